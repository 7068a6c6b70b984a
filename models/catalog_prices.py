"""What a catalog asks: of an operation in credits, and of a credit in money. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Literal

import msgspec

from creditlane.amounts import MICRO, format_amount
from models.rules.catalog import MINOR_DIGITS, Catalog, Feature, Money, price_of

DECIMALS = Decimal("0.000001")
"""What money per credit is rounded to, in major units."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """What a credit costs by one way of buying it."""

    kind: Literal["pack", "offer", "plan"]
    name: str
    price: str
    credits: str
    """What one payment gives: of a bundle all its lots, of a plan all months."""
    per_credit: Decimal
    """Money in major units of the currency, to six decimals."""
    currency: str


class Quoted(msgspec.Struct, frozen=True, kw_only=True):
    """What so much of a feature costs."""

    feature: str
    quantity: str
    credits: str
    """What is charged."""
    rule: str
    """Why."""
    money_from: Decimal | None
    """At the cheapest rate, in major units; None where nothing is charged or nothing is for sale."""
    money_to: Decimal | None
    """At the dearest."""
    currency: str | None


def rates(catalog: Catalog, feature: str | None = None, now: datetime | None = None) -> list[Rate]:
    """What a credit costs by every pack, offer and plan that has a price, the cheapest first.

    :param feature: what they are to be spent on: packs for other features alone do not count; None for everything.
    :param now: for which the offers that run then are included; none unless given.
    """
    return sorted(_rates(catalog, feature, now), key=lambda rate: (rate.per_credit, rate.kind, rate.name))


def _rates(catalog: Catalog, feature: str | None, now: datetime | None) -> Iterator[Rate]:
    for name, pack in catalog.packs.items():
        lots = pack.lots
        if pack.price is None or not any(lot.features is None or feature in lot.features for lot in lots):
            continue
        micro = sum(lot.credits_micro for lot in lots)
        yield _rate("pack", name, pack.price, micro)
        for offered, offer in catalog.offers_at(now).items() if now is not None else ():
            if offer.pack == name:
                yield _rate("offer", offered, offer.price, micro)
    for name, plan in catalog.plans.items():
        if plan.price is not None and plan.monthly_credits:
            yield _rate("plan", name, plan.price, plan.monthly_credits * (1 if plan.interval == "month" else 12))


def _rate(kind: Literal["pack", "offer", "plan"], name: str, price: str, micro: int) -> Rate:
    money = Money.parse(price)
    per_credit = _major(Decimal(money.minor) * MICRO / micro, money.currency)
    return Rate(
        kind=kind, name=name, price=str(money), credits=format_amount(micro), per_credit=per_credit,
        currency=money.currency,
    )  # fmt: skip


def _major(minor: Decimal, currency: str) -> Decimal:
    return minor.scaleb(-MINOR_DIGITS.get(currency, 2)).quantize(DECIMALS, ROUND_HALF_EVEN)


def quote(
    catalog: Catalog, feature: str, quantity_micro: int, plan: str | None = None, now: datetime | None = None
) -> Quoted:
    """What so much of a feature costs, in credits and in money.

    :param quantity_micro: units of the feature in millionths.
    :param plan: of an account that has it: an unlimited one is charged nothing, and its rate counts among the others.
    :param now: as for :func:`rates`.
    :raises KeyError: for a feature or a plan that the catalog has not.
    """
    priced = catalog.features[feature]
    micro = price_of(priced, quantity_micro)
    rule = rule_of(priced, quantity_micro)
    if plan is not None and catalog.plans[plan].unlimited:
        micro, rule = 0, f"the plan {plan} is unlimited: counted, and not charged"
    found = [rate for rate in rates(catalog, feature, now) if rate.kind != "plan" or rate.name == plan]
    money = [
        _major(Decimal(Money.parse(rate.price).minor) * micro / _micro(rate.credits), rate.currency) for rate in found
    ]
    is_paid = bool(micro and money)
    return Quoted(
        feature=feature,
        quantity=format_amount(quantity_micro),
        credits=format_amount(micro),
        rule=rule,
        money_from=min(money) if is_paid else None,
        money_to=max(money) if is_paid else None,
        currency=found[0].currency if is_paid else None,
    )


def _micro(credits: str) -> int:
    return int(Decimal(credits) * MICRO)


def price_words(feature: Feature) -> str:
    """A feature's price in words, such as ``1 per 8, whole blocks``."""
    if not feature.price:
        return "free, counted"
    words = format_amount(feature.price)
    if feature.per != MICRO:
        words += f" per {format_amount(feature.per)}"
    return f"{words}, whole blocks" if feature.rounding == "up" else words


def rule_of(feature: Feature, quantity_micro: int) -> str:
    """How a charge is worked out, in words: ``12 × 1 / 8``, or by whole blocks."""
    quantity, price, per = map(format_amount, (quantity_micro, feature.price, feature.per))
    if not feature.price:
        return "free: counted, and not charged"
    if feature.rounding == "up":
        blocks = -(-quantity_micro // feature.per)
        return f"{blocks} {'block' if blocks == 1 else 'blocks'} of {per} × {price}"
    words = f"{quantity} × {price}" if feature.per == MICRO else f"{quantity} × {price} / {per}"
    return words if not quantity_micro * feature.price % feature.per else f"{words}, rounded up to a millionth"
