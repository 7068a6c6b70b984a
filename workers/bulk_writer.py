"""Writing many new accounts at once, in the place of the lane workers: the same rules and rows, fewer reads.

Of an account that is not there yet nothing else is either: no lots, no holds, no operations. So they are not looked
for. Accounts that are there go through the ledger writer as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import Connection

from models.rules.state import UNOPENED, Account
from workers.ledger_writer import Job, LedgerWriter, Loaded
from workers.ownership import LANE_CLASS
from workers.rows import texts

TAKE = """
SELECT lane FROM unnest(%s::int[]) AS lane WHERE NOT pg_try_advisory_lock(%s, lane)
"""
THERE = "SELECT account, status FROM accounts WHERE account = ANY(%s::text[])"
NEW = "SELECT count(*) FROM accounts WHERE account = ANY(%s::text[])"


class LanesTakenError(RuntimeError):
    """Lanes have another owner, a running worker most likely."""


def own_lanes(connection: Connection[Any], lanes: Sequence[int]) -> None:
    """Own lanes for as long as a connection lives: no worker serves them meanwhile, their messages wait.

    :raises LanesTakenError: when others own some of them; then none are owned.
    """
    taken = connection.execute(TAKE, (list(lanes), LANE_CLASS)).fetchall()
    if taken:
        connection.execute("SELECT pg_advisory_unlock_all()")
        raise LanesTakenError(f"{len(taken)} lanes have another owner")


def known_accounts(connection: Connection[Any], accounts: Sequence[str]) -> dict[str, bool]:
    """Those of the accounts that the ledger has a row of, and whether they were ever opened."""
    rows = connection.execute(THERE, (texts(accounts),))
    return {account: status != UNOPENED for account, status in rows}


class NewAccounts(Loaded):
    """The accounts of a batch that are not in the ledger yet."""

    def __init__(self, connection: Connection[Any], jobs: Sequence[Job]) -> None:
        names = sorted({job.account for job in jobs})
        with connection.pipeline():
            connection.execute("BEGIN")
            there = connection.execute(NEW, (texts(names),))
            clock = connection.execute("SELECT ledger_now()")
            found, now = there.fetchone(), clock.fetchone()
        assert found is not None
        assert now is not None
        if found[0]:
            raise ValueError(f"{found[0]} of the accounts are in the ledger already")
        self.now = now[0]
        self._accounts, self._grants = {}, {}
        self.codes, self._sharing = {}, frozenset()
        self.accounts = {name: self.make(name) for name in names}

    def make(self, name: str) -> Account:
        """An account that nothing is known of."""
        account = Account(name)
        account.is_new = True
        return account


class BulkWriter(LedgerWriter):
    """Writes batches of operations on accounts that are not in the ledger yet.

    :param connection: owns the lanes of all of them, see :func:`own_lanes`.
    """

    @property
    def loads(self) -> type[Loaded]:
        """What makes the accounts of a batch."""
        return NewAccounts
