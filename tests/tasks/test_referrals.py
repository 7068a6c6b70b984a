"""Referrals by the sentence: codes, claims, which purchase a bonus waits for, and what it is like."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from creditlane.codes import Code
from creditlane.contract import rewarding_id
from models.catalog import parse_catalog
from models.rules.sharing import GIFT, REFERRAL, SharedCode, Terms
from models.rules.state import MAX_OPEN_GRANTS
from tests.tasks.test_operations import Lane, refused
from tests.tasks.test_plans import NEW_YEAR, Member

TEXT = """
[catalog]
name = "refer"
[signup]
credits = "6"
[priorities]
referral = 7
[plans.free]
monthly_credits = "20"
[plans.pro]
monthly_credits = "100"
price = "10 EUR"
[plans.yearly]
monthly_credits = "100"
price = "100 EUR"
interval = "year"
[referrals]
trigger = "purchase"
referrer = "5"
referee = "3"
expires_days = 30
[notify]
kinds = ["referral_bonus", "pack_bought"]
"""
BOUGHT = parse_catalog(TEXT, "refer.toml")
AT_ONCE = parse_catalog(TEXT.replace('"purchase"', '"sign_up"'), "refer.toml")
PLAIN = parse_catalog('[catalog]\nname = "plain"\n', "plain.toml")


def issued(lane: Any, code: str, owner: str, kind: str = REFERRAL) -> SharedCode:
    """A code of somebody else's."""
    made = SharedCode(Terms(code=code, kind=kind, account=owner, operation="o"))
    lane.account.codes[code] = made
    return made


def claimed(catalog: Any = BOUGHT) -> Member:
    """A user that was referred by bob."""
    made = Member(catalog, now=NEW_YEAR)
    issued(made, "BOBS", "bob")
    assert made("open", referral_code="BOBS")["referral"] == "claimed"
    return made


def has_bonus(result: dict[str, Any]) -> bool:
    assert result["status"] == "applied"
    return "bonus" in result


def test_a_bonus_is_a_lot_of_its_source_that_ends_and_that_the_account_is_told_of() -> None:
    made = claimed(AT_ONCE)
    lot = made.account.grants[2]
    assert (lot.source, lot.priority, lot.available) == ("referral", 7, 3_000_000)
    assert lot.expires_at == NEW_YEAR + timedelta(days=30)
    (told,) = made.account.notices
    assert (told.kind, told.details) == ("referral_bonus", {"amount": "3", "referrer": "bob"})
    assert refused(made("transfer", to="eve", amount=9), Code.NOT_TRANSFERABLE)


def test_a_bonus_pays_what_is_owed() -> None:
    made = Lane(AT_ONCE)
    made("open")
    made("grant", amount=4, source="pack", purchase="p")
    made("consume", amount=10)
    made("revoke", purchase="p")
    assert made.account.debt == 4_000_000
    issued(made, "BOBS", "bob")
    assert made("referrals.claim", code="BOBS")["bonus"] == "3"
    assert (made.account.debt, made.account.available) == (1_000_000, 0)


@pytest.mark.parametrize(
    ("name", "content", "pays"),
    [
        ("credits.grant", {"amount": 1, "source": "pack", "purchase": "p"}, True),
        ("credits.grant", {"amount": 1, "source": "pack"}, False),
        ("credits.grant", {"amount": 1, "source": "pack", "purchase": "p",
                           "unit_price": {"minor": 0, "currency": "EUR"}}, False),
        ("credits.grant", {"amount": 1, "source": "pack", "purchase": "p",
                           "unit_price": {"minor": 1, "currency": "EUR"}}, True),
        ("plans.subscribe", {"plan": "pro", "payment": "in_1"}, True),
        ("plans.subscribe", {"plan": "pro"}, False),
        ("plans.subscribe", {"plan": "pro", "payment": "in_1", "unit_price": {"minor": 0, "currency": "EUR"}}, False),
        ("plans.renew", {"plan": "pro", "payment": "in_1", "period_start": NEW_YEAR.isoformat()}, True),
        ("credits.adjust", {"amount": 1, "actor": "ann", "reason": "kind"}, False),
    ],
)  # fmt: skip
def test_which_operations_are_a_purchase(name: str, content: dict[str, Any], pays: bool) -> None:
    made = claimed()
    result = made(name, **content)
    assert has_bonus(result) is pays
    assert (made.account.referral.settled_at is not None) is pays  # type: ignore[union-attr]
    if pays:
        assert result["referrer"] == "bob"
        assert "referral_bonus" in [notice.kind for notice in made.account.notices]
    # The next one is the first to pay, or no longer.
    assert has_bonus(made("grant", amount=1, source="pack", purchase="later")) is not pays


def test_changing_to_a_plan_that_is_paid_for_is_a_purchase_and_a_payment_told_again_is_none() -> None:
    made = claimed()
    made("plans.subscribe", plan="free")
    assert has_bonus(made("plans.change", plan="pro", payment="in_1"))
    other = Member(BOUGHT, now=NEW_YEAR)
    issued(other, "BOBS", "bob")
    other("open")
    other("plans.subscribe", plan="pro", payment="in_1")
    other("referrals.claim", code="BOBS")
    other("plans.cancel")
    assert not has_bonus(other("plans.subscribe", plan="pro", payment="in_1"))
    assert has_bonus(other.pay(2, 1, payment="in_2"))


def test_what_is_refused_gives_no_bonus() -> None:
    made = claimed()
    made("plans.subscribe", plan="pro")
    assert refused(made("plans.subscribe", plan="yearly", payment="in_1"), Code.ALREADY_SUBSCRIBED)
    assert made.account.referral is not None
    assert made.account.referral.settled_at is None


def test_who_cannot_take_the_bonus_gets_it_with_a_later_purchase() -> None:
    made = claimed()
    for _ in range(MAX_OPEN_GRANTS - 2):
        made("grant", amount=1, source="pack")
    assert not has_bonus(made("grant", amount=1, source="pack", purchase="p-1"))
    made("consume", amount=8)
    assert has_bonus(made("grant", amount=1, source="pack", purchase="p-2"))
    full = Lane(AT_ONCE)
    full("open", welcome=False)
    for _ in range(MAX_OPEN_GRANTS):
        full("grant", amount=1, source="pack")
    issued(full, "BOBS", "bob")
    assert refused(full("referrals.claim", code="BOBS"), Code.LIMIT_REACHED)
    full("consume", amount=1)
    assert has_bonus(full("referrals.claim", code="BOBS"))
    full("referrals.issue", code="MINE")
    reward = rewarding_id("user_42", "eve")
    assert refused(full("referrals.reward", reward, referee="eve", code="MINE"), Code.LIMIT_REACHED)


@pytest.mark.parametrize("catalog", [BOUGHT, AT_ONCE, PLAIN])
def test_an_account_is_opened_whatever_its_code(catalog: Any) -> None:
    for kind, code, said in (
        ("user", "GIFT", "code_unknown"), ("user", "NONE", "code_unknown"), ("user", "SHUT", "code_expired"),
        ("user", "BOBS", "claimed"), ("pool", "BOBS", "invalid"), ("lead", "BOBS", "invalid"),
    ):  # fmt: skip
        made = Lane(catalog)
        issued(made, "BOBS", "bob")
        issued(made, "GIFT", "bob", GIFT)
        issued(made, "SHUT", "bob").status = "closed"
        opened = made("open", kind=kind, referral_code=code, plan="free" if catalog is BOUGHT else None)
        assert (opened["status"], opened["referral"]) == ("applied", said)
        assert ("code_row" in opened) is (said != "code_unknown")
        assert (opened.get("plan") == "free") is (catalog is BOUGHT)
        assert has_bonus(opened) is (catalog is AT_ONCE and said == "claimed")


def test_an_account_has_one_code_for_ever_and_a_text_has_one_owner() -> None:
    made = Lane(BOUGHT)
    made("open", kind="pool")
    issued(made, "GIFT", "bob", GIFT)
    assert refused(made("referrals.issue", code="GIFT"), Code.CODE_EXISTS)
    assert made.account.referral is None
    for code in ("MINE", "MINE", "OTHER", "GIFT"):
        assert made("referrals.issue", code=code)["referral_code"] == "MINE"
    assert set(made.account.codes) == {"GIFT", "MINE"}
    lead = Lane(BOUGHT)
    lead("open", kind="lead")
    assert refused(lead("referrals.issue", code="LEADS"), Code.INVALID)


def test_a_referee_is_counted_where_the_catalog_gives_nothing() -> None:
    made = Lane(PLAIN)
    made("open")
    made("referrals.issue", code="MINE")
    rewarded = made("referrals.reward", rewarding_id("user_42", "eve"), referee="eve", code="MINE")
    assert (rewarded["referee"], has_bonus(rewarded), "grants" in rewarded) == ("eve", False, False)
    assert made.account.referral is not None
    assert made.account.referral.referees == 1
    assert list(made.account.allowances) == ["referee:eve"]
    stranger = rewarding_id("user_42", "dan")
    assert refused(made("referrals.reward", stranger, referee="dan", code="THEIRS"), Code.CODE_UNKNOWN)


def test_days_are_counted_from_midnight_in_the_catalogs_zone() -> None:
    catalog = parse_catalog(
        '[catalog]\nname = "z"\nzone = "Europe/Paris"\n[referrals]\nreferrer = 1\nper_day = 1\n', "z.toml"
    )
    made = Lane(catalog, now=datetime.fromisoformat("2026-03-01T22:59:59Z"))
    made("open")
    made("referrals.issue", code="MINE")
    codes = []
    for number in range(3):
        referee = f"referee-{number}"
        codes.append(
            made("referrals.reward", rewarding_id("user_42", referee), referee=referee, code="MINE").get("code")
        )
        made.wait(seconds=0.5)
    assert codes == [None, "daily_limit", None]
