"""PayPal: the chain and the signature, and the facts of made-up events of the documented shapes."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from models.rules.facts import DisputeChanged, Line, PackPaid, PaymentFailed, PeriodPaid, RefundChanged
from tests.workers.providers.making import NOW, aliases, body, fetching, made, parked, read_fact
from workers.providers.base import Fetch, Parked, VerificationError, no_fetch
from workers.providers.paypal import PayPal

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

ADDRESS = "https://api.paypal.com/v1/notifications/certs/CERT-made"
HOST = "messages.paypal.com"


@cache
def key(name: str) -> rsa.RSAPrivateKey:
    """A key of its own for each name."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def usage_of(authority: bool) -> x509.KeyUsage:
    """What a key may be used for: to certify, or to sign."""
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def certificate(
    holder: Key,
    issuer: str,
    *,
    name: str = "leaf",
    authority: bool = False,
    hosts: Sequence[str] = (HOST,),
    start: datetime = NOW - timedelta(days=30),
    end: datetime = NOW + timedelta(days=30),
) -> x509.Certificate:
    """A certificate by an issuer, whose key is the one of its name."""
    by = key(issuer)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(holder.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(holder.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        .add_extension(usage_of(authority), critical=True)
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        if hosts:
            names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
    return builder.sign(by, SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    """As an address serves them."""
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


ROOT = certificate(key("root"), "root", name="root", authority=True)
BETWEEN = certificate(key("between"), "root", name="between", authority=True)
LEAF = certificate(key("leaf"), "between")
STRANGER = certificate(key("stranger"), "stranger", name="stranger", authority=True)
RAW = body(made("paypal_capture"))


def paypal(
    served: bytes = pem(LEAF, BETWEEN), trusted: bytes = pem(ROOT), webhooks: Sequence[str] = ("WH1",)
) -> PayPal:
    """An adapter whose certificates' address serves this."""
    return PayPal(webhooks, lambda url: served, trusted, livemode=True)


def signed(
    raw: bytes, at: str = "2031-11-21T12:00:00Z", webhook: str = "WH1", by: str = "leaf", **headers: str
) -> dict[str, str]:
    """The headers of a delivery by PayPal."""
    message = f"made-delivery|{at}|WH1|{zlib.crc32(raw)}".encode()
    signature = base64.b64encode(key(by).sign(message, PKCS1v15(), SHA256())).decode()
    return {
        "Paypal-Transmission-Id": "made-delivery",
        "Paypal-Transmission-Time": at,
        "Paypal-Transmission-Sig": signature,
        "Paypal-Cert-Url": ADDRESS,
        "Paypal-Auth-Algo": "SHA256withRSA",
    }


def code_of(adapter: PayPal, raw: bytes, headers: dict[str, str], now: datetime = NOW) -> str:
    """The code that a delivery is refused with."""
    with pytest.raises(VerificationError) as refused:
        adapter.verify(raw, headers, now)
    return refused.value.code


def test_a_signed_event_is_read() -> None:
    event = paypal().verify(RAW, signed(RAW), NOW)
    assert (event.provider, event.id, event.type, event.livemode) == (
        "paypal", "WH-MADE-1", "PAYMENT.CAPTURE.COMPLETED", True,
    )  # fmt: skip
    assert event.object == made("paypal_capture")["resource"]
    assert paypal().read(RAW) == event


def test_each_webhook_is_tried() -> None:
    assert paypal(webhooks=["WH0", "WH1"]).verify(RAW, signed(RAW), NOW)
    assert code_of(paypal(webhooks=["WH0"]), RAW, signed(RAW)) == "bad_signature"
    for none in ([], [" "]):
        with pytest.raises(ValueError, match="webhook"):
            paypal(webhooks=none)


def test_the_chain_may_come_from_either_side() -> None:
    assert paypal(pem(LEAF), pem(ROOT, BETWEEN)).verify(RAW, signed(RAW), NOW)
    assert code_of(paypal(pem(LEAF)), RAW, signed(RAW)) == "bad_certificate"


def test_a_certificate_of_all_hosts_below_is_enough() -> None:
    wide = certificate(key("leaf"), "between", hosts=["*.paypal.com"])
    assert paypal(pem(wide, BETWEEN)).verify(RAW, signed(RAW), NOW)


@pytest.mark.parametrize(
    "served",
    [
        b"",
        b"garbage",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        pem(certificate(key("leaf"), "leaf"), BETWEEN),  # signed by itself
        pem(certificate(key("leaf"), "stranger"), STRANGER),
        pem(certificate(key("leaf"), "between", hosts=["paypal.com.example.org"]), BETWEEN),
        pem(certificate(key("leaf"), "between", hosts=["notpaypal.com"]), BETWEEN),
        pem(certificate(key("leaf"), "between", hosts=[]), BETWEEN),
        pem(certificate(key("leaf"), "between", end=NOW - timedelta(days=1)), BETWEEN),
        pem(certificate(key("leaf"), "between", start=NOW + timedelta(days=1)), BETWEEN),
        pem(LEAF, certificate(key("between"), "root", name="between", authority=True, end=NOW - timedelta(days=1))),
        pem(LEAF, certificate(key("between"), "root", name="between", hosts=["a.paypal.com"])),  # no authority
        pem(certificate(ec.generate_private_key(ec.SECP256R1()), "between"), BETWEEN),
    ],
    ids=["none", "garbage", "no certificate", "self-signed", "stranger", "other host", "similar host", "no host",
         "expired", "not yet", "issuer expired", "issuer no authority", "other kind of key"],
)  # fmt: skip
def test_certificates_that_are_not_paypals_are_refused(served: bytes) -> None:
    assert code_of(paypal(served), RAW, signed(RAW)) == "bad_certificate"


@pytest.mark.parametrize(
    "address",
    ["http://api.paypal.com/c", "https://paypal.com/c", "https://api.paypal.com.example.org/c",
     "https://example.org/api.paypal.com/", "https://example.org#.paypal.com/", "https://example.org?.paypal.com/",
     "https://example.org\\.paypal.com/", "https://a@example.org/.paypal.com/", "https://a:b@api.paypal.com/c",
     "https://api.paypal.com:8443/c", "https://api.paypal.com", "ftp://api.paypal.com/c", "//api.paypal.com/c",
     "https://notpaypal.com/c", "https://[::1].paypal.com/", "https://api.paypal.com/c\n", "https://.paypal.com/c"],
)  # fmt: skip
def test_no_other_address_is_asked(address: str) -> None:
    asked: list[str] = []

    def ask(url: str) -> bytes:
        asked.append(url)
        return pem(LEAF, BETWEEN)

    adapter = PayPal(["WH1"], ask, pem(ROOT), livemode=True)
    assert code_of(adapter, RAW, signed(RAW) | {"Paypal-Cert-Url": address}) == "bad_certificate"
    assert asked == []
    for good in (ADDRESS, "https://api.sandbox.paypal.com:443/v1/c"):
        assert adapter.verify(RAW, signed(RAW) | {"Paypal-Cert-Url": good}, NOW)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        *(({f"Paypal-{name}": ""}, "no_signature")
          for name in ("Transmission-Id", "Transmission-Time", "Transmission-Sig", "Cert-Url", "Auth-Algo")),
        ({"Paypal-Transmission-Id": "another"}, "bad_signature"),
        ({"Paypal-Transmission-Time": "2031-11-21T12:00:01Z"}, "bad_signature"),
        ({"Paypal-Transmission-Time": "now"}, "bad_signature"),
        ({"Paypal-Transmission-Time": "2031-11-21T12:00:00"}, "bad_signature"),
        ({"Paypal-Transmission-Sig": "!"}, "bad_signature"),
        ({"Paypal-Transmission-Sig": "AAAA"}, "bad_signature"),
        ({"Paypal-Transmission-Sig": "é"}, "bad_signature"),
        ({"Paypal-Auth-Algo": "SHA1withRSA"}, "bad_signature"),
    ],
)  # fmt: skip
def test_headers_that_were_not_signed_are_refused(change: dict[str, str], code: str) -> None:
    assert code_of(paypal(), RAW, signed(RAW) | change) == code


def test_a_forged_or_altered_body_is_refused() -> None:
    assert code_of(paypal(), RAW.replace(b"14.99", b"94.99"), signed(RAW)) == "bad_signature"
    assert code_of(paypal(), RAW, signed(RAW, by="stranger")) == "bad_signature"


def test_an_old_delivery_is_let_in_and_one_of_the_future_is_not() -> None:
    assert paypal().verify(RAW, signed(RAW, "2031-11-18T12:00:00Z"), NOW)  # repeated for three days
    assert paypal().verify(RAW, signed(RAW, "2031-11-21T12:05:00Z"), NOW)
    assert code_of(paypal(), RAW, signed(RAW, "2031-11-21T12:05:01Z")) == "too_new"


@pytest.mark.parametrize(
    ("raw", "code"),
    [(b"\xff", "not_json"), (b"{", "not_json"), (b"[]", "not_an_event"), (b"{}", "not_an_event"),
     *((body({k: v for k, v in made("paypal_capture").items() if k != name}), "not_an_event")
       for name in ("id", "event_type", "create_time", "resource")),
     (body(made("paypal_capture", create_time="2018-19-12T22:20:32.000Z")), "not_an_event"),
     (body(made("paypal_capture", create_time=1)), "not_an_event"), (b" " * 1048577, "too_large")],
)  # fmt: skip
def test_a_signed_body_that_is_no_event_is_refused(raw: bytes, code: str) -> None:
    assert code_of(paypal(), raw, signed(raw)) == code


def test_what_the_certificates_raise_goes_through() -> None:
    def fails(url: str) -> bytes:
        raise OSError("out of reach")

    with pytest.raises(OSError, match="out of reach"):
        PayPal(["WH1"], fails, pem(ROOT), livemode=True).verify(RAW, signed(RAW), NOW)


def resource(name: str, **changes: Any) -> dict[str, Any]:
    """An event with fields in place of its resource's own; ``event_type`` is the event's."""
    value = made(name)
    value["event_type"] = changes.pop("event_type", value["event_type"])
    value["resource"] |= changes
    return value


def fact(name: str, fetch: Fetch = no_fetch, **changes: Any) -> Any:
    """The only fact of it."""
    return read_fact(paypal(), resource(name, **changes), fetch)


def parking(name: str, fetch: Fetch = no_fetch, **changes: Any) -> str:
    """The code that it is parked with."""
    return parked(paypal(), paypal().read(body(resource(name, **changes))), fetch)


ORDER = fetching(order=made("paypal_order"))


def test_a_capture_is_a_pack_of_the_orders_articles() -> None:
    pack = fact("paypal_capture", ORDER)
    assert isinstance(pack, PackPaid)
    assert (pack.key, pack.account, pack.paid_minor, pack.currency) == ("CAP1MADE", "ann", 1499, "EUR")
    assert aliases(pack) == {"capture": "CAP1MADE", "order": "ORD1MADE"}
    assert pack.lines == (
        Line(price="pack_s", quantity=2, amount_minor=1000), Line(price="pack_t", quantity=1, amount_minor=499),
    )  # fmt: skip


def test_a_capture_without_its_order_needs_our_reference() -> None:
    assert parking("paypal_capture") == "no_line_items"
    pack = fact("paypal_capture", invoice_id="quote-7")
    assert (pack.reference, pack.lines) == ("quote-7", ())


def test_a_capture_of_one_part_of_an_order() -> None:
    order = made("paypal_order")
    (unit,) = order["purchase_units"]
    other = unit | {"items": [], "payments": {"captures": [{"id": "CAP2"}]}}
    order["purchase_units"] = [other, unit]
    assert len(fact("paypal_capture", fetching(order=order)).lines) == 2
    order["purchase_units"] = [other, other]
    assert parking("paypal_capture", fetching(order=order)) == "malformed"


def test_articles_need_a_price_id_and_the_payments_currency() -> None:
    for change in ({"sku": None}, {"unit_amount": {"currency_code": "USD", "value": "5.00"}}):
        order = made("paypal_order")
        order["purchase_units"][0]["items"][0] |= change
        assert parking("paypal_capture", fetching(order=order)) == "malformed"


def test_a_capture_that_was_given_back_since_was_paid() -> None:
    for status, pays in (("COMPLETED", True), ("REFUNDED", True), ("PARTIALLY_REFUNDED", True), ("PENDING", False)):
        current = fetching(capture=made("paypal_capture")["resource"] | {"status": status}, order=made("paypal_order"))
        found = paypal().normalise(paypal().read(RAW), current)
        assert not isinstance(found, Parked)
        assert bool(found) is pays


@pytest.mark.parametrize("type", ["DENIED", "DECLINED"])
def test_a_capture_that_failed(type: str) -> None:
    failed = fact("paypal_capture", event_type=f"PAYMENT.CAPTURE.{type}", status=type)
    assert isinstance(failed, PaymentFailed)
    assert (failed.key, failed.amount_minor, failed.account) == ("CAP1MADE", 1499, "ann")


def test_a_sale_is_a_period_of_its_subscription() -> None:
    period = fact("paypal_sale", fetching(subscription=made("paypal_subscription")))
    assert isinstance(period, PeriodPaid)
    assert (period.key, period.subscription, period.price) == ("SALE1MADE", "I-MADE1", "P-MADE1")
    assert (period.account, period.paid_minor, period.period_start) == ("ann", 999, None)
    alone = fact("paypal_sale")
    assert (alone.key, alone.price, alone.account) == ("SALE1MADE", None, None)
    assert parking("paypal_sale", billing_agreement_id=None) == "unknown_sale"
    assert isinstance(fact("paypal_sale", event_type="PAYMENT.SALE.DENIED", state="denied"), PaymentFailed)


@pytest.mark.parametrize("type", ["REFUNDED", "REVERSED"])
def test_money_back_names_its_capture(type: str) -> None:
    refund = fact("paypal_refund", event_type=f"PAYMENT.CAPTURE.{type}")
    assert isinstance(refund, RefundChanged)
    assert (refund.key, refund.amount_minor, refund.status) == ("REF1MADE", 500, "settled")
    assert aliases(refund) == {"capture": "CAP1MADE"}
    assert fact("paypal_refund", status="FAILED").status == fact("paypal_refund", status="CANCELLED").status == "undone"
    pending = paypal().normalise(paypal().read(body(resource("paypal_refund", status="PENDING"))), fetching())
    assert pending == ()


def test_money_back_of_the_older_api_has_a_minus() -> None:
    amount = {"total": "-0.49", "currency": "USD"}
    old: dict[str, Any] = {"status": None, "state": "completed", "links": [], "amount": amount}
    sale = fact("paypal_refund", event_type="PAYMENT.SALE.REFUNDED", sale_id="SALE1MADE", **old)
    assert (sale.amount_minor, sale.currency, aliases(sale)) == (49, "USD", {"sale": "SALE1MADE"})
    assert parking("paypal_refund", event_type="PAYMENT.SALE.REVERSED", **old) == "no_purchase"
    known = fetching(refund=made("paypal_refund")["resource"] | old | {"sale_id": "SALE1MADE"})
    assert aliases(fact("paypal_refund", known, event_type="PAYMENT.SALE.REVERSED", **old)) == {"sale": "SALE1MADE"}


@pytest.mark.parametrize(("type", "stage"), [("CREATED", "created"), ("UPDATED", "updated"), ("RESOLVED", "closed")])
def test_a_dispute_freezes_and_takes_nothing_itself(type: str, stage: str) -> None:
    dispute = fact("paypal_dispute", event_type=f"CUSTOMER.DISPUTE.{type}")
    assert isinstance(dispute, DisputeChanged)
    assert (dispute.key, dispute.stage, dispute.withdrawn_minor) == (f"PP-D-MADE1:{stage}", stage, 0)
    assert aliases(dispute) == {"capture": "CAP1MADE", "sale": "CAP1MADE"}
    assert dispute.is_open
    assert not fact("paypal_dispute", status="RESOLVED").is_open
    assert parking("paypal_dispute", disputed_transactions=[]) == "no_purchase"


@pytest.mark.parametrize(
    ("told", "status", "final"),
    [("APPROVAL_PENDING", "incomplete", False), ("APPROVED", "incomplete", False), ("ACTIVE", "active", False),
     ("SUSPENDED", "paused", False), ("CANCELLED", "canceled", True), ("EXPIRED", "canceled", True)],
)  # fmt: skip
def test_states_of_subscriptions(told: str, status: str, final: bool) -> None:
    event = made("paypal_capture", event_type="BILLING.SUBSCRIPTION.UPDATED")
    event["resource"] = made("paypal_subscription", status=told)
    changed = read_fact(paypal(), event)
    assert (changed.key, changed.status, changed.is_final, changed.account) == ("I-MADE1", status, final, "ann")
    assert changed.items[0].price == "P-MADE1"


def test_a_period_that_failed() -> None:
    event = made("paypal_capture", event_type="BILLING.SUBSCRIPTION.PAYMENT.FAILED")
    event["resource"] = made("paypal_subscription")
    event["resource"]["billing_info"]["last_failed_payment"] = {
        "amount": {"currency_code": "EUR", "value": "9.99"}, "time": "2026-09-03T00:00:00Z",
        "next_payment_retry_time": "2026-09-08T00:00:00Z",
    }  # fmt: skip
    failed = read_fact(paypal(), event)
    assert (failed.key, failed.amount_minor) == ("I-MADE1:2026-09-03T00:00:00+00:00", 999)
    assert failed.next_attempt_at is not None


@pytest.mark.parametrize(
    ("name", "changes"),
    [("paypal_capture", {"amount": {"value": 14.99, "currency_code": "EUR"}}),
     ("paypal_capture", {"amount": {"value": "14.999", "currency_code": "EUR"}}),
     ("paypal_capture", {"amount": {"value": "-1.00", "currency_code": "EUR"}}),
     ("paypal_capture", {"amount": {}}), ("paypal_capture", {"id": None}), ("paypal_refund", {"links": {}}),
     ("paypal_dispute", {"dispute_amount": None}), ("paypal_sale", {"state": 1})],
)  # fmt: skip
def test_objects_of_another_shape_are_parked(name: str, changes: dict[str, Any]) -> None:
    assert parking(name, ORDER, **changes) == "malformed"
