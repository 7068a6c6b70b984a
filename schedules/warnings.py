"""Expiry warnings: a notice some days before credits expire, while there are any (schedules: expiry warnings).

The catalog's ``[notify] expiry_days`` says how many days before; a grant is warned of at the nearest of them that has
come, once for each. What is found is a fact of the grant, and the notice's key holds grant and days, so a run that ends
early, comes late or twice warns of nothing twice.

Credits of a plan's period are left out for as long as the plan goes on: what becomes of them at the period's end, to be
carried or to make room for new ones, the notice of the renewal tells. Of a plan that was cancelled they end with the
period, which may be before the grant's own ``expires_at``; of one that was not paid for, with the days of grace. Those
are warned of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from celery import shared_task
from celery.utils.log import get_task_logger
from psycopg import Connection

from creditlane.amounts import format_amount
from models.database import connect
from models.in_force import catalog_in_force
from models.rules.catalog import Catalog
from models.settings import settings
from tasks.notices import EXPIRING
from workers.notices import delivering, send_all

logger = get_task_logger(__name__)

PAGE = 1000
"""Grants read, and notices written, at a time."""

EVERY_SECONDS = 3600.0

SCHEDULE = {
    "expiry warnings": {
        "task": "schedules.warnings",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

EXPIRING_GRANTS = f"""
SELECT g.expires_at, g.account, g.grant_id, g.source, g.available_micro,
       CASE WHEN s.cancels THEN least(s.period_end, g.expires_at) ELSE g.expires_at END,
       s.account IS NOT NULL AND NOT s.cancels AND s.period_end > %(now)s
FROM grants g LEFT JOIN subscriptions s ON s.account = g.account AND s.status = 'active' AND g.grant_id = ANY(s.lots)
WHERE g.is_open AND g.expires_at > %(now)s AND g.expires_at <= %(until)s
  AND (g.expires_at, g.account, g.grant_id) > (%(expires_at)s, %(account)s, %(grant)s)
ORDER BY g.expires_at, g.account, g.grant_id LIMIT {PAGE}
"""
INSERT = """
INSERT INTO notices (account, key, kind, at, created_at, details, channels, delivered_at)
SELECT u.account, u.key, %s, %s, %s, u.details::json, %s, %s
FROM (SELECT unnest(%s::text[]) AS account, unnest(%s::text[]) AS key, unnest(%s::text[]) AS details) u
WHERE NOT EXISTS (SELECT FROM notices n WHERE n.account = u.account AND n.key = u.key)
ON CONFLICT DO NOTHING RETURNING account, key
"""
"""Most are there already, from a run before: what is looked for first takes no lock and no row version."""


class Warned(NamedTuple):
    """A warning that is due, whether or not it was given before."""

    account: str
    key: str
    details: dict[str, Any]


@shared_task(name="schedules.warnings", bind=True)
def sweep(self: Any) -> dict[str, int]:
    """Warn of every grant that is about to expire, each once for each of the catalog's days.

    :returns: how many warnings were new.
    :raises psycopg.Error: what is left, the next run does.
    :raises BrokerUnavailableError: likewise; what is written and not sent, the sweep of notices sends.
    """
    config = settings()
    warned = 0
    with connect(config.database_url.get_secret_value(), "creditlane warnings", read_only=False) as connection:
        catalog = catalog_in_force(connection)
        if catalog.notify.expiry_days:
            row = connection.execute("SELECT ledger_now()").fetchone()
            assert row is not None
            for page in due(connection, row[0], catalog):
                warned += give(connection, page, row[0], catalog)
                self.update_state(state="PROGRESS", meta={"warned": warned})
    if warned:
        logger.info("expiry warnings: %d grants are about to expire", warned)
    return {"warned": warned}


def due(connection: Connection[Any], now: datetime, catalog: Catalog) -> Iterator[list[Warned]]:
    """The warnings that are due, page by page, the soonest to expire first.

    :param connection: in autocommit mode.
    :param now: the ledger's time.
    """
    days = sorted(catalog.notify.expiry_days)
    # A cancelled plan's credits end up to its days of grace before their own date.
    grace = max((plan.grace_days for plan in catalog.plans.values()), default=0)
    place: dict[str, Any] = {"expires_at": now, "account": "", "grant": 0}
    window = {"now": now, "until": now + timedelta(days=days[-1] + grace)}
    while rows := connection.execute(EXPIRING_GRANTS, {**window, **place}).fetchall():
        place = dict(zip(place, rows[-1][:3], strict=True))
        yield [
            Warned(account, f"{EXPIRING}:{grant}:{nearest}", details)
            for _, account, grant, source, available, ends_at, goes_on in rows
            if available and not goes_on and ends_at > now
            for nearest in [next((each for each in days if ends_at <= now + timedelta(days=each)), None)]
            if nearest is not None
            for details in [
                {"grant": grant, "source": source, "amount": format_amount(available), "expires_at": ends_at,
                 "days": nearest}
            ]
        ]  # fmt: skip


def give(connection: Connection[Any], page: Sequence[Warned], now: datetime, catalog: Catalog) -> int:
    """Write the warnings that are new, and have them delivered.

    :returns: how many.
    """
    channels = catalog.notify.channels
    new = connection.execute(
        INSERT,
        (
            EXPIRING, now, now, list(channels), None if channels else now, [each.account for each in page],
            [each.key for each in page], [msgspec.json.encode(each.details).decode() for each in page],
        ),
    ).fetchall()  # fmt: skip
    if channels:
        send_all(delivering(account, key) for account, key in new)
    return len(new)
