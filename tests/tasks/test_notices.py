"""Notices: what an account is told of because of an operation and of the time before it, and what it is not."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from models.catalog import parse_catalog
from models.rules.calendar import add_months
from models.rules.catalog import NOTICE_KINDS, Catalog
from models.rules.state import Notice
from tests.tasks.test_operations import Lane
from tests.tasks.test_plans import NEW_YEAR, Member

TEXT = """
[catalog]
name = "told"
[features.image]
price = "1"
[plans.big]
monthly_credits = "500"
price = "40 EUR"
[plans.small]
monthly_credits = "100"
price = "10 EUR"
[plans.free]
monthly_credits = "20"
mode = "rollover"
rollover_cap = "50%"
[plans.patient]
monthly_credits = "100"
price = "99 EUR"
interval = "year"
grace_days = 70
[plans.endless]
unlimited = true
price = "99 EUR"
[notify]
"""
LOW = parse_catalog(TEXT + 'low_balance = ["20%", "10%", "5%"]\n', "told.toml")
ABSOLUTE = parse_catalog(TEXT + 'low_balance = ["5", "50"]\n', "told.toml")
BOTH = parse_catalog(TEXT + 'low_balance = ["20%", "10"]\nkinds = ["depleted"]\n', "told.toml")
ALL = parse_catalog(TEXT + f"kinds = {list(NOTICE_KINDS)}\n", "told.toml")
NONE = parse_catalog(TEXT, "told.toml")


def told(lane: Lane) -> list[Notice]:
    """The notices since the last look."""
    notices, lane.account.notices = lane.account.notices, []
    return notices


def kinds(lane: Lane) -> list[str]:
    return [notice.kind for notice in told(lane)]


def thresholds(lane: Lane) -> list[str]:
    """Of the low balances told of since the last look: at which threshold."""
    return [notice.details["threshold"] for notice in told(lane) if notice.kind == "low_balance"]


def with_credits(amount: int, catalog: Catalog) -> Member:
    member = Member.of(None, catalog)
    member("grant", amount=amount, source="pack")
    told(member)
    return member


def test_the_worked_example_of_thresholds() -> None:
    """500 a month; on the way down exactly three notices, none repeated, all armed again by the renewal."""
    member = Member.of("big", LOW)
    for month in (2, 3):
        seen = []
        for _ in range(500):
            member.use(1)
            seen += [(notice.details["threshold"], notice.details["available"]) for notice in told(member)]
        assert seen == [("100", "100"), ("50", "50"), ("25", "25")]
        member.until(month, 1).pay(month, 1)
        assert told(member) == []


def test_one_operation_tells_of_the_lowest_threshold_that_it_crosses_and_of_no_other() -> None:
    member = with_credits(100, LOW)
    member.use(93)
    assert [notice.details for notice in told(member)] == [{"available": "7", "threshold": "10", "reference": "100"}]
    member.use(1)
    assert told(member) == [], "20 was crossed by the same operation, and is not told of later"
    member.use(1)
    assert thresholds(member) == ["5"], "a balance of exactly the threshold is at it"


def test_a_threshold_is_armed_again_when_the_balance_rises_above_it() -> None:
    member = with_credits(100, LOW)
    charge = member.use(81)["id"]
    assert thresholds(member) == ["20"]
    member("refund", operation=charge, amount=1)
    member.use(1)
    assert thresholds(member) == [], "20 is not above 20"
    member("refund", operation=charge, amount=2)
    assert thresholds(member) == [], "on the way up nothing is told"
    member.use(5)
    assert thresholds(member) == ["20"]


def test_percentages_are_of_what_was_there_when_credits_last_came_in() -> None:
    member = with_credits(100, LOW)
    member.use(50)
    member("grant", amount=150, source="pack")  # 200 now, whatever there was before
    member.use(155)
    assert thresholds(member) == []
    member.use(5)
    assert thresholds(member) == ["40"]
    member("adjust", amount=60, actor="a", reason="b")
    member.use(80)
    assert thresholds(member) == ["20"]


def test_credits_that_only_take_effect_later_are_not_among_those_that_are_there() -> None:
    member = with_credits(100, LOW)
    member("grant", amount=900, source="pack", effective_at=NEW_YEAR + timedelta(days=90))
    member.use(80)
    assert thresholds(member) == ["20"]


def test_absolute_amounts() -> None:
    member = with_credits(100, ABSOLUTE)
    member.use(45)
    assert thresholds(member) == []
    member.use(5)
    assert thresholds(member) == ["50"]
    member.use(46)
    assert thresholds(member) == ["5"]


def test_the_end_of_all_credits_is_told_in_place_of_a_low_balance() -> None:
    member = with_credits(100, BOTH)
    member.use(100)
    assert kinds(member) == ["depleted"]
    member("grant", amount=100, source="pack")
    member("hold", amount=100)
    assert kinds(member) == ["depleted"], "what is set aside cannot be spent either"
    assert member("consume", amount=1)["status"] == "rejected"
    assert told(member) == [], "and once is enough"


def test_a_catalog_without_that_kind_tells_of_the_threshold_at_nothing_too() -> None:
    member = with_credits(100, LOW)
    member.use(100)
    assert thresholds(member) == ["5"]


def test_what_lapses_takes_the_balance_below_a_threshold_as_well() -> None:
    member = with_credits(10, LOW)
    member("grant", amount=90, source="promo", expires_in=60)
    told(member)
    member.now += timedelta(seconds=60)
    refusal = member("consume", amount=1000)
    assert refusal["status"] == "rejected"
    assert thresholds(member) == ["10"], "even where the operation itself is refused"
    member("settle")
    assert told(member) == []


def test_a_renewal_to_a_lower_plan_is_no_low_balance() -> None:
    """From 500 to 100, which is all that the new plan gives."""
    member = Member.of("big", LOW).until(1, 15)
    member("plans.change", plan="small")
    member.pay(2, 1)
    member.until(2, 2)("settle")
    assert member.available() == "100"
    assert told(member) == []
    member.use(80)
    assert thresholds(member) == ["20"]


def test_credits_that_come_in_before_anybody_looks_are_no_low_balance() -> None:
    member = Member.of("free", LOW)
    member.use(15)
    told(member)
    member.until(2, 2).use(1)
    assert told(member) == []


def test_no_limit_no_low_balance() -> None:
    member = Member.of("endless", BOTH)
    member.use(1000)
    assert told(member) == []


def test_what_was_answered_before_is_not_told_of_again() -> None:
    member = with_credits(100, LOW)
    for _ in range(2):
        member("consume", "one", amount=90)
    assert thresholds(member) == ["10"]


def test_nothing_is_told_unless_the_catalog_says_so() -> None:
    member = with_credits(100, NONE)
    member.use(100)
    member("plans.subscribe", plan="big")
    member.until(5, 1)("settle")
    assert told(member) == []


# What becomes of plans, and the rest.


def test_the_life_of_a_plan() -> None:
    member = Member(ALL, now=NEW_YEAR)
    opened = member("open", plan="free")
    (started,) = told(member)
    assert (started.kind, started.details["plan"], started.details["allotted"]) == ("plan_started", "free", "20")
    assert opened["plan"] == "free"
    member.use(5)
    assert told(member) == []
    member.until(2, 2)("settle")
    (renewed,) = told(member)
    assert renewed.kind == "period_renewed"
    assert renewed.at == member.plan.period_start
    assert renewed.details == {"plan": "free", "allotted": "20", "rolled_over": "10", "expired": "5"}
    member("plans.change", plan="small", payment="in_1")
    member("plans.change", plan="free")
    assert kinds(member) == ["plan_changed", "plan_changed"]
    member("plans.cancel")
    assert kinds(member) == ["plan_cancelled"]
    member.until(4, 1)("settle")
    lapsed, ended = told(member)
    assert (lapsed.kind, lapsed.at, lapsed.details) == ("credits_expired", member.plan.period_end, {"amount": "100"})
    assert (ended.kind, ended.at, ended.details) == ("plan_ended", member.plan.period_end, {"plan": "small"})


def test_each_period_that_was_missed_is_told_of_under_a_key_of_its_own() -> None:
    member = Member.of("free", ALL)
    told(member)
    member.until(5, 2)("settle")
    notices = told(member)
    assert [notice.kind for notice in notices] == ["period_renewed"] * 4
    assert len({notice.key for notice in notices}) == 4
    assert [notice.at.month for notice in notices] == [2, 3, 4, 5]


def test_a_payment_that_renews_tells_of_the_period_that_it_begins() -> None:
    member = Member.of("small", ALL)
    told(member)
    member.until(2, 2).pay(2, 1)
    (renewed,) = told(member)
    assert (renewed.kind, renewed.at, renewed.details["expired"]) == ("period_renewed", member.now, "100")


def test_periods_that_a_late_payment_begins_at_one_instant_are_told_of_one_by_one() -> None:
    member = Member.of("patient", ALL)
    told(member)
    year = add_months(NEW_YEAR, 12, "UTC")
    member.now = year + timedelta(days=65)
    member("plans.renew", period_start=year)
    renewed = [notice for notice in told(member) if notice.kind == "period_renewed"]
    assert len({notice.key for notice in renewed}) == len(renewed) == 14
    assert [notice.at for notice in renewed][-3:] == [member.now] * 3


def test_what_lapses_at_one_instant_is_told_of_once() -> None:
    member = with_credits(1, ALL)
    for amount in (2, 3):
        member("grant", amount=amount, source="promo", expires_in=60)
    member("grant", amount=4, source="promo", expires_in=70)
    member.now += timedelta(days=1)
    member("settle")
    assert [notice.details for notice in told(member)] == [{"amount": "5"}, {"amount": "4"}]


def test_packs_and_refunds() -> None:
    member = Member.of(None, ALL)
    member("grant", amount=10, source="pack", purchase="pi_1")
    (bought,) = told(member)
    expected: dict[str, Any] = {"amount": "10", "source": "pack", "purchase": "pi_1"}
    assert (bought.kind, bought.details) == ("pack_bought", expected)
    charge = member.use(4)["id"]
    member("refund", operation=charge, amount=3)
    (refunded,) = told(member)
    assert (refunded.kind, refunded.details) == ("refunded", {"amount": "3", "charge": charge})
    assert member("refund", operation=charge, amount=3)["status"] == "rejected"
    assert told(member) == []
