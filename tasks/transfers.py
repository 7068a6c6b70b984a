"""Transfers: credits given to another account, each side in its own lane (ledger rules: operations, transfer).

The sender's ``credits.transfer`` sets the credits aside as in transit and is followed by ``credits.receive`` in the
recipient's lane, which adds a lot for each lot burnt. That one, applied or refused, is followed by the sender's
``credits.confirm`` or ``credits.bounce``. Each follows from the committed row of the one before, under an id that is
derived from sender and transfer, so however often one is delivered, credits move once; and since both ends of a
transfer have one id, it can only have one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import (
    VERSION,
    Bounce,
    Confirm,
    Convert,
    Parcel,
    Receive,
    Transfer,
    concluding_id,
    decode_message,
    receiving_id,
)
from models.rules.allowances import count, used_in
from models.rules.burning import Plan, burn, came_in, check_room, come_back, new_grant, pay_debt
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.sharing import LEAD, LEADS
from models.rules.state import MAX_OPEN_GRANTS, OPEN, Account, Grant, Known
from tasks.gifts import GIFT_NEED, check_gift, count_gift, plan_gift
from tasks.operation import Context, FollowUp, Need, Outcome, operation

TRANSFERS = (Transfer.operation, Convert.operation)
"""The operations that send credits to another account."""


@operation(Transfer, need=lambda _: (GIFT_NEED,), spends=True)
def transfer(account: Account, message: Transfer, context: Context) -> Outcome:
    """Set ``amount`` credits aside for the account ``to``, and send them there.

    Paid in burn-down order by unscoped lots of sources that the catalog lets go. Until the recipient's lane has
    answered they are in transit: not spendable, not refundable, and they do not lapse. What comes back counts as given
    all the same. Refusals: ``daily_limit``; ``insufficient_credits``; ``not_transferable`` when there are enough, but
    not of such lots. (catalog: gifts)
    """
    amount = int(message.amount)
    check_gift(account, amount, context)
    plan = plan_gift(account, amount, context)
    receipt = burn(account, plan, "transferred", context.now, context.operation)
    count_gift(account, amount, context)
    follow = receiving(account.account, context.operation, message, plan, context.now)
    return Outcome(amount, plan, receipt, {"to": message.to}, follow=[follow])


def receiving(sender: str, transfer: str, message: Transfer | Convert, plan: Plan, now: datetime) -> FollowUp:
    """What brings a transfer, or what a lead had, to its recipient; the same each time it is made.

    :param transfer: the transfer's operation id.
    :param plan: which lots gave how many micro-credits.
    :param now: when it was applied.
    """
    more: dict[str, Any] = {}
    if isinstance(message, Convert):
        more["from_lead"] = True
    elif message.message is not None:
        more["message"] = message.message
    return FollowUp(
        Receive.operation,
        receiving_id(sender, transfer),
        {
            "account": message.to,
            "sender": sender,
            "transfer": transfer,
            "lots": [parcel_of(grant, taken, now) for grant, taken in plan],
            **more,
            "v": VERSION,
        },
    )


def parcel_of(grant: Grant, amount_micro: int, now: datetime | None = None) -> dict[str, Any]:
    """Credits of a lot as :class:`creditlane.contract.Parcel` on the wire.

    :param now: given where the lot may not have begun yet.
    """
    parcel: dict[str, Any] = {
        "source": grant.source, "amount": format_amount(amount_micro), "priority": grant.priority,
    }  # fmt: skip
    if grant.expires_at is not None:
        parcel["expires_at"] = grant.expires_at
    if grant.price_per is not None:
        parcel["unit_price"] = {
            "minor": grant.price_minor, "currency": grant.price_currency, "per": format_amount(grant.price_per),
        }  # fmt: skip
    if grant.features is not None:
        parcel["features"] = sorted(grant.features)
    if now is not None and grant.effective_at > now:
        parcel["effective_at"] = grant.effective_at
    return parcel


def _concluded(name: str, message: Receive, **details: str) -> FollowUp:
    """What tells the sender how its transfer ended."""
    arguments = {"account": message.sender, "transfer": message.transfer, **details, "v": VERSION}
    return FollowUp(name, concluding_id(message.sender, message.transfer), arguments)


def _refused(message: Receive, operation: str, code: Code) -> Sequence[FollowUp]:
    """The recipient cannot take the credits: they go back. What is no transfer's own message changes nothing."""
    if operation != receiving_id(message.sender, message.transfer):
        return ()
    return [_concluded(Bounce.operation, message, refused=code.value)]


def _repeated(message: Receive, operation: str, code: Code | None) -> Sequence[FollowUp]:
    """The sender is told again how it ended: what told it before may be lost."""
    return [_concluded(Confirm.operation, message)] if code is None else _refused(message, operation, code)


def _of_lead(message: Receive) -> Sequence[Need]:
    return (Need("allowance", LEADS), Need("allowance", LEAD + message.sender)) if message.from_lead else ()


@operation(Receive, need=_of_lead, refused=_refused, repeated=_repeated)
def receive(account: Account, message: Receive, context: Context) -> Outcome:
    """Add a lot for each one that the sender gave, of its source, priority, expiry, unit price, features and start.

    A debt is paid out of them first, as with a grant; what expired on its way lapses at once. Refusals, which send
    the credits back: ``unknown_account``, ``account_closed``; ``limit_reached``, also for one lead more than a user may
    have been; ``invalid`` for a lead's credits where there is no user, and under another id than the transfer's.
    """
    if context.operation != receiving_id(message.sender, message.transfer):
        raise RefusedError(Code.INVALID, "only the ledger itself sends this, under an id that it derives")
    if message.from_lead and account.kind != "user":
        raise RefusedError(Code.INVALID, f"a lead becomes a user, and this account is a {account.kind}")
    is_counted = message.from_lead and context.catalog.lead.per_user is not None
    if is_counted:
        _check_lead(account, message.sender, context)
    uses = take_in(account, message.lots, context)
    if is_counted:
        _count_lead(account, message.sender, context)
    details = {"sender": message.sender, "transfer": message.transfer}
    return Outcome(uses=uses, details=details, follow=[_concluded(Confirm.operation, message)])


def _check_lead(account: Account, lead: str, context: Context) -> None:
    """Refuse one lead more than a user may have been; what follows of one that it was comes in.

    :raises RefusedError: ``limit_reached``.
    """
    most, zone = context.catalog.lead.per_user, context.catalog.catalog.zone
    been = used_in(account, LEADS, "total", context.now, zone)[1]
    if most is not None and been >= most and LEAD + lead not in account.allowances:
        raise RefusedError(Code.LIMIT_REACHED, f"a user may have been {most} leads, and this one has")


def _count_lead(account: Account, lead: str, context: Context) -> None:
    if LEAD + lead not in account.allowances:
        for key in (LEADS, LEAD + lead):
            count(account, key, "total", 0, context.now, context.catalog.catalog.zone)


def take_in(account: Account, lots: Sequence[Parcel], context: Context) -> Plan:
    """Add a lot for each one that somebody gave, as :func:`receive` says.

    :returns: the new lots, with their micro-credits.
    :raises RefusedError: ``limit_reached``, before anything was changed.
    """
    if account.open_grants() + len(lots) > MAX_OPEN_GRANTS:
        raise RefusedError(Code.LIMIT_REACHED, f"the account may have {MAX_OPEN_GRANTS} grants with credits left")
    check_room(account, sum(lot.amount for lot in lots))
    uses = []
    for lot in lots:
        price = lot.unit_price
        grant = new_grant(
            account,
            source=lot.source,
            priority=lot.priority,
            features=None if lot.features is None else frozenset(lot.features),
            effective_at=lot.effective_at,
            expires_at=lot.expires_at,
            now=context.now,
            operation=context.operation,
            price=(None, None, None) if price is None else (price.minor, price.currency, int(price.per)),
        )
        amount = int(lot.amount)
        post(account, grant, "received", amount, context.now, context.operation)
        if lot.expires_at is not None and lot.expires_at <= context.now:
            post(account, grant, "expired", amount, context.now, context.operation)
        else:
            pay_debt(account, grant, amount, context.now, context.operation)
        uses.append((grant, amount))
    came_in(account, context.now)
    return uses


@operation(Confirm, need=lambda message: (Need("transfer", message.transfer),), concludes=True)
def confirm(account: Account, message: Confirm, context: Context) -> Outcome:
    """The recipient has the credits: they are no longer in transit, but sent.

    Refusals: ``unknown_transfer``; ``invalid`` under another id than the transfer's.
    """
    uses = []
    for line in _sent_out(account, message.transfer, context).lines or ():
        grant = account.grants[line.grant]
        post(account, grant, "sent", line.taken, context.now, context.operation, message.transfer)
        uses.append((grant, line.taken))
    return Outcome(uses=uses, details={"transfer": message.transfer})


@operation(Bounce, need=lambda message: (Need("transfer", message.transfer),), concludes=True)
def bounce(account: Account, message: Bounce, context: Context) -> Outcome:
    """The recipient could not take the credits: they go back to their lots, in reverse order of taking.

    What has expired meanwhile lapses at once; what comes back pays debt first (ledger rules: release, claw-back). A
    lead whose user could not take them is open again, unless it was converted to another meanwhile. Refusals:
    ``unknown_transfer``; ``invalid`` under another id than the transfer's.
    """
    uses = []
    begun = _sent_out(account, message.transfer, context)
    for line in reversed(begun.lines or ()):
        grant = account.grants[line.grant]
        come_back(account, grant, "bounced", line.taken, context.now, context.operation, message.transfer)
        uses.append((grant, line.taken))
    if begun.name == Convert.operation and account.converted_to == _recipient(begun):
        account.status, account.converted_to = OPEN, None
    details = {"transfer": message.transfer, "refused": message.refused}
    return Outcome(-sum(taken for _, taken in uses), uses, details=details)


def _sent_out(account: Account, transfer: str, context: Context) -> Known:
    """A transfer of this account, or its conversion, with what it took from where.

    :raises RefusedError: ``unknown_transfer``, ``invalid``.
    """
    known = account.known.get(transfer)
    if known is None or known.name not in TRANSFERS or not known.lines:
        raise RefusedError(Code.UNKNOWN_TRANSFER)
    if context.operation != concluding_id(account.account, transfer):
        raise RefusedError(Code.INVALID, "only the ledger itself sends this, under an id that it derives")
    return known


def _recipient(begun: Known) -> str:
    message = begun.message
    if message is None:
        assert begun.arguments is not None
        message = decode_message(begun.name, begun.arguments)
    assert isinstance(message, Transfer | Convert)
    return message.to
