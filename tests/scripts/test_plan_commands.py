"""``creditlane plan`` and ``simulate``, as an operator types them, against a real worker."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.conftest import LANES, Spawn
from tests.scripts.test_command_line import Run, one, run
from tests.support import Worker, eventually, owned_lanes, travel

__all__ = ["run"]


@pytest.fixture
def rollover_worker(spawn: Spawn, database: str, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A lane worker that renews by the catalog ``rollover``, which the commands know of as well."""
    monkeypatch.setenv("CREDITLANE_CATALOG", "rollover")
    worker = spawn("worker", CREDITLANE_CATALOG="rollover")
    eventually(lambda: owned_lanes(database) == LANES)
    return worker


def test_the_life_of_a_plan(run: Run, database: str, rollover_worker: Worker) -> None:
    run("account", "open", "alice")
    assert "has no plan" in run("plan", "show", "alice").stdout
    assert run("plan", "show", "alice", "--json").stdout == "null\n"
    begun = one(run("plan", "subscribe", "alice", "starter", "--payment", "in_1", "--json"))
    assert (begun["operation"], begun["plan"], begun["allotted"]) == ("plans.subscribe", "starter", "100")
    refused = run("plan", "subscribe", "alice", "pro", code=3)
    assert "already_subscribed" in refused.stderr
    assert "unknown_plan" in run("plan", "change", "alice", "gold", code=3).stderr
    run("consume", "alice", "generation", "30")
    shown = run("plan", "show", "alice").stdout
    assert "70 left" in shown
    assert "renews when it is paid for" in shown
    ahead = run("simulate", "alice", "--until", "2100-01-01", code=2)
    assert "3660 days ahead" in ahead.stderr
    end = begun["period_end"]
    renewed = one(run("plan", "renew", "alice", "--period-start", end, "--payment", "in_2", "--json"))
    assert renewed["status"] == "applied"
    assert "already_renewed" in run("plan", "renew", "alice", "--period-start", end, code=3).stderr
    travel(database, timedelta(days=32))
    run("settle", "alice")
    assert "70 carried" in run("plan", "show", "alice").stdout
    undone = run("plan", "undo", "alice", "--reason", "renewed by mistake")
    assert "applied" in undone.stdout
    assert "undone" in run("plan", "show", "alice").stdout
    assert one(run("plan", "change", "alice", "pro", "--json"))["allotted"] == "400"
    assert one(run("plan", "change", "alice", "starter", "--json"))["plan_next"] == "starter"
    assert one(run("plan", "cancel", "alice", "--json"))["plan_status"] == "cancelled"
    assert one(run("plan", "cancel", "alice", "--now", "--json"))["plan_status"] == "ended"
    assert "no_subscription" in run("plan", "undo", "alice", "--reason", "x", code=3).stderr


def test_a_balance_run_ahead(run: Run, rollover_worker: Worker) -> None:
    assert "no operation ever named" in run("simulate", "alice", "--until", "2030-01-01", code=3).stderr
    run("account", "open", "alice")
    begun = one(run("plan", "subscribe", "alice", "starter", "--payment", "in_1", "--json"))
    end = begun["period_end"]
    ahead = one(run("simulate", "alice", "--until", end, "--pace", "5", "--json"))
    assert ahead["steps"][0]["what"] == "today"
    assert {"spent", "allotted"} <= {step["what"] for step in ahead["steps"]}
    shown = run("simulate", "alice", "--until", end, "--pace", "5").stdout
    assert "█" in shown
    assert "5 credits a day" in shown
    assert "a pace is 0 or more" in run("simulate", "alice", "--until", end, "--pace", "-1", code=2).stderr
    assert "the end lies behind" in run("simulate", "alice", "--until", "2020-01-01", code=2).stderr
