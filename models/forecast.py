"""What will become of an account's credits at its present pace, by the rules run ahead; nothing is written."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from psycopg import Connection

from creditlane.reports import FORECAST_DAYS, MAX_FORECAST_DAYS, Evening, Forecast, Lapse
from models.advice_reading import account_advice
from models.pace import pace_micro
from models.reading import load_account
from models.rules.catalog import Catalog
from models.rules.settling import settle
from models.simulating import simulate
from models.usage_reading import credits_of

VERY_LONG = timedelta(days=100 * 365)
"""What lasts longer has no day on which it ends."""


def forecast(
    connection: Connection[Any],
    account: str,
    catalog: Catalog,
    *,
    days: int = FORECAST_DAYS,
    pace: int | None = None,
    paid: bool = True,
) -> Forecast | None:
    """How long an account's credits last, and how many of them will end unused.

    :param connection: not within a transaction.
    :param catalog: the one in force, by which plans renew and advice is given.
    :param days: how far ahead, at most :data:`creditlane.reports.MAX_FORECAST_DAYS`.
    :param pace: micro-credits a day; as over the last :data:`models.pace.PACE_DAYS` unless given.
    :param paid: whether a plan with a price is paid for in time.
    :returns: None for an account that no operation ever named.
    :raises ValueError: for days or a pace that make no sense.
    """
    if not 1 <= days <= MAX_FORECAST_DAYS:
        raise ValueError(f"a forecast is of 1 to {MAX_FORECAST_DAYS} days, not {days}")
    if pace is not None and pace < 0:
        raise ValueError("a pace is 0 or more")
    loaded = load_account(connection, account)
    if loaded is None:
        return None
    state, now = loaded
    if pace is None:
        pace = pace_micro(connection, account, now, state.opened_at)
    settle(state, now, catalog)
    available = state.spendable(now)
    charged = not state.is_unlimited
    future = simulate(state, now, now + timedelta(days=days), catalog, pace, paid)
    expiring: dict[datetime, Decimal] = {}
    for step in future.steps:
        if step.what == "expired":
            expiring[step.at] = expiring.get(step.at, Decimal(0)) + Decimal(step.amount)
    return Forecast(
        account=account,
        as_of=now,
        until=future.until,
        pace=credits_of(pace),
        available=credits_of(available),
        depleted_at=_depleted_at(now, available, pace) if charged else None,
        runs_out_at=future.runs_out_at,
        expiring=[Lapse(at=at, amount=amount) for at, amount in expiring.items()],
        expiring_total=Decimal(future.expiring),
        daily=[Evening(at=at, available=Decimal(left)) for at, left in future.daily],
        paid=paid,
        advice=account_advice(connection, account, catalog),
    )


def _depleted_at(now: datetime, available_micro: int, pace: int) -> datetime | None:
    """When credits are used up at a pace, nothing else considered."""
    if not pace:
        return None
    seconds = max(0, available_micro) * 86_400 // pace
    return now + timedelta(seconds=seconds) if seconds <= VERY_LONG.total_seconds() else None
