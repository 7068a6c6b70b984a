"""What the rows work with: a database and a broker that can be broken, workers and producers that can be killed.

Everything a row does to a broker goes through :class:`Broker`; another kind of broker is one more class of it.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import amqp
import msgspec
import psycopg
import redis

from creditlane.lanes import PREFIX, lane_name
from creditlane.rabbitmq import declare_lane
from scripts.embedded import Postgres, Redis, free_port, last_lines, port_is_free
from scripts.rabbitmq import RabbitMQ
from tests.faults.oracle import Judgement, judge, read_ledger, read_policy, read_record
from tests.faults.producers import Notes, Spec
from tests.processes import PythonProcess
from tests.support import travel
from workers.ledger_writer import APPLICATION
from workers.ownership import LANE_CLASS
from workers.redis_lanes import keys_of

ROOT = Path(__file__).resolve().parents[2]
CATALOG = ROOT / "models" / "catalogs" / "packs.toml"
"""What the workers charge by, and what the oracle replays by, unless an act has a catalog of its own."""

LANES = 8
"""Few lanes, so that two workers have some each and every lane some accounts."""

MOST_LANES = 64
"""Lanes that are looked at when it is asked whether anything is left."""

PATIENCE_SECONDS = 40.0
"""How long nothing may move before a row is given up as *unknown*."""

READY_SECONDS = 60.0
"""How long a worker may take to own its lanes."""

STOP_SECONDS = 30.0
"""How long a worker may take to end in good order."""

POLL_SECONDS = 0.02

ANSWER_PAGE = 500

TICK_MS = 300
"""How often a RabbitMQ of ours counts, in milliseconds."""

Found = TypeVar("Found")


class MissedError(RuntimeError):
    """What a row waited for did not come: its verdict is *unknown*, with this text."""


def eventually(condition: Callable[[], Found], seconds: float, what: str) -> Found:
    """Wait until a condition is true, and give its value.

    :param what: what is waited for, for the verdict.
    :raises MissedError: when it takes too long.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise MissedError(f"not within {seconds:.0f} s: {what}")
        time.sleep(POLL_SECONDS)
    return value


def quiet_port() -> int:
    """A free port below those that the system gives to clients.

    A client that tries again and again to reach a server that is away may be given the server's own port, and then
    talks to itself.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return free_port()
    random = Random()
    for _ in range(100):
        port = random.randrange(10_000, first) if first > 10_100 else 0
        if port and port_is_free(port):
            return port
    return free_port()


# --- The broker --------------------------------------------------------------------------------------


class Message(msgspec.Struct, kw_only=True):
    """A message as a client in another language writes it by hand."""

    body: bytes
    headers: Any = None
    content_type: Any = "application/json"


class Depth(msgspec.Struct, frozen=True):
    """What is in the lanes."""

    ready: int
    unacknowledged: int

    @property
    def total(self) -> int:
        """Both."""
        return self.ready + self.unacknowledged


class Broker(ABC):
    """A broker that can be looked into and broken.

    :param server: the server's process, with ``kill``, ``start`` and ``stop``.
    """

    name: str
    server: Any
    counts_late: float = 0.0
    """Seconds by which what :meth:`depth` says is unacknowledged may be late."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the lanes are."""

    @property
    @abstractmethod
    def result_url(self) -> str:
        """Where answers go: a Redis."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every message and answer."""

    @abstractmethod
    def depth(self, lanes: Sequence[int] | None = None) -> Depth:
        """What is in the lanes, or in some of them."""

    @abstractmethod
    def publish(self, lane: str, messages: Sequence[Message]) -> None:
        """Put messages into a lane, in order, with no client of ours."""

    @abstractmethod
    def cut(self) -> None:
        """Close every client's connection."""

    def kill(self) -> None:
        """``kill -9`` of the server."""
        self.server.kill()

    def start(self) -> None:
        """Start the server again, with what it has kept."""
        self.server.start()

    def mend(self) -> None:  # noqa: B027 - most have nothing to mend
        """Set the running server as it was at its first start."""

    def answers(self, replies: Sequence[str]) -> dict[str, Any]:
        """What senders were told, by the names under which they asked."""
        found: dict[str, Any] = {}
        with closing(redis.Redis.from_url(self.result_url)) as store:
            for first in range(0, len(replies), ANSWER_PAGE):
                page = replies[first : first + ANSWER_PAGE]
                told: Any = store.mget([f"celery-task-meta-{reply}" for reply in page])
                found |= {reply: json.loads(meta) for reply, meta in zip(page, told, strict=True) if meta is not None}
        return found


LENGTHS = """
local lengths = {}
for i, key in ipairs(KEYS) do lengths[i] = redis.call('LLEN', key) end
return lengths
"""
"""All at one moment. Not in a transaction: a server that is full takes no commands into one."""


class RedisBroker(Broker):
    """A database of a Redis server.

    :param database: its number; it is emptied.
    """

    name = "redis"

    def __init__(self, server: Redis, database: int = 0) -> None:
        self.server = server
        self.database = database

    @property
    def url(self) -> str:
        """The database."""
        return str(self.server.url_of(self.database))

    @property
    def result_url(self) -> str:
        """The same."""
        return self.url

    def client(self) -> redis.Redis:
        """A plain client."""
        return redis.Redis.from_url(self.url, socket_timeout=30)

    def clear(self) -> None:
        """Empty the database."""
        with closing(self.client()) as store:
            store.flushdb()

    def depth(self, lanes: Sequence[int] | None = None) -> Depth:
        """Count the lists of the lanes."""
        numbers = range(MOST_LANES) if lanes is None else lanes
        keys = [key for number in numbers for key in keys_of(lane_name(number))[:2]]
        with closing(self.client()) as store:
            lengths: Any = store.eval(LENGTHS, len(keys), *keys)
        return Depth(sum(lengths[::2]), sum(lengths[1::2]))

    def publish(self, lane: str, messages: Sequence[Message]) -> None:
        """Push what kombu would put into the list."""
        self.push(lane, [wrapped(message) for message in messages])

    def push(self, lane: str, payloads: Sequence[bytes]) -> None:
        """Push anything at all."""
        with closing(self.client()) as store:
            store.lpush(lane, *payloads)

    def cut(self) -> None:
        """Close every client's connection."""
        with closing(self.client()) as store:
            store.client_kill_filter(_type="normal", skipme=True)

    def configure(self, **settings: str | int) -> None:
        """Change settings of the running server."""
        with closing(self.client()) as store:
            for name, value in settings.items():
                store.config_set(name.replace("_", "-"), value)

    def used_bytes(self) -> int:
        """How much memory the server uses."""
        with closing(self.client()) as store:
            memory: Any = store.info("memory")
            return int(memory["used_memory"])

    def mend(self) -> None:
        """No limit of memory, and the log on disk every second."""
        self.configure(maxmemory=0, appendfsync="everysec")


class Node(RabbitMQ):
    """A RabbitMQ that counts what is in its queues more often than it would."""

    def _prepare(self) -> None:
        super()._prepare()
        intervals = f"{{quorum_tick_interval, {TICK_MS}}}, {{collect_statistics_interval, {TICK_MS}}}"
        self._write(self._home() / "advanced.config", f"[{{rabbit, [{intervals}]}}].\n")


class RabbitBroker(Broker):
    """A virtual host of a RabbitMQ node, a new one for each act.

    :param results: the Redis that answers go to, so that they can be looked up in the end.
    """

    name = "rabbitmq"
    counts_late = 4 * TICK_MS / 1000

    def __init__(self, server: RabbitMQ, results: Redis) -> None:
        self.server = server
        self.results = results
        self._number = 0

    @property
    def _vhost(self) -> str:
        return f"faults-{self._number}"

    @property
    def url(self) -> str:
        """The virtual host."""
        return str(self.server.url_of(self._vhost))

    @property
    def result_url(self) -> str:
        """The Redis."""
        return self.results.url

    def clear(self) -> None:
        """Make another virtual host, and empty the Redis."""
        self.server.delete_vhost(self._vhost)
        self._number += 1
        self.server.create_vhost(self._vhost)
        with closing(redis.Redis.from_url(self.result_url)) as store:
            store.flushdb()

    def depth(self, lanes: Sequence[int] | None = None) -> Depth:
        """What the queues themselves say is ready, and what the node's statistics say is unacknowledged."""
        names = None if lanes is None else {lane_name(number) for number in lanes}
        path = f"/api/queues/{self._vhost}?columns=name,messages_unacknowledged"
        found = {
            queue["name"]: int(queue.get("messages_unacknowledged", 0))
            for queue in self.server.manage("GET", path)
            if queue["name"].startswith(PREFIX) and (names is None or queue["name"] in names)
        }
        ready = 0
        with self._channel() as channel:
            for name in found:
                ready += channel.queue_declare(name, passive=True).message_count
        return Depth(ready, sum(found.values()))

    def publish(self, lane: str, messages: Sequence[Message]) -> None:
        """Publish as any AMQP library would, confirmed."""
        with self._channel() as channel:
            declare_lane(channel, lane)
            channel.confirm_select()
            for message in messages:
                channel.basic_publish_confirm(
                    amqp.Message(
                        message.body,
                        content_type=message.content_type,
                        content_encoding="utf-8",
                        delivery_mode=2,
                        application_headers=message.headers or {},
                    ),
                    "",
                    lane,
                )

    def cut(self) -> None:
        """By the server, as an operator would."""
        for connection in self.server.manage("GET", f"/api/vhosts/{self._vhost}/connections"):
            name = quote(connection["name"], safe="")
            self.server.manage("DELETE", f"/api/connections/{name}", missing_ok=True)

    def kill(self) -> None:
        """``kill -9``, once every queue is on disk: RabbitMQ 3.10 loses one that it was just told to make."""
        for queue in self.server.manage("GET", f"/api/queues/{self._vhost}?columns=name"):
            self.server.await_queue_on_disk(queue["name"], self._vhost)
        super().kill()

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        parts = urlsplit(self.url)
        with amqp.Connection(
            f"{parts.hostname}:{parts.port}", parts.username, parts.password, virtual_host=self._vhost
        ) as connection:
            yield connection.channel()


def wrapped(message: Message) -> bytes:
    """A message as it stands in a Redis list, by kombu's virtual transport."""
    return json.dumps(
        {
            "body": base64.b64encode(message.body).decode(),
            "content-type": message.content_type,
            "content-encoding": "utf-8",
            "headers": message.headers,
            "properties": {"delivery_tag": "by hand", "body_encoding": "base64", "delivery_mode": 2},
        }
    ).encode()


# --- Processes ---------------------------------------------------------------------------------------


class Process:
    """A process of ours, which ends with us however we end."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.process = PythonProcess(command, {**os.environ, **environment}, log)

    @property
    def running(self) -> bool:
        """Whether it still lives."""
        return self.process.poll() is None

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        """SIGTERM; ``kill -9`` where that does not help."""
        if self.running:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def says(self, text: str, seconds: float = READY_SECONDS) -> None:
        """Wait until it has logged a text.

        :raises MissedError: when it does not.
        """
        eventually(lambda: text in self.logged(), seconds, f"{self.name} says {text!r}")

    def wait(self, seconds: float) -> int:
        """Wait for its end, and give its exit code.

        :raises MissedError: when it does not end.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise MissedError(f"{self.name} did not end within {seconds:.0f} s") from None

    def logged(self) -> str:
        """Everything it has logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Scene:
    """One act of a row: a database and a broker of its own, its workers, its producers, and the judgement.

    :param postgres: a running server.
    :param template: a migrated database to copy.
    :param directory: where logs and producers' files go.
    :param seed: everything random comes from it.
    """

    def __init__(
        self, postgres: Postgres, template: str, broker: Broker, directory: Path, name: str, seed: str
    ) -> None:
        self.postgres = postgres
        self.broker = broker
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.seed = seed
        self.random = Random(seed)
        self.lanes = LANES
        self.catalog = CATALOG
        self.workers: list[Process] = []
        self.producers: list[Process] = []
        self.files: list[Path] = []
        self._stop = directory / "stop"
        broker.clear()
        self.database = postgres.create_database(name, template=template)
        self.started: datetime = self.value("SELECT ledger_now()")

    def close(self) -> None:
        """Kill whatever still runs, and drop the database."""
        for process in (*self.producers, *self.workers):
            if process.running:
                process.kill()
        self.postgres.drop_database(self.name)

    # The database

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one query on a connection of its own."""
        with psycopg.connect(self.database, autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: str, *parameters: Any) -> Any:
        """The one value of a query."""
        return self.rows(query, *parameters)[0][0]

    def done(self) -> int:
        """How many operations the ledger has."""
        return int(self.value("SELECT count(*) FROM operations"))

    def owners(self) -> dict[str, list[int]]:
        """The lanes that each worker owns, by the worker's name."""
        found: dict[str, list[int]] = {}
        for name, lane in self.rows(
            "SELECT split_part(substr(a.application_name, %s), '@', 1), l.objid::int"
            " FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory' AND l.classid = %s AND l.granted AND a.datname = current_database()",
            len(APPLICATION) + 2,
            LANE_CLASS,
        ):
            found.setdefault(name, []).append(lane)
        return found

    def sessions(self, worker: str = "") -> list[int]:
        """The backends of the workers' connections, or of one worker's."""
        return [
            pid
            for (pid,) in self.rows(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE %s",
                f"{APPLICATION} {worker}%",
            )
        ]

    # Processes

    def worker(self, name: str, entry: Sequence[str] = ("celery",), **settings: str) -> Process:
        """Start a lane worker.

        :param entry: the module that runs Celery's command line, with arguments of its own.
        :param settings: environment variables.
        """
        command = [
            *entry, "-A", "workers.lane_app", "worker", "--pool", "solo", "--without-gossip", "--without-mingle",
            "--loglevel", "INFO", "-n", f"{name}@%h",
        ]  # fmt: skip
        return self._start(name, command, settings)

    def general(self, name: str, **settings: str) -> Process:
        """Start a general worker, which sweeps and applies payments. It tells nobody of notices.

        :param settings: environment variables.
        """
        command = [
            "celery", "-A", "workers.app", "worker", "--pool", "threads", "--concurrency", "2",
            "-Q", "payments,maintenance", "--without-gossip", "--without-mingle", "--loglevel", "INFO",
            "-n", f"{name}@%h",
        ]  # fmt: skip
        return self._start(name, command, settings)

    def beat(self, name: str, entry: Sequence[str] = ("celery", "-A", "schedules.app")) -> Process:
        """Start a beat.

        :param entry: the module that runs Celery's command line, with arguments of its own.
        """
        return self._start(name, [*entry, "beat", "--pidfile=", "--loglevel", "INFO"], {})

    def relay(self, name: str, port: int, **settings: str) -> Process:
        """Start a relay on a port of this machine.

        :param settings: environment variables.
        """
        return self._start(name, ["workers.relay"], {"CREDITLANE_RELAY_PORT": str(port), **settings})

    def _start(self, name: str, command: Sequence[str], settings: Mapping[str, str]) -> Process:
        environment = {
            "CREDITLANE_BROKER_URL": self.broker.url,
            "CREDITLANE_RESULT_URL": self.broker.result_url,
            "CREDITLANE_DATABASE_URL": self.database,
            "CREDITLANE_CATALOG": str(self.catalog),
            "CREDITLANE_LANES": str(self.lanes),
            "CREDITLANE_BALANCE_SECONDS": "0.5",
            "CREDITLANE_MAX_RETRY_SECONDS": "2",
            **settings,
        }
        process = Process(name, command, environment, self.directory / f"{name}.log")
        self.workers.append(process)
        return process

    def charge_by(self, catalog: str) -> None:
        """Have workers that are yet to start, and the oracle, go by a catalog of the act's own.

        :param catalog: as TOML.
        """
        self.catalog = self.directory / "catalog.toml"
        self.catalog.write_text(catalog, encoding="utf-8")

    # Time

    def travel(self, to: datetime) -> None:
        """Set the ledger's clock."""
        travel(self.database, to - self.value("SELECT clock_timestamp()"))

    def now(self) -> datetime:
        """What time it is by the ledger's clock."""
        now: datetime = self.value("SELECT ledger_now()")
        return now

    def overdue(self) -> int:
        """How many accounts time has something for that nobody has applied."""
        return int(self.value("SELECT count(*) FROM accounts WHERE next_due_at <= ledger_now()"))

    def have_due(self, *schedules: str) -> None:
        """Have schedules ticked for the last time long ago: the next beat that ticks sends them at once.

        Beat measures by the clock of its host, which does not travel.
        """
        for schedule in schedules:
            self.rows(
                "INSERT INTO schedules (name, task, last_tick_at) VALUES (%s, '', now() - interval '99 days')"
                " ON CONFLICT (name) DO UPDATE SET last_tick_at = excluded.last_tick_at",
                schedule,
            )

    def tick(self, name: str, *schedules: str) -> None:
        """Have a beat come, send what is due, and go."""
        self.have_due(*schedules)
        beat = self.beat(name)
        query = "SELECT count(*) FROM schedules WHERE name = ANY(%s) AND last_tick_at > now() - interval '1 day'"
        eventually(
            lambda: self.value(query, list(schedules)) == len(schedules), READY_SECONDS, f"{name} ticks {schedules}"
        )
        beat.end()

    def owning(self, *names: str, lanes: int | None = None) -> None:
        """Wait until every lane has an owner and each of the named workers has some."""
        wanted = self.lanes if lanes is None else lanes

        def shared() -> bool:
            owners = self.owners()
            return sum(map(len, owners.values())) == wanted and all(owners.get(name) for name in names)

        eventually(shared, READY_SECONDS, f"{', '.join(names) or 'the workers'} own their lanes")

    def producer(self, name: str, **options: Any) -> Process:
        """Start a producer; see :class:`~tests.faults.producers.Spec`. It sends to accounts of its own unless told."""
        file = self.directory / f"{name}.jsonl"
        file.touch()
        options.setdefault("accounts", self.accounts(options.get("ids_of") or name))
        options.setdefault("seed", self.seed)
        options.setdefault("lanes", self.lanes)
        endless = not options.get("count") and not options.get("operations")
        spec = Spec(name=name, file=str(file), stop=str(self._stop) if endless else "", **options)
        path = self.directory / f"{name}.json"
        path.write_bytes(msgspec.json.encode(spec))
        environment = {"CREDITLANE_BROKER_URL": self.broker.url, "CREDITLANE_RESULT_URL": self.broker.result_url}
        log = self.directory / f"{name}.log"
        process = Process(name, ["tests.faults.producers", str(path)], environment, log)
        self.producers.append(process)
        self.files.append(file)
        return process

    def accounts(self, producer: str, count: int = 24) -> list[str]:
        """Names of accounts that only one producer uses."""
        return [f"{producer}:{number}" for number in range(count)]

    def notes(self, name: str) -> Notes:
        """A file for what the row itself publishes."""
        path = self.directory / f"{name}.jsonl"
        self.files.append(path)
        return Notes(path)

    def sent(self) -> int:
        """Publications noted so far."""
        return sum(path.read_bytes().count(b'"producer"') for path in self.files)

    def refused(self) -> int:
        """Publications so far that the broker did not confirm."""
        return sum(path.read_bytes().count(b'{"refused"') for path in self.files)

    def under_load(self, operations: int = 100) -> None:
        """Wait until the ledger has so many operations more than now: workers and producers are in full swing."""
        before = self.done()
        eventually(lambda: self.done() >= before + operations, PATIENCE_SECONDS, "the workers apply operations")

    # The end

    def finish(self) -> None:
        """Have the producers end, and wait until all they published is acknowledged.

        :raises MissedError: when they do not, or the lanes do not become empty.
        """
        self._stop.touch()
        for process in self.producers:
            if process.wait(300):
                raise MissedError(f"producer {process.name} failed: {last_lines(process.log, 3)}")
        self.drain()

    def drain(self, lanes: Sequence[int] | None = None) -> None:
        """Wait until nothing is in the lanes, as long as something moves.

        Where the broker counts late, what was published must be accounted for as well, or nothing move for a while.

        :param lanes: some of them; all unless given.
        :raises MissedError: when something is in them and nothing moves for :data:`PATIENCE_SECONDS`.
        """
        late = self.broker.counts_late
        everything = self._published() if late and lanes is None else None
        seen: tuple[int, int] | None = None
        moved = time.monotonic()
        while True:
            depth = self.broker.depth(lanes)
            accounted = self.accounted()
            now = (depth.total, accounted)
            if now != seen:
                seen, moved = now, time.monotonic()
            still = time.monotonic() - moved
            if depth.total == 0 and still >= (late if accounted == everything or not late else 10 * late):
                return
            if still > PATIENCE_SECONDS:
                raise MissedError(
                    f"not quiet: {depth.ready} ready, {depth.unacknowledged} unacknowledged, and nothing moved for"
                    f" {PATIENCE_SECONDS:.0f} s"
                )
            time.sleep(5 * POLL_SECONDS)

    def accounted(self) -> int:
        """Operations in the ledger and messages in quarantine."""
        return int(self.value("SELECT (SELECT count(*) FROM operations) + (SELECT count(*) FROM quarantine)"))

    def _published(self) -> int:
        record = read_record(self.files)
        return len({sent.key for sent in record.sent}) + len(record.poison)

    def judge(self, *, order: bool = True, all_answered: bool = True) -> Judgement:
        """Have the oracle judge what has come to rest."""
        record = read_record(self.files)
        if record.unfinished:
            raise MissedError(f"producers did not end: {', '.join(record.unfinished)}")
        if self.broker.counts_late:
            # What nobody has acknowledged is ready again once everybody is gone, and that is counted at once.
            for worker in self.workers:
                worker.end()
            time.sleep(self.broker.counts_late)
        return judge(
            read_ledger(self.database),
            record,
            read_policy(self.catalog),
            left=self.broker.depth().total,
            started=self.started,
            answers=self.broker.answers([each.reply for each in record.sent if each.reply is not None]),
            all_answered=all_answered,
            order=order,
        )


def logged_lines(processes: Iterable[Process], text: str) -> int:
    """How many log lines of some processes hold a text."""
    return sum(process.logged().count(text) for process in processes)
