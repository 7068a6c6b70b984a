"""The expiry sweep with a lane worker: idle accounts are settled, each once, as of the instants that were due."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

import models.due
from creditlane.client import CreditClient
from models.cutoff import alone
from models.settings import settings
from schedules import expiry
from tests.broker import on_both_brokers
from tests.conftest import LANES, Spawn
from tests.support import ROOT, Worker, eventually, rows, travel, value

IDLE = 10
"""Accounts that fall due in these tests."""

PAGE = 3


@pytest.fixture
def environment(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a sweep in this process, and pages that a few accounts fill."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", broker_url)
    monkeypatch.setenv("CREDITLANE_LANES", str(LANES))
    monkeypatch.setattr(expiry, "DUE", expiry.DUE.replace(f"LIMIT {expiry.PAGE}", f"LIMIT {PAGE}"))
    assert expiry.DUE.rstrip().endswith(f"LIMIT {PAGE}")
    monkeypatch.setattr(expiry, "PAGE", PAGE)
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def idle(lane_worker: Worker, client: CreditClient, database: str) -> None:
    """Accounts with a grant that ends in an hour, half of them with a hold on it, and one without any end."""
    with client.buffer() as buffer:
        for number in range(IDLE):
            account = f"idle-{number}"
            buffer.open(account, kind="pool", id="open")
            buffer.grant(account, 5, source="promo", expires_in=3600, id="grant")
            if number % 2:
                buffer.hold(account, amount=2, ttl=600, id="hold")
        buffer.open("endless", id="open")
    eventually(lambda: done(database) == IDLE * 2 + IDLE // 2 + 1)


def done(database: str) -> int:
    """How many operations the ledger has answered."""
    return int(value(database, "SELECT count(*) FROM operations"))


def sweep() -> int:
    """Run the task in this process; returns how many accounts it sent a message to."""
    return int(expiry.sweep.apply(throw=True).get()["sent"])


def now_of(connection: psycopg.Connection[Any]) -> datetime:
    """What time it is in the ledger."""
    (now,) = connection.execute("SELECT ledger_now()").fetchall()[0]
    assert isinstance(now, datetime)
    return now


def due(database: str) -> int:
    """How many accounts are due by the ledger's clock."""
    return int(value(database, "SELECT count(*) FROM accounts WHERE next_due_at <= ledger_now()"))


def timed(database: str) -> list[tuple[Any, ...]]:
    """What time alone wrote, with how far its instant is from the one that was due."""
    return rows(
        database,
        "SELECT e.account, e.kind, e.amount_micro, e.operation,"
        " e.at - CASE e.kind WHEN 'released' THEN h.expires_at ELSE g.expires_at END"
        " FROM entries e JOIN grants g USING (account, grant_id)"
        " LEFT JOIN holds h ON h.account = e.account AND h.hold = e.refers_to"
        " WHERE e.operation IS NULL ORDER BY e.account, e.seq",
    )


NOW = timedelta(0)
EXPECTED = [
    row
    for number in range(IDLE)
    for row in (
        [(f"idle-{number}", "released", 2_000_000, None, NOW)] * (number % 2)
        + [(f"idle-{number}", "expired", 5_000_000, None, NOW)]
    )
]


@on_both_brokers
def test_idle_accounts_that_fall_due_are_settled_as_of_the_instants_that_were_due(
    environment: None, idle: None, database: str
) -> None:
    assert sweep() == 0
    travel(database, timedelta(hours=2))
    before = done(database)
    assert sweep() == IDLE
    eventually(lambda: done(database) == before + IDLE)
    assert timed(database) == EXPECTED
    assert due(database) == 0
    assert rows(database, "SELECT DISTINCT status FROM holds") == [("expired",)]
    assert value(database, "SELECT available_micro FROM accounts WHERE account = 'endless'") == 50_000_000
    assert sweep() == 0
    assert done(database) == before + IDLE


@on_both_brokers
def test_sweeping_twice_at_once_and_before_the_first_was_applied_changes_nothing_more(
    environment: None, idle: None, lane_worker: Worker, database: str, client: CreditClient
) -> None:
    travel(database, timedelta(minutes=11))  # the holds are due, the grants are not
    before = done(database)
    start = threading.Barrier(2)
    sent: list[int] = []

    def at_once() -> None:
        start.wait()
        sent.append(sweep())

    threads = [threading.Thread(target=at_once) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert IDLE // 2 <= sum(sent) <= IDLE
    eventually(lambda: due(database) == 0)
    for number in range(IDLE):
        client.settle(f"idle-{number}", id="last", wait=10)
    # One operation for each account that was due, however often it was sent.
    assert done(database) == before + IDLE // 2 + IDLE
    assert timed(database) == [row for row in EXPECTED if row[1] == "released"]
    travel(database, timedelta(hours=2))
    assert sweep() == IDLE
    eventually(lambda: due(database) == 0)
    assert timed(database) == EXPECTED


def test_what_was_due_is_settled_once_when_the_account_wakes_before_the_sweeps_message(
    environment: None, idle: None, database: str, client: CreditClient
) -> None:
    travel(database, timedelta(hours=2))
    woken = client.consume("idle-1", amount=1, id="late", wait=10)
    assert woken is not None
    assert woken.code == "insufficient_credits"
    assert sweep() == IDLE - 1
    eventually(lambda: due(database) == 0)
    assert timed(database) == EXPECTED


def test_the_due_are_found_page_by_page_the_longest_overdue_first(environment: None, idle: None, database: str) -> None:
    travel(database, timedelta(hours=2))
    with psycopg.connect(database, autocommit=True) as connection:
        found = list(expiry.due(connection, now_of(connection)))
    assert found == rows(
        database, "SELECT account, next_due_at, operations FROM accounts WHERE next_due_at IS NOT NULL ORDER BY 2, 1"
    )
    assert len(found) == IDLE
    assert len({expiry.settle_id(instant, operations) for _, instant, operations in found}) > 1


def test_accounts_that_are_due_at_the_same_instant_are_all_found(environment: None, idle: None, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        with connection.transaction(force_rollback=True):
            connection.execute("UPDATE accounts SET next_due_at = '2026-01-01T00:00:00Z'")
            found = [account for account, *_ in expiry.due(connection, now_of(connection))]
        assert sorted(found) == sorted(["endless", *(f"idle-{number}" for number in range(IDLE))])


KILLED = f"""
import os, signal
from creditlane.client import Buffer
from schedules import expiry

settle, sent = Buffer.settle, 0

def settle_and_die(buffer, account, **options):
    global sent
    settle(buffer, account, **options)
    buffer.flush()
    sent += 1
    if sent == {PAGE + 1}:
        os.kill(os.getpid(), signal.SIGKILL)

Buffer.settle = settle_and_die
expiry.sweep.apply(throw=True)
"""
"""A sweep that is killed after its first page and a part of the next."""


def test_after_a_sweep_that_was_killed_in_the_middle_nothing_is_lost_or_doubled(
    environment: None, idle: None, lane_worker: Worker, database: str, spawn: Spawn
) -> None:
    travel(database, timedelta(hours=2))
    before = done(database)
    lane_worker.kill()  # what is sent stays in the lanes
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sweep() == IDLE  # nobody has applied what the other one sent
    spawn("another")
    eventually(lambda: due(database) == 0)
    assert timed(database) == EXPECTED
    assert sweep() == 0
    assert done(database) == before + IDLE


def test_a_sweep_beside_another_leaves_at_once(environment: None, idle: None, database: str) -> None:
    travel(database, timedelta(hours=2))
    with psycopg.connect(database, autocommit=True) as connection, alone(connection, expiry.SWEEP):
        assert expiry.sweep.apply(throw=True).get() == {"sent": 0, "skipped": 0, "done": False}
    assert expiry.sweep.apply(throw=True).get() == {"sent": IDLE, "skipped": 0, "done": True}
    eventually(lambda: due(database) == 0)


def test_a_sweep_ends_in_time_and_the_next_goes_on(
    environment: None, idle: None, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    travel(database, timedelta(hours=2))
    with monkeypatch.context() as patch:
        patch.setattr(expiry, "MAX_SECONDS", 0)
        assert expiry.sweep.apply(throw=True).get() == {"sent": PAGE, "skipped": 0, "done": False}
    eventually(lambda: due(database) == IDLE - PAGE)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(expiry.sweep, "update_state", lambda *, state, meta: told.append({"state": state, **meta}))
    assert sweep() == IDLE - PAGE
    assert {key: told[0][key] for key in ("state", "done", "total", "sent", "skipped")} == {
        "state": "PROGRESS", "done": PAGE, "total": IDLE - PAGE, "sent": PAGE, "skipped": 0,
    }  # fmt: skip


def test_of_very_many_accounts_the_planner_says_how_many(
    environment: None, idle: None, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    travel(database, timedelta(hours=2))
    monkeypatch.setattr(models.due, "COUNT", models.due.COUNT.replace(str(models.due.COUNTED), "2"))
    monkeypatch.setattr(models.due, "COUNTED", 2)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ANALYZE accounts")
        assert 2 <= models.due.estimate(connection, now_of(connection)) <= IDLE + 1


def test_a_lane_that_fills_up_during_a_sweep_is_left(
    environment: None, idle: None, lane_worker: Worker, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    travel(database, timedelta(hours=2))
    lane_worker.kill()
    monkeypatch.setattr(expiry, "MAX_BACKLOG", 0)
    monkeypatch.setattr(expiry, "LOOK", 1)
    monkeypatch.setattr(expiry, "LINGER_MS", 0)
    first = expiry.sweep.apply(throw=True).get()
    assert first["sent"] + first["skipped"] == IDLE
    assert first["sent"] > 0
    # Every lane that has accounts has a message now.
    assert expiry.sweep.apply(throw=True).get() == {"sent": 0, "skipped": IDLE, "done": True}
