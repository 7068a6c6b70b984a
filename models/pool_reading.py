"""A pool for those who look after it: what each of its members may use, what it used, and how much of the whole."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from psycopg import Connection

from creditlane.reports import Pool, PoolMember
from models.bisecting import first_operation
from models.columns import ALLOWANCE_COLUMNS
from models.reading import DEFAULT_PAGE, check_limit, load_account
from models.rules.allowances import period_end, standing_of
from models.rules.catalog import Catalog
from models.rules.settling import settle
from models.rules.sharing import MEMBER, allowance_of
from models.rules.state import POOL, Account
from models.usage import COUNTED
from models.usage_reading import BY_KEY, SNAPSHOT, clock, credits_of, days_of, percent

MEMBERS = f"""
WITH named AS (
    SELECT member COLLATE "C" AS member, charged_micro - refunded_micro AS micro FROM usage_days
    WHERE account = %(account)s AND day >= %(since)s AND day < %(until)s
    UNION ALL
    SELECT member COLLATE "C", charged_micro - refunded_micro FROM ({COUNTED}) AS fresh
    WHERE day >= %(since)s AND day < %(until)s
    UNION ALL
    SELECT substr(key, {len(MEMBER) + 1}) COLLATE "C", 0 FROM allowances
    WHERE account = %(account)s AND starts_with(key, '{MEMBER}')
)
SELECT grouping(member) = 1 AS is_total, member, coalesce(sum(micro), 0)::bigint,
       coalesce(sum(micro) FILTER (WHERE member = ''), 0)::bigint
FROM named GROUP BY GROUPING SETS ((member), ())
HAVING grouping(member) = 1 OR (member <> '' AND (%(after)s::text IS NULL OR member > %(after)s))
ORDER BY is_total DESC, member LIMIT %(limit)s
""".replace("{which}", "o.account = %(account)s AND o.number >= %(first)s AND o.applied_at >= %(counted_until)s")
"""All together first, then a page of those that are counted or that used it."""

ALLOWANCES = f"SELECT {', '.join(ALLOWANCE_COLUMNS)} FROM allowances WHERE account = %s AND key = ANY(%s)"


def pool(
    connection: Connection[Any],
    account: str,
    catalog: Catalog,
    *,
    since: date | None = None,
    until: date | None = None,
    limit: int = DEFAULT_PAGE,
    after: str | None = None,
) -> Pool | None:
    """A pool, and a page of its members by name: those on its list, those taken off it, and others who used it.

    :param connection: not within a transaction.
    :param catalog: the one in force, whose limit and period hold for members without their own.
    :param since: the first day of what they were charged, UTC; 30 days before ``until`` unless given.
    :param until: the day after the last; tomorrow unless given.
    :param limit: members of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: only members after it: ``next_after`` of the page before.
    :returns: None for an account that is no pool, or that no operation ever named.
    :raises ValueError: for a limit or days that make no sense.
    """
    check_limit(limit)
    found = load_account(connection, account)
    if found is None or found[0].kind != POOL:
        return None
    state, now = found
    with connection.transaction():
        connection.execute(SNAPSHOT)
        connection.execute(BY_KEY)
        _, counted_until = clock(connection)
        since, until = days_of(now, since, until)
        values = {
            "account": account, "since": since, "until": until, "after": after, "limit": limit + 2,
            "counted_until": counted_until or "-infinity",
            "first": 1 if counted_until is None else first_operation(connection, account, counted_until),
        }  # fmt: skip
        (_, _, total, own), *rows = connection.execute(MEMBERS, values).fetchall()
        names = [name for _, name, *_ in rows[:limit]]
        counted = connection.execute(ALLOWANCES, (account, [MEMBER + name for name in names])).fetchall()
    state.allowances = {row[1]: allowance_of(row[1:]) for row in counted}
    settle(state, now, catalog)  # what time has made due counts as done, for the members' use as well
    return Pool(
        account=account,
        as_of=now,
        available=credits_of(state.spendable(now)),
        held=credits_of(state.held),
        open_to=catalog.pools.members,
        since=since,
        until=until,
        charged=credits_of(total),
        own=credits_of(own),
        members=[_member(state, name, charged, total, catalog, now) for _, name, charged, _ in rows[:limit]],
        next_after=names[-1] if len(rows) > limit else None,
    )


def _member(state: Account, member: str, charged: int, total: int, catalog: Catalog, now: datetime) -> PoolMember:
    allowance = state.allowances.get(MEMBER + member)
    listed = None if allowance is None else allowance.is_listed
    zone = catalog.catalog.zone
    standing = standing_of(state, member, catalog.pools, now, zone)
    return PoolMember(
        member=member,
        status="unlisted" if listed is None else "listed" if listed else "removed",
        limit=None if standing is None or standing.limit is None else credits_of(standing.limit),
        period=None if standing is None else standing.period,  # type: ignore[arg-type]  # one of the four
        period_end=None if standing is None else period_end(standing.period, standing.since, zone),
        used=None if standing is None else credits_of(standing.used),
        left=None if standing is None or standing.left is None else credits_of(standing.left),
        charged=credits_of(charged),
        share_percent=percent(charged, total),
    )
