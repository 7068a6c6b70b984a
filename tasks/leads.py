"""Leads: what one has left becomes its user's (ledger rules: operations, convert).

``credits.convert`` closes the lead and sends its credits to the user as a transfer does: ``credits.receive`` in the
user's lane, ``credits.confirm`` or ``credits.bounce`` in the lead's (see ``tasks/transfers.py``). What comes to a lead
after that, out of a hold that it had, as a refund or as a purchase that is heard of late, follows by a
``credits.convert`` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from creditlane.codes import Code
from creditlane.contract import VERSION, Convert, converting_id
from models.rules.burning import Plan, burn, pay_with
from models.rules.refusal import RefusedError
from models.rules.state import CLOSED, Account
from tasks.operation import Context, FollowUp, Need, Outcome, operation
from tasks.plans import stop
from tasks.transfers import receiving

MAX_FEATURES_BYTES = 256 * 1024
"""What the features of the lots of one message may take in all: with all else of 1,000 lots it is below 1 MiB."""


@operation(Convert, need=lambda _: (Need("subscription", ""),), concludes=True, spends=True)
def convert(account: Account, message: Convert, context: Context) -> Outcome:
    """Send all that a lead has left to the user ``to``, and close the lead.

    Of all lots, also promotional, scoped and upcoming ones, of their source, priority, expiry, unit price, features and
    start; those of a purchase that is disputed follow when it is thawed. A debt is paid out of them first. Its plan is
    cancelled: what is paid for is given to its end, and follows. To the same user again: what is there by then.
    Refusals: ``account_closed``, ``account_frozen``, ``already_converted`` (to another; with ``converted_to``),
    ``invalid`` for what is no lead.
    """
    if account.converted_to not in (None, message.to):
        raise RefusedError(Code.ALREADY_CONVERTED, converted_to=account.converted_to)
    if account.status == CLOSED and account.converted_to is None:
        raise RefusedError(Code.ACCOUNT_CLOSED)
    if account.kind != "lead":
        raise RefusedError(Code.INVALID, f"the account is a {account.kind}: only a lead is converted")
    for lot, available in leaving(account, context.now):
        pay_with(account, lot, available, context.now, context.operation)
    plan = _together(leaving(account, context.now))
    receipt = burn(account, plan, "transferred", context.now, context.operation)
    subscription = account.subscription
    if account.converted_to is None and subscription is not None and subscription.is_active:
        stop(account, subscription, context, at_once=False)
    account.status, account.converted_to = CLOSED, message.to
    account.is_dirty = True
    follow = [receiving(account.account, context.operation, message, plan, context.now)] if plan else []
    return Outcome(sum(taken for _, taken in plan), plan, receipt, {"to": message.to}, follow=follow)


def _together(plan: Plan) -> Plan:
    """As many of these lots as fit one message; the rest follows (see :func:`following`)."""
    room = MAX_FEATURES_BYTES
    for place, (lot, _) in enumerate(plan):
        room -= sum(len(feature.encode()) + 3 for feature in lot.features or ())
        if room < 0 and place:
            return plan[:place]
    return plan


def converting(lead: str, to: str, after: str | None = None) -> FollowUp:
    """What converts a lead that was named as its user's account was opened; the same each time it is made.

    :param after: the lead's operation by which credits came to it later, which follow.
    """
    arguments = {"account": lead, "to": to, **({} if after is None else {"after": after}), "v": VERSION}
    return FollowUp(Convert.operation, converting_id(lead, to, after), arguments)


def following(lead: Account, operation: str, now: datetime) -> Sequence[FollowUp]:
    """What follows from any operation of a lead that was converted: credits that came to it go after the others."""
    if lead.converted_to is None or not leaving(lead, now):
        return ()
    return (converting(lead.account, lead.converted_to, operation),)


def leaving(lead: Account, now: datetime) -> Plan:
    """The lots of a lead that go with it, in burn-down order: what has not ended, but for disputed purchases."""
    frozen = lead.frozen
    return [
        (lot, lot.available)
        for lot in lead.order
        if lot.available and lot.purchase not in frozen and (lot.expires_at is None or now < lot.expires_at)
    ]
