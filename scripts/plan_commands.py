"""``creditlane plan``: subscriptions."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import typer
from rich.console import RenderableType

from models.reading import PlanSummary, load_account, plan_summary
from scripts.command_parts import (
    WAIT_SECONDS,
    AccountArgument,
    IdOption,
    JsonOption,
    ReasonOption,
    WaitOption,
    deployment,
    examples,
    ledger,
    operate,
    operator,
    parse_instant,
    show_json,
    unknown_account,
)
from scripts.showing import console, facts_table, instant, said

plan_app = typer.Typer(
    help="Subscriptions: look at one, begin, change, renew, cancel, undo a renewal.",
    no_args_is_help=True,
    epilog=examples("creditlane plan show alice", "creditlane plan subscribe alice starter --payment in_1"),
)

PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="A plan of the catalog.", show_default=False)]
PaymentOption = Annotated[
    str | None,
    typer.Option("--payment", help="What was paid by: a refund finds the credits.", show_default=False),
]
EndOption = Annotated[
    str | None,
    typer.Option("--paid-until", metavar="INSTANT", help="As the plan says, unless given.", show_default=False),
]


@plan_app.command("show", epilog=examples("creditlane plan show alice", "creditlane plan show alice --json"))
def plan_show(account: AccountArgument, as_json: JsonOption = False) -> None:
    """Show an account's plan: its period, what it gives, and what comes next."""
    with ledger() as connection:
        loaded = load_account(connection, account)
        if loaded is None:
            unknown_account(account)
        summary = plan_summary(*loaded, deployment().catalog)
    if as_json:
        show_json(summary)
    elif summary is None:
        console().print(f"[bold]{said(account)}[/] has no plan")
    else:
        console().print(plan_lines(summary))


def plan_lines(summary: PlanSummary) -> RenderableType:
    """A subscription for people."""
    colour = {"active": "green", "ended": "red"}.get(summary.status, "yellow")
    gives = "unlimited" if summary.unlimited else f"{summary.monthly_credits} a month"
    facts = [
        ("account", f"[bold]{said(summary.account)}[/]"),
        ("plan", f"[bold]{said(summary.plan)}[/], [{colour}]{summary.status}[/]"),
        ("gives", f"{gives}, {summary.mode}"),
        ("period", f"{instant(summary.period_start)} to {instant(summary.period_end)} UTC"),
    ]
    if summary.remaining is not None:
        facts.append(("of this period", f"{summary.remaining} left"))
    if summary.rolled_over is not None:
        facts.append(("rolled over", summary.rolled_over))
    if summary.paid_until is not None:
        facts.append(("paid until", f"{instant(summary.paid_until)} UTC"))
    if summary.next_plan is not None:
        facts.append(("next plan", said(summary.next_plan)))
    facts.append(("next", summary.next))
    last = summary.last_renewal
    if last is not None:
        told = f"{last.allotted} new, {last.rolled_over} carried, {last.expired} expired"
        facts.append(
            (
                "last renewal",
                f"{instant(last.at)} UTC: {told}{', undone' if last.undone else ''}",
            )
        )
    facts.append(("anchor", f"{instant(summary.anchor)} UTC, calendar of {said(summary.zone)}"))
    return facts_table(facts)


@plan_app.command(
    "subscribe",
    epilog=examples(
        "creditlane plan subscribe alice free",
        "creditlane plan subscribe alice pro --payment in_1 --period-start 2026-11-01",
    ),
)
def plan_subscribe(
    account: AccountArgument,
    plan: PlanArgument,
    payment: PaymentOption = None,
    period_start: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="When it began; now unless given.", show_default=False)
    ] = None,
    paid_until: EndOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Begin a plan; its first credits come at once."""
    start, end = _instant(period_start), _instant(paid_until)
    operate(
        id, wait, as_json, account, "plans.subscribe",
        lambda client, identity, seconds: client.subscribe(
            account, plan, id=identity, payment=payment, period_start=start, period_end=end, wait=seconds
        ),
    )  # fmt: skip


@plan_app.command("change", epilog=examples("creditlane plan change alice pro"))
def plan_change(
    account: AccountArgument,
    plan: PlanArgument,
    payment: PaymentOption = None,
    paid_until: EndOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Change to a higher plan at once, to a lower one with the next renewal."""
    end = _instant(paid_until)
    operate(
        id, wait, as_json, account, "plans.change",
        lambda client, identity, seconds: client.change_plan(
            account, plan, id=identity, payment=payment, period_end=end, wait=seconds
        ),
    )  # fmt: skip


@plan_app.command(
    "renew", epilog=examples("creditlane plan renew alice --period-start 2026-12-01T09:30:00Z --payment in_2")
)
def plan_renew(
    account: AccountArgument,
    period_start: Annotated[
        str, typer.Option(metavar="INSTANT", help="When what was paid for begins.", show_default=False)
    ],
    payment: PaymentOption = None,
    paid_until: EndOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Note a payment for the next period: a plan with a price renews by it."""
    start, end = parse_instant(period_start), _instant(paid_until)
    operate(
        id, wait, as_json, account, "plans.renew",
        lambda client, identity, seconds: client.renew_plan(
            account, id=identity, period_start=start, period_end=end, payment=payment, wait=seconds
        ),
    )  # fmt: skip


@plan_app.command("cancel", epilog=examples("creditlane plan cancel alice", "creditlane plan cancel alice --now"))
def plan_cancel(
    account: AccountArgument,
    now: Annotated[bool, typer.Option("--now", help="End it now, and what is left of its credits with it.")] = False,
    reason: ReasonOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """End a plan with its period: nothing more is allotted, and what is left stays until then."""
    at: Literal["period_end", "now"] = "now" if now else "period_end"
    operate(
        id, wait, as_json, account, "plans.cancel",
        lambda client, identity, seconds: client.cancel_plan(
            account, id=identity, at=at, reason=reason, wait=seconds
        ),
    )  # fmt: skip


@plan_app.command("undo", epilog=examples("creditlane plan undo alice --reason 'renewed by mistake'"))
def plan_undo(
    account: AccountArgument,
    reason: Annotated[str, typer.Option(help="Why; kept with the operation.", show_default=False)],
    actor: Annotated[str | None, typer.Option(help="Who; you unless given.", show_default=False)] = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Take back what the last renewal did; both stay in the history."""
    who = actor or operator()
    operate(
        id, wait, as_json, account, "plans.undo",
        lambda client, identity, seconds: client.undo_renewal(
            account, actor=who, reason=reason, id=identity, wait=seconds
        ),
    )  # fmt: skip


def _instant(text: str | None) -> datetime | None:
    return None if text is None else parse_instant(text)
