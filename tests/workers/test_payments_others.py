"""Payments of PayPal, Creem and SePay from the inbox to the ledger: their events, as made up, and what they lead to."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg
import pytest

from models.catalog import parse_catalog
from models.orders import place
from models.payment_inbox import store
from tests.lives import Applying, refused
from tests.support import Ledger, rows, value
from tests.workers.providers.making import made
from tests.workers.providers.test_paypal import paypal
from workers.outbox import Outbox
from workers.payments import Done, Processor
from workers.providers.base import Adapter
from workers.providers.creem import Creem
from workers.providers.sepay import SePay

CATALOG = parse_catalog("""
[catalog]
name = "shop"
currency = "VND"
[features.image]
price = "1"
[packs.small]
credits = "25"
price = "500000 VND"
prices = ["prod_made_1"]
[packs.s]
credits = "10"
price = "100000 VND"
prices = ["pack_s"]
[packs.t]
credits = "5"
price = "90000 VND"
prices = ["pack_t"]
[plans.basic]
monthly_credits = "100"
price = "200000 VND"
prices = ["prod_plan", "P-MADE1"]
grace_days = 6
""", "shop.toml")  # fmt: skip

SECRET = "x" * 20


def at(days: float) -> str:
    """An instant so many days from now, as the providers write one."""
    return (datetime.now(UTC) + timedelta(days=days)).isoformat()


BEFORE, NOW = (at(-41), at(-11)), (at(-11), at(19))
"""The last month that was paid for, and the one under way."""


class Shop:
    """The worker's side of other providers: their events go into the inbox and to the ledger, in this process."""

    def __init__(self, connection: psycopg.Connection[Any], ledger: Ledger, database: str) -> None:
        self.connection = connection
        self.database = database
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        """What PayPal's API has, by kind and id."""
        self._adapters: dict[str, Adapter] = {
            "paypal": paypal(), "creem": Creem([SECRET], livemode=True), "sepay": SePay([SECRET], livemode=True),
        }  # fmt: skip
        self._processor = Processor(
            connection,
            self._adapters,
            {"paypal": lambda kind, id: self.objects.get((kind, id))},
            CATALOG,
            cast("Outbox", Applying(ledger, database)),
        )
        self._numbers = itertools.count(1)

    def tell(self, provider: str, event: dict[str, Any], **changes: Any) -> Done:
        """Take an event, and apply it; each is another one."""
        raw = json.dumps({**event, "id": f"event_{next(self._numbers)}", **changes}).encode()
        return self._processor.apply(store(self.connection, self._adapters[provider].read(raw), raw, "webhook").id)

    def became(self, kind: str) -> list[tuple[str, str | None]]:
        """What became of facts of a kind."""
        return rows(self.database, "SELECT status, code FROM payment_facts WHERE kind = %s ORDER BY key", kind)

    def has(self, account: str) -> tuple[int, int]:
        """Credits at hand, and those that are owed."""
        (found,) = rows(self.database, "SELECT available_micro, debt_micro FROM accounts WHERE account = %s", account)
        return found[0] // 1_000_000, found[1] // 1_000_000

    def frozen(self) -> list[tuple[str, bool]]:
        """Whether the purchases are frozen that were returned or disputed, and whose they are."""
        return rows(self.database, "SELECT account, is_frozen FROM purchases ORDER BY account")

    def plan(self) -> list[tuple[Any, ...]]:
        """The plans that there are."""
        return rows(self.database, "SELECT account, plan, status, cancels FROM subscriptions ORDER BY account")


@pytest.fixture
def shop(database: str, ledger: Ledger) -> Iterator[Shop]:
    """A shop with two customers."""
    ledger.catalog = CATALOG
    ledger.writer.catalog = lambda: CATALOG
    for account in ("ann", "bob"):
        ledger.apply("credits.open", f"open-{account}", account=account)
    with psycopg.connect(database, autocommit=True) as connection:
        yield Shop(connection, ledger, database)


# --- Creem -------------------------------------------------------------------------------------------


def creem_paid(
    number: int, period: tuple[str, str], subscription: str = "sub_made_1", **changes: Any
) -> dict[str, Any]:
    """A paid month."""
    event = made("creem_paid")
    told = event["object"]
    told["product"]["id"] = "prod_plan"
    told["id"] = subscription
    told["last_transaction_id"] = f"tran_{number}"
    told["last_transaction"] = {"id": f"tran_{number}", "amount": 1000, "amount_paid": 1210, "currency": "EUR",
                                "status": "paid", "order": "ord_sub", "subscription": subscription}  # fmt: skip
    told["current_period_start_date"], told["current_period_end_date"] = period
    told.update(changes)
    return event


def creem_refund(number: int, amount: int = 1210) -> dict[str, Any]:
    """A month back; its order and its checkout are the subscription's."""
    event = made("creem_refund")
    told = event["object"]
    told["refund_amount"] = amount
    told["transaction"].update(id=f"tran_{number}", order="ord_sub")
    told["order"]["id"], told["checkout"]["id"] = "ord_sub", "ch_sub"
    return event


def creem_subscribed() -> dict[str, Any]:
    """The checkout of a subscription."""
    event = made("creem_checkout")
    told = event["object"]
    told.update(id="ch_sub", subscription="sub_made_1")
    told["order"].update(id="ord_sub", type="recurring", transaction="tran_1", product="prod_plan")
    return event


def test_a_pack_of_creem_is_given_and_taken_back(shop: Shop) -> None:
    for event in ("creem_refund", "creem_checkout", "creem_checkout"):
        shop.tell("creem", made(event))
    assert shop.has("ann") == (12, 0)
    shop.tell("creem", made("creem_dispute"))
    assert shop.has("ann") == (0, 0)


def test_a_refund_of_a_renewal_of_creem_takes_that_renewal_back(shop: Shop, database: str) -> None:
    shop.tell("creem", creem_subscribed())
    shop.tell("creem", creem_paid(1, BEFORE))
    shop.tell("creem", creem_refund(2, 605))
    assert shop.became("RefundChanged") == [("waiting", "no_purchase")]
    shop.tell("creem", creem_paid(2, NOW))
    assert shop.became("RefundChanged") == [("applied", None)]
    assert shop.has("ann") == (50, 0)
    assert not refused(database)


def test_a_subscription_of_creem_that_is_to_end_and_goes_on(shop: Shop, database: str) -> None:
    paid = creem_paid(1, NOW)
    shop.tell("creem", paid)
    shop.tell("creem", creem_paid(1, NOW, status="scheduled_cancel"), eventType="subscription.scheduled_cancel")
    assert shop.plan() == [("ann", "basic", "active", True)]
    shop.tell("creem", paid, eventType="subscription.active", created_at=1790000000124)
    assert shop.plan() == [("ann", "basic", "active", False)]
    assert not refused(database)


def test_a_subscription_too_many_ends_and_leaves_the_other_alone(shop: Shop) -> None:
    shop.tell("creem", creem_paid(1, NOW))
    shop.tell("creem", creem_paid(2, NOW, "sub_made_2"))  # paid for twice: the ledger gives a month once
    refund = creem_refund(2)
    refund["object"].update(order=None, checkout=None)
    shop.tell("creem", refund)
    shop.tell("creem", creem_paid(2, NOW, "sub_made_2", status="canceled"), eventType="subscription.canceled")
    assert shop.became("SubscriptionChanged") == [("noted", "other_subscription")]
    assert shop.has("ann") == (100, 0)
    assert shop.plan() == [("ann", "basic", "active", False)]


def test_a_subscription_that_is_given_away_pays_for_another_account(shop: Shop, database: str) -> None:
    shop.tell("creem", creem_paid(1, BEFORE))
    shop.tell("creem", creem_paid(2, NOW, metadata={"creditlane_account": "bob"}))
    assert shop.has("bob") == (100, 0)
    assert not refused(database)


# --- PayPal ------------------------------------------------------------------------------------------


def captured(shop: Shop, capture: str, account: str, order: str | None = None) -> None:
    """A pack that was paid by PayPal, and the order that it paid."""
    event = made("paypal_capture")
    told = event["resource"]
    told.update(id=capture, custom_id=account, links=[])
    told["supplementary_data"]["related_ids"]["order_id"] = order or f"ORD{capture}"
    if order is None:
        bought = made("paypal_order", id=f"ORD{capture}")
        (unit,) = bought["purchase_units"]
        unit["payments"]["captures"][0]["id"] = capture
        shop.objects["order", bought["id"]] = bought
    shop.tell("paypal", event)


def paypal_refund(capture: str) -> dict[str, Any]:
    """All of a capture back."""
    event = made("paypal_refund")
    event["resource"] = {"id": f"R{capture}", "status": "COMPLETED", "capture_id": capture,
                         "amount": {"currency_code": "EUR", "value": "14.99"}}  # fmt: skip
    return event


def test_a_dispute_of_two_payments_of_paypal_takes_nothing_from_either_wrongly(shop: Shop) -> None:
    captured(shop, "CAPA", "ann")
    captured(shop, "CAPB", "bob")
    dispute = made("paypal_dispute")
    dispute["resource"]["disputed_transactions"] = [{"seller_transaction_id": each} for each in ("CAPA", "CAPB")]
    shop.tell("paypal", dispute)
    assert shop.frozen() == [("ann", True), ("bob", True)]
    shop.tell("paypal", paypal_refund("CAPB"))
    dispute["resource"]["status"] = "RESOLVED"
    shop.tell("paypal", dispute, event_type="CUSTOMER.DISPUTE.RESOLVED")
    assert shop.frozen() == [("ann", False), ("bob", False)]
    assert [shop.has(account) for account in ("ann", "bob")] == [(25, 0), (0, 0)]
    captured(shop, "CAPC", "bob")
    assert shop.has("bob") == (25, 0)


def test_an_order_of_paypal_for_two_accounts_gives_to_each(shop: Shop) -> None:
    order = made("paypal_order")
    (unit,) = order["purchase_units"]
    order["purchase_units"].append(copy.deepcopy(unit))
    for each, capture in zip(order["purchase_units"], ("CAPA", "CAPB"), strict=True):
        each["payments"]["captures"][0]["id"] = capture
    shop.objects["order", "ORD1MADE"] = order
    captured(shop, "CAPA", "ann", "ORD1MADE")
    captured(shop, "CAPB", "bob", "ORD1MADE")
    shop.tell("paypal", paypal_refund("CAPB"))
    assert [shop.has(account) for account in ("ann", "bob")] == [(25, 0), (0, 0)]


@pytest.mark.parametrize("first", ["sale", "subscription"])
def test_a_subscription_of_paypal_is_given_month_by_month(shop: Shop, database: str, first: str) -> None:
    subscription = made("paypal_sale", event_type="BILLING.SUBSCRIPTION.ACTIVATED", create_time=at(-32))
    subscription["resource"] = made("paypal_subscription")

    def sale(number: int, days: float) -> dict[str, Any]:
        event = made("paypal_sale", create_time=at(days))
        event["resource"]["id"] = f"SALE{number}"
        return event

    events = [subscription, sale(1, -32)]
    for event in events if first == "subscription" else reversed(events):
        shop.tell("paypal", event)
    shop.tell("paypal", sale(2, -1))
    assert value(database, "SELECT sum(granted_micro) FROM grants") == 200_000_000
    over = made("paypal_sale", event_type="BILLING.SUBSCRIPTION.CANCELLED", create_time=at(-0.5))
    over["resource"] = made("paypal_subscription", status="CANCELLED")
    shop.tell("paypal", over)
    assert shop.plan() == [("ann", "basic", "active", True)]
    back = sale(2, -0.4) | {"event_type": "PAYMENT.SALE.REFUNDED"}
    back["resource"] = {"id": "R1", "sale_id": "SALE2", "state": "completed",
                        "amount": {"total": "-9.99", "currency": "EUR"}}  # fmt: skip
    shop.tell("paypal", back)
    assert shop.plan() == [("ann", "basic", "ended", False)]
    assert shop.has("ann")[1] == 0
    assert not refused(database)


# --- SePay -------------------------------------------------------------------------------------------


def test_a_transfer_of_sepay_pays_for_the_order_that_it_names(shop: Shop, database: str) -> None:
    order = place(shop.connection, "bob", "small", CATALOG, request="r-1").id
    transfer = made("sepay_transfer", code=order)
    raw = json.dumps(transfer).encode()
    shop.tell("sepay", transfer | {"transferAmount": 499_999}, id=92_000)
    assert shop.became("PackPaid") == [("parked", "other_amount")]
    for _ in range(2):
        shop.tell("sepay", json.loads(raw), id=92_001)
    assert shop.has("bob") == (25, 0)
    assert value(database, "SELECT paid_by FROM payment_orders WHERE id = %s", order) == "sepay:92001"
