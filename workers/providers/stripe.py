"""Stripe: snapshot events of the releases that are known, signed over the raw body (payments: from event to fact).

The signature is checked by stripe-python; everything after it by us, as the library raises half a dozen kinds of
exception on bodies that are no events, and refuses old signatures alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from stripe import SignatureVerificationError, WebhookSignature

from models.rules.catalog import MINOR_DIGITS
from models.rules.facts import (
    DisputeChanged,
    Fact,
    Item,
    Line,
    Linked,
    PackPaid,
    PaymentFailed,
    PeriodPaid,
    RefundChanged,
    Stage,
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
    check_time,
    created_at,
    currency_of,
    event_fields,
    header_of,
    merge_lines,
    order_of,
    read_again,
    read_envelope,
    read_object,
    when,
)

RELEASES = frozenset({"clover", "dahlia", "endive"})
"""Names of the API's releases whose objects are known; a version is a date, a dot and the name."""

STRIPE_DIGITS = {"ISK": 2, "UGX": 2, "MGA": 0}
"""Decimals of the currencies that Stripe counts otherwise than ISO 4217."""

Seconds = Annotated[int, msgspec.Meta(ge=0, le=10**11)]
Metadata = dict[str, Any]


class _Named(msgspec.Struct):
    id: Id


Ref = Id | _Named
"""Another object: its id, or where it was expanded the object."""


class _Data(msgspec.Struct):
    object: dict[str, Any]


class _Envelope(msgspec.Struct):
    object: str
    id: Id
    type: Id
    livemode: bool
    created: Seconds | str
    data: _Data | None = None
    api_version: str | None = None
    account: Id | None = None


class _Price(msgspec.Struct):
    id: Id


class _SoldLine(msgspec.Struct):
    price: _Price | None = None
    quantity: Quantity | None = None
    amount_total: Minor | None = None


class _SoldLines(msgspec.Struct):
    data: list[_SoldLine]
    has_more: bool = False


class _Session(msgspec.Struct):
    id: Id
    object: Literal["checkout.session"]
    mode: str
    payment_status: str
    amount_total: Minor | None = None
    currency: str | None = None
    client_reference_id: str | None = None
    metadata: Metadata | None = None
    payment_intent: Ref | None = None
    invoice: Ref | None = None
    subscription: Ref | None = None
    customer: Ref | None = None
    line_items: _SoldLines | None = None


class _ProrationDetails(msgspec.Struct):
    credited_items: dict[str, Any] | None = None


class _LineDetails(msgspec.Struct):
    proration: bool = False
    proration_details: _ProrationDetails | None = None
    subscription: Ref | None = None
    subscription_item: Ref | None = None


class _LineParent(msgspec.Struct):
    type: str
    subscription_item_details: _LineDetails | None = None
    invoice_item_details: _LineDetails | None = None


class _PriceDetails(msgspec.Struct):
    price: Ref | None = None


class _Pricing(msgspec.Struct):
    price_details: _PriceDetails | None = None


class _Period(msgspec.Struct):
    start: Seconds
    end: Seconds


class _DiscountAmount(msgspec.Struct):
    amount: Minor


class _InvoiceLine(msgspec.Struct):
    amount: Minor
    """Before discounts."""
    period: _Period
    discount_amounts: list[_DiscountAmount] | None = None
    quantity: Quantity | None = None
    parent: _LineParent | None = None
    pricing: _Pricing | None = None

    @property
    def details(self) -> _LineDetails | None:
        """Those of a subscription's line; of a line that is not of one, None."""
        if self.parent is None:
            return None
        details = self.parent.subscription_item_details or self.parent.invoice_item_details
        return None if details is None or details.subscription is None else details

    @property
    def discounted(self) -> int:
        """What it came to."""
        return self.amount - sum(discount.amount for discount in self.discount_amounts or ())

    @property
    def is_credit(self) -> bool:
        """Whether it gives back unused time."""
        details = self.details
        proration = None if details is None else details.proration_details
        return self.amount < 0 or (proration is not None and bool(proration.credited_items))


class _InvoiceLines(msgspec.Struct):
    data: list[_InvoiceLine]
    has_more: bool = False


class _SubscriptionDetails(msgspec.Struct):
    subscription: Ref | None = None
    metadata: Metadata | None = None


class _InvoiceParent(msgspec.Struct):
    subscription_details: _SubscriptionDetails | None = None


class _Payment(msgspec.Struct):
    payment_intent: Ref | None = None
    charge: Ref | None = None


class _InvoicePayment(msgspec.Struct):
    id: Id
    payment: _Payment
    invoice: Ref | None = None
    status: str | None = None


class _InvoicePayments(msgspec.Struct):
    data: list[_InvoicePayment]


class _Invoice(msgspec.Struct):
    id: Id
    object: Literal["invoice"]
    currency: str
    amount_paid: Minor
    amount_due: Minor
    lines: _InvoiceLines
    status: str | None = None
    billing_reason: str | None = None
    parent: _InvoiceParent | None = None
    payments: _InvoicePayments | None = None
    customer: Ref | None = None
    metadata: Metadata | None = None
    attempt_count: Quantity = 0
    next_payment_attempt: Seconds | None = None


class _Refund(msgspec.Struct):
    id: Id
    object: Literal["refund"]
    amount: Minor
    currency: str
    status: str | None = None
    charge: Ref | None = None
    payment_intent: Ref | None = None
    metadata: Metadata | None = None


class _BalanceTransaction(msgspec.Struct):
    amount: Minor
    currency: str


class _Dispute(msgspec.Struct):
    id: Id
    object: Literal["dispute"]
    amount: Minor
    currency: str
    status: Id
    charge: Ref | None = None
    payment_intent: Ref | None = None
    balance_transactions: list[_BalanceTransaction] = []
    metadata: Metadata | None = None


class _SubscriptionItem(msgspec.Struct):
    id: Id
    price: _Price
    quantity: Quantity | None = None
    current_period_start: Seconds | None = None
    current_period_end: Seconds | None = None


class _SubscriptionItems(msgspec.Struct):
    data: list[_SubscriptionItem]
    has_more: bool = False


class _Subscription(msgspec.Struct):
    id: Id
    object: Literal["subscription"]
    status: Status
    items: _SubscriptionItems
    customer: Ref | None = None
    metadata: Metadata | None = None
    cancel_at: Seconds | None = None
    cancel_at_period_end: bool = False
    ended_at: Seconds | None = None
    trial_start: Seconds | None = None
    trial_end: Seconds | None = None
    pause_collection: dict[str, Any] | None = None


class _PaymentIntent(msgspec.Struct):
    id: Id
    object: Literal["payment_intent"]
    latest_charge: Ref | None = None
    metadata: Metadata | None = None


class _Charge(msgspec.Struct):
    id: Id
    object: Literal["charge"]
    payment_intent: Ref | None = None
    metadata: Metadata | None = None


def id_of(ref: Ref | None) -> str | None:
    """The id of another object, expanded or not."""
    return ref.id if isinstance(ref, _Named) else ref


def money_of(amount: int, currency: str) -> int:
    """Stripe's smallest units, as minor units of the catalog.

    :param currency: in upper case.
    :raises ParkedError: when the amount is no whole number of those.
    """
    shift = MINOR_DIGITS.get(currency, 2) - STRIPE_DIGITS.get(currency, MINOR_DIGITS.get(currency, 2))
    if shift > 0:
        return amount * int(10**shift)
    whole, rest = divmod(amount, int(10**-shift))
    if rest:
        raise ParkedError("malformed", f"an amount has more decimals than {currency}")
    return whole


def _account(metadata: Metadata | None, *others: object) -> str | None:
    return account_of((metadata or {}).get(ACCOUNT_KEY), *others)


class Stripe:
    """The adapter of Stripe.

    :param secrets: of the endpoint, ``whsec_...``; each is tried, so that one can take over from another.
    :param livemode: whether this ledger is for live money: events of the other mode are parked.
    """

    name = "stripe"
    accepted: ClassVar[bytes] = b""

    def __init__(self, secrets: Sequence[str], *, livemode: bool) -> None:
        if not secrets or not all(secret.strip() for secret in secrets):
            raise ValueError("an endpoint of Stripe needs its secret")
        self._secrets = tuple(secrets)
        self._livemode = livemode

    def verify(self, raw: bytes, headers: Mapping[str, str], now: datetime) -> Event:
        """See :class:`~workers.providers.base.Adapter`."""
        check_size(raw)
        header = header_of(headers, "stripe-signature")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise VerificationError("not_json", "the body is not UTF-8") from None
        if not any(self._is_signed(text, header, secret) for secret in self._secrets):
            raise VerificationError("bad_signature", "no signature of the body by a secret of this endpoint")
        # Read as the library reads it: the first of these is the one that was signed.
        check_time(next(int(value) for key, value, *_ in _pairs(header) if key == "t"), now)
        return self.read(raw)

    @staticmethod
    def _is_signed(text: str, header: str, secret: str) -> bool:
        try:
            # Without a tolerance: the library would ask the clock, and take any time to come.
            WebhookSignature.verify_header(text, header, secret, tolerance=None)
        except SignatureVerificationError:
            return False
        return True

    def read(self, raw: bytes) -> Event:
        """See :class:`~workers.providers.base.Adapter`."""
        body = read_envelope(raw, _Envelope)
        thin = body.object == "v2.core.event"
        if not thin and (body.object != "event" or body.data is None or isinstance(body.created, str)):
            raise VerificationError("not_an_event", "the body is not an event of Stripe")
        return Event(
            provider=self.name,
            id=body.id,
            type=body.type,
            livemode=body.livemode,
            created=created_at(body.created),
            release=body.api_version,
            thin=thin,
            merchant=body.account,
            object={} if body.data is None or thin else body.data.object,
        )

    def normalise(self, event: Event, fetch: Fetch) -> Facts | Parked:
        """See :class:`~workers.providers.base.Adapter`.

        Of ``fetch`` it asks for ``checkout.session`` with its line items, ``invoice`` with its lines and payments,
        ``subscription`` with its items, ``refund`` and ``dispute``: every list with all its pages.
        """
        if event.thin:
            return Parked("thin_event", "the event only names its object: have the endpoint send snapshots")
        release = (event.release or "").partition(".")[2]
        if release not in RELEASES:
            return Parked("unknown_release", f"the event is of API version {str(event.release)[:64]!r}")
        if event.merchant is not None:
            return Parked("connected_account", f"the event is of the connected account {event.merchant}")
        if event.livemode is not self._livemode:
            return Parked("other_mode", "a test event at a live ledger, or a live one at a test ledger")
        make = _MAKERS.get(event.type)
        if make is None:
            return ()
        try:
            return tuple(make(event, fetch))
        except ParkedError as parked:
            return parked.parked


def _pairs(header: str) -> list[list[str]]:
    return [pair.split("=", 2) for pair in header.split(",") if "=" in pair]


def _session(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """A checkout: a pack when it was paid, whichever event says so. A subscription's credits come with its invoices."""
    session, _ = read_again(event, fetch, "checkout.session", _Session, "id")
    about = event_fields(event) | {
        "account": _account(session.metadata, session.client_reference_id),
        "aliases": aliases_of(
            ("session", session.id),
            ("payment_intent", id_of(session.payment_intent)),
            ("invoice", id_of(session.invoice)),
            ("subscription", id_of(session.subscription)),
            ("customer", id_of(session.customer)),
        ),
    }
    if session.mode != "payment":
        return (Linked(key=session.id, **about),) if session.subscription is not None else ()
    currency = None if session.currency is None else currency_of(session.currency)
    total = None if currency is None or session.amount_total is None else money_of(session.amount_total, currency)
    if session.payment_status not in ("paid", "no_payment_required"):
        if event.type == "checkout.session.async_payment_failed":
            return (PaymentFailed(key=session.id, currency=currency, amount_minor=total, **about),)
        return ()  # the money is on its way: another event will tell
    if currency is None or total is None:
        raise ParkedError("malformed", "a paid session without an amount")
    return (
        PackPaid(
            key=session.id,
            currency=currency,
            paid_minor=total,
            lines=_sold(session, currency),
            reference=order_of((session.metadata or {}).get(ORDER_KEY)),
            **about,
        ),
    )


def _sold(session: _Session, currency: str) -> tuple[Line, ...]:
    if session.line_items is None:
        raise ParkedError("no_line_items", "what was bought is only in Stripe's API: an API key is needed")
    if session.line_items.has_more:
        raise ParkedError("truncated", "not all line items of the session were fetched")
    lines = []
    for line in session.line_items.data:
        if line.price is None:
            raise ParkedError("malformed", "a line item without a price")
        amount = None if line.amount_total is None else money_of(line.amount_total, currency)
        lines.append(Line(price=line.price.id, quantity=1 if line.quantity is None else line.quantity,
                          amount_minor=amount))  # fmt: skip
    return merge_lines(lines)


_REASONS: dict[str, Literal["create", "cycle", "update"]] = {
    "subscription_create": "create",
    "subscription_cycle": "cycle",
    "subscription_update": "update",
}

_NO_PERIOD = frozenset({"manual", "subscription_threshold", "automatic_pending_invoice_item_invoice", "upcoming"})
"""Billing reasons of invoices that are for no period: among them those that checkouts make of one-off payments."""


def _about_invoice(event: Event, invoice: _Invoice) -> dict[str, Any]:
    parent = None if invoice.parent is None else invoice.parent.subscription_details
    payments = [] if invoice.payments is None else invoice.payments.data
    return event_fields(event) | {
        "account": _account(None if parent is None else parent.metadata, (invoice.metadata or {}).get(ACCOUNT_KEY)),
        "aliases": aliases_of(
            ("invoice", invoice.id),
            ("subscription", None if parent is None else id_of(parent.subscription)),
            ("customer", id_of(invoice.customer)),
            *(("payment_intent", id_of(each.payment.payment_intent)) for each in payments),
            *(("charge", id_of(each.payment.charge)) for each in payments),
        ),
    }


def _invoice_paid(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """Each line that is a period of a subscription; the invoice's own period is another one."""
    invoice, _ = read_again(event, fetch, "invoice", _Invoice, "id")
    if invoice.billing_reason in _NO_PERIOD:
        return ()
    reason = _REASONS.get(invoice.billing_reason or "")
    if reason is None:
        raise ParkedError("unknown_billing_reason", f"an invoice of billing reason {invoice.billing_reason!r:.64}")
    if invoice.status not in (None, "paid"):
        return ()
    if invoice.lines.has_more:
        raise ParkedError("truncated", "not all lines of the invoice are in the event: an API key is needed")
    currency = currency_of(invoice.currency)
    credits: dict[str, list[Line]] = defaultdict(list)
    periods: dict[str, PeriodPaid] = {}
    about = _about_invoice(event, invoice) | {"currency": currency, "reason": reason}
    about["paid_minor"] = money_of(invoice.amount_paid, currency)
    for line in invoice.lines.data:
        details = line.details
        if details is None:
            continue  # a fee, or another thing that was put on the invoice
        subscription = id_of(details.subscription)
        assert subscription is not None
        item = id_of(details.subscription_item) or subscription
        priced = None if line.pricing is None else line.pricing.price_details
        price = None if priced is None else id_of(priced.price)
        if price is None:
            raise ParkedError("malformed", "a line of a subscription without a price")
        amount = money_of(line.discounted, currency)
        quantity = 1 if line.quantity is None else line.quantity
        if line.is_credit:
            credits[item].append(Line(price=price, quantity=quantity, amount_minor=amount))
            continue
        if details.proration and reason != "update":
            continue  # a change of plan of the period before, billed with this one
        key = f"{item}:{line.period.start}:{price}"
        known = periods.get(key)
        if known is not None:  # a tier of the same price
            amount, quantity = amount + known.amount_minor, quantity + known.quantity
        start, end = when(line.period.start), when(line.period.end)
        periods[key] = PeriodPaid(
            key=key,
            subscription=subscription,
            price=price,
            quantity=quantity,
            period_start=start,
            period_end=end,
            prorated=details.proration,
            amount_minor=amount,
            **about,
        )
    return [
        msgspec.structs.replace(
            period,
            credited=tuple(credits[key.rsplit(":", 2)[0]]) if reason == "update" else (),
            trial=_is_trial(period, fetch),
        )
        for key, period in periods.items()
    ]


def _is_trial(period: PeriodPaid, fetch: Fetch) -> bool | None:
    """Whether a line of nothing is a trial, a price of nothing, or cannot be known: only the subscription says."""
    if period.amount_minor:
        return False
    current = fetch("subscription", period.subscription)
    if current is None:
        return None
    subscription = read_object(current, _Subscription)
    start, end = when(subscription.trial_start), when(subscription.trial_end)
    assert period.period_start is not None
    return start is not None and end is not None and start <= period.period_start < end


def _invoice_failed(event: Event, fetch: Fetch) -> Iterable[Fact]:
    invoice = read_object(event.object, _Invoice)
    currency = currency_of(invoice.currency)
    asks = event.type == "invoice.payment_action_required"
    return (
        PaymentFailed(
            key=f"{invoice.id}:{invoice.attempt_count}{':action' if asks else ''}",
            action_required=asks,
            currency=currency,
            amount_minor=money_of(invoice.amount_due, currency),
            next_attempt_at=when(invoice.next_payment_attempt),
            **_about_invoice(event, invoice),
        ),
    )


def _invoice_payment(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """The only word on which payment an invoice was paid by, which is all that a refund names."""
    payment = read_object(event.object, _InvoicePayment)
    aliases = aliases_of(
        ("invoice", id_of(payment.invoice)),
        ("payment_intent", id_of(payment.payment.payment_intent)),
        ("charge", id_of(payment.payment.charge)),
    )
    return (Linked(key=payment.id, aliases=aliases, **event_fields(event)),) if len(aliases) > 1 else ()


def _payment_intent(event: Event, fetch: Fetch) -> Iterable[Fact]:
    intent = read_object(event.object, _PaymentIntent)
    aliases = aliases_of(("payment_intent", intent.id), ("charge", id_of(intent.latest_charge)))
    return (Linked(key=intent.id, account=_account(intent.metadata), aliases=aliases, **event_fields(event)),)


def _charge(event: Event, fetch: Fetch) -> Iterable[Fact]:
    charge = read_object(event.object, _Charge)
    aliases = aliases_of(("charge", charge.id), ("payment_intent", id_of(charge.payment_intent)))
    return (Linked(key=charge.id, account=_account(charge.metadata), aliases=aliases, **event_fields(event)),)


def _refund(event: Event, fetch: Fetch) -> Iterable[Fact]:
    refund, _ = read_again(event, fetch, "refund", _Refund, "id")
    status: Literal["settled", "undone"]
    if event.type == "refund.failed" or refund.status in ("failed", "canceled"):
        status = "undone"
    elif refund.status == "succeeded":
        status = "settled"
    else:
        return ()  # on its way
    aliases = aliases_of(("charge", id_of(refund.charge)), ("payment_intent", id_of(refund.payment_intent)))
    if not aliases:
        raise ParkedError("no_purchase", "a refund of no payment")
    currency = currency_of(refund.currency)
    return (
        RefundChanged(
            key=refund.id,
            status=status,
            currency=currency,
            amount_minor=money_of(refund.amount, currency),
            account=_account(refund.metadata),
            aliases=aliases,
            **event_fields(event),
        ),
    )


_STAGES: dict[str, Stage] = {
    "charge.dispute.created": "created",
    "charge.dispute.updated": "updated",
    "charge.dispute.funds_withdrawn": "funds_withdrawn",
    "charge.dispute.funds_reinstated": "funds_reinstated",
    "charge.dispute.closed": "closed",
}

_DECIDED = frozenset({"won", "lost", "warning_closed", "prevented"})


def _dispute(event: Event, fetch: Fetch) -> Iterable[Fact]:
    """A stage of a dispute. Whether money moved say its balance transactions; where they lag, the stage."""
    dispute, _ = read_again(event, fetch, "dispute", _Dispute, "id")
    aliases = aliases_of(("charge", id_of(dispute.charge)), ("payment_intent", id_of(dispute.payment_intent)))
    if not aliases:
        raise ParkedError("no_purchase", "a dispute of no payment")
    currency = currency_of(dispute.currency)
    amount = money_of(dispute.amount, currency)
    stage = _STAGES[event.type]
    told = {"funds_withdrawn": 1, "funds_reinstated": 2}.get(stage, 0)
    moved = dispute.balance_transactions
    by_stage = amount if stage == "funds_withdrawn" else 0
    withdrawn = _withdrawn(moved, currency, amount) if len(moved) >= told else by_stage
    return (
        DisputeChanged(
            key=f"{dispute.id}:{stage}",
            dispute=dispute.id,
            stage=stage,
            status=dispute.status,
            is_open=dispute.status not in _DECIDED,
            currency=currency,
            amount_minor=amount,
            withdrawn_minor=withdrawn,
            movements=max(len(moved), told),
            account=_account(dispute.metadata),
            aliases=aliases,
            **event_fields(event),
        ),
    )


def _withdrawn(moved: Sequence[_BalanceTransaction], currency: str, amount: int) -> int:
    """What a dispute's movements hold back. In another currency, which is another rate each time, all or nothing."""
    if all(each.currency.upper() == currency for each in moved):
        return min(max(0, -sum(money_of(each.amount, currency) for each in moved)), amount)
    taken = sum(1 if each.amount < 0 else -1 for each in moved)
    return amount if taken > 0 else 0


def _subscription(event: Event, fetch: Fetch) -> Iterable[Fact]:
    subscription, _ = read_again(event, fetch, "subscription", _Subscription, "id")
    if subscription.items.has_more:
        raise ParkedError("truncated", "not all items of the subscription are in the event: an API key is needed")
    items = tuple(
        Item(
            id=item.id,
            price=item.price.id,
            quantity=1 if item.quantity is None else item.quantity,
            period_start=when(item.current_period_start),
            period_end=when(item.current_period_end),
        )
        for item in subscription.items.data
    )
    ends_at = when(subscription.cancel_at)
    if ends_at is None and subscription.cancel_at_period_end:
        ends_at = max((item.period_end for item in items if item.period_end is not None), default=None)
    return (
        SubscriptionChanged(
            key=subscription.id,
            status=subscription.status,
            items=items,
            ends_at=ends_at,
            ended_at=when(subscription.ended_at),
            trial_end=when(subscription.trial_end),
            collection_paused=subscription.pause_collection is not None,
            account=_account(subscription.metadata),
            aliases=aliases_of(("subscription", subscription.id), ("customer", id_of(subscription.customer))),
            **event_fields(event),
        ),
    )


_MAKERS: dict[str, Callable[[Event, Fetch], Iterable[Fact]]] = {
    "checkout.session.completed": _session,
    "checkout.session.async_payment_succeeded": _session,
    "checkout.session.async_payment_failed": _session,
    "invoice.paid": _invoice_paid,
    "invoice.payment_failed": _invoice_failed,
    "invoice.payment_action_required": _invoice_failed,
    "invoice_payment.paid": _invoice_payment,
    "payment_intent.succeeded": _payment_intent,
    "charge.succeeded": _charge,
    "refund.created": _refund,
    "refund.updated": _refund,
    "refund.failed": _refund,
    "charge.refund.updated": _refund,
    **dict.fromkeys(_STAGES, _dispute),
    "customer.subscription.created": _subscription,
    "customer.subscription.updated": _subscription,
    "customer.subscription.deleted": _subscription,
    "customer.subscription.paused": _subscription,
    "customer.subscription.resumed": _subscription,
    "customer.subscription.trial_will_end": _subscription,
}
