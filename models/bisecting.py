"""Where an instant falls among an account's operations and entries.

Neither has an index over time and account. But both are numbered without gaps, and time never goes back from one to
the next: a look at a few of them by number finds the place.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from psycopg import Connection

_FIRST = """
WITH RECURSIVE search (low, high) AS (
    SELECT 1::bigint, {last} + 1 FROM accounts WHERE account = %(account)s
    UNION ALL
    SELECT CASE WHEN found.is_before THEN middle + 1 ELSE low END, CASE WHEN found.is_before THEN high ELSE middle END
    FROM search, LATERAL (SELECT (low + high) / 2 AS middle) AS probe,
         LATERAL (SELECT {time} < %(instant)s AS is_before FROM {table}
                  WHERE account = %(account)s AND {number} = middle) AS found
    WHERE low < high
)
SELECT low FROM search WHERE low = high
"""
FIRST_OPERATION = _FIRST.format(table="operations", number="number", last="operations", time="applied_at")
FIRST_ENTRY = _FIRST.format(table="entries", number="seq", last="seq", time="recorded_at")


def first_operation(connection: Connection[Any], account: str, instant: datetime) -> int:
    """The number of the account's first operation that was applied at an instant or later; it may be yet to come."""
    return _first(connection, FIRST_OPERATION, account, instant)


def first_entry(connection: Connection[Any], account: str, instant: datetime) -> int:
    """The seq of the account's first entry that was recorded at an instant or later; it may be yet to come."""
    return _first(connection, FIRST_ENTRY, account, instant)


def _first(connection: Connection[Any], query: str, account: str, instant: datetime) -> int:
    row = connection.execute(query, {"account": account, "instant": instant}).fetchone()
    return 1 if row is None else int(row[0])
