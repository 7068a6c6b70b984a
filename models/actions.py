"""What administrators did: the operations that name an actor, over all accounts, by time."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from psycopg import Connection

from creditlane.amounts import format_amount
from creditlane.contract import OPERATIONS
from creditlane.reports import Action, ActionsPage
from models.reading import DEFAULT_PAGE, check_limit
from models.rules.posting import FLOWS

LOOK_BACK = timedelta(days=30)
"""How far back is looked unless its caller says otherwise."""

FIRST_SPAN = timedelta(hours=1)
"""The span that is looked through first for a page, going back; each next one is four times as long."""

BY_HAND = [name for name, kind in OPERATIONS.items() if "actor" in kind.__struct_fields__]
"""The operations that can name an actor."""

ENTER = [kind for kind, flow in FLOWS.items() if flow.enters == "available"]
LEAVE = [kind for kind, flow in FLOWS.items() if flow.leaves == "available"]

ACTIONS = """
SELECT o.account, o.number, o.operation, o.name, o.status, o.code, o.arguments->>'actor', o.arguments->>'reason',
       o.charged_micro, o.applied_at,
       (SELECT coalesce(sum(CASE WHEN e.kind = ANY(%(enter)s) THEN e.amount_micro
                                 WHEN e.kind = ANY(%(leave)s) THEN -e.amount_micro END), 0)::bigint
        FROM entries e WHERE e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries)
FROM operations o
WHERE o.applied_at >= %(start)s AND o.applied_at <= %(end)s AND o.name = ANY(%(names)s)
  AND (o.applied_at, o.account, o.number) < (%(end)s, %(account)s, %(number)s)
  AND o.arguments->>'actor' IS NOT NULL
  AND (%(actor)s::text IS NULL OR o.arguments->>'actor' = %(actor)s)
ORDER BY o.applied_at DESC, o.account DESC, o.number DESC LIMIT %(limit)s
"""
"""By the index of operations over time, which knows blocks of rows: all operations of the span are read."""


def actions(
    connection: Connection[Any],
    *,
    actor: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = DEFAULT_PAGE,
    before: str | None = None,
) -> ActionsPage:
    """A page of what administrators did, the newest first.

    There is no index of them, which every operation would have to pay for: the operations of the span are read by their
    time, going back until the page is full. So what it takes grows with what was written since.

    :param actor: only by this one.
    :param since: applied then or later; :data:`LOOK_BACK` ago unless given.
    :param until: applied before; now unless given.
    :param limit: of the page.
    :param before: ``next_before`` of the page before.
    :raises ValueError: for a limit or a page that is none.
    """
    check_limit(limit)
    ((now,),) = connection.execute("SELECT ledger_now()").fetchall()
    first = now - LOOK_BACK if since is None else since
    end, account, number = (until or now + timedelta.resolution, "", 0) if before is None else _place(before)
    found: list[tuple[Any, ...]] = []
    span = FIRST_SPAN
    while len(found) <= limit and end >= first:
        start = max(first, end - span)
        page = {
            "actor": actor, "start": start, "end": end, "account": account, "number": number, "names": BY_HAND,
            "enter": ENTER, "leave": LEAVE, "limit": limit + 1 - len(found),
        }  # fmt: skip
        found += connection.execute(ACTIONS, page).fetchall()
        # All of the span was read, its beginning included.
        end, account, number, span = start, "", 0, 4 * span
        if start == first:
            break
    told = [_action(row) for row in found[:limit]]
    last = told[-1] if len(found) > limit else None
    return ActionsPage(
        actions=told,
        since=first,
        next_before=None if last is None else f"{last.applied_at.isoformat()} {last.number} {last.account}",
    )


def _place(before: str) -> tuple[datetime, str, int]:
    """Where the page before ended.

    :raises ValueError: for what no page gave.
    """
    try:
        at, number, account = before.split(" ", 2)
        return datetime.fromisoformat(at), account, int(number)
    except ValueError:
        raise ValueError("before is next_before of the page before") from None


def _action(row: tuple[Any, ...]) -> Action:
    account, number, operation, name, status, code, actor, reason, charged, applied_at, change = row
    return Action(
        account=account,
        number=number,
        operation=operation,
        name=name,
        status=status,
        code=code,
        actor=actor,
        reason=reason,
        charged=format_amount(charged),
        change=format_amount(change),
        applied_at=applied_at,
    )
