"""An account's future: the same rules, run ahead in memory; nothing is written (schedules: read side, forecast)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import msgspec

from creditlane.amounts import format_amount
from models.rules.burning import burn, plan_burn
from models.rules.catalog import Catalog
from models.rules.settling import settle
from models.rules.state import Account, Subscription
from models.rules.subscriptions import end_of_payment

MAX_DAYS = 3660
"""How far ahead one may look."""

SIMULATED = "simulated"
"""What stands for the id of what an account will have spent."""


class Step(msgspec.Struct, kw_only=True, frozen=True):
    """A day of the future, or a moment of it at which time changes something; amounts in credits."""

    at: datetime
    what: str
    """``today``, ``spent``, ``allotted``, ``rolled over``, ``expired``, ``hold timed out``, ``plan ended``."""
    amount: str
    available: str
    """Spendable after it."""


class Future(msgspec.Struct, kw_only=True, frozen=True):
    """What will become of an account."""

    account: str
    until: datetime
    pace: str
    """Credits a day that are spent."""
    steps: list[Step]
    daily: list[tuple[datetime, str]]
    """What is spendable at the end of each day."""
    runs_out_at: datetime | None
    """The day on which the pace cannot be kept for the first time."""
    expiring: str
    """What will expire unspent."""
    paid: bool
    """Whether payments are taken to arrive in time."""


def simulate(
    account: Account, now: datetime, until: datetime, catalog: Catalog, pace_micro: int, paid: bool = True
) -> Future:
    """Run an account ahead, day by day, each day's spending at its end.

    :param account: as :func:`models.reading.load_account` gives it; it is changed.
    :param pace_micro: micro-credits that are spent a day, from unscoped grants.
    :param paid: whether a plan with a price is paid for in time.
    :raises ValueError: when ``until`` is not ahead, or more than :data:`MAX_DAYS`.
    """
    if until <= now:
        raise ValueError("the end lies behind")
    _check_span(now, until)
    steps: list[Step] = []
    daily: list[tuple[datetime, str]] = []
    runs_out_at: datetime | None = None
    expired = 0
    _pass_time(account, now, catalog, paid)
    steps.append(Step(at=now, what="today", amount="0", available=format_amount(account.spendable(now))))
    account.entries = []
    moment, spent = now, 0

    def change_until(end: datetime) -> None:
        nonlocal spent, expired
        for at in _changes(account, end):
            before = account.spendable(at)
            _pass_time(account, at, catalog, paid)
            if spent and account.entries:
                steps.append(Step(at=at, what="spent", amount=format_amount(spent), available=format_amount(before)))
                spent = 0
            steps.extend(_told(account, at))
            expired += sum(entry.amount_micro for entry in account.entries if entry.kind == "expired")
            account.entries = []

    while moment < until:
        evening = min(moment + timedelta(days=1), until)
        last = evening - timedelta.resolution
        change_until(last)  # what changes with the day's end comes after what is spent by then
        wanted = pace_micro * ((evening - moment) // timedelta.resolution) // (86_400 * 10**6)
        plan, missing = plan_burn(account, wanted, None, last)
        burn(account, plan, "consumed", last, SIMULATED)
        account.entries = []
        spent += wanted - missing
        if missing and runs_out_at is None and not account.is_unlimited:
            runs_out_at = evening
        daily.append((evening, format_amount(account.spendable(evening))))
        moment = evening
    change_until(until)
    if spent:
        available = format_amount(account.spendable(until))
        steps.append(Step(at=until, what="spent", amount=format_amount(spent), available=available))
    return Future(
        account=account.account,
        until=until,
        pace=format_amount(pace_micro),
        steps=steps,
        daily=daily,
        runs_out_at=runs_out_at,
        expiring=format_amount(expired),
        paid=paid,
    )


def advance(account: Account, now: datetime, until: datetime, catalog: Catalog, paid: bool = True) -> None:
    """Let time pass on an account in memory, spending nothing.

    :param paid: whether a plan with a price is paid for in time.
    :raises ValueError: as :func:`simulate`, but that no time may pass at all.
    """
    if until < now:
        raise ValueError("the end lies behind")
    _check_span(now, until)
    _pass_time(account, now, catalog, False)
    while True:
        subscription = account.subscription
        if paid and subscription is not None and subscription.period_end <= until:
            _pay(subscription)
        due = account.due_at()
        if due is None or due > until:
            break
        _pass_time(account, due, catalog, False)
    account.entries, account.renewals = [], []


def _check_span(now: datetime, until: datetime) -> None:
    if until > now + timedelta(days=MAX_DAYS):
        raise ValueError(f"one may look {MAX_DAYS} days ahead at the most")


def _changes(account: Account, until: datetime) -> Iterator[datetime]:
    """The instants up to a moment at which time changes the account, one after the other."""
    while (due := account.due_at()) is not None and due <= until:
        yield due


def _pass_time(account: Account, now: datetime, catalog: Catalog, paid: bool) -> None:
    if paid:
        _pay(account.subscription)
    account.updated_at = now
    account.next_due_at = account.due_at()
    settle(account, now, catalog)
    if paid:
        _pay(account.subscription)


def _pay(subscription: Subscription | None) -> None:
    """What follows the period under way is paid for, if it has to be."""
    if subscription is None or not subscription.is_active or subscription.cancels or subscription.renews_by_itself:
        return
    months = subscription.next_terms.interval_months
    subscription.paid_until = end_of_payment(subscription, subscription.period_end, months)


KINDS = {
    "granted": "allotted",
    "rolled_in": "rolled over",
    "expired": "expired",
    "released": "hold timed out",
}
"""What the entries of passing time are called."""


def _told(account: Account, at: datetime) -> Iterator[Step]:
    """What happened at one instant, summed by kind."""
    amounts: dict[str, int] = {}
    for entry in account.entries:
        if entry.kind in KINDS:
            amounts[entry.kind] = amounts.get(entry.kind, 0) + entry.amount_micro
    available = format_amount(account.spendable(at))
    for kind, amount in amounts.items():
        yield Step(at=at, what=KINDS[kind], amount=format_amount(amount), available=available)
    subscription = account.subscription
    if subscription is not None and not subscription.is_active and subscription.ended_at == at:
        yield Step(at=at, what="plan ended", amount="0", available=available)
