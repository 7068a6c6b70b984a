"""Every fault of the table, shown by one command. Called by ``scripts/faults``.

Everything runs on servers of its own, on free ports in a directory that is removed in the end; of rows that did not
pass, the logs, the producers' files and the tracebacks are kept.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.migrate import upgrade
from scripts.embedded import Postgres, Redis, StackError, temporary_directory
from scripts.rabbitmq import is_installed
from tests.faults.acts import FULL, SMALL, Row, Size
from tests.faults.rows import PASS, ROWS, UNKNOWN, Outcome, Stage, run_row
from tests.faults.stack import ROOT, Broker, Node, RabbitBroker, RedisBroker, quiet_port

TEMPLATE = "migrated"
KEPT = ROOT / ".creditlane" / "faults"
"""Where what is kept of a run goes, unless ``--keep`` says otherwise."""

COLOURS = {PASS: "green", "fail": "red", UNKNOWN: "yellow"}
EXAMPLES = """[bold]Examples[/]
  scripts/faults                                  every row once, on Redis: about a quarter of an hour
  scripts/faults --quick                          the same with the sizes of the test suite: a few minutes
  scripts/faults --broker both --minutes 60       every row at least once on each broker, round robin for an hour
  scripts/faults --row 2 --row 3 --seed 4f1d      two rows, with the randomness of an earlier run
  scripts/faults --json faults.json | tee log     figures for a program, lines for people
"""

# A log has no width: there the table gets what it needs.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True, highlight=False)


class Brokers(StrEnum):
    """What ``--broker`` takes."""

    REDIS = "redis"
    RABBITMQ = "rabbitmq"
    BOTH = "both"


class Report:
    """What became of each row on each broker."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.began = time.monotonic()
        self.rounds: dict[tuple[int, str], int] = {}
        self.outcomes: dict[tuple[int, str], Outcome] = {}

    def add(self, row: Row, broker: str, outcome: Outcome) -> None:
        """Take in what became of a row in one round."""
        key = row.number, broker
        self.rounds[key] = self.rounds.get(key, 0) + 1
        if key in self.outcomes:
            self.outcomes[key].add(outcome)
        else:
            self.outcomes[key] = outcome

    @property
    def passed(self) -> bool:
        """Whether there is an outcome and every one is a pass."""
        return bool(self.outcomes) and all(outcome.verdict == PASS for outcome in self.outcomes.values())

    def table(self) -> Table:
        """The verdicts, for people."""
        table = Table(title=f"faults, seed {self.seed}", title_justify="left", show_lines=True)
        for name in ("#", "fault"):
            table.add_column(name)
        table.add_column("verdict")
        for name in ("hits", "operations", "replayed", "seconds"):
            table.add_column(name, justify="right")
        table.add_column("what was done; why it is no pass", ratio=1)
        for number, row in ROWS.items():
            for (of, broker), outcome in sorted(self.outcomes.items()):
                if of == number:
                    rounds = self.rounds[of, broker]
                    where = broker if rounds == 1 else f"{broker}, {rounds} rounds"
                    lines = [escape(line) for line in outcome.what]
                    lines += [f"[red]{escape(fault)}[/]" for fault in outcome.faults]
                    table.add_row(
                        str(number), f"{row.title}\n[dim]{where}[/]",
                        f"[{COLOURS[outcome.verdict]}]{outcome.verdict}[/]", f"{outcome.hits:,}",
                        f"{outcome.operations:,}", f"{outcome.replayed:,}", f"{outcome.seconds:.0f}", "\n".join(lines),
                    )  # fmt: skip
        return table

    def json(self) -> dict[str, Any]:
        """The verdicts, for programs; a row's own figures are those of all its brokers and rounds."""
        rows: dict[str, Any] = {}
        for (number, broker), outcome in sorted(self.outcomes.items()):
            figures = {
                "verdict": outcome.verdict,
                "hits": outcome.hits,
                "operations": outcome.operations,
                "replayed": outcome.replayed,
                "seconds": round(outcome.seconds, 1),
                "rounds": self.rounds[number, broker],
                "what": outcome.what,
                "faults": outcome.faults,
            }
            rows.setdefault(str(number), {})[broker] = figures
        return {
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": {number: _together(by_broker) for number, by_broker in rows.items()},
        }


def _together(by_broker: dict[str, Any]) -> dict[str, Any]:
    worst = [
        verdict for verdict in ("fail", UNKNOWN, PASS) if any(each["verdict"] == verdict for each in by_broker.values())
    ]
    sums = {name: sum(each[name] for each in by_broker.values()) for name in ("hits", "operations", "replayed")}
    return {"verdict": worst[0], **sums, "brokers": by_broker}


# --- The servers -------------------------------------------------------------------------------------


@contextmanager
def servers(directory: Path, wanted: Brokers) -> Iterator[tuple[Postgres, list[Broker]]]:
    """Postgres and the brokers, for as long as the run takes.

    :raises StackError: with a sentence that says what to do.
    """
    postgres = Postgres(directory / "postgres", quiet_port())
    redis = Redis(directory / "redis", quiet_port())
    started: list[Any] = [postgres, redis]
    brokers: list[Broker] = []
    try:
        postgres.start()
        upgrade(postgres.create_database(TEMPLATE))
        redis.start()
        if wanted != Brokers.RABBITMQ:
            brokers.append(RedisBroker(redis))
        if wanted != Brokers.REDIS:
            node = Node(directory / "rabbitmq", quiet_port())
            started.append(node)
            node.start()
            brokers.append(RabbitBroker(node, redis))
        yield postgres, brokers
    finally:
        for server in reversed(started):
            server.stop()


def mend(postgres: Postgres, broker: Broker) -> None:
    """Have the servers as they were, whatever the last row left them in."""
    postgres.start()
    broker.start()
    broker.mend()


def keep(directory: Path, target: Path) -> None:
    """Keep logs and files of a row that did not pass."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(directory, target, dirs_exist_ok=True)


# --- The command -------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


interrupted = threading.Event()
"""Set once somebody has asked for the end."""


def interrupt(*_: object) -> NoReturn:
    """End in good order; noted as well, since a library that is interrupted may keep it to itself."""
    interrupted.set()
    raise KeyboardInterrupt


def show_rows() -> None:
    """List the rows and their acts."""
    for number, row in ROWS.items():
        console.print(f"{number:>3}  {row.title}")
        for act in row.acts:
            only = "" if len(act.brokers) > 1 else f" [dim]({act.brokers[0]} only)[/]"
            console.print(f"       {act.name}{only}")


@app.command(epilog=EXAMPLES)
def main(
    minutes: Annotated[
        float, typer.Option(min=0, help="Go on round robin for so long; every row runs at least once.")
    ] = 0,
    seed: Annotated[
        str | None, typer.Option(help="Everything random comes from it; a new one is printed unless given.")
    ] = None,
    broker: Annotated[Brokers, typer.Option(help="What carries the messages.")] = Brokers.REDIS,
    row: Annotated[list[int] | None, typer.Option(help="Only this row; can be repeated.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the verdicts to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The sizes of the test suite instead of the table's.")] = False,
    kept: Annotated[
        Path | None,
        typer.Option("--keep", help="Where logs of rows that did not pass go; .creditlane/faults unless given."),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the rows and run none.")] = False,
) -> None:
    """Break creditlane in every way of the table, and have an independent oracle judge what is left.

    Each act of a row has a database of its own, real worker processes, and producers in processes of their own that
    write down each operation before they publish it. When the fault is over and the lanes are empty, the oracle
    compares what was published with what the ledger holds. [bold]pass[/]: the fault really hit, and nothing was wrong.
    [bold]fail[/]: something is wrong, and the lines say what. [bold]unknown[/]: the fault missed, or the lanes did not
    come to rest: nothing was shown. The exit code is 0 only if every row that was run passed.
    """
    if listed:
        show_rows()
        return
    unknown = sorted(set(row or ()) - set(ROWS))
    if unknown:
        raise typer.BadParameter(f"there is no row {unknown[0]}; scripts/faults --list shows those there are")
    wanted = [ROWS[number] for number in sorted(set(row or ROWS))]
    if json_path is not None and (json_path.is_dir() or not os.access(json_path.absolute().parent, os.W_OK)):
        raise typer.BadParameter(f"{json_path} cannot be written")
    if broker != Brokers.REDIS and not is_installed():
        raise typer.BadParameter("there is no RabbitMQ here (on Debian and Ubuntu: apt install rabbitmq-server)")
    for name in [name for name in os.environ if name.startswith(("PG", "CREDITLANE_"))]:
        del os.environ[name]  # of another server, or another deployment
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    report = Report(seed or secrets.token_hex(4))
    code = 0
    try:
        run(report, wanted, broker, minutes, SMALL if quick else FULL, kept or KEPT)
    except StackError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        code = 1
    except KeyboardInterrupt:
        errors.print("interrupted: the rows so far")
        code = 130
    console.print(report.table())
    if json_path is not None:
        json_path.write_text(json.dumps(report.json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    raise typer.Exit(code or (0 if report.passed else 1))


def run(report: Report, wanted: list[Row], broker: Brokers, minutes: float, size: Size, kept: Path) -> None:
    """Run rows round robin until the time is over, each at least once on each broker."""
    console.print(f"seed {report.seed}: repeat with --seed {report.seed}", style="bold")
    deadline = time.monotonic() + 60 * minutes
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors, transient=True,
        disable=not errors.is_terminal,
    )  # fmt: skip
    with (
        temporary_directory("creditlane-faults-") as directory,
        servers(directory, broker) as (postgres, brokers),
        progress,
    ):
        number = 0
        while number == 0 or time.monotonic() < deadline:
            number += 1
            for row in wanted:
                for each in brokers:
                    if number > 1 and time.monotonic() >= deadline:
                        return
                    mend(postgres, each)
                    place = directory / f"{each.name}-{number}"
                    task = progress.add_task("")

                    def announce(act: str, row: Row = row, task: Any = task, name: str = each.name) -> None:
                        if interrupted.is_set():
                            raise KeyboardInterrupt
                        progress.update(task, description=f"row {row.number} on {name}: {row.title}: {act}")

                    stage = Stage(postgres, TEMPLATE, each, place)
                    outcome = run_row(row, stage, size, f"{report.seed} {each.name} {number}", announce)
                    progress.remove_task(task)
                    if outcome is None:
                        continue
                    report.add(row, each.name, outcome)
                    told(row, each.name, outcome)
                    if outcome.verdict != PASS:
                        keep(place, kept / report.seed / place.name)
                        console.print(f"  [dim]logs and files: {kept / report.seed / place.name}[/]", soft_wrap=True)
                    shutil.rmtree(place, ignore_errors=True)


def told(row: Row, broker: str, outcome: Outcome) -> None:
    """A line for a row that is done, and why where it is no pass."""
    console.print(
        f"[{COLOURS[outcome.verdict]}]{outcome.verdict:>7}[/]  row {row.number:>2} on {broker}: {outcome.hits:,} hits,"
        f" {outcome.operations:,} operations, {outcome.replayed:,} replayed, {outcome.seconds:.0f} s  {row.title}",
        soft_wrap=True,
    )
    for fault in outcome.faults:
        console.print(f"         {escape(fault)}", soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="scripts/faults")
