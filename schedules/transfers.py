"""Transfers without an end: send again what brings them to their recipient (ledger rules: operations, transfer).

A message of a transfer is not kept once the broker has confirmed it, and a broker can lose what it confirmed. So a
transfer that has been in transit for long is sent to its recipient again. A recipient that has it already answers the
sender again: whichever of the messages was lost, the transfer ends, once.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger

from creditlane.contract import Transfer, decode_message
from models.rules.state import Grant
from models.settings import settings
from tasks.transfers import receiving

logger = get_task_logger(__name__)

EVERY_SECONDS = 3600.0

AGE_SECONDS = 3600
"""How long a transfer has been in transit before it counts as without an end: a lane that stands for a while is not
filled further."""

MAX_TRANSFERS = 1000
"""Transfers that one run sends again; the next one goes on with what is still without an end."""

SCHEDULE = {
    "transfers": {
        "task": "schedules.transfers",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

ENDLESS = f"""
WITH endless AS (
    SELECT o.account, o.operation, o.number, o.arguments, o.first_seq, o.entries
    FROM accounts a JOIN operations o ON o.account = a.account
    WHERE a.in_transit_micro > 0 AND o.name = 'credits.transfer' AND o.status = 'applied'
      AND o.applied_at <= ledger_now() - interval '{AGE_SECONDS} seconds'
      AND NOT EXISTS (SELECT FROM entries e WHERE e.account = o.account AND e.refers_to = o.operation
                      AND e.kind IN ('sent', 'bounced'))
    ORDER BY o.applied_at LIMIT {MAX_TRANSFERS}
)
SELECT o.account, o.operation, o.arguments::text, e.amount_micro, g.grant_id, g.source, g.priority, g.effective_at,
       g.expires_at, g.created_at, g.operation, g.price_minor, g.price_currency, g.price_per_micro
FROM endless o
JOIN entries e ON e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
    AND e.kind = 'transferred'
JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id
ORDER BY o.account, o.number, e.seq
"""
INSERT = """
INSERT INTO outbox (account, exchange, task, operation, arguments, created_at)
SELECT %s, '', %s, %s, %s, ledger_now() WHERE NOT EXISTS (SELECT FROM outbox WHERE operation = %s)
"""


@shared_task(name="schedules.transfers")
def sweep() -> dict[str, int]:
    """Put what brings a transfer to its recipient into the outbox again, for each that has no end.

    :returns: how many.
    """
    again = 0
    with psycopg.connect(settings().database_url.get_secret_value()) as connection:
        rows = connection.execute(ENDLESS).fetchall()
        for (account, operation, arguments), lots in groupby(rows, key=lambda row: row[:3]):
            message = decode_message(Transfer.operation, arguments.encode())
            assert isinstance(message, Transfer)
            plan = [(_lot(*grant), amount) for _, _, _, amount, *grant in lots]
            follow = receiving(account, operation, message, plan)
            encoded = msgspec.json.encode(follow.arguments).decode()
            values = (follow.account, follow.name, follow.operation, encoded, follow.operation)
            again += connection.execute(INSERT, values).rowcount
            logger.warning("transfer %r of %r has no end yet: sent to its recipient again", operation, account)
    return {"again": again}


def _lot(
    grant_id: int, source: str, priority: int, effective_at: Any, expires_at: Any, created_at: Any, operation: str,
    price_minor: int | None, price_currency: str | None, price_per: int | None,
) -> Grant:  # fmt: skip
    return Grant(
        grant_id, source, priority, None, effective_at, expires_at, created_at, operation, None,
        price_minor, price_currency, price_per,
    )  # fmt: skip
