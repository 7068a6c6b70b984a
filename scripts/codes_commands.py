"""``creditlane codes``: issue gift codes, one or half a million, redeem, look at and withdraw them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from uuid import uuid4

import typer
from psycopg import Connection

from creditlane.client import CreditClient
from creditlane.contract import MAX_CODES, MAX_USES, Result
from creditlane.errors import BrokerUnavailableError, NoAnswerError
from creditlane.gift_codes import new_code, normal_code, shown
from models.code_reading import CodeSummary, code_summary, codes_of, uses_of
from models.reading import DEFAULT_PAGE, MAX_PAGE, account_exists
from scripts.command_parts import (
    AWAY,
    NO_ANSWER,
    REFUSED,
    USAGE,
    WAIT_SECONDS,
    AccountArgument,
    CountProgress,
    IdOption,
    JsonOption,
    LimitOption,
    WaitOption,
    deployment,
    examples,
    fail,
    ledger,
    operate,
    parse_instant,
    parse_span,
    show_json,
    unknown_account,
)
from scripts.export_formats import target
from scripts.showing import console, facts_table, instant, plain_table, refusal, said

MAX_COUNT = 1_000_000
"""Codes that one command issues."""

CSV_COLUMNS = ("code", "account", "credits", "uses", "operation")

codes_app = typer.Typer(
    help="Gift codes: issue, redeem, look at, withdraw.",
    no_args_is_help=True,
    epilog=examples(
        "creditlane codes issue --account alice --amount 10",
        "creditlane codes issue --account alice --amount 10 --count 500 --csv codes.csv",
        "creditlane codes redeem bob 7K3M-9QXA-W2ZD-5HTE",
        "creditlane codes show 7K3M-9QXA-W2ZD-5HTE",
    ),
)

CodeArgument = Annotated[str, typer.Argument(metavar="CODE", help="As it was typed.", show_default=False)]
AdministratorOption = Annotated[
    str | None,
    typer.Option("--actor", help="The administrator who does it, with --reason.", show_default=False),
]
WhyOption = Annotated[str | None, typer.Option("--reason", help="Why; goes with --actor.", show_default=False)]


@codes_app.command(
    "issue",
    epilog=examples(
        "creditlane codes issue --account alice --amount 10 --message 'Happy birthday'",
        "creditlane codes issue --account alice --amount 10 --count 500 --uses 1 --csv codes.csv",
        "creditlane codes issue --account shop --amount 5 --uses 1000 --code SPRING27 --expires-in 30d "
        "--actor ann --reason 'campaign 12'",
    ),
)
def codes_issue(
    account: Annotated[str, typer.Option(help="Who pays for them.", show_default=False)],
    amount: Annotated[str, typer.Option(metavar="CREDITS", help="Of each use.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="How many codes.")] = 1,
    uses: Annotated[int, typer.Option(min=1, max=MAX_USES, help="How often each may be redeemed.")] = 1,
    per_account: Annotated[int, typer.Option(min=1, max=MAX_USES, help="How often by one account.")] = 1,
    code: Annotated[str | None, typer.Option(help="A text of your own for one code.", show_default=False)] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Until when; UTC. As the catalog says.", show_default=False)
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="DURATION", help="For how long, such as 90d.", show_default=False)
    ] = None,
    credits_expire_in: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How long redeemed credits live; with --actor.", show_default=False),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="What the credits are called; with --actor.", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="A word to who redeems it.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Where the codes are written before any is issued; given again, the same command goes on with it.",
            show_default=False,
        ),
    ] = None,
    actor: AdministratorOption = None,
    reason: WhyOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Make gift codes. The account pays for all their uses at once; an administrator's cost nobody anything."""
    end = None if expires_at is None else parse_instant(expires_at)
    seconds = None if expires_in is None else parse_span(expires_in)
    life = None if credits_expire_in is None else parse_span(credits_expire_in)

    def send(client: CreditClient, codes: list[str], identity: str, waited: float | None) -> Result | None:
        return client.issue_codes(
            account, codes, amount, id=identity, uses=uses, per_account=per_account, expires_at=end,
            expires_in=seconds, credits_expire_in=life, source=source, message=message, actor=actor, reason=reason,
            wait=waited,
        )  # fmt: skip

    if file is None:
        if count > 1:
            fail("many codes are written to a file before any is issued: add --csv FILE", USAGE)
        text = new_code() if code is None else normal_code(code)
        console(stderr=True).print(f"code {shown(text)}")
        operate(id, wait, as_json, account, "codes.issue", lambda client, identity, waited: send(
            client, [text], identity, waited))  # fmt: skip
        return
    if code is not None or id is not None:
        fail("--code and --id are of one code; those of a file have their own", USAGE)
    if not file.exists():
        _write(file, [(new_code(), account, amount, uses) for _ in range(count)])
    blocks = list(_blocks(file, account, amount, uses))
    total = sum(len(codes) for _, codes in blocks)
    where = deployment()
    done = again = 0
    try:
        with (
            CreditClient(where.broker_url, lanes=where.lanes, result_url=where.result_url, **where.tls_files) as client,
            CountProgress("issuing", "codes", as_json) as progress,
        ):
            for identity, codes in blocks:
                result = _issue(client, send, codes, identity, wait or WAIT_SECONDS)
                if not result.applied:
                    fail(
                        f"{refusal(result)} {done:,} of {total:,} codes are issued; what is right again, give the same "
                        f"command again: it goes on with {file}",
                        REFUSED,
                    )
                done += len(codes)
                again += len(codes) if result.replayed else 0
                progress(done, total)
    except (NoAnswerError, BrokerUnavailableError) as error:
        fail(
            f"{error}. {done:,} of {total:,} codes are known to be issued; give the same command again: it goes on "
            f"with {file}, and none is issued twice",
            NO_ANSWER if isinstance(error, NoAnswerError) else AWAY,
        )
    if as_json:
        show_json({"account": account, "codes": done, "before": again, "file": str(file)})
    else:
        console().print(
            f"[green]issued[/] {done - again:,} codes, {again:,} were before; they stand in {said(str(file))}"
        )


Send = Callable[[CreditClient, list[str], str, float | None], Result | None]


def _issue(client: CreditClient, send: Send, codes: list[str], identity: str, wait: float) -> Result:
    """Issue a block; one that was refused before is tried under another id, since an id has one answer for ever."""
    attempt = 1
    while True:
        result = send(client, codes, identity if attempt == 1 else f"{identity}.{attempt}", wait)
        assert result is not None
        if result.applied or not result.replayed:
            return result
        attempt += 1


def _write(file: Path, rows: list[tuple[str, str, str, int]]) -> None:
    """Write the codes with the ids that they are issued under; whole and on the disk, or not at all."""
    ids = [f"codes-{uuid4()}" for _ in range(0, len(rows), MAX_CODES)]
    lines = ((shown(code), *rest, ids[number // MAX_CODES]) for number, (code, *rest) in enumerate(rows))
    with target(file) as stream:
        _put(stream, [CSV_COLUMNS])
        _put(stream, lines)


def _blocks(file: Path, account: str, amount: str, uses: int) -> Iterator[tuple[str, list[str]]]:
    """The codes of a file by the id that they are issued under."""
    blocks: dict[str, list[str]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream)
        if tuple(next(rows, ())) != CSV_COLUMNS:
            fail(f"{file} is no file of codes: its columns are not {', '.join(CSV_COLUMNS)}", USAGE)
        for code, *of, identity in rows:
            if of != [account, amount, str(uses)]:
                fail(f"{file} has codes of {', '.join(of)}, not of {account}, {amount}, {uses}", USAGE)
            blocks.setdefault(identity, []).append(normal_code(code))
    yield from blocks.items()


@codes_app.command("redeem", epilog=examples("creditlane codes redeem bob 7K3M-9QXA-W2ZD-5HTE"))
def codes_redeem(
    account: AccountArgument,
    code: CodeArgument,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Give an account the credits of a code."""
    operate(id, wait, as_json, account, "codes.redeem", lambda client, identity, seconds: client.redeem_code(
        account, code, id=identity, wait=seconds))  # fmt: skip


@codes_app.command(
    "withdraw",
    epilog=examples(
        "creditlane codes withdraw alice 7K3M-9QXA-W2ZD-5HTE",
        "creditlane codes withdraw shop SPRING27 --actor ann --reason 'campaign over'",
    ),
)
def codes_withdraw(
    account: AccountArgument,
    codes: Annotated[list[str], typer.Argument(metavar="CODE...", help="Which.", show_default=False)],
    actor: AdministratorOption = None,
    reason: WhyOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """End codes that an account issued; what it paid for uses that are left comes back."""
    operate(id, wait, as_json, account, "codes.withdraw", lambda client, identity, seconds: client.withdraw_codes(
        account, codes, id=identity, actor=actor, reason=reason, wait=seconds))  # fmt: skip


@codes_app.command(
    "show",
    epilog=examples("creditlane codes show 7K3M-9QXA-W2ZD-5HTE", "creditlane codes show SPRING27 --from 1000 --json"),
)
def codes_show(
    code: CodeArgument,
    limit: LimitOption = DEFAULT_PAGE,
    first: Annotated[int, typer.Option("--from", min=0, help="The first use to show.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show a code: what it gives, how long, and who has redeemed it."""
    text = normal_code(code)
    with ledger() as connection:
        found = code_summary(connection, text)
        if found is None:
            fail(f"code_unknown: there is no gift code {shown(text)}", REFUSED)
        uses = uses_of(connection, text, limit=limit, first=first)
    if as_json:
        show_json({"code": found, "uses": uses})
        return
    out = console()
    out.print(facts_table(_facts(found)))
    if uses:
        table = plain_table("use", "account", "operation", "when (UTC)", right=("use",))
        for use in uses:
            table.add_row(str(use.slot), said(use.account), said(use.operation), instant(use.at))
        out.print(table)
        if uses[-1].slot + 1 < found.used:
            out.print(f"[dim]later ones: --from {uses[-1].slot + 1}[/]")


def _facts(found: CodeSummary) -> list[tuple[str, str]]:
    paid = "paid for by the account" if found.source is None else f"given by an administrator, as {said(found.source)}"
    facts = [
        ("code", f"[bold]{shown(found.code)}[/], {found.status}"),
        ("gives", f"{found.credits} credits a use"),
        ("used", f"{found.used:,} of {found.uses:,} times, at most {found.per_account:,} by one account"),
        ("issued by", f"{said(found.account)}, operation {said(found.operation)}, {paid}"),
        ("until", f"{instant(found.expires_at)} UTC"),
    ]
    if found.closed_at is not None:
        facts.append(("ended", f"{instant(found.closed_at)} UTC"))
    if found.message is not None:
        facts.append(("message", said(found.message)))
    return facts


@codes_app.command(
    "list",
    epilog=examples(
        "creditlane codes list --account alice",
        "creditlane codes list --account alice --csv state.csv",
        "creditlane codes list --account alice --json | jq -r .codes[].code",
    ),
)
def codes_list(
    account: Annotated[str, typer.Option(help="Who issued them.", show_default=False)],
    limit: LimitOption = DEFAULT_PAGE,
    after: Annotated[
        str | None, typer.Option(metavar="CODE", help="The page after this one.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="All of them, with what became of each.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the codes that an account issued, and what became of each."""
    with ledger() as connection:
        if not account_exists(connection, account):
            unknown_account(account)
        if file is not None:
            count = _list_to(file, connection, account)
            console().print(f"{count:,} codes in {said(str(file))}")
            return
        try:
            page = codes_of(connection, account, limit=limit, after=None if after is None else normal_code(after))
        except ValueError as error:
            fail(str(error), USAGE)
    if as_json:
        show_json(page)
        return
    out = console()
    if not page.codes:
        out.print("no codes")
        return
    table = plain_table("code", "credits", "used", "of", "status", "until (UTC)", "operation",
                        right=("credits", "used", "of"))  # fmt: skip
    for each in page.codes:
        table.add_row(
            shown(each.code), each.credits, f"{each.used:,}", f"{each.uses:,}", each.status, instant(each.expires_at),
            said(each.operation),
        )  # fmt: skip
    out.print(table)
    if page.next_after is not None:
        out.print(f"[dim]more: --after {shown(page.next_after)}[/]")


def _list_to(file: Path, connection: Connection[tuple[object, ...]], account: str) -> int:
    """Write all codes of an account to a file of CSV, page by page; says how many."""
    names = ("code", "credits", "uses", "used", "status", "expires_at", "closed_at", "operation")
    count, after = 0, None
    with target(file) as stream:
        _put(stream, [names])
        while True:
            page = codes_of(connection, account, limit=MAX_PAGE, after=after)
            _put(stream, ([shown(each.code), *(getattr(each, name) for name in names[1:])] for each in page.codes))
            count += len(page.codes)
            after = page.next_after
            if after is None:
                return count


def _put(stream: BinaryIO, rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    stream.write(text.getvalue().encode())
