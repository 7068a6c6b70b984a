"""One operation on one account: check the idempotency key, settle, apply, answer.

The generic part that every operation gets for nothing. Pure: the ledger writer, an audit and a
simulation run the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import Grant as Bought
from creditlane.contract import Message, decode_message
from models.rules.catalog import Catalog
from models.rules.refusal import RefusedError
from models.rules.settling import settle
from models.rules.state import CLOSED, FROZEN, OPEN, UNOPENED, Account, Grant, Known
from tasks.achievements import Reached, reach
from tasks.leads import following
from tasks.notices import Told
from tasks.operation import Context, FollowUp, Operation, Outcome
from tasks.registry import OPERATIONS

encode = msgspec.json.Encoder().encode


class Row(msgspec.Struct, frozen=True, gc=False):
    """An operation as it is written: one immutable row."""

    operation: str
    number: int
    """Its place among the account's operations, from 1, without gaps; refusals count too."""
    name: str
    status: str
    code: str | None
    charged_micro: int
    feature: str | None
    quantity_micro: int | None
    member: str | None
    first_seq: int | None
    """The first of its entries, if it wrote any; they follow one another."""
    entries: int
    arguments: bytes
    result: bytes
    occurred_at: datetime | None
    applied_at: datetime
    catalog: str


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What the producer is told, and the row to write (none for a replay or a conflict of ids)."""

    name: str
    operation: str
    account: str
    status: str
    stored: bytes
    """The result but for the fields above, as JSON."""
    row: Row | None
    conflict: bool = False
    follow: Sequence[FollowUp] = ()
    """What is to be sent on once the row is committed; nothing for a replay, whose row was committed with it."""

    @property
    def replayed(self) -> bool:
        """Whether the id was answered before, with this answer."""
        return self.row is None and not self.conflict

    @property
    def result(self) -> bytes:
        """The result as JSON, put together without reading the stored part."""
        head = encode({"operation": self.name, "id": self.operation, "status": self.status, "account": self.account})
        return b"%s,%s%s" % (head[:-1], self.stored[1:-1], b',"replayed":true}' if self.replayed else b"}")


def apply(
    account: Account,
    name: str,
    operation: str,
    message: Message,
    arguments: bytes,
    now: datetime,
    catalog: Catalog,
) -> Answer:
    """Apply one operation to an account, in memory (ledger rules: operations, idempotency).

    :param name: the task name, one of :data:`tasks.registry.OPERATIONS`.
    :param operation: the operation id.
    :param arguments: the message as it came, a JSON object; kept for ever on the operation's row.
    :param now: the account's time; not before its last operation.
    :returns: the result as JSON, with the row to write.
    """
    known = account.known.get(operation)
    if known is not None:
        # Time stands still for it: whatever time does is written with an operation, which says by which catalog.
        return _repeat(account, name, operation, message, known)
    told = Told(account, now, catalog) if catalog.notify.is_on else None
    account.updated_at = now
    settle(account, now, catalog)
    if told is not None:
        told.settled()
    settled = account.seq
    status: str = "applied"
    code: str | None = None
    task = OPERATIONS[name]
    try:
        if account.status != OPEN:
            _admit(account, task, message)
        context = Context(now, catalog, operation)
        outcome = task.run(account, message, context)
    except RefusedError as refusal:
        if account.seq != settled:
            raise AssertionError(f"{name} was refused after it wrote entries") from refusal
        status, code = "rejected", refusal.code.value
        follow = () if task.refused is None else task.refused(message, operation, refusal.code)
        outcome = Outcome(details=refusal.details, follow=follow)
        fields: dict[str, Any] = {"code": code, "reason": refusal.reason, **refusal.details}
    else:
        fields = {"charged": format_amount(outcome.charged)}
        if outcome.uses:
            fields["grants"] = [
                {"grant": grant.id, "source": grant.source, "amount": format_amount(amount)}
                for grant, amount in outcome.uses
            ]
        if outcome.details:
            fields.update(outcome.details)
        if catalog.achievements:
            reached = reach(account, message, context)
            if reached:
                fields["achieved"] = [_reached(each) for each in reached]
            if told is not None:
                told.achieved(reached)
    fields["balance"] = balance_of(account, now)
    stored = encode(fields)
    account.operations += 1
    account.is_dirty = True
    account.known[operation] = Known(name, status, stored, message, arguments, outcome.receipt)
    if told is not None:
        told.applied(message, operation, code, outcome)
    if account.renewals:
        account.renewals = []
    row = Row(
        operation,
        account.operations,
        name,
        status,
        code,
        outcome.charged,
        outcome.feature or getattr(message, "feature", None),
        outcome.quantity_micro,
        getattr(message, "member", None),
        settled + 1 if account.seq > settled else None,
        account.seq - settled,
        arguments,
        stored,
        getattr(message, "occurred_at", None),
        now,
        catalog.label,
    )
    follow = outcome.follow
    if account.converted_to is not None:
        follow = (*follow, *following(account, operation, now))
    return Answer(name, operation, account.account, status, stored, row, False, follow)


def _admit(account: Account, task: Operation, message: Message) -> None:
    """Refuse what an account does not take that is not open; what was paid for in a lead's name follows to its user.

    :raises RefusedError: ``unknown_account``, ``account_closed``, ``account_frozen``.
    """
    if account.status == UNOPENED and not task.opens:
        raise RefusedError(Code.UNKNOWN_ACCOUNT)
    if account.status == CLOSED and not task.concludes:
        if account.converted_to is None:
            raise RefusedError(Code.ACCOUNT_CLOSED)
        is_bought = isinstance(message, Bought) and message.purchase is not None
        if not (task.returns or is_bought):
            raise RefusedError(Code.ACCOUNT_CLOSED, converted_to=account.converted_to)
    if account.status == FROZEN and task.spends:
        raise RefusedError(Code.ACCOUNT_FROZEN)


def _reached(reached: Reached) -> dict[str, Any]:
    """What an operation brought, as its result tells it."""
    told: dict[str, Any] = {"achievement": reached.name, "credits": format_amount(reached.achievement.credits)}
    return told if reached.lot is None else {**told, "grant": reached.lot.id}


def _repeat(account: Account, name: str, operation: str, message: Message, known: Known) -> Answer:
    """The same id again: the first answer, or a conflict when the content differs."""
    first = known.message
    if first is None and known.name == name and known.arguments is not None:
        first = decode_message(known.name, known.arguments)
    if known.name == name and first == message:
        repeated = OPERATIONS[name].repeated
        follow = () if repeated is None else repeated(message, operation, _decode_refusal(known.result).code)
        return Answer(name, operation, account.account, known.status, known.result, None, False, follow)
    fields = {
        "code": str(Code.ID_CONFLICT),
        "reason": f"this id belongs to another {known.name} of the account; choose a new one",
    }
    return Answer(name, operation, account.account, "rejected", encode(fields), None, conflict=True)


class _Refusal(msgspec.Struct):
    code: Code | None = None


_decode_refusal = msgspec.json.Decoder(_Refusal).decode


def balance_of(account: Account, now: datetime) -> dict[str, Any]:
    """The balance as a result tells it: spendable now, by source, and what else there is or is owed; in credits."""
    by_source: dict[str, int] = {}
    upcoming = frozen = 0
    disputed = account.purchases and account.frozen
    for grant in account.order:
        if grant.available:
            if disputed and grant.purchase in disputed:
                frozen += grant.available
            elif _is_active(grant, now):
                by_source[grant.source] = by_source.get(grant.source, 0) + grant.available
            else:
                upcoming += grant.available
    balance: dict[str, Any] = {"available": format_amount(account.available - upcoming - frozen)}
    if account.held:
        balance["held"] = format_amount(account.held)
    if account.in_transit:
        balance["in_transit"] = format_amount(account.in_transit)
    if account.debt:
        balance["debt"] = format_amount(account.debt)
    if upcoming:
        balance["upcoming"] = format_amount(upcoming)
    if frozen:
        balance["frozen"] = format_amount(frozen)
    if by_source:
        balance["by_source"] = {source: format_amount(amount) for source, amount in by_source.items()}
    return balance


def _is_active(grant: Grant, now: datetime) -> bool:
    return grant.effective_at <= now and (grant.expires_at is None or now < grant.expires_at)
