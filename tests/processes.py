"""Python processes that start fast: forked from one that has imported the libraries, which are most of a start.

Otherwise they are as ``python -m`` starts them: a process of its own with its own environment, ``__main__`` and log.
What looks at a command line or an environment from outside starts the real one.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

LIBRARIES = (
    "celery.apps.beat", "celery.apps.worker", "celery.backends.redis", "celery.backends.rpc", "celery.bin.celery",
    "celery.concurrency.solo", "celery.concurrency.thread", "celery.worker.consumer", "jinja2",
    "kombu.transport.pyamqp", "kombu.transport.redis", "msgspec", "prometheus_client", "psycopg", "psycopg_pool",
    "pydantic_settings", "stripe",
)  # fmt: skip
"""None of ours: what they read of the environment when they are imported must be the child's."""

_PR_SET_PDEATHSIG = 1

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, *LIBRARIES])


class PythonProcess:
    """A Python process with what is used here of :class:`subprocess.Popen`; it ends with us however we end.

    :param command: a module that is run as the main one, and its arguments.
    :param environment: its whole environment.
    :param log: what its output is appended to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._command = list(command)
        log.touch()  # there to be read from now on
        # Celery tells the name in its log.
        self._process = _context.Process(
            target=_run, args=(self._command, dict(environment), str(log)), name="MainProcess", daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As :attr:`returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and give its exit code.

        :param timeout: in seconds.
        :raises subprocess.TimeoutExpired: when it lives on.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], environment: dict[str, str], log: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[:] = command
    code = 1
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # As an interpreter ends; multiprocessing would leave out what was registered to be done then.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
