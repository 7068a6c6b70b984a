"""The read-only tasks, in this process and through a real worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psycopg
import pytest

from creditlane.client import CreditClient
from creditlane.contract import Balance
from creditlane.errors import BrokerUnavailableError
from models import database as pools
from models.settings import settings
from tasks.queries import balance
from tests.broker import Broker, on_both_brokers
from tests.conftest import Spawn
from tests.support import Ledger, eventually, execute, rows


@pytest.fixture
def configured(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process as a worker of the test's database."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", broker_url)
    settings.cache_clear()
    pools.close_pool()
    yield database
    pools.close_pool()
    settings.cache_clear()


def test_the_balance_is_that_of_the_last_answer(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    answer = ledger.apply("credits.hold", "h-1", account="alice", amount="0.5")
    assert balance("alice") == answer["balance"] == {
        "available": "49.5", "held": "0.5", "by_source": {"signup": "49.5"},
    }  # fmt: skip


def test_an_account_that_was_never_opened_has_none(configured: str, ledger: Ledger) -> None:
    assert balance("nobody") is None
    ledger.apply("credits.consume", "c-1", account="mentioned", amount="1")
    assert balance("mentioned") is None


@pytest.mark.parametrize("account", ["", "x" * 129, "a\x00b", 7, None])
def test_what_is_no_account_is_refused(account: object, configured: str) -> None:
    with pytest.raises(ValueError, match="account"):
        balance(account)


def test_a_newer_query_is_not_guessed_at(configured: str) -> None:
    with pytest.raises(ValueError, match="contract version 2"):
        balance("alice", v=2)


def test_its_sessions_cannot_write(configured: str) -> None:
    with pools.reader() as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("TRUNCATE quarantine")


def test_a_session_that_the_server_ended_is_replaced(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    assert balance("alice") is not None
    ended = rows(
        configured,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'creditlane queries'",
    )
    assert ended == [(True,)]
    assert balance("alice") is not None


def test_a_closed_pool_opens_again(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    before = pools.reading_pool()
    pools.close_pool()
    assert before.closed
    assert balance("alice") is not None
    assert pools.reading_pool() is not before


def test_a_forked_child_has_a_pool_of_its_own(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    assert balance("alice") is not None
    with pools.reader() as connection:
        ours = connection.info.backend_pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with pools.reader() as connection:
                theirs = connection.info.backend_pid
            os.write(write, b"%d %d" % (theirs, balance("alice") is not None))
        finally:
            os._exit(0)
    os.close(write)
    told = os.read(read, 100).split()
    os.close(read)
    os.waitpid(child, 0)
    assert told[1:] == [b"1"]
    assert int(told[0]) != ours
    with pools.reader() as connection:
        assert connection.info.backend_pid == ours, "the child left our session alone"
        assert connection.execute("SELECT 1").fetchone() == (1,)


@on_both_brokers
def test_through_a_real_worker(
    spawn: Spawn, database: str, client: CreditClient, broker: Broker, ledger: Ledger
) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount="0.000001", source="pack")
    spawn("general", kind="general")
    eventually(lambda: broker.has_queue("queries"))

    def ask() -> Balance | None:
        try:
            return client.balance("alice", wait=60)
        except BrokerUnavailableError:
            return None  # the worker has declared its queue and not bound it yet

    found = eventually(ask)
    assert found is not None
    assert str(found.available) == "50.000001"
    assert {source: str(amount) for source, amount in found.by_source.items()} == {"signup": "50", "pack": "0.000001"}
    assert client.balance("nobody") is None
    execute(
        database,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'creditlane queries'"
        " AND datname = current_database()",
    )
    assert client.balance("alice", wait=60) is not None
