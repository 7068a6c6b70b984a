"""Sending over Redis: what any kombu reads, refused messages again, forks, connections that died, servers that hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue

from creditlane import sending
from creditlane.client import CreditClient, task_message
from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import lane_name
from creditlane.sending import Outgoing, RedisSender
from scripts.embedded import Redis
from tests.broker import Broker, RedisBroker
from tests.conftest import LANES
from tests.support import eventually

LANE_0, LANE_1 = lane_name(0), lane_name(1)


@pytest.fixture
def sender(broker_url: str) -> Iterator[RedisSender]:
    """A sender on an empty database."""
    with closing(RedisSender(broker_url)) as made:
        yield made


@pytest.fixture
def store(broker_url: str) -> Iterator[Any]:
    """A client of that database."""
    with redis.Redis.from_url(broker_url) as made:
        yield made


def message(queue: str, identity: str, exchange: str = "") -> Outgoing:
    """A message that is nothing but its id."""
    return Outgoing(queue, b"{}", {"id": identity}, exchange)


def ids(broker: Broker, *queues: str) -> list[str]:
    """The ids of queues' messages, the oldest first."""
    return [found.headers["id"] for queue in queues for found in broker.messages(queue)]


def test_a_message_is_read_by_kombu_as_its_own(sender: RedisSender, broker_url: str) -> None:
    body = b'{"account":"Zo\xc3\xab"}'
    sender.send([task_message("credits.settle", f"id-{number}", LANE_0, body, "Zoë", "reply") for number in range(2)])
    with Connection(broker_url) as connection:
        ours = [connection.SimpleQueue(LANE_0).get(timeout=5) for _ in range(2)]
        with closing(connection.Producer()) as producer:
            producer.publish(
                [[], {"account": "Zoë"}, {}], routing_key=LANE_1, headers={"id": "x"}, correlation_id="x", timestamp=1
            )
        kombus = connection.SimpleQueue(LANE_1).get(timeout=5)
    first, second = ours
    assert first.decode()[1] == kombus.decode()[1] == {"account": "Zoë"}
    assert (first.content_type, first.content_encoding) == (kombus.content_type, kombus.content_encoding)
    assert first.properties.keys() == kombus.properties.keys()
    assert first.delivery_info == {"exchange": "", "routing_key": LANE_0}
    assert kombus.delivery_info == {"exchange": "", "routing_key": LANE_1}
    assert (first.headers["id"], first.headers["reply"]) == ("id-0", "reply")
    assert first.properties["correlation_id"] == "id-0"
    assert abs(first.properties["timestamp"] - time.time()) < 60
    assert first.delivery_tag != second.delivery_tag


def test_a_block_keeps_the_order_of_each_queue(sender: RedisSender, broker: Broker) -> None:
    sender.send([message(lane_name(number % 3), str(number)) for number in range(3000)])
    for lane in range(3):
        assert ids(broker, lane_name(lane)) == [str(number) for number in range(3000) if number % 3 == lane]


def test_events_reach_whoever_is_bound_at_the_time(sender: RedisSender, broker: Broker) -> None:
    exchange = Exchange("events", type="topic")
    patterns = {"all": "#", "one": "credits.held.lane.007", "words": "credits.*.lane.*", "other": "balance.#"}

    def bind(name: str, pattern: str) -> None:
        with Connection(broker.url) as connection:
            Queue(name, exchange, pattern)(connection.default_channel).declare()

    sender.send([message("credits.held.lane.007", "nobody listens", "events")])
    for name, pattern in patterns.items():
        bind(name, pattern)
    sender.send(
        [message("credits.held.lane.007", "1", "events"), message("credits.held.lane.008", "2", "events"),
         message("balance.changed.lane.007", "3", "events"), message("nothing", "4", "nowhere")]
    )  # fmt: skip
    bind("late", "credits.#")
    sender.send([message("credits.held.lane.007", "5", "events")])
    assert {name: ids(broker, name) for name in (*patterns, "late")} == {
        "all": ["1", "2", "3", "5"], "one": ["1", "5"], "words": ["1", "2", "5"], "other": ["3"], "late": ["5"],
    }  # fmt: skip


def test_what_was_refused_is_sent_again_and_nothing_else(sender: RedisSender, broker: Broker, store: Any) -> None:
    store.set(LANE_0, "in the way")
    block = [message((LANE_0, LANE_1)[number % 2], str(number)) for number in range(6)]
    sending_it = threading.Thread(target=lambda: sender.send(block))
    sending_it.start()
    eventually(lambda: store.exists(LANE_1))
    store.delete(LANE_0)
    sending_it.join(10)
    assert not sending_it.is_alive()
    assert ids(broker, LANE_0, LANE_1) == ["0", "2", "4", "1", "3", "5"]


def test_a_queue_that_goes_on_refusing_is_told_after_a_few_attempts(sender: RedisSender, store: Any) -> None:
    store.set(LANE_0, "in the way")
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError, match=r"'1'.*ResponseError.*send it again"):
        sender.send([message(LANE_0, "1")])
    assert 1 < time.monotonic() - began < 20
    with pytest.raises(BrokerUnavailableError, match="2 messages"):
        sender.send([message(LANE_0, "1"), message(LANE_0, "2")], retry=False)


def test_a_connection_that_died_idle_costs_nothing(sender: RedisSender, broker: Broker, store: Any) -> None:
    sender.send([message(LANE_0, "1")])
    store.client_kill_filter(_type="normal", skipme=True)
    sender.send([message(LANE_0, "2")], retry=False)
    assert ids(broker, LANE_0) == ["1", "2"]


def test_a_server_that_hangs_is_told_in_bounded_time(own_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "READ_SECONDS", 0.5)
    with closing(RedisSender(own_redis.url)) as sender:
        sender.send([message(LANE_0, "1")])
        assert own_redis.pid is not None
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            # The connection stands; then there is none.
            for step in (lambda: sender.depth(LANE_0), lambda: sender.send([message(LANE_0, "2")])):
                began = time.monotonic()
                with pytest.raises(BrokerUnavailableError):
                    step()
                assert time.monotonic() - began < 15
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
        sender.send([message(LANE_0, "3")])
    with closing(RedisBroker(own_redis, 0)) as broker:
        found = ids(broker, LANE_0)
    assert (found[0], found[-1]) == ("1", "3")


def test_a_sender_that_was_interrupted_hears_no_answer_twice(
    sender: RedisSender, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that nobody has read must not be taken for the next one's."""
    sender.send([message(LANE_0, "1")])
    (connection,) = sender._idle
    with monkeypatch.context() as patch:
        patch.setattr(connection, "read_response", lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            sender.send([message(LANE_0, "2")])
    store.set(LANE_1, "in the way")
    with pytest.raises(BrokerUnavailableError):
        sender.send([message(LANE_1, "3")], retry=False)


def test_a_forked_process_sends_over_connections_of_its_own(broker: Broker) -> None:
    with CreditClient(broker.url, lanes=LANES) as client:
        client.settle("alice", id="parent-1")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.settle("alice", id="child-1")
                client.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        (kept,) = client._sender._idle  # type: ignore[attr-defined]
        client._sender._send([message(LANE_0, "parent-2")], False)
        assert client._sender._idle == [kept]  # type: ignore[attr-defined]
    assert sorted(ids(broker, *map(lane_name, range(LANES)))) == ["child-1", "parent-1", "parent-2"]


def test_threads_share_a_sender_and_each_keeps_its_order(sender: RedisSender, broker: Broker) -> None:
    def produce(thread: int) -> None:
        for number in range(50):
            sender.send([message(LANE_0, f"{thread}-{number}-{part}") for part in range(3)])

    threads = [threading.Thread(target=produce, args=(thread,)) for thread in range(sending.CONNECTIONS + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sender._idle) <= sending.CONNECTIONS
    found = ids(broker, LANE_0)
    for producer in range(len(threads)):
        mine = [identity for identity in found if identity.startswith(f"{producer}-")]
        assert mine == [f"{producer}-{number}-{part}" for number in range(50) for part in range(3)]


@pytest.mark.parametrize("path", ["ledger", "one"])
def test_a_database_that_is_no_number_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is a number"):
        CreditClient(f"redis://localhost:6379/{path}")
