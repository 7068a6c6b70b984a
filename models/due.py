"""What waits for time or for a schedule: accounts that are due, and what is yet to go out."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from psycopg import Connection

from creditlane.amounts import format_amount
from models.cutoff import somebody_does
from models.reading import load_account
from models.rules.state import Account

BEAT = "beat"
"""What the one beat that ticks does, see :func:`models.cutoff.try_alone`."""

COUNTED = 100_000
"""Rows that are counted; of more due accounts the planner's estimate is good enough."""

SAMPLE = 1000
"""Due accounts, the longest overdue, of which is looked at what is due to them."""

IN_ORDER = "SET enable_sort = off"
"""For a session that reads pages: a page is read off the index, never sorted out of all that is yet to come."""

BEGINNING = datetime.fromisoformat("0001-01-02T00:00:00+00:00")
"""Before every instant that a page begins at."""

COUNT = f"SELECT count(*) FROM (SELECT FROM accounts WHERE next_due_at <= %s LIMIT {COUNTED}) AS found"
ESTIMATE = "EXPLAIN (FORMAT JSON) SELECT FROM accounts WHERE next_due_at <= %s"
OLDEST = f"""
SELECT account, next_due_at FROM accounts WHERE next_due_at <= %s ORDER BY next_due_at, account LIMIT {SAMPLE}
"""
NOTICES = f"""
SELECT count(*), min(created_at)
FROM (SELECT created_at FROM notices WHERE delivered_at IS NULL ORDER BY created_at LIMIT {COUNTED}) AS found
"""
OUTBOX = f"SELECT count(*), min(created_at) FROM (SELECT created_at FROM outbox ORDER BY id LIMIT {COUNTED}) AS found"
IN_TRANSIT = f"""
SELECT count(*), coalesce(sum(in_transit_micro), 0)::bigint
FROM (SELECT in_transit_micro FROM accounts WHERE in_transit_micro > 0 LIMIT {COUNTED}) AS found
"""
TICKS = "SELECT name, task, last_tick_at FROM schedules ORDER BY name"
COUNTED_UNTIL = "SELECT counted_until FROM usage_watermark"


class Due(msgspec.Struct, kw_only=True, frozen=True):
    """How many accounts the sweep would settle, and why."""

    accounts: int
    """Counted up to :data:`COUNTED`, beyond that estimated."""
    oldest: datetime | None
    """Since when the longest overdue one is."""
    by: dict[str, int]
    """How many have a ``hold`` that times out, an ``expiry`` of credits, a ``renewal`` or the ``end`` of a plan; one
    account may have several."""
    looked_at: int
    """Of how many that is: the longest overdue."""


class Waiting(msgspec.Struct, kw_only=True, frozen=True):
    """Rows that wait to go out, counted up to :data:`COUNTED`."""

    count: int
    oldest: datetime | None


class Tick(msgspec.Struct, kw_only=True, frozen=True):
    """A schedule, and when beat last sent it."""

    name: str
    task: str
    last_tick_at: datetime


class Work(msgspec.Struct, kw_only=True, frozen=True):
    """What the schedules would do."""

    at: datetime
    due: Due
    notices: Waiting
    """Not delivered by every channel yet."""
    outbox: Waiting
    """Committed, and not confirmed by the broker yet."""
    transferring: int
    """Accounts with credits on their way to others."""
    in_transit: str
    usage_until: datetime | None
    """Until when usage is counted."""
    beat: bool
    """Whether a beat ticks."""
    schedules: list[Tick]


def estimate(connection: Connection[Any], at: datetime) -> int:
    """About how many accounts are due: counted up to :data:`COUNTED`, beyond that what the planner believes."""
    row = connection.execute(COUNT, (at,)).fetchone()
    assert row is not None
    counted = int(row[0])
    if counted < COUNTED:
        return counted
    plan = connection.execute(ESTIMATE, (at,)).fetchone()
    assert plan is not None
    return max(counted, int(plan[0][0]["Plan"]["Plan Rows"]))


def what_is_due(account: Account, at: datetime) -> set[str]:
    """What time does to an account first, by an instant: the keys of :attr:`Due.by`."""
    due = set()
    subscription = account.subscription
    ends_at = None if subscription is None else subscription.due_at()
    ending: list[int] = []
    if subscription is not None and ends_at is not None and ends_at <= at:
        due.add("renewal" if subscription.renews_by_itself else "end")
        ending = subscription.lots
    if any(hold.status == "open" and hold.expires_at <= at for hold in account.holds.values()):
        due.add("hold")
    for grant in account.order:
        if grant.available and grant.expires_at is not None and grant.expires_at <= at and grant.id not in ending:
            due.add("expiry")
    return due


def work(connection: Connection[Any], at: datetime | None = None) -> Work:
    """What the schedules would do now.

    :param connection: in autocommit mode.
    :param at: what falls due by then, unless now.
    """
    if at is None:
        ((at,),) = connection.execute("SELECT ledger_now()").fetchall()
    oldest = connection.execute(OLDEST, (at,)).fetchall()
    by = dict.fromkeys(("hold", "expiry", "renewal", "end"), 0)
    for account, _ in oldest:
        loaded = load_account(connection, account)
        for what in () if loaded is None else what_is_due(loaded[0], at):
            by[what] += 1
    notices, outbox, transit = (
        connection.execute(statement).fetchall()[0] for statement in (NOTICES, OUTBOX, IN_TRANSIT)
    )
    counted = connection.execute(COUNTED_UNTIL).fetchone()
    return Work(
        at=at,
        due=Due(
            accounts=estimate(connection, at) if len(oldest) == SAMPLE else len(oldest),
            oldest=oldest[0][1] if oldest else None,
            by=by,
            looked_at=len(oldest),
        ),
        notices=Waiting(count=notices[0], oldest=notices[1]),
        outbox=Waiting(count=outbox[0], oldest=outbox[1]),
        transferring=transit[0],
        in_transit=format_amount(transit[1]),
        usage_until=None if counted is None else counted[0],
        beat=somebody_does(connection, BEAT),
        schedules=[Tick(name=name, task=task, last_tick_at=last) for name, task, last in connection.execute(TICKS)],
    )
