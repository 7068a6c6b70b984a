"""The ledger writer on a real Postgres: what is written is what the rules say, however the batches are cut."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from creditlane.codes import Code
from creditlane.contract import MAX_NAME, decode_message
from models.audit import audit
from models.catalog import load_catalog, parse_catalog
from models.rules.catalog import Catalog
from models.rules.state import MAX_TOTAL_MICRO, Account, Entry, Hold
from models.rules.state import Grant as Lot
from scripts.embedded import Stack
from tasks.ledger import apply
from tasks.operation import Context, Outcome
from tasks.registry import OPERATIONS
from tests.conftest import TEMPLATE, _ledger
from tests.support import Ledger, rows, travel, value
from workers.lane_consumer import Pieces, write_around
from workers.ledger_writer import AHEAD_OPERATIONS, FIRST_PLANS, Job, LedgerWriter, connect
from workers.quarantine import Quarantined
from workers.rows import PIECE

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)

TABLES = {
    "accounts": "account",
    "grants": "account, grant_id",
    "holds": "account, hold",
    "receipts": "account, operation, line",
    "entries": "account, seq",
    "operations": "account, number",
    "subscriptions": "account",
    "notices": "account, key",
}

FORGIVING = """
[catalog]
name = "forgiving"
[signup]
credits = "6"
expires_days = 2
[priorities]
signup = 10
pack = 50
[features.image]
price = "1"
per = "8"
[features.export]
price = "0"
[packs.small]
credits = "5"
price = "4.99 EUR"
[clawback]
on_spent = "forgive"
[refunds]
refund_days = 2
"""

CATALOGS = {
    "debt": parse_catalog(FORGIVING.replace('"forgive"', '"debt"'), "debt.toml"),
    "forgive": parse_catalog(FORGIVING, "forgive.toml"),
}


def poison(job: Job, code: Code, reason: str, trace: str | None) -> Quarantined:
    """A quarantine row of a job that came from no queue."""
    return Quarantined(
        code, reason, "test", job.arguments, task=job.name, operation=job.operation, account=job.account,
        traceback=trace,
    )  # fmt: skip


@pytest.fixture
def other_ledger(stack: Stack, database: str) -> Iterator[Ledger]:
    """A second ledger in a database of its own, audited like the first."""
    name = f"{database.rsplit('/', 1)[1].partition('?')[0]}_other"
    url = stack.create_database(name, template=TEMPLATE)
    catalog = load_catalog("packs")
    with connect(url) as connection:
        yield Ledger(LedgerWriter(connection, lambda: catalog, poison), catalog)
    with psycopg.connect(url, autocommit=True) as connection:
        report = audit(connection)
    stack.postgres.drop_database(name)
    assert report.holds, report.faults


def job(name: str, identity: str, /, **arguments: Any) -> Job:
    """One operation, ready to be written."""
    raw = msgspec.json.encode(arguments)
    return Job(name, identity, decode_message(name, raw), raw)


def send(ledger: Ledger, name: str, identity: str, /, **arguments: Any) -> dict[str, Any]:
    """Write one operation in a batch of its own; returns its result."""
    return ledger.write(job(name, identity, **arguments))[0]


def freeze(ledger: Ledger, instant: datetime) -> None:
    """Let the ledger's clock stand still."""
    ledger.writer.connection.execute(
        "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE"
        f" AS 'SELECT timestamptz ''{instant.isoformat()}'''"
    )


@contextmanager
def priced_by(ledger: Ledger, catalog: Catalog) -> Iterator[None]:
    """Apply another catalog for a while."""
    before, ledger.writer.catalog = ledger.writer.catalog, lambda: catalog
    yield
    ledger.writer.catalog = before


def written(ledger: Ledger, accounts: Sequence[str]) -> dict[str, list[str]]:
    """Every row of some accounts, as Postgres writes whole rows: byte for byte."""
    connection = ledger.writer.connection
    return {
        table: [
            row
            for (row,) in connection.execute(
                f"SELECT t::text FROM {table} t WHERE account = ANY(%s) ORDER BY {order}", (list(accounts),)
            )
        ]
        for table, order in TABLES.items()
    }


def one(ledger: Ledger, query: str, *parameters: Any) -> Any:
    """The one value of a query, on the ledger's own connection."""
    row = ledger.writer.connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def all_of(ledger: Ledger, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """The rows of a query, on the ledger's own connection."""
    return ledger.writer.connection.execute(query, parameters).fetchall()


# A random life of a few accounts


class Step(NamedTuple):
    """One operation of a random life, and how much later than the one before it comes."""

    pause: timedelta
    name: str
    operation: str
    arguments: dict[str, Any]


PAUSES = [timedelta(0)] * 6 + [timedelta(seconds=90), timedelta(hours=3), timedelta(days=1), timedelta(days=3)]
AMOUNTS = ["4", "0.000001", "0.3", "2.5", "7", "20"]
SCOPES = [None, None, ["image"], ["image", "other"]]
LIVES = [None, 60, 3600, 7200, 86400, 3 * 86400]


def random_life(random: Random) -> list[Step]:
    """A life of two accounts: mostly what applies, with repeats, references to what never was or is over, and waits."""
    life: list[Step] = []
    accounts = {name: Account(name) for name in ("first", "second")}
    ids: dict[str, dict[str, list[str]]] = {name: {"hold": ["never"], "charge": ["never"]} for name in accounts}
    now = START
    for number in range(random.randint(15, 40)):
        pause = random.choice(PAUSES)
        name, kind = random.choice(["first", "first", "first", "second"]), random.choice(KINDS)
        if number < 2:
            name, kind = ("first", "second")[number], "open"
        if kind == "again":
            step = random.choice(life)._replace(pause=pause)
        else:
            arguments = {"account": name, **random_arguments(random, kind, ids[name])}
            step = Step(pause, f"credits.{kind}", f"{kind}-{number}", arguments)
        life.append(step)
        now += pause
        raw = msgspec.json.encode(step.arguments)
        given_answer = apply(
            accounts[step.arguments["account"]], step.name, step.operation, decode_message(step.name, raw), raw, now,
            CATALOGS["debt"],
        )  # fmt: skip
        if given_answer.row is not None and given_answer.row.status == "applied":
            for group, makers in (("hold", ("hold",)), ("charge", ("consume", "capture"))):
                if kind in makers:
                    ids[name][group].append(step.operation)
    return life


KINDS = [
    "grant", "grant", "consume", "consume", "hold", "hold", "capture", "release", "refund", "refund", "refund",
    "adjust", "revoke", "settle", "open", "again",
]  # fmt: skip


def random_arguments(random: Random, kind: str, ids: dict[str, list[str]]) -> dict[str, Any]:
    """Arguments of an operation, but for its account."""
    arguments: dict[str, Any] = {}
    if kind == "grant":
        arguments = {
            "amount": random.choice(AMOUNTS), "source": random.choice(["pack", "promo"]),
            "features": random.choice(SCOPES),
            "expires_in": random.choice(LIVES), "purchase": random.choice([None, "p-1", "p-2"]),
        }  # fmt: skip
    elif kind in ("consume", "hold"):
        arguments = dict(random.choice(CHARGES))
        if kind == "consume":
            arguments["partial"] = random.choice([False, True])
        else:
            arguments["ttl"] = random.choice([7200, 60, 86400])
    elif kind in ("capture", "release"):
        arguments["hold"] = random.choice(ids["hold"][-4:])
        if kind == "capture":
            arguments["amount"] = random.choice([None, "0.4", "0", "1.9"])
    elif kind == "refund":
        arguments["operation"] = random.choice(ids["charge"][-3:])
        arguments["amount"] = random.choice([None, "0.2", "1"])
    elif kind == "adjust":
        arguments = {"amount": random.choice(["-0.5", "-1", "2"]), "actor": "admin", "reason": "because"}
    elif kind == "revoke":
        arguments = dict(
            random.choice([{"purchase": "p-1"}, {"purchase": "p-2"}, {"grant": 2}, {"grant": 3, "amount": "1"}])
        )
    return {key: value for key, value in arguments.items() if value is not None}


CHARGES: list[dict[str, Any]] = [
    {"feature": "image", "quantity": 7}, {"amount": "0.7"}, {"amount": "1.5"}, {"feature": "image", "quantity": 40},
    {"amount": "5"}, {"feature": "export"},
]  # fmt: skip


_lives = itertools.count(1)


class Lived:
    """A life with account names of its own, and the instant of each operation."""

    def __init__(self, life: Sequence[Step]) -> None:
        self.prefix = f"life-{next(_lives)}-"
        self.accounts = [f"{self.prefix}first", f"{self.prefix}second"]
        self.moments: list[tuple[datetime, Step]] = []
        now = START
        for step in life:
            now += step.pause
            arguments = {**step.arguments, "account": self.prefix + step.arguments["account"]}
            self.moments.append((now, step._replace(arguments=arguments)))

    def one_by_one(self, ledger: Ledger) -> list[bytes | None]:
        """Write each operation in a batch of its own; returns the results."""
        results: list[bytes | None] = []
        for now, step in self.moments:
            freeze(ledger, now)
            alone = job(step.name, step.operation, **step.arguments)
            ledger.writer.write([alone])
            results.append(alone.result)
        return results

    def together(self, ledger: Ledger) -> list[bytes | None]:
        """Write all operations of one instant in one batch; returns the results."""
        results: list[bytes | None] = []
        for now, moments in itertools.groupby(self.moments, key=lambda moment: moment[0]):
            freeze(ledger, now)
            jobs = [job(step.name, step.operation, **step.arguments) for _, step in moments]
            ledger.writer.write(jobs)
            results += [each.result for each in jobs]
        return results

    def in_memory(self, catalog: Catalog) -> tuple[dict[str, Account], list[bytes | None]]:
        """Apply everything to accounts that are never written nor read."""
        accounts = {name: Account(name) for name in self.accounts}
        results: list[bytes | None] = []
        for now, step in self.moments:
            account = accounts[step.arguments["account"]]
            before = account.updated_at
            account.is_dirty = False
            raw = msgspec.json.encode(step.arguments)
            message = decode_message(step.name, raw)
            results.append(apply(account, step.name, step.operation, message, raw, now, catalog).result)
            if not account.is_dirty:
                account.updated_at = before  # a repeated message writes nothing
        return accounts, results


def attribute(item: Any, column: str) -> Any:
    """What a column says of an object of the rules."""
    name = {"grant_id": "id" if isinstance(item, Lot) else "grant", "hold": "id"}.get(column, column)
    found = getattr(item, name) if hasattr(item, name) else getattr(item, name.removesuffix("_micro"))
    return sorted(found) if isinstance(found, frozenset) else found


def compare_with_memory(ledger: Ledger, account: Account) -> None:
    """The rows of an account say exactly what the account in memory does."""
    account.next_due_at = account.due_at()
    expected: dict[str, Sequence[Account | Lot | Hold | Entry]] = {
        "accounts": [account],
        "grants": [account.grants[grant] for grant in sorted(account.grants)],
        "holds": [account.holds[hold] for hold in sorted(account.holds)],
        "entries": account.entries,
    }
    for table, items in expected.items():
        with ledger.writer.connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(f"SELECT * FROM {table} WHERE account = %s", (account.account,))
            found = sorted(cursor, key=lambda row: (row.get("seq"), row.get("grant_id"), row.get("hold")))
        assert len(found) == len(items), table
        for row, item in zip(found, items, strict=True):
            if table != "accounts":
                del row["account"]
            assert row == {column: attribute(item, column) for column in row}, table


@pytest.mark.parametrize("on_spent", CATALOGS)
def test_however_a_life_is_cut_into_batches_the_rows_and_answers_are_the_same(
    on_spent: str, ledger: Ledger, other_ledger: Ledger
) -> None:
    catalog = CATALOGS[on_spent]

    @settings(
        max_examples=100, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.integers(0, 2**64))
    def same(seed: int) -> None:
        lived = Lived(random_life(Random(seed)))
        answers = lived.one_by_one(ledger)
        assert None not in answers
        assert lived.together(other_ledger) == answers
        assert written(other_ledger, lived.accounts) == written(ledger, lived.accounts)
        accounts, in_memory = lived.in_memory(catalog)
        assert in_memory == answers
        for account in accounts.values():
            if account.operations:
                compare_with_memory(ledger, account)

    with priced_by(ledger, catalog), priced_by(other_ledger, catalog):
        same()


def test_what_was_forgiven_of_a_closed_lot_is_taken_when_what_continues_it_comes_back(ledger: Ledger) -> None:
    with priced_by(ledger, CATALOGS["forgive"]):
        freeze(ledger, START)
        send(ledger, "credits.open", "open", account="a", kind="pool")
        send(ledger, "credits.grant", "g", account="a", amount=10, source="pack", purchase="p", expires_in=3600)
        send(ledger, "credits.consume", "c", account="a", amount=10)
        freeze(ledger, START + 2 * HOUR)
        send(ledger, "credits.refund", "r", account="a", operation="c", amount=6)
        send(ledger, "credits.consume", "c-2", account="a", amount=2)
        send(ledger, "credits.hold", "h", account="a", amount=4)
        revoked = send(ledger, "credits.revoke", "v", account="a", purchase="p")
        assert (revoked["status"], revoked["forgiven"]) == ("applied", "10")
        released = send(ledger, "credits.release", "l", account="a", hold="h")
        assert released["balance"] == {"available": "0"}
        refunded = send(ledger, "credits.refund", "r-2", account="a", operation="c-2")
        assert refunded["balance"] == {"available": "0"}
        assert all_of(ledger, "SELECT kind, amount_micro FROM entries WHERE kind = 'revoked' ORDER BY seq") == [
            ("revoked", 4_000_000), ("revoked", 2_000_000),
        ]  # fmt: skip


# Within a batch, and on what earlier batches left


def test_duplicates_within_one_batch_apply_once_and_answer_alike(ledger: Ledger) -> None:
    answers = ledger.write(
        job("credits.open", "open", account="a"),
        job("credits.consume", "c", account="a", amount=3),
        job("credits.consume", "c", account="a", amount=3),
        job("credits.consume", "c", account="a", amount=4),
        job("credits.consume", "c", account="a", amount=3),
        job("credits.consume", "c", account="b", amount=3),
    )
    first, again, conflict, last, elsewhere = answers[1:]
    assert (first["status"], first.get("replayed")) == ("applied", None)
    assert again == last == {**first, "replayed": True}
    assert (conflict["status"], conflict["code"]) == ("rejected", "id_conflict")
    assert elsewhere["code"] == "unknown_account"
    assert all_of(ledger, "SELECT account, operation, number FROM operations ORDER BY 1, 3") == [
        ("a", "open", 1), ("a", "c", 2), ("b", "c", 1),
    ]  # fmt: skip
    assert one(ledger, "SELECT consumed_micro FROM accounts WHERE account = 'a'") == 3_000_000


def test_a_duplicate_of_an_earlier_batch_is_answered_as_the_first_time(ledger: Ledger) -> None:
    send(ledger, "credits.open", "open", account="a")
    first = send(ledger, "credits.consume", "c", account="a", amount=60)
    assert first["code"] == "insufficient_credits"
    send(ledger, "credits.grant", "g", account="a", amount=100, source="pack")
    before = written(ledger, ["a"])
    again, conflict = ledger.write(
        job("credits.consume", "c", account="a", amount=60),
        job("credits.consume", "c", account="a", amount=61),
    )
    assert again == {**first, "replayed": True}
    assert conflict["code"] == "id_conflict"
    assert written(ledger, ["a"]) == before


def test_a_charge_of_an_earlier_batch_is_refunded_twice_in_one_batch_and_never_over_what_was_taken(
    ledger: Ledger,
) -> None:
    ledger.write(
        job("credits.open", "open", account="a"),
        job("credits.grant", "g", account="a", amount=5, source="early", priority=1),
        job("credits.consume", "c", account="a", amount=8),
    )
    answers = ledger.write(
        job("credits.refund", "r-1", account="a", operation="c", amount=4),
        job("credits.refund", "r-2", account="a", operation="c", amount=3),
        job("credits.refund", "r-3", account="a", operation="c", amount=2),
        job("credits.refund", "r-4", account="a", operation="c"),
    )
    assert [answer.get("code") for answer in answers] == [None, None, "exceeds_original", None]
    assert [answer.get("charged") for answer in answers] == ["-4", "-3", None, "-1"]
    assert all_of(ledger, "SELECT line, grant_id, taken_micro, returned_micro FROM receipts ORDER BY line") == [
        (1, 2, 5_000_000, 5_000_000), (2, 1, 3_000_000, 3_000_000),
    ]  # fmt: skip
    assert send(ledger, "credits.refund", "r-5", account="a", operation="c")["code"] == "exceeds_original"


def test_a_refund_to_a_used_up_grant_opens_it_again_and_one_to_an_expired_grant_continues_it(ledger: Ledger) -> None:
    freeze(ledger, START)
    send(ledger, "credits.open", "open", account="a", kind="pool")
    send(ledger, "credits.grant", "g-1", account="a", amount=2, source="pack", features=["image"], purchase="p")
    send(ledger, "credits.grant", "g-2", account="a", amount=3, source="promo", expires_in=60)
    send(ledger, "credits.consume", "c-1", account="a", feature="image", quantity=16)
    send(ledger, "credits.consume", "c-2", account="a", amount=3)
    assert all_of(ledger, "SELECT grant_id FROM grants WHERE is_open") == []
    freeze(ledger, START + HOUR)
    send(ledger, "credits.refund", "r-1", account="a", operation="c-1")
    send(ledger, "credits.refund", "r-2", account="a", operation="c-2")
    assert all_of(
        ledger,
        "SELECT grant_id, source, features, purchase, available_micro, origin, expires_at FROM grants WHERE is_open"
        " ORDER BY 1",
    ) == [
        (1, "pack", ["image"], "p", 2_000_000, None, None),
        (3, "promo", None, None, 3_000_000, 2, START + HOUR + timedelta(days=30)),
    ]


def test_holds_of_earlier_batches_are_captured_and_released_with_their_receipts(ledger: Ledger) -> None:
    ledger.write(
        job("credits.open", "open", account="a"),
        job("credits.grant", "g", account="a", amount=5, source="early", priority=1),
        job("credits.hold", "h-1", account="a", amount=8),
        job("credits.hold", "h-2", account="a", feature="image", quantity=80),
        job("credits.hold", "h-3", account="a", amount=1),
    )
    captured = send(ledger, "credits.capture", "k-1", account="a", hold="h-1", amount=6)
    more = send(ledger, "credits.capture", "k-2", account="a", hold="h-2", quantity=88)
    released = send(ledger, "credits.release", "l", account="a", hold="h-3")
    assert [answer["charged"] for answer in (captured, more, released)] == ["6", "11", "-1"]
    assert all_of(ledger, "SELECT hold, status, amount_micro, captured_micro FROM holds ORDER BY hold") == [
        ("h-1", "captured", 8_000_000, 6_000_000),
        ("h-2", "captured", 10_000_000, 10_000_000),
        ("h-3", "released", 1_000_000, 0),
    ]
    assert all_of(
        ledger, "SELECT operation, grant_id, taken_micro, returned_micro FROM receipts ORDER BY operation, line"
    ) == [
        ("h-1", 2, 5_000_000, 0), ("h-1", 1, 3_000_000, 2_000_000),
        ("h-2", 1, 10_000_000, 0),
        ("h-3", 1, 1_000_000, 1_000_000),
    ]  # fmt: skip
    assert send(ledger, "credits.capture", "k-3", account="a", hold="h-1")["code"] == "hold_closed"
    assert send(ledger, "credits.release", "l-2", account="a", hold="h-3")["code"] == "hold_closed"
    assert send(ledger, "credits.capture", "k-4", account="a", hold="h-9")["code"] == "unknown_hold"
    refunded = send(ledger, "credits.refund", "r", account="a", operation="k-2")
    assert (refunded["charged"], refunded["balance"]["available"]) == ("-11", "49")


def test_a_purchase_is_revoked_from_its_closed_grants_and_from_what_continues_them(ledger: Ledger) -> None:
    freeze(ledger, START)
    send(ledger, "credits.open", "open", account="a", kind="pool")
    send(ledger, "credits.grant", "g-1", account="a", amount=4, source="pack", purchase="p", expires_in=60)
    send(ledger, "credits.grant", "g-2", account="a", amount=3, source="pack", purchase="p")
    send(ledger, "credits.grant", "other", account="a", amount=9, source="pack", purchase="q")
    send(ledger, "credits.consume", "c-1", account="a", amount=4)
    send(ledger, "credits.consume", "c-2", account="a", amount=3)
    freeze(ledger, START + HOUR)
    send(ledger, "credits.refund", "r", account="a", operation="c-1", amount=1)
    assert all_of(ledger, "SELECT grant_id, origin FROM grants WHERE is_open ORDER BY 1") == [(3, None), (4, 1)]
    revoked = send(ledger, "credits.revoke", "v", account="a", purchase="p")
    # One credit of seven came back and is taken from what continues the first lot; six were spent.
    assert (revoked["charged"], revoked["owed"]) == ("1", "6")
    assert all_of(ledger, "SELECT grant_id, available_micro, clawed_back_micro FROM grants ORDER BY 1") == [
        (1, 0, 4_000_000), (2, 0, 3_000_000), (3, 9_000_000, 0), (4, 0, 0),
    ]  # fmt: skip
    assert one(ledger, "SELECT debt_micro FROM accounts") == 6_000_000
    assert send(ledger, "credits.revoke", "v-2", account="a", purchase="p")["code"] == "exceeds_original"
    assert send(ledger, "credits.revoke", "v-3", account="a", grant=1)["code"] == "exceeds_original"
    assert send(ledger, "credits.revoke", "v-4", account="a", grant=7)["code"] == "unknown_grant"


# Faults


@pytest.mark.parametrize("many", [0, 2 * PIECE])
def test_an_operation_whose_code_raises_is_quarantined_and_its_mates_stand_as_if_it_had_not_been_there(
    ledger: Ledger, other_ledger: Ledger, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """With many before it, some are on their way to the database when it raises."""
    consume = OPERATIONS["credits.consume"]

    def run(account: Account, message: Any, context: Context) -> Outcome:
        outcome = consume.run(account, message, context)
        if context.operation == "cursed":
            account.email = "half done"
            raise LookupError("no such thing")
        return outcome

    monkeypatch.setitem(OPERATIONS, "credits.consume", consume._replace(run=run))

    def batch(cursed: bool) -> list[Job]:
        jobs = [
            *(job("credits.consume", f"many-{number}", account="b", amount="0.01") for number in range(many)),
            job("credits.consume", "before", account="a", amount=1),
            job("credits.consume", "b-1", account="b", amount=2),
            job("credits.hold", "h", account="a", amount=3),
            job("credits.consume", "before", account="a", amount=1),
            job("credits.consume", "cursed", account="a", amount=4),
            job("credits.consume", "old", account="a", amount=1),
            job("credits.refund", "r", account="a", operation="before"),
            job("credits.capture", "k", account="a", hold="h"),
            job("credits.open", "open", account="new"),
        ]
        return [each for each in jobs if cursed or each.operation != "cursed"]

    for where, cursed in ((ledger, True), (other_ledger, False)):
        freeze(where, START)
        where.write(*(job("credits.open", "open", account=name) for name in "ab"))
        send(where, "credits.consume", "old", account="a", amount=1)
        freeze(where, START + HOUR)
        where.writer.write(jobs := batch(cursed))
        results = [each.result for each in jobs if each.operation != "cursed"]
        if cursed:
            (bad,) = (each for each in jobs if each.operation == "cursed")
            expected = results
    assert results == expected
    assert written(ledger, ["a", "b", "new"]) == written(other_ledger, ["a", "b", "new"])
    assert bad.result is None
    assert bad.quarantined is not None
    ((code, task, operation, account, reason, trace, body),) = all_of(
        ledger, "SELECT code, task, operation, account, reason, traceback, body FROM quarantine"
    )
    assert (code, task, operation, account) == ("internal_error", "credits.consume", "cursed", "a")
    assert reason == "LookupError: no such thing"
    assert trace.startswith("Traceback")
    assert 'raise LookupError("no such thing")' in trace
    assert msgspec.json.decode(body) == {"account": "a", "amount": 4}
    # Mended, the same message is applied.
    monkeypatch.undo()
    assert send(ledger, "credits.consume", "cursed", account="a", amount=4)["status"] == "applied"


def test_an_account_whose_only_operation_raises_is_not_made(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(account: Account, message: Any, context: Context) -> Outcome:
        raise ZeroDivisionError

    monkeypatch.setitem(OPERATIONS, "credits.open", OPERATIONS["credits.open"]._replace(run=run))
    send(ledger, "credits.open", "open", account="a")
    assert all_of(ledger, "SELECT account FROM accounts") == []
    assert all_of(ledger, "SELECT code, account FROM quarantine") == [("internal_error", "a")]


def test_what_raises_while_the_database_works_undoes_the_transaction(ledger: Ledger) -> None:
    send(ledger, "credits.open", "open", account="a")
    before = written(ledger, ["a"])
    jobs = [job("credits.consume", f"c-{number}", account="a", amount="0.1") for number in range(AHEAD_OPERATIONS)]

    def fail() -> None:
        raise ConnectionResetError("the broker is gone")

    with pytest.raises(ConnectionResetError):
        ledger.writer.write(jobs, (), fail)
    assert written(ledger, ["a"]) == before
    called: list[int] = []
    ledger.writer.write(jobs, (), lambda: called.append(1))
    assert called == [1]
    assert {each.status for each in jobs} == {"applied"}
    ledger.writer.write(jobs, (), lambda: called.append(2))  # nothing to write: called all the same
    assert called == [1, 2]
    assert {each.status for each in jobs} == {"replayed"}


def test_a_batch_that_the_database_refuses_leaves_nothing(ledger: Ledger) -> None:
    send(ledger, "credits.open", "open", account="a")
    before = written(ledger, ["a", "b"])
    ledger.writer.connection.execute("ALTER TABLE entries ADD CONSTRAINT cursed CHECK (operation <> 'cursed')")
    quarantined = Quarantined(Code.MALFORMED, "none", "lane.000", b"x")
    with pytest.raises(psycopg.errors.CheckViolation):
        ledger.writer.write(
            [job("credits.open", "open", account="b"), job("credits.consume", "cursed", account="a",
                                                                        amount=1)],
            [quarantined],
        )  # fmt: skip
    assert written(ledger, ["a", "b"]) == before
    assert all_of(ledger, "SELECT id FROM quarantine") == []
    assert send(ledger, "credits.consume", "c", account="a", amount=1)["status"] == "applied"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE accounts SET available_micro = available_micro + 1",
        "UPDATE accounts SET consumed_micro = consumed_micro - 1",
        "UPDATE accounts SET granted_micro = granted_micro + 1",
        "UPDATE accounts SET available_micro = -1, consumed_micro = consumed_micro + available_micro + 1",
        "UPDATE accounts SET debt_micro = -1",
        "UPDATE grants SET available_micro = available_micro - 1",
        "UPDATE grants SET available_micro = -1, consumed_micro = consumed_micro + available_micro + 1",
        "UPDATE grants SET clawed_back_micro = -1",
        "UPDATE grants SET is_open = NOT is_open",
        "UPDATE receipts SET returned_micro = taken_micro + 1",
        "UPDATE receipts SET returned_micro = -1",
    ],
)
def test_a_row_that_does_not_close_cannot_be_written_even_by_the_owner(ledger: Ledger, change: str) -> None:
    ledger.write(
        job("credits.open", "open", account="a"),
        job("credits.consume", "c", account="a", amount=1),
        job("credits.refund", "r", account="a", operation="c", amount="0.5"),
    )
    with pytest.raises(psycopg.errors.CheckViolation):
        ledger.writer.connection.execute(change)


# What text and JSON may hold


ODD = [
    "back\\slash \\N \\. \\t \\\\",
    "\\.",
    "\\N",
    "NULL",
    "{},\"'`$1 %s %(a)s {0} --;/*",
    '"',
    "emoji 👩‍👩‍👧‍👦 🇫🇷",
    "עברית العربية \u202e\u2066mixed\u2069",
    "𝕒" * MAX_NAME,
    " spaces \u00a0 \u3000 ",
    "e\u0301 é \ufeff \ufffd \U0010fffe",
]


def test_what_an_aborted_batch_did_not_prepare_is_not_taken_for_prepared(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(account: Account, message: Any, context: Context) -> Outcome:
        account.debt = 2**63  # the update of accounts fails; that of grants comes after it, and is not even parsed
        return Outcome()

    monkeypatch.setitem(OPERATIONS, "credits.settle", OPERATIONS["credits.settle"]._replace(run=run))
    connection = ledger.writer.connection
    opening = ledger.job("credits.open", "open", account="alice")
    for number in range(4):  # from the first batch of the connection on
        good = [opening, ledger.job("credits.consume", f"good-{number}", account="alice", amount=1)]
        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            ledger.write(*good, ledger.job("credits.settle", f"bad-{number}", account="alice"))
        assert connection.info.transaction_status == TransactionStatus.IDLE
        assert {each["status"] for each in ledger.write(*good)} == {"applied"}


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_text_survives_in_every_field_byte_for_byte(ledger: Ledger, odd: str) -> None:
    account = job("credits.open", odd, account=odd, email=odd).message.account
    assert account == odd
    answers = ledger.write(
        job("credits.open", "open", account=odd, email=odd),
        job("credits.grant", odd, account=odd, amount=9, source=odd, features=[odd, "image", "\\"],
                   purchase=odd, reason=odd),
        job("credits.adjust", f"a{odd}"[:MAX_NAME], account=odd, amount=1, actor=odd, reason=odd),
    )  # fmt: skip
    answers += [
        send(ledger, "credits.hold", f"h{odd}"[:MAX_NAME], account=odd, feature="image", quantity=8, member=odd,
                     metadata={odd: [odd, {odd: None}]}),
        send(ledger, "credits.capture", f"k{odd}"[:MAX_NAME], account=odd, hold=f"h{odd}"[:MAX_NAME]),
        send(ledger, "credits.refund", f"r{odd}"[:MAX_NAME], account=odd, operation=f"k{odd}"[:MAX_NAME],
                     reason=odd),
        send(ledger, "credits.revoke", f"v{odd}"[:MAX_NAME], account=odd, purchase=odd, reason=odd),
    ]  # fmt: skip
    assert [answer["status"] for answer in answers] == ["applied"] * 7
    unknown = send(ledger, "credits.consume", f"u{odd}"[:MAX_NAME], account=odd, feature=odd, member=odd)
    assert unknown["code"] == "unknown_feature"
    again = send(ledger, "credits.grant", odd, account=odd, amount=9, source=odd, features=[odd, "image", "\\"],
                         purchase=odd, reason=odd)  # fmt: skip
    assert again == {**answers[1], "replayed": True}
    assert all_of(ledger, "SELECT account, email FROM accounts") == [(odd, odd)]
    assert all_of(ledger, "SELECT source, features, purchase, operation FROM grants WHERE operation = %s", odd) == [
        (odd, sorted([odd, "image", "\\"]), odd, odd)
    ]
    assert all_of(ledger, "SELECT feature, member FROM operations WHERE name = 'credits.consume'") == [(odd, odd)]
    assert all_of(ledger, "SELECT hold, member FROM holds") == [(f"h{odd}"[:MAX_NAME], odd)]
    assert one(ledger, "SELECT arguments FROM operations WHERE name = 'credits.hold'")["metadata"] == {
        odd: [odd, {odd: None}]
    }
    assert one(ledger, "SELECT arguments FROM operations WHERE name = 'credits.adjust'")["actor"] == odd
    assert one(ledger, "SELECT refers_to FROM entries WHERE kind = 'captured'") == f"h{odd}"[:MAX_NAME]


@settings(max_examples=40, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=120),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_any_text_of_the_contract_survives(ledger: Ledger, names: list[str]) -> None:
    accounts = [f"{next(_lives)}{name}" for name in names]
    pairs = list(zip(accounts, names, strict=True))
    ledger.write(
        *(job("credits.open", f"o{name}", account=account, email=name) for account, name in pairs),
        *(job("credits.grant", name, account=account, amount=1, source=name, features=names, purchase=name)
          for account, name in pairs),
    )  # fmt: skip
    ledger.write(*(job("credits.settle", f"s{name}", account=account) for account, name in pairs))
    found = all_of(
        ledger,
        "SELECT a.account, a.email, g.source, g.features, g.purchase, g.operation FROM accounts a"
        " JOIN grants g USING (account) WHERE account = ANY(%s) AND g.grant_id = 2",
        accounts,
    )
    expected = [(account, name, name, sorted(names), name, name) for account, name in pairs]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    "raw",
    [
        b'{\n\t"account" :\r\n "a",\t"feature": "export" , "metadata" : {\n\n"x":\t[ 1 ,2\r]\n}\n}',
        rb'{"account":"a","feature":"export","metadata":{"a\nb\tc\r\b\f\"\\\/":"\u00e9\ud83d\ude00 \\n \\\\ \\."}}',
        b'{"account":"\\u0061","feature":"export","metadata":{"n":[1.0,1e5,-0.0,1E+2,123456789012345678901234567890]}}',
        '{"account":"a","feature":"export","metadata":{"é":"\u00a0👩‍👧 \x7f"}}'.encode(),
        rb'{"account":"a","feature":"export","metadata":{"twice":1,"twice":2,"nul but not":"\\u0000"}}',
    ],
)
def test_arguments_are_kept_as_they_came(ledger: Ledger, raw: bytes) -> None:
    send(ledger, "credits.open", "open", account="a")
    ledger.writer.write([Job("credits.consume", "c", decode_message("credits.consume", raw), raw)])
    assert one(ledger, "SELECT arguments::text FROM operations WHERE operation = 'c'").encode() == raw
    again = Job("credits.consume", "c", decode_message("credits.consume", raw), raw)
    ledger.writer.write([again])
    assert again.result is not None
    assert msgspec.json.decode(again.result)["replayed"]


# Two writers, the clock, large numbers


def test_two_writers_on_the_same_accounts_never_overspend_and_lose_nothing(database: str) -> None:
    catalog = load_catalog("packs")
    start = threading.Barrier(2)
    accounts = [f"shared-{number}" for number in range(6)]
    answers: dict[int, list[Job]] = {0: [], 1: []}
    failures: list[BaseException] = []

    def produce(writer_number: int) -> None:
        try:
            with connect(database) as connection:
                writer = LedgerWriter(connection, lambda: catalog, poison)
                for turn in range(25):
                    start.wait(30)
                    batch = []
                    for account in accounts[:: 1 if writer_number else -1]:
                        name = f"{account}-{turn // 5}"
                        batch.append(job("credits.open", "open", account=name))
                        batch += [
                            job("credits.consume", f"{writer_number}-{turn}-{number}", account=name, amount=2)
                            for number in range(3)
                        ]
                        batch.append(job("credits.consume", f"both-{turn}", account=name, amount=1))
                    write_around(writer, batch)
                    answers[writer_number] += batch
        except BaseException as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=produce, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(each.result is not None and each.quarantined is None for jobs in answers.values() for each in jobs)
    sent = {(each.account, each.operation) for jobs in answers.values() for each in jobs}
    assert set(rows(database, "SELECT account, operation FROM operations")) == sent
    # 50 credits each, 65 wanted: every one is used up to less than a charge, none is overdrawn.
    left = rows(database, "SELECT available_micro, consumed_micro FROM accounts")
    assert len(left) == 5 * len(accounts)
    assert all(0 <= available < 2_000_000 and available + used == 50_000_000 for available, used in left)
    assert value(database, "SELECT count(*) FROM quarantine") == 0
    charged = rows(database, "SELECT sum(charged_micro) FROM operations WHERE name = 'credits.consume'")[0][0]
    assert charged == sum(used for _, used in left)
    both = [each for jobs in answers.values() for each in jobs if each.operation.startswith("both-")]
    assert sum(b'"replayed":true' in (each.result or b"") for each in both) == len(both) // 2


def test_two_writers_on_accounts_that_exist_wait_for_each_other_and_never_collide(database: str) -> None:
    catalog = load_catalog("packs")
    accounts = [f"shared-{number}" for number in range(3)]
    with connect(database) as connection:
        LedgerWriter(connection, lambda: catalog, poison).write(
            [job("credits.open", "open", account=account) for account in accounts]
        )
    start = threading.Barrier(2)
    failures: list[BaseException] = []

    def produce(number: int) -> None:
        try:
            with connect(database) as connection:
                writer = LedgerWriter(connection, lambda: catalog, poison)
                for turn in range(60):
                    start.wait(30)
                    order = accounts[:: 1 if number else -1]
                    writer.write([job("credits.consume", f"{number}-{turn}", account=each, amount=1) for each in order])
        except BaseException as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=produce, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert rows(database, "SELECT DISTINCT available_micro, consumed_micro, operations FROM accounts") == [
        (0, 50_000_000, 121)
    ]


def test_a_database_clock_that_steps_back_moves_no_accounts_time_back(ledger: Ledger) -> None:
    freeze(ledger, START)
    send(ledger, "credits.open", "open", account="a")
    freeze(ledger, START - HOUR)
    ledger.write(
        job("credits.grant", "g", account="a", amount=1, source="pack", expires_in=60),
        job("credits.open", "open", account="b"),
    )
    assert all_of(ledger, "SELECT account, updated_at FROM accounts ORDER BY 1") == [
        ("a", START), ("b", START - HOUR),
    ]  # fmt: skip
    assert one(ledger, "SELECT expires_at FROM grants WHERE operation = 'g'") == START + timedelta(seconds=60)
    assert all_of(ledger, "SELECT DISTINCT account, recorded_at FROM entries ORDER BY 1") == [
        ("a", START), ("b", START - HOUR),
    ]  # fmt: skip
    freeze(ledger, START + timedelta(seconds=60))
    send(ledger, "credits.settle", "s", account="a")
    freeze(ledger, START)
    # What has expired stays so, though the clock says that it is not due yet.
    assert send(ledger, "credits.settle", "s-2", account="a")["balance"]["available"] == "50"
    assert one(ledger, "SELECT updated_at FROM accounts WHERE account = 'a'") == START + timedelta(seconds=60)


def test_a_balance_near_the_largest_number_is_refused_more_and_stays_whole(ledger: Ledger) -> None:
    most = 10**12
    send(ledger, "credits.open", "open", account="a", kind="pool")
    granted = [
        send(ledger, "credits.grant", f"g-{number}", account="a", amount=most, source="pack") for number in range(8)
    ]
    granted += ledger.write(
        job("credits.grant", "g-8", account="a", amount=most - 1, source="pack", purchase="p"),
        job("credits.adjust", "plus", account="a", amount=1, actor="admin", reason="to the brim"),
    )
    assert [answer["status"] for answer in granted] == ["applied"] * 10
    assert one(ledger, "SELECT granted_micro FROM accounts") == MAX_TOTAL_MICRO
    over = ledger.write(
        job("credits.grant", "over", account="a", amount="0.000001", source="pack"),
        job("credits.adjust", "over-2", account="a", amount=most, actor="admin", reason="too much"),
        job("credits.consume", "c", account="a", amount=most),
        job("credits.refund", "r", account="a", operation="c"),
        job("credits.hold", "h", account="a", amount=most),
        job("credits.release", "l", account="a", hold="h"),
        job("credits.revoke", "v", account="a", purchase="p"),
    )
    assert [answer.get("code") for answer in over] == [
        "limit_reached", "limit_reached", None, "limit_reached", None, None, None,
    ]  # fmt: skip
    assert send(ledger, "credits.refund", "r-2", account="a", operation="c")["code"] == "limit_reached"
    assert all_of(ledger, "SELECT code FROM quarantine") == []
    assert one(ledger, "SELECT available_micro + consumed_micro + revoked_micro FROM accounts") == MAX_TOTAL_MICRO


@pytest.fixture
def unused_ledger(unused_database: str) -> Iterator[Ledger]:
    """On tables that had no rows: those that rows were deleted from have pages, and are planned for otherwise."""
    yield from _ledger(unused_database)


def test_a_plan_made_for_empty_tables_is_not_kept(unused_ledger: Ledger) -> None:
    ledger = unused_ledger
    ledger.apply("credits.open", "open", account="alice")
    ledger.apply("credits.settle", "settle", account="alice")

    def plan() -> str:
        connection = ledger.writer.connection
        (found,) = connection.execute(
            "SELECT name FROM pg_prepared_statements WHERE statement LIKE '%%SELECT o.account%%o.operation = k.key\n'"
        ).fetchall()
        return str(connection.execute(f"EXPLAIN EXECUTE {found[0]}('{{alice}}', '{{open}}')").fetchall())

    assert "Filter" in plan()  # it would read all operations of an account for each id
    for start in range(0, 4 * FIRST_PLANS, 100):
        ledger.write(*(ledger.job("credits.settle", f"{start + n}", account="alice") for n in range(100)))
    assert "operations_pkey" in plan()
    assert "Filter" not in plan()


# Transactions that take long.


def test_a_batch_that_takes_longer_than_the_database_waits_is_written_in_pieces(ledger: Ledger, database: str) -> None:
    """The server ends the session; the same batch again would be ended again, and its lanes stand still."""
    names = [f"slow-{number}" for number in range(24)]
    for name in names:
        ledger.write(
            ledger.job("credits.open", "open", account=name, kind="pool"),
            *(
                ledger.job("credits.grant", f"g{n}", account=name, amount=2, source="pack", expires_in=9000 + n)
                for n in range(250)
            ),
            *(ledger.job("credits.hold", f"h{n}", account=name, amount=1, ttl=5000 + n) for n in range(250)),
        )
    travel(database, timedelta(days=1))
    jobs = [ledger.job("credits.settle", "settle", account=name) for name in names]
    pieces = Pieces(1000)
    cut = 0
    written = False
    while not written:
        with connect(database) as connection:
            connection.execute("SET transaction_timeout = '500ms'")
            writer = LedgerWriter(connection, lambda: ledger.catalog, ledger.writer.poison)
            try:
                pieces.write(writer, jobs)
                written = True
            except psycopg.Error:
                assert connection.closed
                cut += 1
                assert cut < 20
    assert cut
    assert pieces.size < 1000
    assert value(database, "SELECT count(*) FROM operations WHERE name = 'credits.settle'") == len(names)
    assert value(database, "SELECT count(*) FROM holds WHERE status = 'open'") == 0
    for number in range(20):
        pieces.write(ledger.writer, [ledger.job("credits.settle", f"quick-{number}", account=names[0])])
    assert pieces.size == 1000
