"""Gift codes by the rules alone: what is refused, in which order, and what a day's limits are."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from creditlane.contract import decode_message
from creditlane.gift_codes import ALPHABET, LENGTH, new_code, shown
from models.catalog import parse_catalog
from models.rules.sharing import EndToEnd, SharedCode, told_by
from models.rules.state import CLOSED, FROZEN, Account
from tasks.ledger import apply

CATALOG = parse_catalog(
    """
[catalog]
name = "codes"
currency = "EUR"
zone = "Europe/Paris"

[gifts]
credits_per_day = 20
gifts_per_day = 6
redeems_per_day = 2
code_days = 30
""",
    "codes.toml",
)
START = datetime(2027, 3, 1, 12, tzinfo=UTC)


class Accounts:
    """Accounts that share codes, at one instant."""

    def __init__(self) -> None:
        self.codes: dict[str, SharedCode] = {}
        self.accounts: dict[str, Account] = {}
        self.now = START
        self.number = 0

    def do(self, name: str, account: str, **content: Any) -> dict[str, Any]:
        """Apply an operation; gives its result."""
        if account not in self.accounts:
            made = self.accounts[account] = Account(account)
            made.codes = self.codes
            self.do("credits.open", account, kind="pool")
            self.do("credits.grant", account, amount=100, source="pack")
        self.number += 1
        raw = json.dumps({"account": account, **content}).encode()
        answer = apply(
            self.accounts[account], name, str(self.number), decode_message(name, raw), raw, self.now, CATALOG
        )
        result: dict[str, Any] = json.loads(answer.result)
        return result

    def issue(self, account: str, *codes: str, **content: Any) -> str:
        """Issue codes of one credit; gives the refusal's code, or the status."""
        result = self.do("codes.issue", account, codes=codes, **{"amount": 1, **content})
        return str(result.get("code", result["status"]))

    def redeem(self, account: str, code: str) -> str:
        """Likewise."""
        result = self.do("codes.redeem", account, code=code)
        return str(result.get("code", result["status"]))


def test_what_is_given_away_in_a_day_has_limits_that_splitting_does_not_get_around() -> None:
    world = Accounts()
    assert world.issue("anna", "AAAA", amount="20.000001") == "daily_limit"
    assert world.issue("anna", "AAAA", amount=3, uses=7) == "daily_limit"  # each use is a gift
    assert world.issue("anna", *(f"CODE{number}" for number in range(7))) == "daily_limit"
    assert world.issue("anna", "AAAA", uses=5) == "applied"
    assert world.issue("anna", "BBBB", uses=2) == "daily_limit"
    assert world.issue("anna", "BBBB", amount=16) == "daily_limit"
    assert world.issue("anna", "BBBB", amount=15) == "applied"
    assert world.issue("anna", "CCCC", amount=1) == "daily_limit"
    assert world.issue("anna", "CCCC", amount=500, uses=9, actor="boss", reason="party") == "applied"
    assert world.do("codes.withdraw", "anna", codes=["AAAA"])["status"] == "applied"
    assert world.issue("anna", "DDDD") == "daily_limit"  # what comes back was given all the same
    world.now = datetime(2027, 3, 1, 22, 59, 59, tzinfo=UTC)
    assert world.issue("anna", "DDDD") == "daily_limit"
    world.now = datetime(2027, 3, 1, 23, tzinfo=UTC)  # midnight in Paris
    assert world.issue("anna", "DDDD") == "applied"


def test_a_day_has_so_many_redemptions_and_refusals_do_not_count() -> None:
    world = Accounts()
    for number in range(4):
        assert world.issue("anna", f"CODE{number}", uses=1) == "applied"
    assert world.redeem("bert", "NONE") == "code_unknown"
    assert world.redeem("bert", "CODE0") == "applied"
    assert world.redeem("bert", "CODE0") == "code_used"
    assert world.redeem("bert", "CODE1") == "applied"
    assert world.redeem("bert", "CODE2") == "daily_limit"
    assert world.redeem("bert", "CODE0") == "code_used"  # said before the day's limit
    world.now += timedelta(days=1)
    assert world.redeem("bert", "CODE2") == "applied"
    world.now += timedelta(days=30)
    assert world.redeem("bert", "CODE3") == "code_expired"


def test_refusals_come_in_the_order_of_the_list() -> None:
    world = Accounts()
    assert world.issue("anna", "AAAA") == "applied"
    world.do("credits.grant", "dora", amount=1, source="pack")
    world.accounts["dora"].status = FROZEN
    assert world.issue("dora", "AAAA", amount=1000, expires_at="2020-01-01T00:00:00Z") == "account_frozen"
    world.accounts["dora"].status = "open"
    assert world.issue("dora", "AAAA", amount=1000, expires_at="2020-01-01T00:00:00Z") == "invalid"
    assert world.issue("dora", "AAAA", amount=1000) == "code_exists"
    assert world.issue("dora", "BBBB", amount=1000) == "daily_limit"
    world.do("credits.consume", "dora", amount=99)
    world.do("credits.grant", "dora", amount=5, source="promotion")
    assert world.issue("dora", "BBBB", amount=10) == "insufficient_credits"
    assert world.issue("dora", "BBBB", amount=7) == "not_transferable"
    assert world.issue("dora", "BBBB", amount=2) == "applied"
    world.accounts["dora"].status = CLOSED
    assert world.issue("dora", "CCCC", actor="boss", reason="party") == "account_closed"
    assert world.do("codes.withdraw", "dora", codes=["BBBB"])["charged"] == "-2"  # what it began ends all the same


def test_an_administrators_code_gives_credits_that_go_no_further() -> None:
    world = Accounts()
    given = {"actor": "boss", "reason": "campaign"}
    assert world.issue("shop", "AAAA", uses=2, credits_expire_in=60, message="enjoy", **given) == "applied"
    assert world.accounts["shop"].in_transit == 0
    world.do("credits.consume", "bert", amount=100)
    redeemed = world.do("codes.redeem", "bert", code="AAAA")
    assert (redeemed["message"], "sender" in redeemed) == ("enjoy", False)
    (lot,) = (each for each in world.accounts["bert"].grants.values() if each.source == "promotion")
    assert (lot.granted, lot.expires_at) == (1_000_000, START + timedelta(seconds=60))
    assert world.issue("bert", "BBBB") == "not_transferable"
    assert world.do("credits.transfer", "bert", to="dora", amount=1)["code"] == "not_transferable"
    assert world.do("codes.withdraw", "shop", codes=["AAAA"])["code"] == "invalid"
    assert world.do("codes.withdraw", "shop", codes=["AAAA", "NONE"], **given)["code"] == "code_unknown"
    assert world.do("codes.withdraw", "bert", codes=["AAAA"], **given)["code"] == "code_unknown"
    assert world.do("codes.withdraw", "shop", codes=["AAAA"], **given)["status"] == "applied"


def test_what_an_answer_says_of_codes_is_enough_to_give_it_again() -> None:
    world = Accounts()
    assert world.issue("anna", "AAAA", amount="0.5", uses=3, message="for you") == "applied"
    world.redeem("bert", "AAAA")
    result = world.do("codes.redeem", "dora", code="AAAA")
    (told,) = told_by(json.dumps(result)).values()
    assert told.uses == 1
    assert [int(lot.amount) for lot in told.lots_of(1)] == [500_000]
    assert [int(lot.amount) for lot in world.codes["AAAA"].lots_of(1)] == [500_000]
    refused = world.do("codes.issue", "bert", codes=["BBBB", "AAAA"], amount=1)
    assert list(told_by(json.dumps(refused))) == ["AAAA"]
    assert "anna" not in json.dumps(refused)  # whose the code is, is none of his business


@pytest.mark.parametrize(
    ("start", "end", "cut"),
    [(0, 6, [("a", 2), ("b", 3), ("c", 1)]), (2, 5, [("b", 3)]), (1, 3, [("a", 1), ("b", 1)]), (4, 4, [])],
)
def test_a_stretch_is_cut_out_of_lots_laid_end_to_end(start: int, end: int, cut: list[tuple[str, int]]) -> None:
    laid = EndToEnd([("a", 2), ("b", 3), ("c", 1)])
    assert laid.cut(start, end) == cut
    with pytest.raises(IndexError):
        laid.cut(start, 7)


def test_new_codes_are_of_letters_that_nobody_mistakes_and_differ() -> None:
    made = {new_code() for _ in range(1000)}
    assert len(made) == 1000
    assert {len(code) for code in made} == {LENGTH}
    assert set("".join(made)) == set(ALPHABET)
    assert shown("0123456789ABCDEF") == "0123-4567-89AB-CDEF"
