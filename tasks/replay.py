"""Replay: every operation fed again to the very rules, and what comes out compared with what is written.

An account begins empty; its operations come in their order, each at the instant at which it was applied. Time passes
only within an operation, so the same entries come out, to the last bit of their hashes, and the same answers; in the
end the same account, grants, holds and receipts. What a chain of hashes cannot tell is told by this: that the rules
would have written these rows and no others (ledger rules: proof).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

from creditlane.contract import ContractError, IssueCodes, decode_message
from models.audit_rows import Row, Totals
from models.report import Report
from models.rules.catalog import Catalog
from models.rules.settling import settle
from models.rules.sharing import allowance_row, referral_row, told_by
from models.rules.state import COUNTERS, Account, Grant, Hold, purchase_row, subscription_row
from tasks.ledger import apply
from tasks.operation import Need
from tasks.registry import OPERATIONS

LINES = 16
"""Lots and holds at hand from which on those with nothing left are put aside."""

ROW_FIELDS = (
    "number", "name", "status", "code", "charged_micro", "feature", "quantity_micro", "member", "first_seq", "entries",
    "result", "occurred_at", "applied_at", "catalog",
)  # fmt: skip
_row_fields = attrgetter(*ROW_FIELDS)

_counters = attrgetter(*COUNTERS)


def _names_earlier() -> tuple[str, ...]:
    return tuple(name for name, operation in OPERATIONS.items() if operation.need is not None)


@dataclass(frozen=True)
class Replayer:
    """Begins the replay of accounts.

    :param catalogs: by label, as it stands on each operation. An operation whose catalog is not here cannot be
        replayed, nor what its account did after it.
    """

    catalogs: Mapping[str, Catalog]
    naming: Sequence[str] = _names_earlier()

    def begin(self, report: Report, totals: Totals, named: Iterable[Row] | None) -> Replay:
        """See :class:`models.audit_page.Replayer`."""
        return Replay(report, totals, self.catalogs, named)


class Replay:
    """The replay of one account.

    :param named: name and arguments of the operations that name an earlier one; none when all are kept at hand.
    """

    def __init__(
        self, report: Report, totals: Totals, catalogs: Mapping[str, Catalog], named: Iterable[Row] | None
    ) -> None:
        self.report = report
        self.account = Account(totals.account)
        self._totals = totals
        self._catalogs = catalogs
        self._named: set[str] | None = None
        if named is not None:
            self._named = {key for name, arguments in named for key in _named_by(name, arguments)}
        self._closed: dict[str, Hold] = {}
        self._catalog: Catalog | None = None
        self._over = False

    def _fault(self, table: str, key: str, what: str) -> None:
        self.report.add(self.account.account, table, key, what)

    def feed(self, operation: Row | None, entries: Sequence[Row]) -> None:
        """Apply the next operation, and compare the entries and the answer that come out.

        :param entries: those that time wrote before it, and its own.
        """
        if self._over:
            return
        account = self.account
        try:
            if operation is None:
                self._settle(entries)
            else:
                applied_at = operation[15]
                if entries and entries[0][2] is None and entries[0][9] != applied_at:
                    # An operation that had been answered before settled its account, and left no row.
                    self._settle([entry for entry in entries if entry[2] is None and entry[9] < applied_at])
                self._apply(operation)
        except Exception as error:
            key = "rules" if operation is None else operation[2]
            self._fault("operations", key, f"cannot be replayed: {type(error).__name__}: {error}")
            self._over = True
            return
        written = account.entries
        if self._over:
            return
        if len(written) != len(entries) or any(
            mine != theirs[1:] for mine, theirs in zip(written, entries, strict=True)
        ):
            self._other_entries(operation, entries)
        account.entries = []

    def _settle(self, entries: Sequence[Row]) -> None:
        last = None
        for entry in entries:
            if entry[9] != last:
                last = entry[9]
                self.account.updated_at = last
                self._pass_time(last)

    def _pass_time(self, now: datetime) -> bool:
        """Let time pass without an operation: only rows of before plans were known have such."""
        return self._catalog is not None and settle(self.account, now, self._catalog)

    def _apply(self, row: Row) -> None:
        (
            name, number, operation, task, status, code, charged, feature, quantity, member, first_seq, count,
            arguments, result, occurred_at, applied_at, label,
        ) = row  # fmt: skip
        account = self.account
        catalog = self._catalogs.get(label)
        if catalog is None:
            self.report.missing_catalog(label, self._totals.operations - number + 1)
            self._over = True
            return
        raw = arguments.encode()
        try:
            message = decode_message(task, raw)
        except ContractError as error:
            self._fault("operations", operation, f"has arguments that no producer could have sent: {error}")
            self._over = True
            return
        self._catalog = catalog
        if message.account != name:
            self._fault("operations", operation, f"is in its arguments an operation of {message.account!r}")
            self._over = True
            return
        find = OPERATIONS[task].need
        needs = find(message) if find is not None else ()
        for need in needs:
            self._fetch(need)
        if any(need.kind == "code" for need in needs):
            account.codes = told_by(result)  # what others do with a code is no rule's of this account
        made = apply(account, task, operation, message, raw, applied_at, catalog).row
        self.report.replayed += 1
        if made is None:
            raise AssertionError("an operation of the account has this id")
        out = _row_fields(made)
        stands = (
            number, task, status, code, charged, feature, quantity, member, first_seq, count, result.encode(),
            occurred_at, applied_at, label,
        )  # fmt: skip
        if out != stands:
            different = [field for field, mine, theirs in zip(ROW_FIELDS, out, stands, strict=True) if mine != theirs]
            self._fault("operations", operation, f"has another {', '.join(different)} than the rules give")
        if self._named is not None and operation not in self._named and task != IssueCodes.operation:
            del account.known[operation]  # which issue a withdrawal is of, its arguments do not say
        if len(account.order) > LINES or len(account.holds) > LINES:
            self._put_aside()

    def _fetch(self, need: Need) -> None:
        """Have at hand what the operation works on, as the writer does."""
        account = self.account
        key = str(need.key)
        if need.kind == "hold":
            if key in self._closed:
                account.holds[key] = self._closed.pop(key)
            return
        if need.kind in ("grant", "subscription", "allowance", "referral", "referee", "code"):
            return  # all are known; what is taken back of a lot does not depend on their order
        if need.kind == "purchase":
            purchase = account.purchases.get(key)  # what was taken of its lots may come back to them
            named = [taking.grant for taking in purchase.takings] if purchase is not None else []
        else:
            known = account.known.get(key)
            named = [line.grant for line in (known.lines if known is not None else None) or ()]
        at_hand = {lot.id for lot in account.order}
        for grant in named:
            if grant not in at_hand:
                at_hand.add(grant)
                account.add_grant(account.grants[grant])

    def _put_aside(self) -> None:
        """Lots and holds with nothing left stay known, but out of the way of the rules, which go over all at hand."""
        account = self.account
        if sum(1 for lot in account.order if lot.is_open) * 2 < len(account.order):
            account.order = [lot for lot in account.order if lot.is_open]
        if account.open_holds() * 2 < len(account.holds):
            self._closed.update((key, hold) for key, hold in account.holds.items() if hold.status != "open")
            account.holds = {key: hold for key, hold in account.holds.items() if hold.status == "open"}

    def _other_entries(self, operation: Row | None, entries: Sequence[Row]) -> None:
        """Name the first entry that is not what the rules write; what came after it has another beginning."""
        account = self.account
        for mine, theirs in zip(account.entries, entries, strict=False):
            if mine != theirs[1:]:
                fields = [
                    field for field, one, other in zip(mine._fields, mine, theirs[1:], strict=True) if one != other
                ]
                self._fault("entries", f"seq {theirs[1]}", f"has another {', '.join(fields)} than the rules give")
                break
        else:
            key = f"seq {entries[-1][1] if entries else account.seq}" if operation is None else operation[2]
            self._fault(
                "entries" if operation is None else "operations",
                key,
                f"has {len(entries)} entries, the rules write {len(account.entries)}",
            )
        self._over = True

    def finish(
        self,
        totals: Totals,
        grants: Sequence[Row],
        holds: Sequence[Row],
        receipts: Sequence[Row],
        others: Mapping[str, Sequence[Row]],
    ) -> None:
        """Compare the account, its grants, holds, receipts and other rows with what came out.

        :param others: see :meth:`models.audit_page.Replay.finish`.
        """
        if self._over:
            return
        account = self.account
        at = account.updated_at
        if at is not None and totals.updated_at > at and self._pass_time(totals.updated_at):
            at = totals.updated_at  # a hold of nothing ran out, which leaves no entry
        if account.entries:
            self._fault("accounts", "updated_at", "is at a time at which the rules write entries that are not there")
            return
        account.order = sorted(account.grants.values(), key=attrgetter("key"))
        mine: dict[str, Any] = {
            "operations": account.operations,
            "seq": account.seq,
            "head": account.head,
            "last_grant": account.last_grant,
            "debt": account.debt,
            "totals": _counters(account),
            "updated_at": at,
            "next_due_at": account.due_at(),
            "opening": (
                account.kind, account.status, account.email, account.locale, account.timezone, account.opened_at,
                account.converted_to, account.achieved,
            ),
        }  # fmt: skip
        for field, value in mine.items():
            stands = totals.buckets if field == "totals" else getattr(totals, field)
            if stands != value:
                self._fault("accounts", field, "is not what the rules give")
        self._same("grants", "grant", {row[1]: row[2:] for row in grants}, map(_grant_row, account.grants.values()))
        kept = (*self._closed.values(), *account.holds.values())
        self._same("holds", "hold", {row[1]: row[2:] for row in holds}, map(_hold_row, kept))
        self._finish_receipts(kept, receipts)
        subscription = account.subscription
        made = [] if subscription is None else [(account.account, subscription_row(subscription))]
        self._same("subscriptions", "subscription of", {row[0]: row[1:] for row in others["subscriptions"]}, made)
        returned = ((name, purchase_row(purchase)) for name, purchase in account.purchases.items())
        self._same("purchases", "purchase", {row[1]: row[1:] for row in others["purchases"]}, returned)
        counted = ((key, allowance_row(allowance)) for key, allowance in account.allowances.items())
        self._same("allowances", "allowance", {row[1]: row[1:] for row in others["allowances"]}, counted)
        referral = account.referral
        referred = [] if referral is None else [(account.account, referral_row(referral))]
        self._same("referrals", "referral of", {row[0]: row[1:] for row in others["referrals"]}, referred)

    def _finish_receipts(self, holds: Sequence[Hold], receipts: Sequence[Row]) -> None:
        written = {(operation, line): tuple(rest) for _, operation, line, *rest in receipts}
        made = [(hold.id, hold.lines) for hold in holds]
        made += [(key, known.lines) for key, known in self.account.known.items() if known.lines and known.is_dirty]
        self._same(
            "receipts",
            "line",
            {f"{line} of {operation}": row for (operation, line), row in written.items()},
            (
                (f"{number} of {operation}", (line.grant, line.taken, line.returned))
                for operation, lines in made
                for number, line in enumerate(lines, 1)
            ),
        )

    def _same(self, table: str, what: str, written: dict[Any, Any], made: Iterable[tuple[Any, Any]]) -> None:
        for key, row in made:
            stands = written.pop(key, None)
            if stands is None:
                self._fault(table, f"{what} {key}", "has no row, and the rules make one")
            elif stands != row:
                self._fault(table, f"{what} {key}", "is not what the rules give")
        for key in written:
            self._fault(table, f"{what} {key}", "has a row, and the rules make none")


def _named_by(name: str, arguments: str) -> Iterable[str]:
    try:
        find = OPERATIONS[name].need
        needs = find(decode_message(name, arguments.encode())) if find is not None else ()
    except (ContractError, KeyError):
        return ()  # it is a fault when its turn comes
    return [str(need.key) for need in needs if need.kind in ("charge", "transfer")]


def _grant_row(grant: Grant) -> tuple[int, Row]:
    features = None if grant.features is None else sorted(grant.features)
    return grant.id, (
        grant.source, grant.priority, features, grant.effective_at, grant.expires_at, grant.created_at,
        grant.operation, grant.purchase, grant.price_minor, grant.price_currency, grant.price_per, *_counters(grant),
        grant.clawed_back, grant.forgiven, grant.origin, grant.is_open,
    )  # fmt: skip


def _hold_row(hold: Hold) -> tuple[str, Row]:
    return hold.id, (
        hold.status, hold.amount, hold.captured, hold.feature, hold.member, hold.created_at, hold.expires_at,
        hold.closed_at,
    )  # fmt: skip
