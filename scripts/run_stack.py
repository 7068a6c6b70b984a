"""The whole of creditlane on one machine: servers, workers, beat, Flower, the relay, and a usage file replayed.

Called by ``scripts/run``. Everything it starts is a child of its own and ends with it.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import select
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import Annotated, Any

import psycopg
import redis
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from creditlane.amounts import format_amount, parse_amount
from creditlane.client import CreditClient
from creditlane.contract import ContractError
from creditlane.errors import CreditlaneError
from creditlane.lanes import LANES, lane_name
from models.audit import Report, audit
from models.catalog import CatalogError, load_catalog
from models.migrate import make_logins, upgrade
from models.roles import READER, WORKER
from scripts.embedded import (
    HOST,
    DirectoryLock,
    Stack,
    StackError,
    check_port,
    free_port,
    last_lines,
    open_log,
    prepare_directory,
    spawn,
    start_stack,
    write_private,
)
from scripts.replay import (
    EXPONENT,
    BadRow,
    ReplayError,
    Shape,
    Usage,
    ZipfDraw,
    file_digest,
    grant_id,
    open_id,
    read_header,
    read_usage,
    recognise,
)
from workers.ownership import LANE_CLASS
from workers.redis_lanes import keys_of

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".creditlane"
SAMPLE = ROOT / "scripts" / "sample_usage.csv"

READY_SECONDS = 60.0
"""How long the workers may take until every lane is served."""

PATIENCE_SECONDS = 60.0
"""How long nothing may be applied before the replay is given up."""

WORKERS_STOP_SECONDS = 9.0
"""How long workers may take to finish what they hold; after them come the servers, all within 20 s."""

CHUNK = 500
"""How many operations are looked up at once."""

POLL_SECONDS = 0.02
BAD_ROWS_SHOWN = 10
FAULTS_SHOWN = 10
FLOWER_COLUMNS = "name,kwargs,state,result,received,runtime,routing_key,worker,uuid"
FLOWER_TASKS = 10_000

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class Stopped(BaseException):
    """Somebody asked us to stop: Ctrl-C, SIGTERM, or a terminal that went away."""


# --- The children ------------------------------------------------------------------------------------


@dataclass
class Child:
    """A process that we started, and where it writes."""

    name: str
    process: Popen[bytes]
    log: Path


@dataclass
class Children:
    """The processes around the two servers."""

    directory: Path
    environment: dict[str, str] = field(repr=False)
    _all: list[Child] = field(default_factory=list)

    def start(
        self, name: str, arguments: Sequence[str], *, module: str = "celery", settings: Mapping[str, str] | None = None
    ) -> None:
        """Start a command in the checkout, with its output in a log of its own.

        :param module: what is run; Celery unless given.
        :param settings: what is in its environment, and in no other's.
        """
        log = self.directory / f"{name}.log"
        with open_log(log) as stream:
            process = spawn(
                [sys.executable, "-m", module, *arguments],
                log=stream,
                environment={**self.environment, **(settings or {})},
                directory=ROOT,
            )
        self._all.append(Child(name, process, log))

    def check(self) -> None:
        """Make sure that all still run.

        :raises StackError: naming the one that does not, with the end of its log.
        """
        for child in self._all:
            code = child.process.poll()
            if code is not None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                raise StackError(f"{child.name} {how}; the end of its log ({child.log}):\n{last_lines(child.log)}")

    @property
    def pids(self) -> dict[str, int]:
        """The process ids by name."""
        return {child.name: child.process.pid for child in self._all}

    def stop(self, seconds: float) -> list[str]:
        """End all, all at once.

        :param seconds: how long they have for what they hold.
        :returns: the names of those that had to be killed.
        """
        for child in self._all:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + seconds
        killed = []
        for child in self._all:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutExpired:
                killed.append(child.name)
                child.process.kill()
                child.process.wait()
        self._all.clear()
        return killed

    def kill(self) -> None:
        """End all without waiting for anything."""
        for child in self._all:
            if child.process.poll() is None:
                child.process.kill()


@dataclass
class Running:
    """The whole stack, up and served."""

    stack: Stack
    children: Children
    lanes: int

    def check(self) -> None:
        """Make sure that everything still runs.

        :raises StackError: naming what does not.
        """
        self.children.check()
        for server in (self.stack.postgres, self.stack.redis):
            if not server.running:
                log = server.log
                raise StackError(f"{server.service} has ended; the end of its log ({log}):\n{last_lines(log)}")


def child_environment(stack: Stack, catalog: str, lanes: int, database_url: str | None = None) -> dict[str, str]:
    """The environment of the workers: ours, with the stack's addresses in place of any others.

    :param database_url: the ledger in the workers' role, which cannot change what is written once; else the owner's.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        # A PGHOST or a result store of another deployment would lead astray.
        if not name.startswith("PG") and name not in ("CREDITLANE_RESULT_URL", "CREDITLANE_OWNER_URL")
    }
    return {
        **kept,
        "CREDITLANE_BROKER_URL": stack.broker_url,
        "CREDITLANE_DATABASE_URL": database_url or stack.database_url,
        "CREDITLANE_CATALOG": catalog,
        "CREDITLANE_LANES": str(lanes),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True)
class Payments:
    """How payments are taken here, never with live money."""

    settings: dict[str, str] = field(repr=False)
    """What the relay and the general worker have in their environment."""
    state: dict[str, str | None] = field(repr=False)
    """What stack.json says of it, so that somebody can play Stripe: the secrets that were made here, no others."""


def prepare_payments(data: Path, relay_port: int) -> Payments:
    """Find the settings of payments: ours, with those of Stripe from the environment where they are given.

    Without an API key there, Stripe's API is at a free port of this machine, where a fake may be started.

    :param data: the data directory; the secrets that are made are kept there.
    :param relay_port: the relay's; 0 for none.
    :raises StackError: when the secrets cannot be kept, or are not what was written.
    """
    made = _made_secrets(data / "payments.json")
    if not os.environ.get("CREDITLANE_STRIPE_API_KEY"):
        made["stripe_api_base"] = f"http://{HOST}:{free_port()}"
    else:
        del made["stripe_api_key"]
    names = {f"CREDITLANE_{name.upper()}": name for name in made}
    ours = {variable: made[name] for variable, name in names.items() if not os.environ.get(variable)}
    known = dict.fromkeys(("stripe_webhook_secrets", "stripe_api_key", "stripe_api_base"))
    return Payments(
        settings={
            **ours,
            "CREDITLANE_PAYMENTS_LIVEMODE": "false",
            "CREDITLANE_RELAY_ADDRESS": HOST,
            "CREDITLANE_RELAY_PORT": str(relay_port),
        },
        state={**known, **{names[variable]: text for variable, text in ours.items()}},
    )


def _made_secrets(path: Path) -> dict[str, str]:
    """The secrets of Stripe that were made at the first start."""
    if not path.exists():
        made = {
            "stripe_webhook_secrets": f"whsec_{secrets.token_hex(24)}",
            "stripe_api_key": f"sk_test_{secrets.token_hex(24)}",
        }
        write_private(path, json.dumps(made, indent=2) + "\n")
        return made
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(content[name]) for name in ("stripe_webhook_secrets", "stripe_api_key")}
    except (OSError, ValueError, TypeError, KeyError):
        raise StackError(f"The secrets of payments cannot be read from {path}; delete the file.") from None


def start_children(children: Children, workers: int, payments: Payments) -> None:
    """Start the lane workers, the general worker and beat."""
    quiet = ("--without-gossip", "--without-mingle", "--loglevel", "INFO")
    for number in range(1, workers + 1):
        children.start(
            f"lanes{number}",
            ["-A", "workers.lane_app", "worker", "--pool", "solo", *quiet, "-n", f"lanes{number}@%h"],
        )
    general = ("--pool", "threads", "--concurrency", "4", "-Q", "queries,notices,payments,maintenance", *quiet)
    children.start("general", ["-A", "workers.app", "worker", *general, "-n", "general@%h"], settings=payments.settings)
    children.start("beat", ["-A", "schedules.app", "beat", "--pidfile=", "--loglevel", "INFO"])


def start_flower(children: Children, port: int) -> None:
    """Start Flower; after the lanes have their owners, since it asks once, at its start, who consumes what."""
    children.start(
        "flower",
        [
            "-A",
            "workers.app",
            "flower",
            f"--address={HOST}",
            f"--port={port}",
            f"--max_tasks={FLOWER_TASKS}",
            f"--tasks_columns={FLOWER_COLUMNS}",
        ],
    )


def wait_for(condition: Callable[[], bool], check: Callable[[], None], seconds: float, what: str) -> None:
    """Wait for a condition that nothing announces, as long as everything runs.

    :param check: raises when something does not run any more.
    :param seconds: how long at most.
    :param what: what did not come, for the sentence.
    :raises StackError: when it does not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise StackError(f"{what} within {seconds:.0f} s; see the logs in the data directory.")
        time.sleep(POLL_SECONDS * 5)


def shared_lanes(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Count the lanes that are served at the moment, and the workers that serve them."""
    row = connection.execute(
        "SELECT count(*), count(DISTINCT pid) FROM pg_locks"
        " WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = %s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        (LANE_CLASS,),
    ).fetchone()
    assert row is not None
    lanes: int
    workers: int
    lanes, workers = row
    return lanes, workers


def answers(port: int) -> bool:
    """Say whether a web server answers on a port of this machine."""
    try:
        with closing(http.client.HTTPConnection(HOST, port, timeout=5)) as connection:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False


# --- The replay --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is sent: accounts opened and given credits at their first use, and each row as a consume."""

    digest: str
    credits: str | None
    """What each account is granted, as on the wire; None for nothing."""
    usage: list[Usage]
    bad: list[BadRow]

    def operations(self) -> Iterator[tuple[str, str, str, Usage]]:
        """Every operation in the order of sending: kind, account, id, and the row that it is for."""
        seen: set[str] = set()
        for row in self.usage:
            if row.account not in seen:
                seen.add(row.account)
                yield "open", row.account, open_id(row.account), row
                if self.credits is not None:
                    yield "grant", row.account, grant_id(self.digest, row.account, self.credits), row
            yield "consume", row.account, row.id, row


@dataclass
class Outcome:
    """What became of the operations."""

    sent: int = 0
    replayed: int = 0
    """Those that the ledger had before: they change nothing."""
    applied: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    quarantined: int = 0
    seconds: float = 0.0
    used_micro: Counter[str] = field(default_factory=Counter)
    """Credits used by the file's operations, by account."""

    def count(self, account: str, status: str, code: str | None, charged_micro: int) -> None:
        """Count one answer of the ledger."""
        if status == "applied":
            self.applied += 1
            self.used_micro[account] += charged_micro
        else:
            self.refused[code or "unknown"] += 1


class Steps:
    """Progress on the terminal as a bar, elsewhere as a line for every tenth."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = max(1, total)
        self._done = 0
        self._tenths = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=self._total)

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Note that so many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif (tenths := self._done * 10 // self._total) > self._tenths:
            self._tenths = tenths
            console.print(f"{self._title} {tenths * 10:3d} % ({self._done:,} of {self._total:,})")


def look_up(
    connection: psycopg.Connection[Any], wanted: Sequence[tuple[str, str]]
) -> list[tuple[str, str, str, str | None, int]]:
    """Ask the ledger for the answers to some operations.

    :param wanted: accounts and ids.
    :returns: account, id, status, code and charge (in micro-credits) of those that it has.
    """
    return connection.execute(
        "SELECT o.account, o.operation, o.status, o.code, o.charged_micro"
        " FROM unnest(%s::text[], %s::text[]) AS wanted (account, operation)"
        " JOIN operations o USING (account, operation)",
        ([account for account, _ in wanted], [id for _, id in wanted]),
    ).fetchall()


def in_chunks(items: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    """Cut a list into pieces that one query can ask for."""
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def publish(client: CreditClient, plan: Plan, steps: Steps, check: Callable[[], None], *, single: bool) -> set[str]:
    """Send the plan's operations, each account's in order.

    :param single: one message for each, instead of many per message.
    :returns: the ids that the client's own check refused; their rows are added to the bad ones.
    :raises CreditlaneError: when the broker does not take them.
    """
    unsent: set[str] = set()

    def send(sink: Any) -> None:
        for number, (kind, account, id, row) in enumerate(plan.operations()):
            try:
                if kind == "open":
                    sink.open(account, id=id)
                elif kind == "grant":
                    sink.grant(account, plan.credits, source="replay", id=id)
                else:
                    sink.consume(
                        account,
                        feature=row.feature,
                        quantity=row.quantity,
                        occurred_at=row.occurred_at,
                        id=id,
                    )
            except ContractError as error:
                unsent.add(id)
                plan.bad.append(BadRow(row.line, str(error)))
            steps.advance()
            if number % CHUNK == 0:
                check()

    if single:
        send(client)
    else:
        with client.buffer(linger_ms=5) as buffer:
            send(buffer)
    return unsent


def await_answers(
    connection: psycopg.Connection[Any],
    wanted: Sequence[tuple[str, str]],
    outcome: Outcome,
    steps: Steps,
    check: Callable[[], None],
) -> None:
    """Wait until the ledger has an answer to each operation, or quarantine has the message.

    :param wanted: accounts and ids of operations that the ledger did not have before.
    :raises StackError: when nothing was applied for a minute.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    for chunk in in_chunks(wanted):
        missing = {(account, id) for account, id in chunk}
        while missing:
            before = len(missing)
            for account, id, status, code, charged in look_up(connection, list(missing)):
                missing.discard((account, id))
                outcome.count(account, status, code, charged)
            if len(missing) == before:
                parked = connection.execute(
                    "SELECT DISTINCT operation FROM quarantine WHERE operation = ANY(%s)",
                    ([id for _, id in missing],),
                ).fetchall()
                ids = {id for (id,) in parked}
                missing = {(account, id) for account, id in missing if id not in ids}
                outcome.quarantined += before - len(missing)
            if len(missing) < before:
                steps.advance(before - len(missing))
                deadline = time.monotonic() + PATIENCE_SECONDS
                continue
            check()
            if time.monotonic() > deadline:
                raise StackError(
                    f"Nothing was applied for {PATIENCE_SECONDS:.0f} s and {len(missing):,} operations "
                    "or more are without an answer; see the logs in the data directory."
                )
            time.sleep(POLL_SECONDS)


def await_empty_lanes(broker_url: str, lanes: int, check: Callable[[], None]) -> None:
    """Wait until nothing is in any lane, neither waiting nor unacknowledged.

    :raises StackError: when nothing moves for a minute.
    """
    with closing(redis.Redis.from_url(broker_url)) as store:
        least: int | None = None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with store.pipeline(transaction=False) as pipeline:
                for lane in range(lanes):
                    waiting, unacknowledged, _ = keys_of(lane_name(lane))
                    pipeline.llen(waiting)
                    pipeline.llen(unacknowledged)
                left = sum(pipeline.execute())
            if left == 0:
                return
            if least is None or left < least:
                least = left
                deadline = time.monotonic() + PATIENCE_SECONDS
            check()
            if time.monotonic() > deadline:
                raise StackError(
                    f"{left:,} messages stay in the lanes and nothing moves; see the logs in the data directory."
                )
            time.sleep(POLL_SECONDS)


def replay(running: Running, plan: Plan, *, single: bool) -> Outcome:
    """Send a plan and wait for every answer.

    :raises StackError: when the answers do not come.
    :raises CreditlaneError: when the broker does not take the messages.
    """
    outcome = Outcome()
    operations = [(account, id) for _, account, id, _ in plan.operations()]
    with (
        psycopg.connect(running.stack.database_url, autocommit=True) as connection,
        closing(CreditClient(running.stack.broker_url, lanes=running.lanes)) as client,
    ):
        known: set[tuple[str, str]] = set()
        for chunk in in_chunks(operations):
            for account, id, status, _, charged in look_up(connection, chunk):
                known.add((account, id))
                if status == "applied":
                    outcome.used_micro[account] += charged
        started = time.perf_counter()
        with Steps("sent", len(operations)) as steps:
            unsent = publish(client, plan, steps, running.check, single=single)
        sent = [(account, id) for account, id in operations if id not in unsent]
        outcome.sent = len(sent)
        fresh = [pair for pair in sent if pair not in known]
        outcome.replayed = len(sent) - len(fresh)
        with Steps("answered", len(fresh)) as steps:
            await_answers(connection, fresh, outcome, steps, running.check)
        if fresh:
            outcome.seconds = time.perf_counter() - started
        await_empty_lanes(running.stack.broker_url, running.lanes, running.check)
        if not fresh:
            outcome.seconds = time.perf_counter() - started
    return outcome


# --- What is shown -----------------------------------------------------------------------------------


def show_bad_rows(bad: Sequence[BadRow], file: Path) -> None:
    """Show the rows that were not charged, the first few with their lines."""
    if not bad:
        return
    console.print(f"[yellow]{len(bad):,} rows of {escape(str(file))} were not charged:[/]", soft_wrap=True)
    for row in bad[:BAD_ROWS_SHOWN]:
        console.print(f"  line {row.line}: {escape(row.reason)}", soft_wrap=True)
    if len(bad) > BAD_ROWS_SHOWN:
        console.print(f"  … and {len(bad) - BAD_ROWS_SHOWN:,} more")


def show_outcome(outcome: Outcome, bad: int) -> None:
    """Show what became of the operations."""
    table = Table(title="The replay", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    rate = outcome.sent / outcome.seconds if outcome.seconds else 0.0
    table.add_row("operations sent", f"{outcome.sent:,}")
    table.add_row("seconds, first publish to last commit", f"{outcome.seconds:.2f}")
    table.add_row("operations per second", f"{rate:,.0f}")
    table.add_row("applied", f"{outcome.applied:,}")
    table.add_row("refused", f"{outcome.refused.total():,}")
    for code, count in outcome.refused.most_common():
        table.add_row(f"  {escape(code)}", f"{count:,}")
    table.add_row("replayed (the ledger had them before)", f"{outcome.replayed:,}")
    table.add_row("quarantined", f"{outcome.quarantined:,}")
    if bad:
        table.add_row("rows not charged", f"{bad:,}")
    console.print(table)


def show_accounts(connection: psycopg.Connection[Any], outcome: Outcome) -> None:
    """Show the ten accounts that used most, with what they have left."""
    top = sorted(outcome.used_micro.items(), key=lambda item: (-item[1], item[0]))[:10]
    left: dict[str, int] = dict(
        connection.execute(
            "SELECT account, available_micro FROM accounts WHERE account = ANY(%s)",
            ([account for account, _ in top],),
        ).fetchall()
    )
    table = Table(title="Who used most", title_justify="left")
    table.add_column("account")
    table.add_column("credits used", justify="right")
    table.add_column("credits left", justify="right")
    for account, used in top:
        table.add_row(escape(account), format_amount(used), format_amount(left.get(account, 0)))
    console.print(table)


def show_verdict(report: Report, seconds: float) -> bool:
    """Show what the audit found.

    :returns: whether it holds.
    """
    checked = (
        f"{report.accounts:,} accounts, {report.operations:,} operations, {report.entries:,} entries "
        f"checked in {seconds:.1f} s"
    )
    if report.holds:
        console.print(f"[green]The audit holds[/]: {checked}.")
        return True
    console.print(f"[red]The audit found {report.fault_count:,} faults[/] ({checked}):")
    for fault in report.faults[:FAULTS_SHOWN]:
        where = f"{fault.account}, {fault.table} {fault.key}"
        console.print(f"  {escape(where)}: {escape(fault.what)}", soft_wrap=True)
    if report.fault_count > FAULTS_SHOWN:
        console.print(f"  … and {report.fault_count - FAULTS_SHOWN:,} more")
    return False


def show_addresses(
    running: Running, state: Path, flower_port: int, relay_port: int, account: str, feature: str
) -> None:
    """Show where everything is, and what to try.

    :param state: the file with the addresses and passwords.
    :param relay_port: 0 for none.
    :param account: one to try with.
    :param feature: one to try with.
    """
    console.print(
        Panel.fit(
            f"Flower      http://{HOST}:{flower_port}\n"
            f"PostgreSQL  postgresql://{READER}@{HOST}:{running.stack.postgres.port}/creditlane\n"
            f"Redis       redis://{HOST}:{running.stack.redis.port}/0\n"
            f"Webhooks    {f'http://{HOST}:{relay_port}/webhooks/stripe' if relay_port else 'not taken'}\n"
            f"Passwords   {escape(str(state))} (readable by you only)\n"
            f"Logs        {escape(str(running.children.directory))}",
            title="creditlane is up; Ctrl-C stops it",
        )
    )
    command = shlex.quote(str(Path(sys.executable).with_name("creditlane")))
    console.print("To try from another terminal:", style="bold")
    for words in (
        ["consume", account, feature],
        ["account", "history", account],
        ["lanes"],
        ["audit"],
        ["--help"],
    ):
        console.print(f"  {command} {shlex.join(words)}", soft_wrap=True, markup=False, highlight=False)


# --- The command -------------------------------------------------------------------------------------


@dataclass
class Signals:
    """What happens on Ctrl-C: the first time we stop in good order, the second time at once."""

    children: Children | None = None
    _ends: tuple[socket.socket, socket.socket] = field(default_factory=socket.socketpair)
    _stopping: bool = False

    def install(self) -> None:
        """Take over the signals that ask us to stop, and the one that tells of a child's end."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        for end in self._ends:
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, self._wake)

    def wait(self, seconds: float) -> None:
        """Wait until a child may have ended, at the longest so many seconds."""
        heard, _ = self._ends
        if select.select([heard], [], [], seconds)[0]:
            heard.recv(4096)

    def _wake(self, _number: int, _frame: FrameType | None) -> None:
        # No lock: this may come in the midst of itself, or of the wait, since children that are held still and let go
        # on tell of it as well.
        try:
            self._ends[1].send(b"!")
        except BlockingIOError:
            pass  # it is woken already

    def stopping(self) -> None:
        """From now on a signal means: at once."""
        self._stopping = True

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopping:
            if self.children is not None:
                self.children.kill()
            return
        self._stopping = True
        raise Stopped


@contextmanager
def running_stack(
    data: Path,
    signals: Signals,
    *,
    postgres_port: int,
    redis_port: int,
    flower_port: int,
    relay_port: int,
    workers: int,
    catalog: str,
    lanes: int,
) -> Iterator[Running]:
    """Start everything, and stop everything that was started.

    :raises StackError: when something does not start, with what to do.
    """
    data = prepare_directory(data)
    DirectoryLock(data).release()  # that another run has it says more than that its ports are taken
    check_port(flower_port, "Flower", "--flower-port")
    if relay_port:
        check_port(relay_port, "the relay", "--relay-port")
    payments = prepare_payments(data, relay_port)
    console.print(f"Starting PostgreSQL and Redis in {escape(str(data))}", soft_wrap=True)
    stack = start_stack(data, postgres_port=postgres_port, redis_port=redis_port)
    state = data / "stack.json"
    logs = data / "logs"
    # New ones at each start: nobody has to keep them.
    passwords = {role: secrets.token_urlsafe(24) for role in (WORKER, READER)}
    worker_url, reader_url = (stack.postgres.url_as(role, password) for role, password in passwords.items())
    children = Children(logs, child_environment(stack, catalog, lanes, worker_url))
    signals.children = children
    try:
        logs.mkdir(mode=0o700, exist_ok=True)
        upgrade(stack.database_url)
        make_logins(stack.database_url, passwords)
        taken = ", the relay" if relay_port else ""
        console.print(f"Starting {workers} lane workers, a general worker, beat{taken} and Flower")
        start_children(children, workers, payments)
        if relay_port:
            children.start("relay", [], module="workers.relay", settings=payments.settings)
        running = Running(stack, children, lanes)
        with psycopg.connect(stack.database_url, autocommit=True) as connection:
            wait_for(
                lambda: shared_lanes(connection) == (lanes, min(lanes, workers)),
                running.check,
                READY_SECONDS,
                f"Not all {lanes} lanes were served, shared among {workers} workers,",
            )
        start_flower(children, flower_port)
        wait_for(lambda: answers(flower_port), running.check, READY_SECONDS, "Flower did not answer")
        if relay_port:
            wait_for(lambda: answers(relay_port), running.check, READY_SECONDS, "The relay did not answer")
        content = {
            "broker_url": stack.broker_url,
            "database_url": worker_url,
            "reader_url": reader_url,
            "flower_url": f"http://{HOST}:{flower_port}",
            "relay_url": f"http://{HOST}:{relay_port}" if relay_port else None,
            "payments": payments.state,
            "catalog": catalog,
            "lanes": lanes,
            "pids": {"postgres": stack.postgres.pid, "redis": stack.redis.pid, **children.pids},
        }
        write_private(state, json.dumps(content, indent=2) + "\n")
        yield running
    finally:
        signals.stopping()
        state.unlink(missing_ok=True)
        console.print("Stopping")
        try:
            killed = children.stop(WORKERS_STOP_SECONDS)
        finally:
            stack.stop()
        if killed:
            console.print(f"[yellow]{', '.join(killed)} did not end in time and had to be killed.[/]")


@contextmanager
def naming_what_ended(running: Running) -> Iterator[None]:
    """Turn a lost connection into a sentence about what was lost.

    :raises StackError: naming the server or worker that ended, or what the connection said.
    """
    try:
        yield
    except (psycopg.Error, redis.RedisError, CreditlaneError) as error:
        running.check()
        raise StackError(f"The replay stopped ({type(error).__name__}: {error}).") from error


def make_plan(file: Path, shape: Shape, *, credits_micro: int, seed: int, exponent: float, limit: int | None) -> Plan:
    """Read the file.

    :param credits_micro: what each account is granted, in micro-credits.
    :raises ReplayError: when it cannot be read.
    """
    digest = file_digest(file)
    draw = ZipfDraw(shape.accounts, seed, exponent)
    plan = Plan(digest, format_amount(credits_micro) if credits_micro else None, [], [])
    for row in read_usage(file, shape, draw, digest=digest, limit=limit):
        if isinstance(row, Usage):
            plan.usage.append(row)
        else:
            plan.bad.append(row)
    return plan


def parse_credits(text: str) -> int:
    """Read ``--credits``.

    :returns: micro-credits.
    :raises ReplayError: when it is no amount, or negative.
    """
    try:
        micro = parse_amount(text)
    except ValueError as error:
        raise ReplayError(f"--credits: {error}.") from None
    if micro < 0:
        raise ReplayError("--credits: an account cannot be granted less than nothing.")
    return micro


def parse_lanes(text: str | None) -> int:
    """Read ``CREDITLANE_LANES``.

    :raises ReplayError: when it is no number from 1 to 4096.
    """
    if not text:
        return LANES
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 4096:
        raise ReplayError("CREDITLANE_LANES must be a number from 1 to 4096; unset it for the usual 64.")
    return int(text)


def parse_scale(text: str | None) -> Decimal | None:
    """Read ``--quantity-scale``.

    :raises ReplayError: when it is not a decimal factor above 0.
    """
    if text is None:
        return None
    try:
        scale = Decimal(text)
    except InvalidOperation:
        scale = Decimal("NaN")
    if not scale.is_finite() or scale <= 0 or not -20 <= scale.adjusted() <= 20:
        raise ReplayError("--quantity-scale: send a decimal factor such as 0.001.")
    return scale


def check_features(shape: Shape, catalog: str) -> str:
    """Make sure that the catalog knows the feature of all rows, where there is one.

    :returns: a feature of the catalog.
    :raises ReplayError: when it does not.
    :raises CatalogError: when there is no such catalog.
    """
    features = load_catalog(catalog).features
    if shape.feature is not None and shape.feature not in features:
        raise ReplayError(
            f"The catalog {catalog} has no feature {shape.feature!r}; it has: {', '.join(sorted(features))}."
        )
    return shape.feature or next(iter(features), "")


def audited(running: Running) -> bool:
    """Run the audit over the whole ledger and show its verdict."""
    started = time.perf_counter()
    with psycopg.connect(running.stack.database_url, autocommit=True) as connection:
        # Not within a transaction: it begins one of its own.
        report = audit(connection)
    return show_verdict(report, time.perf_counter() - started)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    input: Annotated[
        Path,
        typer.Option(
            help="The CSV file to replay; its first line names the columns.", show_default="scripts/sample_usage.csv"
        ),
    ] = SAMPLE,
    account_column: Annotated[
        str | None, typer.Option(help="Which column names the account; account unless given.")
    ] = None,
    feature_column: Annotated[
        str | None, typer.Option(help="Which column names the feature; feature unless given.")
    ] = None,
    quantity_column: Annotated[
        list[str] | None, typer.Option(help="Which column is the quantity; several are summed; quantity unless given.")
    ] = None,
    time_column: Annotated[
        str | None, typer.Option(help="Which column is the time of use, in ISO 8601; time unless given.")
    ] = None,
    quantity_scale: Annotated[
        str | None, typer.Option(help="What the quantity is multiplied by, such as 0.001.")
    ] = None,
    feature: Annotated[str | None, typer.Option(help="The feature of every row, when no column names it.")] = None,
    accounts: Annotated[
        int | None,
        typer.Option(min=1, max=10_000_000, help="How many accounts to draw from when no column names them."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same accounts.")] = 1,
    exponent: Annotated[
        float,
        typer.Option(min=0, max=10, help="How steep the draw is: the k-th account in proportion to 1/k^x."),
    ] = EXPONENT,
    credits: Annotated[str, typer.Option(help="What each account is granted; 0 for nothing.")] = "40",
    catalog: Annotated[str, typer.Option(help="A shipped catalog's name, or a TOML file.")] = "metering",
    limit: Annotated[int | None, typer.Option(min=1, help="Replay only so many rows.")] = None,
    once: Annotated[
        bool, typer.Option("--once", help="End after the replay; the exit code is 0 only if the audit holds.")
    ] = False,
    buffer: Annotated[
        bool, typer.Option("--buffer", help="Many operations per message: faster, but Flower shows messages only.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many lane workers.")] = 2,
    data: Annotated[
        Path,
        typer.Option(
            help="Where everything is kept; a second start finds it again.", show_default=".creditlane in the checkout"
        ),
    ] = DATA,
    postgres_port: Annotated[int, typer.Option(min=1, max=65535, help="PostgreSQL's port.")] = 55432,
    redis_port: Annotated[int, typer.Option(min=1, max=65535, help="Redis' port.")] = 56379,
    flower_port: Annotated[int, typer.Option(min=1, max=65535, help="Flower's port.")] = 5555,
    relay_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where payment providers' webhooks are taken; 0 for nowhere.")
    ] = 8787,
) -> None:
    """Start the whole of creditlane on this machine, replay a usage file through it, and stay up.

    Columns called account, feature, quantity and time are found by their names; the Azure LLM traces
    (TIMESTAMP, ContextTokens, GeneratedTokens) are recognised. The same file again changes nothing:
    its operations have the same ids.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # a PGHOST or PGSSLMODE of another server would lead our connections astray
    signals = Signals()
    signals.install()
    code = 0
    try:
        if Path(catalog).suffix == ".toml":
            catalog = str(Path(catalog).resolve())
        shape = recognise(
            read_header(input),
            account=account_column,
            feature_column=feature_column,
            feature=feature,
            quantity=quantity_column or (),
            time=time_column,
            scale=parse_scale(quantity_scale),
            accounts=accounts,
        )
        some_feature = check_features(shape, catalog)
        plan = make_plan(input, shape, credits_micro=parse_credits(credits), seed=seed, exponent=exponent, limit=limit)
        lanes = parse_lanes(os.environ.get("CREDITLANE_LANES"))
        with running_stack(
            data,
            signals,
            postgres_port=postgres_port,
            redis_port=redis_port,
            flower_port=flower_port,
            relay_port=relay_port,
            workers=workers,
            catalog=catalog,
            lanes=lanes,
        ) as running:
            console.print(f"Replaying {len(plan.usage):,} rows of {escape(str(input))}", soft_wrap=True)
            with naming_what_ended(running):
                outcome = replay(running, plan, single=not buffer)
                show_bad_rows(plan.bad, input)
                show_outcome(outcome, len(plan.bad))
                with psycopg.connect(running.stack.database_url) as connection:
                    show_accounts(connection, outcome)
                holds = audited(running)
            if once:
                code = 0 if holds else 1
            else:
                account = next(iter(outcome.used_micro), "user_1")
                state = running.stack.directory / "stack.json"
                show_addresses(running, state, flower_port, relay_port, account, some_feature)
                while True:
                    signals.wait(60)
                    running.check()
    except (ReplayError, CatalogError) as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        code = 2
    except StackError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        code = 1
    except Stopped:
        code = 130 if once else 0
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="scripts/run")
