"""Reading a file of accounts and balances as operations: which columns mean what, and what is wrong with a line.

Nothing here talks to a database. A file is CSV or JSON lines; a line is an account with its balances, or one lot of an
account, whose lines then follow one another. What a line becomes is checked at the door of the ledger itself: by the
types of the messages.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from creditlane.contract import ContractError, Message, decode_message
from models.exporting import BALANCE
from models.rules.catalog import Catalog
from scripts.replay import read_instant

ATTRIBUTES = ("kind", "email", "locale", "timezone", "plan", "opened_at")
LOT = ("source", "amount", "effective_at", "expires_at", "priority", "features")
TOLD = frozenset(
    {
        "status", "updated_at", "operations", "current_plan", "available", "upcoming", "frozen", "held", "in_transit",
        "debt", "lot",
    }
)  # fmt: skip
"""Columns of an export that say how an account stands: they are passed over."""

MAX_LINE_BYTES = 1 << 20
MAX_IMPORT_NAME = 32
"""Characters of an import's name: it is a part of every operation id."""

LONG_SOURCE = 48
"""Characters of a source that stand in an operation id as they are; of longer ones, a digest does."""

_DELIMITERS = ",;\t|"
_BOM = b"\xef\xbb\xbf"
_IMPORT_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_IMPORT_NAME}}}\Z", re.ASCII)
_WHERE = re.compile(r" - at `\$\.?([^`]*)`\Z")


class Format(StrEnum):
    """How a file is written."""

    CSV = "csv"
    JSONL = "jsonl"


class ImportFileError(ValueError):
    """A file that cannot be imported as it was asked for; the text says what to do."""


class BadLine(msgspec.Struct, frozen=True, array_like=True):
    """A line that cannot be imported, and why."""

    line: int
    column: str
    """Empty where it is about the whole line."""
    reason: str


class LineError(ValueError):
    """What is wrong with a line."""

    def __init__(self, line: int, column: str, reason: str) -> None:
        super().__init__(reason)
        self.bad = BadLine(line, column, reason)


class Lot(msgspec.Struct, frozen=True, array_like=True):
    """Credits of an account as a file has them; not checked yet."""

    line: int
    column: str
    """Where the amount stands."""
    fields: dict[str, Any]


class Record(msgspec.Struct, frozen=True, array_like=True):
    """An account as a file has it, with all its lots; not checked yet."""

    line: int
    account: str
    attributes: dict[str, str]
    lots: list[Lot]


class Operation(NamedTuple):
    """What becomes of a record, or of one of its lots."""

    line: int
    name: str
    id: str
    message: Message
    arguments: bytes


class _JsonLot(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    source: str
    amount: int | str
    effective_at: str | None = None
    expires_at: str | None = None
    priority: int | None = None
    features: list[str] | None = None


class _JsonLine(msgspec.Struct, forbid_unknown_fields=True):
    """A line of JSON: with ``balances``, or with the fields of one lot."""

    account: str
    kind: str | None = None
    email: str | None = None
    locale: str | None = None
    timezone: str | None = None
    plan: str | None = None
    opened_at: str | None = None
    balances: dict[str, int | str] | list[_JsonLot] | None = None
    source: str | None = None
    amount: int | str | None = None
    effective_at: str | None = None
    expires_at: str | None = None
    priority: int | None = None
    features: list[str] | None = None


_decode_features = msgspec.json.Decoder(list[str]).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


def check_import_name(name: str) -> str:
    """Check the name of an import.

    :raises ImportFileError: when it cannot be a part of operation ids.
    """
    if not _IMPORT_NAME.match(name):
        raise ImportFileError(
            f"the import's name {name[:40]!r} is not 1 to {MAX_IMPORT_NAME} letters, digits, dots, dashes, underscores"
        )
    return name


def open_id(name: str, owner: str) -> str:
    """The operation id of an account's opening by an import: the same however often it is run.

    :param name: of the import.
    :param owner: a digest of the account.
    """
    return f"{prefix_of(name)}{owner}:open"


def lot_id(name: str, owner: str, source: str, number: int) -> str:
    """The operation id of one lot of an account, likewise.

    :param number: which lot of this source it is, from 1.
    """
    shown = source if len(source) <= LONG_SOURCE else _digest(source)
    return f"{prefix_of(name)}{owner}:{number}:{shown}"


def prefix_of(name: str) -> str:
    """What the operation ids of an import begin with."""
    return f"import:{name}:"


# --- Reading -----------------------------------------------------------------------------------------


@dataclass
class Source:
    """A file to import, and how it is to be understood.

    :ivar renamed: what a column or a field is meant by, where it is called otherwise.
    :ivar ignored: columns or fields that are passed over.
    """

    path: Path
    format: Format
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    bytes_read: int = 0
    lines_read: int = 0
    """How far :meth:`records` is; a line that nothing stands in counts."""

    def size(self) -> int:
        """The file's bytes.

        :raises ImportFileError: when it cannot be read.
        """
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise self._unreadable(error) from None

    def records(self) -> Iterator[Record | BadLine]:
        """The accounts of the file with all their lots, in its order, and the lines that are wrong as they stand.

        :raises ImportFileError: when the file cannot be read, or a column is not known.
        """
        seen: dict[str, int] = {}
        open_record: Record | None = None
        try:
            with self.path.open("rb") as stream:
                lines = _Lines(stream)
                rows = _csv_rows(lines, self) if self.format is Format.CSV else _json_rows(lines, self)
                for row in rows:
                    self.bytes_read, self.lines_read = lines.bytes, lines.number
                    if isinstance(row, BadLine):
                        yield row
                        continue
                    record, goes_on = row
                    if open_record is not None and record.account == open_record.account and goes_on:
                        wrong = _joined(open_record, record)
                        if wrong is not None:
                            yield wrong
                        continue
                    first = seen.setdefault(record.account, record.line)
                    if first != record.line:
                        reason = f"the account stands in line {first} already"
                        if goes_on:
                            reason += "; the lines of an account follow one another"
                        yield BadLine(record.line, "account", reason)
                        continue
                    if open_record is not None:
                        yield open_record
                    open_record = record
                self.bytes_read, self.lines_read = lines.bytes, lines.number
        except OSError as error:
            raise self._unreadable(error) from None
        if open_record is not None:
            yield open_record

    def _unreadable(self, error: OSError) -> ImportFileError:
        return ImportFileError(f"{self.path} cannot be read ({(error.strerror or type(error).__name__).lower()})")

    def meaning(self, name: str) -> str | None:
        """What a column or a field means: None for one that is passed over.

        :raises ImportFileError: for one that is not known.
        """
        meant = self.renamed.get(name, name)
        if name in self.ignored or meant in TOLD or not meant:
            return None
        if meant != "account" and meant not in ATTRIBUTES and meant not in LOT and not meant.startswith(BALANCE):
            raise ImportFileError(
                f"there is no meaning to {name[:60]!r}: give it one with --map {name[:60]}=NAME (account, "
                f"{', '.join((*ATTRIBUTES, *LOT))}, {BALANCE}SOURCE), or leave it out with --ignore {name[:60]}"
            )
        return meant


class _Lines:
    """The lines of a file as text."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.number = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline(MAX_LINE_BYTES + 1)
        if not raw:
            raise StopIteration
        if not self.number:
            raw = raw.removeprefix(_BOM)
        self.number += 1
        self.bytes += len(raw)
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = self._stream.readline(MAX_LINE_BYTES)
                self.bytes += len(raw)
            raise LineError(self.number, "", f"is longer than {MAX_LINE_BYTES:,} bytes")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise LineError(self.number, "", "is not UTF-8") from None


_Row = tuple[Record, bool]
"""What a line says, and whether it may go on with the account of the line before: it is one lot."""


def _csv_rows(lines: _Lines, source: Source) -> Iterator[_Row | BadLine]:
    try:
        first = next(lines, "")
        header = [name.strip() for name in next(csv.reader([first], delimiter=_delimiter(first)), [])]
    except (csv.Error, LineError) as error:
        raise ImportFileError(f"{source.path} is not a CSV file: its first line {error}") from None
    if not any(header):
        raise ImportFileError(f"{source.path} is empty; its first line must name the columns")
    columns = _columns(header, source)
    reader = csv.reader(lines, delimiter=_delimiter(first), strict=True)
    while True:
        line = lines.number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLine(line, "", f"is not CSV: {error}")
            continue
        except LineError as error:
            yield error.bad
            continue
        if not row:
            continue
        if len(row) != len(header):
            yield BadLine(line, "", f"has {len(row)} columns, the first line has {len(header)}")
            continue
        try:
            yield _csv_row(line, row, columns)
        except LineError as error:
            yield error.bad


class _Columns(NamedTuple):
    """Where in a row what stands: indexes, with the columns' own names."""

    account: int
    attributes: Sequence[tuple[int, str]]
    balances: Sequence[tuple[int, str, str]]
    lot: Sequence[tuple[int, str]]


def _columns(header: Sequence[str], source: Source) -> _Columns:
    meant = [source.meaning(name) for name in header]
    twice = [name for name, count in Counter(filter(None, meant)).items() if count > 1]
    if twice:
        raise ImportFileError(f"two columns mean {twice[0]!r}")
    if "account" not in meant:
        raise ImportFileError(
            f"no column is the account; name it with --map COLUMN=account. There are: {', '.join(header)[:500]}"
        )
    lot = [(place, name) for place, name in enumerate(meant) if name in LOT]
    names = {name for _, name in lot}
    if lot and not {"source", "amount"} <= names:
        raise ImportFileError("a lot needs a column source and a column amount")
    return _Columns(
        meant.index("account"),
        [(place, name) for place, name in enumerate(meant) if name in ATTRIBUTES],
        [
            (place, header[place], name.removeprefix(BALANCE))
            for place, name in enumerate(meant)
            if name is not None and name.startswith(BALANCE)
        ],
        lot,
    )


def _csv_row(line: int, row: Sequence[str], columns: _Columns) -> _Row:
    attributes = {name: text for place, name in columns.attributes if (text := row[place].strip())}
    lots = [
        Lot(line, column, {"source": source, "amount": text})
        for place, column, source in columns.balances
        if (text := row[place].strip())
    ]
    fields: dict[str, Any] = {name: text for place, name in columns.lot if (text := row[place].strip())}
    if fields:
        if "priority" in fields:
            fields["priority"] = _whole(fields["priority"], line)
        if "features" in fields:
            try:
                fields["features"] = _decode_features(fields["features"])
            except msgspec.MsgspecError:
                raise LineError(line, "features", 'is no JSON array of names, such as ["image"]') from None
        lots.append(Lot(line, "amount", fields))
    goes_on = bool(fields) and len(lots) == 1
    return Record(line, row[columns.account].strip(), attributes, lots), goes_on


def _whole(text: str, line: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise LineError(line, "priority", "is no whole number")
    return int(text)


def _json_rows(lines: _Lines, source: Source) -> Iterator[_Row | BadLine]:
    while True:
        try:
            text = next(lines).strip()
        except StopIteration:
            return
        except LineError as error:
            yield error.bad
            continue
        if not text:
            continue
        try:
            yield _json_row(lines.number, text, source)
        except LineError as error:
            yield error.bad


def _json_row(line: int, text: str, source: Source) -> _Row:
    try:
        named = _decode_object(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise LineError(line, "", f"is no JSON object: {error}") from None
    meant: dict[str, Any] = {}
    balances: dict[str, Any] = {}
    for name, value in named.items():
        if name == "balances":
            meaning: str | None = name
        else:
            try:
                meaning = source.meaning(name)
            except ImportFileError:
                raise LineError(line, name[:60], "has no meaning; see --map and --ignore") from None
        if meaning is None or value is None:
            continue
        if meaning.startswith(BALANCE):
            balances[meaning.removeprefix(BALANCE)] = value
        elif meaning in meant:
            raise LineError(line, name, f"two fields mean {meaning!r}")
        else:
            meant[meaning] = value
    if balances:
        if "balances" in meant:
            raise LineError(line, "balances", "stands beside fields that are balances")
        meant["balances"] = balances
    try:
        read = msgspec.convert(meant, _JsonLine)
    except msgspec.ValidationError as error:
        raise _line_error(line, "", error) from None
    lots: list[Lot] = []
    if isinstance(read.balances, dict):
        lots = [
            Lot(line, f"{BALANCE}{name}", {"source": name, "amount": amount}) for name, amount in read.balances.items()
        ]
    elif read.balances:
        lots = [
            Lot(line, f"balances[{place}].amount", msgspec.to_builtins(lot)) for place, lot in enumerate(read.balances)
        ]
    fields = {name: value for name in LOT if (value := getattr(read, name)) is not None}
    if fields:
        if lots:
            raise LineError(line, "balances", "stands beside a lot")
        lots.append(Lot(line, "amount", fields))
    attributes = {name: value for name in ATTRIBUTES if (value := getattr(read, name))}
    return Record(line, read.account, attributes, lots), bool(fields)


def _joined(record: Record, further: Record) -> BadLine | None:
    """Add the lot of a further line of an account; what it says of the account may not differ from its first line."""
    for name, value in further.attributes.items():
        if record.attributes.get(name) != value:
            return BadLine(further.line, name, f"is not what line {record.line} says of the account")
    record.lots.extend(further.lots)
    return None


def _delimiter(first: str) -> str:
    return max(_DELIMITERS, key=first.count)


# --- Checking ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checker:
    """Makes operations of records.

    :ivar name: of the import.
    :ivar welcome: whether accounts get the catalog's sign-up credits beside what the file says.
    :ivar now: what has ended by then is not brought along.
    """

    name: str
    catalog: Catalog
    welcome: bool = False
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def operations(self, record: Record) -> tuple[list[Operation], list[Lot]]:
        """The operations that open an account and give it its credits, in order, and the lots that have ended.

        :raises LineError: for the first thing that is wrong.
        """
        line, account = record.line, record.account
        attributes: dict[str, Any] = dict(record.attributes)
        opened_at = attributes.pop("opened_at", None)
        if opened_at is not None:
            attributes["occurred_at"] = _instant(opened_at, "opened_at", line)
        owner = _digest(account)
        opening = {"account": account, **attributes, "welcome": self.welcome}
        made = [_operation(line, "", "credits.open", opening, open_id(self.name, owner))]
        plan = attributes.get("plan")
        terms = None if plan is None else self.catalog.terms_of(plan)
        if plan is not None and terms is None:
            raise LineError(line, "plan", "is no plan of the catalog")
        ended: list[Lot] = []
        numbers: Counter[str] = Counter()
        for lot in record.lots:
            fields = dict(lot.fields)
            for name in ("effective_at", "expires_at"):
                if name in fields:
                    fields[name] = _instant(fields[name], name, lot.line)
            source = fields.get("source", "")
            numbers[source] += 1
            if _is_nothing(fields.get("amount")):
                continue
            if terms is not None and source == terms.source:
                raise LineError(
                    lot.line, lot.column, f"the plan gives its own {source} credits: leave one of the two out"
                )
            identity = lot_id(self.name, owner, source, numbers[source])
            operation = _operation(lot.line, lot.column, "credits.grant", {"account": account, **fields}, identity)
            if self._has_ended(operation.message, lot):
                ended.append(lot)
            else:
                made.append(operation)
        return made, ended

    def _has_ended(self, message: Message, lot: Lot) -> bool:
        starts, ends = getattr(message, "effective_at", None), getattr(message, "expires_at", None)
        if ends is None:
            return False
        if starts is not None and ends <= starts:
            raise LineError(lot.line, "expires_at", "is not after effective_at")
        return bool(ends <= self.now)


def _operation(line: int, column: str, name: str, arguments: dict[str, Any], identity: str) -> Operation:
    try:
        raw = _encode(arguments)
        return Operation(line, name, identity, decode_message(name, raw), raw)
    except ContractError as error:
        raise _line_error(line, column, error) from None


_NOTHING = re.compile(r"0{1,13}(\.0{1,6})?\Z", re.ASCII)


def _is_nothing(amount: Any) -> bool:
    """Whether an account has none of a source: that is no lot."""
    return (type(amount) is int and amount == 0) or (isinstance(amount, str) and bool(_NOTHING.match(amount)))


def _instant(text: str, column: str, line: int) -> str:
    try:
        return read_instant(text, column).isoformat()
    except ValueError as error:
        raise LineError(line, column, str(error).removeprefix(f"{column}: ")) from None


def _line_error(line: int, column: str, error: Exception) -> LineError:
    """What the type of a message says, with the name of the column in place of a path."""
    reason = str(error)
    where = _WHERE.search(reason)
    if where is not None:
        reason = reason[: where.start()]
        named = where[1].replace("occurred_at", "opened_at")
        column = column if named == "amount" and column else named or column
    return LineError(line, column, reason)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
