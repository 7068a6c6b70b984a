"""Stripe's API, against the fake over real HTTP: whole objects, whole lists, and errors that hold no secret."""

from __future__ import annotations

import logging
import pickle
import random
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from stripe import HTTPClient

from models.rules.facts import PackPaid
from models.settings import Settings
from scripts.embedded import free_port
from scripts.fake_stripe import KEY, Clock, FakeStripe
from tests.receivers import Receiver
from tests.workers.providers.making import event_of, parked
from workers import stripe_api
from workers.providers.base import ParkedError
from workers.providers.stripe import Stripe
from workers.stripe_api import (
    LimitError,
    MissingError,
    StripeApi,
    StripeRefusedError,
    UnavailableError,
    make_stripe_api,
)

START = datetime(2031, 1, 1, 12, tzinfo=UTC)
CHECKOUT = {
    "mode": "payment",
    "line_items": [{"price": "price_pack", "quantity": 2}],
    "success_url": "https://shop.example/thanks",
    "client_reference_id": "ann",
    "metadata": {"creditlane_account": "ann"},
}


@pytest.fixture
def clock() -> Clock:
    """The time at Stripe."""
    return Clock(START)


@pytest.fixture
def fake(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStripe]:
    """Stripe, with lists in pages of two; what is sent again is sent at once."""
    monkeypatch.setattr(HTTPClient, "INITIAL_DELAY", 0.0)
    monkeypatch.setattr(HTTPClient, "MAX_DELAY", 0.0)
    with FakeStripe(clock, random.Random(7), page=2) as fake:
        fake.add_price("price_pack", 1500)
        for number in range(5):
            fake.add_price(f"price_{number}", 100 + number)
        fake.add_price("price_month", 1000, interval="month")
        fake.add_price("price_seat", 300, interval="month")
        fake.add_price("price_extra", 200, interval="month")
        yield fake


@pytest.fixture
def api(fake: FakeStripe) -> StripeApi:
    """Its client."""
    return StripeApi(KEY, False, fake.url)


def sold(fake: FakeStripe) -> dict[str, Any]:
    """A pack that was paid."""
    session = fake.open_session([("price_pack", 1)], mode="payment", client_reference_id="ann")
    return fake.complete(session["id"])


def subscribed(fake: FakeStripe, *prices: str) -> str:
    """A subscription, paid for its first period."""
    session = fake.open_session([(price, 1) for price in prices or ("price_month",)], mode="subscription")
    id: str = fake.complete(session["id"])["subscription"]
    return id


def is_plain(value: Any) -> bool:
    """Whether a value is nothing but JSON's own types, exactly."""
    if type(value) is dict:
        return all(type(key) is str and is_plain(each) for key, each in value.items())
    if type(value) is list:
        return all(is_plain(each) for each in value)
    return value is None or type(value) in (str, int, bool, float)


def ids(objects: Any) -> list[str]:
    """Of a list that comes from the API."""
    return [each["id"] for each in objects]


def test_objects_come_whole_whatever_the_pages(fake: FakeStripe, api: StripeApi) -> None:
    session = fake.open_session([(f"price_{number}", 1) for number in range(5)], mode="payment")
    fake.complete(session["id"])
    subscription = subscribed(fake, "price_month", "price_seat", "price_extra")
    invoice = fake.find("subscription", subscription)["latest_invoice"]
    dispute = fake.dispute(session["id"])
    refund = fake.refund(invoice, 200)
    others = [fake.attach_payment(invoice, f"pi_{number}")["id"] for number in range(4)]
    for kind, id, lists in (
        ("checkout.session", session["id"], ("line_items",)),
        ("subscription", subscription, ("items",)),
        ("invoice", invoice, ("lines", "payments")),
        ("refund", refund["id"], ()),
        ("dispute", dispute["id"], ()),
        ("payment_intent", refund["payment_intent"], ()),
    ):
        before = len(fake.requests)
        fetched = api.fetch(kind, id)
        assert fetched == fake.fetch(kind, id)
        assert is_plain(fetched)
        pages = [-(-len(fetched[name]["data"]) // 2) for name in lists]
        assert len(fake.requests) - before == 1 + sum(pages) - len(pages)  # the first ones come with the object
    assert [line["price"]["id"] for line in api.fetch("checkout.session", session["id"])["line_items"]["data"]] == [
        f"price_{number}" for number in range(5)
    ]
    *attached, first = api.fetch("invoice", invoice)["payments"]["data"]
    assert (ids(attached), first["payment"]["payment_intent"]) == (others[::-1], refund["payment_intent"])


def test_a_list_within_an_object_is_read_up_to_a_length(
    fake: FakeStripe, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = fake.open_session([(f"price_{number}", 1) for number in range(5)], mode="payment")
    monkeypatch.setattr(stripe_api, "MAX_PAGES", 2)
    assert len(api.fetch("checkout.session", session["id"])["line_items"]["data"]) == 5
    monkeypatch.setattr(stripe_api, "MAX_PAGES", 1)
    with pytest.raises(ParkedError) as error:
        api.fetch("checkout.session", session["id"])
    assert error.value.parked.code == "truncated"


def test_adapters_take_it(fake: FakeStripe, api: StripeApi, clock: Clock) -> None:
    session = sold(fake)
    event = next(event for event in fake.events if event["type"] == "checkout.session.completed")
    adapter = Stripe([fake.secret], livemode=False)
    (fact,) = adapter.normalise(adapter.verify(*fake.signed(event), clock()), api.fetch)  # type: ignore[misc]
    assert isinstance(fact, PackPaid)
    assert (fact.key, fact.account, fact.lines[0].price) == (session["id"], "ann", "price_pack")


def test_what_stripe_does_not_have_parks_the_event(api: StripeApi) -> None:
    with pytest.raises(MissingError) as error:
        api.fetch("refund", "re_none")
    assert (error.value.parked.code, error.value.__context__) == ("missing", None)
    event = event_of("refund.created", {"id": "re_none", "object": "refund", "amount": 1, "currency": "eur"})
    assert parked(Stripe(["whsec_x"], livemode=False), event, api.fetch) == "missing"


def test_errors_of_stripe_are_asked_again(fake: FakeStripe, api: StripeApi) -> None:
    id = sold(fake)["id"]
    fake.fail(2)
    assert api.fetch("checkout.session", id)["id"] == id
    fake.fail(3, 503)
    with pytest.raises(UnavailableError) as error:
        api.fetch("checkout.session", id)
    assert error.value.code == "api_error"
    assert api.fetch("checkout.session", id)["id"] == id  # all three were used up


@pytest.mark.parametrize("status", [409, 429])
def test_locks_and_limits_are_no_refusals(fake: FakeStripe, api: StripeApi, status: int) -> None:
    fake.fail(3, status)
    with pytest.raises(UnavailableError):
        list(api.refunds(START))


def test_a_checkout_whose_answer_was_lost_is_opened_once(fake: FakeStripe, api: StripeApi) -> None:
    fake.fail(1, 502, done=True)
    session = api.create_checkout(CHECKOUT, "checkout-1")
    assert is_plain(session)
    assert session == api.create_checkout(CHECKOUT, "checkout-1")
    assert ids(fake.all_of("checkout.session")) == [session["id"]]
    assert {request.idempotency_key for request in fake.requests} == {"checkout-1"}
    assert api.create_checkout(CHECKOUT, "checkout-2")["id"] != session["id"]


def test_what_is_made_is_what_was_asked_for(fake: FakeStripe, api: StripeApi) -> None:
    customer = api.create_customer({"email": "ann@example.org", "metadata": {"creditlane_account": "ann"}}, "customer")
    session = api.create_checkout(CHECKOUT | {"customer": customer["id"]}, "checkout")
    assert (session["amount_total"], session["client_reference_id"], session["metadata"]) == (
        3000, "ann", {"creditlane_account": "ann"},
    )  # fmt: skip
    portal = api.create_portal(customer["id"], "https://shop.example/", "portal")
    assert (portal["customer"], portal["return_url"]) == (customer["id"], "https://shop.example/")
    assert [(request.path, request.idempotency_key) for request in fake.requests] == [
        ("/v1/customers", "customer"), ("/v1/checkout/sessions", "checkout"), ("/v1/billing_portal/sessions", "portal"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"line_items": [{"price": "price_none", "quantity": 1}]}, "resource_missing"),
        ({"payment_intent_data": {"metadatas": {"a": "b"}}}, "parameter_unknown"),
        ({"expires_at": 1}, "invalid_request_error"),
        ({"metadata": {"other": "parameters"}}, "idempotency_error"),
    ],
)
def test_refusals_keep_the_code_of_stripe(fake: FakeStripe, api: StripeApi, change: dict[str, Any], code: str) -> None:
    if code == "idempotency_error":
        api.create_checkout(CHECKOUT, "once")
    with pytest.raises(StripeRefusedError) as error:
        api.create_checkout(CHECKOUT | change, "once")
    assert error.value.code == code


def test_an_answer_of_the_other_mode_is_refused(fake: FakeStripe) -> None:
    id = sold(fake)["id"]
    with pytest.raises(StripeRefusedError) as error:
        StripeApi(KEY, True, fake.url).fetch("checkout.session", id)
    assert error.value.code == "other_mode"


def test_the_settings_say_which_api(fake: FakeStripe) -> None:
    def config(**given: Any) -> Settings:
        return Settings(broker_url="redis://127.0.0.1/0", database_url="postgresql://127.0.0.1/x", **given)

    assert make_stripe_api(config()) is None
    api = make_stripe_api(config(stripe_api_key=KEY, payments_livemode=False, stripe_api_base=fake.url))
    assert api is not None
    assert api.fetch("checkout.session", sold(fake)["id"])["livemode"] is False


@contextmanager
def out_of_reach(way: str, fake: FakeStripe) -> Iterator[StripeApi]:
    """A client that gets no answer of use."""
    if way == "silent":
        with fake.stalled():
            yield StripeApi(KEY, False, fake.url, timeout_seconds=(3, 0.05))
    elif way == "nobody":
        yield StripeApi(KEY, False, f"http://127.0.0.1:{free_port()}")
    elif way == "stranger":
        with closing(Receiver()) as receiver:
            yield StripeApi(KEY, False, receiver.url.partition("/hook")[0])
    else:
        fake.key = "sk_test_another"
        yield StripeApi(KEY, False, fake.url)


@pytest.mark.parametrize(
    ("way", "code"), [("silent", "unreachable"), ("nobody", "unreachable"), ("stranger", "http_501"),
                      ("key", "invalid_request_error")]
)  # fmt: skip
def test_out_of_reach_and_no_secret_in_what_is_told(
    way: str, code: str, fake: FakeStripe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with out_of_reach(way, fake) as api, pytest.raises(UnavailableError) as error:
        api.fetch("checkout.session", "cs_1")
    told = error.value
    assert told.code == code
    assert (told.__context__, told.__cause__) == (None, None)
    again = pickle.loads(pickle.dumps(told))
    assert (type(again), again.code, str(again)) == (UnavailableError, code, told.sentence)
    shown = traceback.TracebackException.from_exception(told, capture_locals=True)
    everything = "".join(shown.format()) + repr(told) + repr(api) + caplog.text
    assert told.sentence in everything
    assert KEY not in everything


def test_a_refusal_that_is_not_stripes_is_none(receiver: Receiver) -> None:
    receiver.status = 404
    with pytest.raises(UnavailableError) as error:
        StripeApi(KEY, False, receiver.url.partition("/hook")[0]).create_customer({"email": "ann@example.org"}, "once")
    assert error.value.code == "http_404"


def test_bodies_are_not_logged(fake: FakeStripe, api: StripeApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    api.create_customer({"email": "ann@example.org"}, "once")
    assert "ann@example.org" not in caplog.text


def test_undelivered_events(fake: FakeStripe, api: StripeApi, clock: Clock, receiver: Receiver) -> None:
    sold(fake)
    clock.move(days=1)
    sold(fake)
    lost = {"checkout.session.completed"}
    fake.deliver(receiver.url, lose=lambda event: event["type"] in lost)
    found = list(api.undelivered_events(START))
    assert [event["type"] for event in found] == [*lost] * 2
    assert is_plain(found)
    assert len(list(api.undelivered_events(START + timedelta(seconds=1)))) == 1


def test_lists_to_reconcile_by(fake: FakeStripe, api: StripeApi, clock: Clock) -> None:
    early = [sold(fake)["id"] for _ in range(3)]
    fake.open_session([("price_pack", 1)], mode="payment")
    debit = fake.complete(fake.open_session([("price_pack", 1)], mode="payment")["id"], "pending")["id"]
    assert ids(api.paid_sessions(START)) == early[::-1]
    subscription, ended = subscribed(fake), subscribed(fake)
    fake.cancel(ended)
    refunds = [fake.refund(id, 100)["id"] for id in early]
    dispute = fake.dispute(early[0])["id"]
    assert ids(api.subscriptions(START)) == [ended, subscription]

    # What was made before may be paid, or change, after that time.
    clock.move(days=stripe_api.SESSION_DAYS)
    fake.settle(debit)
    assert debit in ids(api.paid_sessions(clock()))
    assert ids(api.refunds(clock())) == refunds[::-1]
    clock.move(days=10)
    assert ids(api.paid_sessions(clock())) == []
    fake.renew(subscription, "failed")
    first, failed = ids(api.invoices_of(subscription))[::-1]
    assert failed not in ids(api.paid_invoices(START))
    assert first in ids(api.paid_invoices(START))
    assert ids(api.paid_invoices(START + timedelta(seconds=1))) == []
    clock.move(days=stripe_api.INVOICE_DAYS)
    fake.pay(failed)
    assert ids(api.paid_invoices(clock())) == [failed]
    assert ids(api.refunds(clock())) == []
    assert ids(api.disputes(clock())) == [dispute]
    clock.move(days=stripe_api.DISPUTE_DAYS)
    assert ids(api.disputes(clock())) == []

    late = subscribed(fake)
    assert ids(api.subscriptions(clock())) == [late]
    assert ids(api.live_subscriptions()) == [late, subscription]


def test_a_list_to_reconcile_by_is_read_up_to_a_length(
    fake: FakeStripe, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [sold(fake)["id"] for _ in range(4)]
    monkeypatch.setattr(stripe_api, "MAX_LISTED_PAGES", 2)
    assert ids(api.paid_sessions(START)) == made[::-1]
    sold(fake)
    found = api.paid_sessions(START)
    with pytest.raises(LimitError):
        list(found)
