"""``creditlane leaderboard``, ``achievements`` and ``refunds``: who uses and earns most, and what was given back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from creditlane.reports import Achievements, Leaderboard, RefundLine, Refunds
from models.achievement_reading import achievements
from models.exporting import Column, Rows, Type
from models.leaderboard import leaderboard
from models.reading import DEFAULT_PAGE, MAX_PAGE
from models.refund_reading import ALL, MAX_LINES, refunds
from scripts.command_parts import (
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
from scripts.export_formats import Format, target, write
from scripts.reading_commands import parse_day
from scripts.showing import console, credits, facts_table, instant, plain_table, said

# --- Leaderboard -------------------------------------------------------------------------------------


class By(StrEnum):
    """What accounts are ranked by."""

    USED = "used"
    EARNED = "earned"


LEADERBOARD_EXAMPLES = examples(
    "creditlane leaderboard",
    "creditlane leaderboard --by earned --since 2027-01-01 --until 2027-02-01 --limit 10",
    "creditlane leaderboard --account alice --json | jq .own.rank",
)
SinceOption = Annotated[str | None, typer.Option(metavar="DAY", help="The first day, UTC.", show_default=False)]
UntilOption = Annotated[str | None, typer.Option(metavar="DAY", help="The day after the last.", show_default=False)]


def show_leaderboard(
    by: Annotated[By, typer.Option(help="What accounts are ranked by.")] = By.USED,
    since: SinceOption = None,
    until: UntilOption = None,
    account: Annotated[
        str | None, typer.Option(metavar="ACCOUNT", help="Whose rank to tell as well.", show_default=False)
    ] = None,
    limit: LimitOption = DEFAULT_PAGE,
    after: Annotated[
        str | None,
        typer.Option(metavar="ACCOUNT", help="Only what comes after it; a page's end says it.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the accounts that used the most credits, or earned the most without paying.

    Of all time unless days are given. Used is what was charged less what was given back. Earned are credits of the
    sources that count as earned in the catalog, and gifts received less gifts given. It reads the rows of all accounts,
    the usage of the days, or all lots of them: of a large ledger it takes seconds.
    """
    first, end = parse_day(since), parse_day(until)
    with ledger() as connection:
        try:
            found = leaderboard(
                connection, deployment().catalog, by=by.value, since=first, until=end, account=account, limit=limit,
                after=after,
            )  # fmt: skip
        except ValueError as error:
            fail(str(error), USAGE)
    if as_json:
        show_json(found)
    else:
        console().print(leaderboard_lines(found))


def leaderboard_lines(found: Leaderboard) -> RenderableType:
    """A leaderboard for people."""
    days = "all" if found.since is None else f"{found.since} to before {found.until} UTC"
    facts = [("days", days), ("in all", f"{found.total:f} {found.by} by {found.accounts:,} accounts")]
    table = plain_table("rank", "account", found.by, right=("rank", found.by))
    for line in found.lines:
        style = "bold" if found.own is not None and line.account == found.own.account else None
        table.add_row(f"{line.rank:,}", said(line.account), f"{line.credits:f}", style=style)
    parts: list[RenderableType] = [facts_table(facts), "", table]
    if found.own is not None:
        parts.append(f"[bold]{said(found.own.account)}[/] is number {found.own.rank:,}: {found.own.credits:f}")
    if found.next_after is not None:
        parts.append(f"[dim]more: --after {said(repr(found.next_after))}[/]")
    return Group(*parts)


# --- Achievements ------------------------------------------------------------------------------------


ACHIEVEMENTS_EXAMPLES = examples(
    "creditlane achievements alice", "creditlane achievements alice --json | jq '.goals[0]'"
)


def show_achievements(account: AccountArgument, as_json: JsonOption = False) -> None:
    """Show what an account has achieved and when, and how far it is with the rest."""
    with ledger() as connection:
        found = achievements(connection, account, deployment().catalog)
    if found is None:
        unknown_account(account)
    if as_json:
        show_json(found)
    else:
        console().print(achievement_lines(found))


def achievement_lines(found: Achievements) -> RenderableType:
    """Achievements for people."""
    table = plain_table("achievement", "credits", "reached (UTC)", right=("credits",))
    for trophy in found.reached:
        brought = f"{instant(trophy.reached_at)} by {said(trophy.operation)}"
        table.add_row(f"[green]{said(trophy.title)}[/]", f"+{trophy.credits:f}" if trophy.credits else "", brought)
    for goal in found.goals:
        unit = "credits used" if goal.measure == "used" else goal.measure
        progress = f"{goal.percent:g} %: {goal.done:f} of {goal.at:f} {unit}"
        table.add_row(said(goal.title), f"+{goal.credits:f}" if goal.credits else "", f"[dim]{progress}[/]")
    head = f"[bold]{said(found.account)}[/] has reached {len(found.reached)}, {len(found.goals)} to go"
    return Group(head, "", table) if found.reached or found.goals else Group(head)


# --- Refunds -----------------------------------------------------------------------------------------


class Apart(StrEnum):
    """What refunds are told apart by."""

    REASON = "reason"
    FEATURE = "feature"
    ACTOR = "actor"


REFUNDS_EXAMPLES = examples(
    "creditlane refunds --since 2027-01-01 --until 2027-02-01",
    "creditlane refunds --by reason --feature image",
    "creditlane refunds --account alice --json | jq .total.share_percent",
    "creditlane refunds --since 2027-01-01 --csv refunds.csv",
)
CSV_COLUMNS = tuple(
    Column(name, type, "")
    for name, type in (
        ("reason", Type.TEXT), ("feature", Type.TEXT), ("actor", Type.TEXT), ("refunds", Type.NUMBER),
        ("credits", Type.TEXT), ("charged", Type.TEXT), ("share_percent", Type.NUMBER),
    )
)  # fmt: skip


def show_refunds(
    account: Annotated[
        str | None, typer.Option(metavar="ACCOUNT", help="Only of this account.", show_default=False)
    ] = None,
    by: Annotated[
        list[Apart] | None, typer.Option(help="What is told apart; may be repeated.", show_default="all three")
    ] = None,
    since: SinceDayOption = None,
    until: UntilDayOption = None,
    feature: Annotated[
        str | None, typer.Option(help="Only of this feature; '' for charges that name none.", show_default=False)
    ] = None,
    limit: LimitOption = DEFAULT_PAGE,
    after: Annotated[
        int, typer.Option(min=0, max=MAX_LINES, metavar="LINES", help="Leave out so many lines.")
    ] = 0,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", help="Write all lines there as CSV; - is stdout, and then nothing else.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show what was given back and why: by reason, feature and by whom, beside what was charged for the feature.

    What callers gave back themselves has no actor.
    """
    asked: dict[str, Any] = {
        "by": ALL if not by else [each.value for each in by], "since": parse_day(since), "until": parse_day(until),
        "feature": feature,
    }  # fmt: skip
    with ledger() as connection:
        try:
            found = refunds(connection, account, limit=limit, after=after, **asked)
            if found is None:
                assert account is not None
                unknown_account(account)
            if csv_file is not None:
                asked |= {"since": found.since, "until": found.until}
                count = _write_csv(csv_file, _pages(connection, account, asked))
        except ValueError as error:
            fail(str(error), USAGE)
    if as_json:
        show_json(found)
    elif csv_file != Path("-"):
        console().print(refund_lines(found))
        if csv_file is not None:
            console().print(f"{count:,} rows in {said(csv_file)}")


def _pages(connection: Any, account: str | None, asked: dict[str, Any]) -> Iterator[list[RefundLine]]:
    """All lines, a page at a time."""
    after: int | None = 0
    while after is not None:
        page = refunds(connection, account, limit=MAX_PAGE, after=after, **asked)
        assert page is not None
        yield page.lines
        after = page.next_after


def _write_csv(file: Path, pages: Iterator[list[RefundLine]]) -> int:
    rows: Iterator[list[Sequence[Any]]] = (
        [
            (
                line.reason, line.feature, line.actor, line.refunds, f"{line.credits:f}", f"{line.charged:f}",
                line.share_percent,
            )
            for line in lines
        ]
        for lines in pages
    )  # fmt: skip
    try:
        with target(None if file == Path("-") else file) as stream:
            return write(Rows(CSV_COLUMNS, rows), Format.CSV, stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        fail(f"--csv: {file} cannot be written ({error.strerror})", USAGE)


def refund_lines(found: Refunds) -> RenderableType:
    """Refunds for people."""
    total = found.total
    share = "" if total.share_percent is None else f", [bold]{total.share_percent:g} %[/] of {total.charged:f} charged"
    refunds = "refund" if total.refunds == 1 else "refunds"
    facts = [
        ("account", "all" if found.account is None else f"[bold]{said(found.account)}[/]"),
        ("days", f"{found.since} to before {found.until} UTC"),
        ("given back", f"[bold]{credits(total.credits)}[/] in {total.refunds:,} {refunds}{share}"),
    ]
    none = {"reason": "none given", "feature": "none named", "actor": "callers"}
    numbers = ("refunds", "credits", "charged", "share")
    table = plain_table(*found.by, *numbers, right=numbers)
    for line in found.lines:
        told = [getattr(line, name) for name in found.by]
        keys = [said(value) if value else f"[dim]{none[name]}[/]" for name, value in zip(found.by, told, strict=True)]
        percent = "" if line.share_percent is None else f"{line.share_percent:g} %"
        table.add_row(*keys, f"{line.refunds:,}", f"{line.credits:f}", f"{line.charged:f}", percent)
    parts: list[RenderableType] = [facts_table(facts)]
    if found.lines:
        parts += ["", table]
    if found.next_after is not None:
        parts.append(f"[dim]more: --after {found.next_after}[/]")
    return Group(*parts)
