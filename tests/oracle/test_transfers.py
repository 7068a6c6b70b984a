"""Transfers and conversions of leads against the second ledger: letters on their way, in any order, more than once.

What one account's operations are followed by lies in a heap until it is delivered, to both ledgers. After each step
both agree on every account, each account closes, and so do all accounts together.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from creditlane.contract import concluding_id, receiving_id
from models.rules.state import CLOSED
from tests.oracle.model import Row
from tests.oracle.test_against_rules import CATALOGS, COMMON, PRICES, START, THOROUGH, Both

STEPS = settings(COMMON, max_examples=3000 if THOROUGH else 300, stateful_step_count=50)

NAMES = ("anna", "bert", "lena", "dora")
"""A pool, a user and a lead; dora is not opened at first."""

KINDS = {"anna": "pool", "bert": "user", "lena": "lead"}

Letter = tuple[str, str, Row]


class World:
    """Some accounts in the rules and in the second ledger, and what is on its way between them."""

    def __init__(self, on_spent: str) -> None:
        self.accounts = {name: Both(CATALOGS[on_spent], name) for name in NAMES}
        self.now = START
        self.heap: list[Letter] = []
        self.delivered: list[Letter] = []
        self.script: list[str] = []
        self.numbers = 0

    def do(self, name: str, account: str, operation: str | None = None, /, **content: Any) -> Row:
        """Send one operation to an account in both ledgers; what follows goes onto the heap."""
        self.numbers += 1
        operation = operation or f"operation-{self.numbers}"
        present = {"account": account, **{key: value for key, value in content.items() if value is not None}}
        self.script.append(f"  {self.now:%d %H:%M:%S}  {operation}  {name}  {present}")
        both = self.accounts[account]
        both.now = self.now
        known = operation in both.account.known
        try:
            result = both.do(name, operation, present)
            again = known and name not in ("credits.receive", "credits.open")
            assert not (again and both.letters), "what is repeated is followed by nothing, but an answer to the sender"
            self.heap += both.letters
            self.check()
        except Exception as error:
            raise AssertionError("\n".join([*self.script, f"{type(error).__name__}: {error}"])) from error
        return result

    def deliver(self, place: int, keep: bool = False) -> Row:
        """Take a letter from the heap, or leave it there to come again."""
        letter = self.heap[place] if keep else self.heap.pop(place)
        self.delivered.append(letter)
        return self.hand_over(letter)

    def hand_over(self, letter: Letter) -> Row:
        name, operation, content = letter
        rest = {key: value for key, value in content.items() if key != "account"}
        return self.do(name, content["account"], operation, **rest)

    def quiet(self) -> None:
        """Deliver until nothing is on its way any more."""
        while self.heap:
            self.deliver(0)

    def total(self, bucket: str) -> int:
        return sum(getattr(both.account, bucket) for both in self.accounts.values())

    def check(self) -> None:
        """What was received is not more than what left, of each source; both ledgers know of the same."""
        lots = [lot for both in self.accounts.values() for lot in both.account.grants.values()]
        for source in {lot.source for lot in lots}:
            of = [lot for lot in lots if lot.source == source]
            assert sum(lot.received for lot in of) <= sum(lot.sent + lot.in_transit for lot in of), source
        kept = ("available", "held", "consumed", "expired", "revoked")
        came = self.total("granted") + self.total("restored") + self.total("received") - self.total("sent")
        assert came == sum(self.total(bucket) for bucket in kept) + self.total("in_transit")

    def check_quiet(self) -> None:
        """With nothing on its way, nothing is in transit and what was sent has been received."""
        assert self.total("in_transit") == 0
        assert self.total("sent") == self.total("received")
        for both in self.accounts.values():
            assert both.ledger.became is None or not both.ledger.going_along(self.now), "all of a lead has followed"


amounts = st.sampled_from(["0.000001", "0.5", "1", 2, "3", "4.25", "6", 10])
names = st.sampled_from(NAMES)
ends = st.sampled_from([None, None, 10, 20, 60, 3600])


class Transfers(RuleBasedStateMachine):
    """Operations of several accounts, and deliveries in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World("debt")

    @initialize(on_spent=st.sampled_from(["debt", "forgive"]))
    def begin(self, on_spent: str) -> None:
        self.world = World(on_spent)
        for name, kind in KINDS.items():
            self.world.do("credits.open", name, kind=kind, welcome=False)
            for amount, expires_in in ((3, 20), (4, 60), (2, None)):
                self.world.do(
                    "credits.grant", name, amount=amount, source="pack", purchase="purchase-1", expires_in=expires_in
                )
        begins = (START + timedelta(seconds=60)).isoformat()
        self.world.do(
            "credits.grant", "lena", amount=5, source="bonus", features=["third", "image"], effective_at=begins
        )

    def both(self, name: str) -> Both:
        return self.world.accounts[name]

    def past(self, account: str, *names: str) -> list[str]:
        return [operation for name, operation, _ in self.both(account).sent if name in names]

    @rule(
        account=names,
        amount=amounts,
        source=st.sampled_from(["pack", "pack", "bonus", "other"]),
        priority=st.sampled_from([None, None, 0, 50]),
        features=st.sampled_from([None, None, None, ["image"], ["third", "block"]]),
        effective_at=st.sampled_from([None, None, None, 10, 60]),
        expires_in=ends,
        purchase=st.sampled_from([None, "purchase-1", "purchase-1", "purchase-2"]),
        unit_price=st.sampled_from([None, *PRICES, {"minor": 1, "currency": "JPY"}]),
    )
    def grant(self, account: str, effective_at: int | None, **content: Any) -> None:
        begins = None if effective_at is None else (self.world.now + timedelta(seconds=effective_at)).isoformat()
        self.world.do("credits.grant", account, effective_at=begins, **content)

    @rule(account=names, to=names, amount=amounts, message=st.sampled_from([None, "for you"]))
    def transfer(self, account: str, to: str, amount: str | int, message: str | None) -> None:
        if account != to:
            self.world.do("credits.transfer", account, to=to, amount=amount, message=message)

    @rule(account=names, to=names, amount=amounts)
    def another_transfer(self, account: str, to: str, amount: str | int) -> None:
        if account != to:
            self.world.do("credits.transfer", account, to=to, amount=amount)

    @rule(account=st.sampled_from(["lena", "lena", "lena", "bert"]), to=names)
    def convert(self, account: str, to: str) -> None:
        if account != to:
            self.world.do("credits.convert", account, to=to)

    @rule(account=st.sampled_from(["dora", "dora", "lena"]), lead=names, welcome=st.booleans())
    def sign_up(self, account: str, lead: str, welcome: bool) -> None:
        if account != lead:
            self.world.do("credits.open", account, lead=lead, welcome=welcome)

    @rule(
        account=names,
        what=st.sampled_from(
            ["accounts.freeze", "accounts.thaw", "accounts.thaw", "accounts.close", "accounts.reopen"]
        ),
    )
    def by_hand(self, account: str, what: str) -> None:
        if what != "accounts.close" or len(self.world.script) > 20:
            self.world.do(what, account, actor="admin", reason="a test")

    @rule(data=st.data(), account=names, amount=st.sampled_from([None, None, "0.5", "2"]))
    def capture(self, data: st.DataObject, account: str, amount: str | None) -> None:
        hold = data.draw(st.sampled_from(self.past(account, "credits.hold") or ["no"]))
        self.world.do("credits.capture", account, hold=hold, amount=amount)

    @rule(account=names, returned=st.sampled_from([0, 0, 50, 100]), frozen=st.booleans())
    def claw_back(self, account: str, returned: int, frozen: bool) -> None:
        self.world.numbers += 1
        self.world.do(
            "credits.claw_back", account, f"payment.{self.world.numbers}", purchase="purchase-1", paid_minor=100,
            returned_minor=returned, step=self.world.numbers, frozen=frozen,
        )  # fmt: skip

    @precondition(lambda self: self.world.heap)
    @rule(data=st.data(), keep=st.sampled_from([False, False, False, True]))
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        self.world.deliver(data.draw(st.integers(0, len(self.world.heap) - 1)), keep)

    @precondition(lambda self: self.world.heap)
    @rule(data=st.data())
    def deliver_another(self, data: st.DataObject) -> None:
        self.world.deliver(data.draw(st.integers(0, len(self.world.heap) - 1)))

    @precondition(lambda self: self.world.delivered)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        assert self.world.hand_over(data.draw(st.sampled_from(self.world.delivered)))["replayed"]

    @rule(seconds=st.sampled_from([1, 10, 10, 20, 60, 3600]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += timedelta(seconds=seconds)

    @rule(account=names, amount=amounts, partial=st.booleans())
    def consume(self, account: str, amount: str | int, partial: bool) -> None:
        self.world.do("credits.consume", account, amount=amount, partial=partial)

    @rule(account=names, amount=amounts, ttl=st.sampled_from([10, 60]))
    def hold(self, account: str, amount: str | int, ttl: int) -> None:
        self.world.do("credits.hold", account, amount=amount, ttl=ttl)

    @rule(data=st.data(), account=names)
    def release(self, data: st.DataObject, account: str) -> None:
        self.world.do(
            "credits.release", account, hold=data.draw(st.sampled_from(self.past(account, "credits.hold") or ["no"]))
        )

    @rule(data=st.data(), account=names)
    def refund(self, data: st.DataObject, account: str) -> None:
        charged = self.past(account, "credits.consume", "credits.capture", "credits.transfer", "credits.convert")
        charged = charged or ["none"]
        self.world.do("credits.refund", account, operation=data.draw(st.sampled_from(charged)))

    @rule(
        account=names, purchase=st.sampled_from(["purchase-1", "purchase-2"]), amount=st.sampled_from([None, None, "1"])
    )
    def revoke(self, account: str, purchase: str, amount: str | None) -> None:
        self.world.do("credits.revoke", account, purchase=purchase, amount=amount)

    @rule(data=st.data(), account=names, amount=st.sampled_from([None, "0.5", "2"]))
    def revoke_a_grant(self, data: st.DataObject, account: str, amount: str | None) -> None:
        number = data.draw(st.integers(1, self.both(account).account.last_grant + 1))
        self.world.do("credits.revoke", account, grant=number, amount=amount)

    @rule(account=names, to=names)
    def transfer_of_all_that_there_is(self, account: str, to: str) -> None:
        free = sum(
            lot["available"]
            for lot in self.both(account).ledger.lots
            if self.both(account).ledger.can_pay(lot, None, self.world.now) and lot["source"] == "pack"
        )
        if account != to and free:
            self.world.do("credits.transfer", account, to=to, amount=f"{free // 10**6}.{free % 10**6:06d}")

    @rule(account=names, amount=st.sampled_from(["-1", "-0.5", "2"]))
    def adjust(self, account: str, amount: str) -> None:
        self.world.do("credits.adjust", account, amount=amount, actor="admin", reason="a test")

    @rule(account=names)
    def open(self, account: str) -> None:
        self.world.do("credits.open", account)

    @rule(
        data=st.data(),
        account=names,
        sender=names,
        name=st.sampled_from(["credits.receive", "credits.confirm", "credits.bounce"]),
    )
    def what_only_the_ledger_sends_under_another_id(
        self, data: st.DataObject, account: str, sender: str, name: str
    ) -> None:
        if name != "credits.receive":
            sender = account
        named = self.past(sender, "credits.transfer", "credits.consume", "credits.convert")
        transfer = data.draw(st.sampled_from(named or ["none"]))
        content: Row = {"transfer": transfer}
        if name == "credits.receive":
            content |= {"sender": sender, "lots": [{"source": "pack", "amount": "5", "priority": 1}]}
        elif name == "credits.bounce":
            content["refused"] = "unknown_account"
        result = self.world.do(name, account, **content)
        assert result["code"] in ("invalid", "unknown_transfer", "unknown_account", "account_closed")

    @invariant()
    def both_agree_on_every_account(self) -> None:
        for both in self.world.accounts.values():
            assert (both.account.status == CLOSED) is both.ledger.closed

    def teardown(self) -> None:
        self.world.quiet()
        self.world.check_quiet()


Transfers.TestCase.settings = STEPS
TestTransfers = pytest.mark.timeout(1800 if THOROUGH else 240)(Transfers.TestCase)


# One transfer at a time: what each bucket holds at each step.


def world(*opened: str, **granted: Any) -> World:
    """Accounts that are pools, so that they begin with nothing; anna has ten credits unless said otherwise."""
    made = World("debt")
    for name in opened or ("anna", "bert"):
        made.do("credits.open", name, kind="pool")
    made.do("credits.grant", "anna", "grant", **{"amount": 10, "source": "pack", **granted})
    return made


def buckets(made: World, account: str) -> dict[str, int]:
    """What is in an account's buckets, in credits."""
    of = made.accounts[account].account
    counters = ("available", "in_transit", "sent", "received", "expired", "revoked", "debt")
    return {name: getattr(of, name) / 1e6 for name in counters if getattr(of, name)}


def test_credits_are_in_transit_until_the_recipient_has_them() -> None:
    made = world()
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    assert buckets(made, "anna") == {"available": 6, "in_transit": 4}
    assert buckets(made, "bert") == {}
    assert made.heap[0][1] == receiving_id("anna", "gift")
    made.deliver(0)
    assert buckets(made, "anna") == {"available": 6, "in_transit": 4}
    assert buckets(made, "bert") == {"available": 4, "received": 4}
    assert made.heap[0][1] == concluding_id("anna", "gift")
    made.deliver(0)
    assert buckets(made, "anna") == {"available": 6, "sent": 4}
    assert made.heap == []


@pytest.mark.parametrize("prepare", ["unopened", "closed", "full"])
def test_credits_that_the_recipient_cannot_take_come_back(prepare: str) -> None:
    made = world("anna") if prepare == "unopened" else world()
    code = {
        "unopened": "unknown_account",
        "closed": "account_closed",
        "full": "limit_reached",
        "many": "limit_reached",
    }[prepare]
    if prepare == "closed":
        made.accounts["bert"].account.status, made.accounts["bert"].ledger.closed = CLOSED, True
    elif prepare == "full":
        for _ in range(8):
            made.do("credits.grant", "bert", amount=10**12, source="pack")
        made.do("credits.grant", "bert", amount=10**12 - 1, source="pack")
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    assert made.deliver(0)["code"] == code
    assert buckets(made, "anna") == {"available": 6, "in_transit": 4}
    came_back = made.deliver(0)
    assert (came_back["status"], came_back["refused"], came_back["transfer"]) == ("applied", code, "gift")
    assert buckets(made, "anna") == {"available": 10}
    # The recipient opens too late: what was refused stays refused, however often it comes.
    if prepare == "unopened":
        made.do("credits.open", "bert", kind="pool")
        for letter in made.delivered:
            assert made.hand_over(letter)["replayed"]
        assert made.deliver(0)["replayed"]  # the sender is told again
        assert buckets(made, "bert") == {}
    assert made.do("credits.transfer", "anna", "gift", to="bert", amount=4)["replayed"]
    assert made.heap == []


def test_both_ends_of_a_transfer_cannot_be_applied() -> None:
    made = world()
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    made.quiet()
    forged = made.do("credits.bounce", "anna", concluding_id("anna", "gift"), transfer="gift", refused="invalid")
    assert forged["code"] == "id_conflict"
    assert buckets(made, "anna") == {"available": 6, "sent": 4}


def test_a_lot_keeps_its_source_priority_expiry_and_price() -> None:
    price = {"minor": 499, "currency": "EUR", "per": "25"}
    made = world(priority=7, expires_in=60, unit_price=price, purchase="pi_1")
    made.do("credits.transfer", "anna", "gift", to="bert", amount="0.000001")
    made.quiet()
    given, got = (made.accounts[name].account.grants[1] for name in ("anna", "bert"))
    for kept in ("source", "priority", "expires_at", "price_minor", "price_currency", "price_per", "features"):
        assert getattr(got, kept) == getattr(given, kept)
    assert got.purchase is None


def test_what_expires_on_its_way_lapses_where_it_arrives() -> None:
    made = world(expires_in=60)
    made.do("credits.adjust", "bert", amount=1, actor="admin", reason="a test")
    made.do("credits.revoke", "bert", grant=1)
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    made.do("credits.transfer", "anna", "lost", to="dora", amount=3)
    made.now += timedelta(seconds=60)
    made.do("credits.settle", "anna")
    assert buckets(made, "anna") == {"in_transit": 7, "expired": 3}
    made.quiet()
    assert buckets(made, "anna") == {"sent": 4, "expired": 6}
    assert buckets(made, "bert") == {"received": 4, "expired": 4, "revoked": 1}


def test_a_recipients_debt_is_paid_first() -> None:
    made = world()
    made.do("credits.grant", "bert", amount=3, source="pack", purchase="pi_1")
    made.do("credits.consume", "bert", amount=3)
    made.do("credits.revoke", "bert", purchase="pi_1")
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    made.quiet()
    assert buckets(made, "bert") == {"available": 1, "received": 4, "revoked": 3}


@pytest.mark.parametrize("arrives", [True, False])
def test_what_was_given_away_is_owed_when_its_purchase_is_revoked(arrives: bool) -> None:
    made = world(purchase="pi_1")
    made.do("credits.transfer", "anna", "gift", to="bert" if arrives else "dora", amount=4)
    revoked = made.do("credits.revoke", "anna", purchase="pi_1")
    assert (revoked["charged"], revoked["owed"]) == (6_000_000, 4_000_000)
    made.quiet()
    if arrives:
        assert buckets(made, "anna") == {"sent": 4, "revoked": 6, "debt": 4}
        assert buckets(made, "bert") == {"available": 4, "received": 4}
    else:
        assert buckets(made, "anna") == {"revoked": 10}


@pytest.mark.parametrize("arrives", [True, False])
def test_what_is_owed_is_booked_on_the_lot_that_was_given_away(arrives: bool) -> None:
    made = world(purchase="pi_0", amount=5)
    made.do("credits.consume", "anna", amount=5)
    made.do("credits.revoke", "anna", purchase="pi_0")
    made.do("credits.grant", "anna", amount=5, source="pack", purchase="pi_1")  # pays the debt, whole
    made.do("credits.grant", "anna", amount=5, source="pack", purchase="pi_1")
    made.do("credits.transfer", "anna", "gift", to="bert", amount=5)
    if arrives:
        made.quiet()
    made.do("credits.revoke", "anna", purchase="pi_1", amount=4)
    lots = made.accounts["anna"].account.grants
    assert (lots[2].clawed_back, lots[3].clawed_back) == (0, 4_000_000)


def test_what_comes_back_to_a_lot_that_was_clawed_back_pays_the_debt_even_when_it_has_expired() -> None:
    made = world(purchase="pi_1", expires_in=60)
    made.do("credits.transfer", "anna", "lost", to="dora", amount=4)
    made.do("credits.revoke", "anna", purchase="pi_1")
    assert buckets(made, "anna") == {"in_transit": 4, "revoked": 6, "debt": 4}
    made.now += timedelta(seconds=60)
    made.quiet()
    assert buckets(made, "anna") == {"revoked": 10}


def test_the_last_lot_taken_is_the_first_to_come_back() -> None:
    made = world(expires_in=60)
    made.do("credits.grant", "anna", amount=5, source="pack")
    made.do("credits.transfer", "anna", "lost", to="dora", amount=12)
    made.quiet()
    kinds = [(entry.kind, entry.grant) for entry in made.accounts["anna"].account.entries]
    assert kinds[2:] == [("transferred", 1), ("transferred", 2), ("bounced", 2), ("bounced", 1)]


@pytest.mark.parametrize("name", ["credits.confirm", "credits.bounce"])
def test_a_transfer_ends_under_its_own_id_alone(name: str) -> None:
    made = world()
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    refused = "unknown_account" if name == "credits.bounce" else None
    assert made.do(name, "anna", "made up", transfer="gift", refused=refused)["code"] == "invalid"
    assert (
        made.do(name, "anna", concluding_id("anna", "x"), transfer="x", refused=refused)["code"] == "unknown_transfer"
    )
    assert buckets(made, "anna") == {"available": 6, "in_transit": 4}
    made.quiet()
    assert buckets(made, "anna") == {"available": 6, "sent": 4}


def test_a_transfer_is_no_charge_to_refund() -> None:
    made = world()
    made.do("credits.transfer", "anna", "gift", to="bert", amount=4)
    assert made.do("credits.refund", "anna", operation="gift")["code"] == "unknown_charge"
    made.quiet()
    assert made.do("credits.refund", "anna", operation="gift")["code"] == "unknown_charge"


def test_credits_go_round_and_come_home() -> None:
    made = world()
    made.do("credits.open", "dora", kind="pool")
    for sender, to in (("anna", "bert"), ("bert", "dora"), ("dora", "anna")):
        made.do("credits.transfer", sender, "round", to=to, amount=4)
        made.quiet()
    assert buckets(made, "anna") == {"available": 10, "sent": 4, "received": 4}
    made.check_quiet()


def test_only_lots_that_may_be_given_away_are_given() -> None:
    made = world(amount=5)
    made.do("credits.grant", "anna", amount=3, source="other")
    made.do("credits.grant", "anna", amount=2, source="pack", features=["image"])
    short = made.do("credits.transfer", "anna", to="bert", amount=6)
    assert (short["code"], short["required"], short["available"]) == ("not_transferable", 6_000_000, 5_000_000)
    lacking = made.do("credits.transfer", "anna", to="bert", amount=9)
    assert (lacking["code"], lacking["available"], lacking["shortfall"]) == (
        "insufficient_credits", 8_000_000, 1_000_000,
    )  # fmt: skip
    assert made.do("credits.transfer", "anna", to="bert", amount=5)["status"] == "applied"


def test_every_kind_of_entry_between_accounts_is_reached() -> None:
    made = world()
    made.do("credits.transfer", "anna", to="bert", amount=4)
    made.do("credits.transfer", "anna", to="dora", amount=4)
    made.quiet()
    kinds: Callable[[str], set[str]] = lambda name: {entry.kind for entry in made.accounts[name].account.entries}  # noqa: E731
    assert kinds("anna") == {"granted", "transferred", "sent", "bounced"}
    assert kinds("bert") == {"received"}
