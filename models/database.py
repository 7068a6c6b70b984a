"""Connections for reading: one at a time, or out of a small pool of the process.

Sessions are read only by the database's own setting, so that a mistake in a query cannot change the ledger.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import Connection
from psycopg_pool import ConnectionPool

from models.settings import settings

POOL_SIZE = 4
"""Connections that one process opens at the most for queries."""

WAIT_SECONDS = 3.0
"""How long a query waits for a connection before it fails."""

STATEMENT_SECONDS = 30
"""How long one query may take before the database ends it."""


def parameters(application: str, *, read_only: bool = True) -> dict[str, Any]:
    """What every reading connection is opened with.

    :param application: what ``pg_stat_activity`` calls it.
    :param read_only: False for the few commands that note what was done with a quarantined message.
    """
    options = f"-c timezone=UTC -c default_transaction_read_only={'on' if read_only else 'off'}"
    return {
        "autocommit": True,
        "application_name": application,
        "connect_timeout": 5,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "options": options,
    }


def connect(database_url: str, application: str, *, read_only: bool = True) -> Connection[Any]:
    """Open one connection, in autocommit mode.

    :raises psycopg.OperationalError: when the database is away.
    """
    connection: Connection[Any] = psycopg.connect(database_url, **parameters(application, read_only=read_only))
    return connection


_guard = threading.Lock()
_pool: ConnectionPool[Connection[Any]] | None = None
_inherited: list[ConnectionPool[Connection[Any]]] = []


def reading_pool() -> ConnectionPool[Connection[Any]]:
    """The pool of this process, opened at its first use; a forked child gets one of its own."""
    global _pool
    with _guard:
        if _pool is None:
            options = parameters("creditlane queries")
            options["options"] += f" -c statement_timeout={STATEMENT_SECONDS}s"
            _pool = ConnectionPool(
                settings().database_url.get_secret_value(),
                kwargs=options,
                min_size=0,
                max_size=POOL_SIZE,
                timeout=WAIT_SECONDS,
                max_idle=60.0,
                reconnect_timeout=30.0,
                check=ConnectionPool.check_connection,  # one that a restart of the database left behind
                name="creditlane queries",
                open=True,
            )
        return _pool


@contextmanager
def reader() -> Iterator[Connection[Any]]:
    """Lend a read-only connection of the process's pool.

    :raises psycopg.OperationalError: when none could be had in :data:`WAIT_SECONDS`.
    """
    with reading_pool().connection() as connection:
        yield connection


def close_pool() -> None:
    """Close the pool of this process; the next use opens another."""
    global _pool
    with _guard:
        pool, _pool = _pool, None
    if pool is not None:
        pool.close()


def _forget_pool() -> None:
    # In a forked child: the sockets are the parent's. Closing them, or letting them be collected, would end
    # the parent's sessions; the pool's threads and locks are not there. So it is kept and never touched.
    global _pool, _guard
    _guard = threading.Lock()
    if _pool is not None:
        _inherited.append(_pool)
        _pool = None


os.register_at_fork(after_in_child=_forget_pool)
atexit.register(close_pool)
