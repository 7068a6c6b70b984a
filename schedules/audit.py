"""Audits: daily the whole ledger, replayed; hourly what was written since (ledger rules: proof)."""

from __future__ import annotations

from typing import Any

import psycopg
from celery import shared_task
from celery.schedules import crontab
from celery.utils.log import get_task_logger
from psycopg import Connection

from models.audit import audit, audit_new
from models.catalog import CatalogError, load_catalog
from models.catalog_texts import kept_catalogs
from models.in_force import catalog_in_force
from models.report import Report
from models.settings import Settings, settings
from schedules.progress import Progress
from tasks.replay import Replayer

logger = get_task_logger(__name__)

SCHEDULE = {
    "audit": {"task": "schedules.audit", "schedule": crontab(hour="3", minute="17")},
    "audit of what is new": {
        "task": "schedules.audit_new",
        "schedule": crontab(minute="47"),
        "options": {"expires": 3600},  # a tick that nobody took is made good by the next one
    },
}

NAMED_FAULTS = 20
"""Faults that the log names; ``creditlane audit`` names all."""


class AuditError(RuntimeError):
    """The ledger does not prove itself; the text names the first fault."""


@shared_task(name="schedules.audit", bind=True)
def audit_all(self: Any) -> dict[str, Any]:
    """Audit every account, and feed every operation to the rules again.

    Fails, so that Flower shows it, when there is a fault.

    :returns: how much was looked at; operations that could not be replayed, by the catalog that is not at hand.
    :raises AuditError: when a row is not as it should be.
    """
    config = settings()
    with psycopg.connect(config.database_url.get_secret_value(), autocommit=True) as connection:
        progress = Progress(self, logger, "audit", "operations")
        report = audit(connection, progress=progress, processes=config.audit_processes,
                       replayer=replayer(connection, config))  # fmt: skip
    return _verdict("audit", report)


@shared_task(name="schedules.audit_new", bind=True)
def audit_since(self: Any) -> dict[str, Any]:
    """Audit what was written since the last such audit that held.

    :returns: how much was looked at.
    :raises AuditError: when a row is not as it should be; then the next one begins where this one did.
    :raises models.cutoff.BusyError: when another one is running.
    """
    with psycopg.connect(settings().database_url.get_secret_value(), autocommit=True) as connection:
        report = audit_new(connection, progress=Progress(self, logger, "audit", "operations"))
    return _verdict("audit of what is new", report)


def replayer(connection: Connection[Any], config: Settings) -> Replayer:
    """What replays with every catalog that was ever in force, as the ledger has kept it, and with the present one.

    Those that the settings name come first: of before the ledger kept any.

    :raises models.catalog.CatalogError: when one of these cannot be read.
    """
    try:
        present = catalog_in_force(connection)
        catalogs = {present.label: present}
    except CatalogError as error:  # what is to be proven was applied under others
        logger.error("audit: without the catalog in force, which cannot be used: %s", error)
        catalogs = {}
    catalogs.update(kept_catalogs(connection))
    for name in filter(None, (name.strip() for name in config.audit_catalogs.split(","))):
        given = load_catalog(name)
        catalogs[given.label] = given
    return Replayer(catalogs)


def _verdict(what: str, report: Report) -> dict[str, Any]:
    for fault in report.faults[:NAMED_FAULTS]:
        logger.error("%s: %s, %s %s: %s", what, fault.account, fault.table, fault.key, fault.what)
    for label, count in report.not_replayed.items():
        logger.error("%s: %d operations cannot be replayed: the catalog %s is not at hand", what, count, label)
    if not report.holds:
        first = report.faults[0]
        raise AuditError(
            f"{report.fault_count} faults; the first: {first.account}, {first.table} {first.key}: {first.what}"
        )
    logger.info("%s: %d accounts, %d operations hold", what, report.accounts, report.operations)
    return {
        "accounts": report.accounts,
        "operations": report.operations,
        "entries": report.entries,
        "replayed": report.replayed,
        "not_replayed": report.not_replayed,
        "seals": report.seals,
    }
