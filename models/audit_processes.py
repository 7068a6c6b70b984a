"""More than one process for one audit: each with a connection of its own, all on one snapshot."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import Connection
from psycopg.conninfo import make_conninfo

from models.audit_page import Page, PageAudit, begin_reading
from models.report import Report


class HelperError(RuntimeError):
    """A helper's process ended, or could not go on; the text says why."""


class Helpers:
    """Processes that audit pages.

    :param connection: in a ``REPEATABLE READ`` transaction, which stays open until the helpers are done.
    """

    def __init__(self, connection: Connection[Any], work: PageAudit, processes: int) -> None:
        row = connection.execute("SELECT pg_export_snapshot()").fetchone()
        assert row is not None
        parameters = {**connection.info.get_parameters(), "password": connection.info.password or None}
        where = make_conninfo(**{name: value for name, value in parameters.items() if value is not None})
        self._report = Report()
        self._idle: list[Pipe] = []
        self._pipes: list[Pipe] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_help, args=(theirs, where, row[0], work), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._idle.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(None if kind is None else 0)
            if process.is_alive():
                process.terminate()
                process.join()

    def give(self, page: Page, tick: Callable[[int], None]) -> None:
        """Hand a page to the next helper that is free; waits until there is one.

        :raises HelperError: when one ended.
        """
        while not self._idle:
            self._listen(tick)
        self._idle.pop().send(page)

    def finish(self, tick: Callable[[int], None]) -> Report:
        """Wait for all; gives what they found.

        :raises HelperError: when one ended.
        """
        while len(self._idle) < len(self._pipes):
            self._listen(tick)
        return self._report

    def _listen(self, tick: Callable[[int], None]) -> None:
        for ready in wait([pipe for pipe in self._pipes if pipe not in self._idle]):
            assert isinstance(ready, Pipe)
            try:
                told = ready.recv()
            except (EOFError, OSError):
                raise HelperError("a process of the audit ended before its work was done") from None
            if isinstance(told, int):
                tick(told)
            elif isinstance(told, Report):
                self._report.take(told)
                self._idle.append(ready)
            else:
                raise HelperError(f"a process of the audit could not go on: {told}")


def _help(pipe: Pipe, where: str, snapshot: str, work: PageAudit) -> None:
    """What a helper does: pages until there are no more, or until who asked is gone."""
    try:
        with psycopg.connect(where, autocommit=True) as connection, connection.transaction():
            begin_reading(connection, snapshot)
            while True:
                page = pipe.recv()
                pipe.send(work.run(connection, page, pipe.send))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
