"""What an administrator does to an account: freeze it, thaw it, close it, open it again (ledger rules: operations).

Who and why stand in the arguments of each, and so in the account's history for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import ByHand, CloseAccount, FreezeAccount, ReopenAccount, ThawAccount
from models.rules.burning import burn
from models.rules.refusal import RefusedError
from models.rules.state import CLOSED, FROZEN, OPEN, Account
from tasks.grants import taken_by_hand
from tasks.operation import Context, Need, Outcome, operation
from tasks.plans import stop

SHOWN_HOLDS = 10
"""Open holds that a refusal to close an account names."""


@operation(FreezeAccount)
def freeze(account: Account, message: FreezeAccount, context: Context) -> Outcome:
    """Have the account give no credits out, nor begin anything that does.

    What brings credits in, or ends what was begun, goes on, and so do plans and time. Refusals: ``invalid`` when it is
    frozen already.
    """
    if account.status == FROZEN:
        raise RefusedError(Code.INVALID, "the account is frozen already")
    return _now(account, FROZEN)


def _of_referrals(_: ByHand) -> Sequence[Need]:
    """What was reached by referrals while the account could not be given it."""
    return (Need("referral", ""),)


@operation(ThawAccount, need=_of_referrals)
def thaw(account: Account, message: ThawAccount, context: Context) -> Outcome:
    """Let a frozen account spend again. Refusals: ``invalid`` when it is not frozen."""
    if account.status != FROZEN:
        raise RefusedError(Code.INVALID, "the account is not frozen")
    return _now(account, OPEN)


@operation(CloseAccount, need=lambda _: (Need("subscription", ""),))
def close(account: Account, message: CloseAccount, context: Context) -> Outcome:
    """End the account: its plan ends now, what is left of its credits is revoked as by an adjustment.

    What it owes it still owes. Refusals: ``invalid`` while holds are open or credits are in transit, saying which.
    """
    holds = sorted(hold.id for hold in account.holds.values() if hold.status == "open")
    if holds or account.in_transit:
        begun = [f"{len(holds)} open holds"] if holds else []
        begun += [f"{format_amount(account.in_transit)} credits in transit"] if account.in_transit else []
        reason = f"the account has {' and '.join(begun)}: let them end first, and withdraw its gift codes"
        raise RefusedError(Code.INVALID, reason, **({"open_holds": holds[:SHOWN_HOLDS]} if holds else {}))
    now = context.now
    expired = 0
    if account.subscription is not None and account.subscription.is_active:
        expired = stop(account, account.subscription, context, at_once=True)
    plan = [(lot, lot.available) for lot in account.order if lot.available]
    burn(account, plan, "revoked", now, context.operation)
    taken_by_hand(account, plan)
    outcome = _now(account, CLOSED)
    assert outcome.details is not None
    details = outcome.details | ({"expired": format_amount(expired)} if expired else {})
    return Outcome(sum(taken for _, taken in plan), plan, details=details)


@operation(ReopenAccount, need=_of_referrals, concludes=True)
def reopen(account: Account, message: ReopenAccount, context: Context) -> Outcome:
    """Take operations again for an account that was closed, as empty as it was closed.

    Refusals: ``already_converted`` for a lead that has become a user; ``invalid`` when it is not closed.
    """
    if account.converted_to is not None:
        raise RefusedError(Code.ALREADY_CONVERTED, converted_to=account.converted_to)
    if account.status != CLOSED:
        raise RefusedError(Code.INVALID, "the account is not closed")
    return _now(account, OPEN)


def _now(account: Account, status: str) -> Outcome:
    account.status = status
    account.is_dirty = True
    return Outcome(details={"account_status": status})
