"""Who owns which lane: Postgres session advisory locks, shared evenly (lanes: ownership).

The locks are taken on the very connection that writes the lanes' batches. A process that dies or loses
its connection loses them with it and cannot write any more; no lease outlives its holder, no clock is
involved.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from psycopg import Connection

LANE_CLASS = 0x6C61_6E65
"""The class of the lanes' advisory locks; the object is the lane's number."""

PRESENCE_CLASS = 0x6C61_6E66
"""The class of the shared lock that every lane worker holds, so that the others can count it."""

HELD = """
SELECT classid::bigint, objid::bigint, pid, pid = pg_backend_pid()
FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid IN (%s, %s)
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@dataclass
class Balance:
    """What one look at the locks found and took."""

    workers: int
    taken: list[int] = field(default_factory=list)
    """Lanes that are owned by this worker from now on."""
    excess: list[int] = field(default_factory=list)
    """Lanes above the fair share: to be given up once what is buffered of them is applied."""


class Ownership:
    """The lanes of one worker process.

    :param connection: the connection that writes the batches, in autocommit mode.
    :param lanes: how many lanes the deployment has.
    """

    def __init__(self, connection: Connection[Any], lanes: int) -> None:
        self.connection = connection
        self.lanes = lanes
        self.mine: set[int] = set()
        connection.execute("SELECT pg_advisory_lock_shared(%s, 0)", (PRESENCE_CLASS,))

    def balance(self) -> Balance:
        """Take free lanes up to the fair share, and name those above it.

        :raises psycopg.Error: when the connection, and so every lane, is lost.
        """
        rows = self.connection.execute(HELD, (LANE_CLASS, PRESENCE_CLASS)).fetchall()
        taken_by_anyone = {lane for kind, lane, _, _ in rows if kind == LANE_CLASS}
        self.mine = {lane for kind, lane, _, own in rows if kind == LANE_CLASS and own}
        workers = len({pid for kind, _, pid, _ in rows if kind == PRESENCE_CLASS})
        share = -(-self.lanes // max(1, workers))
        result = Balance(workers)
        wanted = share - len(self.mine)
        if wanted > 0:
            free = [lane for lane in range(self.lanes) if lane not in taken_by_anyone]
            random.shuffle(free)  # two workers that start together do not race for the same lanes
            result.taken = self._take(free[:wanted])
        elif wanted < 0:
            result.excess = sorted(self.mine)[wanted:]
        return result

    def _take(self, lanes: list[int]) -> list[int]:
        rows = self.connection.execute(
            "SELECT lane FROM unnest(%s::int[]) AS lane WHERE pg_try_advisory_lock(%s, lane)",
            (lanes, LANE_CLASS),
        ).fetchall()
        got = sorted(lane for (lane,) in rows)
        self.mine.update(got)
        return got

    def give(self, lanes: list[int]) -> None:
        """Give lanes up; nothing of them may be buffered any more."""
        self.connection.execute(
            "SELECT pg_advisory_unlock(%s, lane) FROM unnest(%s::int[]) AS lane", (LANE_CLASS, lanes)
        )
        self.mine.difference_update(lanes)


def check_session(connection: Connection[Any]) -> None:
    """Make sure that session locks work here: a transaction-pooling proxy in between would break them.

    :raises RuntimeError: when two statements in a row do not reach the same backend.
    """
    pids = {connection.execute("SELECT pg_backend_pid()").fetchone() for _ in range(3)}
    if len(pids) != 1:
        raise RuntimeError(
            "the database URL leads through a pooler that shares sessions; lanes need a direct connection "
            "or session pooling"
        )
