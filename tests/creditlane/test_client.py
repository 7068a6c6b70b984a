"""The client on a real broker: confirmed or raised, in order, nothing lost in silence."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import closing
from decimal import Decimal
from typing import Any

import pytest
import redis

from creditlane.client import Buffer, CreditClient
from creditlane.codes import Code
from creditlane.contract import INTERNAL, MAX_BATCH, MAX_MESSAGE_BYTES, ContractError
from creditlane.errors import BrokerUnavailableError, NoAnswerError, QuarantinedError, RefusedError, UnsentError
from creditlane.lanes import lane_name, lane_of
from scripts.embedded import Redis, free_port
from tests.broker import Broker, RedisBroker, on_both_brokers
from tests.conftest import LANES, Spawn
from tests.support import Worker, eventually, rows, value
from workers.redis_lanes import keys_of


def sent(broker: Broker) -> dict[str, list[dict[str, Any]]]:
    """Every message of every lane, in order: headers, and the body's keyword arguments."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(LANES):
        lane = lane_name(number)
        for headers, body in broker.messages(lane):
            args, kwargs, _ = json.loads(body)
            assert args == []
            found.setdefault(lane, []).append({"headers": headers, "kwargs": kwargs, "size": len(body)})
    return found


def members(broker: Broker) -> dict[str, list[str]]:
    """The operation ids of each account in order, single or in batches."""
    ids: dict[str, list[str]] = {}
    for messages in sent(broker).values():
        for message in messages:
            inside = [(message["headers"]["id"], message["kwargs"])]
            if message["headers"]["task"] == "credits.batch":
                inside = [(identity, arguments) for _, identity, arguments in message["kwargs"]["operations"]]
            for identity, arguments in inside:
                ids.setdefault(arguments["account"], []).append(identity)
    return ids


def done(database: str) -> int:
    """How many operations the ledger has answered."""
    return int(value(database, "SELECT count(*) FROM operations"))


# One message


@on_both_brokers
def test_a_call_without_wait_puts_one_message_into_the_accounts_lane(client: CreditClient, broker: Broker) -> None:
    assert client.consume("alice", feature="image", quantity=Decimal("12.50"), id="order-1", metadata={"é": 1}) is None
    assert client.adjust("bob", "-0.5", actor="admin", reason="because", id="a-1") is None
    found = sent(broker)
    assert set(found) == {lane_of("alice", LANES), lane_of("bob", LANES)}
    ((message,), (other,)) = (found[lane_of(account, LANES)] for account in ("alice", "bob"))
    assert message["kwargs"] == {"account": "alice", "feature": "image", "quantity": "12.5", "metadata": {"é": 1}}
    assert (message["headers"]["task"], message["headers"]["id"]) == ("credits.consume", "order-1")
    assert message["headers"]["ignore_result"] is True
    assert other["kwargs"]["amount"] == "-0.5"


@on_both_brokers
def test_what_does_not_fit_the_contract_is_not_sent(client: CreditClient, broker: Broker) -> None:
    for wrong in (
        lambda: client.consume("alice", id="x"),
        lambda: client.consume("", feature="image", id="x"),
        lambda: client.consume("alice", feature="image", id=""),
        lambda: client.consume("alice", feature="image", id="i" * 129),
        lambda: client.consume("alice", amount=-1, id="x"),
        lambda: client.hold("alice", amount=1, ttl=0, id="x"),
        lambda: client.consume("alice", feature="image", metadata={"x": "y" * 5000}, id="x"),
        lambda: client.consume("alice", feature="image", metadata={"x": object()}, id="x"),
        lambda: client.consume("alice\ud800", feature="image", id="x"),
        lambda: client.submit("nothing.known", "x", {"account": "alice"}),
        lambda: client.batch([("credits.settle", "x", {"account": "alice", "more": 1})], id="b", wait=1),
    ):
        with pytest.raises(ContractError):
            wrong()
    for inexact in (1.5, "1e3", Decimal("NaN"), 10**13):
        with pytest.raises(ValueError, match="amount"):
            client.grant("alice", inexact, source="pack", id="x")  # type: ignore[arg-type]
    with client.buffer() as buffer, pytest.raises(ContractError):
        buffer.consume("alice", id="x")
    assert sent(broker) == {}


@pytest.mark.parametrize("id", ["transfer.receive:1", "transfer.conclude:"])
def test_an_id_that_the_ledger_derives_is_refused_before_it_is_sent(client: CreditClient, id: str) -> None:
    with pytest.raises(ContractError, match="derived by the ledger"):
        client.consume("alice", amount=1, id=id)


@pytest.mark.parametrize("name", sorted(INTERNAL))
def test_what_the_ledger_sends_itself_no_client_sends(name: str, client: CreditClient, broker: Broker) -> None:
    with pytest.raises(ContractError, match="sent by the ledger itself") as refused:
        client.submit(name, "forged", {"account": "a", "transfer": "t"})
    assert refused.value.code is Code.UNKNOWN_OPERATION
    assert sent(broker) == {}


@on_both_brokers
def test_without_a_worker_there_is_no_answer_in_time_and_the_message_waits(
    client: CreditClient, broker: Broker
) -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match="'c-1'"):
        client.consume("alice", feature="image", id="c-1", wait=0.2)
    assert time.monotonic() - began < 5
    assert members(broker) == {"alice": ["c-1"]}
    assert sent(broker)[lane_of("alice", LANES)][0]["headers"]["ignore_result"] is False


@on_both_brokers
def test_answers_are_typed_told_apart_and_given_again(
    lane_worker: Worker, client: CreditClient, broker_url: str
) -> None:
    opened = client.open("alice", id="open", email="alice@example.org", wait=10)
    charged = client.consume("alice", feature="image", quantity=12, id="c-1", wait=10)
    refused = client.consume("alice", amount=100, id="c-2", wait=10)
    assert opened is not None
    assert charged is not None
    assert refused is not None
    assert (opened.applied, opened.balance and opened.balance.available) == (True, Decimal(50))
    assert (charged.charged, charged.id, charged.operation) == (Decimal("1.5"), "c-1", "credits.consume")
    assert (refused.status, refused.code) == ("rejected", Code.INSUFFICIENT_CREDITS)
    assert (refused.required, refused.available, refused.shortfall) == (Decimal(100), Decimal("48.5"), Decimal("51.5"))
    assert refused.offer == {"pack": "pro", "credits": "85", "price": "14.99 EUR"}
    with CreditClient(broker_url, lanes=LANES) as another:
        again = another.consume("alice", amount=100, id="c-2", wait=10)
    assert again is not None
    assert (again.replayed, again.shortfall) == (True, Decimal("51.5"))
    with pytest.raises(QuarantinedError, match=r"invalid_message: .*amount"):
        client._ask("credits.consume", "x", lane_of("alice", LANES), b'{"account":"alice","amount":0}', "", 10)
    answers = client.batch(
        [("credits.consume", f"b-{number}", {"account": "alice", "feature": "context"}) for number in range(3)],
        id="batch",
        wait=10,
    )
    assert [(answer.id, answer.status, answer.charged) for answer in answers] == [
        (f"b-{number}", "applied", Decimal(1)) for number in range(3)
    ]


@on_both_brokers
def test_threads_that_wait_at_once_get_their_own_answers(lane_worker: Worker, client: CreditClient) -> None:
    client.open("alice", id="open", wait=10)
    answers: dict[str, str] = {}

    def ask(thread: int) -> None:
        for number in range(20):
            answer = client.consume("alice", amount="0.01", id=f"{thread}-{number}", wait=20)
            assert answer is not None
            answers[f"{thread}-{number}"] = answer.id

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {f"{thread}-{number}": f"{thread}-{number}" for thread in range(8) for number in range(20)}


@on_both_brokers
def test_a_batch_over_several_lanes_or_none_is_refused(client: CreditClient, broker: Broker) -> None:
    accounts = [f"account-{number}" for number in range(20)]
    assert len({lane_of(account, LANES) for account in accounts}) > 1
    for operations in ([("credits.settle", account, {"account": account}) for account in accounts], []):
        with pytest.raises(ContractError, match="one lane"):
            client.batch(operations, id="batch", wait=1)
    assert sent(broker) == {}


@on_both_brokers
def test_balance_is_asked_of_a_general_worker(
    lane_worker: Worker, spawn: Spawn, client: CreditClient, broker: Broker
) -> None:
    spawn("general", kind="general")
    eventually(lambda: broker.has_queue("queries"))
    client.open("alice", id="open", wait=10)
    client.hold("alice", amount=2, id="h", wait=10)
    balance = client.balance("alice", wait=30)
    assert balance is not None
    assert (balance.available, balance.held, balance.by_source) == (Decimal(48), Decimal(2), {"signup": Decimal(48)})
    assert client.balance("nobody", wait=10) is None


# Reservations


@on_both_brokers
def test_reserve_captures_what_it_is_told_or_all_and_releases_on_an_exception(
    lane_worker: Worker, client: CreditClient, database: str
) -> None:
    client.open("alice", id="open", wait=10)
    with client.reserve("alice", feature="context", quantity=5, id="told") as hold:
        assert (hold.hold.charged, hold.captured) == (Decimal(5), None)
        captured = hold.capture(quantity=3)
        assert (captured.charged, hold.captured) == (Decimal(3), captured)
    with client.reserve("alice", amount=4, id="whole"):
        pass
    with pytest.raises(ZeroDivisionError), client.reserve("alice", amount=6, id="failed"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), client.reserve("alice", amount=2, id="late") as hold:
        assert hold.capture(amount=1).charged / 0
    with (
        pytest.raises(RefusedError, match="insufficient_credits") as refused,
        client.reserve("alice", amount=100, id="too much"),
    ):
        pytest.fail("the block of a refused hold must not run")
    assert refused.value.result.shortfall == Decimal(58)
    with (
        pytest.raises(RefusedError, match="insufficient_credits"),
        client.reserve("alice", amount=1, id="more") as hold,
    ):
        hold.capture(amount=1000)
    eventually(lambda: not rows(database, "SELECT hold FROM holds WHERE status = 'open'"))
    assert rows(database, "SELECT hold, status, captured_micro / 1000000 FROM holds ORDER BY hold") == [
        ("failed", "released", 0), ("late", "captured", 1), ("more", "released", 0), ("told", "captured", 3),
        ("whole", "captured", 4),
    ]  # fmt: skip
    assert value(database, "SELECT consumed_micro FROM accounts") == 8_000_000
    assert [row[0] for row in rows(database, "SELECT operation FROM operations WHERE name = 'credits.release'"
                                             " ORDER BY number")] == ["failed:release", "more:release"]  # fmt: skip


# Buffers


@on_both_brokers
def test_a_buffer_keeps_the_order_of_each_account_in_few_messages(client: CreditClient, broker: Broker) -> None:
    expected: dict[str, list[str]] = {}
    with client.buffer(linger_ms=1) as buffer:
        for number in range(2000):
            account = f"account-{number % 7}"
            expected.setdefault(account, []).append(f"c-{number}")
            buffer.consume(account, feature="export", id=f"c-{number}")
    assert members(broker) == expected
    assert buffer.sent == 2000
    assert sum(map(len, sent(broker).values())) < 1000


@on_both_brokers
def test_a_buffered_operation_is_sent_when_it_has_lingered(client: CreditClient, broker: Broker) -> None:
    with client.buffer(linger_ms=20) as buffer:
        for number in range(3):
            buffer.consume("alice", feature="export", id=f"c-{number}")
            eventually(lambda wanted=number + 1: len(members(broker).get("alice", ())) == wanted, 2)  # type: ignore[misc]
        assert buffer.sent == 3


@on_both_brokers
def test_a_buffer_sends_nothing_before_its_time_unless_it_is_flushed(client: CreditClient, broker: Broker) -> None:
    with client.buffer(linger_ms=60_000) as buffer:
        buffer.consume("alice", feature="export", id="c-1")
        assert sent(broker) == {}
        buffer.flush()
        assert members(broker) == {"alice": ["c-1"]}
        buffer.consume("alice", feature="export", id="c-2")
        assert buffer.sent == 1
    assert members(broker) == {"alice": ["c-1", "c-2"]}


@on_both_brokers
def test_a_message_of_a_buffer_never_has_more_operations_than_allowed(client: CreditClient, broker: Broker) -> None:
    with client.buffer(linger_ms=60_000, max_operations=30) as buffer:
        for number in range(100):
            buffer.consume("alice", feature="export", id=f"c-{number}")
        assert buffer.sent == 90
    (messages,) = sent(broker).values()
    assert [len(message["kwargs"]["operations"]) for message in messages] == [30, 30, 30, 10]
    for wrong in (0, MAX_BATCH + 1):
        with pytest.raises(ValueError, match="max_operations"):
            client.buffer(max_operations=wrong)


@on_both_brokers
def test_a_message_of_a_buffer_never_has_more_than_a_mebibyte(client: CreditClient, broker: Broker) -> None:
    with client.buffer(linger_ms=60_000) as buffer:
        for number in range(700):
            text = ('"é\\' * 1000)[: 500 + number]
            buffer.consume("alice", feature="export", id=f'"{number}', metadata={"text": text})
    (messages,) = sent(broker).values()
    assert len(messages) > 1
    assert all(message["size"] <= MAX_MESSAGE_BYTES for message in messages)
    assert all(message["size"] > MAX_MESSAGE_BYTES - 10_000 for message in messages[:-1])
    assert members(broker) == {"alice": [f'"{number}' for number in range(700)]}


@on_both_brokers
def test_eight_threads_share_a_buffer_and_each_keeps_its_order(client: CreditClient, broker: Broker) -> None:
    with client.buffer(linger_ms=1, max_operations=50) as buffer:

        def produce(thread: int) -> None:
            for number in range(300):
                buffer.consume(f"account-{number % 3}", feature="export", id=f"{thread}-{number}")

        threads = [threading.Thread(target=produce, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert buffer.sent == 2400
    for account, ids in members(broker).items():
        assert len(ids) == 800
        for producer in range(8):
            own = [identity for identity in ids if identity.startswith(f"{producer}-")]
            assert own == [f"{producer}-{number}" for number in range(300) if f"account-{number % 3}" == account]


def test_a_buffer_collects_on_while_the_broker_takes_its_time(own_redis: Redis) -> None:
    ids = [f"c-{number}" for number in range(100)]
    with CreditClient(own_redis.url, lanes=LANES) as client, client.buffer(linger_ms=1) as buffer:
        buffer.consume("alice", feature="export", id=ids[0])
        eventually(lambda: buffer.sent == 1)
        assert own_redis.pid is not None
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            buffer.consume("alice", feature="export", id=ids[1])
            eventually(lambda: buffer._sending.locked() and not buffer._groups)
            for identity in ids[2:]:
                buffer.consume("alice", feature="export", id=identity)
            assert buffer.sent == 1
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
    assert buffer.sent == len(ids)
    with closing(RedisBroker(own_redis, 0)) as broker:
        assert members(broker) == {"alice": ids}


@pytest.mark.timeout(60)
@on_both_brokers
def test_a_buffer_ends_at_once_however_short_its_life(client: CreditClient, broker: Broker) -> None:
    for number in range(200):
        with client.buffer(linger_ms=5 * (number % 2)) as buffer:
            if number % 3 == 0:
                buffer.consume("alice", feature="export", id=f"c-{number}")
    assert members(broker) == {"alice": [f"c-{number}" for number in range(0, 200, 3)]}
    assert not [thread for thread in threading.enumerate() if thread.name == "creditlane buffer"]


@on_both_brokers
def test_a_buffer_hands_over_what_it_has_when_its_block_raises(client: CreditClient, broker: Broker) -> None:
    def fail_half_way() -> None:
        with client.buffer(linger_ms=60_000) as buffer:
            buffer.consume("alice", feature="export", id="c-1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert members(broker) == {"alice": ["c-1"]}


@on_both_brokers
def test_a_buffer_waits_for_no_answers(client: CreditClient) -> None:
    with client.buffer() as buffer, pytest.raises(ValueError, match="waits for no answers"):
        buffer.consume("alice", feature="export", id="c-1", wait=1)


# A broker that is away


def test_a_closed_port_is_told_after_a_few_attempts() -> None:
    with CreditClient(f"redis://127.0.0.1:{free_port()}/0", lanes=LANES) as client:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="'c-1'"):
            client.consume("alice", feature="image", id="c-1")
        with pytest.raises(BrokerUnavailableError, match="nothing was sent"):
            client.consume("alice", feature="image", id="c-2", wait=1)
        assert time.monotonic() - began < 20
        with pytest.raises(UnsentError) as unsent, client.buffer(linger_ms=60_000) as buffer:
            buffer.consume("alice", feature="image", id="c-3")
        assert [identity for _, identity, _ in unsent.value.operations] == ["c-3"]


def test_a_call_after_the_brokers_return_succeeds_on_the_same_client(own_redis: Redis) -> None:
    with CreditClient(own_redis.url, lanes=LANES) as client:
        client.consume("alice", feature="export", id="c-1")
        own_redis.kill()
        with pytest.raises(BrokerUnavailableError):
            client.consume("alice", feature="export", id="c-2")
        own_redis.start()
        client.consume("alice", feature="export", id="c-2")
        with closing(RedisBroker(own_redis, 0)) as broker:
            assert members(broker) == {"alice": ["c-1", "c-2"]}


def test_what_a_buffer_could_not_hand_over_is_named_in_order_and_applies_once_when_sent_again(
    own_redis: Redis, spawn: Spawn, database: str
) -> None:
    accounts = [f"account-{number}" for number in range(5)]
    expected: dict[str, list[str]] = {account: [] for account in accounts}
    with CreditClient(own_redis.url, lanes=LANES) as client:
        again: list[tuple[str, str, bytes]] = []
        refused: list[tuple[str, str]] = []
        try:
            with client.buffer(linger_ms=60_000, max_operations=20) as buffer:
                for number in range(300):
                    account = accounts[number % 5]
                    if number == 150:
                        own_redis.kill()
                    expected[account].append(f"c-{number}")
                    try:
                        buffer.consume(account, feature="export", id=f"c-{number}")
                    except UnsentError as error:
                        again += error.operations
                        refused.append((account, f"c-{number}"))
                        break
        except UnsentError as error:
            again += error.operations
        assert refused
        ((account, last),) = refused
        assert expected[account][-1] == last
        own_redis.start()
        with closing(RedisBroker(own_redis, 0)) as broker:
            confirmed = members(broker)
        # Confirmed, to be sent again and refused at the call: together everything, each account's in order.
        for name in accounts:
            mine = [identity for _, identity, arguments in again if json.loads(arguments)["account"] == name]
            rest = [last] if name == account else []
            assert confirmed.get(name, []) + mine + rest == expected[name]
        with client.buffer() as buffer:
            for name, identity, arguments in again:
                buffer.submit(name, identity, json.loads(arguments))
            for name, identity, arguments in again:  # in doubt, once more
                buffer.submit(name, identity, json.loads(arguments))
    spawn("worker", CREDITLANE_BROKER_URL=own_redis.url)
    total = sum(map(len, expected.values())) - 1
    eventually(lambda: done(database) == total)
    order: dict[str, list[str]] = {}
    for name, identity in rows(database, "SELECT account, operation FROM operations ORDER BY account, number"):
        order.setdefault(name, []).append(identity)
    assert order == {name: [identity for identity in ids if identity != last] for name, ids in expected.items()}
    with redis.Redis.from_url(own_redis.url) as store:
        eventually(lambda: not store.exists(*(keys_of(lane_name(number))[1] for number in range(LANES))))


@pytest.mark.parametrize("told_by", ["the next call", "a flush", "the end of the block"])
def test_nothing_of_a_buffer_overtakes_what_was_not_confirmed(told_by: str, own_redis: Redis) -> None:
    """The group outgrows a message while the broker is away: what made it overflow must not be sent before it."""
    size, count = 3500, 0
    again: list[str] = []
    with CreditClient(own_redis.url, lanes=LANES) as client:

        def consume(buffer: Buffer) -> None:
            buffer.consume("alice", feature="export", id=f"c-{count}", metadata={"x": "x" * size})

        def overflow() -> None:
            nonlocal count
            with client.buffer(linger_ms=60_000) as buffer:
                while buffer._failed is None:
                    if count == MAX_MESSAGE_BYTES // size - 20:
                        own_redis.kill()
                    consume(buffer)
                    count += 1
                own_redis.start()
                if told_by == "the next call":
                    consume(buffer)
                elif told_by == "a flush":
                    buffer.flush()

        with pytest.raises(UnsentError) as unsent:
            overflow()
        again = [identity for _, identity, _ in unsent.value.operations]
        with closing(RedisBroker(own_redis, 0)) as broker:
            arrived = members(broker).get("alice", [])
    assert arrived == []
    assert again == [f"c-{number}" for number in range(count)]
