"""The command line of whoever operates the ledger: ``creditlane``.

Writing goes through the lanes like everybody's: a command sends an operation and waits for its answer.
Reading goes to the database, in sessions that cannot write.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from psycopg import Connection
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from creditlane.amounts import MICRO, format_amount
from models.audit import Report, audit_new
from models.audit import audit as audit_ledger
from models.audit_processes import HelperError
from models.catalog import load_catalog, shipped_names
from models.catalog_texts import kept_catalogs
from models.cutoff import WAIT_SECONDS as SEAL_WAIT_SECONDS
from models.cutoff import BusyError
from models.explaining import explain_operation
from models.reading import (
    DEFAULT_PAGE,
    QuarantinedMessage,
    account_exists,
    account_summary,
    quarantine,
    quarantined_message,
)
from models.reading import history as read_history
from models.rules.catalog import Catalog
from models.seal import make_seal, read_seals
from scripts.account_commands import (
    ACTIONS_EXAMPLES,
    CLOSE_EXAMPLES,
    FREEZE_EXAMPLES,
    REOPEN_EXAMPLES,
    THAW_EXAMPLES,
    close_account,
    freeze_account,
    lead_app,
    reopen_account,
    show_actions,
    thaw_account,
)
from scripts.capacity import (
    BOX_CORES,
    LINGER_SECONDS,
    MAX_PER_DAY,
    MEASURED,
    POSTGRES_CORES,
    SINGLE_SHARE,
    TARGET_UTILISATION,
    WAL_MB_PER_S,
    CapacityError,
    Load,
    Machines,
    Profile,
    Window,
    changes,
    choose,
    costs_of_bench,
    plan,
    profile_of,
    sample_profile,
    usage_times,
)
from scripts.capacity_showing import plan_lines, simulated_lines
from scripts.capacity_simulation import simulate
from scripts.catalog_commands import catalog_app
from scripts.codes_commands import codes_app
from scripts.command_parts import (
    AWAY,
    FAULTS,
    REFUSED,
    USAGE,
    WAIT_SECONDS,
    AccountArgument,
    ActorOption,
    AmountOption,
    Commands,
    CountProgress,
    Deployment,
    FeatureArgument,
    IdOption,
    JsonOption,
    LimitOption,
    MemberOption,
    QuantityArgument,
    QuantityOption,
    ReasonOption,
    WaitOption,
    deployment,
    examples,
    fail,
    ledger,
    operate,
    operator,
    parse_instant,
    parse_span,
    show_json,
    unknown_account,
)
from scripts.due_command import DUE_EXAMPLES, show_due
from scripts.export_command import EXPORT_EXAMPLES, export
from scripts.import_command import IMPORT_EXAMPLES, import_accounts
from scripts.lane_state import lane_states
from scripts.notices_commands import notices_app
from scripts.payments_commands import payments_app
from scripts.plan_commands import plan_app
from scripts.pools_commands import pools_app
from scripts.reading_commands import (
    EXPLAIN_EXAMPLES,
    FORECAST_EXAMPLES,
    USAGE_EXAMPLES,
    show_explanation,
    show_forecast,
    show_usage,
)
from scripts.referrals_commands import referrals_app
from scripts.replay import EXPONENT
from scripts.report_commands import (
    ACHIEVEMENTS_EXAMPLES,
    LEADERBOARD_EXAMPLES,
    REFUNDS_EXAMPLES,
    show_achievements,
    show_leaderboard,
    show_refunds,
)
from scripts.requeue import as_it_was, drop, mended, open_message, replay
from scripts.showing import (
    console,
    history_table,
    lanes_view,
    quarantine_table,
    quarantined_lines,
    said,
    summary_lines,
)
from scripts.simulate_command import SIMULATE_EXAMPLES, simulate_account
from tasks.replay import Replayer

# --- The commands ------------------------------------------------------------------------------------


app = typer.Typer(
    cls=Commands,
    name="creditlane",
    help="Operate a creditlane ledger: accounts, credits, lanes, quarantine, audit.",
    epilog=examples(
        "creditlane account open alice",
        "creditlane grant alice 100 --source pack --reason 'invoice 4711'",
        "creditlane consume alice image 12",
        "creditlane account history alice",
        "creditlane lanes --watch",
        codes=True,
    ),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
account_app = typer.Typer(
    help="Open an account, look at it, read its history; freeze, thaw, close, reopen it; what administrators did.",
    no_args_is_help=True,
    epilog=examples("creditlane account open alice", "creditlane account show alice"),
)
quarantine_app = typer.Typer(
    help="Messages that could not be understood or applied: look, mend, replay, drop.",
    no_args_is_help=True,
    epilog=examples("creditlane quarantine list", "creditlane quarantine replay 7"),
)
app.add_typer(account_app, name="account")
app.add_typer(lead_app, name="lead")
app.add_typer(quarantine_app, name="quarantine")
app.add_typer(plan_app, name="plan")
app.add_typer(catalog_app, name="catalog")
app.add_typer(codes_app, name="codes")
app.add_typer(pools_app, name="pools")
app.add_typer(notices_app, name="notices")
app.add_typer(payments_app, name="payments")
app.add_typer(referrals_app, name="referrals")

MONEY, STATE_PANEL, FILES = "Credits", "State", "Files"


class Kind(StrEnum):
    """What an account is."""

    USER = "user"
    LEAD = "lead"
    POOL = "pool"


@account_app.command(
    "open",
    epilog=examples(
        "creditlane account open alice",
        "creditlane account open studio --kind pool",
        "creditlane account open bob --email bob@example.org --locale fr --timezone Europe/Paris",
        "creditlane account open carol --referral-code ALICE-2026",
    ),
)
def account_open(
    account: Annotated[
        str, typer.Argument(metavar="ACCOUNT", help="The account's id, of your own choosing.", show_default=False)
    ],
    kind: Annotated[Kind, typer.Option(help="What it is.")] = Kind.USER,
    email: Annotated[str | None, typer.Option(help="Where notices go.", show_default=False)] = None,
    locale: Annotated[str | None, typer.Option(help="Their language, such as fr.", show_default=False)] = None,
    timezone: Annotated[
        str | None, typer.Option(help="Their IANA time zone, such as Europe/Paris.", show_default=False)
    ] = None,
    lead: Annotated[
        str | None, typer.Option(help="The lead that it was: what is left of its credits follows.", show_default=False)
    ] = None,
    referral_code: Annotated[
        str | None, typer.Option(metavar="CODE", help="That of who referred them.", show_default=False)
    ] = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Create an account, with the catalog's sign-up credits."""
    chosen: Literal["user", "lead", "pool"] = kind.value
    operate(
        id, wait, as_json, account, "open",
        lambda client, identity, seconds: client.open(
            account, id=identity, kind=chosen, email=email, locale=locale, timezone=timezone, lead=lead,
            referral_code=referral_code, wait=seconds,
        ),
    )  # fmt: skip


@account_app.command(
    "show", epilog=examples("creditlane account show alice", "creditlane account show alice --json | jq .balance")
)
def account_show(account: AccountArgument, as_json: JsonOption = False) -> None:
    """Show an account: balance, grants in the order in which they are spent, open holds.

    The balance is what an operation would find now: credits that have expired do not count.
    """
    with ledger() as connection:
        summary = account_summary(connection, account, deployment().catalog)
    if summary is None:
        unknown_account(account)
    if as_json:
        show_json(summary)
    else:
        console().print(summary_lines(summary))


account_app.command("freeze", epilog=FREEZE_EXAMPLES)(freeze_account)
account_app.command("thaw", epilog=THAW_EXAMPLES)(thaw_account)
account_app.command("close", epilog=CLOSE_EXAMPLES)(close_account)
account_app.command("reopen", epilog=REOPEN_EXAMPLES)(reopen_account)
account_app.command("actions", epilog=ACTIONS_EXAMPLES)(show_actions)


class StatusName(StrEnum):
    """What became of an operation."""

    APPLIED = "applied"
    REJECTED = "rejected"


@account_app.command(
    "history",
    epilog=examples(
        "creditlane account history alice",
        "creditlane account history alice --entries --limit 5",
        "creditlane account history alice --status rejected --since 2027-01-01",
        "creditlane account history alice --source pack --before 951",
        "creditlane account history alice --json | jq -r .operation",
    ),
)
def account_history(
    account: AccountArgument,
    limit: LimitOption = DEFAULT_PAGE,
    before: Annotated[
        int | None, typer.Option(min=1, help="Only operations with a smaller number.", show_default=False)
    ] = None,
    feature: Annotated[str | None, typer.Option(help="Only of this feature.", show_default=False)] = None,
    operation: Annotated[
        str | None, typer.Option(help="Only these operations, such as consume.", show_default=False)
    ] = None,
    status: Annotated[StatusName | None, typer.Option(help="Only these.", show_default=False)] = None,
    member: Annotated[str | None, typer.Option(help="Only of this member of a pool.", show_default=False)] = None,
    source: Annotated[
        str | None, typer.Option(help="Only what moved credits of this source, such as pack.", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Applied then or later; UTC.", show_default=False)
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Applied before; UTC.", show_default=False)
    ] = None,
    entries: Annotated[bool, typer.Option("--entries", help="With each operation's entries.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what happened to an account and why, the newest operation first.

    Where no filter leaves lines out, what time did (credits that expired, holds that timed out) stands
    between the operations.
    """
    name = operation
    if name is not None and "." not in name:
        name = f"credits.{name}"
    with ledger() as connection:
        page = read_history(
            connection,
            account,
            limit=limit,
            before=before,
            feature=feature,
            name=name,
            status=None if status is None else status.value,
            member=member,
            source=source,
            since=None if since is None else parse_instant(since),
            until=None if until is None else parse_instant(until),
            with_entries=entries,
        )
        if not page.lines and not account_exists(connection, account):
            unknown_account(account)
    if as_json:
        for line in page.lines:
            show_json(line)
        return
    out = console()
    if not page.lines:
        out.print("no operations")
        return
    out.print(history_table(page.lines))
    if page.next_before is not None:
        out.print(f"[dim]older ones: --before {page.next_before}[/]")


@app.command(
    rich_help_panel=MONEY,
    epilog=examples(
        "creditlane grant alice 100 --source pack --purchase order-17",
        "creditlane grant alice 20 --source promotion --expires-in 30d --feature image",
        "creditlane grant alice 5 --source goodwill --reason 'slow on Monday' --id ticket-991",
    ),
)
def grant(
    account: AccountArgument,
    amount: Annotated[str, typer.Argument(metavar="CREDITS", help="Credits, such as 100 or 0.5.", show_default=False)],
    source: Annotated[str, typer.Option(help="Where they come from, such as pack.", show_default=False)],
    expires_in: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long they live, such as 30d.", show_default=False)
    ] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="When they end, such as 2027-01-31; UTC.", show_default=False)
    ] = None,
    effective_at: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="When they begin; at once unless given.", show_default=False)
    ] = None,
    priority: Annotated[
        int | None, typer.Option(help="Lowest is spent first; the catalog's unless given.", show_default=False)
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="What they may be spent on; may be repeated.", show_default=False)
    ] = None,
    purchase: Annotated[str | None, typer.Option(help="The purchase that paid for them.", show_default=False)] = None,
    reason: ReasonOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Add a lot of credits to an account."""
    seconds_to_live = None if expires_in is None else parse_span(expires_in)
    end = None if expires_at is None else parse_instant(expires_at)
    start = None if effective_at is None else parse_instant(effective_at)
    operate(
        id, wait, as_json, account, "grant",
        lambda client, identity, seconds: client.grant(
            account, amount, source=source, id=identity, priority=priority, features=feature or None,
            effective_at=start, expires_at=end, expires_in=seconds_to_live, purchase=purchase, reason=reason,
            wait=seconds,
        ),
    )  # fmt: skip


@app.command(
    rich_help_panel=MONEY,
    epilog=examples(
        "creditlane consume alice image 12",
        "creditlane consume alice --amount 2.5 --id order-991",
        "creditlane consume studio image --member alice",
    ),
)
def consume(
    account: AccountArgument,
    feature: FeatureArgument = None,
    quantity: QuantityArgument = None,
    amount: AmountOption = None,
    member: MemberOption = None,
    partial: Annotated[bool, typer.Option("--partial", help="Take what there is, if it is not enough.")] = False,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Charge a quantity of a feature, or an amount of credits."""
    operate(
        id, wait, as_json, account, "consume",
        lambda client, identity, seconds: client.consume(
            account, id=identity, feature=feature, quantity=quantity, amount=amount, member=member,
            partial=partial or None, wait=seconds,
        ),
    )  # fmt: skip


@app.command(
    rich_help_panel=MONEY,
    epilog=examples("creditlane hold alice image 80 --id job-7", "creditlane hold alice --amount 10 --ttl 2h"),
)
def hold(
    account: AccountArgument,
    feature: FeatureArgument = None,
    quantity: QuantityArgument = None,
    amount: AmountOption = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long it lives; 15m unless given.", show_default=False)
    ] = None,
    member: MemberOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Set credits aside for work in progress; the operation id names the hold from then on."""
    lives = None if ttl is None else parse_span(ttl)
    operate(
        id, wait, as_json, account, "hold",
        lambda client, identity, seconds: client.hold(
            account, id=identity, feature=feature, quantity=quantity, amount=amount, ttl=lives, member=member,
            wait=seconds,
        ),
    )  # fmt: skip


HoldArgument = Annotated[
    str, typer.Argument(metavar="HOLD", help="The hold: the id of the operation that made it.", show_default=False)
]


@app.command(
    rich_help_panel=MONEY,
    epilog=examples("creditlane capture alice job-7", "creditlane capture alice job-7 --quantity 64"),
)
def capture(
    account: AccountArgument,
    hold: HoldArgument,
    amount: AmountOption = None,
    quantity: QuantityOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Take what the work cost out of a hold: all of it unless an amount or a quantity is given."""
    operate(
        id, wait, as_json, account, "capture",
        lambda client, identity, seconds: client.capture(
            account, hold, id=identity, amount=amount, quantity=quantity, wait=seconds
        ),
    )  # fmt: skip


@app.command(rich_help_panel=MONEY, epilog=examples("creditlane release alice job-7"))
def release(
    account: AccountArgument,
    hold: HoldArgument,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Give a hold back whole."""
    operate(
        id, wait, as_json, account, "release",
        lambda client, identity, seconds: client.release(account, hold, id=identity, wait=seconds),
    )  # fmt: skip


@app.command(
    rich_help_panel=MONEY,
    epilog=examples(
        "creditlane refund alice order-991 --reason 'the picture was empty'",
        "creditlane refund alice order-991 --percent 50 --reason 'blurred' --actor anna",
    ),
)
def refund(
    account: AccountArgument,
    operation: Annotated[
        str, typer.Argument(metavar="OPERATION", help="The id of the consume or capture.", show_default=False)
    ],
    amount: AmountOption = None,
    percent: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="So much of what it took, such as 50, in place of an amount."),
    ] = None,
    reason: ReasonOption = None,
    actor: ActorOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Give back what a consume or capture took: all that is left of it unless an amount or a percentage is given.

    It stands in the history, and in the report of refunds, with the actor and the reason.
    """
    if percent is not None:
        if amount is not None:
            fail("--amount or --percent: give one of the two", USAGE)
        amount = share_of(account, operation, percent)
    operate(
        id, wait, as_json, account, "refund",
        lambda client, identity, seconds: client.refund(
            account, operation, id=identity, amount=amount, reason=reason, actor=actor or operator(), wait=seconds
        ),
    )  # fmt: skip


def share_of(account: str, operation: str, percent: str) -> str:
    """So much of what a charge took, in credits: to the next micro-credit down, and never nothing.

    :param percent: more than 0, at most 100.
    """
    try:
        share = Decimal(percent)
    except InvalidOperation:
        share = Decimal(0)
    if not (share.is_finite() and 0 < share <= 100):
        fail(f"--percent is more than 0 and at most 100, not {percent!r}", USAGE)
    with ledger() as connection:
        charge = explain_operation(connection, account, operation, limit=1)
        if charge is None and not account_exists(connection, account):
            unknown_account(account)
    if charge is None or charge.charged <= 0:
        fail(f"{account!r} was charged nothing by {operation!r}", REFUSED)
    micro = int(charge.charged * MICRO * share / 100)
    return format_amount(max(1, micro))


@app.command(
    rich_help_panel=MONEY,
    # Without this a negative amount would be taken for an option.
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "creditlane adjust alice 5 --reason goodwill",
        "creditlane adjust alice -5 --reason 'granted twice' --actor anna",
    ),
)
def adjust(
    account: AccountArgument,
    amount: Annotated[
        str, typer.Argument(metavar="CREDITS", help="Credits to add, or to take when negative.", show_default=False)
    ],
    reason: Annotated[str, typer.Option(help="Why; kept with the operation.", show_default=False)],
    actor: Annotated[
        str | None, typer.Option(help="Who decided it; the user of this system unless given.", show_default=False)
    ] = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Add credits by hand, or take some away."""
    operate(
        id, wait, as_json, account, "adjust",
        lambda client, identity, seconds: client.adjust(
            account, amount, actor=actor or operator(), reason=reason, id=identity, wait=seconds
        ),
    )  # fmt: skip


@app.command(
    rich_help_panel=MONEY,
    epilog=examples(
        "creditlane revoke alice --purchase order-17 --reason 'disputed'",
        "creditlane revoke alice --grant 3 --amount 10",
    ),
)
def revoke(
    account: AccountArgument,
    grant: Annotated[int | None, typer.Option(min=1, help="The grant's number.", show_default=False)] = None,
    purchase: Annotated[str | None, typer.Option(help="The purchase.", show_default=False)] = None,
    amount: AmountOption = None,
    reason: ReasonOption = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Take a grant's or a purchase's credits back, spent or not: all of them unless an amount is given."""
    operate(
        id, wait, as_json, account, "revoke",
        lambda client, identity, seconds: client.revoke(
            account, id=identity, grant=grant, purchase=purchase, amount=amount, reason=reason, wait=seconds
        ),
    )  # fmt: skip


@app.command(
    rich_help_panel=MONEY,
    epilog=examples("creditlane transfer alice bob 5", "creditlane transfer alice bob 2.5 --message 'thank you'"),
)
def transfer(
    account: AccountArgument,
    to: Annotated[str, typer.Argument(metavar="TO", help="Who is given the credits.", show_default=False)],
    credits: Annotated[str, typer.Argument(metavar="CREDITS", help="Credits, such as 1.5.", show_default=False)],
    message: Annotated[str | None, typer.Option(help="A word to the recipient.", show_default=False)] = None,
    id: IdOption = None,
    wait: WaitOption = WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Give credits to another account; those that it cannot take come back."""
    operate(
        id, wait, as_json, account, "transfer",
        lambda client, identity, seconds: client.transfer(
            account, to, credits, id=identity, message=message, wait=seconds
        ),
    )  # fmt: skip


@app.command(rich_help_panel=MONEY, epilog=examples("creditlane settle alice"))
def settle(
    account: AccountArgument, id: IdOption = None, wait: WaitOption = WAIT_SECONDS, as_json: JsonOption = False
) -> None:
    """Apply what time has made due on an account, nothing else."""
    operate(
        id, wait, as_json, account, "settle",
        lambda client, identity, seconds: client.settle(account, id=identity, wait=seconds),
    )  # fmt: skip


@app.command(
    rich_help_panel=STATE_PANEL,
    epilog=examples(
        "creditlane lanes", "creditlane lanes --watch", "creditlane lanes --json | jq -s 'map(.ready) | add'"
    ),
)
def lanes(
    all: Annotated[bool, typer.Option("--all", help="Idle lanes as well.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="How often --watch looks.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show the lanes: what waits in each, what is being applied, and which worker owns it.

    How long the oldest message waits is told where its sender put the time on it.
    """
    where = deployment()
    if watch and as_json:
        fail("--watch is for people and --json for programs: give one of the two", USAGE)
    try:
        with ledger() as connection:
            if watch:
                _watch(connection, where, every=every, all=all)
                return
            states = lane_states(connection, where.broker_url, where.lanes, where.tls)
    except ValueError as error:
        fail(str(error), USAGE)
    if as_json:
        for lane in states.lanes:
            show_json(lane)
    else:
        console().print(lanes_view(states, every=all))


def _watch(connection: Connection[Any], where: Deployment, *, every: float, all: bool) -> None:
    out = console()
    pause = threading.Event()
    try:
        with Live(console=out, auto_refresh=False, screen=out.is_terminal) as live:
            while True:
                states = lane_states(connection, where.broker_url, where.lanes, where.tls)
                rows = max(1, out.height - states.workers - 7)
                live.update(lanes_view(states, every=all, rows=rows), refresh=True)
                pause.wait(every)
    except KeyboardInterrupt:
        return


class QuarantineStatus(StrEnum):
    """What became of a quarantined message."""

    OPEN = "open"
    REPLAYED = "replayed"
    DROPPED = "dropped"
    ALL = "all"


NumberArgument = Annotated[
    int, typer.Argument(metavar="NUMBER", min=1, help="The message's number in the quarantine.", show_default=False)
]


@quarantine_app.command(
    "list", epilog=examples("creditlane quarantine list", "creditlane quarantine list --status all --json")
)
def quarantine_list(
    status: Annotated[QuarantineStatus, typer.Option(help="Which ones.")] = QuarantineStatus.OPEN,
    limit: LimitOption = DEFAULT_PAGE,
    before: Annotated[
        int | None, typer.Option(min=1, help="Only messages with a smaller number.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List quarantined messages, the newest first."""
    wanted = None if status is QuarantineStatus.ALL else status.value
    with ledger() as connection:
        page = quarantine(connection, limit=limit, before=before, status=wanted)
    if as_json:
        for line in page.lines:
            show_json(line)
        return
    out = console()
    if not page.lines:
        out.print("the quarantine is empty" if wanted is None else f"no message is {wanted}")
        return
    out.print(quarantine_table(page.lines))
    if page.next_before is not None:
        out.print(f"[dim]older ones: --before {page.next_before}[/]")


@quarantine_app.command("show", epilog=examples("creditlane quarantine show 7", "creditlane quarantine show 7 --json"))
def quarantine_show(number: NumberArgument, as_json: JsonOption = False) -> None:
    """Show one quarantined message whole, with the reason."""
    with ledger() as connection:
        message = quarantined_message(connection, number)
    if message is None:
        fail(f"there is no quarantined message {number}", USAGE)
    if as_json:
        show_json(_whole(message))
    else:
        console().print(quarantined_lines(message))


def _whole(message: QuarantinedMessage) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(message.line)
    told["traceback"] = message.traceback
    for name, content in (("headers", message.headers), ("body", message.body)):
        try:
            told[name] = content.decode()
        except UnicodeDecodeError:
            told[f"{name}_base64"] = base64.b64encode(content).decode()
    return told


@quarantine_app.command(
    "replay",
    epilog=examples(
        "creditlane quarantine replay 7",
        """creditlane quarantine replay 7 --arguments '{"account": "alice", "amount": "1.5"}'""",
        "creditlane quarantine replay 8 --task credits.consume",
    ),
)
def quarantine_replay(
    number: NumberArgument,
    arguments: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Send it with these arguments instead of its own.", show_default=False),
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", help="Send it with this operation id instead of its own.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Send it to this task instead, such as credits.consume.", show_default=False),
    ] = None,
    actor: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a quarantined message to its queue again, as it was or mended.

    A mended message is checked first, as a worker will.
    """
    where = deployment()
    who = actor or operator()
    encoded = None
    if arguments is not None:
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            fail(f"--arguments is no JSON: {error}", USAGE)
        if not isinstance(value, dict):
            fail("--arguments is a JSON object: the operation's arguments by name", USAGE)
        encoded = arguments.encode("utf-8", "surrogatepass")
    with ledger(read_only=False) as connection:
        message = open_message(connection, number)
        if encoded is None and id is None and task is None:
            ready = as_it_was(message)
        else:
            ready = mended(message, where.lanes, encoded, id, task)
        replay(connection, where.broker_url, number, ready, who, where.tls)
    if as_json:
        show_json({"id": number, "status": "replayed", "queue": ready.queue, "operation": ready.operation, "by": who})
    else:
        named = f", operation {said(ready.operation)}" if ready.operation else ""
        console().print(f"[green]replayed[/] message {number} to {said(ready.queue)}{named}")


@quarantine_app.command(
    "drop",
    epilog=examples("creditlane quarantine drop 7 --reason 'a test of ours'", "creditlane quarantine drop 7 --yes"),
)
def quarantine_drop(
    number: NumberArgument,
    reason: ReasonOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Without a reason.")] = False,
    actor: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a quarantined message go; it stays in the database, marked as dropped."""
    if reason is None and not yes:
        fail("give a --reason, or --yes to drop it without one", USAGE)
    who = actor or operator()
    with ledger(read_only=False) as connection:
        open_message(connection, number)
        drop(connection, number, who, reason)
    if as_json:
        show_json({"id": number, "status": "dropped", "by": who, "reason": reason})
    else:
        console().print(f"[green]dropped[/] message {number}")


@app.command(
    rich_help_panel=STATE_PANEL,
    epilog=examples(
        "creditlane audit", "creditlane audit alice bob", "creditlane audit --replay --catalog old.toml",
        "creditlane audit --expect 5f2e…", "creditlane audit --json | jq .faults",
    ),
)  # fmt: skip
def audit(
    accounts: Annotated[
        list[str] | None, typer.Argument(metavar="[ACCOUNT]...", help="Only these accounts.", show_default=False)
    ] = None,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Feed every operation to the rules again as well; takes longer."),
    ] = False,
    catalog: Annotated[
        list[str] | None,
        typer.Option(
            help="A catalog that operations were applied under: a name or a path; several may be given.",
            show_default="those that the ledger has kept, CREDITLANE_CATALOG, the shipped ones",
        ),
    ] = None,
    incremental: Annotated[
        bool,
        typer.Option("--incremental", help="Only what was written since the last such audit that held."),
    ] = False,
    seals: Annotated[
        int | None, typer.Option(min=0, help="Compute only the roots of so many of the last seals again.")
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="ROOT", help="A seal's root that was kept elsewhere; several may be given."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="How many processes share the work.", show_default="one per core")
    ] = os.cpu_count() or 1,
    as_json: JsonOption = False,
) -> None:
    """Prove the ledger: chains, sequences, balances, seals and the closing identity of every account.

    Each row that is not as it should be is named; then the exit code is 1. So it is when operations cannot be replayed
    because the catalog that they were applied under is not at hand.
    """
    wanted = sorted(set(accounts)) if accounts else None
    if incremental and (wanted or replay or expect or seals is not None):
        fail("--incremental looks at what is new, and at nothing else: give it alone", USAGE)
    expected = [read_root(text) for text in expect or ()]
    with ledger(read_only=not incremental) as connection:
        replayer = Replayer(catalogs_at_hand(connection, catalog or ())) if replay else None
        for account in wanted or ():
            if not account_exists(connection, account):
                unknown_account(account)
        started = time.monotonic()
        with CountProgress("auditing", "operations", quiet=as_json) as progress:
            try:
                if incremental:
                    report = audit_new(connection, progress)
                else:
                    report = audit_ledger(
                        connection, wanted, progress, processes=processes, replayer=replayer, seals=seals,
                        expected=expected,
                    )  # fmt: skip
            except (BusyError, HelperError) as error:
                fail(str(error), AWAY)
    show_audit(report, time.monotonic() - started, as_json)
    if report.fault_count or not report.is_whole:
        raise typer.Exit(FAULTS)


def read_root(text: str) -> bytes:
    """Read ``--expect``: 64 hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        fail("--expect is a seal's root: 64 hexadecimal digits", USAGE)
    return bytes.fromhex(text)


def catalogs_at_hand(connection: Connection[Any], given: Sequence[str]) -> dict[str, Catalog]:
    """The catalogs to replay with, by label: those given, those that the ledger has kept, that of the environment, and
    those that are shipped; of one label the first of these.

    :raises CatalogError: when a file cannot be used.
    """
    names = [*shipped_names(), *filter(None, [os.environ.get("CREDITLANE_CATALOG")])]
    found = {catalog.label: catalog for catalog in map(load_catalog, names)}
    found.update(kept_catalogs(connection))
    found.update((catalog.label, catalog) for catalog in map(load_catalog, given))
    return found


def show_audit(report: Report, seconds: float, as_json: bool) -> None:
    """Show what an audit found."""
    checked = f"{report.accounts:,} accounts, {report.operations:,} operations, {report.entries:,} entries"
    if as_json:
        show_json(
            {
                "holds": report.holds,
                "accounts": report.accounts,
                "operations": report.operations,
                "entries": report.entries,
                "replayed": report.replayed,
                "not_replayed": report.not_replayed,
                "seals": report.seals,
                "fault_count": report.fault_count,
                "faults": report.faults,
            }
        )
        return
    if report.replayed:
        checked += f", {report.replayed:,} replayed"
    if report.seals:
        checked += f", {report.seals:,} seals"
    out = console()
    for fault in report.faults:
        owner = f"[bold]{said(fault.account)}[/] " if fault.account else ""
        where = f"{owner}{said(fault.table)} {said(fault.key)}"
        out.print(f"[red]fault[/] {where}: {said(fault.what)}", soft_wrap=True)
    if report.fault_count > len(report.faults):
        out.print(f"… and {report.fault_count - len(report.faults):,} more")
    for label, count in report.not_replayed.items():
        out.print(
            f"[red]not replayed[/]: {count:,} operations, because the catalog {said(label)} is not at hand or stands"
            " before them; give it with --catalog",
            soft_wrap=True,
        )
    if report.fault_count:
        out.print(f"[red]{report.fault_count:,} faults[/] in {checked}")
    elif report.is_whole:
        rate = f", {report.operations / max(seconds, 0.001):,.0f} operations/s" if report.operations else ""
        out.print(f"[green]the audit holds[/]: {checked} in {seconds:.1f} s{rate}", soft_wrap=True)
    else:
        out.print(f"[yellow]no fault, but not all was proven[/]: {checked}", soft_wrap=True)


@app.command(
    rich_help_panel=STATE_PANEL,
    epilog=examples("creditlane seal", "creditlane seal --list", "creditlane seal --json | jq -r .root"),
)
def seal(
    listed: Annotated[bool, typer.Option("--list", help="Show the seals there are, and make none.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, max=3600, help="How many seconds running transactions are waited for.")
    ] = SEAL_WAIT_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Seal the ledger as it stands: one root over where every account stands, chained to the seal before.

    Keep the root elsewhere: with it, creditlane audit --expect ROOT proves that nothing sealed was changed, whoever
    owns the database.
    """

    def waiting(pids: list[int]) -> None:
        backends = ", ".join(map(str, pids))
        console(stderr=True).print(f"waiting for the transactions of backends {backends}", soft_wrap=True)

    with ledger(read_only=listed) as connection:
        try:
            made = read_seals(connection) if listed else [make_seal(connection, wait, waiting)]
        except BusyError as error:
            fail(str(error), AWAY)
    shown = [
        {
            "number": one.number,
            "root": one.root.hex(),
            "cutoff": one.cutoff,
            "accounts": one.accounts,
            "operations": one.operations,
            "entries": one.entries,
        }
        for one in made
    ]
    if as_json:
        show_json(shown if listed else shown[0])
        return
    for one in made:
        console().print(
            f"[green]seal {one.number}[/] {one.root.hex()} of {one.cutoff:%Y-%m-%d %H:%M} UTC:"
            f" {one.accounts:,} accounts that moved, {one.operations:,} operations, {one.entries:,} entries in all",
            soft_wrap=True,
        )


_COUNT = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)([kMB]?)", re.ASCII)
_THOUSANDS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """Read a number of operations such as ``100_000_000``, ``100M`` or ``2.5B``.

    :raises typer.BadParameter: with what to write instead.
    """
    found = _COUNT.fullmatch(text)
    number = Decimal(found[1].replace("_", "")) * _THOUSANDS[found[2]] if found else Decimal(0)
    if not 1 <= number <= MAX_PER_DAY:
        raise typer.BadParameter(f"{text!r} is no number from 1 to {MAX_PER_DAY:,}; write 100_000_000, 100M or 10B")
    return int(number)


PER_DAY = ("1M", "100M", "10B")


@app.command(
    epilog=examples(
        "creditlane capacity",
        "creditlane capacity --per-day 100_000_000 --simulate",
        "creditlane capacity --per-day 5M --usage usage.csv --size-for second",
        "creditlane capacity --bench figures.json --single-share 1",
        "creditlane capacity --json | jq '.plans[].postgres_cores'",
    ),
)
def capacity(
    per_day: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Operations a day; may be repeated.", show_default=", ".join(PER_DAY)),
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="Simulate the busiest ten minutes, and what follows an outage.")
    ] = False,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="What a machine needs: the file of scripts/bench --json.", show_default=False
        ),
    ] = None,
    usage: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="A usage file that has the peaks of the load.", show_default=False),
    ] = None,
    time_column: Annotated[
        str | None, typer.Option(help="Its column with times.", show_default="time or TIMESTAMP")
    ] = None,
    peak_factor: Annotated[
        float | None,
        typer.Option(
            min=1, max=10_000, help="How many times the mean comes in the busiest minute.", show_default=False
        ),
    ] = None,
    size_for: Annotated[
        Window, typer.Option(help="The peak that is to be carried at once; what is above it waits.")
    ] = Window.MINUTE,
    single_share: Annotated[
        float, typer.Option(min=0, max=1, help="Operations that are messages of their own: their answers are awaited.")
    ] = SINGLE_SHARE,
    accounts: Annotated[
        int, typer.Option(min=0, max=10**11, help="How many there are; 0 for one per hundred operations a day.")
    ] = 0,
    exponent: Annotated[
        float, typer.Option(min=0, max=3, help="The k-th account is used in proportion to 1 / k^exponent.")
    ] = EXPONENT,
    events: Annotated[float, typer.Option(min=0, max=10, help="Events out for each operation.")] = 0.0,
    linger_ms: Annotated[
        float, typer.Option(min=0, max=60_000, help="How long a producer's buffer waits for company.")
    ] = LINGER_SECONDS * 1000,
    utilisation: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="How busy a part may be at the peak.")
    ] = TARGET_UTILISATION,
    box_cores: Annotated[int, typer.Option(min=1, max=1024, help="Of one machine that does everything.")] = BOX_CORES,
    postgres_cores: Annotated[int, typer.Option(min=1, max=1024, help="Of one Postgres.")] = POSTGRES_CORES,
    wal_mb_per_s: Annotated[
        float, typer.Option(min=1, max=100_000, help="Megabytes a second that one Postgres may log.")
    ] = WAL_MB_PER_S,
    seed: Annotated[int, typer.Option(help="Of the simulation; the same one gives the same figures.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Work out how many workers, how much Postgres and which broker a load needs, and where the design changes.

    From what an operation costs on a machine; needs no ledger.
    """
    machines = Machines(
        box_cores=box_cores, postgres_cores=postgres_cores, wal_mb_per_s=wal_mb_per_s, utilisation=utilisation
    )
    try:
        costs, absent = (MEASURED, []) if bench is None else costs_of_bench(bench)
        profile = sample_profile()
        if usage is not None:
            profile = profile_of(usage_times(usage, time_column), str(usage), profile.hour)
        if peak_factor is not None:
            profile = Profile(min(profile.hour, peak_factor), peak_factor, max(profile.second, peak_factor), "as given")
        loads = [
            Load(parse_count(text), profile, size_for, single_share, accounts, exponent, events, linger_ms / 1000)
            for text in per_day or PER_DAY
        ]
        plans = [plan(load, costs, machines) for load in loads]
        steps = changes(loads[0], costs, machines)
    except CapacityError as error:
        fail(str(error), USAGE)
    found = []
    for load in loads if simulated else ():
        with SimulationProgress(quiet=as_json) as progress:
            found.append(simulate(load, choose(load, costs, machines), seed, progress))
    if as_json:
        show_json(
            {"costs": costs, "absent": absent, "loads": loads, "plans": plans, "changes": steps, "simulations": found}
        )
        return
    for sentence in absent:
        console(stderr=True).print(f"[yellow]note:[/] {said(sentence)}", soft_wrap=True)
    console().print(plan_lines(loads[0], costs, plans, steps))
    for load, one in zip(loads, found, strict=False):
        console().print("", simulated_lines(load.per_day, one), sep="\n")


class SimulationProgress:
    """How far a simulation is: a bar in a terminal, on stderr; elsewhere nothing, as it takes seconds."""

    def __init__(self, quiet: bool) -> None:
        errors = console(stderr=True)
        self._bar = Progress(
            TextColumn("simulating"), BarColumn(), TimeElapsedColumn(),
            console=errors, transient=True, disable=quiet or not errors.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("simulation", total=None)

    def __enter__(self) -> SimulationProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Tell how many messages are simulated, and how many there will be."""
        self._bar.update(self._task, completed=done, total=total)


app.command("simulate", rich_help_panel=STATE_PANEL, epilog=SIMULATE_EXAMPLES)(simulate_account)
app.command("usage", rich_help_panel=STATE_PANEL, epilog=USAGE_EXAMPLES)(show_usage)
app.command("forecast", rich_help_panel=STATE_PANEL, epilog=FORECAST_EXAMPLES)(show_forecast)
app.command("explain", rich_help_panel=STATE_PANEL, epilog=EXPLAIN_EXAMPLES)(show_explanation)
app.command("leaderboard", rich_help_panel=STATE_PANEL, epilog=LEADERBOARD_EXAMPLES)(show_leaderboard)
app.command("achievements", rich_help_panel=STATE_PANEL, epilog=ACHIEVEMENTS_EXAMPLES)(show_achievements)
app.command("refunds", rich_help_panel=STATE_PANEL, epilog=REFUNDS_EXAMPLES)(show_refunds)
app.command("due", rich_help_panel=STATE_PANEL, epilog=DUE_EXAMPLES)(show_due)


app.command("export", rich_help_panel=FILES, epilog=EXPORT_EXAMPLES)(export)
app.command("import", rich_help_panel=FILES, epilog=IMPORT_EXAMPLES)(import_accounts)


def main() -> None:
    """Run the command line."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # a PGHOST or PGSSLMODE of another server would lead our connections astray
    app(prog_name="creditlane")


if __name__ == "__main__":
    main()
