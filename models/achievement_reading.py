"""What an account has achieved, and how far it is with the rest of the catalog's achievements."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection

from creditlane.amounts import MICRO
from creditlane.reports import Achievements, Goal, Trophy
from models.rules.catalog import Catalog
from models.rules.state import achieved_at
from models.usage_reading import SNAPSHOT, credits_of, percent

ACCOUNT = """
SELECT a.achieved, a.consumed_micro - a.restored_micro, coalesce(r.referees, 0)
FROM accounts a LEFT JOIN referrals r ON r.account = a.account WHERE a.account = %s
"""
BROUGHT = """
SELECT o.number, o.operation, o.applied_at, each ->> 'achievement', each ->> 'credits', (each ->> 'grant')::int
FROM operations o CROSS JOIN LATERAL json_array_elements(o.result -> 'achieved') AS each
WHERE o.account = %s AND o.number = ANY(%s) ORDER BY o.number
"""


def achievements(connection: Connection[Any], account: str, catalog: Catalog) -> Achievements | None:
    """What an account has achieved, and what comes next.

    :param connection: not within a transaction.
    :param catalog: the one in force: what it has and the account has not is a goal.
    :returns: None for an account that no operation ever named.
    """
    with connection.transaction():
        connection.execute(SNAPSHOT)
        row = connection.execute(ACCOUNT, (account,)).fetchone()
        if row is None:
            return None
        achieved, used, referees = row
        had = achieved_at(achieved)
        brought = connection.execute(BROUGHT, (account, sorted(set(had.values())))).fetchall()
    done = {"used": int(used), "referrals": int(referees) * MICRO}
    return Achievements(
        account=account,
        reached=list(_trophies(brought, catalog)),
        goals=sorted(_goals(catalog, had, done), key=lambda goal: (-goal.percent, goal.at, goal.achievement)),
    )


def _trophies(rows: list[tuple[int, str, datetime, str, str, int | None]], catalog: Catalog) -> Iterator[Trophy]:
    for _, operation, at, name, credits, grant in rows:
        known = catalog.achievements.get(name)
        yield Trophy(
            achievement=name,
            title=name if known is None else known.title or name,
            credits=Decimal(credits),
            reached_at=at,
            operation=operation,
            grant=grant,
        )


def _goals(catalog: Catalog, had: dict[str, int], done: dict[str, int]) -> Iterator[Goal]:
    for name, achievement in catalog.achievements.items():
        if name not in had:
            have = done[achievement.measure]
            yield Goal(
                achievement=name,
                title=achievement.title or name,
                measure=achievement.measure,
                at=credits_of(achievement.at),
                done=credits_of(have),
                percent=percent(have, achievement.at) or 0.0,
                credits=credits_of(achievement.credits),
            )
