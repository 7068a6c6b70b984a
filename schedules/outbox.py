"""Outbox sweep: publish what was committed and, because of a crash or a fault, not published (schedules: outbox).

A lane worker publishes right after the commit, so what is older than a few seconds was left behind. Two sweeps at once
share the rows: each skips those that the other has locked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger
from psycopg import Connection

from creditlane.errors import BrokerUnavailableError
from creditlane.sending import Outgoing, Sender, make_sender
from models.settings import settings
from workers.outbox import OutboxRow, outgoing

logger = get_task_logger(__name__)

PAGE = 500
"""Rows that one transaction publishes."""

MAX_PAGES = 100
"""Pages of one run; the next one goes on where it ended."""

MAX_FAILURES = 3
"""Queues in a row that the broker may refuse before a run ends: a lane that takes nothing does not stop the others, and
a broker that is away is not asked a hundred times."""

AGE_SECONDS = 10
"""How old a row is before it counts as left behind: a lane worker is done with it by then."""

EVERY_SECONDS = 10.0

SCHEDULE = {
    "outbox": {
        "task": "schedules.outbox",
        "schedule": EVERY_SECONDS,
        "options": {"expires": EVERY_SECONDS},  # a tick that nobody took is made good by the next one
    }
}

LEFT = f"""
SELECT id, account, exchange, task, operation, arguments::text, created_at FROM outbox
WHERE id > %s AND created_at <= ledger_now() - interval '{AGE_SECONDS} seconds'
ORDER BY id LIMIT {PAGE} FOR UPDATE SKIP LOCKED
"""


@shared_task(name="schedules.outbox", bind=True)
def sweep(self: Any) -> dict[str, int]:
    """Publish the rows that were left behind, the oldest first, and delete those that the broker confirmed.

    :returns: how many were published.
    :raises BrokerUnavailableError: when the broker did not confirm all; what it did not stays for the next run.
    """
    config = settings()
    published = 0
    run = Run(config.lanes)
    sender: Sender | None = None
    with psycopg.connect(config.database_url.get_secret_value(), autocommit=True) as connection:
        try:
            last = 0
            for _ in range(MAX_PAGES):
                with connection.transaction():
                    rows = left_behind(connection, last)
                    if not rows:
                        break
                    last = rows[-1].id
                    sender = sender or make_sender(config.broker_url.get_secret_value(), config.tls(config.broker_url))
                    sent = run.publish(sender, rows)
                    connection.execute("DELETE FROM outbox WHERE id = ANY(%s)", ([row.id for row in sent],))
                published += len(sent)
                if run.over:
                    break
                self.update_state(state="PROGRESS", meta={"published": published})
        finally:
            if sender is not None:
                sender.close()
            if published:
                logger.warning("outbox: published %d messages that were left behind", published)
    if run.failure is not None:
        raise run.failure
    return {"published": published}


class Run:
    """What one run has learnt of the broker: which queues take nothing.

    Each queue is sent to by itself, so what others took is not sent again for it; and in any order, so that those
    which take nothing are not always the first to be asked.

    :param lanes: how many lanes the deployment has.
    """

    def __init__(self, lanes: int) -> None:
        self.failure: BrokerUnavailableError | None = None
        """The first of this run."""
        self._lanes = lanes
        self._refusing: set[str] = set()
        self._in_a_row = 0

    @property
    def over(self) -> bool:
        """Whether nothing more is to be tried."""
        return self._in_a_row >= MAX_FAILURES

    def publish(self, sender: Sender, rows: Sequence[OutboxRow]) -> list[OutboxRow]:
        """Send rows, those of one queue in their order.

        :returns: those that the broker confirmed.
        """
        queues: dict[str, list[tuple[OutboxRow, Outgoing]]] = {}
        for row, message in zip(rows, outgoing(rows, self._lanes), strict=True):
            queues.setdefault(message.exchange or message.queue, []).append((row, message))
        sent: list[OutboxRow] = []
        names = [name for name in queues if name not in self._refusing]
        random.shuffle(names)
        for name in names:
            if self.over:
                break
            try:
                sender.send([message for _, message in queues[name]], retry=self.failure is None)
            except BrokerUnavailableError as error:
                self.failure = self.failure or error
                self._refusing.add(name)
                self._in_a_row += 1
            else:
                self._in_a_row = 0
                sent += [row for row, _ in queues[name]]
        return sent


def left_behind(connection: Connection[Any], last: int) -> list[OutboxRow]:
    """Lock the next page of rows that were left behind, beyond the id ``last``."""
    found = connection.execute(LEFT, (last,)).fetchall()
    return [
        OutboxRow(id, account, exchange, task, operation, arguments.encode(), created_at)
        for id, account, exchange, task, operation, arguments, created_at in found
    ]
