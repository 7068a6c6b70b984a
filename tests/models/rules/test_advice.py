"""What is advised: the cheapest packs that last, a plan that costs less than they did, cheaper alternatives."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec
import pytest

from creditlane.amounts import MICRO
from models.catalog import parse_catalog
from models.rules.advice import Use, advise

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
CATALOG = parse_catalog(
    """
[catalog]
name = "advised"
[features.video]
title = "Video"
price = "5"
alternatives = ["image", "sketch"]
[features.image]
title = "Image"
price = "1"
per = "2"
alternatives = ["video"]
[features.sketch]
title = "Sketch"
price = "0"
[packs.small]
title = "Small"
credits = "10"
price = "2.00 EUR"
[packs.large]
title = "Large"
credits = "100"
price = "15.00 EUR"
[packs.brief]
credits = "1000"
price = "1.00 EUR"
expires_days = 7
[packs.quoted]
quote_above = "500"
[plans.free]
monthly_credits = "5"
[plans.starter]
title = "Starter"
monthly_credits = "60"
price = "9.00 EUR"
[plans.pro]
monthly_credits = "600"
price = "40.00 EUR"
[plans.yearly]
monthly_credits = "600"
price = "240.00 EUR"
interval = "year"
[plans.endless]
unlimited = true
price = "99.00 EUR"
""",
    "advised.toml",
)


def use(balance: int = 0, pace: int = 1, **others: object) -> Use:
    """So many credits, and so many a day."""
    return msgspec.structs.replace(Use(balance_micro=balance * MICRO, pace_micro=pace * MICRO), **others)


@pytest.mark.parametrize(
    ("balance", "pace", "days", "missing", "pack", "count", "price"),
    [
        (0, 1, 10, 10, "small", 1, "2.00 EUR"),
        (0, 1, 11, 11, "small", 2, "4.00 EUR"),
        (0, 1, 30, 30, "small", 3, "6.00 EUR"),
        (0, 3, 30, 90, "large", 1, "15.00 EUR"),  # nine small ones would be 18.00
        (0, 10, 30, 300, "large", 3, "45.00 EUR"),
        (5, 1, 10, 5, "small", 1, "2.00 EUR"),
        (0, 1, 7, 7, "brief", 1, "1.00 EUR"),  # it lives just long enough
        (0, 1, 8, 8, "small", 1, "2.00 EUR"),
        (10, 1, 10, 0, None, 0, ""),
        (0, 0, 10, 0, None, 0, ""),
    ],
)
def test_the_cheapest_packs_that_last_to_the_periods_end(
    balance: int, pace: int, days: int, missing: int, pack: str | None, count: int, price: str
) -> None:
    advice = advise(use(balance, pace, period_end=NOW + timedelta(days=days)), NOW, CATALOG)
    assert advice.missing == missing
    assert advice.until == NOW + timedelta(days=days)
    found = advice.pack
    assert (found.pack, found.count, found.price) == (pack, count, price) if found else pack is None


def test_when_it_runs_out() -> None:
    advice = advise(use(6, 2), NOW, CATALOG)
    assert (advice.runs_out_at, advice.pace) == (NOW + timedelta(days=3), Decimal(2))
    assert advice.until == NOW + timedelta(days=30)
    assert advise(use(60, 2), NOW, CATALOG).runs_out_at is None
    assert advise(use(0, 2), NOW, CATALOG).runs_out_at == NOW
    assert advise(use(6, 2, period_end=NOW - timedelta(days=1)), NOW, CATALOG).until == NOW + timedelta(days=30)


@pytest.mark.parametrize(
    ("pace", "spent", "plan", "rank", "found"),
    [
        (1, 1000, None, (False, 0), "starter"),
        (1, 900, None, (False, 0), None),  # it costs as much
        (2, 1000, None, (False, 0), "starter"),
        (3, 1000, None, (False, 0), None),  # 90 a month: it would not do
        (3, 2500, None, (False, 0), "yearly"),  # 20.00 a month
        (3, 2500, "starter", (False, 60 * MICRO), "yearly"),  # 11.00 more a month
        (3, 1000, "starter", (False, 60 * MICRO), None),
        (1, 9999, "pro", (False, 600 * MICRO), "endless"),  # not a lower one, nor one as high
        (100, 9999, None, (False, 0), "endless"),
        (1, 99_999, "endless", (True, 0), None),
    ],
)
def test_a_plan_that_costs_less_than_the_packs_bought_lately(
    pace: int, spent: int, plan: str | None, rank: tuple[bool, int], found: str | None
) -> None:
    advice = advise(use(0, pace, spent_minor=spent, plan=plan, rank=rank), NOW, CATALOG)
    assert (advice.plan and advice.plan.plan) == found
    if advice.plan is not None:
        assert advice.plan.spent == f"{Decimal(spent) / 100:.2f} EUR"


def test_who_has_no_limit_lacks_nothing() -> None:
    assert advise(use(0, 9, plan="endless", rank=(True, 0)), NOW, CATALOG).pack is None


def test_cheaper_or_free_alternatives_of_what_is_used_most() -> None:
    (found,) = advise(use(features=["image", "video", "gone"]), NOW, CATALOG).alternatives
    # An image costs less than a video, and a sketch nothing; for an image there is only what costs more.
    assert (found.feature, found.alternative, found.alternative_title) == ("video", "sketch", "Sketch")
    assert found.free


def test_the_packs_of_an_offer_are_advised_while_it_runs_and_a_bundles_lots_that_live_as_long() -> None:
    catalog = parse_catalog(
        """
[catalog]
name = "selling"
[features.image]
price = 1
[packs.bundle]
title = "Bundle"
price = "2.00 EUR"
[[packs.bundle.grants]]
credits = 10
[[packs.bundle.grants]]
credits = 100
expires_days = 7
[[packs.bundle.grants]]
credits = 100
features = ["image"]
[packs.images]
price = "0.50 EUR"
[[packs.images.grants]]
credits = 100
features = ["image"]
[offers.sale]
title = "Sale"
pack = "bundle"
price = "1.00 EUR"
until = 2026-11-22T00:00:00Z
[offers.once]
pack = "bundle"
price = "0.10 EUR"
per_account = 1
""",
        "selling.toml",
    )
    sale = advise(use(), NOW, catalog).pack
    assert sale is not None
    assert (sale.pack, sale.offer, sale.title, sale.count, sale.price) == ("bundle", "sale", "Sale", 3, "3.00 EUR")
    after = advise(use(), NOW + timedelta(days=1), catalog).pack
    assert after is not None
    assert (after.pack, after.offer, after.title, after.count, after.price) == ("bundle", None, "Bundle", 3, "6.00 EUR")
