"""One step of the audit: the accounts of a page, row by row, in this process or in a helper's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from psycopg import Connection, sql

from models.audit_account import BEGINNING, AccountAudit, Leaf, Start
from models.audit_rows import (
    ALLOWANCES,
    BARE_OPERATION_COLUMNS,
    ENTRIES,
    ENTRIES_SINCE,
    GRANTS,
    GRANTS_SINCE,
    HOLDS,
    LEAVES,
    OPEN_HOLD_RECEIPTS,
    OPEN_HOLDS,
    OPERATION_COLUMNS,
    OPERATIONS,
    OPERATIONS_SINCE,
    PURCHASES,
    RECEIPTS,
    REFERRALS,
    SUBSCRIPTIONS,
    Row,
    Stream,
    Totals,
)
from models.cutoff import declare_reader
from models.report import Report

TICK = 20_000
"""Operations after which progress is told."""

OTHERS = ("purchases", "allowances", "referrals")
"""Tables of which only a replay can say what their rows should be."""

NAMED_EARLIER = "SELECT name, arguments::text FROM operations WHERE account = %(account)s AND name = ANY(%(names)s)"
"""What the operations of an account say that name an earlier one."""


class Replay(Protocol):
    """The replay of one account."""

    def feed(self, operation: Row | None, entries: Sequence[Row]) -> None:
        """As :meth:`models.audit_account.AccountAudit.feed`."""

    def finish(
        self,
        totals: Totals,
        grants: Sequence[Row],
        holds: Sequence[Row],
        receipts: Sequence[Row],
        others: Mapping[str, Sequence[Row]],
    ) -> None:
        """Compare what came out with the rows of the account.

        :param others: those of ``subscriptions`` and of :data:`OTHERS`, by table.
        """


class Replayer(Protocol):
    """Makes the replay of an account; it is sent to other processes."""

    @property
    def naming(self) -> Sequence[str]:
        """The operations that name an earlier one."""

    def begin(self, report: Report, totals: Totals, named: Iterable[Row] | None) -> Replay:
        """Begin with an account.

        :param named: name and arguments of its operations that name an earlier one, for an account with so many
            operations that not all can be kept; none when they can.
        """


def begin_reading(connection: Connection[Any], snapshot: str | None = None) -> None:
    """Make the transaction that has just begun one that sees one state of the database, and changes nothing.

    :param snapshot: that of another session, to see the same state.
    """
    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    if snapshot is not None:
        connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot))
    connection.execute("SET LOCAL cursor_tuple_fraction = 1")  # all rows are wanted, not the first soon
    connection.execute("SET LOCAL work_mem = '64MB'")  # the rows of a page are put in order in memory
    connection.execute("SET LOCAL jit = off")
    declare_reader(connection)


@dataclass
class Page:
    """Accounts whose rows are read together."""

    accounts: list[Totals] = field(default_factory=list)
    starts: list[tuple[Any, ...]] = field(default_factory=list)
    """For an incremental audit: operations, seq, head, debt and buckets at the checkpoint of each."""
    rows: int = 0

    def parameters(self) -> dict[str, Any]:
        """What the queries are asked with."""
        return {
            "accounts": [totals.account for totals in self.accounts],
            "numbers": [start[0] for start in self.starts],
            "seqs": [start[1] for start in self.starts],
        }


@dataclass
class PageAudit:
    """What is done with each page.

    :param cutoffs: the instant of each seal, by its number from 1.
    """

    cutoffs: Sequence[datetime]
    replayer: Replayer | None

    def run(self, connection: Connection[Any], page: Page, tick: Callable[[int], None]) -> Report:
        """Audit the accounts of a page.

        :param connection: in a transaction that sees one snapshot.
        :param tick: told every so many operations.
        """
        report = Report()
        whole = not page.starts
        columns = OPERATION_COLUMNS if self.cutoffs or self.replayer else BARE_OPERATION_COLUMNS
        queries = {
            "operations": OPERATIONS.format(columns=columns) if whole else OPERATIONS_SINCE,
            "entries": ENTRIES if whole else ENTRIES_SINCE,
            "grants": GRANTS if whole else GRANTS_SINCE,
            "holds": HOLDS if whole else OPEN_HOLDS,
            "receipts": RECEIPTS if whole else OPEN_HOLD_RECEIPTS,
            "subscriptions": SUBSCRIPTIONS,
        }
        if self.cutoffs:
            queries["leaves"] = LEAVES
        if self.replayer is not None:
            queries.update(purchases=PURCHASES, allowances=ALLOWANCES, referrals=REFERRALS)
        told = 0
        with ExitStack() as stack:
            streams = {
                name: stack.enter_context(Stream(connection, query, page.parameters()))
                for name, query in queries.items()
            }
            for place, totals in enumerate(page.accounts):
                start = None if whole else Start(*page.starts[place])
                for _ in self._account(connection, streams, report, totals, start):
                    tick(report.operations - told)
                    told = report.operations
            report.rows_read += sum(stream.read for stream in streams.values())
        report.accounts += len(page.accounts)
        tick(report.operations - told)
        return report

    def _account(
        self,
        connection: Connection[Any],
        streams: dict[str, Stream],
        report: Report,
        totals: Totals,
        start: Start | None,
    ) -> Iterable[None]:
        """Audit one account; pauses now and then so that progress can be told."""
        account = totals.account
        only_new, start = start is not None, start or BEGINNING
        receipts = list(streams["receipts"].of(account))
        subscriptions = list(streams["subscriptions"].of(account))
        leaves = [Leaf(*row[1:]) for row in streams["leaves"].of(account)] if self.cutoffs else ()
        check = AccountAudit(report, account, start, receipts, leaves, self.cutoffs, only_new)
        feeds = [check.feed]
        replay = None
        if self.replayer is not None:
            replay = self._replay(self.replayer, connection, report, totals)
            feeds.append(replay.feed)
        entries_of = streams["entries"].entries_of
        for operation in streams["operations"].of(account):
            entries = entries_of(operation)
            for feed in feeds:
                feed(operation, entries)
            report.operations += 1
            report.entries += len(entries)
            if not report.operations % TICK:
                yield
        for entries in streams["entries"].chunks_of(account):
            for feed in feeds:
                feed(None, entries)
            report.entries += len(entries)
        if replay is None:
            check.finish(totals, streams["grants"].of(account), streams["holds"].of(account), subscriptions)
            return
        grants, holds = list(streams["grants"].of(account)), list(streams["holds"].of(account))
        check.finish(totals, grants, holds, subscriptions)
        others = {name: list(streams[name].of(account)) for name in OTHERS}
        replay.finish(totals, grants, holds, receipts, {"subscriptions": subscriptions, **others})

    @staticmethod
    def _replay(replayer: Replayer, connection: Connection[Any], report: Report, totals: Totals) -> Replay:
        if totals.operations <= KEPT_OPERATIONS:
            return replayer.begin(report, totals, None)
        keys = {"account": totals.account, "names": list(replayer.naming)}
        with Stream(connection, NAMED_EARLIER, keys) as named:
            replay = replayer.begin(report, totals, named.all())
            report.rows_read += named.read
        return replay


KEPT_OPERATIONS = 50_000
"""An account with so many operations at the most is replayed with all of them at hand; of others, with those that
a later one names."""
