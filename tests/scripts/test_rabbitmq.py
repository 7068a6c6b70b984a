"""The embedded RabbitMQ: started, stopped, killed and found again, with a real node."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import amqp
import pytest

from scripts import rabbitmq
from scripts.embedded import HOST, DirectoryLock, StackError, process_exists, temporary_directory, wait_until
from scripts.rabbitmq import VHOST, RabbitMQ, is_installed, rabbitmq_program
from tests import brokers
from tests.brokers import REQUIRE, need_rabbitmq

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("rabbitmq")]

QUEUE = "lane.001"

RUNNER = """
import sys, threading
from pathlib import Path
from scripts.rabbitmq import RabbitMQ

def start():
    print(RabbitMQ(Path(sys.argv[1])).start().pid, flush=True)

if sys.argv[2] == "main":
    start()
else:
    # From a thread the kernel is not asked to end the node with us: it is left over.
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
sys.stdin.read()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    need_rabbitmq()
    with temporary_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQ]:
    need_rabbitmq()
    with temporary_directory() as directory:
        server = RabbitMQ(directory / "rabbitmq").start()
        yield server
        server.stop()


def connect(server: RabbitMQ, vhost: str = VHOST, user: str = "", password: str = "") -> amqp.Connection:
    url = server.url_of(vhost)
    owner, _, secret = url.removeprefix("amqp://").partition("@")[0].partition(":")
    connection = amqp.Connection(
        f"{HOST}:{server.port}",
        userid=user or owner,
        password=password or secret,
        virtual_host=vhost,
        confirm_publish=True,
    )
    connection.connect()
    return connection


def declare(channel: amqp.Channel, *, passive: bool = False) -> int:
    """Declare the quorum queue; returns how many messages it has."""
    arguments = None if passive else {"x-queue-type": "quorum", "x-single-active-consumer": True}
    found = channel.queue_declare(QUEUE, passive=passive, durable=True, auto_delete=False, arguments=arguments)
    return int(found.message_count)


def fill(server: RabbitMQ, count: int, vhost: str = VHOST) -> None:
    with connect(server, vhost) as connection:
        channel = connection.channel()
        declare(channel)
        for number in range(count):
            message = amqp.Message(str(number), delivery_mode=2)
            channel.basic_publish_confirm(message, routing_key=QUEUE, mandatory=True)


def take(server: RabbitMQ, count: int, vhost: str = VHOST) -> list[str]:
    """Take so many messages as the queue's one active consumer; there are no more."""
    found: list[str] = []
    with connect(server, vhost) as connection:
        channel = connection.channel()
        channel.basic_consume(QUEUE, callback=lambda message: found.append(message.body))
        while len(found) < count:
            connection.drain_events(timeout=10)
        assert declare(channel, passive=True) == 0
        channel.basic_ack(0, multiple=True)
    return found


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def working_in(directory: Path) -> set[int]:
    """Every process that runs in a data directory, whatever its program."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            running_in = Path(os.readlink(entry / "cwd"))
        except OSError:
            continue
        if directory == running_in or directory in running_in.parents:
            found.add(int(entry.name))
    return found


def listeners(pids: set[int]) -> set[tuple[str, int]]:
    """The addresses at which any of these processes listens."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table, size in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found.add((socket.inet_ntop(size, b"".join(words)), int(port, 16)))
    return found


# --- A node that runs ---


def test_a_confirmed_message_is_taken(node: RabbitMQ) -> None:
    fill(node, 3)
    assert take(node, 3) == ["0", "1", "2"]


def test_a_virtual_host_of_its_own_for_each_test(node: RabbitMQ) -> None:
    one, other = node.create_vhost("one"), node.create_vhost("an other/one")
    assert one == node.url_of("one")
    assert other.endswith("/an%20other%2Fone")
    node.create_vhost("one")
    fill(node, 2, "one")
    fill(node, 1, "an other/one")
    assert take(node, 2, "one") == ["0", "1"]
    assert take(node, 1, "an other/one") == ["0"]
    node.delete_vhost("one")
    node.delete_vhost("one")
    with pytest.raises(amqp.NotAllowed):
        connect(node, "one")
    node.delete_vhost("an other/one")


def test_a_user_may_do_what_it_was_given(node: RabbitMQ) -> None:
    fill(node, 0)
    url = node.add_user("writer", "^$", "^amq\\.default$", "^$", password="with a: /@")
    assert url == f"amqp://writer:with%20a%3A%20%2F%40@{HOST}:{node.port}/{VHOST}"
    with connect(node, user="writer", password="with a: /@") as connection:
        channel = connection.channel()
        channel.basic_publish_confirm(amqp.Message("0"), routing_key=QUEUE, mandatory=True)
        with pytest.raises(amqp.AccessRefused):
            channel.basic_get(QUEUE)
    assert take(node, 1) == ["0"]
    assert node.add_user("writer", "^$", "^$", "^$") != url


def test_who_has_not_the_password_stays_outside(node: RabbitMQ) -> None:
    for user, password in (("creditlane", "guess"), ("guest", "guest")):
        with pytest.raises(amqp.AccessRefused):
            connect(node, user=user, password=password)
    assert [user["name"] for user in node.manage("GET", "/api/users") if user["tags"]] == ["creditlane"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_listens_on_loopback_only(node: RabbitMQ) -> None:
    found = listeners(working_in(node.directory))
    assert {address for address, _ in found} <= {HOST, "::1"}
    assert {(HOST, node.port), (HOST, node.management_port)} <= found
    # AMQP, the management API, the distribution, and the port mapper at one or two addresses.
    assert len({port for _, port in found}) == 4


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root has privileges to give up")
def test_root_gives_its_privileges_up(node: RabbitMQ) -> None:
    for pid in working_in(node.directory):
        status = Path(f"/proc/{pid}/status").read_text()
        assert "\nUid:\t0\t" not in status
        assert "\nGroups:\t \n" in status


def test_secrets_are_kept_to_oneself(node: RabbitMQ) -> None:
    password = (node.directory / "password").read_text()
    cookie = (node.directory / "data" / ".erlang.cookie").read_text()
    assert stat.S_IMODE(node.directory.stat().st_mode) == 0o700
    for pid in working_in(node.directory):
        shown = Path(f"/proc/{pid}/cmdline").read_text()
        assert password not in shown
        assert cookie not in shown
    assert password not in node.log.read_text()
    assert password not in repr(node)


def test_what_the_server_refuses_is_said(node: RabbitMQ) -> None:
    with pytest.raises(StackError, match=r"RabbitMQ refused GET /api/vhosts/none: 404"):
        node.manage("GET", "/api/vhosts/none")


# --- Ends and new starts ---


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_stop_leaves_nothing_running(place: Path) -> None:
    server = RabbitMQ(place / "data").start()
    fill(server, 2)
    processes = family(server.pid) | working_in(server.directory)
    assert len(processes) >= 3
    server.stop()
    assert not server.running
    assert wait_until(lambda: not any(map(process_exists, processes)), 10)
    DirectoryLock(server.directory).release()
    server.stop()
    server.start()
    assert take(server, 2) == ["0", "1"]
    server.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_was_confirmed_survives_a_crash(place: Path) -> None:
    server = RabbitMQ(place / "data").start()
    port, url = server.port, server.url
    with connect(server) as connection:
        channel = connection.channel()
        declare(channel)
        for number in range(50):
            channel.basic_publish_confirm(amqp.Message(str(number), delivery_mode=2), routing_key=QUEUE)
        held: list[str] = []  # in hand when the node dies: it comes back to its place
        channel.basic_qos(0, 1, False)
        channel.basic_consume(QUEUE, callback=lambda message: held.append(message.body))
        connection.drain_events(timeout=10)
        assert held == ["0"]
        assert server.await_queue_on_disk(QUEUE)
        processes = working_in(server.directory)
        server.kill()
        connection.collect()
    assert wait_until(lambda: not any(map(process_exists, processes)), 10)
    server.start()
    assert (server.port, server.url) == (port, url)
    assert take(server, 50) == [str(number) for number in range(50)]
    server.kill()


def killed_runner(data: Path, thread: str) -> set[int]:
    """Start a node in another process, kill that process, and return the ids of the node's processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(data), thread],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(rabbitmq.__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdout, process.stdin:
        processes = family(int(process.stdout.readline())) | working_in(data)
        assert all(map(process_exists, processes))
        process.kill()
        process.wait()
    return processes


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must offer it")
def test_the_node_ends_with_a_killed_runner(place: Path) -> None:
    processes = killed_runner(place / "data", "main")
    assert len(processes) >= 3
    assert wait_until(lambda: not any(map(process_exists, processes)), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_killed_runner_left_over_is_ended_first(place: Path) -> None:
    processes = killed_runner(place / "data", "other")
    try:
        assert any(map(process_exists, processes))
        server = RabbitMQ(place / "data").start()
        assert not any(map(process_exists, processes))
        server.kill()
    finally:
        for pid in filter(process_exists, processes):
            os.kill(pid, signal.SIGKILL)


# --- What stands in the way ---


def test_a_taken_port_is_named(place: Path) -> None:
    with closing(socket.create_server((HOST, 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"Port {port} of 127.0.0.1 is taken, so RabbitMQ cannot listen there"):
            RabbitMQ(place / "data", port).start()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_node_that_cannot_start_shows_its_log_and_leaves_nothing(place: Path) -> None:
    server = RabbitMQ(place / "data", settings={"no.such.setting": "1"})
    with pytest.raises(
        StackError, match=r"RabbitMQ did not start; the end of its log (?s:.*)failed_to_prepare_configuration"
    ):
        server.start()
    assert wait_until(lambda: not working_in(server.directory), 10)


def test_a_password_of_other_data_is_said(place: Path) -> None:
    server = RabbitMQ(place / "data").start()
    server.kill()
    (server.directory / "password").write_text("another")
    with pytest.raises(StackError, match="is not that of the data beside it"):
        server.start()
    assert not server.running


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "DEBIAN_PROGRAM", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not is_installed()
    with pytest.raises(StackError, match="apt install rabbitmq-server"):
        RabbitMQ(tmp_path / "data").start()
    (tmp_path / "rabbitmq-server").write_text("")
    (tmp_path / "rabbitmq-server").chmod(0o755)
    with pytest.raises(StackError, match="install Erlang"):
        rabbitmq_program()


def test_a_test_without_it_is_skipped_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "is_installed", lambda: False)
    monkeypatch.delenv(REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="RabbitMQ, which is not installed"):
        need_rabbitmq()
    monkeypatch.setenv(REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match=f"{REQUIRE} is set"):
        need_rabbitmq()
