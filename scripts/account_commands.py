"""``creditlane account freeze | thaw | close | reopen | actions`` and ``creditlane lead``: accounts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from models.actions import actions
from models.reading import DEFAULT_PAGE
from scripts.command_parts import (
    USAGE,
    WAIT_SECONDS,
    AccountArgument,
    ActorOption,
    Commands,
    IdOption,
    JsonOption,
    LimitOption,
    WaitOption,
    examples,
    fail,
    ledger,
    operate,
    operator,
    parse_instant,
    show_json,
)
from scripts.showing import actions_table, console

WhyOption = Annotated[str, typer.Option("--reason", help="Why; kept with the operation.", show_default=False)]

lead_app = typer.Typer(
    cls=Commands,
    help="Leads: what one has left becomes its user's.",
    no_args_is_help=True,
    epilog=examples("creditlane lead convert visitor-7 alice"),
)


@lead_app.callback()
def _lead() -> None:
    """Leads: what one has left becomes its user's."""


@lead_app.command("convert", epilog=examples("creditlane lead convert visitor-7 alice"))
def lead_convert(
    lead: Annotated[str, typer.Argument(metavar="LEAD", help="The lead that has signed up.", show_default=False)],
    user: Annotated[str, typer.Argument(metavar="USER", help="The account it has now.", show_default=False)],
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Send what a lead has left to its user, and close the lead; what the user cannot take comes back."""
    operate(
        id, wait, as_json, lead, "convert",
        lambda client, identity, seconds: client.convert(lead, user, id=identity, wait=seconds),
    )  # fmt: skip


def _by_hand(deed: str, what: str) -> Callable[..., None]:
    """The command for one thing that an administrator does to an account.

    :param deed: of ``accounts.…``.
    :param what: what it does, for its help.
    """

    def command(
        account: AccountArgument,
        reason: WhyOption,
        actor: ActorOption = None,
        id: IdOption = None,
        wait: WaitOption = WAIT_SECONDS,
        as_json: JsonOption = False,
    ) -> None:
        name = f"accounts.{deed}"
        said = {"account": account, "actor": actor or operator(), "reason": reason}
        operate(
            id, wait, as_json, account, name,
            lambda client, identity, seconds: client.submit(name, identity, said, seconds),
        )  # fmt: skip

    command.__doc__ = what
    return command


FREEZE_EXAMPLES = examples("creditlane account freeze alice --reason 'card reported stolen'")
freeze_account = _by_hand("freeze", "Have an account give no credits out; what comes in, and what was begun, goes on.")

THAW_EXAMPLES = examples("creditlane account thaw alice --reason 'it was a mistake' --actor anna")
thaw_account = _by_hand("thaw", "Let a frozen account spend again.")

CLOSE_EXAMPLES = examples("creditlane account close alice --reason 'asked for by mail of 3 May'")
close_account = _by_hand(
    "close",
    """End an account: its plan ends now, and what is left of its credits is revoked.

    Refused while holds are open or credits on their way. A provider that bills for the plan is not told.
    """,
)

REOPEN_EXAMPLES = examples("creditlane account reopen alice --reason 'closed the wrong one'")
reopen_account = _by_hand("reopen", "Have a closed account take operations again; what was revoked stays so.")


ACTIONS_EXAMPLES = examples(
    "creditlane account actions",
    "creditlane account actions --actor anna --since 2027-01-01",
    "creditlane account actions --json | jq -r .reason",
)


def show_actions(
    actor: Annotated[str | None, typer.Option(help="Only by this one.", show_default=False)] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="INSTANT", help="Applied then or later; UTC; 30 days ago unless given.",
                     show_default=False),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Applied before; UTC.", show_default=False)
    ] = None,
    limit: LimitOption = DEFAULT_PAGE,
    before: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Only older ones: as the page before ends.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show what administrators did, in all accounts, the newest first: every operation with an actor.

    All operations of the span are read by their time until the page is full: in a large ledger give --since.
    """
    first = None if since is None else parse_instant(since)
    end = None if until is None else parse_instant(until)
    with ledger() as connection:
        try:
            page = actions(connection, actor=actor, since=first, until=end, limit=limit, before=before)
        except ValueError as error:
            fail(str(error), USAGE)
    if as_json:
        for action in page.actions:
            show_json(action)
        return
    out = console()
    if not page.actions:
        out.print(f"nothing since {page.since:%Y-%m-%d %H:%M} UTC")
        return
    out.print(actions_table(page.actions))
    if page.next_before is not None:
        out.print(f"[dim]older ones: --before '{page.next_before}'[/]")
