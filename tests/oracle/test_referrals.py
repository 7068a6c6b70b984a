"""Referrals among several accounts against a second opinion: claims, purchases and rewards in any order.

What an operation is followed by lies in a heap until it is delivered. The second opinion is a few dicts, written from
the design document alone. After each step both agree on answers, bonuses and counts, each account closes, and the
audit's replay, which sees one account alone, gives the same.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from creditlane.contract import ContractError, check_reserved, decode_message, rewarding_id
from models.audit_rows import Totals
from models.catalog import parse_catalog
from models.report import Report
from models.rules.sharing import SharedCode, allowance_row, referral_row
from models.rules.state import CLOSED, COUNTERS, FROZEN, Account
from tasks.ledger import apply, encode
from tasks.replay import Replay
from tests.oracle.test_against_rules import COMMON, START, THOROUGH, Auditor

STEPS = settings(COMMON, max_examples=2000 if THOROUGH else 60, stateful_step_count=50)

NAMES = ("anna", "bert", "carl", "dora", "emil", "fred")
CODES = {name: name.upper() + "1" for name in NAMES}
MICRO = 10**6

TERMS: dict[str, dict[str, Any]] = {
    "at_once": {"trigger": "sign_up", "referrer": 5, "referee": 3, "claim_days": None, "per_day": 1, "per_referrer": 3},
    "bought": {"trigger": "purchase", "referrer": 7, "referee": 2, "claim_days": 2, "per_day": None, "per_referrer": 2},
    "nothing": {
        "trigger": "purchase",
        "referrer": 0,
        "referee": 0,
        "claim_days": 1,
        "per_day": 1,
        "per_referrer": None,
    },
}


def written(value: str | int) -> str:
    """A value as TOML has it; amounts may be numbers."""
    return f'"{value}"' if isinstance(value, str) else str(value)


CATALOGS = {
    name: parse_catalog(
        f'[catalog]\nname = "{name}"\n[referrals]\n'
        + "".join(f"{key} = {written(value)}\n" for key, value in terms.items() if value is not None),
        "referrals.toml",
    )
    for name, terms in TERMS.items()
}

Letter = tuple[str, str, dict[str, Any]]


class Opinion:
    """Who referred whom, and what came of it, as the design has it."""

    def __init__(self) -> None:
        self.opened: dict[str, datetime] = {}
        self.kinds: dict[str, str] = {}
        self.frozen: set[str] = set()
        self.closed: set[str] = set()
        self.codes: dict[str, str] = {}
        self.own: dict[str, str] = {}
        self.shut: set[str] = set()
        self.claimed: dict[str, str] = {}
        self.settled: set[str] = set()
        self.rewarded: dict[tuple[str, str], datetime] = {}
        self.answered: dict[tuple[str, str], tuple[str | None, int]] = {}

    def say(
        self, terms: dict[str, Any], name: str, account: str, operation: str, said: dict[str, Any], now: datetime
    ) -> tuple[str | None, int]:
        """The code of the refusal, if there is one, and the bonus that comes with the operation."""
        if (account, operation) not in self.answered:
            self.answered[account, operation] = self._say(terms, name, account, said, now)
        return self.answered[account, operation]

    def _say(
        self, terms: dict[str, Any], name: str, account: str, said: dict[str, Any], now: datetime
    ) -> tuple[str | None, int]:
        if account in self.closed:
            return "account_closed", 0
        if name == "credits.open":
            return self._open(terms, account, said, now)
        if account not in self.opened:
            return "unknown_account", 0
        if name == "referrals.issue":
            if account in self.frozen:
                return "account_frozen", 0
            if self.kinds[account] == "lead":
                return "invalid", 0
            if account not in self.own:
                if said["code"] in self.codes:
                    return "code_exists", 0
                self.own[account], self.codes[said["code"]] = said["code"], account
            return None, 0
        if name == "referrals.claim":
            refusal = "account_frozen" if account in self.frozen else self.why_not(terms, account, said["code"], now)
            return (refusal, 0) if refusal is not None else (None, self.claim(terms, account, said["code"]))
        if name == "referrals.reward":
            return self._reward(terms, account, said["referee"], said["code"], now)
        free = said.get("unit_price", {"minor": 1})["minor"] == 0
        if not free and account in self.claimed and account not in self.settled:
            return None, self.settle(terms, account)
        return None, 0

    def _open(self, terms: dict[str, Any], account: str, said: dict[str, Any], now: datetime) -> tuple[str | None, int]:
        if account in self.opened:
            return "account_exists", 0
        self.opened[account], self.kinds[account] = now, said.get("kind", "user")
        if "referral_code" in said and self.why_not(terms, account, said["referral_code"], now) is None:
            return None, self.claim(terms, account, said["referral_code"])
        return None, 0

    def why_not(self, terms: dict[str, Any], account: str, code: str, now: datetime) -> str | None:
        owner = self.codes.get(code)
        if self.kinds[account] != "user":
            return "invalid"
        if owner is None:
            return "code_unknown"
        if code in self.shut:
            return "code_expired"
        if terms["claim_days"] is not None and now - self.opened[account] >= timedelta(days=terms["claim_days"]):
            return "code_expired"
        if owner == account or (account, owner) in self.rewarded:
            return "self_referral"
        return "already_referred" if account in self.claimed else None

    def claim(self, terms: dict[str, Any], account: str, code: str) -> int:
        self.claimed[account] = self.codes[code]
        return self.settle(terms, account) if terms["trigger"] == "sign_up" else 0

    def settle(self, terms: dict[str, Any], account: str) -> int:
        self.settled.add(account)
        return int(terms["referee"])

    def _reward(
        self, terms: dict[str, Any], account: str, referee: str, code: str, now: datetime
    ) -> tuple[str | None, int]:
        if self.own.get(account) != code:
            return "code_unknown", 0
        if self.claimed.get(account) == referee:
            return "self_referral", 0
        times = [at for (referrer, _), at in self.rewarded.items() if referrer == account]
        if terms["per_referrer"] is not None and len(times) >= terms["per_referrer"]:
            return "limit_reached", 0
        today = [at for at in times if at.date() == now.date()]
        if terms["per_day"] is not None and len(today) >= terms["per_day"]:
            return "daily_limit", 0
        self.rewarded[account, referee] = now
        return None, int(terms["referrer"])


class World:
    """Some accounts, the codes between them, and what is on its way."""

    def __init__(self) -> None:
        self.now = START
        self.terms = "at_once"
        self.codes: dict[str, SharedCode] = {}
        self.accounts = {name: self.account(name) for name in NAMES}
        self.auditors = {name: Auditor() for name in NAMES}
        self.reports = {name: Report() for name in NAMES}
        self.replays = {
            name: Replay(
                self.reports[name],
                Totals(name, 0, 0, b"", 0, 0, (0,) * len(COUNTERS), START, None, ()),
                {catalog.label: catalog for catalog in CATALOGS.values()},
                None,
            )
            for name in NAMES
        }
        self.opinion = Opinion()
        self.heap: list[Letter] = []
        self.delivered: list[Letter] = []
        self.script: list[str] = []
        self.numbers = 0

    def account(self, name: str) -> Account:
        made = Account(name)
        made.codes = self.codes
        return made

    def do(self, name: str, account: str, operation: str | None = None, /, **content: Any) -> dict[str, Any]:
        """Apply one operation, and hold it against the second opinion and the replay."""
        self.numbers += 1
        operation = operation or f"operation-{self.numbers}"
        said = {"account": account, **{key: value for key, value in content.items() if value is not None}}
        self.script.append(f"  {self.now:%d %H}  {self.terms}  {operation}  {name}  {said}")
        try:
            return self._do(name, account, operation, said)
        except Exception as error:
            raise AssertionError("\n".join([*self.script, f"{type(error).__name__}: {error}"])) from error

    def _do(self, name: str, account: str, operation: str, said: dict[str, Any]) -> dict[str, Any]:
        raw = encode(said)
        message = decode_message(name, raw)
        check_reserved(name, operation, message)
        state = self.accounts[account]
        before = state.granted
        entries = len(state.entries)
        answer = apply(state, name, operation, message, raw, self.now, CATALOGS[self.terms])
        result: dict[str, Any] = json.loads(answer.result)
        code, bonus = self.opinion.say(TERMS[self.terms], name, account, operation, said, self.now)
        assert (answer.status == "rejected", result.get("code")) == (code is not None, code)
        self.auditors[account].check(state)
        self.heap += [(each.name, each.operation, each.arguments) for each in answer.follow]
        if answer.row is None:
            assert not answer.follow
            return result
        others = int(said.get("amount", 0)) if name == "credits.grant" and code is None else 0
        assert state.granted - before == (bonus + others) * MICRO
        assert result.get("bonus", "0") == str(bonus)
        row = answer.row
        self.replays[account].feed(
            (account, row.number, row.operation, row.name, row.status, row.code, row.charged_micro, row.feature,
             row.quantity_micro, row.member, row.first_seq, row.entries, row.arguments.decode(), row.result.decode(),
             row.occurred_at, row.applied_at, row.catalog),
            [(account, *entry) for entry in state.entries[entries:]],
        )  # fmt: skip
        assert self.reports[account].faults == []
        self.check()
        return result

    def check(self) -> None:
        """What must hold whatever was done."""
        opinion = self.opinion
        for name, state in self.accounts.items():
            referral, replayed = state.referral, self.replays[name].account
            own = referral_row(referral) if referral is not None else None
            assert own == (referral_row(replayed.referral) if replayed.referral is not None else None)
            assert {key: allowance_row(each) for key, each in state.allowances.items()} == {
                key: allowance_row(each) for key, each in replayed.allowances.items()
            }
            if referral is None:
                continue
            assert referral.code == opinion.own.get(name)
            assert referral.referrer == opinion.claimed.get(name)
            assert (referral.settled_at is not None) == (name in opinion.settled)
            assert referral.referees == sum(referrer == name for referrer, _ in opinion.rewarded)
            bonuses = sum(lot.source == "referral" for lot in state.grants.values())
            assert bonuses <= (name in opinion.settled) + referral.referees
        for referrer, referee in opinion.rewarded:
            assert opinion.claimed[referee] == referrer
            assert (referee, referrer) not in opinion.rewarded, "two are rewarded for each other"

    def deliver(self, place: int, keep: bool = False) -> dict[str, Any]:
        """Take a letter from the heap, or leave it there to come again."""
        letter = self.heap[place] if keep else self.heap.pop(place)
        self.delivered.append(letter)
        return self.hand_over(letter)

    def hand_over(self, letter: Letter) -> dict[str, Any]:
        name, operation, content = letter
        return self.do(
            name, content["account"], operation, **{key: value for key, value in content.items() if key != "account"}
        )

    def quiet(self) -> None:
        """Deliver until nothing is on its way any more: then each claim that was settled was answered, once."""
        while self.heap:
            self.deliver(0)
        for name in self.opinion.settled:
            referrer = self.opinion.claimed[name]
            assert rewarding_id(referrer, name) in self.accounts[referrer].known


names = st.sampled_from(NAMES)
codes = st.sampled_from([*CODES.values(), *[CODES["anna"]] * 4, "NOBODYS"])


class Referrals(RuleBasedStateMachine):
    """Operations of several accounts, and deliveries in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(terms=st.sampled_from(list(TERMS)))
    def begin(self, terms: str) -> None:
        self.world.terms = terms
        for name in NAMES[:5]:
            self.world.do("credits.open", name)
            self.world.do("referrals.issue", name, code=CODES[name])

    @rule(
        account=names,
        code=st.one_of(st.none(), codes),
        kind=st.sampled_from(["user", "user", "user", "user", "pool", "lead"]),
    )
    def open(self, account: str, code: str | None, kind: str) -> None:
        result = self.world.do("credits.open", account, kind=None if kind == "user" else kind, referral_code=code)
        if result["status"] == "applied" and code is not None:
            claimed = self.world.opinion.claimed.get(account)
            assert (result["referral"] == "claimed") is (claimed is not None)

    @rule(account=names, other=st.sampled_from([None, None, None, *CODES.values()]))
    def issue(self, account: str, other: str | None) -> None:
        result = self.world.do("referrals.issue", account, code=other or CODES[account])
        if result["status"] == "applied":
            assert result["referral_code"] == self.world.opinion.own[account]

    @rule(account=names, code=codes)
    def claim(self, account: str, code: str) -> None:
        self.world.do("referrals.claim", account, code=code)

    @rule(account=names, code=codes)
    def claim_again(self, account: str, code: str) -> None:
        self.world.do("referrals.claim", account, code=code)

    @rule(account=names, free=st.booleans())
    def buy(self, account: str, free: bool) -> None:
        price = {"minor": 0, "currency": "EUR"} if free else None
        purchase = f"purchase-{self.world.numbers}"
        self.world.do("credits.grant", account, amount=4, source="pack", purchase=purchase, unit_price=price)

    @precondition(lambda self: self.world.heap)
    @rule(data=st.data(), keep=st.sampled_from([False, False, True]))
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        self.world.deliver(data.draw(st.integers(0, len(self.world.heap) - 1)), keep)

    @precondition(lambda self: self.world.delivered)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        assert self.world.hand_over(data.draw(st.sampled_from(self.world.delivered)))["replayed"]

    @rule(terms=st.sampled_from(list(TERMS)))
    def another_catalog(self, terms: str) -> None:
        self.world.terms = terms

    @rule(hours=st.sampled_from([1, 6, 24]))
    def time_passes(self, hours: int) -> None:
        self.world.now += timedelta(hours=hours)

    @rule(what=st.sampled_from(["freeze", "close", "shut", *["nothing"] * 4]), account=names)
    def by_hand(self, what: str, account: str) -> None:
        world, opinion = self.world, self.world.opinion
        world.script.append(f"  {what} {account}")
        if what == "shut" and account in opinion.own:
            opinion.shut.add(opinion.own[account])
            world.codes[opinion.own[account]].status = "closed"
        elif what in ("freeze", "close") and account in opinion.opened:
            (opinion.frozen if what == "freeze" else opinion.closed).add(account)
            for state in (world.accounts[account], world.replays[account].account):
                state.status = CLOSED if account in opinion.closed else FROZEN

    def teardown(self) -> None:
        self.world.quiet()


Referrals.TestCase.settings = STEPS
TestReferrals = pytest.mark.timeout(1800 if THOROUGH else 240)(Referrals.TestCase)


# One thing at a time.


def world(terms: str, *opened: str) -> World:
    """Accounts that are open and have their codes; all of them unless named."""
    made = World()
    made.terms = terms
    for name in opened or NAMES:
        made.do("credits.open", name)
        made.do("referrals.issue", name, code=CODES[name])
    return made


@pytest.mark.parametrize("first", ["anna", "bert"])
def test_two_that_claim_each_other_at_once_are_not_rewarded_for_it(first: str) -> None:
    made = world("at_once")
    for referee, referrer in (("anna", "bert"), ("bert", "anna")):
        assert made.do("referrals.claim", referee, code=CODES[referrer])["bonus"] == "3"
    letters = sorted(made.heap, key=lambda letter: letter[2]["account"] != first)
    assert [made.hand_over(letter)["code"] for letter in letters] == ["self_referral"] * 2


def test_who_was_rewarded_for_another_is_not_referred_by_it() -> None:
    made = world("bought")
    made.do("referrals.claim", "anna", code=CODES["bert"])
    made.do("credits.grant", "anna", amount=4, source="pack", purchase="p-1")
    assert made.deliver(0)["bonus"] == "7"
    assert made.do("referrals.claim", "bert", code=CODES["anna"])["code"] == "self_referral"
    made.do("referrals.claim", "bert", code=CODES["carl"])


def test_rewards_have_limits_by_the_day_and_in_all() -> None:
    made = world("at_once")
    for referee in NAMES[1:]:
        assert made.do("referrals.claim", referee, code=CODES["anna"])["bonus"] == "3"
    assert made.deliver(0)["bonus"] == "5"
    assert made.deliver(0)["code"] == "daily_limit"
    made.now += timedelta(hours=12)  # midnight
    assert made.deliver(0)["bonus"] == "5"
    made.terms = "bought"
    assert made.deliver(0)["code"] == "limit_reached"
    made.terms = "nothing"
    made.now += timedelta(days=1)
    assert made.deliver(0)["status"] == "applied"
    assert made.accounts["anna"].referral is not None
    assert made.accounts["anna"].referral.referees == 3
    assert made.do("referrals.reward", "anna", rewarding_id("anna", "carl"), referee="carl", code="ANNA1")["replayed"]


@pytest.mark.parametrize(("hours", "code"), [(47, None), (48, "code_expired")])
def test_a_code_is_claimed_within_days_of_the_opening(hours: int, code: str | None) -> None:
    made = world("bought")
    made.now += timedelta(hours=hours)
    assert made.do("referrals.claim", "anna", code=CODES["bert"]).get("code") == code
    made.do("referrals.claim", "anna", code=CODES["anna"])


@pytest.mark.parametrize(("before", "after", "bonus"), [("at_once", "bought", None), ("bought", "at_once", "3")])
def test_a_change_of_the_trigger_neither_doubles_nor_loses_a_bonus(before: str, after: str, bonus: str | None) -> None:
    made = world(before)
    claimed = made.do("referrals.claim", "anna", code=CODES["bert"])
    assert claimed.get("bonus") == (None if bonus else "3")
    made.terms = after
    for purchase in ("p-1", "p-2"):
        bought = made.do("credits.grant", "anna", amount=4, source="pack", purchase=purchase)
        assert bought.get("bonus") == bonus
        bonus = None
    assert len(made.heap) == 1


def test_only_the_ledger_rewards() -> None:
    made = world("at_once")
    state = made.accounts["anna"]
    said = {"account": "anna", "referee": "bert", "code": CODES["anna"]}
    message = decode_message("referrals.reward", encode(said))
    with pytest.raises(ContractError):
        check_reserved("referrals.reward", "mine", message)
    answer = apply(state, "referrals.reward", "mine", message, encode(said), made.now, CATALOGS["at_once"])
    assert json.loads(answer.result)["code"] == "invalid"
    assert state.available == 0
