"""The oracle: it finds nothing where nothing is wrong, and every fault that is planted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest

from creditlane.codes import Code
from models.catalog import load_catalog
from scripts.embedded import Stack
from tests.conftest import TEMPLATE
from tests.faults.acts import SMALL, Act, Done
from tests.faults.oracle import (
    Judgement,
    Poison,
    Record,
    Sent,
    first_inversion,
    judge,
    read_policy,
    read_record,
    read_tables,
)
from tests.faults.producers import Notes, Operation, Spec, load
from tests.faults.rows import FAIL, PASS, UNKNOWN, Outcome, Stage, play
from tests.faults.rows_time import CATALOG as CALENDAR
from tests.faults.rows_time import MONTH, PLANS
from tests.faults.stack import CATALOG, ROOT, MissedError, RedisBroker, Scene
from tests.support import Ledger, execute, travel, value
from workers.ledger_writer import LedgerWriter, connect
from workers.quarantine import Quarantined, store

POLICY = read_policy(CATALOG)
COUNT, BATCH = 120, 40
"""Operations of the ledger under judgement."""

ACCOUNTS = ["a", "b", "c"]


class Court:
    """A ledger that was written in order, with what its producer noted."""

    def __init__(self, database: str, file: Path) -> None:
        self.database = database
        self.started = value(database, "SELECT ledger_now()")
        spec = Spec(name="p", seed="1", file=str(file), lanes=8, accounts=ACCOUNTS)
        operations: list[Operation] = [operation for operation, _ in zip(load(spec), range(COUNT), strict=False)]
        notes = Notes(file)
        notes.sent("p", *operations, replies=[f"reply-{number}" for number in range(COUNT)])
        notes.done()
        self.record = read_record([file])
        self.answers: dict[str, Any] = {}
        catalog = load_catalog("packs")
        with connect(database) as connection:
            ledger = Ledger(LedgerWriter(connection, lambda: catalog, never), catalog)
            for first in range(0, COUNT, BATCH):
                jobs = [ledger.job(name, id, **said) for name, _, id, said in operations[first : first + BATCH]]
                for number, answer in enumerate(ledger.write(*jobs), first):
                    self.answers[f"reply-{number}"] = {"status": "SUCCESS", "result": answer}
        execute(database, "DELETE FROM outbox")  # notices: sent, as far as the ledger is concerned

    def judge(
        self, *tampering: str, quarantined: Sequence[Quarantined] = (), record: Record | None = None, **changed: Any
    ) -> Judgement:
        """What the oracle says when somebody has tampered with the ledger, past its triggers and constraints."""
        with psycopg.connect(self.database, options="-c timezone=UTC") as connection:
            connection.execute("SET session_replication_role = replica")
            for statement in tampering:
                connection.execute(statement)
            store(connection, quarantined)
            tables = read_tables(connection)
            connection.rollback()
        given = {"started": self.started, "answers": self.answers, "all_answered": True, **changed}
        return judge(tables, record or self.record, POLICY, **given)


def never(*_: object) -> Quarantined:
    """No operation of the ledger is poison."""
    raise AssertionError


@pytest.fixture(scope="module")
def court(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Court]:
    """A sound ledger."""
    database = stack.create_database("court", template=TEMPLATE)
    court = Court(database, tmp_path_factory.mktemp("court") / "p.jsonl")
    yield court
    sound = court.judge()
    stack.postgres.drop_database("court")
    assert sound.holds, sound.faults


def found(judgement: Judgement, check: str, *words: str) -> bool:
    """Whether a check found a fault of which these words tell."""
    return any(fault.startswith(check) and all(word in fault for word in words) for fault in judgement.faults)


def test_the_oracle_imports_nothing_of_what_it_judges() -> None:
    script = (
        "import sys, tests.faults.oracle\n"
        "ours = ('creditlane', 'models', 'tasks', 'workers', 'schedules', 'scripts', 'celery', 'kombu')\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ours))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sound_ledger_is_sound(court: Court) -> None:
    sound = court.judge()
    assert sound.holds, sound.faults
    assert (sound.operations, sound.sent, sound.answered) == (COUNT, COUNT, COUNT)
    assert sound.entries > COUNT / 2


def test_the_load_has_answers_of_all_kinds(court: Court) -> None:
    with psycopg.connect(court.database) as connection:
        kinds = {row[0] for row in connection.execute("SELECT DISTINCT name FROM operations").fetchall()}
        codes = {row[0] for row in connection.execute("SELECT DISTINCT code FROM operations").fetchall()}
    assert len(kinds) >= 8
    assert {None, "insufficient_credits"} < codes


# O1


def test_a_lost_id_is_found(court: Court) -> None:
    lost = replace(court.record.sent[0], id="lost", reply=None)
    record = Record(sent=[*court.record.sent, lost])
    assert found(court.judge(record=record), "O1", "'lost'", "is lost")


def test_an_id_that_nobody_published_is_found(court: Court) -> None:
    record = Record(sent=court.record.sent[:-1])
    assert found(court.judge(record=record), "O1", "never published")


def test_a_deleted_operation_is_found(court: Court) -> None:
    judgement = court.judge("DELETE FROM operations WHERE account = 'a' AND number = 3")
    assert found(judgement, "O1", "is lost")
    assert found(judgement, "O4", "without a gap")


def test_a_good_message_in_quarantine_is_found(court: Court) -> None:
    row = Quarantined(Code.INVALID_MESSAGE, "of no worth", "lane.001", b"good", operation="x")
    assert found(court.judge(quarantined=[row]), "O1", "a good message is in quarantine")


def test_poison_must_be_in_quarantine_once_and_as_what_it_is(court: Court) -> None:
    def record(code: str) -> Record:
        poison = Poison("a label", "lane.001", sha256(b"bad").hexdigest(), code)
        return Record(sent=court.record.sent, poison=[poison])

    row = Quarantined(Code.MALFORMED, "a reason", "lane.001", b"bad")
    again = replace(row, headers=b'{"other":1}')
    malformed = record("malformed")
    assert found(court.judge(record=malformed), "O1", "'a label'", "neither")
    assert court.judge(record=malformed, quarantined=[row]).holds
    assert found(court.judge(record=malformed, quarantined=[row, again]), "O1", "2 times")
    assert found(court.judge(record=record("unknown_version"), quarantined=[row]), "O1", "quarantined as malformed")


@pytest.fixture
def journey(tampered_database: str, tampered_ledger: Ledger, tmp_path: Path) -> tuple[str, Record]:
    """A ledger with a transfer that arrived and one that came back, and what its producer noted."""
    operations: list[Operation] = [
        ("credits.open", "a", "open", {"account": "a", "kind": "pool"}),
        ("credits.open", "b", "open", {"account": "b", "kind": "pool"}),
        ("credits.grant", "a", "grant", {"account": "a", "amount": "9", "source": "pack", "expires_in": 900}),
        ("credits.transfer", "a", "gift", {"account": "a", "to": "b", "amount": "4.5", "message": "for you"}),
        ("credits.transfer", "a", "lost", {"account": "a", "to": "nobody", "amount": "1"}),
    ]
    notes = Notes(tmp_path / "p.jsonl")
    notes.sent("p", *operations)
    notes.done()
    tampered_ledger.write(*(tampered_ledger.job(name, id, **said) for name, _, id, said in operations))
    while following := tampered_ledger.writer.take_outbox():
        for row in following:
            tampered_ledger.apply(row.task, row.operation, **json.loads(row.arguments))
    execute(tampered_database, "DELETE FROM outbox")
    return tampered_database, read_record([tmp_path / "p.jsonl"])


def judge_journey(journey: tuple[str, Record], *tampering: str) -> Judgement:
    """What the oracle says of transfers that somebody has tampered with."""
    database, record = journey
    with psycopg.connect(database, options="-c timezone=UTC") as connection:
        connection.execute("SET session_replication_role = replica")
        for statement in tampering:
            connection.execute(statement)
        tables = read_tables(connection)
        connection.rollback()
    return judge(tables, record, POLICY)


def test_what_follows_from_an_operation_belongs_to_the_ledger(journey: tuple[str, Record]) -> None:
    sound = judge_journey(journey)
    assert sound.holds, sound.faults
    assert (sound.sent, sound.operations) == (5, 9)


@pytest.mark.parametrize(
    ("statement", "check", "words"),
    [
        ("DELETE FROM operations WHERE name = 'credits.receive' AND account = 'b'", "O1", "a credits.receive"),
        ("DELETE FROM operations WHERE name = 'credits.confirm'", "O1", "a credits.confirm"),
        ("DELETE FROM operations WHERE name = 'credits.bounce'", "O1", "a credits.bounce"),
        ("UPDATE operations SET operation = 'x' WHERE name = 'credits.receive'", "O1", "never published"),
        (
            "UPDATE operations SET arguments = jsonb_set(arguments::jsonb, '{message}', '\"other\"')"
            " WHERE name = 'credits.receive' AND account = 'b'",
            "O2", "not what follows",
        ),
    ],
)  # fmt: skip
def test_a_transfer_that_went_astray_is_found(
    statement: str, check: str, words: str, journey: tuple[str, Record]
) -> None:
    assert found(judge_journey(journey, statement), check, words)


# O2


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE entries SET balance_after_micro = balance_after_micro + 1 WHERE account = 'a' AND seq = 2", "entry 2"),
        ("UPDATE entries SET amount_micro = amount_micro + 1 WHERE account = 'a' AND seq = 2", "entry 2"),
        ("UPDATE entries SET refers_to = 'other' WHERE account = 'a' AND seq = 2", "entry 2"),
        ("UPDATE entries SET at = at - interval '1 second' WHERE account = 'a' AND seq = 2", "entry 2"),
        (
            "INSERT INTO entries (account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at,"
            " refers_to, recorded_at, hash) SELECT account, (SELECT max(seq) + 1 FROM entries WHERE account = 'a'),"
            " operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to, recorded_at, hash"
            " FROM entries WHERE account = 'a' AND seq = 2",
            "entries, the replay has",
        ),
        ("DELETE FROM entries WHERE account = 'a' AND seq = 2", "entry 2"),
        ("UPDATE operations SET charged_micro = 12345 WHERE account = 'a' AND number = 2", "is booked as 12345"),
        ("UPDATE operations SET arguments = '{}' WHERE account = 'a' AND number = 2", "nobody sent"),
        ("UPDATE operations SET status = 'rejected' WHERE account = 'a' AND number = 1", "differs"),
        ("UPDATE operations SET code = 'invalid' WHERE status = 'rejected' AND account = 'a'", "differs"),
        (
            "UPDATE operations SET result = jsonb_set(result::jsonb, '{balance,available}', '\"7\"')"
            " WHERE account = 'a' AND number = 2",
            "differs",
        ),
        (
            "UPDATE grants SET granted_micro = granted_micro + 1, consumed_micro = consumed_micro + 1"
            " WHERE account = 'a' AND grant_id = 1",
            "grant (1",
        ),
        ("UPDATE grants SET priority = 1 WHERE account = 'a' AND grant_id = 1", "grant (1"),
        ("UPDATE accounts SET debt_micro = debt_micro + 1 WHERE account = 'a'", "debt"),
        ("UPDATE holds SET amount_micro = amount_micro + 1", "holds are"),
    ],
)
def test_what_the_replay_does_not_give_is_found(statement: str, words: str, court: Court) -> None:
    assert found(court.judge(statement), "O2", words)


def test_what_a_sender_was_told_must_be_what_the_ledger_says(court: Court) -> None:
    told = {**court.answers}
    told["reply-3"] = {"status": "SUCCESS", "result": {**told["reply-3"]["result"], "charged": "99"}}
    assert found(court.judge(answers=told), "O2", "was told")
    told["reply-3"] = {"status": "FAILURE", "result": {}}
    assert found(court.judge(answers=told), "O2", "FAILURE")
    del told["reply-3"]
    assert found(court.judge(answers=told), "O2", "never told")
    assert court.judge(answers=told, all_answered=False).holds


def test_a_replay_is_counted_and_a_conflict_must_be_one(court: Court) -> None:
    first = court.record.sent[0]
    same = replace(first, producer="copy", reply="copy")
    other = replace(same, arguments={**first.arguments, "email": "other@example.com", "kind": "lead"})
    assert first.reply is not None
    stored = court.answers[first.reply]["result"]
    replayed = {"status": "SUCCESS", "result": {**stored, "replayed": True}}
    conflict = {"status": "SUCCESS", "result": {"status": "rejected", "code": "id_conflict"}}
    for sent, answer, words in (
        (same, replayed, None),
        (same, conflict, "a conflict with itself"),
        (other, conflict, None),
        (other, replayed, "not refused as a conflict"),
    ):
        record = Record(sent=[*court.record.sent, sent])
        judgement = court.judge(record=record, answers={**court.answers, "copy": answer})
        assert judgement.holds if words is None else found(judgement, "O2", words)
        if words is None:
            assert judgement.replayed + judgement.conflicts == 1


def test_a_time_outside_the_run_is_found(court: Court) -> None:
    assert found(court.judge(started=court.started + timedelta(hours=1)), "O2", "outside the run")
    assert found(
        court.judge(
            "UPDATE operations SET applied_at = applied_at + interval '1 hour' WHERE account = 'c' AND number = 1"
        ),
        "O2",
        "outside the run",
    )


# O3


def test_what_does_not_close_is_found(court: Court) -> None:
    judgement = court.judge(
        "ALTER TABLE grants DROP CONSTRAINT grants_close",
        "UPDATE grants SET granted_micro = granted_micro + 1 WHERE account = 'a' AND grant_id = 1",
    )
    assert found(judgement, "O3", "a: grant 1", "does not close")
    assert found(judgement, "O3", "not the sums of its grants")


# O4


def test_swapped_operations_are_found(court: Court) -> None:
    sent = list(court.record.sent)
    mine = [place for place, each in enumerate(sent) if each.account == "b"]
    sent[mine[4]], sent[mine[5]] = sent[mine[5]], sent[mine[4]]
    judgement = court.judge(record=Record(sent=sent))
    assert found(judgement, "O4", "b:", "published before")
    assert court.judge(record=Record(sent=sent), order=False).holds


def test_a_changed_row_breaks_the_chain(court: Court) -> None:
    assert found(
        court.judge("UPDATE entries SET hash = sha256('x') WHERE account = 'a' AND seq = 2"), "O4", "entry 2", "chain"
    )
    assert found(court.judge("UPDATE accounts SET head = sha256('x') WHERE account = 'b'"), "O4", "b:", "head")


def sent(producer: str, *ids: str) -> list[Sent]:
    """A producer's publications on one account."""
    return [Sent(producer, "credits.settle", "a", id, {}, None) for id in ids]


def ledger(*ids: str) -> dict[tuple[str, str], int]:
    """The places of operations."""
    return {("a", id): place for place, id in enumerate(ids)}


@pytest.mark.parametrize(
    ("publications", "places", "late"),
    [
        (sent("p", "1", "2", "3"), ledger("1", "2", "3"), None),
        (sent("p", "1", "2", "3"), ledger("1", "3", "2"), ("2", "3")),
        (sent("p", "1", "2", "3"), ledger("2", "3", "1"), ("1", "2")),
        (sent("p", "1", "2", "1"), ledger("1", "2"), None),
        (sent("p", "1", "lost", "2"), ledger("1", "2"), None),
        # Two producers: each in its own order, between them any.
        (sent("p", "1", "2") + sent("q", "x", "y"), ledger("x", "1", "y", "2"), None),
        (sent("p", "1", "2") + sent("q", "x", "y"), ledger("y", "1", "x", "2"), ("x", "y")),
        # A copy may be quicker than what it copies.
        (sent("p", "1", "2") + sent("q", "2"), ledger("2", "1"), None),
        (sent("p", "1", "2", "3") + sent("q", "2"), ledger("2", "1", "3"), None),
        (sent("p", "1", "2", "3") + sent("q", "2"), ledger("3", "1", "2"), ("2", "3")),
        # Both sent 1 before 2, so 1 was there first whoever was quicker.
        (sent("p", "1", "2") + sent("q", "1", "2"), ledger("2", "1"), ("1", "2")),
    ],
)
def test_an_inversion_is_one_only_where_the_order_is_certain(
    publications: list[Sent], places: dict[tuple[str, str], int], late: tuple[str, str] | None
) -> None:
    assert first_inversion(publications, places) == late


# O5, O6


def test_an_unfinished_queue_is_found(court: Court) -> None:
    assert found(court.judge(left=3), "O5", "3 messages")


def test_an_unfinished_outbox_is_found(court: Court) -> None:
    statement = (
        "INSERT INTO outbox (account, exchange, task, operation, arguments, created_at)"
        " VALUES ('a', '', 'credits.receive', 'x', '{}', now())"
    )
    assert found(court.judge(statement), "O5", "outbox", "credits.receive")


# O7

Months = tuple[str, Record, dict[str, Any]]
"""A database, what was noted of it, and the policy."""


@pytest.fixture
def months(tampered_database: str, tampered_ledger: Ledger, tmp_path: Path) -> Months:
    """A ledger with a plan of each kind and a purchase, two months on."""
    path = tmp_path / "catalog.toml"
    path.write_text(CALENDAR, encoding="utf-8")
    catalog = load_catalog(str(path))
    tampered_ledger.writer.catalog = lambda: catalog
    opened: list[Operation] = [
        ("credits.open", plan, "open", {"account": plan, "kind": "pool", "plan": plan}) for plan in PLANS
    ]
    opened.append(("credits.open", "buyer", "open", {"account": "buyer", "kind": "pool"}))
    used: list[Operation] = [
        ("credits.consume", plan, f"use-{month}", {"account": plan, "amount": "3"})
        for month in range(2) for plan in PLANS
    ]  # fmt: skip
    notes = Notes(tmp_path / "p.jsonl")
    notes.swept()
    notes.sold("stripe:cs_1", "buyer", "50", 600, 200)
    notes.sent("p", *opened, *used)
    notes.done()
    for name, _, id, said in [*opened, *used[:3]]:
        tampered_ledger.apply(name, id, **said)
    travel(tampered_database, MONTH)
    for name, _, id, said in used[3:]:
        tampered_ledger.apply(name, id, **said)
    travel(tampered_database, 2 * MONTH)
    for plan in PLANS:
        tampered_ledger.apply("credits.settle", "by a sweep", account=plan)
    purchase = {"account": "buyer", "purchase": "stripe:cs_1"}
    paid: list[tuple[str, dict[str, Any]]] = [
        ("credits.grant", {**purchase, "amount": "50", "source": "pack"}),
        ("credits.claw_back", {**purchase, "paid_minor": 600, "returned_minor": 200, "step": 1}),
    ]
    for number, (name, said) in enumerate(paid):
        id = f"payment.{number:032x}"
        tampered_ledger.apply(name, id, **said)
        execute(
            tampered_database,
            "INSERT INTO payment_operations (operation, provider, livemode, effect, group_id, account, name, arguments,"
            f" created_at) VALUES ('{id}', 'stripe', false, '{number}', 1, 'buyer', '{name}', '{json.dumps(said)}',"
            " now())",
        )
    return tampered_database, read_record([tmp_path / "p.jsonl"]), read_policy(path)


def judge_months(months: Months, *tampering: str, record: Record | None = None) -> Judgement:
    """What the oracle says of plans and purchases that somebody has tampered with."""
    database, noted, policy = months
    with psycopg.connect(database, options="-c timezone=UTC") as connection:
        connection.execute("SET session_replication_role = replica")
        for table in ("accounts", "grants"):
            connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {table}_close")
        for statement in tampering:
            connection.execute(statement)
        tables = read_tables(connection)
        connection.rollback()
    return judge(tables, record or noted, policy)


def test_plans_and_purchases_that_are_as_they_must_be_are_sound(months: Months) -> None:
    sound = judge_months(months)
    assert sound.holds, sound.faults
    assert sound.operations == 4 + 6 + 3 + 2


SECOND = "account = 'reset' AND kind = 'granted' AND grant_id = 2"
LATER = "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql AS $$SELECT now() + '99 days'$$"


def test_plans_and_purchases_that_are_not_are_found(months: Months) -> None:
    for statement, check, words in (
        (f"UPDATE entries SET at = at - interval '1 hour' WHERE {SECOND}", "O7", "whose periods begin"),
        (f"UPDATE entries SET amount_micro = amount_micro + 1 WHERE {SECOND}", "O7", "whose periods begin"),
        (f"DELETE FROM entries WHERE {SECOND}", "O7", "whose periods begin"),
        (f"UPDATE entries SET recorded_at = at - interval '1 second' WHERE {SECOND}", "O7", "before its time"),
        ("UPDATE accounts SET available_micro = available_micro + 1 WHERE account = 'keep'", "O7", "keep has"),
        ("UPDATE accounts SET available_micro = available_micro + 1 WHERE account = 'carry'", "O7", "carry has"),
        (LATER, "O7", "whose periods begin"),
        ("UPDATE grants SET granted_micro = 1 WHERE account = 'buyer'", "O7", "stripe:cs_1 gave"),
        ("UPDATE grants SET clawed_back_micro = 1 WHERE account = 'buyer'", "O7", "stripe:cs_1 gave"),
        ("UPDATE grants SET purchase = 'stripe:cs_2' WHERE account = 'buyer'", "O7", "stripe:cs_2 was never sold"),
        ("UPDATE grants SET account = 'keep', grant_id = 99 WHERE account = 'buyer'", "O7", "stripe:cs_1 gave"),
        ("DELETE FROM operations WHERE name = 'credits.grant'", "O1", "is lost"),
        ("DELETE FROM payment_operations WHERE name = 'credits.grant'", "O1", "never published"),
        (
            "UPDATE payment_operations SET arguments = jsonb_set(arguments::jsonb, '{amount}', '\"51\"')",
            "O2", "not what follows",
        ),
        (
            "INSERT INTO payment_events (provider, livemode, event_id, type, source, created_at, received_at, body)"
            " VALUES ('stripe', false, 'evt_1', 'invoice.paid', 'webhook', now(), now(), '')",
            "O5", "evt_1",
        ),
        (
            "INSERT INTO payment_facts (provider, livemode, kind, key, group_id, event, fact, occurred_at, heard_at,"
            " status) VALUES ('stripe', false, 'PackPaid', 'cs_9', 1, 1, '{}', now(), now(), 'waiting')",
            "O5", "cs_9",
        ),
    ):  # fmt: skip
        assert found(judge_months(months, statement), check, words), statement


def test_what_nobody_sold_or_swept_is_found(months: Months) -> None:
    _, record, _ = months
    twice = [*record.sold, replace(record.sold[0], sold="stripe:cs_2")]
    assert found(judge_months(months, record=replace(record, sold=twice)), "O7", "stripe:cs_2 gave", "[]")
    assert found(judge_months(months, record=replace(record, swept=False)), "O1", "never published", "by a sweep")


def test_a_producer_that_did_not_say_that_it_is_done_is_unfinished(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "p.jsonl")
    notes.sent("p", ("credits.settle", "a", "1", {"account": "a"}))
    notes.refused(ConnectionError())
    record = read_record([tmp_path / "p.jsonl"])
    assert record.unfinished == ["p.jsonl"]
    assert (len(record.sent), record.refused) == (1, 1)
    notes.done()
    assert read_record([tmp_path / "p.jsonl"]).unfinished == []


def raise_missed(scene: Scene, size: object) -> Done:
    """An act that waits in vain."""
    raise MissedError("it did not come")


def insert_account(scene: Scene, size: object) -> Done:
    """An act after which the ledger is wrong."""
    execute(
        scene.database,
        "INSERT INTO accounts (account, kind, status, updated_at, operations, seq, head, last_grant)"
        " VALUES ('x', 'user', 'open', now(), 1, 0, '', 0)",
    )
    return Done(1, 1, "done")


@pytest.mark.parametrize(
    ("run", "replays", "verdict", "words"),
    [
        (lambda scene, size: Done(1, 1, "done"), False, PASS, ""),
        (lambda scene, size: Done(0, 1, "done"), False, UNKNOWN, "O6"),
        (lambda scene, size: Done(1, 1, "done"), True, UNKNOWN, "O6"),
        (lambda scene, size: Done(1, 1, "done", ["it burns"]), False, FAIL, "it burns"),
        (raise_missed, False, UNKNOWN, "it did not come"),
        (lambda scene, size: scene.value("SELECT 1 / 0"), False, UNKNOWN, "DivisionByZero"),
        (insert_account, False, FAIL, "O4"),
    ],
)  # fmt: skip
def test_a_fault_that_missed_is_no_pass(
    run: Callable[[Scene, object], Done],
    replays: bool,
    verdict: str,
    words: str,
    stack: Stack,
    tmp_path: Path,
) -> None:
    stage = Stage(stack.postgres, TEMPLATE, RedisBroker(stack.redis), tmp_path)
    outcome = play(Act("act", run, replays=replays), 99, stage, SMALL, "seed")
    assert outcome.verdict == verdict
    assert words in " ".join(outcome.faults)


def test_the_worse_verdict_counts() -> None:
    outcome = Outcome(PASS, hits=1, what=["one"])
    outcome.add(Outcome(UNKNOWN, hits=2, operations=3, what=["one", "two"]))
    assert (outcome.verdict, outcome.hits, outcome.operations, outcome.what) == (UNKNOWN, 3, 3, ["one", "two"])
    outcome.add(Outcome(FAIL, faults=["why"]))
    outcome.add(Outcome(PASS))
    assert (outcome.verdict, outcome.faults) == (FAIL, ["why"])
