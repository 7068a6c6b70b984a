"""What is known of payments: facts by the objects they speak of, their other names, and what they led to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
from psycopg import Connection

from models.rules.catalog import Catalog, Money
from models.rules.facts import (
    PURCHASE_ALIASES,
    Alias,
    DisputeChanged,
    Fact,
    Linked,
    PackPaid,
    PaymentFailed,
    PeriodPaid,
    RefundChanged,
    SubscriptionChanged,
)
from models.rules.resolving import (
    PACK,
    Effect,
    Heard,
    Key,
    Order,
    Resolution,
    Verdict,
    key_of,
    purchase_name,
    resolve,
)
from models.rules.state import CLOSED, FROZEN, OPEN

LOCK_KEY = (0x6C61_7061, 0)
"""The advisory lock under which operations are made of facts and sent."""

LOCK_SECONDS = 60
"""How long a session waits for it."""

GROUP_ALIASES = PURCHASE_ALIASES | {"subscription"}
"""What makes facts belong together."""

BINDING_ALIASES = frozenset({"customer", "subscription"})

LOOK_SECONDS = (60, 3600)
"""How soon, and how late, a group is looked at again whose account is not known or not open."""

MAX_FACTS = 5000
"""Facts of one group: those of a subscription of many years are fewer by far."""

AnyFact = PackPaid | PeriodPaid | RefundChanged | DisputeChanged | SubscriptionChanged | PaymentFailed | Linked

encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AnyFact).decode

KNOWN_FACT = """
SELECT fact::text, group_id FROM payment_facts WHERE provider = %s AND livemode = %s AND kind = %s AND key = %s
"""
KNOWN_GROUPS = """
SELECT DISTINCT a.group_id FROM payment_aliases a JOIN unnest(%s::text[], %s::text[]) AS k(kind, id)
  ON a.kind = k.kind AND a.id = k.id WHERE a.provider = %s AND a.livemode = %s
"""
NEW_GROUP = "INSERT INTO payment_groups DEFAULT VALUES RETURNING id"
JOIN_GROUPS = tuple(
    f"UPDATE {table} SET group_id = %s WHERE group_id = ANY(%s)"
    for table in ("payment_facts", "payment_aliases", "payment_operations")
)
ADD_ALIASES = """
INSERT INTO payment_aliases (provider, livemode, kind, id, group_id)
SELECT %s, %s, k.kind, k.id, %s FROM unnest(%s::text[], %s::text[]) AS k(kind, id) ON CONFLICT DO NOTHING
"""
ADD_BINDINGS = """
INSERT INTO payment_bindings (provider, livemode, kind, id, account, bound_at)
SELECT %s, %s, k.kind, k.id, %s, ledger_now() FROM unnest(%s::text[], %s::text[]) AS k(kind, id) ON CONFLICT DO NOTHING
"""
PUT_FACT = """
INSERT INTO payment_facts (provider, livemode, kind, key, group_id, event, purchase, fact, occurred_at, heard_at,
                           status)
VALUES (%(provider)s, %(livemode)s, %(kind)s, %(key)s, %(group)s, %(event)s, %(purchase)s, %(fact)s, %(occurred_at)s,
        ledger_now(), 'noted')
ON CONFLICT (provider, livemode, kind, key) DO UPDATE
SET fact = excluded.fact, event = excluded.event, occurred_at = excluded.occurred_at, group_id = excluded.group_id
"""
GROUP_FACTS = f"SELECT fact::text, heard_at FROM payment_facts WHERE group_id = %s LIMIT {MAX_FACTS + 1}"
GROUP_OPERATIONS = """
SELECT effect, arguments::text FROM payment_operations WHERE group_id = %s ORDER BY number
"""
ORDERS = """
SELECT id, account, pack, credits_micro, price_minor, currency FROM payment_orders
WHERE id = ANY(%s) AND status IN ('quoted', 'paid')
"""
BOUND = """
SELECT b.account FROM payment_bindings b JOIN unnest(%s::text[], %s::text[]) AS k(kind, id)
  ON b.kind = k.kind AND b.id = k.id WHERE b.provider = %s AND b.livemode = %s
ORDER BY b.bound_at, b.kind, b.id LIMIT 1
"""

JUDGE = """
UPDATE payment_facts f SET status = u.status, code = u.code, reason = u.reason
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[]) AS u(kind, key, status, code, reason)
WHERE f.provider = %s AND f.livemode = %s AND f.kind = u.kind AND f.key = u.key
  AND (f.status, f.code, f.reason) IS DISTINCT FROM (u.status, u.code, u.reason)
"""
ADD_OPERATION = """
INSERT INTO payment_operations (operation, provider, livemode, effect, group_id, account, name, purchase, arguments,
                                created_at)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (provider, livemode, effect) DO NOTHING
"""
PAY_ORDER = "UPDATE payment_orders SET status = 'paid', paid_by = %s WHERE id = %s AND status = 'quoted'"
LOOK_AGAIN = "UPDATE payment_groups SET next_look_at = %s WHERE id = %s AND next_look_at IS DISTINCT FROM %s"
PROVIDER_OF = "SELECT provider, livemode FROM payment_facts WHERE group_id = %s LIMIT 1"
ACCOUNT_STATUSES = "SELECT account, status, converted_to FROM accounts WHERE account = ANY(%s)"
CURRENT = """
SELECT p.effect FROM payment_operations p
LEFT JOIN operations o ON o.account = p.account AND o.operation = p.operation
WHERE p.account = (
    SELECT account FROM payment_operations
    WHERE group_id = %s AND name IN ('plans.renew', 'plans.change') ORDER BY number DESC LIMIT 1
) AND p.name IN ('plans.renew', 'plans.change') AND o.status IS DISTINCT FROM 'rejected'
ORDER BY p.number DESC LIMIT 1
"""


class TooManyFactsError(Exception):
    """A group has more than :data:`MAX_FACTS` facts."""


Message = tuple[str, str, str, str, bytes]
"""For the outbox: account, exchange, task, operation id and arguments."""


class Settled(msgspec.Struct, frozen=True):
    """What was made of a group of facts."""

    group: int
    resolution: Resolution
    effects: list[Effect]
    """Those that are sent now, in order."""
    messages: list[Message]
    """Theirs, in the same order."""


@contextmanager
def alone(connection: Connection[Any]) -> Iterator[None]:
    """Make operations of facts, and send them, as the one session that does.

    :raises psycopg.errors.LockNotAvailable: when others take longer than :data:`LOCK_SECONDS`.
    """
    with connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
        connection.execute("SELECT pg_advisory_lock(%s, %s)", LOCK_KEY)
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", LOCK_KEY)


def now_of(connection: Connection[Any]) -> datetime:
    """The ledger's time."""
    row = connection.execute("SELECT ledger_now()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


def record(connection: Connection[Any], facts: Iterable[Fact], event: int) -> set[int]:
    """Note facts, each with what was known of its object before, and join what belongs together.

    :param connection: in a transaction of the one session that does so.
    :param event: the inbox row that they were heard by.
    :returns: the groups that they are of.
    """
    groups: set[int] = set()
    for fact in facts:
        kind, key = key_of(fact)
        place = (fact.provider, fact.livemode)
        row = connection.execute(KNOWN_FACT, (*place, kind, key)).fetchone()
        known: set[int] = set()
        if row is not None:
            fact = merge(_decode(row[0]), fact)
            known.add(row[1])
        names = [alias for alias in _names(fact) if alias.kind in GROUP_ALIASES]
        columns = [alias.kind for alias in names], [alias.id for alias in names]
        known |= {group for (group,) in connection.execute(KNOWN_GROUPS, (*columns, *place))}
        group = _join(connection, known)
        groups = (groups - known) | {group}
        connection.execute(ADD_ALIASES, (*place, group, *columns))
        connection.execute(
            PUT_FACT,
            {
                "provider": fact.provider,
                "livemode": fact.livemode,
                "kind": kind,
                "key": key,
                "group": group,
                "event": event,
                "purchase": purchase_name(fact) if isinstance(fact, PackPaid | PeriodPaid) else None,
                "fact": encode(fact).decode(),
                "occurred_at": fact.occurred_at,
            },
        )
        if fact.account is not None:
            bound = [alias for alias in _names(fact) if alias.kind in BINDING_ALIASES]
            connection.execute(
                ADD_BINDINGS, (*place, fact.account, [alias.kind for alias in bound], [alias.id for alias in bound])
            )
    return groups


def is_known(connection: Connection[Any], fact: Fact) -> bool:
    """Whether the last that was heard of an object is what a fact says, whenever that was."""
    kind, key = key_of(fact)
    row = connection.execute(KNOWN_FACT, (fact.provider, fact.livemode, kind, key)).fetchone()
    if row is None:
        return False
    known = _decode(row[0])
    same = {"occurred_at": known.occurred_at, "aliases": known.aliases, "account": known.account}
    return bool(known == msgspec.structs.replace(fact, **same))


def _names(fact: Fact) -> list[Alias]:
    """Every name under which a fact's object is known."""
    names = list(fact.aliases)
    if isinstance(fact, PeriodPaid):
        names.append(Alias("subscription", fact.subscription))
    return sorted(set(names))


def _join(connection: Connection[Any], groups: set[int]) -> int:
    """One group of several, or a new one."""
    if not groups:
        row = connection.execute(NEW_GROUP).fetchone()
        assert row is not None
        return int(row[0])
    first, *others = sorted(groups)
    if others:
        for statement in JOIN_GROUPS:
            connection.execute(statement, (first, others))
        connection.execute("DELETE FROM payment_groups WHERE id = ANY(%s)", (others,))
    return first


def merge(known: Fact, heard: Fact) -> Fact:
    """What is so by two words on one object, whichever came first."""
    if known == heard:
        return known
    assert type(known) is type(heard)
    first, last = sorted((known, heard), key=_progress)
    changes: dict[str, Any] = {
        "aliases": tuple(sorted({*first.aliases, *last.aliases})),
        "account": last.account or first.account,
    }
    if isinstance(first, PackPaid) and isinstance(last, PackPaid):
        changes["occurred_at"] = min(first.occurred_at, last.occurred_at)
        changes["paid_minor"] = max(first.paid_minor, last.paid_minor)
        changes["lines"] = last.lines or first.lines
    elif isinstance(first, PeriodPaid) and isinstance(last, PeriodPaid):
        changes["occurred_at"] = min(first.occurred_at, last.occurred_at)
        changes["paid_minor"] = max(first.paid_minor, last.paid_minor)
        changes["trial"] = first.trial if last.trial is None else last.trial
        changes["price"] = last.price or first.price
    elif isinstance(first, DisputeChanged) and isinstance(last, DisputeChanged):
        changes["is_open"] = first.is_open and last.is_open
    return msgspec.structs.replace(last, **changes)


STATUSES = ("incomplete", "trialing", "active", "past_due", "unpaid", "paused", "incomplete_expired", "canceled")
"""Of two words of one second the one that stands later holds."""


def _progress(fact: Fact) -> tuple[Any, ...]:
    """What makes one word on an object later than another; of equals, anything that is the same each time."""
    if isinstance(fact, RefundChanged):
        order: tuple[Any, ...] = (fact.returned.step, fact.occurred_at)
    elif isinstance(fact, DisputeChanged):
        order = (fact.movements, fact.occurred_at)
    elif isinstance(fact, SubscriptionChanged):
        order = (fact.is_final, fact.occurred_at, STATUSES.index(fact.status), fact.ends_at is not None)
    else:
        order = (fact.occurred_at,)
    return (*order, encode(fact))


def settle(connection: Connection[Any], group: int, catalog: Catalog) -> Settled | None:
    """Make of a group of facts the operations that they amount to and that were not sent yet.

    :param connection: in a transaction of the one session that does so.
    :returns: what it came to; None when there is no such group.
    :raises TooManyFactsError: when the group is too large to be looked at.
    """
    row = connection.execute(PROVIDER_OF, (group,)).fetchone()
    if row is None:
        return None
    provider, livemode = row
    now = now_of(connection)
    heard = [Heard(_decode(fact), at) for fact, at in connection.execute(GROUP_FACTS, (group,))]
    if len(heard) > MAX_FACTS:
        raise TooManyFactsError(f"the group {group} has more than {MAX_FACTS} facts")
    issued = {
        effect: msgspec.json.decode(arguments) for effect, arguments in connection.execute(GROUP_OPERATIONS, (group,))
    }
    orders, bound = _orders(connection, heard), _bound(connection, provider, livemode, heard)
    resolution = resolve(heard, issued, now, catalog, orders, bound, _current(connection, group))
    resolution = _within_account(connection, resolution)
    effects, messages = [], []
    for effect in resolution.effects:
        message = _add(connection, provider, livemode, group, effect, now)
        if message is not None:
            effects.append(effect)
            messages.append(message)
    _judge(connection, provider, livemode, resolution.verdicts)
    look = next_look(heard, resolution.verdicts, now)
    connection.execute(LOOK_AGAIN, (look, group, look))
    return Settled(group, resolution, effects, messages)


def _orders(connection: Connection[Any], heard: Sequence[Heard]) -> dict[str, Order]:
    named = [each.fact.reference for each in heard if isinstance(each.fact, PackPaid) and each.fact.reference]
    if not named:
        return {}
    return {
        id: Order(id=id, account=account, pack=pack, credits_micro=credits, price=Money(minor, currency))
        for id, account, pack, credits, minor, currency in connection.execute(ORDERS, (named,))
    }


def _bound(connection: Connection[Any], provider: str, livemode: bool, heard: Sequence[Heard]) -> str | None:
    names = {alias for each in heard for alias in _names(each.fact) if alias.kind in BINDING_ALIASES}
    if not names:
        return None
    columns = [alias.kind for alias in names], [alias.id for alias in names]
    row = connection.execute(BOUND, (*columns, provider, livemode)).fetchone()
    return None if row is None else str(row[0])


def _current(connection: Connection[Any], group: int) -> str | None:
    """The last payment for the plan of the account that a group paid a plan of."""
    row = connection.execute(CURRENT, (group,)).fetchone()
    return None if row is None else str(row[0])


def _within_account(connection: Connection[Any], resolution: Resolution) -> Resolution:
    """Send nothing to an account that is not open yet, and to a closed one what ends things alone.

    A refusal is an operation's answer for ever: what was paid for must not be refused because it came too early. To a
    lead that has signed up meanwhile packs are sent all the same: they follow to the user.
    """
    accounts = {str(effect.arguments["account"]) for effect in resolution.effects}
    if not accounts:
        return resolution
    rows = connection.execute(ACCOUNT_STATUSES, (list(accounts),)).fetchall()
    found = {account: status for account, status, _ in rows}
    became = {account: user for account, _, user in rows if user is not None}
    shut = {account: found.get(account) for account in accounts if found.get(account) not in (OPEN, FROZEN)}
    effects = [
        effect
        for effect in resolution.effects
        if (account := effect.arguments["account"]) not in shut
        or (shut[account] == CLOSED and effect.name == "credits.claw_back")
        or (account in became and effect.key.startswith(PACK))
    ]
    verdicts = dict(resolution.verdicts)
    for key, known in verdicts.items():
        owner = resolution.accounts.get(key)
        if owner is None or owner not in shut or known.status != "applied":
            continue
        if shut[owner] != CLOSED:
            verdicts[key] = Verdict("waiting", "account_not_open", f"the account {owner!r} was not opened yet")
        elif key[0] in GIVING and not (owner in became and key[0] == "PackPaid"):
            what = f"has become {became[owner]!r}" if owner in became else "is closed"
            verdicts[key] = Verdict("parked", "account_closed", f"the account {owner!r} {what}")
    return msgspec.structs.replace(resolution, effects=effects, verdicts=verdicts)


GIVING = frozenset({"PackPaid", "PeriodPaid", "SubscriptionChanged"})
"""Facts that lead to operations which a closed account refuses."""


def _add(
    connection: Connection[Any], provider: str, livemode: bool, group: int, effect: Effect, now: datetime
) -> Message | None:
    """Keep an operation under an id that nobody can guess, before it is sent."""
    operation = f"payment.{uuid4().hex}"
    account = str(effect.arguments["account"])
    arguments = encode(effect.arguments)
    added = connection.execute(
        ADD_OPERATION,
        (operation, provider, livemode, effect.key, group, account, effect.name, effect.purchase, arguments.decode(),
         now),
    )  # fmt: skip
    if not added.rowcount:
        return None
    if effect.order is not None:
        connection.execute(PAY_ORDER, (effect.purchase, effect.order))
    return account, "", effect.name, operation, arguments


def _judge(connection: Connection[Any], provider: str, livemode: bool, verdicts: dict[Key, Verdict]) -> None:
    items = verdicts.items()
    connection.execute(
        JUDGE,
        (
            [key[0] for key, _ in items],
            [key[1] for key, _ in items],
            [verdict.status for _, verdict in items],
            [verdict.code for _, verdict in items],
            [verdict.reason for _, verdict in items],
            provider,
            livemode,
        ),
    )


def next_look(heard: Sequence[Heard], verdicts: dict[Key, Verdict], now: datetime) -> datetime | None:
    """When a group is looked at again, though nothing more is heard of it; None when nothing of it waits.

    A fact that waits for another is looked at when it has waited long enough, one whose account is not known or not
    open again and again, the longer it waits the less often. A refund whose purchase is not known waits to hear of it.
    """
    looks: list[datetime] = []
    for each in heard:
        verdict = verdicts[each.key]
        if verdict.until is not None:
            looks.append(verdict.until)
        elif verdict.code in ("unknown_account", "account_not_open"):
            shortest, longest = LOOK_SECONDS
            waited = (now - each.at).total_seconds()
            looks.append(now + timedelta(seconds=min(max(shortest, waited / 4), longest)))
    return min(looks, default=None)
