"""Counting by period: how much an account, or a member of a pool, has used since it began (ledger rules: pools).

Periods are those of the calendar in a zone, half open: a day from midnight, a week from Monday's, a month from that of
its first day. ``total`` has no end.

A member of a pool is counted from when it is listed, or first charged while the catalog has a limit for all. What it
holds counts as used, from when it was held. What comes back lessens what was counted in the same period, and only
that: what was charged in an earlier one, or before the member was counted, gives nothing back to this one.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from creditlane.contract import FIRST_INSTANT
from models.rules.calendar import LONGEST_MONTH, day_start, month_start, week_start
from models.rules.catalog import Pools
from models.rules.sharing import MEMBER, Allowance
from models.rules.state import Account

WITHIN_NEXT = {"day": timedelta(hours=36), "week": timedelta(days=10), "month": LONGEST_MONTH}
"""So long after its start the period after it is under way, whatever the clocks did meanwhile."""


@lru_cache(maxsize=64)  # of a batch they are all of one instant
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


def period_end(period: str, since: datetime, zone: str) -> datetime | None:
    """The first instant after a period, in UTC; None of ``total``.

    :param since: when it began, as :func:`period_start` gives it.
    """
    return None if period == "total" else period_start(period, since + WITHIN_NEXT[period], zone)


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


class Standing(NamedTuple):
    """How a member of a pool stands in the period under way."""

    member: str
    limit: int | None
    """Micro-credits in a period; None for as much as there is."""
    period: str
    since: datetime
    used: int
    """Micro-credits."""

    @property
    def left(self) -> int | None:
        """Micro-credits that it may use yet; None without a limit."""
        return None if self.limit is None else max(0, self.limit - self.used)


def standing_of(account: Account, member: str, pools: Pools, now: datetime, zone: str) -> Standing | None:
    """How a member of a pool stands, changing nothing.

    Its own limit holds, with its period, else the catalog's with the catalog's.

    :returns: None for one that is not counted: it was never listed, and there is no limit for all.
    """
    allowance = account.allowances.get(MEMBER + member)
    limit: int | None = pools.member_limit
    period: str = pools.period
    if allowance is None:
        if limit is None:
            return None
    elif allowance.limit is not None:
        limit, period = allowance.limit, allowance.period
    elif limit is None:
        period = allowance.period
    return _counted(account, member, limit, period, now, zone)


def _counted(account: Account, member: str, limit: int | None, period: str, now: datetime, zone: str) -> Standing:
    """How a member stands by a limit and a period: a count that begins has what the member holds of this period."""
    since = period_start(period, now, zone)
    allowance = account.allowances.get(MEMBER + member)
    if allowance is not None and allowance.period == period and allowance.since >= since:
        return Standing(member, limit, period, allowance.since, allowance.used)
    held = sum(
        hold.amount
        for hold in account.holds.values()
        if hold.status == "open" and hold.member == member and hold.created_at >= since
    )
    return Standing(member, limit, period, since, held)


def count_member(account: Account, standing: Standing, amount_micro: int) -> Standing:
    """Count what a member uses.

    :param standing: as it is now, the new use apart.
    :returns: how it stands then.
    """
    key = MEMBER + standing.member
    allowance = account.allowances.get(key)
    if allowance is None:
        allowance = account.allowances[key] = Allowance(key, None, standing.period, standing.since)
    after = standing._replace(used=standing.used + amount_micro)
    allowance.period, allowance.since, allowance.used = after.period, after.since, after.used
    allowance.is_dirty = account.is_dirty = True
    return after


def list_member(
    account: Account, member: str, limit: int | None, period: str, pools: Pools, now: datetime, zone: str
) -> Standing:
    """Put a member on a pool's list, or change its limit; what it used stays when the period is the same.

    :param limit: micro-credits in a period; None for what the catalog says for all.
    """
    own = (pools.member_limit, pools.period) if limit is None and pools.member_limit is not None else (limit, period)
    standing = count_member(account, _counted(account, member, *own, now, zone), 0)
    allowance = account.allowances[MEMBER + member]
    allowance.limit, allowance.is_listed = limit, True
    return standing


def give_back_held(account: Account, member: str, amount_micro: int, held_at: datetime) -> None:
    """What a member held comes back: it did not use it after all, if that was in the period that is counted."""
    allowance = account.allowances.get(MEMBER + member)
    if allowance is not None and held_at >= allowance.since:
        _give_back(account, allowance, amount_micro)


def give_back_used(account: Account, member: str, amount_micro: int, period: str, since: datetime) -> None:
    """What a member used is refunded.

    :param period: the kind of the period in which it was counted, which began at ``since``.
    """
    allowance = account.allowances.get(MEMBER + member)
    if allowance is not None and (allowance.period, allowance.since) == (period, since):
        _give_back(account, allowance, amount_micro)


def _give_back(account: Account, allowance: Allowance, amount_micro: int) -> None:
    """Never below nothing: a period of another kind may have begun with less."""
    if amount_micro:
        allowance.used = max(0, allowance.used - amount_micro)
        allowance.is_dirty = account.is_dirty = True
