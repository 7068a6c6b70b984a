"""What an account is told of, as the client gives it: notices, and the advice that goes with some of them."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec

ADVISED = frozenset({"low_balance", "depleted", "expiring"})
"""The kinds of notice that carry advice."""


class Notice(msgspec.Struct, kw_only=True, frozen=True):
    """One notice of an account's inbox."""

    key: str
    """The account has one of this key, ever: what it is marked as read by."""
    kind: str
    """Such as ``low_balance``; all kinds stand in the README."""
    at: datetime
    """The instant of what it tells of."""
    created_at: datetime
    read_at: datetime | None = None
    details: dict[str, Any] = {}
    """What there is to tell, by kind; amounts in credits as decimal strings."""


class PackAdvice(msgspec.Struct, kw_only=True, frozen=True):
    """The cheapest way to last by packs."""

    pack: str
    title: str
    count: int
    """How many of it."""
    credits: Decimal
    """All of them together."""
    price: str
    """All of them together, as ``"9.98 EUR"``."""
    offer: str | None = None
    """The offer that has it at this price, where it is not the pack's own."""


class PlanAdvice(msgspec.Struct, kw_only=True, frozen=True):
    """A plan that costs less than the packs bought lately."""

    plan: str
    title: str
    price: str
    interval: str
    """What the price is for: ``month`` or ``year``."""
    credits: Decimal | None
    """Every month; None for a plan without a limit."""
    spent: str
    """Money spent on packs in the last 30 days."""


class Alternative(msgspec.Struct, kw_only=True, frozen=True):
    """Something cheaper in place of a feature that is used much."""

    feature: str
    title: str
    alternative: str
    alternative_title: str
    free: bool


class Advice(msgspec.Struct, kw_only=True, frozen=True):
    """What somebody whose credits run low or out can do."""

    pace: Decimal
    """Credits a day, over the last 30 days."""
    until: datetime
    """How far ahead it looks: the end of the plan's period, else 30 days."""
    runs_out_at: datetime | None = None
    """When the balance is used up at that pace, if that is before."""
    missing: Decimal = Decimal(0)
    """Credits that it takes to last until then."""
    pack: PackAdvice | None = None
    plan: PlanAdvice | None = None
    alternatives: list[Alternative] = []


class Inbox(msgspec.Struct, kw_only=True, frozen=True):
    """A page of an account's notices, the newest first."""

    notices: list[Notice]
    unread: int
    total: int
    next_before: str | None = None
    """For the page after this one."""
    advice: Advice | None = None
    """Where one of the page's notices is of a kind that carries it."""
