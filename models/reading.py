"""The read side: accounts, histories, quarantine and lane owners, as plain functions on a connection.

Amounts leave as decimal strings of credits, instants in UTC. Nothing here writes. Every page has a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec
from psycopg import Connection

from creditlane.amounts import format_amount
from creditlane.codes import SENTENCES
from creditlane.contract import Capture, Consume
from creditlane.reports import EntryLine, HistoryLine, HistoryPage, Status
from models.bisecting import first_operation
from models.columns import ALLOWANCE_COLUMNS, PURCHASE_VALUES, REFERRAL_COLUMNS, SUBSCRIPTION_VALUES
from models.rules.catalog import Catalog
from models.rules.posting import FLOWS
from models.rules.settling import settle
from models.rules.sharing import MEMBER, allowance_of, referral_of
from models.rules.state import COUNTERS, UNOPENED, Account, Grant, Hold, Known, Line, purchase_of, subscription_of

MAX_PAGE = 1000
"""Rows of one page: operations of a history, messages of the quarantine."""

MAX_PAGE_ENTRIES = 10_000
"""Entries of one page of a history; a page that would have more ends earlier."""

DEFAULT_PAGE = 50
"""Rows of a page unless its caller says otherwise."""

BUCKETS = ", ".join(f"{counter}_micro" for counter in COUNTERS)

ACCOUNT = f"""
SELECT kind, status, email, locale, timezone, opened_at, updated_at, next_due_at, operations, seq, head, last_grant,
       {BUCKETS}, debt_micro, reference_micro, converted_to, achieved
FROM accounts WHERE account = %s
"""
SUBSCRIPTION = f"SELECT {SUBSCRIPTION_VALUES} FROM subscriptions WHERE account = %s"
GRANT_COLUMNS = f"""
grant_id, source, priority, features, effective_at, expires_at, created_at, operation, purchase, price_minor,
price_currency, price_per_micro, {BUCKETS}, clawed_back_micro, forgiven_micro, origin
"""
OPEN_GRANTS = f"""
SELECT {GRANT_COLUMNS} FROM grants
WHERE account = %(account)s
  AND (is_open OR grant_id = ANY(ARRAY(
          SELECT g.grant_id FROM purchases p JOIN grants g ON g.account = p.account AND g.purchase = p.purchase
          WHERE p.account = %(account)s
          UNION SELECT unnest(p.lots) FROM purchases p WHERE p.account = %(account)s)))
"""
"""Those with credits left, and all that claw-backs of the account are about."""
PURCHASES = f"SELECT {PURCHASE_VALUES} FROM purchases p WHERE p.account = %s"
OPEN_HOLDS = """
SELECT hold, amount_micro, expires_at, created_at, feature, member
FROM holds WHERE account = %s AND status = 'open'
"""
OPEN_HOLD_LINES = """
SELECT operation, grant_id, taken_micro, returned_micro FROM receipts
WHERE account = %(account)s
  AND operation = ANY(ARRAY(SELECT hold FROM holds WHERE account = %(account)s AND status = 'open'))
ORDER BY operation, line
"""


ALL_GRANTS = f"SELECT {GRANT_COLUMNS} FROM grants WHERE account = %(account)s"
NAMED_HOLDS = """
SELECT hold, amount_micro, expires_at, created_at, feature, member, status
FROM holds WHERE account = %(account)s AND hold = ANY(%(names)s) AND status <> 'open'
"""
NAMED_OPERATIONS = """
SELECT o.operation, o.name, o.status, o.arguments::text, o.result::text, e.grant_id, e.amount_micro,
       coalesce(r.returned_micro, 0)
FROM operations o
LEFT JOIN LATERAL (
    SELECT e.grant_id, e.amount_micro, row_number() OVER (ORDER BY e.seq) AS line FROM entries e
    WHERE e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
      AND o.name IN ('credits.consume', 'credits.capture') AND e.kind IN ('consumed', 'captured')
) e ON true
LEFT JOIN receipts r ON r.account = o.account AND r.operation = o.operation AND r.line = e.line
WHERE o.account = %(account)s AND o.operation = ANY(%(names)s)
ORDER BY o.operation, e.line
"""
"""What was answered before, and what charges took from where."""
NAMED_ALLOWANCES = f"""
SELECT {", ".join([*ALLOWANCE_COLUMNS][1:])} FROM allowances
WHERE account = %(account)s AND (key = ANY(%(names)s) OR key = ANY(ARRAY(
    SELECT '{MEMBER}' || member FROM holds WHERE account = %(account)s AND status = 'open'
    UNION SELECT '{MEMBER}' || (result -> 'allowance' ->> 'member') FROM operations
    WHERE account = %(account)s AND operation = ANY(%(names)s))))
"""
"""Those that are named, and of a pool's members those who hold credits or were charged by what is named."""
REFERRAL = f"SELECT {', '.join([*REFERRAL_COLUMNS][1:])} FROM referrals WHERE account = %(account)s"
PAST = (NAMED_HOLDS, NAMED_OPERATIONS, NAMED_ALLOWANCES, REFERRAL)


# --- Accounts ----------------------------------------------------------------------------------------


class AccountBalance(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The balance as a result tells it: what is nothing is left out of its JSON."""

    available: str
    """Spendable now."""
    held: str = "0"
    in_transit: str = "0"
    """Credits on their way to another account."""
    debt: str = "0"
    upcoming: str = "0"
    """Credits of grants that take effect later."""
    frozen: str = "0"
    """Credits of disputed purchases, which cannot be used for now."""
    by_source: dict[str, str] = {}
    """The spendable ones, in burn-down order of their grants."""


class GrantLine(msgspec.Struct, kw_only=True, frozen=True):
    """One lot with credits left."""

    grant: int
    source: str
    available: str
    held: str
    granted: str
    """What it was worth at first: granted and received."""
    priority: int
    features: list[str] | None
    """What it may be spent on; None for everything."""
    effective_at: datetime
    expires_at: datetime | None
    created_at: datetime
    operation: str
    purchase: str | None
    frozen: bool
    """Whether its credits cannot be used for now: its purchase is disputed."""


class HoldLine(msgspec.Struct, kw_only=True, frozen=True):
    """Credits set aside."""

    hold: str
    amount: str
    feature: str | None
    member: str | None
    created_at: datetime
    expires_at: datetime


class AccountSummary(msgspec.Struct, kw_only=True, frozen=True):
    """An account as an operation would find it at :attr:`as_of`: what is due by then counts as done."""

    account: str
    kind: str
    status: str
    """``unopened`` (only mentioned so far), ``open``, ``frozen`` or ``closed``."""
    converted_to: str | None
    """Of a lead that has signed up, the user."""
    email: str | None
    locale: str | None
    timezone: str | None
    opened_at: datetime | None
    updated_at: datetime
    """The time of its last operation."""
    next_due_at: datetime | None
    """When time changes it next: a hold's time-out, a grant's expiry, a renewal."""
    as_of: datetime
    operations: int
    entries: int
    balance: AccountBalance
    grants: list[GrantLine]
    """Those with credits left, in burn-down order."""
    holds: list[HoldLine]
    """Those that are open, the oldest first."""


def account_summary(connection: Connection[Any], account: str, catalog: Catalog) -> AccountSummary | None:
    """An account with its balance, its open grants in burn-down order and its open holds.

    Credits that have expired, holds that have timed out and periods that have ended are settled first, in memory, by
    the rules themselves; so the answer is what an operation would find now.

    :param connection: not within a transaction.
    :param catalog: the one in force, by which plans renew.
    :returns: None for an account that no operation ever named.
    """
    loaded = load_account(connection, account)
    if loaded is None:
        return None
    state, now = loaded
    entries = state.seq
    settle(state, now, catalog)
    frozen = state.frozen
    return AccountSummary(
        account=account,
        kind=state.kind,
        status=state.status,
        converted_to=state.converted_to,
        email=state.email,
        locale=state.locale,
        timezone=state.timezone,
        opened_at=state.opened_at,
        updated_at=state.updated_at or now,
        next_due_at=state.due_at(),
        as_of=now,
        operations=state.operations,
        entries=entries,
        balance=_balance(state, now),
        grants=[_grant_line(grant, grant.purchase in frozen) for grant in state.order if grant.is_open],
        holds=[
            HoldLine(
                hold=hold.id,
                amount=format_amount(hold.amount),
                feature=hold.feature,
                member=hold.member,
                created_at=hold.created_at,
                expires_at=hold.expires_at,
            )
            for hold in sorted(state.holds.values(), key=lambda hold: (hold.created_at, hold.id))
            if hold.status == "open"
        ],
    )


def account_balance(connection: Connection[Any], account: str, catalog: Catalog) -> AccountBalance | None:
    """An account's balance at the database's time, as :func:`account_summary` has it.

    :param connection: not within a transaction.
    :param catalog: the one in force.
    :returns: None for an account that was never opened.
    """
    loaded = load_account(connection, account)
    if loaded is None or loaded[0].status == UNOPENED:
        return None
    state, now = loaded
    settle(state, now, catalog)
    return _balance(state, now)


class LastRenewal(msgspec.Struct, kw_only=True, frozen=True):
    """What began the period under way."""

    at: datetime
    allotted: str
    rolled_over: str
    expired: str
    undone: bool


class PlanSummary(msgspec.Struct, kw_only=True, frozen=True):
    """An account's plan as an operation would find it now; amounts in credits."""

    account: str
    plan: str
    status: str
    """``active``, ``cancelled`` (it ends with its period), ``unpaid`` (in the days of grace) or ``ended``."""
    monthly_credits: str
    unlimited: bool
    mode: str
    anchor: datetime
    zone: str
    period_start: datetime
    period_end: datetime
    paid_until: datetime | None
    """None for a plan without a price."""
    ended_at: datetime | None
    allotted: str
    """What the highest plan of this period gives for it."""
    remaining: str | None
    """What is left of the period's credits; None where they do not end with it."""
    rolled_over: str | None
    next_plan: str | None
    """The plan from the next renewal on, where that is another."""
    next: str
    """What comes next, in words."""
    payment: str | None
    last_renewal: LastRenewal | None


def plan_summary(state: Account, now: datetime, catalog: Catalog) -> PlanSummary | None:
    """An account's plan, or its last one.

    :param state: as :func:`load_account` gives it; it is settled.
    :param now: the account's time, likewise.
    :param catalog: the one in force.
    :returns: None for an account that never had one.
    """
    settle(state, now, catalog)
    subscription = state.subscription
    if subscription is None:
        return None
    terms = subscription.terms
    renewal = subscription.renewal
    status: str = subscription.status
    end = f"{subscription.period_end:%Y-%m-%d %H:%M} UTC"
    if not subscription.is_active:
        coming = "nothing: it has ended"
    elif subscription.cancels:
        status, coming = "cancelled", f"ends on {end}"
    elif subscription.renews_by_itself:
        coming = f"renews on {end}"
    elif now < subscription.period_end:
        coming = f"renews when it is paid for, due on {end}"
    else:
        status, coming = "unpaid", f"ends on {subscription.grace_ends:%Y-%m-%d %H:%M} UTC unless it is paid for"
    remaining = sum(state.grants[lot].available for lot in subscription.lots if lot in state.grants)
    rolled = sum(grant.available for grant in state.order if grant.source == terms.rollover_source)
    return PlanSummary(
        account=state.account,
        plan=terms.plan,
        status=status,
        monthly_credits=format_amount(terms.monthly_micro),
        unlimited=terms.unlimited,
        mode=terms.mode,
        anchor=subscription.anchor,
        zone=subscription.zone,
        period_start=subscription.period_start,
        period_end=subscription.period_end,
        paid_until=subscription.paid_until,
        ended_at=subscription.ended_at,
        allotted=format_amount(subscription.allotted),
        remaining=None if terms.mode == "accumulate" or terms.unlimited else format_amount(remaining),
        rolled_over=format_amount(rolled) if terms.mode == "rollover" else None,
        next_plan=None if subscription.pending is None else subscription.pending.plan,
        next=coming,
        payment=subscription.payment,
        last_renewal=None
        if renewal is None
        else LastRenewal(
            at=renewal.at,
            allotted=format_amount(renewal.allotted),
            rolled_over=format_amount(renewal.rolled),
            expired=format_amount(renewal.expired),
            undone=renewal.undone,
        ),
    )


def account_exists(connection: Connection[Any], account: str) -> bool:
    """Whether any operation ever named this account."""
    return connection.execute("SELECT FROM accounts WHERE account = %s", (account,)).fetchone() is not None


def load_account(
    connection: Connection[Any], account: str, names: Sequence[str] | None = None
) -> tuple[Account, datetime] | None:
    """The account as it was last written, with what time can change of it, and its time now.

    :param connection: not within a transaction.
    :param names: for who goes on from there: all grants and the referral come along, and the operations, closed holds
        and allowances that are called so.
    :returns: None for an account that no operation ever named.
    """
    with connection.transaction(), connection.pipeline():
        # One snapshot: an operation that commits meanwhile is seen whole or not at all.
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        row = connection.execute(ACCOUNT, (account,))
        named = {"account": account, "names": names}
        grants = connection.execute(OPEN_GRANTS if names is None else ALL_GRANTS, named)
        past = [connection.execute(query, named) for query in PAST] if names is not None else []
        purchases = connection.execute(PURCHASES, (account,))
        holds = connection.execute(OPEN_HOLDS, (account,))
        lines = connection.execute(OPEN_HOLD_LINES, {"account": account})
        subscription = connection.execute(SUBSCRIPTION, (account,)).fetchone()
        clock = connection.execute("SELECT ledger_now()")
        found = row.fetchone()
        instant = clock.fetchone()
        if found is None or instant is None:
            return None
        state = Account(account, found)
        for grant in grants:
            state.add_grant(grant_of(grant))
        for purchase in purchases:
            state.purchases[purchase[1]] = purchase_of(purchase[1:])
        for hold in holds:
            state.holds[hold[0]] = Hold(*hold)
        for operation, grant_id, taken, returned in lines:
            state.holds[operation].lines.append(Line(grant_id, taken, returned))
        if subscription is not None:
            state.subscription = subscription_of(subscription[1:])
        if past:
            _add_past(state, *past)
    now: datetime = instant[0]
    if state.updated_at is not None:
        now = max(now, state.updated_at)
    return state, now


def _add_past(
    state: Account,
    holds: Iterable[Sequence[Any]],
    operations: Iterable[Sequence[Any]],
    allowances: Iterable[Sequence[Any]],
    referrals: Iterable[Sequence[Any]],
) -> None:
    """Add what :data:`PAST` found."""
    for hold in holds:
        state.holds[hold[0]] = Hold(*hold)
    for operation, name, status, arguments, result, grant_id, taken, returned in operations:
        known = state.known.get(operation)
        if known is None:
            charges = status == "applied" and name in (Consume.operation, Capture.operation)
            known = Known(name, status, result.encode(), None, arguments.encode(), [] if charges else None)
            state.known[operation] = known
        if known.lines is not None and grant_id is not None:
            known.lines.append(Line(grant_id, taken, returned))
    for allowance in allowances:
        state.allowances[allowance[0]] = allowance_of(allowance)
    for referral in referrals:
        state.referral = referral_of(referral)


def grant_of(row: Sequence[Any]) -> Grant:
    """A grant of its :data:`GRANT_COLUMNS`."""
    grant_id, source, priority, features, *rest = row
    return Grant(grant_id, source, priority, None if features is None else frozenset(features), *rest)


def _balance(state: Account, now: datetime) -> AccountBalance:
    by_source: dict[str, int] = {}
    upcoming = frozen = 0
    disputed = state.frozen
    for grant in state.order:
        if grant.purchase in disputed:
            frozen += grant.available
        elif grant.available and grant.effective_at <= now:
            by_source[grant.source] = by_source.get(grant.source, 0) + grant.available
        else:
            upcoming += grant.available
    others = {
        "held": state.held, "in_transit": state.in_transit, "debt": state.debt, "upcoming": upcoming, "frozen": frozen,
    }  # fmt: skip
    return AccountBalance(
        available=format_amount(state.available - upcoming - frozen),
        **{name: format_amount(amount) for name, amount in others.items() if amount},
        by_source={source: format_amount(amount) for source, amount in by_source.items()},
    )


def _grant_line(grant: Grant, is_frozen: bool) -> GrantLine:
    return GrantLine(
        grant=grant.id,
        source=grant.source,
        available=format_amount(grant.available),
        held=format_amount(grant.held),
        granted=format_amount(grant.granted + grant.received),
        priority=grant.priority,
        features=None if grant.features is None else sorted(grant.features),
        effective_at=grant.effective_at,
        expires_at=grant.expires_at,
        created_at=grant.created_at,
        operation=grant.operation,
        purchase=grant.purchase,
        frozen=is_frozen,
    )


# --- History -----------------------------------------------------------------------------------------


_ENTER = [kind for kind, flow in FLOWS.items() if flow.enters == "available"]
_LEAVE = [kind for kind, flow in FLOWS.items() if flow.leaves == "available"]
_CHANGE = """
CASE WHEN e.kind = ANY(%(enter)s) THEN e.amount_micro WHEN e.kind = ANY(%(leave)s) THEN -e.amount_micro ELSE 0 END
"""
BY_INDEX = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL enable_sort = off"
"""A page is read off the index, however many operations the account has: sorting would read them all first."""
HISTORY = f"""
SELECT o.number, o.operation, o.name, o.status, o.code, o.feature, o.quantity_micro, o.member, o.charged_micro,
       o.applied_at, o.occurred_at, o.first_seq, o.entries, o.arguments, o.result,
       coalesce((SELECT sum({_CHANGE}) FROM entries e
                 WHERE e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries), 0)::bigint
FROM operations o
WHERE o.account = %(account)s
  AND o.number < coalesce(%(before)s, 9223372036854775807)
  AND o.number >= coalesce(%(first)s, 1) AND o.number < coalesce(%(end)s, 9223372036854775807)
  AND (%(feature)s::text IS NULL OR o.feature = %(feature)s)
  AND (%(member)s::text IS NULL OR o.member = %(member)s)
  AND (%(name)s::text IS NULL OR o.name = %(name)s)
  AND (%(status)s::text IS NULL OR o.status = %(status)s)
  AND (%(source)s::text IS NULL OR EXISTS (
        SELECT FROM entries e JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id
        WHERE e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
          AND g.source = %(source)s))
ORDER BY o.number DESC LIMIT %(limit)s
"""
_ENTRY = f"""
SELECT e.operation, e.recorded_at, e.seq, e.kind, e.amount_micro, {_CHANGE}, e.balance_after_micro, e.grant_id,
       g.source, e.at, e.refers_to
FROM entries e LEFT JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id
WHERE e.account = %(account)s
"""
ENTRIES = f"""
{_ENTRY} AND e.seq = ANY(%(seqs)s) ORDER BY e.seq
"""
LAPSED = f"""
{_ENTRY} AND e.operation IS NULL
  AND e.seq >= coalesce((SELECT first_seq + entries FROM operations WHERE account = %(account)s AND number < %(first)s
                         AND first_seq IS NOT NULL ORDER BY number DESC LIMIT 1), 1)
  AND e.seq < coalesce((SELECT first_seq FROM operations WHERE account = %(account)s AND number > %(last)s
                        AND first_seq IS NOT NULL ORDER BY number LIMIT 1), 9223372036854775807)
ORDER BY e.seq LIMIT {MAX_PAGE_ENTRIES}
"""


def history(
    connection: Connection[Any],
    account: str,
    *,
    limit: int = DEFAULT_PAGE,
    before: int | None = None,
    feature: str | None = None,
    name: str | None = None,
    status: Status | None = None,
    member: str | None = None,
    source: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    with_entries: bool = False,
) -> HistoryPage:
    """A page of an account's operations, the newest first.

    :param connection: not within a transaction.
    :param limit: operations of the page, at most :data:`MAX_PAGE`; with entries a page may end earlier.
    :param before: only operations with a smaller number: ``next_before`` of the page before.
    :param name: the task name, such as ``credits.consume``.
    :param member: who of a pool sent it.
    :param source: those that moved credits of a grant of this source.
    :param since: applied at this instant or later; ``until``: applied before.
    :param with_entries: whether each line has its entries.
    :raises ValueError: for a limit that is none.
    """
    check_limit(limit)
    filters = {"feature": feature, "name": name, "status": status, "member": member, "source": source}
    signs = {"enter": _ENTER, "leave": _LEAVE}
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute(BY_INDEX)
        first = None if since is None else first_operation(connection, account, since)
        end = None if until is None else first_operation(connection, account, until)
        page = {"account": account, "before": before, "limit": limit + 1, "first": first, "end": end}
        found = cursor.execute(HISTORY, {**page, **filters, **signs}).fetchall()
        rows = found[: _page_length(found, limit) if with_entries else limit]
        beyond = found[len(rows)] if len(found) > len(rows) else None
        lines = [_history_line(row) for row in rows]
        if with_entries:
            seqs = [seq for row in rows for seq in range(row[11] or 0, (row[11] or 0) + row[12])]
            written = cursor.execute(ENTRIES, {"account": account, "seqs": seqs, **signs}).fetchall()
            lines = _with_entries(lines, written)
        # Between filtered lines other operations are missing, so what time did would hang in the air.
        if lines and not any(value is not None for value in (*filters.values(), since, until)):
            span = {"account": account, "first": lines[-1].number, "last": lines[0].number}
            lapsed = cursor.execute(LAPSED, {**span, **signs}).fetchall()
            lines = _with_lapsed(lines, lapsed, None if beyond is None else beyond[9])
    return HistoryPage(lines=lines, next_before=lines[-1].number if beyond is not None else None)


def _page_length(rows: Sequence[tuple[Any, ...]], limit: int) -> int:
    """How many operations fit a page with their entries; at least one."""
    entries = 0
    for position, row in enumerate(rows[:limit]):
        entries += row[12]
        if position and entries > MAX_PAGE_ENTRIES:
            return position
    return min(limit, len(rows))


def _history_line(row: tuple[Any, ...]) -> HistoryLine:
    number, operation, name, status, code, feature, quantity, member, charged, applied_at, occurred_at = row[:11]
    _first_seq, entries, arguments, result, change = row[11:]
    subject: object = None
    for field in ("hold", "operation", "to", "sender", "transfer", "source", "purchase", "grant"):
        if arguments.get(field) is not None:
            subject = arguments[field]
            break
    return HistoryLine(
        number=number,
        operation=operation,
        name=name,
        status=status,
        code=code,
        feature=feature,
        quantity=_text(arguments.get("quantity")) if quantity is None else format_amount(quantity),
        member=member,
        charged=format_amount(charged),
        change=format_amount(change),
        balance=result.get("balance", {}).get("available"),
        applied_at=applied_at,
        occurred_at=occurred_at,
        reason=arguments.get("reason") or arguments.get("message") or arguments.get("refused"),
        actor=arguments.get("actor"),
        refusal=_refusal(code, result),
        subject=_text(subject),
        entries=entries,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _refusal(code: str | None, result: dict[str, Any]) -> str | None:
    if code is None:
        return None
    if "required" in result:
        return f"{result['required']} needed, {result['available']} available"
    reason: str | None = result.get("reason")
    return None if reason in SENTENCES.values() else reason


def _entry_line(row: Sequence[Any]) -> EntryLine:
    seq, kind, amount, change, balance, grant, source, at, refers_to = row
    return EntryLine(
        seq=seq,
        kind=kind,
        amount=format_amount(amount),
        change=format_amount(change),
        balance=format_amount(balance),
        grant=grant,
        source=source,
        at=at,
        refers_to=refers_to,
    )


def _with_entries(lines: list[HistoryLine], rows: Sequence[tuple[Any, ...]]) -> list[HistoryLine]:
    written: dict[str, list[EntryLine]] = {}
    for operation, _recorded_at, *entry in rows:
        written.setdefault(operation, []).append(_entry_line(entry))
    return [msgspec.structs.replace(line, lines=written.get(line.operation, [])) for line in lines]


def _with_lapsed(
    lines: list[HistoryLine], rows: Sequence[tuple[Any, ...]], beyond: datetime | None
) -> list[HistoryLine]:
    """Put what time did before the operation that settled it.

    That is the first one of the same instant: an account is settled at the instant its operation is applied.

    :param beyond: when the operation before the page was applied; of the same instant, it was that one.
    """
    lapsed: dict[datetime, list[EntryLine]] = {}
    for _operation, recorded_at, *entry in rows:
        if recorded_at != beyond:
            lapsed.setdefault(recorded_at, []).append(_entry_line(entry))
    told: list[HistoryLine] = []
    for line in reversed(lines):
        entries = lapsed.pop(line.applied_at, None)
        told.append(line if entries is None else msgspec.structs.replace(line, lapsed=entries))
    return told[::-1]


# --- Quarantine --------------------------------------------------------------------------------------


class QuarantineLine(msgspec.Struct, kw_only=True, frozen=True):
    """A quarantined message without its content."""

    id: int
    status: str
    """``open``, ``replayed`` or ``dropped``."""
    code: str
    reason: str
    queue: str
    task: str | None
    operation: str | None
    account: str | None
    content_type: str | None
    body_bytes: int
    times_seen: int
    received_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None


class QuarantinedMessage(msgspec.Struct, kw_only=True, frozen=True):
    """A quarantined message whole."""

    line: QuarantineLine
    traceback: str | None
    headers: bytes
    """Headers and properties, as JSON."""
    body: bytes


class QuarantinePage(msgspec.Struct, kw_only=True, frozen=True):
    """A page of the quarantine, the newest message first."""

    lines: list[QuarantineLine]
    next_before: int | None


_QUARANTINE_COLUMNS = """
id, status, code, reason, queue, task, operation, account, content_type, octet_length(body), times_seen, received_at,
resolved_at, resolved_by
"""
QUARANTINE = f"""
SELECT {_QUARANTINE_COLUMNS} FROM quarantine
WHERE (%(status)s::text IS NULL OR status = %(status)s) AND id < coalesce(%(before)s, 9223372036854775807)
ORDER BY id DESC LIMIT %(limit)s
"""
OPEN_QUARANTINE = f"""
SELECT {_QUARANTINE_COLUMNS} FROM quarantine
WHERE status = 'open' AND id < coalesce(%(before)s, 9223372036854775807) ORDER BY id DESC LIMIT %(limit)s
"""
QUARANTINED = f"SELECT {_QUARANTINE_COLUMNS}, traceback, headers, body FROM quarantine WHERE id = %s"


def quarantine(
    connection: Connection[Any],
    *,
    limit: int = DEFAULT_PAGE,
    before: int | None = None,
    status: str | None = "open",
) -> QuarantinePage:
    """A page of the quarantine, the newest message first.

    :param limit: messages of the page, at most :data:`MAX_PAGE`.
    :param before: only messages with a smaller id: ``next_before`` of the page before.
    :param status: ``open``, ``replayed``, ``dropped``, or None for all.
    :raises ValueError: for a limit that is none.
    """
    check_limit(limit)
    statement = OPEN_QUARANTINE if status == "open" else QUARANTINE  # the former has an index
    rows = connection.execute(statement, {"status": status, "before": before, "limit": limit + 1}).fetchall()
    lines = [_quarantine_line(row) for row in rows[:limit]]
    return QuarantinePage(lines=lines, next_before=lines[-1].id if len(rows) > limit else None)


def quarantined_message(connection: Connection[Any], id: int) -> QuarantinedMessage | None:
    """One quarantined message whole; None when there is none of this id."""
    row = connection.execute(QUARANTINED, (id,)).fetchone()
    if row is None:
        return None
    *columns, traceback, headers, body = row
    return QuarantinedMessage(
        line=_quarantine_line(columns), traceback=traceback, headers=bytes(headers), body=bytes(body)
    )


def _quarantine_line(row: Sequence[Any]) -> QuarantineLine:
    return QuarantineLine(**dict(zip(QuarantineLine.__struct_fields__, row, strict=True)))


# --- Lanes -------------------------------------------------------------------------------------------


class Owner(msgspec.Struct, kw_only=True, frozen=True):
    """The database session that owns a lane."""

    pid: int
    """The backend's process id, on the database's machine."""
    application: str | None
    client: str | None
    """Where it connects from, as ``address:port``; None for a local socket, or where we may not see it."""


class LaneOwners(msgspec.Struct, kw_only=True, frozen=True):
    """Who owns which lane, and how many workers there are."""

    workers: int
    owners: dict[int, Owner]
    """By the lane's number; lanes that nobody owns are not in it."""


LANE_LOCKS = """
SELECT l.classid::bigint, l.objid::bigint, l.pid, a.application_name,
       host(a.client_addr) || coalesce(':' || nullif(a.client_port, -1), '')
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid IN (%s, %s)
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def lane_owners(connection: Connection[Any], lane_class: int, presence_class: int) -> LaneOwners:
    """Who owns the lanes at this moment, by the advisory locks.

    :param lane_class: the class of the lanes' locks; ``presence_class``: that of the lock every worker shares.
    """
    rows = connection.execute(LANE_LOCKS, (lane_class, presence_class)).fetchall()
    return LaneOwners(
        workers=len({pid for kind, _, pid, _, _ in rows if kind == presence_class}),
        owners={
            lane: Owner(pid=pid, application=application or None, client=client)
            for kind, lane, pid, application, client in rows
            if kind == lane_class
        },
    )


def check_limit(limit: int) -> None:
    """Refuse a page of a length that none has.

    :raises ValueError: for a limit that is none.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} rows, not {limit}")
