"""Which accounts used or earned the most, for all time or in a span of days; exact to the last commit.

What is read: for credits used of all time the rows of all accounts; for those of a span its days of usage and what is
not rolled up yet; for credits earned all lots, or those of the span, and all uses of gift codes. No row says what rank
an account has, so its rank costs as much as the whole board.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

from psycopg import Connection

from creditlane.contract import RECEIVING
from creditlane.reports import Leaderboard, Merit, Ranked
from models.reading import DEFAULT_PAGE, check_limit
from models.rules.catalog import Catalog
from models.usage_reading import BY_KEY, SNAPSHOT, clock, credits_of, days_of, used_in

USED_EVER = """
SELECT account, (consumed_micro - restored_micro)::numeric AS amount FROM accounts WHERE consumed_micro > restored_micro
"""
USED_IN_DAYS = """
SELECT account, sum(charged_micro - refunded_micro) AS amount FROM ({used}) AS used
GROUP BY account HAVING sum(charged_micro - refunded_micro) > 0
"""
EARNED = """
WITH lots AS MATERIALIZED (
    SELECT account, operation, source, granted_micro, received_micro, clawed_back_micro,
           price_minor IS NULL AND purchase IS NULL AS is_free
    FROM grants
    WHERE origin IS NULL AND {created} AND (source = ANY(%(earned)s) OR starts_with(operation, %(receiving)s))
), gifts AS (
    SELECT l.account, o.arguments ->> 'sender' AS sender, l.received_micro
    FROM lots l JOIN operations o ON o.account = l.account AND o.operation = l.operation
    WHERE starts_with(l.operation, %(receiving)s)
      -- What a lead had is its user's own.
      AND NOT EXISTS (SELECT FROM accounts s WHERE s.account = o.arguments ->> 'sender' AND s.converted_to = l.account)
    UNION ALL
    SELECT r.account, c.account, r.amount_micro FROM redemptions r JOIN codes c ON c.code = r.code
    WHERE {redeemed} AND c.kind = 'gift' AND c.terms ->> 'source' IS NULL
)
SELECT account, sum(amount) AS amount FROM (
    SELECT account, granted_micro - clawed_back_micro AS amount FROM lots
    WHERE is_free AND source = ANY(%(earned)s) AND granted_micro > clawed_back_micro
    UNION ALL
    -- What is given away again was not earned: credits that go round in a circle are nobody's.
    SELECT account, sum(given) FROM (
        SELECT account, received_micro AS given FROM gifts
        UNION ALL SELECT sender, -received_micro FROM gifts
    ) AS given GROUP BY account HAVING sum(given) > 0
) AS came GROUP BY account
"""
IN_DAYS = "{at} >= %(start)s AND {at} < %(end)s"
BOARD = """
WITH scored AS MATERIALIZED ({scored}), page AS (
    SELECT account, amount FROM scored
    WHERE %(after)s::text IS NULL OR (-amount, account COLLATE "C") > {last}
    ORDER BY amount DESC, account COLLATE "C" LIMIT %(limit)s
), asked AS (SELECT amount FROM scored WHERE account = %(account)s)
SELECT count(*), coalesce(sum(amount), 0), (SELECT amount FROM asked),
       count(*) FILTER (WHERE amount > (SELECT amount FROM asked)),
       count(*) FILTER (WHERE amount > (SELECT max(amount) FROM page)),
       count(*) FILTER (WHERE (-amount, account COLLATE "C") <= {last}),
       (SELECT array_agg(account ORDER BY amount DESC, account COLLATE "C") FROM page),
       (SELECT array_agg(amount ORDER BY amount DESC, account COLLATE "C") FROM page)
FROM scored
"""
LAST = '(SELECT -amount, account COLLATE "C" FROM scored WHERE account = %(after)s)'
"""Where the page before ended."""


def leaderboard(
    connection: Connection[Any],
    catalog: Catalog,
    *,
    by: Merit = "used",
    since: date | None = None,
    until: date | None = None,
    account: str | None = None,
    limit: int = DEFAULT_PAGE,
    after: str | None = None,
) -> Leaderboard:
    """The accounts that used or earned the most credits.

    Used is what was charged less what was given back. Earned is what came in without being paid for: lots of the
    sources that the catalog counts as earned, less what was taken back of them; and gifts, by transfer or by a code
    that somebody paid for, less those given.

    :param connection: not within a transaction.
    :param catalog: the one in force.
    :param since: the first day, UTC; of all time unless it or ``until`` is given.
    :param until: the day after the last.
    :param account: whose rank is told as well.
    :param limit: accounts of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: only what comes after this account: ``next_after`` of the page before.
    :raises ValueError: for a limit or days that make no sense.
    """
    check_limit(limit)
    with connection.transaction():
        connection.execute(SNAPSHOT)
        connection.execute(BY_KEY)
        now, counted_until = clock(connection)
        values: dict[str, Any] = {"account": account, "after": after, "limit": limit + 1}
        is_of_days = since is not None or until is not None
        if is_of_days:
            since, until = days_of(now, since, until)
            start, end = (datetime.combine(day, time(), UTC) for day in (since, until))
            values |= {"since": since, "until": until, "counted_until": counted_until, "start": start, "end": end}
        if by == "earned":
            values |= {"earned": catalog.earned_sources, "receiving": RECEIVING}
            which = IN_DAYS if is_of_days else "true"
            scored = EARNED.format(created=which.format(at="created_at"), redeemed=which.format(at="r.at"))
        else:
            scored = USED_IN_DAYS.format(used=used_in(None, counted_until)) if is_of_days else USED_EVER
        row = connection.execute(BOARD.format(scored=scored, last=LAST), values).fetchone()
    assert row is not None
    accounts, total, own, above_own, above_page, passed, names, amounts = row
    lines = list(_ranked(names or (), amounts or (), above_page, passed))
    return Leaderboard(
        by=by,
        since=since,
        until=until,
        as_of=now,
        accounts=accounts,
        total=credits_of(int(total)),
        lines=lines[:limit],
        own=None
        if own is None or account is None
        else Ranked(rank=above_own + 1, account=account, credits=credits_of(int(own))),
        next_after=lines[limit - 1].account if len(lines) > limit else None,
    )


def _ranked(names: Sequence[str], amounts: Sequence[Decimal], above: int, passed: int) -> Iterator[Ranked]:
    """Accounts of a page with their ranks; a page may begin among accounts of one rank.

    :param above: how many accounts have more than the first.
    :param passed: how many came on the pages before.
    """
    rank, last = above + 1, None
    for place, (name, amount) in enumerate(zip(names, amounts, strict=True), passed + 1):
        if last is not None and amount != last:
            rank = place
        last = amount
        yield Ranked(rank=rank, account=name, credits=credits_of(int(amount)))
