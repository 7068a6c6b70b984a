"""Seals: once a day one root over where every account stands, each chained to the one before (ledger rules: proof).

A seal has a leaf for every account that has moved since the seal before: its last entry's seq and hash, its last
operation's number, and a hash over all its operations so far, arguments and results included. The root is a hash
over the leaves and the root before, so it covers the accounts that did not move as well. Whoever keeps a root
elsewhere can tell from it alone that nothing older was changed, even by somebody who rewrote all that follows.

A seal is of one snapshot. Its ``cutoff`` is an instant behind which nothing was still to be written then: what a seal
does not have was recorded after it, and the audit names rows that pretend otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

import msgspec
from psycopg import Connection

from models.audit_rows import OPERATION_COLUMNS, Stream
from models.cutoff import WAIT_SECONDS, alone, declare_reader, quiet_cutoff
from models.report import Report

PAGE = 2000
"""Accounts that one step of a seal reads."""

MOVED = f"""
SELECT a.account, a.seq, a.head, a.operations, coalesce(l.operations, 0), coalesce(l.operations_head, ''::bytea)
FROM accounts a LEFT JOIN LATERAL (
    SELECT l.seq, l.operations, l.operations_head FROM seal_leaves l
    WHERE l.account = a.account ORDER BY l.seal DESC LIMIT 1
) l ON true
WHERE a.account > %s AND (l.operations IS DISTINCT FROM a.operations OR l.seq IS DISTINCT FROM a.seq)
ORDER BY a.account LIMIT {PAGE}
"""
NEW_OPERATIONS = f"""
SELECT {OPERATION_COLUMNS}
FROM unnest(%(accounts)s::text[], %(numbers)s::bigint[], %(lasts)s::bigint[]) AS k(account, number, last)
JOIN operations o ON o.account = k.account AND o.number > k.number AND o.number <= k.last ORDER BY 1, 2
"""
LEAF_COLUMNS = "account, seq, head, operations, operations_head"
LEAVES_OF_SEAL = f'SELECT {LEAF_COLUMNS} FROM seal_leaves WHERE seal = %(seal)s ORDER BY account COLLATE "C"'
SEALS = "SELECT number, cutoff, accounts, operations, entries, previous, root, sealed_at FROM seals ORDER BY number"

_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True)
class Seal:
    """One seal: a row of ``seals``."""

    number: int
    cutoff: datetime
    """Everything recorded before it is in this seal or in one before."""
    accounts: int
    """How many accounts had moved since the seal before."""
    operations: int
    """Of the whole ledger."""
    entries: int
    previous: bytes
    root: bytes
    sealed_at: datetime


def read_seals(connection: Connection[Any]) -> list[Seal]:
    """All seals, the oldest first."""
    return [Seal(*row) for row in connection.execute(SEALS)]


def root_of(connection: Connection[Any], seal: Seal) -> tuple[bytes, int]:
    """Compute a seal's root from its leaves as they stand.

    :returns: the root, and how many leaves there are.
    """
    leaves = 0
    digest = sha256()
    with Stream(connection, LEAVES_OF_SEAL, {"seal": seal.number}) as stream:
        for row in stream.all():
            digest.update(_encode(row))
            leaves += 1
    about = (seal.number, seal.cutoff, seal.accounts, seal.operations, seal.entries, seal.previous, seal.sealed_at)
    return sha256(_encode((*about, digest.digest()))).digest(), leaves


def check_seals(
    connection: Connection[Any], report: Report, seals: Sequence[Seal], last: int | None, expected: Sequence[bytes]
) -> None:
    """Check the chain of seals, and compute the last ones' roots again from their leaves.

    That the leaves are what the rows say is for the audit of each account.

    :param last: how many are computed again; all unless given.
    :param expected: roots that were kept elsewhere: each must be that of a seal whose root was computed again.
    """
    proven = set()
    previous = b""
    for place, seal in enumerate(seals, 1):
        key = f"seal {seal.number}"
        if seal.number != place:
            report.add("", "seals", key, f"stands where seal {place} should")
        if seal.previous != previous:
            report.add("", "seals", key, "is not chained to the seal before it")
        previous = seal.root
        if last is not None and place <= len(seals) - last:
            continue
        root, leaves = root_of(connection, seal)
        report.seals += 1
        report.rows_read += leaves
        if root != seal.root or leaves != seal.accounts:
            report.add("", "seals", key, f"or its leaves were changed: its root is {seal.root.hex()}, not {root.hex()}")
        else:
            proven.add(root)
    for root in expected:
        if root not in proven:
            report.add("", "seals", f"root {root.hex()}", "was kept elsewhere, and no seal that was checked has it")


def make_seal(
    connection: Connection[Any],
    wait_seconds: float = WAIT_SECONDS,
    waiting: Callable[[list[int]], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Seal:
    """Seal the ledger as it stands.

    :param connection: in autocommit mode, of a role that may insert into ``seals``.
    :param waiting: told the backends whose transactions are waited for.
    :param progress: told how many accounts that moved are done.
    :raises models.cutoff.BusyError: when a transaction does not end within ``wait_seconds``, or another seal is made.
    """
    with alone(connection, "a seal"):
        return _make_seal(connection, quiet_cutoff(connection, wait_seconds, waiting), progress)


def _make_seal(connection: Connection[Any], cutoff: datetime, progress: Callable[[int], None] | None) -> Seal:
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SET LOCAL enable_hashjoin = off")  # what moved is looked up by key
        connection.execute("SET LOCAL enable_mergejoin = off")
        declare_reader(connection)
        seals = read_seals(connection)
        number, previous = (seals[-1].number + 1, seals[-1].root) if seals else (1, b"")
        accounts = _write_leaves(connection, number, progress)
        row = connection.execute(
            "SELECT coalesce(sum(operations), 0)::bigint, coalesce(sum(seq), 0)::bigint, ledger_now() FROM accounts"
        ).fetchone()
        assert row is not None
        operations, entries, now = row
        if seals and cutoff < seals[-1].cutoff:
            cutoff = seals[-1].cutoff  # the clock was set back
        unsigned = Seal(number, cutoff, accounts, operations, entries, previous, b"", now)
        root, _ = root_of(connection, unsigned)
        seal = Seal(number, cutoff, accounts, operations, entries, previous, root, now)
        connection.execute(
            "INSERT INTO seals (number, cutoff, accounts, operations, entries, previous, root, sealed_at)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
            (number, cutoff, accounts, operations, entries, previous, root, now),
        )
    return seal


def _write_leaves(connection: Connection[Any], number: int, progress: Callable[[int], None] | None) -> int:
    count = 0
    last = ""
    while page := connection.execute(MOVED, (last,)).fetchall():
        last = page[-1][0]
        keys = {
            "accounts": [row[0] for row in page],
            "numbers": [row[4] for row in page],
            "lasts": [row[3] for row in page],
        }
        with Stream(connection, NEW_OPERATIONS, keys) as stream:
            leaves = []
            for account, seq, head, operations, _, operations_head in page:
                digest = sha256(operations_head)
                for row in stream.of(account):
                    digest.update(_encode(row))
                leaves.append((account, number, seq, head, operations, digest.digest()))
        with (
            connection.cursor() as cursor,
            cursor.copy("COPY seal_leaves (account, seal, seq, head, operations, operations_head) FROM STDIN") as copy,
        ):
            for leaf in leaves:
                copy.write_row(leaf)
        count += len(page)
        if progress is not None:
            progress(count)
    return count
