"""The chart of the bench: how throughput depends on the size of batches, on how many accounts there are, and on how
much there is already.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from creditlane.lanes import LANES, lane_of
from scripts.bench_figures import Sample, Spread
from scripts.bench_harness import FEATURE, QUANTITY, Bench, Operation, account_names, opening
from scripts.bench_long import grown_ledger
from scripts.bench_streams import measure_stream
from scripts.bench_svg import Panel, Point, draw

BATCHES = (1, 10, 100, 500, 1_000)
"""Operations in one message and transaction."""

MESSAGES = 4_000
"""The most messages of one batch size that are measured."""

ACCOUNTS = (1, 100, 10_000, 100_000)

POINTS = len(BATCHES) + len(ACCOUNTS) + 2
"""How many there are to measure."""

LINGER_MS = 3_600_000
"""Longer than filling takes: a message goes out when it is full."""

CROWD = "chart_template"
"""The ledger with as many accounts as there are at the most."""

TITLE = "Operations applied per second, two lane workers"


def measure_batches(bench: Bench, size: int) -> Sample:
    """Messages of so many operations that wait in the lanes, each a transaction."""
    number = max(1, min(MESSAGES, bench.sizes.metering // size))
    operations = list(islice(by_lane(bench, size), number * size))
    with bench.lanes(environment={"CREDITLANE_BATCH_MESSAGES": "1"}) as side:
        side.sent(operations)
        side.workers.hold()
        with side.client.buffer(linger_ms=LINGER_MS, max_operations=size) as buffer:
            for account, operation, _ in operations:
                buffer.consume(account, feature=FEATURE, quantity=QUANTITY, id=operation)
        started = side.workers.release()
        side.wait_until_quiet(len(operations))
        return Sample(len(operations) / (side.last_commit() - started))


def by_lane(bench: Bench, size: int) -> Iterator[Operation]:
    """Operations without end, each so many in a row of one lane: so they fill one message after the other."""
    accounts: dict[str, list[str]] = {}
    for account in bench.accounts:
        accounts.setdefault(lane_of(account, LANES), []).append(account)
    draw = random.Random(bench.round)  # noqa: S311 - to be repeatable is its purpose
    number = 0
    while True:
        for names in accounts.values():
            for account in draw.choices(names, k=size):
                yield account, f"batch-{number}", None
                number += 1


def measure_accounts(bench: Bench, accounts: int) -> Sample:
    """As ``metering``, over so many of the accounts of one large ledger."""
    names = account_names(accounts)
    with bench.lanes(CROWD, accounts=names) as side:
        return measure_stream(bench, side, bench.operations("accounts", bench.sizes.metering, names))


def measure_tables(bench: Bench, url: str) -> Sample:
    """As ``metering``, in a ledger that holds entries already."""
    with bench.lanes(database_url=url) as side:
        return measure_stream(bench, side, bench.operations(f"tables-{bench.round}", bench.sizes.metering))


def measure_chart(bench: Bench, runs: int) -> list[Panel]:
    """Measure all points.

    :param runs: how often each.
    """

    def point(label: str, title: str, measure: Callable[[], Sample]) -> Point:
        rates = []
        for number in range(1, runs + 1):
            bench.round = number
            with bench.show.working(title):
                sample = measure()
            bench.show.measured(title, sample)
            rates.append(sample.ops_per_s)
        spread = Spread.of(rates)
        return Point(label, spread.median, spread.min, spread.max)

    batches = [
        point(f"{size:,}", f"{size:,} operations a batch", partial(measure_batches, bench, size)) for size in BATCHES
    ]
    with bench.show.working(f"opening {max(ACCOUNTS):,} accounts"):
        bench.make_ledger(CROWD, opening(account_names(max(ACCOUNTS))))
    accounts = [
        point(f"{number:,}", f"{number:,} accounts", partial(measure_accounts, bench, number)) for number in ACCOUNTS
    ]
    usual = accounts[ACCOUNTS.index(10_000)]
    tables = [Point("none", usual.value, usual.low, usual.high)]
    for entries in (bench.sizes.grow_entries // 10, bench.sizes.grow_entries):
        title = f"{entries:,} entries"
        with bench.show.working(f"a ledger with {title}"), grown_ledger(bench, max(ACCOUNTS), entries) as url:
            tables.append(point(short(entries), title, partial(measure_tables, bench, url)))
    return [
        Panel("Batch size", "operations in one transaction", batches),
        Panel("Accounts", "accounts that are charged", accounts),
        Panel("Ledger size", "entries that are there already", tables),
    ]


def short(number: int) -> str:
    """A large number in a few characters, such as ``10 M``."""
    return f"{number / 10**6:g} M" if number >= 10**6 else f"{number:,}"


def as_svg(panels: list[Panel], system: str) -> str:
    """The chart.

    :param system: what it was measured on.
    """
    return draw(f"{TITLE} ({system})", "operations per second", panels)
