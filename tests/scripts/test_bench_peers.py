"""The peers of the bench: each does what it says, and notices when something is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_peers
from scripts.bench_figures import BenchError, Sample, Sizes
from scripts.bench_harness import LEDGER_TEMPLATE, Bench
from scripts.bench_processes import Loaders, cpu_seconds, resident_mib
from scripts.bench_show import Show
from scripts.bench_streams import Memory
from scripts.embedded import Stack

Order = Mapping[str, Any]


@pytest.fixture(scope="module")
def bench(stack: Stack) -> Iterator[Bench]:
    """A bench of twenty operations each."""
    made = Bench(stack, Sizes.each(20), Show(0), round=1)
    made.prepare()
    yield made
    stack.postgres.drop_database(LEDGER_TEMPLATE)


@pytest.mark.parametrize(
    ("written", "instead", "sentence"),
    [
        ("IF available IS NULL", "IF $2 = 'sql-0-1' OR available IS NULL", r"1 missing \[\('', 'sql-0-1'\)\]"),
        ("SET available_micro = available - $4", "SET available_micro = available", "wrong balance"),
    ],
)
def test_what_pgbench_did_not_write_is_seen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, written: str, instead: str, sentence: str
) -> None:
    assert bench_peers.SQL_FUNCTION.count(written) == 1
    monkeypatch.setattr(bench_peers, "SQL_FUNCTION", bench_peers.SQL_FUNCTION.replace(written, instead))
    with pytest.raises(BenchError, match=sentence):
        bench_peers.measure_sql(bench)


def test_pgbench_that_fails_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "SQL_FUNCTION", "SELECT 1")
    with pytest.raises(BenchError, match="pgbench ended with code 2"):
        bench_peers.measure_sql(bench)


def losing(change: Callable[[Order], Order]) -> Callable[[Path, Sequence[Order]], Loaders]:
    """Loaders whose first does something else than it was told."""

    def start(logs: Path, orders: Sequence[Order]) -> Loaders:
        return Loaders(logs, [change(orders[0]), *orders[1:]])

    return start


@pytest.mark.parametrize(
    ("measure", "change", "sentence"),
    [
        (
            bench_peers.measure_copy,
            lambda order: {**order, "operations": order["operations"][:-1]},
            "20 sent, 19 there; 1 missing",
        ),
        (bench_peers.measure_broker, lambda order: {**order, "lanes": []}, "20 messages were in the lanes and"),
    ],
)
def test_what_a_loader_leaves_out_is_seen(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    measure: Callable[[Bench], Sample],
    change: Callable[[Order], Order],
    sentence: str,
) -> None:
    monkeypatch.setattr(bench_peers, "Loaders", losing(change))
    with pytest.raises(BenchError, match=sentence):
        measure(bench)


def test_a_loader_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    with Loaders(tmp_path, [{"kind": "nothing"}]) as loaders, pytest.raises(BenchError, match="KeyError: 'nothing'"):
        loaders.begin()


def test_cpu_time_is_that_of_a_process_and_of_all_that_it_started() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    before = cpu_seconds([os.getpid()])
    subprocess.run([sys.executable, "-c", nested], check=True)
    assert cpu_seconds([os.getpid()]) - before >= 0.25


def test_memory_is_compared_with_what_it_was_early() -> None:
    memory = Memory([os.getpid()], early=10)
    memory.look(10)
    before = resident_mib(os.getpid())
    more = bytearray(os.urandom(1 << 26))
    memory.look(11)
    fields = memory.as_fields
    assert fields["memory_mib"] >= before + 60
    assert fields["memory_ratio"] > 1
    assert len(more) == 1 << 26


def test_memory_of_a_process_that_has_ended_is_no_figure() -> None:
    with pytest.raises(BenchError, match="cannot be read"):
        resident_mib(2**22 + 1)  # above the largest process id there is
