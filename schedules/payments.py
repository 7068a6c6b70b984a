"""Payments that nobody finished: events that were never picked up, facts that wait, and the provider's own books.

All of it stands in tables (schedules: payments inbox), so a message that a broker lost costs a minute and nothing else.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task
from celery.utils.log import get_task_logger

from creditlane.client import PAYMENTS
from models.database import connect
from models.settings import settings
from workers.notices import send_all, sender
from workers.payments import LOOK, RECONCILE, task
from workers.receiving import applying

logger = get_task_logger(__name__)

PAGE = 500
"""Rows of one block of messages."""

GROUPS = 50
"""Groups of facts of one message."""

MAX_PAGES = 20
"""Blocks of one run; the next one goes on with what is left."""

MAX_BACKLOG = 10_000
"""Messages in the queue above which nothing is added: what stands in it comes first."""

AGE_SECONDS = 60
"""How old an event is before it counts as never picked up."""

CLAIM_SECONDS = 900
"""How long after a message was sent its event, or its groups, get another one."""

EVERY_SECONDS = 60.0
RECONCILE_SECONDS = 3600.0
DEEP_SECONDS = 86_400.0

SCHEDULE = {
    "payments": {
        "task": "schedules.payments",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    },
    "reconcile payments": {
        "task": RECONCILE,
        "schedule": RECONCILE_SECONDS,
        "options": {"expires": RECONCILE_SECONDS},
    },
    "reconcile payments of weeks": {
        "task": RECONCILE,
        "schedule": DEEP_SECONDS,
        "kwargs": {"deep": True},
        "options": {"expires": DEEP_SECONDS},
    },
}

CLAIM_EVENTS = f"""
UPDATE payment_events SET next_attempt_at = ledger_now() + interval '{CLAIM_SECONDS} seconds'
WHERE id IN (
    SELECT id FROM payment_events WHERE status = 'received'
      AND (next_attempt_at <= ledger_now()
           OR next_attempt_at IS NULL AND received_at <= ledger_now() - interval '{AGE_SECONDS} seconds')
    ORDER BY next_attempt_at, id LIMIT {PAGE} FOR UPDATE SKIP LOCKED
)
RETURNING id
"""
CLAIM_GROUPS = f"""
UPDATE payment_groups SET next_look_at = ledger_now() + interval '{CLAIM_SECONDS} seconds'
WHERE id IN (
    SELECT id FROM payment_groups WHERE next_look_at <= ledger_now()
    ORDER BY next_look_at LIMIT {PAGE} FOR UPDATE SKIP LOCKED
)
RETURNING id
"""


@shared_task(name="schedules.payments", bind=True)
def sweep(self: Any) -> dict[str, int]:
    """Send a message for each event that was never picked up or is due again, and for groups whose facts have waited.

    :returns: how many of each.
    :raises BrokerUnavailableError: when the broker does not confirm; they come again after their claim.
    """
    events = groups = 0
    with connect(settings().database_url.get_secret_value(), "creditlane payments", read_only=False) as connection:
        for _ in range(MAX_PAGES):
            if sender().depth(PAYMENTS) > MAX_BACKLOG:
                break
            # Committed before the messages go out: what a broker loses comes again after its claim.
            due = [event for (event,) in connection.execute(CLAIM_EVENTS)]
            waiting = [group for (group,) in connection.execute(CLAIM_GROUPS)]
            if not due and not waiting:
                break
            messages = [applying(id) for id in sorted(due)]
            for start in range(0, len(waiting), GROUPS):
                part = waiting[start : start + GROUPS]
                messages.append(task(LOOK, f"payment groups {part}", groups=part))
            send_all(messages)
            events += len(due)
            groups += len(waiting)
            self.update_state(state="PROGRESS", meta={"events": events, "groups": groups})
    if events:
        logger.warning("payments: %d events were not picked up or are read again", events)
    return {"events": events, "groups": groups}
