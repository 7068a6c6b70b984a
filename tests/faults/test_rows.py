"""Rows 2, 3, 7, 8, 9, 11, 12, 14 and 15 of the table, small and with a fixed seed; all rows: ``scripts/faults``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.embedded import Stack, temporary_directory
from tests.brokers import need_rabbitmq
from tests.conftest import TEMPLATE
from tests.faults.__main__ import Report
from tests.faults.acts import SMALL, Act
from tests.faults.rows import FAIL, PASS, ROWS, UNKNOWN, Outcome, Stage, play
from tests.faults.stack import ROOT, Node, RabbitBroker, RedisBroker

SEED = "1"
IN_THE_SUITE = (2, 3, 7, 8, 9, 11, 12, 14, 15)

ACTS = [
    pytest.param(number, act, id=f"row {number}: {act.name}") for number in IN_THE_SUITE for act in ROWS[number].acts
]

ON_RABBITMQ = [
    pytest.param(number, ROWS[number].acts[place], id=f"row {number}: {ROWS[number].acts[place].name}")
    for number, place in ((2, 1), (9, 1))
]
"""Where the brokers differ most."""


@pytest.mark.parametrize(("number", "act"), ACTS)
def test_row(number: int, act: Act, stack: Stack, tmp_path: Path) -> None:
    stage = Stage(stack.postgres, TEMPLATE, RedisBroker(stack.redis), tmp_path)
    outcome = play(act, number, stage, SMALL, SEED)
    assert outcome.verdict == PASS, outcome.faults


@pytest.fixture(scope="module")
def rabbit(stack: Stack) -> Iterator[RabbitBroker]:
    """A RabbitMQ that counts often what is in its queues."""
    need_rabbitmq()
    with temporary_directory() as directory:
        node = Node(directory / "rabbitmq").start()
        yield RabbitBroker(node, stack.redis)
        node.stop()


@pytest.mark.xdist_group("faults on rabbitmq")  # one node for all of them
@pytest.mark.parametrize(("number", "act"), ON_RABBITMQ)
def test_row_on_rabbitmq(number: int, act: Act, rabbit: RabbitBroker, stack: Stack, tmp_path: Path) -> None:
    outcome = play(act, number, Stage(stack.postgres, TEMPLATE, rabbit, tmp_path), SMALL, SEED)
    assert outcome.verdict == PASS, outcome.faults


def test_every_row_of_the_table_is_there() -> None:
    assert list(ROWS) == list(range(1, 18))
    assert all(row.acts for row in ROWS.values())


def test_only_passes_pass() -> None:
    report = Report("seed")
    assert not report.passed
    report.add(ROWS[1], "redis", Outcome(PASS, hits=2, operations=10, replayed=1))
    assert report.passed
    report.add(ROWS[1], "rabbitmq", Outcome(UNKNOWN, hits=1, faults=["missed"]))
    assert not report.passed
    row = report.json()["rows"]["1"]
    assert {name: row[name] for name in ("verdict", "hits", "operations", "replayed")} == {
        "verdict": UNKNOWN, "hits": 3, "operations": 10, "replayed": 1,
    }  # fmt: skip
    report.add(ROWS[1], "redis", Outcome(FAIL))
    assert report.json()["rows"]["1"]["verdict"] == FAIL
    assert report.table().row_count == 2


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_command_lists_its_rows_and_refuses_others() -> None:
    listed = command("--list")
    assert listed.returncode == 0
    assert all(row.title in listed.stdout for row in ROWS.values())
    assert command("--row", "18").returncode == 2
    assert command("--help").returncode == 0


def test_the_command_runs_a_row_and_says_what_became_of_it(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    done = command("--quick", "--row", "4", "--seed", "7", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--seed 7" in done.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["seed"] == "7"
    assert found["rows"]["4"]["verdict"] == PASS
    assert found["rows"]["4"]["hits"] == 2
