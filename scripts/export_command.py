"""``creditlane export``: accounts, lots, entries and usage as CSV, JSON lines or Parquet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from models.exporting import TimelessError, What, read
from scripts.command_parts import USAGE, CountProgress, examples, fail, ledger, parse_instant
from scripts.export_formats import Format, FormatError, format_of, target, write
from scripts.showing import console, said

EXPORT_EXAMPLES = examples(
    "creditlane export accounts accounts.csv", "creditlane export lots lots.jsonl",
    "creditlane export entries october.parquet --from 2026-10-01 --to 2026-11-01",
    "creditlane export usage --format jsonl | jq -r .feature",
)  # fmt: skip


def export(
    what: Annotated[
        What,
        typer.Argument(
            help="Accounts with balances, lots with credits left, entries, usage by day.", show_default=False
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="- is stdout.")] = Path("-"),
    format: Annotated[
        Format | None, typer.Option(help="How it is written.", show_default="by the file's name, else csv")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="INSTANT", help="Entries recorded, usage from then on; UTC.", show_default=False
        ),
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="INSTANT", help="What was before; UTC.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on stderr.")] = False,
) -> None:
    """Write the ledger to a file, as it stands at one instant, while work goes on.

    The file gets its name when it is whole. creditlane import reads accounts and lots again: balances by source, or
    each lot with its time, priority and features. Credits that have ended are left out; renewals that are due and not
    applied yet do not count.
    """
    path = None if file == Path("-") else file
    since = None if start is None else parse_instant(start)
    until = None if end is None else parse_instant(end)
    began = time.monotonic()
    with ledger() as connection, connection.transaction(), CountProgress("exporting", "rows", quiet=quiet) as progress:
        try:
            rows = read(connection, what, since, until, progress)
            with target(path) as stream:
                count = write(rows, format or format_of(path), stream)
        except (FormatError, TimelessError) as error:
            fail(str(error), USAGE)
        except BrokenPipeError:
            raise
        except OSError as error:
            fail(f"{file} cannot be written ({error.strerror})", USAGE)
    if not quiet:
        seconds = max(time.monotonic() - began, 0.001)
        where = "" if path is None else f" in {said(path)}"
        console(stderr=True).print(f"{count:,} rows{where}, {count / seconds:,.0f}/s", soft_wrap=True)
