"""Beat's schedule: what it ticks exists, and somebody takes it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import ROOT

LOOK = """
import json
from schedules.app import app
app.loader.import_default_modules()
app.finalize()
print(json.dumps({
    "schedule": {name: [entry["task"], repr(entry["schedule"])] for name, entry in app.conf.beat_schedule.items()},
    "tasks": sorted(app.tasks),
    "queues": {entry["task"]: app.amqp.router.route({}, entry["task"])["queue"].name
               for entry in app.conf.beat_schedule.values()},
    "intervals": {name: app.conf.beat_schedule[name].get("options", {}) for name in app.conf.beat_schedule},
}))
"""


@pytest.fixture(scope="module")
def beat() -> dict[str, Any]:
    """What beat's app says of itself, in a process of its own."""
    command = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=ROOT,
        env={
            "CREDITLANE_BROKER_URL": "redis://127.0.0.1:1/0",
            "CREDITLANE_DATABASE_URL": "postgresql://127.0.0.1:1/none",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told: dict[str, Any] = json.loads(command.stdout)
    return told


def test_every_scheduled_task_exists(beat: dict[str, Any]) -> None:
    assert beat["schedule"]
    assert {task for task, _ in beat["schedule"].values()} <= set(beat["tasks"])


def test_the_sweep_and_the_audit_are_scheduled(beat: dict[str, Any]) -> None:
    assert {"schedules.expiry", "schedules.audit"} <= {task for task, _ in beat["schedule"].values()}


def test_scheduled_tasks_go_to_a_queue_that_a_general_worker_takes(beat: dict[str, Any]) -> None:
    assert set(beat["queues"].values()) == {"maintenance", "payments"}


def test_a_tick_of_the_sweep_that_nobody_took_is_dropped_before_the_next(beat: dict[str, Any]) -> None:
    assert beat["schedule"]["allocation, rollover and expiry"][1] == "60.0"
    assert beat["intervals"]["allocation, rollover and expiry"]["expires"] <= 60


def test_the_outbox_is_swept_every_ten_seconds(beat: dict[str, Any]) -> None:
    assert beat["schedule"]["outbox"] == ["schedules.outbox", "10.0"]
    assert beat["intervals"]["outbox"]["expires"] <= 10
