"""Subscriptions: what time and payments do to them (ledger rules: subscriptions).

Whatever is due is stamped with its own instant and depends on nothing else, so that it comes out the same whether a
sweep, the account's next operation or a replay applies it.
"""

from __future__ import annotations

from datetime import datetime
from operator import attrgetter

from models.rules.burning import came_in, new_grant, room_of
from models.rules.calendar import add_months, months_passed
from models.rules.catalog import Catalog, Terms
from models.rules.claw_back import come_due
from models.rules.posting import post
from models.rules.state import (
    ENDED,
    HALF_MONTH,
    NEVER,
    PAYMENT_SLACK,
    Account,
    Grant,
    Renewal,
    Subscription,
    Taken,
)


def pass_time(account: Account, subscription: Subscription, now: datetime, catalog: Catalog) -> None:
    """Apply what is due to a subscription at its :meth:`~models.rules.state.Subscription.due_at`.

    It ends, because it was cancelled or no payment came within the grace period; or it is renewed.

    :param now: when it is recorded.
    """
    at = subscription.due_at()
    assert at is not None
    if subscription.renews_by_itself:
        renew(account, subscription, at, now, None, catalog)
    else:
        end(account, subscription, at, now, None)


def renew(
    account: Account,
    subscription: Subscription,
    at: datetime,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
) -> None:
    """Begin the next period: what is left of the last one expires or is carried, and the new credits come in.

    The ending plan's terms decide over what is left of it; the catalog's, as they are now, over what comes. A plan that
    the catalog no longer has goes on as it was.

    :param at: the instant it holds from: the period's end, or later where a payment came late.
    """
    ending, coming = subscription.terms, subscription.next_terms
    subscription.terms = catalog.terms_of(coming.plan) or coming
    if coming is subscription.pending:
        subscription.pending = subscription.pending_at = None
    if not subscription.terms.paid:
        subscription.paid_until = None
        subscription.forget_payment()
    subscription.number += 1
    if abs(add_months(subscription.anchor, subscription.number, subscription.zone) - subscription.period_end) > (
        PAYMENT_SLACK
    ):
        subscription.anchor, subscription.number = subscription.period_end, 0  # the last period was no whole month
    subscription.period_start = subscription.period_end
    subscription.period_end = end_of_period(
        subscription.anchor, subscription.number, subscription.zone, subscription.period_start, subscription.paid_until
    )
    last = account.last_grant
    taken = _close_period(account, subscription, ending, at, now, operation, catalog)
    subscription.allotted = subscription.terms.monthly_micro
    subscription.lots = []
    allotted = allot(account, subscription, subscription.allotted, at, now, operation, catalog)
    made = list(range(last + 1, account.last_grant + 1))
    subscription.renewal = Renewal(at, subscription.terms.plan, subscription.period_start, made, taken, allotted)
    account.renewals.append(subscription.renewal)
    subscription.is_dirty = account.is_dirty = True


def _close_period(
    account: Account,
    subscription: Subscription,
    ending: Terms,
    at: datetime,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
) -> list[Taken]:
    """Expire or carry what is left of a period's lots; over the cap, the rollover lots that end soonest go first.

    Those count among them that are carried now: a lot that never ends is not trimmed before they are. What is more than
    the account can ever be credited with expires as well.
    """
    lots = lots_of(account, subscription)
    ending_lots = [lot for lot in lots if lot.is_open]
    taken: dict[int, Taken] = {}
    excess = 0
    keeps = ending.mode == "rollover"
    carried_until = None
    if keeps:
        if ending.rollover_months is not None:
            months = subscription.number + ending.rollover_months
            carried_until = add_months(subscription.anchor, months, subscription.zone)
            keeps = at < carried_until  # not so where a payment came very late
        cap = ending.cap_micro
        if ending.caps_balance:
            cap = max(0, cap - subscription.terms.monthly_micro)
        carried = [
            lot
            for lot in account.order
            if lot.source == ending.rollover_source
            and lot.id not in subscription.lots
            and (lot.expires_at is None or at < lot.expires_at)
        ]
        # What is set aside is in them too: it may come back.
        rolled = sum(lot.available + lot.held + lot.in_transit for lot in carried)
        rolled += sum(lot.available for lot in lots) if keeps else 0
        excess = max(0, rolled - cap)
        carried.sort(key=attrgetter("created_at", "id"))
        ends = {lot.id: carried_until for lot in lots} | {lot.id: lot.expires_at for lot in carried}
        lots = sorted(carried + lots, key=lambda lot: ends[lot.id] or NEVER)
    for lot in lots:
        is_ending = lot.id in subscription.lots
        if keeps or not is_ending:
            over = min(lot.available, excess)
            excess -= over
        else:
            over = lot.available
        rest = 0
        if is_ending:
            rest = min(lot.available - over, room_of(account))  # what is carried comes in once more
            over = lot.available - rest
        if over:
            post(account, lot, "expired", over, now, operation, at=at)
        if rest:
            _carry(account, lot, rest, ending.rollover_source, carried_until, at, now, operation, catalog)
        if over or rest:
            taken[lot.id] = Taken(lot.id, over, rest)
    for lot in ending_lots:
        account.end_grant(lot, at)
    return list(taken.values())


def end_of_payment(subscription: Subscription, start: datetime, months: int) -> datetime:
    """Until when a payment is for so many months from a date on: counted from the anchor, if that is a date of its."""
    anchor, zone = subscription.anchor, subscription.zone
    passed = months_passed(anchor, start + PAYMENT_SLACK, zone)
    if abs(add_months(anchor, passed, zone) - start) <= PAYMENT_SLACK:
        return add_months(anchor, passed + months, zone)
    return add_months(start, months, zone)


def end_of_period(
    anchor: datetime, number: int, zone: str, period_start: datetime, paid_until: datetime | None
) -> datetime:
    """When the period ends that begins so many months after the anchor: with its month, or with what is paid for.

    :param paid_until: of a plan that is paid for; what reaches :data:`~models.rules.state.HALF_MONTH` beyond the month
        at the most is this one period, so that one payment gives one.
    """
    end = add_months(anchor, number + 1, zone)
    if paid_until is not None and period_start + PAYMENT_SLACK < paid_until <= end + HALF_MONTH:
        return paid_until
    return end


def _carry(
    account: Account,
    lot: Grant,
    amount_micro: int,
    source: str,
    expires_at: datetime | None,
    at: datetime,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
) -> None:
    """Move credits of an ended period into a rollover lot of their own, with what was paid for them."""
    carried = new_grant(
        account,
        source=source,
        priority=catalog.priority_of(source),
        features=lot.features,
        expires_at=expires_at,
        now=at,
        operation=operation or renewal_name(at),
        purchase=lot.purchase,
        price=(lot.price_minor, lot.price_currency, lot.price_per),
        origin=lot.family,
    )
    post(account, lot, "rolled_out", amount_micro, now, operation, at=at)
    post(account, carried, "rolled_in", amount_micro, now, operation, at=at)


def allot(
    account: Account,
    subscription: Subscription,
    amount_micro: int,
    at: datetime,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
) -> int:
    """Add a lot of the plan's credits that ends with the period under way, grace included; a debt is paid out of it.

    :param at: the instant it holds from.
    :returns: micro-credits; 0 where the lot would have ended already, or the account can never hold it.
    """
    terms = subscription.terms
    expires_at = None if terms.mode == "accumulate" else subscription.grace_ends
    amount = min(amount_micro, room_of(account))
    if amount <= 0 or (expires_at is not None and expires_at <= at):
        return 0
    lot = new_grant(
        account,
        source=terms.source,
        priority=catalog.priority_of(terms.source),
        expires_at=expires_at,
        now=at,
        operation=operation or renewal_name(at),
        purchase=subscription.payment,
        price=(subscription.price_minor, subscription.price_currency, subscription.price_per),
    )
    if expires_at is not None:
        subscription.lots = [*subscription.lots, lot.id]
    post(account, lot, "granted", amount, now, operation, at=at)
    come_due(account, lot, now, operation, catalog, at)
    came_in(account, at)
    return amount


def end(account: Account, subscription: Subscription, at: datetime, now: datetime, operation: str | None) -> int:
    """End a subscription: what is left of its period's lots expires.

    :param at: the instant it holds from.
    :returns: micro-credits that expired.
    """
    expired = expire_lots(account, subscription, at, now, operation)
    subscription.status = ENDED
    subscription.ended_at = at
    subscription.pending = subscription.pending_at = None
    subscription.cancels = False
    subscription.is_dirty = account.is_dirty = True
    return expired


def expire_lots(
    account: Account, subscription: Subscription, at: datetime, now: datetime, operation: str | None
) -> int:
    """What is left of a period's lots expires, and so does what comes back to them later; gives how much it was."""
    expired = 0
    for lot in lots_of(account, subscription):
        if lot.is_open:
            if lot.available:
                expired += lot.available
                post(account, lot, "expired", lot.available, now, operation, at=at)
            account.end_grant(lot, at)
    subscription.lots = []
    return expired


def lots_of(account: Account, subscription: Subscription) -> list[Grant]:
    """The lots of the period under way that are at hand, in burn-down order; others have nothing left."""
    named = (account.grants.get(number) for number in subscription.lots)
    return sorted((lot for lot in named if lot is not None), key=attrgetter("key"))


def renewal_name(at: datetime) -> str:
    """What a lot that time made has in place of an operation's id."""
    return f"renewal:{at.isoformat()}"
