"""A database that is away or refuses: seen in the log, the metrics and the events, and nothing refused or lost."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from prometheus_client.parser import text_string_to_metric_families

from creditlane.client import CreditClient
from scripts.embedded import Stack, free_port
from tests.broker import on_both_brokers
from tests.conftest import LANES, Spawn
from tests.support import eventually, execute, owned_lanes, value

pytestmark = on_both_brokers

ACCOUNTS = 40

REFUSE = """
CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'no space left' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER no_space BEFORE INSERT ON operations FOR EACH ROW EXECUTE FUNCTION no_space()
"""


def scrape(port: int) -> dict[tuple[str, str], float]:
    """A worker's metrics by name and label value, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, next(iter(sample.labels.values()), "")): sample.value
            for family in families
            for sample in family.samples
        }


@contextmanager
def watched(broker_url: str) -> Iterator[list[dict[str, Any]]]:
    """The events that a watcher such as Flower receives meanwhile."""
    found: list[dict[str, Any]] = []
    app = Celery("watcher", broker=broker_url, set_as_current=False)
    listening = threading.Event()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": found.append})
        receiver.on_consume_ready = lambda *_args, **_kwargs: listening.set()

        def listen() -> None:
            receiver.capture(limit=None, timeout=None, wakeup=False)

        thread = threading.Thread(target=listen)
        thread.start()
        assert listening.wait(10)
        try:
            yield found
        finally:
            receiver.should_stop = True
            thread.join()


def test_a_database_that_refuses_is_seen_everywhere_and_refuses_nobody(
    spawn: Spawn, database: str, client: CreditClient, broker_url: str
) -> None:
    port = free_port()
    worker = spawn("worker", CREDITLANE_METRICS_PORT=str(port))
    eventually(lambda: owned_lanes(database) == LANES)
    execute(database, REFUSE)
    with watched(broker_url) as events:
        for number in range(ACCOUNTS):
            client.open(f"account-{number}", id=f"open-{number}")
        eventually(lambda: scrape(port).get(("creditlane_database_retries_total", "53"), 0) >= 3)
        assert scrape(port)["creditlane_database_away_seconds", ""] > 0
        assert 0 < scrape(port)["creditlane_buffered_operations", ""] <= ACCOUNTS
        waiting = eventually(lambda: [event for event in events if event["type"] == "task-retried"])
        assert "53100" in waiting[0]["exception"]
        assert "next attempt in" in waiting[0]["exception"]
        assert value(database, "SELECT count(*) FROM operations") == 0
        execute(database, "DROP TRIGGER no_space ON operations")
        eventually(lambda: value(database, "SELECT count(*) FROM operations") == ACCOUNTS)
        eventually(lambda: len([event for event in events if event["type"] == "task-succeeded"]) == ACCOUNTS)
    found = scrape(port)
    assert found["creditlane_database_away_seconds", ""] == 0
    assert found["creditlane_lanes_owned", ""] == LANES
    assert found["creditlane_operations_total", "applied"] == ACCOUNTS
    assert found["creditlane_batch_operations_sum", ""] == ACCOUNTS
    assert "refused a batch" in worker.logged()
    assert "the database is back" in worker.logged()
    assert value(database, "SELECT count(*) FROM operations WHERE status = 'applied'") == ACCOUNTS
    assert value(database, "SELECT count(*) FROM quarantine") == 0


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_what_is_sent_while_the_database_is_away_is_applied_when_it_is_back(
    how: str, spawn: Spawn, stack: Stack, database: str, client: CreditClient
) -> None:
    port = free_port()
    worker = spawn("worker", CREDITLANE_METRICS_PORT=str(port), CREDITLANE_BALANCE_SECONDS="0.1")
    eventually(lambda: owned_lanes(database) == LANES)
    client.open("account-0", id="open-0", wait=10)
    if how == "stopped":
        stack.postgres.stop()
    else:
        stack.postgres.kill()
    try:
        for number in range(1, ACCOUNTS):
            client.open(f"account-{number}", id=f"open-{number}")
        # However often it is tried, it is tried again: an hour is more of the same.
        eventually(lambda: scrape(port).get(("creditlane_database_retries_total", "08"), 0) >= 20)
        assert scrape(port)["creditlane_lanes_owned", ""] == 0
        assert worker.running
    finally:
        stack.postgres.start()
    eventually(lambda: value(database, "SELECT count(*) FROM operations WHERE status = 'applied'") == ACCOUNTS)
    assert value(database, "SELECT count(*) FROM quarantine") == 0
    assert "database away for" in worker.logged()
