"""Counting by period: how much an account, or a member of a pool, has used since it began (ledger rules: pools).

Periods are those of the calendar in a zone, half open: a day from midnight, a week from Monday's, a month from that of
its first day. ``total`` has no end.
"""

from __future__ import annotations

from datetime import datetime

from creditlane.contract import FIRST_INSTANT
from models.rules.calendar import day_start, month_start, week_start
from models.rules.sharing import Allowance
from models.rules.state import Account


def period_start(period: str, now: datetime, zone: str) -> datetime:
    """When the period began that an instant lies in.

    :param period: ``day``, ``week``, ``month`` or ``total``.
    :param zone: an IANA time zone.
    :returns: in UTC; of ``total`` the beginning of the calendar that messages may name.
    """
    if period == "day":
        return day_start(now, zone)
    if period == "week":
        return week_start(now, zone)
    if period == "month":
        return month_start(now, zone)
    return FIRST_INSTANT


def used_in(account: Account, key: str, period: str, now: datetime, zone: str) -> tuple[int, int]:
    """What was counted in the period under way, changing nothing.

    :returns: micro-credits, and how many times.
    """
    allowance = account.allowances.get(key)
    if allowance is None or allowance.since < period_start(period, now, zone):
        return 0, 0
    return allowance.used, allowance.uses


def count(account: Account, key: str, period: str, amount_micro: int, now: datetime, zone: str) -> Allowance:
    """Count one more use, in the period that ``now`` lies in; what an earlier one counted is over.

    :param amount_micro: of credits; 0 where only times are counted.
    """
    since = period_start(period, now, zone)
    allowance = account.allowances.get(key)
    if allowance is None:
        allowance = account.allowances[key] = Allowance(key, None, period, since)
    elif allowance.since < since or allowance.period != period:
        allowance.period, allowance.since, allowance.used, allowance.uses = period, since, 0, 0
    allowance.used += amount_micro
    allowance.uses += 1
    allowance.is_dirty = account.is_dirty = True
    return allowance
