"""Catalog files: what is read from them, and with what words a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.catalog import SHIPPED, CatalogError, load_catalog, parse_catalog
from models.rules.catalog import Money

HEAD = '[catalog]\nname = "mine"\n'


def refused(text: str) -> str:
    with pytest.raises(CatalogError) as caught:
        parse_catalog(text, "mine.toml")
    reason = str(caught.value)
    assert reason.startswith("mine.toml: ")
    return reason.removeprefix("mine.toml: ")


SHIPPED_NAMES = sorted(file.stem for file in SHIPPED.glob("*.toml"))


def test_catalogs_are_shipped() -> None:
    assert {"packs", "metering"} <= set(SHIPPED_NAMES)


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


def test_a_catalog_of_a_name_and_nothing_else_has_the_documented_defaults() -> None:
    catalog = parse_catalog(HEAD, "mine.toml")
    assert catalog.signup.credits == catalog.lead.credits == 0
    assert catalog.clawback.on_spent == "debt"
    assert catalog.refunds.refund_days == 30
    assert catalog.priority_of("anything") == 100
    assert catalog.label == "mine-1"


def test_credits_that_nobody_paid_for_stay_where_they_are_unless_the_catalog_says_otherwise() -> None:
    plain = parse_catalog(HEAD + '[signup]\nsource = "hello"\n[lead]\nsource = "hi"\n', "mine.toml")
    for source in ("hello", "hi", "signup", "lead", "bonus", "referral", "promotion"):
        assert not plain.is_transferable(source), source
    assert plain.is_transferable("pack")
    assert plain.is_transferable("anything")
    said = "[sources.signup]\ntransferable = true\n[sources.pack]\ntransferable = false\n"
    named = parse_catalog(HEAD + said, "mine.toml")
    assert named.is_transferable("signup")
    assert not named.is_transferable("pack")


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
        ("[featurs.image]\nprice = 1\n", "", "unknown field `featurs`"),
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
        ("[signup]\ncredits = '-1'\n", "signup", "credits must not be negative"),
        ("[signup]\ncredits = 1\nexpires_days = 0\n", "signup.expires_days", ">= 1"),
        ("[priorities]\npack = -1\n", "priorities", ">= 0"),
        ("[priorities]\npack = 1001\n", "priorities", "<= 1000"),
        ("[priorities]\npack = 'first'\n", "priorities", "int"),
        ("[sources.pack]\ntransferable = 1\n", "sources", "bool"),
        ("[sources.pack]\ntransferrable = true\n", "sources", "unknown field `transferrable`"),
        ("[sources.pack]\n", "sources", "`transferable`"),
        ("[clawback]\non_spent = 'shrug'\n", "clawback.on_spent", "shrug"),
        ("[refunds]\nrefund_days = 0\n", "refunds.refund_days", ">= 1"),
        ("[refunds]\nrefund_days = 3661\n", "refunds.refund_days", "<= 3660"),
        ("[retention]\nnotices_days = 0\n", "retention.notices_days", ">= 1"),
        ("[retention]\nholds_days = 9\n", "retention", "holds_days"),
        ("[retention]\nnotices_days = 30\n[notify]\nexpiry_days = [7, 30]\n", "retention.notices_days", "more than"),
    ],
)
def test_a_wrong_catalog_is_refused_with_file_key_and_reason(text: str, key: str, reason: str) -> None:
    said = refused(HEAD + text)
    assert said.startswith(key)
    assert reason in said.removeprefix(key)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("name = ''", "catalog.name"),
        ("name = 'Mine!'", "catalog.name"),
        ("name = 1", "catalog.name"),
        ("name = 'mine'\nversion = 0", "catalog.version"),
        ("name = 'mine'\nversion = '1'", "catalog.version"),
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
