"""The bench: a tiny run of everything, its end when something is wrong or it is stopped, and its arithmetic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from creditlane.client import checked
from creditlane.contract import decode_message
from models.catalog import load_catalog
from models.rules.state import Account
from scripts.bench_cases import CASES, plan
from scripts.bench_figures import Bound, Results, Sample, Sizes, Spread, percentile, ratios
from scripts.bench_harness import CATALOG, difference
from scripts.bench_mix import GRANTS, openings, read_trace, requests
from scripts.bench_peers import PEERS
from scripts.bench_run import cases_of
from scripts.bench_show import CPU, cost_table, report_json, report_table
from scripts.embedded import temporary_directory, wait_until
from tasks.ledger import apply
from workers.metrics import STAGES

ROOT = Path(__file__).resolve().parents[2]
BENCH = [sys.executable, "-m", "scripts.bench_run", "--runs", "1"]
LOSING_ONE = """
from scripts import bench_harness, bench_run
sent = bench_harness.Side.sent
bench_harness.Side.sent = lambda side, operations: sent(side, operations)[:-1]
bench_run.app()
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_a_tiny_run_measures_every_case_and_peer(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = run(*BENCH, "--operations", "30", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(path.read_text())
    assert set(told["cases"]) == set(CASES)
    assert set(told["peers"]) == set(PEERS)
    assert {"celery", "kombu", "python", "postgresql", "redis-server"} <= set(told["versions"])
    for name, case in told["cases"].items():
        rate = case["ops_per_s"]
        assert 0 < rate["min"] == rate["median"] == rate["max"]
        assert set(case["ratio"]) == set(CASES[name].against)
        assert all(ratio > 0 for ratio in case["ratio"].values())
        assert case["goal"] == CASES[name].goal
        assert isinstance(case["met"], bool)
        assert (case["p50_ms"] is None) == (not name.startswith("answer"))
    for name in ("answer", "answer_loaded"):
        assert 0 < told["cases"][name]["p50_ms"] <= told["cases"][name]["p99_ms"]
    for name in ("metering", "hot", "mix", "grow", "memory"):
        assert set(told["cases"][name]["cpu_us_per_op"]) == {"producer", "workers", "database", "broker"}
        assert sum(told["cases"][name]["cpu_us_per_op"].values()) > 0
        assert set(told["cases"][name]["stages_us_per_op"]) == set(STAGES)
        assert told["cases"][name]["stages_us_per_op"]["rules"] > 0
    for name in ("month", "memory"):
        assert told["cases"][name]["memory_mib"] > 0
    assert "bytes_per_operation" in told["sizes"]
    assert all(peer["ops_per_s"]["median"] > 0 for peer in told["peers"].values())
    for name in (*CASES, *PEERS):
        assert f"{name}: " in done.stdout  # a line for each, as this is no terminal


@pytest.mark.timeout(180)
def test_a_wrong_count_fails(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = run(
        sys.executable, "-c", LOSING_ONE, "--case", "hot", "--runs", "1", "--operations", "5", "--json", str(path)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not what was sent: 10 sent, 9 there; 1 missing [('user_" in done.stderr
    assert "Traceback" not in done.stderr
    assert not path.exists()


@pytest.mark.timeout(180)
def test_a_signal_leaves_nothing_behind() -> None:
    with temporary_directory() as place:
        process = subprocess.Popen(
            [*BENCH, "--case", "single", "--operations", "20000"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(place)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("naive"):
                    break
            assert wait_until(lambda: len(started_in(place)) >= 5, 60)  # the bench, two servers, worker and pool
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
            assert wait_until(lambda: not started_in(place), 20), started_in(place)
            assert not list(place.iterdir())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def started_in(place: Path) -> list[int]:
    """The processes whose environment says that temporary files go here, or into a directory in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0TMPDIR={place}".encode() in b"\0" + (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--case", "none"], "there is no case 'none'"),
        (["--json", "/nowhere/figures.json"], "/nowhere is not a directory"),
        (["--chart", "/nowhere/chart.svg"], "/nowhere is not a directory"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(arguments: list[str], sentence: str) -> None:
    done = run(*BENCH, *arguments)
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_spread_is_median_least_and_most() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([4.0, 2.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread(1234.5678, 0.000123456, 9.0).as_json() == {"median": 1234.6, "min": 0.00012346, "max": 9.0}


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [(100, 99, 99), (100, 50, 50), (101, 50, 51), (100, 100, 100), (1, 99, 1), (3, 99, 3), (1000, 99, 990)],
)
def test_a_percentile_is_one_of_the_values(count: int, percent: float, expected: int) -> None:
    assert percentile([float(value) for value in range(count, 0, -1)], percent) == expected


def test_ratios_are_taken_run_by_run() -> None:
    # A machine that was twice as slow in one run was so for both: the ratio does not waver.
    assert ratios([100.0, 50.0], [10.0, 5.0]) == Spread(10.0, 10.0, 10.0)
    assert ratios([10.0, 20.0, 30.0], [10.0, 10.0, 10.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_latencies_make_a_sample() -> None:
    sample = Sample.of_latencies([0.001] * 98 + [0.051, 0.151])
    assert sample.ops_per_s == pytest.approx(100 / 0.3)
    assert sample.p50_ms == pytest.approx(1.0)
    assert sample.p99_ms == pytest.approx(51.0)


def results(**rates: list[float]) -> Results:
    made = Results()
    for name, values in rates.items():
        for round, value in enumerate(values, 1):
            made.add(name, Sample(value, value, value * 2), round)
    return made


@pytest.mark.parametrize(
    ("bound", "met"),
    [
        (Bound("ops_per_s", "≥", 3, "naive"), True),
        (Bound("ops_per_s", "≥", 3.1, "naive"), False),
        (Bound("p99_ms", "<", 60), False),
        (Bound("p99_ms", "<", 60.1), True),
        (Bound("p50_ms", "<", 3, "naive"), False),
    ],
)
def test_a_goal_is_met_by_the_medians(bound: Bound, met: bool) -> None:
    measured = results(single=[30.0, 20.0, 90.0], naive=[10.0, 10.0, 10.0])
    assert bound.met(measured, "single") is met


def test_a_goal_reads_as_in_the_documentation() -> None:
    assert CASES["publish"].goal == "≥ 3 × apply_async"
    assert CASES["answer"].goal == "p99 < 50 ms, p50 < 5 × celery"


def test_a_case_is_measured_with_what_it_is_compared_with_each_once() -> None:
    assert [step.name for step in plan(["hot"])] == ["metering", "hot"]
    names = [step.name for step in plan(list(CASES))]
    assert len(names) == len(set(names)) == len(CASES) + len(PEERS)
    for case in CASES.values():
        assert set(case.against) <= {*CASES, *PEERS}


def test_a_single_case_is_reported_with_its_peer_alone() -> None:
    measured = results(hot=[9.0, 18.0], metering=[10.0, 10.0])
    told = report_json(measured, plan(["hot"]), ["hot"], {"python": "3"}, 2)
    assert told["versions"] == {"python": "3"}
    assert told["peers"] == {}
    assert set(told["cases"]) == {"hot"}
    assert told["cases"]["hot"]["ops_per_s"] == {"median": 13.5, "min": 9.0, "max": 18.0}
    assert told["cases"]["hot"]["ratio"] == {"metering": 1.35}
    assert told["cases"]["hot"]["ratio_spread"] == {"metering": {"median": 1.35, "min": 0.9, "max": 1.8}}
    assert told["cases"]["hot"]["met"] is True
    assert report_table(measured, plan(["hot"]), ["hot"], 2).row_count == 2


def test_what_was_measured_once_is_compared_with_the_same_run() -> None:
    measured = results(metering=[100.0, 10.0, 10.0])
    measured.add("grow", Sample(95.0), 1)
    assert measured.ratio("grow", "metering", "ops_per_s") == Spread(0.95, 0.95, 0.95)
    assert CASES["grow"].met(measured)


def test_costs_are_medians_and_have_a_table_of_their_own() -> None:
    measured = Results()
    for round, value in enumerate((10.0, 30.0, 200.0), 1):
        costs = {"workers": value}, {"rules": value * 10}
        note = f"note {round > 1}"
        measured.add("hot", Sample(1.0, cpu_us_per_op=costs[0], stages_us_per_op=costs[1], note=note), round)
        measured.add("metering", Sample(1.0, bytes_per_op=900.0), round)
    told = report_json(measured, plan(["hot"]), ["hot"], {}, 3)
    assert told["cases"]["hot"]["cpu_us_per_op"] == {"workers": 30.0}
    assert told["cases"]["hot"]["stages_us_per_op"] == {"rules": 300.0}
    assert told["cases"]["hot"]["notes"] == ["note False", "note True"]
    assert told["sizes"] == {"bytes_per_operation": 900.0}
    table = cost_table(measured, plan(["hot"]))
    assert table.row_count == 1  # nothing is known of the other
    assert [column.header for column in table.columns] == ["", *CPU, *STAGES]
    assert [text for column in table.columns for text in column.cells if text] == ["hot", "30.0", "300"]


def test_what_takes_minutes_is_left_out_when_it_must_be_quick() -> None:
    assert cases_of((), quick=False, chart=False) == list(CASES)
    quick = cases_of((), quick=True, chart=False)
    assert set(CASES) - set(quick) == {"grow", "month", "memory"}
    assert cases_of(("grow", "hot"), quick=True, chart=True) == ["hot", "grow"]
    assert cases_of((), quick=False, chart=True) == []


def test_the_mix_is_of_operations_that_the_rules_apply() -> None:
    catalog, now = load_catalog(CATALOG), datetime.now(UTC)
    sent = list(islice(requests(read_trace()), 5_000))
    assert len({request.id for request in sent}) == len(sent)
    accounts = {request.arguments["account"]: Account(request.arguments["account"]) for request in sent}
    opened = [request for account in accounts for request in openings(account)]
    done: Counter[str] = Counter()
    for name, operation, arguments in (*opened, *sent):
        raw = checked(name, operation, arguments)
        account = accounts[arguments["account"]]
        row = apply(account, name, operation, decode_message(name, raw), raw, now, catalog).row
        assert row is not None
        assert row.status == "applied", (name, arguments, row.code)
        done[name] += 1
    assert set(done) == {
        f"credits.{name}" for name in ("open", "grant", "consume", "hold", "capture", "release", "refund")
    }
    assert 0 <= done["credits.hold"] - done["credits.capture"] - done["credits.release"] <= 1  # the end is a cut
    # Small lots run out where much is used: charges are paid by several.
    assert min(account.open_grants() for account in accounts.values()) < len(GRANTS) - 1


def test_what_is_lost_doubled_or_strange_is_seen() -> None:
    sent = [("a", "1"), ("a", "2"), ("b", "1")]
    assert not difference(sent, sent[::-1])
    assert "2 there; 1 missing [('b', '1')]" in difference(sent, sent[:2])
    assert "1 not sent [('b', '9')]" in difference(sent, [*sent, ("b", "9")])
    assert "1 twice" in difference(sent, [*sent, sent[0]])


def test_sizes_are_those_of_the_cases() -> None:
    assert (Sizes().single, Sizes().metering, Sizes().accounts) == (20_000, 200_000, 10_000)
    assert (Sizes.each(7).metering, Sizes.each(7).accounts, Sizes.each(7).memory_early) == (7, 7, 3)
    assert Sizes().differences() == []
    assert "single 10,000 (20,000)" in Sizes.quick().differences()
    assert Sizes.each(200_000).accounts == 10_000
