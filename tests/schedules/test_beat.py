"""Beats in processes of their own: one ticks, a second stands by and takes over; what was ticked is remembered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from schedules import (
    audit,
    beat,
    expiry,
    notices,
    outbox,
    payments,
    referrals,
    retention,
    seal,
    transfers,
    usage,
    warnings,
)
from tests.broker import RabbitBroker
from tests.conftest import LANES
from tests.support import ROOT, Worker, eventually, execute, rows, value

ON_RABBITMQ = pytest.mark.parametrize("broker_kind", ["rabbitmq"], indirect=True)
TICKS = "beat: has the lock, and ticks"
STANDS_BY = "beat: another beat ticks; this one stands by"
WITHOUT = "beat: nothing is sent without the database"
SENDS = "Sending due task"
MODULES = (audit, expiry, notices, outbox, payments, referrals, retention, seal, transfers, usage, warnings)
SCHEDULES = sorted(name for module in MODULES for name in module.SCHEDULE)


@pytest.fixture
def environment(database: str, broker_url: str) -> dict[str, str]:
    """The settings of a beat."""
    return {
        "CREDITLANE_DATABASE_URL": database,
        "CREDITLANE_BROKER_URL": broker_url,
        "CREDITLANE_LANES": str(LANES),
    }


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    """Start beats, as docker-compose.yml does; killed when the test is done."""
    started: list[Worker] = []

    def one(name: str) -> Worker:
        command = ["-A", "schedules.app", "beat", "--pidfile=", "--loglevel", "INFO"]
        started.append(Worker(name, command, environment, tmp_path / f"{name}.log"))
        return started[-1]

    yield one
    for each in started:
        if each.running:
            each.kill()


def all_long_ago(database: str) -> None:
    """Have every schedule ticked for the last time long ago."""
    for name in SCHEDULES:
        execute(database, f"INSERT INTO schedules VALUES ('{name}', '', '2026-01-01T00:00:00Z')"
                          " ON CONFLICT (name) DO UPDATE SET last_tick_at = excluded.last_tick_at")  # fmt: skip


def ticked(database: str) -> list[str]:
    """Which schedules ticked lately."""
    found = rows(database, "SELECT name FROM schedules WHERE last_tick_at > now() - interval '5 minutes' ORDER BY name")
    return [name for (name,) in found]


def health(environment: dict[str, str]) -> int:
    """What the health check says."""
    return subprocess.run(
        [sys.executable, "-m", "schedules.beat"], cwd=ROOT, env=environment, timeout=60, check=False
    ).returncode


@ON_RABBITMQ
def test_a_second_beat_stands_by_and_takes_over_when_the_first_is_killed(
    start: Any, environment: dict[str, str], database: str, broker: RabbitBroker
) -> None:
    assert health(environment) == 1
    all_long_ago(database)
    first = start("first")
    eventually(lambda: ticked(database) == SCHEDULES, what="what fell due while there was no beat is sent")
    assert health(environment) == 0
    assert broker.depth("maintenance")
    second = start("second")
    eventually(lambda: STANDS_BY in second.logged())
    all_long_ago(database)
    first.kill()
    eventually(lambda: ticked(database) == SCHEDULES, what="the second takes over, and goes on where the first was")
    assert second.logged().index(STANDS_BY) < second.logged().index(TICKS) < second.logged().index(SENDS)
    # Whoever loses the connection has lost the lock, and ticks again when it has another.
    third = start("third")
    eventually(lambda: STANDS_BY in third.logged())
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'creditlane beat'"
    assert value(database, f"SELECT count(*) FROM ({ended}) AS ended") == 2
    eventually(lambda: sum(TICKS in each.logged().rpartition(WITHOUT)[2] for each in (second, third)) == 1)
    eventually(lambda: sum(STANDS_BY in each.logged().rpartition(WITHOUT)[2] for each in (second, third)) == 1)
    assert {second.running, third.running} == {True}
    ticks, waits = sorted((second, third), key=lambda each: STANDS_BY in each.logged().rpartition(WITHOUT)[2])
    assert waits.stop() == 0
    assert ticks.stop() == 0
    assert health(environment) == 1


def test_a_beat_that_is_stopped_gives_the_lock_up_at_once(
    start: Any, database: str, environment: dict[str, str]
) -> None:
    first = start("first")
    eventually(lambda: TICKS in first.logged())
    second = start("second")
    eventually(lambda: STANDS_BY in second.logged())
    assert first.stop() == 0
    eventually(lambda: TICKS in second.logged())
    assert rows(database, "SELECT name FROM schedules") == []  # nothing was due yet: a first start is no catching up


def test_a_tick_from_the_future_counts_as_one_of_now(database: str) -> None:
    execute(database, "INSERT INTO schedules VALUES ('a', 't', now() + interval '1 hour')")
    with psycopg.connect(database) as connection:
        now = value(database, "SELECT now()")
        assert connection.execute(beat.LAST_TICKS, (now,)).fetchall() == [("a", now)]
