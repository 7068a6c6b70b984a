"""``creditlane due``: what the schedules would do now, and when they were last sent."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from models.due import COUNTED, Waiting, Work, work
from scripts.command_parts import JsonOption, examples, ledger, parse_instant, show_json
from scripts.showing import console, credits, facts_table, instant, plain_table, said, span

DUE_EXAMPLES = examples(
    "creditlane due", "creditlane due --until 2027-02-01", "creditlane due --json | jq .due.accounts"
)


def show_due(
    until: Annotated[
        str | None,
        typer.Option(metavar="INSTANT", help="What falls due by then; by now unless given.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the schedules would do: accounts that are due, notices and messages that wait, and their last ticks."""
    with ledger() as connection:
        found = work(connection, None if until is None else parse_instant(until))
    if as_json:
        show_json(found)
    else:
        console().print(due_lines(found))


def due_lines(found: Work) -> RenderableType:
    """It for people."""
    due, at = found.due, found.at
    accounts = f"about {due.accounts:,}" if due.accounts >= COUNTED else f"{due.accounts:,}"
    why = ", ".join(f"{count:,} {what}" for what, count in due.by.items() if count)
    if due.looked_at < due.accounts and why:
        why += f" (of the {due.looked_at:,} longest overdue)"
    facts = [
        ("by", f"{instant(at)} UTC"),
        ("due accounts", f"[bold]{accounts}[/]{_since(due.oldest, at)}"),
        ("because of", why or "nothing"),
        ("notices", _waiting(found.notices, at)),
        ("outbox", _waiting(found.outbox, at)),
        ("in transit", f"{credits(found.in_transit)} of {found.transferring:,} accounts"),
        (
            "usage",
            "not counted yet" if found.usage_until is None else f"counted until {instant(found.usage_until)} UTC",
        ),
        ("beat", "[green]ticks[/]" if found.beat else "[red]none ticks[/]"),
    ]
    table = plain_table("schedule", "task", "last tick (UTC)", "ago")
    for tick in found.schedules:
        table.add_row(said(tick.name), said(tick.task), instant(tick.last_tick_at), _ago(tick.last_tick_at, at))
    return Group(facts_table(facts), *(("", table) if found.schedules else ()))


def _waiting(waiting: Waiting, at: datetime) -> str:
    more = "at least " if waiting.count >= COUNTED else ""
    return f"{more}{waiting.count:,} wait{_since(waiting.oldest, at)}"


def _since(oldest: datetime | None, at: datetime) -> str:
    return "" if oldest is None else f", the oldest since {instant(oldest)} UTC ({_ago(oldest, at)})"


def _ago(then: datetime, at: datetime) -> str:
    return span(max(0.0, (at - then).total_seconds()))
