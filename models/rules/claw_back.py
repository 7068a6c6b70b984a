"""Claw-back: what a revocation, a refund or a dispute takes of lots, and what an end of it gives back.

What a lot's family lost is booked on its root, were it spent or not. What claw-backs took of a purchase is noted on the
purchase as well, part by part in the order of taking, so that exactly this can go back in the reverse order (ledger
rules: claw-back).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from typing import NamedTuple

from models.rules.burning import Plan, pay_debt, pay_with, room_of, successor
from models.rules.catalog import Catalog
from models.rules.payments import claw_back_target
from models.rules.posting import post
from models.rules.state import FORGIVEN, OWED, REVOKED, Account, Grant, Purchase, Taking

Family = tuple[Grant, list[Grant]]
"""A lot, and with it the lots that continue it because it had expired when its credits came back."""


class TakenBack(NamedTuple):
    """What was taken back."""

    plan: Plan
    """Which lots gave how many micro-credits."""
    away_micro: int
    """What was not there to be taken."""
    kind: str
    """What became of that: ``owed`` or ``forgiven``."""


NOTHING = TakenBack([], 0, OWED)


def families_of(account: Account, roots: Iterable[Grant]) -> list[Family]:
    """Lots that continue no other, each with those that continue it, the oldest first."""
    ordered = sorted(roots, key=lambda lot: lot.id)
    return [(root, [lot for lot in account.grants.values() if lot.family == root.id]) for root in ordered]


def bought_with(account: Account, purchase: str) -> list[Family]:
    """The lots of a purchase, by family."""
    return families_of(
        account, [lot for lot in account.grants.values() if lot.purchase == purchase and lot.family == lot.id]
    )


def worth_of(root: Grant, lots: Sequence[Grant]) -> int:
    """What of a family can still be taken back: not what expired unspent, nor what was taken back before."""
    return max(0, _left(root, lots))


def worth_in_all(families: Sequence[Family]) -> int:
    """What of families of lots can still be taken back together.

    One of which more was taken back than there was, since the rest lapsed after others had paid its debt, makes the
    others worth as much less: nothing is taken twice.
    """
    return max(0, sum(_left(root, lots) for root, lots in families))


def _left(root: Grant, lots: Sequence[Grant]) -> int:
    return gave(lots) - sum(lot.expired for lot in lots) - root.clawed_back


def gave(lots: Sequence[Grant]) -> int:
    """What a family's lots gave, in micro-credits, but for what they carried to one another."""
    return sum(lot.granted + lot.received for lot in lots) - _carried(lots)


def _carried(lots: Sequence[Grant]) -> int:
    """What a family's lots carried to one another: it left one as it came into another."""
    return sum(lot.received for lot in lots if lot.origin is not None)


def take_back(
    account: Account,
    families: Sequence[Family],
    wanted: int,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
    purchase: Purchase | None = None,
    at: datetime | None = None,
) -> TakenBack:
    """Take so many micro-credits out of families of lots, last burnt first; what is not there is owed, or forgiven.

    :param wanted: not more than they are worth together.
    :param purchase: where it is noted, so that it can go back.
    :param at: the instant it holds from, where that is earlier than now.
    """
    worth = {root.id: worth_of(root, lots) for root, lots in families}
    taken: Plan = []
    by_burning = [(lot, root) for root, lots in families for lot in lots]
    for lot, root in sorted(by_burning, key=lambda pair: pair[0].key, reverse=True):
        amount = min(lot.available, worth[root.id], wanted)
        if amount:
            post(account, lot, "revoked", amount, now, operation, at=at)
            root.clawed_back += amount
            root.is_dirty = True
            worth[root.id] -= amount
            wanted -= amount
            taken.append((lot, amount))
            if purchase is not None:
                purchase.note(Taking(root.id, lot.id, REVOKED, amount))
    kind = FORGIVEN if catalog.clawback.on_spent == "forgive" else OWED
    if wanted:
        _owe(account, families, worth, wanted, kind, now, operation, purchase, at)
    return TakenBack(taken, wanted, kind)


def _owe(
    account: Account,
    families: Sequence[Family],
    worth: dict[int, int],
    wanted: int,
    kind: str,
    now: datetime,
    operation: str | None,
    purchase: Purchase | None,
    at: datetime | None,
) -> None:
    """Book what was spent, or is set aside, as debt, or forgive it: on the families whose credits those are."""
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
        if kind == FORGIVEN:
            root.forgiven += share
        else:
            post(account, root, "debt_incurred", share, now, operation, at=at)
        if purchase is not None:
            purchase.note(Taking(root.id, root.id, kind, share))


def take_what_is_due(
    account: Account,
    purchase: Purchase,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
    at: datetime | None = None,
) -> TakenBack:
    """Take back what is to be away of a purchase's credits and is not yet; what its lots are not worth is gone.

    A lot whose debt another one has paid may have credits beyond its worth: what is owed is paid out of them at once.
    """
    families = bought_with(account, purchase.purchase)
    wanted = min(_missing(purchase, families), worth_in_all(families))
    if wanted <= 0:
        return NOTHING
    taken = take_back(account, families, wanted, now, operation, catalog, purchase, at)
    if taken.away_micro and taken.kind == OWED:
        own = (lot for _, lots in families for lot in lots if lot.available)
        for lot in sorted(own, key=attrgetter("key"), reverse=True):
            pay_with(account, lot, lot.available, now, operation, at, purchase.purchase)
    return taken


def _missing(purchase: Purchase, families: Sequence[Family]) -> int:
    """How much more than was taken is to be away; negative where it is less. A revocation by hand counts as taken."""
    given = sum(gave(lots) for _, lots in families)
    target = claw_back_target(given, purchase.paid_minor, purchase.returned_minor)
    return target - sum(root.clawed_back for root, _ in families)


def come_due(
    account: Account,
    lot: Grant,
    now: datetime,
    operation: str | None,
    catalog: Catalog,
    at: datetime | None = None,
) -> int:
    """A new lot has its credits: what is to be away of its purchase is taken at once, and debt is paid of the rest.

    :param at: the instant it holds from, where that is earlier than now.
    :returns: micro-credits that were taken back of the purchase.
    """
    purchase = account.purchases.get(lot.purchase) if lot.purchase is not None else None
    taken = 0
    if purchase is not None:
        taken = sum(amount for _, amount in take_what_is_due(account, purchase, now, operation, catalog, at).plan)
    pay_debt(account, lot, lot.available, now, operation, at)
    return taken


def give_back_what_is_over(
    account: Account, purchase: Purchase, now: datetime, operation: str, refund_days: int
) -> tuple[Plan, int]:
    """Give back what claw-backs took of a purchase beyond what is to be away, the last taken first.

    What was forgiven is so no more, and nothing comes back of it. What is owed is owed no more. Credits return to the
    lots they were taken from, those that paid such a debt included; in place of a lot that has expired meanwhile to a
    new one that lives ``refund_days``. Coming back, they pay what else is owed.

    :returns: which lots got how many micro-credits, and how much was given back in all.
    """
    over = min(-_missing(purchase, bought_with(account, purchase.purchase)), purchase.taken_micro)
    if over <= 0:
        return [], 0
    cancelled: dict[int, int] = {}
    returning: dict[int, int] = {}
    for taking in _pop(purchase, over):
        root = account.grants[taking.root]
        root.clawed_back -= taking.amount_micro
        root.is_dirty = account.is_dirty = True
        if taking.kind == FORGIVEN:
            root.forgiven -= taking.amount_micro
        elif taking.kind == OWED:
            cancelled[root.id] = cancelled.get(root.id, 0) + taking.amount_micro
        else:
            returning[taking.grant] = returning.get(taking.grant, 0) + taking.amount_micro
    for number, amount in cancelled.items():
        post(account, account.grants[number], "debt_cancelled", amount, now, operation)
    return [
        (_reinstate(account, account.grants[number], amount, now, operation, refund_days), amount)
        for number, amount in returning.items()
    ], over


def _pop(purchase: Purchase, amount_micro: int) -> list[Taking]:
    """Remove so much of what was taken, the last first, and give it in that order."""
    popped: list[Taking] = []
    while amount_micro:
        last = purchase.takings.pop()
        amount = min(last.amount_micro, amount_micro)
        amount_micro -= amount
        popped.append(Taking(last.root, last.grant, last.kind, amount))
        if amount < last.amount_micro:
            purchase.takings.append(Taking(last.root, last.grant, last.kind, last.amount_micro - amount))
    return popped


def _reinstate(
    account: Account, lot: Grant, amount_micro: int, now: datetime, operation: str, refund_days: int
) -> Grant:
    """Credits return to the lot they were taken from, or to one that continues it; gives which."""
    post(account, lot, "reinstated", amount_micro, now, operation)
    if lot.expires_at is None or now < lot.expires_at:
        pay_debt(account, lot, amount_micro, now, operation)
        return lot
    amount = min(amount_micro, room_of(account))  # what is carried comes in once more
    if amount < amount_micro:
        post(account, lot, "expired", amount_micro - amount, now, operation)
    if not amount:
        return lot
    into = successor(account, lot, now, operation, now + timedelta(days=refund_days))
    post(account, lot, "rolled_out", amount, now, operation)
    post(account, into, "rolled_in", amount, now, operation)
    pay_debt(account, into, amount, now, operation)
    return into


def thaw(account: Account, purchase: str, now: datetime, operation: str) -> None:
    """The credits of a purchase can be used again: they pay what is owed, in the order in which they are spent."""
    for lot in [lot for lot in account.order if lot.purchase == purchase and lot.available]:
        pay_with(account, lot, lot.available, now, operation)
