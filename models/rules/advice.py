"""What somebody whose credits run low, or out, or are about to expire can do (schedules: notices). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal

import msgspec

from creditlane.amounts import MICRO
from creditlane.inbox import Advice, Alternative, PackAdvice, PlanAdvice
from models.rules.catalog import Catalog, Feature, Money, Plan

AHEAD = timedelta(days=30)
"""How far ahead is looked where no plan's period ends."""

MONTH_DAYS = 30
"""What a month of use is reckoned as."""

MAX_ALTERNATIVES = 3


class Use(msgspec.Struct, kw_only=True, frozen=True):
    """How an account stands, and how it has been used lately; amounts in micro-credits."""

    balance_micro: int
    """Spendable now."""
    pace_micro: int
    """Spent in a day."""
    features: Sequence[str] = ()
    """What most was spent on, the dearest first."""
    spent_minor: int = 0
    """Money paid for packs in the last 30 days, in minor units of the catalog's currency."""
    plan: str | None = None
    """Its plan, while one is active."""
    rank: tuple[bool, int] = (False, 0)
    """That plan's."""
    period_end: datetime | None = None


def advise(use: Use, now: datetime, catalog: Catalog) -> Advice:
    """Work out what there is to do: packs, a plan, cheaper alternatives.

    Packs: those that cover what is missing until the period's end at the present pace, and live as long, for the least
    money; of equals the fewest. A plan: the cheapest that is higher than the present one, covers a month at the present
    pace, and costs less more in a month than was spent on packs. Alternatives: of the features that most was spent on.

    :param now: the instant that the use was looked at.
    """
    until = use.period_end if use.period_end is not None and use.period_end > now else now + AHEAD
    wanted = use.pace_micro * _seconds(until - now) // 86_400
    missing = 0 if use.rank[0] else max(0, wanted - use.balance_micro)
    runs_out_at = None
    if missing:
        runs_out_at = now + timedelta(seconds=max(0, use.balance_micro) * 86_400 // use.pace_micro)
    return Advice(
        pace=_credits(use.pace_micro),
        until=until,
        runs_out_at=runs_out_at,
        missing=_credits(missing),
        pack=_cheapest_packs(missing, now, until, catalog) if missing else None,
        plan=_cheaper_plan(use, catalog),
        alternatives=_alternatives(use.features, catalog),
    )


def _cheapest_packs(missing: int, now: datetime, until: datetime, catalog: Catalog) -> PackAdvice | None:
    found: list[tuple[int, int, PackAdvice]] = []
    for name, offered, pack, price in catalog.on_sale(now):
        credits = pack.general_micro(until - now)
        if not credits:
            continue
        count = -(-missing // credits)
        money = Money.parse(price)
        total = Money(money.minor * count, money.currency)
        offer = PackAdvice(
            pack=name,
            title=(catalog.offers[offered].title if offered is not None else "") or pack.title or name,
            offer=offered,
            count=count,
            credits=_credits(credits * count),
            price=str(total),
        )
        found.append((total.minor, count, offer))
    return min(found, key=lambda each: each[:2])[2] if found else None


def _cheaper_plan(use: Use, catalog: Catalog) -> PlanAdvice | None:
    present = catalog.plans.get(use.plan or "")
    paid = 0 if present is None else _monthly_minor(present)
    found: list[tuple[int, PlanAdvice]] = []
    for name, plan in catalog.plans.items():
        monthly = int(plan.monthly_credits)
        covers = plan.unlimited or monthly >= use.pace_micro * MONTH_DAYS
        minor = _monthly_minor(plan) - paid
        if plan.price is None or not covers or (plan.unlimited, monthly) <= use.rank or minor >= use.spent_minor:
            continue
        advice = PlanAdvice(
            plan=name,
            title=plan.title or name,
            price=plan.price,
            interval=plan.interval,
            credits=None if plan.unlimited else _credits(monthly),
            spent=str(Money(use.spent_minor, catalog.catalog.currency)),
        )
        found.append((minor, advice))
    return min(found, key=lambda each: each[0])[1] if found else None


def _alternatives(features: Sequence[str], catalog: Catalog) -> list[Alternative]:
    found: list[Alternative] = []
    for name in features:
        feature = catalog.features.get(name)
        others = [] if feature is None else [(other, catalog.features[other]) for other in feature.alternatives]
        cheaper = [(other, its) for other, its in others if feature is not None and _is_cheaper(its, feature)]
        if feature is None or not cheaper:
            continue
        other, its = min(cheaper, key=lambda each: each[1].price * MICRO // each[1].per)
        found.append(
            Alternative(
                feature=name,
                title=feature.title or name,
                alternative=other,
                alternative_title=its.title or other,
                free=not its.price,
            )
        )
    return found[:MAX_ALTERNATIVES]


def _is_cheaper(one: Feature, other: Feature) -> bool:
    """Whether a unit of one costs less than a unit of the other."""
    return one.price * other.per < other.price * one.per


def _monthly_minor(plan: Plan) -> int:
    """What a plan costs in a month, in minor units, rounded up."""
    if plan.price is None:
        return 0
    return -(-Money.parse(plan.price).minor // (12 if plan.interval == "year" else 1))


def _credits(micro: int) -> Decimal:
    return Decimal(micro) / MICRO


def _seconds(span: timedelta) -> int:
    return span // timedelta(seconds=1)
