"""How the capacity model and its simulation are shown: tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from scripts.capacity import ONE_BOX, Change, Costs, Load, Plan
from scripts.capacity_simulation import Simulated
from scripts.showing import said, span


def count(number: float) -> str:
    """A large number in a few signs: ``1.3 k``, ``12.7 M``, ``10 B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def design(database: str, broker: str) -> str:
    """A design in two words."""
    return database if database == ONE_BOX else f"{database}, {broker}"


def _grid(title: str, heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), title=title)
    table.title_justify, table.title_style = "left", "dim"
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def plan_lines(load: Load, costs: Costs, plans: Sequence[Plan], steps: Sequence[Change]) -> RenderableType:
    """What loads need, side by side; where each part ends; and why, in sentences."""
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        ("operations/s, mean", lambda plan: count(plan.mean_per_s)),
        (f"operations/s, busiest {load.size_for}", lambda plan: count(plan.peak_per_s)),
        ("design", lambda plan: design(plan.database, plan.broker)),
        ("lane workers", lambda plan: f"{plan.workers:,}"),
        ("  their cores", lambda plan: count(plan.worker_cores)),
        ("  operations/s of one", lambda plan: count(plan.worker_per_s)),
        ("lanes", lambda plan: f"{plan.lanes:,}"),
        ("producers", lambda plan: f"{plan.producers:,}"),
        ("operations in a message", lambda plan: f"{plan.operations_per_message:.1f}"),
        ("operations in a transaction", lambda plan: f"{plan.batch_at_peak:,.1f}"),
        ("commits/s", lambda plan: count(plan.commits_per_s)),
        ("Postgres nodes", lambda plan: f"{plan.postgres_nodes:,}"),
        ("  cores", lambda plan: count(plan.postgres_cores)),
        ("  log (WAL), MB/s", lambda plan: count(plan.wal_mb_per_s)),
        ("  log a day, GB", lambda plan: count(plan.wal_gb_per_day)),
        ("  tables a day, GB", lambda plan: count(plan.stored_gb_per_day)),
        ("  tables a year, TB", lambda plan: count(plan.stored_tb_per_year)),
        ("broker nodes", lambda plan: f"{plan.broker_nodes:,}"),
        ("  cores, of Redis", lambda plan: count(plan.broker_cores)),
        ("  cores, of RabbitMQ", lambda plan: count(plan.rabbitmq_cores)),
        ("  network, MB/s", lambda plan: count(plan.broker_mb_per_s)),
        ("busiest account", lambda plan: f"{plan.largest_account:.2%}"),
    ]  # fmt: skip
    table = _grid("", [f"{count(plan.per_day)} a day" for plan in plans])
    for name, cell in rows:
        table.add_row(name, *map(cell, plans))
    parts: list[RenderableType] = [table]
    for plan in plans:
        parts += ["", f"[bold]{count(plan.per_day)} a day[/]"]
        parts += [f"- {said(note)}" for note in plan.notes]
    parts += ["", "[bold]The design changes[/]"]
    parts += [f"- from {count(step.per_day)} a day on: {design(step.database, step.broker)}" for step in steps[1:]]
    last = plans[-1]
    ends = _grid(
        f"Where each part is full, as it is used at {count(last.per_day)} a day", ["operations/s", "a day", ""]
    )
    ends.columns[-1].justify = "left"
    for limit in last.limits:
        ends.add_row(limit.part, count(limit.per_second), count(limit.per_day), said(limit.why))
    peaks = load.profile
    parts += [
        "",
        ends,
        "",
        f"[dim]Peaks: {peaks.hour:.1f} times the mean in the busiest hour, {peaks.minute:.1f} in the busiest minute,"
        f" {peaks.second:.0f} in the busiest second ({said(peaks.source)}).[/]",
        f"[dim]Costs: {said(costs.source)}.[/]",
    ]
    return Group(*parts)


def simulated_lines(per_day: int, found: Simulated) -> RenderableType:
    """What a simulation found."""
    table = _grid(f"The busiest ten minutes of {count(per_day)} a day, simulated", [""])
    table.show_header = False
    rows = [
        ("workers simulated", f"{found.workers_simulated:,} of {found.workers:,}"),
        ("operations at these", f"{found.arrived:,} came, {found.served:,} done, {found.waiting:,} waiting in the end"),
        ("operations/s in the busiest ten seconds, at all", count(found.peak_per_s)),
        ("waited for a batch", f"p50 {_time(found.waited_p50_ms)}, p99 {_time(found.waited_p99_ms)}"),
        ("until committed and answered", f"p50 {_time(found.answered_p50_ms)}, p99 {_time(found.answered_p99_ms)}"),
        ("  at the busiest worker", f"p99 {_time(found.busiest_p99_ms)}"),
        ("largest backlog, at all", f"{found.largest_backlog:,} operations"),
        ("operations in a transaction", f"{found.batch:,.1f}"),
        ("at a batch", ", ".join(f"{part:.0%}" for part in found.utilisation[:SHOWN])),
        ("  were all batches full", ", ".join(f"{part:.0%}" for part in found.needed[:SHOWN])),
        (
            "after an outage of an hour, caught up in",
            "never" if found.drain_seconds is None else span(found.drain_seconds),
        ),
    ]
    for name, value in rows:
        table.add_row(name, value)
    table.columns[1].justify = "left"
    return table


SHOWN = 8
"""Of how many workers the utilisation is shown."""


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.1f} ms"
