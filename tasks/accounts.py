"""Accounts: open one, let its time pass."""

from __future__ import annotations

from datetime import timedelta

from creditlane.codes import Code
from creditlane.contract import Open, Settle
from models.rules.burning import new_grant
from models.rules.catalog import Welcome
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import OPEN, UNOPENED, Account
from tasks.operation import Context, Outcome, operation


@operation(Open, opens=True)
def open_account(account: Account, message: Open, context: Context) -> Outcome:
    """Create the account, and give a user or a lead what the catalog welcomes them with.

    A pool starts empty. Refusals: ``account_exists``. (ledger rules: operations, open)
    """
    if account.status != UNOPENED:
        raise RefusedError(Code.ACCOUNT_EXISTS)
    account.status = OPEN
    account.kind = message.kind
    account.email = message.email
    account.locale = message.locale
    account.timezone = message.timezone
    account.opened_at = context.now
    account.is_dirty = True
    welcome = {"user": context.catalog.signup, "lead": context.catalog.lead}.get(message.kind, Welcome())
    if not welcome.credits:
        return Outcome()
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
    return Outcome(uses=[(grant, amount)])


@operation(Settle)
def settle(account: Account, message: Settle, context: Context) -> Outcome:
    """Nothing of its own: every operation settles its account before it is applied.

    Refusals: ``unknown_account``. (ledger rules: settling)
    """
    return Outcome()
