"""What several have a part in: limits counted by period, codes that many may redeem, and who referred whom.

Plain slotted objects, as those of ``models/rules/state.py``. Limits and referrals are of one account and change in its
lane alone. A code is of all: its row is locked while a batch that names it is applied, so that of two lanes the one
that came first is known; what the row said is kept with each operation's result.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from itertools import accumulate
from typing import Any, Generic, TypeVar

import msgspec

from creditlane.amounts import Micro, format_amount, parse_amount
from creditlane.contract import Parcel

MEMBER, CODE, REFEREE, LEAD = "member:", "code:", "referee:", "lead:"
"""What the keys of allowances begin with that are of one member, of one code, of one who was referred, of one lead."""

GIVEN, REDEEMED, REFERRED, LEADS = "gifts", "redeems", "referrals", "leads"
"""The keys of the allowances that count what an account gives away in a day, what it redeems, whom it refers, and how
many leads it was."""


class Allowance:
    """How much of something an account, or a member of a pool, has used in the period under way."""

    __slots__ = ("is_dirty", "is_listed", "key", "limit", "period", "since", "used", "uses")

    def __init__(
        self,
        key: str,
        limit: int | None,
        period: str,
        since: datetime,
        used: int = 0,
        uses: int = 0,
        is_listed: bool | None = None,
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
        self.is_listed = is_listed
        """Of a member of a pool, whether it is on its list; False for one that was taken off, None if it never was."""
        self.is_dirty = False


def allowance_row(allowance: Allowance) -> tuple[Any, ...]:
    """What is kept of it, in the order of the columns of its table, its account apart."""
    return (
        allowance.key, allowance.limit, allowance.period, allowance.since, allowance.used, allowance.uses,
        allowance.is_listed,
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

    @property
    def is_paid(self) -> bool:
        """Whether an account paid for it, of a gift code."""
        return self.source is None


Piece = TypeVar("Piece")


class EndToEnd(Generic[Piece]):
    """Credits of several lots laid end to end, so that any stretch of them can be cut out.

    :param pieces: the lots, each with its micro-credits.
    """

    def __init__(self, pieces: Sequence[tuple[Piece, int]]) -> None:
        self._pieces = pieces
        self._ends = list(accumulate(amount for _, amount in pieces))

    def cut(self, start: int, end: int) -> list[tuple[Piece, int]]:
        """What lies in ``[start, end)``, in micro-credits from the first one on, by lot.

        :raises IndexError: when there is not so much.
        """
        found = []
        place = bisect_right(self._ends, start)
        while start < end:
            stop = min(end, self._ends[place])
            found.append((self._pieces[place][0], stop - start))
            start = stop
            place += 1
        return found


OPEN, CLOSED = "open", "closed"
"""What a code may be."""


class SharedCode:
    """A code as one batch sees it, between all accounts of the batch."""

    __slots__ = ("closed_at", "first_slot", "is_dirty", "is_new", "status", "taken", "terms", "used")

    def __init__(
        self,
        terms: Terms,
        status: str = OPEN,
        used: int = 0,
        closed_at: datetime | None = None,
        first_slot: int = 0,
    ) -> None:
        self.terms = terms
        self.status = status
        """``open``, or ``closed`` by who issued it."""
        self.used = used
        """How many uses there were before this batch: those with slots from 0 on."""
        self.closed_at = closed_at
        self.taken: dict[int, Redemption] = {}
        """The uses of this batch by their slot."""
        self.first_slot = first_slot
        """The use that the first of its lots is of."""
        self.is_new = False
        self.is_dirty = False

    @property
    def uses(self) -> int:
        """How many uses there were by now; the next one has this slot."""
        return self.used + len(self.taken)

    @property
    def is_used_up(self) -> bool:
        """Whether no use is left."""
        return self.terms.uses is not None and self.uses >= self.terms.uses

    def is_over(self, now: datetime) -> bool:
        """Whether it cannot be used any more, whatever uses are left."""
        expires_at = self.terms.expires_at
        return self.status != OPEN or (expires_at is not None and expires_at <= now)

    def lots_of(self, slot: int) -> list[Parcel]:
        """The credits of one use, by the lot that paid; none where nobody did."""
        if not self.terms.lots:
            return []
        laid = EndToEnd([(lot, int(lot.amount)) for lot in self.terms.lots])
        start = (slot - self.first_slot) * self.terms.amount
        return [
            msgspec.structs.replace(lot, amount=Micro(amount))
            for lot, amount in laid.cut(start, start + self.terms.amount)
        ]


class Redemption(msgspec.Struct, frozen=True, gc=False):
    """One use of a code."""

    account: str
    operation: str
    amount: int
    """Micro-credits."""
    at: datetime


class CodeRow(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What the row of a code said to an operation: kept with the operation's result, so that a replay is told again."""

    terms: Terms
    """Of the lots those of the use in question alone."""
    status: str = OPEN
    used: int = 0
    """How many uses there were before the operation; the slot of the next."""


def row_of(code: SharedCode, to_use: bool = False) -> CodeRow:
    """What a code's row says now.

    :param to_use: with what only its next use is about, the lots and the message.
    """
    lots = tuple(code.lots_of(code.uses)) if to_use and not code.is_used_up else ()
    terms = msgspec.structs.replace(code.terms, lots=lots, message=code.terms.message if to_use else None)
    return CodeRow(terms=terms, status=code.status, used=code.uses)


def code_of_row(row: CodeRow) -> SharedCode:
    """The code of which :func:`row_of` was kept."""
    return SharedCode(row.terms, row.status, row.used, first_slot=row.used)


def _to_wire(value: Any) -> str:
    if isinstance(value, Micro):
        return format_amount(value)
    raise NotImplementedError(type(value))


def of_wire(kind: type, value: object) -> Any:
    """Read an amount as the messages write it: for msgspec's ``dec_hook``."""
    if kind is Micro:
        return Micro(parse_amount(value))
    raise NotImplementedError(kind)


encode_row = msgspec.json.Encoder(enc_hook=_to_wire).encode
"""As JSON: the amounts of lots are written as in the messages, in credits."""


class _Rows(msgspec.Struct, gc=False):
    code_row: CodeRow | None = None
    code_rows: list[CodeRow] = []
    existing: list[str] = []


_decode_rows = msgspec.json.Decoder(_Rows, dec_hook=of_wire).decode
_decode_terms = msgspec.json.Decoder(Terms, dec_hook=of_wire).decode


def told_by(result: bytes | str) -> dict[str, SharedCode]:
    """The codes that an operation's result says it saw, by their text.

    :param result: JSON with ``code_row`` or ``code_rows``, see :class:`CodeRow`; ``existing`` are texts that had been
        given before, whoever gave them.
    """
    rows = _decode_rows(result)
    seen = [*rows.code_rows, *([] if rows.code_row is None else [rows.code_row])]
    codes = {row.terms.code: code_of_row(row) for row in seen}
    codes.update({text: SharedCode(Terms(code=text, kind="", account="", operation="")) for text in rows.existing})
    return codes


def fingerprint(terms: bytes) -> str:
    """What an issue's result says of a code's terms, as JSON: the code's row must say the same for ever."""
    return sha256(terms).hexdigest()[:32]


def code_row(code: SharedCode) -> tuple[Any, ...]:
    """What is kept of a code, in the order of the columns of its table."""
    terms = code.terms
    return (
        terms.code, terms.kind, terms.account, terms.operation, terms.place, terms.amount, terms.uses,
        terms.expires_at, code.status, code.uses, code.closed_at, encode_row(terms).decode(),
    )  # fmt: skip


def code_of(status: str, used: int, closed_at: datetime | None, terms: str) -> SharedCode:
    """A code of the last columns of :func:`code_row`, in this order."""
    return SharedCode(_decode_terms(terms), status, used, closed_at)
