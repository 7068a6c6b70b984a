"""The one place of calendar arithmetic: renewals, allocations and expiries all count months here (ledger rules: time).

The n-th date is counted from the anchor each time, never from the date before, so a clamped day does not stick: 31 Jan,
28 Feb, 31 Mar. A local time that a change of the clocks skips moves forward; of one that occurs twice, the first is
meant.
"""

from __future__ import annotations

import zoneinfo
from calendar import monthrange
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

zoneinfo.reset_tzpath(to=())
# The zones are those of the package ``tzdata``, never a machine's own: all workers of a deployment have the same ones.

MONTHS_PER_YEAR = 12

LONGEST_MONTH = timedelta(days=33)
"""No month of any zone is longer, clamping and changes of the clocks and of the date line included."""


def add_months(anchor: datetime, months: int, zone: str) -> datetime:
    """The instant so many months after an anchor: the same day and time of day in a zone, or the month's last day.

    :param anchor: with a zone of its own, which does not matter.
    :param months: how many, 0 or more.
    :param zone: an IANA time zone, in which the calendar is looked at.
    :returns: in UTC. For 0 months the anchor.
    """
    if not months:
        return anchor.astimezone(UTC)
    local = anchor.astimezone(ZoneInfo(zone))
    years, month = divmod(local.month - 1 + months, MONTHS_PER_YEAR)
    year, month = local.year + years, month + 1
    day = min(local.day, monthrange(year, month)[1])
    # Of a time that occurs twice, fold 0 is the first; of one that is skipped, it has the offset from before the gap,
    # which makes it as much later.
    return local.replace(year=year, month=month, day=day, fold=0).astimezone(UTC)


def months_passed(anchor: datetime, now: datetime, zone: str) -> int:
    """How many whole months lie between an anchor and an instant: the largest n with ``add_months(anchor, n) <= now``.

    :returns: 0 also when ``now`` is before the anchor.
    """
    here = ZoneInfo(zone)
    start, end = anchor.astimezone(here), now.astimezone(here)
    # One too many at the most, by day and time of day, and one more where the date line was moved.
    months = max(0, (end.year - start.year) * MONTHS_PER_YEAR + end.month - start.month + 1)
    while months and add_months(anchor, months, zone) > now:
        months -= 1
    return months


def month_start(now: datetime, zone: str) -> datetime:
    """The first instant of the calendar month that an instant lies in, in UTC."""
    return _midnight(now.astimezone(ZoneInfo(zone)).replace(day=1))


def week_start(now: datetime, zone: str) -> datetime:
    """The first instant of the week, which begins on Monday, that an instant lies in, in UTC."""
    local = now.astimezone(ZoneInfo(zone))
    return _midnight(local - timedelta(days=local.weekday()))


def day_start(now: datetime, zone: str) -> datetime:
    """The first instant of the day that an instant lies in, in UTC."""
    return _midnight(now.astimezone(ZoneInfo(zone)))


def _midnight(local: datetime) -> datetime:
    return local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0).astimezone(UTC)
