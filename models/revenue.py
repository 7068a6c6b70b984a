"""Revenue: what was paid for credits, and what became of the money, to the last minor unit.

Whoever buys credits has paid for something that is yet to be given: the money is deferred until the credits are used.
For every currency, and never across two::

    opening + sold + moved in = earned + breakage + returned + moved out + closing

sold        credits that came with a price: packs, and the allotments of plans that are paid for
earned      used: consumed, captured, paid on a debt; less what was given back of it
breakage    expired without having been used
returned    taken back, by revocation, claw-back or adjustment
moved       given to another account, or carried into a lot of another source; over all accounts it comes to nothing
opening, closing    deferred: available, held, or on the way to another account

**Where each entry belongs** stands in :data:`PLACES`; a kind that is not there is a fault of the report. An entry
counts in the month that it holds from (``at``): credits that expired on the 31st are that month's breakage, though a
sweep wrote it on the 1st.

**Debt.** When a purchase is returned whose credits were spent already, nothing is left to take back, and the account
owes the credits. The money went back to the buyer, so what was earned by those credits is earned no more: it moves from
earned to returned, at the price of the lot that was returned. What pays the debt later is given for what had been used
by then: it is earned, at the price of the lot that pays. If the credits were only held or on their way, the reversal
comes before the use, so earned may be less than nothing for a while. What a catalog forgives leaves no entry, and stays
earned. When a return is undone, so is all of that: credits that had paid its debt come back to their lot, and are
counted with the kinds that they were counted with, less than nothing.

**Rounding.** A lot is worth ``price_minor × credits / price_per`` rounded half to even; of several lots of one purchase
at one price the k-th is worth what the first k come to less what the k - 1 before came to, so that together they never
come to more than what was paid. What is left in a lot is worth its share of the lot's money, rounded in the same way,
and what moves is worth the difference between before and after. So the parts of a lot always add up to the lot,
whatever their number, and nothing is lost in between. A lot that was given carries its money along.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, TextIO, TypeVar
from zoneinfo import ZoneInfo

from creditlane.amounts import format_amount
from models.report import Report
from models.rules.calendar import add_months, month_start
from models.rules.catalog import MINOR_DIGITS

SOLD, MOVED_IN, EARNED, BREAKAGE, RETURNED, MOVED_OUT = (
    "sold", "moved_in", "earned", "breakage", "returned", "moved_out",
)  # fmt: skip
PARTS = SOLD, MOVED_IN, EARNED, BREAKAGE, RETURNED, MOVED_OUT
"""What lies between opening and closing, in the order in which it is shown."""

GROWS = {SOLD: 1, MOVED_IN: 1, EARNED: -1, BREAKAGE: -1, RETURNED: -1, MOVED_OUT: -1}
"""What each part does to what is deferred."""


class Place(NamedTuple):
    """Where the money of a kind of entry goes."""

    how: str
    """What it does to its lot: see :mod:`models.revenue_reading`."""
    parts: tuple[tuple[str, int], ...] = ()
    """The parts of the report that change, and their sign."""


PLACES: dict[str, Place] = {
    "granted": Place("bought", ((SOLD, +1),)),
    "received": Place("received", ((MOVED_IN, +1),)),
    "rolled_in": Place("carried", ((MOVED_IN, +1),)),
    "consumed": Place("take", ((EARNED, +1),)),
    "captured": Place("take", ((EARNED, +1),)),
    "debt_paid": Place("take", ((EARNED, +1),)),
    "restored": Place("back", ((EARNED, -1),)),
    "expired": Place("take", ((BREAKAGE, +1),)),
    "unexpired": Place("back", ((BREAKAGE, -1),)),
    "revoked": Place("take", ((RETURNED, +1),)),
    "reinstated": Place("reinstate", ((RETURNED, -1),)),
    "debt_incurred": Place("owe", ((EARNED, -1), (RETURNED, +1))),
    "debt_cancelled": Place("forgo", ((EARNED, +1), (RETURNED, -1))),
    "rolled_out": Place("carry", ((MOVED_OUT, +1),)),
    "transferred": Place("give"),
    "sent": Place("given", ((MOVED_OUT, +1),)),
    "bounced": Place("bounce"),
    "held": Place("stay"),
    "released": Place("stay"),
}
"""The place of every kind of entry."""


def decimal(minor: int, currency: str) -> str:
    """Write minor units as a decimal number of a currency, without its name: ``-4.99``, ``500`` of yen."""
    digits = MINOR_DIGITS.get(currency, 2)
    text = f"{abs(minor):0{digits + 1}d}"
    sign = "-" if minor < 0 else ""
    return f"{sign}{text[:-digits]}.{text[-digits:]}" if digits else f"{sign}{text}"


class Amount(NamedTuple):
    """Credits, and the money that was paid for them."""

    credits_micro: int = 0
    minor: int = 0

    def __add__(self, other: object) -> Amount:
        """Both together."""
        if not isinstance(other, Amount):
            return NotImplemented
        return Amount(self.credits_micro + other.credits_micro, self.minor + other.minor)

    def __mul__(self, factor: object) -> Amount:
        """So many times it: a sign."""
        if not isinstance(factor, int):
            return NotImplemented
        return Amount(self.credits_micro * factor, self.minor * factor)

    def __sub__(self, other: Amount) -> Amount:
        """What it is more."""
        return self + other * -1


NOTHING = Amount()


class Book(NamedTuple):
    """What figures are kept apart by."""

    account: str
    """Empty where the report is not by account."""
    currency: str
    """ISO 4217; empty for credits that nobody paid for."""
    source: str


Figures = dict[tuple[int, str], list[int]]
"""What a book has, by month and kind of entry: credits in micro-credits, and money in minor units. The report's months
count from 0; what was before them is -1, and what came after them is the number of months."""

Key = TypeVar("Key")


class Line(NamedTuple):
    """One line of the report for a program: a figure of one month, currency, source and kind."""

    start: datetime
    end: datetime
    """The month, or the part of it that the report is of: ``[start, end)``."""
    account: str
    currency: str
    source: str
    part: str
    """``opening``, one of :data:`PARTS`, or ``closing``."""
    kind: str
    """The kind of entry; empty for ``opening`` and ``closing``."""
    amount: Amount


class Summary(NamedTuple):
    """What became of what was deferred, in one span of time."""

    opening: Amount
    parts: dict[str, Amount]
    """What moved in between, by :data:`PARTS`."""

    @property
    def closing(self) -> Amount:
        """What is deferred at the end."""
        return sum((self.parts[part] * GROWS[part] for part in PARTS), self.opening)


@dataclass
class Revenue:
    """What a report found.

    Figures are kept for each month, currency, source and kind of entry, and each account where that was asked for.
    """

    bounds: list[datetime]
    """Where each month begins, and where the last one ends; the first and the last may be parts of one."""
    zone: str = "UTC"
    by_account: bool = False
    report: Report = field(default_factory=Report)
    """What was read, and each fault by name."""
    books: dict[Book, Figures] = field(default_factory=dict)

    @property
    def months(self) -> int:
        """How many months it is of, begun ones included."""
        return len(self.bounds) - 1

    def local(self, instant: datetime) -> str:
        """An instant as the report's zone writes it, by ISO 8601."""
        return instant.astimezone(ZoneInfo(self.zone)).isoformat()

    @property
    def currencies(self) -> list[str]:
        """Those that credits were paid for in."""
        return sorted({book.currency for book in self.books} - {""})

    def summaries(self, key: Callable[[Book], Key], first: int = 0, last: int | None = None) -> dict[Key, Summary]:
        """Add up books, over all months or some.

        :param key: which books are added up together; those of two currencies make no sense together.
        :param first: the first month, from 0.
        :param last: the last month; that of the report unless given.
        """
        last = self.months - 1 if last is None else last
        found: dict[Key, Summary] = {}
        for book, figures in self.books.items():
            name = key(book)
            opening, parts = found.get(name) or Summary(NOTHING, dict.fromkeys(PARTS, NOTHING))
            for (month, kind), (credits, minor) in figures.items():
                amount = Amount(credits, minor)
                for part, sign in PLACES[kind].parts:
                    if month < first:
                        opening += amount * (sign * GROWS[part])
                    elif month <= last:
                        parts[part] += amount * sign
            found[name] = Summary(opening, parts)
        return found

    def totals(self, first: int = 0, last: int | None = None) -> dict[str, Summary]:
        """Add up each currency: nothing moves into it or out of it, so what was sold is all that came in.

        A gift that has arrived is the recipient's, though the giver's lane may not know it yet: it is counted once.
        """
        found = {}
        for currency, summary in self.summaries(_currency, first, last).items():
            parts = {**summary.parts, MOVED_IN: NOTHING, MOVED_OUT: NOTHING}
            found[currency] = Summary(summary.opening - self.under_way(currency, first), parts)
        return found

    def under_way(self, currency: str, month: int) -> Amount:
        """What of a currency is counted twice when a month begins: received, and not yet confirmed to its giver."""
        moved = (
            Amount(*amount) * (sign * GROWS[part])
            for book, figures in self.books.items()
            if book.currency == currency
            for (in_month, kind), amount in figures.items()
            if in_month < month
            for part, sign in PLACES[kind].parts
            if part in (MOVED_IN, MOVED_OUT)
        )
        return sum(moved, NOTHING)

    def lines(self) -> Iterator[Line]:
        """Every figure, in the order of account, currency, source and month; what is nothing is left out."""
        for book in sorted(self.books):
            cells = self.books[book]
            opening = self._deferred_before(cells, 0)
            for month in range(self.months):
                ends = self.bounds[month], self.bounds[month + 1]
                closing = self._deferred_before(cells, month + 1)
                if opening != NOTHING:
                    yield Line(*ends, *book, "opening", "", opening)
                for kind, place in PLACES.items():
                    found = cells.get((month, kind))
                    if found is not None:
                        for part, sign in place.parts:
                            yield Line(*ends, *book, part, kind, Amount(*found) * sign)
                if closing != NOTHING:
                    yield Line(*ends, *book, "closing", "", closing)
                opening = closing

    @staticmethod
    def _deferred_before(cells: Figures, end: int) -> Amount:
        grown = (
            Amount(*figures) * sum(sign * GROWS[part] for part, sign in PLACES[kind].parts)
            for (month, kind), figures in cells.items()
            if month < end
        )
        return sum(grown, NOTHING)


def month_bounds(start: datetime, end: datetime, zone: str) -> list[datetime]:
    """Where the months of a span begin, and where it ends.

    :param zone: the IANA time zone whose calendar counts.
    :raises ValueError: when the span is empty.
    """
    if end <= start:
        raise ValueError("the report ends before it begins")
    bounds = [start]
    first = month_start(start, zone)
    while (begins := add_months(first, len(bounds), zone)) < end:
        bounds.append(begins)
    return [*bounds, end]


CSV_COLUMNS = (
    "start", "end", "account", "currency", "source", "part", "kind", "credits", "amount_minor", "amount",
)  # fmt: skip


def write_csv(found: Revenue, file: TextIO) -> int:
    """Write every figure as a row of CSV (RFC 4180), money both in minor units and as a decimal number.

    :param file: opened with ``newline=""``.
    :returns: how many rows, the one of names apart.
    """
    rows = csv.writer(file)
    rows.writerow(CSV_COLUMNS)
    count = 0
    for line in found.lines():
        credits, minor = line.amount
        money = (minor, decimal(minor, line.currency)) if line.currency else ("", "")
        start, end = found.local(line.start), found.local(line.end)
        book = (line.account, line.currency, line.source, line.part, line.kind)
        rows.writerow((start, end, *book, format_amount(credits), *money))
        count += 1
    return count


def _currency(book: Book) -> str:
    return book.currency
