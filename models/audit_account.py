"""The audit of one account, fed with its rows in order: nothing of its history is kept.

What is kept is what an account has at a time: a counter per bucket and grant, and the receipts of charges that
were given back from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import NamedTuple

import msgspec

from creditlane.amounts import format_amount
from models.audit_rows import GRANT_BASE, GRANT_COUNTERS, GRANT_EXPIRES_AT, GRANT_ID, Row, Totals
from models.report import Report
from models.rules.posting import FLOWS
from models.rules.state import COUNTERS, subscription_of


class Leaf(NamedTuple):
    """Where an account stood when a seal was made."""

    seal: int
    seq: int
    head: bytes
    operations: int
    operations_head: bytes


class Start(NamedTuple):
    """Where the audit of an account begins: at nothing, or at a checkpoint."""

    operations: int = 0
    seq: int = 0
    head: bytes = b""
    debt: int = 0
    buckets: Sequence[int] = (0,) * len(COUNTERS)

    @property
    def is_checkpoint(self) -> bool:
        """Whether something stands before it that is not looked at."""
        return bool(self.operations or self.seq)


BEGINNING = Start()


class Step(NamedTuple):
    """What an entry kind does to the counters, by their place in :data:`COUNTERS`; -1 for none."""

    leaves: int
    enters: int
    counted: int
    debt: int
    available: int
    """Its sign in the balance."""


def _place(counter: str | None) -> int:
    return -1 if counter is None else COUNTERS.index(counter)


STEPS: dict[str, Step] = {
    kind: Step(
        _place(flow.leaves),
        _place(flow.enters),
        _place(flow.counted),
        flow.debt,
        (flow.enters == "available") - (flow.leaves == "available"),
    )
    for kind, flow in FLOWS.items()
}
"""Every kind of entry, made of what the rules say of it."""

HELD, AVAILABLE = COUNTERS.index("held"), COUNTERS.index("available")
CAME_IN = 3
"""The first counters are what came in, the others where it is."""

HOLD = "credits.hold"
SET_ASIDE_OR_TAKEN = {HOLD: ("held",), "credits.consume": ("consumed",), "credits.capture": ("consumed", "captured")}
"""The entries that the receipt of an operation is made of."""

CHARGED_BY: dict[str, dict[str, int]] = {
    "credits.open": {},
    "credits.grant": {},
    "credits.settle": {},
    "credits.consume": {"consumed": 1},
    "credits.hold": {"held": 1},
    "credits.capture": {"consumed": 1, "captured": 1},
    "credits.release": {"released": -1},
    "credits.refund": {"restored": -1},
    "credits.adjust": {"revoked": 1},
    "credits.revoke": {"revoked": 1},
    "credits.claw_back": {"revoked": 1, "reinstated": -1},
    "credits.transfer": {"transferred": 1},
    "credits.receive": {},
    "credits.confirm": {},
    "credits.bounce": {"bounced": -1},
    "credits.convert": {"transferred": 1},
    "accounts.freeze": {},
    "accounts.thaw": {},
    "accounts.close": {"revoked": 1},
    "accounts.reopen": {},
    "codes.issue": {"transferred": 1},
    "codes.redeem": {},
    "codes.conclude": {},
    "codes.withdraw": {"bounced": -1},
    "referrals.issue": {},
    "referrals.claim": {},
    "referrals.reward": {},
    "plans.subscribe": {},
    "plans.change": {},
    "plans.cancel": {},
    "plans.renew": {},
    "plans.undo": {},
}
"""Which entries make up what an operation says it charged; one that is not here is proven by replay alone."""

_encode = msgspec.msgpack.Encoder().encode


class AccountAudit:
    """The audit of one account.

    :param start: where the rows that are fed begin.
    :param receipts: its rows of ``receipts``.
    :param leaves: where the account stood at each seal, oldest first.
    :param cutoffs: the instant of each seal of the ledger, by its number from 1.
    :param only_new: for an incremental audit, which knows the receipts of open holds alone: what went back lately may
        be of charges from long ago.
    """

    def __init__(
        self,
        report: Report,
        account: str,
        start: Start = BEGINNING,
        receipts: Iterable[Row] = (),
        leaves: Sequence[Leaf] = (),
        cutoffs: Sequence[datetime] = (),
        only_new: bool = False,
    ) -> None:
        self.report = report
        self.account = account
        self.start = start
        self._has_receipts = not only_new
        self.sums: dict[int, list[int]] = {}
        """What the entries add up to, by grant; on top of the checkpoint where there is one."""
        self.debt = start.debt
        self.available = start.buckets[AVAILABLE]
        self.head = start.head
        self.seq = start.seq
        self.number = start.operations
        self.last: datetime | None = None
        """When the last row was recorded."""
        self._before: str | None = None
        self._receipts: dict[str, list[tuple[int, int, int]]] = {}
        """Grant, taken and returned of each line, by the hold or the charge."""
        for _, operation, _, *line in receipts:
            self._receipts.setdefault(operation, []).append((line[0], line[1], line[2]))
        self._returned: dict[str, int] = {}
        self._leaves = list(reversed(leaves))
        self._seal_seq = list(self._leaves)
        self._first_sealed = 0
        self._cutoffs = cutoffs
        self._operations_head = sha256()
        self._floor = self._floor_before(self._leaves)

    def fault(self, table: str, key: str, what: str) -> None:
        """Note a row that is not as it should be."""
        self.report.add(self.account, table, key, what)

    # --- Row by row ----------------------------------------------------------------------------------

    def feed(self, operation: Row | None, entries: Sequence[Row]) -> None:
        """Take the next operation with the entries that time wrote before it, and its own.

        :param operation: none for what time wrote after the last one.
        """
        for row in entries:
            self._entry(row)
        if operation is not None:
            self._operation(operation, entries)
        elif entries:
            self._strangers(None, entries)

    def _entry(self, row: Row) -> None:
        _, seq, operation, kind, grant, amount, balance, at, refers_to, recorded_at, digest = row
        self.seq = expected = self.seq + 1
        if seq != expected:
            self.fault("entries", f"seq {seq}", f"stands where seq {expected} should")
            self.seq = seq
        head = sha256(self.head + _encode(row[:-1])).digest()
        if head != digest:
            self.fault("entries", f"seq {seq}", "does not fit the chain: it, or the one before it, was changed")
            head = digest
        self.head = head
        floor = None
        if self._cutoffs:
            floor = self._floor_before(self._seal_seq)
            if self._seal_seq and seq >= self._seal_seq[-1].seq:
                self._sealed_entry(seq, head)
        step = STEPS.get(kind)
        if step is None:
            self.fault("entries", f"seq {seq}", f"is of the unknown kind {kind!r}")
            return
        leaves, enters, counted, debt, sign = step
        counters = self.sums.get(grant)
        if counters is None:
            counters = self.sums[grant] = [0] * len(COUNTERS)
        if leaves >= 0:
            counters[leaves] -= amount
            if counters[leaves] < 0 and not self.start.is_checkpoint:
                self.fault("entries", f"seq {seq}", f"takes more out of grant {grant} than it has")
        if enters >= 0:
            counters[enters] += amount
        if counted >= 0:
            counters[counted] += amount
            if kind == "restored" and refers_to is not None:
                self._returned[refers_to] = self._returned.get(refers_to, 0) + amount
        if debt:
            self.debt += debt * amount
        available = self.available + sign * amount
        if available != balance:
            said, is_now = format_amount(balance), format_amount(available)
            self.fault("entries", f"seq {seq}", f"says a balance of {said}, it is {is_now}")
        self.available = balance
        if amount <= 0:
            self.fault("entries", f"seq {seq}", f"moves {format_amount(amount)} credits")
        if at > recorded_at or (operation is None and self._is_early(recorded_at, floor)):
            self.fault("entries", f"seq {seq}", "was recorded out of its time")

    def _is_early(self, recorded_at: datetime, floor: datetime | None) -> bool:
        """Whether a row was recorded before the one before it, or before a seal that does not have it."""
        early = (self.last is not None and recorded_at < self.last) or (floor is not None and recorded_at < floor)
        self.last = recorded_at
        return early

    def _operation(self, row: Row, entries: Sequence[Row]) -> None:
        (
            _, number, operation, name, status, _, charged, _, _, _, first_seq, count, _, _, _, applied_at, _,
        ) = row  # fmt: skip
        self.number = expected = self.number + 1
        if number != expected:
            self.fault("operations", operation, f"has number {number}, it stands where {expected} should")
            self.number = number
        own = [entry for entry in entries if entry[2] == operation]
        if len(own) != count or (own and own[0][1] != first_seq) or (first_seq is None) != (count == 0):
            self.fault("operations", operation, f"says it wrote {count} entries, there are {len(own)}")
        if len(own) != len(entries):
            self._strangers(operation, entries)
        if self._is_early(applied_at, self._floor):
            self.fault("operations", operation, "was recorded out of its time")
        if own and (own[0][9] != applied_at or own[-1][9] != applied_at):
            self.fault("operations", operation, "was applied at another time than its entries were recorded")
        if status == "applied":
            charges = CHARGED_BY.get(name)
            if charges is not None:
                counted = 0
                for entry in own:
                    sign = charges.get(entry[3])
                    if sign:
                        counted += sign * entry[5]
                if charged != counted:
                    said, is_now = format_amount(charged), format_amount(counted)
                    self.fault("operations", operation, f"says it charged {said}, its entries say {is_now}")
        elif own or charged:
            self.fault("operations", operation, f"was {status} and yet has entries, or a charge")
        if operation in self._receipts:
            taken = [(entry[4], entry[5]) for entry in own if entry[3] in SET_ASIDE_OR_TAKEN.get(name, ())]
            if [line[:2] for line in self._receipts[operation]] != taken:
                what = "hold" if name == HOLD else "charge"
                self.fault("receipts", f"{what} {operation}", f"does not say what the {what}'s entries took")
        self._before = operation
        if self._leaves:
            self._sealed_operation(row)

    def _strangers(self, operation: str | None, entries: Sequence[Row]) -> None:
        """Name entries that stand at an operation and are neither its own nor time's."""
        for entry in entries:
            other = entry[2]
            if other is None or other == operation:
                continue
            if other == self._before:
                self.fault("operations", other, "says it wrote fewer entries than there are")
            else:
                self.fault("entries", f"seq {entry[1]}", f"belongs to operation {other!r}, which has no row here")

    # --- What was sealed -----------------------------------------------------------------------------

    def _floor_before(self, leaves: Sequence[Leaf]) -> datetime | None:
        """What the next of these leaves is the first to have cannot have been recorded before this instant."""
        seal = leaves[-1].seal - 1 if leaves else len(self._cutoffs)
        return self._cutoffs[seal - 1] if 0 < seal <= len(self._cutoffs) else None

    def _sealed_entry(self, seq: int, head: bytes) -> None:
        while self._seal_seq and seq >= self._seal_seq[-1].seq:
            leaf = self._seal_seq.pop()
            if seq == leaf.seq and head != leaf.head:
                self.fault("entries", f"seq {seq}", f"or one before it is not as seal {leaf.seal} has it")

    def _sealed_operation(self, row: Row) -> None:
        digest = self._operations_head
        digest.update(_encode(row))
        while self._leaves and row[1] >= self._leaves[-1].operations:
            leaf = self._leaves.pop()
            if digest.digest() != leaf.operations_head:
                first = self._first_sealed + 1
                self.fault(
                    "operations",
                    f"number {first} to {leaf.operations}" if first < leaf.operations else row[2],
                    f"are not as seal {leaf.seal} has them",
                )
            self._first_sealed = leaf.operations
            self._operations_head = digest = sha256(leaf.operations_head)
        self._floor = self._floor_before(self._leaves)

    # --- What it all adds up to ----------------------------------------------------------------------

    def finish(
        self, totals: Totals, grants: Iterable[Row], holds: Iterable[Row], subscriptions: Iterable[Row] = ()
    ) -> None:
        """Compare the account's rows with what the entries add up to.

        :param grants: with the counters of the checkpoint behind them, if the audit began at one.
        """
        added = [0] * len(COUNTERS)
        soonest = None
        for row in grants:
            grant, counters, base = row[GRANT_ID], row[GRANT_COUNTERS], row[GRANT_BASE]
            expected = self.sums.pop(grant, None) or [0] * len(COUNTERS)
            for place, amount in enumerate(expected):
                added[place] += amount
            if base:
                expected = [before + amount for before, amount in zip(base, expected, strict=True)]
            self._compare("grants", f"grant {grant}", counters, expected)
            if grant > totals.last_grant:
                self.fault("grants", f"grant {grant}", f"is numbered after the account's last, {totals.last_grant}")
            due = row[GRANT_EXPIRES_AT]
            if due is not None and counters[AVAILABLE] and (soonest is None or due < soonest):
                soonest = due
        for grant in self.sums:
            self.fault("grants", f"grant {grant}", "has entries but no row")
        expected = [before + amount for before, amount in zip(self.start.buckets, added, strict=True)]
        self._compare("accounts", "totals", totals.buckets, expected)
        if totals.debt != self.debt:
            said, is_now = format_amount(totals.debt), format_amount(self.debt)
            self.fault("accounts", "debt", f"is {said}, its entries say {is_now}")
        if totals.seq != self.seq:
            self.fault("accounts", "seq", f"is {totals.seq}, the last entry has {self.seq}")
        if totals.head != self.head:
            self.fault("accounts", "head", "is not the hash of the last entry")
        if totals.operations != self.number:
            self.fault("accounts", "operations", f"is {totals.operations}, the last operation has {self.number}")
        if self.last is not None and totals.updated_at < self.last:
            self.fault("accounts", "updated_at", "is before its last operation")
        due = self._finish_holds(holds, expected[HELD])
        if due is not None and (soonest is None or due < soonest):
            soonest = due
        for row in subscriptions:
            due = subscription_of(row[1:]).due_at()
            if due is not None and (soonest is None or due < soonest):
                soonest = due
        if totals.next_due_at != soonest:
            self.fault("accounts", "next_due_at", f"is {totals.next_due_at}, its grants, holds and plan say {soonest}")
        for leaf in {leaf.seal: leaf for leaf in (*self._leaves, *self._seal_seq)}.values():
            self.fault("accounts", f"seal {leaf.seal}", "has operations or entries of it that are there no more")

    def _finish_holds(self, holds: Iterable[Row], expected_micro: int) -> datetime | None:
        """Holds against their receipts, and charges against theirs; gives the first instant at which one runs out."""
        held = 0
        soonest: datetime | None = None
        for _, hold, status, amount, captured, _, _, _, expires_at, _ in holds:
            outstanding = sum(taken - returned for _, taken, returned in self._receipts.pop(hold, ()))
            if status == "open":
                held += amount
                if soonest is None or expires_at < soonest:
                    soonest = expires_at
                if outstanding != amount:
                    self.fault("receipts", f"hold {hold}", "does not add up to what is held")
            elif outstanding != captured:
                self.fault("receipts", f"hold {hold}", "does not add up to what was captured")
        if held != expected_micro:
            said, is_now = format_amount(held), format_amount(expected_micro)
            self.fault("holds", "open holds", f"hold {said}, the entries say {is_now}")
        if not self._has_receipts:
            return soonest
        for charge in sorted(self._receipts.keys() | self._returned.keys()):
            back = sum(returned for _, _, returned in self._receipts.get(charge, ()))
            went = self._returned.get(charge, 0)
            if charge not in self._receipts:
                self.fault("receipts", f"charge {charge}", "is not there, though credits of it went back")
            elif back != went:
                said, is_now = format_amount(back), format_amount(went)
                self.fault("receipts", f"charge {charge}", f"says {said} went back, the entries say {is_now}")
        return soonest

    def _compare(self, table: str, key: str, actual: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(actual) != tuple(expected):
            for counter, stands, adds_up in zip(COUNTERS, actual, expected, strict=True):
                if stands != adds_up:
                    said, is_now = format_amount(stands), format_amount(adds_up)
                    self.fault(table, key, f"{counter} is {said}, its entries say {is_now}")
        if sum(actual[:CAME_IN]) != sum(actual[CAME_IN:]):
            self.fault(table, key, "does not close: what came in is not what is left and what went out")
