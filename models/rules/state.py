"""The state that the rules work on: an account, its open grants and holds, and what was just written.

Plain slotted objects, changed in place: a batch may apply hundreds of operations to one account, and
copies would cost more than the rules. All credits move through :func:`models.rules.posting.post`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from creditlane.contract import Message
from models.rules.catalog import Terms
from models.rules.sharing import Allowance, Referral, SharedCode

MAX_OPEN_GRANTS = 1000
"""Grants with credits left that one account may have at a time."""

MAX_OPEN_HOLDS = 1000
"""Holds that one account may have open at a time."""

UNOPENED, OPEN, FROZEN, CLOSED = "unopened", "open", "frozen", "closed"

POOL = "pool"
"""The kind of accounts that have members."""

MAX_TOTAL_MICRO = 9 * 10**18
"""What one account may be credited with in all its life, in micro-credits: a Postgres bigint holds it."""

SortKey = tuple[int, int, datetime, datetime, int]


class Grant:
    """One lot of credits. Its buckets close: granted + received + restored = the sum of the others."""

    __slots__ = (
        "available", "clawed_back", "consumed", "created_at", "effective_at", "expired", "expires_at", "features",
        "forgiven", "granted", "held", "id", "in_transit", "is_dirty", "is_new", "key", "operation", "origin",
        "price_currency", "price_minor", "price_per", "priority", "purchase", "received", "restored", "revoked", "sent",
        "source",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        source: str,
        priority: int,
        features: frozenset[str] | None,
        effective_at: datetime,
        expires_at: datetime | None,
        created_at: datetime,
        operation: str,
        purchase: str | None = None,
        price_minor: int | None = None,
        price_currency: str | None = None,
        price_per: int | None = None,
        granted: int = 0,
        received: int = 0,
        restored: int = 0,
        available: int = 0,
        held: int = 0,
        in_transit: int = 0,
        consumed: int = 0,
        expired: int = 0,
        revoked: int = 0,
        sent: int = 0,
        clawed_back: int = 0,
        forgiven: int = 0,
        origin: int | None = None,
    ) -> None:
        self.id = id
        self.source = source
        self.priority = priority
        self.features = features
        self.effective_at = effective_at
        self.expires_at = expires_at
        self.created_at = created_at
        self.operation = operation
        self.purchase = purchase
        self.price_minor = price_minor
        self.price_currency = price_currency
        self.price_per = price_per
        self.granted = granted
        self.received = received
        self.restored = restored
        self.available = available
        self.held = held
        self.in_transit = in_transit
        self.consumed = consumed
        self.expired = expired
        self.revoked = revoked
        self.sent = sent
        self.clawed_back = clawed_back
        """What revocations took back of it and of the lots that continue it, were it spent or not."""
        self.forgiven = forgiven
        """What revocations let go because it was spent or set aside: if it comes back, it is taken after all."""
        self.origin = origin
        """The grant that this one continues, because that had expired when its credits came back."""
        self.key = burn_key(self)
        self.is_new = False
        self.is_dirty = False

    @property
    def family(self) -> int:
        """The number of the lot that this one continues, or its own: revocations are booked there."""
        return self.id if self.origin is None else self.origin

    @property
    def is_open(self) -> bool:
        """Whether any credits are left in it, spendable or set aside."""
        return bool(self.available or self.held or self.in_transit)


NEVER = datetime.max.replace(tzinfo=UTC)


def burn_key(grant: Grant) -> SortKey:
    """The burn-down order, lowest first (ledger rules: burn-down order).

    1. ``priority``; 2. scoped to features before unscoped; 3. ``expires_at``, soonest first, never
    last; 4. ``created_at``, then ``id``.
    """
    return (
        grant.priority,
        1 if grant.features is None else 0,
        NEVER if grant.expires_at is None else grant.expires_at,
        grant.created_at,
        grant.id,
    )


class Line(msgspec.Struct, gc=False):
    """One line of a receipt: what a charge or a hold took from one grant, and what went back."""

    grant: int
    taken: int
    returned: int = 0


class Hold:
    """Credits set aside by one operation; its id is that operation's."""

    __slots__ = (
        "amount", "captured", "closed_at", "created_at", "expires_at", "feature", "id", "is_dirty", "is_new",
        "lines", "member", "status",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        amount: int,
        expires_at: datetime,
        created_at: datetime,
        feature: str | None = None,
        member: str | None = None,
        status: str = "open",
        captured: int = 0,
        closed_at: datetime | None = None,
        lines: list[Line] | None = None,
    ) -> None:
        self.id = id
        self.amount = amount
        self.expires_at = expires_at
        self.created_at = created_at
        self.feature = feature
        self.member = member
        self.status = status
        self.captured = captured
        self.closed_at = closed_at
        self.lines = [] if lines is None else lines
        self.is_new = False
        self.is_dirty = False


class Taken(msgspec.Struct, frozen=True, gc=False):
    """What a renewal took out of a lot of the period that ended."""

    grant: int
    expired: int
    rolled: int

    @property
    def total(self) -> int:
        """All of it, in micro-credits."""
        return self.expired + self.rolled


class Renewal(msgspec.Struct, frozen=True, gc=False):
    """What a renewal did: for its notice, and for who undoes it."""

    at: datetime
    """The instant it holds from."""
    plan: str
    period_start: datetime
    """When the period begins that it began; a late one comes after that."""
    made: list[int]
    """The lots that it made: the allotment, and what was carried."""
    taken: list[Taken]
    allotted: int = 0
    undone: bool = False

    @property
    def rolled(self) -> int:
        """Micro-credits that were carried."""
        return sum(each.rolled for each in self.taken)

    @property
    def expired(self) -> int:
        """Micro-credits that ended with the period, or over the cap."""
        return sum(each.expired for each in self.taken)


ACTIVE, ENDED = "active", "ended"

HALF_MONTH = timedelta(days=15)
"""A payment that reaches so far beyond a month, or less far, is for one period, however long: a provider's periods may
have 28 days, or 31, or begin with a trial."""

PAYMENT_SLACK = timedelta(days=1)
"""How far a payment's dates may be from ours and mean the same period: a provider counts months in its own zone."""


class Subscription:
    """An account's plan, and where in its time it is (ledger rules: subscriptions)."""

    __slots__ = (
        "allotted", "anchor", "cancels", "ended_at", "is_dirty", "lots", "number", "paid_until", "payment",
        "pending", "pending_at", "period_end", "period_start", "price_currency", "price_minor", "price_per", "renewal",
        "status", "terms", "zone",
    )  # fmt: skip

    def __init__(
        self,
        terms: Terms,
        anchor: datetime,
        zone: str,
        number: int,
        period_start: datetime,
        period_end: datetime,
        paid_until: datetime | None,
        payment: str | None = None,
        status: str = ACTIVE,
        cancels: bool = False,
        allotted: int = 0,
        pending: Terms | None = None,
        lots: list[int] | None = None,
        price_minor: int | None = None,
        price_currency: str | None = None,
        price_per: int | None = None,
        renewal: Renewal | None = None,
        ended_at: datetime | None = None,
        pending_at: datetime | None = None,
    ) -> None:
        self.terms = terms
        self.anchor = anchor
        self.zone = zone
        self.number = number
        """Months from the anchor to the period under way."""
        self.period_start = period_start
        self.period_end = period_end
        self.paid_until = paid_until
        """Of a plan that is paid for, until when; None for others."""
        self.payment = payment
        """The last payment: the purchase of the lots that it pays for."""
        self.status = status
        self.cancels = cancels
        """Whether it ends with the period under way, or with the last one that is paid for."""
        self.allotted = allotted
        """Micro-credits of the highest plan of this period."""
        self.pending = pending
        """The plan from the renewal at :attr:`pending_at` on, where that is another."""
        self.pending_at = pending_at
        self.lots = [] if lots is None else lots
        """The lots that end with the period."""
        self.price_minor = price_minor
        self.price_currency = price_currency
        self.price_per = price_per
        self.renewal = renewal
        """The one that began this period, if one did."""
        self.ended_at = ended_at
        self.is_dirty = False

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.status == ACTIVE

    @property
    def next_terms(self) -> Terms:
        """The plan from the next renewal on: a year that is paid for is given to its end."""
        return self.terms_at(self.period_end)

    def terms_at(self, start: datetime) -> Terms:
        """The plan of a period that begins then, the one under way being over."""
        if self.pending is None or (self.pending_at or self.period_end) > start + PAYMENT_SLACK:
            return self.terms
        return self.pending

    @property
    def is_prepaid(self) -> bool:
        """Whether what follows the period under way has been paid for."""
        return self.paid_until is not None and self.paid_until > self.period_end + PAYMENT_SLACK

    @property
    def renews_by_itself(self) -> bool:
        """Whether the next renewal comes with the calendar: nothing is to be paid, or it has been."""
        return self.is_prepaid or not (self.cancels or self.next_terms.paid)

    @property
    def grace_ends(self) -> datetime:
        """Until when the allotment stays usable if no payment comes."""
        return self.period_end + timedelta(days=self.terms.grace_days)

    def forget_payment(self) -> None:
        """Nothing was paid for the lots to come."""
        self.payment = self.price_minor = self.price_currency = self.price_per = None

    def due_at(self) -> datetime | None:
        """The next instant at which time alone changes it."""
        if not self.is_active:
            return None
        return self.period_end if self.cancels or self.renews_by_itself else self.grace_ends


REVOKED, OWED, FORGIVEN = "revoked", "owed", "forgiven"


class Taking(msgspec.Struct, gc=False, array_like=True):
    """A part of what claw-backs took of a purchase, and could give back."""

    root: int
    """The lot on whose family it is booked."""
    grant: int
    """The lot whose credits were taken; the root itself where none were there to be taken."""
    kind: str
    """``revoked`` out of that lot, ``owed`` as a debt that is not paid yet, or ``forgiven``."""
    amount_micro: int


class Purchase:
    """What is known of a purchase that was ever returned or disputed (ledger rules: claw-back)."""

    __slots__ = (
        "currency", "is_dirty", "is_frozen", "paid_minor", "purchase", "returned_minor", "step", "takings",
    )  # fmt: skip

    def __init__(
        self,
        purchase: str,
        step: int,
        paid_minor: int,
        returned_minor: int,
        currency: str | None,
        is_frozen: bool,
        takings: list[Taking] | None = None,
    ) -> None:
        self.purchase = purchase
        self.step = step
        """How far its story is told: what comes with a lower one, or the same, is old."""
        self.paid_minor = paid_minor
        self.returned_minor = returned_minor
        self.currency = currency
        self.is_frozen = is_frozen
        """Whether its credits cannot be used, since it is disputed."""
        self.takings = [] if takings is None else takings
        """What was taken because of it and not given back, in the order of taking: the last goes back first."""
        self.is_dirty = False

    @property
    def taken_micro(self) -> int:
        """What was taken because of it and not given back, in micro-credits."""
        return sum(taking.amount_micro for taking in self.takings)

    @property
    def owed_micro(self) -> int:
        """What of that is debt that nothing has paid yet, in micro-credits."""
        return sum(taking.amount_micro for taking in self.takings if taking.kind == OWED)

    def note(self, taking: Taking, place: int | None = None) -> None:
        """Add what was taken: as the last, or below what stands at a place; like and like are one."""
        at = len(self.takings) if place is None else place
        below = self.takings[at - 1] if at else None
        if below is not None and (below.root, below.grant, below.kind) == (taking.root, taking.grant, taking.kind):
            below.amount_micro += taking.amount_micro
        else:
            self.takings.insert(at, taking)
        self.is_dirty = True


_encode = msgspec.json.Encoder().encode
_decode_takings = msgspec.json.Decoder(list[Taking]).decode


def purchase_row(purchase: Purchase) -> tuple[Any, ...]:
    """What is kept of a purchase, in the order of the columns of its table, its account apart."""
    return (
        purchase.purchase, purchase.step, purchase.paid_minor, purchase.returned_minor, purchase.currency,
        purchase.is_frozen, purchase.taken_micro, sorted({taking.grant for taking in purchase.takings}),
        _encode(purchase.takings).decode(),
    )  # fmt: skip


def purchase_of(row: Sequence[Any]) -> Purchase:
    """A purchase of what :func:`purchase_row` gave."""
    purchase, step, paid_minor, returned_minor, currency, is_frozen, _taken_micro, _lots, takings = row
    return Purchase(purchase, step, paid_minor, returned_minor, currency, is_frozen, _decode_takings(takings))


_decode_terms = msgspec.json.Decoder(Terms).decode
_decode_renewal = msgspec.json.Decoder(Renewal).decode


def subscription_row(subscription: Subscription) -> tuple[Any, ...]:
    """What is kept of a subscription, in the order of the columns of its table, its account apart."""
    pending, renewal = subscription.pending, subscription.renewal
    renewal_lots = [] if renewal is None else [*renewal.made, *(taken.grant for taken in renewal.taken)]
    return (
        subscription.terms.plan, subscription.status, subscription.anchor, subscription.zone, subscription.number,
        subscription.period_start, subscription.period_end, subscription.paid_until, subscription.ended_at,
        subscription.cancels, subscription.allotted, subscription.payment, subscription.price_minor,
        subscription.price_currency, subscription.price_per, list(subscription.lots), renewal_lots,
        _encode(subscription.terms).decode(), None if pending is None else _encode(pending).decode(),
        None if renewal is None else _encode(renewal).decode(), subscription.pending_at,
    )  # fmt: skip


def subscription_of(row: Sequence[Any]) -> Subscription:
    """A subscription of what :func:`subscription_row` gave."""
    (
        _plan, status, anchor, zone, number, period_start, period_end, paid_until, ended_at, cancels, allotted, payment,
        price_minor, price_currency, price_per, lots, _renewal_lots, terms, pending, renewal, pending_at,
    ) = row  # fmt: skip
    return Subscription(
        _decode_terms(terms),
        anchor,
        zone,
        number,
        period_start,
        period_end,
        paid_until,
        payment,
        status,
        cancels,
        allotted,
        None if pending is None else _decode_terms(pending),
        list(lots),
        price_minor,
        price_currency,
        price_per,
        None if renewal is None else _decode_renewal(renewal),
        ended_at,
        pending_at,
    )


class Notice(NamedTuple):
    """Something that an account is told of (schedules: notices)."""

    kind: str
    key: str
    """The account has one of this key, ever."""
    at: datetime
    """The instant of what it tells of."""
    details: dict[str, Any]


class Entry(NamedTuple):
    """One immutable line of the ledger; ``amount_micro`` is never negative, ``kind`` says which way it goes."""

    seq: int
    operation: str | None
    """The operation that caused it; none where time did."""
    kind: str
    grant: int
    amount_micro: int
    balance_after_micro: int
    """The account's available credits, upcoming ones included, after this entry."""
    at: datetime
    """The instant it holds from: for an expiry or a time-out, when it was due."""
    refers_to: str | None
    """The charge or hold that it belongs to, where that is another operation."""
    recorded_at: datetime
    hash: bytes


class Known(msgspec.Struct, gc=False):
    """An operation that the ledger has seen: its content, its first answer, and what it took from where."""

    name: str
    status: str
    result: bytes
    message: Message | None = None
    arguments: bytes | None = None
    lines: list[Line] | None = None
    is_dirty: bool = False


def achieved_at(achieved: str | None) -> dict[str, int]:
    """The achievements of an account, each with the number of the operation by which it was reached.

    >>> achieved_at("beginner:3,expert:120")
    {'beginner': 3, 'expert': 120}
    """
    pairs = (each.rpartition(":") for each in achieved.split(",")) if achieved else ()
    return {name: int(number) for name, _, number in pairs}


COUNTERS = (
    "granted", "received", "restored",
    "available", "held", "in_transit", "consumed", "expired", "revoked", "sent",
)  # fmt: skip
"""The ten buckets that an account and a grant count in; the first three are what came in."""

ACCOUNT_FIELDS = (
    "kind", "status", "email", "locale", "timezone", "opened_at", "updated_at", "next_due_at", "operations", "seq",
    "head", "last_grant", *COUNTERS, "debt", "reference", "converted_to", "achieved",
)  # fmt: skip
"""What is kept of an account beside its name, in the order in which :class:`Account` takes it."""

NOBODY = ("user", UNOPENED, None, None, None, None, None, None, 0, 0, b"", 0, *(0 for _ in COUNTERS), 0, 0, None, None)
"""The fields of an account that nothing is known of."""


class Account:
    """An account as one batch sees it: totals, open grants in burn-down order, holds, and new rows."""

    __slots__ = (
        "account",
        "achieved",
        "allowances",
        "available",
        "codes",
        "consumed",
        "converted_to",
        "debt",
        "email",
        "entries",
        "expired",
        "granted",
        "grants",
        "head",
        "held",
        "holds",
        "in_transit",
        "is_dirty",
        "is_new",
        "kind",
        "known",
        "last_grant",
        "locale",
        "next_due_at",
        "notices",
        "opened_at",
        "operations",
        "order",
        "purchases",
        "received",
        "reference",
        "referral",
        "renewals",
        "restored",
        "revoked",
        "sent",
        "seq",
        "status",
        "subscription",
        "timezone",
        "updated_at",
    )  # fmt: skip

    kind: str
    status: str
    email: str | None
    locale: str | None
    timezone: str | None
    opened_at: datetime | None
    updated_at: datetime | None
    next_due_at: datetime | None
    operations: int
    """How many operations it has seen; the last one's number."""
    seq: int
    head: bytes
    last_grant: int
    reference: int
    """What was spendable right after credits last came in: thresholds in percent are of it."""
    converted_to: str | None
    """Of a lead that has signed up, the user."""
    achieved: str | None
    """The achievements that it has, see :func:`achieved_at`."""

    def __init__(self, account: str, fields: Sequence[Any] = NOBODY) -> None:
        """An account with these :data:`ACCOUNT_FIELDS`, a new one unless given."""
        self.account = account
        (
            self.kind, self.status, self.email, self.locale, self.timezone, self.opened_at, self.updated_at,
            self.next_due_at, self.operations, self.seq, self.head, self.last_grant, self.granted, self.received,
            self.restored, self.available, self.held, self.in_transit, self.consumed, self.expired, self.revoked,
            self.sent, self.debt, self.reference, self.converted_to, self.achieved,
        ) = fields  # fmt: skip
        self.grants: dict[int, Grant] = {}
        self.order: list[Grant] = []
        self.holds: dict[str, Hold] = {}
        self.known: dict[str, Known] = {}
        self.subscription: Subscription | None = None
        """Loaded where something is due some day, or the operation is about it; one that has ended may not be."""
        self.purchases: dict[str, Purchase] = {}
        """Those that were ever returned or disputed, nearly always none; all their lots are at hand."""
        self.allowances: dict[str, Allowance] = {}
        """Those that the operations of the batch are about, by key."""
        self.codes: dict[str, SharedCode] = {}
        """Those that the operations of the batch name: the same objects for all its accounts."""
        self.referral: Referral | None = None
        """Loaded where the operation is about it."""
        self.entries: list[Entry] = []
        self.renewals: list[Renewal] = []
        """Those of the operation under way."""
        self.notices: list[Notice] = []
        self.is_new = False
        self.is_dirty = False

    @property
    def is_unlimited(self) -> bool:
        """Whether it is charged nothing: its plan has no limit."""
        subscription = self.subscription
        return subscription is not None and subscription.terms.unlimited and subscription.is_active

    @property
    def frozen(self) -> set[str | None]:
        """The purchases whose credits cannot be used."""
        return {name for name, purchase in self.purchases.items() if purchase.is_frozen}

    def end_grant(self, grant: Grant, at: datetime) -> None:
        """Have a lot end earlier than it was to: what comes back to it from then on lapses."""
        if grant.expires_at is None or at < grant.expires_at:
            self.order.remove(grant)
            grant.expires_at = at
            grant.key = burn_key(grant)
            grant.is_dirty = True
            insort(self.order, grant, key=attrgetter("key"))

    def add_grant(self, grant: Grant) -> None:
        """Put a grant in its place in the burn-down order."""
        self.grants[grant.id] = grant
        insort(self.order, grant, key=attrgetter("key"))

    def open_grants(self) -> int:
        """How many grants have credits left."""
        return sum(1 for grant in self.order if grant.is_open)

    def open_holds(self) -> int:
        """How many holds are open."""
        return sum(1 for hold in self.holds.values() if hold.status == "open")

    def spendable(self, now: datetime) -> int:
        """Micro-credits that are there to be spent, what has ended since the account was last settled included."""
        frozen = self.purchases and self.frozen
        return sum(
            grant.available
            for grant in self.order
            if grant.available and grant.effective_at <= now and not (frozen and grant.purchase in frozen)
        )

    def due_at(self) -> datetime | None:
        """The next instant at which time alone changes this account: a hold's time-out, a grant's expiry, a renewal."""
        soonest = None if self.subscription is None else self.subscription.due_at()
        for hold in self.holds.values():
            if hold.status == "open" and (soonest is None or hold.expires_at < soonest):
                soonest = hold.expires_at
        for grant in self.order:
            due = grant.expires_at
            if due is not None and grant.available and (soonest is None or due < soonest):
                soonest = due
        return soonest
