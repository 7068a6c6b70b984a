"""Usage by account, day, feature and member: added up of operations as they come, each counted once.

Operations are read by the time at which they were applied. They commit in another order than they were timed, so they
are counted only up to an instant behind which nothing is written any more (:func:`models.cutoff.quiet_cutoff`). How far
that is moves in the transaction that writes the sums: whoever is killed in between leaves both or neither.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from psycopg import Connection

from models.cutoff import alone, declare_reader, quiet_cutoff

ROLL_UP = "the usage roll-up"
"""What only one session does at a time."""

WAIT_SECONDS = 30.0
"""How long running transactions are waited for; the next roll-up counts what this one leaves."""

FIRST_STEP, SHORTEST_STEP, LONGEST_STEP = timedelta(seconds=10), timedelta(milliseconds=100), timedelta(days=31)
"""The span of time that one transaction counts, at first and at its limits; halved and doubled so that
a transaction has about so many rows:"""

FEW, MANY = 20_000, 100_000

WATERMARK = "SELECT counted_until FROM usage_watermark WHERE id = 1 FOR UPDATE"
FIRST = "SELECT min(applied_at) FROM operations"
BEGIN = "INSERT INTO usage_watermark (id, counted_until) VALUES (1, %s)"
ADVANCE = "UPDATE usage_watermark SET counted_until = %s WHERE id = 1"
COUNTED = """
SELECT o.account, (coalesce(o.occurred_at, o.applied_at) AT TIME ZONE 'UTC')::date AS day,
       coalesce(o.feature, c.feature, '') AS feature, coalesce(o.member, c.member, h.member, '') AS member,
       (o.name <> 'credits.refund')::int AS operations,
       CASE WHEN o.name = 'credits.refund' THEN 0 ELSE coalesce(o.quantity_micro, 0) END AS quantity_micro,
       CASE WHEN o.name = 'credits.refund' THEN 0 ELSE o.charged_micro END AS charged_micro,
       CASE WHEN o.name = 'credits.refund' THEN -o.charged_micro ELSE 0 END AS refunded_micro
FROM operations o
-- The charge that a refund gives back of, the hold that a capture takes out of; the hold of a charge given back of.
LEFT JOIN operations c ON c.account = o.account AND c.operation =
    CASE o.name WHEN 'credits.refund' THEN o.arguments ->> 'operation'
                WHEN 'credits.capture' THEN o.arguments ->> 'hold' END
LEFT JOIN operations h ON h.account = c.account AND h.operation =
    CASE c.name WHEN 'credits.capture' THEN c.arguments ->> 'hold' END
WHERE {which} AND o.status = 'applied' AND o.name IN ('credits.consume', 'credits.capture', 'credits.refund')
"""
"""What operations are counted as, with the columns of ``usage_days``, each by itself; ``which`` is a condition on
``o``."""

COUNT = f"""
WITH counted AS (
    {COUNTED.format(which="o.applied_at >= %(start)s AND o.applied_at < %(end)s")}
), written AS (
    INSERT INTO usage_days AS d
        (account, day, feature, member, operations, quantity_micro, charged_micro, refunded_micro)
    SELECT account, day, feature, member, sum(operations), sum(quantity_micro), sum(charged_micro), sum(refunded_micro)
    FROM counted GROUP BY account, day, feature, member ORDER BY account, day, feature, member
    ON CONFLICT (account, day, feature, member) DO UPDATE SET
        operations = d.operations + excluded.operations,
        quantity_micro = d.quantity_micro + excluded.quantity_micro,
        charged_micro = d.charged_micro + excluded.charged_micro,
        refunded_micro = d.refunded_micro + excluded.refunded_micro
)
SELECT count(*) FROM counted
"""
BY_INDEX = "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off"
"""A span of time is found by the index over blocks, what a refund gives back by its key."""

CLEAR = "DELETE FROM usage_days; DELETE FROM usage_watermark"

Progress = Callable[[int, datetime, datetime], bool]
"""Told how many operations are counted, until when, and until when they will be; says whether to go on."""


def roll_up(connection: Connection[Any], progress: Progress, *, anew: bool = False) -> int:
    """Count what was applied since the last time.

    :param connection: in autocommit mode.
    :param anew: forget what was counted, and begin with the first operation.
    :returns: how many operations were counted.
    :raises models.cutoff.BusyError: when another one counts, or a transaction does not end in time; nothing is wrong.
    """
    with alone(connection, ROLL_UP):
        cutoff = quiet_cutoff(connection, WAIT_SECONDS)
        if anew:
            with connection.transaction():
                connection.execute(CLEAR)
        counted, step = 0, FIRST_STEP
        while True:
            found = _count(connection, cutoff, step)
            if found is None:
                return counted
            rows, until = found
            counted += rows
            if not progress(counted, until, cutoff):
                return counted
            if rows > MANY:
                step = max(SHORTEST_STEP, step / 2)
            elif rows < FEW:
                step = min(LONGEST_STEP, step * 2)


def _count(connection: Connection[Any], cutoff: datetime, step: timedelta) -> tuple[int, datetime] | None:
    """Count what was applied in the next span of time, in one transaction.

    :returns: how many operations there were and until when it is counted now, or None when all are.
    """
    with connection.transaction():
        declare_reader(connection)
        connection.execute(BY_INDEX)
        row = connection.execute(WATERMARK).fetchone()
        if row is None:
            first = connection.execute(FIRST).fetchone()
            if first is None or first[0] is None:
                return None
            row = first
            connection.execute(BEGIN, row)
        start: datetime = row[0]
        if start >= cutoff:
            return None
        end = min(cutoff, start + step)
        counted = connection.execute(COUNT, {"start": start, "end": end}).fetchone()
        assert counted is not None
        connection.execute(ADVANCE, (end,))
    return int(counted[0]), end
