"""What every measurement of the bench works with: fresh ledgers and queues, workers that are warm, and the check that
what is written in the end is what was sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any
from uuid import uuid4

import psycopg
import redis
from celery import Celery

from creditlane.amounts import format_amount
from creditlane.client import CreditClient, _shown, checked, task_message
from creditlane.codes import Code
from creditlane.contract import decode_message
from creditlane.lanes import LANES, lane_name, lane_of
from creditlane.sending import Outgoing
from models.audit import audit
from models.catalog import load_catalog
from models.migrate import upgrade
from scripts import bench_naive
from scripts.bench_figures import BenchError, Sizes
from scripts.bench_processes import Workers, cpu_seconds
from scripts.bench_show import Show
from scripts.embedded import Stack, port_is_free
from scripts.run_stack import child_environment, shared_lanes, wait_for
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

BALANCE_SECONDS = 0.5
"""How often they look whether the lanes are shared evenly, so that they are ready soon."""

METRICS_PORTS = range(20_000, 30_000)
"""Where lane workers serve their metrics: below the ports that systems give to outgoing connections."""

LEDGER_TEMPLATE = "ledger_template"
LANE_BROKER, NAIVE_BROKER, PUBLISH_BROKER = 0, 1, 2
"""The Redis databases of the lanes, of the naive tasks, and of what is only published."""

READY_SECONDS = 60.0
"""How long workers may take to be up."""

PATIENCE_SECONDS = 60.0
"""How long nothing may be applied before a measurement is given up."""

POLL_SECONDS = 0.1
"""How often a measurement looks for its end; when that was is what the commits say, not when it was seen."""

FILL = 500
"""Messages that go into a queue in one round trip where filling it is not what is measured."""

WRONG_SHOWN = 5

Operation = tuple[str, str, str | None]
"""One consume: account, operation id, member."""


class Costs:
    """What a measurement cost, per operation."""

    def __init__(self) -> None:
        self.cpu_us_per_op: dict[str, float] = {}
        self.stages_us_per_op: dict[str, float] = {}
        self._producer_seconds: float | None = None

    @contextmanager
    def producing(self) -> Iterator[None]:
        """Count what this process uses meanwhile as the producer's."""
        started = time.process_time()
        yield
        self._producer_seconds = time.process_time() - started

    def note(self, operations: int, cpu: Mapping[str, float], stages: Mapping[str, float]) -> None:
        """Note what was used, in seconds, for so many operations."""
        if self._producer_seconds is not None:
            self.cpu_us_per_op["producer"] = self._producer_seconds * 1e6 / operations
        self.cpu_us_per_op |= {name: seconds * 1e6 / operations for name, seconds in cpu.items()}
        self.stages_us_per_op = {name: seconds * 1e6 / operations for name, seconds in stages.items()}

    @property
    def as_fields(self) -> dict[str, Any]:
        """As fields of a sample."""
        return {"cpu_us_per_op": self.cpu_us_per_op, "stages_us_per_op": self.stages_us_per_op}


@dataclass
class Bench:
    """What every measurement works with."""

    stack: Stack
    sizes: Sizes
    show: Show
    round: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    """Operations a second of what was measured so far."""
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def accounts(self) -> list[str]:
        """The accounts that operations are spread over."""
        return account_names(self.sizes.accounts)

    def operations(self, kind: str, number: int, accounts: Sequence[str] | None = None) -> list[Operation]:
        """Make up operations, the same in every run of the bench.

        :param kind: what their ids begin with.
        :param accounts: what they are spread over; all unless given.
        """
        draw = random.Random(self.round)  # noqa: S311 - to be repeatable is its purpose
        drawn = draw.choices(self.accounts if accounts is None else accounts, k=number)
        return [(account, f"{kind}-{index}", None) for index, account in enumerate(drawn)]

    def prepare(self) -> None:
        """Make the ledger that every measurement begins with: accounts that have credits."""
        with self.show.working("opening accounts"):
            self.make_ledger(LEDGER_TEMPLATE, opening([*self.accounts, POOL]))

    def make_ledger(self, name: str, jobs: Sequence[Job]) -> str:
        """Create a ledger and write operations to it, without a broker.

        :param name: of its database.
        :returns: its URL.
        """
        url = self.stack.create_database(name)
        upgrade(url)
        self.write(url, jobs)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM (FREEZE, ANALYZE)")
        return url

    def write(self, url: str, jobs: Sequence[Job]) -> None:
        """Write operations to a ledger, without a broker."""
        catalog = load_catalog(CATALOG)
        with connect(url, "creditlane bench") as connection:
            writer = LedgerWriter(connection, lambda: catalog, unexpected)
            for start in range(0, len(jobs), FILL * 2):
                writer.write(jobs[start : start + FILL * 2])
                self.show.advance(start, len(jobs))

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
    def metered(self, operations: int, workers: Workers | Sequence[int] = ()) -> Iterator[Costs]:
        """Count what is used until the block ends.

        :param operations: how many it is for.
        :param workers: who applies them: workers, or other processes by their ids.
        """

        def used() -> tuple[dict[str, float], dict[str, float]]:
            cpu = {
                "database": cpu_seconds([self.stack.postgres.pid]),
                "broker": cpu_seconds([self.stack.redis.pid]),
            }
            if not isinstance(workers, Workers):
                return cpu, {}
            return {**cpu, "workers": cpu_seconds(workers.pids)}, workers.stage_seconds()

        costs = Costs()
        before = used()
        yield costs
        after = used()
        cpu, stages = (
            {name: now[name] - was.get(name, 0) for name in now} for was, now in zip(before, after, strict=True)
        )
        costs.note(operations, cpu, stages)

    @contextmanager
    def lanes(
        self,
        template: str = LEDGER_TEMPLATE,
        *,
        database_url: str | None = None,
        whole: bool = False,
        environment: Mapping[str, str] | None = None,
        accounts: Sequence[str] | None = None,
    ) -> Iterator[Lanes]:
        """A fresh ledger with lane workers that have shared the lanes and are warm; checked in the end.

        :param template: what the ledger is a copy of.
        :param database_url: a ledger that is there, to work in instead of a copy.
        :param whole: audit all of it; else only the accounts that the measurement has touched.
        :param environment: settings of the workers beside the usual ones.
        :param accounts: what the first operations are spread over; all unless given.
        :raises BenchError: when the ledger does not hold exactly what was sent.
        """
        if database_url is None:
            with self.database(template) as copy, self._lanes(copy, environment, accounts, whole=True) as side:
                yield side
        else:
            with self._lanes(database_url, environment, accounts, whole=whole) as side:
                yield side

    @contextmanager
    def _lanes(
        self, database: str, environment: Mapping[str, str] | None, accounts: Sequence[str] | None, *, whole: bool
    ) -> Iterator[Lanes]:
        with self.broker(LANE_BROKER) as broker:
            workers = Workers(self.stack.directory, {**self.environment(database, broker), **(environment or {})})
            try:
                for number in range(1, WORKERS + 1):
                    workers.start(
                        f"lanes{number}", ["-A", "workers.lane_app", "worker", "--pool", "solo"], metrics_port()
                    )
                with (
                    psycopg.connect(database, autocommit=True) as connection,
                    redis.Redis.from_url(broker) as store,
                    CreditClient(broker, lanes=LANES) as client,
                ):
                    side = Lanes(self, workers, connection, store, client, whole=whole)
                    wait_for(
                        lambda: shared_lanes(connection) == (LANES, WORKERS),
                        workers.check,
                        READY_SECONDS,
                        "The lane workers did not share the lanes",
                    )
                    # Of this round: a ledger that is there may have seen those of another.
                    warm = side.sent(self.operations(f"warm-{self.round}", self.sizes.warm, accounts))
                    with side.measured(warm):
                        yield side
            finally:
                workers.stop()

    def environment(self, database: str, broker: str) -> dict[str, str]:
        """The environment of workers on a ledger and a broker."""
        return {
            **child_environment(self.stack, CATALOG, LANES),
            "CREDITLANE_BROKER_URL": broker,
            "CREDITLANE_DATABASE_URL": database,
            "CREDITLANE_BALANCE_SECONDS": str(BALANCE_SECONDS),
        }

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
                    with side.measured(warm):
                        yield side
            finally:
                workers.stop()


def metrics_port() -> int:
    """A free port that no outgoing connection is given while the worker that is to listen there starts."""
    return next(port for port in iter(lambda: random.choice(METRICS_PORTS), None) if port_is_free(port))  # noqa: S311


def account_names(number: int) -> list[str]:
    """The names of so many accounts."""
    return [f"user_{index:05d}" for index in range(number)]


def opening(accounts: Iterable[str], **grant: Any) -> list[Job]:
    """The operations that open accounts and give each of them :data:`GRANTED_MICRO`.

    :param grant: further arguments of the grants.
    """
    amount = {"amount": format_amount(GRANTED_MICRO), "source": "bench", **grant}
    return [
        each
        for account in accounts
        for each in (
            job("credits.open", account, {"kind": "pool" if account == POOL else "user"}),
            job("credits.grant", account, amount),
        )
    ]


def job(name: str, account: str, arguments: Mapping[str, Any], operation: str | None = None) -> Job:
    """One operation for the ledger writer.

    :param operation: its id; from name and account unless given.
    """
    operation = operation or f"{name}-{account}"
    raw = checked(name, operation, {"account": account, **arguments})
    return Job(name, operation, decode_message(name, raw), raw)


def unexpected(job: Job, code: Code, reason: str, _trace: str | None) -> Quarantined:
    """What becomes of an operation of the preparation that cannot be applied: the end of the bench."""
    raise BenchError(f"{job.name} of {job.account} could not be prepared ({code}: {reason}).")


def consume_message(account: str, operation: str, member: str | None, lanes: int) -> Outgoing:
    """A consume as :meth:`CreditClient.consume` with ``wait`` sends it."""
    arguments = {"account": account, "feature": FEATURE, "quantity": str(QUANTITY)}
    if member is not None:
        arguments["member"] = member
    return task_message(
        "credits.consume",
        operation,
        lane_of(account, lanes),
        checked("credits.consume", operation, arguments),
        _shown(arguments),
        uuid4().hex,
    )


def lanes_filled(store: redis.Redis, lists: Sequence[str]) -> int:
    """How many messages are in lists of Redis."""
    with store.pipeline(transaction=False) as pipe:
        for key in lists:
            pipe.llen(key)
        return sum(pipe.execute())


class Side:
    """What the lanes and the naive tasks have in common: operations that were sent, and where they end."""

    table: str
    """Where an operation's row is."""
    kept: tuple[str, ...]
    """The tables to which operations add rows that stay."""

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

    @contextmanager
    def measured(self, warm: list[Operation]) -> Iterator[None]:
        """Have the workers apply some operations before what is measured, and check everything after it.

        :raises BenchError: when what is written is not what was sent.
        """
        self.fill(warm)
        self.wait_until_quiet(len(warm), quiet=True)
        yield
        self.wait_until_quiet(0, quiet=True)
        self.workers.check()
        self.check()

    def wait_until_quiet(
        self,
        operations: int,
        *,
        quiet: bool = False,
        first: int | None = None,
        all_of_them: bool = False,
        watch: Callable[[int], None] = lambda written: None,
    ) -> None:
        """Wait until no message is left: each is acknowledged only after its commit.

        :param operations: how many are on their way, for the progress.
        :param quiet: show no progress.
        :param first: how many rows were written before; as many as now unless given.
        :param all_of_them: wait until so many rows are written, since somebody else still sends.
        :param watch: told every now and then how many rows are written since.
        :raises BenchError: when nothing moves any more.
        """
        first = self.written() if first is None else first
        seen = written = first
        moved = time.monotonic()
        left = -1
        while (waiting := self.waiting()) > 0 or (all_of_them and written - first < operations):
            written = self.written()
            if (written, waiting) != (seen, left):
                seen, left, moved = written, waiting, time.monotonic()
            self.workers.check()
            if time.monotonic() - moved > PATIENCE_SECONDS:
                raise BenchError(
                    f"Nothing was applied for {PATIENCE_SECONDS:.0f} s, and {waiting:,} messages wait;"
                    f" the ends of the workers' logs:\n{self.workers.logged}"
                )
            watch(seen - first)
            if not quiet:
                self.bench.show.advance(min(seen - first, operations), operations)
            time.sleep(POLL_SECONDS)

    def written(self) -> int:
        """About how many rows are written; what the server counts anyway, so that looking costs nothing."""
        row = self.connection.execute(
            "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = %s", (self.table,)
        ).fetchone()
        return int(row[0]) if row else 0

    def stored_bytes(self) -> int:
        """What is kept of operations for ever, with the indexes."""
        row = self.connection.execute(
            "SELECT sum(pg_total_relation_size(relid))::bigint FROM pg_stat_user_tables WHERE relname = ANY(%s)",
            (list(self.kept),),
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
    """Lane workers on a ledger.

    :param whole: the ledger is all of this measurement's making, and is audited whole.
    """

    table = "operations"
    kept = ("operations", "entries")

    def __init__(
        self,
        bench: Bench,
        workers: Workers,
        connection: psycopg.Connection[Any],
        store: redis.Redis,
        client: CreditClient,
        *,
        whole: bool = True,
    ) -> None:
        super().__init__(bench, workers, connection, store)
        self.client = client
        self._lists = [key for number in range(LANES) for key in keys_of(lane_name(number))[:2]]
        self._since = ledger_now(connection)
        self._whole = whole

    def fill(self, operations: list[Operation]) -> None:
        """As :meth:`CreditClient.consume` with ``wait`` sends them, many in one round trip, and nobody waits."""
        for start in range(0, len(operations), FILL):
            self.client._sender.send(
                [consume_message(*operation, self.client.lanes) for operation in operations[start : start + FILL]]
            )

    def waiting(self) -> int:
        """Of all lanes."""
        return lanes_filled(self.store, self._lists)

    def check(self) -> None:
        """Every operation applied once, nothing in quarantine, and an audit that finds nothing."""
        self.compare(check_applied(self.connection, self._since))
        touched = None if self._whole else sorted({account for account, _ in self._expected})
        check_audit(self.connection, touched)


def ledger_now(connection: psycopg.Connection[Any]) -> datetime:
    """What time it is in a ledger."""
    row = connection.execute("SELECT ledger_now()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


def check_applied(connection: psycopg.Connection[Any], since: datetime) -> list[tuple[str, str]]:
    """Make sure that nothing was refused or put into quarantine.

    :param since: what was applied before is none of ours.
    :returns: what was applied, as accounts and operation ids.
    :raises BenchError: when something was.
    """
    rows = connection.execute(
        "SELECT account, operation, status FROM operations WHERE applied_at >= %s", (since,)
    ).fetchall()
    refused = sum(status != "applied" for _, _, status in rows)
    row = connection.execute("SELECT count(*) FROM quarantine").fetchone()
    quarantined = int(row[0]) if row else 0
    if refused or quarantined:
        raise BenchError(f"{refused:,} operations were refused and {quarantined:,} are in quarantine.")
    return [(account, operation) for account, operation, _ in rows]


def check_audit(connection: psycopg.Connection[Any], accounts: Sequence[str] | None = None) -> None:
    """Make sure that a ledger passes its audit.

    :param accounts: those to audit; all unless given.
    :raises BenchError: naming a fault.
    """
    report = audit(connection, accounts, processes=WORKERS)
    if not report.holds:
        fault = report.faults[0]
        raise BenchError(
            f"The audit found {report.fault_count:,} faults, such as:"
            f" {fault.account}, {fault.table} {fault.key}: {fault.what}"
        )


class Naive(Side):
    """The naive tasks on tables of their own."""

    table = "naive_operations"
    kept = ("naive_operations",)

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
        self.compare(naive_rows(self.connection))
        check_naive_balances(self.connection)


def naive_rows(connection: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    """The operations in the naive tables, as accounts and ids."""
    return connection.execute("SELECT account, operation FROM naive_operations").fetchall()


def check_naive_balances(connection: psycopg.Connection[Any]) -> None:
    """Make sure that each account of the naive tables has what it must have left, and what its last operation says.

    :raises BenchError: when one has not.
    """
    row = connection.execute(
        "SELECT count(*) FROM naive_accounts a LEFT JOIN ("
        "  SELECT account, sum(amount_micro) AS spent, min(balance_after_micro) AS least FROM naive_operations"
        "  GROUP BY account"
        ") o USING (account)"
        " WHERE available_micro <> %(granted)s - coalesce(spent, 0)"
        " OR available_micro <> coalesce(least, %(granted)s)",
        {"granted": GRANTED_MICRO},
    ).fetchone()
    if row is None or row[0]:
        raise BenchError(f"{row[0] if row else 'All'} accounts have a wrong balance.")


@contextmanager
def sender(broker_url: str) -> Iterator[Celery]:
    """A Celery app that only sends."""
    app = Celery("scripts.bench_sender", broker=broker_url, set_as_current=False)
    app.conf.update(task_serializer="json", accept_content=["json"])
    try:
        yield app
    finally:
        app.close()
