"""``creditlane payments revenue``: what was paid for credits, and what became of the money."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer
from psycopg import Connection

from creditlane.amounts import format_amount
from models.revenue import PARTS, Amount, Book, Revenue, Summary, decimal, write_csv
from models.revenue_reading import revenue as read_revenue
from models.rules.calendar import month_start
from scripts.command_parts import FAULTS, USAGE, CountProgress, JsonOption, examples, fail, ledger, show_json
from scripts.showing import console, plain_table, said

REVENUE_EXAMPLES = examples(
    "creditlane payments revenue", "creditlane payments revenue --from 2026-01 --to 2027-01 --zone Europe/Paris",
    "creditlane payments revenue --from 2026-10 --to 2026-11 --by source",
    "creditlane payments revenue --from 2026-01 --csv revenue.csv",
    "creditlane payments revenue --json | jq .currencies.EUR.closing.minor",
)  # fmt: skip

_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}\Z", re.ASCII)


class By(StrEnum):
    """What the rows of the table are."""

    MONTH = "month"
    SOURCE = "source"
    ACCOUNT = "account"


def revenue(
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="INSTANT", help="Such as 2026-01, 2026-01-15 or 2026-01-15T12:00:00Z.",
            show_default="the beginning of this month",
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--to", metavar="INSTANT", help="What is before it is reported.", show_default="now"),
    ] = None,
    zone: Annotated[str, typer.Option(metavar="ZONE", help="The IANA time zone of dates and months.")] = "UTC",
    by: Annotated[By, typer.Option(help="What the rows are; within each currency.")] = By.MONTH,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", help="Write every figure there as CSV; - is stdout, and then nothing else.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Report deferred revenue, what was earned of it, what expired unused and what was returned, by currency.

    It reads the whole ledger, and is no sum of sums: what was sold and is not earned, expired or returned is what the
    accounts have left, to the last minor unit. When that is not so, each difference is named and the exit code is 1.
    Credits that nobody paid for are shown in credits alone.
    """
    try:
        here = ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        fail(f"--zone: {zone!r} is no IANA time zone, such as Europe/Paris", USAGE)
    with ledger() as connection:
        until = _now(connection) if end is None else _instant("--to", end, here)
        since = month_start(until, zone) if start is None else _instant("--from", start, here)
        if until <= since:
            fail("--to is not after --from", USAGE)
        with CountProgress("adding up", "entries", quiet=as_json or csv_file == Path("-")) as progress:
            found = read_revenue(
                connection, since, until, zone, by_account=by is By.ACCOUNT, progress=progress
            )  # fmt: skip
    _show(found, by, csv_file, as_json)
    if not found.report.holds:
        raise typer.Exit(FAULTS)


def _now(connection: Connection[Any]) -> datetime:
    row = connection.execute("SELECT ledger_now()").fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def _instant(option: str, text: str, here: ZoneInfo) -> datetime:
    """A month, a date or an instant, in a zone unless it says otherwise."""
    try:
        found = datetime.fromisoformat(f"{text}-01" if _MONTH.match(text) else text)
    except ValueError:
        fail(f"{option}: {text!r} is no instant; write 2026-01, 2026-01-15 or 2026-01-15T12:00:00Z", USAGE)
    return (found if found.tzinfo is not None else found.replace(tzinfo=here)).astimezone(UTC)


def _show(found: Revenue, by: By, csv_file: Path | None, as_json: bool) -> None:
    rows = None
    if csv_file == Path("-"):
        write_csv(found, sys.stdout)
    elif csv_file is not None:
        try:
            with csv_file.open("w", encoding="utf-8", newline="") as file:
                rows = write_csv(found, file)
        except OSError as error:
            fail(f"--csv: {csv_file} cannot be written ({error.strerror})", USAGE)
    if as_json:
        show_json(as_plain(found, by))
        return
    out = console(stderr=csv_file == Path("-"))
    if csv_file != Path("-"):
        for currency in [*found.currencies, ""]:
            if any(book.currency == currency for book in found.books):
                out.print(_table(found, currency, by))
                out.print()
    for fault in found.report.faults:
        owner = f"[bold]{said(fault.account)}[/] " if fault.account else ""
        out.print(f"[red]fault[/] {owner}{said(fault.table)} {said(fault.key)}: {said(fault.what)}", soft_wrap=True)
    if found.report.fault_count > len(found.report.faults):
        out.print(f"… and {found.report.fault_count - len(found.report.faults):,} more")
    read = f"{found.report.entries:,} entries of {found.report.accounts:,} accounts"
    out.print(f"[green]it closes[/]: {read}" if found.report.holds else f"[red]it does not close[/]: {read}")
    if rows is not None:
        out.print(f"{rows:,} rows in {said(csv_file)}")


def summaries(found: Revenue, currency: str, by: By) -> list[tuple[str, Summary]]:
    """The rows of a currency's table, by name; accounts and sources only where something is or was deferred."""
    if by is By.MONTH:
        return [
            (_month(found, month), found.totals(month, month)[currency]) for month in range(found.months)
        ]  # fmt: skip

    def key(book: Book) -> tuple[str, str]:
        return book.currency, book.source if by is By.SOURCE else book.account

    named = found.summaries(key)
    return [(name, summary) for (of, name), summary in sorted(named.items(), key=lambda row: row[0]) if of == currency]


def _month(found: Revenue, month: int) -> str:
    return found.local(found.bounds[month])[:7]


def _table(found: Revenue, currency: str, by: By) -> Any:
    columns = ("opening", *PARTS, "closing")
    named = summaries(found, currency, by)
    total = found.totals()[currency]
    shown = [part for part in columns if any(_figure(summary, part) != (0, 0) for _, summary in [*named, ("", total)])]
    table = plain_table(
        currency or "free credits", *(part.replace("_", " ") for part in shown),
        right=[part.replace("_", " ") for part in shown],
    )  # fmt: skip
    for name, summary in named:
        table.add_row(said(name), *(_text(_figure(summary, part), currency) for part in shown))
    table.add_row("[bold]in all[/]", *(f"[bold]{_text(_figure(total, part), currency)}[/]" for part in shown))
    return table


def _figure(summary: Summary, part: str) -> Amount:
    if part in PARTS:
        return summary.parts[part]
    return summary.opening if part == "opening" else summary.closing


def _text(amount: Amount, currency: str) -> str:
    return decimal(amount.minor, currency) if currency else format_amount(amount.credits_micro)


def as_plain(found: Revenue, by: By) -> dict[str, Any]:
    """The report as JSON tells it: each currency in all and by row; free credits under no currency's name."""
    currencies = {}
    totals = found.totals()
    for currency, total in sorted(totals.items()):
        rows = [{"name": name, **_plain(summary, currency)} for name, summary in summaries(found, currency, by)]
        under_way = found.under_way(currency, found.months)
        currencies[currency or "free"] = {
            **_plain(total, currency), "counted_twice": _amount(under_way, currency), "rows": rows,
        }  # fmt: skip
    return {
        "from": found.local(found.bounds[0]),
        "to": found.local(found.bounds[-1]),
        "zone": found.zone,
        "by": by,
        "closes": found.report.holds,
        "accounts": found.report.accounts,
        "entries": found.report.entries,
        "fault_count": found.report.fault_count,
        "faults": found.report.faults,
        "currencies": currencies,
    }


def _plain(summary: Summary, currency: str) -> dict[str, Any]:
    return {part: _amount(_figure(summary, part), currency) for part in ("opening", *PARTS, "closing")}


def _amount(amount: Amount, currency: str) -> dict[str, Any]:
    credits = {"credits": format_amount(amount.credits_micro)}
    return {**credits, "minor": amount.minor, "amount": decimal(amount.minor, currency)} if currency else credits
