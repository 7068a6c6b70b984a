"""Payments for an operator: what came, what it says, what it led to, and how to have what went wrong tried again."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, get_args

import msgspec
from psycopg import Connection

from models.reading import DEFAULT_PAGE, MAX_PAGE
from models.rules.facts import Stage

Status = Literal["received", "done", "ignored", "parked", "dropped"]


class PaymentEvent(msgspec.Struct, kw_only=True, frozen=True):
    """An event of the inbox."""

    id: int
    provider: str
    event: str
    type: str
    source: str
    status: str
    created_at: datetime
    received_at: datetime
    code: str | None = None
    reason: str | None = None
    attempts: int = 0
    next_attempt_at: datetime | None = None
    resolved_by: str | None = None


class Fact(msgspec.Struct, kw_only=True, frozen=True):
    """What is known of one of a provider's objects."""

    kind: str
    key: str
    status: str
    code: str | None
    reason: str | None
    occurred_at: datetime
    heard_at: datetime
    event: int
    said: dict[str, Any]


class Sent(msgspec.Struct, kw_only=True, frozen=True):
    """An operation that facts led to, and what became of it."""

    operation: str
    name: str
    account: str
    effect: str
    purchase: str | None
    created_at: datetime
    arguments: dict[str, Any]
    status: str
    """``sent`` until a lane has applied it, then the ledger's answer."""
    code: str | None
    applied_at: datetime | None
    charged_micro: int | None


class Lot(msgspec.Struct, kw_only=True, frozen=True):
    """A grant that a purchase gave."""

    account: str
    grant: int
    source: str
    purchase: str
    expires_at: datetime | None
    granted_micro: int
    available_micro: int
    held_micro: int
    consumed_micro: int
    expired_micro: int
    revoked_micro: int


class Explanation(msgspec.Struct, kw_only=True, frozen=True):
    """All that belongs to one purchase, or one subscription: facts, operations, and the grants that came of them."""

    names: list[str]
    """Under what the provider knows it."""
    facts: list[Fact]
    operations: list[Sent]
    lots: list[Lot]


EVENTS = """
SELECT id, provider, event_id, type, source, status, created_at, received_at, code, reason, attempts, next_attempt_at,
       resolved_by
FROM payment_events WHERE id < %(before)s {filter} ORDER BY id DESC LIMIT %(limit)s
"""
BODY = "SELECT body FROM payment_events WHERE id = %s"
RETRY = """
UPDATE payment_events SET status = 'received', code = NULL, reason = NULL, attempts = 0, done_at = NULL,
       next_attempt_at = ledger_now(), resolved_by = %s
WHERE id = ANY(%s) AND status = 'parked' RETURNING id
"""
DROP = """
UPDATE payment_events SET status = 'dropped', done_at = ledger_now(), next_attempt_at = NULL, resolved_by = %s
WHERE id = ANY(%s) AND status = 'parked' RETURNING id
"""
LOOK_NOW = """
UPDATE payment_groups SET next_look_at = ledger_now() WHERE id IN (
    SELECT group_id FROM payment_facts WHERE status IN ('waiting', 'parked') AND (%(all)s OR group_id = ANY(%(groups)s))
) RETURNING id
"""
GROUPS = """
SELECT group_id FROM payment_aliases WHERE id = %(name)s
UNION SELECT group_id FROM payment_facts WHERE purchase = %(name)s
UNION SELECT group_id FROM payment_operations WHERE operation = %(name)s
UNION SELECT group_id FROM payment_facts WHERE key = ANY(%(keys)s)
"""
NAMES = "SELECT DISTINCT id FROM payment_aliases WHERE group_id = ANY(%s) ORDER BY id LIMIT %s"
FACTS = """
SELECT kind, key, status, code, reason, occurred_at, heard_at, event, fact::text FROM payment_facts
WHERE group_id = ANY(%s) ORDER BY occurred_at, kind, key LIMIT %s
"""
OPERATIONS = """
SELECT p.operation, p.name, p.account, p.effect, p.purchase, p.created_at, p.arguments::text,
       coalesce(o.status, 'sent'), o.code, o.applied_at, o.charged_micro
FROM payment_operations p LEFT JOIN operations o ON o.account = p.account AND o.operation = p.operation
WHERE p.group_id = ANY(%s) ORDER BY p.number LIMIT %s
"""
LOTS = """
SELECT g.account, g.grant_id, g.source, g.purchase, g.expires_at, g.granted_micro + g.received_micro + g.restored_micro,
       g.available_micro, g.held_micro + g.in_transit_micro, g.consumed_micro, g.expired_micro, g.revoked_micro
FROM (SELECT DISTINCT account, purchase FROM payment_operations WHERE group_id = ANY(%s) AND purchase IS NOT NULL) p
JOIN grants g ON g.account = p.account AND g.purchase = p.purchase ORDER BY g.account, g.grant_id LIMIT %s
"""


def events(
    connection: Connection[Any], *, status: str | None = None, limit: int = DEFAULT_PAGE, before: int | None = None
) -> list[PaymentEvent]:
    """A page of the inbox, the newest event first.

    :param before: only older ones than this row.
    """
    filtered = EVENTS.format(filter="" if status is None else "AND status = %(status)s")
    values = {"before": 2**62 if before is None else before, "status": status, "limit": min(limit, MAX_PAGE)}
    return [
        PaymentEvent(
            id=id, provider=provider, event=event, type=type, source=source, status=found, created_at=created_at,
            received_at=received_at, code=code, reason=reason, attempts=attempts, next_attempt_at=next_attempt_at,
            resolved_by=resolved_by,
        )
        for id, provider, event, type, source, found, created_at, received_at, code, reason, attempts, next_attempt_at,
            resolved_by in connection.execute(filtered, values)
    ]  # fmt: skip


def body(connection: Connection[Any], event: int) -> bytes | None:
    """An event's body as it came, or None when there is no such row."""
    row = connection.execute(BODY, (event,)).fetchone()
    return None if row is None else bytes(row[0])


def retry(connection: Connection[Any], chosen: list[int], actor: str) -> list[int]:
    """Have parked events read again; a sweep picks them up within a minute.

    :param chosen: their rows.
    :returns: those that were parked.
    """
    return [id for (id,) in connection.execute(RETRY, (actor, chosen))]


def drop(connection: Connection[Any], chosen: list[int], actor: str) -> list[int]:
    """Give parked events up; they stay in the inbox.

    :returns: those that were parked.
    """
    return [id for (id,) in connection.execute(DROP, (actor, chosen))]


def look_now(connection: Connection[Any], name: str | None = None) -> int:
    """Have what waits or is parked looked at again, within a minute, by the catalog that is in force then.

    :param name: of one purchase, as for :func:`explain`; all unless given.
    :returns: how many groups of facts.
    """
    groups = [] if name is None else _groups(connection, name)
    return len(connection.execute(LOOK_NOW, {"all": name is None, "groups": groups}).fetchall())


def explain(connection: Connection[Any], name: str) -> Explanation | None:
    """What came of a purchase, a refund, a dispute or a subscription.

    :param name: any id of the provider's that it has, the ledger's name of the purchase, or an operation of it.
    :returns: None when nothing is known by that name.
    """
    groups = _groups(connection, name)
    if not groups:
        return None
    return Explanation(
        names=[id for (id,) in connection.execute(NAMES, (groups, MAX_PAGE))],
        facts=[
            Fact(
                kind=kind, key=key, status=status, code=code, reason=reason, occurred_at=occurred_at, heard_at=heard_at,
                event=event, said=msgspec.json.decode(fact),
            )
            for kind, key, status, code, reason, occurred_at, heard_at, event, fact in connection.execute(
                FACTS, (groups, MAX_PAGE)
            )
        ],
        operations=[
            Sent(
                operation=operation, name=called, account=account, effect=effect, purchase=purchase,
                created_at=created_at, arguments=msgspec.json.decode(arguments), status=status, code=code,
                applied_at=applied_at, charged_micro=charged,
            )
            for operation, called, account, effect, purchase, created_at, arguments, status, code, applied_at, charged
            in connection.execute(OPERATIONS, (groups, MAX_PAGE))
        ],
        lots=[
            Lot(
                account=account, grant=grant, source=source, purchase=purchase, expires_at=expires_at,
                granted_micro=granted, available_micro=available, held_micro=held, consumed_micro=consumed,
                expired_micro=expired, revoked_micro=revoked,
            )
            for account, grant, source, purchase, expires_at, granted, available, held, consumed, expired, revoked
            in connection.execute(LOTS, (groups, MAX_PAGE))
        ],
    )  # fmt: skip


def _groups(connection: Connection[Any], name: str) -> list[int]:
    keys = [name, *(f"{name}:{stage}" for stage in get_args(Stage))]  # a dispute's facts are kept by its stages
    found = connection.execute(GROUPS, {"name": name, "keys": keys})
    return sorted({group for (group,) in found})
