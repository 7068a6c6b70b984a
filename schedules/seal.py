"""The daily seal: one root over where every account stands (ledger rules: proof).

It comes after the daily audit, so that what is sealed was proven before.
"""

from __future__ import annotations

from typing import Any

import psycopg
from celery import shared_task
from celery.schedules import crontab
from celery.utils.log import get_task_logger

from models.cutoff import BusyError
from models.seal import make_seal
from models.settings import settings

logger = get_task_logger(__name__)

SCHEDULE = {"seal": {"task": "schedules.seal", "schedule": crontab(hour="4", minute="17")}}


@shared_task(name="schedules.seal", bind=True, max_retries=5, autoretry_for=(BusyError, psycopg.OperationalError),
             retry_backoff=60)  # fmt: skip
def seal(self: Any) -> dict[str, Any]:
    """Seal the ledger as it stands.

    :returns: the seal's number, its root in hexadecimal digits, and how many accounts had moved.
    :raises models.cutoff.BusyError: when a transaction that may still write does not end in time, each time it was
        tried: the next day's seal has what this one would have had.
    """
    config = settings()

    def waiting(pids: list[int]) -> None:
        self.update_state(state="PROGRESS", meta={"waiting_for": pids})
        logger.info("seal: waiting for the transactions of backends %s", ", ".join(map(str, pids)))

    def progress(accounts: int) -> None:
        self.update_state(state="PROGRESS", meta={"accounts": accounts})

    with psycopg.connect(config.database_url.get_secret_value(), autocommit=True) as connection:
        made = make_seal(connection, config.seal_wait_seconds, waiting, progress)
    logger.info("seal %d: root %s over %d accounts that moved", made.number, made.root.hex(), made.accounts)
    return {"number": made.number, "root": made.root.hex(), "accounts": made.accounts}
