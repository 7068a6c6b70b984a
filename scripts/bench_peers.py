"""What cases are compared with: what one would write without creditlane, and the limits of database and broker."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import redis

from creditlane.client import CreditClient
from creditlane.lanes import LANES, lane_name, lane_of
from scripts import bench_naive
from scripts.bench_figures import BenchError, Sample, Step
from scripts.bench_harness import (
    FEATURE,
    FILL,
    GRANTED_MICRO,
    LANE_BROKER,
    LEDGER_TEMPLATE,
    PUBLISH_BROKER,
    QUANTITY,
    WORKERS,
    Bench,
    check_applied,
    check_audit,
    check_naive_balances,
    consume_message,
    difference,
    lanes_filled,
    ledger_now,
    naive_rows,
    sender,
)
from scripts.bench_processes import Loaders
from scripts.bench_streams import measure_backlog
from scripts.embedded import _postgres_programs

ANSWER_SECONDS = 30.0
"""How long one answer may take."""

COPY_BATCH = 1_000
"""Operations in a transaction of ``copy``, the most that one of the lane workers has."""

PGBENCH_CLIENTS = (4, 8, 16)
"""Numbers of clients that ``sql`` is tried with; the best is measured."""

PGBENCH_TRY = 10
"""How many times fewer transactions a try has."""

SQL_FUNCTION = """
CREATE FUNCTION sql_consume(text, text, text, bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    available bigint;
BEGIN
    SELECT available_micro INTO available FROM naive_accounts WHERE account = $1 FOR UPDATE;
    IF available IS NULL OR available < $4 THEN
        RETURN NULL;
    END IF;
    INSERT INTO naive_operations (operation, account, feature, amount_micro, balance_after_micro)
        VALUES ($2, $1, $3, $4, available - $4) ON CONFLICT (operation) DO NOTHING;
    IF NOT FOUND THEN
        RETURN available;
    END IF;
    UPDATE naive_accounts SET available_micro = available - $4 WHERE account = $1;
    RETURN available - $4;
END $$
"""
"""One operation: lock the account, keep what was done under its unique id, take the amount. In one function and with
that in one round trip, which is as little as a client can make of it."""

PGBENCH_SCRIPT = """
\\set number :number + 1
\\set account random(0, :accounts - 1)
SELECT sql_consume('user_' || lpad(:account::text, 5, '0'), :run || '-' || :client_id || '-' || :number,
                   '{feature}', {amount_micro});
"""


def measure_apply_async(bench: Bench) -> Sample:
    """Celery's ``apply_async`` of the same task to the same queues, its answer ignored as well."""
    operations = bench.operations("publish", bench.sizes.publish)
    lanes = [lane_name(number) for number in range(LANES)]
    with bench.broker(PUBLISH_BROKER) as broker, sender(broker) as app, redis.Redis.from_url(broker) as store:

        @app.task(name="credits.consume", ignore_result=True)
        def consume(account: str, feature: str, quantity: str) -> None:
            """Never run: only its sending is measured."""

        # The first message to a queue declares it; that is not what a service does all day.
        for lane in lanes:
            consume.apply_async(kwargs={"account": "", "feature": FEATURE, "quantity": "1"}, queue=lane)
        before = lanes_filled(store, lanes)
        with bench.metered(len(operations)) as costs, costs.producing():
            started = time.perf_counter()
            for account, operation, _ in operations:
                consume.apply_async(
                    kwargs={"account": account, "feature": FEATURE, "quantity": str(QUANTITY)},
                    task_id=operation,
                    queue=lane_of(account, LANES),
                )
            seconds = time.perf_counter() - started
        there = lanes_filled(store, lanes) - before
        if there != len(operations):
            raise BenchError(f"{len(operations):,} messages were sent and {there:,} are there.")
    return Sample(len(operations) / seconds, **costs.as_fields)


def measure_naive(bench: Bench) -> Sample:
    """One Celery task and one transaction per operation, events and results on."""
    with bench.naive() as side:
        return measure_backlog(bench, side, bench.operations("naive", bench.sizes.naive))


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


# --- sql ---------------------------------------------------------------------------------------------


def measure_sql(bench: Bench) -> Sample:
    """The same work as one hand-written transaction per operation, by pgbench and without a broker."""
    with bench.database("template1") as database:
        bench_naive.prepare(database, bench.accounts, GRANTED_MICRO)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(SQL_FUNCTION)
            connection.execute("VACUUM (ANALYZE)")
            few = max(1, bench.sizes.sql // PGBENCH_TRY)
            tried = {clients: pgbench(bench, database, f"try{clients}", clients, few) for clients in PGBENCH_CLIENTS}
            best = max(tried, key=lambda clients: tried[clients][0])
            transactions = each_client(best, bench.sizes.sql) * best
            with bench.metered(transactions) as costs:
                rate, sent = pgbench(bench, database, "sql", best, bench.sizes.sql)
            expected = [operation for _, ids in tried.values() for operation in ids] + sent
            found = naive_rows(connection)
            # Which account it was is pgbench's own draw.
            if wrong := difference([("", operation) for operation in expected], [("", each) for _, each in found]):
                raise BenchError(f"What pgbench wrote is not what it was to write: {wrong}.")
            check_naive_balances(connection)
    return Sample(rate, **costs.as_fields, note=f"best with {best} clients")


def each_client(clients: int, operations: int) -> int:
    """How many operations each client has, so that there are at least so many."""
    return -(-operations // clients)


def pgbench(bench: Bench, database: str, run: str, clients: int, operations: int) -> tuple[float, list[str]]:
    """Run at least so many operations.

    :param run: what their ids begin with.
    :returns: how many a second, and their ids.
    :raises BenchError: when it fails, or one of them does.
    """
    script = bench.stack.directory / "pgbench.sql"
    script.write_text(PGBENCH_SCRIPT.format(feature=FEATURE, amount_micro=QUANTITY * 10**6), encoding="ascii")
    each = each_client(clients, operations)
    done = subprocess.run(
        [
            str(_postgres_programs() / "pgbench"), "--no-vacuum", "--protocol=prepared", f"--file={script}",
            f"--client={clients}", f"--jobs={min(clients, os.cpu_count() or 1)}", f"--transactions={each}",
            f"--random-seed={bench.round}", "--define=number=0", f"--define=run={run}",
            f"--define=accounts={bench.sizes.accounts}", database,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    if done.returncode != 0 or rate is None:
        raise BenchError(f"pgbench ended with code {done.returncode}:\n{done.stdout}{done.stderr}")
    ids = [f"{run}-{client}-{number}" for client in range(clients) for number in range(1, each + 1)]
    return float(rate[1]), ids


# --- copy --------------------------------------------------------------------------------------------


def measure_copy(bench: Bench) -> Sample:
    """Rows of the ledger that are there already, written in batches: no rules, no broker."""
    operations = bench.operations("copy", bench.sizes.copy)
    with (
        bench.database(LEDGER_TEMPLATE) as database,
        scratch_ledgers(bench, WORKERS) as scratch,
        psycopg.connect(database, autocommit=True) as connection,
    ):
        since = ledger_now(connection)
        # No account is in two hands, as with lane workers.
        shares = [
            [(account, operation) for account, operation, _ in operations if int(account[-1]) % WORKERS == number]
            for number in range(WORKERS)
        ]
        orders = [
            {"kind": "copy", "scratch": url, "database": database, "batch": COPY_BATCH, "operations": share}
            for url, share in zip(scratch, shares, strict=True)
        ]
        with Loaders(bench.stack.directory, orders) as loaders:
            started = loaders.begin()
            # Not before: preparing the rows is no part of it.
            with bench.metered(len(operations)) as costs:
                ended = max(told["ended"] for told in loaders.end())
        sent = [(account, operation) for account, operation, _ in operations]
        if wrong := difference(sent, check_applied(connection, since)):
            raise BenchError(f"What was copied is not what was to be copied: {wrong}.")
        check_audit(connection)
    return Sample(len(operations) / (ended - started), **costs.as_fields)


@contextmanager
def scratch_ledgers(bench: Bench, number: int) -> Iterator[list[str]]:
    """So many fresh ledgers."""
    if number == 0:
        yield []
    else:
        with bench.database(LEDGER_TEMPLATE) as url, scratch_ledgers(bench, number - 1) as others:
            yield [url, *others]


# --- broker ------------------------------------------------------------------------------------------


def measure_broker(bench: Bench) -> Sample:
    """The messages of ``single`` taken from the broker as lane workers do, and dropped."""
    operations = bench.operations("broker", bench.sizes.single)
    with bench.broker(LANE_BROKER) as broker:
        with CreditClient(broker, lanes=LANES) as client:
            for begin in range(0, len(operations), FILL):
                client._sender.send(
                    [consume_message(*operation, LANES) for operation in operations[begin : begin + FILL]]
                )
        return dropped(bench, broker, len(operations), len(operations))


def measure_broker_batch(bench: Bench) -> Sample:
    """The messages of ``metering``, likewise."""
    operations = bench.operations("broker", bench.sizes.metering)
    with bench.broker(LANE_BROKER) as broker, redis.Redis.from_url(broker) as store:
        with CreditClient(broker, lanes=LANES) as client, client.buffer() as buffer:
            for account, operation, member in operations:
                buffer.consume(account, feature=FEATURE, quantity=QUANTITY, member=member, id=operation)
        messages = lanes_filled(store, [lane_name(number) for number in range(LANES)])
        return dropped(bench, broker, len(operations), messages)


def dropped(bench: Bench, broker: str, operations: int, messages: int) -> Sample:
    """Have what is in the lanes taken, by as many processes as there are lane workers.

    :raises BenchError: when they did not take as many messages as there were.
    """
    orders = [
        {"kind": "drop", "broker": broker, "lanes": list(range(number, LANES, WORKERS))} for number in range(WORKERS)
    ]
    with Loaders(bench.stack.directory, orders) as loaders:
        started = loaders.begin()
        with bench.metered(operations) as costs:
            told = loaders.end()
    taken = sum(each["messages"] for each in told)
    if taken != messages:
        raise BenchError(f"{messages:,} messages were in the lanes and {taken:,} were taken.")
    ended = max(each["ended"] for each in told)
    note = "" if messages == operations else f"{operations / messages:.0f} operations a message"
    return Sample(operations / (ended - started), **costs.as_fields, note=note)


PEERS = {
    step.name: step
    for step in (
        Step("apply_async", "Celery's apply_async of the same task, in one process", measure_apply_async),
        Step("naive", "one Celery task and one row-locked transaction per operation", measure_naive),
        Step(
            "sql",
            "the same as one hand-written transaction per operation, by pgbench: no broker, no task",
            measure_sql,
        ),
        Step(
            "copy",
            f"the ledger's own rows, prepared before, in batches of {COPY_BATCH:,} by COPY and UPDATE: the limit of the"
            " database",
            measure_copy,
        ),
        Step(
            "broker",
            "the messages of single, taken from the broker and dropped: the limit of the transport",
            measure_broker,
        ),
        Step("broker_batch", "the messages of metering, likewise", measure_broker_batch),
        Step("celery", "a Celery task that returns at once, waited for", measure_celery),
    )
}
"""What cases are compared with."""
