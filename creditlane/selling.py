"""What a shop is answered when it asks to sell credits: a checkout, the portal, a quote. And why it is refused."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

import msgspec


class SaleCode(StrEnum):
    """Why something is not sold; where several would fit, the one that stands earlier."""

    INVALID = "invalid"
    UNKNOWN_ACCOUNT = "unknown_account"
    ACCOUNT_CLOSED = "account_closed"
    UNKNOWN_PACK = "unknown_pack"
    UNKNOWN_PLAN = "unknown_plan"
    UNKNOWN_OFFER = "unknown_offer"
    UNKNOWN_QUOTE = "unknown_quote"
    NO_PRICE = "no_price"
    OFFER_OVER = "offer_over"
    OFFER_USED = "offer_used"
    QUOTE_NOT_READY = "quote_not_ready"
    QUOTE_OVER = "quote_over"
    ALREADY_QUOTED = "already_quoted"
    ALREADY_SUBSCRIBED = "already_subscribed"
    NO_CUSTOMER = "no_customer"
    ID_CONFLICT = "id_conflict"
    LIMIT_REACHED = "limit_reached"
    NOT_CONFIGURED = "not_configured"
    PROVIDER_REFUSED = "provider_refused"

    @property
    def sentence(self) -> str:
        """What it means and what to do, in one sentence."""
        return SENTENCES[self]


SENTENCES: dict[SaleCode, str] = {
    SaleCode.INVALID: "The arguments make no sense; the reason says which.",
    SaleCode.UNKNOWN_ACCOUNT: "The account was never opened; send credits.open first.",
    SaleCode.ACCOUNT_CLOSED: "The account is closed; nothing is sold to it.",
    SaleCode.UNKNOWN_PACK: "The catalog has no such pack; name one that it has.",
    SaleCode.UNKNOWN_PLAN: "The catalog has no such plan; name one that it has.",
    SaleCode.UNKNOWN_OFFER: "The catalog has no such offer; name one that it has.",
    SaleCode.UNKNOWN_QUOTE: "The account has no such quote; name one of its own.",
    SaleCode.NO_PRICE: "The catalog gives it no price of the provider; add one under prices, or ask for a quote.",
    SaleCode.OFFER_OVER: "The offer does not run now; sell the pack at its own price.",
    SaleCode.OFFER_USED: "The account has had the offer as often as it may; sell the pack at its own price.",
    SaleCode.QUOTE_NOT_READY: "No administrator has quoted it yet; wait for the quote.",
    SaleCode.QUOTE_OVER: "The quote was paid or withdrawn, or its time is over; ask for a new one.",
    SaleCode.ALREADY_QUOTED: "It was quoted before, and a quote is never changed; make a new one.",
    SaleCode.ALREADY_SUBSCRIBED: "The account pays for a plan already; send its owner to the portal to change it.",
    SaleCode.NO_CUSTOMER: "The account has bought nothing yet, so the portal has nothing to show; make a checkout.",
    SaleCode.ID_CONFLICT: "This request was made before with other content; choose a new one.",
    SaleCode.LIMIT_REACHED: "The account has as many inquiries open as it may; answer some first.",
    SaleCode.NOT_CONFIGURED: "There is no key for the provider's API; set CREDITLANE_STRIPE_API_KEY.",
    SaleCode.PROVIDER_REFUSED: "The provider refused it; the reason has its code.",
}


class SaleAnswer(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What all answers have: whether it was done, and if not, why."""

    status: Literal["done", "rejected"]
    code: SaleCode | None = None
    reason: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether it was done."""
        return self.status == "done"


class Page(SaleAnswer, kw_only=True, frozen=True, omit_defaults=True):
    """A page of the provider's to send the buyer to: a checkout, or the portal."""

    url: str | None = None
    id: str | None = None
    """The provider's name for it."""
    expires_at: datetime | None = None
    """When a checkout is over, if nobody has paid by then."""


class Inquiry(SaleAnswer, kw_only=True, frozen=True, omit_defaults=True):
    """That a quote was asked for."""

    order: str | None = None
    """By this id it is quoted, and bought once it is."""


class Ordered(SaleAnswer, kw_only=True, frozen=True, omit_defaults=True):
    """That a pack was ordered, to be paid by a provider that takes no price ids."""

    order: str | None = None
    """What the payment has to name: PayPal's ``invoice_id``, the text of a transfer."""
    price: str | None = None
    """What has to be paid, as ``"4.99 EUR"``."""
    expires_at: datetime | None = None
