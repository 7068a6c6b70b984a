"""Monthly allocation, rollover and expiry: settle the accounts that time changes while nobody uses them.

One schedule for all of it (schedules: "monthly allocation and rollover" and "expiry sweep"): whatever is due to an
account first, a subscription's renewal or end, a grant's expiry or a hold's time-out, stands in its ``next_due_at``,
and one ``credits.settle`` applies all that is due, each as of its own instant. Every operation settles its account
first, so nothing expired is spendable meanwhile and nobody waits for credits; the sweep is for those who are idle.

A run keeps nothing of where it is. What it sent and the lanes have applied is not due any more, so whoever comes after
one that was killed goes on where it ended; what still waits in a lane is sent again under the same id, and applied
once.
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
from models.cutoff import BusyError, alone
from models.due import BEGINNING, IN_ORDER, estimate
from models.settings import settings
from schedules.progress import Progress

logger = get_task_logger(__name__)

PAGE = 1000
"""Accounts read at a time."""

MAX_BACKLOG = 100
"""Messages in a lane above which its accounts are left for a later sweep."""

LOOK = 2000
"""Accounts of a lane after which its backlog is looked at again."""

LINGER_MS = 1000
"""How long an operation waits for company: nobody waits for it, and few large messages cost less than many small."""

MAX_SECONDS = 600.0
"""How long a run goes on; the next one takes what is left."""

EVERY_SECONDS = 60.0

SCHEDULE = {
    "allocation, rollover and expiry": {
        "task": "schedules.expiry",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

SWEEP = "the sweep of due accounts"
"""What only one session does at a time."""

DUE = f"""
SELECT account, next_due_at, operations FROM accounts
WHERE next_due_at <= %s AND (next_due_at, account) > (%s, %s)
ORDER BY next_due_at, account LIMIT {PAGE}
"""


@shared_task(name="schedules.expiry", bind=True, max_retries=3, autoretry_for=(psycopg.OperationalError,),
             retry_backoff=True)  # fmt: skip
def sweep(self: Any) -> dict[str, Any]:
    """Send ``credits.settle`` to every account that is due.

    Leaves at once when another sweep is under way.

    :returns: how many accounts it was ``sent`` to, how many were ``skipped``, left for a later sweep because their lane
        has more than :data:`MAX_BACKLOG` messages waiting (a lane that stands must not be filled further every minute),
        and whether all that were due are ``done``: not after :data:`MAX_SECONDS`, nor when another is under way.
    """
    config = settings()
    try:
        with (
            psycopg.connect(config.database_url.get_secret_value(), autocommit=True) as connection,
            alone(connection, SWEEP),
            CreditClient(
                config.broker_url.get_secret_value(),
                lanes=config.lanes,
                ca=config.broker_ca,
                certificate=config.broker_certificate,
                key=config.broker_key,
            ) as client,
        ):
            sent, skipped, done = _send(self, connection, client)
    except BusyError:
        logger.info("due accounts: another sweep is under way")
        return {"sent": 0, "skipped": 0, "done": False}
    if sent:
        logger.info("due accounts: sent credits.settle to %d", sent)
    if skipped:
        logger.warning("due accounts: left %d for later, their lanes are more than busy", skipped)
    if not done:
        logger.warning("due accounts: ended after %.0f s; the next sweep takes what is left", MAX_SECONDS)
    return {"sent": sent, "skipped": skipped, "done": done}


def _send(task: Any, connection: Connection[Any], client: CreditClient) -> tuple[int, int, bool]:
    now = connection.execute("SELECT ledger_now()").fetchone()
    assert now is not None
    total = estimate(connection, now[0])
    progress = Progress(task, logger, "due accounts", "accounts")
    backlogs = Backlogs(client)
    sent = skipped = 0
    with client.buffer(linger_ms=LINGER_MS) as buffer:
        for account, due_at, operations in due(connection, now[0]):
            if backlogs.is_full(account):
                skipped += 1
            else:
                buffer.settle(account, id=settle_id(due_at, operations))
                sent += 1
            if (sent + skipped) % PAGE == 0:
                progress(sent + skipped, max(total, sent + skipped), sent=sent, skipped=skipped, due_at=str(due_at))
                if progress.seconds > MAX_SECONDS:
                    return sent, skipped, False
    return sent, skipped, True


class Backlogs:
    """Which lanes have more than enough to do: looked at now and then while they are filled."""

    def __init__(self, client: CreditClient) -> None:
        self._client = client
        self._waiting: dict[str, int] = {}
        self._until_look: dict[str, int] = {}

    def is_full(self, account: str) -> bool:
        """Whether nothing more should be sent to an account's lane."""
        lane = lane_of(account, self._client.lanes)
        left = self._until_look.get(lane, 0)
        if not left:
            self._waiting[lane] = self._client.backlog(lane)
            left = LOOK
        self._until_look[lane] = left - 1
        return self._waiting[lane] > MAX_BACKLOG


def due(connection: Connection[Any], now: datetime) -> Iterator[tuple[str, datetime, int]]:
    """The accounts that are due at an instant, the longest overdue first, page by page.

    :returns: each account with the instant at which it fell due, and how many operations it has seen.
    """
    connection.execute(IN_ORDER)
    last: tuple[datetime, str] = (BEGINNING, "")
    while page := connection.execute(DUE, (now, *last)).fetchall():
        yield from page
        last = (page[-1][1], page[-1][0])


def settle_id(due_at: datetime, operations: int) -> str:
    """The operation id for settling what falls due at an instant: twice sent, once applied.

    :param operations: how many the account has seen: what is due once more is no repetition.
    """
    return f"settle:{due_at.isoformat()}:{operations}"
