"""The outbox on a real Postgres and a real Redis: what follows from operations is committed with them and goes out."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import msgspec
import psycopg
import pytest
import redis
from kombu import Connection, Exchange, Queue, binding

from creditlane.client import NOTICES, CreditClient
from creditlane.codes import Code
from creditlane.contract import concluding_id, decode_message, receiving_id
from creditlane.events import BY_NOTICE, EXCHANGE, TYPES, Event, matching, routing_key
from creditlane.lanes import lane_of
from creditlane.rabbitmq import declare_lane
from creditlane.sending import Sender, make_sender
from models.catalog import load_catalog
from models.rules.state import Account
from scripts.embedded import Redis, free_port, temporary_directory
from tasks.ledger import Answer, apply, encode
from tests.broker import Broker, RabbitBroker, on_both_brokers
from tests.conftest import LANES
from tests.support import ROOT, Ledger, rows, value
from tests.workers.test_ledger_writer import priced_by
from workers.crash import OUTBOX_POINTS
from workers.ledger_writer import SILENT_SECONDS, Job
from workers.outbox import PATIENCE_SECONDS, Outbox, OutboxRow

START = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def sender(broker_url: str) -> Iterator[Sender]:
    """A sender on the test's broker."""
    made = make_sender(broker_url)
    yield made
    made.close()


@pytest.fixture
def outbox(sender: Sender, ledger: Ledger) -> Outbox:
    """The outbox of the ledger in this process."""
    return Outbox(ledger.writer.connection, sender, LANES)


def opened(ledger: Ledger, *accounts: str) -> None:
    """Open pools, and give the first ten credits."""
    for account in accounts:
        ledger.apply("credits.open", "open", account=account, kind="pool")
    ledger.apply("credits.grant", "grant", account=accounts[0], amount=10, source="pack")


def job_of(row: OutboxRow) -> Job:
    """A follow-up, as a lane worker would read it."""
    return Job(row.task, row.operation, decode_message(row.task, row.arguments), row.arguments)


def again(jobs: Sequence[Job]) -> list[Job]:
    """The same operations, as they are delivered once more."""
    return [Job(job.name, job.operation, job.message, job.arguments) for job in jobs]


def follow(ledger: Ledger) -> list[dict[str, Any]]:
    """Apply what follows from what was written, until nothing follows; returns the results."""
    answers = []
    while committed := ledger.writer.take_outbox():
        answers += ledger.write(*map(job_of, committed))
        ledger.writer.connection.execute("DELETE FROM outbox WHERE id = ANY(%s)", ([row.id for row in committed],))
    return answers


def buckets(database: str, account: str) -> dict[str, int]:
    """What is in an account's buckets, in credits."""
    names = ("available", "in_transit", "sent", "received", "expired", "revoked", "debt")
    columns = ", ".join(f"{name}_micro" for name in names)
    found = rows(database, f"SELECT {columns} FROM accounts WHERE account = %s", account)[0]
    return {name: amount // 1_000_000 for name, amount in zip(names, found, strict=True) if amount}


def lane_messages(broker: Broker, account: str, count: int) -> list[tuple[dict[str, Any], bytes]]:
    """Takes everything out of an account's lane: headers and body of each of ``count`` messages, the oldest first."""
    lane = lane_of(account, LANES)
    if isinstance(broker, RabbitBroker):
        found: list[Any] = []
        with closing(broker.connect()) as connection:
            channel = connection.channel()
            declare_lane(channel, lane)
            channel.basic_consume(lane, no_ack=True, callback=found.append)
            while len(found) < count:
                connection.drain_events(timeout=20)
        bodies = [each.body.encode() if isinstance(each.body, str) else each.body for each in found]
        return [(each.headers, body) for each, body in zip(found, bodies, strict=True)]
    with redis.Redis.from_url(broker.url) as plain:
        payloads = [msgspec.json.decode(payload) for payload in reversed(plain.lrange(lane, 0, -1))]
        plain.delete(lane)
    assert len(payloads) == count
    return [(payload["headers"], base64.b64decode(payload["body"])) for payload in payloads]


def freeze(ledger: Ledger, instant: datetime) -> None:
    """Let the ledger's clock stand still."""
    ledger.writer.connection.execute(
        "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE"
        f" AS 'SELECT timestamptz ''{instant.isoformat()}'''"
    )


# Follow-ups of a transfer.


def test_what_follows_is_committed_with_what_it_follows_from(ledger: Ledger, database: str) -> None:
    opened(ledger, "anna", "bert")
    assert ledger.writer.take_outbox() == []
    given = ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4, message="for you")
    assert (given["charged"], given["to"]) == ("4", "bert")
    assert given["balance"]["in_transit"] == "4"
    [row] = ledger.writer.take_outbox()
    assert (row.account, row.exchange, row.task) == ("bert", "", "credits.receive")
    assert row.operation == receiving_id("anna", "gift")
    stored = rows(database, "SELECT id, account, exchange, task, operation, arguments::text, created_at FROM outbox")
    assert stored == [(*row[:5], row.arguments.decode(), row.created_at)]
    assert msgspec.json.decode(row.arguments) == {
        "account": "bert", "sender": "anna", "transfer": "gift", "message": "for you", "v": 1,
        "lots": [{"source": "pack", "amount": "4", "priority": 50}],
    }  # fmt: skip


def test_a_transfer_arrives_and_is_confirmed(ledger: Ledger, database: str) -> None:
    opened(ledger, "anna", "bert")
    ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4)
    received, confirmed = follow(ledger)
    assert (received["operation"], received["account"], received["status"]) == ("credits.receive", "bert", "applied")
    assert (received["sender"], received["transfer"]) == ("anna", "gift")
    assert (confirmed["operation"], confirmed["account"]) == ("credits.confirm", "anna")
    assert buckets(database, "anna") == {"available": 6, "sent": 4}
    assert buckets(database, "bert") == {"available": 4, "received": 4}
    kinds = rows(database, "SELECT kind, refers_to, operation FROM entries WHERE account = 'anna' ORDER BY seq")
    assert kinds[1:] == [
        ("transferred", None, "gift"),
        ("sent", "gift", concluding_id("anna", "gift")),
    ]


@pytest.mark.parametrize("closed", [False, True], ids=["", "to a sender that was closed meanwhile"])
def test_a_transfer_to_nobody_comes_back(ledger: Ledger, database: str, closed: bool) -> None:
    opened(ledger, "anna")
    ledger.apply("credits.transfer", "gift", account="anna", to="nobody", amount=4)
    if closed:
        ledger.writer.connection.execute("UPDATE accounts SET status = 'closed' WHERE account = 'anna'")
    refused, bounced = follow(ledger)
    assert (refused["status"], refused["code"]) == ("rejected", "unknown_account")
    assert (bounced["status"], bounced["refused"], bounced["charged"]) == ("applied", "unknown_account", "-4")
    assert buckets(database, "anna") == {"available": 10}
    told = rows(database, "SELECT name, status, code FROM operations WHERE account = 'anna' ORDER BY number")
    assert told[-1] == ("credits.bounce", "applied", None)
    # No operation closes an account yet, so a replay of its operations finds it open.
    ledger.writer.connection.execute("UPDATE accounts SET status = 'open' WHERE account = 'anna'")


def test_follow_ups_that_come_twice_or_in_one_batch_move_credits_once(ledger: Ledger, database: str) -> None:
    opened(ledger, "anna", "bert")
    ledger.write(
        *(ledger.job("credits.transfer", f"gift-{n}", account="anna", to="bert" if n else "nobody", amount=2)
          for n in range(3))
    )  # fmt: skip
    first = list(map(job_of, ledger.writer.take_outbox()))
    ledger.write(*first, *again(first))
    second = list(map(job_of, ledger.writer.take_outbox()))
    assert len(second) == 6  # what brings a transfer is answered each time it comes
    answers = ledger.write(*again(first), *second, *again(second))
    assert len(answers) == 15
    assert [answer["operation"] for answer in answers if not answer.get("replayed")] == [
        "credits.bounce", "credits.confirm", "credits.confirm",
    ]  # fmt: skip
    last = ledger.write(*map(job_of, ledger.writer.take_outbox()))
    assert [answer["replayed"] for answer in last] == [True] * 3
    assert ledger.writer.take_outbox() == []
    assert buckets(database, "anna") == {"available": 6, "sent": 4}
    assert buckets(database, "bert") == {"available": 4, "received": 4}


def test_a_receipt_is_found_though_its_lots_were_emptied_since(ledger: Ledger, database: str) -> None:
    opened(ledger, "anna", "bert")
    ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4)
    ledger.apply("credits.consume", "rest", account="anna", amount=6)
    ledger.apply("credits.revoke", "back", account="anna", grant=1)
    assert buckets(database, "anna") == {"in_transit": 4, "debt": 10}
    follow(ledger)
    assert buckets(database, "anna") == {"sent": 4, "debt": 10}
    assert ledger.apply("credits.refund", "no", account="anna", operation="gift")["code"] == "unknown_charge"


def test_an_operation_that_raises_is_followed_by_nothing_and_takes_nothing_with_it(
    ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import registry

    opened(ledger, "anna", "bert")
    consume = registry.OPERATIONS["credits.consume"]

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setitem(registry.OPERATIONS, "credits.consume", consume._replace(run=fail))
    ledger.write(
        ledger.job("credits.transfer", "one", account="anna", to="bert", amount=1),
        ledger.job("credits.consume", "cursed", account="anna", amount=1),
        ledger.job("credits.transfer", "two", account="anna", to="bert", amount=1),
    )
    follows = [row.operation for row in ledger.writer.outbox]
    assert follows == [receiving_id("anna", "one"), receiving_id("anna", "two")]
    follow(ledger)
    assert buckets(database, "anna") == {"available": 8, "sent": 2}


def test_a_batch_that_is_not_committed_leaves_nothing_in_the_outbox(ledger: Ledger, database: str) -> None:
    opened(ledger, "anna", "bert")
    ledger.writer.connection.execute("ALTER TABLE entries ADD CONSTRAINT cursed CHECK (kind <> 'transferred')")
    with pytest.raises(psycopg.errors.CheckViolation):
        ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=1)
    assert ledger.writer.take_outbox() == []
    assert value(database, "SELECT count(*) FROM outbox") == 0


@pytest.mark.parametrize("seed", range(6))
def test_transfers_in_batches_are_what_the_rules_say_of_each(ledger: Ledger, database: str, seed: int) -> None:
    """Batches of several accounts, follow-ups in any order and more than once: the same results byte for byte as one
    by one in memory, and in the end nothing in transit."""
    random = Random(seed)
    names = ["anna", "bert", "cleo", "dora"]
    accounts = {name: Account(name) for name in names}
    now = START
    letters: list[Job] = []
    numbers = iter(range(10_000))

    def both(jobs: Sequence[Job]) -> None:
        freeze(ledger, now)
        results = ledger.write(*jobs)
        expected: list[Answer] = []
        for job in jobs:
            answer = apply(
                accounts[job.account], job.name, job.operation, job.message, job.arguments, now, ledger.catalog
            )
            assert msgspec.json.decode(answer.result) == results[len(expected)]
            expected.append(answer)
        follows = [each for answer in expected for each in answer.follow]
        committed = ledger.writer.take_outbox()
        wanted = [(each.account, each.name, each.operation, encode(each.arguments)) for each in follows]
        assert sorted((row.account, row.task, row.operation, row.arguments) for row in committed) == sorted(wanted)
        assert [row.id for row in committed] == sorted(row.id for row in committed)
        letters.extend(map(job_of, committed))

    def operation() -> Job:
        account = random.choice(names)
        to = random.choice([name for name in names if name != account])
        id = f"operation-{next(numbers)}"
        span = random.choice([20, 60, 3600])
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("credits.grant", {"amount": "2.5", "source": "pack", "purchase": "p", "expires_in": span}),
            ("credits.grant", {"amount": "5", "source": "pack"}),
            ("credits.transfer", {"to": to, "amount": random.choice(["1", "0.25", "3"])}),
            ("credits.transfer", {"to": to, "amount": random.choice(["1", "2"])}),
            ("credits.consume", {"amount": "1", "partial": True}),
            ("credits.revoke", {"purchase": "p", "amount": "0.5"}),
        ]
        name, content = random.choice(kinds)
        return ledger.job(name, id, account=account, **content)

    both([ledger.job("credits.open", "open", account=name, kind="pool") for name in names[:-1]])
    for step in range(40):
        now += timedelta(seconds=random.choice([0, 0, 10, 30]))
        batch = [operation() for _ in range(random.randint(0, 4))]
        for _ in range(random.randint(0, min(3, len(letters)))):
            batch.append(letters.pop(random.randrange(len(letters))))
            if random.random() < 0.3:
                letters.extend(again(batch[-1:]))
        if step == 20:
            batch.append(ledger.job("credits.open", "open", account="dora", kind="pool"))
        random.shuffle(batch)
        both(batch)
    while letters:
        both([letters.pop(random.randrange(len(letters)))])
    sums = "sum(in_transit_micro), sum(sent_micro) - sum(received_micro), sum(sent_micro) > 0"
    assert rows(database, f"SELECT {sums} FROM accounts") == [(0, 0, True)]
    assert {name: account.head for name, account in accounts.items() if account.entries} == dict(
        rows(database, "SELECT account, head FROM accounts WHERE seq > 0")
    )


# Publishing.


@on_both_brokers
def test_what_is_published_is_what_a_client_sends_and_is_deleted(
    outbox: Outbox, ledger: Ledger, client: CreditClient, broker: Broker, database: str
) -> None:
    opened(ledger, "anna", "bert")
    ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4)
    [row] = committed = ledger.writer.take_outbox()
    outbox.publish(committed)
    assert value(database, "SELECT count(*) FROM outbox") == 0
    client.settle("bert", id="example")
    (headers, body), (example, example_body) = lane_messages(broker, "bert", 2)
    assert headers.keys() == example.keys()
    assert (headers["task"], headers["id"], headers["root_id"]) == ("credits.receive", row.operation, row.operation)
    same = set(headers) - {"task", "id", "root_id", "kwargsrepr"}
    assert {name: headers[name] for name in same} == {name: example[name] for name in same}
    args, kwargs, embed = msgspec.json.decode(body)
    assert (args, embed) == ([], msgspec.json.decode(example_body)[2])
    assert kwargs == msgspec.json.decode(row.arguments)


@on_both_brokers
def test_follow_ups_are_published_in_order(outbox: Outbox, ledger: Ledger, broker: Broker) -> None:
    opened(ledger, "anna", "bert")
    ledger.write(*(ledger.job("credits.transfer", f"{n}", account="anna", to="bert", amount="0.1") for n in range(20)))
    outbox.publish(ledger.writer.take_outbox())
    ids = [headers["id"] for headers, _ in lane_messages(broker, "bert", 20)]
    assert ids == [receiving_id("anna", f"{n}") for n in range(20)]


def test_without_a_broker_nothing_is_raised_and_the_rows_stay(
    ledger: Ledger, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    opened(ledger, "anna", "bert")
    ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4)
    with temporary_directory() as directory:
        server = Redis(directory / "redis", free_port(), appendfsync="always").start()
        sender = make_sender(server.url)
        outbox = Outbox(ledger.writer.connection, sender, LANES)
        server.stop()
        outbox.publish([])
        assert caplog.text == ""
        outbox.publish(ledger.writer.take_outbox())
        sender.close()
    assert "1 messages wait for the sweep" in caplog.text
    assert value(database, "SELECT count(*) FROM outbox") == 1


@pytest.fixture
def silent_url(broker_kind: str) -> Iterator[str]:
    """A broker that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        yield f"redis://{host}/0" if broker_kind == "redis" else f"amqp://{host}//"


@on_both_brokers
def test_a_broker_that_says_nothing_does_not_cost_the_lanes_and_is_let_rest_over_a_new_connection(
    ledger: Ledger, database: str, silent_url: str
) -> None:
    """The database ends the session of a worker that waits too long; that must not begin the wait anew."""
    opened(ledger, "anna", "bert")
    with closing(make_sender(silent_url, patience_seconds=PATIENCE_SECONDS)) as sender:
        outbox = Outbox(ledger.writer.connection, sender, LANES)
        for number in range(2):
            ledger.apply("credits.transfer", f"gift-{number}", account="anna", to="bert", amount=4)
            began = time.monotonic()
            outbox.publish(ledger.writer.take_outbox())
            assert time.monotonic() - began < (SILENT_SECONDS - 1, 0.5)[number]
            outbox.connection = ledger.writer.connection
    assert value(database, "SELECT count(*) FROM outbox") == 2


def test_without_the_database_nothing_is_raised_and_the_rows_are_sent(
    ledger: Ledger, database: str, sender: Sender, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    opened(ledger, "anna", "bert")
    ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4)
    with psycopg.connect(database, autocommit=True) as gone:
        outbox = Outbox(gone, sender, LANES)
    outbox.publish(ledger.writer.take_outbox())
    assert "were sent and not deleted" in caplog.text
    assert value(database, "SELECT count(*) FROM outbox") == 1
    assert len(lane_messages(broker, "bert", 1)) == 1


WORK = """
from creditlane.sending import make_sender
from models.settings import settings
from tests.conftest import _ledger
from workers.outbox import Outbox

config = settings()
made = _ledger(config.database_url.get_secret_value())
ledger = next(made)
ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=4)
sender = make_sender(config.broker_url.get_secret_value())
Outbox(ledger.writer.connection, sender, config.lanes).publish(ledger.writer.take_outbox())
"""


@pytest.mark.parametrize(("crash", "sent"), [("after-commit", 0), *zip(OUTBOX_POINTS, (0, 1), strict=True), ("", 1)])
def test_a_row_outlives_a_crash_until_it_was_published(
    ledger: Ledger, database: str, broker: Broker, crash: str, sent: int
) -> None:
    opened(ledger, "anna", "bert")
    settings = {
        "CREDITLANE_DATABASE_URL": database, "CREDITLANE_BROKER_URL": broker.url, "CREDITLANE_LANES": str(LANES),
        "CREDITLANE_CRASH_AT": crash,
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", WORK], cwd=ROOT, env={**os.environ, **settings}, timeout=60, capture_output=True
    )
    assert ended.returncode == (-signal.SIGKILL if crash else 0), ended.stderr.decode()
    assert value(database, "SELECT count(*) FROM outbox") == (1 if crash else 0)
    assert len(lane_messages(broker, "bert", sent)) == sent


# Events out.


def listen(broker_url: str, *keys: str) -> tuple[Connection, Any]:
    """A listener of the exchange, with kombu alone: a connection, and a queue bound by routing keys."""
    connection = Connection(broker_url)
    exchange = Exchange(EXCHANGE, type="topic")
    queue = Queue("listener", bindings=[binding(exchange, routing_key=key) for key in keys])
    bound = queue(connection.channel())
    bound.declare()
    return connection, bound


def heard(queue: Any) -> list[tuple[str, Event]]:
    """Everything that waits in a queue: routing key and event of each."""
    found = []
    while (message := queue.get()) is not None:
        event = msgspec.json.decode(message.body, type=Event, strict=False)
        assert message.headers["id"] == event.id
        found.append((message.delivery_info["routing_key"], event))
        message.ack()
    return found


def live(ledger: Ledger) -> None:
    """Operations that write an entry of each kind."""
    opened(ledger, "anna", "bert")
    ledger.apply("credits.consume", "c", account="anna", amount=3)
    ledger.apply("credits.refund", "r", account="anna", operation="c", amount=1)
    ledger.apply("credits.hold", "h", account="anna", amount=2)
    ledger.apply("credits.capture", "h2", account="anna", hold="h", amount=1)
    ledger.apply("credits.transfer", "gift", account="anna", to="bert", amount=1)
    ledger.apply("credits.transfer", "lost", account="anna", to="nobody", amount=1)


@on_both_brokers
def test_a_listener_hears_of_everything_once_and_in_order(
    outbox: Outbox, ledger: Ledger, broker_url: str, database: str
) -> None:
    ledger.writer.events = matching("*")
    connection, queue = listen(broker_url, "#")
    with connection:
        freeze(ledger, START)
        live(ledger)
        for _ in range(3):
            committed = ledger.writer.take_outbox()
            outbox.publish(committed)
            ledger.write(*(job_of(row) for row in committed if not row.exchange))
        ledger.apply("credits.grant", "short", account="anna", amount=1, source="pack", expires_in=10)
        freeze(ledger, START + timedelta(seconds=20))
        ledger.apply("credits.revoke", "back", account="anna", grant=1)
        ledger.apply("credits.grant", "pays", account="anna", amount=1, source="pack")
        outbox.publish(ledger.writer.take_outbox())
        told = heard(queue)
    assert value(database, "SELECT count(*) FROM outbox") == 0
    assert len({event.id for _, event in told}) == len(told)
    of_others = {
        "payment.settled", "credits.rolled_out", "credits.rolled_in", "credits.unexpired", "credits.reinstated",
        "credits.debt_cancelled", *BY_NOTICE.values(),
    }  # fmt: skip
    assert {event.type for _, event in told} == set(TYPES) - of_others
    for name in ("anna", "bert"):
        own = [event for _, event in told if event.account == name]
        seqs = [event.seq for event in own]
        assert seqs == sorted(seqs)
        # The amounts of the entries, by kind, and the last word on the balance.
        entries = rows(
            database, "SELECT kind, sum(amount_micro)::bigint FROM entries WHERE account = %s GROUP BY 1", name
        )
        for kind, total in entries:
            type = {"restored": "credits.refunded"}.get(kind, f"credits.{kind}")
            amounts = [event.amount for event in own if event.type == type and event.amount is not None]
            assert sum(amounts) * 1_000_000 == total, type
        changed = [event for event in own if event.type == "balance.changed"]
        assert changed[-1].balance is not None
        last = rows(database, "SELECT seq, available_micro FROM accounts WHERE account = %s", name)
        assert [(changed[-1].seq, changed[-1].balance.available * 1_000_000)] == last
    for key, event in told:
        assert key == routing_key(event.type, event.account, LANES)


@on_both_brokers
def test_an_event_says_what_happened(outbox: Outbox, ledger: Ledger, broker_url: str) -> None:
    ledger.writer.events = matching("credits.consumed,balance.*")
    connection, queue = listen(broker_url, f"*.*.{lane_of('anna', LANES)}")
    with connection:
        opened(ledger, "anna")
        ledger.writer.connection.execute("DELETE FROM outbox")
        ledger.writer.take_outbox()
        ledger.apply("credits.consume", "c", account="anna", amount="2.5")
        outbox.publish(ledger.writer.take_outbox())
        (key, consumed), (_, changed) = heard(queue)
    assert key == f"credits.consumed.{lane_of('anna', LANES)}"
    assert (consumed.account, consumed.seq, consumed.operation) == ("anna", 2, "c")
    assert (str(consumed.amount), str(consumed.balance_after)) == ("2.5", "7.5")
    assert [(use.grant, use.source, str(use.amount)) for use in consumed.grants] == [(1, "pack", "2.5")]
    assert (changed.type, changed.seq, changed.operation) == ("balance.changed", 2, None)
    assert changed.balance is not None
    assert str(changed.balance.available) == "7.5"


def test_a_batch_changes_a_balance_once(ledger: Ledger) -> None:
    ledger.writer.events = matching("balance.changed")
    ledger.write(
        ledger.job("credits.open", "open", account="anna", kind="pool"),
        ledger.job("credits.grant", "g", account="anna", amount=10, source="pack"),
        *(ledger.job("credits.consume", f"{n}", account="anna", amount=1) for n in range(5)),
        ledger.job("credits.open", "open", account="bert", kind="pool"),
    )
    [row] = ledger.writer.take_outbox()
    event = msgspec.json.decode(row.arguments)
    assert (event["account"], event["seq"], event["balance"]["available"]) == ("anna", 6, "5")


def test_depletion_is_told_when_a_batch_leaves_nothing_to_spend(ledger: Ledger) -> None:
    ledger.writer.events = matching("balance.depleted")
    freeze(ledger, START)

    def told(name: str, id: str, **content: Any) -> list[str]:
        ledger.apply(name, id, account="anna", **content)
        return [row.task for row in ledger.writer.take_outbox()]

    assert told("credits.open", "open", kind="pool") == []
    assert told("credits.grant", "g", amount=2, source="pack", expires_in=60) == []
    later = (START + timedelta(hours=1)).isoformat()
    assert told("credits.grant", "upcoming", amount=2, source="pack", effective_at=later) == []
    assert told("credits.consume", "1", amount=1) == []
    assert told("credits.consume", "2", amount=1) == ["balance.depleted"]
    assert told("credits.consume", "3", amount=1) == [], "it was depleted before"
    assert told("credits.refund", "r", operation="2") == []
    freeze(ledger, START + timedelta(seconds=60))
    assert told("credits.settle", "s") == ["balance.depleted"], "by what has expired"
    assert told("credits.settle", "s2") == []


def test_a_replay_is_no_event(ledger: Ledger) -> None:
    ledger.writer.events = matching("*")
    opened(ledger, "anna")
    assert ledger.writer.take_outbox()
    opened(ledger, "anna")
    assert ledger.apply("credits.consume", "much", account="anna", amount=99)["code"] == Code.INSUFFICIENT_CREDITS
    assert ledger.writer.take_outbox() == []


def test_no_events_are_written_unless_asked_for(ledger: Ledger, database: str) -> None:
    live(ledger)
    assert {row.exchange for row in ledger.writer.take_outbox()} == {""}
    assert value(database, "SELECT count(*) FROM outbox WHERE exchange <> ''") == 0


def test_a_notice_is_a_row_a_message_and_an_event_of_its_operation(ledger: Ledger) -> None:
    ledger.writer.events = matching("plan.*,balance.low,credits.rolled_in")
    with priced_by(ledger, load_catalog("rollover")):
        freeze(ledger, START)
        ledger.apply("credits.open", "open", account="a")
        begun = ledger.apply("plans.subscribe", "plan", account="a", plan="starter", payment="in_1")
        ledger.apply("credits.consume", "most", account="a", amount=85)
        ledger.writer.take_outbox()
        freeze(ledger, START + timedelta(days=40))
        ledger.apply(
            "plans.renew", "late", account="a", period_start=begun["period_end"], period_end="2026-04-20T00:00:00Z"
        )
    connection = ledger.writer.connection
    kinds = ["plan_started", "low_balance", "credits_expired", "plan_ended", "plan_started"]
    assert sorted(kind for (kind,) in connection.execute("SELECT kind FROM notices")) == sorted(kinds)
    sent = connection.execute("SELECT exchange, task, arguments FROM outbox ORDER BY id").fetchall()
    assert [arguments["key"].partition(":")[0] for exchange, _, arguments in sent if exchange == NOTICES] == kinds
    events = [Event(**arguments) for exchange, _, arguments in sent if exchange == EXCHANGE]
    assert [event.type for event in events] == ["plan.started", "balance.low", "plan.ended", "plan.started"]
    assert events[1].details == {"available": "15", "threshold": "20", "reference": "100"}
    assert events[0].details["plan"] == "starter"
    ledger.apply(
        "plans.renew", "late", account="a", period_start=begun["period_end"], period_end="2026-04-20T00:00:00Z"
    )
    assert connection.execute("SELECT count(*) FROM notices").fetchone() == (5,)
