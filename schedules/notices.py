"""Notices that nobody delivered are sent to their queue again, and deliveries that failed when their time has come.

Both are facts of the tables (schedules: low-balance sweep), so a message that was lost, by a broker or a worker, costs
time and nothing else.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery import shared_task
from celery.utils.log import get_task_logger

from creditlane.client import NOTICES
from models.database import connect
from models.settings import settings
from workers.notices import CLAIM_SECONDS, delivering, send_all, sender, sending

logger = get_task_logger(__name__)

PAGE = 1000
"""Rows of one block of messages."""

MAX_PAGES = 100
"""Blocks of one run; the next one goes on with what is left."""

MAX_BACKLOG = 10_000
"""Messages in the queue above which nothing is added: what stands in it comes first."""

AGE_SECONDS = 600
"""How old a notice is before it counts as left behind."""

EVERY_SECONDS = 600.0
RETRY_EVERY_SECONDS = 60.0

SCHEDULE = {
    "notices": {
        "task": "schedules.notices",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    },
    "deliveries": {
        "task": "schedules.deliveries",
        "schedule": RETRY_EVERY_SECONDS,
        "options": {"expires": RETRY_EVERY_SECONDS},
    },
}

UNBEGUN = f"""
SELECT n.created_at, n.account, n.key
FROM notices n LEFT JOIN LATERAL (
    SELECT true AS is_begun FROM deliveries d WHERE d.account = n.account AND d.key = n.key LIMIT 1
) d ON true
WHERE n.delivered_at IS NULL AND n.created_at <= ledger_now() - interval '{AGE_SECONDS} seconds'
  AND (n.created_at, n.account, n.key) > (%s, %s, %s) AND d.is_begun IS NULL
ORDER BY n.created_at, n.account, n.key LIMIT {PAGE}
"""
"""Looked up one by one: while a channel is away for long, a whole table would be read for each page otherwise."""
CLAIM = f"""
UPDATE deliveries SET next_attempt_at = ledger_now() + interval '{CLAIM_SECONDS} seconds'
WHERE (account, key, channel) IN (
    SELECT account, key, channel FROM deliveries WHERE next_attempt_at <= %s
    ORDER BY next_attempt_at LIMIT {PAGE} FOR UPDATE SKIP LOCKED
)
RETURNING account, key, channel, attempts
"""
"""Each gets one message, and another only when that one was lost. Those that are being sent are locked, and skipped."""

BEGINNING = datetime.fromisoformat("0001-01-02T00:00:00+00:00")


@shared_task(name="schedules.notices", bind=True)
def sweep(self: Any) -> dict[str, int]:
    """Send ``notices.deliver`` for each notice whose delivery was never begun.

    :returns: for how many.
    :raises BrokerUnavailableError: when the broker does not confirm; the next run sends them.
    """
    again = 0
    with connect(settings().database_url.get_secret_value(), "creditlane notices") as connection:
        place: tuple[Any, ...] = (BEGINNING, "", "")
        for _ in range(MAX_PAGES):
            if sender().depth(NOTICES) > MAX_BACKLOG:
                break
            rows = connection.execute(UNBEGUN, place).fetchall()
            if not rows:
                break
            place = rows[-1]
            again += send_all(delivering(account, key) for _, account, key in rows)
            self.update_state(state="PROGRESS", meta={"again": again})
    if again:
        logger.warning("notices: %d were left behind, they are sent to their queue again", again)
    return {"again": again}


@shared_task(name="schedules.deliveries", bind=True)
def retry(self: Any) -> dict[str, int]:
    """Send ``notices.send`` for each delivery whose next attempt is due.

    :returns: for how many.
    :raises BrokerUnavailableError: when the broker does not confirm; they come again after their claim.
    """
    again = 0
    with connect(settings().database_url.get_secret_value(), "creditlane notices", read_only=False) as connection:
        row = connection.execute("SELECT ledger_now()").fetchone()
        assert row is not None
        for _ in range(MAX_PAGES):
            if sender().depth(NOTICES) > MAX_BACKLOG:
                break
            # Committed before the messages go out: a worker that is quicker than we finds no lock of ours.
            rows = connection.execute(CLAIM, row).fetchall()
            if not rows:
                break
            again += send_all(sending(*each) for each in rows)
            self.update_state(state="PROGRESS", meta={"again": again})
    return {"again": again}
