"""What a business decides about its credits, as plain values (see ``models/catalog.py`` for the file).

The types are strict: an unknown key, a wrong type or a number out of range is an error that names the
key. Amounts are micro-credits once read.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from creditlane.amounts import MICRO, Micro, format_amount

DEFAULT_PRIORITY = 100
"""The burn-down priority of a source that the catalog does not name."""

MINOR_DIGITS = {"BIF": 0, "CLP": 0, "DJF": 0, "GNF": 0, "ISK": 0, "JPY": 0, "KMF": 0, "KRW": 0, "PYG": 0,
                "RWF": 0, "UGX": 0, "VND": 0, "VUV": 0, "XAF": 0, "XOF": 0, "XPF": 0,
                "BHD": 3, "IQD": 3, "JOD": 3, "KWD": 3, "LYD": 3, "OMR": 3, "TND": 3}  # fmt: skip
"""Decimals of the currencies (ISO 4217) that do not have two."""

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


class Catalog(Section, frozen=True):
    """A whole catalog."""

    catalog: About
    signup: Welcome = Welcome()
    lead: Welcome = Welcome(source="lead")
    priorities: dict[str, Annotated[int, msgspec.Meta(ge=0, le=1000)]] = {}
    sources: dict[str, Source] = {}
    features: dict[str, Feature] = {}
    packs: dict[str, Pack] = {}
    clawback: Clawback = Clawback()
    refunds: Refunds = Refunds()

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

    def cheapest_pack(self, shortfall: int) -> dict[str, str] | None:
        """The pack of least price that covers ``shortfall`` micro-credits; of equals, the one with more credits."""
        covering = [
            (Money.parse(pack.price).minor, -pack.credits, name)
            for name, pack in self.packs.items()
            if pack.price is not None and pack.credits >= shortfall
        ]
        if not covering:
            return None
        _, _, name = min(covering)
        pack = self.packs[name]
        return {"pack": name, "credits": format_amount(pack.credits), "price": pack.price or ""}


def price_of(feature: Feature, quantity_micro: int) -> int:
    """What a quantity of a feature costs (ledger rules: feature prices).

    :param quantity_micro: units of the feature in millionths.
    :returns: micro-credits, rounded up to whole blocks of ``per`` or to a whole micro-credit.
    """
    if feature.rounding == "up":
        return -(-quantity_micro // feature.per) * feature.price
    return -(-quantity_micro * feature.price // feature.per)
