"""The daily audit: the whole ledger checked against its own entries (ledger rules: proof)."""

from __future__ import annotations

from typing import Any

import psycopg
from celery import shared_task
from celery.schedules import crontab
from celery.utils.log import get_task_logger

from models.audit import audit
from models.settings import settings

logger = get_task_logger(__name__)

SCHEDULE = {"audit": {"task": "schedules.audit", "schedule": crontab(hour="3", minute="17")}}

NAMED_FAULTS = 20
"""Faults that the log names; ``creditlane audit`` names all."""


class AuditError(RuntimeError):
    """The ledger does not prove itself; the text names the first fault."""


@shared_task(name="schedules.audit", bind=True)
def audit_all(self: Any) -> dict[str, int]:
    """Audit every account; fails, so that Flower shows it, when there is a fault.

    :returns: how many accounts, operations and entries were looked at.
    :raises AuditError: when a row is not as it should be.
    """

    def progress(done: int, total: int) -> None:
        self.update_state(state="PROGRESS", meta={"done": done, "total": total})

    with psycopg.connect(settings().database_url.get_secret_value(), autocommit=True) as connection:
        report = audit(connection, progress=progress)
    for fault in report.faults[:NAMED_FAULTS]:
        logger.error("audit: %s, %s %s: %s", fault.account, fault.table, fault.key, fault.what)
    if not report.holds:
        first = report.faults[0]
        raise AuditError(
            f"{report.fault_count} faults; the first: {first.account}, {first.table} {first.key}: {first.what}"
        )
    logger.info("audit: %d accounts, %d operations hold", report.accounts, report.operations)
    return {"accounts": report.accounts, "operations": report.operations, "entries": report.entries}
