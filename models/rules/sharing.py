"""What several have a part in: limits counted by period, codes that many may redeem, and who referred whom.

Plain slotted objects, as those of ``models/rules/state.py``. Limits and referrals are of one account and change in its
lane alone. A code is of all: its row is locked while a batch that names it is applied, so that of two lanes the one
that came first is known; what the row said is kept with each operation's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from creditlane.contract import Parcel

MEMBER, CODE, REFEREE = "member:", "code:", "referee:"
"""What the keys of allowances begin with that are of one member, of one code, of one who was referred."""

GIVEN, REDEEMED, REFERRED = "gifts", "redeems", "referrals"
"""The keys of the allowances that count what an account gives away in a day, what it redeems, and whom it refers."""


class Allowance:
    """How much of something an account, or a member of a pool, has used in the period under way."""

    __slots__ = ("is_dirty", "is_removed", "key", "limit", "period", "since", "used", "uses")

    def __init__(
        self,
        key: str,
        limit: int | None,
        period: str,
        since: datetime,
        used: int = 0,
        uses: int = 0,
        is_removed: bool = False,
    ) -> None:
        self.key = key
        """What it is of, see the prefixes above."""
        self.limit = limit
        """Of micro-credits in a period; None for none, or where the catalog says."""
        self.period = period
        """``day``, ``week``, ``month`` or ``total``."""
        self.since = since
        """When the period began that the counters are of."""
        self.used = used
        """Micro-credits."""
        self.uses = uses
        """How many times."""
        self.is_removed = is_removed
        self.is_dirty = False


def allowance_row(allowance: Allowance) -> tuple[Any, ...]:
    """What is kept of it, in the order of the columns of its table, its account apart."""
    return (
        allowance.key, allowance.limit, allowance.period, allowance.since, allowance.used, allowance.uses,
        allowance.is_removed,
    )  # fmt: skip


def allowance_of(row: Sequence[Any]) -> Allowance:
    """An allowance of what :func:`allowance_row` gave."""
    return Allowance(*row)


class Referral:
    """Who referred an account, by which code it refers others, and how many it has referred."""

    __slots__ = ("claimed_at", "claimed_code", "code", "is_dirty", "referees", "referrer", "settled_at")

    def __init__(
        self,
        code: str | None = None,
        referrer: str | None = None,
        claimed_code: str | None = None,
        claimed_at: datetime | None = None,
        settled_at: datetime | None = None,
        referees: int = 0,
    ) -> None:
        self.code = code
        """Its own."""
        self.referrer = referrer
        self.claimed_code = claimed_code
        """That of its referrer."""
        self.claimed_at = claimed_at
        self.settled_at = settled_at
        """When it got its bonus, and its referrer was told."""
        self.referees = referees
        """How many it was rewarded for."""
        self.is_dirty = False


def referral_row(referral: Referral) -> tuple[Any, ...]:
    """What is kept of it, in the order of the columns of its table, its account apart."""
    return (
        referral.code, referral.referrer, referral.claimed_code, referral.claimed_at, referral.settled_at,
        referral.referees,
    )  # fmt: skip


def referral_of(row: Sequence[Any]) -> Referral:
    """A referral of what :func:`referral_row` gave."""
    return Referral(*row)


GIFT, REFERRAL = "gift", "referral"
"""Kinds of codes."""


class Terms(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What a code is, for ever."""

    code: str
    kind: str
    account: str
    """Who issued it; of a referral code, whose it is."""
    operation: str
    """The operation that issued it."""
    place: int = 0
    """Among the codes of that operation, from 0."""
    amount: int = 0
    """Micro-credits for each use."""
    uses: int | None = None
    """How often it may be used in all; None for without end."""
    per_account: int | None = None
    expires_at: datetime | None = None
    """Until when it can be used."""
    credits_seconds: int | None = None
    """How long its credits live; None where they have the ends of the lots that paid, or none."""
    source: str | None = None
    """That of its credits, where nobody paid for it."""
    lots: tuple[Parcel, ...] = ()
    """Where an account paid: the lots that did, in order, for all its uses."""
    message: str | None = None


class SharedCode:
    """A code as one batch sees it, between all accounts of the batch."""

    __slots__ = ("_before", "closed_at", "is_dirty", "is_new", "status", "taken", "terms", "used")

    def __init__(self, terms: Terms, status: str = "open", used: int = 0, closed_at: datetime | None = None) -> None:
        self.terms = terms
        self.status = status
        """``open``, or ``closed`` by who issued it."""
        self.used = used
        """How many uses there were before this batch: those with slots from 0 on."""
        self.closed_at = closed_at
        self.taken: dict[int, Redemption] = {}
        """The uses of this batch by their slot."""
        self._before = status, closed_at
        self.is_new = False
        self.is_dirty = False

    @property
    def uses(self) -> int:
        """How many uses there were by now."""
        return self.used + len(self.taken)

    def free_slot(self) -> int:
        """The first slot that nobody has."""
        slot = self.used
        while slot in self.taken:
            slot += 1
        return slot

    def forget(self, account: str) -> None:
        """As if an account had done nothing in this batch: it is made anew."""
        if account == self.terms.account:
            self.status, self.closed_at = self._before
            self.is_dirty = False
        self.taken = {slot: each for slot, each in self.taken.items() if each.account != account}


class Redemption(msgspec.Struct, frozen=True, gc=False):
    """One use of a code."""

    account: str
    operation: str
    amount: int
    """Micro-credits."""
    at: datetime


_encode = msgspec.json.Encoder().encode
_decode_terms = msgspec.json.Decoder(Terms).decode


def code_row(code: SharedCode) -> tuple[Any, ...]:
    """What is kept of a code, in the order of the columns of its table."""
    terms = code.terms
    return (
        terms.code, terms.kind, terms.account, terms.operation, terms.place, terms.amount, terms.uses,
        terms.expires_at, code.status, code.uses, code.closed_at, _encode(terms).decode(),
    )  # fmt: skip


def code_of(status: str, used: int, closed_at: datetime | None, terms: str) -> SharedCode:
    """A code of the last columns of :func:`code_row`, in this order."""
    return SharedCode(_decode_terms(terms), status, used, closed_at)


class CodeRow(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What a code's row said to an operation: kept with its result, under ``code_row``, so that it can be replayed."""

    terms: Terms
    status: str
    used: int = 0
    closed_at: datetime | None = None


def said_of(code: SharedCode) -> CodeRow:
    """What there is to keep of how a code stood."""
    return CodeRow(terms=code.terms, status=code.status, used=code.uses, closed_at=code.closed_at)


class _Said(msgspec.Struct):
    code_row: CodeRow | None = None


_decode_said = msgspec.json.Decoder(_Said).decode


def code_said(result: str) -> SharedCode | None:
    """The code that an operation found, by its result; None where there was none.

    :param result: as JSON.
    """
    row = _decode_said(result).code_row
    return None if row is None else SharedCode(row.terms, row.status, row.used, row.closed_at)
