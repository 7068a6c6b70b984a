"""The capacity model: its arithmetic, a simulation that must agree with it and with queueing theory, its command."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from creditlane.lanes import lane_number, lane_of
from scripts.capacity import (
    BATCH_MESSAGES,
    BATCH_OPERATIONS,
    BENCH_METERING,
    BENCH_SINGLE,
    BURSTS,
    BUSIEST_MINUTE,
    BUSIEST_SECOND,
    CITUS,
    LANES_PER_WORKER,
    MEASURED,
    ONE_BOX,
    RABBITMQ,
    Batch,
    CapacityError,
    Line,
    Load,
    Machines,
    Profile,
    Window,
    Workers,
    changes,
    choose,
    costs_of_bench,
    distinct_accounts,
    elastic_batch,
    harmonic,
    largest_share,
    plan,
    profile_of,
    rate_of_cores,
    sample_profile,
    usage_times,
    worker_shares,
)
from scripts.capacity_simulation import ServiceTime, arrivals, drain, serve, simulate
from scripts.command_line import app
from scripts.lane_state import MAX_LANES

PEAKS = Profile(2.0, 8.0, 50.0, "made up")


def load(per_day: int, **options: Any) -> Load:
    return Load(per_day, PEAKS, **options)


# --- Costs -------------------------------------------------------------------------------------------


def test_a_line_is_the_sum_of_its_parts() -> None:
    line = Line(transaction=100.0, message=10.0, single=5.0, operation=2.0, account=1.0)
    batch = Batch(operations=50, messages=20, singles=10, accounts=40)
    assert line.of(batch) == 100 + 200 + 50 + 100 + 40
    assert line.per_operation(batch) == line.of(batch) / 50
    assert line.scaled(2).of(batch) == 2 * line.of(batch)


def test_a_worker_waits_for_everybody() -> None:
    batch = Batch(1, 1, 1, 1)
    parts = (MEASURED.worker_us, MEASURED.postgres_us, MEASURED.broker_us, MEASURED.wait_us)
    alone = MEASURED.service_us(batch)
    assert alone == pytest.approx(sum(line.of(batch) for line in parts))
    assert MEASURED.service_us(batch, round_trip_us=100) == pytest.approx(alone + 1_000)
    assert MEASURED.service_us(batch, events=2) == pytest.approx(alone + 2 * MEASURED.event.total_us)


def figures(**changed: Any) -> dict[str, Any]:
    metering = {"producer": 5.0, "workers": 20.0, "database": 15.0, "broker": 1.0}
    publish = {"producer": 90.0, "workers": 0.0, "database": 0.1, "broker": 16.0}
    single = {"workers": 100.0, "database": 25.0, "broker": 11.0}
    cases = {"metering": metering, "publish": publish, "single": single}
    told = {
        "cases": {name: {"cpu_us_per_op": costs, "ops_per_s": {}} for name, costs in cases.items()},
        "sizes": {"bytes_per_operation": 640},
    }
    return {**told, **changed}


def test_the_costs_of_a_bench_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    told = figures()
    path.write_text(json.dumps(told))
    costs, absent = costs_of_bench(path)
    assert absent == []
    assert costs.stored_bytes == 640
    assert str(path) in costs.source
    lines = {
        "producer": costs.producer_us, "workers": costs.worker_us,
        "database": costs.postgres_us, "broker": costs.broker_us,
    }  # fmt: skip
    for part, line in lines.items():
        assert line.per_operation(BENCH_METERING) == pytest.approx(told["cases"]["metering"]["cpu_us_per_op"][part])
    assert costs.producer_us.per_operation(BENCH_SINGLE) == pytest.approx(90)
    assert costs.worker_us.per_operation(BENCH_SINGLE) == pytest.approx(100)
    assert costs.broker_us.per_operation(BENCH_SINGLE) == pytest.approx(16 + 11)


def test_spreads_and_tables_are_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    told = figures(sizes={"bytes_per_operation": {"operations": 400, "entries": 250.5}})
    told["cases"]["metering"]["cpu_us_per_op"]["workers"] = {"median": 33.0, "min": 30.0, "max": 40.0}
    path.write_text(json.dumps(told))
    costs, absent = costs_of_bench(path)
    assert absent == []
    assert costs.stored_bytes == 650.5
    assert costs.worker_us.per_operation(BENCH_METERING) == pytest.approx(33.0)


def test_what_a_bench_does_not_tell_is_said_and_taken_as_measured(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    told = figures(sizes=None)
    del told["cases"]["single"]
    told["cases"]["metering"]["cpu_us_per_op"]["broker"] = None
    path.write_text(json.dumps(told))
    costs, absent = costs_of_bench(path)
    named = [sentence.split(" ")[0] for sentence in absent]
    assert set(named) == {
        "cases.metering.cpu_us_per_op.broker", "cases.single.cpu_us_per_op.workers",
        "cases.single.cpu_us_per_op.broker", "sizes.bytes_per_operation",
    }  # fmt: skip
    assert costs.broker_us == MEASURED.broker_us
    assert costs.stored_bytes == MEASURED.stored_bytes
    assert costs.worker_us != MEASURED.worker_us


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "it has no cases"),
        ("[]", "it has no cases"),
        ('{"cases": 3}', "it has no cases"),
        ('{"cases": {"metering": {"ops_per_s": 3}}}', "no cpu_us_per_op and no sizes"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_bench_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "figures.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CapacityError, match=sentence):
        costs_of_bench(path)


# --- Peaks -------------------------------------------------------------------------------------------


def test_the_recorded_bursts_are_what_they_say() -> None:
    assert len(BURSTS) == 60
    assert pytest.approx(4.29, abs=0.01) == BUSIEST_MINUTE
    assert pytest.approx(26.1, abs=0.05) == BUSIEST_SECOND


def test_a_steady_file_shows_no_burst_of_its_own() -> None:
    draw = random.Random(3)
    times = [draw.uniform(0, 86_400 * 2) for _ in range(3_000)]  # one in a minute: most seconds have none
    found = profile_of(times, "steady")
    assert 1 <= found.hour < 1.6
    assert found.minute == pytest.approx(found.hour * BUSIEST_MINUTE)
    assert found.second == pytest.approx(found.hour * BUSIEST_SECOND)


def test_a_burst_that_is_no_chance_counts() -> None:
    draw = random.Random(4)
    times = [draw.uniform(0, 3_000) for _ in range(30_000)] + [draw.uniform(1_200, 1_260) for _ in range(3_000)]
    found = profile_of(times, "bursts", hour=2.5)
    assert found.hour == 2.5
    steady = len(times) / 3_000 * 60
    assert found.minute == pytest.approx(2.5 * (600 + 3_000) / steady, rel=0.05)
    assert found.second >= found.minute


def test_the_hours_of_the_sample_are_the_default() -> None:
    found = sample_profile()
    assert found.hour == pytest.approx(2.56, abs=0.02)  # 143 of its 2,000 rows in the busiest of 36 hours
    assert found.minute == pytest.approx(found.hour * BUSIEST_MINUTE)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("when,what\n1,2\n", "no column with times; it has: when, what"),
        ("time,what\nyesterday,2\n", "each row has a time like"),
        ("", "is empty"),
        (None, "cannot be read"),
    ],
)
def test_a_usage_file_without_times_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "usage.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CapacityError, match=sentence):
        usage_times(path)


def test_a_file_with_hardly_a_row_has_no_peaks(tmp_path: Path) -> None:
    path = tmp_path / "usage.csv"
    path.write_text("at;what\n2026-03-01T12:00:00Z;a\n2026-03-01 12:00:01.5;b\n".replace(";", ","))
    times = usage_times(path, "at")
    assert times[1] - times[0] == 1.5
    with pytest.raises(CapacityError, match="from 100 rows"):
        profile_of(times, "two rows")


# --- Accounts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("count", [1, 7, 1_000, 60_000])
def test_harmonic_is_the_sum(count: int, exponent: float) -> None:
    assert harmonic(count, exponent) == pytest.approx(math.fsum(k**-exponent for k in range(1, count + 1)), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    operations=st.integers(1, 1_000), accounts=st.integers(1, 5_000), exponent=st.floats(0, 2), parts=st.integers(1, 20)
)
def test_different_accounts_are_as_many_as_there_must_be(
    operations: int, accounts: int, exponent: float, parts: int
) -> None:
    found = distinct_accounts(operations, accounts, exponent, parts)
    total = harmonic(accounts, exponent)
    exact = sum(-math.expm1(-operations * parts * k**-exponent / total) for k in range(1, accounts + 1)) / parts
    assert found == pytest.approx(min(max(1.0, exact), operations), rel=0.02)


def test_shares_of_workers_are_those_of_their_lanes() -> None:
    small = load(1_000, accounts=300, exponent=1.0)
    weights = [0.0] * 16
    for rank in range(1, 301):
        weights[lane_number(lane_of(f"user_{rank:03d}", 16))] += 1 / rank / harmonic(300, 1.0)
    expected = sorted((sum(weights[worker::3]) for worker in range(3)), reverse=True)
    assert worker_shares(small, 16, 3) == pytest.approx(expected)


@settings(deadline=None, max_examples=15)
@given(per_day=st.integers(1, 10**12), lanes=st.sampled_from([64, 512]), workers=st.integers(1, 64))
def test_shares_of_workers_are_the_whole(per_day: int, lanes: int, workers: int) -> None:
    given = load(per_day)
    shares = worker_shares(given, lanes, workers)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] >= largest_share(given.population, given.exponent)


# --- Batches -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rate=st.floats(0.1, 1e6), fixed=st.floats(1e-5, 0.1), each=st.floats(1e-6, 1e-3), least=st.floats(1, 20))
def test_a_batch_is_what_came_while_the_one_before_was_applied(
    rate: float, fixed: float, each: float, least: float
) -> None:
    def seconds(operations: float) -> float:
        return fixed + each * operations

    found = elastic_batch(rate, seconds, least, 1_000)
    assert least <= found <= 1_000
    if least < found < 1_000:
        assert rate * seconds(found) == pytest.approx(found, rel=1e-3, abs=1e-3)
    elif found == least:
        assert rate * seconds(least) <= least
    else:
        assert rate * seconds(1_000) >= 1_000


# --- Plans -------------------------------------------------------------------------------------------

loads = st.builds(
    Load,
    per_day=st.integers(1, 10**10),
    profile=st.builds(
        lambda hour, minute, second: Profile(hour, hour * minute, hour * minute * second, ""),
        st.floats(1, 4), st.floats(1, 6), st.floats(1, 6),
    ),
    size_for=st.sampled_from(Window),
    single_share=st.floats(0, 1),
    accounts=st.integers(0, 10**7),
    exponent=st.floats(0, 1.5),
    events=st.floats(0, 2),
    linger_seconds=st.floats(0, 1),
)  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(load=loads)
def test_a_plan_carries_its_load(load: Load) -> None:
    machines = Machines()
    found = plan(load, MEASURED, machines)
    assert found.workers * found.worker_per_s * machines.utilisation >= found.peak_per_s * 0.999_999
    assert found.lanes >= min(MAX_LANES, LANES_PER_WORKER * found.workers)
    assert found.lanes & (found.lanes - 1) == 0
    assert found.postgres_cores <= found.postgres_nodes * machines.postgres_cores * 1.000_001
    assert found.wal_mb_per_s <= found.postgres_nodes * machines.wal_mb_per_s * machines.utilisation * 1.000_001
    assert found.workers <= found.postgres_nodes * machines.connections
    assert 1 <= found.batch_at_mean <= found.batch_at_peak * 1.000_001 <= BATCH_OPERATIONS * 1.000_001
    assert found.batch_at_peak / found.operations_per_message <= BATCH_MESSAGES * 1.01
    if found.database == ONE_BOX:
        assert found.worker_cores + found.postgres_cores + found.broker_cores <= machines.box_cores
    if found.broker == RABBITMQ:
        assert found.broker_nodes >= 3
    else:
        assert found.broker_cores <= 1
    rates = [limit.per_second for limit in found.limits]
    assert rates == sorted(rates)
    assert all(rate > 0 for rate in rates)
    assert found.notes


@settings(deadline=None, max_examples=10)
@given(per_day=st.integers(1, 10**10), times=st.integers(2, 20))
def test_more_needs_no_less(per_day: int, times: int) -> None:
    less, more = plan(load(per_day)), plan(load(per_day * times))
    assert more.lanes >= less.lanes
    assert more.postgres_nodes >= less.postgres_nodes
    assert more.stored_gb_per_day == pytest.approx(times * less.stored_gb_per_day)
    if more.database == less.database:
        assert more.workers >= less.workers


def test_the_design_changes_where_it_is_said() -> None:
    found = changes(load(1))
    assert found[0].database == ONE_BOX
    assert found[-1].database == CITUS
    assert [step.per_day for step in found] == sorted({step.per_day for step in found})
    for before, after in pairwise(found):
        under, over = plan(load(round(after.per_day * 0.99))), plan(load(round(after.per_day * 1.01)))
        assert (under.database, under.broker) == (before.database, before.broker)
        assert (over.database, over.broker) == (after.database, after.broker)


def test_a_smaller_machine_is_outgrown_sooner() -> None:
    given = load(10**8)
    assert plan(given).database == ONE_BOX
    assert plan(given, machines=Machines(box_cores=1)).database == "one Postgres"
    tiny = plan(given, machines=Machines(box_cores=1, wal_mb_per_s=10))
    assert tiny.database == CITUS
    assert tiny.postgres_nodes >= plan(given).wal_mb_per_s / (10 * 0.7)


def test_one_box_is_one_with_redis() -> None:
    alone = load(10**8, single_share=1.0)
    assert plan(alone, machines=Machines(box_cores=1_000)).database == ONE_BOX
    busier = plan(replace(alone, per_day=10**9), machines=Machines(box_cores=1_000))
    assert (busier.database, busier.broker) == (CITUS, RABBITMQ)
    assert not any("linger" in note for note in busier.notes)  # nothing of it is buffered
    assert any("linger of" in note for note in plan(load(10**10)).notes)


def test_an_account_that_one_process_cannot_carry_is_named() -> None:
    assert not plan(load(10**9, accounts=1)).hot_lane_fits
    said = " ".join(plan(load(10**9, accounts=1)).notes)
    assert "busiest account has 100.00% of all operations" in said
    assert plan(load(10**9)).hot_lane_fits


@pytest.mark.parametrize("broken", [{"per_day": 0}, {"single_share": 1.5}, {"accounts": -1}])
def test_a_load_of_nothing_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(CapacityError, match="at least one operation"):
        plan(replace(load(1), **broken))


def test_cores_that_are_shared_are_the_limit_when_there_are_workers_enough() -> None:
    batch = Batch(1_000, 50, 0, 300)
    lines = (MEASURED.producer_us, MEASURED.worker_us, MEASURED.postgres_us, MEASURED.broker_us)
    each = sum(line.per_operation(batch) for line in lines)
    assert rate_of_cores(MEASURED, batch, 2, 100) == pytest.approx(2e6 / each)
    assert rate_of_cores(MEASURED, batch, 100, 1) == pytest.approx(1e6 * 1_000 / MEASURED.service_us(batch))


# --- The simulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("utilisation", [0.3, 0.7, 0.85])
def test_with_batches_of_one_it_waits_as_queueing_theory_has_it(utilisation: float) -> None:
    # M/D/1: Poisson arrivals, one server, always as long for each (Pollaczek and Khinchine).
    service = 0.01
    rate = utilisation / service
    times = arrivals(random.Random(11), [rate], 150_000 / rate)
    found = serve(times, [1] * len(times), lambda operations, messages: service, 150_000 / rate, 1, 1)
    expected = utilisation * service / (2 * (1 - utilisation))
    assert sum(found.waited) / len(found.waited) == pytest.approx(expected, rel=0.05)
    assert found.busy_seconds / (150_000 / rate) == pytest.approx(utilisation, rel=0.02)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.5, 200),
    fixed=st.floats(0.001, 1),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    most_messages=st.integers(1, 9),
    most_operations=st.integers(12, 40),
)
def test_nothing_is_lost_and_nobody_overtakes(
    seed: int, rate: float, fixed: float, sizes: list[int], most_messages: int, most_operations: int
) -> None:
    times = arrivals(random.Random(seed), [rate, 0.0, rate / 2], 2.0)
    operations = [sizes[number % len(sizes)] for number in range(len(times))]
    taken: list[tuple[int, int]] = []

    def took(operations: int, messages: int) -> float:
        taken.append((operations, messages))
        return fixed

    found = serve(times, operations, took, 6.0, most_messages, most_operations)
    assert found.arrived == sum(operations) == found.served + found.waiting
    done = len(found.waited)
    assert found.served == sum(operations[:done])
    assert found.depths[-1] == found.waiting
    assert min(found.depths) >= 0
    assert 0 <= found.busy_seconds <= 6.0 + 1e-9
    assert all(count <= most_messages and size <= most_operations for size, count in taken)
    begins = [time + wait for time, wait in zip(times, found.waited, strict=False)]
    assert begins == pytest.approx(sorted(begins))
    assert all(wait >= 0 for wait in found.waited)
    assert list(found.answered) == pytest.approx([wait + fixed for wait in found.waited])


def test_batches_grow_to_what_the_model_says() -> None:
    given = load(10**8, single_share=0.0)
    workers = Workers(MEASURED, given, 3, 0.5, 0.0)
    took = ServiceTime(workers)
    for part in (0.3, 0.6, 0.8):
        rate = part * workers.rate
        times = arrivals(random.Random(5), [rate * 0.5], 30.0)
        found = serve(times, [2] * len(times), took, 30.0)
        assert found.served / found.batches == pytest.approx(workers.elastic(rate * 3).operations, rel=0.15)


def test_a_backlog_is_applied_at_the_rate_of_full_batches() -> None:
    workers = Workers(MEASURED, load(10**8, single_share=0.0), 3, 0.5, 0.0)
    took = ServiceTime(workers)
    for operations in (2, 38, 400, 1_000):
        expected = MEASURED.service_us(workers.batch(operations)) / 1e6
        assert took(operations, operations // 2) == pytest.approx(expected, rel=0.01)
    found = serve([0.0] * 200_000, [2] * 200_000, took, 10.0)
    assert found.served / 10.0 == pytest.approx(workers.rate, rel=0.02)
    assert found.waiting > 0


def test_a_backlog_drains_by_what_is_left_of_the_rate() -> None:
    def took(operations: int, messages: int) -> float:
        return 0.1

    draw = random.Random(2)
    assert drain(draw, 3_600_000, 4_000, took, 1_000, 1.0) == pytest.approx(3_600_000 / (10_000 - 4_000), rel=0.02)
    assert drain(draw, 3_600_000, 10_500, took, 1_000, 1.0) is None
    assert drain(draw, 500, 4_000, took, 1_000, 1.0) == 0


def test_a_simulation_is_the_same_by_its_seed_and_keeps_count() -> None:
    given = load(2_000_000)
    choice = choose(given, MEASURED, Machines())
    told: list[tuple[int, int]] = []
    first = simulate(given, choice, 7, lambda done, total: told.append((done, total)))
    assert first == simulate(given, choice, 7)
    assert first != simulate(given, choice, 8)
    assert told[-1][0] == told[-1][1]
    assert first.arrived == first.served + first.waiting
    expected = given.mean * PEAKS.minute / BUSIEST_MINUTE * sum(BURSTS) / len(BURSTS) / 25.667 * 600
    assert first.arrived == pytest.approx(expected, rel=0.03)
    assert 0 <= first.waited_p50_ms < first.waited_p99_ms < first.answered_p99_ms <= first.busiest_p99_ms
    assert first.answered_p50_ms >= MEASURED.service_us(Batch(1, 1, 0, 1)) / 1e3
    assert first.drain_seconds is not None
    assert len(first.utilisation) == first.workers == first.workers_simulated == 1


def test_a_few_workers_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.capacity_simulation.MESSAGES", 1)
    given = load(3 * 10**7)
    choice = choose(given, MEASURED, Machines(box_cores=1, utilisation=0.05))
    assert choice.sized.workers.count > 3
    found = simulate(given, choice)
    assert found.workers_simulated == 3
    assert found.arrived == found.served + found.waiting
    assert found.utilisation == sorted(found.utilisation, reverse=True)


# --- The command -------------------------------------------------------------------------------------


def command(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["capacity", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


def test_the_command_shows_three_loads_and_where_the_design_changes() -> None:
    shown = command()
    assert "1 M a day" in shown
    assert "10 B a day" in shown
    assert "The design changes" in shown
    assert "one Postgres, Redis" in shown
    assert "busiest account" in shown
    assert "simulated" not in shown


def test_the_command_simulates() -> None:
    shown = command("--per-day", "500_000", "--simulate", "--peak-factor", "3")
    assert "The busiest ten minutes of 500 k a day, simulated" in shown
    assert "caught up in" in shown
    assert "(as given)" in shown


def test_the_command_speaks_to_programs(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures(sizes={})))
    arguments = ("--per-day", "2.5M", "--per-day", "400k", "--bench", str(path), "--simulate", "--json")
    told = json.loads(command(*arguments))
    assert [one["per_day"] for one in told["plans"]] == [2_500_000, 400_000]
    assert told["plans"][0]["limits"][0].keys() == {"part", "per_second", "per_day", "why"}
    assert told["costs"]["postgres_us"]["transaction"] > 0
    assert len(told["absent"]) == 1
    assert [one["workers_simulated"] for one in told["simulations"]] == [1, 1]
    assert told["changes"][0]["per_day"] == 1
    assert "sizes.bytes_per_operation is not in" in CliRunner().invoke(
        app, ["capacity", "--bench", str(path)]
    ).stderr.replace("\n", "")  # fmt: skip


def test_the_command_reads_the_peaks_of_a_usage_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.csv"
    rows = "".join(f"2026-03-01T12:{number // 60:02d}:{number % 60:02d}Z\n" for number in range(600) for _ in range(9))
    path.write_text("time\n" + rows + "2026-03-01T12:05:00Z\n" * 600)
    told = json.loads(command("--per-day", "1M", "--usage", str(path), "--json"))
    assert told["loads"][0]["profile"]["source"] == str(path)
    peaks = told["loads"][0]["profile"]
    assert peaks["second"] > 20 * peaks["hour"]
    assert peaks["minute"] < 3 * peaks["hour"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--per-day", "many"], "is no number from 1 to"),
        (["--per-day", "0"], "is no number from 1 to"),
        (["--per-day", "99999B"], "is no number from 1 to"),
        (["--bench", "/nowhere/figures.json"], "/nowhere/figures.json cannot be read"),
        (["--usage", "/nowhere/usage.csv"], "cannot be read"),
        (["--size-for", "year"], "'year'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], sentence: str) -> None:
    assert sentence in " ".join(command(*arguments, code=2).replace("│", "").split())
