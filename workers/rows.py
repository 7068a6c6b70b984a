"""How rows travel to Postgres: COPY in text form for new ones, one ``UPDATE`` from arrays for those that changed.

Values are put into their text form here: the driver, asked to adapt one by one, takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import compress, islice
from typing import Any, NamedTuple

from psycopg import Cursor

from models.rules.state import Entry
from tasks.ledger import Row

Values = tuple[Any, ...]
"""The values of a row."""

NULL = "\\N"
"""NULL, in COPY's text form."""


PIECE = 128
"""Lines that are sent together."""


def copy(
    cursor: Cursor[Any], statement: str, lines: Iterable[str], meanwhile: Callable[[], None] | None = None
) -> None:
    """COPY lines; nothing is sent when there are none.

    The server works on the first ones while the others are still being made.

    :param meanwhile: is called while it works on the last ones.
    """
    made = iter(lines)
    piece = list(islice(made, PIECE))
    if not piece:
        if meanwhile is not None:
            meanwhile()
        return
    with cursor.copy(statement) as stream:
        while piece:
            stream.write("\n".join(piece) + "\n")
            piece = list(islice(made, PIECE))
        if meanwhile is not None:
            meanwhile()


def row_line(row: Iterable[Any]) -> str:
    """A row for COPY; of bytes, a ``bytea``."""
    return "\t".join(map(_field, row))


def operation_line(account: str, row: Row) -> str:
    """A row of ``operations`` for COPY, as :func:`row_line` makes it, in half the time."""
    code, feature, quantity, member = row.code, row.feature, row.quantity_micro, row.member
    first_seq, occurred_at = row.first_seq, row.occurred_at
    return (
        f"{_text(account)}\t{_text(row.operation)}\t{row.number}\t{row.name}\t{row.status}"
        f"\t{NULL if code is None else code}\t{row.charged_micro}\t{NULL if feature is None else _text(feature)}"
        f"\t{NULL if quantity is None else quantity}\t{NULL if member is None else _text(member)}"
        f"\t{NULL if first_seq is None else first_seq}\t{row.entries}\t{_json(row.arguments)}\t{_json(row.result)}"
        f"\t{NULL if occurred_at is None else _iso(occurred_at)}\t{_iso(row.applied_at)}\t{_text(row.catalog)}"
    )


def entry_line(account: str, entry: Entry) -> str:
    """A row of ``entries`` for COPY, likewise."""
    seq, operation, kind, grant, amount_micro, balance_after_micro, at, refers_to, recorded_at, digest = entry
    return (
        f"{_text(account)}\t{seq}\t{NULL if operation is None else _text(operation)}\t{kind}\t{grant}\t{amount_micro}"
        f"\t{balance_after_micro}\t{_iso(at)}\t{NULL if refers_to is None else _text(refers_to)}\t{_iso(recorded_at)}"
        f"\t\\\\x{digest.hex()}"
    )


def _field(value: Any) -> str:
    kind = type(value)
    if kind is int:
        return str(value)
    if kind is str:
        return _text(value)
    if value is None:
        return NULL
    if kind is datetime:
        return _iso(value)
    if kind is bool:
        return "t" if value else "f"
    if kind is bytes:
        digits: str = value.hex()
        return "\\\\x" + digits
    raise TypeError(f"a {kind.__name__} in a row")


def _text(text: str) -> str:
    """Text that was checked to have no control characters."""
    return text.replace("\\", "\\\\") if "\\" in text else text


def _json(encoded: bytes) -> str:
    """JSON as it came off the wire: white space between its tokens may be any."""
    text = str(encoded, "utf-8")
    if text.isprintable():
        return _text(text)
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


@lru_cache(maxsize=4096)
def _iso(instant: datetime) -> str:
    return instant.isoformat()


# --- Arrays ------------------------------------------------------------------------------------------


def texts(values: Iterable[str | None]) -> str:
    """An array literal of texts."""
    listed = list(values)
    if None in listed:
        return "{" + ",".join("NULL" if text is None else _quoted(text) for text in listed) + "}"
    together = "".join(listed)  # type: ignore[arg-type]  # there is no None
    if '"' in together or "\\" in together:
        return "{" + ",".join(map(_quoted, listed)) + "}"  # type: ignore[arg-type]  # likewise
    return '{"' + '","'.join(listed) + '"}' if listed else "{}"  # type: ignore[arg-type]  # likewise


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def plain(values: Iterable[Any]) -> str:
    """An array literal of numbers or truth values."""
    return "{" + ",".join(map(str, values)) + "}"


def instants(values: Iterable[datetime | None]) -> str:
    """An array literal of instants."""
    return "{" + ",".join(["NULL" if value is None else f'"{_iso(value)}"' for value in values]) + "}"


def binary(values: Iterable[bytes]) -> str:
    """An array literal of ``bytea``."""
    return "{" + ",".join([f'"\\\\x{value.hex()}"' for value in values]) + "}"


LITERALS: dict[str, Callable[[Iterable[Any]], str]] = {
    "text": texts, "int": plain, "bigint": plain, "bool": plain, "timestamptz": instants, "bytea": binary,
}  # fmt: skip
"""How an array of a type is written."""


# --- Updates -----------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column and its type."""

    name: str
    type: str


class Changing(NamedTuple):
    """A table of which rows change."""

    table: str
    keys: tuple[Column, ...]
    columns: tuple[Column, ...]
    """Those that may change."""


def update(
    cursor: Cursor[Any],
    changing: Changing,
    keys: Sequence[Values],
    before: Sequence[Values] | None,
    after: Sequence[Values],
) -> None:
    """Update rows in one statement, which names only the columns that change in any of them.

    :param keys: of each row, the values of its key.
    :param before: of each row, the values of the columns as they were read; None when all are to be written.
    :param after: the same as they are to be.
    """
    now = list(zip(*after, strict=True))
    if before is None:
        changed = (True,) * len(now)
    else:
        changed = tuple(old != new for old, new in zip(zip(*before, strict=True), now, strict=True))
    if any(changed):
        columns = (*changing.keys, *compress(changing.columns, changed))
        values = (*zip(*keys, strict=True), *compress(now, changed))
        cursor.execute(
            _statement(changing, changed),
            [LITERALS[column.type](listed) for column, listed in zip(columns, values, strict=True)],
        )


@lru_cache(maxsize=256)
def _statement(changing: Changing, changed: tuple[bool, ...]) -> str:
    columns = list(compress(changing.columns, changed))
    given = (*changing.keys, *columns)
    return (
        f"UPDATE {changing.table} r SET {', '.join(f'{column.name} = u.{column.name}' for column in columns)}"
        # Side by side as they are read; FROM unnest(…, …) would first put each array into a table of its own.
        f" FROM (SELECT {', '.join(f'unnest(%s::{column.type}[]) AS {column.name}' for column in given)}) u"
        f" WHERE {' AND '.join(f'r.{key.name} = u.{key.name}' for key in changing.keys)}"
    )
