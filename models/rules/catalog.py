"""What a business decides about its credits, as plain values (see ``models/catalog.py`` for the file).

The types are strict: an unknown key, a wrong type or a number out of range is an error that names the
key. Amounts are micro-credits once read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Annotated, Any, Literal

import msgspec

from creditlane.amounts import MAX_MICRO, MICRO, Micro, format_amount, parse_amount
from creditlane.contract import MAX_FEATURES, Name

DEFAULT_PRIORITY = 100
"""The burn-down priority of a source that the catalog does not name."""

MINOR_DIGITS = {"BIF": 0, "CLP": 0, "DJF": 0, "GNF": 0, "ISK": 0, "JPY": 0, "KMF": 0, "KRW": 0, "PYG": 0,
                "RWF": 0, "UGX": 0, "VND": 0, "VUV": 0, "XAF": 0, "XOF": 0, "XPF": 0,
                "BHD": 3, "IQD": 3, "JOD": 3, "KWD": 3, "LYD": 3, "OMR": 3, "TND": 3}  # fmt: skip
"""Decimals of the currencies (ISO 4217) that do not have two."""

NOTICE_KINDS = (
    "depleted", "credits_expired", "period_renewed", "pack_bought", "payment_failed", "plan_started", "plan_changed",
    "plan_cancelled", "plan_ended", "gift_received", "referral_bonus", "refunded", "member_limit", "purchase_frozen",
    "purchase_thawed", "quote_ready", "achievement",
)  # fmt: skip
"""What a notice may be of, beside ``low_balance`` and ``expiring``, which have settings of their own."""

PROMOTIONAL = frozenset({"signup", "lead", "trial", "bonus", "referral", "promotion", "achievement"})
"""Sources of credits that nobody paid for: not to be given away unless the catalog says so."""

EARNED = frozenset({"bonus", "referral", "promotion", "achievement"})
"""Sources of credits that an account was given for something it did: what leaderboards count as earned."""

PriceId = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._:-]+\Z")]
"""What a payment provider calls a price: a payment names it, and it says what was bought."""

Days = Annotated[int, msgspec.Meta(ge=1, le=36_600)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Priority = Annotated[int, msgspec.Meta(ge=0, le=1000)]

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
    version: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] = 1
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")] = "EUR"
    zone: str = "UTC"


class Welcome(Section, frozen=True):
    """``[signup]``: what a new user is given, and for how long."""

    credits: Micro = Micro(0)
    source: Name = "signup"
    expires_days: Days | None = None

    def __post_init__(self) -> None:
        if self.credits < 0:
            raise ValueError("credits must not be negative")


class LeadWelcome(Welcome, frozen=True):
    """``[lead]``: as ``[signup]``, of a source of its own; and how many leads one user may have been, in all."""

    source: Name = "lead"
    per_user: Count | None = None


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


class PackGrant(Section, frozen=True, kw_only=True):
    """``[[packs.NAME.grants]]``: one of the lots that a bundle is made of."""

    credits: Micro
    features: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_FEATURES)] | None = None
    """What they may be spent on; everything unless given."""
    source: Name | None = None
    """That of the pack unless given."""
    expires_days: Days | None = None
    priority: Priority | None = None
    """In the burn-down order; that of the source unless given."""

    def __post_init__(self) -> None:
        if self.credits <= 0:
            raise ValueError("credits must be more than 0")


class Pack(Section, frozen=True):
    """``[packs.NAME]``: so many credits, or so many lots of them, for so much money; or a quantity by quote."""

    credits: Micro = Micro(0)
    price: str | None = None
    """Money, as ``"4.99 EUR"``."""
    title: str = ""
    quote_above: Micro | None = None
    """Sold by an administrator's quote, for more credits than these."""
    expires_days: Days | None = None
    prices: list[PriceId] = []
    """The prices of payment providers that stand for it; a checkout asks for the first."""
    source: Name = "pack"
    grants: list[PackGrant] = []
    """What it gives in place of ``credits``: several lots, each with an end and a scope of its own."""

    def __post_init__(self) -> None:
        if self.price is not None:
            Money.parse(self.price)
        if self.credits < 0:
            raise ValueError("credits must not be negative")
        if self.credits and self.grants:
            raise ValueError("a pack has credits or grants, not both")
        if self.grants and self.expires_days is not None:
            raise ValueError("of a pack with grants each says its own expires_days")
        is_for_sale = self.price is not None and bool(self.credits or self.grants)
        if self.quote_above is None and not is_for_sale:
            raise ValueError("a pack needs credits and a price, or quote_above where it is sold by quote")
        if self.quote_above is not None and (self.price is not None or self.credits or self.grants):
            raise ValueError("what is sold by quote has its credits and its price from the quote")
        if self.prices and not is_for_sale:
            raise ValueError("prices go with price: a quote has its own")

    @property
    def lots(self) -> tuple[SoldGrant, ...]:
        """What one of it gives."""
        if self.credits:
            return (SoldGrant(int(self.credits), self.source, None, self.expires_days, None),)
        return tuple(
            SoldGrant(
                int(each.credits),
                each.source or self.source,
                None if each.features is None else tuple(each.features),
                each.expires_days,
                each.priority,
            )
            for each in self.grants
        )

    def general_micro(self, lasting: timedelta = timedelta()) -> int:
        """What it gives that may be spent on everything, and lives as long.

        :returns: micro-credits.
        """
        if self.credits:
            return int(self.credits) if _lives(self.expires_days, lasting) else 0
        return sum(
            int(each.credits) for each in self.grants if each.features is None and _lives(each.expires_days, lasting)
        )


def _lives(expires_days: int | None, lasting: timedelta) -> bool:
    return expires_days is None or not lasting or timedelta(days=expires_days) >= lasting


class Offer(Section, frozen=True, kw_only=True):
    """``[offers.NAME]``: a pack at another price, for a time or so many times an account."""

    pack: str
    price: str
    """Money, as ``"3.99 EUR"``."""
    prices: list[PriceId] = []
    """As those of a pack. Who paid one gets the pack, were the offer over by then or not."""
    title: str = ""
    begins_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = msgspec.field(name="from", default=None)
    ends_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = msgspec.field(name="until", default=None)
    """The first instant at which it is over."""
    per_account: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    """How many an account may buy; as many as it likes unless given."""

    def __post_init__(self) -> None:
        Money.parse(self.price)
        if self.begins_at is not None and self.ends_at is not None and self.ends_at <= self.begins_at:
            raise ValueError("until is not after from")

    def runs_at(self, now: datetime) -> bool:
        """Whether it can be bought at an instant."""
        return (self.begins_at is None or self.begins_at <= now) and (self.ends_at is None or now < self.ends_at)


class SoldGrant(msgspec.Struct, frozen=True):
    """A lot of credits as it is bought."""

    credits_micro: int
    source: str
    features: tuple[str, ...] | None
    expires_days: int | None
    """From when it is given."""
    priority: int | None
    """None: that of its source."""


class Sold(msgspec.Struct, frozen=True, kw_only=True):
    """What a price stands for."""

    kind: Literal["pack", "plan"]
    name: str
    offer: str | None = None
    """The offer that it was bought by."""
    grants: tuple[SoldGrant, ...] = ()
    """What one of a pack gives. A plan gives by its terms."""


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
    source: Name = "monthly"
    rollover_source: Name = "rollover"
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
    prices: list[PriceId] = []
    """The prices of payment providers that stand for it; a checkout asks for the first."""
    trial_days: Annotated[int, msgspec.Meta(ge=1, le=730)] | None = None
    """How long a new subscriber may try it before the first payment."""
    trial_credits: Micro = Micro(0)
    """What there is for the time of a trial."""

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
        if self.price is None and (self.prices or self.trial_days is not None):
            raise ValueError("prices and trial_days go with price")
        if self.trial_credits < 0:
            raise ValueError("trial_credits must not be negative")
        if self.trial_credits and self.trial_days is None:
            raise ValueError("trial_credits go with trial_days")


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
    """``[sources.NAME]``: what its credits are."""

    transferable: bool | None = None
    """Whether they may be given to another account. Unless said, they may, but for those of :data:`PROMOTIONAL` and of
    the catalog's own welcomes."""
    earned: bool | None = None
    """Whether they count as earned; those of :data:`EARNED` do unless said."""

    def __post_init__(self) -> None:
        if self.transferable is None and self.earned is None:
            raise ValueError("a source says transferable or earned")


class Refunds(Section, frozen=True):
    """``[refunds]``: how many days credits live that are given back to a grant that has expired."""

    refund_days: Annotated[int, msgspec.Meta(ge=1, le=3660)] = 30


class Retention(Section, frozen=True):
    """``[retention]``: how long is kept what nothing is proven by; for ever unless said."""

    notices_days: Annotated[int, msgspec.Meta(ge=1, le=36_600)] | None = None
    """Notices, read or not, after they were delivered."""
    quarantine_days: Annotated[int, msgspec.Meta(ge=1, le=36_600)] | None = None
    """Quarantined messages after they were replayed or dropped. Those that are open stay."""


class Gifts(Section, frozen=True, kw_only=True):
    """``[gifts]``: how much may be given away, by transfer or gift code, and how often redeemed; no limit unless said.

    A day begins at midnight in the catalog's zone.
    """

    credits_per_day: Micro | None = None
    """What one account may give away in a day."""
    gifts_per_day: Count | None = None
    """How often."""
    redeems_per_day: Count | None = None
    """How many codes one account may redeem in a day."""
    code_days: Days = 365
    """How long a gift code can be redeemed, where its issue does not say."""

    def __post_init__(self) -> None:
        if self.credits_per_day is not None and self.credits_per_day <= 0:
            raise ValueError("credits_per_day must be more than 0")


class Referrals(Section, frozen=True, kw_only=True):
    """``[referrals]``: what who refers somebody gets, and who is referred; nothing unless said."""

    referrer: Micro = Micro(0)
    """Credits for each referee."""
    referee: Micro = Micro(0)
    trigger: Literal["sign_up", "purchase"] = "sign_up"
    """Whether both are given when the code is claimed, or with the referee's first purchase."""
    source: Name = "referral"
    expires_days: Days | None = None
    """How long these credits live."""
    claim_days: Days | None = None
    """How long after its opening an account may claim a code; for ever unless said."""
    per_day: Count | None = None
    """How many referees an account is rewarded for in a day."""
    per_referrer: Count | None = None
    """And in all."""

    def __post_init__(self) -> None:
        if self.referrer < 0 or self.referee < 0:
            raise ValueError("referrer and referee must not be negative")


class Pools(Section, frozen=True, kw_only=True):
    """``[pools]``: who may use a pool, and how much of it, where ``pools.set_member`` says nothing else."""

    members: Literal["any", "listed"] = "any"
    """Whether anybody whom the business names as a member may use it, or only those that were listed."""
    member_limit: Micro | None = None
    """Credits for each member in a period; none unless said."""
    period: Literal["day", "week", "month", "total"] = "month"

    def __post_init__(self) -> None:
        if self.member_limit is not None and self.member_limit < 0:
            raise ValueError("member_limit must not be negative")


class Achievement(Section, frozen=True, kw_only=True):
    """``[achievements.NAME]``: something an account reaches once, for which it may get credits."""

    title: str = ""
    measure: Literal["used", "referrals"] = "used"
    """Credits used, what was given back not counted; or accounts that it was rewarded for referring."""
    at: Micro
    """From how many on it is reached."""
    credits: Micro = Micro(0)
    """What comes with it."""
    expires_days: Days | None = None

    def __post_init__(self) -> None:
        if self.at <= 0:
            raise ValueError("at must be more than 0")
        if self.credits < 0:
            raise ValueError("credits must not be negative")


AchievementName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9_-]+\Z")]


class Catalog(Section, frozen=True):
    """A whole catalog."""

    catalog: About
    signup: Welcome = Welcome()
    lead: LeadWelcome = LeadWelcome()
    priorities: dict[Name, Priority] = {}
    sources: dict[Name, Source] = {}
    features: dict[Name, Feature] = {}
    packs: dict[Name, Pack] = {}
    plans: dict[Name, Plan] = {}
    offers: dict[Name, Offer] = {}
    notify: Notify = Notify()
    clawback: Clawback = Clawback()
    refunds: Refunds = Refunds()
    retention: Retention = Retention()
    gifts: Gifts = Gifts()
    referrals: Referrals = Referrals()
    pools: Pools = Pools()
    achievements: dict[AchievementName, Achievement] = {}

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
        """Whether credits of a source may be given to another account; what a plan carried, if it might before."""
        named = self.sources.get(source)
        if named is not None and named.transferable is not None:
            return named.transferable
        carried = [plan.source for plan in self.plans.values() if plan.rollover_source == source]
        return all(map(self._may_leave, (source, *carried)))

    def _may_leave(self, source: str) -> bool:
        named = self.sources.get(source)
        if named is not None and named.transferable is not None:
            return named.transferable
        return source not in PROMOTIONAL and source not in (
            self.signup.source, self.lead.source, self.referrals.source,
        )  # fmt: skip

    @property
    def earned_sources(self) -> list[str]:
        """The sources of credits that count as earned."""
        named = {name: source.earned for name, source in self.sources.items() if source.earned is not None}
        counted = dict.fromkeys((*EARNED, self.referrals.source), True) | named
        return sorted(name for name, earned in counted.items() if earned)

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

    def sold_by(self, price: str) -> Sold | None:
        """What a payment provider's price stands for, or None when nothing has it.

        That of an offer does after its end as well: the money was taken.
        """
        for name, pack in self.packs.items():
            if price in pack.prices:
                return Sold(kind="pack", name=name, grants=pack.lots)
        for name, offer in self.offers.items():
            if price in offer.prices:
                return Sold(kind="pack", name=offer.pack, offer=name, grants=self.packs[offer.pack].lots)
        for name, plan in self.plans.items():
            if price in plan.prices:
                return Sold(kind="plan", name=name)
        return None

    def sold_by_quote(self, name: str, credits_micro: int) -> Sold | None:
        """So many credits of a pack that is sold by quote, or None when there is no such pack."""
        pack = self.packs.get(name)
        if pack is None or pack.quote_above is None:
            return None
        return Sold(kind="pack", name=name, grants=(
            SoldGrant(credits_micro, pack.source, None, pack.expires_days, None),
        ))  # fmt: skip

    def offers_at(self, now: datetime) -> dict[str, Offer]:
        """The offers that can be bought at an instant."""
        return {name: offer for name, offer in self.offers.items() if offer.runs_at(now)}

    def on_sale(self, now: datetime | None = None) -> Iterator[tuple[str, str | None, Pack, str]]:
        """What anybody may buy as often as they like, first the packs at their own price.

        :param now: for which offers to include those that run then; none unless given.
        :returns: a pack's name, the offer's or None, the pack and the price.
        """
        for name, pack in self.packs.items():
            if pack.price is not None:
                yield name, None, pack, pack.price
        if now is not None:
            for offered, offer in self.offers_at(now).items():
                if offer.per_account is None:
                    yield offer.pack, offered, self.packs[offer.pack], offer.price

    def cheapest_offer(
        self, shortfall: int, above: tuple[bool, int] = (False, 0), now: datetime | None = None
    ) -> dict[str, Any] | None:
        """The pack or plan of least price that covers so much; of equals, the one with more credits.

        Of those that are alike, the first by name. Of a bundle counts what may be spent on everything.
        Minor units are compared as they are: a catalog sells in one currency.

        :param shortfall: in micro-credits.
        :param above: the rank of the plan that there is: a lower one is no offer.
        :param now: for which packs may be named at the price of an offer that runs then.
        :returns: its name under ``pack`` or ``plan``, with what it gives and its price.
        """
        found: list[tuple[int, int, str, dict[str, Any]]] = []
        for name, offered, pack, price in self.on_sale(now):
            credits = pack.general_micro()
            if credits >= shortfall:
                offer: dict[str, Any] = {"pack": name, "credits": format_amount(credits), "price": price}
                if offered is not None:
                    offer["offer"] = offered
                found.append((Money.parse(price).minor, -credits, name, offer))
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
