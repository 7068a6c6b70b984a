"""Plans: the worked examples of the shipped catalogs, each refusal, and how credits might be had twice or be lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creditlane.codes import Code
from models.catalog import load_catalog, parse_catalog
from models.rules.calendar import add_months
from models.rules.catalog import Catalog
from models.rules.state import MAX_TOTAL_MICRO, Subscription
from tests.tasks.test_operations import Lane, refused

NEW_YEAR = datetime(2027, 1, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)

TEXT = """
[catalog]
name = "plans"
zone = "Europe/Paris"
[priorities]
rollover = 20
monthly = 30
[features.image]
price = "1"
[plans.free]
monthly_credits = "20"
[plans.hobby]
monthly_credits = "50"
[plans.saver]
monthly_credits = "100"
mode = "rollover"
rollover_cap = "50%"
rollover_months = 2
[plans.hoarder]
monthly_credits = "10"
mode = "accumulate"
[plans.calendar]
monthly_credits = "30"
anchor = "month"
[plans.calendar_paid]
monthly_credits = "30"
anchor = "month"
price = "3 EUR"
[plans.basic]
monthly_credits = "100"
price = "10 EUR"
[plans.more]
monthly_credits = "300"
price = "25 EUR"
[plans.prorated]
monthly_credits = "400"
price = "30 EUR"
upgrade = "prorated"
[plans.full]
monthly_credits = "500"
price = "40 EUR"
upgrade = "full"
[plans.carrying]
monthly_credits = "100"
price = "10 EUR"
mode = "rollover"
rollover_cap = "1000"
[plans.yearly]
monthly_credits = "100"
price = "100 EUR"
interval = "year"
[plans.patient]
monthly_credits = "100"
price = "100 EUR"
interval = "year"
grace_days = 70
[plans.endless]
unlimited = true
price = "99 EUR"
[clawback]
on_spent = "debt"
"""
PLANS = parse_catalog(TEXT, "plans.toml")
FORGIVING = parse_catalog(TEXT.replace('"debt"', '"forgive"'), "plans.toml")


class Member(Lane):
    """An account with a plan."""

    @classmethod
    def of(cls, plan: str | None, catalog: Catalog = PLANS, **content: Any) -> Member:
        """A new account, at the new year; with a plan that began then, if one is named."""
        member = cls(catalog, now=NEW_YEAR)
        member("open", kind="pool")
        if plan is not None:
            assert member("plans.subscribe", plan=plan, **content)["status"] == "applied"
        return member

    @property
    def plan(self) -> Subscription:
        assert self.account.subscription is not None
        return self.account.subscription

    def until(self, month: int, day: int) -> Member:
        """Let time pass to a date of 2027, at the hour at which the plan began."""
        self.now = datetime(2027, month, day, 9, tzinfo=UTC)
        return self

    def use(self, amount: int | str) -> dict[str, Any]:
        result = self("consume", amount=amount)
        assert result["status"] == "applied"
        return result

    def pay(self, month: int, day: int, **content: Any) -> dict[str, Any]:
        """A payment for what begins on a date of 2027."""
        return self("plans.renew", period_start=datetime(2027, month, day, 9, tzinfo=UTC), **content)

    def undo(self) -> dict[str, Any]:
        return self("plans.undo", actor="admin", reason="a mistake")

    def by_source(self) -> dict[str, str]:
        balance: dict[str, Any] = self("settle")["balance"]
        return dict(balance.get("by_source", {}))

    def given(self) -> int:
        """All credits that the account was ever given, whole ones."""
        return int(self.account.granted // 10**6)


# The worked examples of the shipped catalogs, read like the plan.


def shipped(name: str) -> Member:
    member = Member(load_catalog(name), now=NEW_YEAR)
    member("open")
    return member


def test_the_worked_example_of_the_rollover_catalog() -> None:
    member = shipped("rollover")
    member("plans.subscribe", plan="starter")
    member.use(30)
    member.until(2, 1).pay(2, 1)
    assert member.by_source() == {"rollover": "70", "monthly": "100"}
    renewed = member.until(3, 1).pay(3, 1)
    assert renewed["balance"]["by_source"] == {"rollover": "100", "monthly": "100"}
    assert [entry.amount_micro // 10**6 for entry in member.account.entries if entry.kind == "expired"] == [70]
    member("grant", amount=50, source="pack", purchase="fifty", expires_in=90 * 86_400)
    assert member.use(60)["balance"]["by_source"] == {"rollover": "90", "monthly": "100"}


def test_the_worked_example_of_the_dual_catalog() -> None:
    member = shipped("dual")
    member("plans.subscribe", plan="plus")
    member("grant", amount=40, source="purchased", purchase="forty")
    assert member.use(110)["balance"]["by_source"] == {"purchased": "30"}
    assert member.until(2, 1).pay(2, 1)["balance"]["by_source"] == {"monthly": "100", "purchased": "30"}
    assert member.undo()["balance"]["by_source"] == {"purchased": "30"}
    assert [entry.kind for entry in member.account.entries][-2:] == ["granted", "revoked"], "both are in the history"


def test_the_worked_example_of_the_registration_catalog() -> None:
    member = shipped("registration")
    features = ["interior", "exterior", "sketch", "furnish", "remove", "video"]
    assert [member("consume", feature=each)["balance"]["available"] for each in features] == [
        "5",
        "4",
        "3",
        "2",
        "1",
        "0",
    ]
    seventh = member("consume", feature="interior")
    assert refused(seventh, Code.INSUFFICIENT_CREDITS)
    assert seventh["offer"] == {"plan": "subscriber", "price": "9.00 EUR", "interval": "month", "unlimited": True}
    member("plans.subscribe", plan="subscriber")
    counted = member("consume", feature="interior", quantity=2)
    assert (counted["status"], counted["charged"]) == ("applied", "0")
    assert member.row is not None
    assert (member.row.feature, member.row.quantity_micro) == ("interior", 2 * 10**6)
    member("plans.cancel")
    assert member.until(1, 31)("consume", feature="video")["status"] == "applied"
    assert refused(member.until(2, 1)("consume", feature="video"), Code.INSUFFICIENT_CREDITS)


# Each refusal by name.


def test_what_a_plan_is_refused_for() -> None:
    nobody = Lane(PLANS)
    assert refused(nobody("plans.subscribe", plan="free"), Code.UNKNOWN_ACCOUNT)
    assert refused(nobody("open", plan="nonesuch"), Code.UNKNOWN_PLAN)
    member = Member.of(None)
    assert refused(member("plans.subscribe", plan="nonesuch"), Code.UNKNOWN_PLAN)
    assert refused(member("plans.subscribe", plan="free", period_start=member.now + 2 * DAY), Code.INVALID)
    assert refused(member("plans.change", plan="free"), Code.NO_SUBSCRIPTION)
    assert refused(member("plans.cancel"), Code.NO_SUBSCRIPTION)
    assert refused(member.pay(1, 1), Code.NO_SUBSCRIPTION)
    assert refused(member.pay(1, 1, plan="free"), Code.INVALID)
    assert refused(member.undo(), Code.NO_SUBSCRIPTION)
    member("plans.subscribe", plan="basic", payment="pi_1")
    assert refused(member("plans.subscribe", plan="basic"), Code.ALREADY_SUBSCRIBED)
    assert refused(member("plans.subscribe", plan="more"), Code.ALREADY_SUBSCRIBED)
    assert refused(member("plans.change", plan="nonesuch"), Code.UNKNOWN_PLAN)
    assert refused(member.pay(2, 1, plan="nonesuch"), Code.UNKNOWN_PLAN)
    assert refused(member.pay(2, 1, plan="free"), Code.INVALID)
    assert refused(member.pay(1, 1), Code.ALREADY_RENEWED)
    assert refused(member.undo(), Code.NOTHING_TO_UNDO)
    member("plans.cancel", at="now")
    assert refused(member("plans.subscribe", plan="basic", payment="pi_1"), Code.ALREADY_RENEWED)
    assert refused(member("plans.change", plan="more"), Code.NO_SUBSCRIPTION)
    assert member.given() == 100
    free = Member.of("free")
    assert refused(free.pay(2, 1), Code.INVALID)


def test_an_unknown_plan_opens_no_account() -> None:
    member = Member(PLANS, now=NEW_YEAR)
    assert refused(member("open", plan="nonesuch"), Code.UNKNOWN_PLAN)
    opened = member("open", plan="free")
    assert (opened["plan"], opened["balance"]["available"]) == ("free", "20")


# Periods.


def test_a_free_plan_renews_by_the_calendar_and_catches_up_each_period_once() -> None:
    member = Member.of("saver")
    member.until(4, 15)
    assert member.by_source() == {"rollover": "50", "monthly": "100"}
    # Periods end at 10 in the morning in Paris, whatever the clocks do: from 28 March on that is 8 in UTC.
    ends = {entry.at for entry in member.account.entries if entry.kind == "granted"}
    assert ends == {NEW_YEAR, datetime(2027, 2, 1, 9, tzinfo=UTC), datetime(2027, 3, 1, 9, tzinfo=UTC),
                    datetime(2027, 4, 1, 8, tzinfo=UTC)}  # fmt: skip
    before = list(member.account.entries)
    member("settle")
    assert member.account.entries == before


def test_carried_credits_live_as_long_as_the_plan_says_and_their_lots_stay_few() -> None:
    member = Member.of("saver")
    for month in range(2, 13):
        member.until(month, 2)
        member("settle")
        assert member.account.open_grants() <= 3
        assert int(member.by_source()["rollover"]) <= 50
    member("plans.cancel", at="now")
    member.now = add_months(member.plan.period_start, 2, "Europe/Paris") - timedelta.resolution
    assert member.available() == "50"
    member.now += timedelta.resolution
    assert member.available() == "0"


def test_what_never_ends_is_trimmed_after_what_ends() -> None:
    member = Member.of("carrying")
    member.until(1, 2)("plans.change", plan="free")
    member("plans.change", plan="saver")  # of equal rank: at once, and it trims what was carried for ever
    member("grant", amount=40, source="rollover")
    member.until(2, 1)
    assert member.by_source() == {"rollover": "50", "monthly": "100"}
    never = [lot for lot in member.account.order if lot.source == "rollover" and lot.expires_at is None]
    assert [lot.available // 10**6 for lot in never] == [40]


def test_accumulated_credits_never_end_not_even_with_the_plan() -> None:
    member = Member.of("hoarder")
    member.until(5, 1)
    assert member.available() == "50"
    member("plans.cancel", at="now")
    member.now += timedelta(days=10_000)
    assert member.available() == "50"


def test_a_plan_of_the_calendar_month_begins_with_the_month_and_is_given_at_once() -> None:
    member = Member.of(None).until(1, 31)
    member("plans.subscribe", plan="calendar")
    start = datetime(2027, 1, 31, 23, tzinfo=UTC)  # midnight in Paris
    assert (member.plan.period_start, member.plan.period_end) == (datetime(2026, 12, 31, 23, tzinfo=UTC), start)
    member.now = start - timedelta.resolution
    member("settle")
    assert member.given() == 30
    member.now = start
    member("settle")
    assert member.given() == 60


def test_a_paid_plan_of_the_calendar_month_is_paid_to_the_months_end_and_not_given_twice() -> None:
    member = Member.of(None).until(1, 15)
    member("plans.subscribe", plan="calendar_paid")
    assert member.plan.paid_until == datetime(2027, 1, 31, 23, tzinfo=UTC)
    member.until(2, 1)
    member("settle")
    assert member.given() == 30
    member.pay(2, 1)
    member.until(2, 28)
    member("settle")
    assert member.given() == 60


def test_the_credits_of_a_month_cannot_be_spent_from_its_end_on() -> None:
    member = Member.of("free")
    member.now = member.plan.period_end - timedelta.resolution
    assert member.available() == "20"
    member.now += timedelta.resolution
    member.use(20)
    assert refused(member("consume", amount=1), Code.INSUFFICIENT_CREDITS)
    assert [entry.kind for entry in member.account.entries] == ["granted", "expired", "granted", "consumed"]


def test_terms_are_those_of_the_beginning_until_the_renewal_and_the_catalogs_from_then_on() -> None:
    member = Member.of("free")
    member.catalog = parse_catalog(TEXT.replace('monthly_credits = "20"', 'monthly_credits = "25"'), "plans.toml")
    member.until(1, 20)
    assert member.available() == "20"
    member.until(2, 1)
    assert member.available() == "25"


def test_a_plan_that_the_catalog_no_longer_has_goes_on_as_it_was() -> None:
    member = Member.of("free")
    member.catalog = parse_catalog(TEXT.replace("[plans.free]", "[plans.gratis]"), "plans.toml")
    member.until(2, 1)
    assert member.available() == "20"
    assert refused(member("plans.change", plan="free"), Code.UNKNOWN_PLAN)


# Payments.


def test_a_payment_that_is_told_of_twice_renews_once() -> None:
    member = Member.of("basic").until(2, 1)
    assert member.pay(2, 1, payment="in_2")["allotted"] == "100"
    assert refused(member.pay(2, 1, payment="in_2"), Code.ALREADY_RENEWED)
    assert refused(member.pay(2, 1, payment="another"), Code.ALREADY_RENEWED), "a period is given once"
    member.until(2, 2)
    assert refused(member.pay(2, 2, payment="a day off"), Code.ALREADY_RENEWED)
    assert member.given() == 200


def test_an_early_payment_renews_at_the_periods_end_and_two_early_ones_twice() -> None:
    member = Member.of("basic").until(1, 10)
    assert "allotted" not in member.pay(2, 1, payment="in_2")
    assert "allotted" not in member.pay(3, 1, payment="in_3")
    assert member.given() == 100
    for month, total in ((2, 200), (3, 300), (4, 300)):
        member.until(month, 2)
        member("settle")
        assert member.given() == total
        assert member.plan.period_start == add_months(NEW_YEAR, month - 1, "Europe/Paris") or month == 4


def test_a_payment_ahead_of_a_year_that_is_paid_for_costs_no_month() -> None:
    member = Member.of("yearly").until(11, 20)
    member("plans.renew", period_start=add_months(NEW_YEAR, 12, "Europe/Paris"))
    member.now = add_months(NEW_YEAR, 23, "Europe/Paris")
    member("settle")
    assert member.given() == 24 * 100
    member.now = add_months(NEW_YEAR, 40, "Europe/Paris")
    member("settle")
    assert member.given() == 24 * 100
    assert not member.plan.is_active


def test_a_late_payment_within_the_days_of_grace_renews_when_it_comes() -> None:
    member = Member.of("basic").until(2, 3)
    assert member.available() == "100", "usable in the days of grace"
    member.use(10)
    paid = member.pay(2, 1)
    assert (paid["allotted"], paid["balance"]["available"]) == ("100", "100")
    assert member.plan.period_end == datetime(2027, 3, 1, 9, tzinfo=UTC)
    assert [entry.at for entry in member.account.entries if entry.kind == "expired"] == [member.now]


def test_what_is_carried_so_late_that_it_would_have_ended_expires_instead() -> None:
    text = TEXT.replace('rollover_cap = "1000"', 'rollover_cap = "1000"\nrollover_months = 1\ngrace_days = 50')
    member = Member.of("carrying", parse_catalog(text, "plans.toml"))
    member.until(3, 10).pay(2, 1)
    assert member.by_source() == {"monthly": "100"}
    assert all(lot.expires_at is None or lot.expires_at > lot.created_at for lot in member.account.grants.values())


def test_without_a_payment_the_plan_ends_after_the_days_of_grace_and_nothing_is_carried() -> None:
    member = Member.of("carrying")
    member.now = datetime(2027, 2, 4, 9, tzinfo=UTC) - timedelta.resolution
    assert member.available() == "100"
    member.now += timedelta.resolution
    assert member.available() == "0"
    assert not member.plan.is_active
    ended = [(entry.kind, entry.at) for entry in member.account.entries]
    assert ended[-1] == ("expired", member.now)


def test_a_payment_after_the_end_begins_anew_with_the_days_that_it_names() -> None:
    member = Member.of("basic").until(2, 10)
    assert member.available() == "0"
    assert member.pay(2, 1)["allotted"] == "100"
    assert member.plan.period_end == datetime(2027, 3, 1, 9, tzinfo=UTC)
    assert refused(member.pay(2, 1), Code.ALREADY_RENEWED)


def test_reactivation_with_a_start_in_the_past_makes_no_lot_that_has_ended() -> None:
    member = Member.of("basic").until(8, 1)
    member("settle")
    reactivated = member.pay(3, 1)
    assert "allotted" not in reactivated
    assert member.account.last_grant == 1
    member("settle")
    assert not member.plan.is_active
    again = Member.of(None).until(8, 20)
    again("plans.subscribe", plan="free", period_start=NEW_YEAR)
    assert again.given() == 20, "one period's credits, the present one's"
    assert again.plan.period_start <= again.now < again.plan.period_end


def test_a_payment_that_begins_amid_a_period_begins_a_new_one_there() -> None:
    member = Member.of("basic").until(1, 15)
    member.use(60)
    paid = member.pay(1, 15)
    assert (paid["allotted"], paid["balance"]["available"]) == ("100", "100")
    assert member.plan.period_start == member.now
    assert member.plan.period_end == add_months(member.now, 1, "Europe/Paris")
    member.until(2, 15).pay(2, 15)
    assert member.given() == 300


def test_a_payment_for_another_plan_gives_that_plan_even_amid_a_period_of_one_without_a_price() -> None:
    member = Member.of("free").until(1, 15)
    paid = member.pay(1, 15, plan="basic", payment="in_1")
    assert (paid["plan"], paid["allotted"]) == ("basic", "100")
    lot = member.account.order[-1]
    assert (lot.purchase, lot.price_minor, lot.price_per) == ("in_1", 1000, 100 * 10**6)


def test_an_annual_payment_allots_monthly_for_its_twelve_months_and_no_longer() -> None:
    member = Member.of("yearly", payment="in_1", unit_price={"minor": 9900, "currency": "EUR", "per": "1200"})
    for month in range(1, 30):
        member.now = add_months(NEW_YEAR, month, "Europe/Paris")
        member("settle")
        assert member.given() == 100 * min(12, month + 1)
    assert {(lot.purchase, lot.price_minor) for lot in member.account.grants.values()} == {("in_1", 9900)}
    assert not member.plan.is_active


def test_a_year_that_is_cancelled_or_left_for_a_lower_plan_is_given_to_its_end() -> None:
    for name in ("plans.cancel", "plans.change"):
        member = Member.of("yearly").until(3, 15)
        member(name, **({"plan": "free"} if name == "plans.change" else {}))
        member.now = add_months(NEW_YEAR, 12, "Europe/Paris") - timedelta.resolution
        member("settle")
        assert member.given() == 12 * 100
        member.now += timedelta.resolution
        member("settle")
        assert member.given() == 12 * 100 + (20 if name == "plans.change" else 0)
        assert member.available() == ("20" if name == "plans.change" else "0")


def test_a_year_paid_for_after_more_than_a_period_of_grace_begins_each_period_in_its_order() -> None:
    member = Member.of("patient")
    member.now = add_months(NEW_YEAR, 12, "Europe/Paris") + timedelta(days=65)
    late = member("plans.renew", period_start=add_months(NEW_YEAR, 12, "Europe/Paris"))
    assert member.plan.period_start <= member.now < member.plan.period_end
    assert late["balance"]["available"] == "100"
    assert all(entry.at <= entry.recorded_at for entry in member.account.entries)
    assert [entry.at for entry in member.account.entries] == sorted(entry.at for entry in member.account.entries)


def test_what_a_plan_without_a_price_gives_was_paid_for_by_nobody() -> None:
    member = Member.of("basic", payment="in_1").until(1, 15)
    member("plans.change", plan="free")
    member.until(2, 2)
    member("settle")
    lot = member.account.order[-1]
    assert (lot.available // 10**6, lot.purchase, lot.price_minor, lot.price_per) == (20, None, None, None)


# Changes.


def test_up_gives_the_difference_down_waits_and_to_and_fro_gives_nothing_more() -> None:
    member = Member.of("basic").until(1, 15)
    assert member("plans.change", plan="more")["allotted"] == "200"
    for _ in range(5):
        down = member("plans.change", plan="basic")
        assert (down["plan"], down["plan_next"], down.get("allotted")) == ("more", "basic", None)
        up = member("plans.change", plan="more")
        assert (up["plan"], up.get("plan_next"), up.get("allotted")) == ("more", None, None)
    assert member.given() == 300
    member("plans.change", plan="basic")
    member.until(2, 1).pay(2, 1)
    assert (member.plan.terms.plan, member.given()) == ("basic", 400)
    assert member("plans.change", plan="more")["allotted"] == "200"
    assert member("plans.change", plan="more").get("allotted") is None


def test_a_prorated_upgrade_gives_what_fits_the_time_left_and_the_rest_never() -> None:
    member = Member.of("basic")
    member.now += (member.plan.period_end - NEW_YEAR) / 2
    assert member("plans.change", plan="prorated")["allotted"] == "150"
    member("plans.change", plan="basic")
    assert member("plans.change", plan="prorated").get("allotted") is None
    assert member("plans.change", plan="full")["allotted"] == "500"


def test_a_full_upgrade_replaces_what_is_left() -> None:
    member = Member.of("basic").until(1, 15)
    member.use(30)
    changed = member("plans.change", plan="full")
    assert (changed["allotted"], changed["expired"]) == ("500", "70")
    assert changed["balance"]["available"] == "500"
    member("plans.change", plan="basic")
    assert member("plans.change", plan="full").get("allotted") is None
    assert member.available() == "500"


def test_an_upgrade_in_the_days_of_grace_gives_nothing_until_it_is_paid_for() -> None:
    for plan in ("more", "prorated", "full"):
        member = Member.of("basic").until(2, 2)
        assert member("plans.change", plan=plan).get("allotted") is None
        assert member.available() == "100"
        paid = member.pay(2, 1)
        assert (paid["plan"], member.plan.allotted) == (plan, PLANS.plans[plan].monthly_credits)
        assert member.given() == 100 + PLANS.plans[plan].monthly_credits // 10**6


def test_an_upgrade_whose_payment_begins_a_period_of_its_own_is_not_given_twice() -> None:
    """Paid from 15 January to 15 February: what is given for it must not be given once more on 1 February."""
    member = Member.of("basic").until(1, 15)
    changed = member("plans.change", plan="more", period_start=member.now, period_end=add_months(member.now, 1, "UTC"))
    assert (changed["plan"], changed["allotted"]) == ("more", "300")
    member.until(2, 5)
    member("settle")
    assert member.given() == 400
    member.until(2, 15).pay(2, 15)
    assert member.given() == 700


def test_from_the_month_to_the_year_amid_a_period_gives_twelve_allotments() -> None:
    member = Member.of("basic").until(1, 15)
    member("plans.change", plan="yearly", period_start=member.now, period_end=add_months(member.now, 12, "UTC"))
    member.now = add_months(member.now, 30, "UTC")
    member("settle")
    assert member.given() == 100 + 12 * 100


def test_to_a_plan_without_a_price_in_the_days_of_grace_at_once() -> None:
    member = Member.of("basic").until(2, 2)
    changed = member("plans.change", plan="free")
    assert (changed["plan"], changed["allotted"], changed["balance"]["available"]) == ("free", "20", "20")


# Cancelling, and beginning again.


def test_cancelled_credits_stay_until_the_periods_end_and_no_longer() -> None:
    member = Member.of("basic").until(1, 15)
    assert member("plans.cancel")["plan_status"] == "cancelled"
    member.now = datetime(2027, 2, 1, 9, tzinfo=UTC) - timedelta.resolution
    assert member.available() == "100"
    member.now += timedelta.resolution
    assert member.available() == "0", "there are no days of grace for what was cancelled"
    member.now += timedelta(days=400)
    member("settle")
    assert member.given() == 100


def test_to_cancel_and_think_better_of_it_gives_nothing_more() -> None:
    member = Member.of("basic").until(1, 15)
    for how in ("plans.subscribe", "plans.change"):
        member("plans.cancel")
        assert member(how, plan="basic")["plan_status"] == "active"
    assert member.given() == 100


@pytest.mark.parametrize("other", ["free", "hobby"])
def test_a_free_plan_ended_and_begun_again_within_its_period_gives_no_more_than_its_highest_plan(other: str) -> None:
    member = Member.of("free")
    for day in range(2, 30):
        member.until(1, day)("plans.cancel", at="now")
        member("plans.subscribe", plan=other if day % 2 else "free")
    assert member.given() == {"free": 20, "hobby": 50}[other]
    start, end = member.plan.period_start, member.plan.period_end
    assert (start, end) == (NEW_YEAR, datetime(2027, 2, 1, 9, tzinfo=UTC)), "nor is its end put off"
    member.now = end
    member("settle")
    assert member.given() == {"free": 40, "hobby": 50 + member.plan.terms.monthly_micro // 10**6}[other]


def test_a_paid_plan_ended_and_begun_again_by_the_same_payment_gives_nothing() -> None:
    member = Member.of("basic", payment="in_1", period_start=NEW_YEAR)
    member("plans.cancel", at="now")
    again = member("plans.subscribe", plan="basic", payment="in_1", period_start=NEW_YEAR)
    assert refused(again, Code.ALREADY_RENEWED)
    assert refused(member.pay(1, 1, payment="in_1"), Code.ALREADY_RENEWED)
    assert member.available() == "0"


def test_ending_now_takes_the_periods_credits_and_leaves_the_carried_ones() -> None:
    member = Member.of("saver").until(2, 2)
    ended = member("plans.cancel", at="now")
    assert (ended["plan_status"], ended["expired"]) == ("ended", "100")
    assert member.by_source() == {"rollover": "50"}


WHIMS = st.lists(
    st.tuples(
        st.sampled_from(["plans.change", "plans.change", "plans.subscribe", "plans.cancel", "end", "spend", "settle"]),
        st.sampled_from(["free", "hobby", "saver", "basic", "more", "prorated"]),
        st.sampled_from([0, 0, 1, 5, 12]),
    ),
    max_size=25,
)


@settings(deadline=None, database=None, derandomize=True, max_examples=200)
@given(whims=WHIMS)
def test_whatever_is_changed_ended_and_begun_again_no_period_gives_more_than_its_highest_plan(
    whims: list[tuple[str, str, int]],
) -> None:
    member = Member.of("free")
    highest: dict[datetime, int] = {}
    allotted: dict[datetime, int] = {}
    for name, plan, days in whims:
        member.now += days * DAY
        member("settle")
        read = len(member.account.entries)
        bought = name == "plans.subscribe" and plan not in ("free", "hobby", "saver")  # each time
        if name in ("plans.change", "plans.subscribe") and not bought:
            member(name, plan=plan)
        elif name in ("plans.cancel", "end"):
            member("plans.cancel", at="now" if name == "end" else "period_end")
        elif name == "spend":
            member("consume", amount=30, partial=True)
        start = member.plan.period_start
        highest[start] = max(highest.get(start, 0), member.plan.terms.monthly_micro)
        came = sum(entry.amount_micro for entry in member.account.entries[read:] if entry.kind == "granted")
        allotted[start] = allotted.get(start, 0) + came
    for entry in member.account.entries:
        if entry.kind == "granted" and entry.operation is None:
            allotted[entry.at] = allotted.get(entry.at, 0) + entry.amount_micro
            highest[entry.at] = max(highest.get(entry.at, 0), entry.amount_micro)
    allotted[NEW_YEAR] = allotted.get(NEW_YEAR, 0) + 20 * 10**6
    highest[NEW_YEAR] = max(highest.get(NEW_YEAR, 0), 20 * 10**6)
    assert all(allotted[start] <= highest[start] for start in allotted)
    starts = sorted(allotted)
    assert all(after - before >= timedelta(days=27, hours=22) for before, after in pairwise(starts))


def test_who_cancels_and_buys_again_before_the_end_has_what_was_paid_for() -> None:
    member = Member.of("basic", payment="in_1").until(1, 20)
    member.use(30)
    member("plans.cancel")
    bought = member("plans.subscribe", plan="basic", payment="in_2", period_start=member.now)
    assert (bought["plan_status"], bought["allotted"]) == ("active", "100")
    assert member.plan.paid_until == add_months(member.now, 1, "Europe/Paris")
    assert refused(member("plans.subscribe", plan="basic", payment="in_2"), Code.ALREADY_SUBSCRIBED)
    member("plans.cancel")
    assert "allotted" not in member("plans.subscribe", plan="basic", payment="in_2")
    assert member.given() == 200


def test_a_year_ahead_is_of_the_plan_that_was_paid_for() -> None:
    """Who goes down at the year's end, and then pays for the next year of the higher plan before that, keeps it."""
    for paid_for in ("yearly", "basic", None):
        member = Member.of("yearly").until(5, 1)
        member("plans.change", plan="basic")
        assert member.plan.pending is None, "of equal rank: at once"
        member = Member.of("patient").until(5, 1)
        member("plans.change", plan="hobby")
        ends = add_months(NEW_YEAR, 12, "Europe/Paris")
        member("plans.renew", period_start=ends, **({} if paid_for is None else {"plan": paid_for}))
        member.now = ends + DAY
        member("settle")
        assert (member.plan.terms.plan, member.given()) == (paid_for or "patient", 1300), (
            "the plan of then has no price"
        )


# Undoing.


@pytest.mark.parametrize(("catalog", "owed"), [(PLANS, True), (FORGIVING, False)], ids=["debt", "forgive"])
def test_undone_after_spending(catalog: Catalog, owed: bool) -> None:
    member = Member.of("saver", catalog).until(2, 2)
    member.use(90)  # 50 of what was carried, 40 of the new allotment
    undone = member.undo()
    assert undone["owed" if owed else "forgiven"] == "40"
    # What had expired at the renewal is back, and pays what is owed first.
    assert undone["restored"] == "50"
    assert undone["balance"]["available"] == ("10" if owed else "50")
    assert refused(member.undo(), Code.NOTHING_TO_UNDO)
    member.until(3, 1)
    assert member.by_source() == {"monthly": "100", "rollover": "10" if owed else "50"}


def test_what_is_undone_is_as_if_it_had_not_been_where_nothing_was_spent() -> None:
    member = Member.of("saver")
    member.use(30)
    member.until(2, 2)
    assert member.by_source() == {"rollover": "50", "monthly": "100"}
    assert member.undo()["balance"]["by_source"] == {"monthly": "70"}
    assert member.account.debt == 0
    member.until(3, 1)
    assert member.by_source() == {"rollover": "50", "monthly": "100"}, "and is carried with the next renewal"


def test_an_upgrade_after_the_renewal_that_is_undone_stays_the_periods_own() -> None:
    member = Member.of("basic").until(2, 1)
    member.pay(2, 1)
    member("plans.change", plan="more")
    assert member.undo()["balance"]["available"] == "300"  # 200 of the upgrade, 100 that had expired
    member.until(3, 1).pay(3, 1)
    assert member.by_source() == {"monthly": "300"}, "what the upgrade gave has ended with its period"


# Claw-back, holds, refunds and transfers across a period's end.


def test_a_payment_that_is_taken_back_counts_once_what_was_carried() -> None:
    member = Member.of("carrying", payment="in_1").until(2, 1)
    member.pay(2, 1, payment="in_2")
    member.use(130)  # the 100 that were carried and 30 of the second month
    revoked = member("revoke", purchase="in_1")
    assert (revoked["charged"], revoked["owed"]) == ("0", "100")
    assert refused(member("revoke", purchase="in_1"), Code.EXCEEDS_ORIGINAL)
    assert member.account.debt == 100 * 10**6
    untouched = Member.of("carrying", payment="in_1").until(2, 1)
    untouched.pay(2, 1, payment="in_2")
    assert untouched("revoke", purchase="in_1")["charged"] == "100"
    assert untouched.by_source() == {"monthly": "100"}


def test_a_payment_that_is_taken_back_after_it_was_carried_twice_counts_once() -> None:
    member = Member.of("carrying", payment="in_1")
    member.use(20)
    for month in (2, 3):
        member.until(month, 1).pay(month, 1, payment=f"in_{month}")
    revoked = member("revoke", purchase="in_1")
    assert (revoked["charged"], revoked["owed"]) == ("80", "20")
    assert member.by_source() == {"rollover": "100", "monthly": "100"}


def test_other_rules_for_the_clocks_of_a_zone_move_no_period_by_more_than_they_move_the_clocks() -> None:
    """A country gives up summer time in the midst of a subscription: as many allotments, none lost and none twice."""
    member, other = Member.of("free"), Member.of("free")
    member.until(2, 15)("settle")
    other.until(2, 15)("settle")
    member.plan.zone = "Africa/Lagos"  # Paris without summer time
    for month in range(3, 13):
        member.until(month, 15)("settle")
        other.until(month, 15)("settle")
        assert member.given() == other.given() == 20 * month
        assert abs(member.plan.period_start - other.plan.period_start) <= timedelta(hours=1)
        assert member.available() == other.available() == "20"


def test_a_hold_across_the_periods_end_lapses_with_it_and_what_is_captured_is_paid_by_it() -> None:
    member = Member.of("free")
    member.until(1, 20)("hold", "held", amount=15, ttl=20 * 86_400)
    member.until(2, 2)
    released = member("release", hold="held")
    assert released["balance"]["available"] == "20", "the last month's credits are gone"
    captured = Member.of("free")
    captured.until(1, 20)("hold", "held", amount=15, ttl=20 * 86_400)
    captured.until(2, 2)
    assert captured("capture", hold="held")["balance"]["available"] == "20"


def test_credits_that_are_held_over_a_renewal_do_not_come_back_over_and_over() -> None:
    """Whoever holds and releases at each period's end has never more than who does not."""
    member, honest = Member.of("saver"), Member.of("saver")
    for month in range(2, 12):
        number = f"hold-{month}"
        member.until(month - 1, 25)
        member("hold", number, amount=member.available(), ttl=20 * 86_400)
        member.until(month, 2)
        assert member("release", hold=number)["status"] == "applied"
        honest.until(month, 2)
        assert int(member.available()) <= int(honest.available())


def test_carried_credits_that_are_held_over_a_renewal_count_towards_the_cap() -> None:
    """Or whoever held them at each period's end, and released them after it, would carry more and more."""
    member = Member.of("saver").until(2, 20)
    assert member.by_source() == {"rollover": "50", "monthly": "100"}
    member("hold", "held", amount=50, ttl=20 * 86_400)
    member("transfer", "gift", to="nobody", amount=10)
    member.until(3, 2)
    assert member.by_source() == {"monthly": "100"}
    member("release", hold="held")
    assert member.by_source() == {"rollover": "50", "monthly": "100"}


def test_a_refund_after_the_periods_end_lives_as_long_as_refunds_do() -> None:
    member = Member.of("free")
    charge = member.use(15)["id"]
    member.until(2, 2)
    refunded = member("refund", operation=charge)
    assert refunded["balance"]["available"] == "35"
    member.until(3, 5)
    assert member.available() == "20"


def test_a_refund_within_the_period_ends_with_it() -> None:
    member = Member.of("free")
    charge = member.use(15)["id"]
    member("refund", operation=charge)
    member.until(2, 2)
    assert member.available() == "20"


def test_a_debt_is_paid_out_of_the_next_allotment_once() -> None:
    member = Member.of("basic", payment="in_1")
    member.use(100)
    member("revoke", purchase="in_1", amount=30)
    renewed = member.until(2, 1).pay(2, 1)
    assert (renewed["allotted"], renewed["balance"]["available"]) == ("100", "70")
    assert "debt" not in renewed["balance"]
    assert member.until(3, 1).pay(3, 1)["balance"]["available"] == "100"


def test_a_gift_of_a_months_credits_ends_with_the_month() -> None:
    member = Member.of("free")
    member("transfer", to="somebody", amount=20)
    (lot,) = member.account.grants.values()
    assert lot.expires_at == member.plan.period_end
    assert member.account.in_transit == 20 * 10**6
    member.until(2, 2)
    assert member.available() == "20"


# Unlimited.


def test_no_limit_while_the_plan_lasts_days_of_grace_included() -> None:
    member = Member.of("endless")
    assert member.use(10**6)["charged"] == "0"
    held = member("hold", "held", amount=100)
    assert (held["status"], held["charged"]) == ("applied", "0")
    assert member("capture", hold="held", amount=50)["charged"] == "0"
    member.until(2, 3)
    assert member.use(5)["charged"] == "0"
    member.until(2, 4)
    assert refused(member("consume", amount=5), Code.INSUFFICIENT_CREDITS)


def test_a_hold_of_before_the_plan_is_captured_for_no_more_than_was_held() -> None:
    member = Member.of(None)
    member("grant", amount=10, source="pack")
    member("hold", "held", amount=4)
    member("plans.subscribe", plan="endless")
    captured = member("capture", hold="held", amount=9)
    assert (captured["charged"], captured["balance"]["available"]) == ("4", "6")


def test_the_offer_is_a_higher_plan_and_never_the_present_one_or_a_lower() -> None:
    member = Member.of("more")
    member.use(300)
    wanting = member("consume", amount=50)
    assert wanting["offer"]["plan"] == "prorated"
    assert member("consume", amount=10**6)["offer"]["plan"] == "endless"


@pytest.mark.parametrize("undone", [False, True])
def test_what_comes_in_again_stays_within_what_an_account_can_ever_be_credited_with(undone: bool) -> None:
    """Beyond it no row could be written any more, and every operation of the account would fail."""
    own = '[plans.huge]\nmonthly_credits = "1000000000000"\nmode = "rollover"\nrollover_cap = "9x"\n'
    member = Member.of("huge", parse_catalog(TEXT + own, "plans.toml"))
    answers = set()
    for month in range(2, 13):
        member.until(month, 2)("settle")
        if undone:
            answers.add(member.undo().get("code"))
        account = member.account
        assert account.granted + account.received + account.restored <= MAX_TOTAL_MICRO
    assert MAX_TOTAL_MICRO - (account.granted + account.received + account.restored) < 10**18
    assert answers == ({None, Code.LIMIT_REACHED} if undone else set())


def test_what_has_ended_before_it_begins_is_refused() -> None:
    member = Member.of(None)
    refused(member("plans.subscribe", plan="basic", period_end=NEW_YEAR - DAY), Code.INVALID)
    assert member.account.subscription is None


def test_a_plan_that_begins_again_does_so_by_the_catalog_as_it_is_then() -> None:
    own = '[plans.basic]\nmonthly_credits = "100"\n'
    for catalog, allotted in (
        (parse_catalog(TEXT.replace(own, own.replace("100", "150")), "plans.toml"), "150"),
        (parse_catalog(TEXT.replace(own, own.replace("basic", "other")), "plans.toml"), None),
    ):
        member = Member.of("basic").until(3, 1)
        member("settle")
        member.catalog = catalog
        paid = member.pay(3, 1)
        assert paid["allotted"] == allotted if allotted else refused(paid, Code.UNKNOWN_PLAN)


@pytest.mark.parametrize("hours", [-2, 0, 2, 23])
def test_a_payment_on_the_first_day_of_a_plan_without_a_price_gives_the_plan_that_was_paid_for(hours: int) -> None:
    member = Member.of("free")
    start = NEW_YEAR + timedelta(hours=hours)
    member.now = max(NEW_YEAR, start) + timedelta(hours=1)
    paid = member("plans.renew", plan="basic", payment="in_1", period_start=start)
    assert (paid["plan"], paid["allotted"], paid["balance"]["available"]) == ("basic", "100", "100")
    member.until(1, 31)("settle")
    assert member.plan.is_active


def test_a_payment_of_long_ago_does_not_end_a_plan_without_a_price() -> None:
    member = Member.of("free")
    start = datetime(2020, 1, 1, tzinfo=UTC)
    refused(member("plans.renew", plan="basic", payment="in_0", period_start=start), Code.INVALID)
    assert member.until(2, 2).available() == "20"


def test_no_plan_is_had_until_a_payment_that_begins_in_years() -> None:
    member = Member.of("endless")
    end = member.plan.period_end
    far = datetime(8998, 1, 1, tzinfo=UTC)
    refused(member("plans.renew", period_start=far), Code.INVALID)
    assert member.plan.period_end == end


@pytest.mark.parametrize("plan", [None, "yearly"])
def test_a_lower_plan_waits_for_the_end_of_a_second_year_that_is_paid_for_meanwhile(plan: str | None) -> None:
    member = Member.of("yearly").until(10, 20)
    member("plans.change", plan="hobby")
    member("plans.renew", period_start=datetime(2028, 1, 1, 9, tzinfo=UTC), **({} if plan is None else {"plan": plan}))
    for year, name in ((2028, "yearly"), (2029, "hobby")):
        member.now = datetime(year, 2, 10, 9, tzinfo=UTC)
        member("settle")
        assert member.plan.terms.plan == name
    assert member.given() == 24 * 100 + 2 * 50


@pytest.mark.parametrize(("month", "day"), [(1, 20), (2, 1)])
def test_a_cancelled_plan_that_is_paid_for_again_gives_what_was_paid_for(month: int, day: int) -> None:
    """From now on, or from where the last payment ends."""
    member = Member.of("basic", payment="in_1").until(1, 20)
    member("plans.cancel")
    start = datetime(2027, month, day, 9, tzinfo=UTC)
    again = member("plans.subscribe", plan="basic", payment="in_2", period_start=start)
    assert again["plan_status"] == "active"
    member.until(2, 10)("settle")
    assert member.given() == 200
    assert (member.plan.period_start, member.plan.payment) == (start, "in_2")


def test_a_cancelled_plan_that_goes_on_with_the_dates_that_are_paid_for_gives_nothing_more() -> None:
    member = Member.of("basic", payment="in_1", period_start=NEW_YEAR).until(1, 20)
    member("plans.cancel")
    assert member("plans.subscribe", plan="basic", payment="in_1", period_start=NEW_YEAR)["plan_status"] == "active"
    assert member.given() == 100


# One payment gives one period, however long; nothing of a period outlives it.


@pytest.mark.parametrize("plan", ["basic", "calendar_paid"])
@pytest.mark.parametrize("days", [28, 30, 31, 33, 35])
def test_a_payment_gives_one_period_as_long_as_it_says(plan: str, days: int) -> None:
    start = datetime(2027, 1, 20, 9, tzinfo=UTC)
    member = Member.of(None)
    member.now = start
    cycle = timedelta(days=days)
    member("plans.subscribe", plan=plan, period_start=start, period_end=start + cycle, payment="pi_0")
    for number in range(1, 12):
        begins = start + number * cycle
        for hours in (-12, 1):
            member.now = begins + timedelta(hours=hours)
            member("settle")
        member("plans.renew", period_start=begins, period_end=begins + cycle, payment=f"pi_{number}")
        assert member.given() == (number + 1) * (100 if plan == "basic" else 30)
        assert (member.plan.period_start, member.plan.period_end) == (begins, begins + cycle)
    member.now = start + 12 * cycle + 4 * DAY
    member("settle")
    assert (member.available(), member.plan.is_active) == ("0", False)


@pytest.mark.parametrize("days", [1, 10])
def test_a_short_payment_gives_a_short_period(days: int) -> None:
    member = Member.of("basic")
    member.until(2, 1)
    begins = member.now
    member("plans.renew", period_start=begins, period_end=begins + days * DAY + timedelta(hours=1))
    assert member.plan.period_end == begins + days * DAY + timedelta(hours=1)
    member.now = begins + (days + 4) * DAY
    member("settle")
    assert (member.available(), member.plan.is_active, member.given()) == ("0", False, 200)


def test_payments_that_come_ahead_give_as_many_periods() -> None:
    member = Member.of("basic")
    for month in (2, 3, 4):
        member.pay(month, 1, payment=f"pi_{month}")
    member.until(8, 1)
    member("settle")
    assert (member.given(), member.plan.ended_at) == (400, datetime(2027, 5, 4, 8, tzinfo=UTC))


@pytest.mark.parametrize(
    ("message", "content", "left"),
    [
        ("plans.cancel", {"at": "now"}, "0"),
        ("plans.change", {"plan": "full"}, "500"),
    ],
)
def test_what_is_held_of_lots_that_end_early_lapses_when_it_comes_back(
    message: str, content: dict[str, Any], left: str
) -> None:
    member = Member.of("basic")
    member("hold", "job", amount=100)
    member(message, **content)
    assert member("release", hold="job")["balance"]["available"] == left


def test_what_is_held_over_a_renewal_lapses_when_it_comes_back() -> None:
    member = Member.of("basic").until(2, 1)
    member.now -= timedelta(minutes=5)
    member("hold", "job", amount=100)
    member.until(2, 1).pay(2, 1)
    assert member("release", hold="job")["balance"]["available"] == "100"
    kinds = [entry.kind for entry in member.account.entries]
    assert kinds[-2:] == ["released", "expired"]


def test_a_refund_after_the_renewal_lives_as_long_as_refunds_do() -> None:
    member = Member.of("basic")
    member("consume", "c", amount=40)
    member.until(2, 1).pay(2, 1)
    assert member("refund", operation="c")["balance"]["available"] == "140"
    refunded = member.account.grants[member.account.last_grant]
    assert (refunded.source, refunded.expires_at) == ("monthly", member.now + timedelta(days=30))


@pytest.mark.parametrize("spent", [0, 60])
def test_a_claw_back_after_an_undo_finds_what_was_restored(spent: int) -> None:
    member = Member.of("basic", payment="pi_1")
    member.until(2, 1).pay(2, 1, payment="pi_2")
    undone = member.undo()
    assert (undone["taken_back"], undone["restored"], undone["balance"]["available"]) == ("100", "100", "100")
    if spent:
        member.use(spent)
    revoked = member("revoke", purchase="pi_1")
    assert (revoked["status"], revoked["charged"]) == ("applied", str(100 - spent))
    assert revoked["balance"].get("debt", "0") == str(spent)
    assert refused(member("revoke", purchase="pi_1"), Code.EXCEEDS_ORIGINAL)


@pytest.mark.parametrize("before", ["free", "basic"])
def test_a_change_to_a_plan_by_the_year_is_paid_for_a_year(before: str) -> None:
    member = Member.of(before).until(1, 11)
    member("plans.change", plan="yearly", payment="in_year")
    member.until(12, 31)
    member("settle")
    assert (member.plan.terms.plan, member.plan.is_active, member.available()) == ("yearly", True, "100")
    member.now = datetime(2028, 1, 20, tzinfo=UTC)
    member("settle")
    assert not member.plan.is_active


def test_a_payment_begins_the_plan_that_it_names() -> None:
    member = Member.of(None)
    member.pay(1, 1, plan="basic", payment="in_1")
    assert member.given() == 100
    assert refused(member.pay(1, 1, plan="basic", payment="in_1"), Code.ALREADY_RENEWED)


def test_what_ended_early_is_paid_for_again_by_a_payment_of_its_own() -> None:
    member = Member.of(None)
    member.pay(1, 1, plan="yearly", payment="in_1")
    member("plans.cancel", at="now")
    assert refused(member.pay(1, 1, plan="yearly", payment="in_1"), Code.ALREADY_RENEWED)
    assert refused(member.pay(1, 1, plan="basic"), Code.ALREADY_RENEWED)
    member.pay(1, 1, plan="basic", payment="in_2")
    assert member("plans.cancel")["plan"] == "basic"
