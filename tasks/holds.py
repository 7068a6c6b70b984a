"""Holds: set credits aside for work in progress, then take what it cost."""

from __future__ import annotations

from datetime import timedelta

from creditlane.codes import Code
from creditlane.contract import Capture, Hold, Release
from models.rules.burning import burn, plan_burn
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.settling import close_hold
from models.rules.state import FROZEN, MAX_OPEN_HOLDS, Account, Line
from models.rules.state import Hold as Reservation
from tasks.consuming import cost_of, feature_cost, insufficient
from tasks.operation import Context, Need, Outcome, operation
from tasks.pools import admitted, capture_counted, check_limit, counted, member_standing


@operation(Hold, spends=True)
def hold(account: Account, message: Hold, context: Context) -> Outcome:
    """Set the price of a feature, or an explicit amount in credits, aside for ``ttl`` seconds.

    A member of a pool has used it up from then on. Refusals: ``unknown_feature``, ``unknown_member``,
    ``limit_reached``; ``member_limit``, then ``insufficient_credits``, or ``pool_exhausted`` for a member of a pool.
    (ledger rules: hold, pools)
    """
    cost, quantity = cost_of(account, message, context)
    standing = admitted(account, message.member, context)
    if account.open_holds() >= MAX_OPEN_HOLDS:
        raise RefusedError(Code.LIMIT_REACHED, f"the account has {MAX_OPEN_HOLDS} open holds")
    if standing is not None:
        check_limit(standing, cost, context)
    plan, missing = plan_burn(account, cost, message.feature, context.now)
    if missing:
        raise insufficient(account, context, cost, missing, message.member)
    # Before the hold is there: a count that begins has what the member holds already.
    allowance = {} if standing is None else counted(account, standing, cost, context)
    reservation = Reservation(
        context.operation,
        cost,
        context.now + timedelta(seconds=message.ttl),
        context.now,
        message.feature,
        message.member,
        lines=burn(account, plan, "held", context.now, context.operation),
    )
    reservation.is_new = True
    account.holds[reservation.id] = reservation
    if account.next_due_at is None or reservation.expires_at < account.next_due_at:
        account.next_due_at = reservation.expires_at
    account.is_dirty = True
    details = {"hold": reservation.id, "expires_at": reservation.expires_at, **allowance}
    return Outcome(cost, plan, None, details, quantity, message.feature)


@operation(Capture, need=lambda message: (Need("hold", message.hold),), returns=True)
def capture(account: Account, message: Capture, context: Context) -> Outcome:
    """Take the final amount out of a hold: ``amount`` credits, ``quantity`` of its feature, or all of it.

    Less than held: the rest goes back in reverse order of taking. More: the extra is burnt as a consume of
    the same operation, all or nothing, and within the limit of a pool's member; a frozen account may not. Refusals:
    ``unknown_hold``, ``hold_closed``, ``unknown_feature`` and ``invalid`` (a quantity of a hold that names no
    feature); for what is more than held those of a hold. (ledger rules: capture, pools)
    """
    held = _open_hold(account, message.hold)
    quantity = None
    if message.quantity is not None:
        if held.feature is None:
            raise RefusedError(Code.INVALID, "the hold names no feature: capture an amount")
        quantity = int(message.quantity)
        final = feature_cost(account, held.feature, quantity, context)
    else:
        final = held.amount if message.amount is None else int(message.amount)
        if account.is_unlimited:
            final = min(final, held.amount)
    more = max(0, final - held.amount)
    if more and account.status == FROZEN:
        raise RefusedError(Code.ACCOUNT_FROZEN)
    standing = member_standing(account, held.member, context)
    if standing is not None:
        check_limit(standing, more, context)
    extra, missing = plan_burn(account, more, held.feature, context.now)
    if missing:
        raise insufficient(account, context, more, missing, held.member)
    allowance = {} if standing is None else capture_counted(account, standing, held, final, context)
    close_hold(account, held, context.now, context.operation, min(final, held.amount), "captured")
    receipt = []
    uses = []
    for line in held.lines:
        taken = line.taken - line.returned
        if taken:
            grant = account.grants[line.grant]
            post(account, grant, "captured", taken, context.now, context.operation, held.id)
            receipt.append(Line(line.grant, taken))
            uses.append((grant, taken))
    receipt += burn(account, extra, "consumed", context.now, context.operation, held.id)
    return Outcome(final, uses + extra, receipt, {"hold": held.id, **allowance}, quantity, held.feature)


@operation(Release, need=lambda message: (Need("hold", message.hold),), returns=True)
def release(account: Account, message: Release, context: Context) -> Outcome:
    """Give a hold back whole, in reverse order of taking; what has expired meanwhile lapses at once.

    Refusals: ``unknown_hold``, ``hold_closed``. (ledger rules: release)
    """
    held = _open_hold(account, message.hold)
    uses = [(account.grants[line.grant], line.taken) for line in held.lines]
    close_hold(account, held, context.now, context.operation, 0, "released")
    return Outcome(-held.amount, uses, None, {"hold": held.id}, None, held.feature)


def _open_hold(account: Account, hold: str) -> Reservation:
    held = account.holds.get(hold)
    if held is None:
        raise RefusedError(Code.UNKNOWN_HOLD)
    if held.status != "open":
        raise RefusedError(Code.HOLD_CLOSED, f"the hold is {held.status}")
    return held
