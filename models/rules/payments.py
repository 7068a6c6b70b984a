"""What a refund or a dispute takes back of a purchase (ledger rules: claw-back).

The providers' events arrive in any order, twice, or late. So nothing here adds up what came one by one: each refund and
each dispute is known by the furthest that was heard of it, and what is to be taken follows from those alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Returned(msgspec.Struct, frozen=True, order=True):
    """Money of a purchase that one refund or one dispute has away from the seller, at one point of its life."""

    key: str
    """The refund's or dispute's own id."""
    step: int
    """How far it has come: of two that are heard of one refund or dispute the higher holds."""
    amount_minor: int
    """What is away at that step; 0 once it was undone or given back."""


def returned_minor(heard: Iterable[Returned]) -> int:
    """Add up what is away, of each refund and dispute its furthest step, whatever the order and repetition.

    :returns: minor units; more than was paid where a dispute came on top of a refund.
    """
    furthest: dict[str, Returned] = {}
    for each in heard:
        known = furthest.get(each.key)
        if known is None or known < each:
            furthest[each.key] = each
    return sum(each.amount_minor for each in furthest.values())


def claw_back_target(credits_micro: int, paid_minor: int, refunded_minor: int, withdrawn_minor: int = 0) -> int:
    """How much of a purchase's own credits is to be away in all; what is written is this less what was taken already.

    :param credits_micro: what the purchase gave, in micro-credits.
    :param paid_minor: what was paid for all of it, in minor units. Nothing can be returned of what was free.
    :param refunded_minor: what its refunds returned.
    :param withdrawn_minor: what its disputes hold back.
    :returns: micro-credits, rounded down: the buyer keeps the fraction.
    :raises ValueError: for a negative number.
    """
    if min(credits_micro, paid_minor, refunded_minor, withdrawn_minor) < 0:
        raise ValueError("credits and amounts of a purchase are not negative")
    if not paid_minor:
        return 0
    return credits_micro * min(refunded_minor + withdrawn_minor, paid_minor) // paid_minor
