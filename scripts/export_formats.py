"""How exports are written: CSV (RFC 4180), JSON lines, Parquet; and where, whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from creditlane.amounts import format_amount
from models.exporting import Column, Row, Rows, Type


class Format(StrEnum):
    """How an export is written."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class FormatError(RuntimeError):
    """A format that cannot be written here; the text says what to do."""


def format_of(path: Path | None) -> Format:
    """The format that a file's name tells; CSV where it tells none."""
    suffix = "" if path is None else path.suffix.lower()
    return {".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".parquet": Format.PARQUET}.get(suffix, Format.CSV)


@contextmanager
def target(path: Path | None) -> Iterator[BinaryIO]:
    """Where an export goes: standard output, or a file that gets its name when it is whole and on the disk.

    Only who writes it can read it: it tells of people.

    :raises OSError: when it cannot be written; nothing is left of it then.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write(rows: Rows, format: Format, stream: BinaryIO) -> int:
    """Write rows as they are read.

    :returns: how many there were.
    :raises FormatError: for Parquet, where its package is not installed.
    """
    return {Format.CSV: _write_csv, Format.JSONL: _write_jsonl, Format.PARQUET: _write_parquet}[format](rows, stream)


Show = Callable[[Any], Any]


def _instant(value: datetime) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


_json = msgspec.json.Encoder().encode

_IN_CSV: dict[Type, Show] = {
    Type.TEXT: str, Type.NUMBER: str, Type.AMOUNT: lambda micro: format_amount(int(micro)), Type.INSTANT: _instant,
    Type.DAY: date.isoformat, Type.TEXTS: lambda texts: _json(texts).decode(),
}  # fmt: skip
_IN_JSON: dict[Type, Show] = {**_IN_CSV, Type.NUMBER: int, Type.TEXTS: list}


def _write_csv(rows: Rows, stream: BinaryIO) -> int:
    shows = [_IN_CSV[column.type] for column in rows.columns]
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    count = 0
    try:
        writer = csv.writer(text)
        writer.writerow([column.name for column in rows.columns])
        for page in rows.pages:
            writer.writerows(_shown(row, shows) for row in page)
            count += len(page)
    finally:
        text.detach()
    return count


def _shown(row: Row, shows: Sequence[Show]) -> list[str]:
    return ["" if value is None else show(value) for value, show in zip(row, shows, strict=True)]


def _write_jsonl(rows: Rows, stream: BinaryIO) -> int:
    """What is nothing is left out."""
    shows = [(column.name, _IN_JSON[column.type]) for column in rows.columns]
    encode = msgspec.json.Encoder().encode_lines
    count = 0
    for page in rows.pages:
        stream.write(
            encode(
                [
                    {name: show(value) for value, (name, show) in zip(row, shows, strict=True) if value is not None}
                    for row in page
                ]
            )
        )
        count += len(page)
    return count


def _write_parquet(rows: Rows, stream: BinaryIO) -> int:
    """Amounts are decimals of six places, instants in microseconds, UTC."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FormatError(
            "Parquet needs pyarrow, which is not installed: pip install 'creditlane[export]'; CSV and JSON do not"
        ) from None
    types = {
        Type.TEXT: pyarrow.string(), Type.NUMBER: pyarrow.int64(), Type.AMOUNT: pyarrow.decimal128(38, 6),
        Type.INSTANT: pyarrow.timestamp("us", tz="UTC"), Type.DAY: pyarrow.date32(),
        Type.TEXTS: pyarrow.list_(pyarrow.string()),
    }  # fmt: skip
    schema = pyarrow.schema([(column.name, types[column.type]) for column in rows.columns])
    count = 0
    with parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for page in rows.pages:
            arrays = [
                pyarrow.array(_values(column, values), type=types[column.type])
                for column, values in zip(rows.columns, zip(*page, strict=True), strict=True)
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            count += len(page)
    return count


def _values(column: Column, values: Sequence[Any]) -> Sequence[Any]:
    if column.type is Type.AMOUNT:
        return [None if micro is None else Decimal(int(micro)).scaleb(-6) for micro in values]
    return values
