"""Every process of a deployment, each started by the command that docker-compose.yml has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import LANES
from tests.support import Worker

QUIET = "--without-gossip --without-mingle"
COMMANDS = {
    "lanes": f"-A workers.lane_app worker --pool=solo {QUIET} -n lanes@%h",
    "general": "-A workers.app worker --pool=threads --concurrency=2 -Q queries,notices,payments,maintenance"
    f" {QUIET} -n general@%h",
    "beat": "-A schedules.app beat --pidfile=",
    "flower": "-A workers.app flower",
}

Run = Callable[..., Worker]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start one of :data:`COMMANDS` at a broker and a database; killed when the test is done."""
    started: list[Worker] = []

    def start(kind: str, broker_url: str, database_url: str, *options: str, **environment: str) -> Worker:
        settings = {
            "CREDITLANE_BROKER_URL": broker_url,
            "CREDITLANE_DATABASE_URL": database_url,
            "CREDITLANE_LANES": str(LANES),
            "CREDITLANE_BALANCE_SECONDS": "0.5",
            **environment,
        }
        log = tmp_path / f"{kind}{len(started)}.log"
        process = Worker(kind, [*COMMANDS[kind].split(), *options], settings, log)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.running:
            process.kill()
