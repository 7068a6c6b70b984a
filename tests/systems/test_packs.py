"""Packs: a few free credits, packs for money, prices per action; each test is a requirement of that system's plan."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from creditlane.codes import Code
from models.orders import NotSoldError, inquire, quote
from models.reading import history
from models.rules.catalog import Money
from tests.systems.conftest import System

pytestmark = pytest.mark.xdist_group("system-packs")
CATALOG = "packs"


def test_start_with_50_free_credits_when_their_account_is_first_created(system: System) -> None:
    user = system.open()
    assert user.available == 50
    user.refused(Code.ACCOUNT_EXISTS, "credits.open")
    assert user.available == 50, "first created: only then"


def test_image_generation_costs_1_credit_per_8_images(system: System) -> None:
    user = system.open()
    assert [user.use("image", 8).charged, user.use("image", 12).charged] == [1, Decimal("1.5")]


def test_image_regeneration_costs_a_fifth_of_a_credit(system: System) -> None:
    user = system.open()
    assert [user.use("regeneration").charged for _ in range(5)] == [Decimal("0.2")] * 5
    assert user.available == 49, "five fifths are one credit, exactly"


def test_context_generation_costs_1_credit(system: System) -> None:
    assert system.open().use("context").charged == 1


def test_saving_a_collection_costs_10_credits(system: System) -> None:
    assert system.open().use("save_collection").charged == 10


def test_pdf_and_png_exports_consume_no_credits(system: System) -> None:
    user = system.open()
    user.burn(50)
    assert user.use("export").charged == 0, "also when nothing is left"
    counted = system.read(
        "SELECT name, feature FROM operations WHERE account = %s AND feature = 'export'", user.account
    )
    assert counted == [("credits.consume", "export")], "free, and counted"


@pytest.mark.parametrize(
    ("pack", "credits", "price"),
    [("decouverte", 25, "4.99 EUR"), ("pro", 85, "14.99 EUR"), ("organisme", 250, "39.99 EUR")],
)
def test_each_user_can_purchase_credit_packs(pack: str, credits: int, price: str, system: System) -> None:
    assert system.catalog.packs[pack].price == price
    user = system.open()
    user.buy(pack)
    assert user.available == 50 + credits


def test_more_than_500_credits_are_sold_by_an_administrators_quote(system: System) -> None:
    user = system.open()
    with system.connect(read_only=False) as connection:
        with pytest.raises(NotSoldError):
            inquire(connection, user.account, 500 * 10**6, system.catalog, request="small")
        asked = inquire(connection, user.account, 501 * 10**6, system.catalog, request="large", note="for a school")
        quoted = quote(
            connection, asked.id, Money(7500, "EUR"), system.catalog, actor="ana",
            expires_at=datetime.now(UTC) + timedelta(days=14),
        )  # fmt: skip
    assert (asked.status, quoted.status, quoted.price) == ("inquiry", "quoted", "75.00 EUR")


def test_credits_never_expire_and_remain_in_user_accounts_indefinitely(system: System) -> None:
    user = system.open()
    user.buy("decouverte")
    system.later(days=3650)
    assert user.available == 75


def test_users_cannot_overspend_credits_even_under_concurrent_requests(system: System) -> None:
    user = system.open()
    with ThreadPoolExecutor(8) as producers:
        answers = list(producers.map(lambda _: user.send("credits.consume", feature="save_collection"), range(16)))
    assert sorted(answer.status for answer in answers) == ["applied"] * 5 + ["rejected"] * 11
    assert {answer.code for answer in answers if answer.status == "rejected"} == {Code.INSUFFICIENT_CREDITS}
    assert user.available == 0


def test_a_refusal_names_the_pack_that_would_cover_it(system: System) -> None:
    user = system.open()
    user.burn(45)
    refused = user.refused(Code.INSUFFICIENT_CREDITS, "credits.consume", feature="save_collection")
    assert refused.required == 10
    assert refused.available == refused.shortfall == 5
    assert refused.offer == {"pack": "decouverte", "credits": "25", "price": "4.99 EUR"}


def test_a_request_that_is_sent_twice_is_charged_once(system: System) -> None:
    user = system.open()
    first = user.send("credits.consume", id="order-991", feature="context")
    again = user.send("credits.consume", id="order-991", feature="context")
    assert first.charged == again.charged == 1
    assert (first.replayed, again.replayed) == (False, True)
    assert user.available == 49


def test_view_balance_and_transaction_history(system: System) -> None:
    user = system.open()
    user.buy("decouverte")
    user.use("image", 12)
    with system.connect() as connection:
        page = history(connection, user.account, limit=50)
    told = [(line.name, line.change, line.balance) for line in page.lines]
    assert told == [
        ("credits.consume", "-1.5", "73.5"), ("credits.grant", "25", "75"), ("credits.open", "50", "50"),
    ]  # fmt: skip


def test_administrators_adjust_credits_with_their_name_and_reason(system: System) -> None:
    user = system.open()
    user.send("credits.adjust", amount="-5.5", actor="ana", reason="double click")
    user.send("credits.adjust", amount="3", actor="ana", reason="sorry")
    assert user.available == Decimal("47.5")
    kept = system.read(
        "SELECT arguments->>'actor', arguments->>'reason' FROM operations WHERE account = %s"
        " AND name = 'credits.adjust' ORDER BY number",
        user.account,
    )
    assert kept == [("ana", "double click"), ("ana", "sorry")]


def test_the_worked_example(system: System) -> None:
    user = system.open()
    told = [user.available]
    for feature, quantity in (("image", 12), ("regeneration", 1), ("save_collection", 1), ("export", 1)):
        user.use(feature, quantity)
        told.append(user.available)
    user.buy("decouverte")
    told.append(user.available)
    assert told == [Decimal(each) for each in ("50", "48.5", "48.3", "38.3", "38.3", "63.3")]
