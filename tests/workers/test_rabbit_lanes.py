"""Lanes on a real RabbitMQ: letting go, reading no more than there is room for, noticing what nobody says, poison."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import amqp
import pytest
from celery import Celery
from kombu import Connection, Queue
from kombu.asynchronous import Hub

from creditlane.client import CreditClient
from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import lane_name, lane_of
from creditlane.rabbitmq import DEAD, LANE, LANES_EXCHANGE, connect, declare_exchange
from scripts.embedded import temporary_directory
from scripts.rabbitmq import RabbitMQ
from tests.broker import RabbitBroker
from tests.brokers import need_rabbitmq
from tests.conftest import LANES, Spawn
from tests.support import Worker, eventually, owned_lanes, rows, value
from workers import rabbit_lanes
from workers.lane_consumer import envelope
from workers.rabbit_lanes import RabbitLanes, ReplacedError, tolerant_frames
from workers.redis_lanes import UNREADABLE

pytestmark = pytest.mark.xdist_group("rabbitmq")

LANE_0, LANE_1 = lane_name(0), lane_name(1)


class Owner:
    """One process's lanes, and what it was given."""

    def __init__(self, url: str, room: int = 1000, prefetch: int = 10, heartbeat: int = 0) -> None:
        self.connection = Connection(
            url, heartbeat=heartbeat, transport_options={"read_timeout": 5, "frame_handler": tolerant_frames}
        )
        connect(self.connection)
        self.amqp = self.connection.connection
        self.got: list[Any] = []
        self.room = room
        self.hub = Hub()
        consumer = SimpleNamespace(
            connection=self.connection,
            task_consumer=SimpleNamespace(on_message=self.got.append),
            app=SimpleNamespace(conf=SimpleNamespace(accept_content=["json"])),
            connection_errors=self.connection.connection_errors,
            on_decode_error=lambda message, error: self.got.append(message),
        )
        self.lanes = RabbitLanes(consumer, self.hub, lambda: self.room - len(self.got), lambda step: step(), prefetch)

    def poll(self) -> bool:
        """Bring what has arrived; for conditions, since it is nothing to wait for."""
        self.lanes.poll()
        return False

    def await_messages(self, count: int) -> list[str]:
        """Poll until so many have come; their bodies."""
        eventually(lambda: self.poll() or len(self.got) >= count, what=f"{count} messages")
        return self.bodies()

    def bodies(self) -> list[str]:
        """What has come, the oldest first."""
        return [message.body.decode("latin-1") if message.body else "" for message in self.got]


@pytest.fixture
def rabbit(rabbitmq: RabbitMQ) -> Iterator[RabbitBroker]:
    """An empty virtual host."""
    broker = RabbitBroker(rabbitmq)
    yield broker
    broker.remove()


Begin = Callable[..., Owner]


@pytest.fixture
def begin(rabbit: RabbitBroker) -> Iterator[Begin]:
    """Make owners of lanes."""
    made: list[Owner] = []

    def start(url: str = "", **options: Any) -> Owner:
        made.append(Owner(url or rabbit.url, **options))
        return made[-1]

    yield start
    for owner in made:
        owner.connection.collect()
        owner.hub.close()


def fill(rabbit: RabbitBroker, lane: str, numbers: range) -> list[str]:
    """Send messages that are nothing but a number; returns their bodies."""
    bodies = [str(number) for number in numbers]
    rabbit.publish(lane, *(amqp.Message(body, application_headers={"task": "x"}) for body in bodies))
    return bodies


# Taking and letting go


def test_a_lane_let_go_returns_what_was_prefetched_to_its_place(rabbit: RabbitBroker, begin: Begin) -> None:
    leaving, heir = begin(), begin()
    first = fill(rabbit, LANE_0, range(15))
    leaving.lanes.take([LANE_0])
    leaving.await_messages(10)
    heir.lanes.take([LANE_0])
    leaving.lanes.acknowledge(leaving.got[:4])
    later = fill(rabbit, LANE_0, range(15, 30))
    leaving.lanes.forget([LANE_0])
    heir.await_messages(10)
    while len(heir.got) < 26:
        heir.lanes.acknowledge(heir.got)
        heir.await_messages(min(26, len(heir.got) + 5))
    assert heir.bodies() == (first + later)[4:]


def test_nothing_of_lanes_that_are_let_go_is_delivered_any_more(rabbit: RabbitBroker, begin: Begin) -> None:
    names = [lane_name(number) for number in range(4)]
    for name in names:
        fill(rabbit, name, range(50))
    owner = begin(room=1, prefetch=50)
    owner.lanes.take(names)
    owner.await_messages(1)
    eventually(lambda: not any(rabbit.depth(name) for name in names))
    owner.lanes.forget(names[1:])  # what is in the socket is read while one channel after the other closes
    assert {message.delivery_info["routing_key"] for message in owner.got[1:]} <= {names[0]}
    eventually(lambda: all(rabbit.depth(name) == 50 for name in names[1:]))


def test_acknowledging_touches_no_other_lane_and_nothing_newer(rabbit: RabbitBroker, begin: Begin) -> None:
    owner = begin()
    fill(rabbit, LANE_0, range(5))
    fill(rabbit, LANE_1, range(10, 15))
    owner.lanes.take([LANE_0, LANE_1])
    owner.await_messages(10)
    owner.lanes.acknowledge(message for message in owner.got if message.body in (b"0", b"1", b"2"))
    owner.lanes.close()
    eventually(lambda: (rabbit.depth(LANE_0), rabbit.depth(LANE_1)) == (2, 5))


def test_a_message_looks_alike_when_it_comes_again(rabbit: RabbitBroker, begin: Begin) -> None:
    """Its quarantine row is known by its headers: delivered twice it must not be two."""
    many = amqp.Message("with headers", application_headers={"task": "1", "id": {"z": 1, "a": [2]}, "b": 3})
    rabbit.publish(LANE_0, amqp.Message("bare"), many)
    seen = []
    for _ in range(3):
        owner = begin()
        owner.lanes.take([LANE_0])
        owner.await_messages(2)
        seen.append([envelope(message) for message in owner.got])
        assert [message.delivery_info["redelivered"] for message in owner.got] == [len(seen) > 1] * 2
        owner.lanes.close()
    assert seen[0] == seen[1] == seen[2]


# No more than there is room for


def test_taking_lanes_brings_nothing_that_there_is_no_room_for(rabbit: RabbitBroker, begin: Begin) -> None:
    names = [lane_name(number) for number in range(4)]
    for name in names:
        fill(rabbit, name, range(20))
    owner = begin(room=5, prefetch=20)
    owner.lanes.take(names)
    assert owner.got == []
    owner.await_messages(5)
    for _ in range(10):
        owner.lanes.poll()
    assert len(owner.got) == 5


def test_reading_stops_while_the_buffer_is_full_and_goes_on_after(rabbit: RabbitBroker, begin: Begin) -> None:
    owner = begin(room=5, prefetch=50)
    loop = owner.hub.create_loop()
    fill(rabbit, LANE_0, range(50))
    owner.lanes.take([LANE_0])
    eventually(lambda: [next(loop), len(owner.got) >= 5][1])
    eventually(lambda: not owner.lanes._readable() or not owner.hub.readers)
    assert (len(owner.got), owner.hub.readers) == (5, {})
    owner.room = 1000
    owner.lanes.poll()
    eventually(lambda: [next(loop), len(owner.got) >= 50][1])
    assert owner.bodies() == [str(number) for number in range(50)]
    assert owner.hub.readers


def forget_heartbeats(owner: Owner) -> None:
    """As if nothing had been heard of the broker for an hour."""
    owner.amqp.last_heartbeat_received = time.monotonic() - 3600
    owner.amqp.prev_recv = owner.amqp.bytes_recv


def test_a_full_buffer_is_not_taken_for_a_broker_that_is_gone(rabbit: RabbitBroker, begin: Begin) -> None:
    owner = begin(room=5, prefetch=50, heartbeat=30)
    fill(rabbit, LANE_0, range(50))
    owner.lanes.take([LANE_0])
    owner.await_messages(5)
    forget_heartbeats(owner)
    owner.lanes.poll()
    owner.amqp.heartbeat_tick()
    assert len(owner.got) == 5
    owner.room = 50
    owner.await_messages(50)
    owner.room = 0
    eventually(lambda: not (owner.poll() or owner.lanes._readable()))
    forget_heartbeats(owner)
    owner.lanes.poll()
    with pytest.raises(amqp.ConnectionForced):  # nothing waits, and nothing was heard
        owner.amqp.heartbeat_tick()


def test_heartbeats_are_heard_while_there_are_no_lanes_and_no_room(rabbit: RabbitBroker, begin: Begin) -> None:
    """As while the database is away."""
    owner = begin(room=0, heartbeat=1)
    heard = owner.amqp.bytes_recv
    eventually(lambda: owner.poll() or owner.amqp.bytes_recv > heard, 5)


class Trickle:
    """A proxy that can keep the rest of what the broker says back."""

    def __init__(self, url: str) -> None:
        found = urlsplit(url)
        self.broker = found.hostname, found.port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.allowed: int | None = None
        """How many bytes more may pass; None for any number."""
        self.held = threading.Event()
        port = self.listener.getsockname()[1]
        self.url = url.replace(f":{found.port}/", f":{port}/")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        client, _ = self.listener.accept()
        server = socket.create_connection(self.broker)
        threading.Thread(target=self._up, args=(client, server), daemon=True).start()
        with suppress(OSError):
            self._down(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        while data := server.recv(65536):
            while data:
                part = data if self.allowed is None else data[: self.allowed]
                if self.allowed is not None:
                    self.allowed -= len(part)
                client.sendall(part)
                data = data[len(part) :]
                if data and not part:
                    self.held.set()
                    time.sleep(0.01)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)


def test_the_rest_of_a_frame_is_not_waited_for(
    rabbit: RabbitBroker, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbit_lanes, "FRAME_SECONDS", 0.05)
    proxy = Trickle(rabbit.url)
    owner = begin(proxy.url)
    owner.lanes.take([LANE_0])
    for kept in (3, 20, 90, 150):
        owner.got.clear()
        proxy.held.clear()
        proxy.allowed = kept
        rabbit.publish(LANE_0, amqp.Message("x" * 300, application_headers={"task": "x"}))
        assert proxy.held.wait(10)
        began, cpu = time.monotonic(), time.thread_time()
        while time.monotonic() - began < 0.3:
            owner.lanes.poll()
            time.sleep(0.01)
        assert time.monotonic() - began < 5
        assert time.thread_time() - cpu < 0.2, "it turned in circles"
        assert owner.got == []
        proxy.allowed = None
        assert owner.await_messages(1) == ["x" * 300]


# What nobody says


def test_a_connection_that_is_gone_or_was_replaced_is_noticed(rabbit: RabbitBroker, begin: Begin) -> None:
    for replace in (False, True):
        owner = begin()
        owner.lanes.take([LANE_0])
        owner.lanes.check()
        owner.connection.collect()
        if replace:
            owner.connection.connect()
        with pytest.raises(ReplacedError):
            owner.lanes.check()
        if not replace:
            with pytest.raises(ReplacedError):
                owner.lanes.poll()


def swallow(owner: Owner, error: type[Exception]) -> None:
    """Let the broker's word arrive where nobody hears it, as in the loop's own first look."""

    def heard() -> bool:
        try:
            owner.lanes.poll()
        except error:
            return True
        return False

    eventually(heard)


def test_a_channel_that_the_broker_closed_is_noticed_though_the_library_opened_it_again(
    rabbit: RabbitBroker, begin: Begin
) -> None:
    owner = begin()
    owner.lanes.take([LANE_0, LANE_1])
    owner.lanes.channels[LANE_0].channel.basic_ack(17)
    swallow(owner, amqp.PreconditionFailed)
    assert owner.lanes.channels[LANE_0].channel.is_open
    with pytest.raises(ReplacedError, match=LANE_0):
        owner.lanes.check()


def test_a_consumer_that_the_broker_cancelled_is_noticed(rabbit: RabbitBroker, begin: Begin) -> None:
    owner = begin()
    owner.lanes.take([LANE_0, LANE_1])
    owner.lanes.check()
    with closing(rabbit.connect()) as connection:
        connection.channel().queue_delete(LANE_0)
    swallow(owner, amqp.ConsumerCancelled)
    with pytest.raises(ReplacedError, match=LANE_0):
        owner.lanes.check()


def test_a_lane_with_other_arguments_is_told_and_the_others_are_served(
    rabbit: RabbitBroker, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(rabbit.connect()) as connection:
        connection.channel().queue_declare(
            LANE_0, durable=True, auto_delete=False, arguments={**LANE, "x-max-length": 5}
        )
    fill(rabbit, LANE_1, range(3))
    owner = begin()
    assert owner.lanes.take([LANE_0, LANE_1]) == [LANE_1]
    assert owner.await_messages(3) == ["0", "1", "2"]
    for _ in range(3):
        assert owner.lanes.take([LANE_0]) == []
    assert len(caplog.messages) == 1
    assert "x-max-length" in caplog.text
    assert "delete it" in caplog.text
    owner.lanes.check()
    with closing(rabbit.connect()) as connection:
        connection.channel().queue_delete(LANE_0)
    owner.lanes.refused[LANE_0] = time.monotonic()
    assert owner.lanes.take([LANE_0]) == [LANE_0]
    fill(rabbit, LANE_0, range(7, 9))
    assert owner.await_messages(5)[3:] == ["7", "8"]


# Poison


class Raw(amqp.Message):
    """A message whose properties are these bytes."""

    raw: bytes = b""

    def _serialize_properties(self) -> bytes:
        return self.raw


def raw(flags: int, properties: bytes) -> Raw:
    """Properties that no client of ours would write."""
    message = Raw("kept")
    message.raw = flags.to_bytes(2, "big") + properties
    return message


def table(*items: bytes) -> bytes:
    content = b"".join(items)
    return len(content).to_bytes(4, "big") + content


CONTENT_TYPE, HEADERS, REPLY_TO = 0x8000, 0x2000, 0x0200

UNDECODABLE = {
    "a content type that is no text": raw(CONTENT_TYPE, b"\x02\xff\xfe"),
    "an address that is no text": raw(REPLY_TO, b"\x03a\xc3("),
    "a time beyond all calendars": raw(HEADERS, table(b"\x01tT" + b"\xff" * 8)),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_what_cannot_be_decoded_comes_in_its_turn_and_ends_nothing(
    name: str, rabbit: RabbitBroker, begin: Begin
) -> None:
    rabbit.publish(LANE_0, amqp.Message("before"), UNDECODABLE[name], amqp.Message("after"))
    owner = begin()
    owner.lanes.take([LANE_0])
    assert owner.await_messages(3) == ["before", "kept", "after"]
    assert [message.content_type for message in owner.got] == [None, UNREADABLE, None]
    properties = bytes.fromhex(owner.got[1].headers["undecoded"])
    assert properties.endswith(UNDECODABLE[name].raw[2:])


def test_a_body_is_kept_in_its_bytes_whatever_it_says_of_itself(rabbit: RabbitBroker, begin: Begin) -> None:
    bodies = [b"\xff\xfea\x00", b"\x00\x01\xfe", "é".encode("latin-1"), b"x"]
    for body, encoding in zip(bodies, ("utf-16", "utf-8", "latin-1", "rot13"), strict=True):
        rabbit.publish(LANE_0, amqp.Message(body, content_encoding=encoding))
    owner = begin()
    owner.lanes.take([LANE_0])
    owner.await_messages(4)
    assert [message.body for message in owner.got] == bodies


def test_an_expired_message_is_kept_among_the_dead(rabbit: RabbitBroker, begin: Begin) -> None:
    rabbit.publish(LANE_0, amqp.Message("late", expiration="1", delivery_mode=2))
    eventually(lambda: rabbit.depth(DEAD) == 1)
    assert rabbit.depth(LANE_0) == 0


# With workers


@pytest.fixture
def broker_kind() -> str:
    """What follows starts workers on RabbitMQ."""
    return "rabbitmq"


def done(database: str) -> int:
    """How many operations the ledger has answered."""
    return int(value(database, "SELECT count(*) FROM operations"))


def test_a_lane_that_is_deleted_is_made_again_and_one_with_other_arguments_stops_nobody(
    spawn: Spawn, database: str, client: CreditClient, broker: RabbitBroker
) -> None:
    accounts = {lane_of(account, LANES): account for account in map(str, range(100))}
    wrong, gone, *_ = sorted(accounts)
    with closing(broker.connect()) as connection:
        other = {**LANE, "x-max-length": 1000}
        channel = connection.channel()
        channel.queue_declare(wrong, durable=True, auto_delete=False, arguments=other)
        declare_exchange(channel)
        channel.queue_bind(wrong, LANES_EXCHANGE, wrong)
    worker = spawn("worker")
    eventually(lambda: owned_lanes(database) == LANES)
    for lane, account in accounts.items():
        client.open(account, id="open", wait=None if lane == wrong else 20)
    assert worker.logged().count(f"{wrong} is not consumed") == 1
    assert "Connection to broker lost" not in worker.logged()
    with closing(broker.connect()) as connection:
        connection.channel().queue_delete(gone)
    eventually(lambda: broker.depth(gone) is not None)
    client.settle(accounts[gone], id="after", wait=20)
    assert done(database) == len(accounts)
    assert worker.running


POISON = {
    "no headers": amqp.Message(b"[[],{},{}]", content_type="application/json"),
    "headers of every kind": amqp.Message(
        b"[[],{},{}]",
        content_type="application/json",
        application_headers={
            "task": "credits.consume", "id": datetime(2026, 1, 1, tzinfo=UTC), "a": Decimal("1.5"),
            "b": [1, {"c": None}], "d": {"e": b"\xff"}, "f": 1.5, "g": True, "h": 2**62, "compression": {"x": 1},
        },
    ),
    "a task that is a table": amqp.Message(b"x", application_headers={"task": {"a": 1}, "id": "i"}),
    "a name that is no text": amqp.Message(b"x", application_headers={"task": b"\xff\xfe", "id": b"\xff"}),
    "a content type of another kind": amqp.Message(
        b"\x80\x04}", content_type="application/x-python-serialize", application_headers={"task": "credits.consume"}
    ),
    "bytes": amqp.Message(bytes(range(256)), content_type="application/octet-stream"),
    "utf-16": amqp.Message('{"a":1}'.encode("utf-16"), content_type="application/json", content_encoding="utf-16"),
    "an answer to nowhere": amqp.Message(
        b"[[],{},{}]", content_type="application/json", reply_to="\x00 no such queue", correlation_id="é" * 100,
        priority=255, application_headers={"task": "credits.consume", "id": "nowhere"},
    ),
    "every other property": amqp.Message(b"", type="x", app_id="y", message_id="z", timestamp=2**63),
}  # fmt: skip


def test_poison_of_amqps_own_is_kept_once_and_its_neighbours_are_applied_in_order(
    spawn: Spawn, database: str, client: CreditClient, broker: RabbitBroker
) -> None:
    lane = lane_of("alice", LANES)
    client.open("alice", id="open")
    for number, poison in enumerate(POISON.values()):
        broker.publish(lane, poison)
        client.consume("alice", feature="export", id=f"consume-{number}")
    undecodable = [*UNDECODABLE.values()]
    broker.publish(lane, *undecodable)
    # The first worker commits what has come by then, and dies before it acknowledges: all of it comes again.
    doomed = spawn("doomed", CREDITLANE_CRASH_AT="after-commit")
    eventually(lambda: not doomed.running)
    worker = spawn("worker")
    client.settle("alice", id="last", wait=20)
    assert rows(database, "SELECT operation FROM operations ORDER BY number") == [
        ("open",), *((f"consume-{number}",) for number in range(len(POISON))), ("last",)
    ]  # fmt: skip
    kept = rows(database, "SELECT body, times_seen FROM quarantine WHERE body <> 'kept' ORDER BY id")
    assert [body for body, _ in kept] == [poison.body for poison in POISON.values()]
    seen = [times for _, times in kept]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 2
    # What cannot be decoded is not recognised: all of it is kept, and again what was committed before.
    again = value(database, "SELECT count(*) FROM quarantine WHERE body = 'kept'")
    assert again in range(len(undecodable), 2 * len(undecodable) + 1)
    if seen[-1] == 1:
        assert again == len(undecodable)
    assert "Traceback" not in worker.logged()
    assert worker.running


def test_a_client_of_celerys_own_reads_its_answers_through_its_queue(
    lane_worker: Worker, spawn: Spawn, broker: RabbitBroker
) -> None:
    spawn("general", kind="general")
    # Celery does not notice that a message found no queue.
    eventually(lambda: broker.depth(lane_of("alice", LANES)) is not None)
    eventually(lambda: broker.depth("queries") is not None)
    with Celery("elsewhere", broker=broker.url, backend="rpc://") as app:
        sent = [
            app.send_task(name, kwargs=arguments, queue=Queue(lane_of("alice", LANES), no_declare=True))
            for name, arguments in [
                ("credits.open", {"account": "alice"}),
                ("credits.consume", {"account": "alice", "feature": "image", "quantity": 8}),
                ("credits.consume", {"account": "alice", "amount": 1.5}),
            ]
        ]
        assert sent[0].get(timeout=20)["status"] == "applied"
        assert sent[1].get(timeout=20)["charged"] == "1"
        with pytest.raises(Exception, match="invalid_message"):
            sent[2].get(timeout=20)
        asked = app.send_task("queries.balance", kwargs={"account": "alice"}, queue="queries")
        assert asked.get(timeout=30)["available"] == "49"


@pytest.mark.timeout(180)
def test_a_node_killed_under_load_loses_nothing_that_it_confirmed(spawn: Spawn, database: str) -> None:
    need_rabbitmq()
    with temporary_directory() as directory:
        node = RabbitMQ(directory / "rabbitmq").start()
        sent: dict[str, list[str]] = {f"account-{number}": [] for number in range(8)}
        with CreditClient(node.url, lanes=LANES) as client:
            worker = spawn("worker", CREDITLANE_BROKER_URL=node.url, CREDITLANE_BATCH_MESSAGES="20")
            eventually(lambda: owned_lanes(database) == LANES)
            for account in sent:
                client.open(account, id="open", wait=30)
                sent[account].append("open")
            for lane in {lane_of(account, LANES) for account in sent}:
                assert node.await_queue_on_disk(lane)
            stop = threading.Event()

            def produce() -> None:
                number = 0
                while not stop.is_set():
                    for account, identities in sent.items():
                        while not stop.is_set():
                            try:
                                client.consume(account, feature="export", id=f"c-{number}")
                            except BrokerUnavailableError:
                                continue
                            identities.append(f"c-{number}")
                            break
                    number += 1

            producer = threading.Thread(target=produce)
            producer.start()
            try:
                eventually(lambda: done(database) > 200, 60)
                node.kill()
                node.start()
                before = done(database)
                eventually(lambda: done(database) > before + 200, 90)
            finally:
                stop.set()
                producer.join()
            last = {account: identities[-1] for account, identities in sent.items()}
            eventually(lambda: all(
                rows(database, "SELECT 1 FROM operations WHERE account = %s AND operation = %s", account, identity)
                for account, identity in last.items()
            ), 60)  # fmt: skip
            assert worker.running
        found: dict[str, list[str]] = {}
        for account, operation in rows(database, "SELECT account, operation FROM operations ORDER BY account, number"):
            found.setdefault(account, []).append(operation)
        # The last attempt of a stopped producer may have arrived unconfirmed.
        assert {account: ids[: len(sent[account])] for account, ids in found.items()} == sent
        node.stop()
