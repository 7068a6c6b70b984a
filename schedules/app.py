"""The Celery app of beat: ``celery -A schedules.app beat``.

Beat only ticks. What is due is a fact in the database: two beats, or none for a day, change no balance.
"""

from __future__ import annotations

from schedules import (
    audit,
    codes,
    expiry,
    notices,
    outbox,
    payments,
    referrals,
    retention,
    seal,
    transfers,
    usage,
    warnings,
)
from workers.app import app

app.conf.beat_scheduler = "schedules.beat:Scheduler"
app.conf.beat_schedule = {
    **expiry.SCHEDULE,
    **outbox.SCHEDULE,
    **notices.SCHEDULE,
    **warnings.SCHEDULE,
    **transfers.SCHEDULE,
    **codes.SCHEDULE,
    **referrals.SCHEDULE,
    **payments.SCHEDULE,
    **usage.SCHEDULE,
    **audit.SCHEDULE,
    **seal.SCHEDULE,
    **retention.SCHEDULE,
}

__all__ = ["app"]
