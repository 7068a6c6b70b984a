"""The facts of Stripe's recorded test data; skipped where the recordings are not at hand."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from models.rules.facts import DisputeChanged, Line, Linked, PackPaid, PaymentFailed
from tests.workers.providers.making import (
    CREATED,
    RECORDED,
    STRIPE,
    aliases,
    at,
    body,
    event_of,
    fact_of,
    facts_of,
    fetching,
    parked,
    recorded,
    signed,
)
from workers.providers.base import Parked

EVENTS = sorted(path.stem for path in RECORDED.glob("event_*.json"))
EXPANDED = fetching()


@pytest.mark.parametrize("name", EVENTS)
def test_events_of_old_versions_are_parked(name: str) -> None:
    raw = body(recorded(name))
    created: datetime = STRIPE.read(raw).created
    event = STRIPE.verify(raw, signed(raw, created), created)
    assert parked(STRIPE, event) == "unknown_release"


def of_today(name: str) -> tuple[Any, ...]:
    """The facts of a recorded event with a release that is known put in."""
    found = STRIPE.normalise(STRIPE.read(body(recorded(name) | {"api_version": "2026-03-25.dahlia"})), EXPANDED)
    assert not isinstance(found, Parked), found
    return found


def test_recorded_events_of_a_known_release() -> None:
    (withdrawn,) = of_today("event_charge.dispute.funds_withdrawn__2020-03-02_syncengine")
    assert isinstance(withdrawn, DisputeChanged)
    assert (withdrawn.stage, withdrawn.withdrawn_minor, withdrawn.status) == (
        "funds_withdrawn", 1000, "warning_needs_response",
    )  # fmt: skip
    (created,) = of_today("event_charge.dispute.created__2020-03-02_syncengine")
    (closed,) = of_today("event_charge.dispute.closed__2020-03-02_syncengine")
    assert [fact.withdrawn_minor for fact in (created, closed)] == [0, 0]
    assert aliases(closed) == {
        "charge": "ch_1IqtGAJDPojXS6LNstgEfUji", "payment_intent": "pi_1IqtG9JDPojXS6LNOGnYrIqq",
    }  # fmt: skip
    assert of_today("event_customer.deleted__2020-03-02_syncengine") == ()
    (ended,) = of_today("event_customer.subscription.deleted__2020-03-02_syncengine")
    assert (ended.status, ended.is_final, ended.ended_at) == ("canceled", True, at(1623149102))
    assert ended.items[0].period_end is None  # a version whose periods were not yet on the items
    (paid,) = of_today("event_invoice_payment.paid__2023-10-16_syncengine")
    assert aliases(paid) == {"invoice": "in_103Q0w2eZvKYlo2C5PYwf6Wf", "payment_intent": "pi_103Q0w2eZvKYlo2C364X582Z"}
    (refund,) = of_today("event_refund.created__2020-03-02_syncengine")
    assert (refund.status, refund.amount_minor, refund.currency) == ("settled", 1000, "USD")
    (failed,) = of_today("event_refund.failed__2020-03-02_syncengine")
    assert (failed.status, failed.key, failed.returned.amount_minor) == ("undone", refund.key, 0)


def test_an_open_session_is_no_purchase() -> None:
    session = recorded("api_checkout.session_open_payment__2026-03-25.dahlia")
    assert facts_of("checkout.session.completed", session) == ()
    (failed,) = facts_of("checkout.session.async_payment_failed", session)
    assert isinstance(failed, PaymentFailed)
    assert (failed.key, failed.amount_minor, failed.currency) == (session["id"], 1500, "USD")


def test_a_paid_session() -> None:
    # No paid session was recorded: this is the open one with what payment changes put in.
    session = recorded("api_checkout.session_open_payment__2026-03-25.dahlia")
    paid = session | {"payment_status": "paid", "status": "complete", "payment_intent": "pi_1"}
    assert parked(STRIPE, event_of("checkout.session.completed", paid)) == "no_line_items"
    lines = {
        "data": [{"id": "li_1", "price": {"id": "price_1"}, "quantity": 1, "amount_total": 1500}],
        "has_more": False,
    }
    again = fetching(checkout_session=paid | {"line_items": lines})
    for type in ("checkout.session.completed", "checkout.session.async_payment_succeeded"):
        pack = fact_of(type, paid, again)
        assert isinstance(pack, PackPaid)
        assert (pack.key, pack.paid_minor, pack.account) == (session["id"], 1500, None)
        assert pack.lines == (Line(price="price_1", quantity=1, amount_minor=1500),)


def test_a_session_of_a_subscription() -> None:
    session = recorded("api_checkout.session_open_subscription__2026-03-25.dahlia")
    assert facts_of("checkout.session.completed", session) == ()  # not even a subscription yet
    linked = fact_of("checkout.session.completed", session | {"subscription": "sub_1", "payment_status": "paid"})
    assert isinstance(linked, Linked)


def test_the_first_invoice_of_a_subscription() -> None:
    invoice = recorded("api_invoice_paid_subscription_create__2026-03-25.dahlia")
    assert invoice["period_start"] == invoice["period_end"]
    fact = fact_of("invoice.paid", invoice)
    assert fact.key == "si_UFHoafB3RkcGGE:1774905649:price_1ISuPKQK2ZHS99Rkrxy6GwbM"
    assert (fact.reason, fact.trial, fact.prorated, fact.quantity) == ("create", False, False, 1)
    assert (fact.period_start, fact.period_end) == (at(1774905649), at(1777584049))
    assert (fact.amount_minor, fact.paid_minor, fact.currency) == (1000, 1000, "USD")
    assert fact.subscription == aliases(fact)["subscription"] == "sub_1TGnErQK2ZHS99RkHpVN5MOi"
    # The same invoice with its payments, as the API has it, is the same fact but for the payment it names.
    expanded = recorded("api_subscription_active__2026-03-25.dahlia")["latest_invoice"]
    again = fact_of("invoice.paid", invoice, fetching(invoice=expanded))
    assert aliases(again) == aliases(fact) | {"payment_intent": "pi_3TGnEsQK2ZHS99Rk1DIz66Nj"}
    assert again.key == fact.key


def test_a_manual_invoice_is_no_period() -> None:
    assert facts_of("invoice.paid", recorded("api_invoice_paid_manual__2026-03-25.dahlia")) == ()


def test_from_monthly_to_annual() -> None:
    fact = fact_of("invoice.paid", recorded("api_invoice_paid_subscription_update_proration__2025-10-29.clover"))
    assert fact.key == "si_TOnQinO102U9En:1762799355:small-annual"
    assert (fact.reason, fact.prorated, fact.amount_minor, fact.paid_minor) == ("update", True, 25000, 22500)
    assert fact.credited == (Line(price="small-monthly", quantity=1, amount_minor=-2500),)
    assert (fact.period_start, fact.period_end) == (at(1762799355), at(1794335351))


def test_a_trial_is_an_invoice_of_nothing() -> None:
    subscription = recorded("api_subscription_trialing__2026-03-25.dahlia")
    invoice = subscription["latest_invoice"]
    assert fact_of("invoice.paid", invoice).trial is None
    fact = fact_of("invoice.paid", invoice, fetching(subscription=subscription))
    assert (fact.trial, fact.amount_minor, fact.paid_minor) == (True, 0, 0)
    assert fact.period_end == at(1776201677)


def test_partial_refunds() -> None:
    one = fact_of("refund.created", recorded("api_refund_partial_1__2025-10-29.clover"))
    other = fact_of("refund.created", recorded("api_refund_partial_2__2025-10-29.clover"))
    assert (one.amount_minor, other.amount_minor, one.status, other.status) == (1000, 500, "settled", "settled")
    assert one.aliases == other.aliases
    assert aliases(one)["payment_intent"] == "pi_3SRzqkKXBGcbgpbZ1P6QNbvc"


@pytest.mark.parametrize(
    ("type", "name", "expected"),
    [
        ("payment_intent.succeeded", "api_payment_intent_succeeded_for_invoice__2026-03-25.dahlia",
         {"payment_intent": "pi_3TGnEsQK2ZHS99Rk1DIz66Nj", "charge": "ch_3TGnEsQK2ZHS99Rk1GtpXcp5"}),
        ("payment_intent.succeeded", "api_payment_intent_succeeded_one_off__2025-10-29.clover",
         {"payment_intent": "pi_3SRzqkKXBGcbgpbZ1P6QNbvc", "charge": "ch_3SRzqkKXBGcbgpbZ17eTrqrl"}),
        ("charge.succeeded", "api_charge_succeeded__2026-03-25.dahlia",
         {"payment_intent": "pi_3TGnEsQK2ZHS99Rk1DIz66Nj", "charge": "ch_3TGnEsQK2ZHS99Rk1GtpXcp5"}),
    ],
)  # fmt: skip
def test_payments_link(type: str, name: str, expected: dict[str, str]) -> None:
    assert aliases(fact_of(type, recorded(name))) == expected


def test_lists_of_an_invoices_payments() -> None:
    (payment,) = recorded("api_invoice_payments_list_by_payment_intent__2026-03-25.dahlia")["data"]
    assert aliases(fact_of("invoice_payment.paid", payment)) == {
        "invoice": "in_1TGnErQK2ZHS99Rk4nuhpuoB", "payment_intent": "pi_3TGnEsQK2ZHS99Rk1DIz66Nj",
    }  # fmt: skip
    assert recorded("api_invoice_payments_list_empty_one_off__2025-10-29.clover")["data"] == []


@pytest.mark.parametrize(
    "name",
    [
        "api_payment_intent_requires_action__2026-03-25.dahlia",
        "api_credit_note_issued_with_refund__2025-10-29.clover",
        "api_error_402_card_declined__2025-10-29.clover",
    ],
)
def test_objects_in_an_event_of_another_are_parked(name: str) -> None:
    object = recorded(name)
    for type in ("checkout.session.completed", "invoice.paid", "refund.created", "charge.dispute.created"):
        assert parked(STRIPE, event_of(type, object)) == "malformed"
    assert facts_of("credit_note.created", object) == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("active__2026-03-25.dahlia", {"status": "active", "ends_at": None, "collection_paused": False}),
        ("after_price_swap__2025-10-29.clover", {"status": "active"}),
        ("cancel_at_period_end__2025-10-29.clover", {"status": "active", "ends_at": at(1765391185), "ended_at": None}),
        ("canceled_now__2025-10-29.clover", {"status": "canceled", "ended_at": at(1762799298), "is_final": True}),
        ("incomplete_sca__2026-03-25.dahlia", {"status": "incomplete", "is_final": False}),
        ("pause_collection__2025-10-29.clover", {"status": "active", "collection_paused": True}),
        ("trialing__2026-03-25.dahlia", {"status": "trialing", "trial_end": at(1776201677)}),
    ],
)
def test_states_of_subscriptions(name: str, expected: dict[str, Any]) -> None:
    object = recorded(f"api_subscription_{name}")
    fact = fact_of("customer.subscription.updated", object)
    assert {field: getattr(fact, field) for field in expected} == expected
    (item,) = object["items"]["data"]
    (held,) = fact.items
    assert (held.id, held.price, held.quantity) == (item["id"], item["price"]["id"], 1)
    assert (held.period_start, held.period_end) == (at(item["current_period_start"]), at(item["current_period_end"]))
    assert (fact.key, fact.occurred_at) == (object["id"], at(CREATED))
