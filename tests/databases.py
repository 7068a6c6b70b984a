"""Migrated databases for tests: a copy is made once and handed on, emptied, from test to test.

To copy and to drop a database costs far more than most tests do in it. One that is handed on is as new: the same
schema, no rows, sequences at their start, nobody connected, and a name that nobody has known before. Whatever
cannot be put back so is dropped, and the next test gets a copy.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import Connection, sql

from scripts.embedded import Postgres

MAX_ROWS = 5_000
"""Rows that are deleted from a database in all, after which its tables and indexes are no more like new ones."""

IN_TURN = 2
"""Databases that wait before one is handed on: the server has let go of whoever was connected to it by then."""

STOP_MS = 10_000
"""How long a session may take to end."""

_numbers = itertools.count(1)

CLOCK = "SELECT pg_get_functiondef('ledger_now()'::regprocedure)"

# A row of a catalog is written anew, by another transaction, whenever what it describes is altered. That of a table is
# so when it is truncated too; hence its properties. Statistics that were gathered would change plans.
_WATCHED = ("attrdef", "attribute", "constraint", "default_acl", "index", "policy", "publication", "rewrite",
            "trigger", "type")  # fmt: skip
_ROWS = " UNION ALL ".join(
    f"SELECT '{name}', count(*)::text, max(xmin::text::bigint)::text FROM pg_{name}" for name in _WATCHED
)
SCHEMA = rf"""
{_ROWS}
UNION ALL SELECT 'proc', count(*)::text, max(xmin::text::bigint)::text FROM pg_proc WHERE proname <> 'ledger_now'
UNION ALL SELECT 'namespace', string_agg((nspname, nspowner, nspacl)::text, ' ' ORDER BY nspname), '' FROM pg_namespace
    WHERE nspname NOT LIKE 'pg\_%'
UNION ALL SELECT 'class', count(*)::text, string_agg((relname, relkind, relowner, relacl, reloptions, relpersistence,
        relrowsecurity, relforcerowsecurity, relreplident)::text, ' ' ORDER BY relnamespace, relname) FROM pg_class
    WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT 'database', datacl::text, (SELECT string_agg(setconfig::text, ' ') FROM pg_db_role_setting
        WHERE setdatabase = d.oid) FROM pg_database d WHERE datname = current_database()
UNION ALL SELECT 'statistic', count(*)::text, '' FROM pg_statistic JOIN pg_class c ON c.oid = starelid
    WHERE c.relnamespace = 'public'::regnamespace
UNION ALL SELECT 'version', string_agg(version_num, ' '), '' FROM alembic_version
"""

TABLES = """
SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
AND relname <> 'alembic_version' ORDER BY relname
"""
OTHERS = """
SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
RESTART = "SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"


class Databases:
    """The databases of one server.

    :param server: a running one.
    :param template: a migrated database without rows to copy; nobody may be connected to it.
    """

    def __init__(self, server: Postgres, template: str) -> None:
        self._server = server
        self._template = template
        self._free: deque[tuple[str, int]] = deque()
        self._deleted: dict[str, int] = {}
        with psycopg.connect(server.url_of(template), autocommit=True) as connection:
            self._clock = _value(connection, CLOCK)
            self._schema = _schema(connection)
            tables = [name for (name,) in connection.execute(TABLES)]
        deleting = ", ".join(f"{name} AS (DELETE FROM public.{name} RETURNING 1)" for name in tables)
        self._delete = f"WITH {deleting} SELECT {' + '.join(f'(SELECT count(*) FROM {name})' for name in tables)}"

    def take(self, *, unused: bool = False) -> str:
        """Give a fresh, migrated database.

        :param unused: whether it must be a copy, for what looks at the sizes of files.
        :returns: its URL.
        """
        name = f"ledger_{next(_numbers)}"
        if unused or len(self._free) < IN_TURN:
            self._deleted[name] = 0
            return self._server.create_database(name, template=self._template)
        before, self._deleted[name] = self._free.popleft()
        with psycopg.connect(self._server.url_of("postgres"), autocommit=True) as connection:
            renaming = sql.SQL("ALTER DATABASE {} RENAME TO {}")
            connection.execute(renaming.format(sql.Identifier(before), sql.Identifier(name)))
        return self._server.url_of(name)

    def give_back(self, url: str) -> None:
        """Let others have a database; everybody's connection to it ends."""
        name = urlsplit(url).path[1:]
        deleted = self._deleted.pop(name)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                deleted += self._empty(connection)
                as_new = deleted < MAX_ROWS and _schema(connection) == self._schema
        except psycopg.Error:
            as_new = False
        if as_new:
            self._free.append((name, deleted))
        else:
            self._server.drop_database(name)

    def _empty(self, connection: Connection[Any]) -> int:
        connection.execute(OTHERS, (STOP_MS,))
        if _value(connection, CLOCK) != self._clock:
            connection.execute(self._clock)
        # What is append-only refuses a deletion otherwise, and so do references.
        connection.execute("SET session_replication_role = replica")
        deleted: int = _value(connection, self._delete)
        connection.execute(RESTART)
        return deleted


def _value(connection: Connection[Any], query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def _schema(connection: Connection[Any]) -> set[tuple[Any, ...]]:
    return set(connection.execute(SCHEMA))
