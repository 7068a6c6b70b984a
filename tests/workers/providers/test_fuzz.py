"""Whatever comes, signed or not: a refusal with a code, a parked event, or facts; never another exception."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.rules.facts import Fact
from tests.workers.providers import test_creem, test_paypal, test_sepay
from tests.workers.providers.making import NOW, STRIPE, body, envelope, fetching, made, signed
from workers.providers.base import Adapter, Parked, VerificationError

PAYPAL = test_paypal.paypal()

CASES: dict[str, tuple[Adapter, Callable[[bytes], Mapping[str, str]], list[dict[str, Any]]]] = {
    "stripe": (STRIPE, signed, [
        envelope("checkout.session.completed", made("stripe_session", line_items=made("stripe_line_items"))),
        envelope("invoice.paid", made("stripe_invoice_change")),
        envelope("invoice.payment_failed", made("stripe_invoice_cycle")),
        envelope("refund.created", made("stripe_refund")),
        envelope("charge.dispute.closed", made("stripe_dispute")),
        envelope("customer.subscription.updated", made("stripe_subscription")),
    ]),
    "paypal": (PAYPAL, test_paypal.signed, [
        made("paypal_capture"), made("paypal_refund"), made("paypal_sale"), made("paypal_dispute"),
        made("paypal_capture", event_type="BILLING.SUBSCRIPTION.UPDATED", resource=made("paypal_subscription")),
    ]),
    "creem": (test_creem.CREEM, test_creem.signed, [
        made("creem_checkout"), made("creem_paid"), made("creem_refund"), made("creem_dispute"),
        made("creem_paid", eventType="subscription.update"),
    ]),
    "sepay": (test_sepay.SEPAY, test_sepay.signed, [made("sepay_transfer")]),
}  # fmt: skip
PROVIDERS = pytest.mark.parametrize("provider", list(CASES))

odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 2**63, 10**30, 10**400, 1e308, 0.1, float("nan")]),
    st.text(max_size=8), st.sampled_from(["\x00", "\ud800", "", "x" * 300, "1e9", "-0.01", "EUR", "2026-01-01"]),
    st.lists(st.none(), max_size=2), st.dictionaries(st.text(max_size=3), st.none(), max_size=2), st.just([[[[{}]]]]),
)  # fmt: skip
json_values = st.recursive(odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def paths(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in paths(each, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: object) -> Any:
    """A copy with another value at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def outcome(provider: str, raw: bytes, headers: Mapping[str, str], fetched: Any = None) -> object:
    """What comes of a delivery; anything but a refusal, a parked event and facts is an error."""
    adapter = CASES[provider][0]
    try:
        event = adapter.verify(raw, headers, NOW)
    except VerificationError as refused:
        return refused.code
    found = adapter.normalise(event, (lambda kind, id: fetched) if fetched is not None else fetching())
    assert b"\\u0000" not in msgspec.json.encode(found)  # it can be stored, whatever it was made of
    if isinstance(found, Parked):
        return found.code
    assert all(isinstance(fact, Fact) and fact.key and fact.occurred_at.tzinfo for fact in found)
    assert len({*found, *found}) == len(found)
    return found


@PROVIDERS
@settings(max_examples=25)
@given(raw=st.binary(max_size=64), header=st.text(max_size=40))
def test_garbage_is_refused(provider: str, raw: bytes, header: str) -> None:
    names = ["stripe-signature", "creem-signature", "x-sepay-signature", "x-sepay-timestamp", "paypal-transmission-id",
             "paypal-transmission-time", "paypal-transmission-sig", "paypal-cert-url", "paypal-auth-algo"]  # fmt: skip
    for given_header in (header, f"t={header},v1={header}", f"sha256={header}", ""):
        assert isinstance(outcome(provider, raw, dict.fromkeys(names, given_header)), str)


@PROVIDERS
@settings(max_examples=25)
@given(value=json_values)
def test_any_signed_json_has_an_outcome(provider: str, value: object) -> None:
    raw = body(value)
    outcome(provider, raw, CASES[provider][1](raw))


@PROVIDERS
@settings(max_examples=60)
@given(data=st.data())
def test_any_value_at_any_place_of_an_event_has_an_outcome(provider: str, data: st.DataObject) -> None:
    _, sign, events = CASES[provider]
    event = data.draw(st.sampled_from(events))
    for _ in range(data.draw(st.integers(1, 2))):
        event = put(event, data.draw(st.sampled_from(paths(event))), data.draw(odd))
    raw = body(event)
    outcome(provider, raw, sign(raw))


@PROVIDERS
@settings(max_examples=15)
@given(value=json_values)
def test_anything_that_is_fetched_has_an_outcome(provider: str, value: object) -> None:
    _, sign, events = CASES[provider]
    for event in events:
        raw = body(event)
        outcome(provider, raw, sign(raw), value)


@PROVIDERS
@pytest.mark.parametrize("deep", [500, 990, 20_000])
def test_deep_nesting_has_an_outcome(provider: str, deep: int) -> None:
    _, sign, events = CASES[provider]
    for event in events:
        for name in event:
            raw = body(event | {name: "DEEP"}).replace(b'"DEEP"', b'{"object":' * deep + b"1" + b"}" * deep)
            outcome(provider, raw, sign(raw))


@PROVIDERS
def test_every_event_of_the_cases_makes_facts(provider: str) -> None:
    _, sign, events = CASES[provider]
    for event in events:
        raw = body(event)
        fetched = made("paypal_order") if "PAYMENT.CAPTURE.COMPLETED" in event.values() else None
        if fetched is None:
            assert isinstance(outcome(provider, raw, sign(raw)), tuple), event
