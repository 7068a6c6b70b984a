"""Accounts: open one, let its time pass."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from creditlane.codes import Code
from creditlane.contract import Open, Settle
from models.rules.burning import Plan, came_in, new_grant
from models.rules.catalog import Welcome
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import OPEN, UNOPENED, Account
from tasks.leads import converting
from tasks.operation import Context, FollowUp, Need, Outcome, operation
from tasks.plans import begin
from tasks.referrals import claim_with_opening


def _need(message: Open) -> Sequence[Need]:
    return () if message.referral_code is None else (Need("code", message.referral_code),)


def _repeated(message: Open, operation: str, code: Code | None) -> Sequence[FollowUp]:
    """The lead is told again whom it has become: what told it before may be lost."""
    return _converted(message) if code is None else ()


@operation(Open, need=_need, opens=True, repeated=_repeated)
def open_account(account: Account, message: Open, context: Context) -> Outcome:
    """Create the account, and give a user or a lead what the catalog welcomes them with, unless told not to.

    A pool starts empty. A ``plan`` begins at once. What the ``lead`` has left that it was follows by a
    ``credits.convert`` in that one's lane; if that is refused, the account stays open. A ``referral_code`` is claimed,
    and never keeps an account from being opened: the details tell ``referral``, ``claimed`` or the code that a
    ``referrals.claim`` would be refused with. Refusals: ``account_exists``, ``unknown_plan``.
    (ledger rules: operations, open)
    """
    if account.status != UNOPENED:
        raise RefusedError(Code.ACCOUNT_EXISTS)
    terms = None if message.plan is None else context.catalog.terms_of(message.plan)
    if message.plan is not None and terms is None:
        raise RefusedError(Code.UNKNOWN_PLAN)
    account.status = OPEN
    account.kind = message.kind
    account.email = message.email
    account.locale = message.locale
    account.timezone = message.timezone
    account.opened_at = context.now
    account.is_dirty = True
    uses = _welcome(account, message, context)
    details = None if terms is None else begin(account, terms, None, context).details
    outcome = Outcome(uses=uses, details=details, follow=_converted(message))
    if message.referral_code is None:
        return outcome
    return claim_with_opening(account, message.referral_code, outcome, context)


def _converted(message: Open) -> Sequence[FollowUp]:
    return () if message.lead is None else (converting(message.lead, message.account),)


def _welcome(account: Account, message: Open, context: Context) -> Plan:
    """Give what the catalog welcomes a user or a lead with."""
    welcome = {"user": context.catalog.signup, "lead": context.catalog.lead}.get(message.kind, Welcome())
    if not welcome.credits or not message.welcome:
        return []
    expires_at = None
    if welcome.expires_days is not None:
        expires_at = context.now + timedelta(days=welcome.expires_days)
    grant = new_grant(
        account,
        source=welcome.source,
        priority=context.catalog.priority_of(welcome.source),
        expires_at=expires_at,
        now=context.now,
        operation=context.operation,
    )
    amount = int(welcome.credits)
    post(account, grant, "granted", amount, context.now, context.operation)
    came_in(account, context.now)
    return [(grant, amount)]


@operation(Settle)
def settle(account: Account, message: Settle, context: Context) -> Outcome:
    """Nothing of its own: every operation settles its account before it is applied.

    Refusals: ``unknown_account``. (ledger rules: settling)
    """
    return Outcome()
