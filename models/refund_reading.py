"""What was given back in a span of days and why: by reason, feature and by whom.

What is read: the refunds of those days, by an index of their own, or by their numbers where they are of one account;
and its days of usage, for what was charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from typing import Any, get_args

from psycopg import Connection

from creditlane.reports import RefundGrouping, RefundLine, Refunds, RefundSums
from models.bisecting import first_operation
from models.reading import DEFAULT_PAGE, account_exists, check_limit
from models.usage_reading import BY_KEY, SNAPSHOT, clock, credits_of, days_of, not_rolled_up, percent, used_in

MAX_LINES = 1_000_000
"""How many lines may be left out before a page."""

ALL: tuple[RefundGrouping, ...] = get_args(RefundGrouping)

REFUNDS = """
WITH given AS (
    SELECT coalesce(o.arguments ->> 'reason', '') AS reason, coalesce(c.feature, '') AS feature,
           coalesce(o.arguments ->> 'actor', '') AS actor, -o.charged_micro AS credits_micro
    FROM operations o
    LEFT JOIN operations c ON c.account = o.account AND c.operation = o.arguments ->> 'operation'
    WHERE {which} AND o.name = 'credits.refund' AND o.status = 'applied'
      AND o.applied_at >= %(start)s AND o.applied_at < %(end)s
), used AS (
    SELECT feature, sum(charged_micro) AS charged_micro FROM ({used}) AS used
    WHERE %(feature)s::text IS NULL OR feature = %(feature)s GROUP BY feature
), told AS (
    SELECT row_number() OVER (ORDER BY grouping({by}) DESC, sum(credits_micro) DESC, {order}) - 1 AS place,
           {shown}, count(*) AS refunds, coalesce(sum(credits_micro), 0) AS credits_micro
    FROM given WHERE %(feature)s::text IS NULL OR feature = %(feature)s GROUP BY GROUPING SETS (({by}), ())
)
SELECT reason, feature, actor, refunds, credits_micro,
       coalesce((SELECT sum(u.charged_micro) FROM used u WHERE told.feature IS NULL OR u.feature = told.feature), 0)
FROM told WHERE place = 0 OR place > %(after)s ORDER BY place LIMIT %(limit)s
"""
"""First the sum of all, then the lines."""


def refunds(
    connection: Connection[Any],
    account: str | None,
    *,
    by: Sequence[RefundGrouping] = ALL,
    since: date | None = None,
    until: date | None = None,
    feature: str | None = None,
    limit: int = DEFAULT_PAGE,
    after: int = 0,
) -> Refunds | None:
    """What was given back in a span of days, UTC, of whichever charges, beside what was charged in it.

    :param connection: not within a transaction.
    :param account: whose; None for all accounts together.
    :param by: what is told apart; at least one.
    :param since: the first day; :data:`models.usage_reading.DEFAULT_DAYS` before ``until`` unless given.
    :param until: the day after the last; tomorrow unless given.
    :param feature: only of charges for this one; of charges that name none when empty.
    :param limit: lines of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: how many lines to leave out: ``next_after`` of the page before.
    :returns: None for an account that no operation ever named.
    :raises ValueError: for a limit, days or a grouping that make no sense.
    """
    check_limit(limit)
    apart = [name for name in ALL if name in by]
    if not apart:
        raise ValueError(f"refunds are told apart by {', '.join(ALL)}: name at least one")
    if not 0 <= after <= MAX_LINES:
        raise ValueError(f"a page begins after 0 to {MAX_LINES:,} lines")
    with connection.transaction():
        connection.execute(SNAPSHOT)
        connection.execute(BY_KEY)
        now, counted_until = clock(connection)
        since, until = days_of(now, since, until)
        start, end = (datetime.combine(day, time(), UTC) for day in (since, until))
        values: dict[str, Any] = {
            "account": account, "feature": feature, "since": since, "until": until, "start": start, "end": end,
            "counted_until": counted_until, "limit": limit + 2, "after": after,
        }  # fmt: skip
        which = "true"
        if account is not None:
            if not account_exists(connection, account):
                return None
            which = "o.account = %(account)s AND o.number >= %(first_of_days)s AND o.number < %(end_of_days)s"
            values["first"] = not_rolled_up(connection, account, counted_until)
            values["first_of_days"] = first_operation(connection, account, start)
            values["end_of_days"] = first_operation(connection, account, end)
        query = REFUNDS.format(
            which=which,
            used=used_in(account, counted_until),
            by=", ".join(apart),
            shown=", ".join(name if name in apart else f"NULL::text AS {name}" for name in ALL),
            order=", ".join(f'{name} COLLATE "C"' for name in apart),
        )
        (_, _, _, *total), *rows = connection.execute(query, values).fetchall()
    return Refunds(
        account=account,
        by=apart,
        since=since,
        until=until,
        as_of=now,
        total=RefundSums(**_sums(total)),
        lines=[
            RefundLine(reason=reason, feature=of, actor=actor, **_sums(sums))
            for reason, of, actor, *sums in rows[:limit]
        ],
        next_after=after + limit if len(rows) > limit else None,
    )


def _sums(row: Sequence[Any]) -> dict[str, Any]:
    """The fields of :class:`RefundSums`."""
    count, credits, charged = map(int, row)
    return {
        "refunds": count,
        "credits": credits_of(credits),
        "charged": credits_of(charged),
        "share_percent": percent(credits, charged),
    }
