"""The audit: does what is written prove itself? (ledger rules: proof)

For each account: entries without gaps, each chained to the one before by its hash; operations without gaps;
every balance, bucket, hold and receipt equal to what its entries add up to; and the closing identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg import Connection

from creditlane.amounts import format_amount
from models.rules.posting import FLOWS, chain_hash
from models.rules.state import COUNTERS, Entry

PAGE = 500
"""Accounts that one step of the audit reads."""

MAX_ROWS = 200_000
"""Operations and entries that one step of the audit reads, unless a single account has more."""

MAX_FAULTS = 1000
"""Faults that a report names; further ones are only counted."""


@dataclass(frozen=True)
class Fault:
    """One row that is not as it should be."""

    account: str
    table: str
    key: str
    """Which row, such as ``seq 7``."""
    what: str
    """What is wrong with it, in a sentence."""


@dataclass
class Report:
    """What an audit looked at and found."""

    accounts: int = 0
    operations: int = 0
    entries: int = 0
    fault_count: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether everything is as it should be."""
        return not self.fault_count

    def add(self, account: str, table: str, key: str, what: str) -> None:
        """Note a fault."""
        self.fault_count += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(account, table, key, what))


BUCKETS = ", ".join(f"{counter}_micro" for counter in COUNTERS)
ACCOUNTS = f"""
SELECT account, operations, seq, head, last_grant, debt_micro, {BUCKETS} FROM accounts
WHERE account > %s AND (%s::text[] IS NULL OR account = ANY(%s)) ORDER BY account LIMIT {PAGE}
"""
ENTRIES = """
SELECT account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to, recorded_at, hash
FROM entries WHERE account = ANY(%s) ORDER BY account, seq
"""
OPERATIONS = """
SELECT account, number, operation, name, status, charged_micro, first_seq, entries, applied_at FROM operations
WHERE account = ANY(%s) ORDER BY account, number
"""
GRANTS = f"SELECT account, grant_id, {BUCKETS} FROM grants WHERE account = ANY(%s) ORDER BY account, grant_id"
HOLDS = """
SELECT h.account, h.hold, h.status, h.amount_micro, h.captured_micro, coalesce(sum(r.taken_micro - r.returned_micro), 0)
FROM holds h LEFT JOIN receipts r ON r.account = h.account AND r.operation = h.hold
WHERE h.account = ANY(%s) GROUP BY h.account, h.hold ORDER BY h.account, h.hold
"""
RECEIPTS = """
SELECT account, operation, line, grant_id, taken_micro, returned_micro FROM receipts r
WHERE account = ANY(%s) AND NOT EXISTS (SELECT FROM holds h WHERE h.account = r.account AND h.hold = r.operation)
ORDER BY account, operation, line
"""
CHARGED_BY: dict[str, dict[str, int]] = {
    "credits.consume": {"consumed": 1},
    "credits.hold": {"held": 1},
    "credits.capture": {"consumed": 1, "captured": 1},
    "credits.refund": {"restored": -1},
}
"""Which entries make up what an operation says it charged."""

ORPHANS = """
SELECT 'entries' AS found_in, e.account, min(e.seq)::text FROM entries e
WHERE NOT EXISTS (SELECT FROM accounts a WHERE a.account = e.account) GROUP BY e.account
UNION ALL
SELECT 'operations', o.account, min(o.number)::text FROM operations o
WHERE NOT EXISTS (SELECT FROM accounts a WHERE a.account = o.account) GROUP BY o.account
"""


def audit(
    connection: Connection[Any],
    accounts: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Audit all accounts, or those named, as they stand in one snapshot of the database.

    :param connection: not within a transaction; needs no more than the right to read.
    :param progress: called with how many accounts are done and how many there are.
    :returns: what was looked at, and each row that differs.
    """
    report = Report()
    wanted = None if accounts is None else list(accounts)
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        if wanted is None:
            row = cursor.execute("SELECT count(*) FROM accounts").fetchone()
            total = int(row[0]) if row else 0
        else:
            total = len(wanted)
        last = ""
        while True:
            page = cursor.execute(ACCOUNTS, (last, wanted, wanted)).fetchall()
            if not page:
                break
            page = page[: _as_many_as_fit(page)]
            last = page[-1][0]
            names = ([account for account, *_ in page],)
            entries = _grouped(cursor.execute(ENTRIES, names))
            operations = _grouped(cursor.execute(OPERATIONS, names))
            grants = _grouped(cursor.execute(GRANTS, names))
            holds = _grouped(cursor.execute(HOLDS, names))
            receipts = _grouped(cursor.execute(RECEIPTS, names))
            for account, *row in page:
                _audit_account(
                    report,
                    account,
                    row,
                    entries.get(account, []),
                    operations.get(account, []),
                    grants.get(account, []),
                    holds.get(account, []),
                )
                _audit_receipts(report, account, entries.get(account, []), receipts.get(account, []))
            report.accounts += len(page)
            if progress is not None:
                progress(report.accounts, max(total, report.accounts))
        if wanted is None:
            for table, account, key in cursor.execute(ORPHANS):
                report.add(account, table, key, "belongs to an account that has no row")
    return report


def _as_many_as_fit(page: Sequence[tuple[Any, ...]]) -> int:
    """How many accounts of a page have so few rows that they fit in memory together; at least one."""
    rows = 0
    for count, (_, operations, seq, *_rest) in enumerate(page):
        rows += operations + seq
        if rows > MAX_ROWS and count:
            return count
    return len(page)


def _audit_account(
    report: Report,
    account: str,
    row: Sequence[Any],
    entries: Sequence[tuple[Any, ...]],
    operations: Sequence[tuple[Any, ...]],
    grants: Sequence[tuple[Any, ...]],
    holds: Sequence[tuple[Any, ...]],
) -> None:
    last_operation, seq, head, last_grant, debt, *buckets = row
    report.entries += len(entries)
    report.operations += len(operations)
    sums, debt_sum = _audit_chain(report, account, entries, seq, bytes(head))
    _audit_operations(report, account, operations, entries, last_operation)
    for grant_id, *counters in grants:
        expected = sums.pop(grant_id, dict.fromkeys(COUNTERS, 0))
        _compare(report, account, "grants", f"grant {grant_id}", counters, expected)
        for counter in COUNTERS:
            sums.setdefault(0, dict.fromkeys(COUNTERS, 0))[counter] += expected[counter]
        if grant_id > last_grant:
            report.add(account, "grants", f"grant {grant_id}", f"is numbered after the account's last, {last_grant}")
    total = sums.pop(0, dict.fromkeys(COUNTERS, 0))
    for grant_id in sums:
        report.add(account, "grants", f"grant {grant_id}", "has entries but no row")
    _compare(report, account, "accounts", "totals", buckets, total)
    if debt != debt_sum:
        report.add(
            account,
            "accounts",
            "debt",
            f"is {format_amount(debt)}, its entries say {format_amount(debt_sum)}",
        )
    held = 0
    for hold, status, amount, captured, outstanding in holds:
        if status == "open":
            held += amount
            if outstanding != amount:
                report.add(account, "receipts", f"hold {hold}", "does not add up to what is held")
        elif outstanding != captured:
            report.add(account, "receipts", f"hold {hold}", "does not add up to what was captured")
    if held != total["held"]:
        report.add(
            account,
            "holds",
            "open holds",
            f"hold {format_amount(held)}, grants {format_amount(total['held'])}",
        )


def _audit_chain(
    report: Report, account: str, entries: Sequence[tuple[Any, ...]], seq: int, head: bytes
) -> tuple[dict[int, dict[str, int]], int]:
    """Sequence, hashes and balances of an account's entries; returns what they add up to per grant, and the debt."""
    sums: dict[int, dict[str, int]] = {}
    available = debt = 0
    previous = b""
    for number, row in enumerate(entries, 1):
        entry = Entry(*row)
        key = f"seq {entry.seq}"
        if entry.seq != number:
            report.add(account, "entries", key, f"stands where seq {number} should")
        if chain_hash(previous, account, entry) != bytes(entry.hash):
            report.add(account, "entries", key, "does not fit the chain: it, or the one before it, was changed")
        previous = bytes(entry.hash)
        flow = FLOWS.get(entry.kind)
        if flow is None:
            report.add(account, "entries", key, f"is of the unknown kind {entry.kind!r}")
            continue
        counters = sums.setdefault(entry.grant, dict.fromkeys(COUNTERS, 0))
        if flow.leaves is not None:
            counters[flow.leaves] -= entry.amount_micro
            if counters[flow.leaves] < 0:
                report.add(account, "entries", key, f"takes more out of grant {entry.grant} than it has")
        if flow.enters is not None:
            counters[flow.enters] += entry.amount_micro
        if flow.counted is not None:
            counters[flow.counted] += entry.amount_micro
        debt += flow.debt * entry.amount_micro
        available += entry.amount_micro * ((flow.enters == "available") - (flow.leaves == "available"))
        if available != entry.balance_after_micro:
            report.add(
                account,
                "entries",
                key,
                f"says a balance of {format_amount(entry.balance_after_micro)}, it is {format_amount(available)}",
            )
            available = entry.balance_after_micro
    if len(entries) != seq:
        report.add(account, "accounts", "seq", f"is {seq}, there are {len(entries)} entries")
    if previous != head:
        report.add(account, "accounts", "head", "is not the hash of the last entry")
    return sums, debt


def _audit_operations(
    report: Report,
    account: str,
    operations: Sequence[tuple[Any, ...]],
    entries: Sequence[tuple[Any, ...]],
    last: int,
) -> None:
    wrote: dict[str, list[int]] = {}
    amounts: dict[tuple[str, str], int] = {}
    for seq, operation, kind, _, amount, *_rest in entries:
        if operation is not None:
            wrote.setdefault(operation, []).append(seq)
            amounts[operation, kind] = amounts.get((operation, kind), 0) + amount
    last_seq, last_applied = 0, None
    for expected, row in enumerate(operations, 1):
        number, operation, name, status, charged, first_seq, count, applied_at = row
        if number != expected:
            report.add(account, "operations", operation, f"has number {number}, it stands where {expected} should")
        own = wrote.pop(operation, [])
        if own != list(range(first_seq or 0, (first_seq or 0) + count)):
            report.add(account, "operations", operation, f"says it wrote {count} entries, there are {len(own)}")
        if (own and own[0] < last_seq) or (last_applied is not None and applied_at < last_applied):
            report.add(account, "operations", operation, "stands after one that came later")
        last_seq, last_applied = own[-1] if own else last_seq, applied_at
        if status != "applied" and own:
            report.add(account, "operations", operation, f"was {status} and yet has entries")
        if status == "applied" and name in CHARGED_BY:
            sign_by_kind = CHARGED_BY[name].items()
            counted = sum(sign * amounts.get((operation, kind), 0) for kind, sign in sign_by_kind)
            if charged != counted:
                report.add(
                    account,
                    "operations",
                    operation,
                    f"says it charged {format_amount(charged)}, its entries say {format_amount(counted)}",
                )
    for operation, own in wrote.items():
        report.add(account, "entries", f"seq {own[0]}", f"belongs to operation {operation!r}, which has no row")
    if len(operations) != last:
        report.add(account, "accounts", "operations", f"is {last}, there are {len(operations)} operations")


def _audit_receipts(
    report: Report, account: str, entries: Sequence[tuple[Any, ...]], receipts: Sequence[tuple[Any, ...]]
) -> None:
    """The receipts of charges: what they say was taken, and what went back since."""
    returned: dict[str, int] = {}
    taken: dict[str, list[tuple[int, int]]] = {}
    for _, operation, kind, grant_id, amount, _, _, refers_to, *_rest in entries:
        if kind == "restored" and refers_to is not None:
            returned[refers_to] = returned.get(refers_to, 0) + amount
        elif kind in ("consumed", "captured") and operation is not None:
            taken.setdefault(operation, []).append((grant_id, amount))
    lines: dict[str, list[tuple[int, int]]] = {}
    back: dict[str, int] = {}
    for operation, _, grant_id, line_taken, line_returned in receipts:
        lines.setdefault(operation, []).append((grant_id, line_taken))
        back[operation] = back.get(operation, 0) + line_returned
    for operation in sorted(lines.keys() | returned.keys()):
        if lines.get(operation, []) != taken.get(operation, []):
            report.add(account, "receipts", f"charge {operation}", "does not say what the charge's entries took")
        elif back[operation] != returned.get(operation, 0):
            report.add(
                account,
                "receipts",
                f"charge {operation}",
                f"says {format_amount(back[operation])} went back, the entries say"
                f" {format_amount(returned.get(operation, 0))}",
            )


def _compare(
    report: Report, account: str, table: str, key: str, actual: Iterable[int], expected: dict[str, int]
) -> None:
    values = dict(zip(COUNTERS, actual, strict=True))
    for counter in COUNTERS:
        if values[counter] != expected[counter]:
            report.add(
                account,
                table,
                key,
                f"{counter} is {format_amount(values[counter])}, its entries say {format_amount(expected[counter])}",
            )
    came_in = values["granted"] + values["received"] + values["restored"]
    if came_in != sum(values[counter] for counter in COUNTERS[3:]):
        report.add(account, table, key, "does not close: what came in is not what is left and what went out")


def _grouped(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    grouped: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(row[1:])
    return grouped
