"""Grants: add a lot, adjust by hand, take a lot back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import Adjust, Grant, Revoke
from models.rules.burning import Plan, burn, came_in, check_room, new_grant, plan_burn
from models.rules.claw_back import TakenBack, bought_with, come_due, families_of, take_back, worth_in_all
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import MAX_OPEN_GRANTS, Account
from models.rules.state import Grant as Lot
from tasks.consuming import insufficient
from tasks.operation import Context, Need, Outcome, operation
from tasks.referrals import may_be_purchase, purchase_needs

ADJUSTMENT = "adjustment"
"""The source of credits that an administrator added."""


@operation(Grant, need=purchase_needs)
@may_be_purchase
def grant(account: Account, message: Grant, context: Context) -> Outcome:
    """Add a lot of credits; a debt is paid out of it first.

    ``amount`` in credits; ``expires_in`` in seconds from when it takes effect; ``priority`` from the
    catalog's source unless sent. With a ``purchase`` it may be what a referral's bonus waits for. Refusals:
    ``invalid`` (it would end before it starts, or has ended), ``limit_reached``.
    (ledger rules: operations, grant; claw-back)
    """
    effective_at = message.effective_at or context.now
    expires_at = message.expires_at
    if message.expires_in is not None:
        expires_at = effective_at + timedelta(seconds=message.expires_in)
    if expires_at is not None and expires_at <= max(effective_at, context.now):
        raise RefusedError(Code.INVALID, "expires_at is not after the grant's start and the present")
    check_grant_limit(account)
    check_room(account, int(message.amount))
    price = message.unit_price
    lot = new_grant(
        account,
        source=message.source,
        priority=context.catalog.priority_of(message.source) if message.priority is None else message.priority,
        features=None if message.features is None else frozenset(message.features),
        effective_at=effective_at,
        expires_at=expires_at,
        now=context.now,
        operation=context.operation,
        purchase=message.purchase,
        price=(None, None, None) if price is None else (price.minor, price.currency, int(price.per)),
    )
    return credit(account, lot, int(message.amount), context)


@operation(Adjust)
def adjust(account: Account, message: Adjust, context: Context) -> Outcome:
    """Add credits, or take some away in burn-down order, by hand of a named administrator.

    Refusals: ``insufficient_credits`` for a minus over the unscoped balance, ``limit_reached``.
    (ledger rules: operations, adjust)
    """
    amount = int(message.amount)
    if amount > 0:
        check_grant_limit(account)
        check_room(account, amount)
        lot = new_grant(
            account,
            source=ADJUSTMENT,
            priority=context.catalog.priority_of(ADJUSTMENT),
            now=context.now,
            operation=context.operation,
        )
        return credit(account, lot, amount, context)
    plan, missing = plan_burn(account, -amount, None, context.now)
    if missing:
        raise insufficient(account, context, -amount, missing)
    burn(account, plan, "revoked", context.now, context.operation)
    taken_by_hand(account, plan)
    return Outcome(charged=-amount, uses=plan)


def taken_by_hand(account: Account, plan: Plan) -> None:
    """Note what an administrator took of lots, so that a later revocation of them does not take it twice."""
    for lot, taken in plan:
        root = account.grants[lot.family]
        root.clawed_back += taken
        root.is_dirty = True


def _revoke_need(message: Revoke) -> Sequence[Need]:
    if message.grant is not None:
        return (Need("grant", message.grant),)
    assert message.purchase is not None
    return (Need("purchase", message.purchase),)


@operation(Revoke, need=_revoke_need)
def revoke(account: Account, message: Revoke, context: Context) -> Outcome:
    """Take back a grant's or a purchase's credits, never those of others.

    Without an amount, all that it was worth and that was not taken back yet. What was spent, given away or is
    held becomes debt, or is forgiven, as the catalog says; what expired is gone and owes nothing. Refusals:
    ``unknown_grant``, ``exceeds_original``. (ledger rules: claw-back)
    """
    if message.grant is not None:
        named = account.grants.get(message.grant)
        families = families_of(account, [] if named is None else [account.grants[named.family]])
    else:
        assert message.purchase is not None
        families = bought_with(account, message.purchase)
    if not families:
        raise RefusedError(Code.UNKNOWN_GRANT)
    revocable = worth_in_all(families)
    wanted = revocable if message.amount is None else int(message.amount)
    if wanted > revocable or not wanted:
        raise RefusedError(
            Code.EXCEEDS_ORIGINAL, f"at most {format_amount(revocable)} credits can be taken back from it"
        )
    taken = take_back(account, families, wanted, context.now, context.operation, context.catalog)
    return Outcome(charged=sum(amount for _, amount in taken.plan), uses=taken.plan, details=told(taken))


def told(taken: TakenBack) -> dict[str, str]:
    """The fields of a result that tell what became of that which was not there to be taken."""
    return {taken.kind: format_amount(taken.away_micro)} if taken.away_micro else {}


def check_grant_limit(account: Account) -> None:
    """Refuse one more lot to an account that has :data:`MAX_OPEN_GRANTS`."""
    if account.open_grants() >= MAX_OPEN_GRANTS:
        raise RefusedError(Code.LIMIT_REACHED, f"the account has {MAX_OPEN_GRANTS} grants with credits left")


def credit(account: Account, lot: Lot, amount_micro: int, context: Context) -> Outcome:
    """Post new credits to a new lot; what is to be away of its purchase is taken, and the account's debt paid."""
    post(account, lot, "granted", amount_micro, context.now, context.operation)
    taken = come_due(account, lot, context.now, context.operation, context.catalog)
    came_in(account, context.now)
    details = {"grant": lot.id} | ({"taken_back": format_amount(taken)} if taken else {})
    return Outcome(uses=[(lot, amount_micro)], details=details)
