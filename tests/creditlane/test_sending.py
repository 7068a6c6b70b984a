"""Sending over RabbitMQ: confirmed or raised in bounded time, refused messages again, forks, connections that died."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import amqp
import pytest
from kombu import Connection

from creditlane import answers, sending
from creditlane import rabbitmq as rabbitmq_module
from creditlane.answers import RabbitAnswers
from creditlane.client import CreditClient
from creditlane.errors import BrokerUnavailableError, NoAnswerError
from creditlane.lanes import lane_name, lane_of
from creditlane.rabbitmq import DEAD, LANE, LANES_EXCHANGE, QUORUM, Confirms, declare_exchange
from creditlane.sending import Outgoing, RabbitSender
from scripts.embedded import free_port
from scripts.rabbitmq import RabbitMQ
from tests.broker import RabbitBroker
from tests.conftest import LANES
from tests.support import eventually

pytestmark = pytest.mark.xdist_group("rabbitmq")

LANE_0, LANE_1 = lane_name(0), lane_name(1)


@pytest.fixture
def rabbit(rabbitmq: RabbitMQ) -> Iterator[RabbitBroker]:
    """An empty virtual host."""
    broker = RabbitBroker(rabbitmq)
    yield broker
    broker.remove()


@pytest.fixture
def sender(rabbit: RabbitBroker) -> Iterator[RabbitSender]:
    """A sender on it."""
    with closing(RabbitSender(rabbit.url)) as made:
        yield made


def message(queue: str, identity: str, exchange: str = "") -> Outgoing:
    """A message that is nothing but its id."""
    return Outgoing(queue, b"{}", {"id": identity}, exchange)


def ids(rabbit: RabbitBroker, lane: str) -> list[str]:
    """The ids of a lane's messages, the oldest first."""
    return [found.headers["id"] for found in rabbit.messages(lane)]


def small(rabbit: RabbitBroker, lane: str, length: int) -> None:
    """Make a lane that is full soon."""
    with closing(rabbit.connect()) as connection:
        channel = connection.channel()
        channel.queue_declare(DEAD, durable=True, auto_delete=False, arguments=QUORUM)
        channel.queue_declare(lane, durable=True, auto_delete=False, arguments={**LANE, "x-max-length": length})
        declare_exchange(channel)
        channel.queue_bind(lane, LANES_EXCHANGE, lane)


def fill_up(sender: RabbitSender) -> None:
    """Send until the lane is full; how many it takes is up to the broker, which notices late."""

    def fill() -> None:
        for number in range(1000):
            sender.send([message(LANE_0, f"m-{number}")], retry=False)

    with pytest.raises(BrokerUnavailableError, match="NackedError"):
        fill()


def test_what_a_queue_refused_is_sent_again_and_nothing_else(rabbit: RabbitBroker, sender: RabbitSender) -> None:
    small(rabbit, LANE_0, 1)
    sender.send([message(LANE_1, "first")])
    fill_up(sender)
    refused = threading.Thread(target=lambda: sender.send([message(LANE_0, "again"), message(LANE_1, "other-again")]))
    refused.start()
    eventually(lambda: "other-again" in ids(rabbit, LANE_1))
    with closing(rabbit.connect()) as connection:
        connection.channel().queue_purge(LANE_0)
    refused.join(10)
    assert not refused.is_alive()
    assert ids(rabbit, LANE_0) == ["again"]
    assert ids(rabbit, LANE_1).count("other-again") == 1


def test_a_full_lane_is_told_after_a_few_attempts(rabbit: RabbitBroker, sender: RabbitSender) -> None:
    small(rabbit, LANE_0, 1)
    fill_up(sender)
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError, match="queue is full"):
        sender.send([message(LANE_0, "one more")])
    assert 1 < time.monotonic() - began < 20


def test_a_block_makes_the_lanes_that_are_not_there_and_keeps_its_order(
    rabbit: RabbitBroker, sender: RabbitSender
) -> None:
    sender.send([message(lane_name(number % 3), str(number)) for number in range(30)])
    assert [ids(rabbit, lane_name(lane)) for lane in range(3)] == [
        [str(number) for number in range(30) if number % 3 == lane] for lane in range(3)
    ]


def test_a_lane_that_somebody_binds_in_the_middle_of_a_block_takes_it_in_order(
    rabbit: RabbitBroker, sender: RabbitSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker does that declares its lanes while a producer sends the first messages for one."""
    with closing(rabbit.connect()) as connection:
        channel = connection.channel()
        channel.queue_declare(DEAD, durable=True, auto_delete=False, arguments=QUORUM)
        channel.queue_declare(LANE_0, durable=True, auto_delete=False, arguments=LANE)
        declare_exchange(channel)
        publish, published = Confirms.publish, 0

        def publish_and_bind(*arguments: Any) -> int:
            nonlocal published
            published += 1
            if published == 3:
                channel.queue_bind(LANE_0, LANES_EXCHANGE, LANE_0)
            return publish(*arguments)

        monkeypatch.setattr(Confirms, "publish", publish_and_bind)
        sender.send([message(LANE_0, str(number)) for number in range(6)])
    assert published >= 6
    assert list(dict.fromkeys(ids(rabbit, LANE_0))) == [str(number) for number in range(6)]


def test_a_user_who_may_not_make_a_lane_is_told_what_to_do(rabbitmq: RabbitMQ, rabbit: RabbitBroker) -> None:
    url = rabbitmq.add_user("producer", "^$", ".*", "^$", vhost=rabbit.vhost)
    with closing(RabbitSender(url)) as producer:
        with pytest.raises(BrokerUnavailableError, match=r"no queue lane\.000.*start a lane worker"):
            producer.send([message(LANE_0, "1")])
        small(rabbit, LANE_0, 100)
        producer.send([message(LANE_0, "1")])
    assert ids(rabbit, LANE_0) == ["1"]


def test_a_queue_that_is_no_lane_is_not_made(sender: RabbitSender) -> None:
    with pytest.raises(BrokerUnavailableError, match="no queue queries; the worker"):
        sender.send([message("queries", "1")])


def test_a_connection_that_died_idle_costs_nothing(rabbit: RabbitBroker, sender: RabbitSender) -> None:
    sender.send([message(LANE_0, "1")])
    eventually(lambda: rabbit.server.manage("GET", f"/api/vhosts/{rabbit.vhost}/connections"))
    rabbit.cut()
    sender.send([message(LANE_0, "2")], retry=False)
    assert ids(rabbit, LANE_0) == ["1", "2"]


def test_an_exchange_that_was_deleted_is_made_again(rabbit: RabbitBroker, sender: RabbitSender) -> None:
    sender.send([message("key", "1", "events")])
    with closing(rabbit.connect()) as connection:
        connection.channel().exchange_delete("events")
    with pytest.raises(BrokerUnavailableError, match="NotFound"):
        sender.send([message("key", "2", "events")])
    sender.send([message("key", "2", "events")])


def test_nothing_is_kept_of_connections_that_are_gone(rabbit: RabbitBroker, sender: RabbitSender) -> None:
    sender.send([message(LANE_0, "1")])
    (kept,) = sender._opened
    gone = weakref.ref(kept)
    kept.collect()
    del kept
    sender.send([message(LANE_0, "2")])
    gc.collect()
    assert gone() is None
    assert len(sender._confirms) == 1


def test_a_frozen_broker_is_told_in_bounded_time(
    rabbitmq: RabbitMQ, rabbit: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "READ_SECONDS", 0.5)
    monkeypatch.setattr(sending, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(rabbitmq_module, "CONFIRM_SECONDS", 0.5)
    with closing(RabbitSender(rabbit.url)) as sender:
        sender.send([message(LANE_0, "1")])
        assert rabbitmq.pid is not None
        os.kill(rabbitmq.pid, signal.SIGSTOP)
        try:
            # The pooled connection stands, and a channel is asked of it; then there is none.
            for step in (
                lambda: sender.depth(LANE_0), lambda: sender.send([message(LANE_0, "2")]),
                lambda: sender.depth(LANE_0),
            ):  # fmt: skip
                began = time.monotonic()
                with pytest.raises(BrokerUnavailableError):
                    step()
                assert time.monotonic() - began < 15
        finally:
            os.kill(rabbitmq.pid, signal.SIGCONT)
        sender.send([message(LANE_0, "3")])
    assert ids(rabbit, LANE_0)[-1] == "3"


def test_no_word_of_the_broker_is_told_as_such(
    rabbitmq: RabbitMQ, rabbit: RabbitBroker, sender: RabbitSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_module, "CONFIRM_SECONDS", 0.5)
    sender.send([message(LANE_0, "1")])
    assert rabbitmq.pid is not None
    os.kill(rabbitmq.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BrokerUnavailableError, match="short of memory or disk"):
            sender.send([message(LANE_0, "2")])
    finally:
        os.kill(rabbitmq.pid, signal.SIGCONT)


def test_a_forked_process_sends_and_waits_over_connections_of_its_own(rabbit: RabbitBroker) -> None:
    with CreditClient(rabbit.url, lanes=LANES) as client:
        with pytest.raises(NoAnswerError):
            client.consume("alice", feature="image", id="parent-1", wait=0.05)
        before = set(client._sender._opened)  # type: ignore[attr-defined]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.consume("alice", feature="image", id="child-1")
                try:
                    client.consume("alice", feature="image", id="child-2", wait=0.05)
                except NoAnswerError:
                    status = 0
                gc.collect()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        client.consume("alice", feature="image", id="parent-2")
        assert set(client._sender._opened) == before, "the child left our connection alone"  # type: ignore[attr-defined]
    assert ids(rabbit, lane_of("alice", LANES)) == ["parent-1", "child-1", "child-2", "parent-2"]


def test_threads_share_a_sender_and_each_keeps_its_order(rabbit: RabbitBroker, sender: RabbitSender) -> None:
    def produce(thread: int) -> None:
        for number in range(20):
            sender.send([message(LANE_0, f"{thread}-{number}-{part}") for part in range(3)])

    threads = [threading.Thread(target=produce, args=(thread,)) for thread in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ids(rabbit, LANE_0)
    assert len(found) == 12 * 60
    for producer in range(12):
        mine = [identity for identity in found if identity.startswith(f"{producer}-")]
        assert mine == [f"{producer}-{number}-{part}" for number in range(20) for part in range(3)]


# Answers


def reply(rabbit: RabbitBroker, queue: str, name: str) -> None:
    """Answer as a worker does."""
    with closing(rabbit.connect()) as connection:
        body = b'{"status":"SUCCESS","result":1}'
        connection.channel().basic_publish(amqp.Message(body, correlation_id=name), "", queue)


@pytest.fixture
def waiting(rabbit: RabbitBroker) -> Iterator[RabbitAnswers]:
    """Answers on it."""
    with closing(RabbitAnswers(rabbit.url)) as made:
        yield made


def test_an_answer_reaches_whoever_waits_for_it_and_nobody_else(rabbit: RabbitBroker, waiting: RabbitAnswers) -> None:
    with waiting.expect("a") as (first, queue), waiting.expect("b") as (second, same):
        assert queue == same
        assert queue is not None
        with closing(rabbit.connect()) as connection:
            channel = connection.channel()
            for body in (b"garbage", b"{}", b'{"status":"STARTED"}', b'{"status":5}'):
                channel.basic_publish(amqp.Message(body, correlation_id="a"), "", queue)
            channel.basic_publish(amqp.Message(b'{"status":"SUCCESS"}'), "", queue)
        reply(rabbit, queue, "nobody")
        reply(rabbit, queue, "b")
        assert second.result(10).result == 1
        assert not first.done()
        reply(rabbit, queue, "a")
        reply(rabbit, queue, "a")
        assert first.result(10).result == 1


def test_after_a_cut_the_next_call_waits_for_a_new_queue(rabbit: RabbitBroker, waiting: RabbitAnswers) -> None:
    with waiting.expect("a") as (_, old):
        pass
    eventually(lambda: rabbit.server.manage("GET", f"/api/vhosts/{rabbit.vhost}/connections"))
    rabbit.cut()
    eventually(lambda: waiting._queue != old)
    with waiting.expect("b") as (answer, queue):
        assert queue not in (None, old)
        assert queue is not None
        reply(rabbit, queue, "b")
        assert answer.result(10).result == 1


def test_a_broker_that_is_away_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "CONNECT_SECONDS", 1)
    with (
        closing(RabbitAnswers(f"amqp://user:secret@127.0.0.1:{free_port()}//")) as waiting,
        pytest.raises(BrokerUnavailableError, match="nothing was sent") as told,
        waiting.expect("a"),
    ):
        pytest.fail("nothing can be waited for")
    assert "secret" not in str(told.value)


def test_the_broker_hears_of_a_client_that_has_answers_all_the_time(
    rabbit: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats are sent between answers, not only when none come: else the broker ends the connection."""
    ticks: list[Any] = []
    monkeypatch.setattr(Connection, "heartbeat_check", lambda connection, rate=2: ticks.append(connection))
    with (
        closing(RabbitAnswers(rabbit.url)) as waiting,
        waiting.expect("a") as (_, queue),
        closing(rabbit.connect()) as connection,
    ):
        channel = connection.channel()
        began = time.monotonic()
        while time.monotonic() - began < answers.POLL_SECONDS * 0.8:
            channel.basic_publish(amqp.Message(b'{"status":"STARTED"}', correlation_id="a"), "", queue)
            time.sleep(0.02)
        assert ticks


def test_an_id_that_is_longer_than_a_property_may_be_is_sent_all_the_same(rabbit: RabbitBroker) -> None:
    long = "\N{GRINNING FACE}" * 128
    with CreditClient(rabbit.url, lanes=LANES) as client:
        client.settle("anna", id="short")
        client.settle("anna", id=long)
    assert ids(rabbit, lane_of("anna", LANES)) == ["short", long]
