"""Plans in the rules against plans in the second ledger, step by step, with all else that moves credits in between."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from models.catalog import parse_catalog
from models.rules.catalog import Catalog
from tests.oracle.model import Row
from tests.oracle.plans import later
from tests.oracle.test_against_rules import (
    COMMON,
    MOVES,
    THOROUGH,
    Both,
    plain,
    present,
    reduced,
    returned,
    shares,
    written,
)

STEPS = settings(COMMON, max_examples=4000 if THOROUGH else 300, stateful_step_count=40)

START = datetime(2027, 12, 31, 11, 30, tzinfo=UTC)
"""The months to come have 31, 29, 31 and 30 days; clocks are put on in Paris on 26 March."""

CATALOG = """
[catalog]
name = "{name}"
zone = "Europe/Paris"
[signup]
credits = "3"
[priorities]
pack = 5
rollover = 20
monthly = 30
[features.image]
price = "1"
per = "2"
[packs.small]
credits = "5"
price = "4.99 EUR"
[plans.free]
monthly_credits = "{free}"
[plans.calendar]
monthly_credits = "4"
anchor = "month"
mode = "accumulate"
[plans.keep]
monthly_credits = "{free}"
mode = "rollover"
rollover_cap = "150%"
rollover_months = 2
[plans.basic]
monthly_credits = "{basic}"
price = "9.99 EUR"
mode = "rollover"
balance_cap = "2x"
[plans.basic_yearly]
monthly_credits = "{basic}"
price = "99 EUR"
interval = "year"
mode = "rollover"
balance_cap = "2x"
rollover_months = 1
grace_days = 40
zone = "America/New_York"
[plans.plus]
monthly_credits = "20"
price = "19 EUR"
upgrade = "prorated"
grace_days = 0
[plans.top]
monthly_credits = "50"
price = "39 EUR"
upgrade = "full"
mode = "rollover"
rollover_cap = "7.5"
rollover_months = 3
[plans.endless]
unlimited = true
price = "99 EUR"
[notify]
kinds = ["depleted", "credits_expired", "period_renewed", "refunded", "plan_started", "plan_changed",
         "plan_cancelled", "plan_ended"]
low_balance = ["50%", "1"]
[clawback]
on_spent = "{on_spent}"
[refunds]
refund_days = 2
"""


def made(on_spent: str, basic: str = "10", free: str = "6", name: str = "first") -> Catalog:
    text = CATALOG
    for key, value in (("on_spent", on_spent), ("basic", basic), ("free", free), ("name", name)):
        text = text.replace("{" + key + "}", value)
    return parse_catalog(text, "plans.toml")


CATALOGS = {
    "debt": made("debt"),
    "forgive": made("forgive"),
    "dearer": made("debt", basic="12", free="5", name="dearer"),
}
PLANS = ("free", "calendar", "keep", "basic", "basic_yearly", "plus", "top", "endless")


@dataclass
class Subscribed(Both):
    """An account with a plan in the rules and in the second ledger, by a catalog that may be replaced."""

    def do(self, name: str, operation: str, content: Row) -> Row:
        if name == "catalog":
            self.script.append((self.now, name, operation, content))
            self.catalog = CATALOGS[operation]
            self.ledger.policy = plain(self.catalog)
            return {}
        result = super().do(name, operation, content)
        self.check_plan()
        return result

    def check_plan(self) -> None:
        """The subscription is the same in both, as it stands."""
        mine, theirs = self.account.subscription, self.ledger.plan
        assert (mine is None) is (theirs is None)
        if mine is None or theirs is None:
            return
        assert (mine.terms.plan, mine.is_active, mine.cancels) == (
            theirs["is"]["name"],
            theirs["alive"],
            theirs["cancels"],
        )
        assert (mine.terms.monthly_micro, mine.terms.unlimited) == (theirs["is"]["credits"], theirs["is"]["unlimited"])
        assert (None if mine.pending is None else mine.pending.plan) == (theirs["next"] and theirs["next"]["name"])
        assert (mine.period_start, mine.period_end, mine.paid_until) == (
            theirs["start"],
            theirs["end"],
            theirs["paid_until"],
        )
        assert mine.payment == theirs["payment"]
        assert mine.allotted == theirs["most"]
        at_hand = [lot["number"] for lot in theirs["lots"] if lot["available"]]
        assert [number for number in mine.lots if self.account.grants[number].available] == at_hand


amounts = st.sampled_from(["0.000001", "0.5", "1", "2", "3", "4.25", "6", "10", "25"])
some = st.sampled_from([None, None, "0.000001", "0.25", "1", "2", "5"])
jumps = st.sampled_from(
    [timedelta(0), timedelta(minutes=20), timedelta(hours=6), timedelta(days=2), timedelta(days=9), timedelta(days=31),
     timedelta(days=70)]
)  # fmt: skip
payments = st.sampled_from([None, "payment-1", "payment-2", "payment-3"])
PRICES = st.sampled_from([None, None, {"minor": 499, "currency": "EUR", "per": "25"}])


class Plans(RuleBasedStateMachine):
    """Random operations on one account with a plan; after every one both ledgers must agree on everything."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Subscribed(CATALOGS["debt"])
        self.first = self.both.catalog

    @initialize(
        catalog=st.sampled_from(["debt", "forgive"]),
        plan=st.sampled_from([None, *PLANS]),
        later=st.integers(0, 24 * 40),
    )
    def begin(self, catalog: str, plan: str | None, later: int) -> None:
        self.first = CATALOGS[catalog]
        self.both = Subscribed(self.first, now=START + timedelta(hours=later))
        self.send("credits.open", present(plan=plan))

    def send(self, name: str, content: Row) -> None:
        self.do(name, f"operation-{len(self.both.sent)}", content)

    def do(self, name: str, operation: str, content: Row) -> None:
        try:
            self.both.do(name, operation, content)
        except Exception as error:
            raise AssertionError(reduced(self.first, self.both.script, Subscribed)) from error

    def past(self, *names: str) -> list[str]:
        return [operation for name, operation, _ in self.both.sent if name in names]

    @rule(jump=jumps)
    def time_passes(self, jump: timedelta) -> None:
        self.both.now += jump

    @rule(early=st.sampled_from([0, 0, 0, 1, 3600_000_000]))
    def time_passes_until_something_is_due(self, early: int) -> None:
        due = self.both.ledger.due()
        if due is not None:
            self.both.now = max(self.both.now, due - timedelta(microseconds=early))

    @rule(catalog=st.sampled_from(["debt", "forgive", "dearer"]))
    def another_catalog(self, catalog: str) -> None:
        self.do("catalog", catalog, {})

    @rule()
    def settle(self) -> None:
        self.send("credits.settle", present())

    @rule(amount=amounts, partial=st.sampled_from([True, True, False]))
    def consume(self, amount: str, partial: bool) -> None:
        self.send("credits.consume", present(amount=amount, partial=partial))

    @rule(quantity=st.sampled_from([1, 3, 9]))
    def use(self, quantity: int) -> None:
        self.send("credits.consume", present(feature="image", quantity=quantity))

    @rule(amount=amounts, ttl=st.sampled_from([None, 60, 86_400, 20 * 86_400]))
    def hold(self, amount: str, ttl: int | None) -> None:
        self.send("credits.hold", present(amount=amount, ttl=ttl))

    @rule(data=st.data(), amount=some)
    def capture_or_release(self, data: st.DataObject, amount: str | None) -> None:
        holds = self.past("credits.hold")
        if holds:
            name = data.draw(st.sampled_from(["capture", "release"]))
            content = present(hold=data.draw(st.sampled_from(holds[-3:])))
            self.send(f"credits.{name}", content | ({"amount": amount} if amount and name == "capture" else {}))

    @rule(data=st.data(), amount=some)
    def refund(self, data: st.DataObject, amount: str | None) -> None:
        charged = self.past("credits.consume", "credits.capture")
        if charged:
            self.send("credits.refund", present(operation=data.draw(st.sampled_from(charged[-5:])), amount=amount))

    @rule(amount=amounts, days=st.sampled_from([None, 1, 20, 31, 90]), source=st.sampled_from(["pack", "rollover"]))
    def grant(self, amount: str, days: int | None, source: str) -> None:
        ends = None if days is None else days * 86_400
        self.send("credits.grant", present(amount=amount, source=source, expires_in=ends))

    @rule(payment=payments, amount=some)
    def revoke_a_payment(self, payment: str | None, amount: str | None) -> None:
        self.send("credits.revoke", present(purchase=payment or "payment-4", amount=amount))

    @rule(
        payment=payments,
        share=shares,
        frozen=st.sampled_from([None, None, True]),
        last=st.booleans(),
        behind=st.sampled_from([0, 0, 0, 3]),
    )
    def claw_back(self, payment: str | None, share: int, frozen: bool | None, last: bool, behind: int) -> None:
        plan = self.both.ledger.plan
        purchase = plan["payment"] if last and plan is not None and plan["payment"] else payment or "payment-4"
        step = max(1, len(self.both.sent) - behind)
        self.send("credits.claw_back", returned(purchase, share, step, frozen))

    @rule(data=st.data(), amount=some)
    def revoke_a_lot(self, data: st.DataObject, amount: str | None) -> None:
        number = data.draw(st.integers(1, self.both.account.last_grant + 1))
        self.send("credits.revoke", present(grant=number, amount=amount))

    @rule(amount=st.sampled_from(["2", "-1", "-3"]))
    def adjust(self, amount: str) -> None:
        self.send("credits.adjust", present(amount=amount, actor="admin", reason="goodwill"))

    @rule(
        plan=st.sampled_from(PLANS),
        payment=payments,
        price=PRICES,
        ago=st.sampled_from([None, None, None, -30, -6, 6, 24 * 20, 24 * 70]),
    )
    def subscribe(self, plan: str, payment: str | None, price: Row | None, ago: int | None) -> None:
        start = None if ago is None else written(self.both.now - timedelta(hours=ago))
        self.send("plans.subscribe", present(plan=plan, payment=payment, unit_price=price, period_start=start))

    @rule(
        plan=st.sampled_from(PLANS),
        payment=payments,
        ago=st.sampled_from([None, None, 0, 0, -2, 2]),
        ahead=st.sampled_from([None, None, None, 1, 20, 31, 40, 400]),
    )
    def change(self, plan: str, payment: str | None, ago: int | None, ahead: int | None) -> None:
        start = None if ago is None else written(self.both.now - timedelta(days=ago))
        end = None if ahead is None else written(self.both.now + timedelta(days=ahead, hours=1))
        if ago is not None and ahead is not None and ahead <= -ago:
            end = None
        self.send("plans.change", present(plan=plan, payment=payment, period_start=start, period_end=end))

    @rule(at=st.sampled_from([None, None, None, "now"]))
    def cancel(self, at: str | None) -> None:
        self.send("plans.cancel", present(at=at))

    @rule(
        plan=st.sampled_from([None, None, None, *PLANS]),
        payment=payments,
        price=PRICES,
        begins=st.sampled_from(["end", "end", "end", "start", "now", "before"]),
        off=st.sampled_from([0, 0, 0, -20, 20, 100]),
        ends=st.sampled_from([None, None, None, 14, 33, 400]),
    )
    def renew(
        self, plan: str | None, payment: str | None, price: Row | None, begins: str, off: int, ends: int | None
    ) -> None:
        present_plan = self.both.ledger.plan
        start = self.both.now
        if begins == "before":
            start -= timedelta(days=45)
        elif present_plan is not None and begins != "now":
            start = present_plan[begins]
        start += timedelta(hours=off)
        end = None if ends is None else written(start + timedelta(days=ends))
        content = present(plan=plan, payment=payment, unit_price=price, period_start=written(start), period_end=end)
        self.send("plans.renew", content)

    @rule()
    def pay_what_comes_next(self) -> None:
        plan = self.both.ledger.plan
        if plan is not None:
            start = max(plan["end"], plan["paid_until"] or plan["end"])
            self.send("plans.renew", present(payment=f"invoice-{start:%Y-%m-%d}", period_start=written(start)))

    @rule()
    def undo(self) -> None:
        self.send("plans.undo", present(actor="admin", reason="a mistake"))

    @rule(data=st.data())
    def the_same_again(self, data: st.DataObject) -> None:
        if self.both.sent:
            self.do(*data.draw(st.sampled_from(self.both.sent)))


Plans.TestCase.settings = STEPS
TestPlans = pytest.mark.timeout(1800 if THOROUGH else 240)(Plans.TestCase)


def test_every_kind_of_entry_that_a_plan_makes_is_compared() -> None:
    both = Subscribed(CATALOGS["debt"], now=START)
    both.do("credits.open", "open", present(plan="keep"))
    both.do("credits.consume", "use", present(amount="5"))
    both.now = later(START, 1, "Europe/Paris")
    both.do("credits.settle", "settle", present())
    both.do("plans.undo", "undo", present(actor="admin", reason="a mistake"))
    kinds = {entry.kind for entry in both.account.entries}
    assert kinds == {"granted", "consumed", "rolled_out", "rolled_in", "revoked"}
    assert kinds <= set(MOVES)
