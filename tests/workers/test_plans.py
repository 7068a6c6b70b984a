"""How the statements find their rows in a large ledger: by key, never by reading a table or all of an account.

Every statement that a varied life of two accounts makes is recorded and planned for a ledger with many accounts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psycopg
import pytest

from models import code_reading, due, reading, usage
from models.catalog import load_catalog
from models.database import connect
from schedules import codes, expiry, outbox, retention
from scripts.bench_grow import fill
from scripts.embedded import Stack
from tests.conftest import TEMPLATE, _ledger
from tests.proof import live
from tests.support import CATALOG, Ledger, travel
from workers import ledger_writer
from workers.outbox import DELETE

pytestmark = [pytest.mark.xdist_group("plans"), pytest.mark.timeout(120)]

ACCOUNTS, ENTRIES = 10_000, 40_000

KEYS = {
    "accounts": [{"account"}, {"next_due_at"}],
    "grants": [{"account"}],
    "holds": [{"account"}],
    "operations": [{"account", "operation"}, {"account", "number"}],
    "entries": [{"account", "seq"}],
    "receipts": [{"account", "operation"}],
    "outbox": [{"id"}],
    "quarantine": [{"id"}, {"digest"}],
    "subscriptions": [{"account"}],
    "notices": [{"account", "key"}, {"delivered_at"}],
    "deliveries": [{"account", "key"}],
    "usage_days": [{"account", "day"}],
    "purchases": [{"account"}],
    "allowances": [{"account", "key"}],
    "referrals": [{"account"}, {"referrer"}],
    "codes": [{"code"}, {"account", "operation"}, {"expires_at"}],
    "redemptions": [{"code"}],
}
"""What the condition of an index must have of a table's columns: one of these sets. Of what one account has many of,
more than the account."""

WRITERS = {
    name: getattr(ledger_writer, name)
    for name in (
        "LOCK_ACCOUNTS", "OPEN_GRANTS", "OPEN_HOLDS", "OPEN_HOLD_LINES", "KNOWN", "TRANSFERS", "NAMED_HOLDS", "CHARGES",
        "CHARGED_GRANTS", "NAMED_GRANTS", "ROOT_GRANTS", "PURCHASED_GRANTS", "UPSERT_RECEIPTS",
        "SUBSCRIPTIONS", "SUBSCRIBED_GRANTS", "UPSERT_SUBSCRIPTIONS", "INSERT_NOTICES", "CODES", "ALLOWANCES",
        "UPSERT_ALLOWANCES", "COUNTING", "REFERRALS", "UPSERT_REFERRALS",
    )
}  # fmt: skip
READERS = {
    name: getattr(reading, name)
    for name in (
        "ACCOUNT", "OPEN_GRANTS", "OPEN_HOLDS", "OPEN_HOLD_LINES", "HISTORY", "ENTRIES", "LAPSED", "QUARANTINE",
        "OPEN_QUARANTINE", "QUARANTINED", "SUBSCRIPTION",
    )
} | {name: getattr(code_reading, name) for name in ("ONE", "OF_ACCOUNT", "USES")}  # fmt: skip
SWEEPS = {
    "DUE": expiry.DUE, "OVER": codes.OVER, "LEFT": outbox.LEFT, "DELETE": DELETE,
    **{name: getattr(due, name) for name in ("COUNT", "OLDEST")},
    **{
        name: getattr(retention, name)
        for name in ("OLD_NOTICES", "DELETE_NOTICES", "DELETE_DELIVERIES", "QUARANTINE", "DELETE_QUARANTINED")
    },
}  # fmt: skip
BOUNDED = {
    due.NOTICES: {"notices_undelivered"}, due.OUTBOX: {"outbox_pkey"}, due.IN_TRANSIT: {"accounts_in_transit"},
    codes.UNTOLD: {"accounts_in_transit", "codes_by_account", "redemptions_pkey", "operations_pkey"},
}  # fmt: skip
"""Statements that read the first rows of an index that has only what waits, or what is to be published in order."""

MANY = (
    "INSERT INTO holds SELECT account, 'h', 'captured', 1, 1, NULL, NULL, now(), now(), now() FROM accounts LIMIT 9000"
    " ON CONFLICT DO NOTHING",
    "INSERT INTO receipts SELECT account, 'h', 1, 1, 1, 0 FROM accounts LIMIT 9000 ON CONFLICT DO NOTHING",
    "INSERT INTO outbox (account, exchange, task, operation, arguments, created_at)"
    " SELECT account, '', 'credits.settle', 's', '{}', now() FROM accounts",
    "INSERT INTO quarantine (digest, status, code, reason, queue, headers, body, received_at)"
    " SELECT sha256(account::bytea), CASE WHEN account LIKE '%1' THEN 'open' ELSE 'dropped' END, '', '', '', '', '',"
    " now() FROM accounts",
    "INSERT INTO subscriptions SELECT account, 'p', 'active', now(), 'UTC', 0, now(), now() + interval '1 day', NULL,"
    " NULL, false, 1, NULL, NULL, NULL, NULL, '{1}', '{}', '{}' FROM accounts LIMIT 9000 ON CONFLICT DO NOTHING",
    "INSERT INTO purchases"
    " SELECT account, 'p', 1, 1, 0, NULL, false, 0, '{}', '[]' FROM accounts LIMIT 9000 ON CONFLICT DO NOTHING",
    "INSERT INTO notices SELECT account, 'k' || number, 'depleted', now(), now(), '{}', '{}', NULL,"
    " CASE WHEN account LIKE '%1' THEN NULL ELSE now() END FROM accounts, generate_series(1, 4) AS number",
    "INSERT INTO deliveries SELECT account, 'k1', channel, 'sent', 1, NULL, now(), NULL"
    " FROM accounts, unnest('{email,webhook}'::text[]) AS channel",
    "INSERT INTO usage_days SELECT account, '2026-01-01', 'f', '', 1, 1, 1, 0 FROM accounts",
    "INSERT INTO allowances SELECT account, 'k', NULL, 'total', now(), 0, 0, false FROM accounts",
    "INSERT INTO referrals SELECT account, NULL, 'r' || account, NULL, NULL, NULL, 0 FROM accounts"
    " ON CONFLICT DO NOTHING",
    "INSERT INTO codes SELECT account || 'X', 'gift', account, 'o', 0, 1, 1, now() + interval '1 day', 'open', 1, NULL,"
    " '{}' FROM accounts",
    "INSERT INTO redemptions SELECT account || 'X', 0, account, 'o', 1, now() FROM accounts",
    "UPDATE accounts SET next_due_at = now() WHERE account LIKE 'user_%'",
)
"""Rows of tables that a bench does not fill, so that reading a whole one is never the shortest way."""

recorded: dict[str, Any] = {}
"""Each statement that was executed, with the parameters of one time."""


class Recording(psycopg.Cursor[Any]):
    """Notes what it executes."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """As any cursor."""
        if isinstance(query, str):
            recorded[query] = params
        return super().execute(query, params, **options)


@pytest.fixture(scope="module")
def large(stack: Stack) -> Iterator[str]:
    """A database with many accounts, in which every statement was executed once."""
    url = stack.create_database("large", template=TEMPLATE)
    fill(url, ACCOUNTS, ENTRIES, lambda done, total: None)
    recorded.clear()
    for ledger in _ledger(url):
        ledger.writer.connection.cursor_factory = Recording
        live_on(ledger, url)
        ledger.writer.connection.execute(DELETE, ([1, 2],))
    with psycopg.connect(url, autocommit=True, cursor_factory=Recording) as connection:
        read(connection, "a")
        now = datetime.now(UTC)
        list(expiry.due(connection, now))
        list(retention.delete_notices(connection, now))
        list(retention.delete_quarantined(connection, now))
        recorded.update(
            {
                retention.DELETE_NOTICES: (["a"], ["k"]), retention.DELETE_DELIVERIES: (["a"], ["k"]),
                retention.DELETE_QUARANTINED: ([1],), due.COUNT: (now,), due.OLDEST: (now,),
                codes.OVER: (now, now, ""),
            }
        )  # fmt: skip
        with connection.transaction():
            outbox.left_behind(connection, 0)
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in (*MANY, "VACUUM (ANALYZE)"):
            connection.execute(statement)
    yield url
    stack.postgres.drop_database("large")


def live_on(ledger: Ledger, database: str) -> None:
    """A life that makes every statement of the writer."""
    live(ledger, "a", "b")
    ledger.apply("credits.capture", "in-time", account="a", hold="open-hold", amount=1)
    ledger.apply("credits.release", "late", account="a", hold="h")
    ledger.apply("credits.revoke", "by-number", account="a", grant=1)
    ledger.apply("credits.grant", "to-give", account="b", amount=9, source="pack")
    ledger.apply("credits.transfer", "gift", account="b", to="a", amount=4)
    for _ in ("receive", "confirm"):
        (follow,) = ledger.writer.take_outbox()
        ledger.apply(follow.task, follow.operation, **msgspec.json.decode(follow.arguments))
    ledger.apply("referrals.issue", "referral", account="a", code="REFERRAL")
    ledger.apply("codes.issue", "codes", account="b", codes=["AAAA"], amount=1, uses=3)
    ledger.apply("codes.redeem", "redeemed", account="a", code="AAAA")
    (follow,) = ledger.writer.take_outbox()
    ledger.apply(follow.task, follow.operation, **msgspec.json.decode(follow.arguments))
    ledger.apply("codes.withdraw", "withdrawn", account="b", codes=["AAAA"])
    ledger.apply("credits.open", "open", account="c", kind="pool")
    ledger.apply("credits.grant", "brief", account="c", amount=3, source="pack", expires_in=60)
    ledger.apply("credits.consume", "of-brief", account="c", amount=3)
    travel(database, timedelta(days=1))
    ledger.apply("credits.refund", "into-a-new-lot", account="c", operation="of-brief")
    ledger.apply("credits.consume", "of-the-new-lot", account="c", amount=1)
    rollover = load_catalog("rollover")
    ledger.writer.catalog = lambda: rollover
    ledger.apply("plans.subscribe", "subscribed", account="c", plan="starter")
    ledger.apply("plans.cancel", "cancelled", account="c")


def read(connection: psycopg.Connection[Any], account: str) -> None:
    """Every read that the command line makes."""
    assert reading.account_summary(connection, account, CATALOG) is not None
    assert reading.history(connection, account, limit=3, with_entries=True).next_before
    reading.history(connection, account, limit=3, before=9, status="applied")
    for status in ("open", "dropped", None):
        reading.quarantine(connection, status=status, limit=3, before=9)
    reading.quarantined_message(connection, 1)
    assert code_reading.code_summary(connection, "AAAA") is not None
    assert code_reading.uses_of(connection, "AAAA", limit=3)
    assert code_reading.codes_of(connection, "b", limit=3).codes


def plan(connection: psycopg.Connection[Any], statement: str, parameters: Any) -> dict[str, Any]:
    """How Postgres would execute a statement; with parameters, or without knowing them if there are none."""
    if parameters is None:
        numbers: dict[str, int] = {}

        def numbered(found: re.Match[str]) -> str:
            return f"${numbers.setdefault(found[1] or str(len(numbers)), len(numbers) + 1)}"

        statement = re.sub(r"%(?:\((\w+)\))?s", numbered, statement)
    options = "FORMAT JSON" if parameters else "GENERIC_PLAN, FORMAT JSON"
    row = connection.execute(f"EXPLAIN ({options}) {statement}", parameters).fetchone()
    assert row is not None
    found: dict[str, Any] = row[0][0]["Plan"]
    return found


def scans(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read a table, each with the condition of its index, if it has one."""
    below = node.get("Plans", [])
    if "Relation Name" in node and node["Node Type"] != "ModifyTable":
        conditions = [node.get("Index Cond", ""), *(child.get("Index Cond", "") for child in below)]
        yield {**node, "Index Cond": " ".join(conditions)}
    for child in below:
        yield from scans(child)


def offences(found: dict[str, Any]) -> list[str]:
    """The nodes of a plan that do not find their rows by a key."""
    wrong = []
    for node in scans(found):
        table = node["Relation Name"]
        condition = re.sub(r"'[^']*'", "", node["Index Cond"])
        columns = set(re.findall(r"\((?:\w+\.)?(\w+) (?:=|<|<=|>|>=) ", condition))
        columns |= set(re.findall(r"\w+", " ".join(re.findall(r"ROW\(([^)]*)\) [<>]", condition))))
        if not any(keys <= columns for keys in KEYS[table]):
            wrong.append(f"{node['Node Type']} of {table} by {node.get('Index Name')} on {node['Index Cond']!r}")
    return wrong


def judge(connection: psycopg.Connection[Any], statements: Iterable[str], *, known: bool) -> dict[str, list[str]]:
    """What is wrong with the plans of statements.

    :param known: whether the plans are made for the parameters of one time, or for any.
    """
    return {
        statement: found
        for statement in statements
        if (found := offences(plan(connection, statement, (recorded[statement] or ()) if known else None)))
    }


any_or_known = pytest.mark.parametrize("known", [False, True], ids=["any parameters", "known parameters"])


@any_or_known
@pytest.mark.parametrize("session", ["lane worker's", "plain"])
def test_what_writes_finds_every_row_by_its_key(large: str, session: str, known: bool) -> None:
    assert [name for name, statement in WRITERS.items() if statement not in recorded] == []
    written = [statement for statement in recorded if re.search(r"\b(FROM|UPDATE|INSERT)\b", statement)]
    changed = {found[1] for found in (re.match(r"\s*UPDATE (\w+)", statement) for statement in written) if found}
    assert changed == {"accounts", "grants", "holds", "codes"}
    others = {*READERS.values(), *SWEEPS.values(), ledger_writer.COUNTING}
    statements = [statement for statement in written if statement not in others]
    with ledger_writer.connect(large) if session != "plain" else psycopg.connect(large, autocommit=True) as connection:
        assert judge(connection, statements, known=known) == {}


@any_or_known
def test_sweeps_find_every_row_by_its_key(large: str, known: bool) -> None:
    with psycopg.connect(large, autocommit=True) as connection:
        assert judge(connection, SWEEPS.values(), known=known) == {}


@any_or_known
def test_a_page_of_due_accounts_is_read_off_the_index_however_many_are_due_at_once(large: str, known: bool) -> None:
    """Neither sorted nor read from the first of that instant on."""
    with psycopg.connect(large, autocommit=True) as connection:
        (at,) = connection.execute("SELECT next_due_at FROM accounts WHERE account = 'user_00000'").fetchall()[0]
        connection.execute(due.IN_ORDER)
        found = plan(connection, expiry.DUE, (at, at, "user_04999") if known else None)
        assert found["Node Type"] == "Limit"
        (scan,) = found["Plans"]
        assert (scan["Node Type"], scan["Index Name"]) == ("Index Scan", "accounts_due")
        assert "ROW(next_due_at, account) > ROW(" in scan["Index Cond"]
        assert connection.execute(expiry.DUE, (at, at, "user_04999")).fetchall()[0][0] == "user_05000"


def test_whether_a_pool_counts_anything_is_seen_by_its_first_row(large: str) -> None:
    with ledger_writer.connect(large) as connection:
        found = plan(connection, ledger_writer.COUNTING, None)
        assert (found["Node Type"], found["Join Type"]) == ("Nested Loop", "Semi")
        assert [node["Index Cond"].strip() for node in scans(found)] == ["(account = k.account)"]


def test_what_waits_is_counted_on_an_index_of_it(large: str) -> None:
    with psycopg.connect(large, autocommit=True) as connection:
        for statement, indexes in BOUNDED.items():
            assert {node.get("Index Name") for node in scans(plan(connection, statement, ()))} == indexes


@any_or_known
def test_usage_is_counted_by_blocks_of_time_and_by_key(large: str, known: bool) -> None:
    with psycopg.connect(large, autocommit=True) as connection, connection.transaction():
        connection.execute(usage.BY_INDEX)
        now = datetime.now(UTC)
        found = plan(connection, usage.COUNT, {"start": now - timedelta(seconds=10), "end": now} if known else None)
        timed, *by_key = sorted(scans(found), key=lambda node: node.get("Index Name") is not None)
        assert timed["Node Type"] == "Bitmap Heap Scan"
        assert {child["Index Name"] for child in timed["Plans"]} == {"operations_by_time"}
        assert [node["Index Name"] for node in by_key] == ["operations_pkey"] * 2
        assert all("account" in node["Index Cond"] and "operation" in node["Index Cond"] for node in by_key)


@any_or_known
def test_what_reads_finds_every_row_by_its_key(large: str, known: bool) -> None:
    with connect(large, "test") as connection, connection.transaction():
        connection.execute(reading.BY_INDEX)
        assert judge(connection, READERS.values(), known=known) == {}


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        ("SELECT FROM entries", "Seq Scan of entries by None on ''"),
        ("SELECT FROM accounts WHERE operations = %s", "Seq Scan of accounts by None on ''"),
        ("SELECT FROM operations WHERE account = %s", "of operations by operations_"),
        ("SELECT FROM entries WHERE account = %s AND kind = 'consumed'", "of entries by"),
        ("SELECT FROM operations WHERE applied_at > %s", "of operations by"),
        ("SELECT FROM receipts r JOIN holds h ON h.account = r.account WHERE h.account = %s", "of receipts by"),
    ],
)
def test_a_statement_that_reads_more_is_noticed(large: str, statement: str, wrong: str) -> None:
    with psycopg.connect(large, autocommit=True) as connection:
        assert any(wrong in offence for offence in offences(plan(connection, statement, None)))
