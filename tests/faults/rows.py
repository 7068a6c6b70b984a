"""The table of faults, and how a row is run: its acts one after the other, each judged by the oracle."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from models.audit import audit
from scripts.embedded import Postgres
from tests.faults import rows_messages, rows_payments, rows_servers, rows_time, rows_trust, rows_workers
from tests.faults.acts import Act, Row, Size
from tests.faults.oracle import Judgement
from tests.faults.stack import Broker, MissedError, Scene

PASS, FAIL, UNKNOWN = "pass", "fail", "unknown"

ROWS: dict[int, Row] = {
    row.number: row
    for row in sorted(
        (
            *rows_workers.ROWS,
            *rows_servers.ROWS,
            *rows_messages.ROWS,
            *rows_trust.ROWS,
            *rows_time.ROWS,
            *rows_payments.ROWS,
        ),
        key=lambda row: row.number,
    )
}
"""Every row of the table, by its number."""


@dataclass
class Outcome:
    """What became of an act, or of all acts of a row."""

    verdict: str
    hits: int = 0
    operations: int = 0
    replayed: int = 0
    seconds: float = 0.0
    what: list[str] = field(default_factory=list)
    """What was done, a line for each act."""
    faults: list[str] = field(default_factory=list)
    """Why it is no pass."""

    def add(self, other: Outcome) -> None:
        """Take another one in: the worse verdict counts."""
        self.verdict = max(self.verdict, other.verdict, key=(PASS, UNKNOWN, FAIL).index)
        self.hits += other.hits
        self.operations += other.operations
        self.replayed += other.replayed
        self.seconds += other.seconds
        self.what += [line for line in other.what if line not in self.what]
        self.faults += other.faults


@dataclass(frozen=True)
class Stage:
    """Where acts are played.

    :param template: the name of a migrated database.
    :param directory: where logs and producers' files go; those of an act that passed are removed by whoever made it.
    """

    postgres: Postgres
    template: str
    broker: Broker
    directory: Path


def play(act: Act, number: int, stage: Stage, size: Size, seed: str) -> Outcome:
    """Play one act, and judge it.

    What an act waits for in vain, and whatever else it cannot do, makes its verdict *unknown*: nothing was shown.
    """
    began = time.monotonic()
    name = f"row_{number}_{''.join(letter if letter.isalnum() else '_' for letter in act.name)}"
    scene: Scene | None = None
    outcome = Outcome(UNKNOWN, what=[f"{act.name}: did not come to its end"])
    try:
        scene = Scene(stage.postgres, stage.template, stage.broker, stage.directory / name, name, f"{seed} {name}")
        done = act.run(scene, size)
        scene.finish()
        judgement = scene.judge(order=act.order, all_answered=act.answered)
        outcome = Outcome(
            PASS,
            hits=done.hits,
            operations=judgement.operations,
            replayed=judgement.replayed,
            what=[f"{act.name}: {done.what}"],
            faults=faults_of(scene, judgement, done.wrong),
        )
        if outcome.faults:
            outcome.verdict = FAIL
        elif done.hits < done.wanted:
            outcome.verdict = UNKNOWN
            outcome.faults.append(f"O6: the fault hit {done.hits} times, {done.wanted} were wanted")
        elif act.replays and not judgement.replayed:
            outcome.verdict = UNKNOWN
            outcome.faults.append("O6: nothing was delivered again after it was committed")
    except MissedError as error:
        outcome.faults.append(str(error))
    except Exception as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
        if scene is not None:
            (scene.directory / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    finally:
        if scene is not None:
            scene.close()
    outcome.faults = [f"{act.name}: {fault}" for fault in outcome.faults]
    outcome.seconds = time.monotonic() - began
    return outcome


def faults_of(scene: Scene, judgement: Judgement, wrong: Sequence[str]) -> list[str]:
    """Everything that must not be: what the act saw, what the oracle found, what the product's own audit says."""
    faults = [*wrong, *judgement.faults]
    if judgement.fault_count > len(judgement.faults):
        faults.append(f"and {judgement.fault_count - len(judgement.faults)} more")
    with psycopg.connect(scene.database, autocommit=True) as connection:
        report = audit(connection)
    if not report.holds:
        faults.append(f"the audit found {report.fault_count} faults, the first: {report.faults[0]}")
    return faults


def run_row(
    row: Row, stage: Stage, size: Size, seed: str, announce: Callable[[str], None] = lambda _: None
) -> Outcome | None:
    """Run all acts of a row that its broker can play.

    :param announce: called with each act's name before it is played.
    :returns: None when there is none.
    """
    outcome: Outcome | None = None
    for act in row.acts:
        if stage.broker.name not in act.brokers:
            continue
        announce(act.name)
        played = play(act, row.number, stage, size, seed)
        if outcome is None:
            outcome = played
        else:
            outcome.add(played)
    return outcome
