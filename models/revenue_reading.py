"""How revenue is read: every entry once, lot by lot, and what does not close is named (see :mod:`models.revenue`)."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any

from psycopg import Connection

from creditlane.amounts import format_amount
from creditlane.contract import RECEIVING, receiving_id, redeemed_id
from models.audit_page import begin_reading
from models.audit_rows import Row, Stream
from models.revenue import NOTHING, PLACES, Amount, Book, Figures, Revenue, decimal, month_bounds

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
       CASE WHEN kind IN ('transferred', 'received', 'reinstated') THEN operation
            WHEN kind = 'sent' AND operation LIKE 'code.conclude:%%' THEN operation
            WHEN kind IN ('sent', 'bounced') THEN refers_to END
FROM entries WHERE account = ANY(%(accounts)s::text[]) ORDER BY account, seq
"""
GRANTS = """
SELECT account, grant_id, source, purchase, price_minor, price_currency, price_per_micro, origin,
       available_micro + held_micro + in_transit_micro
FROM grants WHERE account = ANY(%(accounts)s::text[]) ORDER BY account, grant_id
"""
SENDER = """
SELECT s.sender, s.sender <= %(now)s
FROM operations o CROSS JOIN LATERAL (
    SELECT CASE o.name WHEN 'codes.redeem' THEN o.result ELSE o.arguments END ->> 'sender' AS sender
) s
WHERE o.account = %(account)s AND o.operation = %(operation)s
"""
USE = """
SELECT arguments ->> 'code', coalesce((result -> 'code_row' ->> 'used')::bigint, 0) FROM operations
WHERE account = %(account)s AND operation = %(operation)s AND name = 'codes.redeem'
"""
ISSUES = """
SELECT account, operation, code, uses, used, amount_micro FROM codes
WHERE account = ANY(%s::text[]) AND kind = 'gift' AND terms ->> 'source' IS NULL ORDER BY account, operation, place
"""
"""The gift codes that accounts paid for."""
PURCHASE = """
SELECT arguments ->> 'purchase' FROM operations WHERE account = %(account)s AND operation = %(operation)s
"""
BY_PRICE = """
SELECT price_currency, count(*),
       round(sum((available_micro + held_micro + in_transit_micro)::numeric * price_minor / price_per_micro))::bigint
FROM grants WHERE is_open AND price_currency IS NOT NULL GROUP BY price_currency
"""
"""What the open lots of each currency come to by their price."""

Progress = Callable[[int, int], None]
"""Told how many entries are done and how many there are."""


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
    found = Revenue(month_bounds(start, end, zone), zone, by_account)
    with connection.transaction():
        begin_reading(connection)
        _Reading(connection, found, progress).run()
    return found


def rounded(numerator: int, denominator: int) -> int:
    """A fraction as the nearest integer, of two the even one.

    :param denominator: more than 0.
    """
    whole, rest = divmod(numerator, denominator)
    twice = 2 * rest
    return whole + (twice > denominator or (twice == denominator and whole & 1))


class ShortError(ArithmeticError):
    """An entry moves more credits than there are: somebody changed rows."""


class _Lot:
    """A lot's credits that are deferred, and their money."""

    __slots__ = (
        "back_elsewhere", "book", "credits", "expected", "money", "on_way", "origin", "owed", "price",
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
        self.on_way: dict[str, Amount] = {}
        """By transfer, what is on the way to another account."""
        self.owed = 0
        """Credits that became debt when it was taken back."""
        self.back_elsewhere = 0
        """Credits of it that came back when it had expired, so into a lot of their own."""

    def note(self, month: int, kind: str, credits: int, money: int) -> None:
        """Add to a figure of the report."""
        figure = self.book.get((month, kind))
        if figure is None:
            self.book[month, kind] = [credits, money]
        else:
            figure[0] += credits
            figure[1] += money

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
        # What came back from its way may have brought a unit more or less than its share.
        self.money = min(money, self.share(left)) if left else 0
        return money - self.money

    def put(self, credits: int, money: int) -> None:
        """Credits come in with money of their own."""
        self.credits += credits
        self.money += money
        self.whole, self.value = self.credits, self.money

    def put_back(self, credits: int, money: int) -> None:
        """Credits come back with the money that they left with."""
        self.credits += credits
        self.money += money

    def come_back(self, credits: int, root: _Lot) -> int:
        """Credits come back out of use; gives their money.

        :param root: the lot that this one continues, or itself: it says what they are worth where they come into a
            new lot.
        :raises ShortError: when that never had any.
        """
        if self.credits + credits <= self.whole:
            before = self.money
            self.credits += credits
            self.money = max(before, self.share(self.credits))
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


class _Issue:
    """Gift codes that an account paid for with one operation: each use is a gift of its own."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.codes: list[tuple[str, int, int, int]] = []
        """Text, uses, how many of them were made, and the micro-credits of one, of each code in order."""
        self._laid = 0
        """Micro-credits that came so far, of all lots laid end to end."""
        self._pieces: Counter[str] = Counter()

    def lay(self, grant: int, credits: int, money: int) -> Iterator[tuple[str, int, Amount]]:
        """Divide what a lot gave among the uses that it pays for.

        :returns: by whom each part is received, or that it is not yet; which piece of it; and the part.
        :raises ShortError: when there are not so many uses.
        """
        _, uses, _, amount = self.codes[0]
        start, end = self._laid, self._laid + credits
        if end > len(self.codes) * uses * amount:
            raise ShortError("pays for more uses of gift codes than these have")
        self._laid, at = end, start
        while at < end:
            place, slot = divmod(at // amount, uses)
            code, _, used, _ = self.codes[place]
            # What nobody has redeemed is one part, whatever its uses.
            stop = min(end, (place * uses + slot + 1 if slot < used else (place + 1) * uses) * amount)
            minor = rounded(money * (stop - start), credits) - rounded(money * (at - start), credits)
            name = redeemed_id(code, slot) if slot < used else self.unused(code, grant)
            yield name, self._pieces[name], Amount(stop - at, minor)
            self._pieces[name] += 1
            at = stop

    def unused(self, code: str, grant: int) -> str:
        """What a lot has paid for uses that nobody has made."""
        return f"{self.operation} {code} {grant}"


class _Account:
    """The entries of one account, as far as they were read.

    :param issues: of the gift codes that it paid for, by operation.
    """

    def __init__(
        self,
        reading: _Reading,
        account: str,
        grants: Iterator[Row],
        entries: Iterator[Row],
        issues: Mapping[str, _Issue],
    ) -> None:
        self.name = account
        self._reading = reading
        self._lots = {row[1]: _Lot(row, reading.book(account, row)) for row in grants}
        self._entries = entries
        self._bought: dict[tuple[Any, ...], int] = {}
        self._issues = issues
        self.asking = ""
        """The operation that cannot go on before what its sender gave is known."""
        self.wanted: str | None = None
        """Under which name that is known: of a ``credits.receive`` its own."""
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
            if lower is None or upper is None or not lower <= at < upper:
                month = bisect_right(bounds, at) - 1
                lower = bounds[month] if month >= 0 else datetime.min.replace(tzinfo=at.tzinfo)
                upper = bounds[month + 1] if month + 1 < len(bounds) else datetime.max.replace(tzinfo=at.tzinfo)
            how = place.how
            try:
                if how == "take":
                    money = lot.take(credits)
                elif how == "stay":
                    continue
                elif how == "back":
                    money = lot.come_back(credits, self._root(lot))
                elif how == "reinstate":
                    money = lot.come_back(credits, self._root(lot))
                    purchase = self._reading.purchase(self.name, operation)
                    if purchase not in (None, lot.purchase):
                        lot.note(month, "debt_paid", -credits, -money)
                        self._owe_no_more(purchase, credits, month)
                        continue
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
                        if operation in self._issues:
                            self._give_codes(lot, number, self._issues[operation], Amount(credits, money))
                            continue
                        lot.on_way[operation] = Amount(credits, money)
                        if lot.price is not None:
                            gifts.setdefault(receiving_id(self.name, operation), {})[line] = money, lot.price[1]
                        continue
                    money = 0
                    if lot.price is not None:
                        gift = operation if operation.startswith(RECEIVING) else reading.use(self.name, operation)
                        if gift not in gifts:
                            self.asking = operation
                            yield gift
                        money = self._gift(lot, gift, line, credits, seq)
                    lot.put(credits, money)
                else:
                    ended = operation
                    if operation in self._issues:
                        ended = self._came_back(lot, number, self._issues[operation], credits)
                    away = lot.on_way.pop(ended, None)
                    if away is None or away.credits_micro != credits:
                        raise ShortError("ends a transfer that did not take so much out of its lot")
                    money = away.minor
                    if how == "bounce":
                        lot.put_back(credits, money)
                        gifts.pop(receiving_id(self.name, operation) if ended == operation else ended, None)
                        continue
            except ShortError as error:
                fault(self.name, "entries", f"seq {seq}", str(error))
                continue
            lot.note(month, kind, credits, money)
        self._finish()

    def _give_codes(self, lot: _Lot, number: int, issue: _Issue, given: Amount) -> None:
        for name, piece, part in issue.lay(number, given.credits_micro, given.minor):
            lot.on_way[name] = part
            if lot.price is not None:
                self._reading.gifts.setdefault(name, {})[piece] = part.minor, lot.price[1]

    @staticmethod
    def _came_back(lot: _Lot, number: int, issue: _Issue, credits: int) -> str:
        """Which code's unused part came back: one with so many credits; it is all the same which one of these."""
        for code, *_ in issue.codes:
            name = issue.unused(code, number)
            if name in lot.on_way and lot.on_way[name].credits_micro == credits:
                return name
        raise ShortError("ends a gift code that had not so much of its lot")

    def _root(self, lot: _Lot) -> _Lot:
        return lot if lot.origin is None else self._lots.get(lot.origin, lot)

    def _owe_no_more(self, purchase: str | None, credits: int, month: int) -> None:
        """A debt that other credits have paid is undone with the return of its purchase: it was earned after all.

        :raises ShortError: when the purchase's lots did not owe so much.
        """
        for lot in self._lots.values():
            if lot.purchase == purchase and lot.owed:
                paid = min(lot.owed, credits)
                credits -= paid
                lot.note(month, "debt_incurred", -paid, lot.owe(-paid))
        if credits:
            raise ShortError("gives back more of what paid a debt than there was owed")

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
            issues = self._issues_of(page)
            with self._stream(ENTRIES, page) as entries, self._stream(GRANTS, page) as grants:
                for account in page:
                    self._take_turn(account, grants, entries, issues.get(account, {}))
        if self._progress is not None:
            self._progress(self.found.report.entries, self.found.report.entries)
        self._check()

    def purchase(self, account: str, operation: str) -> str | None:
        """Which purchase an operation is about."""
        row = self._connection.execute(PURCHASE, {"account": account, "operation": operation}).fetchone()
        return None if row is None else row[0]

    def use(self, account: str, operation: str) -> str:
        """Under which name the money of the use of a code is known that an operation redeemed."""
        row = self._connection.execute(USE, {"account": account, "operation": operation}).fetchone()
        return operation if row is None else redeemed_id(*row)

    def _issues_of(self, accounts: list[str]) -> dict[str, dict[str, _Issue]]:
        issues: dict[str, dict[str, _Issue]] = {}
        for account, operation, *code in self._connection.execute(ISSUES, (accounts,)):
            of = issues.setdefault(account, {})
            of.setdefault(operation, _Issue(operation)).codes.append((code[0], code[1], code[2], code[3]))
        return issues

    def _stream(self, query: str, accounts: list[str]) -> Stream:
        return Stream(self._connection, query, {"accounts": accounts})

    def _take_turn(self, account: str, grants: Stream, entries: Stream, issues: Mapping[str, _Issue]) -> None:
        self.found.report.accounts += 1
        begun = self._begun.pop(account, None)
        if begun is None and account not in self._done:
            self._read(_Account(self, account, grants.of(account), entries.of(account), issues))
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
        keys = {"account": recipient.name, "operation": recipient.asking, "now": first.name}
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
            issues = self._issues_of([account]).get(account, {})
            return _Account(self, account, grants.of(account), _closing(entries.of(account), ways), issues)

    def _check(self) -> None:
        """What is deferred now: by all that moved, by what is left in the lots, and by the lots' price."""
        found = self.found
        by_price = {currency: (lots, minor) for currency, lots, minor in self._connection.execute(BY_PRICE)}
        moved = found.summaries(lambda book: book.currency, last=found.months)
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


def _closing(rows: Iterator[Row], ways: ExitStack) -> Iterator[Row]:
    with ways:
        yield from rows
