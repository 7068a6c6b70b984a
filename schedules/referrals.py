"""Rewards of referrals that never came: send again what brings them to their referrers (ledger rules: referrals).

The message that follows from a referee's bonus is not kept once the broker has confirmed it, and a broker can lose what
it confirmed. So a bonus whose reward the referrer's lane has not answered is sent there again. What was refused was
answered: it is not sent again.
"""

from __future__ import annotations

from typing import Any

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger

from models.settings import settings
from schedules.transfers import INSERT
from tasks.referrals import rewarding

logger = get_task_logger(__name__)

EVERY_SECONDS = 3600.0

AGE_SECONDS = 3600
"""How long ago a bonus was given before its reward counts as lost: a lane that stands for a while is not filled
further."""

DAYS = 7
"""How far back is looked: a broker that has lost more is made good by a call with more ``days``."""

PAGE = 1000
"""Bonuses that are looked at together."""

SCHEDULE = {
    "referrals": {
        "task": "schedules.referrals",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

SETTLED = f"""
SELECT referrer, account, claimed_code FROM referrals
WHERE settled_at > ledger_now() - make_interval(days => %s)
  AND settled_at <= ledger_now() - interval '{AGE_SECONDS} seconds'
ORDER BY settled_at
"""
ANSWERED = """
SELECT o.operation FROM unnest(%s::text[], %s::text[]) AS k(account, operation)
JOIN operations o ON o.account = k.account AND o.operation = k.operation
"""


@shared_task(name="schedules.referrals")
def sweep(days: int = DAYS) -> dict[str, int]:
    """Put what rewards a referrer into the outbox again, for each bonus whose reward was never answered.

    :param days: how far back bonuses are looked at.
    :returns: how many.
    """
    again = 0
    url = settings().database_url.get_secret_value()
    with psycopg.connect(url) as connection, connection.cursor("settled") as settled:
        settled.execute(SETTLED, (days,))
        while page := settled.fetchmany(PAGE):
            again += _send_again(connection, page)
    return {"again": again}


def _send_again(connection: psycopg.Connection[Any], page: list[Any]) -> int:
    rewards = [rewarding(*row) for row in page]
    keys = ([each.account for each in rewards], [each.operation for each in rewards])
    answered = {operation for (operation,) in connection.execute(ANSWERED, keys)}
    again = 0
    for reward in rewards:
        if reward.operation not in answered:
            encoded = msgspec.json.encode(reward.arguments).decode()
            values = (reward.account, reward.name, reward.operation, encoded, reward.operation)
            again += connection.execute(INSERT, values).rowcount
            logger.warning("the reward of %r for %r was lost: sent again", reward.account, reward.arguments["referee"])
    return again
