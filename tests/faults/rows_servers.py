"""Rows 3, 5, 6, 17: servers that are cut off, restarted, away, slow, full."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import psycopg

from tests.faults.acts import RABBITMQ, REDIS, Act, Done, Row, Size
from tests.faults.proxy import Proxy, command_complete
from tests.faults.rows_workers import producers
from tests.faults.stack import PATIENCE_SECONDS, Process, RedisBroker, Scene, eventually, logged_lines

RECOVERY_SECONDS = 60.0
"""How long workers may take to own their lanes again after a server is back."""

COMMITTED = command_complete(b"COMMIT")
COPIED = b"COPY "
"""The beginning of what the server says after a COPY, within the transaction."""

FULL_MARGIN_BYTES = 1_500_000
"""How much more than now the broker may use when it is made full."""

SEGMENT_BYTES = 16 << 20
"""A segment of Postgres' own log: a limit on file sizes must leave room for one."""

LIMIT_BYTES = SEGMENT_BYTES + (1 << 20)


def cut_connection(answer: bytes, where: str, scene: Scene, size: Size) -> Done:
    """Row 3: the connection is cut at an answer of the server's, which the worker never gets."""
    proxy = Proxy(scene.database)
    try:
        producers(scene)
        worker = scene.worker("worker", CREDITLANE_DATABASE_URL=proxy.url)
        for number in range(size.kills):
            scene.owning(worker.name)
            scene.under_load(20)
            proxy.cut_at(answer, scene.random.randrange(5))
            eventually(lambda number=number: proxy.cuts > number, PATIENCE_SECONDS, "a connection is cut")  # type: ignore[misc]
        scene.owning(worker.name)
        scene.finish()
        return Done(proxy.cuts, size.kills, f"{proxy.cuts} × connection to Postgres cut {where}")
    finally:
        proxy.close()


# --- The broker --------------------------------------------------------------------------------------


def restart_broker(appendfsync: str, scene: Scene, size: Size) -> Done:
    """Row 5: kill -9 of the broker under load, and a restart with what it has on disk.

    :param appendfsync: when Redis forces its append-only file to disk; nothing for RabbitMQ. The system keeps what a
        killed process has written, forced or not: what only a loss of power loses is not shown here.
    """
    broker = scene.broker
    set_appendfsync(scene, appendfsync)
    producers(scene)
    workers = [scene.worker("worker-0"), scene.worker("worker-1")]
    scene.owning(*(worker.name for worker in workers))
    hits = 0
    for _ in range(size.rounds):
        scene.under_load(50)
        time.sleep(scene.random.uniform(0, 0.5))
        hits += waits(lambda: broker.depth().total > 0 or scene.sent() > scene.done(), PATIENCE_SECONDS)
        broker.kill()
        time.sleep(scene.random.uniform(0.1, 1.0))
        broker.start()
        set_appendfsync(scene, appendfsync)
        scene.under_load(50)
        eventually(
            lambda: sum(map(len, scene.owners().values())) == scene.lanes, RECOVERY_SECONDS, "the lanes have owners"
        )
    alive = [worker.name for worker in workers if worker.running]
    wrong = [] if len(alive) == len(workers) else [f"only {alive} of the workers survived the broker's restart"]
    how = f"Redis with appendfsync {appendfsync}" if appendfsync else "RabbitMQ"
    what = f"{size.rounds} × kill -9 of {how} under load and restart, {scene.refused()} sends repeated"
    return Done(hits, size.rounds, what, wrong)


def set_appendfsync(scene: Scene, value: str) -> None:
    """Set when Redis forces its append-only file to disk, if the broker is a Redis."""
    if isinstance(scene.broker, RedisBroker):
        scene.broker.configure(appendfsync=value)


def broker_away(scene: Scene, size: Size) -> Done:
    """Row 5: the broker is away while producers publish: they are told, and send the same again."""
    producers(scene)
    workers = [scene.worker("worker-0"), scene.worker("worker-1")]
    scene.owning(*(worker.name for worker in workers))
    scene.under_load()
    scene.broker.kill()
    time.sleep(size.outage_seconds)
    eventually(lambda: scene.refused() > 0, PATIENCE_SECONDS, "producers are told that the broker is away")
    refused = scene.refused()
    scene.broker.start()
    scene.under_load()
    wrong = [f"{worker.name} did not survive" for worker in workers if not worker.running]
    what = (
        f"{scene.broker.name} away for {size.outage_seconds:.0f} s; producers were told {refused} times, and sent again"
    )
    return Done(refused, 1, what, wrong)


def broker_full(scene: Scene, size: Size) -> Done:
    """Row 17: Redis at its memory's end, evicting nothing: producers are told; afterwards all is applied."""
    broker = scene.broker
    assert isinstance(broker, RedisBroker)
    worker = scene.worker("worker")
    scene.owning(worker.name)
    producers(scene, per_second=1500)
    scene.under_load()
    worker.signal(signal.SIGSTOP)
    try:
        broker.configure(maxmemory=broker.used_bytes() + FULL_MARGIN_BYTES)
        eventually(lambda: scene.refused() > 3, PATIENCE_SECONDS, "producers are told that the broker is full")
        waiting = broker.depth().total
        worker.signal(signal.SIGCONT)
        # What waits is drained with the memory as it is: producers may fill it again as fast.
        before = scene.done()
        drained = waits(lambda: scene.done() > before + waiting // 2, PATIENCE_SECONDS)
    finally:
        broker.configure(maxmemory=0)
    refused = scene.refused()
    scene.under_load()
    wrong = (
        [] if drained else [f"with the memory still full the worker did not drain the {waiting} messages that waited"]
    )
    what = f"Redis full with {waiting} messages waiting, producers told {refused} times; drained while full: {drained}"
    return Done(refused, 1, what, wrong)


def waits(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# --- Postgres ----------------------------------------------------------------------------------------


def restart_postgres(number: signal.Signals, how: str, scene: Scene, size: Size) -> Done:
    """Row 6: Postgres is shut down under load and started again."""
    producers(scene)
    workers = [scene.worker("worker-0"), scene.worker("worker-1")]
    scene.owning(*(worker.name for worker in workers))
    hits = 0
    for _ in range(size.rounds):
        scene.under_load(50)
        time.sleep(scene.random.uniform(0, 0.5))
        before = scene.sent()
        stop_postgres(scene, number)
        eventually(lambda before=before: scene.sent() > before + 20, PATIENCE_SECONDS, "producers go on")  # type: ignore[misc]
        hits += scene.broker.depth().total > 0
        scene.postgres.start()
        eventually(
            lambda: sum(map(len, scene.owners().values())) == scene.lanes, RECOVERY_SECONDS, "the lanes have owners"
        )
    wrong = [f"{worker.name} did not survive" for worker in workers if not worker.running]
    return Done(hits, size.rounds, f"{size.rounds} × {how} of Postgres under load, messages waiting each time", wrong)


def stop_postgres(scene: Scene, number: signal.Signals) -> None:
    """Have the server shut down its own way, and wait for its end."""
    process = scene.postgres._process
    assert process is not None
    process.send_signal(number)
    process.wait(RECOVERY_SECONDS)


def postgres_away(scene: Scene, size: Size) -> Done:
    """Row 6: a longer outage: the workers try again and again, and say so each time."""
    producers(scene, per_second=100)
    workers = [scene.worker("worker-0"), scene.worker("worker-1")]
    scene.owning(*(worker.name for worker in workers))
    scene.under_load()
    stop_postgres(scene, signal.SIGINT)
    before = logged_lines(workers, "database away")
    time.sleep(size.outage_seconds)
    told = logged_lines(workers, "database away") - before
    scene.postgres.start()
    scene.owning(*(worker.name for worker in workers))
    # Every balance, of each worker, tries once: half of that is told apart from a retry that gave up.
    expected = int(size.outage_seconds / 0.5)
    wrong = [] if told >= expected // 2 else [f"{told} attempts were logged in {size.outage_seconds:.0f} s"]
    wrong += [f"{worker.name} did not survive" for worker in workers if not worker.running]
    what = f"Postgres away for {size.outage_seconds:.0f} s (an hour is the same loop): {told} attempts logged"
    return Done(told, 1, what, wrong)


def no_connections(scene: Scene, size: Size) -> Done:
    """Row 6: every connection of the server is taken just when the workers need new ones."""
    producers(scene)
    worker = scene.worker("worker")
    scene.owning(worker.name)
    scene.under_load()
    before = logged_lines([worker], "53300") + logged_lines([worker], "too many")
    with ExitStack() as taken:
        admin = taken.enter_context(psycopg.connect(scene.postgres.url_of("postgres"), autocommit=True))
        sessions = scene.sessions(worker.name)
        count = exhaust(scene, taken)
        for pid in sessions:
            admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
        count += exhaust(scene, taken)
        deadline = time.monotonic() + size.outage_seconds
        refused = 0
        while time.monotonic() < deadline or not refused:
            count += exhaust(scene, taken)
            refused = logged_lines([worker], "53300") + logged_lines([worker], "too many") - before
            if time.monotonic() > deadline + PATIENCE_SECONDS:
                break
            time.sleep(0.1)
    scene.owning(worker.name)
    scene.under_load()
    wrong = [] if worker.running else ["the worker did not survive"]
    what = f"all {count} connections taken for {size.outage_seconds:.0f} s: refused {refused} times, then it went on"
    return Done(refused, 1, what, wrong)


def exhaust(scene: Scene, taken: ExitStack) -> int:
    """Take every connection that the server still gives."""
    count = 0
    while True:
        try:
            connection = psycopg.connect(scene.postgres.url_of("postgres"), autocommit=True, connect_timeout=5)
        except psycopg.OperationalError:
            return count
        taken.enter_context(connection)
        count += 1


def locked_accounts(scene: Scene, size: Size) -> Done:
    """Row 6: somebody else holds a lock on accounts of a batch: the batch waits, and is applied."""
    producers(scene, per_second=200)
    worker = scene.worker("worker")
    scene.owning(worker.name)
    scene.under_load()
    waited = 0.0
    with psycopg.connect(scene.database) as holder:
        locked = holder.execute("SELECT account FROM accounts ORDER BY account LIMIT 10 FOR UPDATE").fetchall()
        deadline = time.monotonic() + size.lock_seconds
        while time.monotonic() < deadline:
            (blocked,) = scene.rows(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )[0]
            waited += 0.1 if blocked else 0
            time.sleep(0.1)
        holder.rollback()
    scene.under_load()
    what = f"{len(locked)} accounts locked for {size.lock_seconds:.0f} s, the batch waited {waited:.0f} s of it"
    return Done(int(waited > 0), 1, what)


def disk_full(scene: Scene, size: Size) -> Done:
    """Row 17: the ledger's files may grow no further, as on a full disk; later they may again."""
    worker = scene.worker("worker")
    scene.owning(worker.name)
    producers(scene)
    scene.under_load()
    # Rows that are rolled back leave the file grown to its limit: whatever needs one page more is refused.
    grow(scene)
    before = logged_lines([worker], "the database refused a batch")
    with limited(scene, worker):
        eventually(
            lambda: logged_lines([worker], "the database refused a batch") > before,
            PATIENCE_SECONDS,
            "a batch is refused for want of space",
        )
        time.sleep(size.outage_seconds / 5)
        refused = logged_lines([worker], "the database refused a batch") - before
    scene.under_load()
    wrong = [] if worker.running else ["the worker did not survive"]
    what = (
        f"a file-size limit kept the table of operations from growing: {refused} times a batch was refused and tried"
        " again, until the limit was lifted (the server's own log had room)"
    )
    return Done(refused, 1, what, wrong)


def grow(scene: Scene) -> None:
    """Let the file of a table reach the limit, with rows that are never committed."""
    with psycopg.connect(scene.database) as connection:
        connection.execute("ALTER TABLE operations SET (autovacuum_enabled = off)")
        connection.commit()
        connection.execute(
            "INSERT INTO operations (account, operation, number, name, status, charged_micro, entries, arguments,"
            " result, applied_at, catalog) SELECT 'filler', 'filler-' || n, n, repeat('x', 1800), 'x', 0, 0,"
            " '{}', '{}', now(), 'x' FROM generate_series(1, %s) n",
            (LIMIT_BYTES // 2000,),
        )
        connection.rollback()


@contextmanager
def limited(scene: Scene, worker: Process) -> Iterator[None]:
    """Let no file of the workers' sessions, present and future, grow above the limit."""
    account = scene.postgres._account

    def limit(size: int | None) -> None:
        pids = [scene.postgres.pid, *scene.sessions(worker.name)]

        def set_limits() -> None:
            for pid in pids:
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

        # As whoever the server runs as: even root may not be allowed to, from outside.
        subprocess.run(
            ["true"],
            user=account.uid,
            group=account.gid,
            extra_groups=[] if account.uid is not None else None,
            preexec_fn=set_limits,
            check=True,
            timeout=60,
        )

    try:
        limit(LIMIT_BYTES)
        yield
    finally:
        limit(None)


ROWS = (
    Row(
        3,
        "connection to Postgres cut between COMMIT and its answer",
        (
            Act("at COMMIT", partial(cut_connection, COMMITTED, "between COMMIT and its answer"), replays=True),
            Act("at COPY", partial(cut_connection, COPIED, "in the middle of a transaction, after COPY")),
        ),
    ),
    Row(
        5,
        "the broker killed, restarted, and away while producers publish",
        (
            Act("restarted, always", partial(restart_broker, "always"), answered=False, brokers=(REDIS,)),
            Act("restarted, everysec", partial(restart_broker, "everysec"), answered=False, brokers=(REDIS,)),
            Act("restarted", partial(restart_broker, ""), answered=False, brokers=(RABBITMQ,)),
            Act("away", broker_away, answered=False),
        ),
    ),
    Row(
        6,
        "Postgres: restarts, an outage, connections exhausted, a lock held",
        (
            Act("fast restart", partial(restart_postgres, signal.SIGINT, "fast shutdown")),
            Act("immediate stop", partial(restart_postgres, signal.SIGQUIT, "immediate shutdown (crash recovery)")),
            Act("away", postgres_away),
            Act("no connections", no_connections),
            Act("locked accounts", locked_accounts),
        ),
    ),
    Row(
        17,
        "Postgres out of disk, Redis out of memory",
        (
            Act("disk", disk_full),
            Act("memory", broker_full, answered=False, brokers=(REDIS,)),
        ),
    ),
)
