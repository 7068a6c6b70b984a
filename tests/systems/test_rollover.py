"""Rollover: monthly credits of which what is left is carried on, and packs of 90 days that burn first.

Each test is a requirement of that system's plan.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from creditlane.codes import Code
from models.explaining import explain_operation
from models.rules.calendar import add_months
from tests.systems.conftest import Member, System

pytestmark = pytest.mark.xdist_group("system-rollover")
CATALOG = "rollover"


class Subscriber:
    """An account with a plan whose months are paid for one after the other."""

    def __init__(self, system: System, plan: str = "starter") -> None:
        self.system = system
        self.member = system.open()
        begun = self.member.send("plans.subscribe", plan=plan, payment=f"{self.member.account}-0")
        assert begun.period_start is not None
        self.anchor: datetime = begun.period_start
        self.month = 0

    def next_month(self, *, paid: bool = True) -> Member:
        """Let time pass to the period's end, and the payment for the next one arrive."""
        self.month += 1
        start = add_months(self.anchor, self.month, "UTC")
        self.system.later(seconds=(start - datetime.now(UTC) - self.system.away).total_seconds())
        if paid:
            answer = self.member.send(
                "plans.renew", period_start=start.isoformat(), payment=f"{self.member.account}-{self.month}"
            )
            assert answer.status == "applied", answer
        return self.member


def test_users_receive_monthly_credits_with_their_subscription(system: System) -> None:
    assert Subscriber(system, "pro").member.by_source == {"monthly": "500"}


def test_what_is_left_rolls_over(system: System) -> None:
    subscriber = Subscriber(system)
    subscriber.member.burn(30)
    assert subscriber.next_month().by_source == {"rollover": "70", "monthly": "100"}


def test_rollover_is_capped_at_twice_the_monthly_credits(system: System) -> None:
    subscriber = Subscriber(system)
    subscriber.next_month()
    member = subscriber.next_month()
    assert member.by_source == {"rollover": "100", "monthly": "100"}
    told = system.read("SELECT sum(amount_micro) FROM entries WHERE account = %s AND kind = 'expired'", member.account)
    assert told == [(100 * 10**6,)], "what is over the cap ends, and is seen to"


def test_users_can_purchase_additional_credit_packs(system: System) -> None:
    member = Subscriber(system).member
    member.buy("fifty")
    assert member.by_source == {"pack": "50", "monthly": "100"}


def test_a_pack_expires_after_90_days(system: System) -> None:
    member = system.open()
    member.buy("fifty")
    system.later(days=89, hours=23)
    assert member.available == 50
    system.later(hours=1)
    member.refused(Code.INSUFFICIENT_CREDITS, "credits.consume", feature="generation")
    assert member.available == 0


def test_packs_are_consumed_before_monthly_credits_to_protect_paid_top_ups(system: System) -> None:
    member = Subscriber(system).member
    member.buy("fifty")
    member.burn(60)
    assert member.by_source == {"monthly": "90"}


def test_consumption_is_in_the_order_of_expiration(system: System) -> None:
    member = system.open()
    member.send("credits.grant", amount=10, source="pack", expires_in=60 * 86_400, purchase="later")
    member.send("credits.grant", amount=10, source="pack", expires_in=30 * 86_400, purchase="sooner")
    used = member.burn(15)
    with system.connect() as connection:
        explained = explain_operation(connection, member.account, used.id)
    assert explained is not None
    assert [(use.grant, f"{use.amount:f}") for use in used.grants] == [(2, "10"), (1, "5")]


def test_the_worked_example(system: System) -> None:
    subscriber = Subscriber(system)
    subscriber.member.burn(30)
    assert subscriber.next_month().available == 170
    member = subscriber.next_month()
    assert member.available == 200
    member.buy("fifty")
    member.burn(60)
    assert member.by_source == {"rollover": "90", "monthly": "100"}


def test_deductions_are_atomic_and_no_double_spend_is_possible(system: System) -> None:
    member = system.open()
    member.buy("fifty")
    with ThreadPoolExecutor(8) as producers:
        answers = list(producers.map(lambda _: member.send("credits.consume", feature="upscale"), range(30)))
    assert [answer.status for answer in answers].count("applied") == 25
    assert member.available == 0


def test_a_month_that_is_not_paid_for_ends_after_the_days_of_grace_with_no_rollover(system: System) -> None:
    subscriber = Subscriber(system)
    subscriber.member.burn(30)
    member = subscriber.next_month(paid=False)
    assert member.available == 70, "until then what there was stays usable"
    system.later(days=3)
    assert member.available == 0


def test_a_yearly_payment_gives_its_credits_month_by_month(system: System) -> None:
    subscriber = Subscriber(system, "pro_yearly")
    assert subscriber.member.available == 500
    assert subscriber.next_month(paid=False).by_source == {"rollover": "500", "monthly": "500"}


def test_a_refund_of_a_pack_takes_back_that_packs_credits_alone(system: System) -> None:
    member = Subscriber(system).member
    bought = member.buy("fifty")
    lot = bought.grant
    member.send("credits.revoke", grant=lot, reason="refunded")
    assert member.by_source == {"monthly": "100"}


def test_every_change_is_in_the_transaction_log(system: System) -> None:
    subscriber = Subscriber(system)
    subscriber.member.burn(30)
    member = subscriber.next_month()
    kinds = system.read("SELECT kind FROM entries WHERE account = %s ORDER BY seq", member.account)
    assert [kind for (kind,) in kinds] == ["granted", "consumed", "rolled_out", "rolled_in", "granted"]


def test_low_credits_are_warned_of(system: System) -> None:
    member = Subscriber(system).member
    member.burn(80)
    assert member.notices("low_balance") == ["low_balance"]
    member.burn(1)
    assert member.notices("low_balance") == ["low_balance"], "once on the way down"
    assert system.catalog.notify.expiry_days == [30, 7, 1], "and packs before they expire: the hourly sweep"
