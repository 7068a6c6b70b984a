"""Beat's scheduler: ticks only while it holds a lock in Postgres, so that of several beats one ticks.

The lock is a session's advisory lock on a connection of beat's own: who dies or loses the connection has lost the lock,
and a beat that stands by takes over within seconds. It does so for every broker alike. When each schedule was last sent
stands in the table ``schedules``: a beat that takes over, or comes back after a day, goes on from there, and sends once
what fell due meanwhile. A tick may still come twice, or late: what is due is a fact in the database, not here.

``python -m schedules.beat`` says whether a beat ticks, for a health check.
"""

from __future__ import annotations

import sys
from typing import Any

import psycopg
from celery import beat
from celery.utils.log import get_logger
from psycopg import Connection

from models.cutoff import somebody_does, try_alone
from models.due import BEAT
from models.settings import settings

logger = get_logger(__name__)

STANDBY_SECONDS = 2.0
"""How often a beat that stands by looks whether the lock is free, and one without a database whether it is back."""

LONGEST_SECONDS = 5.0
"""How long beat sleeps at the most: as often it proves that it has the lock still."""

SILENT_SECONDS = 30
"""How long a beat may be silent before the server ends its session, and frees the lock with it: it may hang, or its
machine be gone without a word."""

LAST_TICKS = "SELECT name, least(last_tick_at, %s) FROM schedules"
NOTE_TICK = """
INSERT INTO schedules (name, task, last_tick_at) VALUES (%s, %s, %s)
ON CONFLICT (name) DO UPDATE SET task = excluded.task, last_tick_at = excluded.last_tick_at
"""


class Scheduler(beat.Scheduler):
    """Celery's scheduler in memory, with a lock and a memory in Postgres."""

    max_interval = LONGEST_SECONDS
    _connection: Connection[Any] | None = None
    _ticks = False
    _told = ""

    def tick(self, *arguments: Any, **options: Any) -> float:
        """Send what is due, if this is the beat that ticks.

        :returns: seconds until it should be called again.
        """
        try:
            self._ticks = self._has_lock()
        except psycopg.Error as error:
            self._lose(error)
        if not self._ticks:
            return STANDBY_SECONDS
        wait: float = super().tick(*arguments, **options)
        return wait

    def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **options: Any) -> Any:
        """Send a task, and note when."""
        result = super().apply_async(entry, producer=producer, advance=advance, **options)
        try:
            if self._connection is not None:
                last_run_at = self.schedule[entry.name].last_run_at
                self._connection.execute(NOTE_TICK, (entry.name, entry.task, last_run_at))
        except psycopg.Error as error:
            self._lose(error)
        return result

    def close(self) -> None:
        """Give up the lock: who stands by takes over."""
        super().close()
        if self._connection is not None:
            self._connection.close()

    def _has_lock(self) -> bool:
        if self._connection is None:
            self._connection = connect(settings().database_url.get_secret_value())
        if self._ticks:
            self._connection.execute("SELECT")  # the lock is there as long as the session is
            return True
        if not try_alone(self._connection, BEAT):
            self._tell("another beat ticks; this one stands by")
            return False
        last = dict(self._connection.execute(LAST_TICKS, (self.app.now(),)).fetchall())
        for name, entry in self.schedule.items():
            entry.last_run_at = last.get(name, entry.last_run_at)
        self._heap = None  # it is made anew of them
        self._tell("has the lock, and ticks")
        return True

    def _lose(self, error: psycopg.Error) -> None:
        """Stop ticking until the lock is had again."""
        self._ticks = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._tell(f"nothing is sent without the database ({type(error).__name__})")

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            logger.warning("beat: %s", what)


def connect(database_url: str) -> Connection[Any]:
    """The connection that holds the lock: whichever end goes silent, the other notices within seconds.

    :raises psycopg.OperationalError: when the database is away.
    """
    silent_ms = SILENT_SECONDS * 1000
    connection: Connection[Any] = psycopg.connect(
        database_url,
        autocommit=True,
        application_name="creditlane beat",
        connect_timeout=5,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=silent_ms,
        options=f"-c timezone=UTC -c idle_session_timeout={silent_ms} -c statement_timeout=10s"
        " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3"
        f" -c tcp_user_timeout={silent_ms}",
    )
    return connection


def main() -> int:
    """Say whether a beat ticks.

    :returns: the exit code, 0 if one does.
    """
    with connect(settings().database_url.get_secret_value()) as connection:
        ticks = somebody_does(connection, BEAT)
    sys.stdout.write("a beat ticks\n" if ticks else "no beat ticks\n")
    return 0 if ticks else 1


if __name__ == "__main__":
    sys.exit(main())
