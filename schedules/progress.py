"""How far a task is: in its state, which Flower shows, and in the log."""

from __future__ import annotations

import time
from logging import Logger
from typing import Any

TOLD_SECONDS = 1.0
"""How often the task's state is brought up to date."""

LOGGED_SECONDS = 30.0
"""How often the log is told."""


class Progress:
    """Tells the task's state and the log how much is done, and of how much.

    :param task: the bound Celery task.
    :param what: what is being done, for the log.
    :param of: what is counted, such as ``operations``.
    """

    def __init__(self, task: Any, logger: Logger, what: str, of: str) -> None:
        self._task = task
        self._logger = logger
        self._what = what
        self._of = of
        self._began = self._logged = time.monotonic()
        self._told = 0.0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def __call__(self, done: int, total: int, **more: Any) -> None:
        """Tell it, if it is time.

        :param total: as far as it is known.
        :param more: what else the state is to have.
        """
        now = time.monotonic()
        rate = round(done / max(now - self._began, 0.001))
        if now - self._told >= TOLD_SECONDS or done >= total:
            self._told = now
            meta = {"done": done, "total": total, "per_second": rate, **more}
            self._task.update_state(state="PROGRESS", meta=meta)
        if now - self._logged >= LOGGED_SECONDS:
            self._logged = now
            self._logger.info("%s: %d of %d %s, %d/s", self._what, done, total, self._of, rate)
