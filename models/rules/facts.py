"""The facts of payments: what a provider says is so (payments: from event to fact). Plain values.

A fact is keyed by the object it speaks of, never by the event: two events may tell of one payment. Every fact may be
heard twice and in any order, so each says what is so, and none says what to add.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from models.rules.payments import Returned


class Alias(msgspec.Struct, frozen=True, order=True):
    """Another name of a purchase, or of who buys: ``("payment_intent", "pi_1")``.

    Those of :data:`PURCHASE_ALIASES` name one purchase. ``subscription`` and ``customer`` have many, and only lead to
    the account.
    """

    kind: str
    id: str


PURCHASE_ALIASES = frozenset({
    "session", "checkout", "order", "payment_intent", "charge", "invoice", "capture", "sale", "transaction", "transfer",
})  # fmt: skip

PAYMENT_ALIASES = frozenset({"payment_intent", "charge", "capture", "sale", "transaction", "transfer"})
"""Those that name the payment itself: an order, a checkout or an invoice may have been paid in several."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What was sold: credits follow ``price`` in the catalog, times ``quantity``."""

    price: str
    quantity: int
    amount_minor: int | None = None


class Fact(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a provider says is so. Amounts are in minor units of ``currency`` as the catalog counts them."""

    provider: str
    livemode: bool
    key: str
    """The object's own key, one per provider and livemode for ever."""
    account: str | None = None
    aliases: tuple[Alias, ...] = ()
    """Sorted, without repetition."""
    occurred_at: datetime
    """When the provider says that it came about: of two states the later holds."""


class PackPaid(Fact, frozen=True, kw_only=True):
    """A one-off purchase was paid. ``key`` is the purchase; a line's own is :meth:`line_key`.

    Lines of equal price are one. No lines: the order named by ``reference`` says what was sold, and the amount must
    fit it.
    """

    currency: str
    paid_minor: int
    lines: tuple[Line, ...]
    reference: str | None = None
    """Our own order or quote."""

    def line_key(self, line: Line) -> str:
        """The key of one line's credits."""
        return f"{self.key}:{line.price}"


class PeriodPaid(Fact, frozen=True, kw_only=True):
    """A period of a subscription was paid; an ``update`` gives by the change-of-plan rule."""

    subscription: str
    price: str | None
    """None where the provider does not say: it is that of the subscription."""
    quantity: int = 1
    period_start: datetime | None = None
    period_end: datetime | None = None
    reason: Literal["create", "cycle", "update"]
    prorated: bool = False
    """Whether it is for what was left of a period under way."""
    trial: bool | None = False
    """Whether it is a free trial: only what the catalog says for one. None: nothing was paid, and it cannot be known
    why."""
    credited: tuple[Line, ...] = ()
    """Of an ``update``: the unused time that was set against it."""
    currency: str
    amount_minor: int
    """What this line came to."""
    paid_minor: int
    """What was paid for all that the same payment was for: of this a refund takes its share."""


class RefundChanged(Fact, frozen=True, kw_only=True):
    """A refund was settled, or undone: it failed or was cancelled. Undone is for ever; ``key`` is the refund."""

    status: Literal["settled", "undone"]
    currency: str
    amount_minor: int
    """What the refund is of."""
    paid_minor: int | None = None
    """What had been paid, where the refund says it: more than the purchase knew when tax came on top."""

    @property
    def returned(self) -> Returned:
        """What of it is away from the seller."""
        settled = self.status == "settled"
        return Returned(self.key, 1 if settled else 2, self.amount_minor if settled else 0)


Stage = Literal["created", "updated", "funds_withdrawn", "funds_reinstated", "closed"]


class DisputeChanged(Fact, frozen=True, kw_only=True):
    """A stage of a dispute; ``key`` is dispute and stage.

    What is left of the purchase is frozen from ``created`` on, until ``closed`` was heard, in whichever order.
    """

    dispute: str
    stage: Stage
    status: str
    """The provider's own word. ``lost`` is not for ever: money moves only with ``withdrawn_minor``."""
    is_open: bool
    """Whether it was still undecided when last looked at."""
    currency: str
    amount_minor: int
    withdrawn_minor: int
    """What it holds back from the seller after so many ``movements`` of money."""
    movements: int
    paid_minor: int | None = None

    @property
    def returned(self) -> Returned:
        """What of it is away from the seller."""
        return Returned(self.dispute, self.movements, self.withdrawn_minor)


Status = Literal[
    "incomplete", "incomplete_expired", "trialing", "active", "past_due", "unpaid", "paused", "canceled"
]  # fmt: skip


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """What is subscribed to."""

    id: str | None = None
    price: str
    quantity: int
    period_start: datetime | None = None
    period_end: datetime | None = None


class SubscriptionChanged(Fact, frozen=True, kw_only=True):
    """The state of a subscription; it never gives credits. ``key`` is the subscription."""

    status: Status
    items: tuple[Item, ...]
    ends_at: datetime | None = None
    """When it will end, where it was cancelled for later."""
    ended_at: datetime | None = None
    trial_end: datetime | None = None
    collection_paused: bool = False
    """Whether no payments are collected; the status stays what it was."""

    @property
    def is_final(self) -> bool:
        """Whether nothing comes after it."""
        return self.status in ("canceled", "incomplete_expired")


class PaymentFailed(Fact, frozen=True, kw_only=True):
    """A payment did not come about; ``key`` is the attempt."""

    action_required: bool = False
    """Whether the customer has only to confirm it."""
    currency: str | None = None
    amount_minor: int | None = None
    next_attempt_at: datetime | None = None


class Linked(Fact, frozen=True, kw_only=True):
    """No money: ids that belong together, and the account where it is known."""
