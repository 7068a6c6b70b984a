"""``creditlane simulate``: what operations would do, or what will become of a balance; nothing is written."""

from __future__ import annotations

import sys
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Group, RenderableType

from creditlane.amounts import parse_amount, to_wire
from creditlane.contract import MAX_BATCH, Result
from creditlane.reports import Planned, Simulation
from models.pace import pace_micro
from models.reading import load_account
from models.simulating import Future, simulate
from scripts.command_parts import (
    USAGE,
    AccountArgument,
    AmountOption,
    FeatureArgument,
    JsonOption,
    MemberOption,
    QuantityArgument,
    deployment,
    examples,
    fail,
    ledger,
    parse_instant,
    show_json,
    unknown_account,
)
from scripts.showing import chart, console, facts_table, instant, plain_table, refusal, said, short
from tasks.simulation import simulate_operations

SIMULATE_EXAMPLES = examples(
    "creditlane simulate alice image 12 --times 10",
    "creditlane simulate alice --amount 40 --at 2027-03-31",
    "creditlane simulate alice --file operations.jsonl --json | jq .refused",
    "creditlane simulate alice --until 2027-03-31 --pace 12.5",
    "creditlane simulate alice --until 2027-03-31 --payments unpaid --json | jq .runs_out_at",
)


class Payments(StrEnum):
    """What becomes of the payments for a plan."""

    PAID = "paid"
    UNPAID = "unpaid"


def simulate_account(
    account: AccountArgument,
    feature: FeatureArgument = None,
    quantity: QuantityArgument = None,
    amount: AmountOption = None,
    member: MemberOption = None,
    times: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="How often, one after the other.")] = 1,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Operations before that, a JSON line each: name, arguments, id, times.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="INSTANT", help="When they are sent; now unless given.", show_default=False),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="INSTANT", help="In place of operations: run the account ahead until then.", show_default=False
        ),
    ] = None,
    pace: Annotated[
        str | None,
        typer.Option(
            metavar="CREDITS",
            help="With --until: credits spent a day; as in the last 30 unless given.",
            show_default=False,
        ),
    ] = None,
    payments: Annotated[Payments, typer.Option(help="Whether a plan is paid for in time.")] = Payments.PAID,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show what operations would cost, which grants would pay, and what would be refused; or run an account ahead.

    By the rules themselves, one operation after the other. With --until: renewals, rollover, expiries, spending.
    Nothing is written.
    """
    planned = [] if file is None else read_planned(file)
    charge = {"feature": feature, "quantity": quantity, "amount": amount, "member": member}
    given = {name: value for name, value in charge.items() if value is not None}
    if given:
        planned.append(Planned("credits.consume", given, times=times))
    paid = payments is Payments.PAID
    if until is not None:
        if planned or at is not None:
            fail("--until runs an account ahead: give it without operations and --at", USAGE)
        run_ahead(account, parse_instant(until), pace, paid, as_json)
        return
    if not planned:
        fail("name a feature, --amount, or operations with --file; or --until to run the account ahead", USAGE)
    if pace is not None:
        fail("--pace goes with --until", USAGE)
    instant = None if at is None else parse_instant(at)
    with ledger() as connection:
        try:
            found = simulate_operations(connection, account, planned, deployment().catalog, at=instant, paid=paid)
        except ValueError as error:
            fail(str(error), USAGE)
    if found is None:
        unknown_account(account)
    if as_json:
        show_json(found)
    else:
        console().print(simulation_lines(found))


def read_planned(file: Path) -> list[Planned]:
    """Read operations, a JSON object a line; ``-`` is stdin."""
    try:
        text = sys.stdin.read() if file == Path("-") else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--file: {file} cannot be read ({type(error).__name__})", USAGE)
    planned = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                planned.append(msgspec.json.decode(line, type=Planned))
        except (msgspec.MsgspecError, ValueError) as error:
            fail(f"--file: line {number}: {error}", USAGE)
    return planned


def simulation_lines(found: Simulation) -> RenderableType:
    """A simulation for people: what each operation would do."""
    facts = [
        ("account", f"[bold]{said(found.account)}[/]"),
        ("at", f"{instant(found.at)} UTC" + ("" if found.paid or found.at == found.as_of else ", nothing paid")),
        ("available", f"{found.before.available:f}, afterwards [bold]{found.after.available:f}[/]"),
        ("charged", f"{found.charged:f}"),
    ]
    if found.refused:
        facts.append(("refused", f"[red]{found.refused:,} of {len(found.results):,}[/]"))
    table = plain_table("", "operation", "charged", "available", "grants", right=("", "charged", "available"))
    for place, result in enumerate(found.results[:SHOWN_STEPS], 1):
        left = "" if result.balance is None else to_wire(result.balance.available)
        charged = to_wire(result.charged) if result.applied else ""
        table.add_row(str(place), said(short(result.operation)), charged, left, _paid_by(result))
    parts: list[RenderableType] = [facts_table(facts), "", table]
    if len(found.results) > SHOWN_STEPS:
        parts.append(f"[dim]and {len(found.results) - SHOWN_STEPS:,} more; --json has all[/]")
    return Group(*parts)


def _paid_by(result: Result) -> str:
    """Which grants would pay, or why it would be refused."""
    if not result.applied:
        return f"[red]{said(refusal(result))}[/]"
    uses = [f"{to_wire(use.amount)} {said(use.source)} ({use.grant})" for use in result.grants]
    uses += [f"[green]{said(each.achievement)}: +{to_wire(each.credits)}[/]" for each in result.achieved]
    return ", ".join(uses)


# --- An account run ahead ----------------------------------------------------------------------------


def run_ahead(account: str, end: datetime, pace: str | None, paid: bool, as_json: bool) -> None:
    """Show what will become of an account.

    :param pace: credits a day; as in the last 30 unless given.
    """
    with ledger() as connection:
        loaded = load_account(connection, account)
        if loaded is None:
            unknown_account(account)
        state, now = loaded
        try:
            micro = parse_amount(pace) if pace is not None else pace_micro(connection, account, now, state.opened_at)
            if micro < 0:
                raise ValueError("a pace is 0 or more")
            future = simulate(state, now, end, deployment().catalog, micro, paid)
        except ValueError as error:
            fail(str(error), USAGE)
    if as_json:
        show_json(future)
    else:
        console().print(future_lines(future))


SHOWN_STEPS = 60
"""Lines of the table at the most; the JSON has all."""


def future_lines(future: Future) -> RenderableType:
    """A simulation for people: what happens, and the balance as a chart."""
    table = plain_table("when (UTC)", "what", "credits", "spendable", right=("credits", "spendable"))
    for step in future.steps[:SHOWN_STEPS]:
        amount = "" if step.amount == "0" else step.amount
        table.add_row(instant(step.at), step.what, amount, step.available)
    left = len(future.steps) - SHOWN_STEPS
    facts = [
        ("account", f"[bold]{said(future.account)}[/]"),
        ("pace", f"{future.pace} credits a day"),
        ("runs out", "not by then" if future.runs_out_at is None else f"[red]{instant(future.runs_out_at)} UTC[/]"),
        ("expires unspent", future.expiring),
    ]
    if not future.paid:
        facts.append(("payments", "none arrives"))
    parts: list[RenderableType] = [facts_table(facts), "", table]
    if left > 0:
        parts.append(f"[dim]and {left} more; --json has all[/]")
    return Group(*parts, "", chart([(at, Decimal(available)) for at, available in future.daily]))
