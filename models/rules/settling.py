"""Settling: time passes inside the lane (ledger rules: settling).

Every operation settles its account before it is applied, so an expired credit is never spendable,
however late the sweep is.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from models.rules.allowances import give_back_held as give_back_to_member
from models.rules.burning import give_back_held
from models.rules.catalog import Catalog
from models.rules.posting import post
from models.rules.state import Account, Grant, Hold, Subscription
from models.rules.subscriptions import pass_time

HOLD_TIMEOUT, GRANT_EXPIRY, RENEWAL = 0, 1, 2
"""What comes first at the same instant."""


def settle(account: Account, now: datetime, catalog: Catalog) -> bool:
    """Apply every transition that is due by ``now``, oldest first, each stamped with its own due instant.

    At the same instant hold time-outs come before grant expiries, and these before the subscription's renewal or end. A
    lot of the period that ends is dealt with by that, not by expiry: it may be carried.

    :returns: whether anything was due.
    """
    if account.next_due_at is None or now < account.next_due_at:
        return False
    changed = False
    while (due := _next_due(account, now)) is not None:
        instant, _, item = due
        if isinstance(item, Subscription):
            pass_time(account, item, now, catalog)
        elif isinstance(item, Hold):
            close_hold(account, item, now, None, captured=0, at=instant, status="expired")
        else:
            post(account, item, "expired", item.available, now, None, at=instant)
        changed = True
    account.next_due_at = account.due_at()
    account.is_dirty = True
    return changed


Due = tuple[datetime, tuple[int, str, int], Hold | Grant | Subscription]


def _next_due(account: Account, now: datetime) -> Due | None:
    first: Due | None = None
    ends_at: datetime | None = None
    ending: Sequence[int] = ()
    subscription = account.subscription
    if subscription is not None:
        ends_at, ending = subscription.due_at(), subscription.lots
        if ends_at is not None and ends_at <= now:
            first = (ends_at, (RENEWAL, "", 0), subscription)
    for hold in account.holds.values():
        if hold.status == "open" and hold.expires_at <= now:
            key: Due = (hold.expires_at, (HOLD_TIMEOUT, hold.id, 0), hold)
            if first is None or key[:2] < first[:2]:
                first = key
    for grant in account.order:
        if grant.expires_at is not None and grant.available and grant.expires_at <= now:
            if ends_at is not None and ends_at <= grant.expires_at and grant.id in ending:
                continue
            at: Due = (grant.expires_at, (GRANT_EXPIRY, "", grant.id), grant)
            if first is None or at[:2] < first[:2]:
                first = at
    return first


def close_hold(
    account: Account,
    hold: Hold,
    now: datetime,
    operation: str | None,
    captured: int,
    status: str,
    at: datetime | None = None,
) -> None:
    """Give back what a hold has beyond ``captured`` micro-credits, and close it.

    :param status: ``captured``, ``released`` or ``expired`` (its time ran out).
    """
    give_back_held(account, hold.lines, hold.amount - captured, now, operation, hold.id, at)
    if account.allowances and hold.member is not None:
        give_back_to_member(account, hold.member, hold.amount - captured, hold.created_at)
    hold.status = status
    hold.captured = captured
    hold.closed_at = at or now
    hold.is_dirty = True
    account.is_dirty = True
