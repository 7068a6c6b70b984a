"""Database sessions of schedules: whoever is gone without a word holds no lock for long."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import Connection

SILENT_SECONDS = 120
"""How long a session may be silent before the server ends it, and frees its locks: its process may hang, or its machine
be gone. Between two statements a sweep publishes a page, and may have to wait for the broker."""


def connect(
    database_url: str, application: str, silent_seconds: int = SILENT_SECONDS, options: str = ""
) -> Connection[Any]:
    """Open a connection, in autocommit mode; whichever end goes silent, the other notices.

    :param application: what ``pg_stat_activity`` calls it.
    :param options: further settings of the session, such as ``-c statement_timeout=10s``.
    :raises psycopg.OperationalError: when the database is away.
    """
    silent_ms = 1000 * silent_seconds
    connection: Connection[Any] = psycopg.connect(
        database_url,
        autocommit=True,
        application_name=application,
        connect_timeout=5,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=silent_ms,
        options=f"-c timezone=UTC -c idle_session_timeout={silent_ms}"
        f" -c idle_in_transaction_session_timeout={silent_ms}"
        " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3"
        f" -c tcp_user_timeout={silent_ms} {options}",
    )
    return connection
