"""``creditlane notices``: what an account was told of, how it went out, and what was given up."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from creditlane.inbox import Inbox, Notice
from models.deliveries import Delivery, deliveries_of, parked, retry
from models.inbox import inbox
from models.reading import DEFAULT_PAGE, account_exists
from models.rules.catalog import Catalog
from scripts.command_parts import (
    USAGE,
    AccountArgument,
    JsonOption,
    LimitOption,
    deployment,
    examples,
    fail,
    ledger,
    show_json,
    unknown_account,
)
from scripts.showing import console, instant, plain_table, said
from workers.channels import Told
from workers.wording import subject

LIST = "list"


class ListUnlessSaid(TyperGroup):
    """A group in which ``notices ALICE`` is ``notices list ALICE``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; what is none is an account."""
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else [LIST, *args])


notices_app = typer.Typer(
    cls=ListUnlessSaid,
    help="What an account was told of; deliveries that were given up, and how to have them tried again.",
    no_args_is_help=True,
    epilog=examples(
        "creditlane notices alice --unread",
        "creditlane notices parked",
        "creditlane notices retry alice low_balance:17 --channel email",
    ),
)


@notices_app.command(
    LIST,
    epilog=examples("creditlane notices alice", "creditlane notices alice --unread --json | jq .notices"),
)
def notices_list(
    account: AccountArgument,
    unread: Annotated[bool, typer.Option("--unread", help="Only what was not read.")] = False,
    limit: LimitOption = DEFAULT_PAGE,
    before: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Only older ones; a page's end says it.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show an account's inbox, the newest notice first, and how each went out."""
    catalog = deployment().catalog
    with ledger() as connection:
        try:
            page = inbox(connection, account, catalog, limit=limit, before=before, unread=unread)
        except ValueError as error:
            fail(str(error), USAGE)
        if not page.notices and not account_exists(connection, account):
            unknown_account(account)
        ways = deliveries_of(connection, account, [notice.key for notice in page.notices])
    if as_json:
        show_json(page)
    else:
        _show(account, page, ways, catalog)


def _show(account: str, page: Inbox, ways: dict[str, list[Delivery]], catalog: Catalog) -> None:
    out = console()
    if page.notices:
        table = plain_table("when (UTC)", "what", "key", "read", "went out")
        for notice in page.notices:
            went = ", ".join(f"{way.channel} {_status(way)}" for way in ways.get(notice.key, []))
            read = instant(notice.read_at) or "[yellow]unread[/]"
            table.add_row(instant(notice.at), said(_subject(account, notice, catalog)), said(notice.key), read, went)
        out.print(table)
    out.print(f"[dim]{page.unread} unread of {page.total}[/]")
    if page.next_before is not None:
        out.print(f"[dim]older ones: --before {said(repr(page.next_before))}[/]")


def _subject(account: str, notice: Notice, catalog: Catalog) -> str:
    told = Told(
        account=account, key=notice.key, kind=notice.kind, at=notice.at, details=notice.details, email=None,
        locale=None, timezone=None,
    )  # fmt: skip
    return subject(told, catalog)


def _status(way: Delivery) -> str:
    colour = {"sent": "green", "parked": "red", "pending": "yellow"}.get(way.status, "dim")
    again = f", again {instant(way.next_attempt_at)}" if way.status == "pending" and way.attempts else ""
    return f"[{colour}]{way.status}[/]{again}"


@notices_app.command("parked", epilog=examples("creditlane notices parked", "creditlane notices parked --json"))
def notices_parked(limit: LimitOption = DEFAULT_PAGE, as_json: JsonOption = False) -> None:
    """Show deliveries that were given up, and why."""
    with ledger() as connection:
        found = parked(connection, limit=limit)
    if as_json:
        for each in found:
            show_json(each)
        return
    out = console()
    if not found:
        out.print("nothing was given up")
        return
    table = plain_table("account", "key", "channel", "attempts", "error", right=("attempts",))
    for each in found:
        table.add_row(said(each.account), said(each.key), said(each.channel), str(each.attempts), said(each.error))
    out.print(table)
    out.print("[dim]have one tried again: creditlane notices retry ACCOUNT KEY[/]")


@notices_app.command(
    "retry",
    epilog=examples(
        "creditlane notices retry alice low_balance:17", "creditlane notices retry alice depleted:9 --channel webhook"
    ),
)
def notices_retry(
    account: AccountArgument,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The notice's.", show_default=False)],
    channel: Annotated[
        str | None, typer.Option(help="Only by this one, such as email; all unless given.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Have a notice tried again by every channel that has not sent it; it goes out within a minute."""
    with ledger(read_only=False) as connection:
        channels = retry(connection, account, key, channel)
    if not channels:
        fail(f"nothing to try again: {key!r} of {account!r} was sent, or was never begun", USAGE)
    if as_json:
        show_json({"account": account, "key": key, "channels": channels})
    else:
        console().print(f"[green]to be tried again[/] by {said(', '.join(channels))}, within a minute")
