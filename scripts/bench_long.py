"""The cases that take minutes: a ledger that has grown, the first of a month, and the workers' memory."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from models.migrate import upgrade
from schedules.expiry import settle_id
from scripts.bench_figures import Sample
from scripts.bench_grow import fill, fill_subscribed
from scripts.bench_harness import POOL, READY_SECONDS, Bench, account_names, opening, sender
from scripts.bench_streams import Memory, measure_stream
from scripts.run_stack import ROOT, wait_for

EARLY = 20
"""``month`` looks at memory first when one part in so many is done."""

MAINTENANCE = "maintenance"
"""The queue of the sweep; its own module is for those who are a worker."""

CATALOG, PLAN = ROOT / "scripts" / "bench_month.toml", "monthly"


@contextmanager
def grown_ledger(bench: Bench, accounts: int, entries: int) -> Iterator[str]:
    """A ledger with a past, dropped in the end; the bench's own accounts are among those of it."""
    url = bench.stack.create_database("grown")
    upgrade(url)
    fill(url, max(accounts, bench.sizes.accounts), max(accounts, entries), bench.show.advance)
    yield url
    bench.stack.postgres.drop_database("grown")


def measure_grow(bench: Bench) -> Sample:
    """As ``metering``, with many more accounts and entries beside."""
    with (
        grown_ledger(bench, bench.sizes.grow_accounts, bench.sizes.grow_entries) as url,
        bench.lanes(database_url=url) as side,
    ):
        return measure_stream(bench, side, bench.operations("grow", bench.sizes.metering))


def measure_month(bench: Bench) -> Sample:
    """The sweep over subscribers whose period ends at one instant, until the last is renewed."""
    names = account_names(bench.sizes.month)
    url = bench.stack.create_database("month")
    upgrade(url)
    due_at = fill_subscribed(url, len(names), str(CATALOG), PLAN, bench.show.advance)
    bench.write(url, opening([POOL]))
    catalog = {"CREDITLANE_CATALOG": str(CATALOG)}
    with (
        bench.lanes(database_url=url, whole=True, accounts=[POOL], environment=catalog) as side,
        sender(bench.stack.broker_url) as app,
    ):
        queues = ["--pool", "threads", "--concurrency", "1", "-Q", MAINTENANCE]
        side.workers.start("general", ["-A", "workers.app", "worker", *queues])
        general = f"general@{socket.gethostname()}"
        wait_for(
            lambda: bool(app.control.ping([general], timeout=1.0)),
            side.workers.check,
            READY_SECONDS,
            "The general worker did not come up",
        )
        side.sent([(account, settle_id(due_at, 3), None) for account in names])
        memory = Memory(side.workers.pids, len(names) // EARLY)
        first = side.written()
        with bench.metered(len(names), side.workers) as costs:
            started = datetime.now(UTC).timestamp()
            app.send_task("schedules.expiry", queue=MAINTENANCE, ignore_result=True)
            side.wait_until_quiet(len(names), first=first, all_of_them=True, watch=memory.look)
        seconds = side.last_commit() - started
        sample = Sample(len(names) / seconds, **costs.as_fields, **memory.as_fields)
    bench.stack.postgres.drop_database("month")
    return sample


def measure_memory(bench: Bench) -> Sample:
    """As ``metering``, with as many operations as show whether workers keep anything."""
    with bench.lanes() as side:
        memory = Memory(side.workers.pids, bench.sizes.memory_early)
        sample = measure_stream(bench, side, bench.operations("memory", bench.sizes.memory), memory.look)
        return replace(sample, **memory.as_fields)
