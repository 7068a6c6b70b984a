"""Expiry sweep: settle the accounts on which grants or holds ran out while nobody used them.

Every operation settles its account first, so nothing expired is spendable meanwhile; the sweep brings the
books of idle accounts up to date (schedules: expiry sweep).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger
from psycopg import Connection

from creditlane.client import CreditClient
from creditlane.lanes import lane_of
from models.settings import settings

logger = get_task_logger(__name__)

PAGE = 1000
"""Accounts read at a time."""

MAX_BACKLOG = 100
"""Messages in a lane above which its accounts are left for a later sweep."""

EVERY_SECONDS = 60.0

SCHEDULE = {
    "expiry sweep": {
        "task": "schedules.expiry",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

DUE = f"""
SELECT account, next_due_at, operations FROM accounts
WHERE next_due_at <= %s AND (next_due_at, account) > (%s, %s)
ORDER BY next_due_at, account LIMIT {PAGE}
"""
BEGINNING = datetime.fromisoformat("0001-01-02T00:00:00+00:00")


@shared_task(name="schedules.expiry", bind=True, max_retries=3, autoretry_for=(psycopg.OperationalError,),
             retry_backoff=True)  # fmt: skip
def sweep(self: Any) -> dict[str, int]:
    """Send ``credits.settle`` to every account that is due.

    :returns: how many accounts it was sent to, and how many were left for a later sweep because their lane has more
        than :data:`MAX_BACKLOG` messages waiting: a lane that stands must not be filled further every minute.
    """
    config = settings()
    sent = skipped = 0
    with (
        psycopg.connect(config.database_url.get_secret_value(), autocommit=True) as connection,
        CreditClient(
            config.broker_url.get_secret_value(),
            lanes=config.lanes,
            ca=config.broker_ca,
            certificate=config.broker_certificate,
            key=config.broker_key,
        ) as client,
        client.buffer(linger_ms=50) as buffer,
    ):
        backlogs: dict[str, int] = {}
        for account, due_at, operations in due(connection):
            lane = lane_of(account, config.lanes)
            if lane not in backlogs:
                backlogs[lane] = client.backlog(lane)
            if backlogs[lane] > MAX_BACKLOG:
                skipped += 1
                continue
            buffer.settle(account, id=settle_id(due_at, operations))
            sent += 1
            if sent % PAGE == 0:
                self.update_state(state="PROGRESS", meta={"sent": sent})
                logger.info("expiry sweep: %d accounts so far", sent)
    if sent:
        logger.info("expiry sweep: sent credits.settle to %d accounts", sent)
    if skipped:
        logger.warning("expiry sweep: left %d accounts for later, their lanes are more than busy", skipped)
    return {"sent": sent, "skipped": skipped}


def due(connection: Connection[Any]) -> Iterator[tuple[str, datetime, int]]:
    """The accounts that are due now, the longest overdue first, page by page.

    :returns: each account with the instant at which it fell due, and how many operations it has seen.
    """
    row = connection.execute("SELECT ledger_now()").fetchone()
    assert row is not None
    last: tuple[datetime, str] = (BEGINNING, "")
    while page := connection.execute(DUE, (row[0], *last)).fetchall():
        yield from page
        last = (page[-1][1], page[-1][0])


def settle_id(due_at: datetime, operations: int) -> str:
    """The operation id for settling what falls due at an instant: twice sent, once applied.

    :param operations: how many the account has seen: what is due once more is no repetition.
    """
    return f"settle:{due_at.isoformat()}:{operations}"
