"""Consuming: price a feature and burn the credits; give them back."""

from __future__ import annotations

from typing import Any

from creditlane.amounts import MAX_MICRO, format_amount
from creditlane.codes import Code
from creditlane.contract import Capture, Charge, Consume, Refund
from models.rules.burning import burn, check_room, plan_burn, restore_consumed
from models.rules.catalog import price_of
from models.rules.refusal import RefusedError
from models.rules.state import MAX_OPEN_GRANTS, Account
from tasks.operation import Context, Need, Outcome, operation
from tasks.pools import admitted, check_limit, counted, limit_shortage, uncount, want_code

CHARGES = Consume.operation, Capture.operation
"""What can be refunded."""


@operation(Consume, spends=True)
def consume(account: Account, message: Consume, context: Context) -> Outcome:
    """Charge a feature times a quantity, or an explicit amount in credits.

    Priced by the catalog in force now, paid by the grants that are live now. ``partial`` takes what there
    is, if it is not enough. A member of a pool is charged up to its limit. Refusals: ``unknown_feature``,
    ``unknown_member``; ``member_limit``, then ``insufficient_credits``, or ``pool_exhausted`` for a member of a
    pool (with ``partial``: only when there is nothing to take). (ledger rules: burn-down order, feature prices, pools)
    """
    cost, quantity = cost_of(account, message, context)
    standing = admitted(account, message.member, context)
    asked = cost
    if standing is not None:
        if message.partial and standing.left:
            asked = min(cost, standing.left)  # what its limit leaves is the most that can be taken in part
        check_limit(standing, asked, context)
    plan, missing = plan_burn(account, asked, message.feature, context.now)
    if missing and not (message.partial and plan):
        raise insufficient(account, context, cost, missing + cost - asked, message.member)
    charged = asked - missing
    receipt = burn(account, plan, "consumed", context.now, context.operation)
    details = shortage(account, context, cost, cost - charged) if missing else None
    if standing is not None:
        if asked < cost and not missing:
            details = limit_shortage(standing, cost, context)
        details = {**(details or {}), **counted(account, standing, charged, context)}
    return Outcome(charged, plan, receipt, details, quantity, message.feature)


@operation(Refund, need=lambda message: (Need("charge", message.charge),), returns=True)
def refund(account: Account, message: Refund, context: Context) -> Outcome:
    """Give back all, or ``amount`` credits, of a consume or a capture, in reverse order of taking.

    Never more than was taken in total. To a grant that has expired meanwhile: into a new one that lives the
    catalog's ``refund_days``. Refusals: ``unknown_charge``, ``exceeds_original``, ``limit_reached``.
    (ledger rules: refund)
    """
    charge = account.known.get(message.charge)
    if charge is None or charge.lines is None or charge.name not in CHARGES:
        raise RefusedError(Code.UNKNOWN_CHARGE)
    returned = sum(line.returned for line in charge.lines)
    left = sum(line.taken for line in charge.lines) - returned
    amount = left if message.amount is None else int(message.amount)
    if amount > left or not left:
        raise RefusedError(Code.EXCEEDS_ORIGINAL, f"{format_amount(left)} credits of this charge are left to give back")
    check_room(account, amount)
    # Each line of the charge may need a lot of its own, if the one it was taken from has expired.
    if account.open_grants() + len(charge.lines) > MAX_OPEN_GRANTS:
        raise RefusedError(Code.LIMIT_REACHED, f"the account may have {MAX_OPEN_GRANTS} grants with credits left")
    uses = restore_consumed(
        account,
        charge.lines,
        amount,
        context.now,
        context.operation,
        message.charge,
        context.catalog.refunds.refund_days,
    )
    charge.is_dirty = True
    if account.allowances:
        uncount(account, charge.result, returned, amount)
    return Outcome(charged=-amount, uses=uses)


def cost_of(account: Account, message: Charge, context: Context) -> tuple[int, int | None]:
    """What a consume or hold costs, in micro-credits, and its quantity in millionths (none for an amount).

    To the subscriber of an unlimited plan nothing; it is counted all the same (ledger rules: unlimited plans).

    :raises RefusedError: ``unknown_feature``; ``invalid`` when the price goes over the largest amount.
    """
    if message.amount is not None:
        return 0 if account.is_unlimited else int(message.amount), None
    assert message.feature is not None
    assert message.quantity is not None
    quantity = int(message.quantity)
    return feature_cost(account, message.feature, quantity, context), quantity


def feature_cost(account: Account, feature: str, quantity_micro: int, context: Context) -> int:
    """What so much of a feature costs an account, in micro-credits: the catalog's price, or nothing.

    :raises RefusedError: as :func:`cost_of`.
    """
    priced = context.catalog.features.get(feature)
    if priced is None:
        raise RefusedError(Code.UNKNOWN_FEATURE)
    cost = price_of(priced, quantity_micro)
    if cost > MAX_MICRO:
        raise RefusedError(Code.INVALID, "this quantity costs more than the largest amount")
    return 0 if account.is_unlimited else cost


def shortage(account: Account, context: Context, required: int, missing: int) -> dict[str, Any]:
    """The fields of a result that say what was wanting and what pack or plan would cover it; amounts in credits."""
    fields: dict[str, Any] = {
        "required": format_amount(required),
        "available": format_amount(required - missing),
        "shortfall": format_amount(missing),
    }
    subscription = account.subscription
    rank = subscription.terms.rank if subscription is not None and subscription.is_active else (False, 0)
    offer = context.catalog.cheapest_offer(missing, rank, context.now)
    if offer is not None:
        fields["offer"] = offer
    return fields


def insufficient(
    account: Account, context: Context, required: int, missing: int, member: str | None = None
) -> RefusedError:
    """The refusal for want of credits (ledger rules: refusals).

    :param member: who was to be charged; of a pool it is told that the pool's balance was wanting, not its limit.
    """
    return RefusedError(want_code(account, member), **shortage(account, context, required, missing))
