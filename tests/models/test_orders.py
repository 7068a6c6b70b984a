"""Custom quotes: asked for, quoted by an administrator, paid; and everything that is refused on the way."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg import Connection

from creditlane.selling import SaleCode
from models import orders
from models.catalog import load_catalog, parse_catalog
from models.database import connect
from models.orders import NotSoldError, OrderLine
from models.payments import PAY_ORDER
from models.rules.catalog import Money
from tests.support import Ledger, execute, travel

CATALOG = load_catalog("packs")
PRICE = Money(9900, "EUR")
MILLION = 10**6
FAR = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def connection(database: str, ledger: Ledger) -> Iterator[Connection[Any]]:
    """A connection of an operator's; alice and bob have accounts."""
    for name in ("alice", "bob"):
        ledger.apply("credits.open", "open", account=name)
    with connect(database, "test", read_only=False) as found:
        yield found


def ask(connection: Connection[Any], credits: int = 700, account: str = "alice", request: str = "r-1") -> OrderLine:
    """Ask for so many credits."""
    return orders.inquire(connection, account, credits * MILLION, CATALOG, request=request, note="by March")


def quoted(connection: Connection[Any], **terms: Any) -> OrderLine:
    """An inquiry of alice's, answered."""
    made = ask(connection, request=f"r-{len(orders.orders_of(connection, 'alice'))}")
    given = {"price": PRICE, "catalog": CATALOG, "expires_at": FAR, "actor": "zoe", **terms}
    return orders.quote(connection, made.id, **given)


def refusal(call: Any, *arguments: Any, **named: Any) -> SaleCode:
    """The code that something is refused with."""
    with pytest.raises(NotSoldError) as caught:
        call(*arguments, **named)
    assert caught.value.reason
    return caught.value.code


def pay(connection: Connection[Any], id: str) -> OrderLine:
    """Note a payment as the payments do."""
    connection.execute(PAY_ORDER, ("stripe:cs_1", id))
    found = orders.order(connection, id)
    assert found is not None
    return found


def test_a_quote_from_the_inquiry_to_the_payment(connection: Connection[Any]) -> None:
    made = ask(connection)
    assert (made.status, made.pack, made.asked, made.credits, made.price, made.note) == (
        "inquiry", "sur_mesure", "700", None, None, "by March",
    )  # fmt: skip
    assert [each.id for each in orders.open_orders(connection)] == [made.id]
    answered = orders.quote(connection, made.id, PRICE, CATALOG, expires_at=FAR, actor="zoe")
    assert (answered.status, answered.credits, answered.price, answered.actor, answered.expires_at) == (
        "quoted", "700", "99.00 EUR", "zoe", FAR,
    )  # fmt: skip
    assert answered.quoted_at is not None
    assert not answered.is_over
    orders.opened(connection, made.id, "cs_1")
    paid = pay(connection, made.id)
    assert (paid.status, paid.session, paid.paid_by) == ("paid", "cs_1", "stripe:cs_1")
    assert orders.open_orders(connection) == []
    assert orders.orders_of(connection, "alice") == [paid]
    assert orders.orders_of(connection, "bob") == []


def test_an_inquiry_is_one_however_often_it_is_sent(connection: Connection[Any]) -> None:
    made = ask(connection)
    assert ask(connection) == made
    assert refusal(ask, connection, 701) is SaleCode.ID_CONFLICT
    assert ask(connection, account="bob").id != made.id, "another account's request of the same name is another"
    orders.quote(connection, made.id, PRICE, CATALOG, expires_at=FAR, actor="zoe")
    assert ask(connection).status == "quoted"


def test_what_is_no_inquiry_is_refused(connection: Connection[Any], ledger: Ledger) -> None:
    assert refusal(ask, connection, 500) is SaleCode.INVALID
    assert refusal(ask, connection, -700) is SaleCode.INVALID
    assert refusal(ask, connection, account="nobody") is SaleCode.UNKNOWN_ACCOUNT
    ledger.apply("credits.consume", "c", account="mentioned", amount="1")
    assert refusal(ask, connection, account="mentioned") is SaleCode.UNKNOWN_ACCOUNT
    common = {"request": "r", "pack": "pro"}
    assert refusal(orders.inquire, connection, "alice", 10**9, CATALOG, **common) is SaleCode.UNKNOWN_PACK
    without = load_catalog("rollover")
    assert refusal(orders.inquire, connection, "alice", 10**9, without, request="r") is SaleCode.UNKNOWN_PACK
    several = parse_catalog(
        '[catalog]\nname = "several"\n[packs.a]\nquote_above = 5\n[packs.b]\nquote_above = 50\n', "several.toml"
    )
    assert refusal(orders.inquire, connection, "alice", 10**9, several, request="r") is SaleCode.UNKNOWN_PACK
    assert orders.inquire(connection, "alice", 10**9, several, request="r", pack="b").pack == "b"


def test_an_account_that_is_closed_asks_for_nothing(connection: Connection[Any], database: str) -> None:
    execute(database, "UPDATE accounts SET status = 'closed' WHERE account = 'bob'")
    assert refusal(ask, connection, account="bob") is SaleCode.ACCOUNT_CLOSED
    given = {"expires_at": FAR, "actor": "zoe"}
    assert refusal(orders.new_quote, connection, "bob", 10**9, PRICE, CATALOG, **given) is SaleCode.ACCOUNT_CLOSED
    execute(database, "UPDATE accounts SET status = 'open' WHERE account = 'bob'")


def test_an_account_has_so_many_inquiries_open_and_no_more(connection: Connection[Any]) -> None:
    for number in range(orders.MAX_OPEN):
        ask(connection, request=f"r-{number}")
    assert refusal(ask, connection, request="one more") is SaleCode.LIMIT_REACHED
    assert ask(connection, request="r-3").status == "inquiry", "those that are there are answered as before"
    assert ask(connection, account="bob").status == "inquiry"
    orders.withdraw(connection, orders.inquiry_id("alice", "r-0"), actor="zoe")
    assert ask(connection, request="one more").status == "inquiry"


def test_a_quote_that_makes_no_sense_is_refused_and_changes_nothing(connection: Connection[Any]) -> None:
    made = ask(connection)
    wrong: list[dict[str, Any]] = [
        {"credits_micro": 0},
        {"credits_micro": -MILLION},
        {"credits_micro": 10**18 + 1},
        {"price": Money(0, "EUR")},
        {"price": Money(9900, "USD")},
        {"price": Money(10**13, "EUR")},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
        {"expires_at": datetime(9999, 1, 1, tzinfo=UTC)},
        {"actor": ""},
        {"actor": "a" * 501},
        {"actor": "a\nb"},
    ]
    for terms in wrong:
        given = {"price": PRICE, "catalog": CATALOG, "expires_at": FAR, "actor": "zoe", **terms}
        assert refusal(orders.quote, connection, made.id, **given) is SaleCode.INVALID, terms
        new = {"credits_micro": 700 * MILLION, **given}
        assert refusal(orders.new_quote, connection, "alice", **new) is SaleCode.INVALID, terms
    assert orders.orders_of(connection, "alice") == [made]


def test_what_was_quoted_is_never_changed_but_quoted_anew(connection: Connection[Any]) -> None:
    first = quoted(connection, credits_micro=650 * MILLION)
    assert first.credits == "650"
    terms: dict[str, Any] = {"expires_at": FAR, "actor": "zoe"}
    cheaper = Money(100, "EUR")
    assert refusal(orders.quote, connection, first.id, cheaper, CATALOG, **terms) is SaleCode.ALREADY_QUOTED
    assert orders.order(connection, first.id) == first
    gone = orders.withdraw(connection, first.id, actor="yves")
    assert (gone.status, gone.actor, gone.price) == ("cancelled", "yves", "99.00 EUR")
    assert refusal(orders.quote, connection, first.id, cheaper, CATALOG, **terms) is SaleCode.QUOTE_OVER
    assert refusal(orders.withdraw, connection, first.id, actor="zoe") is SaleCode.QUOTE_OVER
    second = orders.new_quote(connection, "alice", 650 * MILLION, cheaper, CATALOG, **terms)
    assert (second.status, second.credits, second.price, second.asked) == ("quoted", "650", "1.00 EUR", None)
    assert second.id != first.id


def test_a_quote_is_over_with_its_time(connection: Connection[Any], database: str) -> None:
    made = quoted(connection, expires_at=datetime.now(UTC) + timedelta(days=1))
    assert not made.is_over
    travel(database, timedelta(days=2))
    late = orders.order(connection, made.id)
    assert late is not None
    assert (late.status, late.is_over) == ("quoted", True)
    paid = pay(connection, made.id)
    assert (paid.status, paid.is_over) == ("paid", False), "money that came late buys what was quoted"


def test_what_was_paid_or_is_not_there_is_past_all_changes(connection: Connection[Any]) -> None:
    assert pay(connection, ask(connection, request="never").id).status == "inquiry"
    made = quoted(connection)
    pay(connection, made.id)
    terms: dict[str, Any] = {"expires_at": FAR, "actor": "zoe"}
    assert refusal(orders.quote, connection, made.id, PRICE, CATALOG, **terms) is SaleCode.QUOTE_OVER
    assert refusal(orders.withdraw, connection, made.id, actor="zoe") is SaleCode.QUOTE_OVER
    assert refusal(orders.quote, connection, "order.none", PRICE, CATALOG, **terms) is SaleCode.UNKNOWN_QUOTE
    assert refusal(orders.withdraw, connection, "order.none", actor="zoe") is SaleCode.UNKNOWN_QUOTE


def test_a_pack_is_ordered_at_its_price_once_for_each_request(connection: Connection[Any]) -> None:
    made = orders.place(connection, "alice", "pro", CATALOG, request="cart-1")
    assert (made.status, made.pack, made.credits, made.price) == ("quoted", "pro", "85", "14.99 EUR")
    assert made.id.isascii()
    assert made.id.isalnum()
    assert len(made.id) <= 20  # what fits the text of a transfer
    assert orders.place(connection, "alice", "pro", CATALOG, request="cart-1") == made
    assert orders.place(connection, "bob", "pro", CATALOG, request="cart-1").id != made.id
    assert orders.open_orders(connection) == []  # nobody has to quote it
    assert refusal(orders.place, connection, "alice", "decouverte", CATALOG, request="cart-1") == SaleCode.ID_CONFLICT
    assert pay(connection, made.id).paid_by == "stripe:cs_1"


def test_what_is_no_order_is_refused(connection: Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(orders.place, connection, "nobody", "pro", CATALOG, request="r") == SaleCode.UNKNOWN_ACCOUNT
    assert refusal(orders.place, connection, "alice", "nonesuch", CATALOG, request="r") == SaleCode.UNKNOWN_PACK
    assert refusal(orders.place, connection, "alice", "sur_mesure", CATALOG, request="r") == SaleCode.NO_PRICE
    monkeypatch.setattr(orders, "MAX_PLACED", 1)
    orders.place(connection, "alice", "pro", CATALOG, request="1")
    assert refusal(orders.place, connection, "alice", "pro", CATALOG, request="2") == SaleCode.LIMIT_REACHED
