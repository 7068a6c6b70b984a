"""What each account used of each feature on each day, added up as it comes (schedules: usage roll-up)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger

from models.cutoff import BusyError
from models.settings import settings
from models.usage import roll_up
from schedules.progress import Progress

logger = get_task_logger(__name__)

EVERY_SECONDS = 300.0

MAX_SECONDS = 240.0
"""How long a run goes on; the next one takes what is left."""

SCHEDULE = {
    "usage roll-up": {
        "task": "schedules.usage",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}


@shared_task(name="schedules.usage", bind=True, max_retries=3, autoretry_for=(psycopg.OperationalError,),
             retry_backoff=10)  # fmt: skip
def count(self: Any, anew: bool = False) -> dict[str, int]:
    """Count the operations that were applied since the last time.

    :param anew: forget what was counted and begin with the first operation, such as after a fault of ours in counting.
        Reports are incomplete until it has come to the end.
    :returns: how many operations were ``counted``.
    """
    progress = Progress(self, logger, "usage", "operations")

    def told(counted: int, until: datetime, cutoff: datetime) -> bool:
        progress(counted, counted, until=str(until), of=str(cutoff))
        return progress.seconds < MAX_SECONDS

    try:
        with psycopg.connect(settings().database_url.get_secret_value(), autocommit=True) as connection:
            counted = roll_up(connection, told, anew=anew)
    except BusyError as error:
        logger.info("usage: left to the next roll-up (%s)", error)
        return {"counted": 0}
    return {"counted": counted}
