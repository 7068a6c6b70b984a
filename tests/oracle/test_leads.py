"""Leads one conversion at a time, in both ledgers: what goes along, what follows, what comes back, and to whom."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from creditlane.contract import converting_id
from models.rules.state import CLOSED, OPEN
from tests.oracle.model import Row
from tests.oracle.test_against_rules import START
from tests.oracle.test_transfers import World, buckets

PRICE = {"minor": 499, "currency": "EUR", "per": "25"}


def world(**granted: Any) -> World:
    """A lead with ten credits unless said otherwise, beside two users and a pool that have nothing; dora is nobody."""
    made = World("debt")
    for name, kind in (("lena", "lead"), ("anna", "user"), ("bert", "user")):
        made.do("credits.open", name, kind=kind, welcome=False)
    made.do("credits.grant", "lena", "grant", **{"amount": 10, "source": "lead", **granted})
    return made


def state(made: World) -> tuple[str, str | None]:
    lead = made.accounts["lena"].account
    return lead.status, lead.converted_to


def converted(made: World, to: str = "anna") -> Row:
    """The lead is converted, and everything has arrived."""
    result = made.do("credits.convert", "lena", to=to)
    made.quiet()
    return result


def test_what_a_lead_has_left_becomes_its_users() -> None:
    made = world()
    made.do("credits.consume", "lena", amount=4)
    result = made.do("credits.convert", "lena", "signed up", to="anna")
    assert (result["status"], result["charged"], result["to"]) == ("applied", 6_000_000, "anna")
    assert buckets(made, "lena") == {"in_transit": 6}
    assert state(made) == (CLOSED, "anna")
    made.quiet()
    made.check_quiet()
    assert buckets(made, "lena") == {"sent": 6}
    assert buckets(made, "anna") == {"available": 6, "received": 6}
    for refused in (
        made.do("credits.grant", "lena", amount=1, source="pack"),
        made.do("credits.consume", "lena", amount=1),
        made.do("accounts.close", "lena", actor="ann", reason="a test"),
    ):
        assert (refused["code"], refused["converted_to"]) == ("account_closed", "anna")
    reopened = made.do("accounts.reopen", "lena", actor="ann", reason="a test")
    assert (reopened["code"], reopened["converted_to"]) == ("already_converted", "anna")


def test_every_lot_goes_along_as_it_is() -> None:
    made = world(priority=7, expires_in=60, unit_price=PRICE, features=["image", "block"])
    begins = (START + timedelta(days=3)).isoformat()
    made.do("credits.grant", "lena", amount=5, source="signup", effective_at=begins)
    made.do("credits.grant", "lena", amount=2, source="other")
    made.now += timedelta(seconds=1)
    converted(made)
    lots = made.accounts["anna"].account.grants
    assert {lot.source: (lot.available // 10**6, lot.features, lot.effective_at) for lot in lots.values()} == {
        "lead": (10, frozenset({"image", "block"}), made.now),
        "signup": (5, None, START + timedelta(days=3)),
        "other": (2, None, made.now),
    }
    (kept,) = (lot for lot in lots.values() if lot.source == "lead")
    assert (kept.priority, kept.expires_at, kept.price_minor, kept.price_per) == (
        7, START + timedelta(seconds=60), 499, 25_000_000,
    )  # fmt: skip


def test_it_is_converted_once_however_often_and_to_whomever_it_is_sent() -> None:
    made = world()
    made.do("credits.convert", "lena", "first", to="anna")
    assert made.do("credits.convert", "lena", "first", to="anna")["replayed"]
    assert made.do("credits.convert", "lena", "first", to="bert")["code"] == "id_conflict"
    assert made.do("credits.convert", "lena", "again", to="anna")["charged"] == 0
    other = made.do("credits.convert", "lena", "other", to="bert")
    assert (other["code"], other["converted_to"]) == ("already_converted", "anna")
    assert len(made.heap) == 1
    for _ in range(2):
        made.hand_over(made.heap[0])
    made.quiet()
    made.check_quiet()
    assert buckets(made, "anna") == {"available": 10, "received": 10}
    assert buckets(made, "bert") == {}
    assert made.do("credits.convert", "anna", to="bert")["code"] == "invalid"


def test_what_comes_back_to_a_lead_later_follows_each_part_once() -> None:
    made = world()
    for hold in ("to release", "to capture", "too little", "to forget"):
        made.do("credits.hold", "lena", hold, amount=2, ttl=60)
    made.do("credits.consume", "lena", "spent", amount=1)
    assert converted(made)["charged"] == 1_000_000
    made.do("credits.release", "lena", "released", hold="to release")
    assert [(name, id) for name, id, _ in made.heap] == [
        ("credits.convert", converting_id("lena", "anna", "released")),
    ]
    made.quiet()
    assert buckets(made, "anna")["available"] == 3
    made.do("credits.capture", "lena", hold="to capture", amount="0.5")
    made.quiet()
    # Its credits are gone: more than was held is not there.
    assert made.do("credits.capture", "lena", hold="too little", amount=3)["code"] == "insufficient_credits"
    assert made.do("credits.capture", "lena", hold="too little")["status"] == "applied"
    made.do("credits.refund", "lena", operation="spent")
    made.quiet()
    assert buckets(made, "anna")["available"] == 5.5
    made.now += timedelta(seconds=60)
    made.do("credits.settle", "lena")  # as the sweep does: refused, and yet time has passed
    assert buckets(made, "lena") == {"available": 2, "sent": 5.5}
    letter = made.heap[0]
    made.quiet()
    assert buckets(made, "anna") == {"available": 7.5, "received": 7.5}
    assert made.hand_over(letter)["replayed"]
    assert made.heap == []


def test_a_lead_whose_user_cannot_take_its_credits_is_open_again() -> None:
    made = world()
    made.do("credits.hold", "lena", "work", amount=4)
    assert converted(made, to="dora")["charged"] == 6_000_000
    assert state(made) == (OPEN, None)
    assert buckets(made, "lena") == {"available": 6}
    made.do("credits.release", "lena", hold="work")
    converted(made, to="bert")
    assert buckets(made, "bert") == {"available": 10, "received": 10}
    assert state(made) == (CLOSED, "bert")


def test_what_comes_back_too_late_goes_to_whom_the_lead_has_become() -> None:
    made = world()
    made.do("credits.hold", "lena", "work", amount=4)
    made.do("credits.convert", "lena", "first", to="dora")
    made.do("credits.release", "lena", "released", hold="work")
    made.deliver(1)  # the part that follows is on its way to dora as well
    while len(made.heap) > 1:
        made.deliver(0)
    assert state(made) == (OPEN, None)
    made.do("credits.convert", "lena", "second", to="bert")
    made.quiet()
    made.check_quiet()
    assert state(made) == (CLOSED, "bert")
    assert buckets(made, "bert") == {"available": 10, "received": 10}
    assert buckets(made, "dora") == {}


def test_a_debt_is_paid_before_a_lead_leaves() -> None:
    made = world(purchase="p")
    made.do("credits.consume", "lena", amount=10)
    made.do("credits.grant", "lena", amount=2, source="lead", features=["image"])
    made.do("credits.grant", "lena", amount=5, source="bonus")
    made.do("credits.revoke", "lena", purchase="p", amount=3)
    assert buckets(made, "lena")["debt"] == 3
    assert converted(made)["charged"] == 4_000_000
    assert buckets(made, "lena") == {"sent": 4, "revoked": 3}
    # What is owed later stays with the lead.
    made.do("credits.claw_back", "lena", "payment.1", purchase="p", paid_minor=10, returned_minor=10, step=1)
    assert buckets(made, "lena") == {"sent": 4, "revoked": 3, "debt": 7}
    assert buckets(made, "anna") == {"available": 4, "received": 4}


def test_what_is_disputed_follows_once_the_dispute_is_over() -> None:
    made = world(purchase="p")
    claim = {"purchase": "p", "paid_minor": 10, "returned_minor": 0}
    made.do("credits.claw_back", "lena", "payment.1", **claim, step=1, frozen=True)
    assert converted(made)["charged"] == 0
    assert buckets(made, "lena") == {"available": 10}
    made.do("credits.claw_back", "lena", "payment.2", **claim, step=2)
    made.quiet()
    assert buckets(made, "anna") == {"available": 10, "received": 10}


def test_a_lead_becomes_a_user_and_nothing_else() -> None:
    made = world()
    made.do("credits.open", "dora", kind="pool")
    converted(made, to="dora")
    assert state(made) == (OPEN, None)
    assert buckets(made, "lena") == {"available": 10}


def test_a_lead_named_at_sign_up_follows_whatever_is_lost_or_doubled() -> None:
    made = world()
    made.do("credits.open", "dora", "signed up", lead="lena", welcome=False)
    assert [id for _, id, _ in made.heap] == [converting_id("lena", "dora")]
    made.heap.clear()
    assert made.do("credits.open", "dora", "signed up", lead="lena", welcome=False)["replayed"]
    letter = made.heap[0]
    made.quiet()
    assert made.hand_over(letter)["replayed"]
    assert buckets(made, "dora") == {"available": 10, "received": 10}
    assert made.heap == []
    # Of who is no lead, or somebody else by now, it is told in the history of that one; the account stands.
    for lead, code in (("bert", "invalid"), ("lena", "already_converted")):
        again = World("debt")
        again.accounts["lena"], again.accounts["bert"] = made.accounts["lena"], made.accounts["bert"]
        again.do("credits.open", "dora", "signed up", lead=lead)
        if lead == "lena":
            again.accounts["dora"], again.heap = made.accounts["anna"], []
            assert again.do("credits.convert", "lena", to="anna")["code"] == code
        else:
            assert again.deliver(0)["code"] == code
