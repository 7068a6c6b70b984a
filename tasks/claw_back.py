"""Claw-back by state: how much of a purchase's money is away from the seller, and what of its credits is with it."""

from __future__ import annotations

from creditlane.amounts import format_amount
from creditlane.contract import ClawBack
from models.rules.claw_back import give_back_what_is_over, take_what_is_due, thaw
from models.rules.state import Account, Purchase
from tasks.grants import told
from tasks.operation import Context, Need, Outcome, operation


@operation(ClawBack, need=lambda message: (Need("purchase", message.purchase),), concludes=True)
def claw_back(account: Account, message: ClawBack, context: Context) -> Outcome:
    """Bring what was taken of a purchase's credits to the share of its money that is away, and freeze or thaw the rest.

    ``paid_minor`` and ``returned_minor`` in minor units of ``currency``: they say what is so, not what changed, so of
    two messages the one of the higher ``step`` holds, and the other changes nothing. More away than before: taken as a
    revocation takes. Less: exactly what was taken goes back, the last first; never what a revocation took. A purchase
    without lots is remembered: those to come are brought to the share at once. Refusals: ``unknown_account``.
    (ledger rules: claw-back)
    """
    purchase = account.purchases.get(message.purchase)
    if purchase is not None and message.step <= purchase.step:
        return Outcome()
    was_frozen = purchase is not None and purchase.is_frozen
    if purchase is None:
        purchase = account.purchases[message.purchase] = Purchase(message.purchase, 0, 0, 0, None, False)
    purchase.step = message.step
    purchase.paid_minor = message.paid_minor
    purchase.returned_minor = message.returned_minor
    purchase.currency = message.currency
    purchase.is_frozen = message.frozen
    purchase.is_dirty = account.is_dirty = True
    now, operation = context.now, context.operation
    first = len(account.entries)
    taken = take_what_is_due(account, purchase, now, operation, context.catalog)
    uses, restored = taken.plan, 0
    if not (taken.plan or taken.away_micro):
        refund_days = context.catalog.refunds.refund_days
        uses, restored = give_back_what_is_over(account, purchase, now, operation, refund_days)
    if was_frozen and not purchase.is_frozen:
        thaw(account, purchase.purchase, now, operation)
    details = told(taken)
    if restored:
        details["restored"] = format_amount(restored)
    if was_frozen != purchase.is_frozen:
        left = sum(lot.available for lot in account.order if lot.purchase == purchase.purchase)
        details["frozen" if purchase.is_frozen else "thawed"] = format_amount(left)
    signs = {"revoked": 1, "reinstated": -1}
    charged = sum(signs.get(entry.kind, 0) * entry.amount_micro for entry in account.entries[first:])
    return Outcome(charged=charged, uses=uses, details=details)
