"""Retention: delete what the catalog says is kept no longer (schedules: retention).

Only what nothing is proven by: notices that were delivered, with their deliveries, and quarantined messages that were
replayed or dropped. Operations, entries, lots, holds and receipts stay, closed or not: the audit adds them up and a
replay compares each. Results for waiting senders expire in the result backend by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
from celery import shared_task
from celery.schedules import crontab
from celery.utils.log import get_task_logger
from psycopg import Connection

from models.cutoff import BusyError, alone
from models.due import BEGINNING, IN_ORDER
from models.in_force import catalog_in_force
from models.settings import settings
from schedules.progress import Progress
from schedules.sessions import connect

logger = get_task_logger(__name__)

PAGE = 1000
"""Rows that one transaction deletes."""

MAX_SECONDS = 1800.0
"""How long a run goes on; the next day's takes what is left."""

SCHEDULE = {"retention": {"task": "schedules.retention", "schedule": crontab(hour="4", minute="47")}}

OLD_NOTICES = f"""
SELECT delivered_at, account, key FROM notices
WHERE delivered_at < %s AND (delivered_at, account, key) > (%s, %s, %s)
ORDER BY delivered_at, account, key LIMIT {PAGE}
"""
PAIRS = "unnest(%s::text[], %s::text[]) AS k(account, key)"
DELETE_DELIVERIES = f"DELETE FROM deliveries d USING {PAIRS} WHERE d.account = k.account AND d.key = k.key"
DELETE_NOTICES = (
    f"DELETE FROM notices n USING {PAIRS} WHERE n.account = k.account AND n.key = k.key AND n.delivered_at IS NOT NULL"
)
QUARANTINE = f"""
SELECT id, status <> 'open' AND coalesce(resolved_at < %s, false) FROM quarantine
WHERE id > %s ORDER BY id LIMIT {PAGE}
"""
DELETE_QUARANTINED = "DELETE FROM quarantine WHERE id = ANY(%s) AND status <> 'open'"


@shared_task(name="schedules.retention", bind=True, max_retries=3, autoretry_for=(psycopg.OperationalError,),
             retry_backoff=60)  # fmt: skip
def retain(self: Any) -> dict[str, int]:
    """Delete what is older than the catalog's ``[retention]`` keeps; nothing where it says nothing.

    :returns: how many ``notices`` and ``quarantined`` messages were deleted.
    """
    config = settings()
    progress = Progress(self, logger, "retention", "rows")
    deleted = {"notices": 0, "quarantined": 0}
    try:
        with (
            connect(config.database_url.get_secret_value(), "creditlane retention") as connection,
            alone(connection, "retention"),
        ):
            periods = catalog_in_force(connection).retention
            for what, days, delete in (
                ("notices", periods.notices_days, delete_notices),
                ("quarantined", periods.quarantine_days, delete_quarantined),
            ):
                if days is None:
                    continue
                now = connection.execute("SELECT ledger_now()").fetchone()
                assert now is not None
                for count in delete(connection, now[0] - timedelta(days=days)):
                    deleted[what] += count
                    done = sum(deleted.values())
                    progress(done, done, **deleted)
                    if progress.seconds > MAX_SECONDS:
                        break
    except BusyError:
        logger.info("retention: another one is under way")
    if any(deleted.values()):
        logger.info("retention: deleted %d notices, %d quarantined messages", *deleted.values())
    return deleted


def delete_notices(connection: Connection[Any], before: datetime) -> Iterator[int]:
    """Delete the notices that were delivered before an instant, page by page, the oldest first.

    :returns: how many, page by page.
    """
    connection.execute(IN_ORDER)
    last: tuple[datetime, str, str] = (BEGINNING, "", "")
    while page := connection.execute(OLD_NOTICES, (before, *last)).fetchall():
        last = page[-1]
        keys = ([account for _, account, _ in page], [key for *_, key in page])
        with connection.transaction():
            connection.execute(DELETE_DELIVERIES, keys)
            count = connection.execute(DELETE_NOTICES, keys).rowcount
        yield count


def delete_quarantined(connection: Connection[Any], before: datetime) -> Iterator[int]:
    """Delete the quarantined messages that were replayed or dropped before an instant, page by page.

    :returns: how many, page by page.
    """
    last = 0
    while page := connection.execute(QUARANTINE, (before, last)).fetchall():
        last = page[-1][0]
        yield connection.execute(DELETE_QUARANTINED, ([id for id, is_old in page if is_old],)).rowcount
