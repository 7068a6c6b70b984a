"""``creditlane pools``: who may use a pool, how much of it, and who did."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from creditlane.reports import Pool, PoolMember
from models.pool_reading import pool
from models.reading import DEFAULT_PAGE
from scripts.command_parts import (
    REFUSED,
    USAGE,
    WAIT_SECONDS,
    IdOption,
    JsonOption,
    LimitOption,
    SinceDayOption,
    UntilDayOption,
    WaitOption,
    deployment,
    examples,
    fail,
    ledger,
    operate,
    show_json,
)
from scripts.reading_commands import parse_day
from scripts.showing import console, facts_table, instant, plain_table, said

pools_app = typer.Typer(
    help="Pools: look at one and its members, list a member with a limit, remove one.",
    no_args_is_help=True,
    epilog=examples("creditlane pools show studio", "creditlane pools set-member studio alice --limit 100"),
)

PoolArgument = Annotated[str, typer.Argument(metavar="POOL", help="An account of kind pool.", show_default=False)]
MemberArgument = Annotated[str, typer.Argument(metavar="MEMBER", help="Who uses it.", show_default=False)]


class Period(StrEnum):
    """What a limit is for."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    TOTAL = "total"


@pools_app.command(
    "show",
    epilog=examples(
        "creditlane pools show studio",
        "creditlane pools show studio --since 2027-01-01 --until 2027-02-01",
        "creditlane pools show studio --json | jq '.members[] | select(.left == \"0\")'",
    ),
)
def pools_show(
    account: PoolArgument,
    since: SinceDayOption = None,
    until: UntilDayOption = None,
    limit: LimitOption = DEFAULT_PAGE,
    after: Annotated[
        str | None,
        typer.Option(metavar="MEMBER", help="Only members after it; a page's end says it.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a pool and its members: what each may use in its period, what it used, and its share of some days."""
    first, end = parse_day(since), parse_day(until)
    with ledger() as connection:
        try:
            found = pool(connection, account, deployment().catalog, since=first, until=end, limit=limit, after=after)
        except ValueError as error:
            fail(str(error), USAGE)
    if found is None:
        fail(f"{account!r} is no pool; open one with: creditlane account open {account} --kind pool", REFUSED)
    if as_json:
        show_json(found)
    else:
        console().print(pool_lines(found))


def pool_lines(found: Pool) -> RenderableType:
    """A pool for people."""
    last = found.until - timedelta(days=1)
    facts = [
        ("pool", f"[bold]{said(found.account)}[/]"),
        ("available", f"[bold]{found.available:f}[/]" + (f", {found.held:f} held" if found.held else "")),
        ("members", "only those that are listed" if found.open_to == "listed" else "whoever is named as one"),
        ("days", f"{found.since} to {last} UTC ({(found.until - found.since).days})"),
        ("charged", f"{found.charged:f}" + (f", {found.own:f} of it for no member" if found.own else "")),
    ]
    parts: list[RenderableType] = [facts_table(facts)]
    if found.members:
        numbers = ("limit", "used", "left", "charged", "share")
        table = plain_table("member", "", "limit", "each", "used", "left", "until (UTC)", "charged", "share",
                            right=numbers)  # fmt: skip
        for member in found.members:
            table.add_row(*_cells(member))
        parts += ["", table]
    if found.next_after is not None:
        parts.append(f"[dim]more: --after {said(repr(found.next_after))}[/]")
    return Group(*parts)


def _cells(member: PoolMember) -> tuple[str, ...]:
    amounts = ("" if each is None else f"{each:f}" for each in (member.limit, member.used, member.left))
    limit, used, left = amounts
    return (
        said(member.member),
        {"removed": "[red]removed[/]", "unlisted": "[dim]unlisted[/]"}.get(member.status, ""),
        limit,
        "" if member.limit is None or member.period is None else member.period,
        used,
        f"[red]{left}[/]" if left == "0" else left,
        instant(member.period_end),
        f"{member.charged:f}",
        "" if member.share_percent is None else f"{member.share_percent:g} %",
    )


@pools_app.command(
    "set-member",
    epilog=examples(
        "creditlane pools set-member studio alice --limit 100",
        "creditlane pools set-member studio bob --limit 2.5 --period day",
        "creditlane pools set-member studio carol",
    ),
)
def pools_set_member(
    account: PoolArgument,
    member: MemberArgument,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit", metavar="CREDITS", help="What it may use; the catalog's limit unless given.", show_default=False
        ),
    ] = None,
    period: Annotated[Period, typer.Option(help="How long that is for.")] = Period.MONTH,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """List a member of a pool, or change its limit; what it used in a period of the same kind stays."""
    operate(
        id, wait, as_json, account, "pools.set_member",
        lambda client, identity, seconds: client.set_member(
            account, member, id=identity, limit=limit, period=period.value, wait=seconds
        ),
    )  # fmt: skip


@pools_app.command("remove-member", epilog=examples("creditlane pools remove-member studio alice"))
def pools_remove_member(
    account: PoolArgument,
    member: MemberArgument,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Take a member off a pool's list: it uses the pool no more. Its open holds can still be captured or released."""
    operate(
        id, wait, as_json, account, "pools.remove_member",
        lambda client, identity, seconds: client.remove_member(account, member, id=identity, wait=seconds),
    )  # fmt: skip
