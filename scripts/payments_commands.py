"""``creditlane payments``: what providers said, what it led to, and in what they and the ledger differ."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from creditlane.amounts import format_amount
from creditlane.client import PAYMENTS, CreditClient
from creditlane.errors import BrokerUnavailableError, CreditlaneError, NoAnswerError
from models.payment_reading import Explanation, PaymentEvent, body, drop, events, explain, look_now, retry
from models.reading import DEFAULT_PAGE
from models.rules.catalog import Money
from scripts.command_parts import (
    AWAY,
    FAULTS,
    USAGE,
    JsonOption,
    LimitOption,
    deployment,
    examples,
    fail,
    ledger,
    operator,
    show_json,
)
from scripts.payments_demo import demo
from scripts.payments_revenue import REVENUE_EXAMPLES, revenue
from scripts.payments_selling import selling_app
from scripts.showing import console, credits, facts_table, instant, plain_table, said

RECONCILE_SECONDS = 600.0
"""How long a comparison is waited for unless told otherwise."""

COLOURS = {"parked": "red", "waiting": "yellow", "received": "yellow", "sent": "yellow", "rejected": "red",
           "done": "green", "applied": "green"}  # fmt: skip

payments_app = typer.Typer(
    help="Payments: the inbox of providers' events, what they led to, and in what provider and ledger differ.",
    no_args_is_help=True,
    epilog=examples(
        "creditlane payments events --status parked",
        "creditlane payments purchase cs_test_a1b2",
        "creditlane payments reconcile",
    ),
)

payments_app.registered_commands += selling_app.registered_commands
payments_app.command("revenue", epilog=REVENUE_EXAMPLES)(revenue)
payments_app.command("demo", epilog=examples("creditlane payments demo"))(demo)

EventsArgument = Annotated[list[int], typer.Argument(metavar="EVENT…", help="Rows of the inbox.", show_default=False)]


@payments_app.command(
    "events",
    epilog=examples("creditlane payments events", "creditlane payments events --status parked --json | jq .code"),
)
def payments_events(
    status: Annotated[
        str | None,
        typer.Option(help="Only those that are received, done, ignored, parked or dropped.", show_default=False),
    ] = None,
    limit: LimitOption = DEFAULT_PAGE,
    before: Annotated[int | None, typer.Option(metavar="EVENT", help="Only older ones.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the inbox, the newest event first."""
    if status is not None and status not in ("received", "done", "ignored", "parked", "dropped"):
        fail(f"{status!r} is no status; write received, done, ignored, parked or dropped", USAGE)
    with ledger() as connection:
        found = events(connection, status=status, limit=limit, before=before)
    if as_json:
        for each in found:
            show_json(each)
        return
    out = console()
    if not found:
        out.print("no events")
        return
    out.print(_events_table(found))
    if len(found) == limit:
        out.print(f"[dim]older ones: --before {found[-1].id}[/]")
    if any(each.status == "parked" for each in found):
        out.print("[dim]mend what the reason names, then: creditlane payments retry EVENT…[/]")


def _events_table(found: list[PaymentEvent]) -> RenderableType:
    table = plain_table("event", "received (UTC)", "provider", "type", "status", "why", right=("event",))
    for each in found:
        why = "" if each.code is None else f"{each.code}: {each.reason}"
        table.add_row(str(each.id), instant(each.received_at), said(each.provider), said(each.type),
                      _coloured(each.status), said(why))  # fmt: skip
    return table


def _coloured(status: str) -> str:
    colour = COLOURS.get(status, "dim")
    return f"[{colour}]{said(status)}[/]"


@payments_app.command("show", epilog=examples("creditlane payments show 17 | jq .data.object"))
def payments_show(
    event: Annotated[int, typer.Argument(metavar="EVENT", help="A row of the inbox.", show_default=False)],
) -> None:
    """Print an event's body, to the last byte as it came; on a terminal without what could drive it."""
    with ledger() as connection:
        found = body(connection, event)
    if found is None:
        fail(f"the inbox has no row {event}", USAGE)
    if sys.stdout.isatty():
        console().print(said(found.decode("utf-8", "backslashreplace")), soft_wrap=True)
        return
    sys.stdout.buffer.write(found)
    sys.stdout.flush()


@payments_app.command(
    "retry",
    epilog=examples(
        "creditlane payments retry 17 18",
        "creditlane payments retry --waiting",
        "creditlane payments retry --waiting --of cs_1",
    ),
)
def payments_retry(
    chosen: Annotated[
        list[int] | None, typer.Argument(metavar="[EVENT…]", help="Parked rows of the inbox.", show_default=False)
    ] = None,
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Look again at facts that wait or are parked, by the catalog of now.")
    ] = False,
    of: Annotated[
        str | None, typer.Option(metavar="ID", help="With --waiting: only at those of it.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Have parked events read again, or facts that wait looked at again; within a minute."""
    if not chosen and not waiting:
        fail("name events, or --waiting", USAGE)
    if of is not None and not waiting:
        fail("--of goes with --waiting", USAGE)
    with ledger(read_only=False) as connection:
        again = retry(connection, chosen or [], operator())
        groups = look_now(connection, of) if waiting else 0
    if chosen and not again:
        fail("none of them is parked", USAGE)
    if of is not None and not groups:
        fail(f"nothing of {of!r} waits or is parked", USAGE)
    if as_json:
        show_json({"events": again, "groups": groups})
    else:
        console().print(
            f"[green]to be looked at again[/] within a minute: {len(again)} events, {groups} groups of facts"
        )


@payments_app.command("drop", epilog=examples("creditlane payments drop 17"))
def payments_drop(chosen: EventsArgument, as_json: JsonOption = False) -> None:
    """Give parked events up; they stay in the inbox, with who did it."""
    with ledger(read_only=False) as connection:
        dropped = drop(connection, chosen, operator())
    if not dropped:
        fail("none of them is parked", USAGE)
    if as_json:
        show_json({"events": dropped})
    else:
        console().print(f"[green]dropped[/] {', '.join(map(str, dropped))}")


@payments_app.command(
    "purchase",
    epilog=examples(
        "creditlane payments purchase cs_test_a1b2", "creditlane payments purchase stripe:in_1 --json | jq .operations"
    ),
)
def payments_purchase(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Any id of the provider's that it has: session, invoice, charge, refund, subscription; or what the "
            "ledger calls the purchase.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Explain a purchase or a subscription: what was said of it, what it led to, what is left of its credits."""
    with ledger() as connection:
        found = explain(connection, name)
    if found is None:
        fail(f"nothing is known of {name!r}; creditlane payments events shows what came", USAGE)
    if as_json:
        show_json(found)
    else:
        console().print(explanation_lines(found))


def explanation_lines(found: Explanation) -> RenderableType:
    """It for people."""
    facts = plain_table("when (UTC)", "fact", "says", "became", "event", right=("event",))
    for fact in found.facts:
        became = _coloured(fact.status) + ("" if fact.code is None else f" {said(f'{fact.code}: {fact.reason}')}")
        facts.add_row(instant(fact.occurred_at), said(f"{fact.kind} {fact.key}"), said(_says(fact.said)), became,
                      str(fact.event))  # fmt: skip
    operations = plain_table("sent (UTC)", "operation", "account", "what", "became", "charged", right=("charged",))
    for each in found.operations:
        became = _coloured(each.status) + ("" if each.code is None else f" {said(each.code)}")
        charged = "" if each.charged_micro is None else credits(format_amount(each.charged_micro))
        operations.add_row(instant(each.created_at), said(each.operation), said(each.account),
                           said(_does(each.name, each.arguments)), became, charged)  # fmt: skip
    numbers = ("gave", "left", "held", "used", "expired", "taken back")
    lots = plain_table("account", "grant", "source", *numbers, "expires (UTC)", right=("grant", *numbers))
    for lot in found.lots:
        amounts = (lot.granted_micro, lot.available_micro, lot.held_micro, lot.consumed_micro, lot.expired_micro,
                   lot.revoked_micro)  # fmt: skip
        lots.add_row(said(lot.account), str(lot.grant), said(lot.source),
                     *(credits(format_amount(amount)) for amount in amounts), instant(lot.expires_at))  # fmt: skip
    parts: list[RenderableType] = [facts_table([("known as", said(", ".join(found.names)))]), "", facts]
    parts += ["", operations] if found.operations else ["", "[dim]it led to nothing yet[/]"]
    parts += ["", lots] if found.lots else []
    return Group(*parts)


def _says(fact: dict[str, Any]) -> str:
    """What a fact says, in a few words."""
    words = []
    currency = fact.get("currency")
    amount = next((fact[name] for name in ("amount_minor", "paid_minor") if fact.get(name) is not None), None)
    if currency and amount is not None:
        words.append(str(Money(abs(amount), currency)) if amount >= 0 else f"-{Money(-amount, currency)}")
    words += [str(fact[name]) for name in ("stage", "status", "reason", "price") if fact.get(name)]
    words += [line["price"] for line in fact.get("lines", ())]
    if fact.get("period_start"):
        words.append(f"from {fact['period_start'][:10]}")
    return " ".join(words)


def _does(name: str, arguments: dict[str, Any]) -> str:
    """What an operation is for, in a few words."""
    if name == "credits.grant":
        return f"grant {arguments['amount']} {arguments['source']}"
    if name == "credits.claw_back":
        returned, paid = (Money(arguments[key], arguments["currency"]) for key in ("returned_minor", "paid_minor"))
        return f"claw back: {returned} of {paid}{', frozen' if arguments['frozen'] else ''}"
    plan = arguments.get("plan", "")
    start = str(arguments.get("period_start", ""))[:10]
    return " ".join(word for word in (name.partition(".")[2], plan, f"from {start}" if start else "") if word)


@payments_app.command(
    "reconcile",
    epilog=examples(
        "creditlane payments reconcile", "creditlane payments reconcile --deep --json | jq '.differences[]'"
    ),
)
def payments_reconcile(
    deep: Annotated[bool, typer.Option("--deep", help="Compare the provider's objects of weeks.")] = False,
    days: Annotated[
        int, typer.Option(min=1, max=3660, help="How far back what was refused, waits or is parked is reported.")
    ] = 31,
    wait: Annotated[
        float, typer.Option("--wait", min=1, metavar="SECONDS", help="How long to wait for the report.")
    ] = RECONCILE_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Compare the provider with the ledger, take up what was never heard of, and report in what they differ.

    A worker does it: the provider's key is its alone. Ends with 1 when there are differences.
    """
    report = _reconciled(deep, days, wait, quiet=as_json)
    if as_json:
        show_json(report)
    else:
        console().print(report_lines(report))
    if report["total"]:
        raise typer.Exit(FAULTS)


def _reconciled(deep: bool, days: int, wait: float, *, quiet: bool) -> dict[str, Any]:
    """A worker's report."""
    where = deployment()
    shown = Progress(SpinnerColumn(), TextColumn("comparing with the provider"), TimeElapsedColumn(),
                     console=console(stderr=True), transient=True, disable=quiet)  # fmt: skip
    with (
        CreditClient(where.broker_url, lanes=where.lanes, result_url=where.result_url, **where.tls_files) as client,
        shown,
    ):
        shown.add_task("")
        try:
            report: dict[str, Any] = client.query("payments.reconcile", PAYMENTS, wait, deep=deep, days=days)
        except (NoAnswerError, BrokerUnavailableError):
            raise
        except CreditlaneError as error:
            fail(f"the worker could not compare: {error}; its log says more", AWAY)
    return report


def report_lines(report: dict[str, Any]) -> RenderableType:
    """A comparison for people."""
    compared = ", ".join(f"{count:,} {kind}s" for kind, count in report["compared"].items()) or "nothing"
    since = report["since"]
    facts = [
        ("compared", said(compared) + ("" if since is None else f", from {since[:16].replace('T', ' ')} UTC on")),
        ("taken up", f"{report['taken']:,} that were never heard of"),
        ("differences", f"[red]{report['total']:,}[/]" if report["total"] else "[green]none[/]"),
    ]
    if since is None:
        facts.insert(0, ("provider", "[yellow]not asked: the workers have no API key (CREDITLANE_STRIPE_API_KEY)[/]"))
    if not report["differences"]:
        return facts_table(facts)
    table = plain_table("since (UTC)", "what", "account", "why")
    for each in report["differences"]:
        why = " ".join(part for part in (each["code"], each.get("reason") or "") if part)
        at = each.get("at")
        table.add_row("" if at is None else at[:16].replace("T", " "), said(each["what"]),
                      said(each.get("account") or ""), said(why))  # fmt: skip
    return Group(facts_table(facts), "", table)
