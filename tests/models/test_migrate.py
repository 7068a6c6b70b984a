"""Migrations on a real Postgres: they take turns, end where the tables are declared, and guard what is written once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from models.migrate import MIGRATION_LOCK, alembic_config, sqlalchemy_url, upgrade
from models.tables import Base
from scripts.embedded import Stack
from tests.proof import live
from tests.support import ROOT, Ledger, execute, rows, value


@pytest.fixture
def empty_database(stack: Stack) -> Iterator[str]:
    """A database that was never migrated."""
    yield stack.create_database("empty")
    stack.postgres.drop_database("empty")


def schema(database: str) -> list[tuple[str, ...]]:
    """Every table, column, constraint, index, trigger and function, as Postgres describes them."""
    return rows(
        database,
        "SELECT 'column', table_name || '.' || column_name, data_type || is_nullable || coalesce(column_default, '')"
        " FROM information_schema.columns WHERE table_schema = 'public'"
        " UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace"
        " UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
        " UNION ALL SELECT 'options', relname, reloptions::text FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        " UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
        " UNION ALL SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        " ORDER BY 1, 2, 3",
    )


def test_upgrading_again_changes_nothing(empty_database: str) -> None:
    upgrade(empty_database)
    first = schema(empty_database)
    assert len(first) > 100
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("INSERT INTO outbox (account, exchange, task, operation, arguments, created_at)"
                           " VALUES ('a', '', 't', 'o', '{}', now())")  # fmt: skip
    upgrade(empty_database)
    assert schema(empty_database) == first
    assert value(empty_database, "SELECT count(*) FROM outbox") == 1


RIGHTS = """
SELECT relname, relowner::regrole, privilege_type, grantee::regrole FROM pg_class, aclexplode(relacl)
WHERE relname IN ('operations', 'entries') ORDER BY 1, 3, 4
"""
COLUMNS = """
SELECT table_name, string_agg(column_name, ' ' ORDER BY ordinal_position) FROM information_schema.columns
WHERE table_name IN ('operations', 'entries') GROUP BY 1 ORDER BY 1
"""
CONTENT = """
SELECT 'operation', to_jsonb(o)::text FROM operations o UNION ALL SELECT 'entry', to_jsonb(e)::text FROM entries e
ORDER BY 1, 2
"""


def test_what_was_written_before_rows_were_narrow_stands_as_it_was(
    database: str, ledger: Ledger, empty_database: str
) -> None:
    """There and back again, with rows, with rights that somebody added; audited in the end, as every ledger is."""
    live(ledger, "a", "b")
    ledger.writer.connection.execute("GRANT SELECT ON entries TO PUBLIC")
    now, content, columns = schema(database), rows(database, CONTENT), rows(database, COLUMNS)
    rights = rows(database, RIGHTS)
    found = rows(database, "SELECT account, reference_micro FROM accounts")
    references = "VALUES " + ", ".join(f"('{account}', {micro})" for account, micro in found)
    migrate(database, command.downgrade, "0004")
    old = without_functions(database), rows(database, COLUMNS)
    assert old[1] != columns
    assert rows(database, CONTENT) == content
    migrate(empty_database, command.upgrade, "0004")
    assert (without_functions(empty_database), rows(empty_database, COLUMNS)) == old
    upgrade(database)
    # What thresholds are percentages of is younger than those columns, and went with its own.
    execute(
        database, f"UPDATE accounts SET reference_micro = micro FROM ({references}) r(name, micro) WHERE name = account"
    )
    assert (schema(database), rows(database, COLUMNS)) == (now, columns)
    assert rows(database, CONTENT) == content
    assert rows(database, RIGHTS) == rights
    assert ledger.apply("credits.adjust", "next", account="a", amount=1, actor="t", reason="t")["status"] == "applied"
    with pytest.raises(psycopg.errors.RestrictViolation):
        ledger.writer.connection.execute("DELETE FROM entries")


def test_what_an_operator_took_away_from_a_table_is_not_given_back(empty_database: str) -> None:
    migrate(empty_database, command.upgrade, "0004")
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("REVOKE SELECT ON operations FROM creditlane_readers")
        connection.execute("ALTER TABLE operations ENABLE ALWAYS TRIGGER operations_append_only")
    rights = rows(empty_database, RIGHTS)
    upgrade(empty_database)
    assert rows(empty_database, RIGHTS) == rights
    enabled = "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'operations_append_only'"
    assert value(empty_database, enabled) == "A"


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ("ALTER TABLE entries ENABLE ROW LEVEL SECURITY", "row security"),
        ("CREATE PUBLICATION changes FOR TABLE entries", "a publication"),
        ("GRANT SELECT (account) ON entries TO PUBLIC", "the column account"),
        ("ALTER TABLE entries SET (autovacuum_enabled = off)", "storage parameters"),
    ],
)
def test_a_table_with_something_that_would_be_lost_is_left_alone(empty_database: str, added: str, named: str) -> None:
    migrate(empty_database, command.upgrade, "0004")
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(added)
    before = schema(empty_database), rows(empty_database, COLUMNS)
    with pytest.raises(psycopg.errors.RaiseException, match=f"the table entries has what would be lost: .*{named}"):
        upgrade(empty_database)
    assert (schema(empty_database), rows(empty_database, COLUMNS)) == before


def without_functions(database: str) -> list[tuple[str, ...]]:
    """The schema but for its functions: a test's clock is one."""
    return [row for row in schema(database) if row[0] != "function"]


def migrate(database: str, change: Callable[[Config, str], None], revision: str) -> None:
    """Bring a database to a revision."""
    engine = create_engine(sqlalchemy_url(database), poolclass=NullPool)
    with engine.connect() as connection:
        change(alembic_config(connection), revision)
        connection.commit()
    engine.dispose()


def test_several_at_once_take_turns(empty_database: str) -> None:
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def migrate() -> None:
        start.wait()
        try:
            upgrade(empty_database)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert value(empty_database, "SELECT count(*) FROM alembic_version") == 1
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s"
    assert value(empty_database, held, MIGRATION_LOCK) == 0


def test_the_command_migrates_the_database_of_the_environment(empty_database: str) -> None:
    command = subprocess.run(
        [sys.executable, "-m", "models.migrate"],
        cwd=ROOT,
        env={"CREDITLANE_DATABASE_URL": empty_database, "CREDITLANE_BROKER_URL": "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert command.stdout == "the database has the present schema\n"
    assert value(empty_database, "SELECT count(*) FROM accounts") == 0


def test_the_migrations_end_at_the_declared_tables(database: str, empty_database: str) -> None:
    engine = create_engine(sqlalchemy_url(database), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()
    # What that comparison does not look at (checks, conditions of indexes, storage options), by Postgres itself.
    engine = create_engine(sqlalchemy_url(empty_database), poolclass=NullPool)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        assert connection.execute(text("SELECT count(*) FROM accounts")).scalar() == 0
    engine.dispose()
    migrated = [row for row in schema(database) if "alembic_version" not in "".join(map(str, row))]
    declared = schema(empty_database)
    assert [row for row in migrated if row[0] not in ("trigger", "function")] == declared


@pytest.mark.parametrize("url", ["mysql://localhost/x", "localhost/x", "sqlite:///x", ""])
def test_another_kind_of_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="postgresql://"):
        sqlalchemy_url(url)


@pytest.mark.parametrize("table", ["entries", "operations"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {} SET account = account",
        "UPDATE {} SET account = 'x' WHERE false",
        "DELETE FROM {}",
        "DELETE FROM {} WHERE false",
        "TRUNCATE {}",
        "TRUNCATE accounts, {}, grants",
        "INSERT INTO {0} SELECT * FROM {0} ON CONFLICT ON CONSTRAINT {0}_pkey DO UPDATE SET account = 'x'",
        "MERGE INTO {0} USING {0} AS other ON {0}.account = other.account WHEN MATCHED THEN DELETE",
    ],
)
def test_what_is_written_once_is_never_changed(statement: str, table: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "open", account="a")
    before = ledger.writer.connection.execute(f"SELECT * FROM {table}").fetchall()
    assert before
    with pytest.raises(psycopg.errors.RestrictViolation, match=f"on {table} refused") as refused:
        ledger.writer.connection.execute(statement.format(table))
    assert refused.value.sqlstate == "23001"
    assert refused.value.diag.message_hint
    assert ledger.writer.connection.execute(f"SELECT * FROM {table}").fetchall() == before
