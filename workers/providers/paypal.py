"""PayPal: an RSA signature of the delivery's id, its time, the webhook and the body's CRC (payments: other providers).

The certificate comes from an address in the headers, so both are checked: the address lies below paypal.com, and the
certificate leads to an authority that is trusted here, is valid now and names a host below paypal.com.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.verification import PolicyBuilder, Store
from cryptography.x509.verification import VerificationError as ChainError

from models.rules.facts import (
    DisputeChanged,
    Fact,
    Item,
    Line,
    PackPaid,
    PaymentFailed,
    PeriodPaid,
    RefundChanged,
    Status,
    SubscriptionChanged,
)
from workers.providers.base import (
    Event,
    Facts,
    Fetch,
    Id,
    Parked,
    ParkedError,
    VerificationError,
    account_of,
    aliases_of,
    check_size,
    check_time,
    created_at,
    currency_of,
    event_fields,
    header_of,
    instant_of,
    merge_lines,
    minor_of,
    order_of,
    read_again,
    read_envelope,
    read_object,
    when,
)

_ADDRESS = re.compile(r"https://(?:[a-z0-9-]+\.)+paypal\.com(?::443)?/[A-Za-z0-9._~/-]*\Z", re.ASCII)
"""Of a certificate. Stricter than an address need be, so that no reader of addresses sees another host in it."""

_BELOW = re.compile(r"(?:\*\.)?((?:[a-z0-9-]+\.)*paypal\.com)\Z", re.ASCII | re.IGNORECASE)

_CAPTURE_LINK = re.compile(r"/v[12]/payments/captures?/([A-Za-z0-9]+)\Z", re.ASCII)
_SALE_LINK = re.compile(r"/v1/payments/sale/([A-Za-z0-9]+)\Z", re.ASCII)
_ORDER_LINK = re.compile(r"/v2/checkout/orders/([A-Za-z0-9]+)\Z", re.ASCII)

Certificates = Callable[[str], bytes]
"""Gets the PEM at an address, kept for as long as one likes. What it raises goes through: the delivery is to be
repeated."""

Count = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}\Z")]


class _Envelope(msgspec.Struct):
    id: Id
    event_type: Id
    create_time: str
    resource: dict[str, Any]
    resource_version: str | None = None


class _Money(msgspec.Struct):
    """Of either generation of the API."""

    value: str | None = None
    total: str | None = None
    currency_code: str | None = None
    currency: str | None = None

    def parse(self, *, signed: bool = False) -> tuple[int, str]:
        """Minor units and currency.

        :param signed: whether a minus is let pass: the older API has one on what goes back.
        """
        text, currency = self.value or self.total, self.currency_code or self.currency
        if text is None or currency is None:
            raise ParkedError("malformed", "an amount without value or currency")
        currency = currency_of(currency)
        return minor_of(text.removeprefix("-") if signed else text, currency), currency


class _Link(msgspec.Struct):
    href: str
    rel: str


class _Related(msgspec.Struct):
    order_id: Id | None = None
    capture_id: Id | None = None


class _Supplementary(msgspec.Struct):
    related_ids: _Related | None = None


class _Capture(msgspec.Struct):
    id: Id
    status: str
    amount: _Money
    custom_id: str | None = None
    invoice_id: str | None = None
    supplementary_data: _Supplementary | None = None
    links: list[_Link] = []


class _OrderItem(msgspec.Struct):
    quantity: Count
    unit_amount: _Money
    sku: Id | None = None


class _Captured(msgspec.Struct):
    id: Id


class _Payments(msgspec.Struct):
    captures: list[_Captured] = []


class _Unit(msgspec.Struct):
    items: list[_OrderItem] = []
    custom_id: str | None = None
    payments: _Payments | None = None


class _Order(msgspec.Struct):
    id: Id
    purchase_units: list[_Unit]


class _Sale(msgspec.Struct):
    id: Id
    state: str
    amount: _Money
    billing_agreement_id: Id | None = None
    custom: str | None = None


class _Refund(msgspec.Struct):
    id: Id
    amount: _Money
    status: str | None = None
    state: str | None = None
    sale_id: Id | None = None
    capture_id: Id | None = None
    custom_id: str | None = None
    links: list[_Link] = []


class _Disputed(msgspec.Struct):
    seller_transaction_id: Id | None = None


class _Dispute(msgspec.Struct):
    dispute_id: Id
    status: Id
    dispute_amount: _Money
    disputed_transactions: list[_Disputed] = []


class _FailedPayment(msgspec.Struct):
    amount: _Money
    time: str
    next_payment_retry_time: str | None = None


class _BillingInfo(msgspec.Struct):
    next_billing_time: str | None = None
    last_failed_payment: _FailedPayment | None = None


class _Subscription(msgspec.Struct):
    id: Id
    status: str
    plan_id: Id
    quantity: Count = "1"
    custom_id: str | None = None
    status_update_time: str | None = None
    billing_info: _BillingInfo | None = None


def _bad_certificate(sentence: str) -> VerificationError:
    return VerificationError("bad_certificate", sentence)


class PayPal:
    """The adapter of PayPal.

    :param webhooks: ids of the webhook at PayPal; each is tried.
    :param certificates: gets the certificate at an address.
    :param authorities: PEM of the certificates that are trusted to lead to PayPal's, and of those between, as PayPal
        does not always send them.
    :param livemode: whether they are webhooks of live accounts: the events do not say.
    :raises ValueError: when there is no webhook or no authority.
    """

    name = "paypal"
    accepted: ClassVar[bytes] = b""

    def __init__(
        self, webhooks: Sequence[str], certificates: Certificates, authorities: bytes, *, livemode: bool
    ) -> None:
        if not webhooks or not all(webhook.strip() for webhook in webhooks):
            raise ValueError("an endpoint of PayPal needs the id of its webhook")
        self._webhooks = tuple(webhooks)
        self._certificates = certificates
        self._store = Store(x509.load_pem_x509_certificates(authorities))
        self._livemode = livemode

    def verify(self, raw: bytes, headers: Mapping[str, str], now: datetime) -> Event:
        """See :class:`~workers.providers.base.Adapter`.

        An old time is no reason to refuse: a delivery that is repeated for days may keep that of the first.
        """
        check_size(raw)
        delivery = header_of(headers, "paypal-transmission-id")
        time = header_of(headers, "paypal-transmission-time")
        algorithm = header_of(headers, "paypal-auth-algo")
        address = header_of(headers, "paypal-cert-url")
        if algorithm.lower() != "sha256withrsa":
            raise VerificationError("bad_signature", "the signature is of another algorithm")
        try:
            signature = base64.b64decode(header_of(headers, "paypal-transmission-sig"), validate=True)
            signed_at = instant_of(time)
        except (binascii.Error, ValueError, OverflowError):
            raise VerificationError("bad_signature", "the signature or its time is not one") from None
        if _ADDRESS.match(address) is None:
            raise _bad_certificate("the certificate's address is not below paypal.com")
        key = self._key(self._certificates(address), now)
        for webhook in self._webhooks:
            message = f"{delivery}|{time}|{webhook}|{zlib.crc32(raw)}".encode()
            try:
                key.verify(signature, message, PKCS1v15(), SHA256())
            except InvalidSignature:
                continue
            check_time(signed_at.timestamp(), now, past=False)
            return self.read(raw)
        raise VerificationError("bad_signature", "the signature is not of this body and webhook")

    def _key(self, pem: bytes, now: datetime) -> RSAPublicKey:
        try:
            leaf, *others = x509.load_pem_x509_certificates(pem)
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            hosts = [found for name in names.get_values_for_type(x509.DNSName) if (found := _BELOW.match(name))]
            if not hosts:
                raise _bad_certificate("the certificate names no host below paypal.com")
            host = f"any.{hosts[0][1]}" if hosts[0][0].startswith("*") else hosts[0][1]
            verifier = PolicyBuilder().store(self._store).time(now).build_server_verifier(x509.DNSName(host))
            verifier.verify(leaf, others)
            key = leaf.public_key()
        except (ChainError, ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.InvalidVersion,
                x509.UnsupportedGeneralNameType, UnsupportedAlgorithm):  # fmt: skip
            raise _bad_certificate("the certificate is not valid, or not of an authority that is trusted") from None
        if not isinstance(key, RSAPublicKey):
            raise _bad_certificate("the certificate's key is not of RSA")
        return key

    def read(self, raw: bytes) -> Event:
        """See :class:`~workers.providers.base.Adapter`."""
        body = read_envelope(raw, _Envelope)
        return Event(
            provider=self.name,
            id=body.id,
            type=body.event_type,
            livemode=self._livemode,
            created=created_at(body.create_time),
            release=body.resource_version,
            object=body.resource,
        )

    def normalise(self, event: Event, fetch: Fetch) -> Facts | Parked:
        """See :class:`~workers.providers.base.Adapter`.

        Of ``fetch`` it asks for ``capture``, ``order``, ``sale``, ``refund``, ``subscription`` and ``dispute``.
        """
        make = _MAKERS.get(event.type)
        if make is None:
            return ()
        try:
            return tuple(make(event, fetch))
        except ParkedError as parked:
            return parked.parked


def _linked(links: Iterable[_Link], pattern: re.Pattern[str]) -> str | None:
    """The id that a link leads to."""
    return next((found[1] for link in links if (found := pattern.search(link.href))), None)


def _order_id(capture: _Capture) -> str | None:
    related = None if capture.supplementary_data is None else capture.supplementary_data.related_ids
    return (related and related.order_id) or _linked(capture.links, _ORDER_LINK)


def _about_capture(event: Event, capture: _Capture, unit: _Unit | None) -> dict[str, Any]:
    return event_fields(event) | {
        "key": capture.id,
        "account": account_of(capture.custom_id, None if unit is None else unit.custom_id),
        "aliases": aliases_of(("capture", capture.id), ("order", _order_id(capture))),
    }


def _captured(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """A pack. Its price ids are the articles of the order, which a capture does not show."""
    capture, _ = read_again(event, fetch, "capture", _Capture, "id")
    if capture.status not in ("COMPLETED", "PARTIALLY_REFUNDED", "REFUNDED"):
        return ()  # not paid yet, or no more: another event will tell
    paid, currency = capture.amount.parse()
    unit = _unit_of(capture, fetch)
    lines = []
    for item in () if unit is None else unit.items:
        amount, of = item.unit_amount.parse()
        if item.sku is None or of != currency:
            raise ParkedError("malformed", "an article of the order without its price id, or in another currency")
        lines.append(Line(price=item.sku, quantity=int(item.quantity), amount_minor=amount * int(item.quantity)))
    reference = order_of(capture.invoice_id)
    if not lines and reference is None:
        raise ParkedError("no_line_items", "what was bought is only in PayPal's API: an API key is needed")
    return (
        PackPaid(
            currency=currency,
            paid_minor=paid,
            lines=merge_lines(lines),
            reference=reference,
            **_about_capture(event, capture, unit),
        ),
    )


def _unit_of(capture: _Capture, fetch: Fetch) -> _Unit | None:
    """The part of the order that a capture paid."""
    order_id = _order_id(capture)
    current = None if order_id is None else fetch("order", order_id)
    if current is None:
        return None
    units = read_object(current, _Order).purchase_units
    for unit in units:
        if unit.payments is not None and any(each.id == capture.id for each in unit.payments.captures):
            return unit
    if len(units) != 1:
        raise ParkedError("malformed", "an order of several parts, none of which this payment was for")
    return units[0]


def _capture_failed(event: Event, fetch: Fetch) -> Iterable[Fact]:
    capture = read_object(event.object, _Capture)
    amount, currency = capture.amount.parse()
    return (PaymentFailed(currency=currency, amount_minor=amount, **_about_capture(event, capture, None)),)


def _sale(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """A period. What is paid for says the subscription; from when to when nobody does."""
    sale, _ = read_again(event, fetch, "sale", _Sale, "id")
    if sale.billing_agreement_id is None:
        raise ParkedError("unknown_sale", "a sale that is of no subscription")
    paid, currency = sale.amount.parse()
    about = event_fields(event) | {
        "key": sale.id,
        "aliases": aliases_of(("sale", sale.id), ("subscription", sale.billing_agreement_id)),
        "currency": currency,
        "amount_minor": paid,
    }
    if event.type == "PAYMENT.SALE.DENIED":
        return (PaymentFailed(account=account_of(sale.custom), **about),)
    if sale.state not in ("completed", "partially_refunded", "refunded"):
        return ()
    current = fetch("subscription", sale.billing_agreement_id)
    subscription = None if current is None else read_object(current, _Subscription)
    return (
        PeriodPaid(
            account=account_of(None if subscription is None else subscription.custom_id, sale.custom),
            subscription=sale.billing_agreement_id,
            price=None if subscription is None else subscription.plan_id,
            quantity=1 if subscription is None else int(subscription.quantity),
            reason="cycle",
            paid_minor=paid,
            **about,
        ),
    )


def _refund(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """Money back, by the seller or by PayPal: a reversal has an id of its own like a refund."""
    refund, _ = read_again(event, fetch, "refund", _Refund, "id")
    state = (refund.status or refund.state or "").lower()
    status: Literal["settled", "undone"]
    if state == "completed":
        status = "settled"
    elif state in ("failed", "cancelled"):
        status = "undone"
    else:
        return ()  # on its way
    amount, currency = refund.amount.parse(signed=True)
    aliases = aliases_of(
        ("capture", refund.capture_id or _linked(refund.links, _CAPTURE_LINK)),
        ("sale", refund.sale_id or _linked(refund.links, _SALE_LINK)),
    )
    if not aliases:
        raise ParkedError("no_purchase", "the event does not say what was paid back: an API key is needed")
    return (
        RefundChanged(
            key=refund.id,
            status=status,
            currency=currency,
            amount_minor=amount,
            account=account_of(refund.custom_id),
            aliases=aliases,
            **event_fields(event),
        ),
    )


_STAGES: dict[str, Literal["created", "updated", "closed"]] = {
    "CUSTOMER.DISPUTE.CREATED": "created",
    "CUSTOMER.DISPUTE.UPDATED": "updated",
    "CUSTOMER.DISPUTE.RESOLVED": "closed",
}


def _dispute(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """A stage of a dispute. It holds back nothing itself: what PayPal takes comes as a reversal or a refund."""
    dispute, _ = read_again(event, fetch, "dispute", _Dispute, "dispute_id")
    payments = [each.seller_transaction_id for each in dispute.disputed_transactions]
    aliases = aliases_of(*(("capture", each) for each in payments), *(("sale", each) for each in payments))
    if not aliases:
        raise ParkedError("no_purchase", "a dispute of no payment")
    amount, currency = dispute.dispute_amount.parse()
    stage = _STAGES[event.type]
    return (
        DisputeChanged(
            key=f"{dispute.dispute_id}:{stage}",
            dispute=dispute.dispute_id,
            stage=stage,
            status=dispute.status,
            is_open=dispute.status != "RESOLVED",
            currency=currency,
            amount_minor=amount,
            withdrawn_minor=0,
            movements=0,
            aliases=aliases,
            **event_fields(event),
        ),
    )


_STATUSES: dict[str, Status] = {
    "APPROVAL_PENDING": "incomplete",
    "APPROVED": "incomplete",
    "ACTIVE": "active",
    "SUSPENDED": "paused",
    "CANCELLED": "canceled",
    "EXPIRED": "canceled",
}


def _about_subscription(event: Event, subscription: _Subscription) -> dict[str, Any]:
    return event_fields(event) | {
        "account": account_of(subscription.custom_id),
        "aliases": aliases_of(("subscription", subscription.id)),
    }


def _subscription(event: Event, fetch: Fetch) -> Iterable[Fact]:
    subscription, _ = read_again(event, fetch, "subscription", _Subscription, "id")
    status = _STATUSES.get(subscription.status)
    if status is None:
        raise ParkedError("unknown_status", f"a subscription of status {subscription.status!r:.64}")
    return (
        SubscriptionChanged(
            key=subscription.id,
            status=status,
            items=(Item(price=subscription.plan_id, quantity=int(subscription.quantity)),),
            ended_at=when(subscription.status_update_time) if status == "canceled" else None,
            collection_paused=status == "paused",
            **_about_subscription(event, subscription),
        ),
    )


def _period_failed(event: Event, fetch: Fetch) -> Iterable[Fact]:
    subscription = read_object(event.object, _Subscription)
    failed = None if subscription.billing_info is None else subscription.billing_info.last_failed_payment
    amount, currency = (None, None) if failed is None else failed.amount.parse()
    failed_at = None if failed is None else when(failed.time)
    return (
        PaymentFailed(
            key=f"{subscription.id}:{event.id if failed_at is None else failed_at.isoformat()}",
            currency=currency,
            amount_minor=amount,
            next_attempt_at=None if failed is None else when(failed.next_payment_retry_time),
            **_about_subscription(event, subscription),
        ),
    )


_MAKERS: dict[str, Callable[[Event, Fetch], Iterable[Fact]]] = {
    "PAYMENT.CAPTURE.COMPLETED": _captured,
    "PAYMENT.CAPTURE.DENIED": _capture_failed,
    "PAYMENT.CAPTURE.DECLINED": _capture_failed,
    "PAYMENT.CAPTURE.REFUNDED": _refund,
    "PAYMENT.CAPTURE.REVERSED": _refund,
    "PAYMENT.SALE.COMPLETED": _sale,
    "PAYMENT.SALE.DENIED": _sale,
    "PAYMENT.SALE.REFUNDED": _refund,
    "PAYMENT.SALE.REVERSED": _refund,
    **dict.fromkeys(_STAGES, _dispute),
    "BILLING.SUBSCRIPTION.CREATED": _subscription,
    "BILLING.SUBSCRIPTION.ACTIVATED": _subscription,
    "BILLING.SUBSCRIPTION.RE-ACTIVATED": _subscription,
    "BILLING.SUBSCRIPTION.UPDATED": _subscription,
    "BILLING.SUBSCRIPTION.SUSPENDED": _subscription,
    "BILLING.SUBSCRIPTION.CANCELLED": _subscription,
    "BILLING.SUBSCRIPTION.EXPIRED": _subscription,
    "BILLING.SUBSCRIPTION.PAYMENT.FAILED": _period_failed,
}
