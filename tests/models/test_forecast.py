"""A forecast: how long credits last at the present pace, and how many will end unused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from models.catalog import load_catalog
from models.forecast import forecast
from tests.support import CATALOG, Ledger
from tests.workers.test_ledger_writer import freeze, priced_by

START = datetime(2027, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def ahead(ledger: Ledger, **options: Any) -> Any:
    found = forecast(ledger.writer.connection, "a", options.pop("catalog", CATALOG), **options)
    assert found is not None
    return found


def spending(ledger: Ledger) -> None:
    """An account of 50 credits that has spent 20 in ten days."""
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    ledger.apply("credits.grant", "g", account="a", amount=20, source="pack", priority=1, expires_in=15 * 86_400)
    ledger.apply("credits.consume", "c", account="a", amount=20)
    freeze(ledger, START + 10 * DAY)


def test_the_day_on_which_credits_run_out(ledger: Ledger) -> None:
    spending(ledger)
    found = ahead(ledger)
    assert (found.pace, found.available) == (2, 50)
    assert found.depleted_at == START + 35 * DAY
    assert found.runs_out_at == START + 36 * DAY, "the 26th day is the first that cannot be paid"
    assert found.until == START + 100 * DAY
    assert [day.available for day in found.daily[:3]] == [48, 46, 44]
    assert len(found.daily) == 90
    assert (found.expiring, found.expiring_total) == ([], 0)
    assert found.advice is not None
    assert found.advice.missing == 10
    assert ahead(ledger, days=25).runs_out_at is None


def test_credits_that_will_end_unused(ledger: Ledger) -> None:
    spending(ledger)
    ledger.apply("credits.grant", "trial", account="a", amount=30, source="trial", priority=1, expires_in=5 * 86_400)
    found = ahead(ledger, pace=4_000_000)
    assert found.available == 80
    assert found.depleted_at == START + 30 * DAY
    assert [(lapse.at, lapse.amount) for lapse in found.expiring] == [(START + 15 * DAY, 10)]
    assert found.expiring_total == 10
    assert found.runs_out_at == START + 28 * DAY, "20 of the trial are spent, and 50 that do not end"


def test_nothing_is_spent(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    found = ahead(ledger, days=366)
    assert (found.pace, found.depleted_at, found.runs_out_at, len(found.daily)) == (0, None, None, 366)
    assert ahead(ledger, pace=1).depleted_at is None, "a millionth a day lasts for ever"


def test_a_plan_goes_on_while_it_is_paid_for(ledger: Ledger) -> None:
    catalog = load_catalog("dual")
    with priced_by(ledger, catalog):
        freeze(ledger, START)
        ledger.apply("credits.open", "open", account="a")
        ledger.apply("plans.subscribe", "plan", account="a", plan="plus", payment="in_1")
        written = ledger.writer.connection.execute("SELECT count(*) FROM entries").fetchone()
        paid = ahead(ledger, catalog=catalog, pace=1_000_000, days=60)
        unpaid = ahead(ledger, catalog=catalog, pace=1_000_000, days=60, paid=False)
        assert paid.runs_out_at is None
        assert unpaid.runs_out_at is not None
        assert paid.expiring_total > 0
        assert sum((lapse.amount for lapse in paid.expiring), Decimal(0)) == paid.expiring_total
        assert ledger.writer.connection.execute("SELECT count(*) FROM entries").fetchone() == written


def test_what_does_not_exist_or_makes_no_sense(ledger: Ledger) -> None:
    connection = ledger.writer.connection
    assert forecast(connection, "nobody", CATALOG) is None
    for days in (0, 367):
        with pytest.raises(ValueError, match="1 to 366 days"):
            forecast(connection, "a", CATALOG, days=days)
    with pytest.raises(ValueError, match="0 or more"):
        forecast(connection, "a", CATALOG, pace=-1)
