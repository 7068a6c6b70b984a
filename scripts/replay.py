"""Reading a usage file as operations: which columns mean what, whose row it is, and its lasting id.

Nothing here talks to a broker or a database. Quantities are decimals from the first digit to the wire.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation
from functools import reduce
from itertools import accumulate
from pathlib import Path

import msgspec

from creditlane.amounts import MAX_CREDITS, to_wire
from creditlane.contract import Name

TRACE_COLUMNS = frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"})
"""The columns of the Azure LLM inference traces, which are recognised without options."""

TRACE_ACCOUNTS = 500
DRAWN_ACCOUNTS = 100
"""How many accounts are drawn from when a file names none, and no number is asked for."""

EXPONENT = 0.8
"""How steep the draw of accounts is: the k-th account is drawn in proportion to 1 / k^0.8."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,2})?\Z", re.ASCII)
_EXACT = Context(prec=400, traps=[InvalidOperation, Inexact])
_DELIMITERS = ",;\t|"


class ReplayError(ValueError):
    """A file that cannot be replayed as it was asked for; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Usage:
    """One row of the file, as one consume."""

    line: int
    account: str
    feature: str
    quantity: Decimal | None
    """Units of the feature; None for the contract's default of 1."""
    occurred_at: datetime | None
    id: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be charged, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Shape:
    """Which columns of a file mean what."""

    account: str | None
    """The column that names the account; None to draw one for each row."""
    feature_column: str | None
    feature: str | None
    """The feature of every row, when no column names it."""
    quantity: tuple[str, ...]
    """The columns whose sum is the quantity; none for 1 a row."""
    time: str | None
    scale: Decimal
    """What the sum is multiplied by."""
    accounts: int
    """How many accounts are drawn from."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        named = (self.account, None if self.feature else self.feature_column, self.time, *self.quantity)
        return tuple(column for column in named if column is not None)


def recognise(
    header: Sequence[str],
    *,
    account: str | None = None,
    feature_column: str | None = None,
    feature: str | None = None,
    quantity: Sequence[str] = (),
    time: str | None = None,
    scale: Decimal | None = None,
    accounts: int | None = None,
) -> Shape:
    """Decide what a file's columns mean: as asked for, else by their names.

    :param header: the file's columns.
    :param account: the column that names the account.
    :param feature_column: the column that names the feature.
    :param feature: the feature of every row, instead.
    :param quantity: the columns whose sum is the quantity.
    :param time: the column with the time of use.
    :param scale: what that sum is multiplied by.
    :param accounts: how many accounts to draw from when no column names them.
    :raises ReplayError: when a column is not there, or nothing says which feature is charged.
    """
    trace = set(header) >= TRACE_COLUMNS

    def usual(name: str) -> str | None:
        return name if name in header else None

    if not quantity:
        by_name = usual("quantity")
        quantity = ("ContextTokens", "GeneratedTokens") if trace else (by_name,) if by_name else ()
    shape = Shape(
        account=account or usual("account"),
        feature_column=feature_column or usual("feature"),
        feature=feature or ("completion" if trace and not feature_column else None),
        quantity=tuple(quantity),
        time=time or ("TIMESTAMP" if trace else usual("time")),
        scale=scale if scale is not None else Decimal("0.001") if trace else Decimal(1),
        accounts=accounts or (TRACE_ACCOUNTS if trace else DRAWN_ACCOUNTS),
    )
    for column in shape.columns:
        if column not in header:
            raise ReplayError(f"There is no column {column!r}; the file has: {', '.join(header)}.")
    if shape.feature is None and shape.feature_column is None:
        raise ReplayError(
            "Nothing says which feature the rows are of; name the column with --feature-column, "
            "or one feature for all rows with --feature."
        )
    return shape


class ZipfDraw:
    """A seeded draw of accounts in which few are used much and many little; the same on every machine."""

    def __init__(self, accounts: int, seed: int = 1, exponent: float = EXPONENT) -> None:
        """Prepare the draw.

        :param accounts: how many there are, at least 1.
        :param seed: the same seed gives the same accounts.
        :param exponent: how steep; 0 draws all alike.
        """
        # Integers, so that no machine's rounding moves a boundary.
        weights = (round(10**12 / (rank**exponent)) or 1 for rank in range(1, accounts + 1))
        self._cumulative = list(accumulate(weights))
        self._random = random.Random(seed)  # noqa: S311 - to be repeatable is its purpose
        self._digits = len(str(accounts))

    def draw(self) -> str:
        """Draw the next row's account, such as ``user_017``."""
        place = bisect_right(self._cumulative, self._random.randrange(self._cumulative[-1]))
        return f"user_{place + 1:0{self._digits}d}"


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    :raises ReplayError: when it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_header(path: Path) -> list[str]:
    """The names of a file's columns.

    :raises ReplayError: when it cannot be read, or has no first line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            first = stream.readline()
            stream.seek(0)
            header = next(csv.reader(stream, delimiter=_delimiter(first)), [])
    except OSError as error:
        raise _unreadable(path, error) from None
    except csv.Error as error:
        raise ReplayError(f"{path} is not a CSV file ({error}).") from None
    names = [name.strip() for name in header]
    if not any(names):
        raise ReplayError(f"{path} is empty; its first line must name the columns.")
    return names


def read_usage(
    path: Path, shape: Shape, draw: ZipfDraw, *, digest: str, limit: int | None = None
) -> Iterator[Usage | BadRow]:
    """Read a file's rows, each as a consume or as what is wrong with it.

    The same file gives the same operations: an account is drawn for every row, also for a bad one, and
    an id follows from the file's content, the row's number and the account.

    :param draw: gives the accounts when no column does.
    :param digest: what :func:`file_digest` says of the file.
    :param limit: how many rows to read at most.
    :raises ReplayError: when the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            first = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=_delimiter(first))
            header = [name.strip() for name in next(reader, [])]
            number = 0
            while limit is None or number < limit:
                line = reader.line_num + 1
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    number += 1
                    draw.draw()
                    yield BadRow(line, f"not CSV: {error}")
                    continue
                if not row:
                    continue
                number += 1
                account = draw.draw()
                try:
                    if len(row) != len(header):
                        raise ValueError(f"has {len(row)} columns, the first line has {len(header)}")
                    yield _usage(dict(zip(header, row, strict=True)), shape, account, digest, number, line)
                except ValueError as error:
                    yield BadRow(line, str(error))
    except OSError as error:
        raise _unreadable(path, error) from None


def usage_id(digest: str, number: int, account: str) -> str:
    """The operation id of a row: the same whenever the same file is replayed.

    :param digest: of the file.
    :param number: of the row, from 1.
    """
    return f"use-{digest[:16]}-{number}-{_short(account)}"


def open_id(account: str) -> str:
    """The operation id of an account's opening, whichever file it comes from."""
    return f"open-{_short(account, 32)}"


def grant_id(digest: str, account: str, amount: str) -> str:
    """The operation id of the credits that an account gets for a file.

    :param digest: of the file.
    :param amount: credits, as on the wire; another amount is another grant.
    """
    return f"grant-{digest[:16]}-{amount}-{_short(account, 32)}"


def _usage(row: dict[str, str], shape: Shape, drawn: str, digest: str, number: int, line: int) -> Usage:
    account = _name(row[shape.account], "account") if shape.account is not None else drawn
    if shape.feature is not None:
        feature = shape.feature
    else:
        assert shape.feature_column is not None
        feature = _name(row[shape.feature_column], "feature")
    quantity = None
    if shape.quantity:
        quantity = _quantity([_number(row[column], column) for column in shape.quantity], shape.scale)
    occurred_at = None
    if shape.time is not None and row[shape.time].strip():
        occurred_at = read_instant(row[shape.time].strip(), shape.time)
    return Usage(line, account, feature, quantity, occurred_at, usage_id(digest, number, account))


def _name(text: str, what: str) -> str:
    text = text.strip()
    try:
        return msgspec.convert(text, Name)
    except msgspec.ValidationError as error:
        reason = "is empty" if not text else f"is not usable: {error}"
        raise ValueError(f"the {what} {reason}") from None
    except UnicodeError:
        raise ValueError(f"the {what} is not UTF-8") from None


def _number(text: str, column: str) -> Decimal:
    text = text.strip()
    if _NUMBER.match(text) is None:
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise ValueError(f"{column}: {_printable(shown)} is not a number" if text else f"{column} is empty")
    return Decimal(text)


def _quantity(numbers: Iterable[Decimal], scale: Decimal) -> Decimal:
    try:
        quantity = _EXACT.multiply(reduce(_EXACT.add, numbers), scale)
    except DecimalException:
        raise ValueError("the quantity has too many digits") from None
    if quantity <= 0:
        raise ValueError(f"the quantity {quantity:f} is not more than 0")
    try:
        to_wire(quantity)
    except ValueError:
        raise ValueError(
            f"the quantity {quantity:f} has more than six decimals or is more than {MAX_CREDITS:,}; "
            "see --quantity-scale"
        ) from None
    return quantity


def read_instant(text: str, column: str) -> datetime:
    """Read an instant of a file; UTC unless it says otherwise.

    :raises ValueError: with the column and what to write instead.
    """
    try:
        moment = datetime.fromisoformat(text)
        # A time without a zone is taken for UTC: the file does not say where it was written.
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{column}: {_printable(text[:40])} is not a time like 2026-03-01T12:00:00Z") from None


def _printable(text: str) -> str:
    return ascii(text) if not text.isprintable() or not text.isascii() else repr(text)


def _short(account: str, characters: int = 12) -> str:
    return hashlib.sha256(account.encode("utf-8")).hexdigest()[:characters]


def _delimiter(first: str) -> str:
    return max(_DELIMITERS, key=first.count)


def _unreadable(path: Path, error: OSError) -> ReplayError:
    reason = (error.strerror or type(error).__name__).lower()
    return ReplayError(f"{path} cannot be read ({reason}); give a CSV file with --input.")
