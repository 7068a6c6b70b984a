"""Creem: a signature over the raw body alone, so only the inbox tells a repeated delivery (payments: other providers).

A product of Creem is what the catalog knows as a price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from models.rules.facts import (
    DisputeChanged,
    Fact,
    Item,
    Line,
    Linked,
    PackPaid,
    PeriodPaid,
    RefundChanged,
    Status,
    SubscriptionChanged,
)
from workers.providers.base import (
    ACCOUNT_KEY,
    ORDER_KEY,
    Event,
    Facts,
    Fetch,
    Id,
    Minor,
    Parked,
    ParkedError,
    Quantity,
    VerificationError,
    account_of,
    aliases_of,
    check_size,
    created_at,
    currency_of,
    event_fields,
    header_of,
    order_of,
    read_again,
    read_envelope,
    read_object,
    when,
)
from workers.providers.signing import check_hmac, check_secrets

LIVE_MODES = frozenset({"prod", "live"})
"""What Creem calls live; its test modes have had several names."""

Time = Annotated[int, msgspec.Meta(ge=0, le=10**14)] | str
"""Milliseconds since 1970, or ISO 8601."""

Metadata = dict[str, Any]


class _Named(msgspec.Struct):
    id: Id


Ref = Id | _Named


class _Envelope(msgspec.Struct):
    id: Id
    eventType: Id
    created_at: Time
    object: dict[str, Any]


class _Order(msgspec.Struct):
    id: Id
    product: Ref
    amount: Minor
    currency: str
    status: str
    type: str | None = None
    amount_paid: Minor | None = None
    tax_amount: Minor | None = None
    transaction: Ref | None = None


class _Checkout(msgspec.Struct):
    id: Id
    order: _Order | None = None
    request_id: str | None = None
    units: Quantity | None = None
    customer: Ref | None = None
    subscription: Ref | None = None
    metadata: Metadata | None = None


class _Product(msgspec.Struct):
    id: Id
    price: Minor
    currency: str


class _Transaction(msgspec.Struct):
    id: Id
    amount: Minor
    currency: str
    amount_paid: Minor | None = None
    refunded_amount: Minor | None = None
    status: Id | None = None
    order: Ref | None = None
    subscription: Ref | None = None


class _SubscriptionItem(msgspec.Struct):
    id: Id
    product_id: Id
    units: Quantity = 1


class _Subscription(msgspec.Struct):
    id: Id
    product: _Product | Id
    status: str
    customer: Ref | None = None
    items: list[_SubscriptionItem] = []
    last_transaction_id: Id | None = None
    last_transaction: _Transaction | None = None
    current_period_start_date: Time | None = None
    current_period_end_date: Time | None = None
    canceled_at: Time | None = None
    metadata: Metadata | None = None


class _Refund(msgspec.Struct):
    id: Id
    status: str
    refund_amount: Minor
    refund_currency: str
    transaction: _Transaction | None = None
    order: Ref | None = None
    checkout: _Checkout | Id | None = None


class _Dispute(msgspec.Struct):
    id: Id
    amount: Minor
    currency: str
    transaction: _Transaction | None = None
    order: Ref | None = None
    checkout: _Checkout | Id | None = None


def _id(ref: _Named | _Product | _Transaction | _Checkout | str | None) -> str | None:
    return ref if ref is None or isinstance(ref, str) else ref.id


def _account(metadata: Metadata | None) -> str | None:
    return account_of((metadata or {}).get(ACCOUNT_KEY))


class Creem:
    """The adapter of Creem.

    :param secrets: of the endpoint; each is tried.
    :param livemode: whether this ledger is for live money: events of the other mode are parked.
    """

    name = "creem"
    accepted: ClassVar[bytes] = b""

    def __init__(self, secrets: Sequence[str], *, livemode: bool) -> None:
        self._keys = check_secrets(secrets, "Creem")
        self._livemode = livemode

    def verify(self, raw: bytes, headers: Mapping[str, str], now: datetime) -> Event:
        """See :class:`~workers.providers.base.Adapter`; nothing that is signed has a time."""
        check_size(raw)
        check_hmac(raw, header_of(headers, "creem-signature"), self._keys)
        return self.read(raw)

    def read(self, raw: bytes) -> Event:
        """See :class:`~workers.providers.base.Adapter`."""
        body = read_envelope(raw, _Envelope)
        mode = body.object.get("mode")
        if not isinstance(mode, str):
            raise VerificationError("not_an_event", "the event does not say whether it is a test")
        return Event(
            provider=self.name,
            id=body.id,
            type=body.eventType,
            livemode=mode in LIVE_MODES,
            created=created_at(body.created_at, unit="ms"),
            object=body.object,
        )

    def normalise(self, event: Event, fetch: Fetch) -> Facts | Parked:
        """See :class:`~workers.providers.base.Adapter`.

        Of ``fetch`` it asks for ``checkout``, ``subscription`` and ``transaction``.
        """
        if event.livemode is not self._livemode:
            return Parked("other_mode", "a test event at a live ledger, or a live one at a test ledger")
        make = _MAKERS.get(event.type)
        if make is None and event.type.startswith("subscription."):
            make = _subscription
        if make is None:
            return ()
        try:
            return tuple(make(event, fetch))
        except ParkedError as parked:
            return parked.parked


def _checkout(event: Event, fetch: Fetch) -> Iterable[Fact]:
    checkout, _ = read_again(event, fetch, "checkout", _Checkout, "id")
    order = checkout.order
    if order is None:
        raise ParkedError("malformed", "a completed checkout without an order")
    about = event_fields(event) | {
        "account": _account(checkout.metadata),
        "aliases": aliases_of(
            ("checkout", checkout.id),
            ("order", order.id),
            ("transaction", _id(order.transaction)),
            ("subscription", _id(checkout.subscription)),
            ("customer", _id(checkout.customer)),
        ),
    }
    if order.type == "recurring" or checkout.subscription is not None:
        return (Linked(key=checkout.id, **about),)
    if order.status != "paid":
        return ()
    paid = order.amount + (order.tax_amount or 0) if order.amount_paid is None else order.amount_paid
    units = 1 if checkout.units is None else checkout.units
    price = _id(order.product)
    assert price is not None
    return (
        PackPaid(
            key=order.id,
            currency=currency_of(order.currency),
            paid_minor=paid,
            lines=(Line(price=price, quantity=units, amount_minor=order.amount),),
            reference=order_of((checkout.metadata or {}).get(ORDER_KEY), checkout.request_id),
            **about,
        ),
    )


def _about_subscription(event: Event, subscription: _Subscription) -> dict[str, Any]:
    return event_fields(event) | {
        "account": _account(subscription.metadata),
        "aliases": aliases_of(
            ("subscription", subscription.id),
            ("customer", _id(subscription.customer)),
            ("transaction", subscription.last_transaction_id if event.type == "subscription.paid" else None),
        ),
    }


def _paid(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """A period. As the event has it: fetched again, the subscription may be a period further."""
    subscription = read_object(event.object, _Subscription)
    transaction = subscription.last_transaction
    if subscription.last_transaction_id is None:
        raise ParkedError("malformed", "a paid subscription without its transaction")
    fetched = fetch("transaction", subscription.last_transaction_id)
    if fetched is not None:
        transaction = read_object(fetched, _Transaction)
    start, end = when(subscription.current_period_start_date), when(subscription.current_period_end_date)
    if transaction is not None and transaction.id == subscription.last_transaction_id:
        currency, amount = transaction.currency, transaction.amount
        paid = amount if transaction.amount_paid is None else transaction.amount_paid
    elif isinstance(subscription.product, _Product):
        currency, amount = subscription.product.currency, subscription.product.price
        paid = amount
    else:
        raise ParkedError("malformed", "a paid subscription without an amount")
    price = _id(subscription.product)
    units = next((item.units for item in subscription.items if item.product_id == price), 1)
    return (
        PeriodPaid(
            key=subscription.last_transaction_id,
            subscription=subscription.id,
            price=price,
            quantity=units,
            period_start=start,
            period_end=end,
            reason="cycle",
            currency=currency_of(currency),
            amount_minor=amount,
            paid_minor=paid,
            **_about_subscription(event, subscription),
        ),
    )


def _returned(event: Event, about: _Refund | _Dispute) -> dict[str, Any]:
    transaction, checkout = about.transaction, about.checkout
    aliases = aliases_of(
        ("transaction", _id(transaction)),
        ("order", _id(about.order) or (None if transaction is None else _id(transaction.order))),
        ("checkout", _id(checkout)),
    )
    if not aliases:
        raise ParkedError("no_purchase", "money back of no payment")
    return event_fields(event) | {
        "aliases": aliases,
        "account": _account(checkout.metadata) if isinstance(checkout, _Checkout) else None,
        "paid_minor": None if transaction is None else transaction.amount_paid,
    }


def _refund(event: Event, fetch: Fetch) -> Iterable[Fact]:
    refund, _ = read_again(event, fetch, "refund", _Refund, "id")
    status: Literal["settled", "undone"]
    if refund.status == "succeeded":
        status = "settled"
    elif refund.status in ("failed", "canceled"):
        status = "undone"
    else:
        return ()  # on its way
    return (
        RefundChanged(
            key=refund.id,
            status=status,
            currency=currency_of(refund.refund_currency),
            amount_minor=refund.refund_amount,
            **_returned(event, refund),
        ),
    )


def _dispute(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """Creem tells of no other stage: with the dispute the money is gone when the transaction was charged back."""
    dispute, _ = read_again(event, fetch, "dispute", _Dispute, "id")
    transaction = dispute.transaction
    taken = transaction is not None and transaction.status == "chargeback"
    return (
        DisputeChanged(
            key=f"{dispute.id}:created",
            dispute=dispute.id,
            stage="created",
            status=(transaction.status if transaction is not None else None) or "open",
            is_open=True,
            currency=currency_of(dispute.currency),
            amount_minor=dispute.amount,
            withdrawn_minor=dispute.amount if taken else 0,
            movements=int(taken),
            **_returned(event, dispute),
        ),
    )


_STATUSES: dict[str, Status] = {
    "active": "active",
    "scheduled_cancel": "active",
    "trialing": "trialing",
    "past_due": "past_due",
    "expired": "past_due",  # no payment came, and one still may
    "unpaid": "unpaid",
    "paused": "paused",
    "incomplete": "incomplete",
    "canceled": "canceled",
}


def _subscription(event: Event, fetch: Fetch) -> Iterable[Fact]:
    subscription, _ = read_again(event, fetch, "subscription", _Subscription, "id")
    status = _STATUSES.get(subscription.status)
    if status is None:
        raise ParkedError("unknown_status", f"a subscription of status {subscription.status!r:.64}")
    start, end = when(subscription.current_period_start_date), when(subscription.current_period_end_date)
    price = _id(subscription.product)
    assert price is not None
    items = tuple(
        Item(id=item.id, price=item.product_id, quantity=item.units, period_start=start, period_end=end)
        for item in subscription.items
    ) or (Item(price=price, quantity=1, period_start=start, period_end=end),)
    return (
        SubscriptionChanged(
            key=subscription.id,
            status=status,
            items=items,
            ends_at=end if subscription.status == "scheduled_cancel" else None,
            ended_at=when(subscription.canceled_at) if status == "canceled" else None,
            trial_end=end if status == "trialing" else None,
            collection_paused=status == "paused",
            **_about_subscription(event, subscription),
        ),
    )


_MAKERS: dict[str, Callable[[Event, Fetch], Iterable[Fact]]] = {
    "checkout.completed": _checkout,
    "subscription.paid": _paid,
    "refund.created": _refund,
    "dispute.created": _dispute,
}
