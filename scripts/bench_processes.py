"""The processes of a measurement: started, held still, ended, and what they cost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from scripts.bench_figures import BenchError
from scripts.embedded import _end_with_parent, last_lines, open_log, spawn
from scripts.run_stack import ROOT

STOP_SECONDS = 15.0
"""How long workers have to end."""

SCRAPE_SECONDS = 10.0
"""How long a worker has to tell its metrics."""

PREPARED_SECONDS = 600.0
"""How long a loader may prepare what it does."""

STAGE_SECONDS = "creditlane_stage_seconds_total"
"""The lane workers' counter of seconds by stage."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Workers:
    """Celery workers that can be held still, so that what waits in a queue waits for a common start."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        # What a killed worker leaves behind (its pool's shared memory) goes with the logs.
        left = logs / "tmp"
        left.mkdir(exist_ok=True)
        self._environment = {**environment, "TMPDIR": str(left)}
        self._all: list[tuple[str, Popen[bytes], Path]] = []
        self._ports: list[int] = []

    def start(self, name: str, arguments: Sequence[str], metrics_port: int | None = None) -> None:
        """Start a worker, with its output in a log of its own.

        :param metrics_port: where it serves its metrics, if it is a lane worker.
        """
        log = self._logs / f"{name}.log"
        quiet = ("--without-gossip", "--without-mingle", "--loglevel", "WARNING")
        environment = dict(self._environment)
        if metrics_port is not None:
            environment["CREDITLANE_METRICS_PORT"] = str(metrics_port)
            self._ports.append(metrics_port)
        with open_log(log) as stream:
            process = spawn(
                [sys.executable, "-m", "celery", *arguments, *quiet, "-n", f"{name}@%h"],
                log=stream,
                # A worker that is held still would not hear a milder one.
                death_signal=signal.SIGKILL,
                environment=environment,
                directory=ROOT,
            )
        self._all.append((name, process, log))

    def check(self) -> None:
        """Make sure that all still run.

        :raises BenchError: naming the one that does not, with the end of its log.
        """
        for name, process, log in self._all:
            if process.poll() is not None:
                raise BenchError(
                    f"The worker {name} ended with code {process.returncode}; the end of its log:\n{last_lines(log)}"
                )

    @property
    def logged(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"{name}:\n{last_lines(log, 30)}" for name, _, log in self._all)

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for _, process, _ in self._all]

    def stage_seconds(self) -> dict[str, float]:
        """The seconds that lane workers have spent in each stage since their start, added up; empty for others.

        :raises BenchError: when one does not tell.
        """
        found: dict[str, float] = {}
        for port in self._ports:
            try:
                with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SCRAPE_SECONDS) as answer:
                    text = answer.read().decode()
            except (OSError, HTTPException) as error:
                raise BenchError(f"A lane worker does not tell its metrics: {error}.") from None
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == STAGE_SECONDS:
                        stage = sample.labels["stage"]
                        found[stage] = found.get(stage, 0.0) + sample.value
        return found

    def hold(self) -> None:
        """Hold them still."""
        self._signal(signal.SIGSTOP)

    def release(self) -> float:
        """Let them go on.

        :returns: when that was, in seconds of the system's clock.
        """
        started = time.time()
        self._signal(signal.SIGCONT)
        return started

    def _signal(self, number: signal.Signals) -> None:
        for _, process, _ in self._all:
            if process.poll() is None:
                process.send_signal(number)

    def stop(self) -> None:
        """End all; one that does not end in time is killed."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for _, process, _ in self._all:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutExpired:
                process.kill()
                process.wait()
        self._all.clear()
        self._ports.clear()


class Loaders:
    """Processes of :mod:`scripts.bench_loader` that begin together, when all of them are prepared.

    Use it as a context manager: what still runs at its end is killed.

    :param logs: where they write what goes wrong.
    :param orders: what each of them does, as :mod:`scripts.bench_loader` reads it.
    """

    def __init__(self, logs: Path, orders: Sequence[Mapping[str, Any]]) -> None:
        self._log = logs / "loaders.log"
        self._all: list[Popen[str]] = []
        with open_log(self._log) as stream:
            for order in orders:
                process = Popen(
                    [sys.executable, "-m", "scripts.bench_loader"],
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=stream,
                    text=True,
                    cwd=ROOT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent(signal.SIGKILL),
                )
                self._all.append(process)
                self._tell(process, json.dumps(order))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._all]

    def begin(self) -> float:
        """Wait until all are prepared, then let them begin.

        :returns: when that was, in seconds of the system's clock.
        :raises BenchError: when one fails.
        """
        for process in self._all:
            self._read(process)
        started = time.time()
        for process in self._all:
            self._tell(process, "")
        return started

    def end(self, *, ask: bool = False) -> list[dict[str, Any]]:
        """Wait until all are done.

        :param ask: have those end that go on until they are asked to.
        :returns: what each of them has to tell.
        :raises BenchError: when one fails.
        """
        if ask:
            for process in self._all:
                self._tell(process, "")
        return [self._read(process) for process in self._all]

    def _tell(self, process: Popen[str], line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the next read says so

    def _read(self, process: Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            raise BenchError(f"A loader ended with code {code}; the end of its log:\n{last_lines(self._log)}")
        told: dict[str, Any] = json.loads(line)
        return told


# --- What processes cost -----------------------------------------------------------------------------


def cpu_seconds(pids: Sequence[int]) -> float:
    """The CPU time that processes and all their descendants have used, those that have ended included.

    :param pids: of processes none of which descends from another.
    """
    used, parents = _processes()
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found = 0
    left = list(pids)
    while left:
        pid = left.pop()
        found += used.get(pid, 0)
        left += children.get(pid, ())
    return found / _TICKS_PER_SECOND


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """The ticks that each process and its children that were waited for have used, and each one's parent."""
    used, parents = {}, {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/stat", encoding="utf-8", errors="replace") as stream:
                # The name may hold anything, spaces and brackets too; what follows it does not.
                columns = stream.read().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        used[int(entry.name)] = sum(map(int, columns[11:15]))
        parents[int(entry.name)] = int(columns[1])
    return used, parents


def resident_mib(pid: int) -> float:
    """The memory of a process that is in RAM, in MiB.

    :raises BenchError: when it has ended.
    """
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError as error:
        raise BenchError(f"The memory of process {pid} cannot be read: {error}.") from None
    return pages * _PAGE_BYTES / 2**20
