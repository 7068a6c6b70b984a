"""``creditlane referrals``: an account's referral code, who referred it, and whom it referred."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group, RenderableType

from creditlane.codes import Code
from creditlane.reports import Referee, Referrals
from models.reading import DEFAULT_PAGE
from models.referral_reading import referrals
from scripts.command_parts import (
    USAGE,
    WAIT_SECONDS,
    AccountArgument,
    IdOption,
    JsonOption,
    LimitOption,
    WaitOption,
    examples,
    fail,
    ledger,
    operate,
    show_json,
    unknown_account,
)
from scripts.showing import console, facts_table, instant, plain_table, said

referrals_app = typer.Typer(
    help="Referrals: give an account its code, claim one, look at who was referred.",
    no_args_is_help=True,
    epilog=examples("creditlane referrals issue alice", "creditlane referrals show alice"),
)


@referrals_app.command(
    "issue", epilog=examples("creditlane referrals issue alice", "creditlane referrals issue alice --code ALICE-2026")
)
def referrals_issue(
    account: AccountArgument,
    code: Annotated[
        str | None, typer.Option("--code", help="4 to 64 letters and digits; made up unless given.", show_default=False)
    ] = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Give an account the code by which it refers others; it has one, for ever."""
    operate(
        id, wait, as_json, account, "referrals.issue",
        lambda client, identity, seconds: client.issue_referral(account, id=identity, code=code, wait=seconds),
    )  # fmt: skip


@referrals_app.command("claim", epilog=examples("creditlane referrals claim bob ALICE-2026"))
def referrals_claim(
    account: AccountArgument,
    code: Annotated[str, typer.Argument(metavar="CODE", help="That of who referred it.", show_default=False)],
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Say by which code an account was referred; that happens once."""
    operate(
        id, wait, as_json, account, "referrals.claim",
        lambda client, identity, seconds: client.claim_referral(account, code, id=identity, wait=seconds),
    )  # fmt: skip


@referrals_app.command(
    "show",
    epilog=examples("creditlane referrals show alice", "creditlane referrals show alice --json | jq .referees"),
)
def referrals_show(
    account: AccountArgument,
    limit: LimitOption = DEFAULT_PAGE,
    before: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Only earlier ones; a page's end says it.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show an account's code, its referrer, and those whom it referred, the latest first."""
    with ledger() as connection:
        try:
            found = referrals(connection, account, limit=limit, before=before)
        except ValueError as error:
            fail(str(error), USAGE)
    if found is None:
        unknown_account(account)
    elif as_json:
        show_json(found)
    else:
        console().print(_lines(found))


def _lines(found: Referrals) -> RenderableType:
    facts = [
        ("account", f"[bold]{said(found.account)}[/]"),
        ("code", "none yet" if found.code is None else f"[bold]{said(found.code)}[/]"),
    ]
    if found.referrer is not None and found.claimed_code is not None:
        by = f"{said(found.referrer)}, by {said(found.claimed_code)}, {instant(found.claimed_at)} UTC"
        facts.append(("referred by", by))
        got = "waits for a purchase" if found.settled_at is None else f"{instant(found.settled_at)} UTC"
        facts.append(("its own bonus", got))
    facts.append(("rewarded for", str(found.rewarded)))
    parts: list[RenderableType] = [facts_table(facts)]
    if found.referees:
        table = plain_table("referred", "claimed (UTC)", "became of it", "when (UTC)", "credits", right=("credits",))
        for each in found.referees:
            when = instant(each.rewarded_at or each.settled_at)
            table.add_row(said(each.account), instant(each.claimed_at), _status(each), when, each.reward)
        parts += ["", table]
    if found.next_before is not None:
        parts.append(f"[dim]earlier ones: --before {said(repr(found.next_before))}[/]")
    return Group(*parts)


def _status(referee: Referee) -> str:
    refused = referee.status in set(Code)
    colour = "red" if refused else {"rewarded": "green"}.get(referee.status, "yellow")
    return f"[{colour}]{referee.status}[/]"
