"""Quarantine: messages that could not be understood or applied, kept whole (messages: at the door)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from psycopg import Connection

from creditlane.codes import Code

MAX_REASON = 2000
"""Characters of a reason or traceback that are kept; the message itself is kept whole."""


@dataclass(slots=True)
class Quarantined:
    """One message on its way into quarantine."""

    code: Code
    reason: str
    queue: str
    body: bytes
    headers: bytes = b"{}"
    content_type: str | None = None
    task: str | None = None
    operation: str | None = None
    account: str | None = None
    traceback: str | None = None

    @property
    def digest(self) -> bytes:
        """What makes a redelivery the same row: queue, headers and body, each with its length."""
        parts = (self.queue.encode("utf-8", "surrogatepass"), self.headers, self.body)
        return sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).digest()


INSERT = """
INSERT INTO quarantine (digest, status, code, reason, traceback, queue, task, operation, account, content_type,
                        headers, body, received_at)
VALUES (%s, 'open', %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, ledger_now())
ON CONFLICT (digest) DO UPDATE SET times_seen = quarantine.times_seen + 1, status = 'open', resolved_at = NULL,
    resolved_by = NULL
"""


def store(connection: Connection[Any], rows: Sequence[Quarantined]) -> None:
    """Insert rows in the present transaction; a message seen before counts up, and is open again."""
    if not rows:
        return
    with connection.cursor() as cursor:
        cursor.executemany(
            INSERT,
            [
                (
                    row.digest,
                    str(row.code),
                    printable(row.reason, MAX_REASON),
                    None if row.traceback is None else printable(row.traceback, 10 * MAX_REASON, end=True),
                    printable(row.queue, 255),
                    _optional(row.task),
                    _optional(row.operation),
                    _optional(row.account),
                    _optional(row.content_type),
                    row.headers,
                    row.body,
                )
                for row in rows
            ],
        )


def printable(text: str, limit: int, end: bool = False) -> str:
    """Text that any column and any terminal takes: no NUL, no lone surrogates, at most ``limit`` characters."""
    clean = text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
    return clean[-limit:] if end else clean[:limit]


def _optional(value: object) -> str | None:
    return None if value is None else printable(str(value), 255)
