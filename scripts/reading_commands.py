"""``creditlane usage``, ``forecast`` and ``explain``: what credits were spent on, how long they last, and why."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated

import typer
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table

from creditlane.amounts import parse_amount
from creditlane.reports import (
    FORECAST_DAYS,
    MAX_FORECAST_DAYS,
    BalanceExplained,
    Buckets,
    Forecast,
    GrantExplained,
    Movement,
    OperationExplained,
    Usage,
    UsageSums,
)
from models.explaining import MAX_GRANT, explain_balance, explain_grant, explain_operation
from models.forecast import forecast
from models.reading import DEFAULT_PAGE, account_exists
from models.usage_reading import usage
from scripts.command_parts import (
    REFUSED,
    USAGE,
    AccountArgument,
    JsonOption,
    LimitOption,
    SinceDayOption,
    UntilDayOption,
    deployment,
    examples,
    fail,
    ledger,
    show_json,
    unknown_account,
)
from scripts.showing import chart, console, credits, facts_table, instant, plain_table, said, short, span

BAR_COLUMNS = 40
"""How long the longest bar is."""

FILLED_DAYS = 92
"""Of a longer span the days without use are left out."""

LARGEST_BIGINT = 2**63 - 1


class By(StrEnum):
    """What usage is summed by."""

    FEATURE = "feature"
    MEMBER = "member"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


# --- Usage -------------------------------------------------------------------------------------------


USAGE_EXAMPLES = examples(
    "creditlane usage alice",
    "creditlane usage alice --by day --since 2027-01-01 --until 2027-02-01",
    "creditlane usage studio --by member --feature image",
    "creditlane usage --by month --since 2026-01-01 --json | jq .total",
)


def show_usage(
    account: Annotated[
        str | None,
        typer.Argument(metavar="[ACCOUNT]", help="Whose usage; of all accounts unless given.", show_default=False),
    ] = None,
    by: Annotated[By, typer.Option(help="What is summed.")] = By.FEATURE,
    since: SinceDayOption = None,
    until: UntilDayOption = None,
    feature: Annotated[
        str | None, typer.Option(help="Only of this feature; '' for charges that name none.", show_default=False)
    ] = None,
    member: Annotated[str | None, typer.Option(help="Only of this member of a pool.", show_default=False)] = None,
    limit: LimitOption = DEFAULT_PAGE,
    after: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Only what comes after it; a page's end says it.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what credits were spent on, compared with as many days before.

    A charge is of the day on which it occurred, what is given back of the day on which that was done.
    """
    first, end = parse_day(since), parse_day(until)
    with ledger() as connection:
        try:
            found = usage(
                connection, account, by=by.value, since=first, until=end, feature=feature, member=member, limit=limit,
                after=after,
            )  # fmt: skip
        except ValueError as error:
            fail(str(error), USAGE)
    if found is None:
        assert account is not None
        unknown_account(account)
    if as_json:
        show_json(found)
    else:
        console().print(usage_lines(found, whole=after is None))


def parse_day(text: str | None) -> date | None:
    """Read a day such as ``2027-01-31``.

    :raises typer.BadParameter: with what to write instead.
    """
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no day; write 2027-01-31") from None


def usage_lines(found: Usage, *, whole: bool = True) -> RenderableType:
    """Usage for people: the sums, and a bar for each line.

    :param whole: whether it is the first page.
    """
    total, used = found.total, found.utilisation
    last = found.until - timedelta(days=1)
    charges = "charge" if total.charges == 1 else "charges"
    facts = [
        ("account", "all" if found.account is None else f"[bold]{said(found.account)}[/]"),
        ("days", f"{found.since} to {last} UTC ({(found.until - found.since).days})"),
        ("used", f"[bold]{total.used:f}[/] in {total.charges:,} {charges}{_given_back(total)}"),
        ("before", f"{total.used_before:f} from {found.before} on{_change(total)}"),
    ]
    if used is not None and used.percent is not None:
        facts.append(
            ("utilisation", f"{used.percent:g} %: {used.used:f} used, {used.left:f} left, {used.expired:f} expired")
        )
    parts: list[RenderableType] = [facts_table(facts)]
    if found.lines:
        parts += ["", _usage_table(found, filled=whole and found.next_after is None)]
    if found.next_after is not None:
        parts.append(f"[dim]more: --after {said(repr(found.next_after))}[/]")
    return Group(*parts)


def _given_back(sums: UsageSums) -> str:
    return f", {sums.refunded:f} given back" if sums.refunded else ""


def _change(sums: UsageSums) -> str:
    return "" if sums.change_percent is None else f" ([bold]{sums.change_percent:+g} %[/])"


def _usage_table(found: Usage, *, filled: bool) -> Table:
    compared = any(line.used_before is not None for line in found.lines)
    counted = any(line.quantity is not None for line in found.lines)
    numbers = ["charges", *(["quantity"] if counted else []), "credits", "given back"]
    numbers += ["before", "change"] if compared else []
    table = plain_table(found.by, *numbers, "used", right=numbers)
    table.columns[-1].no_wrap = True
    top = max(Decimal(1), *(line.used for line in found.lines))
    lines = {line.key: line for line in found.lines}
    keys = list(lines)
    days = (found.until - found.since).days
    if filled and found.by == "day" and days <= FILLED_DAYS:
        keys = [(found.since + timedelta(days=day)).isoformat() for day in range(days)]
    for key in keys:
        line = lines.get(key)
        if line is None:
            table.add_row(key, "", *[""] * (len(numbers) - 1), "")
            continue
        cells = [said(key) if key else "[dim]none named[/]", f"{line.charges:,}"]
        if counted:
            cells.append("" if line.quantity is None else f"{line.quantity:f}")
        cells += [f"{line.credits:f}", f"{line.refunded:f}" if line.refunded else ""]
        if compared:
            change = "" if line.change_percent is None else f"{line.change_percent:+g} %"
            cells += [f"{line.used_before:f}", change]
        bar = Bar(float(top), 0, max(0.0, float(line.used)), width=BAR_COLUMNS, color="cyan")
        table.add_row(*cells, bar)
    return table


# --- Forecast ----------------------------------------------------------------------------------------


FORECAST_EXAMPLES = examples(
    "creditlane forecast alice",
    "creditlane forecast alice --days 30 --pace 12.5",
    "creditlane forecast alice --unpaid --json | jq .runs_out_at",
)


def show_forecast(
    account: AccountArgument,
    days: Annotated[int, typer.Option(min=1, max=MAX_FORECAST_DAYS, help="How far ahead.")] = FORECAST_DAYS,
    pace: Annotated[
        str | None,
        typer.Option(
            metavar="CREDITS", help="Credits spent a day; as in the last 30 unless given.", show_default=False
        ),
    ] = None,
    unpaid: Annotated[bool, typer.Option("--unpaid", help="As if no payment for the plan came.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how long credits last at the present pace, and how many will end unused. Nothing is written."""
    where = deployment()
    with ledger() as connection:
        try:
            micro = None if pace is None else parse_amount(pace)
            found = forecast(connection, account, where.catalog, days=days, pace=micro, paid=not unpaid)
        except ValueError as error:
            fail(str(error), USAGE)
    if found is None:
        unknown_account(account)
    if as_json:
        show_json(found)
    else:
        console().print(forecast_lines(found))


def forecast_lines(found: Forecast) -> RenderableType:
    """A forecast for people, with the balance ahead as a chart."""
    facts = [
        ("account", f"[bold]{said(found.account)}[/]"),
        ("available", f"[bold]{found.available:f}[/]"),
        ("pace", f"{found.pace:f} credits a day"),
    ]
    if found.depleted_at is not None:
        left = span((found.depleted_at - found.as_of).total_seconds())
        facts.append(("lasts", f"{left} if nothing comes or ends, until {instant(found.depleted_at)} UTC"))
    out = f"not by {found.until:%Y-%m-%d}"
    facts.append(("runs out", out if found.runs_out_at is None else f"[red]{instant(found.runs_out_at)} UTC[/]"))
    facts.append(("expires unused", f"{found.expiring_total:f}"))
    facts += [("", f"{lapse.amount:f} on {instant(lapse.at)} UTC") for lapse in found.expiring[:SHOWN_LAPSES]]
    if len(found.expiring) > SHOWN_LAPSES:
        facts.append(("", f"[dim]and {len(found.expiring) - SHOWN_LAPSES} more; --json has all[/]"))
    if not found.paid:
        facts.append(("payments", "none arrives"))
    advice = found.advice
    if advice is not None and advice.pack is not None:
        pack = advice.pack
        facts.append(("advice", f"{pack.count} × {said(pack.title)} ({credits(pack.credits)}) for {said(pack.price)}"))
    if advice is not None and advice.plan is not None:
        facts.append(("advice", f"the plan {said(advice.plan.title)} for {said(advice.plan.price)}"))
    for each in () if advice is None else advice.alternatives:
        price = "free" if each.free else "cheaper"
        facts.append(("advice", f"{said(each.alternative_title)} in place of {said(each.title)}, {price}"))
    return Group(facts_table(facts), "", chart([(day.at, day.available) for day in found.daily]))


SHOWN_LAPSES = 5
"""Dates of expiry that are shown; the JSON has all."""


# --- Explanation -------------------------------------------------------------------------------------


EXPLAIN_EXAMPLES = examples(
    "creditlane explain alice",
    "creditlane explain alice order-991",
    "creditlane explain alice --grant 3",
    "creditlane explain alice --grant 3 --after 120 --json | jq '.movements[] | .operation'",
)


def show_explanation(
    account: AccountArgument,
    operation: Annotated[
        str | None, typer.Argument(metavar="[OPERATION]", help="An operation's id.", show_default=False)
    ] = None,
    grant: Annotated[
        int | None, typer.Option(min=1, max=MAX_GRANT, help="A grant's number.", show_default=False)
    ] = None,
    limit: LimitOption = DEFAULT_PAGE,
    after: Annotated[
        int, typer.Option(min=0, max=LARGEST_BIGINT - 1, metavar="SEQ", help="Only movements after it.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show why a balance is what it is; which grants an operation took from; or the life of a grant."""
    if operation is not None and grant is not None:
        fail("an operation or --grant: give one of the two", USAGE)
    found: BalanceExplained | OperationExplained | GrantExplained | None
    with ledger() as connection:
        if operation is not None:
            found = explain_operation(connection, account, operation, limit=limit, after=after)
        elif grant is not None:
            found = explain_grant(connection, account, grant, limit=limit, after=after)
        else:
            found = explain_balance(connection, account, deployment().catalog)
        if found is None and not account_exists(connection, account):
            unknown_account(account)
    if found is None:
        fail(f"{account!r} has no {f'operation {operation!r}' if grant is None else f'grant {grant}'}", REFUSED)
    if as_json:
        show_json(found)
    elif isinstance(found, BalanceExplained):
        console().print(balance_lines(found))
    elif isinstance(found, OperationExplained):
        console().print(operation_lines(found))
    else:
        console().print(grant_lines(found))


def balance_lines(found: BalanceExplained) -> RenderableType:
    """A balance for people: what came in and went, in all and by grant."""
    facts = [("account", f"[bold]{said(found.account)}[/]"), ("available", f"[bold]{found.available:f}[/]")]
    for name in ("upcoming", "frozen", "debt"):
        amount = getattr(found, name)
        if amount:
            facts.append((name, f"{amount:f}"))
    facts += [("came in", _named(found.total, CAME)), ("went", _named(found.total, WENT))]
    facts.append(("is there", _named(found.total, LIES)))
    names = [name for name in (*CAME, *WENT, *LIES) if getattr(found.total, name)]
    shown = [name.replace("_", " ") for name in names]
    table = plain_table("grant", "source", *shown, "until", right=("grant", *shown))
    for lot in found.lots:
        until = "never" if lot.expires_at is None else instant(lot.expires_at)[:16]
        table.add_row(str(lot.grant), said(lot.source), *_cells(lot, names), until)
    if found.closed_grants:
        table.add_row("", f"{found.closed_grants:,} used up", *_cells(found.closed, names), "", style="dim")
    table.add_row("", "all", *_cells(found.total, names), "", style="bold")
    return Group(facts_table(facts), "", table)


CAME = ("granted", "received", "restored")
WENT = ("consumed", "expired", "revoked", "sent")
LIES = ("available", "held", "in_transit")


def _named(buckets: Buckets, names: Sequence[str]) -> str:
    amounts = ((name.replace("_", " "), getattr(buckets, name)) for name in names)
    return ", ".join(f"{amount:f} {name}" for name, amount in amounts if amount) or "nothing"


def _cells(buckets: Buckets, names: Sequence[str]) -> list[str]:
    amounts = (getattr(buckets, name) for name in names)
    return [f"{amount:f}" if amount else "" for amount in amounts]


def operation_lines(found: OperationExplained) -> RenderableType:
    """An operation for people, with what it took from or gave to each grant."""
    facts = [
        ("operation", f"[bold]{said(found.operation)}[/]  {said(short(found.name))}"),
        ("account", said(found.account)),
        ("applied", f"{instant(found.applied_at)} UTC"),
        ("status", "[green]applied[/]" if found.code is None else f"[red]{said(found.code)}[/]"),
    ]
    if found.feature is not None:
        measured = "" if found.quantity is None else f" × {found.quantity:f}"
        facts.append(("feature", f"{said(found.feature)}{measured}"))
    if found.member is not None:
        facts.append(("member", said(found.member)))
    facts.append(("charged", f"{found.charged:f}"))
    if found.given_back:
        facts.append(("given back", f"{found.given_back:f}"))
    return Group(facts_table(facts), *_movements(found.movements, found.next_after, of_grant=False))


def grant_lines(found: GrantExplained) -> RenderableType:
    """A grant for people, with its life."""
    lot = found.lot
    scope = "everything" if lot.features is None else ", ".join(lot.features)
    facts = [
        ("grant", f"[bold]{lot.grant}[/] of {said(found.account)}"),
        ("source", said(lot.source) + (f", continues grant {lot.origin}" if lot.origin is not None else "")),
        ("for", said(scope)),
        ("from", f"{instant(lot.effective_at)} UTC"),
        ("until", "never" if lot.expires_at is None else f"{instant(lot.expires_at)} UTC"),
        ("came in", _named(lot, CAME)),
        ("went", _named(lot, WENT)),
        ("is there", _named(lot, LIES)),
    ]
    if lot.purchase is not None:
        facts.insert(2, ("purchase", said(lot.purchase)))
    return Group(facts_table(facts), *_movements(found.movements, found.next_after, of_grant=True))


def _movements(movements: Sequence[Movement], next_after: int | None, *, of_grant: bool) -> list[RenderableType]:
    """Movements as a table, and where the next page begins.

    :param of_grant: whether all are of one grant: then each is told with its operation, otherwise with its grant.
    """
    parts: list[RenderableType] = []
    if movements:
        who = ("operation", "for") if of_grant else ("grant", "source", "priority", "until")
        table = plain_table("at (UTC)", "what", "credits", *who, right=("credits", "grant", "priority"))
        for each in movements:
            if of_grant:
                cause = "time" if each.operation is None else f"{short(each.name or '')} {each.operation}"
                why = " by ".join(part for part in (each.feature, each.member) if part) or each.refers_to or ""
                rest = [said(cause), said(why)]
            else:
                until = "never" if each.expires_at is None else instant(each.expires_at)[:16]
                rest = [str(each.grant), said(each.source), str(each.priority), until]
            table.add_row(instant(each.at), said(each.kind.replace("_", " ")), f"{each.amount:f}", *rest)
        parts += ["", table]
    if next_after is not None:
        parts.append(f"[dim]more: --after {next_after}[/]")
    return parts
