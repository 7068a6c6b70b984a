"""The embedded stack: started, stopped, killed and found again, with real servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from scripts import embedded
from scripts.embedded import (
    HOST,
    DirectoryLock,
    Postgres,
    Redis,
    Stack,
    StackError,
    check_port,
    free_port,
    last_lines,
    process_exists,
    start_stack,
    temporary_directory,
    wait_until,
)

pytestmark = pytest.mark.timeout(120)

RUNNER = """
import sys, threading, time
from pathlib import Path
from scripts.embedded import start_stack

def start():
    stack = start_stack(Path(sys.argv[1]))
    with __import__("psycopg").connect(stack.database_url) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    client = __import__("redis").Redis.from_url(stack.broker_url)
    client.set("kept", "7")
    client.execute_command("WAIT", 0, 100)
    print(stack.postgres.pid, stack.redis.pid, flush=True)

if sys.argv[2] == "main":
    start()
else:
    # From a thread the kernel is not asked to end the servers with us: they are left over.
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
sys.stdin.read()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with temporary_directory() as directory:
        yield directory


def rows(stack: Stack, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(stack.database_url) as connection:
        return connection.execute(query.encode()).fetchall()


def client(stack: Stack) -> Any:
    return redis.Redis.from_url(stack.broker_url, decode_responses=True)


def fill(stack: Stack) -> None:
    with psycopg.connect(stack.database_url) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    with closing(client(stack)) as store:
        store.set("kept", "7")


def assert_kept(stack: Stack) -> None:
    assert rows(stack, "SELECT n FROM kept") == [(7,)]
    with closing(client(stack)) as store:
        assert store.get("kept") == "7"


def test_starts_stops_and_finds_its_data_again(place: Path) -> None:
    data = place / "data"
    stack = start_stack(data)
    try:
        fill(stack)
        assert stack.database_url.startswith("postgresql://creditlane:")
        assert stack.broker_url.startswith("redis://:")
        postgres, store = stack.postgres.pid, stack.redis.pid
    finally:
        stack.stop()
    assert not process_exists(postgres)
    assert not process_exists(store)
    stack.stop()  # once more does nothing

    stack = start_stack(data)
    try:
        assert_kept(stack)
    finally:
        stack.stop()


def test_what_it_is_set_to(place: Path) -> None:
    stack = start_stack(place / "data", appendfsync="always", postgres_settings={"work_mem": "5MB"})
    try:
        settings = dict(rows(stack, "SELECT name, setting FROM pg_settings"))
        assert settings["fsync"] == settings["synchronous_commit"] == settings["full_page_writes"] == "on"
        assert settings["listen_addresses"] == "127.0.0.1"
        assert settings["max_connections"] == "200"
        assert settings["data_checksums"] == "on"
        assert settings["work_mem"] == "5120"
        assert rows(stack, "SHOW server_version_num")[0][0].startswith("18")
        assert rows(stack, "SELECT datcollate, pg_encoding_to_char(encoding) FROM pg_database LIMIT 1") == [
            ("C", "UTF8")
        ]
        with closing(client(stack)) as store:
            found = {
                name: store.config_get(name)[name]
                for name in ("appendonly", "appendfsync", "save", "maxmemory-policy", "bind")
            }
        assert found == {
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
            "bind": "127.0.0.1",
        }
    finally:
        stack.stop()


def test_passwords_are_asked_for_and_kept_to_oneself(place: Path) -> None:
    stack = start_stack(place / "data")
    try:
        for server in (stack.postgres, stack.redis):
            path = server.directory / "password"
            password = path.read_text()
            assert len(password) >= 32
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
            assert password not in repr(stack)
            assert password not in repr(server)
            assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
            assert password not in server.log.read_text()
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://creditlane:wrong@{HOST}:{stack.postgres.port}/creditlane")
        with (
            closing(redis.Redis(host=HOST, port=stack.redis.port, retry=Retry(NoBackoff(), 0))) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
    finally:
        stack.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root must change its user")
def test_root_gives_its_privileges_up(place: Path) -> None:
    stack = start_stack(place / "data")
    try:
        for server in (stack.postgres, stack.redis):
            status = Path(f"/proc/{server.pid}/status").read_text()
            ids = {line.split()[0]: line.split()[1:] for line in status.splitlines() if line[:4] in ("Uid:", "Gid:")}
            assert "0" not in ids["Uid:"]
            assert "0" not in ids["Gid:"]
            groups = next(line for line in status.splitlines() if line.startswith("Groups:"))
            assert "0" not in groups.split()[1:]
    finally:
        stack.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root must change its user")
def test_a_place_the_unprivileged_user_cannot_enter_is_named(place: Path) -> None:
    (place / "closed").mkdir(mode=0o700)
    with pytest.raises(StackError, match=f"who cannot enter {place / 'closed'} and so not reach its data"):
        start_stack(place / "closed" / "data")


def test_recovers_from_a_crash_of_the_servers(place: Path) -> None:
    stack = start_stack(place / "data", appendfsync="always")
    fill(stack)
    stack.kill()
    stack = start_stack(place / "data")
    try:
        assert_kept(stack)
    finally:
        stack.stop()


def test_one_server_can_be_restarted_on_its_port(place: Path) -> None:
    stack = start_stack(place / "data", appendfsync="always")
    try:
        fill(stack)
        urls = stack.database_url, stack.broker_url
        stack.redis.kill()
        assert not stack.redis.running
        assert stack.redis.start().running
        stack.postgres.kill()
        stack.postgres.start()
        assert (stack.database_url, stack.broker_url) == urls
        assert_kept(stack)
    finally:
        stack.stop()


def killed_runner(data: Path, thread: str) -> tuple[int, int]:
    """Start a stack in another process, kill that process, and return the ids of its servers."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(data), thread],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(embedded.__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdout, process.stdin:
        postgres, store = map(int, process.stdout.readline().split())
        assert process_exists(postgres)
        assert process_exists(store)
        process.kill()
        process.wait()
    return postgres, store


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must offer it")
def test_the_servers_end_with_a_killed_runner(place: Path) -> None:
    data = place / "data"
    postgres, store = killed_runner(data, "main")
    assert wait_until(lambda: not process_exists(postgres) and not process_exists(store), 20)
    stack = start_stack(data)
    try:
        assert_kept(stack)
    finally:
        stack.stop()


def test_what_a_killed_runner_left_over_is_ended_first(place: Path) -> None:
    data = place / "data"
    postgres, store = killed_runner(data, "other")
    assert process_exists(postgres)
    assert process_exists(store)
    stack = start_stack(data)
    try:
        assert not process_exists(postgres)
        assert not process_exists(store)
        assert_kept(stack)
    finally:
        stack.stop()


def test_a_stranger_with_the_number_of_a_dead_server_is_left_alone(place: Path) -> None:
    data = place / "data"
    stack = start_stack(data)
    fill(stack)
    pid_file = stack.postgres.cluster / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    stack.stop()
    owner = pid_file.parent.stat()
    as_owner = {"user": owner.st_uid, "extra_groups": []} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["sleep", "100"], **as_owner)  # type: ignore[call-overload]
    try:
        # As after a crash of the machine: the files are there, their numbers are somebody else's now.
        for path, text in (
            (pid_file, "\n".join([str(stranger.pid), *lines[1:]]) + "\n"),
            (data / "redis" / "redis.pid", f"{stranger.pid}\n"),
        ):
            path.write_text(text)
            path.chmod(0o600)
            os.chown(path, owner.st_uid, owner.st_gid)
        stack = start_stack(data)
        try:
            assert_kept(stack)
            assert stranger.poll() is None
        finally:
            stack.stop()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_half_made_cluster_is_made_again(place: Path) -> None:
    data = place / "data"
    (data / "postgres" / "cluster.part" / "base").mkdir(parents=True)
    stack = start_stack(data)
    try:
        assert rows(stack, "SELECT 1") == [(1,)]
        assert not (data / "postgres" / "cluster.part").exists()
    finally:
        stack.stop()


def test_a_database_of_its_own_for_each_test(place: Path) -> None:
    stack = start_stack(place / "data")
    try:
        url = stack.create_database("template_one")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE made (n int)")
        copy = stack.create_database('odd "name"', template="template_one")
        with psycopg.connect(stack.postgres.url_of("template_one")) as connection:
            assert connection.execute("SELECT count(*) FROM made").fetchone() == (0,)
        assert copy.endswith('/odd "name"')
        assert stack.create_database("template_one") == url
        stack.postgres.drop_database('odd "name"')
        stack.postgres.drop_database('odd "name"')
    finally:
        stack.stop()


def test_two_runs_do_not_share_a_directory(place: Path) -> None:
    stack = start_stack(place / "data")
    try:
        with pytest.raises(StackError, match=rf"in use by another run \(process {os.getpid()}\).*--data"):
            start_stack(place / "data")
        assert rows(stack, "SELECT 1") == [(1,)]
    finally:
        stack.stop()


def test_a_lock_ends_with_its_release(place: Path) -> None:
    first = DirectoryLock(place)
    with pytest.raises(StackError, match="in use by another run"):
        DirectoryLock(place)
    first.release()
    first.release()
    DirectoryLock(place).release()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Postgres, "so PostgreSQL cannot listen there; .* --postgres-port"),
        (Redis, "so Redis cannot listen there; .* --redis-port"),
    ],
)
def test_a_taken_port_is_named(place: Path, kind: type[Postgres] | type[Redis], sentence: str) -> None:
    with closing(socket.create_server((HOST, 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"Port {port} of 127.0.0.1 is taken, {sentence}"):
            kind(place / "data", port).start()
        with pytest.raises(StackError, match="choose another port with --flower-port"):
            check_port(port, "Flower", "--flower-port")
    # Nothing of the attempt stands in the way of the next one.
    server = kind(place / "data").start()
    server.stop()


def test_a_free_port_is_free() -> None:
    check_port(free_port(), "Redis", "--redis-port")


def test_too_little_space_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 123_456_789

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(StackError, match=r"Only 123 MB are free where .* 300 MB are needed; free some space"):
        start_stack(place / "data")


def test_a_place_that_is_no_directory_is_said(place: Path) -> None:
    (place / "file").write_text("")
    for path in (place / "file", place / "file" / "below"):
        with pytest.raises(StackError, match=r"cannot be used as a data directory .*--data"):
            start_stack(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_not_writable_is_said(place: Path) -> None:
    (place / "data").mkdir(mode=0o500)
    with pytest.raises(StackError, match="permission denied"):
        start_stack(place / "data")


def test_data_of_another_major_version_is_not_touched(place: Path) -> None:
    server = Postgres(place / "data").start()
    server.stop()
    version = server.cluster / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(StackError, match="holds the data of PostgreSQL 17, and this is PostgreSQL 18"):
        server.start()
    version.write_text("18\n")
    server.start().stop()


def test_data_of_a_newer_redis_is_not_overlooked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "data" / "data" / "appendonlydir").mkdir(parents=True)
    monkeypatch.setattr(embedded, "_redis_version", lambda _: (6, 2))
    with pytest.raises(StackError, match=r"was written by Redis 7 or later, and .* is Redis 6\.2"):
        Redis(place / "data").start()


def test_a_lost_password_is_said(place: Path) -> None:
    server = Postgres(place / "data").start()
    server.stop()
    password = server.directory / "password"
    right = password.read_text()
    password.write_text("wrong")
    with pytest.raises(StackError, match="is not that of the data beside it"):
        server.start()
    password.unlink()
    with pytest.raises(StackError, match="password of PostgreSQL cannot be read"):
        server.start()
    password.write_text(right)
    server.start().stop()


def test_a_server_that_ends_at_once_shows_its_log(place: Path) -> None:
    with pytest.raises(StackError, match=r"(?s)Redis did not start.*Bad directive"):
        Redis(place / "data", settings={"no-such-setting": "1"}).start()


def test_an_old_redis_on_the_path_is_passed_over(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = place / "redis-server"
    fake.write_text("#!/bin/sh\necho 'Redis server v=5.0.7 sha=0 malloc=libc bits=64 build=0'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    assert embedded.redis_program() != fake
    fake.write_text("#!/bin/sh\necho 'Redis server v=7.4.0 sha=0 malloc=libc bits=64 build=0'\n")
    assert embedded.redis_program() == fake.resolve()


def test_a_redis_that_is_a_link_is_called_by_its_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = place / "redis-check-rdb"
    several.write_text("#!/bin/sh\n[ \"${0##*/}\" = redis-server ] && echo 'Redis server v=7.0.15 sha=0'\n")
    several.chmod(0o755)
    (place / "redis-server").symlink_to(several)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    assert embedded.redis_program() == place / "redis-server"


def test_a_stopped_server_has_no_process(place: Path) -> None:
    with pytest.raises(StackError, match="Redis is not running"):
        _ = Redis(place / "data").pid


def test_children_do_not_hear_the_terminal(place: Path) -> None:
    with (place / "log").open("wb") as log:
        child = embedded.spawn(["sleep", "100"], log=log)
    try:
        assert os.getpgid(child.pid) == child.pid
    finally:
        embedded.end_process(child, ((signal.SIGTERM, 5.0),))
    assert child.returncode == -signal.SIGTERM


def test_the_end_of_a_log(place: Path) -> None:
    log = place / "log"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {n}\n" for n in range(100_000)))
    assert last_lines(log, 2) == "line 99998\nline 99999"
