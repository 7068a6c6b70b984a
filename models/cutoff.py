"""An instant behind which nothing is written any more.

A batch takes its time from the ledger's clock and commits a little later. So a look at the database may miss rows
whose time has passed already; this waits until whoever could still commit such rows has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from zlib import crc32

import psycopg
from psycopg import Connection

READERS_CLASS = 0x6C61_6E67
"""The class of the shared advisory lock by which a long transaction says that it writes no operation."""

CLOCK_MARGIN = timedelta(seconds=60)
"""How far the database's clock may be set back without a row slipping behind a cutoff."""

WAIT_SECONDS = 120.0
"""How long running transactions are waited for; a batch's own locks wait no longer than 60 s."""

POLL_SECONDS = 0.1

WRITERS = """
SELECT l.virtualtransaction, l.pid FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND a.datname = current_database()
  AND l.pid <> pg_backend_pid() AND has_table_privilege(a.usesysid, 'operations', 'INSERT')
  AND NOT EXISTS (
    SELECT FROM pg_locks r WHERE r.pid = l.pid AND r.locktype = 'advisory' AND r.classid = %s AND r.objid = 0
  )
"""
"""Transactions that run in this database under a role that may write, as any role may see them."""


class BusyError(RuntimeError):
    """Transactions did not end in time; the text names their backends."""


def declare_reader(connection: Connection[Any]) -> None:
    """Say, for the present transaction, that it writes no operation: nobody needs to wait for it."""
    connection.execute("SELECT pg_advisory_xact_lock_shared(%s, 0)", (READERS_CLASS,))


@contextmanager
def alone(connection: Connection[Any], what: str) -> Iterator[None]:
    """Do something that only one session of a database may do at a time.

    Not waited for: whoever waits for a lock looks like somebody who may still write.

    :raises BusyError: when another does it.
    """
    if not try_alone(connection, what):
        raise BusyError(f"{what} is being made by another session; wait until it is done")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", _key_of(what))


def try_alone(connection: Connection[Any], what: str) -> bool:
    """Begin something that only one session of a database may do at a time, until this session ends.

    :returns: whether nobody else does it.
    """
    row = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", _key_of(what)).fetchone()
    return row is not None and bool(row[0])


def somebody_does(connection: Connection[Any], what: str) -> bool:
    """Whether a session does something that only one may do at a time."""
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2"
        " AND classid = %s AND objid = %s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
        _key_of(what),
    ).fetchone()
    return row is not None and bool(row[0])


def _key_of(what: str) -> tuple[int, int]:
    return READERS_CLASS, crc32(what.encode()) & 0x7FFF_FFFF


def quiet_cutoff(
    connection: Connection[Any],
    wait_seconds: float = WAIT_SECONDS,
    waiting: Callable[[list[int]], None] | None = None,
) -> datetime:
    """Find an instant such that every row that was or will be recorded before it can be seen from now on.

    :param connection: in autocommit mode, outside a transaction.
    :param waiting: told the backends that are waited for, each time there are others.
    :returns: the ledger's time less :data:`CLOCK_MARGIN`.
    :raises BusyError: when a transaction that ran before does not end within ``wait_seconds``.
    """
    if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        raise ValueError("a cutoff is looked for outside a transaction, whose snapshot would be older than it")
    row = connection.execute("SELECT ledger_now()").fetchone()
    assert row is not None
    now: datetime = row[0]
    before = _writers(connection)
    deadline = time.monotonic() + wait_seconds
    told: list[int] = []
    while left := before & _writers(connection):
        pids = sorted(pid for _, pid in left)
        if time.monotonic() > deadline:
            raise BusyError(
                f"transactions of these backends have run for more than {wait_seconds:.0f} s and may still write: "
                f"{', '.join(map(str, pids))}; end them, or wait until they have ended"
            )
        if waiting is not None and pids != told:
            waiting(pids)
            told = pids
        time.sleep(POLL_SECONDS)
    return now - CLOCK_MARGIN


def _writers(connection: Connection[Any]) -> set[tuple[str, int]]:
    return {(transaction, pid) for transaction, pid in connection.execute(WRITERS, (READERS_CLASS,))}
