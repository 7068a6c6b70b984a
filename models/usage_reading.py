"""Usage of an account, or of all, over days: what is rolled up and what is yet to be, each operation counted once."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from psycopg import Connection

from creditlane.amounts import format_amount
from creditlane.reports import MAX_SPAN_DAYS, Grouping, Usage, UsageLine, UsageSums, Utilisation
from models.bisecting import first_entry, first_operation
from models.reading import DEFAULT_PAGE, account_exists, check_limit
from models.usage import COUNTED

DEFAULT_DAYS = 30
"""The span of days unless its caller says otherwise: today and those before it."""

MAX_ENTRIES = 1_000_000
"""The most entries of a span of which the utilisation is worked out."""

SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
"""What is rolled up and how far it is belong together."""

BY_KEY = "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"
"""What a refund gives back of is found by its key, never by reading all operations."""

CLOCK = "SELECT ledger_now(), (SELECT counted_until FROM usage_watermark)"

KEYS: dict[Grouping, str] = {
    "feature": "feature",
    "member": "member",
    "day": "to_char(day, 'YYYY-MM-DD')",
    "week": "to_char(date_trunc('week', day::timestamp), 'YYYY-MM-DD')",
    "month": "to_char(date_trunc('month', day::timestamp), 'YYYY-MM-DD')",
}
RANKED = ("feature", "member")
"""What is told by how much was used, and compared with the time before; days, weeks and months come in their order."""

USED_IN = """
    SELECT account, day, feature, member, operations, quantity_micro, charged_micro, refunded_micro
    FROM usage_days WHERE {rolled_up}
    UNION ALL
    SELECT account, day, feature, member, operations, quantity_micro, charged_micro, refunded_micro
    FROM ({fresh}) AS fresh WHERE day >= %(since)s AND day < %(until)s
"""
BEFORE, NOW = "FILTER (WHERE day < %(first_day)s)", "FILTER (WHERE day >= %(first_day)s)"
USED = """
WITH used AS (
    {used}
), keyed AS (
    SELECT {key} COLLATE "C" AS key, * FROM used
    WHERE (%(feature)s::text IS NULL OR feature = %(feature)s)
      AND (%(member)s::text IS NULL OR member = %(member)s)
), summed AS (
    SELECT grouping(key) = 1 AS is_total, key,
           coalesce(sum(operations) {now}, 0) AS charges,
           coalesce(sum(quantity_micro) {now}, 0) AS quantity_micro,
           coalesce(sum(charged_micro) {now}, 0) AS charged_micro,
           coalesce(sum(refunded_micro) {now}, 0) AS refunded_micro,
           coalesce(sum(charged_micro - refunded_micro) {now}, 0) AS used_micro,
           coalesce(sum(charged_micro - refunded_micro) {before}, 0) AS before_micro
    FROM keyed GROUP BY GROUPING SETS ((key), ()) HAVING grouping(key) = 1 OR {has}
)
SELECT is_total, key, charges::bigint, quantity_micro, charged_micro, refunded_micro, used_micro, before_micro
FROM summed WHERE is_total OR %(after)s::text IS NULL OR {beyond}
ORDER BY is_total DESC, {order} LIMIT %(limit)s
"""
ORDERS = {
    True: {
        "has": "true",
        "beyond": "(-used_micro, key) > (SELECT -used_micro, key FROM summed WHERE NOT is_total AND key = %(after)s)",
        "order": "used_micro DESC, key",
    },
    False: {"has": "bool_or(day >= %(first_day)s)", "beyond": "key > %(after)s", "order": "key"},
}
MOVED = """
SELECT coalesce(sum(amount_micro) FILTER (WHERE kind IN ('consumed', 'captured')), 0)
       - coalesce(sum(amount_micro) FILTER (WHERE kind = 'restored'), 0),
       coalesce(sum(amount_micro) FILTER (WHERE kind = 'expired'), 0)
       - coalesce(sum(amount_micro) FILTER (WHERE kind = 'unexpired'), 0)
FROM entries WHERE account = %s AND seq >= %s AND seq < %s
"""
LEFT = "SELECT balance_after_micro FROM entries WHERE account = %s AND seq = %s"


def usage(
    connection: Connection[Any],
    account: str | None,
    *,
    by: Grouping = "feature",
    since: date | None = None,
    until: date | None = None,
    feature: str | None = None,
    member: str | None = None,
    limit: int = DEFAULT_PAGE,
    after: str | None = None,
) -> Usage | None:
    """What was used in a span of days, UTC, with as many days before for comparison.

    A charge is of the day on which it occurred, or was applied where its sender did not say; what is given back is of
    the day on which that was done.

    :param connection: not within a transaction.
    :param account: whose; None for all accounts together.
    :param since: the first day; :data:`DEFAULT_DAYS` before ``until`` unless given.
    :param until: the day after the last; tomorrow unless given.
    :param feature: only of this one; of charges that name none when empty. ``member``: likewise.
    :param limit: lines of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: only what comes after it: ``next_after`` of the page before.
    :returns: None for an account that no operation ever named.
    :raises ValueError: for a limit or days that make no sense.
    """
    check_limit(limit)
    with connection.transaction():
        connection.execute(SNAPSHOT)
        connection.execute(BY_KEY)
        now, counted_until = clock(connection)
        since, until = days_of(now, since, until)
        before = _before(since, until)
        if account is not None and not account_exists(connection, account):
            return None
        values = {
            "account": account, "first_day": since, "since": before, "until": until, "feature": feature,
            "member": member, "after": after, "limit": limit + 2, "counted_until": counted_until,
        }  # fmt: skip
        if account is not None:
            values["first"] = not_rolled_up(connection, account, counted_until)
        query = USED.format(
            used=used_in(account, counted_until),
            key=KEYS[by],
            now=NOW,
            before=BEFORE,
            **ORDERS[by in RANKED],
        )
        (_, _, *total), *rows = connection.execute(query, values).fetchall()
        whole = feature is None and member is None
        used = _utilisation(connection, account, since, until) if account is not None and whole else None
    lines = [
        UsageLine(
            key=key,
            **_sums(sums, of_one=by == "feature" or feature is not None, compared=by in RANKED),
        )
        for _, key, *sums in rows[:limit]
    ]
    return Usage(
        account=account,
        by=by,
        since=since,
        until=until,
        before=before,
        as_of=now,
        total=UsageSums(**_sums(total, of_one=feature is not None, compared=True)),
        utilisation=used,
        lines=lines,
        next_after=lines[-1].key if len(rows) > limit else None,
    )


def clock(connection: Connection[Any]) -> tuple[datetime, datetime | None]:
    """The database's time, and until when usage is rolled up; None for not at all."""
    row = connection.execute(CLOCK).fetchone()
    assert row is not None
    return row[0], row[1]


def days_of(now: datetime, since: date | None, until: date | None) -> tuple[date, date]:
    """The first day of a span and the day after the last, :data:`DEFAULT_DAYS` until today unless given.

    :raises ValueError: for days that make no sense.
    """
    try:
        if until is None:
            until = now.astimezone(UTC).date() + timedelta(days=1)
        if since is None:
            since = until - timedelta(days=DEFAULT_DAYS)
    except OverflowError:
        raise ValueError("there are no days before the first of the calendar") from None
    if since >= until:
        raise ValueError("the first day is not before the last")
    if until - since > timedelta(days=MAX_SPAN_DAYS):
        raise ValueError(f"one may ask for {MAX_SPAN_DAYS} days at the most")
    return since, until


def _before(since: date, until: date) -> date:
    """The first of as many days before."""
    try:
        return since - (until - since)
    except OverflowError:
        raise ValueError("there are no days before the first of the calendar to compare with") from None


def used_in(account: str | None, counted_until: datetime | None) -> str:
    """A query for what was used in the days from ``since`` to ``until``, each operation counted once.

    Its columns are those of ``usage_days``. Its parameters are ``since``, ``until``, ``counted_until`` and, where it is
    of one account, ``account`` and ``first``, the number of the first operation that is not rolled up.
    """
    fresh = "true" if counted_until is None else "o.applied_at >= %(counted_until)s"
    rolled_up = "day >= %(since)s AND day < %(until)s"
    if account is not None:
        rolled_up = f"account = %(account)s AND {rolled_up}"
        fresh = f"o.account = %(account)s AND o.number >= %(first)s AND {fresh}"
    return USED_IN.format(rolled_up=rolled_up, fresh=COUNTED.format(which=fresh))


def not_rolled_up(connection: Connection[Any], account: str, counted_until: datetime | None) -> int:
    """The number of an account's first operation that is not rolled up."""
    return 1 if counted_until is None else first_operation(connection, account, counted_until)


def _sums(row: list[Any], *, of_one: bool, compared: bool) -> dict[str, Any]:
    """The fields of :class:`UsageSums`.

    :param of_one: whether it is of one feature.
    :param compared: whether it is told with the time before.
    """
    charges, quantity, charged, refunded, used, before = map(int, row)
    return {
        "charges": charges,
        "quantity": credits_of(quantity) if of_one else None,
        "credits": credits_of(charged),
        "refunded": credits_of(refunded),
        "used": credits_of(used),
        "used_before": credits_of(before) if compared else None,
        "change_percent": percent(used - before, before) if compared else None,
    }


def _utilisation(connection: Connection[Any], account: str, since: date, until: date) -> Utilisation | None:
    """How much of what there was is used, by the entries recorded in a span of days; None where they are too many."""
    start, end = (first_entry(connection, account, datetime.combine(day, time(), UTC)) for day in (since, until))
    if end - start > MAX_ENTRIES:
        return None
    row = connection.execute(MOVED, (account, start, end)).fetchone()
    last = connection.execute(LEFT, (account, end - 1)).fetchone()
    assert row is not None
    used, expired, left = int(row[0]), int(row[1]), 0 if last is None else last[0]
    there = used + left + max(0, expired)
    return Utilisation(
        used=credits_of(used), left=credits_of(left), expired=credits_of(expired), percent=percent(used, there)
    )


def credits_of(micro: int) -> Decimal:
    """Micro-credits, or millionths of a unit, as credits or units; exact, however many."""
    return Decimal(format_amount(micro))


def percent(part: int, whole: int) -> float | None:
    """A part in percent, to a tenth; None of nothing."""
    return round(100 * part / whole, 1) if whole > 0 else None
