"""How the command line shows things: tables and lines for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from creditlane.amounts import to_wire
from creditlane.codes import Code
from creditlane.contract import Result
from creditlane.rabbitmq import DEAD
from creditlane.reports import Action, EntryLine, HistoryLine
from models.reading import (
    AccountSummary,
    Owner,
    QuarantinedMessage,
    QuarantineLine,
)
from scripts.lane_state import LaneState, LaneStates

PIPED_WIDTH = 160
"""Columns of a table that goes into a file or another program."""

BODY_CHARACTERS = 4000
"""How much of a quarantined message's body is shown to people; ``--json`` gives it all."""


def console(*, stderr: bool = False) -> Console:
    """The console of this run; wide when it is no terminal, so that nothing is folded for grep."""
    found = Console(stderr=stderr, highlight=False, emoji=False)
    if not found.is_terminal:
        found.width = PIPED_WIDTH
    return found


def plain(text: str) -> str:
    """Text that cannot drive a terminal: control characters become visible escapes, line ends stay."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode() for sign in text
    )


def said(text: object) -> str:
    """A value of the ledger's for Rich: harmless to the terminal, and no markup."""
    return escape(plain(str(text)))


def instant(value: datetime | None) -> str:
    """An instant in UTC, to the second."""
    return "" if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float) -> str:
    """A duration in its two largest units, such as ``3d 4h``."""
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def signed(amount: str) -> str:
    """An amount with its sign; nothing for nothing."""
    if amount == "0":
        return ""
    return amount if amount.startswith("-") else f"+{amount}"


def credits(amount: Decimal | str | int) -> str:
    """An amount of credits with its unit."""
    text = to_wire(amount)
    return f"{text} credit" if text == "1" else f"{text} credits"


def short(name: str) -> str:
    """An operation's name without its family: ``consume``."""
    return name.removeprefix("credits.")


def plain_table(*columns: str, right: Iterable[str] = (), **options: Any) -> Table:
    """A table without lines.

    :param right: the columns of numbers.
    """
    numbers = set(right)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), **options)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values side by side."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


CHART_ROWS, CHART_COLUMNS = 8, 72
BLOCKS = " ▁▂▃▄▅▆▇█"


def chart(daily: Sequence[tuple[datetime, Decimal]]) -> RenderableType:
    """A balance ahead, a column for each day, or for several where there are many: then the lowest of them.

    :param daily: what is there at the end of each day; at least one.
    """
    values = [available for _, available in daily]
    each = -(-len(values) // CHART_COLUMNS)
    columns = [min(values[start : start + each]) for start in range(0, len(values), each)]
    top = max(columns) or Decimal(1)
    lines = Table.grid(padding=(0, 1))
    lines.add_column(justify="right", style="dim")
    lines.add_column()
    for row in range(CHART_ROWS, 0, -1):
        filled = [int(8 * (value * CHART_ROWS / top - (row - 1))) for value in columns]
        label = f"{top:f}" if row == CHART_ROWS else ""
        lines.add_row(label, Text("".join(BLOCKS[min(8, max(0, eighths))] for eighths in filled), style="cyan"))
    first, last = (at.astimezone(UTC).date().isoformat() for at in (daily[0][0], daily[-1][0]))
    gap = max(1, len(columns) - len(first) - len(last))
    lines.add_row("0", Text(first + " " * gap + last, style="dim"))
    return lines


# --- Operations --------------------------------------------------------------------------------------


def result_lines(result: Result) -> RenderableType:
    """What an applied operation did."""
    facts = [("id", said(result.id))]
    if result.grants:
        uses = ", ".join(f"{to_wire(use.amount)} {said(use.source)} (grant {use.grant})" for use in result.grants)
        facts.append(("grants", uses))
    if result.expires_at is not None:
        facts.append(("expires", f"{instant(result.expires_at)} UTC"))
    for name in ("shortfall", "owed", "forgiven", "allotted", "expired", "taken_back", "restored"):
        amount = getattr(result, name)
        if amount:
            facts.append((name.replace("_", " "), credits(amount)))
    for each in result.achieved:
        came = f", {credits(each.credits)}" if each.credits else ""
        facts.append(("achieved", f"{said(each.achievement)}{came}"))
    if result.period_start is not None:
        facts.append(("period", f"{instant(result.period_start)} to {instant(result.period_end)} UTC"))
    if result.plan_next is not None:
        facts.append(("next plan", said(result.plan_next)))
    if result.referral is not None:
        facts.append(("referral", said(result.referral)))
    if result.bonus:
        facts.append(("bonus", credits(result.bonus)))
    if result.balance is not None:
        facts.append(("balance", _balance_words(result)))
    again = " [dim](this id was answered before; nothing was changed again)[/]" if result.replayed else ""
    head = f"[green]applied[/] {_deed(result)}{again}"
    return Group(Text.from_markup(head), facts_table(facts))


def _deed(result: Result) -> str:
    account = f"[bold]{said(result.account)}[/]"
    amount = result.charged
    match short(result.operation):
        case "open":
            return f"open: {account} is open"
        case "settle":
            return f"settle: what was due on {account} is done"
        case "release":
            return f"release: the hold went back to {account}"
        case "hold":
            return f"hold: {credits(amount)} set aside on {account}"
        case "transfer":
            return f"transfer: {credits(amount)} on their way from {account} to [bold]{said(result.to)}[/]"
        case "codes.issue":
            return f"issue: {result.codes} gift codes, {credits(amount)} taken from {account} until they are redeemed"
        case "codes.withdraw":
            return f"withdraw: {result.codes} gift codes ended, {credits(-amount)} back to {account}"
        case "codes.redeem":
            return f"redeem: {credits(result.credits or 0)} added to {account}"
        case "convert":
            return f"convert: {credits(amount)} on their way from the lead {account} to [bold]{said(result.to)}[/]"
        case "accounts.close":
            return f"accounts.close: {account} is closed, {credits(amount)} revoked"
        case name if result.account_status is not None:
            return f"{name}: {account} is {result.account_status}"
        case "refund":
            return f"refund: {credits(-amount)} given back to {account}"
        case "grant" | "adjust" if not amount:
            given = sum((use.amount for use in result.grants), Decimal(0))
            return f"{short(result.operation)}: {credits(given)} added to {account}"
        case "referrals.issue":
            return f"{account} refers others by the code [bold]{said(result.referral_code)}[/]"
        case "referrals.claim":
            return f"{account} was referred by [bold]{said(result.referrer)}[/]"
        case name if result.plan is not None and name.startswith("plans."):
            return f"{name}: {account} has the plan [bold]{said(result.plan)}[/], {result.plan_status}"
        case "pools.set_member":
            limit = "without a limit" if result.limit is None else f"for {credits(result.limit)} in each period"
            return f"{result.operation}: [bold]{said(result.member)}[/] may use {account} {limit}"
        case "pools.remove_member":
            return f"{result.operation}: [bold]{said(result.member)}[/] may use {account} no more"
        case "adjust" | "revoke":
            return f"{short(result.operation)}: {credits(amount)} taken from {account}"
        case name:
            return f"{said(name)}: {credits(amount)} charged to {account}"


def _balance_words(result: Result) -> str:
    balance = result.balance
    assert balance is not None
    words = [f"[bold]{to_wire(balance.available)}[/] available"]
    for name in ("held", "in_transit", "debt", "upcoming", "frozen"):
        amount = getattr(balance, name)
        if amount:
            words.append(f"{to_wire(amount)} {name.replace('_', ' ')}")
    return ", ".join(words)


def refusal(result: Result) -> str:
    """Why an operation was refused, in a sentence that begins with the code."""
    sentence = result.reason or (result.code.sentence if result.code is not None else "no reason was given")
    if result.required is not None:
        sentence = (
            f"{credits(result.required)} needed, {to_wire(result.available or 0)} available, "
            f"{to_wire(result.shortfall or 0)} short"
        )
    if result.code is Code.MEMBER_LIMIT:
        until = "" if result.period_end is None else f" until {instant(result.period_end)} UTC"
        sentence += f"; {result.member} may use {to_wire(result.limit or 0)}{until}"
    if result.offer:
        kind = "plan" if "plan" in result.offer else "pack"
        sentence += f"; the cheapest that covers it: {kind} {result.offer.get(kind)}, {result.offer.get('price')}"
    again = " (as it was before: this id was answered already)" if result.replayed else ""
    return f"{result.code}: {sentence.rstrip('.')}{again}."


# --- Accounts ----------------------------------------------------------------------------------------


def summary_lines(summary: AccountSummary) -> RenderableType:
    """An account with its balance, its grants and its holds."""
    balance = summary.balance
    colour = {"open": "green", "closed": "red"}.get(summary.status, "yellow")
    became = "" if summary.converted_to is None else f": has become {said(summary.converted_to)}"
    state = f"[{colour}]{said(summary.status)}[/]{became}"
    facts = [
        ("account", f"[bold]{said(summary.account)}[/]  {said(summary.kind)}, {state}"),
        ("available", f"[bold]{balance.available}[/]"),
    ]
    others = {
        "held": balance.held, "in transit": balance.in_transit, "debt": balance.debt, "upcoming": balance.upcoming,
        "frozen": balance.frozen,
    }  # fmt: skip
    for name, amount in others.items():
        if amount != "0":
            facts.append((name, f"[red]{amount}[/]" if name == "debt" else amount))
    if len(balance.by_source) > 1:
        facts.append(
            ("by source", ", ".join(f"{said(source)} {amount}" for source, amount in balance.by_source.items()))
        )
    contact = [said(value) for value in (summary.email, summary.locale, summary.timezone) if value]
    if contact:
        facts.append(("contact", ", ".join(contact)))
    if summary.opened_at is not None:
        facts.append(("opened", f"{instant(summary.opened_at)} UTC"))
    facts.append(
        (
            "last operation",
            f"{instant(summary.updated_at)} UTC ({summary.operations:,} in all, {summary.entries:,} entries)",
        )
    )
    if summary.next_due_at is not None:
        facts.append(("next due", f"{instant(summary.next_due_at)} UTC"))
    parts: list[RenderableType] = [facts_table(facts)]
    if summary.grants:
        parts += ["", _grants_table(summary)]
    if summary.holds:
        parts += ["", _holds_table(summary)]
    return Group(*parts)


def _grants_table(summary: AccountSummary) -> Table:
    some_held = any(grant.held != "0" for grant in summary.grants)
    some_priced = any(grant.purchase for grant in summary.grants)
    columns = [
        "grant",
        "source",
        "available",
        *(["held"] if some_held else []),
        "of",
        "priority",
        "scope",
        "from",
        "until",
    ]
    columns += ["purchase"] if some_priced else []
    table = plain_table(
        *columns,
        right=("grant", "available", "held", "of", "priority"),
        title="Grants, in the order in which they are spent",
        title_justify="left",
        title_style="dim",
    )
    for column in table.columns:
        column.no_wrap = column.header not in ("source", "scope", "purchase")
    for grant in summary.grants:
        upcoming = grant.effective_at > summary.as_of
        cells = [str(grant.grant), said(grant.source), grant.available]
        cells += [grant.held] if some_held else []
        cells += [
            grant.granted,
            str(grant.priority),
            "all" if grant.features is None else said(", ".join(grant.features)),
            instant(grant.effective_at)[:16],
            "never" if grant.expires_at is None else instant(grant.expires_at)[:16],
        ]
        cells += [said(grant.purchase or "") + (" [red](frozen)[/]" if grant.frozen else "")] if some_priced else []
        table.add_row(*cells, style="dim" if upcoming or grant.frozen else None)
    return table


def _holds_table(summary: AccountSummary) -> Table:
    table = plain_table(
        "hold", "amount", "feature", "member", "since", "until", right=("amount",),
        title="Open holds", title_justify="left", title_style="dim",
    )  # fmt: skip
    for hold in summary.holds:
        table.add_row(
            said(hold.hold), hold.amount, said(hold.feature or ""), said(hold.member or ""),
            instant(hold.created_at), instant(hold.expires_at),
        )  # fmt: skip
    return table


def history_table(lines: Iterable[HistoryLine]) -> Table:
    """A history, the newest operation first; what time did stands where it happened."""
    table = plain_table("when (UTC)", "operation", "change", "balance", "status", right=("change", "balance"))
    for number in (0, 2, 3):
        table.columns[number].no_wrap = True
    table.columns[1].min_width = 36  # a uuid on one line, to be copied
    for line in lines:
        status = "[green]applied[/]" if line.status == "applied" else f"[red]{said(line.code)}[/]"
        why = " · ".join(part for part in (line.refusal, line.reason, line.actor) if part)
        table.add_row(
            instant(line.applied_at),
            f"{said(f'{short(line.name)} {_what(line)}'.rstrip())}\n[dim]{said(line.operation)}[/]",
            signed(line.change),
            line.balance or "",
            f"{status}\n{said(why)}" if why else status,
        )
        for entry in line.lines or ():
            table.add_row("", f"  [dim]{_entry_words(entry)}[/]", f"[dim]{signed(entry.change)}[/]", "", "")
        for entry in reversed(line.lapsed):
            table.add_row(instant(entry.at), f"time: {_entry_words(entry)}", signed(entry.change), "", "")
    return table


def actions_table(actions: Iterable[Action]) -> Table:
    """What administrators did, the newest first."""
    table = plain_table("when (UTC)", "who", "account", "operation", "change", "status and reason", right=("change",))
    for number in (0, 4):
        table.columns[number].no_wrap = True
    for action in actions:
        status = "[green]applied[/]" if action.status == "applied" else f"[red]{said(action.code)}[/]"
        table.add_row(
            instant(action.applied_at),
            said(action.actor),
            said(action.account),
            f"{said(short(action.name))}\n[dim]{said(action.operation)}[/]",
            signed(action.change),
            f"{status}\n{said(action.reason)}" if action.reason else status,
        )
    return table


def _what(line: HistoryLine) -> str:
    name = short(line.name)
    measured = ""
    if line.feature is not None:
        measured = line.feature if line.quantity is None else f"{line.feature} × {line.quantity}"
    if name == "grant":
        what = f"from {line.subject}"
    elif name in ("capture", "release"):
        what = f"of hold {line.subject}"
        if name == "capture" and line.status == "applied":
            what = f"took {line.charged} {what}"
    elif name == "convert":
        what = f"to {line.subject}"
    elif name == "transfer":
        what = f"of {line.charged} to {line.subject}" if line.status == "applied" else f"to {line.subject}"
    elif name == "receive":
        what = f"from {line.subject}"
    elif name in ("confirm", "bounce"):
        what = f"of transfer {line.subject}"
    elif name in ("refund", "revoke"):
        what = f"of {line.subject}"
    else:
        what = measured
    return f"{what} by {line.member}" if line.member else what


def _entry_words(entry: EntryLine) -> str:
    amount = "" if entry.change != "0" else f" {entry.amount}"
    source = f" ({entry.source})" if entry.source else ""
    of = f", {entry.refers_to}" if entry.refers_to else ""
    return said(f"{entry.kind.replace('_', ' ')}{amount} grant {entry.grant}{source}{of}")


# --- Quarantine --------------------------------------------------------------------------------------


def quarantine_table(lines: Iterable[QuarantineLine]) -> Table:
    """Quarantined messages, the newest first."""
    table = plain_table("number", "received (UTC)", "message", "why", right=("number",))
    table.columns[1].no_wrap = True
    for line in lines:
        message = said(line.task or f"{line.body_bytes:,} bytes")
        for detail in (line.operation, line.queue):
            if detail:
                message += f"\n[dim]{said(detail)}[/]"
        why = f"[red]{said(line.code)}[/]\n{said(line.reason)}"
        if line.times_seen > 1:
            why += f"\n[dim]seen {line.times_seen} times[/]"
        if line.status != "open":
            why += f"\n[green]{said(f'{line.status} by {line.resolved_by}')}[/]"
        table.add_row(str(line.id), instant(line.received_at), message, why)
    return table


def quarantined_lines(message: QuarantinedMessage) -> RenderableType:
    """One quarantined message, whole as far as a terminal can show it."""
    line = message.line
    facts = [
        ("number", str(line.id)),
        ("status", said(line.status if line.resolved_by is None else f"{line.status} by {line.resolved_by}")),
        ("code", f"[red]{said(line.code)}[/]"),
        ("reason", said(line.reason)),
        ("queue", said(line.queue)),
        ("task", said(line.task or "not told")),
        ("operation", said(line.operation or "not told")),
    ]
    if line.account:
        facts.append(("account", said(line.account)))
    facts += [
        (
            "received",
            f"{instant(line.received_at)} UTC" + (f", seen {line.times_seen} times" if line.times_seen > 1 else ""),
        ),
        ("content type", said(line.content_type or "not told")),
    ]
    parts: list[RenderableType] = [facts_table(facts), "", "[bold]Headers[/]", said(_pretty(message.headers))]
    body = _pretty(message.body)
    parts += ["", f"[bold]Body[/] ({line.body_bytes:,} bytes)", said(body[:BODY_CHARACTERS])]
    if len(body) > BODY_CHARACTERS:
        parts.append("[dim]… --json shows the rest[/]")
    if message.traceback:
        parts += ["", "[bold]Traceback[/]", said(message.traceback.rstrip())]
    return Group(*parts)


def _pretty(content: bytes) -> str:
    try:
        return json.dumps(json.loads(content), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "backslashreplace")


# --- Lanes -------------------------------------------------------------------------------------------


def lanes_view(states: LaneStates, *, every: bool, rows: int | None = None) -> RenderableType:
    """Workers with their lanes, then the lanes where something waits or that nobody owns.

    :param every: all lanes.
    :param rows: how many lanes at most; None for no limit.
    """
    ready = sum(lane.ready for lane in states.lanes)
    known = [lane.unacknowledged for lane in states.lanes if lane.unacknowledged is not None]
    taken = f", {sum(known):,} are being applied" if known else ""
    orphans = sum(1 for lane in states.lanes if lane.owner is None)
    workers = "1 worker" if states.workers == 1 else f"{states.workers} workers"
    head = f"[bold]{len(states.lanes)} lanes, {workers}[/]: {ready:,} messages wait{taken}"
    head += f", [red]{orphans} lanes have no owner[/]" if orphans else ", every lane has its owner"
    parts: list[RenderableType] = [head]
    if states.dead:
        parts.append(f"[red]{states.dead:,} messages were delivered too often and lie in {DEAD}[/]: look at them there")
    if states.lanes and orphans < len(states.lanes):
        parts += ["", _workers_table(states)]
    chosen = [
        lane
        for lane in states.lanes
        if every or lane.ready or lane.unacknowledged or (lane.owner is None and not _all_orphans(states))
    ]
    if not every:
        chosen.sort(key=lambda lane: (-lane.ready, lane.lane))
    if chosen:
        shown = chosen if rows is None else chosen[: max(1, rows)]
        parts += ["", _lanes_table(shown)]
        if len(chosen) > len(shown):
            parts.append(f"[dim]… and {len(chosen) - len(shown)} more[/]")
    return Group(*parts)


def _all_orphans(states: LaneStates) -> bool:
    return all(lane.owner is None for lane in states.lanes)


def owner_words(owner: Owner | None) -> str:
    """An owner as pid, application and address."""
    if owner is None:
        return "[red]nobody[/]"
    where = f" from {said(owner.client)}" if owner.client else ""
    return f"{owner.pid} {said(owner.application or '')}{where}"


def _workers_table(states: LaneStates) -> Table:
    table = plain_table(
        "worker (database session)", "lanes", "waiting", "being applied", right=("lanes", "waiting", "being applied")
    )
    lanes: Counter[Owner] = Counter()
    ready: Counter[Owner] = Counter()
    taken: Counter[Owner] = Counter()
    told = any(lane.unacknowledged is not None for lane in states.lanes)
    for lane in states.lanes:
        if lane.owner is not None:
            lanes[lane.owner] += 1
            ready[lane.owner] += lane.ready
            taken[lane.owner] += lane.unacknowledged or 0
    for owner in sorted(lanes, key=lambda owner: owner.pid):
        being_applied = f"{taken[owner]:,}" if told else ""
        table.add_row(owner_words(owner), str(lanes[owner]), f"{ready[owner]:,}", being_applied)
    return table


def _lanes_table(lanes: Iterable[LaneState]) -> Table:
    table = plain_table(
        "lane", "waiting", "being applied", "oldest waits", "owner", right=("waiting", "being applied", "oldest waits")
    )
    for lane in lanes:
        lag = "" if not lane.ready else "unknown" if lane.lag_seconds is None else span(lane.lag_seconds)
        taken = "" if lane.unacknowledged is None else f"{lane.unacknowledged:,}"
        table.add_row(lane.lane, f"{lane.ready:,}", taken, lag, owner_words(lane.owner))
    return table
