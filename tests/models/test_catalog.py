"""Catalog files: what is read from them, and with what words a wrong one is refused."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.catalog import SECTIONS, SHIPPED, CatalogError, Problem, check_catalog, load_catalog, parse_catalog
from models.catalog_changes import compare, values
from models.catalog_prices import rates
from models.rules.catalog import Money, Sold, SoldGrant

HEAD = '[catalog]\nname = "mine"\n'


def refused(text: str) -> str:
    with pytest.raises(CatalogError) as caught:
        parse_catalog(text, "mine.toml")
    reason = str(caught.value)
    assert reason.startswith("mine.toml: ")
    return reason.removeprefix("mine.toml: ")


SHIPPED_NAMES = sorted(file.stem for file in SHIPPED.glob("*.toml"))


def test_catalogs_are_shipped() -> None:
    assert SHIPPED_NAMES == ["dual", "metering", "packs", "registration", "rollover", "tiers"]


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_each_shipped_catalog_loads_and_is_called_as_its_file(name: str) -> None:
    catalog = load_catalog(name)
    assert catalog.catalog.name == name
    assert catalog.label == f"{name}-{catalog.catalog.version}"
    assert load_catalog(str(SHIPPED / f"{name}.toml")) == catalog


def test_packs_has_the_prices_of_the_business_that_it_is_for() -> None:
    catalog = load_catalog("packs")
    assert catalog.signup.credits == 50_000_000
    assert (catalog.features["image"].price, catalog.features["image"].per) == (1_000_000, 8_000_000)
    assert catalog.features["image"].rounding == "exact"
    prices = {name: int(feature.price) for name, feature in catalog.features.items()}
    assert prices == {
        "image": 1_000_000,
        "regeneration": 200_000,
        "context": 1_000_000,
        "save_collection": 10_000_000,
        "export": 0,
    }
    packs = {
        int(pack.credits) // 1_000_000: Money.parse(pack.price)
        for pack in catalog.packs.values()
        if pack.price is not None
    }
    assert packs == {25: Money(499, "EUR"), 85: Money(1499, "EUR"), 250: Money(3999, "EUR")}
    assert catalog.priority_of("signup") < catalog.priority_of("pack") < catalog.priority_of("unnamed")


def test_tiers_has_the_prices_of_the_business_that_it_is_for() -> None:
    catalog = load_catalog("tiers")
    assert (catalog.signup.credits, catalog.lead.credits) == (0, 20_000_000)
    assert {name for name, feature in catalog.features.items() if not feature.price} == {"chat_basic", "export"}
    for name, feature in catalog.features.items():  # what is named as cheaper is
        for other in feature.alternatives:
            its = catalog.features[other]
            assert its.price * feature.per < feature.price * its.per, name
    plus = catalog.terms_of("plus")
    assert plus is not None
    assert (plus.monthly_micro, plus.cap_micro, plus.caps_balance) == (500_000_000, 250_000_000, False)
    assert (plus.mode, plus.rollover_months, plus.paid) == ("rollover", 3, True)
    assert {name for name, plan in catalog.plans.items() if plan.price is None} == {"free"}
    assert [catalog.notify.thresholds(500_000_000)] == [[25_000_000, 50_000_000, 100_000_000]]
    by_credit = {rate.name: rate.per_credit for rate in rates(catalog)}
    assert by_credit["large"] < by_credit["creator_kit"] < by_credit["medium"] < by_credit["small"]
    assert by_credit["pro_yearly"] < by_credit["pro"] < by_credit["plus"]
    assert set(catalog.offers_at(datetime(2026, 11, 25, tzinfo=UTC))) == {"first_pack", "black_week"}
    assert (catalog.gifts.credits_per_day, catalog.pools.members) == (1_000_000_000, "listed")
    assert (catalog.referrals.referrer, catalog.referrals.referee) == (50_000_000, 25_000_000)
    assert len(catalog.achievements) == 3


def test_a_catalog_of_a_name_and_nothing_else_has_the_documented_defaults() -> None:
    catalog = parse_catalog(HEAD, "mine.toml")
    assert catalog.signup.credits == catalog.lead.credits == 0
    assert catalog.clawback.on_spent == "debt"
    assert catalog.refunds.refund_days == 30
    assert catalog.priority_of("anything") == 100
    assert catalog.label == "mine-1"


def test_credits_that_nobody_paid_for_stay_where_they_are_unless_the_catalog_says_otherwise() -> None:
    plain = parse_catalog(HEAD + '[signup]\nsource = "hello"\n[lead]\nsource = "hi"\n', "mine.toml")
    for source in ("hello", "hi", "signup", "lead", "trial", "bonus", "referral", "promotion", "achievement"):
        assert not plain.is_transferable(source), source
    assert plain.is_transferable("pack")
    assert plain.is_transferable("anything")
    said = "[sources.signup]\ntransferable = true\n[sources.pack]\ntransferable = false\n"
    named = parse_catalog(HEAD + said, "mine.toml")
    assert named.is_transferable("signup")
    assert not named.is_transferable("pack")
    tiers = load_catalog("tiers")
    given = {plan.source: plan.price is not None for plan in tiers.plans.values()}
    assert given == {source: tiers.is_transferable(source) for source in given}, "a free plan's are not paid for"


def test_a_file_that_is_not_there_is_named_with_the_shipped_ones() -> None:
    with pytest.raises(CatalogError, match=r"nonesuch\.toml: cannot be read .*metering, packs"):
        load_catalog("nonesuch")


def test_a_catalog_is_loaded_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + '[features."ü"]\nprice = "0.000001"\n', encoding="utf-8")
    assert load_catalog(str(path)).features["ü"].price == 1


def test_a_file_that_is_no_text_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CatalogError, match=r"mine\.toml: cannot be read"):
        load_catalog(str(path))


def test_text_that_is_no_toml_is_refused() -> None:
    assert refused("[catalog").startswith("not TOML")


def test_a_catalog_without_its_own_section_is_refused() -> None:
    assert "`catalog`" in refused("")


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[featurs.image]\nprice = 1\n", "featurs", "unknown section; do you mean features?"),
        ("[signup]\ncredit = 1\n", "signup", "unknown field `credit`"),
        ("[features.image]\nprice = 1\nround = 'up'\n", "features.image", "unknown field `round`"),
        ("[features.image]\nper = 8\n", "features.image", "`price`"),
        ("[features.image]\nprice = 0.2\n", "features.image.price", "float"),
        ("[features.image]\nprice = '0.0000001'\n", "features.image.price", "six decimals"),
        ("[features.image]\nprice = '1e3'\n", "features.image.price", "six decimals"),
        ("[features.image]\nprice = true\n", "features.image.price", "bool"),
        ("[features.image]\nprice = '-1'\n", "features.image", "price must not be negative"),
        ("[features.image]\nprice = 1\nper = 0\n", "features.image", "per must be more than 0"),
        ("[features.image]\nprice = 1\nper = '-8'\n", "features.image", "per must be more than 0"),
        ("[features.image]\nprice = 1\nrounding = 'down'\n", "features.image.rounding", "down"),
        (
            "[features.image]\nprice = 1\nalternatives = ['imgae']\n",
            "features.image.alternatives",
            "no feature 'imgae'",
        ),
        ("[features]\nimage = 1\n", "features.image", "object"),
        ("[packs.small]\ncredits = 25\n", "packs.small", "price"),
        ("[packs.small]\nprice = '4.99 EUR'\n", "packs.small", "credits"),
        ("[packs.small]\ncredits = 0\nprice = '4.99 EUR'\n", "packs.small", "credits"),
        ("[packs.small]\ncredits = 25\nprice = '4.999 EUR'\n", "packs.small", "EUR has 2 decimals"),
        ("[packs.small]\ncredits = 25\nprice = '500.5 JPY'\n", "packs.small", "JPY has 0 decimals"),
        ("[packs.small]\ncredits = 25\nprice = '4,99 EUR'\n", "packs.small", "money is written as"),
        ("[packs.small]\ncredits = 25\nprice = '-4.99 EUR'\n", "packs.small", "money is written as"),
        ("[packs.small]\ncredits = 25\nprice = 4.99\n", "packs.small.price", "float"),
        (
            "[packs.small]\ncredits = 25\nprice = '1 EUR'\nsale = true\n",
            "packs.small",
            "unknown field `sale`",
        ),
        ("[features.'']\nprice = 1\n", "features.", ">= 1"),
        ('[plans."a\\u0000b"]\nmonthly_credits = 1\n', "plans.a\0b", "regex"),
        ('[lead]\nsource = "a\\u0000"\n', "lead.source", "regex"),
        (f"[plans.b]\nmonthly_credits = 1\nsource = '{'x' * 129}'\n", "plans.b.source", "<= 128"),
        ("[signup]\ncredits = '-1'\n", "signup", "credits must not be negative"),
        ("[signup]\ncredits = 1\nexpires_days = 0\n", "signup.expires_days", ">= 1"),
        ("[priorities]\npack = -1\n", "priorities", ">= 0"),
        ("[priorities]\npack = 1001\n", "priorities", "<= 1000"),
        ("[priorities]\npack = 'first'\n", "priorities", "int"),
        ("[sources.pack]\ntransferable = 1\n", "sources", "bool"),
        ("[sources.pack]\ntransferrable = true\n", "sources", "unknown field `transferrable`"),
        ("[sources.pack]\n", "sources", "says transferable or earned"),
        ("[clawback]\non_spent = 'shrug'\n", "clawback.on_spent", "shrug"),
        ("[refunds]\nrefund_days = 0\n", "refunds.refund_days", ">= 1"),
        ("[refunds]\nrefund_days = 3661\n", "refunds.refund_days", "<= 3660"),
        (
            "[packs.small]\ncredits = 25\nprice = '1 EUR'\n[[packs.small.grants]]\ncredits = 1\n",
            "packs.small",
            "credits or grants",
        ),
        ("[packs.small]\ncredits = -1\nquote_above = 5\n", "packs.small", "negative"),
        ("[packs.small]\n[[packs.small.grants]]\ncredits = 1\n", "packs.small", "and a price"),
        (
            "[packs.small]\nprice = '1 EUR'\nexpires_days = 9\n[[packs.small.grants]]\ncredits = 1\n",
            "packs.small",
            "each says its own expires_days",
        ),
        (
            "[packs.small]\nprice = '1 EUR'\n[[packs.small.grants]]\ncredits = 0\n",
            "packs.small.grants[0]",
            "more than 0",
        ),
        (
            "[packs.small]\nprice = '1 EUR'\n[[packs.small.grants]]\ncredits = 1\nfeatures = []\n",
            "packs.small.grants[0].features",
            ">= 1",
        ),
        (
            "[packs.small]\nprice = '1 EUR'\n[[packs.small.grants]]\ncredits = 1\n"
            "[[packs.small.grants]]\ncredits = 1\nfeatures = ['imgae']\n",
            "packs.small.grants[1].features",
            "no feature 'imgae'",
        ),
        ("[packs.small]\nquote_above = 5\nprices = ['p']\n", "packs.small", "prices go with price"),
        ("[packs.small]\nquote_above = 5\nprice = '1 EUR'\n", "packs.small", "from the quote"),
        ("[packs.small]\nquote_above = 5\ncredits = 5\n", "packs.small", "from the quote"),
        ("[packs.small]\ncredits = 5\nprice = '1 EUR'\nprices = ['']\n", "packs.small.prices[0]", ">= 1"),
        ("[packs.small]\ncredits = 5\nprice = '1 EUR'\nprices = ['a b']\n", "packs.small.prices[0]", "regex"),
        ("[packs.small]\ncredits = 5\nprice = '1 EUR'\nsource = ''\n", "packs.small.source", ">= 1"),
        ("[packs.a]\ncredits = 5\nprice = '1 EUR'\nprices = ['p', 'p']\n", "packs.a.prices", "'p' stands in packs.a"),
        (
            "[packs.a]\ncredits = 5\nprice = '1 EUR'\nprices = ['p']\n"
            "[plans.b]\nmonthly_credits = 5\nprice = '1 EUR'\nprices = ['q', 'p']\n",
            "plans.b.prices",
            "'p' stands in packs.a.prices already",
        ),
        (
            "[packs.a]\ncredits = 5\nprice = '1 EUR'\n[plans.b]\nmonthly_credits = 5\nprice = '1 EUR'\nprices = ['q']\n"
            "[offers.c]\npack = 'a'\nprice = '0.5 EUR'\nprices = ['q']\n",
            "offers.c.prices",
            "'q' stands in plans.b.prices already",
        ),
        ("[plans.b]\nmonthly_credits = 5\nprices = ['q']\n", "plans.b", "go with price"),
        ("[plans.b]\nmonthly_credits = 5\ntrial_days = 7\n", "plans.b", "go with price"),
        ("[plans.b]\nmonthly_credits = 5\nprice = '1 EUR'\ntrial_credits = 7\n", "plans.b", "go with trial_days"),
        (
            "[plans.b]\nmonthly_credits = 5\nprice = '1 EUR'\ntrial_days = 7\ntrial_credits = -1\n",
            "plans.b",
            "negative",
        ),
        ("[plans.b]\nmonthly_credits = 5\nprice = '1 EUR'\ntrial_days = 731\n", "plans.b.trial_days", "<= 730"),
        ("[offers.c]\npack = 'a'\nprice = '1 EUR'\n", "offers.c.pack", "no pack 'a' with a price"),
        ("[packs.a]\nquote_above = 5\n[offers.c]\npack = 'a'\nprice = '1 EUR'\n", "offers.c.pack", "with a price"),
        ("[offers.c]\npack = 'a'\n", "offers.c", "`price`"),
        ("[offers.c]\npack = 'a'\nprice = '1'\n", "offers.c", "money is written as"),
        (
            "[packs.a]\ncredits = 5\nprice = '1 EUR'\n[offers.c]\npack = 'a'\nprice = '1 USD'\n",
            "offers.c.price",
            "currency of its pack",
        ),
        ("[offers.c]\npack = 'a'\nprice = '1 EUR'\nper_account = 0\n", "offers.c.per_account", ">= 1"),
        ("[offers.c]\npack = 'a'\nprice = '1 EUR'\nfrom = 2026-11-27T00:00:00\n", "offers.c.from", "timezone"),
        ("[offers.c]\npack = 'a'\nprice = '1 EUR'\nuntil = 2026-11-27\n", "offers.c.until", "date"),
        (
            "[offers.c]\npack = 'a'\nprice = '1 EUR'\nfrom = 2026-11-27T00:00:00Z\nuntil = 2026-11-27T00:00:00Z\n",
            "offers.c",
            "until is not after from",
        ),
        ("[retention]\nnotices_days = 0\n", "retention.notices_days", ">= 1"),
        ("[gifts]\ncredits_per_day = 0\n", "gifts", "more than 0"),
        ("[gifts]\ngifts_per_day = 0\n", "gifts.gifts_per_day", ">= 1"),
        ("[gifts]\nper_day = 1\n", "gifts", "unknown field `per_day`"),
        ("[referrals]\nreferrer = -1\n", "referrals", "negative"),
        ("[referrals]\ntrigger = 'signup'\n", "referrals.trigger", "signup"),
        ("[pools]\nmember_limit = '-1'\n", "pools", "negative"),
        ("[pools]\nperiod = 'year'\n", "pools.period", "year"),
        ("[achievements.Big]\nat = 1\n", "achievements.Big", "regex"),
        ("[achievements.big]\n", "achievements.big", "`at`"),
        ("[achievements.big]\nat = 0\n", "achievements.big", "more than 0"),
        ("[achievements.big]\nat = 1\ncredits = 0.5\n", "achievements.big.credits", "float"),
        ("[plans.b]\nmonthly_credits = 5\nmode = 'rollover'\n", "plans.b", "rollover_cap or balance_cap"),
        ("[plans.b]\nmonthly_credits = 5\nzone = 'Mars'\n", "plans.b.zone", "no such IANA time zone"),
        ("[priorities]\npack = 1\nplan = 'b'\n", "priorities.plan", "int"),
        ("[retention]\nholds_days = 9\n", "retention", "holds_days"),
        ("[retention]\nnotices_days = 30\n[notify]\nexpiry_days = [7, 30]\n", "retention.notices_days", "more than"),
    ],
)
def test_a_wrong_catalog_is_refused_with_file_key_and_reason(text: str, key: str, reason: str) -> None:
    said = refused(HEAD + text)
    assert said.startswith(key)
    assert reason in said.removeprefix(key)


def test_all_that_is_wrong_is_told_at_once() -> None:
    text = (
        HEAD
        + """
[features.image]
price = 0.2
[features.video]
price = 1
rounding = "down"
[packs.small]
credits = 5
[plan.gold]
monthly_credits = 5
"""
    )
    with pytest.raises(CatalogError) as caught:
        parse_catalog(text, "mine.toml")
    assert [problem.key for problem in caught.value.problems] == [
        "features.image.price", "features.video.rounding", "packs.small", "plan",
    ]  # fmt: skip
    assert "\n" not in str(caught.value)
    whole = (
        HEAD + "zone = 'Mars'\n[offers.a]\npack = 'b'\nprice = '1 EUR'\n[features.f]\nprice = 1\nalternatives = ['g']\n"
    )
    with pytest.raises(CatalogError) as caught:
        parse_catalog(whole, "mine.toml")
    assert [problem.key for problem in caught.value.problems] == [
        "catalog.zone", "features.f.alternatives", "offers.a.pack",
    ]  # fmt: skip


TOML_VALUES = st.recursive(
    st.one_of(
        st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.datetimes(), st.dates(), st.times(),
        st.sampled_from(["1", "0.2", "50%", "2x", "4.99 EUR", "5 JPY", "UTC", "..", "", "a\0b", 10**30, -1, 0]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_whatever_a_file_says_is_a_catalog_or_a_catalog_error(data: st.DataObject) -> None:
    """A catalog that is good but for a value somewhere in it, which may be anything."""
    tables: dict[str, Any] = values(load_catalog(data.draw(st.sampled_from(SHIPPED_NAMES))))
    place: Any = tables
    while isinstance(place, dict):
        keys = [*place, *(SECTIONS if place is tables else ())]
        key = data.draw(st.sampled_from(keys) | st.text(max_size=8)) if keys else "key"
        if isinstance(place.get(key), dict) and place[key] and data.draw(st.integers(0, 3)):
            place = place[key]
            continue
        place[key] = data.draw(TOML_VALUES)
        break
    problems: tuple[Problem, ...] = ()
    try:
        catalog = check_catalog(tables, "any.toml")
    except CatalogError as error:
        problems = error.problems
    else:
        assert check_catalog(values(catalog), "again.toml") == catalog
        assert compare(catalog, catalog) == []
        return
    assert problems


def test_whatever_text_there_is_is_a_catalog_or_a_catalog_error() -> None:
    """Files with letters changed, lost and moved, cut short, and with what TOML itself stumbles over."""
    chance = random.Random(7)
    texts = [(SHIPPED / f"{name}.toml").read_text() for name in SHIPPED_NAMES]
    broken = [
        HEAD + "x = " + "[" * 5000,
        HEAD + "x = " + "9" * 5000,
        HEAD + "[a" + ".a" * 3000 + "]\n",
        "\ufeff" + HEAD,
    ]
    for _ in range(300):
        text = chance.choice(texts)
        start, end = sorted(chance.randrange(len(text)) for _ in range(2))
        kind = chance.randrange(4)
        letter = chance.choice("\"=[]{}.,\n\t\0 -1e9#'\\ü")
        broken.append(
            [text[:start], text[:start] + letter + text[start + 1 :], text[:start] + text[start + 5 :],
             text[:start] + text[end:] + text[start:end]][kind]
        )  # fmt: skip
    refused = 0
    for text in broken:
        try:
            parse_catalog(text, "any.toml")
        except CatalogError:
            refused += 1
    assert refused > len(broken) // 2


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("name = ''", "catalog.name"),
        ("name = 'Mine!'", "catalog.name"),
        ("name = 1", "catalog.name"),
        ("name = 'mine'\nversion = 0", "catalog.version"),
        ("name = 'mine'\nversion = '1'", "catalog.version"),
        ("name = 'mine'\nversion = 1_000_000_001", "catalog.version"),
        ("name = 'mine'\ncurrency = 'euro'", "catalog.currency"),
        ("name = 'mine'\nzone = 'Europe/Pariss'", "catalog.zone"),
        ("name = 'mine'\nzone = '../../etc/passwd'", "catalog.zone"),
        ("name = 'mine'\nzone = ''", "catalog.zone"),
    ],
)
def test_the_catalogs_own_section_is_as_strict(line: str, key: str) -> None:
    assert refused(f"[catalog]\n{line}\n").startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("text", "money", "written"),
    [
        ("4.99 EUR", Money(499, "EUR"), "4.99 EUR"),
        ("5 EUR", Money(500, "EUR"), "5.00 EUR"),
        ("4.9 EUR", Money(490, "EUR"), "4.90 EUR"),
        ("0.05 USD", Money(5, "USD"), "0.05 USD"),
        ("500 JPY", Money(500, "JPY"), "500 JPY"),
        ("99000 VND", Money(99000, "VND"), "99000 VND"),
        ("1.234 KWD", Money(1234, "KWD"), "1.234 KWD"),
    ],
)
def test_money_is_an_integer_of_the_currencys_minor_units(text: str, money: Money, written: str) -> None:
    assert Money.parse(text) == money
    assert str(money) == written


@pytest.mark.parametrize("text", ["", "4.99", "EUR", "4.99EUR", "4.99 eur", "1e3 EUR", "4.99 EUR ", "４ EUR", "1. EUR"])
def test_money_is_written_in_one_way(text: str) -> None:
    with pytest.raises(ValueError, match="money is written as"):
        Money.parse(text)


PACKS = (
    HEAD
    + """
[packs.a]
credits = 10
price = "2.00 EUR"
[packs.b]
credits = 20
price = "2.00 EUR"
[packs.c]
credits = 15
price = "3.00 EUR"
[packs.d]
credits = 100
price = "9.00 EUR"
[packs.quote]
quote_above = 500
"""
)


@pytest.mark.parametrize(("shortfall", "pack"), [(1, "b"), (10, "b"), (20, "b"), (21, "d"), (100, "d"), (101, None)])
def test_the_offer_is_the_pack_of_least_price_that_covers_and_of_equals_the_fuller(
    shortfall: int, pack: str | None
) -> None:
    offer = parse_catalog(PACKS, "mine.toml").cheapest_offer(shortfall * 1_000_000)
    assert (offer and offer["pack"]) == pack
    if pack == "d":
        assert offer == {"pack": "d", "credits": "100", "price": "9.00 EUR"}


def test_the_offer_of_packs_that_are_alike_is_the_first_by_name_wherever_it_stands() -> None:
    """Refusals of before plans were known said so, and are replayed."""
    alike = HEAD + "".join(f'[packs.{name}]\ncredits = 10\nprice = "2.00 EUR"\n' for name in "bac")
    offer = parse_catalog(alike, "mine.toml").cheapest_offer(1)
    assert offer is not None
    assert offer["pack"] == "a"


BLACK_FRIDAY = datetime(2026, 11, 27, tzinfo=UTC)

SELLING = (
    HEAD
    + """
[features.image]
price = 1
[packs.plain]
credits = 10
price = "2.00 EUR"
prices = ["price_plain", "price_plain_old"]
source = "purchased"
expires_days = 90
[packs.bundle]
price = "5.00 EUR"
prices = ["price_bundle"]
[[packs.bundle.grants]]
credits = 20
expires_days = 30
[[packs.bundle.grants]]
credits = 100
features = ["image"]
source = "images"
priority = 3
[packs.quoted]
quote_above = 500
source = "bespoke"
[plans.monthly]
monthly_credits = 30
price = "9.00 EUR"
prices = ["price_monthly"]
trial_days = 14
trial_credits = 5
[offers.black_friday]
title = "Black Friday"
pack = "bundle"
price = "3.00 EUR"
prices = ["price_black"]
from = 2026-11-27T00:00:00Z
until = 2026-11-30T00:00:00+01:00
[offers.first]
pack = "plain"
price = "1.00 EUR"
prices = ["price_first"]
per_account = 1
"""
)


def test_a_price_stands_for_what_was_bought() -> None:
    catalog = parse_catalog(SELLING, "mine.toml")
    plain = (SoldGrant(10_000_000, "purchased", None, 90, None),)
    bundle = (SoldGrant(20_000_000, "pack", None, 30, None), SoldGrant(100_000_000, "images", ("image",), None, 3))
    assert catalog.sold_by("price_plain") == Sold(kind="pack", name="plain", grants=plain)
    assert catalog.sold_by("price_plain_old") == catalog.sold_by("price_plain")
    assert catalog.sold_by("price_bundle") == Sold(kind="pack", name="bundle", grants=bundle)
    assert catalog.sold_by("price_black") == Sold(kind="pack", name="bundle", offer="black_friday", grants=bundle)
    assert catalog.sold_by("price_first") == Sold(kind="pack", name="plain", offer="first", grants=plain)
    assert catalog.sold_by("price_monthly") == Sold(kind="plan", name="monthly")
    assert catalog.sold_by("plain") is None
    assert catalog.sold_by("") is None


def test_what_is_sold_by_quote_has_its_credits_from_the_quote() -> None:
    catalog = parse_catalog(SELLING, "mine.toml")
    quoted = catalog.sold_by_quote("quoted", 700_000_000)
    assert quoted == Sold(kind="pack", name="quoted", grants=(SoldGrant(700_000_000, "bespoke", None, None, None),))
    assert catalog.sold_by_quote("plain", 1) is None
    assert catalog.sold_by_quote("nonesuch", 1) is None


def test_an_offer_runs_from_its_first_instant_to_before_its_last() -> None:
    catalog = parse_catalog(SELLING, "mine.toml")
    end, instant = datetime(2026, 11, 29, 23, tzinfo=UTC), timedelta(microseconds=1)
    for at, runs in (
        (BLACK_FRIDAY - instant, False), (BLACK_FRIDAY, True), (end - instant, True), (end, False),
    ):  # fmt: skip
        assert ("black_friday" in catalog.offers_at(at)) is runs, at
        assert "first" in catalog.offers_at(at)


def test_what_is_short_is_offered_at_the_price_of_an_offer_while_it_runs_and_of_none_that_may_be_used_up() -> None:
    catalog = parse_catalog(SELLING, "mine.toml")
    sale = {"pack": "bundle", "offer": "black_friday", "credits": "20", "price": "3.00 EUR"}
    assert catalog.cheapest_offer(15_000_000, now=BLACK_FRIDAY) == sale
    plain = {"pack": "plain", "credits": "10", "price": "2.00 EUR"}
    assert catalog.cheapest_offer(5_000_000, now=BLACK_FRIDAY) == plain
    bundle = {"pack": "bundle", "credits": "20", "price": "5.00 EUR"}
    assert catalog.cheapest_offer(15_000_000, now=BLACK_FRIDAY - timedelta(days=1)) == bundle
    assert catalog.cheapest_offer(15_000_000) == bundle


def test_what_a_bundle_gives_for_some_features_alone_is_no_help_for_all() -> None:
    catalog = parse_catalog(SELLING, "mine.toml")
    assert catalog.packs["bundle"].general_micro() == 20_000_000
    assert catalog.packs["bundle"].general_micro(timedelta(days=31)) == 0
    offer = catalog.cheapest_offer(21_000_000)
    assert offer is not None
    assert offer["plan"] == "monthly"


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_everything_with_a_price_in_the_shipped_catalogs_can_be_bought_and_burns_where_its_source_says(
    name: str,
) -> None:
    catalog = load_catalog(name)
    for sold, pack in catalog.packs.items():
        if pack.price is not None:
            assert pack.prices, sold
        if catalog.priorities:
            assert pack.source in catalog.priorities, sold
    for sold, plan in catalog.plans.items():
        assert bool(plan.prices) is (plan.price is not None), sold
