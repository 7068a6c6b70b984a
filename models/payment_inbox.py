"""The inbox of payments: each event of a provider once, whole, as it came (payments: the way of a webhook)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NamedTuple, Protocol

from psycopg import Connection

Source = Literal["webhook", "receive", "reconcile"]
"""How an event came: by the relay, by a task of another party's relay, or asked for."""

STORE = """
INSERT INTO payment_events (provider, livemode, event_id, type, source, created_at, received_at, body)
VALUES (%(provider)s, %(livemode)s, %(event_id)s, %(type)s, %(source)s, %(created_at)s, ledger_now(), %(body)s)
ON CONFLICT ON CONSTRAINT payment_events_once DO NOTHING RETURNING id
"""
FIND = """
SELECT id FROM payment_events WHERE provider = %(provider)s AND livemode = %(livemode)s AND event_id = %(event_id)s
"""


class Envelope(Protocol):
    """What an adapter reads of an event (``workers.providers.base.Event``)."""

    @property
    def provider(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def livemode(self) -> bool: ...
    @property
    def created(self) -> datetime: ...


class Stored(NamedTuple):
    """An event's row."""

    id: int
    is_new: bool
    """False: it was there before, and stays as it was."""


def store(connection: Connection[Any], event: Envelope, raw: bytes, source: Source) -> Stored:
    """Put an event into the inbox, unless it is there; of several at once one is new.

    :param connection: in autocommit mode, or in a transaction that commits before anybody is told of the row.
    :param raw: the body as it came.
    :returns: its row, which nobody has been told of: ``next_attempt_at`` is NULL.
    :raises psycopg.Error: when it is not known to be stored.
    """
    values = {
        "provider": event.provider,
        "livemode": event.livemode,
        "event_id": event.id,
        "type": event.type,
        "source": source,
        "created_at": event.created,
        "body": raw,
    }
    new = connection.execute(STORE, values).fetchone()
    if new is not None:
        return Stored(new[0], True)
    known = connection.execute(FIND, values).fetchone()
    assert known is not None  # rows of the inbox are not deleted
    return Stored(known[0], False)
