"""How fast creditlane is on this machine, beside what one would write without it.

Called by ``scripts/bench``. Everything runs on a stack of its own that is removed in the end. A run of the whole
is made of rounds; each round measures every case and every peer once, so that what else the machine does at the
time meets all of them alike, and ratios are taken within a round.

:mod:`scripts.bench_cases` says what is measured, :mod:`scripts.bench_peers` what it is compared with.
"""

from __future__ import annotations

import json
import os
import platform
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psycopg
import redis
import typer
from celery.exceptions import CeleryError
from kombu.exceptions import KombuError
from rich.markup import escape

from creditlane.errors import CreditlaneError
from scripts.bench_cases import CASES, plan
from scripts.bench_chart import POINTS, as_svg, measure_chart
from scripts.bench_figures import BenchError, Results, Sizes, Step, rounded
from scripts.bench_grow import FillError
from scripts.bench_harness import Bench
from scripts.bench_show import Show, console, cost_table, errors, report_json, report_table
from scripts.embedded import Stack, StackError, start_stack, temporary_directory
from scripts.run_stack import ROOT, Signals, Stopped

FAILURES = (
    BenchError, StackError, FillError, CreditlaneError, CeleryError, KombuError, psycopg.Error, redis.RedisError,
    OSError,
)  # fmt: skip
"""What ends the bench with a sentence and exit code 1."""


def versions_of(stack: Stack) -> dict[str, str]:
    """What was measured with."""
    with psycopg.connect(stack.database_url) as connection:
        durable = [connection.execute(f"SHOW {name}").fetchone() for name in ("fsync", "synchronous_commit")]
        if durable != [("on",), ("on",)]:
            raise BenchError(f"fsync and synchronous_commit must be on, and are {durable}.")
        postgres = connection.info.parameter_status("server_version") or "?"
    with redis.Redis.from_url(stack.broker_url) as store:
        server: Any = store.info("server")
    packages = {name: version(name) for name in ("celery", "kombu", "redis", "psycopg", "sqlalchemy")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "creditlane": str(project["version"]),
        **packages,
        "python": platform.python_version(),
        "postgresql": postgres.split(" ")[0],
        "redis-server": str(server["redis_version"]),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


# --- The command -------------------------------------------------------------------------------------


@contextmanager
def running(directory: Path, signals: Signals) -> Iterator[Stack]:
    """The servers, for as long as the bench runs."""
    # Commit times cost nothing worth mentioning, and all peers alike; without them the end of a
    # measurement would be when somebody happened to look.
    stack = start_stack(directory, postgres_settings={"track_commit_timestamp": "on"})
    try:
        yield stack
    finally:
        signals.stopping()
        stack.stop()


def measure(bench: Bench, steps: Sequence[Step], runs: int) -> Results:
    """Measure everything, round by round."""
    results = Results()
    for number in range(1, runs + 1):
        bench.round = number
        # Every other round goes backwards, so that none is always measured on a machine that has just rested.
        for step in steps if number % 2 else steps[::-1]:
            if step.once and number > 1:
                continue
            title = step.name if runs == 1 else f"{step.name}, run {number} of {runs}"
            with bench.show.working(title):
                sample = step.measure(bench)
            results.add(step.name, sample, number)
            bench.rates[step.name] = sample.ops_per_s
            bench.show.measured(title, sample)
    return results


def cases_of(named: Sequence[str], *, quick: bool, chart: bool) -> list[str]:
    """The cases that are measured: those that are named; else, without a chart to draw, all that there is time for."""
    if named or chart:
        return [name for name in CASES if name in named]
    return [name for name in CASES if not (quick and CASES[name].once)]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this case, and what it is compared with: {', '.join(CASES)}. Can be repeated."),
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="How often; 3 unless given, 1 with --quick.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer operations and one run: under two minutes.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    chart_path: Annotated[
        Path | None,
        typer.Option(
            "--chart",
            help="Draw throughput by batch size, number of accounts and size of the ledger to this SVG file: takes some"
            " minutes. Without --case, nothing else is measured.",
        ),
    ] = None,
    operations: Annotated[
        int | None,
        typer.Option(min=1, max=200_000, help="So many operations in every measurement: to try it, not for figures."),
    ] = None,
) -> None:
    """Measure creditlane on this machine beside what one would write without it.

    Starts a PostgreSQL (fsync and synchronous_commit on) and a Redis of its own, measures every case and every
    peer once in each run, and removes all of it. After each measurement the ledger must hold exactly the
    operations that were sent, and pass its audit: if not, the exit code is 1. A goal that is missed is shown, and
    is no failure. What takes minutes is measured in the first run alone, and with --quick only when it is named.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # a PGHOST or PGSSLMODE of another server would lead our connections astray
    signals = Signals()
    signals.install()
    code = 0
    try:
        for name in case or ():
            if name not in CASES:
                raise typer.BadParameter(f"there is no case {name!r}; there are: {', '.join(CASES)}")
        # Said now, not when everything is measured.
        for option, path in (("--json", json_path), ("--chart", chart_path)):
            if path is not None and path.is_dir():
                raise typer.BadParameter(f"{path} is a directory; {option} takes a file")
            if path is not None and not os.access(path.absolute().parent, os.W_OK):
                raise typer.BadParameter(f"{path.absolute().parent} is not a directory that can be written to")
        cases = cases_of(case or (), quick=quick, chart=chart_path is not None)
        runs = runs or (1 if quick else 3)
        sizes = Sizes.each(operations) if operations is not None else Sizes.quick() if quick else Sizes()
        steps = plan(cases)
        measurements = sum(1 if step.once else runs for step in steps) + (POINTS * runs if chart_path else 0)
        with temporary_directory() as directory, Show(measurements) as show:
            with show.working("starting PostgreSQL and Redis"):
                pass
            with running(directory, signals) as stack:
                bench = Bench(stack, sizes, show)
                versions = versions_of(stack)
                bench.prepare()
                results = measure(bench, steps, runs)
                panels = measure_chart(bench, runs) if chart_path is not None else []
        console.print(", ".join(f"{name} {found}" for name, found in versions.items()), style="dim", soft_wrap=True)
        if steps:
            console.print(report_table(results, steps, cases, runs))
            console.print(cost_table(results, steps))
        if shrunk := sizes.differences():
            console.print(f"Not a whole run; operations (in a whole run): {', '.join(shrunk)}", soft_wrap=True)
        for step in steps:
            told = "; ".join([step.what, *results.notes(step.name)])
            console.print(f"{step.name}: {escape(told)}", style="dim", soft_wrap=True)
        if chart_path is not None:
            chart_path.write_text(as_svg(panels, versions["system"]), encoding="utf-8")
        if json_path is not None:
            figures = report_json(results, steps, cases, versions, runs)
            if panels:
                figures["chart"] = {
                    panel.name: {point.label: rounded(point.value) for point in panel.points} for panel in panels
                }
            json_path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except FAILURES as error:
        told = (
            str(error) if isinstance(error, BenchError | StackError | FillError) else f"{type(error).__name__}: {error}"
        )
        errors.print(f"[red]error:[/] {escape(told)}", soft_wrap=True)
        code = 1
    except Stopped:
        code = 130
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="scripts/bench")
