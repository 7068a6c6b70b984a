"""How what reads and delivers notices finds its rows: by index, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from models import advice_reading, deliveries, inbox
from schedules import notices as sweeps
from schedules import warnings
from scripts.bench_grow import fill
from scripts.embedded import Stack
from tests.conftest import TEMPLATE
from workers import notices

pytestmark = [pytest.mark.xdist_group("plans"), pytest.mark.timeout(120)]

ACCOUNTS, ENTRIES = 5000, 20_000

MANY = """
INSERT INTO notices (account, key, kind, at, created_at, details, channels, read_at, delivered_at)
SELECT account, 'k:' || n, 'k', now(), now() - n * interval '1 hour', '{}', '{email}',
       CASE WHEN n > 1 THEN now() END, CASE WHEN n > 1 OR account < 'a' THEN now() END
FROM accounts, generate_series(1, 8) n;
INSERT INTO deliveries (account, key, channel, status, attempts, next_attempt_at)
SELECT account, key, 'email', CASE WHEN account LIKE '%77' THEN 'parked' ELSE 'sent' END, 0,
       CASE WHEN account LIKE '%78' THEN now() END FROM notices WHERE key <> 'k:1';
INSERT INTO notices (account, key, kind, at, created_at, details, channels)
SELECT account, 'left', 'k', now(), now() - interval '1 day', '{}', '{email}' FROM accounts LIMIT 20;
UPDATE grants SET expires_at = now() + interval '400 days' * random();
INSERT INTO subscriptions (account, plan, status, anchor, zone, number, period_start, period_end, cancels,
                           allotted_micro, lots, renewal_lots, terms)
SELECT account, 'p', 'active', now(), 'UTC', 0, now(), now() + interval '1 month', false, 0, '{1}', '{}', '{}'
FROM accounts;
"""
"""Rows of which few are what a sweep looks for."""

NOW = datetime.now(UTC)
PLACE = {"account": "bench-1", "created_at": NOW, "key": "", "limit": 51}

STATEMENTS: dict[str, tuple[str, Any, set[str]]] = {
    "an inbox": (inbox.PAGE, PLACE, {"notices_by_time", "notices_pkey"}),
    "what is unread of it": (inbox.UNREAD_PAGE, PLACE, {"notices_unread", "notices_by_time"}),
    "how many": (inbox.TOTAL, ("bench-1",), {"notices_by_time", "notices_pkey"}),
    "how many are unread": (inbox.UNREAD, ("bench-1",), {"notices_unread"}),
    "mark one": (inbox.MARK_ONE, ("bench-1", "k:1"), {"notices_pkey", "notices_unread"}),
    "mark all": (inbox.MARK_ALL, ("bench-1", NOW), {"notices_unread"}),
    "used most": (advice_reading.FEATURES, ("bench-1", NOW), {"operations_in_order"}),
    "spent on packs": (advice_reading.SPENT, ("bench-1", NOW, "EUR", ["monthly"]), {"grants_by_purchase"}),
    "given up": (deliveries.PARKED, ("", "", "", 50), {"deliveries_parked"}),
    "how it went out": (deliveries.OF_NOTICES, ("bench-1", ["k:1"]), {"deliveries_pkey"}),
    "try again": (deliveries.RETRY, ("bench-1", "k:1", None), {"deliveries_pkey"}),
    "a notice": (notices.NOTICE, ("bench-1", "k:1"), {"notices_pkey", "accounts_pkey"}),
    "lock": (notices.LOCK, ("bench-1", "k:1", "email", 0), {"deliveries_pkey"}),
    "finish": (notices.FINISH, ("bench-1", "k:1"), {"notices_pkey", "deliveries_pkey"}),
    "never begun": (sweeps.UNBEGUN, (sweeps.BEGINNING, "", ""), {"notices_undelivered", "deliveries_pkey"}),
    "due again": (sweeps.CLAIM, (NOW,), {"deliveries_due", "deliveries_pkey"}),
    "about to expire": (
        warnings.EXPIRING_GRANTS,
        {"now": NOW, "until": NOW, "expires_at": NOW, "account": "", "grant": 0},
        {"grants_expiring", "subscriptions_pkey"},
    ),
}


@pytest.fixture(scope="module")
def connection(stack: Stack) -> Iterator[psycopg.Connection[Any]]:
    """A database with many notices."""
    url = stack.create_database("told", template=TEMPLATE)
    fill(url, ACCOUNTS, ENTRIES, lambda done, total: None)
    with psycopg.connect(url, autocommit=True) as opened:
        opened.execute(MANY)
        opened.execute("VACUUM (ANALYZE)")
        yield opened
    stack.postgres.drop_database("told")


@pytest.mark.parametrize("what", STATEMENTS)
def test_rows_are_found_by_index(what: str, connection: psycopg.Connection[Any]) -> None:
    statement, parameters, indexes = STATEMENTS[what]
    with connection.transaction(force_rollback=True):
        (found,) = connection.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters).fetchall()
    nodes = list(walk(found[0][0]["Plan"]))
    assert [node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"] == []
    used = {node["Index Name"] for node in nodes if "Index Name" in node}
    assert used
    assert used <= indexes, used


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes."""
    yield node
    for child in node.get("Plans", []):
        yield from walk(child)
