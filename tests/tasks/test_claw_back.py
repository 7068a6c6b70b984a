"""Claw-back by state, in worked examples: refunds and disputes of a purchase, and what becomes of its credits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from creditlane.codes import Code
from models.catalog import parse_catalog
from models.rules.calendar import add_months
from models.rules.catalog import Catalog
from models.rules.state import CLOSED, MAX_TOTAL_MICRO
from tests.tasks.test_operations import DEBT, FORGIVE, START, Lane, lane, refused, uses

PACK = {"amount": "10", "source": "pack", "purchase": "pi_1"}

YEARLY = parse_catalog(
    """
[catalog]
name = "yearly"
[plans.yearly]
monthly_credits = "12"
price = "120 EUR"
interval = "year"
[plans.keeping]
monthly_credits = "12"
price = "120 EUR"
interval = "year"
mode = "rollover"
rollover_cap = "100"
[notify]
kinds = ["refunded", "purchase_frozen", "purchase_thawed"]
""",
    "yearly.toml",
)

KEPT = parse_catalog(
    """
[catalog]
name = "kept"
[plans.kept]
monthly_credits = "12"
price = "120 EUR"
interval = "year"
mode = "accumulate"
""",
    "kept.toml",
)


def tell(own: Lane, returned: int, step: int, frozen: bool = False, paid: int = 100, **more: Any) -> dict[str, Any]:
    """So much of the purchase is away."""
    content = {"purchase": "pi_1", "paid_minor": paid, "returned_minor": returned, "step": step, "frozen": frozen}
    return own("claw_back", **{**content, **more})


def spent(*grants: str | dict[str, Any], catalog: Catalog = DEBT) -> Lane:
    """A purchase of 10 credits that were spent, and further grants before that."""
    own = lane(PACK, *grants, catalog=catalog)
    own("consume", "c", amount="10")
    return own


def last_kinds(own: Lane, number: int) -> list[tuple[str, int, str]]:
    """The last entries: kind, lot and credits."""
    return [(entry.kind, entry.grant, f"{entry.amount_micro / 10**6:g}") for entry in own.account.entries[-number:]]


def test_two_refunds_in_part_take_their_share_rounded_down_and_all_together_everything() -> None:
    own = lane(PACK, "3")
    first = tell(own, 250, 1, paid=499)
    assert (first["charged"], uses(first)) == ("5.01002", [(1, "5.01002")])
    second = tell(own, 499, 2, paid=499)
    assert (second["charged"], second["balance"]["available"]) == ("4.98998", "3")
    assert tell(own, 700, 3, paid=499)["charged"] == "0"


def test_a_repeated_and_an_older_state_change_nothing() -> None:
    own = lane(PACK)
    tell(own, 50, 5)
    written = own.account.seq
    for step in (5, 4, 1):
        late = tell(own, 100, step, frozen=True)
        assert (late["status"], late["charged"], late["balance"]["available"]) == ("applied", "0", "5")
    assert own.account.seq == written


def test_a_dispute_on_top_of_a_refund_takes_no_more_than_there_was() -> None:
    own = lane({**PACK, "amount": "100"})
    assert tell(own, 300, 1, paid=1000)["charged"] == "30"
    opened = tell(own, 300, 2, frozen=True, paid=1000)
    assert (opened["charged"], opened["frozen"]) == ("0", "70")
    assert opened["balance"] == {"available": "0", "frozen": "70"}
    withdrawn = tell(own, 1300, 3, frozen=True, paid=1000)
    assert (withdrawn["charged"], withdrawn["balance"]) == ("70", {"available": "0"})
    lost = tell(own, 1300, 4, paid=1000)
    assert (lost["charged"], lost["thawed"], lost["balance"]) == ("0", "0", {"available": "0"})


def test_a_dispute_that_is_won_gives_back_what_paid_for_it_and_cancels_what_is_owed_yet() -> None:
    own = spent()
    assert tell(own, 100, 1)["owed"] == "10"
    assert own("grant", amount="4", source="pack", purchase="pi_2")["balance"] == {"available": "0", "debt": "6"}
    won = tell(own, 0, 2)
    assert (won["charged"], won["restored"], uses(won)) == ("-4", "10", [(2, "4")])
    assert won["balance"] == {"available": "4", "by_source": {"pack": "4"}}
    assert last_kinds(own, 2) == [("debt_cancelled", 1, "6"), ("reinstated", 2, "4")]
    assert (own.account.grants[1].clawed_back, own.account.purchases["pi_1"].taken_micro) == (0, 0)


def test_what_goes_back_goes_in_the_reverse_order_of_taking() -> None:
    own = lane({**PACK, "expires_in": 60}, PACK)
    own("consume", amount="7")
    assert uses(tell(own, 75, 1)) == [(2, "10"), (1, "3")]
    assert own.account.debt == 2_000_000
    less = tell(own, 60, 2)
    assert (less["restored"], less["charged"], less["balance"]["available"]) == ("3", "-1", "1")
    assert last_kinds(own, 2) == [("debt_cancelled", 1, "2"), ("reinstated", 1, "1")]
    least = tell(own, 10, 3)
    assert uses(least) == [(1, "2"), (2, "8")]
    assert least["balance"]["available"] == "11"


def test_a_refund_that_fails_after_the_lot_has_ended_comes_back_in_one_that_continues_it() -> None:
    own = lane({**PACK, "expires_in": 60, "features": ["image"]}, catalog=DEBT)
    tell(own, 100, 1)
    own.wait(seconds=60)
    failed = tell(own, 0, 2)
    assert (failed["charged"], uses(failed)) == ("-10", [(2, "10")])
    lot = own.account.grants[2]
    assert (lot.origin, lot.purchase, lot.features) == (1, "pi_1", frozenset({"image"}))
    assert lot.expires_at == own.now + timedelta(days=30)
    assert last_kinds(own, 3) == [("reinstated", 1, "10"), ("rolled_out", 1, "10"), ("rolled_in", 2, "10")]
    assert uses(tell(own, 40, 3)) == [(2, "4")]
    own.wait(days=30)
    assert own.available() == "0"


def test_what_comes_back_in_place_of_an_ended_lot_pays_what_else_is_owed() -> None:
    own = lane({**PACK, "expires_in": 60}, "4")
    tell(own, 100, 1)
    own("consume", amount="4")
    assert own("revoke", grant=2)["owed"] == "4"
    own.wait(seconds=60)
    assert tell(own, 0, 2)["balance"] == {"available": "6", "by_source": {"pack": "6"}}
    assert last_kinds(own, 1) == [("debt_paid", 3, "4")]


def test_what_no_account_can_ever_be_credited_with_lapses_instead_of_coming_back() -> None:
    own = lane({**PACK, "expires_in": 60})
    tell(own, 100, 1)
    own.wait(seconds=60)
    for _ in range(8):
        own("grant", amount=10**12, source="other")
    own("grant", amount=str(10**12 - 12), source="other")
    assert MAX_TOTAL_MICRO - own.account.granted == 2_000_000
    assert uses(tell(own, 0, 2)) == [(11, "10")]
    assert last_kinds(own, 4)[1:] == [("expired", 1, "8"), ("rolled_out", 1, "2"), ("rolled_in", 11, "2")]
    assert tell(own, 100, 3)["charged"] == "2"


def test_what_is_forgiven_of_a_refund_is_taken_when_it_comes_back_and_given_back_when_the_refund_fails() -> None:
    own = spent(catalog=FORGIVE)
    assert tell(own, 100, 1)["forgiven"] == "10"
    assert own("refund", operation="c", amount="4")["balance"] == {"available": "0"}
    back = tell(own, 0, 2)
    assert (back["charged"], back["restored"], back["balance"]["available"]) == ("-4", "10", "4")
    root = own.account.grants[1]
    assert (root.forgiven, root.clawed_back) == (0, 0)
    assert own("refund", operation="c")["balance"]["available"] == "10"


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_revocation_took_counts_and_does_not_come_back(when: str) -> None:
    own = lane(PACK)
    if when == "before":
        own("revoke", purchase="pi_1", amount="3")
    assert tell(own, 50, 1)["charged"] == ("2" if when == "before" else "5")
    if when == "after":
        own("revoke", purchase="pi_1", amount="3")
        assert tell(own, 50, 2)["restored"] == "3"
    assert own.available() == "5"
    assert tell(own, 0, 3)["restored"] == "2"
    assert own.available() == "7"
    assert refused(own("revoke", purchase="pi_1", amount="7.000001"), Code.EXCEEDS_ORIGINAL)


def test_what_comes_back_pays_what_else_is_owed() -> None:
    own = lane(PACK, {**PACK, "purchase": "pi_2"})
    tell(own, 100, 1)
    own("consume", amount="10")
    tell(own, 60, 1, purchase="pi_2")
    won = tell(own, 0, 2)
    assert (won["charged"], won["balance"]) == ("-10", {"available": "4", "by_source": {"pack": "4"}})
    assert last_kinds(own, 2) == [("reinstated", 1, "10"), ("debt_paid", 1, "6")]
    both = tell(own, 0, 2, purchase="pi_2")
    assert (uses(both), both["balance"]["available"]) == ([(1, "6")], "10")


@pytest.mark.parametrize("catalog", [DEBT, FORGIVE])
def test_a_claw_back_before_its_grant_comes_to_the_same_as_after_it(catalog: Catalog) -> None:
    ahead, behind = Lane(catalog), Lane(catalog)
    for own in (ahead, behind):
        own("open", kind="pool")
    early = tell(ahead, 30, 1)
    assert (early["status"], early["charged"]) == ("applied", "0")
    granted = ahead("grant", **PACK)
    assert (uses(granted), granted["taken_back"]) == ([(1, "10")], "3")
    behind("grant", **PACK)
    tell(behind, 30, 1)
    assert ahead.available() == behind.available() == "7"
    assert tell(ahead, 0, 2)["balance"] == tell(behind, 0, 2)["balance"]


def test_a_purchase_that_was_free_loses_nothing_and_can_be_frozen() -> None:
    own = lane(PACK)
    state = tell(own, 50, 1, frozen=True, paid=0)
    assert state["balance"] == {"available": "0", "frozen": "10"}


def test_frozen_credits_are_neither_spent_nor_held_given_away_or_adjusted_away_until_they_thaw() -> None:
    own = lane(PACK, "3")
    assert tell(own, 0, 1, frozen=True)["balance"] == {
        "available": "3", "frozen": "10", "by_source": {"pack": "3"},
    }  # fmt: skip
    for name, content in (
        ("consume", {"amount": "4"}),
        ("hold", {"amount": "4"}),
        ("transfer", {"amount": "4", "to": "user_43"}),
        ("adjust", {"amount": "-4", "actor": "anna", "reason": "wrong"}),
    ):
        short = own(name, **content)
        assert refused(short, Code.INSUFFICIENT_CREDITS)
        assert (short["required"], short["available"], short["shortfall"]) == ("4", "3", "1")
    assert uses(own("consume", amount="4", partial=True)) == [(2, "3")]
    thawed = tell(own, 0, 2)
    assert (thawed["thawed"], thawed["balance"]["available"]) == ("10", "10")
    assert own("consume", amount="4")["status"] == "applied"


def test_frozen_credits_end_in_their_time_and_a_frozen_start_is_no_upcoming_credit() -> None:
    own = lane(
        {**PACK, "expires_in": 60},
        {**PACK, "effective_at": (START + timedelta(hours=1)).isoformat(), "expires_in": 60},
        {**PACK, "purchase": None, "effective_at": (START + timedelta(hours=2)).isoformat()},
    )
    assert tell(own, 0, 1, frozen=True)["balance"] == {"available": "0", "frozen": "20", "upcoming": "10"}
    own.wait(seconds=60)
    assert own("settle")["balance"] == {"available": "0", "frozen": "10", "upcoming": "10"}
    own.wait(hours=1)
    assert own("settle")["balance"] == {"available": "0", "upcoming": "10"}
    assert tell(own, 0, 2)["thawed"] == "0"


def test_what_comes_back_to_a_frozen_lot_is_frozen_and_pays_no_debt_before_it_thaws() -> None:
    own = lane(PACK, "2")
    own("consume", "c", amount="4")
    own("hold", "h", amount="6")
    own("consume", "d", amount="2")
    tell(own, 0, 1, frozen=True)
    assert own("revoke", grant=2)["owed"] == "2"
    own("release", hold="h")
    back = own("refund", operation="c")
    assert back["balance"] == {"available": "0", "debt": "2", "frozen": "10"}
    assert tell(own, 0, 2)["balance"] == {"available": "8", "by_source": {"pack": "8"}}
    assert last_kinds(own, 1) == [("debt_paid", 1, "2")]


@pytest.mark.parametrize("way", ["release", "time", "refund"])
def test_what_comes_back_to_a_frozen_lot_pays_what_is_owed_for_its_own_purchase(way: str) -> None:
    """Else it would lapse frozen, and its owner owe what nobody ever used."""
    own = lane({**PACK, "expires_in": 60}, "2")
    own("consume" if way == "refund" else "hold", "h", amount="10", **({} if way == "refund" else {"ttl": 60}))
    own("consume", amount="2")
    assert own("revoke", grant=2)["owed"] == "2"
    assert tell(own, 100, 1, frozen=True)["owed"] == "10"
    own.wait(seconds=60 if way == "time" else 0)
    if way == "time":
        own("settle")
    else:
        own(way, **{"operation" if way == "refund" else "hold": "h"})
    own.wait(seconds=60)
    assert own("settle")["balance"] == {"available": "0", "debt": "2"}, "what is owed for others is owed yet"
    assert last_kinds(own, 1) == [("debt_paid", 1, "10")]
    assert tell(own, 100, 2)["thawed"] == "0"
    back = tell(own, 0, 3)
    assert (back["restored"], back["balance"]) == ("10", {"available": "8", "by_source": {"pack": "8"}})


def test_a_grant_of_a_frozen_purchase_is_frozen_and_can_be_revoked() -> None:
    own = lane()
    tell(own, 0, 1, frozen=True)
    assert own("grant", **PACK)["balance"] == {"available": "0", "frozen": "10"}
    assert own("revoke", purchase="pi_1", amount="4")["charged"] == "4"
    assert tell(own, 100, 2, frozen=True)["charged"] == "6"
    assert tell(own, 0, 3)["balance"]["available"] == "6"


def year(plan: str = "yearly") -> Lane:
    """A year that was paid for, of 12 credits a month."""
    own = Lane(YEARLY)
    own("open", kind="pool")
    own("plans.subscribe", plan=plan, payment="pi_1")
    return own


def until(own: Lane, month: int) -> None:
    own.now = add_months(START, month, "UTC")


def test_half_a_year_that_is_refunded_in_its_third_month() -> None:
    own = year()
    own("consume", amount="12")
    until(own, 1)
    own("consume", amount="5")
    until(own, 2)
    assert own.available() == "12"
    refunded = tell(own, 6_000, 1, paid=12_000)
    # 36 were given, so 18 are to be away: the 12 of this month, and 6 of the 17 that were spent.
    assert (refunded["charged"], refunded["owed"]) == ("12", "6")
    balances = []
    for month in (3, 4, 5):
        until(own, month)
        balances.append(own("settle")["balance"])
    assert balances[0] == {"available": "0"}, "6 were taken, and 6 paid the debt"
    assert [balance["available"] for balance in balances[1:]] == ["6", "6"]
    until(own, 6)
    assert tell(own, 0, 2, paid=12_000)["restored"] == "42"
    assert own.available() == "48"


@pytest.mark.parametrize(("returned", "left"), [(0, "12"), (50, "12"), (75, "6"), (100, "0")])
def test_what_had_lapsed_of_a_returned_purchase_is_taken_when_a_renewal_is_undone(returned: int, left: str) -> None:
    own = year()
    until(own, 1)
    tell(own, returned, 1)
    assert own("plans.undo", actor="anna", reason="wrong")["balance"]["available"] == left


def test_what_a_purchase_owes_is_paid_out_of_its_own_lots_before_it_can_be_spent() -> None:
    """Of the second month's lot nothing is left: it paid what was owed for the first, of which it comes back now."""
    own = Lane(KEPT)
    own("open", kind="pool")
    own("plans.subscribe", plan="kept", payment="pi_1")
    own("hold", "h", amount="12", ttl=30 * 86_400)
    assert tell(own, 50, 1)["owed"] == "6"
    until(own, 1)
    assert own("settle")["balance"] == {"available": "0", "held": "12"}
    own("release", hold="h")
    assert own.available() == "12"
    assert tell(own, 100, 2)["balance"] == {"available": "0"}
    assert tell(own, 50, 3)["balance"]["available"] == "12"


def test_what_lapses_after_others_have_paid_its_debt_is_not_taken_again() -> None:
    own = year()
    own("hold", "h", amount="9", ttl=30 * 86_400)
    assert tell(own, 50, 1)["owed"] == "3"
    until(own, 1)
    assert own("settle")["balance"]["available"] == "3", "6 were taken, and 3 paid the debt"
    own.wait(days=3)
    own("settle")
    assert last_kinds(own, 1) == [("expired", 1, "9")]
    everything = tell(own, 100, 2)
    assert (everything["charged"], everything["balance"]) == ("3", {"available": "0"})


def test_a_month_of_a_disputed_year_is_frozen_as_it_comes_and_carried_as_it_is() -> None:
    own = year("keeping")
    tell(own, 0, 1, frozen=True)
    until(own, 2)
    assert own("settle")["balance"] == {"available": "0", "frozen": "36"}
    assert refused(own("consume", amount="1"), Code.INSUFFICIENT_CREDITS)
    assert tell(own, 0, 2)["balance"] == {"available": "36", "by_source": {"rollover": "24", "monthly": "12"}}


def test_an_unopened_account_is_waited_for_and_a_closed_one_is_not() -> None:
    own = Lane()
    assert refused(tell(own, 50, 1), Code.UNKNOWN_ACCOUNT)
    assert own.account.purchases == {}
    own = lane(PACK)
    own.account.status = CLOSED
    assert tell(own, 50, 1)["charged"] == "5"


def test_an_account_is_told_what_was_taken_and_that_a_purchase_is_frozen_or_thawed() -> None:
    own = year()
    own("consume", amount="10")
    for returned, frozen in ((0, True), (50, True), (50, False), (0, False)):
        tell(own, returned, own.sent, frozen=frozen)
    told = [(notice.kind, notice.details) for notice in own.account.notices]
    assert told == [
        ("purchase_frozen", {"amount": "2", "purchase": "pi_1"}),
        ("refunded", {"amount": "6", "purchase": "pi_1", "owed": "4"}),
        ("purchase_thawed", {"amount": "0", "purchase": "pi_1"}),
    ]
