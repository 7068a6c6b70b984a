"""Dual: monthly credits that reset beside purchased ones that stay.

Each test is a requirement of that system's plan.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest

from creditlane.codes import Code
from creditlane.contract import ContractError
from models.reading import history, load_account, plan_summary
from models.rules.calendar import add_months
from tests.systems.conftest import Member, System

pytestmark = pytest.mark.xdist_group("system-dual")
CATALOG = "dual"


def subscriber(system: System) -> tuple[Member, datetime]:
    """An account of the plan of 100 a month, and when its second month begins."""
    member = system.open()
    begun = member.send("plans.subscribe", plan="plus", payment=f"{member.account}-0")
    assert begun.period_start is not None
    return member, add_months(begun.period_start, 1, "UTC")


def reset(system: System, member: Member, start: datetime) -> None:
    """Let time pass to the second month, and its payment arrive."""
    system.later(seconds=(start - datetime.now(UTC) - system.away).total_seconds())
    member.send("plans.renew", period_start=start.isoformat(), payment=f"{member.account}-1")


def test_monthly_credits_are_not_cumulative_and_reset_monthly(system: System) -> None:
    member, start = subscriber(system)
    member.burn(30)
    reset(system, member, start)
    assert member.by_source == {"monthly": "100"}


def test_free_users_reset_with_the_calendars_month_without_any_message(system: System) -> None:
    member = system.open(plan="free")
    member.burn(5)
    system.later(days=32)
    assert member.by_source == {"monthly": "20"}


def test_purchased_credits_do_not_expire(system: System) -> None:
    member = system.open(plan="free")
    member.buy("forty")
    system.later(days=400)
    assert member.by_source == {"monthly": "20", "purchased": "40"}


@pytest.mark.parametrize("plan", ["free", "plus"])
def test_purchased_credits_can_be_bought_by_free_and_pro_users(plan: str, system: System) -> None:
    member = system.open(plan=plan)
    member.buy("two_hundred")
    assert member.by_source["purchased"] == "200"


def test_deductions_take_the_monthly_credits_first(system: System) -> None:
    member, _ = subscriber(system)
    member.buy("forty")
    used = member.burn(110)
    assert [(use.source, f"{use.amount:f}") for use in used.grants] == [("monthly", "100"), ("purchased", "10")]
    assert member.by_source == {"purchased": "30"}


def test_the_last_monthly_reset_is_shown(system: System) -> None:
    member, start = subscriber(system)
    reset(system, member, start)
    with system.connect() as connection:
        loaded = load_account(connection, member.account)
    assert loaded is not None
    plan = plan_summary(*loaded, system.catalog)
    assert plan is not None
    assert plan.last_renewal is not None
    paid_at = system.read(
        "SELECT applied_at FROM operations WHERE account = %s AND name = 'plans.renew'", member.account
    )
    assert [(plan.last_renewal.at,)] == paid_at, "when its payment came"
    assert plan.last_renewal.allotted == "100"


def test_each_history_line_tracks_its_credit_source(system: System) -> None:
    member, _ = subscriber(system)
    member.buy("forty")
    member.burn(110)
    with system.connect() as connection:
        lines = history(connection, member.account, limit=1, with_entries=True).lines[0].lines
    assert lines is not None
    assert [(line.source, line.change) for line in lines] == [("monthly", "-100"), ("purchased", "-10")]


def test_the_balance_is_told_by_source_with_its_total(system: System) -> None:
    member, _ = subscriber(system)
    bought = member.buy("forty")
    assert bought.balance is not None
    assert bought.balance.available == 140
    assert member.by_source == {"monthly": "100", "purchased": "40"}


def test_there_is_a_rollback_procedure_for_a_reset(system: System) -> None:
    member, start = subscriber(system)
    member.buy("forty")
    member.burn(110)
    reset(system, member, start)
    assert member.by_source == {"monthly": "100", "purchased": "30"}
    member.send("plans.undo", actor="ana", reason="reset by mistake")
    assert member.by_source == {"purchased": "30"}
    kinds = system.read("SELECT kind FROM entries WHERE account = %s ORDER BY seq DESC LIMIT 2", member.account)
    assert kinds == [("revoked",), ("granted",)], "both stand in the history"


def test_existing_users_are_brought_along_with_what_they_had(system: System) -> None:
    member = system.open()
    member.send("credits.grant", amount=12, source="monthly", expires_in=10 * 86_400, reason="brought along")
    member.send("credits.grant", amount=7, source="purchased", reason="brought along")
    assert member.by_source == {"monthly": "12", "purchased": "7"}


def test_all_credit_operations_are_atomic_under_concurrent_deductions(system: System) -> None:
    member = system.open(plan="free")
    with ThreadPoolExecutor(8) as producers:
        answers = list(producers.map(lambda _: member.send("credits.consume", feature="document"), range(12)))
    assert [answer.status for answer in answers].count("applied") == 4
    assert member.available == 0


def test_credits_cannot_be_manipulated(system: System) -> None:
    member = system.open(plan="free")
    first = member.send("credits.consume", id="m-1", feature="message")
    other = member.send("credits.consume", id="m-1", feature="document")
    assert (first.status, other.code) == ("applied", Code.ID_CONFLICT), "one id, one content"
    with pytest.raises(ContractError, match="amount"):
        member.send("credits.consume", amount="-5")
    with pytest.raises(psycopg.errors.RestrictViolation):
        system.read("UPDATE entries SET amount_micro = 1 WHERE account = %s RETURNING seq", member.account)


def test_an_audit_trail_of_all_credit_changes_is_maintained(system: System) -> None:
    member, _ = subscriber(system)
    member.burn(3)
    member.send("credits.refund", operation=member.burn(4).id, reason="failed")
    trail = system.read("SELECT name FROM operations WHERE account = %s ORDER BY number", member.account)
    assert [name for (name,) in trail] == [
        "credits.open", "plans.subscribe", "credits.consume", "credits.consume", "credits.refund",
    ]  # fmt: skip
