"""The outbox: what follows from operations goes out once they are committed (lanes: outbox).

A row is written in the transaction of the operation that it follows from, published after the commit and deleted when
the broker has confirmed it. What a crash left between those steps, ``schedules/outbox.py`` publishes. So each goes out
at least once; whoever receives one knows it by its id.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5

import psycopg
from celery.utils.log import get_logger
from psycopg import Connection

from creditlane.client import NOTICES, SHOWN_CHARACTERS, task_message
from creditlane.errors import BrokerUnavailableError
from creditlane.events import EXCHANGE, routing_key
from creditlane.lanes import lane_of
from creditlane.sending import Outgoing, Sender
from workers.crash import crash_point

logger = get_logger(__name__)

REST_SECONDS = 10.0
"""How long nothing is published after the broker did not confirm: the sweep does it meanwhile, and a lane does not
wait for a broker at each batch."""

PATIENCE_SECONDS = 2.0
"""How long the broker may take for one step of that; a connection is tried twice. Lanes stand still meanwhile, and the
database ends a session that is silent for longer than :data:`workers.ledger_writer.SILENT_SECONDS`: a broker that gives
messages and takes none (it is short of memory or disk) must not cost the lanes."""

DELETE = """
DELETE FROM outbox WHERE id IN (SELECT id FROM outbox WHERE id = ANY(%s) FOR UPDATE SKIP LOCKED)
"""
"""Rows that a sweep is publishing at this moment are its own to delete: nobody waits for it."""


DELIVER = "notices.deliver"
"""The task that delivers one notice by all its channels."""


class OutboxRow(NamedTuple):
    """One row of the outbox."""

    id: int
    account: str
    exchange: str
    task: str
    operation: str
    arguments: bytes
    created_at: datetime


class Outbox:
    """Publishes what a lane worker has just committed.

    :param connection: in autocommit mode; the lane's own will do, between two batches. Another may take its place.
    :param sender: sends in confirmed blocks, with :data:`PATIENCE_SECONDS`.
    :param lanes: how many lanes the deployment has.
    """

    def __init__(self, connection: Connection[Any], sender: Sender, lanes: int) -> None:
        self.connection = connection
        self._sender = sender
        self._lanes = lanes
        self._resting_until = 0.0

    def publish(self, rows: Sequence[OutboxRow]) -> None:
        """Send rows that are committed, in order, and delete them; costs nothing when there are none.

        Raises nothing for a broker or a database that is away: it is logged, and the rows stay for the sweep.
        """
        if not rows or time.monotonic() < self._resting_until:
            return
        crash_point("before-publish")
        try:
            self._sender.send(outgoing(rows, self._lanes), retry=False)
            crash_point("after-publish")
            self.connection.execute(DELETE, ([row.id for row in rows],))
        except BrokerUnavailableError as error:
            self._resting_until = time.monotonic() + REST_SECONDS
            logger.warning("outbox: %d messages wait for the sweep, the broker is away: %s", len(rows), error)
        except psycopg.Error as error:
            logger.warning(
                "outbox: %d messages were sent and not deleted, the sweep sends them again: %s", len(rows), error
            )


def outgoing(rows: Iterable[OutboxRow], lanes: int) -> list[Outgoing]:
    """The messages of outbox rows: operations as a client sends them, events for their exchange, tasks for a queue."""
    return [_event(row, lanes) if row.exchange == EXCHANGE else _task(row, lanes) for row in rows]


def _task(row: OutboxRow, lanes: int) -> Outgoing:
    shown = row.arguments[:SHOWN_CHARACTERS].decode("utf-8", "ignore")
    if row.exchange == NOTICES:
        return task_message(row.task, str(uuid5(NAMESPACE_OID, row.operation)), NOTICES, row.arguments, shown)
    return task_message(row.task, row.operation, lane_of(row.account, lanes), row.arguments, shown)


def _event(row: OutboxRow, lanes: int) -> Outgoing:
    headers = {"id": row.operation, "type": row.task}
    return Outgoing(routing_key(row.task, row.account, lanes), row.arguments, headers, row.exchange)
