"""``creditlane import``: bring users and their balances along from elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from creditlane.amounts import format_amount
from models.audit import audit as audit_ledger
from models.audit_processes import HelperError
from models.catalog import CatalogError, load_catalog
from models.report import Report
from scripts.command_parts import (
    AWAY,
    FAULTS,
    REFUSED,
    USAGE,
    CountProgress,
    JsonOption,
    deployment,
    examples,
    fail,
    ledger,
    show_json,
)
from scripts.import_reading import Format, ImportFileError, Source, check_import_name
from scripts.importing import BAD, CONFLICTS, ENDED, EXISTS, Crew, Found, Order, granted
from scripts.importing import REFUSED as REFUSALS
from scripts.showing import console, plain_table, said
from workers.bulk_writer import LanesTakenError

IMPORT_EXAMPLES = examples(
    "creditlane import users.csv --name legacy --dry-run", "creditlane import users.csv --name legacy",
    "creditlane import users.csv --name legacy --map user_id=account --map credits=balance:pack --ignore created_by",
    "creditlane import users.jsonl --name legacy --skip-bad --json | jq .findings",
)  # fmt: skip

KINDS = {
    BAD: "cannot be imported",
    ENDED: "credits that have ended, left out",
    EXISTS: "opened by others before, left alone",
    REFUSALS: "refused by the ledger",
    CONFLICTS: "differ from an earlier run, left as they are",
}
"""What was found, in words."""


WORTH_HELP_BYTES = 1_000_000
"""A file from which on other processes are worth their start."""


class Existing(StrEnum):
    """What becomes of accounts that this import did not open."""

    REFUSE = "refuse"
    ADD = "add"


def import_accounts(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or JSON lines.", show_default=False)],
    name: Annotated[
        str,
        typer.Option(
            help="What the import is called: under the same name a file is imported once.", show_default=False
        ),
    ],
    format: Annotated[
        Format | None, typer.Option(help="How the file is written.", show_default="by its name, else csv")
    ] = None,
    renamed: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="COLUMN=NAME", help="What a column means; may be repeated.", show_default=False),
    ] = None,
    ignored: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="COLUMN", help="A column to pass over; may be repeated.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every line, write nothing.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Import the others where lines are wrong; else nothing is written.")
    ] = False,
    existing: Annotated[
        Existing, typer.Option(help="Accounts that are there already: refuse them, or add the credits to them.")
    ] = Existing.REFUSE,
    welcome: Annotated[bool, typer.Option("--welcome", help="Give the catalog's sign-up credits as well.")] = False,
    notify: Annotated[
        bool, typer.Option("--notify", help="Make the notices that the catalog has for what is done.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="How many share the work.", show_default="one per core")
    ] = os.cpu_count() or 1,
    audited: Annotated[bool, typer.Option("--audit/--no-audit", help="Audit the ledger when it is done.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Open accounts with the balances of a file, each exactly once.

    Every line is checked before anything is written. The lane workers must be stopped meanwhile: the import takes
    their lanes, and their messages wait. Killed half way, it goes on when it is started again.

    Columns of a CSV file, or fields of JSON: account, kind, email, locale, timezone, plan, opened_at; and
    balance:SOURCE for each source, or one lot a line with source, amount, expires_at, effective_at, priority,
    features (the lines of an account follow one another). In JSON also balances: {source: amount} or a list of lots.
    """
    where = deployment()
    began = time.monotonic()
    try:
        source = Source(
            file,
            format or (Format.JSONL if file.suffix.lower() in (".jsonl", ".ndjson", ".json") else Format.CSV),
            _mapping(renamed or ()),
            frozenset(ignored or ()),
        )
        several = processes if source.size() >= WORTH_HELP_BYTES else 1
        load_catalog(where.catalog_name)
        order = Order(
            check_import_name(name), "" if dry_run else where.database_url, where.catalog_name, where.lanes,
            welcome, notify, existing is Existing.ADD,
        )  # fmt: skip
        with Crew(order, several) as crew:
            if not dry_run:
                crew.own_lanes()
            with CountProgress("checking", "bytes", quiet=as_json) as progress:
                checked = crew.check(source, progress)
            written = not dry_run and (skip_bad or not checked.count(BAD))
            found = checked
            writing = time.monotonic()
            if written:
                with CountProgress("writing", "bytes", quiet=as_json) as progress:
                    found = crew.write(source, progress)
    except (ImportFileError, CatalogError) as error:
        fail(str(error), USAGE)
    except LanesTakenError as error:
        fail(f"{error}: stop the lane workers, and start the import again. Messages wait in the broker meanwhile", AWAY)
    except HelperError as error:
        fail(f"{error}; what is written is whole: start the import again", AWAY)
    done = time.monotonic()
    told: dict[str, Any] = {
        "written": written,
        "lines": source.lines_read,
        "accounts": found.accounts,
        "operations": found.operations,
        "applied": found.applied,
        "replayed": found.replayed,
        "credits": {name: format_amount(micro) for name, micro in sorted(found.micro.items())},
        "counts": found.counts,
        "findings": found.examples,
        "check_seconds": round(writing - began, 3),
        "write_seconds": round(done - writing, 3) if written else None,
    }
    report = None
    missing: dict[str, int] = {}
    if written and audited:
        report, missing = _audit(order, found, processes, as_json)
        told["audit"] = {"holds": report.holds, "faults": report.faults}
        told["missing"] = {name: format_amount(micro) for name, micro in missing.items()}
    if as_json:
        show_json(told)
    else:
        _show(told, found, report, missing, dry_run)
    if found.count(BAD) or missing or (report is not None and not report.holds):
        raise typer.Exit(FAULTS)
    if found.count(EXISTS, REFUSALS, CONFLICTS):
        raise typer.Exit(REFUSED)


def _mapping(renamed: Sequence[str]) -> dict[str, str]:
    mapping = {}
    for each in renamed:
        column, equals, meant = each.partition("=")
        if not equals or not column or not meant:
            raise ImportFileError(f"--map {each[:60]!r}: write COLUMN=NAME, such as user_id=account")
        mapping[column] = meant
    return mapping


def _audit(order: Order, found: Found, processes: int, quiet: bool) -> tuple[Report, dict[str, int]]:
    """Audit the ledger, and compare what it has of the import with what was written.

    :returns: the audit's report, and what the ledger lacks, in micro-credits by source.
    """
    with ledger() as connection:
        with CountProgress("auditing", "operations", quiet=quiet) as progress:
            report = audit_ledger(connection, progress=progress, processes=processes)
        there = granted(connection, order.name)
    lacking = {source: micro - there.get(source, 0) for source, micro in found.micro.items()}
    return report, {source: micro for source, micro in lacking.items() if micro > 0}


def _show(told: dict[str, Any], found: Found, report: Report | None, missing: dict[str, int], dry_run: bool) -> None:
    out = console()
    for kind, count in found.counts.items():
        out.print(f"[{'yellow' if kind == ENDED else 'red'}]{count:,} lines[/] {KINDS[kind]}:")
        for line in found.examples[kind]:
            column = f"{line.column}: " if line.column else ""
            out.print(f"  line {line.line}: {said(column + line.reason)}", soft_wrap=True)
        if count > len(found.examples[kind]):
            out.print(f"  … and {count - len(found.examples[kind]):,} more")
    if found.micro:
        table = plain_table("source", "credits", right=["credits"])
        for name, micro in sorted(found.micro.items()):
            table.add_row(said(name), format_amount(micro))
        out.print(table)
    counted = f"{found.accounts:,} accounts, {found.operations:,} operations"
    if not told["written"]:
        reason = "" if dry_run else "; mend the lines, or leave them out with --skip-bad"
        verdict = "[red]nothing is written[/]" if found.count(BAD) else "[green]every line is good[/]"
        out.print(f"{verdict}: {counted} would be{reason}", soft_wrap=True)
        return
    seconds = max(told["write_seconds"], 0.001)
    out.print(
        f"[green]imported[/] {counted} ({found.replayed:,} of an earlier run):"
        f" checked in {told['check_seconds']:.1f} s, written in {seconds:.1f} s, {found.accounts / seconds:,.0f}"
        " accounts/s",
        soft_wrap=True,
    )
    for name, micro in missing.items():
        out.print(f"[red]missing[/]: {format_amount(micro)} {said(name)} credits are not in the ledger")
    if report is not None:
        for fault in report.faults:
            out.print(
                f"[red]fault[/] {said(fault.account)} {said(fault.table)} {said(fault.key)}: {said(fault.what)}",
                soft_wrap=True,
            )
        verdict = "[green]the audit holds[/]" if report.holds else f"[red]{report.fault_count:,} faults[/] in"
        out.print(f"{verdict}: {report.accounts:,} accounts, {report.operations:,} operations")
