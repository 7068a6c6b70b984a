"""An account run ahead: the rules themselves, nothing written, and what really happens then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models.catalog import load_catalog
from models.pace import pace_micro
from models.reading import load_account, plan_summary
from models.simulating import Future, simulate
from tests.support import Ledger
from tests.workers.test_ledger_writer import freeze, priced_by

ROLLOVER = load_catalog("rollover")
DUAL = load_catalog("dual")
START = datetime(2027, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)
MICRO = 1_000_000


def future(ledger: Ledger, catalog: Any, until: datetime, pace: float = 0, paid: bool = True) -> Future:
    loaded = load_account(ledger.writer.connection, "a")
    assert loaded is not None
    return simulate(*loaded, until, catalog, round(pace * MICRO), paid)


def told(ahead: Future) -> list[tuple[str, str, str]]:
    return [(step.at.date().isoformat(), step.what, step.amount) for step in ahead.steps]


def subscribed(ledger: Ledger, plan: str) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    ledger.apply("plans.subscribe", "plan", account="a", plan=plan, payment="in_1")


def test_months_of_rollover_are_told_without_a_row(ledger: Ledger) -> None:
    with priced_by(ledger, ROLLOVER):
        subscribed(ledger, "starter")
        before = rows_of(ledger)
        ahead = future(ledger, ROLLOVER, datetime(2027, 4, 30, tzinfo=UTC), pace=1)
        assert told(ahead) == [
            ("2027-01-31", "today", "0"),
            ("2027-02-28", "spent", "28"),
            ("2027-02-28", "rolled over", "72"),
            ("2027-02-28", "allotted", "100"),
            ("2027-03-31", "spent", "31"),
            ("2027-03-31", "expired", "41"),
            ("2027-03-31", "rolled over", "100"),
            ("2027-03-31", "allotted", "100"),
            ("2027-04-30", "spent", "29.5"),
        ]
        assert (ahead.expiring, ahead.runs_out_at, ahead.daily[-1][1]) == ("41", None, "170.5")
        assert rows_of(ledger) == before


def test_what_was_told_comes_true(ledger: Ledger) -> None:
    with priced_by(ledger, DUAL):
        subscribed(ledger, "free")
        until = START + 100 * DAY
        ahead = future(ledger, DUAL, until)
        freeze(ledger, until)
        assert ledger.apply("credits.settle", "s", account="a")["balance"]["available"] == ahead.daily[-1][1]
        entries = ledger.writer.connection.execute(
            "SELECT at, kind, amount_micro FROM entries WHERE at > %s ORDER BY seq", (START,)
        ).fetchall()
        names = {"granted": "allotted", "expired": "expired"}
        really = [(at.date().isoformat(), names[kind], str(amount // MICRO)) for at, kind, amount in entries]
        assert sorted(told(ahead)[1:]) == sorted(really)


def test_the_day_on_which_credits_run_out(ledger: Ledger) -> None:
    with priced_by(ledger, DUAL):
        subscribed(ledger, "plus")
        ahead = future(ledger, DUAL, START + 20 * DAY, pace=30)
        assert ahead.runs_out_at == START + 4 * DAY
        assert ahead.daily[-1][1] == "0"


def test_a_plan_that_is_not_paid_for_ends_after_its_grace(ledger: Ledger) -> None:
    with priced_by(ledger, DUAL):
        subscribed(ledger, "plus")
        ahead = future(ledger, DUAL, START + 60 * DAY, paid=False)
        assert told(ahead)[1:] == [("2027-03-07", "expired", "100"), ("2027-03-07", "plan ended", "0")]


@pytest.mark.parametrize(("days", "sentence"), [(0, "behind"), (-1, "behind"), (3661, "3660 days ahead")])
def test_an_end_that_makes_no_sense(ledger: Ledger, days: int, sentence: str) -> None:
    with priced_by(ledger, DUAL):
        subscribed(ledger, "free")
        with pytest.raises(ValueError, match=sentence):
            future(ledger, DUAL, START + days * DAY)


def test_the_pace_is_what_was_spent_lately_refunds_taken_off(ledger: Ledger) -> None:
    freeze(ledger, START - 60 * DAY)
    ledger.apply("credits.open", "open", account="a")
    ledger.apply("credits.grant", "g", account="a", amount=1000, source="pack")
    ledger.apply("credits.consume", "old", account="a", amount=500)
    freeze(ledger, START - 10 * DAY)
    ledger.apply("credits.consume", "c", account="a", amount=100)
    ledger.apply("credits.refund", "r", account="a", operation="c", amount=40)
    connection = ledger.writer.connection
    assert pace_micro(connection, "a", START) == 2 * MICRO
    assert pace_micro(connection, "a", START, START - 12 * DAY) == 5 * MICRO
    assert pace_micro(connection, "nobody", START) == 0


def test_a_plan_as_it_is_told(ledger: Ledger) -> None:
    with priced_by(ledger, ROLLOVER):
        subscribed(ledger, "starter")
        ledger.apply("credits.consume", "c", account="a", amount=30)

        def summary() -> Any:
            loaded = load_account(ledger.writer.connection, "a")
            assert loaded is not None
            return plan_summary(*loaded, ROLLOVER)

        first = summary()
        assert (first.plan, first.status, first.remaining, first.rolled_over) == ("starter", "active", "70", "0")
        assert first.next == "renews when it is paid for, due on 2027-02-28 12:00 UTC"
        freeze(ledger, START + 29 * DAY)
        assert (summary().status, summary().next) == ("unpaid", "ends on 2027-03-03 12:00 UTC unless it is paid for")
        ledger.apply("plans.renew", "r", account="a", period_start=first.period_end, payment="in_2")
        second = summary()
        assert (second.remaining, second.rolled_over) == ("100", "70")
        assert (second.last_renewal.allotted, second.last_renewal.rolled_over) == ("100", "70")
        ledger.apply("plans.cancel", "c-2", account="a")
        assert (summary().status, summary().next) == ("cancelled", "ends on 2027-03-31 12:00 UTC")
        freeze(ledger, START + 80 * DAY)
        assert (summary().status, summary().remaining) == ("ended", "0")


def rows_of(ledger: Ledger) -> list[Any]:
    tables = "accounts", "grants", "operations", "entries", "subscriptions", "notices"
    return [ledger.writer.connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
