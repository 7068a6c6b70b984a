"""What a business decides about its credits, as plain values (see ``models/catalog.py`` for the file).

The types are strict: an unknown key, a wrong type or a number out of range is an error that names the
key. Amounts are micro-credits once read.
"""

from __future__ import annotations

import re
from operator import itemgetter
from typing import Annotated, Any, Literal

import msgspec

from creditlane.amounts import MAX_MICRO, MICRO, Micro, format_amount, parse_amount

DEFAULT_PRIORITY = 100
"""The burn-down priority of a source that the catalog does not name."""

MINOR_DIGITS = {"BIF": 0, "CLP": 0, "DJF": 0, "GNF": 0, "ISK": 0, "JPY": 0, "KMF": 0, "KRW": 0, "PYG": 0,
                "RWF": 0, "UGX": 0, "VND": 0, "VUV": 0, "XAF": 0, "XOF": 0, "XPF": 0,
                "BHD": 3, "IQD": 3, "JOD": 3, "KWD": 3, "LYD": 3, "OMR": 3, "TND": 3}  # fmt: skip
"""Decimals of the currencies (ISO 4217) that do not have two."""

NOTICE_KINDS = (
    "depleted", "credits_expired", "period_renewed", "pack_bought", "payment_failed", "plan_started", "plan_changed",
    "plan_cancelled", "plan_ended", "gift_received", "referral_bonus", "refunded", "member_limit",
)  # fmt: skip
"""What a notice may be of, beside ``low_balance`` and ``expiring``, which have settings of their own."""

PROMOTIONAL = frozenset({"signup", "lead", "bonus", "referral", "promotion"})
"""Sources of credits that nobody paid for: not to be given away unless the catalog says so."""

_MONEY = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,3}))? ([A-Z]{3})\Z", re.ASCII)


class Money(msgspec.Struct, frozen=True):
    """An integer of minor units with its ISO 4217 currency; never added to credits."""

    minor: int
    currency: str

    @classmethod
    def parse(cls, text: str) -> Money:
        """Read ``"4.99 EUR"`` or ``"500 JPY"``.

        :raises ValueError: for another shape, or more decimals than the currency has.
        """
        match = _MONEY.match(text)
        if match is None:
            raise ValueError('money is written as "4.99 EUR"')
        whole, fraction, currency = match.group(1), match.group(2) or "", match.group(3)
        digits = MINOR_DIGITS.get(currency, 2)
        if len(fraction) > digits:
            raise ValueError(f"{currency} has {digits} decimals, {text!r} has {len(fraction)}")
        return cls(int(whole) * 10**digits + int(fraction.ljust(digits, "0") or 0), currency)

    def __str__(self) -> str:
        digits = MINOR_DIGITS.get(self.currency, 2)
        if not digits:
            return f"{self.minor} {self.currency}"
        whole, fraction = divmod(self.minor, 10**digits)
        return f"{whole}.{fraction:0{digits}d} {self.currency}"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the catalog file; an unknown key in it is an error."""


class About(Section, frozen=True):
    """``[catalog]``: its name, its version (recorded on every operation), currency and time zone."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9_-]+\Z")]
    version: Annotated[int, msgspec.Meta(ge=1)] = 1
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")] = "EUR"
    zone: str = "UTC"


class Welcome(Section, frozen=True):
    """``[signup]`` and ``[lead]``: what a new user or a new lead is given, and for how long."""

    credits: Micro = Micro(0)
    source: str = "signup"
    expires_days: Annotated[int, msgspec.Meta(ge=1, le=36_600)] | None = None

    def __post_init__(self) -> None:
        if self.credits < 0:
            raise ValueError("credits must not be negative")


class Feature(Section, frozen=True):
    """``[features.NAME]``: ``price`` credits for every ``per`` units.

    ``rounding = "exact"`` charges the proportional part (to the next micro-credit up), ``"up"`` whole
    blocks of ``per`` (ledger rules: feature prices).
    """

    price: Micro
    per: Micro = Micro(MICRO)
    rounding: Literal["exact", "up"] = "exact"
    title: str = ""
    alternatives: list[str] = []

    def __post_init__(self) -> None:
        if self.price < 0:
            raise ValueError("price must not be negative")
        if self.per <= 0:
            raise ValueError("per must be more than 0")


class Pack(Section, frozen=True):
    """``[packs.NAME]``: so many credits for so much money; ``credits`` of 0 and no price is by quote."""

    credits: Micro = Micro(0)
    price: str | None = None
    """Money, as ``"4.99 EUR"``."""
    title: str = ""
    quote_above: Micro | None = None
    expires_days: Annotated[int, msgspec.Meta(ge=1, le=36_600)] | None = None

    def __post_init__(self) -> None:
        if self.price is not None:
            Money.parse(self.price)
        if self.quote_above is None and (self.price is None or self.credits <= 0):
            raise ValueError("a pack needs credits and a price, or quote_above where it is sold by quote")


class Plan(Section, frozen=True, kw_only=True):
    """``[plans.NAME]``: credits every month, for as long as the subscription lasts (ledger rules: subscriptions).

    ``mode`` says what becomes of what is left when a period ends: it expires (``reset``), is carried into a lot of its
    own (``rollover``), or was never to expire (``accumulate``). A plan with a price renews when it is paid for, one
    without by the calendar.
    """

    title: str = ""
    monthly_credits: Micro = Micro(0)
    unlimited: bool = False
    """Whether its subscribers are charged nothing; what they use is counted all the same."""
    mode: Literal["reset", "rollover", "accumulate"] = "reset"
    source: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] = "monthly"
    rollover_source: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] = "rollover"
    rollover_cap: str | None = None
    """At most so much in live rollover lots after a renewal: ``"50%"``, ``"2x"`` of the monthly credits, or credits."""
    balance_cap: str | None = None
    """At most so much in rollover lots and the new allotment together, written likewise."""
    rollover_months: Annotated[int, msgspec.Meta(ge=1, le=1200)] | None = None
    """How many months carried credits live; for ever unless given."""
    price: str | None = None
    """Money for every ``interval``, as ``"9.99 EUR"``."""
    interval: Literal["month", "year"] = "month"
    """What one payment pays for. Credits come monthly all the same."""
    anchor: Literal["subscription", "month"] = "subscription"
    """When periods begin: at the moment of subscription, or with the calendar's month."""
    zone: str | None = None
    """Whose calendar it is, an IANA time zone; the catalog's unless given."""
    grace_days: Annotated[int, msgspec.Meta(ge=0, le=366)] = 3
    """Of a plan with a price: how long the old allotment stays usable when no payment comes."""
    upgrade: Literal["difference", "prorated", "full"] = "difference"
    """What a change to it from a smaller plan gives for the period under way: the difference of monthly credits, the
    part of it that fits the time left, or its whole allotment in place of what is left of the old one."""

    def __post_init__(self) -> None:
        if self.price is not None:
            Money.parse(self.price)
        if self.monthly_credits < 0:
            raise ValueError("monthly_credits must not be negative")
        if not self.monthly_credits and not self.unlimited:
            raise ValueError("a plan needs monthly_credits, or unlimited = true")
        caps = [cap for cap in (self.rollover_cap, self.balance_cap) if cap is not None]
        if self.mode == "rollover" and len(caps) != 1:
            raise ValueError("a plan that rolls over needs rollover_cap or balance_cap, one of the two")
        if self.mode != "rollover" and (caps or self.rollover_months is not None):
            raise ValueError('rollover_cap, balance_cap and rollover_months go with mode = "rollover"')
        for cap in caps:
            cap_micro(cap, self.monthly_credits)


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """A plan as a subscription has it, until its next renewal; what the catalog says then is in force from then on."""

    plan: str
    monthly_micro: int
    unlimited: bool = False
    mode: Literal["reset", "rollover", "accumulate"] = "reset"
    source: str = "monthly"
    rollover_source: str = "rollover"
    cap_micro: int = 0
    caps_balance: bool = False
    """Whether the cap holds for rollover lots and the new allotment together, or for rollover lots alone."""
    rollover_months: int | None = None
    interval_months: int = 1
    paid: bool = False
    """Whether it renews when a payment arrives, and not by the calendar."""
    price_minor: int | None = None
    price_currency: str | None = None
    grace_days: int = 0
    upgrade: Literal["difference", "prorated", "full"] = "difference"

    @property
    def rank(self) -> tuple[bool, int]:
        """What makes one plan higher than another: no limit, then credits."""
        return self.unlimited, self.monthly_micro


_CAP = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,4})?)(%|x)\Z", re.ASCII)


def cap_micro(cap: str, monthly_micro: int) -> int:
    """Read a cap: ``"50%"`` and ``"2x"`` are of the plan's monthly credits, anything else is credits.

    :returns: micro-credits, rounded down.
    :raises ValueError: for another shape.
    """
    match = _CAP.match(cap)
    if match is None:
        return int(parse_amount(cap))
    whole, _, fraction = match.group(1).partition(".")
    unit: int = 10 ** len(fraction) * (100 if match.group(2) == "%" else 1)
    return monthly_micro * int(whole + fraction) // unit


class Notify(Section, frozen=True, kw_only=True):
    """``[notify]``: what accounts are told of. Nothing unless said: each notice is a row."""

    kinds: list[Literal[NOTICE_KINDS]] = []  # type: ignore[valid-type]  # the names, once
    """Kinds of notice to make, beside those of low balances and of expiries ahead."""
    low_balance: list[str] = []
    """Thresholds: ``"20%"`` of the balance right after credits last came in, or credits."""
    expiry_days: list[Annotated[int, msgspec.Meta(ge=1, le=366)]] = []
    """How many days before a grant expires its account is warned."""
    channels: list[Literal["email", "webhook"]] = []
    """How notices go out, beside the in-app inbox, which has all of them."""

    def __post_init__(self) -> None:
        for threshold in self.low_balance:
            if cap_micro(threshold, MICRO) <= 0:
                raise ValueError(f"low_balance: {threshold!r} is not more than 0")
            if threshold.endswith("x"):
                raise ValueError(f"low_balance: write {threshold!r} in percent")

    @property
    def is_on(self) -> bool:
        """Whether operations make any notices."""
        return bool(self.kinds or self.low_balance)

    def thresholds(self, reference_micro: int) -> list[int]:
        """The thresholds in micro-credits, lowest first.

        :param reference_micro: the balance right after credits last came in.
        """
        return sorted(cap_micro(threshold, reference_micro) for threshold in self.low_balance)


class Clawback(Section, frozen=True):
    """``[clawback]``: what becomes of revoked credits that were spent already."""

    on_spent: Literal["debt", "forgive"] = "debt"


class Source(Section, frozen=True):
    """``[sources.NAME]``: whether its credits may be given to another account.

    Unless said, they may, but for those of :data:`PROMOTIONAL` and of the catalog's own welcomes.
    """

    transferable: bool


class Refunds(Section, frozen=True):
    """``[refunds]``: how many days credits live that are given back to a grant that has expired."""

    refund_days: Annotated[int, msgspec.Meta(ge=1, le=3660)] = 30


class Retention(Section, frozen=True):
    """``[retention]``: how long is kept what nothing is proven by; for ever unless said."""

    notices_days: Annotated[int, msgspec.Meta(ge=1, le=36_600)] | None = None
    """Notices, read or not, after they were delivered."""
    quarantine_days: Annotated[int, msgspec.Meta(ge=1, le=36_600)] | None = None
    """Quarantined messages after they were replayed or dropped. Those that are open stay."""


class Catalog(Section, frozen=True):
    """A whole catalog."""

    catalog: About
    signup: Welcome = Welcome()
    lead: Welcome = Welcome(source="lead")
    priorities: dict[str, Annotated[int, msgspec.Meta(ge=0, le=1000)]] = {}
    sources: dict[str, Source] = {}
    features: dict[str, Feature] = {}
    packs: dict[str, Pack] = {}
    plans: dict[str, Plan] = {}
    notify: Notify = Notify()
    clawback: Clawback = Clawback()
    refunds: Refunds = Refunds()
    retention: Retention = Retention()

    def __post_init__(self) -> None:
        days = self.retention.notices_days
        if days is not None and days <= max(self.notify.expiry_days, default=0):
            # A warning that is gone before its credits are would be given again.
            raise ValueError("retention.notices_days must be more than the longest of notify.expiry_days")

    @property
    def label(self) -> str:
        """Name and version, as recorded on each operation."""
        return f"{self.catalog.name}-{self.catalog.version}"

    def priority_of(self, source: str) -> int:
        """The burn-down priority of a source, lowest first."""
        return self.priorities.get(source, DEFAULT_PRIORITY)

    def is_transferable(self, source: str) -> bool:
        """Whether credits of a source may be given to another account."""
        named = self.sources.get(source)
        if named is not None:
            return named.transferable
        return source not in PROMOTIONAL and source not in (self.signup.source, self.lead.source)

    def zone_of(self, plan: str) -> str:
        """The IANA time zone of a plan's calendar."""
        return self.plans[plan].zone or self.catalog.zone

    def terms_of(self, name: str) -> Terms | None:
        """What a plan is at present, or None when there is no such plan."""
        plan = self.plans.get(name)
        if plan is None:
            return None
        monthly = int(plan.monthly_credits)
        cap = plan.rollover_cap if plan.balance_cap is None else plan.balance_cap
        price = None if plan.price is None else Money.parse(plan.price)
        return Terms(
            plan=name,
            monthly_micro=monthly,
            unlimited=plan.unlimited,
            mode=plan.mode,
            source=plan.source,
            rollover_source=plan.rollover_source,
            cap_micro=0 if cap is None else cap_micro(cap, monthly),
            caps_balance=plan.balance_cap is not None,
            rollover_months=plan.rollover_months,
            interval_months=1 if plan.interval == "month" else 12,
            paid=price is not None,
            price_minor=None if price is None else price.minor,
            price_currency=None if price is None else price.currency,
            grace_days=0 if price is None else plan.grace_days,
            upgrade=plan.upgrade,
        )

    def cheapest_offer(self, shortfall: int, above: tuple[bool, int] = (False, 0)) -> dict[str, Any] | None:
        """The pack or plan of least price that covers so much; of equals, the one with more credits.

        Of those that are alike, the first by name.
        Minor units are compared as they are: a catalog sells in one currency.

        :param shortfall: in micro-credits.
        :param above: the rank of the plan that there is: a lower one is no offer.
        :returns: its name under ``pack`` or ``plan``, with what it gives and its price.
        """
        found: list[tuple[int, int, str, dict[str, Any]]] = []
        for name, pack in self.packs.items():
            if pack.price is not None and pack.credits >= shortfall:
                offer: dict[str, Any] = {"pack": name, "credits": format_amount(pack.credits), "price": pack.price}
                found.append((Money.parse(pack.price).minor, -pack.credits, name, offer))
        for name, plan in self.plans.items():
            rank = (plan.unlimited, int(plan.monthly_credits))
            if plan.price is None or rank <= above or rank < (False, shortfall):
                continue
            offer = {"plan": name, "price": plan.price, "interval": plan.interval}
            if plan.unlimited:
                offer["unlimited"] = True
            else:
                offer["credits"] = format_amount(plan.monthly_credits)
            credits = MAX_MICRO if plan.unlimited else rank[1]
            found.append((Money.parse(plan.price).minor, -credits, name, offer))
        return min(found, key=itemgetter(0, 1, 2))[3] if found else None


def price_of(feature: Feature, quantity_micro: int) -> int:
    """What a quantity of a feature costs (ledger rules: feature prices).

    :param quantity_micro: units of the feature in millionths.
    :returns: micro-credits, rounded up to whole blocks of ``per`` or to a whole micro-credit.
    """
    if feature.rounding == "up":
        return -(-quantity_micro // feature.per) * feature.price
    return -(-quantity_micro * feature.price // feature.per)
