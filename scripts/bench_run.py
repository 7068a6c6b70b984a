"""How fast creditlane is on this machine, beside what one would write without it.

Called by ``scripts/bench``. Everything runs on a stack of its own that is removed in the end. A run of the whole
is made of rounds; each round measures every case and every peer once, so that what else the machine does at the
time meets all of them alike, and ratios are taken within a round.

To add a case or a peer: write a function that takes a :class:`Bench` and gives a :class:`Sample`, and name it in
:data:`CASES` or :data:`PEERS`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Annotated, Any
from uuid import uuid4

import psycopg
import redis
import typer
from celery import Celery
from celery.exceptions import CeleryError
from kombu.exceptions import KombuError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from creditlane.amounts import format_amount
from creditlane.client import CreditClient, _shown, checked, task_message
from creditlane.codes import Code
from creditlane.contract import decode_message
from creditlane.errors import CreditlaneError
from creditlane.lanes import LANES, lane_name, lane_of
from creditlane.sending import Outgoing
from models.audit import audit
from models.catalog import load_catalog
from models.migrate import upgrade
from scripts import bench_naive
from scripts.embedded import Stack, StackError, last_lines, open_log, spawn, start_stack, temporary_directory
from scripts.run_stack import ROOT, Signals, Stopped, child_environment, shared_lanes, wait_for
from workers.ledger_writer import Job, LedgerWriter, connect
from workers.quarantine import Quarantined
from workers.redis_lanes import keys_of

CATALOG = "metering"
FEATURE, QUANTITY = "completion", 1
"""What every operation charges: one credit."""

GRANTED_MICRO = 10**15
"""What each account has, in micro-credits: nothing is refused."""

POOL = "pool"
MEMBERS = 1_000
"""Members who share the one account of ``hot``."""

WORKERS = 2
"""Lane workers."""

LEDGER_TEMPLATE = "ledger_template"
LANE_BROKER, NAIVE_BROKER, PUBLISH_BROKER = 0, 1, 2
"""The Redis databases of the lanes, of the naive tasks, and of what is only published."""

READY_SECONDS = 60.0
"""How long workers may take to be up."""

PATIENCE_SECONDS = 60.0
"""How long nothing may be applied before a measurement is given up."""

STOP_SECONDS = 15.0
"""How long workers have to end."""

ANSWER_SECONDS = 30.0
"""How long one answer may take."""

POLL_SECONDS = 0.1
"""How often a measurement looks for its end; when that was is what the commits say, not when it was seen."""

FILL = 500
"""Messages that go into a queue in one round trip where filling it is not what is measured."""

WRONG_SHOWN = 5

# A log has no width: there the table gets what it needs.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False)


class BenchError(RuntimeError):
    """A figure that cannot stand: something was lost, doubled or refused, or did not come."""


FAILURES = (
    BenchError, StackError, CreditlaneError, CeleryError, KombuError, psycopg.Error, redis.RedisError, OSError,
)  # fmt: skip
"""What ends the bench with a sentence and exit code 1."""


# --- Statistics --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several runs, the least and the most of them."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def as_json(self) -> dict[str, float]:
        """As it stands in the report, to five digits."""
        return {"median": rounded(self.median), "min": rounded(self.min), "max": rounded(self.max)}


def rounded(value: float) -> float:
    """A figure to five digits: no measurement here is more exact."""
    return float(f"{value:.5g}")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that so many percent of them do not exceed (nearest rank).

    :param percent: above 0, at most 100.
    """
    ranked = sorted(values)
    rank = -(-len(ranked) * percent // 100)
    return ranked[max(0, int(rank) - 1)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The ratio round by round: each to what was measured in the same round."""
    return Spread.of(own / other for own, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measurement of a case or peer gave."""

    ops_per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None

    @classmethod
    def of_latencies(cls, seconds: Sequence[float]) -> Sample:
        """Of operations that were made one after the other, from how many seconds each took."""
        return cls(len(seconds) / sum(seconds), percentile(seconds, 50) * 1000, percentile(seconds, 99) * 1000)


# --- What is measured --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bound:
    """One condition of a goal, on medians."""

    figure: str
    """A field of :class:`Sample`."""
    sign: str
    """``≥`` or ``<``."""
    limit: float
    against: str | None = None
    """The peer or case that the limit is a multiple of; None for a limit as it stands."""

    def __str__(self) -> str:
        name = "" if self.figure == "ops_per_s" else self.figure.removesuffix("_ms") + " "
        what = f"{self.limit:g} × {self.against}" if self.against else f"{self.limit:g} ms"
        return f"{name}{self.sign} {what}"

    def met(self, results: Results, case: str) -> bool:
        """Whether the measurements are within it."""
        if self.against is None:
            value = results.spread(case, self.figure).median
        else:
            value = results.ratio(case, self.against, self.figure).median
        return value >= self.limit if self.sign == "≥" else value < self.limit


@dataclass(frozen=True, slots=True)
class Step:
    """A case or a peer: a name, what it is, how it is measured."""

    name: str
    what: str
    measure: Callable[[Bench], Sample]
    bounds: tuple[Bound, ...] = ()
    """The goal of a case; what these name is measured beside it."""

    @property
    def goal(self) -> str:
        """The goal in a line."""
        return ", ".join(map(str, self.bounds))

    @property
    def against(self) -> list[str]:
        """What it is compared with, each once."""
        return list(dict.fromkeys(bound.against for bound in self.bounds if bound.against))

    @property
    def figure(self) -> str:
        """What its ratios are of: the latency where that is the goal, else the rate."""
        return next((bound.figure for bound in self.bounds if bound.against), "ops_per_s")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many operations each measurement has."""

    accounts: int = 10_000
    publish: int = 20_000
    single: int = 20_000
    naive: int = 20_000
    metering: int = 200_000
    answer: int = 1_000
    warm: int = 2_000
    """Operations that lane workers have applied before anything is measured."""
    warm_naive: int = 200

    @classmethod
    def quick(cls) -> Sizes:
        """Enough to see where one stands."""
        return cls(publish=5_000, single=10_000, naive=1_500, metering=50_000, answer=300, warm=1_000, warm_naive=100)

    @classmethod
    def each(cls, operations: int) -> Sizes:
        """So many for each measurement, for trying whether everything works."""
        few = operations
        return cls(min(10_000, few), few, few, few, few, few, warm=few, warm_naive=few)


@dataclass
class Results:
    """The samples of every step, round by round."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def add(self, step: str, sample: Sample) -> None:
        """Note a measurement."""
        self.samples.setdefault(step, []).append(sample)

    def values(self, step: str, figure: str) -> list[float]:
        """One figure of all rounds, in the order in which they were."""
        found: list[float | None] = [getattr(sample, figure) for sample in self.samples[step]]
        return [value for value in found if value is not None]

    def spread(self, step: str, figure: str) -> Spread:
        """One figure over all rounds."""
        return Spread.of(self.values(step, figure))

    def ratio(self, step: str, against: str, figure: str) -> Spread:
        """A step's figure as a multiple of another's."""
        return ratios(self.values(step, figure), self.values(against, figure))


# --- Worker processes --------------------------------------------------------------------------------


class Workers:
    """Celery workers that can be held still, so that what waits in a queue waits for a common start."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = environment
        self._all: list[tuple[str, Popen[bytes], Path]] = []

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start a worker, with its output in a log of its own."""
        log = self._logs / f"{name}.log"
        quiet = ("--without-gossip", "--without-mingle", "--loglevel", "WARNING")
        with open_log(log) as stream:
            process = spawn(
                [sys.executable, "-m", "celery", *arguments, *quiet, "-n", f"{name}@%h"],
                log=stream,
                # A worker that is held still would not hear a milder one.
                death_signal=signal.SIGKILL,
                environment=self._environment,
                directory=ROOT,
            )
        self._all.append((name, process, log))

    def check(self) -> None:
        """Make sure that all still run.

        :raises BenchError: naming the one that does not, with the end of its log.
        """
        for name, process, log in self._all:
            if process.poll() is not None:
                raise BenchError(
                    f"The worker {name} ended with code {process.returncode}; the end of its log:\n{last_lines(log)}"
                )

    @property
    def logged(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"{name}:\n{last_lines(log, 30)}" for name, _, log in self._all)

    def hold(self) -> None:
        """Hold them still."""
        self._signal(signal.SIGSTOP)

    def release(self) -> float:
        """Let them go on.

        :returns: when that was, in seconds of the system's clock.
        """
        started = time.time()
        self._signal(signal.SIGCONT)
        return started

    def _signal(self, number: signal.Signals) -> None:
        for _, process, _ in self._all:
            if process.poll() is None:
                process.send_signal(number)

    def stop(self) -> None:
        """End all; one that does not end in time is killed."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for _, process, _ in self._all:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutExpired:
                process.kill()
                process.wait()
        self._all.clear()


# --- The bench ---------------------------------------------------------------------------------------

Operation = tuple[str, str, str | None]
"""One consume: account, operation id, member."""


@dataclass
class Bench:
    """What every measurement works with."""

    stack: Stack
    sizes: Sizes
    show: Show
    round: int = 0
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def accounts(self) -> list[str]:
        """The accounts that operations are spread over."""
        return [f"user_{number:05d}" for number in range(self.sizes.accounts)]

    def operations(self, kind: str, number: int, *, pool: bool = False) -> list[Operation]:
        """Make up operations, the same in every run of the bench.

        :param kind: what their ids begin with.
        :param pool: all on the one pool account, by its members in turn.
        """
        if pool:
            return [(POOL, f"{kind}-{index}", f"member_{index % MEMBERS}") for index in range(number)]
        draw = random.Random(self.round)  # noqa: S311 - to be repeatable is its purpose
        return [
            (account, f"{kind}-{index}", None) for index, account in enumerate(draw.choices(self.accounts, k=number))
        ]

    def prepare(self) -> None:
        """Make the ledger that every measurement begins with: accounts that have credits."""
        with self.show.working("opening accounts"):
            url = self.stack.create_database(LEDGER_TEMPLATE)
            upgrade(url)
            catalog = load_catalog(CATALOG)
            jobs = [
                job
                for account in [*self.accounts, POOL]
                for job in (
                    _job("credits.open", account, {"kind": "pool" if account == POOL else "user"}),
                    _job("credits.grant", account, {"amount": format_amount(GRANTED_MICRO), "source": "bench"}),
                )
            ]
            with connect(url, "creditlane bench") as connection:
                writer = LedgerWriter(connection, lambda: catalog, _unexpected)
                for start in range(0, len(jobs), FILL * 2):
                    writer.write(jobs[start : start + FILL * 2])
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("VACUUM (FREEZE, ANALYZE)")

    @contextmanager
    def database(self, template: str) -> Iterator[str]:
        """A fresh database, dropped when its measurement is done; nobody else's rows are in the way."""
        name = f"bench_{next(self._numbers)}"
        yield self.stack.create_database(name, template=template)
        self.stack.postgres.drop_database(name)

    @contextmanager
    def broker(self, number: int) -> Iterator[str]:
        """The URL of an empty Redis database, emptied again afterwards."""
        url = self.stack.redis.url_of(number)
        with redis.Redis.from_url(url) as connection:
            connection.flushdb()
            yield url
            connection.flushdb()

    @contextmanager
    def lanes(self) -> Iterator[Lanes]:
        """A fresh ledger with lane workers that have shared the lanes and are warm; checked in the end.

        :raises BenchError: when the ledger does not hold exactly what was sent.
        """
        with self.database(LEDGER_TEMPLATE) as database, self.broker(LANE_BROKER) as broker:
            environment = {
                **child_environment(self.stack, CATALOG, LANES),
                "CREDITLANE_BROKER_URL": broker,
                "CREDITLANE_DATABASE_URL": database,
            }
            workers = Workers(self.stack.directory, environment)
            try:
                for number in range(1, WORKERS + 1):
                    workers.start(f"lanes{number}", ["-A", "workers.lane_app", "worker", "--pool", "solo"])
                with (
                    psycopg.connect(database, autocommit=True) as connection,
                    redis.Redis.from_url(broker) as store,
                    CreditClient(broker, lanes=LANES) as client,
                ):
                    side = Lanes(self, workers, connection, store, client)
                    wait_for(
                        lambda: shared_lanes(connection) == (LANES, WORKERS),
                        workers.check,
                        READY_SECONDS,
                        "The lane workers did not share the lanes",
                    )
                    warm = side.sent(self.operations("warm", self.sizes.warm))
                    side.fill(warm)
                    side.wait_until_quiet(len(warm), quiet=True)
                    yield side
                    side.wait_until_quiet(0, quiet=True)
                    workers.check()
                    side.check()
            finally:
                workers.stop()

    @contextmanager
    def naive(self) -> Iterator[Naive]:
        """The naive tasks on fresh tables, with a worker that is warm; checked in the end.

        :raises BenchError: when the tables do not hold exactly what was sent.
        """
        with self.database("template1") as database, self.broker(NAIVE_BROKER) as broker:
            bench_naive.prepare(database, self.accounts, GRANTED_MICRO)
            environment = {
                **child_environment(self.stack, CATALOG, LANES),
                bench_naive.BROKER_VARIABLE: broker,
                bench_naive.DATABASE_VARIABLE: database,
            }
            workers = Workers(self.stack.directory, environment)
            try:
                pool = ["--pool", "prefork", "--concurrency", str(bench_naive.CONCURRENCY), "--task-events"]
                workers.start("naive", ["-A", "scripts.bench_naive", "worker", *pool])
                with (
                    psycopg.connect(database, autocommit=True) as connection,
                    redis.Redis.from_url(broker) as store,
                ):
                    connection.execute("VACUUM (ANALYZE)")
                    side = Naive(self, workers, connection, store, broker)
                    warm = side.sent(self.operations("warm", self.sizes.warm_naive))
                    side.fill(warm)
                    side.wait_until_quiet(len(warm), quiet=True)
                    yield side
                    side.wait_until_quiet(0, quiet=True)
                    workers.check()
                    side.check()
            finally:
                workers.stop()


def _job(name: str, account: str, arguments: dict[str, Any]) -> Job:
    operation = f"{name}-{account}"
    raw = checked(name, operation, {"account": account, **arguments})
    return Job(name, operation, decode_message(name, raw), raw)


def _unexpected(job: Job, code: Code, reason: str, _trace: str | None) -> Quarantined:
    raise BenchError(f"{job.name} of {job.account} could not be prepared ({code}: {reason}).")


class Side:
    """What the lanes and the naive tasks have in common: operations that were sent, and where they end."""

    table: str
    """Where an operation's row is."""

    def __init__(self, bench: Bench, workers: Workers, connection: psycopg.Connection[Any], store: redis.Redis) -> None:
        self.bench = bench
        self.workers = workers
        self.connection = connection
        self.store = store
        self._expected: list[tuple[str, str]] = []

    def sent(self, operations: list[Operation]) -> list[Operation]:
        """Note operations as ones that must be found in the end, exactly once."""
        self._expected += [(account, operation) for account, operation, _ in operations]
        return operations

    def fill(self, operations: list[Operation]) -> None:
        """Put operations into the queue, one message each, with an answer asked for; not what is measured."""
        raise NotImplementedError

    def waiting(self) -> int:
        """How many messages are in the queue or not yet acknowledged."""
        raise NotImplementedError

    def check(self) -> None:
        """Compare what is written with what was sent.

        :raises BenchError: when they are not the same.
        """
        raise NotImplementedError

    def wait_until_quiet(self, operations: int, *, quiet: bool = False) -> None:
        """Wait until no message is left: each is acknowledged only after its commit.

        :param operations: how many are on their way, for the progress.
        :param quiet: show no progress.
        :raises BenchError: when nothing moves any more.
        """
        first = seen = self._written()
        moved = time.monotonic()
        left = -1
        while (waiting := self.waiting()) > 0:
            written = self._written()
            if (written, waiting) != (seen, left):
                seen, left, moved = written, waiting, time.monotonic()
            self.workers.check()
            if time.monotonic() - moved > PATIENCE_SECONDS:
                raise BenchError(
                    f"Nothing was applied for {PATIENCE_SECONDS:.0f} s, and {waiting:,} messages wait;"
                    f" the ends of the workers' logs:\n{self.workers.logged}"
                )
            if not quiet:
                self.bench.show.advance(min(seen - first, operations), operations)
            time.sleep(POLL_SECONDS)

    def _written(self) -> int:
        """About how many rows are written; what the server counts anyway, so that looking costs nothing."""
        row = self.connection.execute(
            "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = %s", (self.table,)
        ).fetchone()
        return int(row[0]) if row else 0

    def last_commit(self) -> float:
        """When the last operation was committed, in seconds of the system's clock, as the server noted it."""
        row = self.connection.execute(
            "SELECT extract(epoch FROM max(pg_xact_commit_timestamp(writer)))::float8"
            f" FROM (SELECT DISTINCT xmin AS writer FROM {self.table} WHERE xmin::text::bigint > 2) AS writers"
        ).fetchone()
        if row is None or row[0] is None:
            raise BenchError("Nothing was committed.")
        return float(row[0])

    def compare(self, found: Sequence[tuple[str, str]]) -> None:
        """Compare operations found with those sent, one by one.

        :raises BenchError: when one is missing, twice there or not one of ours.
        """
        if wrong := difference(self._expected, found):
            raise BenchError(f"What {self.table} holds is not what was sent: {wrong}.")


def difference(sent: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> str:
    """Say how what was found differs from what was sent; an empty text when it does not.

    :param sent: accounts and operation ids, each once.
    :param found: the same, in any order.
    """
    expected, rows = set(sent), set(found)
    if rows == expected and len(found) == len(rows):
        return ""
    missing, more = sorted(expected - rows), sorted(rows - expected)
    return (
        f"{len(sent):,} sent, {len(found):,} there; {len(missing):,} missing {missing[:WRONG_SHOWN]},"
        f" {len(more):,} not sent {more[:WRONG_SHOWN]}, {len(found) - len(rows):,} twice"
    )


class Lanes(Side):
    """Lane workers on a ledger of their own."""

    table = "operations"

    def __init__(
        self,
        bench: Bench,
        workers: Workers,
        connection: psycopg.Connection[Any],
        store: redis.Redis,
        client: CreditClient,
    ) -> None:
        super().__init__(bench, workers, connection, store)
        self.client = client
        self._lists = [key for number in range(LANES) for key in keys_of(lane_name(number))[:2]]

    def fill(self, operations: list[Operation]) -> None:
        """As :meth:`CreditClient.consume` with ``wait`` sends them, many in one round trip, and nobody waits."""
        for start in range(0, len(operations), FILL):
            self.client._sender.send([self._message(*operation) for operation in operations[start : start + FILL]])

    def _message(self, account: str, operation: str, member: str | None) -> Outgoing:
        arguments = {"account": account, "feature": FEATURE, "quantity": str(QUANTITY)}
        if member is not None:
            arguments["member"] = member
        return task_message(
            "credits.consume",
            operation,
            lane_of(account, self.client.lanes),
            checked("credits.consume", operation, arguments),
            _shown(arguments),
            uuid4().hex,
        )

    def waiting(self) -> int:
        """Of all lanes."""
        with self.store.pipeline(transaction=False) as pipe:
            for key in self._lists:
                pipe.llen(key)
            return sum(pipe.execute())

    def check(self) -> None:
        """Every operation applied once, nothing in quarantine, and an audit that finds nothing."""
        rows = self.connection.execute(
            "SELECT account, operation, status FROM operations WHERE name = 'credits.consume'"
        ).fetchall()
        self.compare([(account, operation) for account, operation, _ in rows])
        refused = sum(status != "applied" for _, _, status in rows)
        row = self.connection.execute("SELECT count(*) FROM quarantine").fetchone()
        quarantined = int(row[0]) if row else 0
        if refused or quarantined:
            raise BenchError(f"{refused:,} operations were refused and {quarantined:,} are in quarantine.")
        report = audit(self.connection)
        if not report.holds:
            fault = report.faults[0]
            raise BenchError(
                f"The audit found {report.fault_count:,} faults, such as:"
                f" {fault.account}, {fault.table} {fault.key}: {fault.what}"
            )


class Naive(Side):
    """The naive tasks on tables of their own."""

    table = "naive_operations"

    def __init__(
        self,
        bench: Bench,
        workers: Workers,
        connection: psycopg.Connection[Any],
        store: redis.Redis,
        broker_url: str,
    ) -> None:
        super().__init__(bench, workers, connection, store)
        self.broker_url = broker_url

    def fill(self, operations: list[Operation]) -> None:
        """As ``consume.apply_async`` sends them, answers asked for, and nobody waits."""
        # Without a result backend of its own: with one, the sender would be sent every answer while it measures.
        with sender(self.broker_url) as app, app.producer_pool.acquire(block=True) as producer:
            for start in range(0, len(operations), FILL):
                with producer.batch(max_size=FILL):
                    for account, operation, _ in operations[start : start + FILL]:
                        app.send_task(
                            bench_naive.consume.name,
                            kwargs={
                                "account": account,
                                "operation": operation,
                                "feature": FEATURE,
                                "quantity": str(QUANTITY),
                            },
                            task_id=operation,
                            queue=bench_naive.QUEUE,
                            ignore_result=False,
                            producer=producer,
                        )

    def waiting(self) -> int:
        """Of the queue, and what kombu keeps as unacknowledged."""
        with self.store.pipeline(transaction=False) as pipe:
            pipe.llen(bench_naive.QUEUE)
            pipe.hlen("unacked")
            return sum(pipe.execute())

    def check(self) -> None:
        """Every operation applied once, and each account has what it must have left."""
        rows = self.connection.execute("SELECT account, operation FROM naive_operations").fetchall()
        self.compare(rows)
        row = self.connection.execute(
            "SELECT count(*) FROM naive_accounts a WHERE available_micro <> %s"
            " - coalesce((SELECT sum(amount_micro) FROM naive_operations o WHERE o.account = a.account), 0)",
            (GRANTED_MICRO,),
        ).fetchone()
        if row is None or row[0]:
            raise BenchError(f"{row[0] if row else 'All'} accounts of the naive tasks have a wrong balance.")


@contextmanager
def sender(broker_url: str) -> Iterator[Celery]:
    """A Celery app that only sends."""
    app = Celery("scripts.bench_sender", broker=broker_url, set_as_current=False)
    app.conf.update(task_serializer="json", accept_content=["json"])
    try:
        yield app
    finally:
        app.close()


# --- The measurements --------------------------------------------------------------------------------


def measure_publish(bench: Bench) -> Sample:
    """``client.consume``, fire and forget, in one process; the workers wait meanwhile, and apply it after."""
    with bench.lanes() as side:
        operations = side.sent(bench.operations("publish", bench.sizes.publish))
        side.workers.hold()
        consume = side.client.consume
        started = time.perf_counter()
        for account, operation, _ in operations:
            consume(account, feature=FEATURE, quantity=QUANTITY, id=operation)
        seconds = time.perf_counter() - started
        if side.waiting() != len(operations):
            raise BenchError(f"{len(operations):,} messages were confirmed and {side.waiting():,} are in the lanes.")
        side.workers.release()
    return Sample(len(operations) / seconds)


def measure_apply_async(bench: Bench) -> Sample:
    """Celery's ``apply_async`` of the same task to the same queues, its answer ignored as well."""
    operations = bench.operations("publish", bench.sizes.publish)
    with bench.broker(PUBLISH_BROKER) as broker, sender(broker) as app:

        @app.task(name="credits.consume", ignore_result=True)
        def consume(account: str, feature: str, quantity: str) -> None:
            """Never run: only its sending is measured."""

        # The first message to a queue declares it; that is not what a service does all day.
        for lane in map(lane_name, range(LANES)):
            consume.apply_async(kwargs={"account": "", "feature": FEATURE, "quantity": "1"}, queue=lane)
        before = _messages(broker)
        started = time.perf_counter()
        for account, operation, _ in operations:
            consume.apply_async(
                kwargs={"account": account, "feature": FEATURE, "quantity": str(QUANTITY)},
                task_id=operation,
                queue=lane_of(account, LANES),
            )
        seconds = time.perf_counter() - started
        if _messages(broker) - before != len(operations):
            raise BenchError(f"{len(operations):,} messages were sent and {_messages(broker) - before:,} are there.")
    return Sample(len(operations) / seconds)


def _messages(broker_url: str) -> int:
    with redis.Redis.from_url(broker_url) as store, store.pipeline(transaction=False) as pipe:
        for number in range(LANES):
            pipe.llen(lane_name(number))
        return sum(pipe.execute())


def measure_backlog(bench: Bench, side: Side, operations: list[Operation]) -> Sample:
    """What waits in the queue, one message each: from the first delivery to the last commit."""
    side.sent(operations)
    side.workers.hold()
    side.fill(operations)
    started = side.workers.release()
    side.wait_until_quiet(len(operations))
    return Sample(len(operations) / (side.last_commit() - started))


def measure_single(bench: Bench) -> Sample:
    """One message per operation, events and results on."""
    with bench.lanes() as side:
        return measure_backlog(bench, side, bench.operations("single", bench.sizes.single))


def measure_naive(bench: Bench) -> Sample:
    """One Celery task and one transaction per operation, events and results on."""
    with bench.naive() as side:
        return measure_backlog(bench, side, bench.operations("naive", bench.sizes.naive))


def measure_stream(bench: Bench, operations: list[Operation]) -> Sample:
    """Through ``buffer()`` while the workers apply: from the first publish to the last commit."""
    with bench.lanes() as side:
        side.sent(operations)
        started = time.time()
        with side.client.buffer() as buffer:
            for account, operation, member in operations:
                buffer.consume(account, feature=FEATURE, quantity=QUANTITY, member=member, id=operation)
        side.wait_until_quiet(len(operations))
        return Sample(len(operations) / (side.last_commit() - started))


def measure_metering(bench: Bench) -> Sample:
    """Spread over all accounts."""
    return measure_stream(bench, bench.operations("metering", bench.sizes.metering))


def measure_hot(bench: Bench) -> Sample:
    """All on one account."""
    return measure_stream(bench, bench.operations("hot", bench.sizes.metering, pool=True))


def measure_answer(bench: Bench) -> Sample:
    """Consume and wait for the answer, one after the other."""
    with bench.lanes() as side:
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
    return Sample.of_latencies(latencies)


def measure_celery(bench: Bench) -> Sample:
    """A Celery task that does nothing, its answer waited for, one after the other."""
    with bench.naive() as side:
        app = bench_naive.configure(side.broker_url)
        latencies = []
        try:
            for number in range(bench.sizes.answer + 5):
                started = time.perf_counter()
                result = bench_naive.nothing.apply_async()
                result.get(timeout=ANSWER_SECONDS)
                result.forget()
                latencies.append(time.perf_counter() - started)
                bench.show.advance(min(number, bench.sizes.answer), bench.sizes.answer)
        finally:
            app.close()
    return Sample.of_latencies(latencies[5:])


PEERS = {
    step.name: step
    for step in (
        Step("apply_async", "Celery's apply_async of the same task, in one process", measure_apply_async),
        Step("naive", "one Celery task and one row-locked transaction per operation", measure_naive),
        Step("celery", "a Celery task that returns at once, waited for", measure_celery),
    )
}
"""What cases are compared with."""

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
        ),
        Step(
            "metering",
            "consumes through buffer(), spread over the accounts",
            measure_metering,
            (Bound("ops_per_s", "≥", 40, "naive"),),
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
    )
}
"""What is measured, with its goal."""


def plan(cases: Sequence[str]) -> list[Step]:
    """What a round measures: the cases and all that they are compared with, each once."""
    wanted: list[str] = []
    for case in cases:
        wanted += [*CASES[case].against, case]
    return [(CASES | PEERS)[name] for name in dict.fromkeys(wanted)]


# --- What is shown -----------------------------------------------------------------------------------


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
        console.print(f"{title}: {shown}", soft_wrap=True)


def shown(spread: Spread, form: str) -> str:
    """A median with its spread."""
    if spread.min == spread.max:
        return form.format(spread.median)
    return f"{form.format(spread.median)} ({form.format(spread.min)}–{form.format(spread.max)})"


def latency(results: Results, step: str) -> str:
    """p50 and p99 of a step in milliseconds; nothing when it has none."""
    if not results.values(step, "p50_ms"):
        return ""
    return "\n".join(shown(results.spread(step, figure), "{:.2f}") for figure in ("p50_ms", "p99_ms"))


def report_table(results: Results, cases: Sequence[str], runs: int) -> Table:
    """The figures of all that was measured, with goals."""
    title = "One run" if runs == 1 else f"Median of {runs} runs (least–most)"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("per second", "p50, p99 in ms", "ratio"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("goal")
    table.add_column("met", justify="center")
    for step in plan(cases):
        rate = shown(results.spread(step.name, "ops_per_s"), "{:,.0f}")
        if step.name not in cases:
            table.add_row(step.name, rate, latency(results, step.name), "", "", "", style="dim")
            continue
        compared = "\n".join(
            f"{shown(results.ratio(step.name, other, step.figure), '{:.2f}')} × {other}" for other in step.against
        )
        verdict = "[green]yes[/]" if met(results, step) else "[red]no[/]"
        table.add_row(step.name, rate, latency(results, step.name), compared, step.goal, verdict)
    return table


def met(results: Results, case: Step) -> bool:
    """Whether a case's goal is reached."""
    return all(bound.met(results, case.name) for bound in case.bounds)


def report_json(results: Results, cases: Sequence[str], versions: Mapping[str, str], runs: int) -> dict[str, Any]:
    """What ``--json`` writes: rates per second, latencies in milliseconds, ratios of medians taken by round.

    A latency's ratio is one of latencies: less is better there.
    """

    def figures(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"ops_per_s": results.spread(name, "ops_per_s").as_json()}
        for figure in ("p50_ms", "p99_ms"):
            measured = results.spread(name, figure) if results.values(name, figure) else None
            found[figure] = None if measured is None else rounded(measured.median)
            if measured is not None:
                found[f"{figure}_spread"] = measured.as_json()
        return found

    peers = {step.name: figures(step.name) for step in plan(cases) if step.name in PEERS}
    told = {}
    for name in cases:
        case = CASES[name]
        spreads = {other: results.ratio(name, other, case.figure) for other in case.against}
        told[name] = {
            **figures(name),
            "ratio": {other: rounded(found.median) for other, found in spreads.items()},
            "ratio_spread": {other: found.as_json() for other, found in spreads.items()},
            "goal": case.goal,
            "met": met(results, case),
        }
    return {"versions": dict(versions), "runs": runs, "peers": peers, "cases": told}


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
            title = step.name if runs == 1 else f"{step.name}, run {number} of {runs}"
            with bench.show.working(title):
                sample = step.measure(bench)
            results.add(step.name, sample)
            bench.show.measured(title, sample)
    return results


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
    operations: Annotated[
        int | None,
        typer.Option(min=1, max=200_000, help="So many operations in every measurement: to try it, not for figures."),
    ] = None,
) -> None:
    """Measure creditlane on this machine beside what one would write without it.

    Starts a PostgreSQL (fsync and synchronous_commit on) and a Redis of its own, measures every case and every
    peer once in each run, and removes all of it. After each measurement the ledger must hold exactly the
    operations that were sent, and pass its audit: if not, the exit code is 1. A goal that is missed is shown, and
    is no failure. Where the time goes within the workers is not part of the figures yet.
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
        if json_path is not None and json_path.is_dir():
            raise typer.BadParameter(f"{json_path} is a directory; --json takes a file")
        if json_path is not None and not os.access(json_path.absolute().parent, os.W_OK):
            raise typer.BadParameter(f"{json_path.absolute().parent} is not a directory that can be written to")
        cases = [name for name in CASES if not case or name in case]
        runs = runs or (1 if quick else 3)
        sizes = Sizes.each(operations) if operations is not None else Sizes.quick() if quick else Sizes()
        steps = plan(cases)
        with temporary_directory() as directory, Show(len(steps) * runs) as show:
            with show.working("starting PostgreSQL and Redis"):
                pass
            with running(directory, signals) as stack:
                bench = Bench(stack, sizes, show)
                versions = versions_of(stack)
                bench.prepare()
                results = measure(bench, steps, runs)
        console.print(", ".join(f"{name} {found}" for name, found in versions.items()), style="dim", soft_wrap=True)
        console.print(report_table(results, cases, runs))
        for step in steps:
            console.print(f"{step.name}: {escape(step.what)}", style="dim", soft_wrap=True)
        if json_path is not None:
            figures = report_json(results, cases, versions, runs)
            json_path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except FAILURES as error:
        told = str(error) if isinstance(error, BenchError | StackError) else f"{type(error).__name__}: {error}"
        errors.print(f"[red]error:[/] {escape(told)}", soft_wrap=True)
        code = 1
    except Stopped:
        code = 130
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="scripts/bench")
