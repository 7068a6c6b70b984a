"""The rows that an audit reads: streamed in the order of account, so that no account is ever held whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

from models.columns import ALLOWANCE_COLUMNS, PURCHASE_VALUES, REFERRAL_COLUMNS, SUBSCRIPTION_VALUES
from models.rules.state import COUNTERS

Row = tuple[Any, ...]

CHUNK = 10_000
"""Rows that one round trip brings."""

MAX_GROUP = 200_000
"""Entries that one operation may have written before they are looked at apart; no operation writes so many."""

BUCKETS = ", ".join(f"{counter}_micro" for counter in COUNTERS)

ACCOUNT_COLUMNS = (
    f"account, operations, seq, head, last_grant, debt_micro, {BUCKETS}, updated_at, next_due_at, kind, status, email,"
    " locale, timezone, opened_at, converted_to, achieved"
)


class Totals(NamedTuple):
    """A row of ``accounts``."""

    account: str
    operations: int
    seq: int
    head: bytes
    last_grant: int
    debt: int
    buckets: Sequence[int]
    updated_at: datetime
    next_due_at: datetime | None
    opening: Row
    """Kind, status, e-mail, locale, time zone, when it was opened, whom it became, and what it achieved."""

    @classmethod
    def of(cls, row: Row) -> Totals:
        """Make one of a row of :data:`ACCOUNT_COLUMNS`."""
        buckets = 6 + len(COUNTERS)
        first: Any = (*row[:6], row[6:buckets], row[buckets], row[buckets + 1], row[buckets + 2 :])
        return cls._make(first)


GRANT_COLUMNS = ", ".join(
    f"g.{column}"
    for column in (
        "account", "grant_id", "source", "priority", "features", "effective_at", "expires_at", "created_at",
        "operation", "purchase", "price_minor", "price_currency", "price_per_micro",
        *(f"{counter}_micro" for counter in COUNTERS), "clawed_back_micro", "forgiven_micro", "origin", "is_open",
    )
)  # fmt: skip
GRANT_ID, GRANT_EXPIRES_AT, GRANT_COUNTERS, GRANT_BASE = 1, 6, slice(13, 23), slice(27, None)
"""Where a row has them; the base is what the counters were at the checkpoint."""
HOLD_COLUMNS = "account, hold, status, amount_micro, captured_micro, feature, member, created_at, expires_at, closed_at"
ENTRY_COLUMNS = ", ".join(
    f"e.{column}"
    for column in (
        "account", "seq", "operation", "kind", "grant_id", "amount_micro", "balance_after_micro", "at", "refers_to",
        "recorded_at", "hash",
    )
)  # fmt: skip
OPERATION_COLUMNS = ", ".join(
    f"o.{column}"
    for column in (
        "account", "number", "operation", "name", "status", "code", "charged_micro", "feature", "quantity_micro",
        "member", "first_seq", "entries", "arguments::text", "result::text", "occurred_at", "applied_at", "catalog",
    )
)  # fmt: skip
BARE_OPERATION_COLUMNS = OPERATION_COLUMNS.replace("o.arguments::text, o.result::text", "NULL, NULL")
"""Without the two columns that only seals and the rules need, and that are as long as all the others."""

PAGE = "account = ANY(%(accounts)s::text[])"
ENTRIES = f"SELECT {ENTRY_COLUMNS} FROM entries e WHERE e.{PAGE} ORDER BY e.account, e.seq"
OPERATIONS = "SELECT {columns} FROM operations o WHERE o." + PAGE + " ORDER BY o.account, o.number"
GRANTS = f"SELECT {GRANT_COLUMNS} FROM grants g WHERE g.{PAGE} ORDER BY g.account, g.grant_id"
HOLDS = f"SELECT {HOLD_COLUMNS} FROM holds WHERE {PAGE} ORDER BY account, hold"
SUBSCRIPTIONS = f"SELECT {SUBSCRIPTION_VALUES} FROM subscriptions WHERE {PAGE} ORDER BY account"
PURCHASES = f"SELECT {PURCHASE_VALUES} FROM purchases p WHERE p.{PAGE} ORDER BY p.account, p.purchase"
ALLOWANCES = f"SELECT {', '.join(ALLOWANCE_COLUMNS)} FROM allowances WHERE {PAGE} ORDER BY account, key"
REFERRALS = f"SELECT {', '.join(REFERRAL_COLUMNS)} FROM referrals WHERE {PAGE} ORDER BY account"
RECEIPTS = f"""
SELECT account, operation, line, grant_id, taken_micro, returned_micro FROM receipts
WHERE {PAGE} ORDER BY account, operation, line
"""
LEAVES = f"SELECT account, seal, seq, head, operations, operations_head FROM seal_leaves WHERE {PAGE} ORDER BY 1, 2"

# From a checkpoint on: by key, row by row, so that what was there before is not touched.
SINCE = "unnest(%(accounts)s::text[], %(numbers)s::bigint[], %(seqs)s::bigint[]) AS k(account, number, seq)"
ENTRIES_SINCE = f"""
SELECT {ENTRY_COLUMNS} FROM {SINCE} JOIN entries e ON e.account = k.account AND e.seq > k.seq ORDER BY 1, 2
"""
OPERATIONS_SINCE = f"""
SELECT {BARE_OPERATION_COLUMNS} FROM {SINCE} JOIN operations o ON o.account = k.account AND o.number > k.number
ORDER BY 1, 2
"""
GRANTS_SINCE = f"""
SELECT {GRANT_COLUMNS}, {", ".join(f"coalesce(c.{counter}_micro, 0)" for counter in COUNTERS)}
FROM (
    SELECT e.account, e.grant_id FROM {SINCE} JOIN entries e ON e.account = k.account AND e.seq > k.seq
    UNION SELECT g.account, g.grant_id FROM {SINCE} JOIN grants g ON g.account = k.account AND g.is_open
) t
JOIN grants g ON g.account = t.account AND g.grant_id = t.grant_id
LEFT JOIN checkpoint_grants c ON c.account = t.account AND c.grant_id = t.grant_id
ORDER BY 1, 2
"""
OPEN_HOLDS = f"SELECT {HOLD_COLUMNS} FROM holds WHERE {PAGE} AND status = 'open' ORDER BY account, hold"
OPEN_HOLD_RECEIPTS = f"""
SELECT r.account, r.operation, r.line, r.grant_id, r.taken_micro, r.returned_micro
FROM holds h JOIN receipts r ON r.account = h.account AND r.operation = h.hold
WHERE h.{PAGE} AND h.status = 'open' ORDER BY 1, 2, 3
"""

_numbers = itertools.count(1)


class Stream:
    """The rows of one query in the order of account, a chunk at a time."""

    def __init__(self, connection: Connection[Any], query: str, parameters: dict[str, Any]) -> None:
        self._cursor = connection.cursor(name=f"audit_{next(_numbers)}", binary=True)
        self._cursor.execute(query, parameters)
        self._rows: list[Row] = []
        self._at = 0
        self.read = 0
        """How many rows it has given so far."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._cursor.close()

    def _more(self, kept: int) -> bool:
        """Fetch another chunk behind the rows from ``kept`` on; False when there is none."""
        chunk = self._cursor.fetchmany(CHUNK)
        self._rows = self._rows[kept:] + chunk
        self.read += len(chunk)
        return bool(chunk)

    def of(self, account: str) -> Iterator[Row]:
        """The next rows, as long as they are of this account."""
        while True:
            if self._at == len(self._rows):
                more = self._more(self._at)
                self._at = 0
                if not more:
                    return
            row = self._rows[self._at]
            if row[0] != account:
                return
            self._at += 1
            yield row

    def all(self) -> Iterator[Row]:
        """All rows, whosever they are."""
        while self._more(len(self._rows)):
            yield from self._rows

    def chunks_of(self, account: str) -> Iterator[list[Row]]:
        """The next rows of this account, in pieces as large as an operation's may be."""
        rows = self.of(account)
        while piece := list(itertools.islice(rows, MAX_GROUP)):
            yield piece

    def entries_of(self, operation: Row) -> list[Row]:
        """The entries up to an operation's last, or those that time wrote before an operation without any."""
        account, first, written, applied_at = operation[0], operation[10], operation[11], operation[15]
        last = first + written - 1 if written and first is not None else None
        start = at = self._at
        rows = self._rows
        while at - start < MAX_GROUP:
            if at == len(rows):
                kept = at - start
                more = self._more(start)
                rows, start, at = self._rows, 0, kept
                if not more:
                    break
            row = rows[at]
            if row[0] != account:
                break
            if last is not None:
                if row[1] > last:
                    break
            elif row[2] is not None or row[9] > applied_at:
                break
            at += 1
        self._at = at
        return rows[start:at]
