"""Grants: add a lot, adjust by hand, take a lot back."""

from __future__ import annotations

from datetime import timedelta

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import Adjust, Grant, Revoke
from models.rules.burning import Plan, burn, check_room, new_grant, pay_debt, plan_burn
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import MAX_OPEN_GRANTS, Account
from models.rules.state import Grant as Lot
from tasks.consuming import insufficient
from tasks.operation import Context, Need, Outcome, operation

ADJUSTMENT = "adjustment"
"""The source of credits that an administrator added."""


@operation(Grant)
def grant(account: Account, message: Grant, context: Context) -> Outcome:
    """Add a lot of credits; a debt is paid out of it first.

    ``amount`` in credits; ``expires_in`` in seconds from when it takes effect; ``priority`` from the
    catalog's source unless sent. Refusals: ``invalid`` (it would end before it starts, or has ended),
    ``limit_reached``. (ledger rules: operations, grant; claw-back)
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
        raise insufficient(context, -amount, missing)
    burn(account, plan, "revoked", context.now, context.operation)
    for lot, taken in plan:
        lot.clawed_back += taken  # so that a later revocation of the lot does not take it twice
    return Outcome(charged=-amount, uses=plan)


def _revoke_need(message: Revoke) -> Need:
    if message.grant is not None:
        return Need("grant", message.grant)
    assert message.purchase is not None
    return Need("purchase", message.purchase)


@operation(Revoke, need=_revoke_need)
def revoke(account: Account, message: Revoke, context: Context) -> Outcome:
    """Take back a grant's or a purchase's credits, never those of others.

    Without an amount, all that it was worth and that was not taken back yet. What was spent (or is held)
    becomes debt, or is forgiven, as the catalog says; what expired is gone and owes nothing. Refusals:
    ``unknown_grant``, ``exceeds_original``. (ledger rules: claw-back)
    """
    lots = [lot for lot in account.grants.values() if _is_meant(lot, message)]
    if not lots:
        raise RefusedError(Code.UNKNOWN_GRANT)
    lots.sort(key=lambda lot: lot.key, reverse=True)
    worth = sum(lot.granted + lot.received - lot.expired - lot.clawed_back for lot in lots)
    revocable = max(0, worth)
    wanted = revocable if message.amount is None else int(message.amount)
    if wanted > revocable or not wanted:
        raise RefusedError(
            Code.EXCEEDS_ORIGINAL, f"at most {format_amount(revocable)} credits can be taken back from it"
        )
    taken: Plan = []
    for lot in lots:
        amount = min(lot.available, wanted)
        if amount:
            post(account, lot, "revoked", amount, context.now, context.operation)
            lot.clawed_back += amount
            wanted -= amount
            taken.append((lot, amount))
    if not wanted:
        return Outcome(charged=sum(amount for _, amount in taken), uses=taken)
    # What is left of it was spent or is held. It is owed by the first lot, the one that the others continue.
    first = min(lots, key=lambda lot: lot.id)
    first.clawed_back += wanted
    first.is_dirty = account.is_dirty = True
    if context.catalog.clawback.on_spent == "forgive":
        first.forgiven += wanted
        details = {"forgiven": format_amount(wanted)}
    else:
        post(account, first, "debt_incurred", wanted, context.now, context.operation)
        details = {"owed": format_amount(wanted)}
    return Outcome(charged=sum(amount for _, amount in taken), uses=taken, details=details)


def _is_meant(lot: Lot, message: Revoke) -> bool:
    """Whether a revocation names this lot, its purchase, or the lot that it continues."""
    if message.grant is not None:
        return message.grant in (lot.id, lot.origin)
    return lot.purchase == message.purchase


def check_grant_limit(account: Account) -> None:
    """Refuse one more lot to an account that has :data:`MAX_OPEN_GRANTS`."""
    if account.open_grants() >= MAX_OPEN_GRANTS:
        raise RefusedError(Code.LIMIT_REACHED, f"the account has {MAX_OPEN_GRANTS} grants with credits left")


def credit(account: Account, lot: Lot, amount_micro: int, context: Context) -> Outcome:
    """Post new credits to a new lot, and pay the account's debt out of it."""
    post(account, lot, "granted", amount_micro, context.now, context.operation)
    pay_debt(account, lot, context.now, context.operation)
    return Outcome(uses=[(lot, amount_micro)], details={"grant": lot.id})
