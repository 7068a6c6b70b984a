"""The outbox sweep on a real Postgres and a real Redis: what was left behind goes out, each row once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import psycopg
import pytest
import redis

from creditlane.client import CreditClient
from creditlane.contract import receiving_id
from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import lane_of
from models.settings import settings
from schedules import outbox
from scripts.embedded import free_port
from tests.conftest import LANES
from tests.support import Ledger, Worker, eventually, rows, travel, value

PAGE = 3
AGE = timedelta(seconds=outbox.AGE_SECONDS)


@pytest.fixture
def environment(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a sweep in this process, and pages that a few rows fill."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", broker_url)
    monkeypatch.setenv("CREDITLANE_LANES", str(LANES))
    monkeypatch.setattr(outbox, "LEFT", outbox.LEFT.replace(f"LIMIT {outbox.PAGE} ", f"LIMIT {PAGE} "))
    assert f"LIMIT {PAGE} " in outbox.LEFT
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def left(ledger: Ledger, environment: None) -> list[str]:
    """Ten transfers from Anna to Bert that are committed and whose follow-ups nobody has published; their ids."""
    for account in ("anna", "bert"):
        ledger.apply("credits.open", "open", account=account, kind="pool")
    ledger.apply("credits.grant", "grant", account="anna", amount=10, source="pack")
    ledger.write(*(ledger.job("credits.transfer", f"{n}", account="anna", to="bert", amount=1) for n in range(10)))
    return [receiving_id("anna", f"{n}") for n in range(10)]


def sweep() -> int:
    """Run the task in this process; returns how many rows it published."""
    told: dict[str, int] = outbox.sweep.apply(throw=True).get()
    return told["published"]


def in_lane(broker_url: str, account: str = "bert") -> list[str]:
    """The ids of the messages that wait in an account's lane, the oldest first."""
    with redis.Redis.from_url(broker_url) as plain:
        payloads = reversed(plain.lrange(lane_of(account, LANES), 0, -1))
        return [msgspec.json.decode(payload)["headers"]["id"] for payload in payloads]


def test_what_was_left_behind_is_published_in_order_and_deleted(
    left: list[str], database: str, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    travel(database, AGE)
    assert sweep() == 10
    assert in_lane(broker_url) == left
    assert value(database, "SELECT count(*) FROM outbox") == 0
    assert "published 10 messages that were left behind" in caplog.text
    assert sweep() == 0
    assert in_lane(broker_url) == left


def test_what_a_worker_is_about_to_publish_is_let_be(left: list[str], database: str, broker_url: str) -> None:
    assert sweep() == 0
    assert in_lane(broker_url) == []
    assert value(database, "SELECT count(*) FROM outbox") == 10


def test_a_run_ends_after_so_many_pages_and_the_next_goes_on(
    left: list[str], database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    travel(database, AGE)
    monkeypatch.setattr(outbox, "MAX_PAGES", 2)
    assert [sweep() for _ in range(3)] == [6, 4, 0]
    assert in_lane(broker_url) == left


def test_two_sweeps_at_once_publish_nothing_twice(left: list[str], database: str, broker_url: str) -> None:
    travel(database, AGE)
    with psycopg.connect(database, autocommit=True) as other, other.transaction():
        held = {row.operation for row in outbox.left_behind(other, 0)}
        assert held == set(left[:PAGE])
        assert sweep() == 10 - PAGE
        assert in_lane(broker_url) == left[PAGE:]
    assert sweep() == PAGE
    assert sorted(in_lane(broker_url)) == sorted(left)


def test_a_worker_does_not_wait_for_a_sweep(left: list[str], ledger: Ledger, database: str, broker_url: str) -> None:
    from creditlane.sending import make_sender
    from workers.outbox import Outbox

    travel(database, AGE)
    sender = make_sender(broker_url)
    ledger.writer.connection.execute("SET lock_timeout = '1s'")
    with psycopg.connect(database, autocommit=True) as other, other.transaction():
        assert len(outbox.left_behind(other, 0)) == PAGE
        Outbox(ledger.writer.connection, sender, LANES).publish(ledger.writer.take_outbox())
        assert value(database, "SELECT count(*) FROM outbox") == PAGE
    sender.close()
    assert in_lane(broker_url) == left


def test_without_a_broker_the_rows_stay_and_the_task_fails(
    left: list[str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    travel(database, AGE)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    settings.cache_clear()
    with pytest.raises(BrokerUnavailableError):
        sweep()
    assert value(database, "SELECT count(*) FROM outbox") == 10


def test_a_lane_that_takes_nothing_does_not_stop_the_others(
    left: list[str], ledger: Ledger, database: str, broker_url: str
) -> None:
    assert lane_of("emil", LANES) != lane_of("bert", LANES)
    ledger.apply("credits.grant", "more", account="anna", amount=1, source="pack")
    ledger.apply("credits.transfer", "other", account="anna", to="emil", amount=1)
    travel(database, AGE)
    with redis.Redis.from_url(broker_url) as plain:
        plain.set(lane_of("bert", LANES), "no list")
        for _ in range(2):
            with pytest.raises(BrokerUnavailableError):
                sweep()
        plain.delete(lane_of("bert", LANES))
    # The last page of Bert's had the message to Emil in it.
    assert in_lane(broker_url, "emil") == [receiving_id("anna", "other")]
    assert value(database, "SELECT count(*) FROM outbox") == 10
    assert sweep() == 10
    assert in_lane(broker_url) == left
    assert value(database, "SELECT count(*) FROM outbox") == 0


def test_what_a_crash_left_reaches_both_accounts(
    left: list[str], lane_worker: Worker, client: CreditClient, database: str
) -> None:
    """With lane workers that have come back: the sweep delivers the credits, and then the confirmations."""
    ages = itertools.count(1)

    def quiet() -> bool:
        travel(database, next(ages) * AGE)
        sweep()
        anna = "SELECT in_transit_micro, sent_micro FROM accounts WHERE account = 'anna'"
        return rows(database, anna) == [(0, 10_000_000)]

    eventually(quiet)
    balances: list[Any] = [client.consume(name, amount=1, id="c", wait=20.0) for name in ("anna", "bert")]
    assert [answer.code for answer in balances] == ["insufficient_credits", None]
