"""The fake Stripe: its acts make what the adapter reads, its API answers as Stripe does, its webhooks go as told."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from stripe import AuthenticationError, StripeClient

from models.rules.facts import (
    DisputeChanged,
    Fact,
    PackPaid,
    PaymentFailed,
    PeriodPaid,
    RefundChanged,
    SubscriptionChanged,
)
from scripts.fake_stripe import KEY, Clock, Delivered, FakeStripe, RefusedError
from scripts.fake_stripe.merchant import stepped
from tests.workers.providers.making import at, recorded
from workers.providers.base import Parked, no_fetch
from workers.providers.stripe import Stripe

START = datetime(2031, 1, 31, 12, tzinfo=UTC)
URL = "http://receiver.example/webhooks/stripe"


class Sink:
    """A receiver of webhooks that answers as it is told."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []

    def __call__(self, url: str, body: bytes, headers: Mapping[str, str]) -> int | None:
        assert url == URL
        self.bodies.append(body)
        self.headers.append(headers)
        return self.status


@pytest.fixture
def clock() -> Clock:
    """The time at Stripe."""
    return Clock(START)


@pytest.fixture
def sink() -> Sink:
    """Who gets the webhooks."""
    return Sink()


@pytest.fixture
def fake(clock: Clock, sink: Sink) -> FakeStripe:
    """Stripe, with something to sell; not served."""
    return made(clock, sink)


def made(clock: Clock, sink: Sink, **knobs: Any) -> FakeStripe:
    fake = FakeStripe(clock, random.Random(3), send=sink, **knobs)
    fake.add_price("pack", 1500)
    fake.add_price("month", 3000, interval="month")
    fake.add_price("year", 30000, interval="year")
    fake.add_price("better", 6000, interval="month")
    fake.add_coupon("free", 100)
    fake.add_coupon("half", 50)
    return fake


def types(fake: FakeStripe, after: int = 0) -> list[str]:
    """The types of the events from a place on."""
    return [event["type"] for event in fake.events[after:]]


def facts(fake: FakeStripe, kind: type[Any] = Fact, *, fetched: bool = True, after: int = 0) -> list[Any]:
    """The facts of a kind that the adapter makes of the events from a place on; none of them may be parked."""
    adapter = Stripe([fake.secret], livemode=False)
    found: list[Fact] = []
    for event in fake.events[after:]:
        read = adapter.verify(*fake.signed(event), at(fake.now()))
        normalised = adapter.normalise(read, fake.fetch if fetched else no_fetch)
        assert not isinstance(normalised, Parked), (event["type"], normalised)
        found += normalised
    return [fact for fact in found if isinstance(fact, kind)]


def buy(fake: FakeStripe, outcome: Any = "succeeded", **given: Any) -> dict[str, Any]:
    """Go through a checkout of two packs."""
    session = fake.open_session([("pack", 2)], mode="payment", client_reference_id="ann", **given)
    return fake.complete(session["id"], outcome)


def subscribe(fake: FakeStripe, price: str = "month", **given: Any) -> str:
    """Go through a checkout of a subscription."""
    id: str = fake.complete(fake.open_session([(price, 1)], mode="subscription", **given)["id"])["subscription"]
    return id


def test_a_pack_is_paid(fake: FakeStripe) -> None:
    session = buy(fake)
    assert types(fake) == [
        "payment_intent.created", "charge.succeeded", "payment_intent.succeeded", "checkout.session.completed",
    ]  # fmt: skip
    (fact,) = facts(fake, PackPaid)
    assert (fact.key, fact.account, fact.paid_minor, fact.lines[0].quantity) == (session["id"], "ann", 3000, 2)


def test_a_pack_is_paid_later_or_not_at_all(fake: FakeStripe) -> None:
    paid, failed = buy(fake, "pending"), buy(fake, "pending")
    assert facts(fake, PackPaid) == []
    fake.settle(paid["id"])
    fake.settle(failed["id"], "failed")
    assert {fact.key for fact in facts(fake, PackPaid)} == {paid["id"]}
    assert [fact.key for fact in facts(fake, PaymentFailed)] == [failed["id"]]
    told = [event["data"]["object"]["payment_status"] for event in fake.events if "checkout" in event["type"]]
    assert told == ["unpaid", "unpaid", "paid", "unpaid"]  # each as it was then


def test_a_subscription_is_paid_later(fake: FakeStripe) -> None:
    session = fake.open_session([("month", 1)], mode="subscription")["id"]
    assert fake.complete(session, "pending")["payment_status"] == "unpaid"
    assert facts(fake, PeriodPaid) == []
    assert fake.settle(session)["payment_status"] == "paid"
    assert len(facts(fake, PeriodPaid)) == 1
    assert types(fake)[-1] == "checkout.session.async_payment_succeeded"


def test_a_card_that_is_declined_leaves_the_checkout_open(fake: FakeStripe) -> None:
    session = fake.open_session([("pack", 1)], mode="payment")["id"]
    assert fake.complete(session, "failed")["status"] == "open"
    assert types(fake)[-1] == "payment_intent.payment_failed"
    fake.complete(session)
    assert len(facts(fake, PackPaid)) == 1
    expired = fake.open_session([("pack", 1)], mode="payment")["id"]
    with pytest.raises(ValueError, match="declined"):
        fake.complete(expired, "declined")  # type: ignore[arg-type]
    fake.expire(expired)
    with pytest.raises(RefusedError):
        fake.complete(expired)


def test_coupons(fake: FakeStripe) -> None:
    free, half = buy(fake, coupon="free"), buy(fake, coupon="half")
    assert (free["payment_intent"], free["payment_status"]) == (None, "no_payment_required")
    assert [fact.paid_minor for fact in facts(fake, PackPaid)] == [0, 1500]
    assert fake.charge_of(half["id"])["amount"] == 1500
    subscription = subscribe(fake, coupon="half")
    fake.renew(subscription)
    assert [fact.paid_minor for fact in facts(fake, PeriodPaid)] == [1500, 3000]


def test_a_pack_with_an_invoice_is_no_period(fake: FakeStripe) -> None:
    session = buy(fake, invoice_creation=True)
    assert {"invoice.paid", "invoice_payment.paid"} <= set(types(fake))
    assert fake.find("invoice", session["invoice"])["billing_reason"] == "manual"
    assert facts(fake, PeriodPaid) == []
    assert len(facts(fake, PackPaid)) == 1
    assert fake.charge_of(session["invoice"]) == fake.charge_of(session["id"])


def test_months_are_played(fake: FakeStripe, clock: Clock) -> None:
    subscription = subscribe(fake, subscription_data={"metadata": {"creditlane_account": "ann"}})
    for _ in range(2):
        clock.at = at(fake.within(subscription, "items")[0]["current_period_end"])
        fake.renew(subscription)
    periods = facts(fake, PeriodPaid)
    assert [(each.period_start.date().isoformat(), each.period_end.date().isoformat()) for each in periods] == [
        ("2031-01-31", "2031-02-28"), ("2031-02-28", "2031-03-31"), ("2031-03-31", "2031-04-30"),
    ]  # fmt: skip
    assert [each.reason for each in periods] == ["create", "cycle", "cycle"]
    assert {each.account for each in periods} == {"ann"}
    assert len({each.key for each in periods}) == 3


def test_a_step_ends_on_the_last_day_of_a_shorter_month() -> None:
    leap = int(datetime(2032, 2, 29, tzinfo=UTC).timestamp())
    assert at(stepped(leap, "year", 1)) == datetime(2033, 2, 28, tzinfo=UTC)
    assert at(stepped(leap, "week", 2)) == datetime(2032, 3, 14, tzinfo=UTC)


def test_a_trial_begins_with_nothing_paid(fake: FakeStripe, clock: Clock) -> None:
    ends = fake.now() + 7 * 86400
    subscription = subscribe(fake, subscription_data={"trial_end": ends})
    fake.remind_of_trial(subscription)
    (first,) = facts(fake, PeriodPaid)
    assert (first.trial, first.paid_minor, first.period_end) == (True, 0, at(ends))
    clock.at = at(ends)
    assert fake.renew(subscription)["status"] == "active"
    second = facts(fake, PeriodPaid)[-1]
    assert (second.trial, second.paid_minor, second.period_start) == (False, 3000, at(ends))


def test_a_renewal_fails_and_is_paid_after_all(fake: FakeStripe, clock: Clock) -> None:
    subscription = subscribe(fake)
    clock.move(days=28)
    assert fake.renew(subscription, "failed")["status"] == "past_due"
    invoice = fake.find("subscription", subscription)["latest_invoice"]
    fake.pay(invoice, "failed")
    assert [fact.key for fact in facts(fake, PaymentFailed)] == [f"{invoice}:1", f"{invoice}:2"]
    assert len(facts(fake, PeriodPaid)) == 1
    fake.pay(invoice)
    assert fake.find("subscription", subscription)["status"] == "active"
    assert len(facts(fake, PeriodPaid)) == 2


def test_a_renewal_waits_for_the_customer_or_the_bank(fake: FakeStripe, clock: Clock) -> None:
    asks, waits = subscribe(fake), subscribe(fake)
    clock.move(days=28)
    assert fake.renew(asks, "requires_action")["status"] == "past_due"
    assert fake.renew(waits, "pending")["status"] == "active"
    (asked,) = facts(fake, PaymentFailed)
    assert asked.action_required
    assert len(facts(fake, PeriodPaid)) == 2
    for subscription in (asks, waits):
        fake.pay(fake.find("subscription", subscription)["latest_invoice"])
    assert len(facts(fake, PeriodPaid)) == 4


def test_from_monthly_to_annual(fake: FakeStripe, clock: Clock) -> None:
    subscription = subscribe(fake)
    clock.move(days=14)
    fake.change_plan(subscription, "year")
    change = facts(fake, PeriodPaid)[-1]
    assert (change.reason, change.prorated, change.price) == ("update", True, "year")
    assert (change.amount_minor, change.paid_minor) == (30000, 28500)
    assert [(line.price, line.amount_minor) for line in change.credited] == [("month", -1500)]
    assert (change.period_start, change.period_end) == (clock(), datetime(2032, 2, 14, 12, tzinfo=UTC))
    lines = fake.within(fake.find("subscription", subscription)["latest_invoice"], "lines")
    credited = lines[0]["parent"]["subscription_item_details"]["proration_details"]["credited_items"]
    assert credited["invoice"] == fake.all_of("invoice")[1]["id"]


@pytest.mark.parametrize("proration", ["always_invoice", "create_prorations", "none"])
def test_a_better_plan_of_the_same_rhythm(fake: FakeStripe, clock: Clock, proration: Any) -> None:
    subscription = subscribe(fake)
    clock.move(days=14)
    fake.change_plan(subscription, "better", proration=proration)
    clock.move(days=14)
    fake.renew(subscription)
    paid = [(fact.reason, fact.amount_minor, fact.paid_minor) for fact in facts(fake, PeriodPaid)]
    assert (
        paid
        == {
            "always_invoice": [("create", 3000, 3000), ("update", 3000, 1500), ("cycle", 6000, 6000)],
            "create_prorations": [("create", 3000, 3000), ("cycle", 6000, 7500)],
            "none": [("create", 3000, 3000), ("cycle", 6000, 6000)],
        }[proration]
    )


def test_no_change_of_plan_is_none(fake: FakeStripe) -> None:
    subscription = subscribe(fake)
    before = types(fake)
    fake.change_plan(subscription, "month")
    assert types(fake) == before


def test_what_a_lesser_plan_leaves_is_set_against_the_next_invoice(fake: FakeStripe, clock: Clock) -> None:
    subscription = subscribe(fake, "better")
    clock.move(days=14)
    fake.change_plan(subscription, "month")
    clock.move(days=14)
    fake.renew(subscription)
    assert [fact.paid_minor for fact in facts(fake, PeriodPaid)] == [6000, 0, 1500]


def test_ends_of_subscriptions(fake: FakeStripe, clock: Clock) -> None:
    now, later = subscribe(fake), subscribe(fake)
    fake.cancel(now)
    ends = fake.cancel(later, at_period_end=True)["cancel_at"]
    assert facts(fake, SubscriptionChanged)[-1].ends_at == at(ends)
    fake.undo_cancel(later)
    assert facts(fake, SubscriptionChanged)[-1].ends_at is None
    fake.cancel(later, at_period_end=True)
    clock.at = at(ends)
    fake.renew(later)
    assert types(fake)[-1] == "customer.subscription.deleted"
    ended = {fact.key: fact.ended_at for fact in facts(fake, SubscriptionChanged) if fact.is_final}
    assert ended == {now: START, later: at(ends)}


def test_nothing_is_collected_of_a_paused_subscription(fake: FakeStripe, clock: Clock) -> None:
    subscription = subscribe(fake)
    fake.pause_collection(subscription)
    clock.move(days=28)
    fake.renew(subscription)
    assert types(fake)[-1] == "invoice.voided"
    assert len(facts(fake, PeriodPaid)) == 1
    assert facts(fake, SubscriptionChanged)[-1].collection_paused


def test_refunds(fake: FakeStripe) -> None:
    session = buy(fake)
    fake.refund(session["id"], 500)
    late = fake.refund(session["id"], 1000, "pending")
    assert [fact.amount_minor for fact in facts(fake, RefundChanged)] == [500]
    fake.change_refund(late["id"], "succeeded")
    fake.refer_refund(late["id"])
    assert fake.charge_of(session["id"])["amount_refunded"] == 1500
    fake.change_refund(late["id"], "failed")
    assert {fact.key: fact.status for fact in facts(fake, RefundChanged)}[late["id"]] == "undone"
    assert fake.charge_of(session["id"])["amount_refunded"] == 500
    cancelled = fake.refund(session["id"], outcome="pending")
    assert (cancelled["amount"], fake.charge_of(session["id"])["refunded"]) == (2500, True)
    fake.change_refund(cancelled["id"], "canceled")
    assert facts(fake, RefundChanged)[-1].returned.amount_minor == 0


def test_disputes(fake: FakeStripe) -> None:
    sold = [buy(fake)["id"] for _ in range(3)]
    first = len(fake.events)
    won, lost, asked = (fake.dispute(id, inquiry=id == sold[2])["id"] for id in sold)
    fake.answer_dispute(won)
    fake.close_dispute(won, "won")
    fake.close_dispute(lost, "lost")
    fake.close_dispute(asked, "warning_closed")
    last = {fact.dispute: fact for fact in facts(fake, DisputeChanged)}
    assert {id: (fact.withdrawn_minor, fact.is_open) for id, fact in last.items()} == {
        won: (0, False), lost: (3000, False), asked: (0, False),
    }  # fmt: skip
    assert Counter(types(fake))["charge.dispute.funds_withdrawn"] == 2
    assert types(fake)[-3:] == ["charge.dispute.funds_reinstated", "charge.dispute.closed", "charge.dispute.closed"]
    # As the events themselves tell it, without a look at how it ended:
    told = [fact for fact in facts(fake, DisputeChanged, fetched=False, after=first) if fact.dispute == won]
    assert [fact.withdrawn_minor for fact in told] == [0, 3000, 3000, 3000, 0]


def test_the_same_seed_is_the_same_story(clock: Clock, sink: Sink) -> None:
    stories = []
    for _ in range(2):
        fake = made(clock, sink)
        fake.refund(buy(fake)["id"], 500)
        subscribe(fake)
        fake.deliver(URL, copies=2, shuffle=True)
        stories.append((fake.events, sink.bodies[-2 * len(fake.events) :]))
    assert stories[0] == stories[1]


def test_what_happens_in_silence_makes_no_events(fake: FakeStripe) -> None:
    with fake.silent():
        session = buy(fake)
    assert fake.events == []
    assert fake.fetch("checkout.session", session["id"])["payment_status"] == "paid"


# Webhooks


def delivered(made: list[Delivered]) -> list[str]:
    """Which events were posted."""
    return [each.event for each in made]


def test_webhooks_are_signed_and_taken_once(fake: FakeStripe, sink: Sink, clock: Clock) -> None:
    buy(fake)
    posted = fake.deliver(URL)
    assert delivered(posted) == [event["id"] for event in fake.events]
    assert all(each.is_taken for each in posted)
    assert fake.undelivered() == []
    assert fake.deliver(URL) == []
    read = Stripe([fake.secret], livemode=False).verify(sink.bodies[-1], sink.headers[-1], clock())
    assert (read.id, read.release) == (posted[-1].event, "2026-10-28.endive")


def test_every_order_can_be_had(clock: Clock, sink: Sink) -> None:
    orders = set()
    for order in itertools.permutations(range(4)):
        fake = made(clock, sink)
        buy(fake)
        orders.add(tuple(delivered(fake.deliver(URL, order=order))))
    assert len(orders) == 24
    with pytest.raises(ValueError, match="permutation"):
        fake.deliver(URL, fake.events, order=[0, 0, 1, 2])


def test_webhooks_come_again_late_or_never(fake: FakeStripe, sink: Sink, clock: Clock) -> None:
    buy(fake)
    assert fake.deliver(URL, delay_seconds=60) == []
    clock.move(seconds=60)
    sink.status = 500
    failed = fake.deliver(URL, copies=2, delay_seconds=60, lose=lambda event: event["type"] == "charge.succeeded")
    assert {each.status for each in failed} == {500}
    assert len(failed) == 6
    assert fake.deliver(URL) == []  # they were tried: that is for retry
    sink.status = None
    assert {each.is_taken for each in fake.retry(URL)} == {False}
    sink.status = 202
    assert set(delivered(fake.retry(URL))) == set(delivered(failed))
    assert fake.retry(URL) == []
    answer = fake.call("GET", "/v1/events", {"delivery_success": "false"}).body
    assert [event["type"] for event in answer["data"]] == ["charge.succeeded"]


# The API


def test_lists_have_pages_and_filters(fake: FakeStripe, clock: Clock) -> None:
    made = [buy(fake)["id"] for _ in range(5)][::-1]
    first = fake.call("GET", "/v1/checkout/sessions", {"limit": "2"}).body
    second = fake.call("GET", "/v1/checkout/sessions", {"limit": "2", "starting_after": made[1]}).body
    last = fake.call("GET", "/v1/checkout/sessions", {"limit": "2", "starting_after": made[3]}).body
    assert [[each["id"] for each in page["data"]] for page in (first, second, last)] == [made[:2], made[2:4], made[4:]]
    assert [page["has_more"] for page in (first, second, last)] == [True, True, False]
    clock.move(days=31)
    session = buy(fake)
    since = {"created": {"gte": str(fake.now())}}
    assert [each["id"] for each in fake.call("GET", "/v1/checkout/sessions", since).body["data"]] == [session["id"]]
    intent = session["payment_intent"]
    (charge,) = fake.call("GET", "/v1/charges", {"payment_intent": intent, "expand": ["data.refunds"]}).body["data"]
    assert charge["refunds"]["data"] == []
    events = fake.call("GET", "/v1/events", {"types": ["charge.succeeded", "refund.created"], "limit": "100"}).body
    assert [event["data"]["object"]["id"] for event in events["data"]] == [charge["id"]]  # older than 30 days are gone


def test_expanding(fake: FakeStripe) -> None:
    subscription = subscribe(fake)
    path = "latest_invoice.payments"
    found = fake.call("GET", f"/v1/subscriptions/{subscription}", {"expand": [path]}).body
    assert found["latest_invoice"]["payments"]["data"][0]["status"] == "paid"
    assert fake.call("GET", f"/v1/subscriptions/{subscription}", {"expand": ["status"]}).status == 400


@pytest.mark.parametrize(
    ("method", "path", "parameters", "status", "param"),
    [
        ("GET", "/v1/refunds/re_none", {}, 404, "id"),
        ("GET", "/v1/refunds", {"limit": "101"}, 400, "limit"),
        ("GET", "/v1/refunds", {"starting_after": "re_none"}, 400, "starting_after"),
        ("GET", "/v1/refunds", {"invoice": "in_1"}, 400, "invoice"),
        ("GET", "/v1/nothing", {}, 404, None),
        ("POST", "/v1/checkout/sessions", {"success_url": "x"}, 400, "line_items"),
        ("POST", "/v1/checkout/sessions", {"line_items": [{"price": "pack", "amount": "5"}]}, 400,
         "line_items[0][amount]"),
        ("POST", "/v1/checkout/sessions", {"line_items": [{"price": "pack", "quantity": "1"}]}, 400, "success_url"),
        ("POST", "/v1/checkout/sessions", {"mode": "subscription", "payment_intent_data": {"metadata": {"a": "b"}},
         "line_items": [{"price": "month", "quantity": "1"}], "success_url": "x"}, 400, "payment_intent_data"),
        ("POST", "/v1/customers", {"metadata": {"a": "x" * 501}}, 400, "metadata"),
    ],
)  # fmt: skip
def test_what_stripe_would_refuse_is_refused(
    fake: FakeStripe, method: str, path: str, parameters: dict[str, Any], status: int, param: str | None
) -> None:
    answer = fake.call(method, path, parameters)
    assert (answer.status, answer.body["error"].get("param")) == (status, param)


def test_a_price_of_a_quote_is_made_with_its_session(fake: FakeStripe) -> None:
    price = {"currency": "eur", "unit_amount": "12345", "product_data": {"name": "Made to measure"}}
    given = {"line_items": [{"price_data": price, "quantity": "1"}], "success_url": "x", "mode": "payment",
             "expand": ["line_items"]}  # fmt: skip
    session = fake.call("POST", "/v1/checkout/sessions", given).body
    (line,) = session["line_items"]["data"]
    assert (session["amount_total"], line["price"]["id"]) == (12345, fake.all_of("price")[0]["id"])


def test_a_request_with_a_known_key_is_done_once(fake: FakeStripe) -> None:
    given = {"email": "ann@example.org"}
    first, again = (fake.call("POST", "/v1/customers", given, "key") for _ in range(2))
    assert (first.body, again.is_replayed) == (again.body, True)
    assert len(fake.all_of("customer")) == 1
    other = fake.call("POST", "/v1/customers", {"email": "bob@example.org"}, "key")
    assert (other.status, other.body["error"]["type"]) == (400, "idempotency_error")
    assert fake.call("POST", "/v1/refunds", {"charge": "ch_none"}, "another").status == 404
    assert fake.call("POST", "/v1/customers", given, "another").status == 200  # what was refused holds no key


def test_stripes_own_client_works_with_it(fake: FakeStripe, clock: Clock) -> None:
    with fake:
        client = StripeClient(KEY, base_addresses={"api": fake.url})
        session = client.v1.checkout.sessions.create(
            {"mode": "subscription", "line_items": [{"price": "month", "quantity": 1}], "success_url": "https://x.example",
             "subscription_data": {"trial_period_days": 7, "metadata": {"creditlane_account": "ann"}}}
        )  # fmt: skip
        id = str(fake.complete(session.id)["subscription"])
        subscription = client.v1.subscriptions.update(id, {"cancel_at_period_end": True})
        assert (subscription.status, subscription.cancel_at) == (
            "trialing",
            int((START + timedelta(days=7)).timestamp()),
        )
        client.v1.subscriptions.update(id, {"cancel_at_period_end": False})
        clock.move(days=7)
        fake.renew(id)
        intent = client.v1.invoices.list({"subscription": id, "expand": ["data.payments"]}).data[0].payments
        assert intent is not None
        paid_by = intent.data[0].payment.payment_intent
        assert isinstance(paid_by, str)
        assert client.v1.refunds.create({"payment_intent": paid_by, "amount": 1000}).status == "succeeded"
        assert client.v1.subscriptions.cancel(id).status == "canceled"
        assert [each.type for each in client.v1.events.list({"limit": 1}).auto_paging_iter()] == types(fake)[::-1]
        with pytest.raises(AuthenticationError):
            StripeClient("sk_test_other", base_addresses={"api": fake.url}).v1.customers.list()


# Against what Stripe really sends

PRESENTATION = frozenset({
    "branding_settings", "payment_method_options", "payment_method_details", "evidence", "rendering", "metadata",
    "payment_method_configuration_details", "saved_payment_method_options", "outcome", "address",
})  # fmt: skip
"""What is of no use to anybody here: the fake keeps it empty."""

OF_LATER_RELEASES = frozenset({"customer_account", "quantity_decimal", "subtotal", "enhanced_eligibility_types"})
"""Fields that the older recordings do not have."""


def differences(real: Any, fake: Any, path: str = "") -> list[str]:
    """Where the shape of a fake object is not the real one's: fields, and types where both have a value."""
    if isinstance(real, dict) and isinstance(fake, dict):
        found = [f"{path}.{key} is missing" for key in real.keys() - fake.keys()]
        found += [f"{path}.{key} is too many" for key in fake.keys() - real.keys() - OF_LATER_RELEASES]
        for key in (real.keys() & fake.keys()) - PRESENTATION:
            found += differences(real[key], fake[key], f"{path}.{key}")
        return found
    if isinstance(real, list) and isinstance(fake, list):
        return differences(real[0], fake[0], f"{path}[]") if real and fake else []
    expanded = isinstance(real, dict) and isinstance(fake, str) and fake == fake.strip() and "id" in real
    if real is None or fake is None or expanded or type(real) is type(fake):
        return []
    return [f"{path} is {type(fake).__name__}, not {type(real).__name__}"]


def story(clock: Clock, fake: FakeStripe) -> dict[str, Any]:
    """One object of each shape that was recorded."""
    found = {
        "api_checkout.session_open_payment__2026-03-25.dahlia":
            fake.shown(fake.open_session([("pack", 1)], mode="payment")),
        "api_checkout.session_open_subscription__2026-03-25.dahlia":
            fake.shown(fake.open_session([("month", 1)], mode="subscription")),
    }  # fmt: skip
    invoiced = buy(fake, invoice_creation=True)
    charge = fake.charge_of(invoiced["id"])
    found["api_invoice_paid_manual__2026-03-25.dahlia"] = fake.shown(fake.find("invoice", invoiced["invoice"]))
    found["api_charge_succeeded__2026-03-25.dahlia"] = fake.shown(charge, ["refunds"])
    subscription = subscribe(fake)
    invoice = str(fake.find("subscription", subscription)["latest_invoice"])
    found["api_subscription_active__2026-03-25.dahlia"] = fake.fetch("subscription", subscription)
    found["api_invoice_paid_subscription_create__2026-03-25.dahlia"] = fake.shown(fake.find("invoice", invoice))
    found["api_invoice_payments_list_by_payment_intent__2026-03-25.dahlia"] = fake.call(
        "GET", "/v1/invoice_payments", {"invoice": invoice}
    ).body
    intent = fake.charge_of(invoice)["payment_intent"]
    found["api_payment_intent_succeeded_for_invoice__2026-03-25.dahlia"] = fake.fetch("payment_intent", intent)
    clock.move(days=3)
    fake.change_plan(subscription, "year")
    changed = fake.find("subscription", subscription)["latest_invoice"]
    found["api_invoice_paid_subscription_update_proration__2025-10-29.clover"] = fake.shown(
        fake.find("invoice", changed)
    )
    found["api_subscription_after_price_swap__2025-10-29.clover"] = fake.fetch("subscription", subscription)
    fake.cancel(subscription, at_period_end=True)
    found["api_subscription_cancel_at_period_end__2025-10-29.clover"] = fake.fetch("subscription", subscription)
    fake.undo_cancel(subscription)
    fake.pause_collection(subscription)
    found["api_subscription_pause_collection__2025-10-29.clover"] = fake.fetch("subscription", subscription)
    fake.cancel(subscription)
    found["api_subscription_canceled_now__2025-10-29.clover"] = fake.fetch("subscription", subscription)
    trial = subscribe(fake, subscription_data={"trial_end": fake.now() + 86400})
    found["api_subscription_trialing__2026-03-25.dahlia"] = fake.fetch("subscription", trial)
    found["api_refund_partial_1__2025-10-29.clover"] = fake.shown(fake.refund(charge["id"], 100))
    created = fake.events[-2]
    refund = fake.refer_refund(created["data"]["object"]["id"])  # recorded with its reference
    found["event_refund.created__2020-03-02_syncengine"] = created | {"data": {"object": fake.shown(refund)}}
    fake.dispute(buy(fake)["id"])
    found["event_charge.dispute.created__2020-03-02_syncengine"] = fake.events[-2]
    return found


def test_shapes_are_those_that_were_recorded(fake: FakeStripe, clock: Clock) -> None:
    objects = story(clock, fake)
    wrong = {name: differences(recorded(name), object) for name, object in objects.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_a_difference_of_shape_is_seen() -> None:
    assert differences({"a": 1, "b": [{"c": "x"}]}, {"a": "1", "b": [{}], "d": 0}) != []
    assert differences({"a": 1}, {"a": True}) == [".a is bool, not int"]
