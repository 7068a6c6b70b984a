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
earned.

**Rounding.** A lot is worth ``price_minor × credits / price_per`` rounded half to even; of several lots of one purchase
at one price the k-th is worth what the first k come to less what the k - 1 before came to, so that together they never
come to more than what was paid. What is left in a lot is worth its share of the lot's money, rounded in the same way,
and what moves is worth the difference between before and after. So the parts of a lot always add up to the lot,
whatever their number, and nothing is lost in between. A lot that was given carries its money along.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from psycopg import Connection

from creditlane.amounts import format_amount
from creditlane.contract import receiving_id
from models.audit_page import begin_reading
from models.audit_rows import Row, Stream
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
    """What it does to its lot: see :meth:`_Account.walk`."""
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
    "reinstated": Place("back", ((RETURNED, -1),)),
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

PAGE = 2000
"""Accounts that are read together."""

TICK = 20_000
"""Entries after which progress is told."""

ROUNDING_MINOR = 2
"""How far a lot's money may be from its credits times their price: it is rounded once as a whole and once in part."""

ACCOUNTS = f"SELECT account FROM accounts WHERE account > %s ORDER BY account LIMIT {PAGE}"
COUNT = "SELECT coalesce(sum(seq), 0)::bigint FROM accounts"
ENTRIES = """
SELECT account, seq, kind, grant_id, amount_micro, at,
       CASE WHEN kind IN ('transferred', 'received') THEN operation
            WHEN kind IN ('sent', 'bounced') THEN refers_to END
FROM entries WHERE account = ANY(%(accounts)s::text[]) ORDER BY account, seq
"""
GRANTS = """
SELECT account, grant_id, source, purchase, price_minor, price_currency, price_per_micro, origin,
       available_micro + held_micro + in_transit_micro
FROM grants WHERE account = ANY(%(accounts)s::text[]) ORDER BY account, grant_id
"""
SENDER = """
SELECT arguments ->> 'sender', (arguments ->> 'sender') <= %(now)s FROM operations
WHERE account = %(account)s AND operation = %(operation)s
"""
BY_PRICE = """
SELECT price_currency, count(*),
       round(sum((available_micro + held_micro + in_transit_micro)::numeric * price_minor / price_per_micro))::bigint
FROM grants WHERE is_open AND price_currency IS NOT NULL GROUP BY price_currency
"""
"""What the open lots of each currency come to by their price."""

Progress = Callable[[int, int], None]
"""Told how many entries are done and how many there are."""


def rounded(numerator: int, denominator: int) -> int:
    """A fraction as the nearest integer, of two the even one.

    :param denominator: more than 0.
    """
    whole, rest = divmod(numerator, denominator)
    twice = 2 * rest
    return whole + (twice > denominator or (twice == denominator and whole & 1))


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


class ShortError(ArithmeticError):
    """An entry moves more credits than there are: somebody changed rows."""


class _Lot:
    """A lot's credits that are deferred, and their money."""

    __slots__ = (
        "back_elsewhere", "book", "credits", "expected", "money", "offset", "on_way", "origin", "owed", "price",
        "purchase", "value", "whole",
    )  # fmt: skip

    def __init__(self, row: Row, book: Figures) -> None:
        _, _, _, self.purchase, minor, currency, per, self.origin, self.expected = row
        self.price = None if per is None else (minor, currency, per)
        self.book = book
        self.credits = self.money = 0
        """What is left and not on the way to another account."""
        self.whole = self.value = 0
        """How many credits it was once, and what those were worth."""
        self.offset = 0
        """What the money is more than the credits' share, because something came back with the money it left with."""
        self.on_way: dict[str, Amount] = {}
        """By transfer, what is on the way to another account."""
        self.owed = 0
        """Credits that became debt when it was taken back."""
        self.back_elsewhere = 0
        """Credits of it that came back when it had expired, so into a lot of their own."""

    def share(self, credits: int) -> int:
        """What so many of its credits are worth."""
        return rounded(self.value * credits, self.whole) if self.value else 0

    def take(self, credits: int) -> int:
        """Credits leave; gives their money.

        :raises ShortError: when there are not so many.
        """
        left = self.credits - credits
        if left < 0:
            raise ShortError("takes more out of its lot than there is")
        money = self.money
        self.credits = left
        if left:
            self.money = max(0, self.share(left) + self.offset)
        else:
            self.money = self.offset = 0
        return money - self.money

    def put(self, credits: int, money: int) -> None:
        """Credits come in with money of their own."""
        self.credits += credits
        self.money += money
        self.whole, self.value, self.offset = self.credits, self.money, 0

    def put_back(self, credits: int, money: int) -> None:
        """Credits come back with the money that they left with."""
        self.credits += credits
        self.money += money
        self.offset = self.money - self.share(self.credits)

    def come_back(self, credits: int, root: _Lot) -> int:
        """Credits come back out of use; gives their money.

        :param root: the lot that this one continues, or itself: it says what they are worth where they come into a
            new lot.
        :raises ShortError: when that never had any.
        """
        if self.credits + credits <= self.whole:
            before = self.money
            self.credits += credits
            self.money = max(0, self.share(self.credits) + self.offset)
            return self.money - before
        if not root.whole:
            raise ShortError("gives back to a lot that was never given anything")
        before = root.share(root.back_elsewhere)
        root.back_elsewhere += credits
        money = root.share(root.back_elsewhere) - before
        self.put(credits, money)
        return money

    def owe(self, credits: int) -> int:
        """Credits that are gone are owed, or owed no more where it is less than 0; gives what they were worth.

        :raises ShortError: when the lot never had any.
        """
        if not self.whole:
            raise ShortError("owes for a lot that was never given anything")
        before = self.share(self.owed)
        self.owed += credits
        return self.share(self.owed) - before


@dataclass
class Revenue:
    """What a report found.

    Figures are kept for each month, currency, source and kind of entry, and each account where that was asked for.
    """

    bounds: list[datetime]
    """Where each month begins, and where the last one ends; the first and the last may be parts of one."""
    by_account: bool = False
    report: Report = field(default_factory=Report)
    """What was read, and each fault by name."""
    books: dict[Book, Figures] = field(default_factory=dict)

    @property
    def months(self) -> int:
        """How many months it is of, begun ones included."""
        return len(self.bounds) - 1

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


def revenue(
    connection: Connection[Any],
    start: datetime,
    end: datetime,
    zone: str = "UTC",
    *,
    by_account: bool = False,
    progress: Progress | None = None,
) -> Revenue:
    """Report what became of the money that was paid for credits, of all accounts, as one snapshot has it.

    All entries are read from the first on, once and in the order of account; of gifts whose recipient is yet to come
    the money is kept, and otherwise no more than an account's lots at a time.

    :param connection: not within a transaction; needs no more than the right to read.
    :param zone: the IANA time zone in which months are counted.
    :param by_account: keep accounts apart; then the report grows with their number.
    :returns: the figures, and each thing that does not close as a fault of its report.
    :raises ValueError: when the span is empty.
    """
    found = Revenue(month_bounds(start, end, zone), by_account)
    with connection.transaction():
        begin_reading(connection)
        _Reading(connection, found, progress).run()
    return found


class _Account:
    """The entries of one account, as far as they were read."""

    def __init__(self, reading: _Reading, account: str, grants: Iterator[Row], entries: Iterator[Row]) -> None:
        self.name = account
        self._reading = reading
        self._lots = {row[1]: _Lot(row, reading.book(account, row)) for row in grants}
        self._entries = entries
        self._bought: dict[tuple[Any, ...], int] = {}
        self.wanted: str | None = None
        """The ``credits.receive`` that cannot go on before what its sender gave is known."""
        self._walk = self.walk()

    def go_on(self, anyway: bool) -> bool:
        """Read on until a gift's money is wanted that is not known, or to the end; says whether it is the end.

        :param anyway: go on without what is wanted: nobody has sent it.
        """
        if anyway or self.wanted is None or self.wanted in self._reading.gifts:
            self.wanted = next(self._walk, None)
        return self.wanted is None

    def walk(self) -> Iterator[str]:
        """Book every entry; gives the operation whose gift is wanted, and is gone on with when that is known."""
        reading, lots, fault = self._reading, self._lots, self._reading.fault
        bounds = reading.found.bounds
        places, gifts = PLACES, reading.gifts
        carried = line = month = 0
        last, lower, upper = None, None, None
        for _, seq, kind, number, credits, at, operation in self._entries:
            reading.tick()
            place = places.get(kind)
            lot = lots.get(number)
            if place is None or lot is None:
                what = f"is of the kind {kind!r}, which has no place in the report"
                fault(
                    self.name, "entries", f"seq {seq}", what if lot else f"is of the grant {number}, which has no row"
                )
                continue
            how = place.how
            try:
                if how == "take":
                    money = lot.take(credits)
                elif how == "stay":
                    continue
                elif how == "back":
                    money = lot.come_back(credits, self._root(lot))
                elif how == "bought":
                    money = self._bought_for(lot, credits)
                    lot.put(credits, money)
                elif how == "carry":
                    money = carried = lot.take(credits)
                elif how == "carried":
                    money = carried
                    lot.put(credits, money)
                elif how == "owe":
                    money = lot.owe(credits)
                elif how == "forgo":
                    money = -lot.owe(-credits)
                elif how in ("give", "received"):
                    line = line + 1 if operation == last else 0
                    last = operation
                    if how == "give":
                        money = lot.take(credits)
                        lot.on_way[operation] = Amount(credits, money)
                        if lot.price is not None:
                            gifts.setdefault(receiving_id(self.name, operation), {})[line] = money, lot.price[1]
                        continue
                    money = 0
                    if lot.price is not None:
                        if operation not in gifts:
                            yield operation
                        money = self._gift(lot, operation, line, credits, seq)
                    lot.put(credits, money)
                else:
                    away = lot.on_way.pop(operation, None)
                    if away is None or away.credits_micro != credits:
                        raise ShortError("ends a transfer that did not take so much out of its lot")
                    money = away.minor
                    if how == "bounce":
                        lot.put_back(credits, money)
                        gifts.pop(receiving_id(self.name, operation), None)
                        continue
            except ShortError as error:
                fault(self.name, "entries", f"seq {seq}", str(error))
                continue
            if lower is None or upper is None or not lower <= at < upper:
                month = bisect_right(bounds, at) - 1
                lower = bounds[month] if month >= 0 else datetime.min.replace(tzinfo=at.tzinfo)
                upper = bounds[month + 1] if month + 1 < len(bounds) else datetime.max.replace(tzinfo=at.tzinfo)
            figure = lot.book.get((month, kind))
            if figure is None:
                lot.book[month, kind] = [credits, money]
            else:
                figure[0] += credits
                figure[1] += money
        self._finish()

    def _root(self, lot: _Lot) -> _Lot:
        return lot if lot.origin is None else self._lots.get(lot.origin, lot)

    def _bought_for(self, lot: _Lot, credits: int) -> int:
        """What a lot that was bought is worth: its part of what all of its purchase came to so far."""
        if lot.price is None:
            return 0
        minor, _, per = lot.price
        if lot.purchase is None:
            return rounded(minor * credits, per)
        key = (lot.purchase, *lot.price)
        before = self._bought.get(key, 0)
        self._bought[key] = before + credits
        return rounded(minor * (before + credits), per) - rounded(minor * before, per)

    def _gift(self, lot: _Lot, operation: str, line: int, credits: int, seq: int) -> int:
        """The money that came with a lot; what it would be by its price, where nobody sent it, which is a fault."""
        gifts = self._reading.gifts
        lines = gifts.get(operation, {})
        assert lot.price is not None
        minor, currency, per = lot.price
        money, sent = lines.pop(line, (0, None))
        if not lines:
            gifts.pop(operation, None)
        if sent == currency:
            return money
        self._reading.fault(self.name, "entries", f"seq {seq}", f"was received, and nobody sent it in {currency}")
        return rounded(minor * credits, per)

    def _finish(self) -> None:
        for number, lot in self._lots.items():
            away = sum(lot.on_way.values(), NOTHING)
            left = lot.credits + away.credits_micro
            if left != lot.expected:
                self._reading.fault(
                    self.name,
                    "grants",
                    f"grant {number}",
                    f"has {format_amount(lot.expected)} credits left, its entries leave {format_amount(left)}",
                )
            self._reading.left(lot, away.minor)


class _Reading:
    """One reading of the ledger."""

    def __init__(self, connection: Connection[Any], found: Revenue, progress: Progress | None) -> None:
        self.found = found
        self.gifts: dict[str, dict[int, tuple[int, str]]] = {}
        """By the operation that receives it, and its line: the money of what was sent and is yet to be received."""
        self._connection = connection
        self._progress = progress
        self._total = 0
        self._left: Counter[str] = Counter()
        """By currency, the money that is left in lots at the end, what is on its way from them included."""
        self._away: Counter[str] = Counter()
        """What of it is on its way."""
        self._begun: dict[str, _Account] = {}
        """Accounts that somebody's gift came from before it was their turn, and that wait for a gift themselves."""
        self._done: set[str] = set()
        """Those of them that are read to the end."""

    def fault(self, account: str, table: str, key: str, what: str) -> None:
        """Note what is not as it should be."""
        self.found.report.add(account, table, key, what)

    def book(self, account: str, grant: Row) -> Figures:
        """Where the figures of a lot are added up."""
        book = Book(account if self.found.by_account else "", grant[5] or "", grant[2])
        return self.found.books.setdefault(book, {})

    def left(self, lot: _Lot, away: int) -> None:
        """Note what is left of a lot when all was read.

        :param away: the money of what is on its way.
        """
        if lot.price is not None:
            currency = lot.price[1]
            self._left[currency] += lot.money + away
            self._away[currency] += away

    def tick(self) -> None:
        """Count an entry."""
        report = self.found.report
        report.entries += 1
        if self._progress is not None and not report.entries % TICK:
            self._progress(report.entries, max(report.entries, self._total))

    def run(self) -> None:
        """Read everything, and look whether it closes."""
        row = self._connection.execute(COUNT).fetchone()
        self._total = row[0] if row else 0
        last = ""
        while page := [row[0] for row in self._connection.execute(ACCOUNTS, (last,))]:
            last = page[-1]
            with self._stream(ENTRIES, page) as entries, self._stream(GRANTS, page) as grants:
                for account in page:
                    self._take_turn(account, grants, entries)
        if self._progress is not None:
            self._progress(self.found.report.entries, self.found.report.entries)
        self._check()

    def _stream(self, query: str, accounts: list[str]) -> Stream:
        return Stream(self._connection, query, {"accounts": accounts})

    def _take_turn(self, account: str, grants: Stream, entries: Stream) -> None:
        self.found.report.accounts += 1
        begun = self._begun.pop(account, None)
        if begun is None and account not in self._done:
            self._read(_Account(self, account, grants.of(account), entries.of(account)))
            return
        for stream in (grants, entries):  # it has been read by a way of its own
            for _ in stream.of(account):
                pass
        self._done.discard(account)
        if begun is not None:
            self._read(begun)

    def _read(self, first: _Account) -> None:
        """Read an account to its end, and before that, as far as they go, those whose gifts it wants the money of.

        A gift was given before it was received, so somebody can always go on. An account that waits for one that
        waits beneath it is put aside; what was wanted of it was there by then.
        """
        waiting, anyway = [first], False
        while waiting:
            top = waiting[-1]
            if top.go_on(anyway):
                waiting.pop()
                anyway = False
                if top is not first:
                    self._done.add(top.name)
                continue
            sender = self._sender(top, first)
            anyway = sender is None
            if sender is None:
                continue
            if all(each.name != sender for each in waiting):
                waiting.append(self._begun.pop(sender) if sender in self._begun else self._ahead(sender))
                continue
            while len(waiting) > 1 and waiting[-1].wanted not in self.gifts:
                aside = waiting.pop()
                self._begun[aside.name] = aside
            anyway = waiting[-1].wanted not in self.gifts

    def _sender(self, recipient: _Account, first: _Account) -> str | None:
        """Who sent what an account wants, unless all of that one was read."""
        assert recipient.wanted is not None
        keys = {"account": recipient.name, "operation": recipient.wanted, "now": first.name}
        row = self._connection.execute(SENDER, keys).fetchone()
        if row is None or row[0] is None or row[0] in self._done:
            return None
        sender, was_read = row
        return str(sender) if sender == first.name or not was_read else None

    def _ahead(self, account: str) -> _Account:
        """Begin an account before its turn, by a way of its own that is closed at its end."""
        ways = ExitStack()
        entries = ways.enter_context(self._stream(ENTRIES, [account]))
        with self._stream(GRANTS, [account]) as grants:
            return _Account(self, account, grants.of(account), _closing(entries.of(account), ways))

    def _check(self) -> None:
        """What is deferred now: by all that moved, by what is left in the lots, and by the lots' price."""
        found = self.found
        by_price = {currency: (lots, minor) for currency, lots, minor in self._connection.execute(BY_PRICE)}
        moved = found.summaries(_currency, last=found.months)
        yet_to_come: Counter[str] = Counter()
        for lines in self.gifts.values():
            for minor, currency in lines.values():
                yet_to_come[currency] += minor
        for currency in sorted({*found.currencies, *by_price}):
            leaves = moved[currency].closing.minor if currency in moved else 0
            left = self._left[currency]
            if leaves != left:
                what = f"what moved leaves {decimal(leaves, currency)}, the lots have {decimal(left, currency)}"
                self.fault("", "entries", currency, what)
            lots, minor = by_price.get(currency, (0, 0))
            if abs(left - minor) > ROUNDING_MINOR * lots:
                what = f"the lots have {decimal(left, currency)}, by their price it is {decimal(minor, currency)}"
                self.fault("", "grants", currency, what)
            arrived = self._away[currency] - yet_to_come[currency]
            under_way = found.under_way(currency, found.months + 1).minor
            if arrived != under_way:
                what = f"{decimal(under_way, currency)} were received and not sent, {decimal(arrived, currency)} left"
                self.fault("", "entries", currency, what)


def _currency(book: Book) -> str:
    return book.currency


def _closing(rows: Iterator[Row], ways: ExitStack) -> Iterator[Row]:
    with ways:
        yield from rows
