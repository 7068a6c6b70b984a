"""The sweep of payments on a real Postgres and a real Redis: what nobody picked up is told of, as often as it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import redis

from creditlane.client import PAYMENTS
from creditlane.errors import BrokerUnavailableError
from models.payment_inbox import store
from models.settings import settings
from schedules import payments
from scripts.embedded import free_port
from tests.broker import Broker
from tests.support import execute, rows, travel, value
from tests.workers.providers.making import STRIPE, body, envelope
from workers.notices import sender
from workers.payments import LOOK
from workers.receiving import APPLY

AGE = timedelta(seconds=payments.AGE_SECONDS)
CLAIM = timedelta(seconds=payments.CLAIM_SECONDS)
PAGE, GROUPS = 3, 2
NOTHING = {"events": 0, "groups": 0}


@pytest.fixture(autouse=True)
def environment(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a sweep in this process, and pages that a few rows fill."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    for name in ("CLAIM_EVENTS", "CLAIM_GROUPS"):
        smaller = getattr(payments, name).replace(f"LIMIT {payments.PAGE} ", f"LIMIT {PAGE} ")
        assert smaller != getattr(payments, name)
        monkeypatch.setattr(payments, name, smaller)
    monkeypatch.setattr(payments, "GROUPS", GROUPS)
    reach(broker_url, monkeypatch)
    yield
    forget_settings()


def reach(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the sweep find a broker there."""
    monkeypatch.setenv("CREDITLANE_BROKER_URL", broker_url)
    forget_settings()


def forget_settings() -> None:
    """As in a new process."""
    settings.cache_clear()
    sender.cache_clear()


def keep(database: str, *names: str) -> list[int]:
    """Put events into the inbox that nobody is told of; gives their rows."""
    with psycopg.connect(database, autocommit=True) as connection:
        raws = [body(envelope("customer.created", {"object": "customer"}, id=name)) for name in names]
        return [store(connection, STRIPE.read(raw), raw, "webhook").id for raw in raws]


def wait(database: str, *seconds: float | None) -> list[int]:
    """Groups of facts that are looked at so many seconds from now, or not at all; gives their ids."""
    return [
        value(
            database,
            "INSERT INTO payment_groups (next_look_at) VALUES (ledger_now() + make_interval(secs => %s)) RETURNING id",
            each,
        )
        for each in seconds
    ]


def sweep() -> dict[str, int]:
    """Run the task in this process; returns how many events and groups it sent messages for."""
    told: dict[str, int] = payments.sweep.apply(throw=True).get()
    return told


def taken(broker: Broker) -> list[tuple[str, Any]]:
    """The messages that a worker is given, with what they are about, the oldest first; then they are gone."""
    found = [(message.headers["task"], *json.loads(message.body)[1].values()) for message in broker.messages(PAYMENTS)]
    broker.remove()
    return found


def looked_at(found: list[tuple[str, Any]]) -> list[int]:
    """The groups of all messages."""
    return sorted(group for task, groups in found if task == LOOK for group in groups)


def test_an_event_that_nobody_picked_up_is_told_of_once(database: str, broker: Broker) -> None:
    (early,) = keep(database, "evt_1")
    travel(database, AGE - timedelta(seconds=20))
    assert sweep() == NOTHING  # the relay's own message may still be on its way
    (late,) = keep(database, "evt_2")
    travel(database, AGE)
    assert sweep() == {"events": 1, "groups": 0}
    assert taken(broker) == [(APPLY, early)]
    assert sweep() == NOTHING
    travel(database, 2 * AGE)
    assert sweep() == {"events": 1, "groups": 0}
    assert taken(broker) == [(APPLY, late)]


def test_the_message_is_the_one_that_the_relay_sends(database: str, broker: Broker) -> None:
    (event,) = keep(database, "evt_1")
    travel(database, AGE)
    sweep()
    (message,) = broker.messages(PAYMENTS)
    assert message.headers["id"] == f"payment-event-{event}"
    assert message.headers["ignore_result"] is True


def test_what_was_told_of_and_lost_comes_again_after_its_claim_until_it_is_read(database: str, broker: Broker) -> None:
    (event,) = keep(database, "evt_1")
    travel(database, AGE)
    for times in range(1, 4):
        assert sweep() == {"events": 1, "groups": 0}
        assert taken(broker) == [(APPLY, event)]
        travel(database, AGE + times * CLAIM - timedelta(seconds=20))
        assert sweep() == NOTHING
        travel(database, AGE + times * CLAIM + timedelta(seconds=1))
    execute(database, "UPDATE payment_events SET status = 'done', done_at = ledger_now()")
    assert sweep() == NOTHING


@pytest.mark.parametrize("status", ["done", "ignored", "parked", "dropped"])
def test_what_needs_no_reading_is_let_be(database: str, status: str) -> None:
    keep(database, "evt_1", "evt_2")
    execute(database, f"UPDATE payment_events SET status = '{status}'")
    execute(database, "UPDATE payment_events SET next_attempt_at = ledger_now() WHERE event_id = 'evt_2'")
    travel(database, AGE)
    assert sweep() == NOTHING


def test_an_event_that_is_read_again_comes_at_its_time_and_no_sooner(database: str, broker: Broker) -> None:
    (event,) = keep(database, "evt_1")
    execute(database, "UPDATE payment_events SET attempts = 2, next_attempt_at = ledger_now() + interval '10 minutes'")
    travel(database, timedelta(minutes=9))
    assert sweep() == NOTHING
    travel(database, timedelta(minutes=10))
    assert sweep() == {"events": 1, "groups": 0}
    assert taken(broker) == [(APPLY, event)]
    # Being told of is no attempt.
    assert value(database, "SELECT attempts FROM payment_events") == 2


def test_groups_that_waited_are_looked_at_some_by_one_message(database: str, broker: Broker) -> None:
    due = wait(database, -3, -2, -1)
    later, _ = wait(database, 600, None)
    assert sweep() == {"events": 0, "groups": 3}
    found = taken(broker)
    assert {task for task, _ in found} == {LOOK}
    assert [len(groups) for _, groups in found] == [GROUPS, 1]
    assert looked_at(found) == due
    assert sweep() == NOTHING
    travel(database, timedelta(seconds=601))
    assert sweep() == {"events": 0, "groups": 1}
    assert taken(broker) == [(LOOK, [later])]
    travel(database, CLAIM)
    assert sweep() == {"events": 0, "groups": 3}  # nobody has looked


def test_more_than_a_page_goes_in_one_run_and_more_than_a_run_in_the_next(
    database: str, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = keep(database, *(f"evt_{number}" for number in range(2 * PAGE + 1)))
    groups = wait(database, *(-1.0 for _ in range(PAGE + 1)))
    travel(database, AGE)
    monkeypatch.setattr(payments, "MAX_PAGES", 2)
    assert sweep() == {"events": 2 * PAGE, "groups": PAGE + 1}
    assert sweep() == {"events": 1, "groups": 0}
    found = taken(broker)
    assert sorted(about for task, about in found if task == APPLY) == events
    assert looked_at(found) == groups


def test_two_sweeps_at_once_tell_of_nothing_twice(database: str, broker: Broker) -> None:
    events = keep(database, *(f"evt_{number}" for number in range(PAGE + 2)))
    groups = wait(database, *(-1.0 for _ in range(PAGE + 1)))
    travel(database, AGE)
    with psycopg.connect(database) as other:  # one that has claimed a page, and not committed
        claimed = [id for statement in (payments.CLAIM_EVENTS, payments.CLAIM_GROUPS)
                   for (id,) in other.execute(statement)]  # fmt: skip
        assert sweep() == {"events": 2, "groups": 1}
        other.rollback()
    assert len(claimed) == 2 * PAGE
    assert sweep() == {"events": PAGE, "groups": PAGE}
    found = taken(broker)
    assert sorted(about for task, about in found if task == APPLY) == events
    assert looked_at(found) == groups


def test_nothing_is_added_to_a_long_queue(
    database: str, broker: Broker, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(database, "evt_1")
    wait(database, -1)
    travel(database, AGE)
    monkeypatch.setattr(payments, "MAX_BACKLOG", 2)
    with redis.Redis.from_url(broker_url) as plain:
        plain.lpush(PAYMENTS, *"abc")
        assert sweep() == NOTHING
        assert plain.llen(PAYMENTS) == 3
        assert rows(database, "SELECT next_attempt_at FROM payment_events") == [(None,)]  # nor is it claimed
        plain.lpop(PAYMENTS)
        assert sweep() == {"events": 1, "groups": 1}
        assert plain.llen(PAYMENTS) == 4


def test_without_a_broker_the_task_fails_and_nothing_is_lost(
    database: str, broker: Broker, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (event,) = keep(database, "evt_1")
    (group,) = wait(database, -1)
    travel(database, AGE)
    reach(f"redis://127.0.0.1:{free_port()}/0", monkeypatch)
    with pytest.raises(BrokerUnavailableError):
        sweep()
    reach(broker_url, monkeypatch)
    assert sweep() == {"events": 1, "groups": 1}  # it was away before anything was claimed
    assert taken(broker) == [(APPLY, event), (LOOK, [group])]


@contextmanager
def full(broker_url: str) -> Iterator[None]:
    """A broker whose memory is used up: it says how long its queues are, and takes nothing."""
    with redis.Redis.from_url(broker_url) as plain:
        plain.config_set("maxmemory", 1)
        try:
            yield
        finally:
            plain.config_set("maxmemory", 0)


def test_a_broker_that_takes_nothing_costs_a_claim_and_loses_nothing(
    database: str, broker: Broker, broker_url: str
) -> None:
    (event,) = keep(database, "evt_1")
    (group,) = wait(database, -1)
    travel(database, AGE)
    with full(broker_url), pytest.raises(BrokerUnavailableError):
        sweep()
    assert sweep() == NOTHING
    travel(database, AGE + CLAIM + timedelta(seconds=1))
    assert sweep() == {"events": 1, "groups": 1}
    assert taken(broker) == [(APPLY, event), (LOOK, [group])]
