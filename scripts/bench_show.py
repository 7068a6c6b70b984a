"""What the bench shows: progress, the tables, and the same as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts.bench_figures import FIGURES, TABLES, Results, Sample, Spread, Step, rounded
from workers.metrics import STAGES

# A log has no width: there the table gets what it needs.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False)

CPU = ("producer", "workers", "database", "broker")
"""Whose CPU time is told."""


class Show:
    """Progress: a bar on a terminal, elsewhere a line for each measurement."""

    def __init__(self, steps: int) -> None:
        self._bar: Progress | None = None
        self._title = ""
        self._steps = steps
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<34}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._all = self._bar.add_task("measurements", total=steps)
            self._one = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> Show:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Name what is being done."""
        if self._bar is not None:
            self._bar.reset(self._one, description=title, total=None, visible=True)
        else:
            console.print(f"{title} …", soft_wrap=True)
        yield
        if self._bar is not None:
            self._bar.update(self._one, visible=False)

    def advance(self, done: int, total: int) -> None:
        """Note how far the present measurement is."""
        if self._bar is not None:
            self._bar.update(self._one, completed=done, total=total)

    def measured(self, title: str, sample: Sample) -> None:
        """Note the end of a measurement."""
        if self._bar is not None:
            self._bar.advance(self._all)
        shown = f"{sample.ops_per_s:,.0f}/s"
        if sample.p50_ms is not None and sample.p99_ms is not None:
            shown += f", p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
        if sample.memory_mib is not None and sample.memory_ratio is not None:
            shown += f", {sample.memory_mib:.0f} MiB, {sample.memory_ratio:.2f} × early"
        if sample.note:
            shown += f" ({sample.note})"
        console.print(f"{title}: {shown}", soft_wrap=True)


def shown(spread: Spread, form: str) -> str:
    """A median with its spread."""
    if spread.min == spread.max:
        return form.format(spread.median)
    return f"{form.format(spread.median)} ({form.format(spread.min)}–{form.format(spread.max)})"


def beside_the_rate(results: Results, step: str) -> str:
    """p50 and p99 of a step in milliseconds, or its memory; nothing when it has neither."""
    forms = {"p50_ms": "{:.2f}", "p99_ms": "{:.2f}", "memory_mib": "{:.0f} MiB", "memory_ratio": "{:.2f} × early"}
    return "\n".join(
        shown(results.spread(step, figure), form) for figure, form in forms.items() if results.figures(step, figure)
    )


def report_table(results: Results, steps: Sequence[Step], cases: Sequence[str], runs: int) -> Table:
    """The figures of all that was measured, with goals.

    :param steps: in the order in which they are shown.
    :param cases: those that were asked for; the others are there for comparison.
    """
    title = "One run" if runs == 1 else f"Median of {runs} runs (least–most)"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("per second", "p50, p99 in ms; memory", "ratio"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("goal")
    table.add_column("met", justify="center")
    for step in steps:
        rate = shown(results.spread(step.name, "ops_per_s"), "{:,.0f}")
        if step.name not in cases:
            table.add_row(step.name, rate, beside_the_rate(results, step.name), "", "", "", style="dim")
            continue
        compared = "\n".join(
            f"{shown(results.ratio(step.name, other, step.figure), '{:.2f}')} × {other}" for other in step.against
        )
        verdict = "" if not step.bounds else "[green]yes[/]" if step.met(results) else "[red]no[/]"
        table.add_row(step.name, rate, beside_the_rate(results, step.name), compared, step.goal, verdict)
    return table


def cost_table(results: Results, steps: Sequence[Step]) -> Table:
    """Where time goes: CPU by process, and what passes in each stage of the lane workers, per operation."""
    title = "Microseconds per operation: CPU time of each part; what passes in the lane workers, by stage"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in (*CPU, *STAGES):
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        cpu, stages = results.table(step.name, "cpu_us_per_op"), results.table(step.name, "stages_us_per_op")
        if cpu or stages:
            figures = [*(cpu.get(name) for name in CPU), *(stages.get(name) for name in STAGES)]
            table.add_row(step.name, *map(microseconds, figures))
    return table


def microseconds(value: float | None) -> str:
    """A figure of that table, as exact as it is worth."""
    if value is None:
        return ""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def report_json(
    results: Results, steps: Sequence[Step], cases: Sequence[str], versions: Mapping[str, str], runs: int
) -> dict[str, Any]:
    """What ``--json`` writes: rates per second, latencies in milliseconds, ratios of medians taken by round.

    A latency's ratio is one of latencies: less is better there. Where the goal is of several conditions, all must
    be met.
    """

    def figures(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"ops_per_s": results.spread(name, "ops_per_s").as_json()}
        for figure in FIGURES[1:]:
            measured = results.spread(name, figure) if results.figures(name, figure) else None
            if figure.startswith("p") or measured is not None:
                found[figure] = None if measured is None else rounded(measured.median)
            if measured is not None:
                found[f"{figure}_spread"] = measured.as_json()
        for table in TABLES:
            found[table] = {key: rounded(value) for key, value in results.table(name, table).items()}
        found["notes"] = results.notes(name)
        return found

    peers, told = {}, {}
    for step in steps:
        if step.name in cases:
            spreads = {other: results.ratio(step.name, other, step.figure) for other in step.against}
            told[step.name] = {
                **figures(step.name),
                "ratio": {other: rounded(found.median) for other, found in spreads.items()},
                "ratio_spread": {other: found.as_json() for other, found in spreads.items()},
                "goal": step.goal,
                "met": step.met(results),
            }
        elif not step.bounds:  # a peer: a case that is there for comparison alone is not told
            peers[step.name] = figures(step.name)
    report = {"versions": dict(versions), "runs": runs, "peers": peers, "cases": told}
    if "metering" in results.samples and results.figures("metering", "bytes_per_op"):
        report["sizes"] = {"bytes_per_operation": rounded(results.spread("metering", "bytes_per_op").median)}
    return report
