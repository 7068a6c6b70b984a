"""Every operation by its task name. Adding one touches its module, its test and the contract table."""

from __future__ import annotations

from tasks.accounts import open_account, settle
from tasks.by_hand import close, freeze, reopen, thaw
from tasks.claw_back import claw_back
from tasks.codes import conclude, issue, redeem, withdraw
from tasks.consuming import consume, refund
from tasks.grants import adjust, grant, revoke
from tasks.holds import capture, hold, release
from tasks.leads import convert
from tasks.operation import Operation
from tasks.plans import cancel, change, renew_on_payment, subscribe, undo
from tasks.pools import remove_member, set_member
from tasks.referrals import claim, issue_referral, reward
from tasks.transfers import bounce, confirm, receive, transfer

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        open_account, grant, consume, hold, capture, release, refund, adjust, revoke, claw_back, settle, transfer,
        receive, confirm, bounce, convert, freeze, thaw, close, reopen, issue, redeem, withdraw, conclude, set_member,
        remove_member, issue_referral, claim, reward, subscribe, change, cancel, renew_on_payment, undo,
    )
}  # fmt: skip
