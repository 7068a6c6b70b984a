"""The database's roles: workers and readers can do all that they have to, and neither can tamper."""

from __future__ import annotations

import secrets
import subprocess
import sys
from datetime import timedelta
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from celery import Celery

from creditlane.client import CreditClient
from creditlane.lanes import lane_of
from models.audit import audit, audit_new
from models.database import connect as connect_reader
from models.explaining import explain_balance, explain_grant, explain_operation
from models.forecast import forecast
from models.migrate import make_logins, upgrade
from models.reading import account_summary, history, lane_owners, quarantine
from models.roles import READER, READERS, WORKER, WORKERS
from models.seal import make_seal
from models.usage_reading import usage
from scripts.embedded import Stack, temporary_stack
from tests.conftest import LANES, Spawn
from tests.proof import live
from tests.support import CATALOG, ROOT, Ledger, eventually, execute, owned_lanes, rows, travel, value
from workers.ownership import LANE_CLASS, PRESENCE_CLASS

PASSWORDS = {WORKER: secrets.token_urlsafe(16), READER: secrets.token_urlsafe(16)}

LEDGER = ("operations", "entries")
ONCE = (*LEDGER, "seals", "seal_leaves", "audits", "redemptions", "catalogs")
KEYS = {**dict.fromkeys((*LEDGER, "seal_leaves"), "account"), "redemptions": "code", "catalogs": "label"}
"""A column of a table of those; of the others it is ``cutoff``."""
STATE = ("accounts", "grants", "holds", "receipts", "checkpoints", "checkpoint_grants", "subscriptions",
         "purchases", "schedules", "payment_events", "payment_facts", "payment_aliases", "payment_bindings",
         "payment_orders", "payment_watermarks", "allowances", "referrals")  # fmt: skip
PASSING = ("outbox", "notices", "deliveries", "quarantine", "usage_days", "usage_watermark", "payment_groups")
SENT = ("payment_operations", "codes")
"""Written once, but for the group that their facts are of."""


@pytest.fixture(scope="module")
def logins(stack: Stack) -> None:
    """The two roles that log in; they belong to the whole server."""
    make_logins(stack.postgres.url_of("migrated"), PASSWORDS)


def as_role(stack: Stack, database: str, role: str) -> str:
    """The URL of a database for one of the roles."""
    return stack.postgres.url_as(role, PASSWORDS[role], urlsplit(database).path[1:])


@pytest.fixture
def worker_url(stack: Stack, database: str, logins: None) -> str:
    """The test's database in the workers' role."""
    return as_role(stack, database, WORKER)


@pytest.fixture
def reader_url(stack: Stack, database: str, logins: None) -> str:
    """The test's database in the readers' role."""
    return as_role(stack, database, READER)


def test_every_table_has_the_rights_that_each_group_needs_and_no_more(database: str) -> None:
    expected = {
        (WORKERS, table): rights
        for tables, rights in (
            ((*ONCE, *SENT), {"SELECT", "INSERT"}),
            (STATE, {"SELECT", "INSERT", "UPDATE"}),
            (PASSING, {"SELECT", "INSERT", "UPDATE", "DELETE"}),
            (("alembic_version",), {"SELECT"}),
        )
        for table in tables
    }
    expected |= {(READERS, table): {"SELECT"} for _, table in expected}
    found: dict[tuple[str, str], set[str]] = {}
    for role, table, right in rows(
        database,
        "SELECT r.role, c.relname, p.privilege FROM pg_class c, unnest(%s::text[]) AS r(role),"
        " unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER,MAINTAIN}'::text[]) AS p(privilege)"
        " WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'"
        " AND has_table_privilege(r.role, c.oid, p.privilege)",
        [WORKERS, READERS],
    ):
        found.setdefault((role, table), set()).add(right)
    assert found == expected


def test_the_groups_log_in_as_nobody_and_are_no_administrators(database: str, logins: None) -> None:
    found = rows(
        database,
        "SELECT rolname, rolcanlogin, rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls"
        " FROM pg_roles WHERE rolname LIKE 'creditlane\\_%%' ORDER BY 1",
    )
    assert found == [(READER, True, False), (READERS, False, False), (WORKER, True, False), (WORKERS, False, False)]
    for role in (WORKER, READER, WORKERS, READERS):
        assert not value(database, "SELECT has_schema_privilege(%s, 'public', 'CREATE')", role)


def test_a_table_of_a_later_migration_can_be_looked_at_and_no_more(database: str) -> None:
    execute(database, "CREATE TABLE later (id int)")
    for group in (WORKERS, READERS):
        assert value(database, "SELECT has_table_privilege(%s, 'later', 'SELECT')", group)
        assert not value(database, "SELECT has_table_privilege(%s, 'later', 'INSERT,UPDATE,DELETE,TRUNCATE')", group)


TAMPERING = [
    *(
        (table, statement)
        for table in ONCE
        for statement in (
            "UPDATE {} SET {key} = {key}",
            "DELETE FROM {}",
            "TRUNCATE {}",
            "ALTER TABLE {} DISABLE TRIGGER ALL",
            "DROP TRIGGER {}_append_only ON {}",
            "DROP TABLE {}",
            "MERGE INTO {} USING {} AS other ON false WHEN MATCHED THEN DELETE",
        )
    ),
    *((table, statement) for table in STATE for statement in ("DELETE FROM {}", "TRUNCATE {}", "DROP TABLE {}")),
    ("entries", "SET session_replication_role = replica"),
    ("entries", "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE sql AS ''"),
    ("entries", "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'"),
    ("entries", "SET ROLE creditlane"),
    ("entries", "CREATE TABLE mine (id int)"),
]


@pytest.mark.parametrize("role", [WORKER, READER])
def test_neither_role_may_tamper(role: str, stack: Stack, ledger: Ledger, database: str, logins: None) -> None:
    live(ledger, "a")
    make_seal(ledger.writer.connection, 0)
    with psycopg.connect(as_role(stack, database, role), autocommit=True) as connection:
        for table, statement in TAMPERING:
            key = KEYS.get(table, "cutoff")
            with pytest.raises(psycopg.Error) as refused:
                connection.execute(statement.replace("{}", table).replace("{key}", key))
            assert refused.value.sqlstate == "42501", (statement, refused.value)


def test_a_reader_writes_nothing(stack: Stack, ledger: Ledger, database: str, logins: None) -> None:
    live(ledger, "a")
    with psycopg.connect(as_role(stack, database, READER), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        for table in (*ONCE, *STATE, *PASSING, *SENT):
            for statement in (f"INSERT INTO {table} DEFAULT VALUES", f"SELECT FROM {table} FOR UPDATE"):
                with pytest.raises(psycopg.Error) as refused:
                    connection.execute(statement)
                assert refused.value.sqlstate == "42501", statement


@pytest.mark.parametrize("table", ONCE)
@pytest.mark.parametrize("statement", ["UPDATE {} SET {key} = {key}", "DELETE FROM {}", "TRUNCATE {}"])
def test_the_trigger_refuses_even_who_was_given_the_right(
    statement: str, table: str, stack: Stack, ledger: Ledger, database: str, logins: None
) -> None:
    live(ledger, "a")
    execute(database, f"GRANT ALL ON {table} TO {WORKERS}")
    key = KEYS.get(table, "cutoff")
    with (
        psycopg.connect(as_role(stack, database, WORKER), autocommit=True) as connection,
        pytest.raises(psycopg.errors.RestrictViolation, match="written once"),
    ):
        connection.execute(statement.format(table, key=key))


def test_a_worker_does_the_work_of_the_ledger_in_its_role(
    spawn: Spawn, worker_url: str, database: str, client: CreditClient, broker_url: str
) -> None:
    worker = spawn("worker", CREDITLANE_DATABASE_URL=worker_url)
    general = spawn("general", kind="general", CREDITLANE_DATABASE_URL=worker_url)
    eventually(lambda: owned_lanes(database) == LANES)
    for answer in (
        client.open("alice", id="open", wait=20),
        client.grant("alice", 10, source="promo", expires_in=60, id="g", wait=20),
        client.consume("alice", amount=1, id="c", wait=20),
        client.hold("alice", amount=2, id="h", wait=20),
        client.capture("alice", "h", amount=1, id="k", wait=20),
        client.refund("alice", "c", id="r", wait=20),
    ):
        assert answer is not None
        assert answer.applied
    with redis.Redis.from_url(broker_url) as store:
        store.lpush(lane_of("alice", LANES), b"no message")
    eventually(lambda: value(database, "SELECT count(*) FROM quarantine") == 1)
    travel(database, timedelta(minutes=5))
    app = Celery(broker=broker_url, backend=broker_url)
    for task in (
        "schedules.expiry", "schedules.audit", "schedules.audit_new", "schedules.seal", "schedules.usage",
        "schedules.retention", "schedules.notices", "schedules.deliveries", "schedules.warnings",
        "schedules.payments",
    ):  # fmt: skip
        app.send_task(task, queue="maintenance").get(timeout=60)
    assert app.send_task("queries.balance", ("alice",), queue="queries").get(timeout=60)["available"] == "49"
    assert app.send_task("notices.read", ("alice",), queue="notices").get(timeout=60) == 0
    eventually(lambda: value(database, "SELECT count(*) FROM entries WHERE kind = 'expired'") > 0)
    assert value(database, "SELECT count(*) FROM seals") == 1
    assert value(database, "SELECT count(*) FROM checkpoints") == 1
    users = rows(database, "SELECT DISTINCT usename FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks"
                           " WHERE locktype = 'advisory' AND classid = %s)", LANE_CLASS)  # fmt: skip
    assert users == [(WORKER,)]
    assert {worker.running, general.running} == {True}


def test_the_read_side_works_in_the_readers_role(
    reader_url: str, database: str, ledger: Ledger, spawn: Spawn, worker_url: str
) -> None:
    for name in ("a", "b"):
        ledger.apply("credits.open", "open", account=name)
    spawn("worker", CREDITLANE_DATABASE_URL=worker_url)
    eventually(lambda: owned_lanes(database) == LANES)
    with connect_reader(reader_url, "test") as connection:
        assert account_summary(connection, "a", CATALOG) is not None
        assert len(history(connection, "a").lines) == 1
        assert usage(connection, "a") is not None
        assert usage(connection, None) is not None
        assert forecast(connection, "a", CATALOG) is not None
        assert explain_balance(connection, "a", CATALOG) is not None
        assert explain_operation(connection, "a", "open") is not None
        assert explain_grant(connection, "a", 1) is not None
        assert quarantine(connection).lines == []
        owned = lane_owners(connection, LANE_CLASS, PRESENCE_CLASS)
        assert len(owned.owners) == LANES
        # The name of a session is everybody's to see; where it comes from is not, and is left out.
        assert {(owner.application or "").split(" on ")[0] for owner in owned.owners.values()} != {""}
        assert {owner.client for owner in owned.owners.values()} == {None}
        assert audit(connection).holds
        assert audit(connection, ["a"]).accounts == 1
        with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction)):
            make_seal(connection, 30)
        with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction)):
            audit_new(connection, wait_seconds=30)


def test_the_command_makes_the_logins_of_the_environment(stack: Stack) -> None:
    database = stack.create_database("with_logins")
    passwords = {role: secrets.token_urlsafe(16) for role in (WORKER, READER)}
    try:
        command = subprocess.run(
            [sys.executable, "-m", "models.migrate"],
            cwd=ROOT,
            env={
                "CREDITLANE_OWNER_URL": database,
                "CREDITLANE_DATABASE_URL": stack.postgres.url_as(WORKER, passwords[WORKER], "with_logins"),
                "CREDITLANE_BROKER_URL": "redis://127.0.0.1:1/0",
                "CREDITLANE_WORKER_PASSWORD": passwords[WORKER],
                "CREDITLANE_READER_PASSWORD": passwords[READER],
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "creditlane_worker and creditlane_reader may log in" in command.stdout
        for role, password in passwords.items():
            url = stack.postgres.url_as(role, password, "with_logins")
            assert value(url, "SELECT count(*) FROM accounts") == 0
            with pytest.raises(psycopg.OperationalError):
                value(stack.postgres.url_as(role, "another", "with_logins"), "SELECT 1")
            assert password not in stack.postgres.log.read_text()
    finally:
        make_logins(stack.postgres.url_of("migrated"), PASSWORDS)
        stack.postgres.drop_database("with_logins")


def test_a_server_without_the_groups() -> None:
    with temporary_stack() as fresh:
        # Somebody who may not make the groups is told what to do, and nothing is left half done.
        role, password = "plain", secrets.token_hex(16)
        execute(fresh.postgres.url_of("postgres"), f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
        fresh.create_database("plain")
        execute(fresh.postgres.url_of("postgres"), f"ALTER DATABASE plain OWNER TO {role}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as refused:
            upgrade(fresh.postgres.url_as(role, password, "plain"))
        assert refused.value.diag.message_hint == (
            "Have an administrator run CREATE ROLE creditlane_workers NOLOGIN, then migrate again."
        )
        # Databases of one server are set up at once: each makes the groups, or finds them made.
        urls = [fresh.create_database(f"at_once_{number}") for number in range(4)]
        commands = [
            subprocess.Popen(
                [sys.executable, "-m", "models.migrate"],
                cwd=ROOT,
                env={"CREDITLANE_DATABASE_URL": url, "CREDITLANE_BROKER_URL": "redis://127.0.0.1:1/0"},
                stdout=subprocess.DEVNULL,
            )
            for url in urls
        ]
        assert [command.wait(60) for command in commands] == [0] * 4
        for url in urls:
            assert value(url, "SELECT has_table_privilege(%s, 'entries', 'INSERT')", WORKERS)
        # Now that they are there, nobody has to be able to make them.
        upgrade(fresh.postgres.url_as(role, password, "plain"))
        assert value(fresh.postgres.url_of("plain"), "SELECT count(*) FROM accounts") == 0


def test_an_empty_password_is_refused(stack: Stack) -> None:
    with pytest.raises(ValueError, match="needs a password"):
        make_logins(stack.postgres.url_of("migrated"), {WORKER: ""})
