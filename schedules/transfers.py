"""Transfers without an end: send again what brings them to their recipient (ledger rules: operations, transfer).

A message of a transfer is not kept once the broker has confirmed it, and a broker can lose what it confirmed. So a
transfer that has been in transit for long is sent to its recipient again, as the recipient has it if it does: it then
answers the sender again. Whichever of the messages was lost, the transfer ends, once. So do conversions of leads; and
what came to a lead after its own, and did not follow, is told to follow again.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger

from creditlane.contract import Convert, Receive, Transfer, decode_message
from models.rules.state import Grant
from models.settings import settings
from tasks.leads import converting
from tasks.operation import FollowUp
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
    SELECT o.account, o.operation, o.name, o.number, o.arguments, o.first_seq, o.entries, o.applied_at
    FROM accounts a JOIN operations o ON o.account = a.account
    WHERE a.in_transit_micro > 0 AND o.name IN ('credits.transfer', 'credits.convert') AND o.status = 'applied'
      AND o.applied_at <= ledger_now() - interval '{AGE_SECONDS} seconds'
      AND NOT EXISTS (SELECT FROM entries e WHERE e.account = o.account AND e.refers_to = o.operation
                      AND e.kind IN ('sent', 'bounced'))
    ORDER BY o.applied_at LIMIT {MAX_TRANSFERS}
)
SELECT o.account, o.operation, o.name, o.arguments::text, o.applied_at, e.amount_micro, g.grant_id, g.source,
       g.priority, g.features, g.effective_at, g.expires_at, g.created_at, g.operation, g.price_minor,
       g.price_currency, g.price_per_micro
FROM endless o
JOIN entries e ON e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
    AND e.kind = 'transferred'
JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id
ORDER BY o.account, o.number, e.seq
"""
RECEIVED = "SELECT arguments FROM operations WHERE account = %s AND operation = %s"
"""What the recipient has of a transfer: a lot of the sender's may have got another end since."""
STAYED = f"""
SELECT a.account, a.converted_to, o.operation
FROM accounts a JOIN operations o ON o.account = a.account AND o.number = a.operations
WHERE a.converted_to IS NOT NULL AND a.available_micro > 0
  AND NOT (o.name = 'credits.convert' AND o.status = 'applied' AND o.entries = 0)
  AND a.updated_at <= ledger_now() - interval '{AGE_SECONDS} seconds'
ORDER BY a.account LIMIT {MAX_TRANSFERS}
"""
"""What came to leads after they were converted, and by which operation: looked for among all leads that were. A
conversion that found nothing to take shows that the rest cannot leave, being disputed."""
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
        for (account, operation, name, arguments, applied_at), lots in groupby(rows, key=lambda row: row[:5]):
            message = decode_message(name, arguments.encode())
            assert isinstance(message, Transfer | Convert)
            plan = [(_lot(*grant), amount) for _, _, _, _, _, amount, *grant in lots]
            follow = receiving(account, operation, message, plan, applied_at)
            received = connection.execute(RECEIVED, (follow.account, follow.operation)).fetchone()
            if received is not None:
                follow = FollowUp(Receive.operation, follow.operation, received[0])
            again += _insert(connection, follow)
            logger.warning("transfer %r of %r has no end yet: sent to its recipient again", operation, account)
        for lead, to, after in connection.execute(STAYED).fetchall():
            again += _insert(connection, converting(lead, to, after))
            logger.warning("credits of %r have not followed to %r yet: sent for again", lead, to)
    return {"again": again}


def _insert(connection: psycopg.Connection[Any], follow: FollowUp) -> int:
    encoded = msgspec.json.encode(follow.arguments).decode()
    values = (follow.account, follow.name, follow.operation, encoded, follow.operation)
    return connection.execute(INSERT, values).rowcount


def _lot(
    grant_id: int, source: str, priority: int, features: list[str] | None, effective_at: Any, expires_at: Any,
    created_at: Any, operation: str, price_minor: int | None, price_currency: str | None, price_per: int | None,
) -> Grant:  # fmt: skip
    scope = None if features is None else frozenset(features)
    return Grant(
        grant_id, source, priority, scope, effective_at, expires_at, created_at, operation, None,
        price_minor, price_currency, price_per,
    )  # fmt: skip
