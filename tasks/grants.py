"""Grants: add a lot, adjust by hand, take a lot back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import Adjust, Grant, Revoke
from models.rules.burning import Plan, burn, came_in, check_room, new_grant, pay_debt, plan_burn
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
        raise insufficient(account, context, -amount, missing)
    burn(account, plan, "revoked", context.now, context.operation)
    for lot, taken in plan:
        root = account.grants[lot.family]
        root.clawed_back += taken  # so that a later revocation of the lot does not take it twice
        root.is_dirty = True
    return Outcome(charged=-amount, uses=plan)


def _revoke_need(message: Revoke) -> Need:
    if message.grant is not None:
        return Need("grant", message.grant)
    assert message.purchase is not None
    return Need("purchase", message.purchase)


@operation(Revoke, need=_revoke_need)
def revoke(account: Account, message: Revoke, context: Context) -> Outcome:
    """Take back a grant's or a purchase's credits, never those of others.

    Without an amount, all that it was worth and that was not taken back yet. What was spent, given away or is
    held becomes debt, or is forgiven, as the catalog says; what expired is gone and owes nothing. Refusals:
    ``unknown_grant``, ``exceeds_original``. (ledger rules: claw-back)
    """
    families = _families(account, message)
    if not families:
        raise RefusedError(Code.UNKNOWN_GRANT)
    revocable = sum(worth_of(*family) for family in families)
    wanted = revocable if message.amount is None else int(message.amount)
    if wanted > revocable or not wanted:
        raise RefusedError(
            Code.EXCEEDS_ORIGINAL, f"at most {format_amount(revocable)} credits can be taken back from it"
        )
    taken, details = take_back(account, families, wanted, context)
    return Outcome(charged=sum(amount for _, amount in taken), uses=taken, details=details)


Family = tuple[Lot, list[Lot]]
"""A lot, and with it the lots that continue it because it had expired when its credits came back."""


def _families(account: Account, message: Revoke) -> list[Family]:
    """The lots that a revocation names, by family, the oldest first."""
    if message.grant is not None:
        named = account.grants.get(message.grant)
        roots = [] if named is None else [account.grants[named.family]]
    else:
        roots = [lot for lot in account.grants.values() if lot.purchase == message.purchase and lot.family == lot.id]
    roots.sort(key=lambda lot: lot.id)
    return [(root, [lot for lot in account.grants.values() if lot.family == root.id]) for root in roots]


def worth_of(root: Lot, lots: list[Lot]) -> int:
    """What of a family can still be taken back: not what expired unspent, nor what was taken back before."""
    came_in = sum(lot.granted + lot.received - lot.expired for lot in lots)
    return max(0, came_in - _carried(lots) - root.clawed_back)


def _carried(lots: list[Lot]) -> int:
    """What a family's lots carried to one another: it left one as it came into another."""
    return sum(lot.received for lot in lots if lot.origin is not None)


def take_back(
    account: Account, families: Sequence[Family], wanted: int, context: Context
) -> tuple[Plan, dict[str, str]]:
    """Take so many micro-credits out of families of lots, last burnt first; what is not there is owed, or forgiven.

    :param wanted: not more than they are worth together.
    :returns: which lots gave how many, and the fields of a result that tell of the rest.
    """
    worth = {root.id: worth_of(root, lots) for root, lots in families}
    taken: Plan = []
    by_burning = [(lot, root) for root, lots in families for lot in lots]
    for lot, root in sorted(by_burning, key=lambda pair: pair[0].key, reverse=True):
        amount = min(lot.available, worth[root.id], wanted)
        if amount:
            post(account, lot, "revoked", amount, context.now, context.operation)
            root.clawed_back += amount
            root.is_dirty = True
            worth[root.id] -= amount
            wanted -= amount
            taken.append((lot, amount))
    return taken, _owe(account, families, worth, wanted, context) if wanted else {}


def _owe(
    account: Account, families: Sequence[Family], worth: dict[int, int], wanted: int, context: Context
) -> dict[str, str]:
    """Book what was spent, or is set aside, as debt, or forgive it: on the families whose credits those are."""
    forgive = context.catalog.clawback.on_spent == "forgive"
    told = {"forgiven" if forgive else "owed": format_amount(wanted)}
    shares = dict.fromkeys(worth, 0)
    for root, lots in families:
        out = sum(lot.consumed + lot.held + lot.in_transit + lot.sent - lot.restored for lot in lots)
        away = out - _carried(lots) - root.forgiven
        shares[root.id] = min(max(0, away), worth[root.id], wanted)
        wanted -= shares[root.id]
    for root, _ in families:
        more = min(worth[root.id] - shares[root.id], wanted)
        wanted -= more
        share = shares[root.id] + more
        if not share:
            continue
        root.clawed_back += share
        root.is_dirty = account.is_dirty = True
        if forgive:
            root.forgiven += share
        else:
            post(account, root, "debt_incurred", share, context.now, context.operation)
    return told


def check_grant_limit(account: Account) -> None:
    """Refuse one more lot to an account that has :data:`MAX_OPEN_GRANTS`."""
    if account.open_grants() >= MAX_OPEN_GRANTS:
        raise RefusedError(Code.LIMIT_REACHED, f"the account has {MAX_OPEN_GRANTS} grants with credits left")


def credit(account: Account, lot: Lot, amount_micro: int, context: Context) -> Outcome:
    """Post new credits to a new lot, and pay the account's debt out of it."""
    post(account, lot, "granted", amount_micro, context.now, context.operation)
    pay_debt(account, lot, amount_micro, context.now, context.operation)
    came_in(account, context.now)
    return Outcome(uses=[(lot, amount_micro)], details={"grant": lot.id})
