"""Why a balance is what it is: which grants paid which operation, and what became of each grant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from psycopg import Connection

from creditlane.reports import BalanceExplained, Buckets, GrantExplained, Lot, Movement, OperationExplained
from models.bisecting import first_entry
from models.reading import DEFAULT_PAGE, GRANT_COLUMNS, check_limit, grant_of, load_account
from models.rules.catalog import Catalog
from models.rules.settling import settle
from models.rules.state import COUNTERS, Account, Grant
from models.usage_reading import SNAPSHOT, credits_of

MAX_SCANNED = 100_000
"""Entries of an account that one page of a grant's life looks at: they have no index by grant."""

MAX_GRANT = 2**31 - 1
"""The largest number that a grant can have."""

OPERATION = """
SELECT o.name, o.status, o.code, o.applied_at, o.feature, o.member, o.quantity_micro, o.charged_micro,
       coalesce(o.first_seq, 1), o.entries,
       coalesce((SELECT sum(r.returned_micro) FROM receipts r
                 WHERE r.account = o.account AND r.operation = o.operation), 0)::bigint
FROM operations o WHERE o.account = %s AND o.operation = %s
"""
GRANT = f"SELECT {GRANT_COLUMNS} FROM grants WHERE account = %s AND grant_id = %s"
_MOVEMENT = """
SELECT e.seq, e.kind, e.amount_micro, e.grant_id, g.source, g.priority, g.expires_at, e.at, e.operation,
       o.name, o.feature, o.member, e.refers_to
FROM ({entries}) AS e
JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id
LEFT JOIN operations o ON o.account = e.account AND o.operation = e.operation
ORDER BY e.seq
"""
OF_OPERATION = _MOVEMENT.format(
    entries="""
    SELECT * FROM entries WHERE account = %(account)s AND seq >= %(start)s AND seq < %(end)s ORDER BY seq
    LIMIT %(limit)s"""
)
OF_GRANT = _MOVEMENT.format(
    entries="""
    SELECT * FROM entries
    WHERE account = %(account)s AND seq >= %(start)s AND seq < %(end)s AND grant_id = %(grant)s ORDER BY seq
    LIMIT %(limit)s"""
)
LAST = "SELECT seq FROM accounts WHERE account = %s"
BY_KEY = "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"
"""A page is read off the indexes, however much the account has of everything."""


def explain_balance(connection: Connection[Any], account: str, catalog: Catalog) -> BalanceExplained | None:
    """What came in, what went out, and where what is left lies, at the database's time.

    :param connection: not within a transaction.
    :param catalog: the one in force, by which plans renew.
    :returns: None for an account that no operation ever named.
    """
    loaded = load_account(connection, account)
    if loaded is None:
        return None
    state, now = loaded
    settle(state, now, catalog)
    disputed = state.frozen
    lots = [grant for grant in state.order if grant.is_open]
    closed = {counter: getattr(state, counter) - sum(getattr(lot, counter) for lot in lots) for counter in COUNTERS}
    frozen = sum(lot.available for lot in lots if lot.purchase in disputed)
    spendable = state.spendable(now)
    return BalanceExplained(
        account=account,
        as_of=now,
        available=credits_of(spendable),
        upcoming=credits_of(state.available - frozen - spendable),
        frozen=credits_of(frozen),
        debt=credits_of(state.debt),
        total=Buckets(**_counters(state)),
        closed=Buckets(**{counter: credits_of(amount) for counter, amount in closed.items()}),
        closed_grants=state.last_grant - len(lots),
        lots=[_lot(lot) for lot in lots],
    )


def explain_operation(
    connection: Connection[Any], account: str, operation: str, *, limit: int = DEFAULT_PAGE, after: int = 0
) -> OperationExplained | None:
    """Which grants an operation took from or gave to.

    :param connection: not within a transaction.
    :param operation: its id; what time did just before it is not part of it.
    :param limit: movements of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: only movements with a larger seq: ``next_after`` of the page before.
    :returns: None when the account has no such operation.
    :raises ValueError: for a limit that is none.
    """
    check_limit(limit)
    with connection.transaction():
        connection.execute(SNAPSHOT)
        connection.execute(BY_KEY)
        row = connection.execute(OPERATION, (account, operation)).fetchone()
        if row is None:
            return None
        name, status, code, applied_at, feature, member, quantity, charged, first, entries, returned = row
        span = {"account": account, "start": max(first, after + 1), "end": first + entries, "limit": limit + 1}
        found = connection.execute(OF_OPERATION, span).fetchall()
    movements = _movements(found[:limit])
    return OperationExplained(
        account=account,
        operation=operation,
        name=name,
        status=status,
        code=code,
        applied_at=applied_at,
        feature=feature,
        member=member,
        quantity=None if quantity is None else credits_of(quantity),
        charged=credits_of(charged),
        given_back=credits_of(returned),
        movements=movements,
        next_after=movements[-1].seq if len(found) > limit else None,
    )


def explain_grant(
    connection: Connection[Any], account: str, grant: int, *, limit: int = DEFAULT_PAGE, after: int = 0
) -> GrantExplained | None:
    """The life of a grant: what came in, what it paid, and what is left of it.

    A page looks at :data:`MAX_SCANNED` entries of the account at the most, so it may have fewer rows than its limit, or
    none, and not be the last.

    :param connection: not within a transaction.
    :param grant: its number within the account.
    :param limit: movements of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: only movements with a larger seq: ``next_after`` of the page before.
    :returns: None when the account has no such grant.
    :raises ValueError: for a limit that is none.
    """
    check_limit(limit)
    if not 1 <= grant <= MAX_GRANT:
        return None
    with connection.transaction():
        connection.execute(SNAPSHOT)
        connection.execute(BY_KEY)
        row = connection.execute(GRANT, (account, grant)).fetchone()
        last = connection.execute(LAST, (account,)).fetchone()
        if row is None or last is None:
            return None
        lot = _lot(grant_of(row))
        start = max(first_entry(connection, account, lot.created_at), after + 1)
        end = min(start + MAX_SCANNED, last[0] + 1)
        span = {"account": account, "grant": grant, "start": start, "end": end, "limit": limit + 1}
        found = connection.execute(OF_GRANT, span).fetchall()
    movements = _movements(found[:limit])
    next_after = end - 1 if end <= last[0] else None
    return GrantExplained(
        account=account,
        lot=lot,
        movements=movements,
        next_after=movements[-1].seq if len(found) > limit else next_after,
    )


def _counters(of: Account | Grant) -> dict[str, Any]:
    return {counter: credits_of(getattr(of, counter)) for counter in COUNTERS}


def _lot(grant: Grant) -> Lot:
    return Lot(
        grant=grant.id,
        source=grant.source,
        priority=grant.priority,
        features=None if grant.features is None else sorted(grant.features),
        effective_at=grant.effective_at,
        expires_at=grant.expires_at,
        created_at=grant.created_at,
        operation=grant.operation,
        purchase=grant.purchase,
        origin=grant.origin,
        **_counters(grant),
    )


def _movements(rows: Iterable[tuple[Any, ...]]) -> list[Movement]:
    names = Movement.__struct_fields__
    told = (dict(zip(names, row, strict=True)) for row in rows)
    return [Movement(**{**each, "amount": credits_of(each["amount"])}) for each in told]
