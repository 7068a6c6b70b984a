"""Selling: what a provider is asked for, once for each request, and what is refused before it is asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from psycopg import Connection

from creditlane.client import CreditClient
from creditlane.errors import BrokerUnavailableError
from creditlane.selling import Page, SaleCode
from models import orders
from models.catalog import load_catalog
from models.database import connect
from models.payments import PAY_ORDER
from models.rules.catalog import Money
from models.settings import settings
from scripts.fake_stripe import FakeStripe
from tests.broker import Broker, on_both_brokers
from tests.conftest import Spawn
from tests.lives import Books, Life
from tests.support import Ledger, eventually, execute, rows, travel
from workers.checkout import ask, checkout, portal
from workers.ledger_writer import LedgerWriter
from workers.ledger_writer import connect as connect_writer
from workers.selling import check_page, stripe_amount, stripe_locale

CATALOG = """
[catalog]
name = "selling"
[packs.small]
title = "Small"
credits = 10
price = "2.00 EUR"
prices = ["price_small", "price_small_old"]
[packs.unpriced]
credits = 10
price = "2.00 EUR"
[packs.quoted]
title = "Made to measure"
quote_above = 500
[plans.free]
monthly_credits = 5
[plans.monthly]
monthly_credits = 30
price = "9.00 EUR"
prices = ["price_monthly"]
trial_days = 14
trial_credits = 5
[plans.unpriced]
monthly_credits = 50
price = "19.00 EUR"
[offers.always]
pack = "small"
price = "1.00 EUR"
prices = ["price_always"]
[offers.first]
pack = "small"
price = "0.50 EUR"
prices = ["price_first", "price_first_old"]
per_account = 2
[offers.passing]
pack = "small"
price = "1.50 EUR"
prices = ["price_passing"]
from = {begin}
until = {end}
[offers.coming]
pack = "small"
price = "1.75 EUR"
prices = ["price_coming"]
from = {end}
[offers.unpriced]
pack = "small"
price = "1.50 EUR"
"""

HERE: dict[str, Any] = {
    "success_url": "https://shop.example/thanks?s={CHECKOUT_SESSION_ID}",
    "cancel_url": "https://shop.example/",
}
KEY = "sk_test_" + "0" * 24
BEGIN = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
END = BEGIN + timedelta(days=7)


def now() -> datetime:
    """The provider's clock."""
    return datetime.now(UTC)


class Till:
    """Takes payments, and makes credits of them as the workers do.

    :param ledger: by the catalog that is sold by.
    """

    def __init__(self, connection: Connection[Any], database: str, ledger: Ledger, stripe: FakeStripe) -> None:
        self._stripe = stripe
        self._life = Life("alice", 1, now())
        self._life.stripe = stripe
        self._books = Books(connection, database, ledger, self._life)

    def __call__(self, page: Page | str) -> None:
        """Go through a checkout, and hear all that the provider says of it."""
        self._stripe.complete(page if isinstance(page, str) else str(page.id))
        self.deliver()

    def deliver(self, type: str | None = None) -> None:
        """Hear what was not heard yet, of one type or of all."""
        for event in self._stripe.undelivered():
            self._life.now = now()
            if type in (None, event["type"]):
                self._books.deliver(event)
                event["pending_webhooks"] = 0


@pytest.fixture
def stripe() -> Iterator[FakeStripe]:
    """A Stripe that knows the prices of the catalog."""
    with FakeStripe(now, random.Random(1), key=KEY) as found:
        for price, minor in (
            ("price_small", 200), ("price_always", 100), ("price_first", 50), ("price_passing", 150),
            ("price_coming", 175),
        ):  # fmt: skip
            found.add_price(price, minor)
        found.add_price("price_first_old", 60)
        found.add_price("price_monthly", 900, interval="month")
        yield found


@pytest.fixture
def shop(stripe: FakeStripe, tmp_path: Path) -> dict[str, str]:
    """The settings of a worker that sells by the catalog above."""
    path = tmp_path / "selling.toml"
    path.write_text(CATALOG.format(begin=BEGIN.isoformat(), end=END.isoformat()))
    return {
        "CREDITLANE_CATALOG": str(path), "CREDITLANE_STRIPE_API_KEY": stripe.key,
        "CREDITLANE_STRIPE_API_BASE": stripe.url, "CREDITLANE_PAYMENTS_LIVEMODE": "false",
    }  # fmt: skip


@pytest.fixture
def selling(
    shop: dict[str, str], database: str, broker_url: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """This process as that worker; alice and bob have accounts."""
    given = {"CREDITLANE_DATABASE_URL": database, "CREDITLANE_BROKER_URL": broker_url, **shop}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    ledger.apply("credits.open", "open", account="alice", email="alice@example.org", locale="fr_FR")
    ledger.apply("credits.open", "open", account="bob")
    yield database
    settings.cache_clear()


@pytest.fixture
def till(selling: str, ledger: Ledger, stripe: FakeStripe) -> Iterator[Till]:
    """Where checkouts are paid."""
    catalog = load_catalog(settings().catalog)
    ledger.catalog = catalog
    ledger.writer.catalog = lambda: catalog
    with connect(selling, "test", read_only=False) as connection:
        yield Till(connection, selling, ledger, stripe)


def sell(account: str = "alice", /, request: str = "r-1", **what: Any) -> Page:
    """Ask for a checkout."""
    return msgspec.convert(checkout(account=account, request=request, **{**HERE, **what}), Page)


def refused(account: str = "alice", /, **what: Any) -> SaleCode | None:
    """What a checkout is refused with."""
    page = sell(account, **what)
    assert (page.status, page.url, page.id) == ("rejected", None, None)
    assert page.reason
    return page.code


def asked(stripe: FakeStripe, path: str = "checkout/sessions") -> list[Any]:
    """What the provider was asked to make, in order."""
    return [each for each in stripe.requests if (each.method, each.path) == ("POST", f"/v1/{path}")]


def quote(database: str, account: str = "alice", expires_at: datetime | None = None, credits: int = 700) -> str:
    """A quote of 99 EUR."""
    with connect(database, "test", read_only=False) as connection:
        return orders.new_quote(
            connection, account, credits * 10**6, Money(9900, "EUR"), load_catalog(settings().catalog),
            expires_at=expires_at or now() + timedelta(days=30), actor="zoe",
        ).id  # fmt: skip


def subscribed(database: str, plan: str, account: str = "alice") -> None:
    """Begin a plan in the ledger."""
    catalog = load_catalog(settings().catalog)
    with connect_writer(database) as connection:
        plans = Ledger(LedgerWriter(connection, lambda: catalog, lambda *_: None), catalog)  # type: ignore[arg-type]
        answer = plans.apply("plans.subscribe", f"s-{plan}", account=account, plan=plan)
        assert answer["status"] == "applied"


# What the provider is asked for


def test_a_pack(selling: str, stripe: FakeStripe) -> None:
    page = sell(pack="small", quantity=3)
    assert page.is_done
    assert page.expires_at is not None
    assert now() + timedelta(hours=23) < page.expires_at <= now() + timedelta(hours=24)
    (request,) = asked(stripe)
    account = {"creditlane_account": "alice"}
    session = stripe.find("checkout.session", str(page.id))
    assert request.parameters == {
        "mode": "payment",
        "line_items": [{"price": "price_small", "quantity": "3"}],
        "client_reference_id": "alice",
        "customer": session["customer"],
        "metadata": account,
        "payment_intent_data": {"metadata": account},
        "locale": "fr",
        **HERE,
    }
    assert (session["url"], session["client_reference_id"], session["amount_total"]) == (page.url, "alice", 600)
    assert stripe.find("customer", session["customer"])["email"] == "alice@example.org"
    assert stripe.find("customer", session["customer"])["metadata"] == account


def test_a_plan_with_a_trial_for_who_never_had_one(selling: str, stripe: FakeStripe) -> None:
    page = sell(plan="monthly")
    (request,) = asked(stripe)
    assert request.parameters["mode"] == "subscription"
    assert request.parameters["subscription_data"] == {
        "metadata": {"creditlane_account": "alice"}, "trial_period_days": "14",
    }  # fmt: skip
    assert "payment_intent_data" not in request.parameters
    assert stripe.find("checkout.session", str(page.id))["metadata"] == {"creditlane_account": "alice"}


def test_a_quote_is_sold_as_it_was_made_and_names_its_order(selling: str, stripe: FakeStripe) -> None:
    order = quote(selling)
    page = sell(quote=order)
    session = stripe.find("checkout.session", str(page.id))
    names = {"creditlane_account": "alice", "creditlane_order": order}
    assert (session["metadata"], session["amount_total"], session["currency"]) == (names, 9900, "eur")
    (request,) = asked(stripe)
    assert request.parameters["payment_intent_data"] == {"metadata": names}
    assert "Made to measure: 700" in str(request.parameters["line_items"])
    with connect(selling, "test") as connection:
        found = orders.order(connection, order)
    assert found is not None
    assert (found.status, found.session) == ("quoted", page.id)
    assert sell(quote=order, request="r-2").id == page.id, "one quote, one checkout"


def test_an_offer_is_sold_at_its_own_price(selling: str, stripe: FakeStripe) -> None:
    assert stripe.find("checkout.session", str(sell(offer="always").id))["amount_total"] == 100


def test_the_same_request_has_the_same_checkout_and_another_one_another(selling: str, stripe: FakeStripe) -> None:
    first = sell(pack="small")
    assert sell(pack="small") == first
    others = [
        sell(pack="small", request="r-2"), sell(pack="small", quantity=2), sell(offer="always"),
        sell("bob", pack="small"), sell(pack="small", cancel_url="https://shop.example/other"),
    ]  # fmt: skip
    assert len({page.id for page in [first, *others]}) == 6
    keys = [request.idempotency_key for request in asked(stripe)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 6


def test_an_account_is_one_customer(selling: str, stripe: FakeStripe) -> None:
    customers = {stripe.find("checkout.session", str(sell(pack="small", request=r).id))["customer"] for r in "abc"}
    assert len(customers) == len(asked(stripe, "customers")) == 1
    sell("bob", pack="small")
    (one, other) = rows(selling, "SELECT account, id FROM payment_bindings ORDER BY account")
    assert (one[0], {one[1]}, other[0]) == ("alice", customers, "bob")
    # As when a worker was killed between the provider's answer and the commit.
    execute(selling, "DELETE FROM payment_bindings")
    sell(pack="small", request="d")
    assert rows(selling, "SELECT account, id FROM payment_bindings") == [one]


def test_a_customer_of_the_other_mode_is_another(selling: str, stripe: FakeStripe) -> None:
    execute(
        selling,
        "INSERT INTO payment_bindings VALUES ('stripe', true, 'customer', 'cus_live', 'alice', now()),"
        " ('paypal', false, 'customer', 'payer', 'alice', now())",
    )
    assert stripe.find("checkout.session", str(sell(pack="small").id))["customer"] not in ("cus_live", "payer")


def test_a_checkout_ends_with_its_offer_but_lasts_half_an_hour(selling: str, stripe: FakeStripe) -> None:
    assert sell(offer="passing").expires_at > now() + timedelta(hours=23)  # type: ignore[operator]
    ahead = END - now()
    travel(selling, ahead - timedelta(hours=5))
    stripe.now = lambda: int((END - timedelta(hours=5)).timestamp())  # type: ignore[method-assign]
    assert sell(offer="passing", request="r-2").expires_at == END
    travel(selling, ahead - timedelta(minutes=5))
    stripe.now = lambda: int((END - timedelta(minutes=5)).timestamp())  # type: ignore[method-assign]
    page = sell(offer="passing", request="r-3")
    assert page.expires_at is not None
    assert END + timedelta(minutes=25) <= page.expires_at <= END + timedelta(minutes=60)


def test_a_quote_whose_checkout_nobody_paid_in_time_gets_another(selling: str, stripe: FakeStripe) -> None:
    order = quote(selling)
    first = sell(quote=order)
    travel(selling, timedelta(hours=25))
    second = sell(quote=order, request="r-2")
    assert second.is_done
    assert second.id != first.id


# What is refused


NOT_SOLD: list[tuple[dict[str, Any], SaleCode]] = [
    ({"pack": "nonesuch"}, SaleCode.UNKNOWN_PACK),
    ({"plan": "nonesuch"}, SaleCode.UNKNOWN_PLAN),
    ({"offer": "nonesuch"}, SaleCode.UNKNOWN_OFFER),
    ({"quote": "nonesuch"}, SaleCode.UNKNOWN_QUOTE),
    ({"pack": "unpriced"}, SaleCode.NO_PRICE),
    ({"pack": "quoted"}, SaleCode.NO_PRICE),
    ({"plan": "unpriced"}, SaleCode.NO_PRICE),
    ({"plan": "free"}, SaleCode.NO_PRICE),
    ({"offer": "unpriced"}, SaleCode.NO_PRICE),
    ({"offer": "first", "quantity": 3}, SaleCode.OFFER_USED),
    ({}, SaleCode.INVALID),
    ({"pack": "small", "plan": "monthly"}, SaleCode.INVALID),
    ({"pack": "small", "quote": "order.1"}, SaleCode.INVALID),
    ({"pack": "small", "quantity": 0}, SaleCode.INVALID),
    ({"pack": "small", "quantity": -1}, SaleCode.INVALID),
    ({"pack": "small", "quantity": 101}, SaleCode.INVALID),
    ({"pack": "small", "quantity": 1.5}, SaleCode.INVALID),
    ({"pack": "small", "quantity": "2"}, SaleCode.INVALID),
    ({"plan": "monthly", "quantity": 2}, SaleCode.INVALID),
    ({"quote": "order.1", "quantity": 2}, SaleCode.INVALID),
    ({"pack": "small", "request": ""}, SaleCode.INVALID),
    ({"pack": "small\x00"}, SaleCode.INVALID),
    ({"pack": {"price_data": {"unit_amount": 1}}}, SaleCode.INVALID),
]


def test_what_is_not_sold(selling: str, stripe: FakeStripe) -> None:
    for what, code in NOT_SOLD:
        assert refused(**what) is code, what
    assert stripe.requests == [], "the provider is not even asked"


STRANGE = [
    "javascript:alert(1)",
    "JavaScript://shop.example/%0aalert(1)",
    "data:text/html,<script>alert(1)</script>",
    "http://shop.example/",
    "ftp://shop.example/",
    "//shop.example/",
    "/thanks",
    "https://",
    "https:///path",
    "https://shop.example@evil.example/",
    "https://shop.example\\@evil.example/",
    "https://shop.example/\r\nSet-Cookie: a=b",
    "https://shop.example/ x",
    "https://shop.example:0/",
    "https://shop.example:99999/",
    "https://[::1",
    "https://sh\u043ep.example/",
    "http://127.0.0.1.evil.example/",
    "",
]


@pytest.mark.parametrize("url", STRANGE)
def test_a_buyer_is_sent_to_no_strange_place(url: str) -> None:
    with pytest.raises(ValueError, match="the page"):
        check_page(url, "the page")


@pytest.mark.parametrize("url", ["http://localhost:3000/x", "http://127.0.0.1/", "http://[::1]:8080/a?b#c"])
def test_a_buyer_may_be_sent_to_this_machine(url: str) -> None:
    check_page(url, "the page")


def test_all_pages_that_a_buyer_is_sent_to_are_looked_at(selling: str, stripe: FakeStripe) -> None:
    for url in ("javascript:alert(1)", "https://shop.example/" + "x" * 2000, "", None):
        for name in ("success_url", "cancel_url"):
            assert refused(pack="small", **{name: url}) is SaleCode.INVALID
        answer = portal(account="alice", return_url=url)
        assert (answer["status"], answer["code"]) == ("rejected", "invalid")
    assert stripe.requests == []


def test_an_account_that_is_not_open_buys_nothing(selling: str, ledger: Ledger, stripe: FakeStripe) -> None:
    assert refused("nobody", pack="small") is SaleCode.UNKNOWN_ACCOUNT
    ledger.apply("credits.consume", "c", account="mentioned", amount="1")
    assert refused("mentioned", pack="small") is SaleCode.UNKNOWN_ACCOUNT
    assert refused("", pack="small") is SaleCode.INVALID
    execute(selling, "UPDATE accounts SET status = 'closed' WHERE account = 'bob'")
    assert refused("bob", pack="small") is SaleCode.ACCOUNT_CLOSED
    execute(selling, "UPDATE accounts SET status = 'open' WHERE account = 'bob'")
    assert stripe.requests == []


def test_a_quote_is_sold_to_its_own_account_once_it_is_quoted_and_not_after(selling: str, stripe: FakeStripe) -> None:
    made = ask(account="alice", credits="700", request="q")
    order = made["order"]
    assert refused(quote=order) is SaleCode.QUOTE_NOT_READY
    assert refused("bob", quote=order) is SaleCode.UNKNOWN_QUOTE
    theirs = quote(selling, "alice")
    assert refused("bob", quote=theirs) is SaleCode.UNKNOWN_QUOTE
    brief = quote(selling, expires_at=now() + timedelta(hours=1))
    with connect(selling, "test", read_only=False) as connection:
        orders.withdraw(connection, order, actor="zoe")
        connection.execute(PAY_ORDER, ("stripe:cs_1", theirs))
    assert refused(quote=order) is SaleCode.QUOTE_OVER
    assert refused(quote=theirs) is SaleCode.QUOTE_OVER
    travel(selling, timedelta(hours=2))
    assert refused(quote=brief) is SaleCode.QUOTE_OVER
    assert stripe.requests == []


def test_an_offer_is_sold_while_it_runs_and_no_longer(selling: str) -> None:
    assert refused(offer="coming") is SaleCode.OFFER_OVER
    assert sell(offer="passing").is_done
    travel(selling, END - now())
    assert sell(offer="coming").is_done
    assert refused(offer="passing") is SaleCode.OFFER_OVER


def test_an_offer_is_sold_as_often_as_it_may_be(selling: str, stripe: FakeStripe, till: Till) -> None:
    first = sell(offer="first")
    assert sell(offer="first", request="another tab").id == first.id, "of two checkouts at a time each could be paid"
    till(sell("bob", offer="first", quantity=2))
    till(sell(pack="small", quantity=9))
    assert sell(offer="first").id == first.id, "what others bought, or at another price, does not count"
    till(first)
    assert refused(offer="first", quantity=2) is SaleCode.OFFER_USED
    till(stripe.open_session([("price_first_old", 1)], mode="payment", client_reference_id="alice")["id"])
    assert refused(offer="first") is SaleCode.OFFER_USED
    assert refused("bob", offer="first") is SaleCode.OFFER_USED
    given = rows(selling, "SELECT account, sum(granted_micro) FROM grants WHERE source = 'pack' GROUP BY 1 ORDER BY 1")
    assert given == [("alice", 110 * 10**6), ("bob", 20 * 10**6)]


def test_who_pays_for_a_plan_is_sent_to_the_portal_and_who_has_a_free_one_is_not(
    selling: str, stripe: FakeStripe
) -> None:
    subscribed(selling, "free")
    assert sell(plan="monthly").is_done
    subscribed(selling, "monthly", "bob")
    assert refused("bob", plan="monthly") is SaleCode.ALREADY_SUBSCRIBED
    travel(selling, timedelta(days=60))
    assert sell("bob", plan="monthly").is_done, "it ended, as nobody paid for it"
    assert "trial_period_days" not in asked(stripe)[-1].parameters["subscription_data"], "one trial"


def test_a_subscription_that_the_provider_knows_counts_before_its_credits_come(
    selling: str, stripe: FakeStripe, till: Till
) -> None:
    stripe.complete(str(sell(plan="monthly").id))
    till.deliver("customer.subscription.created")
    assert rows(selling, "SELECT FROM subscriptions") == []
    assert refused(plan="monthly") is SaleCode.ALREADY_SUBSCRIBED
    stripe.cancel(stripe.all_of("subscription")[0]["id"])
    till.deliver("customer.subscription.deleted")
    assert sell(plan="monthly").is_done
    assert "trial_period_days" not in asked(stripe)[-1].parameters["subscription_data"], "one trial"


def test_a_quote_that_is_paid_gives_its_credits_once(selling: str, stripe: FakeStripe, till: Till) -> None:
    order = quote(selling)
    till(sell(quote=order))
    assert refused(quote=order) is SaleCode.QUOTE_OVER
    ((source, micro, purchase),) = rows(
        selling, "SELECT source, granted_micro, purchase FROM grants WHERE account = 'alice' AND source <> 'signup'"
    )
    assert (source, micro) == ("pack", 700 * 10**6)
    assert rows(selling, "SELECT status, paid_by FROM payment_orders") == [("paid", purchase)]


def test_the_portal_is_for_who_has_bought_something(selling: str, stripe: FakeStripe) -> None:
    visit = {"account": "alice", "return_url": "https://shop.example/"}
    assert portal(**visit)["code"] == "no_customer"
    sell(pack="small")
    first, second = portal(**visit), portal(**visit)
    assert (first["status"], bool(first["url"])) == ("done", True)
    assert first["id"] != second["id"], "an old address would lead nowhere"
    (one, other) = asked(stripe, "billing_portal/sessions")
    assert one.parameters["customer"] == rows(selling, "SELECT id FROM payment_bindings")[0][0]
    assert one.idempotency_key != other.idempotency_key


def test_an_inquiry(selling: str) -> None:
    made = ask(account="alice", credits="700.5", request="q", note="soon")
    assert ask(account="alice", credits="700.5", request="q", note="soon") == made
    with connect(selling, "test") as connection:
        (found,) = orders.orders_of(connection, "alice")
    assert (found.id, found.asked, found.note) == (made["order"], "700.5", "soon")
    for wrong in (
        {"credits": "-700"}, {"credits": "1e3"}, {"credits": 700.5}, {"credits": True}, {"credits": 10**13},
        {"note": ""}, {"note": "a\x00b"}, {"note": "n" * 501}, {"request": ""}, {"account": "a\x00"},
    ):  # fmt: skip
        answer = ask(**{"account": "alice", "credits": "700", "request": "w", **wrong})
        assert (answer["status"], answer["code"]) == ("rejected", "invalid"), wrong
    assert len(rows(selling, "SELECT FROM payment_orders")) == 1


# The provider


def test_without_a_key_nothing_is_sold(selling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDITLANE_STRIPE_API_KEY")
    settings.cache_clear()
    assert refused(pack="small") is SaleCode.NOT_CONFIGURED
    assert portal(account="alice", return_url="https://shop.example/")["code"] == "not_configured"
    assert ask(account="alice", credits=700, request="q")["order"], "a quote can be asked for all the same"


def test_what_the_provider_refuses_is_answered_with_its_code(selling: str, stripe: FakeStripe) -> None:
    execute(selling, "INSERT INTO payment_bindings VALUES ('stripe', false, 'customer', 'cus_gone', 'bob', now())")
    page = sell("bob", pack="small")
    assert (page.code, page.url) == (SaleCode.PROVIDER_REFUSED, None)
    assert "resource_missing" in str(page.reason)
    assert stripe.key not in str(page.reason)


def test_a_newer_message_is_not_guessed_at(selling: str) -> None:
    for call in (
        lambda: sell(pack="small", v=2),
        lambda: portal(account="alice", return_url="https://shop.example/", v=2),
        lambda: ask(account="alice", credits=700, request="q", v=2),
    ):
        with pytest.raises(ValueError, match="contract version 2"):
            call()


def test_a_provider_that_stumbles_makes_one_checkout(selling: str, stripe: FakeStripe) -> None:
    stripe.fail(1, done=True)
    page = sell(pack="small")
    assert page.is_done
    assert len(stripe.all_of("checkout.session")) == len(stripe.all_of("customer")) == 1


@pytest.mark.parametrize(
    ("money", "amount"),
    [
        (Money(499, "EUR"), 499),
        (Money(500, "JPY"), 500),
        (Money(500, "ISK"), 50_000),
        (Money(500, "UGX"), 50_000),
        (Money(1234, "KWD"), 1234),
        (Money(500, "MGA"), 5),
    ],
)
def test_money_in_the_providers_units(money: Money, amount: int) -> None:
    assert stripe_amount(money) == amount


def test_money_that_the_provider_has_no_unit_for() -> None:
    with pytest.raises(orders.NotSoldError, match="MGA"):
        stripe_amount(Money(501, "MGA"))


@pytest.mark.parametrize(
    ("locale", "shown"),
    [
        ("fr", "fr"), ("fr_FR", "fr"), ("fr-CA", "fr-CA"), ("FR_ca", "fr-CA"), ("en_GB", "en-GB"), ("en-US", "en"),
        ("zh-Hant-TW", "zh"), ("es_419", "es-419"), ("eo", "auto"), (None, "auto"), ("", "auto"),
    ],
)  # fmt: skip
def test_the_language_of_the_providers_pages(locale: str | None, shown: str) -> None:
    assert stripe_locale(locale) == shown


# Through a worker


@on_both_brokers
def test_a_shop_sells_through_the_broker(
    selling: str, shop: dict[str, str], client: CreditClient, spawn: Spawn, broker: Broker
) -> None:
    spawn("general", kind="general", **shop)
    eventually(lambda: broker.has_queue("payments"))

    def ask_for_it() -> Page | None:
        try:
            return client.checkout("alice", pack="small", request="r-1", wait=60, **HERE)
        except BrokerUnavailableError:
            return None  # the worker has declared its queue and not bound it yet

    page = eventually(ask_for_it)
    assert page == sell(pack="small")
    assert client.checkout("alice", pack="nonesuch", request="r-2", **HERE).code is SaleCode.UNKNOWN_PACK
    assert client.portal("alice", return_url="https://shop.example/").url
    made = client.inquire("alice", 700, request="q", note="soon")
    assert made.order == orders.inquiry_id("alice", "q")
