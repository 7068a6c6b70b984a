"""The audit: does what is written prove itself? (ledger rules: proof)

For each account: entries without gaps, each chained to the one before by its hash; operations without gaps, each
with its own entries and its charge; every balance, bucket, hold and receipt equal to what its entries add up to; the
closing identity; and everything as the seals have it. Over all accounts: nothing that belongs to nobody, nothing
received that was not sent, the seals chained. Where it is asked for, every operation is fed to the rules again.

An incremental audit looks only at what was written since the last one that held. It trusts that one's checkpoints,
and that nothing older was changed; a whole audit trusts neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import Connection

from creditlane.amounts import format_amount
from models.audit_codes import check_codes
from models.audit_page import Page, PageAudit, Replayer, begin_reading
from models.audit_processes import Helpers
from models.audit_referrals import check_referrals
from models.audit_rows import ACCOUNT_COLUMNS, BUCKETS, SINCE, Stream, Totals
from models.cutoff import BusyError, alone, declare_reader, quiet_cutoff
from models.report import Fault, Report
from models.rules.state import COUNTERS
from models.seal import check_seals, read_seals

__all__ = ["Fault", "Report", "audit", "audit_new"]

PAGE = 2000
"""Accounts that one step of the audit reads."""

MAX_ROWS = 100_000
"""Operations and entries that one step of the audit reads, unless a single account has more: that is streamed."""

WORTH_HELP = 200_000
"""Operations from which on other processes are worth their start."""

ACCOUNTS = f"""
SELECT {ACCOUNT_COLUMNS} FROM accounts
WHERE account > %s AND (%s::text[] IS NULL OR account = ANY(%s)) ORDER BY account LIMIT {PAGE}
"""
COUNT = """
SELECT coalesce(sum(operations), 0)::bigint FROM accounts WHERE %s::text[] IS NULL OR account = ANY(%s)
"""
ORPHANS = " UNION ALL ".join(
    f"""SELECT '{table}', t.account, min(t.{key})::text FROM {table} t
    WHERE NOT EXISTS (SELECT FROM accounts a WHERE a.account = t.account) GROUP BY t.account"""
    for table, key in (
        ("entries", "seq"), ("operations", "number"), ("grants", "grant_id"), ("holds", "hold"),
        ("receipts", "operation"), ("purchases", "purchase"), ("seal_leaves", "seal"),
    )
)  # fmt: skip
IN_TRANSIT = """
SELECT coalesce(sum(received_micro), 0)::bigint, coalesce(sum(sent_micro), 0)::bigint,
       coalesce(sum(in_transit_micro), 0)::bigint FROM accounts
"""

LAST_AUDIT = "SELECT cutoff FROM audits ORDER BY number DESC LIMIT 1"
MOVED = f"""
SELECT {", ".join(f"a.{column.strip()}" for column in ACCOUNT_COLUMNS.split(","))},
       coalesce(c.operations, 0), coalesce(c.seq, 0), coalesce(c.head, ''::bytea), coalesce(c.debt_micro, 0),
       {", ".join(f"coalesce(c.{counter}_micro, 0)" for counter in COUNTERS)}, e.hash
FROM ({{moved}}) m JOIN accounts a ON a.account = m.account
LEFT JOIN checkpoints c ON c.account = a.account
LEFT JOIN entries e ON e.account = c.account AND e.seq = c.seq
ORDER BY a.account
"""
SINCE_THEN = """
SELECT account FROM operations WHERE applied_at >= %(since)s
UNION SELECT account FROM entries WHERE recorded_at >= %(since)s
"""
UNKNOWN = "SELECT account FROM ({moved}) m WHERE NOT EXISTS (SELECT FROM accounts a WHERE a.account = m.account)"
KEEP_GRANTS = f"""
INSERT INTO checkpoint_grants (account, grant_id, {BUCKETS})
SELECT g.account, g.grant_id, {", ".join(f"g.{counter}_micro" for counter in COUNTERS)}
FROM (SELECT DISTINCT e.account, e.grant_id FROM {SINCE}
      JOIN entries e ON e.account = k.account AND e.seq > k.seq) t
JOIN grants g ON g.account = t.account AND g.grant_id = t.grant_id
ON CONFLICT (account, grant_id) DO UPDATE
SET {", ".join(f"{counter}_micro = excluded.{counter}_micro" for counter in COUNTERS)}
"""
KEEP_ACCOUNTS = f"""
INSERT INTO checkpoints (account, operations, seq, head, debt_micro, {BUCKETS})
SELECT account, operations, seq, head, debt_micro, {BUCKETS} FROM accounts WHERE account = ANY(%(accounts)s::text[])
ON CONFLICT (account) DO UPDATE
SET operations = excluded.operations, seq = excluded.seq, head = excluded.head, debt_micro = excluded.debt_micro,
    {", ".join(f"{counter}_micro = excluded.{counter}_micro" for counter in COUNTERS)}
"""

Progress = Callable[[int, int], None]
"""Told how many operations are done and how many there are."""


@dataclass
class _Counted:
    """Tells progress in operations."""

    progress: Progress | None
    total: int
    done: int = 0

    def tick(self, operations: int) -> None:
        self.done += operations
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))


def audit(
    connection: Connection[Any],
    accounts: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    processes: int = 1,
    replayer: Replayer | None = None,
    seals: int | None = None,
    expected: Sequence[bytes] = (),
) -> Report:
    """Audit all accounts, or those named, as they stand in one snapshot of the database.

    :param connection: not within a transaction; needs no more than the right to read.
    :param progress: told how many operations are done and how many there are.
    :param processes: how many share the work, each with a connection of its own, where there is enough of it.
    :param replayer: makes what feeds the operations to the rules again; without it they are not.
    :param seals: how many of the last seals have their roots computed again; all unless given.
    :param expected: roots of seals that were kept elsewhere.
    :returns: what was looked at, and each row that differs.
    """
    report = Report()
    wanted = None if accounts is None else list(accounts)
    with connection.transaction():
        begin_reading(connection)
        sealed = read_seals(connection)
        row = connection.execute(COUNT, (wanted, wanted)).fetchone()
        counted = _Counted(progress, int(row[0]) if row else 0)
        work = PageAudit([seal.cutoff for seal in sealed], replayer)
        if processes > 1 and counted.total >= WORTH_HELP:
            with Helpers(connection, work, processes) as helpers:
                for page in _pages(connection, wanted):
                    helpers.give(page, counted.tick)
                if wanted is None:
                    _check_whole(connection, report)
                report.take(helpers.finish(counted.tick))
        else:
            for page in _pages(connection, wanted):
                report.take(work.run(connection, page, counted.tick))
            if wanted is None:
                _check_whole(connection, report)
        if wanted is None or expected:
            check_seals(connection, report, sealed, seals, expected)
    return report


def audit_new(
    connection: Connection[Any],
    progress: Progress | None = None,
    *,
    wait_seconds: float = 10.0,
) -> Report:
    """Audit what was written since the last such audit that held, and note how far it came, if this one holds too.

    What is read grows with what was written, not with the ledger. It trusts the checkpoints that the last one left,
    and what stands before them.

    :param connection: not within a transaction; of a role that may write ``checkpoints`` and ``audits``.
    :param wait_seconds: how long transactions that may still write are waited for; when one does not end, what comes
        next is looked for from the same instant again.
    :raises models.cutoff.BusyError: when another such audit runs.
    """
    with alone(connection, "an incremental audit"):
        try:
            cutoff = quiet_cutoff(connection, wait_seconds)
        except BusyError:
            cutoff = None
        report = Report()
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for method in ("hashjoin", "mergejoin", "seqscan"):
                connection.execute(f"SET LOCAL enable_{method} = off")  # everything is looked up by key
            declare_reader(connection)
            _audit_new(connection, report, cutoff, progress)
            if not report.holds:
                raise psycopg.Rollback
    return report


def _audit_new(connection: Connection[Any], report: Report, cutoff: datetime | None, progress: Progress | None) -> None:
    row = connection.execute(LAST_AUDIT).fetchone()
    since = None if row is None else row[0]
    moved = "SELECT account FROM accounts" if since is None else SINCE_THEN
    if since is not None:
        for (account,) in connection.execute(UNKNOWN.format(moved=moved), {"since": since}):
            report.add(account, "accounts", "row", "is not there, though operations or entries of it are")
    work = PageAudit([], None)
    counted = _Counted(progress, 0)
    with Stream(connection, MOVED.format(moved=moved), {"since": since}) as stream:
        for page in _cut(_checkpoints(stream, report)):
            counted.total += sum(
                totals.operations - start[0] for totals, start in zip(page.accounts, page.starts, strict=True)
            )
            report.take(work.run(connection, page, counted.tick))
            keys = page.parameters()
            connection.execute(KEEP_GRANTS, keys)
            connection.execute(KEEP_ACCOUNTS, keys)
        report.rows_read += stream.read
    connection.execute(
        "INSERT INTO audits (cutoff, audited_at, accounts, operations, entries) VALUES (%s, ledger_now(), %s, %s, %s)",
        (cutoff or since, report.accounts, report.operations, report.entries),
    )


def _checkpoints(stream: Stream, report: Report) -> Iterator[tuple[Totals, tuple[Any, ...]]]:
    """Each account that moved, and where its checkpoint stands; the entry there must still be the one it was."""
    width = len(ACCOUNT_COLUMNS.split(","))
    for row in stream.all():
        totals = Totals.of(row[:width])
        *start, digest = row[width:]
        operations, seq, head, debt, *buckets = start
        if seq and digest != head:
            report.add(totals.account, "entries", f"seq {seq}", "is not as the last audit found it")
        if (totals.operations, totals.seq) != (operations, seq):
            yield totals, (operations, seq, head, debt, buckets)


def _cut(accounts: Iterator[tuple[Totals, tuple[Any, ...]]]) -> Iterator[Page]:
    page = Page()
    for totals, start in accounts:
        rows = totals.operations + totals.seq - start[0] - start[1]
        if page.accounts and (page.rows + rows > MAX_ROWS or len(page.accounts) >= PAGE):
            yield page
            page = Page()
        page.accounts.append(totals)
        page.starts.append(start)
        page.rows += rows
    if page.accounts:
        yield page


def _pages(connection: Connection[Any], wanted: list[str] | None) -> Iterator[Page]:
    """All accounts, in pages of as many as have few enough rows together; at least one."""
    last = ""
    while rows := connection.execute(ACCOUNTS, (last, wanted, wanted)).fetchall():
        last = rows[-1][0]
        page = Page()
        for row in rows:
            totals = Totals.of(row)
            more = totals.operations + totals.seq
            if page.accounts and page.rows + more > MAX_ROWS:
                yield page
                page = Page()
            page.accounts.append(totals)
            page.rows += more
        yield page


def _check_whole(connection: Connection[Any], report: Report) -> None:
    """What only shows over all accounts: rows of nobody, credits received that nobody sent, codes and referrals."""
    for table, account, key in connection.execute(ORPHANS):
        report.add(account, table, key, "belongs to an account that has no row")
    row = connection.execute(IN_TRANSIT).fetchone()
    assert row is not None
    received, sent, in_transit = row
    # A transfer is received before the sender's lane says that it was sent; what is under way may be received already.
    if not sent <= received <= sent + in_transit:
        report.add(
            "",
            "accounts",
            "received and sent",
            f"{format_amount(received)} were received, {format_amount(sent)} sent and {format_amount(in_transit)} are"
            " in transit",
        )
    check_codes(connection, report)
    check_referrals(connection, report)
