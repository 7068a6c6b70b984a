"""The databases of tests: one that is handed on is as new, and one that cannot be is dropped."""

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest

from scripts.embedded import Stack
from tests.conftest import TEMPLATE, _ledger
from tests.databases import CLOCK, IN_TURN, TABLES, Databases
from tests.support import execute, rows, travel, value

OID = "SELECT oid FROM pg_database WHERE datname = current_database()"

LASTING = (
    "CREATE SCHEMA another",
    "ALTER TABLE entries DISABLE TRIGGER entries_append_only",
    "ALTER TABLE grants DROP CONSTRAINT grants_account",
    "ALTER TABLE operations SET (autovacuum_enabled = off)",
    "GRANT SELECT ON accounts TO public",
    "DROP TABLE alembic_version",
    "INSERT INTO usage_watermark VALUES (1, now()); ANALYZE usage_watermark",
)


def handed_on(databases: Databases, oid: int) -> str | None:
    """The URL of the same database when its turn has come again, if it ever does."""
    for _ in range(IN_TURN + 1):
        url = databases.take()
        if value(url, OID) == oid:
            return url
        databases.give_back(url)
    return None


def test_one_that_is_handed_on_is_as_new(stack: Stack) -> None:
    databases = Databases(stack.postgres, TEMPLATE)
    url = databases.take()
    oid = value(url, OID)
    for ledger in _ledger(url):
        ledger.apply("credits.open", "o-1", account="alice")
        ledger.apply("credits.consume", "c-1", account="alice", feature="image")
        travel(url, timedelta(days=99))
        databases.give_back(url)
        with pytest.raises(psycopg.OperationalError):
            ledger.writer.connection.execute("SELECT 1")
    again = handed_on(databases, oid)
    assert again is not None
    with pytest.raises(psycopg.OperationalError):
        value(url, "SELECT 1")
    template = stack.postgres.url_of(TEMPLATE)
    assert value(again, CLOCK) == value(template, CLOCK)
    tables = [name for (name,) in rows(again, TABLES)]
    assert {"accounts", "operations", "entries", "grants"} < set(tables)
    assert not [name for name in tables if value(again, f"SELECT count(*) FROM {name}")]
    assert {last for (last,) in rows(again, "SELECT last_value FROM pg_sequences")} == {None}
    databases.give_back(again)


def test_one_that_was_altered_is_dropped(stack: Stack) -> None:
    databases = Databases(stack.postgres, TEMPLATE)
    for statements in LASTING:
        url = databases.take()
        oid = value(url, OID)
        for statement in statements.split("; "):
            execute(url, statement)
        databases.give_back(url)
        assert not rows(stack.postgres.url_of("postgres"), "SELECT FROM pg_database WHERE oid = %s", oid), statements
