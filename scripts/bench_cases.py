"""The cases of the bench, each with its goal.

To add one: write a function that takes a :class:`scripts.bench_harness.Bench` and gives a
:class:`scripts.bench_figures.Sample`, and name it in :data:`CASES`; what it is compared with is in
:mod:`scripts.bench_peers`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from scripts.bench_figures import BenchError, Bound, Sample, Step
from scripts.bench_harness import FEATURE, MEMBERS, POOL, QUANTITY, Bench, Lanes, Operation
from scripts.bench_long import measure_grow, measure_memory, measure_month
from scripts.bench_mix import measure_mix
from scripts.bench_peers import ANSWER_SECONDS, PEERS
from scripts.bench_processes import Loaders
from scripts.bench_streams import measure_backlog, measure_stream

LOAD = 3
"""``answer_loaded`` has one part in so many of the load that ``single`` shows to be possible."""


def measure_publish(bench: Bench) -> Sample:
    """``client.consume``, fire and forget, in one process; the workers wait meanwhile, and apply it after."""
    with bench.lanes() as side:
        operations = side.sent(bench.operations("publish", bench.sizes.publish))
        side.workers.hold()
        consume = side.client.consume
        with bench.metered(len(operations)) as costs, costs.producing():
            started = time.perf_counter()
            for account, operation, _ in operations:
                consume(account, feature=FEATURE, quantity=QUANTITY, id=operation)
            seconds = time.perf_counter() - started
        if side.waiting() != len(operations):
            raise BenchError(f"{len(operations):,} messages were confirmed and {side.waiting():,} are in the lanes.")
        side.workers.release()
    return Sample(len(operations) / seconds, **costs.as_fields)


def measure_single(bench: Bench) -> Sample:
    """One message per operation, events and results on."""
    with bench.lanes() as side:
        return measure_backlog(bench, side, bench.operations("single", bench.sizes.single))


def measure_metering(bench: Bench) -> Sample:
    """Spread over all accounts."""
    with bench.lanes() as side:
        return measure_stream(bench, side, bench.operations("metering", bench.sizes.metering))


def measure_hot(bench: Bench) -> Sample:
    """All on one pool account, by its members in turn."""
    with bench.lanes() as side:
        operations: list[Operation] = [
            (POOL, f"hot-{index}", f"member_{index % MEMBERS}") for index in range(bench.sizes.metering)
        ]
        return measure_stream(bench, side, operations)


def answered(bench: Bench, side: Lanes) -> list[float]:
    """Consume and wait for the answer, one after the other; returns how many seconds each took."""
    latencies = []
    operations = side.sent(bench.operations("answer", bench.sizes.answer))
    # The first call opens the connections, and the answers' subscription.
    for account, operation, _ in side.sent([(POOL, f"first-{number}", None) for number in range(5)]):
        side.client.consume(account, feature=FEATURE, quantity=QUANTITY, id=operation, wait=ANSWER_SECONDS)
    for number, (account, operation, _) in enumerate(operations):
        started = time.perf_counter()
        result = side.client.consume(account, feature=FEATURE, quantity=QUANTITY, id=operation, wait=ANSWER_SECONDS)
        latencies.append(time.perf_counter() - started)
        if result is None or not result.applied:
            raise BenchError(f"{operation} was not applied: {result}")
        bench.show.advance(number, len(operations))
    return latencies


def measure_answer(bench: Bench) -> Sample:
    """With nothing else to do."""
    with bench.lanes() as side, bench.metered(bench.sizes.answer, side.workers) as costs, costs.producing():
        latencies = answered(bench, side)
    return Sample.of_latencies(latencies, **costs.as_fields)


def measure_answer_loaded(bench: Bench) -> Sample:
    """While another process sends a third of what was possible a moment ago, one message each."""
    with bench.lanes() as side:
        order = {
            "kind": "stream",
            "broker": bench.stack.broker_url,
            "lanes": side.client.lanes,
            "accounts": bench.accounts,
            "per_second": bench.rates["single"] / LOAD,
        }
        with Loaders(bench.stack.directory, [order]) as loaders:
            loaders.begin()
            latencies = answered(bench, side)
            (told,) = loaders.end(ask=True)
        accounts = bench.accounts
        side.sent([(accounts[number % len(accounts)], f"stream-{number}", None) for number in range(told["sent"])])
    return Sample.of_latencies(latencies, note=f"beside {told['sent'] / told['seconds']:,.0f} operations a second")


CASES = {
    step.name: step
    for step in (
        Step(
            "publish",
            "client.consume, fire and forget, in one process",
            measure_publish,
            (Bound("ops_per_s", "≥", 3, "apply_async"),),
        ),
        Step(
            "single",
            "consumes waiting in the queue, one message each",
            measure_single,
            (Bound("ops_per_s", "≥", 10, "naive"),),
            beside=("broker",),
        ),
        Step(
            "metering",
            "consumes through buffer(), spread over the accounts",
            measure_metering,
            (
                Bound("ops_per_s", "≥", 40, "naive"),
                Bound("ops_per_s", "≥", 2, "sql"),
                Bound("ops_per_s", "≥", 0.5, "copy"),
            ),
            beside=("broker_batch",),
        ),
        Step(
            "hot",
            "as metering, all on one pool account",
            measure_hot,
            (Bound("ops_per_s", "≥", 0.9, "metering"),),
        ),
        Step(
            "answer",
            "consume and wait for the answer, one after the other",
            measure_answer,
            (Bound("p99_ms", "<", 50), Bound("p50_ms", "<", 5, "celery")),
        ),
        Step(
            "answer_loaded",
            "the same, while another process sends a third of what single gave",
            measure_answer_loaded,
            (Bound("p99_ms", "<", 50), Bound("p50_ms", "<", 5, "celery")),
            after=("single",),
        ),
        Step(
            "mix",
            "a usage trace as consumes, holds with captures and releases, refunds and grants through buffer(); accounts"
            " with five grants",
            measure_mix,
            (Bound("ops_per_s", "≥", 20, "naive"),),
        ),
        Step(
            "grow",
            "as metering, in a ledger that has 1,000,000 accounts and 10,000,000 entries already",
            measure_grow,
            (Bound("ops_per_s", "≥", 0.9, "metering"),),
            once=True,
        ),
        Step(
            "month",
            "the sweep over 1,000,000 idle accounts whose period ends at one instant: each is renewed and carries what"
            " is left",
            measure_month,
            (Bound("ops_per_s", "≥", 5_000), Bound("memory_ratio", "≤", 1.1)),
            once=True,
        ),
        Step(
            "memory",
            "as metering, 1,000,000 operations; the workers' resident memory, early is after 50,000",
            measure_memory,
            (Bound("memory_ratio", "≤", 1.1), Bound("memory_mib", "≤", 200)),
            once=True,
        ),
    )
}
"""What is measured, with its goal."""


def plan(cases: Sequence[str]) -> list[Step]:
    """What a round measures: the cases and all that they need to be measured before or compared with, each once."""
    wanted: list[str] = []
    for case in cases:
        wanted += [*CASES[case].against, *CASES[case].after, case]
    return [(CASES | PEERS)[name] for name in dict.fromkeys(wanted)]
