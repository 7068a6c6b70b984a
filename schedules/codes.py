"""Gift codes: end those whose time is over, and tell those who paid of uses that they were not told of.

A code that is over gives nothing any more, however late it is ended; but what was paid for the uses that are left comes
back only then. And a message that tells of a use is not kept once the broker has confirmed it, and a broker can lose
what it confirmed: a use that its payer does not know of after long is told of again, under the same id, so once.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby
from typing import Any

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger

from creditlane.contract import MAX_CODES, VERSION, WithdrawCodes
from models.audit_codes import REDEEMED_ID
from models.due import BEGINNING, IN_ORDER
from models.rules.sharing import GIFT, Terms
from models.settings import settings
from tasks.codes import concluding
from tasks.operation import FollowUp

logger = get_task_logger(__name__)

EVERY_SECONDS = 600.0

AGE_SECONDS = 3600
"""How long ago a code was redeemed before it counts as untold: a lane that stands for a while is not filled further."""

PAGE = MAX_CODES
"""Codes that are read at a time."""

MAX_ENDED = 100 * PAGE
"""Codes that one run ends; the next one goes on with what is left."""

MAX_AGAIN = 10_000
"""Uses that one run tells of again."""

SCHEDULE = {
    "gift codes": {
        "task": "schedules.codes",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

OVER = f"""
SELECT account, code, expires_at FROM codes
WHERE status = 'open' AND expires_at IS NOT NULL AND expires_at <= %s AND (expires_at, code) > (%s, %s)
ORDER BY expires_at, code LIMIT {PAGE}
"""
UNTOLD = f"""
SELECT c.code, c.account, c.operation, c.place, r.slot, r.account
FROM accounts a JOIN codes c ON c.account = a.account JOIN redemptions r ON r.code = c.code
WHERE a.in_transit_micro > 0 AND c.kind = 'gift' AND c.used > 0 AND c.terms ->> 'source' IS NULL
  AND r.at <= ledger_now() - interval '{AGE_SECONDS} seconds'
  AND NOT EXISTS (SELECT FROM operations o WHERE o.account = c.account AND o.operation = {REDEEMED_ID})
ORDER BY r.at LIMIT {MAX_AGAIN}
"""
INSERT = """
INSERT INTO outbox (account, exchange, task, operation, arguments, created_at)
SELECT %s, '', %s, %s, %s, ledger_now() WHERE NOT EXISTS (SELECT FROM outbox WHERE operation = %s)
"""

ACTOR, REASON = "creditlane", "its time is over"
"""Who ends a code that an administrator gave, and why."""


@shared_task(name="schedules.codes")
def sweep() -> dict[str, int]:
    """Put what ends codes, and what tells of their uses again, into the outbox.

    :returns: how many messages ``ended`` codes, and how many uses are told of ``again``.
    """
    with psycopg.connect(settings().database_url.get_secret_value()) as connection:
        ended = sum(_put(connection, follow) for page in _over(connection) for follow in _ending(page))
        untold = [
            concluding(Terms(code=code, kind=GIFT, account=account, operation=issue, place=place), slot, redeemed_by)
            for code, account, issue, place, slot, redeemed_by in connection.execute(UNTOLD)
        ]
        again = sum(_put(connection, follow) for follow in untold)
    if ended:
        logger.info("gift codes: ended those whose time is over, with %d messages", ended)
    if again:
        logger.warning("gift codes: %d uses are told of again to those who paid", again)
    return {"ended": ended, "again": again}


def _over(connection: psycopg.Connection[Any]) -> Iterator[list[tuple[str, str]]]:
    """The codes whose time is over, with who issued them, page by page."""
    connection.execute(IN_ORDER)
    row = connection.execute("SELECT ledger_now()").fetchone()
    assert row is not None
    last = (BEGINNING, "")
    for _ in range(MAX_ENDED // PAGE):
        page = connection.execute(OVER, (row[0], *last)).fetchall()
        if not page:
            return
        yield [(account, code) for account, code, _ in page]
        last = (page[-1][2], page[-1][1])


def _ending(over: list[tuple[str, str]]) -> Iterator[FollowUp]:
    """What ends codes of each account; the same each time it is made of the same codes."""
    for account, rows in groupby(sorted(over), key=lambda row: row[0]):
        codes = [code for _, code in rows]
        arguments = {"account": account, "codes": codes, "actor": ACTOR, "reason": REASON, "v": VERSION}
        digest = sha256(" ".join(codes).encode()).hexdigest()
        yield FollowUp(WithdrawCodes.operation, f"codes.over:{digest}", arguments)


def _put(connection: psycopg.Connection[Any], follow: FollowUp) -> int:
    encoded = msgspec.json.encode(follow.arguments).decode()
    return connection.execute(
        INSERT, (follow.account, follow.name, follow.operation, encoded, follow.operation)
    ).rowcount
