"""The in-app inbox: an account's notices, read and marked as read. Marking is all that is ever written."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from psycopg import Connection

from creditlane.inbox import ADVISED, Inbox, Notice
from models.advice_reading import account_advice
from models.reading import DEFAULT_PAGE, MAX_PAGE
from models.rules.catalog import Catalog

_PAGE = """
SELECT key, kind, at, created_at, read_at, details FROM notices
WHERE account = %(account)s AND (created_at, key) < (%(created_at)s, %(key)s) {filter}
ORDER BY created_at DESC, key DESC LIMIT %(limit)s
"""
PAGE = _PAGE.format(filter="")
UNREAD_PAGE = _PAGE.format(filter="AND read_at IS NULL")
TOTAL = "SELECT count(*) FROM notices WHERE account = %s"
UNREAD = "SELECT count(*) FROM notices WHERE account = %s AND read_at IS NULL"
MARK_ONE = "UPDATE notices SET read_at = ledger_now() WHERE account = %s AND key = %s AND read_at IS NULL"
MARK_ALL = """
UPDATE notices SET read_at = ledger_now()
WHERE account = %s AND read_at IS NULL AND created_at <= coalesce(%s, ledger_now())
"""

END = datetime.fromisoformat("9999-12-30T00:00:00+00:00")


def inbox(
    connection: Connection[Any],
    account: str,
    catalog: Catalog,
    *,
    limit: int = DEFAULT_PAGE,
    before: str | None = None,
    unread: bool = False,
) -> Inbox:
    """A page of an account's notices, the newest first, with advice where one of them is of a kind that carries it.

    :param connection: not within a transaction.
    :param catalog: the one in force, by which advice is given.
    :param limit: notices of the page, at most :data:`models.reading.MAX_PAGE`.
    :param before: only older ones: ``next_before`` of the page before.
    :param unread: only those that were not read.
    :raises ValueError: for a limit or a place that is none.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} rows, not {limit}")
    created_at, key = (END, "") if before is None else _place(before)
    values = {"account": account, "created_at": created_at, "key": key, "limit": limit + 1}
    rows = connection.execute(UNREAD_PAGE if unread else PAGE, values).fetchall()
    fields = ("key", "kind", "at", "created_at", "read_at", "details")
    notices = [Notice(**dict(zip(fields, row, strict=True))) for row in rows[:limit]]
    last = notices[-1] if len(rows) > limit else None
    advised = any(notice.kind in ADVISED for notice in notices)
    return Inbox(
        notices=notices,
        unread=_count(connection, UNREAD, account),
        total=_count(connection, TOTAL, account),
        next_before=None if last is None else f"{last.created_at.isoformat()} {last.key}",
        advice=account_advice(connection, account, catalog) if advised else None,
    )


def mark_read(
    connection: Connection[Any], account: str, *, key: str | None = None, until: datetime | None = None
) -> int:
    """Note that notices were read; one that was read before keeps its time.

    :param key: one of them; all of them unless given.
    :param until: of all of them, those that were made by then: what somebody has seen.
    :returns: how many were not read before.
    """
    if key is not None:
        return connection.execute(MARK_ONE, (account, key)).rowcount
    return connection.execute(MARK_ALL, (account, until)).rowcount


def _place(before: str) -> tuple[datetime, str]:
    at, _, key = before.partition(" ")
    try:
        return msgspec.convert(at, datetime, strict=False), key
    except msgspec.ValidationError:
        raise ValueError(f"{before!r} is no place in an inbox; give next_before of the page before") from None


def _count(connection: Connection[Any], query: str, account: str) -> int:
    row = connection.execute(query, (account,)).fetchone()
    assert row is not None
    count: int = row[0]
    return count
