"""How fast an account spends: what forecasts and advice are drawn from."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from psycopg import Connection

PACE_DAYS = 30
"""How far back is looked."""

MAX_ENTRIES = 10_000
"""The most entries that are looked at, the last ones first: of an account with more, the pace is that of fewer days."""

SPENT = f"""
SELECT sum(amount_micro) FILTER (WHERE kind IN ('consumed', 'captured'))::bigint,
       sum(amount_micro) FILTER (WHERE kind = 'restored')::bigint, min(at), count(*)
FROM (SELECT kind, amount_micro, at FROM entries WHERE account = %s ORDER BY seq DESC LIMIT {MAX_ENTRIES}) last
WHERE at >= %s
"""


def pace_micro(connection: Connection[Any], account: str, now: datetime, since: datetime | None = None) -> int:
    """What an account spends, refunds taken off, over its last :data:`PACE_DAYS`.

    :param since: when it was opened: of a younger account the days since then count.
    :returns: micro-credits a day, 0 or more.
    """
    start = now - timedelta(days=PACE_DAYS)
    row = connection.execute(SPENT, (account, start)).fetchone()
    assert row is not None
    spent, restored, first, count = row
    if count == MAX_ENTRIES:
        start = first
    elif since is not None:
        start = max(start, since)
    seconds = max(timedelta(days=1), now - start) // timedelta(seconds=1)
    return max(0, (spent or 0) - (restored or 0)) * 86_400 // seconds
