"""What many tests use: waiting for a condition, a real worker process, time travel."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psycopg

from creditlane.contract import decode_message
from models.catalog import load_catalog
from models.rules.catalog import Catalog
from tests.processes import PythonProcess
from workers.ledger_writer import Job, LedgerWriter
from workers.ownership import LANE_CLASS

ROOT = Path(__file__).parent.parent
CATALOG = load_catalog("packs")
POLL_SECONDS = 0.02

Found = TypeVar("Found")


def eventually(condition: Callable[[], Found], seconds: float = 30, what: str = "") -> Found:
    """Wait until a condition is true, and give its value; fail with ``what`` when it takes too long."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(POLL_SECONDS)
    return value


class Worker:
    """A worker in a process of its own."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.process = PythonProcess(["celery", *command], {**os.environ, **environment}, log)

    @property
    def running(self) -> bool:
        """Whether the process still lives."""
        return self.process.poll() is None

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and wait for the end; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def logged(self) -> str:
        """Everything it has logged."""
        return self.log.read_text(errors="replace")


def rows(database: str, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run one query on a connection of its own."""
    with psycopg.connect(database, autocommit=True) as connection:
        return connection.execute(query, parameters).fetchall()


def value(database: str, query: str, *parameters: Any) -> Any:
    """The one value of a query."""
    return rows(database, query, *parameters)[0][0]


def execute(database: str, statement: str) -> None:
    """Run one statement that gives no rows."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement)


def owned_lanes(database: str) -> int:
    """How many lanes have an owner."""
    return int(
        value(
            database,
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            LANE_CLASS,
        )
    )


def travel(database: str, time_ahead: timedelta) -> None:
    """Let the ledger's clock be so far ahead of the real one."""
    seconds = time_ahead.total_seconds()
    execute(
        database,
        "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE"
        f" AS 'SELECT clock_timestamp() + interval ''{seconds} seconds'''",
    )


class Ledger:
    """The ledger writer in this process, for tests that need no broker."""

    def __init__(self, writer: LedgerWriter, catalog: Catalog) -> None:
        self.writer = writer
        self.catalog = catalog

    def job(self, name: str, operation: str, /, **arguments: Any) -> Job:
        """One operation, ready to be written."""
        raw = msgspec.json.encode(arguments)
        return Job(name, operation, decode_message(name, raw), raw)

    def write(self, *jobs: Job) -> list[dict[str, Any]]:
        """Write jobs in one batch; returns their results."""
        self.writer.write(jobs)
        return [msgspec.json.decode(job.result) if job.result else {} for job in jobs]

    def apply(self, name: str, operation: str, /, **arguments: Any) -> dict[str, Any]:
        """Write one operation in a batch of its own."""
        return self.write(self.job(name, operation, **arguments))[0]
