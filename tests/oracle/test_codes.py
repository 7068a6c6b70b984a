"""Gift codes among several accounts against the second ledger: issued, redeemed, concluded, withdrawn in any order."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from models.rules.sharing import SharedCode
from models.rules.state import CLOSED
from tests.oracle.model import Row
from tests.oracle.test_against_rules import COMMON, PRICES, THOROUGH, Both
from tests.oracle.test_transfers import NAMES, World, amounts, names

STEPS = settings(COMMON, max_examples=3000 if THOROUGH else 200, stateful_step_count=50)

CODES = ("AAAA", "BBBB", "CCCC", "DDDD", "EEEE", "FFFF")

codes = st.sampled_from(CODES)


class CodeWorld(World):
    """Accounts that share codes, in the rules and in the second ledger."""

    def __init__(self) -> None:
        super().__init__("debt")
        self.codes: dict[str, SharedCode] = {}
        booklets: dict[str, Row] = {}
        for both in self.accounts.values():
            both.account.codes, both.ledger.codes = self.codes, booklets
        self.booklets: Mapping[str, Row] = booklets

    def check(self) -> None:
        super().check()
        received = 0
        for text, code in self.codes.items():
            booklet = self.booklets[text]
            assert [use.account for _, use in sorted(code.taken.items())] == booklet["users"]
            assert sorted(code.taken) == list(range(code.uses))
            assert (code.status == "closed") is booklet["closed"]
            assert code.uses <= (code.terms.uses or 0)
            assert (code.terms.expires_at, code.terms.place) == (booklet["end"], booklet["place"])
            if code.terms.is_paid:
                received += code.uses * code.terms.amount
        assert self.total("received") == received


class Codes(RuleBasedStateMachine):
    """Operations of several accounts on a few codes, and what tells of uses in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = CodeWorld()
        for name in NAMES[:-1]:
            self.world.do("credits.open", name, kind="pool")
            for amount, expires_in in ((3, 20), (4, 60), (2, None)):
                self.world.do(
                    "credits.grant", name, amount=amount, source="pack", purchase="purchase-1", expires_in=expires_in
                )

    def both(self, name: str) -> Both:
        return self.world.accounts[name]

    @rule(
        account=names,
        amount=amounts,
        source=st.sampled_from(["pack", "pack", "promotion", "bonus"]),
        features=st.sampled_from([None, None, None, ["image"]]),
        expires_in=st.sampled_from([None, None, 10, 60, 3600]),
        unit_price=st.sampled_from([None, *PRICES]),
    )
    def grant(self, account: str, **content: Any) -> None:
        self.world.do("credits.grant", account, **content)

    @rule(
        account=names,
        texts=st.lists(codes, min_size=1, max_size=3, unique=True),
        amount=st.sampled_from(["0.5", "1", "0.000001", 2, "1.3"]),
        uses=st.sampled_from([None, 1, 2, 3, 5]),
        per_account=st.sampled_from([None, 1, 2]),
        expires_in=st.sampled_from([None, 10, 60]),
        by=st.sampled_from([None, None, None, "admin"]),
        life=st.sampled_from([None, 10, 60]),
        source=st.sampled_from([None, "campaign"]),
    )
    def issue(self, account: str, texts: list[str], by: str | None, life: int | None, source: str | None,
              **content: Any) -> None:  # fmt: skip
        if by is not None:
            content |= {"actor": by, "reason": "a test", "credits_expire_in": life, "source": source}
        self.world.do("codes.issue", account, codes=texts, **content)

    @rule(account=names, code=codes)
    def redeem(self, account: str, code: str) -> None:
        self.world.do("codes.redeem", account, code=code)

    @rule(account=names, code=codes)
    def redeem_another(self, account: str, code: str) -> None:
        self.world.do("codes.redeem", account, code=code)

    @rule(code=codes, by=st.sampled_from([None, "admin"]), data=st.data())
    def withdraw(self, code: str, by: str | None, data: st.DataObject) -> None:
        owner = self.world.codes[code].terms.account if code in self.world.codes else "anna"
        account = data.draw(st.sampled_from([owner, owner, owner, *NAMES]))
        others = [text for text, each in self.world.codes.items() if each.terms.account == account and text != code]
        more = data.draw(st.sampled_from([[], others]))
        content = {} if by is None else {"actor": by, "reason": "a test"}
        self.world.do("codes.withdraw", account, codes=[code, *more], **content)

    @precondition(lambda self: self.world.heap)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        self.world.deliver(data.draw(st.integers(0, len(self.world.heap) - 1)), keep)

    @precondition(lambda self: self.world.delivered)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        assert self.world.hand_over(data.draw(st.sampled_from(self.world.delivered)))["replayed"]

    @rule(account=names, code=codes, place=st.integers(0, 2), slot=st.integers(0, 5), issue=st.integers(0, 30))
    def what_only_the_ledger_sends_under_another_id(
        self, account: str, code: str, place: int, slot: int, issue: int
    ) -> None:
        result = self.world.do("codes.conclude", account, code=code, issue=f"operation-{issue}", place=place,
                               slot=slot, redeemed_by="anna")  # fmt: skip
        assert result["code"] in ("invalid", "unknown_account", "account_closed")

    @rule(seconds=st.sampled_from([1, 10, 20, 60, 3600]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += timedelta(seconds=seconds)

    @rule(account=names, amount=amounts)
    def consume(self, account: str, amount: str | int) -> None:
        self.world.do("credits.consume", account, amount=amount, partial=True)

    @rule(data=st.data(), account=names)
    def refund(self, data: st.DataObject, account: str) -> None:
        sent = [
            operation for name, operation, _ in self.both(account).sent if name in ("codes.issue", "credits.consume")
        ]
        self.world.do("credits.refund", account, operation=data.draw(st.sampled_from(sent or ["none"])))

    @rule(account=names, amount=st.sampled_from([None, "1"]))
    def revoke(self, account: str, amount: str | None) -> None:
        self.world.do("credits.revoke", account, purchase="purchase-1", amount=amount)

    @rule(kind=st.sampled_from(["open", "close", *["nothing"] * 8]), account=names)
    def open_or_close(self, kind: str, account: str) -> None:
        both = self.both(account)
        if kind == "open":
            self.world.do("credits.open", account)
        elif kind == "close" and both.ledger.opened and len(self.world.script) > 20:
            self.world.script.append(f"  {account} is closed")
            both.account.status, both.ledger.closed = CLOSED, True

    def teardown(self) -> None:
        world = self.world
        world.quiet()
        paid = [code for code in world.codes.values() if code.terms.is_paid]
        left = sum(((code.terms.uses or 0) - code.uses) * code.terms.amount for code in paid if code.status == "open")
        assert world.total("in_transit") == left
        assert world.total("sent") == world.total("received")
        for text, code in world.codes.items():
            if code.status == "open":
                world.do("codes.withdraw", code.terms.account, codes=[text], actor="admin", reason="the end")
        world.check_quiet()


Codes.TestCase.settings = STEPS
TestCodes = pytest.mark.timeout(1800 if THOROUGH else 240)(Codes.TestCase)
