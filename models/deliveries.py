"""How notices went out: by which channels, and those that were given up, which an operator may have tried again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from psycopg import Connection

from models.reading import DEFAULT_PAGE, MAX_PAGE

_COLUMNS = "d.account, d.key, d.channel, d.status, d.attempts, d.next_attempt_at, d.sent_at, d.error"
OF_NOTICES = f"SELECT {_COLUMNS} FROM deliveries d WHERE account = %s AND key = ANY(%s) ORDER BY key, channel"
PARKED = f"""
SELECT {_COLUMNS} FROM deliveries d WHERE status = 'parked' AND (account, key, channel) > (%s, %s, %s)
ORDER BY account, key, channel LIMIT %s
"""
RETRY = """
UPDATE deliveries SET status = 'pending', next_attempt_at = ledger_now(),
       attempts = CASE status WHEN 'pending' THEN attempts ELSE 0 END
WHERE account = %s AND key = %s AND channel = coalesce(%s, channel) AND status <> 'sent'
RETURNING channel
"""


class Delivery(msgspec.Struct, kw_only=True, frozen=True):
    """A notice's way out by one channel."""

    account: str
    key: str
    channel: str
    status: str
    """``pending``, ``sent``, ``skipped`` (there was no address) or ``parked`` (given up)."""
    attempts: int
    """How many have failed."""
    next_attempt_at: datetime | None
    sent_at: datetime | None
    error: str | None
    """Why the last one failed."""


def deliveries_of(connection: Connection[Any], account: str, keys: Sequence[str]) -> dict[str, list[Delivery]]:
    """How notices of an account went out, by their keys."""
    found: dict[str, list[Delivery]] = {}
    for row in connection.execute(OF_NOTICES, (account, list(keys))):
        found.setdefault(row[1], []).append(_delivery(row))
    return found


def parked(
    connection: Connection[Any], *, limit: int = DEFAULT_PAGE, after: tuple[str, str, str] = ("", "", "")
) -> list[Delivery]:
    """Deliveries that were given up, by account.

    :param limit: at most :data:`models.reading.MAX_PAGE`.
    :param after: account, key and channel of the last one of the page before.
    :raises ValueError: for a limit that is none.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} rows, not {limit}")
    return [_delivery(row) for row in connection.execute(PARKED, (*after, limit))]


def retry(connection: Connection[Any], account: str, key: str, channel: str | None = None) -> list[str]:
    """Have a notice tried again, from the beginning, by a channel or by all that have not sent it.

    The sweep of deliveries takes it up (``schedules/notices.py``).

    :param connection: one that may write.
    :returns: by which channels; none where it was sent, or there is no such notice.
    """
    return [found for (found,) in connection.execute(RETRY, (account, key, channel))]


def _delivery(row: Sequence[Any]) -> Delivery:
    return Delivery(**dict(zip(Delivery.__struct_fields__, row, strict=True)))
