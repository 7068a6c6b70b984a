"""Creem: the signature, and the facts of made-up events of the documented shapes."""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any

import pytest

from models.rules.facts import DisputeChanged, Line, Linked, PackPaid, PeriodPaid, RefundChanged
from models.rules.payments import claw_back_target
from tests.workers.providers.making import NOW, aliases, body, fetching, made, parked, read_fact
from workers.providers.base import Fetch, VerificationError, no_fetch
from workers.providers.creem import Creem

CREEM = Creem(["older", "made"], livemode=True)
RAW = body(made("creem_checkout"))


def signed(raw: bytes, secret: str = "made") -> dict[str, str]:
    """The header of a delivery by Creem."""
    return {"Creem-Signature": hmac.new(secret.encode(), raw, hashlib.sha256).hexdigest()}


def code_of(raw: bytes, headers: dict[str, str]) -> str:
    """The code that a delivery is refused with."""
    with pytest.raises(VerificationError) as refused:
        CREEM.verify(raw, headers, NOW)
    return refused.value.code


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """An event with fields in place of its object's own; ``eventType`` is the event's."""
    value = made(name)
    value["eventType"] = changes.pop("eventType", value["eventType"])
    value["object"] |= changes
    return value


def fact(name: str, fetch: Fetch = no_fetch, **changes: Any) -> Any:
    """The only fact of it."""
    return read_fact(CREEM, changed(name, **changes), fetch)


def parking(name: str, **changes: Any) -> str:
    """The code that it is parked with."""
    return parked(CREEM, CREEM.read(body(changed(name, **changes))))


def test_a_signed_event_is_read() -> None:
    event = CREEM.verify(RAW, signed(RAW), NOW)
    assert (event.provider, event.id, event.type, event.livemode) == ("creem", "evt_made_1", "checkout.completed", True)
    assert event.created == datetime(2026, 9, 21, 14, 13, 20, 123000, UTC)
    assert CREEM.read(RAW) == event


def test_each_secret_is_tried_and_no_other() -> None:
    assert CREEM.verify(RAW, signed(RAW, "older"), NOW)
    assert code_of(RAW, signed(RAW, "other")) == "bad_signature"
    with pytest.raises(ValueError, match="secret"):
        Creem([], livemode=True)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "no_signature"),
        ({"creem-signature": "é"}, "bad_signature"),
        ({"creem-signature": "0" * 64}, "bad_signature"),
        ({"creem-signature": "0" * 63}, "bad_signature"),
        ({"creem-signature": "0" * 64 + "\n"}, "bad_signature"),
    ],
)
def test_headers_that_are_none_are_refused(headers: dict[str, str], code: str) -> None:
    assert code_of(RAW, headers) == code


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff", "not_json"),
        (b"[]", "not_an_event"),
        (body(made("creem_checkout", id=None)), "not_an_event"),
        (body(made("creem_checkout", created_at=-1)), "not_an_event"),
        (body(changed("creem_checkout", mode=None)), "not_an_event"),
        (b" " * 1048577, "too_large"),
    ],
)
def test_a_signed_body_that_is_no_event_is_refused(raw: bytes, code: str) -> None:
    assert code_of(raw, signed(raw)) == code
    assert code_of(RAW.replace(b"1210", b"9210"), signed(RAW)) == "bad_signature"


@pytest.mark.parametrize("mode", ["test", "sandbox", "local", "new"])
def test_events_of_a_test_are_parked_by_a_live_ledger(mode: str) -> None:
    assert parking("creem_checkout", mode=mode) == "other_mode"
    event = Creem(["made"], livemode=False).read(body(changed("creem_checkout", mode=mode)))
    assert Creem(["made"], livemode=False).normalise(event, fetching())


def test_an_order_is_a_pack() -> None:
    pack = fact("creem_checkout")
    assert isinstance(pack, PackPaid)
    assert (pack.key, pack.account, pack.paid_minor, pack.currency) == ("ord_made_1", "ann", 1210, "EUR")
    assert pack.lines == (Line(price="prod_made_1", quantity=1, amount_minor=1000),)
    assert pack.reference == "quote-7"
    assert aliases(pack) == {
        "checkout": "ch_made_1", "order": "ord_made_1", "transaction": "tran_made_1", "customer": "cust_made_1",
    }  # fmt: skip


def test_tax_counts_as_paid() -> None:
    order = made("creem_checkout")["object"]["order"]
    for gone, paid in (("amount_paid",), 1210), (("amount_paid", "tax_amount"), 1000):
        assert fact("creem_checkout", order={k: v for k, v in order.items() if k not in gone}).paid_minor == paid


def test_an_order_that_recurs_only_links() -> None:
    order = made("creem_checkout")["object"]["order"]
    assert isinstance(fact("creem_checkout", order=order | {"type": "recurring"}), Linked)
    assert isinstance(fact("creem_checkout", subscription={"id": "sub_made_1"}), Linked)
    unpaid = CREEM.read(body(changed("creem_checkout", order=order | {"status": "pending"})))
    assert CREEM.normalise(unpaid, fetching()) == ()


def test_a_paid_subscription_is_a_period() -> None:
    period = fact("creem_paid")
    assert isinstance(period, PeriodPaid)
    assert (period.key, period.price, period.paid_minor) == ("tran_made_2", "prod_made_1", 1000)
    assert (period.period_start, period.period_end) == (
        datetime(2026, 9, 21, 12, tzinfo=UTC), datetime(2026, 10, 21, 12, tzinfo=UTC),
    )  # fmt: skip
    transaction = {"id": "tran_made_2", "amount": 1000, "amount_paid": 1210, "currency": "EUR"}
    fetched = fact("creem_paid", fetching(transaction=transaction))
    assert (fetched.key, fetched.paid_minor, fetched.amount_minor) == ("tran_made_2", 1210, 1000)
    assert fact("creem_paid", last_transaction=transaction).paid_minor == 1210
    assert fact("creem_paid", last_transaction=transaction | {"id": "tran_earlier"}).paid_minor == 1000
    assert parking("creem_paid", last_transaction_id=None) == "malformed"


def test_a_refund_says_what_was_paid() -> None:
    refund = fact("creem_refund")
    assert isinstance(refund, RefundChanged)
    assert (refund.key, refund.status, refund.amount_minor, refund.paid_minor) == ("ref_made_1", "settled", 605, 1210)
    assert aliases(refund) == {"transaction": "tran_made_1", "order": "ord_made_1", "checkout": "ch_made_1"}
    assert claw_back_target(100, refund.paid_minor or 0, refund.amount_minor) == 50
    assert [fact("creem_refund", status=status).status for status in ("failed", "canceled")] == ["undone", "undone"]
    pending = CREEM.read(body(changed("creem_refund", status="pending")))
    assert CREEM.normalise(pending, fetching()) == ()
    assert parking("creem_refund", transaction=None, order=None, checkout=None) == "no_purchase"


def test_a_dispute_takes_when_the_transaction_was_charged_back() -> None:
    dispute = fact("creem_dispute")
    assert isinstance(dispute, DisputeChanged)
    assert (dispute.key, dispute.withdrawn_minor, dispute.movements) == ("disp_made_1:created", 1210, 1)
    calm = fact("creem_dispute", transaction=made("creem_refund")["object"]["transaction"])
    assert (calm.withdrawn_minor, calm.movements, calm.is_open) == (0, 0, True)


@pytest.mark.parametrize(
    ("told", "status"),
    [("active", "active"), ("trialing", "trialing"), ("paused", "paused"), ("expired", "past_due"),
     ("past_due", "past_due"), ("canceled", "canceled"), ("scheduled_cancel", "active")],
)  # fmt: skip
def test_states_of_subscriptions(told: str, status: str) -> None:
    state = fact("creem_paid", eventType="subscription.update", status=told)
    assert (state.status, state.is_final, state.account) == (status, status == "canceled", "ann")
    assert (state.ends_at is not None) is (told == "scheduled_cancel")
    assert state.items[0].price == "prod_made_1"
    assert parking("creem_paid", eventType="subscription.update", status="new") == "unknown_status"


def test_other_events_make_no_facts() -> None:
    assert CREEM.normalise(CREEM.read(body(made("creem_checkout", eventType="product.updated"))), fetching()) == ()
    assert parking("creem_checkout", order=None) == "malformed"
    assert parking("creem_checkout", order={"id": "ord", "amount": 10.5}) == "malformed"
