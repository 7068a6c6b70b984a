"""Plans: subscribe, change, cancel, renew on payment, undo a renewal (ledger rules: subscriptions)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from creditlane.amounts import format_amount
from creditlane.codes import Code
from creditlane.contract import CancelPlan, ChangePlan, Paid, RenewPlan, Subscribe, UndoRenewal
from models.rules.burning import check_room, new_grant, pay_debt
from models.rules.calendar import add_months, month_start, months_passed
from models.rules.catalog import Terms
from models.rules.claw_back import come_due, take_back, worth_of
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import PAYMENT_SLACK, Account, Subscription
from models.rules.state import Grant as Lot
from models.rules.subscriptions import allot, end, end_of_payment, end_of_period, expire_lots, renew
from tasks.grants import told
from tasks.operation import Context, Need, Outcome, operation
from tasks.referrals import may_be_purchase, purchase_needs


def _need(message: Any) -> Sequence[Need]:
    return (Need("subscription", ""), *purchase_needs(message))


@operation(Subscribe, need=_need)
@may_be_purchase
def subscribe(account: Account, message: Subscribe, context: Context) -> Outcome:
    """Begin a plan: the credits of the period under way come at once, those of the next ones in their time.

    ``period_start`` may lie in the past: no period that is over gives credits. A plan that was cancelled and has not
    ended goes on, and is paid for again by another payment that goes beyond what was paid for before. One without a
    price, ended and begun again within the same period, gives no more for it than its highest plan. Refusals:
    ``unknown_plan``, ``already_subscribed``, ``already_renewed``, ``invalid``.
    """
    terms = _terms(message.plan, context)
    subscription = account.subscription
    if subscription is not None and subscription.is_active:
        if subscription.terms.plan != message.plan or not subscription.cancels:
            raise RefusedError(Code.ALREADY_SUBSCRIBED)
        again = message.payment is not None and message.payment != subscription.payment
        if terms.paid and (again or message.period_start is not None or message.period_end is not None):
            start = message.period_start or context.now
            until = _paid_until(message, start, terms, subscription)
            if not _is_paid(subscription, until, message):
                return _go_on(account, subscription, terms, start, until, message, context)
        subscription.cancels = False
        return _outcome(account, subscription)
    return begin(account, terms, message, context)


def begin(account: Account, terms: Terms, message: Paid | None, context: Context) -> Outcome:
    """Begin a subscription to a plan.

    :param message: what is known of the payment, if anything.
    :raises RefusedError: ``invalid`` for a start that lies ahead, or an end that does not come after it;
        ``already_renewed`` for the last one's payment.
    """
    now = context.now
    start = now if message is None or message.period_start is None else message.period_start
    if start > now + PAYMENT_SLACK:
        raise RefusedError(Code.INVALID, "period_start lies ahead; subscribe when the plan begins")
    if message is not None and message.period_end is not None and message.period_end <= start:
        raise RefusedError(Code.INVALID, "period_end has passed; send period_start with it")
    zone = context.catalog.zone_of(terms.plan)
    before = account.subscription
    payment = None if message is None else message.payment
    if before is not None and payment is not None and payment == before.payment:
        raise RefusedError(Code.ALREADY_RENEWED)
    dated = terms.paid and message is not None and message.period_start is not None
    anchor = start
    if context.catalog.plans[terms.plan].anchor == "month" and not dated:
        anchor = month_start(start, zone)
    paid_until = None
    if terms.paid:
        given = None if message is None else message.period_end
        paid_until = given or add_months(anchor, terms.interval_months, zone)
    if not terms.paid and before is not None and now < before.period_end:
        # The same period goes on, whatever was subscribed to and cancelled in it.
        anchor, zone, number, allotted = before.anchor, before.zone, before.number, before.allotted
        period_start, period_end = before.period_start, before.period_end
    else:
        allotted = 0
        last = now if paid_until is None else min(now, paid_until - timedelta.resolution)
        number = months_passed(anchor, last, zone)
        period_start = add_months(anchor, number, zone)
        period_end = end_of_period(anchor, number, zone, period_start, paid_until)
    subscription = Subscription(
        terms,
        anchor,
        zone,
        number,
        period_start,
        period_end,
        paid_until,
        allotted=max(allotted, terms.monthly_micro),
    )
    account.subscription = subscription
    _note_payment(subscription, message, context)
    return _outcome(account, subscription, _allot(account, subscription, terms.monthly_micro - allotted, context))


@operation(ChangePlan, need=_need)
@may_be_purchase
def change(account: Account, message: ChangePlan, context: Context) -> Outcome:
    """Change to another plan.

    To a higher one at once: what more it gives for the period under way is the catalog's choice, and never more than
    the highest plan of the period has, however often one changes. If what was paid for begins now and outlasts the
    period under way, that ends, and one of the new plan begins. To a lower one with the next renewal; changing back
    before that calls it off. Where what was paid for it ends sooner than what was paid for before, as of a year that is
    given up for a month, the rest of that was given back and is not allotted. Refusals: ``unknown_plan``,
    ``no_subscription``.
    """
    terms = _terms(message.plan, context)
    subscription = _active(account)
    subscription.cancels = False
    subscription.pending = subscription.pending_at = None
    if terms.plan == subscription.terms.plan:
        return _outcome(account, subscription)
    if terms.rank < subscription.terms.rank:
        until = message.period_end if message.payment is not None else None
        if (
            until is not None
            and subscription.paid_until is not None
            and until < subscription.paid_until - PAYMENT_SLACK
        ):
            subscription.paid_until = until
        subscription.pending = terms
        subscription.pending_at = subscription.paid_until or subscription.period_end
        return _outcome(account, subscription, _catch_up(account, subscription, context))
    now = context.now
    start, until = message.period_start, message.period_end
    paid_months = subscription.terms.interval_months if subscription.terms.paid else 0
    if until is None and message.payment is not None and terms.paid and terms.interval_months > paid_months:
        start = start or now
        until = end_of_payment(subscription, start, terms.interval_months)
    outlasts = until is not None and until > subscription.period_end + PAYMENT_SLACK
    if terms.paid and outlasts and start is not None and _is_amidst(subscription, start):
        assert until is not None
        return _pay(account, subscription, terms, start, until, message, context)
    subscription.terms = terms
    if not terms.paid:
        subscription.paid_until = None
    elif until is not None:
        subscription.paid_until = until
    elif subscription.paid_until is None:
        subscription.paid_until = subscription.period_end
    _note_payment(subscription, message, context)
    more = max(0, terms.monthly_micro - subscription.allotted)
    left = max(timedelta(0), subscription.period_end - now)  # nothing in the days of grace: that period is over
    expired = 0
    if terms.upgrade == "prorated":
        more = more * _microseconds(left) // _microseconds(subscription.period_end - subscription.period_start)
    elif not left:
        more = 0
    elif terms.upgrade == "full" and more:
        more = terms.monthly_micro
        expired = expire_lots(account, subscription, now, now, context.operation)
    subscription.allotted = max(subscription.allotted, terms.monthly_micro)
    allotted = _allot(account, subscription, more, context)
    return _outcome(account, subscription, allotted + _catch_up(account, subscription, context), expired)


@operation(CancelPlan, need=_need)
def cancel(account: Account, message: CancelPlan, context: Context) -> Outcome:
    """End the plan: nothing more is allotted, and what is left of the period's credits stays until the period's end.

    A year that is paid for is given to its end.

    With ``at`` ``now`` it ends at once, and they with it. Refusals: ``no_subscription``.
    """
    subscription = _active(account)
    return _outcome(account, subscription, expired=stop(account, subscription, context, message.at == "now"))


def stop(account: Account, subscription: Subscription, context: Context, at_once: bool) -> int:
    """End a plan with its period, or at once; gives how many micro-credits expired by it."""
    now = context.now
    expired = 0
    if at_once or subscription.period_end <= now:
        expired = end(account, subscription, now, now, context.operation)
    else:
        subscription.cancels = True
        subscription.pending = subscription.pending_at = None
    subscription.is_dirty = account.is_dirty = True
    account.next_due_at = account.due_at()
    return expired


@operation(RenewPlan, need=_need)
@may_be_purchase
def renew_on_payment(account: Account, message: RenewPlan, context: Context) -> Outcome:
    """A payment has arrived for what comes after what is paid for; where there is no plan yet, the one it names begins.

    If the period is over, the next one begins now; if not, it begins when it is. A payment whose period begins in the
    midst of the one under way moves the anchor there. A subscription that has ended begins again. However many
    messages tell of a payment, its period is given once. Refusals: ``no_subscription``, ``unknown_plan``,
    ``already_renewed``, ``invalid`` for a plan without a price, and for dates that are over or lie ahead of what is
    paid for.
    """
    subscription = account.subscription
    start = message.period_start
    if subscription is None:
        if message.plan is None:
            raise RefusedError(Code.NO_SUBSCRIPTION)
        return begin(account, _priced(_terms(message.plan, context)), message, context)
    if message.plan is not None:
        terms = _terms(message.plan, context)
    else:
        # What was paid for is no plan without a price, even if one is to come.
        terms = subscription.terms_at(start) if subscription.terms_at(start).paid else subscription.terms
    if not subscription.is_active:
        terms = _terms(terms.plan, context)  # it begins again, by what the catalog says now
    until = _paid_until(message, start, _priced(terms), subscription)
    if _is_paid(subscription, until, message):
        raise RefusedError(Code.ALREADY_RENEWED)
    if not subscription.is_active:
        return begin(account, terms, message, context)
    return _go_on(account, subscription, terms, start, until, message, context)


def _paid_until(message: Paid, start: datetime, terms: Terms, subscription: Subscription) -> datetime:
    return message.period_end or end_of_payment(subscription, start, terms.interval_months)


def _priced(terms: Terms) -> Terms:
    """Terms of a plan that is paid for.

    :raises RefusedError: ``invalid`` for one without a price.
    """
    if not terms.paid:
        raise RefusedError(Code.INVALID, "this plan has no price: it renews by the calendar")
    return terms


def _is_paid(subscription: Subscription, until: datetime, message: Paid) -> bool:
    """Whether it was paid for that long before: what ended early is paid for again by a payment of its own."""
    paid_until = subscription.paid_until
    if paid_until is None:
        return False
    if subscription.ended_at is not None and message.payment is not None and not subscription.is_active:
        paid_until = min(paid_until, subscription.ended_at)
    return until <= paid_until + PAYMENT_SLACK


def _go_on(
    account: Account,
    subscription: Subscription,
    terms: Terms,
    start: datetime,
    until: datetime,
    message: Paid,
    context: Context,
) -> Outcome:
    """Go on with a subscription by a payment, cancelled or not.

    :raises RefusedError: ``invalid`` for dates that are over or lie ahead of what is paid for.
    """
    if subscription.paid_until is None and until <= context.now:
        raise RefusedError(Code.INVALID, "what was paid for is over")
    if _is_late(subscription, start) and start > context.now + PAYMENT_SLACK:
        raise RefusedError(Code.INVALID, "period_start lies ahead of what is paid for; renew when it begins")
    subscription.cancels = False
    return _pay(account, subscription, terms, start, until, message, context)


def _pay(
    account: Account,
    subscription: Subscription,
    terms: Terms,
    start: datetime,
    until: datetime,
    message: Paid,
    context: Context,
) -> Outcome:
    """Note what was paid for, and begin it, if it has begun.

    If it begins in the midst of the period under way, or later than that ends and nothing was paid for what lies
    between, that period ends where it begins; one of a plan without a price also where it begins with it.
    """
    if _is_late(subscription, start) or _is_amidst(subscription, start):
        subscription.period_end = start
    elif not subscription.terms.paid and start <= subscription.period_start + PAYMENT_SLACK:
        subscription.period_end = max(start, subscription.period_start + timedelta.resolution)
    if terms.plan == subscription.terms.plan:
        if subscription.pending_at is not None:
            subscription.pending_at = max(subscription.pending_at, until)  # what is paid for is given to its end
    elif terms.plan != subscription.terms_at(start).plan:
        subscription.pending, subscription.pending_at = terms, start
    subscription.paid_until = until
    _note_payment(subscription, message, context)
    return _outcome(account, subscription, _catch_up(account, subscription, context))


def _is_late(subscription: Subscription, start: datetime) -> bool:
    """Whether something begins later than the period under way ends, and nothing was paid for what lies between."""
    return start > subscription.period_end + PAYMENT_SLACK and not subscription.is_prepaid


def _is_amidst(subscription: Subscription, start: datetime) -> bool:
    """Whether something begins within the period under way, and neither with it nor with the next."""
    return subscription.period_start + PAYMENT_SLACK < start < subscription.period_end - PAYMENT_SLACK


@operation(UndoRenewal, need=_need)
def undo(account: Account, message: UndoRenewal, context: Context) -> Outcome:
    """Take back what the renewal did that began the period under way, by hand of a named administrator.

    The lots that it made are taken back, what was spent of them as the catalog's claw-back says; what it let expire or
    carried comes back in lots that end with the period under way. Dates stay: the next renewal comes in its time.
    Refusals: ``no_subscription``, ``nothing_to_undo``, ``limit_reached``.
    """
    subscription = _active(account)
    renewal = subscription.renewal
    if renewal is None or renewal.undone:
        raise RefusedError(Code.NOTHING_TO_UNDO)
    now, operation = context.now, context.operation
    revoked = account.revoked
    carried: list[Lot] = []
    allotted: list[Lot] = []
    for number in renewal.made:
        lot = account.grants.get(number)
        if lot is not None:
            (allotted if lot.family == lot.id else carried).append(lot)
    check_room(account, sum(lot.available for lot in carried) + sum(taken.expired for taken in renewal.taken))
    families = [(lot, [lot]) for lot in allotted]
    wanted = sum(worth_of(*family) for family in families)
    details = told(take_back(account, families, wanted, now, operation, context.catalog)) if wanted else {}
    taken_back = account.revoked - revoked
    restored = 0
    for lot in carried:
        amount = lot.available
        if amount:
            back = _back(account, subscription, lot, context)
            post(account, lot, "rolled_out", amount, now, operation)
            post(account, back, "rolled_in", amount, now, operation)
            pay_debt(account, back, amount, now, operation)
    for taken in renewal.taken:
        if taken.expired:
            restored += taken.expired
            lot = account.grants[taken.grant]
            back = _back(account, subscription, lot, context)
            post(account, lot, "unexpired", taken.expired, now, operation)
            post(account, lot, "rolled_out", taken.expired, now, operation)
            post(account, back, "rolled_in", taken.expired, now, operation)
            come_due(account, back, now, operation, context.catalog)  # the purchase may have been returned meanwhile
    subscription.renewal = msgspec.structs.replace(renewal, undone=True)
    outcome = _outcome(account, subscription)
    assert outcome.details is not None
    outcome.details.update(details, taken_back=format_amount(taken_back), restored=format_amount(restored))
    return outcome


def _back(account: Account, subscription: Subscription, lot: Lot, context: Context) -> Lot:
    """A new lot for credits of an ended period, which ends with the period under way."""
    terms = subscription.terms
    back = new_grant(
        account,
        source=terms.source,
        priority=context.catalog.priority_of(terms.source),
        features=lot.features,
        expires_at=None if terms.mode == "accumulate" else subscription.grace_ends,
        now=context.now,
        operation=context.operation,
        purchase=lot.purchase,
        price=(lot.price_minor, lot.price_currency, lot.price_per),
        origin=lot.family,
    )
    if back.expires_at is not None:
        subscription.lots.append(back.id)
    return back


def _terms(plan: str, context: Context) -> Terms:
    terms = context.catalog.terms_of(plan)
    if terms is None:
        raise RefusedError(Code.UNKNOWN_PLAN)
    return terms


def _active(account: Account) -> Subscription:
    subscription = account.subscription
    if subscription is None or not subscription.is_active:
        raise RefusedError(Code.NO_SUBSCRIPTION)
    return subscription


def _note_payment(subscription: Subscription, message: Paid | None, context: Context) -> None:
    """Keep what pays for the next lots: the payment's name, and the price of a credit."""
    terms = subscription.next_terms
    if not terms.paid:
        subscription.forget_payment()
        return
    if message is not None and message.payment is not None:
        subscription.payment = message.payment
    price = None if message is None else message.unit_price
    if price is not None:
        subscription.price_minor = price.minor
        subscription.price_currency = price.currency
        subscription.price_per = int(price.per)
    else:
        subscription.price_minor = terms.price_minor
        subscription.price_currency = terms.price_currency
        subscription.price_per = terms.monthly_micro * terms.interval_months or None


def _allot(account: Account, subscription: Subscription, amount_micro: int, context: Context) -> int:
    now = context.now
    return allot(account, subscription, amount_micro, now, now, context.operation, context.catalog)


def _catch_up(account: Account, subscription: Subscription, context: Context) -> int:
    """Renew now what has come to be overdue by a payment or a change; gives what it allotted.

    Not at the period's end: what was spent since then was spent of the old allotment. Where the days of grace are more
    than a period, several may be overdue, one after the other.
    """
    allotted = 0
    while subscription.renews_by_itself and subscription.period_end <= context.now:
        renew(account, subscription, context.now, context.now, context.operation, context.catalog)
        assert subscription.renewal is not None
        allotted += subscription.renewal.allotted
    return allotted


def _outcome(account: Account, subscription: Subscription, allotted: int = 0, expired: int = 0) -> Outcome:
    """What the subscription is now; it is written anew, and the account knows when it is due."""
    subscription.is_dirty = account.is_dirty = True
    account.next_due_at = account.due_at()
    details: dict[str, Any] = {
        "plan": subscription.terms.plan,
        "plan_status": "cancelled" if subscription.cancels else subscription.status,
        "period_start": subscription.period_start,
        "period_end": subscription.period_end,
    }
    if subscription.pending is not None:
        details["plan_next"] = subscription.pending.plan
    if subscription.paid_until is not None:
        details["paid_until"] = subscription.paid_until
    if allotted:
        details["allotted"] = format_amount(allotted)
    if expired:
        details["expired"] = format_amount(expired)
    return Outcome(details=details)


def _microseconds(span: timedelta) -> int:
    return span // timedelta.resolution
