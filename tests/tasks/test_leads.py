"""What leads, gifts and administrators come to over several accounts: plans, limits of a day, and no way round them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creditlane.contract import MAX_MESSAGE_BYTES, decode_message
from models.catalog import parse_catalog
from models.rules.catalog import Catalog
from models.rules.sharing import SharedCode
from models.rules.state import Account
from tasks.ledger import apply
from tasks.registry import OPERATIONS

START = datetime(2026, 1, 31, 12, tzinfo=UTC)

CATALOG = """
[catalog]
name = "leads"
zone = "Europe/Berlin"
[signup]
credits = "6"
[lead]
credits = "20"
source = "trial"
[plans.free]
monthly_credits = "5"
source = "bonus"
mode = "rollover"
rollover_cap = "1x"
[plans.pro]
monthly_credits = "100"
price = "10.00 EUR"
interval = "year"
[gifts]
credits_per_day = "10"
gifts_per_day = 3
[features.image]
price = "1"
[referrals]
referrer = "4"
referee = "3"
trigger = "sign_up"
"""


class Town:
    """Some accounts in memory with what they share; what follows from an operation is delivered by :meth:`quiet`."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.now = START
        self.codes: dict[str, SharedCode] = {}
        self.accounts: dict[str, Account] = {}
        self.heap: list[tuple[str, str, dict[str, Any]]] = []
        self.sent = 0

    def __call__(self, name: str, account: str, id: str | None = None, /, **content: Any) -> dict[str, Any]:
        """Send an operation to an account, and return its result."""
        self.sent += 1
        arguments = msgspec.json.encode({"account": account, **content})
        state = self.accounts.setdefault(account, Account(account))
        state.codes = self.codes
        message = decode_message(name, arguments)
        done = apply(state, name, id or f"operation-{self.sent}", message, arguments, self.now, self.catalog)
        self.heap += [(each.name, each.operation, dict(each.arguments)) for each in done.follow]
        result: dict[str, Any] = msgspec.json.decode(done.result)
        return result

    def quiet(self) -> None:
        """Deliver what follows, until nothing does."""
        while self.heap:
            name, id, content = self.heap.pop(0)
            assert len(msgspec.json.encode(content)) < MAX_MESSAGE_BYTES
            self(name, content.pop("account"), id, **content)

    def balance(self, account: str) -> dict[str, Any]:
        """What an account has by source, after time has passed."""
        found: dict[str, Any] = self("credits.settle", account)["balance"].get("by_source", {})
        return found


@pytest.fixture
def town() -> Town:
    return Town(parse_catalog(CATALOG, "leads.toml"))


def by_hand(town: Town, name: str, account: str) -> dict[str, Any]:
    return town(f"accounts.{name}", account, actor="ann", reason="a test")


def test_a_plan_of_a_lead_gives_nothing_more_but_what_is_paid_for_follows(town: Town) -> None:
    town("credits.open", "user")
    for lead, plan in (("visitor", "free"), ("buyer", "pro")):
        town("credits.open", lead, kind="lead", plan=plan)
        town("credits.convert", lead, to="user")
    town.quiet()
    assert town.balance("user") == {"signup": "6", "trial": "40", "bonus": "5", "monthly": "100"}
    town.now += timedelta(days=40)
    for lead in ("visitor", "buyer"):
        town("credits.settle", lead)
    town.quiet()
    # The free plan's credits of the first month went along with their end; the year that is paid for goes on.
    assert town.balance("user")["monthly"] == "100"
    assert "bonus" not in town.balance("user")
    assert [subscription.status for name in ("visitor", "buyer")
            if (subscription := town.accounts[name].subscription) is not None] == ["ended", "active"]  # fmt: skip


def test_lots_of_many_features_go_along_message_by_message(town: Town) -> None:
    town("credits.open", "user", welcome=False)
    town("credits.open", "visitor", kind="lead")
    names = [f"{number:03d}{'x' * 125}" for number in range(63)]
    for number in range(80):
        town("credits.grant", "visitor", amount=1, source="trial", features=[f"{number}", *names])
    assert town("credits.convert", "visitor", to="user")["charged"] == "31"
    town.quiet()
    user = town.accounts["user"]
    assert (user.available, town.accounts["visitor"].available) == (100_000_000, 0)
    assert len({lot.operation for lot in user.grants.values()}) == 3


def test_nobody_is_welcomed_as_another_lead_again_and_again(town: Town) -> None:
    town.catalog = parse_catalog(CATALOG.replace('source = "trial"', 'source = "trial"\nper_user = 2'), "leads.toml")
    town("credits.open", "user", welcome=False)
    for number in range(4):
        lead = f"visitor-{number}"
        town("credits.open", lead, kind="lead")
        town("credits.hold", lead, "work", amount=5, ttl=86400)
        town("credits.convert", lead, to="user")
        town.quiet()
    assert town.balance("user") == {"trial": "30"}
    for number in range(4):
        town("credits.release", f"visitor-{number}", hold="work")
    town.quiet()
    assert town.balance("user") == {"trial": "40"}, "what comes later of a lead that it was follows"
    assert [town.accounts[f"visitor-{number}"].status for number in range(4)] == ["closed", "closed", "open", "open"]
    assert town.balance("visitor-3") == {"trial": "20"}


def test_an_account_that_is_frozen_gives_nothing_out(town: Town) -> None:
    for name in ("user", "friend"):
        town("credits.open", name)
    town("credits.grant", "user", "grant", amount=10, source="pack", purchase="p")
    for hold in ("less", "more", "all"):
        town("credits.hold", "user", hold, amount=1)
    town("credits.consume", "user", "spent", amount=1)
    town("credits.transfer", "user", "lost", to="nobody", amount=1)
    assert by_hand(town, "thaw", "user")["code"] == "invalid"
    assert by_hand(town, "freeze", "user")["account_status"] == "frozen"
    assert by_hand(town, "freeze", "user")["code"] == "invalid"
    refused = [
        town("credits.consume", "user", amount=1),
        town("credits.hold", "user", amount=1),
        town("credits.transfer", "user", to="friend", amount=1),
        town("codes.issue", "user", codes=["AAAA"], amount=1),
        town("credits.capture", "user", hold="more", amount=2),
    ]
    assert {each["code"] for each in refused} == {"account_frozen"}
    town.quiet()  # the transfer comes back
    went_on = [
        town("credits.capture", "user", hold="less", amount="0.5"),
        town("credits.release", "user", hold="all"),
        town("credits.refund", "user", operation="spent"),
        town("credits.grant", "user", amount=1, source="pack"),
        town("credits.adjust", "user", amount=-1, actor="ann", reason="a test"),
        town("credits.revoke", "user", purchase="p", amount=1),
        town("credits.claw_back", "user", "payment.1", purchase="p", paid_minor=10, returned_minor=1, step=1),
        town("plans.subscribe", "user", plan="free"),
        town("credits.transfer", "friend", to="user", amount=1),
    ]
    assert [each["status"] for each in went_on[:-1]] == ["applied"] * 8
    assert by_hand(town, "thaw", "user")["account_status"] == "open"
    assert town("credits.consume", "user", amount=1)["status"] == "applied"


def test_whatever_takes_credits_out_says_so() -> None:
    """An operation that is new is thought of: which ones a frozen account may not do is written down here."""
    assert {name for name, operation in OPERATIONS.items() if operation.spends} == {
        "credits.consume", "credits.hold", "credits.transfer", "credits.convert", "codes.issue", "referrals.issue",
        "referrals.claim",
    }  # fmt: skip


def test_an_account_is_closed_when_nothing_is_open_and_opened_again_empty(town: Town) -> None:
    town("credits.open", "user", plan="free")
    town("credits.grant", "user", amount=5, source="pack", purchase="p", features=["image"])
    town("credits.grant", "user", amount=7, source="pack", effective_at="2026-03-01T00:00:00Z")
    town("credits.hold", "user", "work", amount=1)
    town("credits.grant", "user", amount=2, source="gift")
    town("credits.transfer", "user", to="nobody", amount=2)
    refused = by_hand(town, "close", "user")
    assert (refused["code"], refused["open_holds"]) == ("invalid", ["work"])
    assert "1 open holds and 2 credits in transit" in refused["reason"]
    town.quiet()
    town("credits.release", "user", hold="work")
    by_hand(town, "freeze", "user")
    closed = by_hand(town, "close", "user")
    assert (closed["account_status"], closed["charged"], closed["expired"]) == ("closed", "20", "5")
    assert closed["balance"] == {"available": "0"}
    assert town("plans.renew", "user", period_start="2026-02-01T00:00:00Z", plan="pro")["code"] == "account_closed"
    assert town("credits.refund", "user", operation="work")["code"] == "account_closed"
    assert town("credits.convert", "user", to="friend")["code"] == "account_closed"
    # What was taken by hand is not taken again with its money, and does not come back with it.
    for step, returned in ((1, 100), (2, 0)):
        claim = {"purchase": "p", "paid_minor": 100, "returned_minor": returned, "step": step}
        assert town("credits.claw_back", "user", f"payment.{step}", **claim)["charged"] == "0"
    assert by_hand(town, "reopen", "user")["account_status"] == "open"
    assert by_hand(town, "reopen", "user")["code"] == "invalid"
    town.now += timedelta(days=40)
    assert town("credits.settle", "user")["balance"] == {"available": "0"}


def test_what_is_given_away_in_a_day_has_limits(town: Town) -> None:
    for name in ("user", "friend"):
        town("credits.open", name, welcome=False)
    town("credits.grant", "user", amount=100, source="pack")

    def give(amount: Any, to: str = "friend") -> Any:
        return town("credits.transfer", "user", to=to, amount=amount).get("code")

    assert give("10.000001") == "daily_limit"
    assert [give(6), give("4.5"), give(4)] == [None, "daily_limit", None]
    assert town("codes.issue", "user", codes=["AAAA"], amount="0.5")["code"] == "daily_limit"
    town.now = datetime(2026, 1, 31, 22, 59, 59, tzinfo=UTC)
    assert give("0.5") == "daily_limit"
    town.now += timedelta(seconds=1)  # midnight in Berlin
    # What comes back was given all the same: the limit is on trying.
    assert give(1, "nobody") is None
    town.quiet()
    assert town("codes.issue", "user", codes=["AAAA", "BBBB"], amount=1)["status"] == "applied"
    assert give(1) == "daily_limit"
    town.now += timedelta(days=1)
    assert give(10) is None


ACCOUNTS = ("a", "b", "c", "v", "w")
who = st.sampled_from(ACCOUNTS)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("transfer"), who, who, st.sampled_from(["0.5", 1, 3])),
        st.tuples(st.just("convert"), st.sampled_from(["v", "w"]), who),
        st.tuples(st.just("issue"), who, st.booleans()),
        st.tuples(st.just("redeem"), who, st.integers(0, 3)),
        st.tuples(st.just("consume"), who, st.sampled_from(["0.5", 2])),
        st.tuples(st.just("hold"), who),
        st.tuples(st.just("release"), who),
        st.tuples(st.just("refund"), who),
        st.tuples(st.just("wait"), st.sampled_from([1, 20, 40])),
        st.tuples(st.just("deliver")),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_what_nobody_paid_for_can_be_given_away_by_no_way_round(steps: list[tuple[Any, ...]]) -> None:
    """Out of welcomes, bonuses, promotions and what a plan carries of them, no gift is ever made."""
    town = Town(parse_catalog(CATALOG.replace("credits_per_day", "redeems_per_day = 9\n#").replace(
        "gifts_per_day", "#"), "leads.toml"))  # fmt: skip
    for name in ACCOUNTS:
        town("credits.open", name, kind="lead" if name in "vw" else "user", plan="free")
        town("credits.grant", name, f"bonus of {name}", amount=4, source="promotion")
    made = 0
    for number, (what, *arguments) in enumerate(steps):
        account = str(arguments[0]) if arguments else ""
        if what == "wait":
            town.now += timedelta(days=int(arguments[0]))
        elif what == "deliver":
            town.quiet()
        elif what == "transfer" and account != arguments[1]:
            assert town("credits.transfer", account, to=arguments[1], amount=arguments[2])["status"] == "rejected"
        elif what == "convert" and account != arguments[1]:
            town("credits.convert", account, to=arguments[1])
        elif what == "issue":
            given = {"actor": "ann", "reason": "a campaign"} if arguments[1] else {}
            issued = town("codes.issue", account, codes=[f"CODE{made}"], amount=2, uses=5, **given)
            assert issued["status"] == "rejected" or given
            made += issued["status"] == "applied"
        elif what == "redeem":
            town("codes.redeem", account, code=f"CODE{arguments[1]}")
        elif what == "consume":
            town("credits.consume", account, f"charge-{number}", amount=arguments[1])
        elif what == "hold":
            town("credits.hold", account, f"hold-{number}", amount=1, ttl=86400)
        else:
            wanted = "hold" if what == "release" else "charge"
            known = [id for id in town.accounts[account].known if id.startswith(wanted)]
            if known and what == "release":
                town("credits.release", account, hold=known[-1])
            elif known:
                town("credits.refund", account, operation=known[-1])
    town.quiet()
    for each in town.accounts.values():
        assert {lot.source for lot in each.grants.values()} <= {"signup", "trial", "promotion", "bonus", "rollover"}
