"""What a producer may do at the broker, as docker-compose.yml has it: put messages into lanes, and no more."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import amqp
import pytest
import redis
from celery import Celery
from redis.exceptions import NoPermissionError

from creditlane.client import CreditClient
from creditlane.contract import Balance
from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import lane_name, lane_of
from scripts.embedded import HOST, _redis_version, free_port, redis_program, spawn, temporary_directory, wait_until
from scripts.rabbitmq import RABBITMQ_SETTINGS, VHOST, RabbitMQ
from tests.brokers import need_rabbitmq
from tests.conftest import LANES
from tests.security.conftest import Run
from tests.support import ROOT, eventually, owned_lanes, value

BROKERS = ROOT / "scripts" / "brokers"
WORKERS, PRODUCER, ADMIN = "workerspassword", "producerpassword", "adminpassword"

pytestmark = pytest.mark.xdist_group("guarded brokers")

HAS_SELECTORS = _redis_version(redis_program()) >= (7,)


class Guarded(NamedTuple):
    """A broker with its users."""

    host: str
    port: int

    def redis_url(self, user: str, password: str) -> str:
        """The URL of database 0 for a user."""
        return f"redis://{user}:{password}@{self.host}:{self.port}/0"

    def redis(self, user: str, password: str) -> Any:
        """A client of a user."""
        return redis.Redis.from_url(self.redis_url(user, password), decode_responses=True)


def printed(script: str, *arguments: str, **environment: str) -> str:
    """What a script that makes users prints."""
    return subprocess.run(
        ["sh", str(BROKERS / script), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def guarded_redis() -> Iterator[Guarded]:
    """A Redis that is told its users as the one of docker-compose.yml is, and one more that looks after it."""
    with temporary_directory() as directory:
        users = printed(
            "redis_users", "7" if HAS_SELECTORS else "6", REDIS_PASSWORD=WORKERS, REDIS_PRODUCER_PASSWORD=PRODUCER
        )
        port = free_port()
        config = directory / "redis.conf"
        config.write_text(
            f'bind {HOST}\nport {port}\nsave ""\ndir {directory}\n{users}user admin on >{ADMIN} ~* &* +@all\n'
        )
        with (directory / "log").open("wb") as log:
            process = spawn([redis_program(), config], log=log)
        here = Guarded(HOST, port)
        try:
            assert wait_until(lambda: redis_answers(here), 10), (directory / "log").read_text()
            yield here
        finally:
            process.kill()
            process.wait()


def redis_answers(server: Guarded) -> bool:
    try:
        with closing(server.redis("admin", ADMIN)) as store:
            return bool(store.ping())
    except redis.RedisError:
        return False


@pytest.fixture(scope="module")
def guarded_rabbitmq() -> Iterator[Guarded]:
    """A RabbitMQ with the configuration and the users of docker-compose.yml's."""
    need_rabbitmq()
    with temporary_directory() as directory:
        definitions = directory / "definitions.json"
        definitions.write_text(
            printed("rabbitmq_users", VHOST, RABBITMQ_PASSWORD=WORKERS, RABBITMQ_PRODUCER_PASSWORD=PRODUCER)
        )
        lines = [line for line in (BROKERS / "rabbitmq.conf").read_text().splitlines() if line and line[0] != "#"]
        settings = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
        assert set(settings) >= {"consumer_timeout", "load_definitions", "vm_memory_high_watermark.absolute"}
        settings["load_definitions"] = str(definitions)
        settings["disk_free_limit.absolute"] = RABBITMQ_SETTINGS["disk_free_limit.absolute"]
        node = RabbitMQ(directory / "node", settings=settings)
        node.directory.mkdir(mode=0o711)
        (node.directory / "password").write_text(WORKERS)
        node.start()
        yield Guarded(HOST, node.port)
        node.kill()


def rabbit_url(server: Guarded, user: str, password: str) -> str:
    return f"amqp://{user}:{password}@{server.host}:{server.port}/{VHOST}"


def rabbit_channel(server: Guarded, user: str, password: str) -> Any:
    connection = amqp.Connection(f"{server.host}:{server.port}", user, password, virtual_host=VHOST)
    connection.connect()
    return connection.channel()


# --- Redis ---


@pytest.fixture
def redis_workers(guarded_redis: Guarded, database: str, run: Run) -> Guarded:
    """Lane worker, general worker and beat, as their own user, on an empty broker that noted no refusal yet."""
    with closing(guarded_redis.redis("admin", ADMIN)) as admin:
        admin.flushall()
        admin.acl_log_reset()
    for kind in ("lanes", "general", "beat"):
        run(kind, guarded_redis.redis_url("creditlane", WORKERS), database)
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
    return guarded_redis


def refusals(server: Guarded) -> list[tuple[str, str]]:
    """What Redis refused so far: the user and the command, key or channel.

    Except what the Redis library tells of itself when it connects: older servers do not know what that is.
    """
    with closing(server.redis("admin", ADMIN)) as admin:
        found = [(entry["username"], entry["object"]) for entry in admin.acl_log()]
    return [refused for refused in found if refused[1] not in ("client", "client|setinfo")]


def test_a_producer_of_ours_needs_no_more_on_redis(redis_workers: Guarded, database: str) -> None:
    with CreditClient(redis_workers.redis_url("producer", PRODUCER), lanes=LANES) as client:
        client.open("alice", id="open")
        assert client.grant("alice", 5, source="pack", id="grant", wait=10) is not None
        with client.buffer() as buffer:
            for number in range(20):
                buffer.open(f"account-{number}", id="open")
        (settled,) = client.batch([("credits.settle", "settle", {"account": "alice"})], id="batch", wait=10)
        assert settled.applied
        eventually(lambda: client.backlog(lane_of("alice", LANES)) == 0)
        found = client.balance("alice")
        assert found is not None
        assert found.available == 55
        assert client.notices("alice").total == client.mark_read("alice", wait=10) == 0
    eventually(lambda: value(database, "SELECT count(*) FROM operations") == 23)
    # Of its own accord an older Redis cannot let a producer remove its answers and not the lanes: they expire.
    assert set(refusals(redis_workers)) <= (set() if HAS_SELECTORS else {("producer", "unlink")})


def test_workers_beat_and_flower_need_no_more_on_redis(redis_workers: Guarded, database: str, run: Run) -> None:
    url = redis_workers.redis_url("creditlane", WORKERS)
    port = free_port()
    run("flower", url, database, f"--address={HOST}", f"--port={port}", FLOWER_UNAUTHENTICATED_API="1")

    def seen_by_flower() -> bool:
        try:
            with closing(http.client.HTTPConnection(HOST, port, timeout=10)) as connection:
                connection.request("GET", "/api/workers?refresh=1")
                return len(json.loads(connection.getresponse().read())) == 2
        except (OSError, http.client.HTTPException, ValueError):
            return False

    eventually(seen_by_flower, what="Flower knows both workers")
    # What fell due long ago is sent at once.
    eventually(lambda: value(database, "SELECT count(*) FROM schedules"), what="beat has sent something")
    assert refusals(redis_workers) == []


@pytest.mark.parametrize("command", ["FLUSHALL", "CONFIG GET *", "ACL LIST", "KEYS *", "MONITOR", "SHUTDOWN"])
def test_workers_may_not_on_redis(command: str, guarded_redis: Guarded) -> None:
    with closing(guarded_redis.redis("creditlane", WORKERS)) as store, pytest.raises(NoPermissionError):
        store.execute_command(*command.split())


FORBIDDEN_ON_REDIS = {
    "take": "RPOP lane.001",
    "take the newest": "LPOP lane.001",
    "move": "LMOVE lane.001 queries RIGHT LEFT",
    "wait and take": "BRPOP lane.001 1",
    "read": "LRANGE lane.001 0 -1",
    "read one": "LINDEX lane.001 0",
    "delete": "DEL lane.001",
    "unlink": "UNLINK lane.001",
    "trim": "LTRIM lane.001 1 0",
    "change": "LSET lane.001 0 x",
    "remove": "LREM lane.001 0 x",
    "rename": "RENAME lane.001 lane.002",
    "expire": "EXPIRE lane.001 1",
    "dump": "DUMP lane.001",
    "a set in its place": "SADD lane.001 x",
    "what is in a worker's hands": "LRANGE lane.001:unacked 0 -1",
    "into a worker's hands": "LPUSH lane.001:unacked x",
    "the fence": "INCR lane.001:epoch",
    "the fence's place": "LPUSH lane.001:epoch x",
    "other queues": "LPUSH maintenance x",
    "others' keys": "GET unacked",
    "write an answer": "SET celery-task-meta-x x",
    "send an answer": "PUBLISH celery-task-meta-x x",
    "command workers": "PUBLISH /0.celery.pidbox x",
    "hear everything": "PSUBSCRIBE *",
    "hear all answers": "PSUBSCRIBE celery-task-meta-*",
    "hear events": "SUBSCRIBE /0.celeryev/worker.heartbeat",
    "run scripts": "EVAL return 0",
    "list keys": "KEYS *",
    "scan keys": "SCAN 0",
    "flush": "FLUSHALL",
    "configure": "CONFIG GET *",
    "users": "ACL LIST",
    "monitor": "MONITOR",
    "look around": "INFO",
    "others' connections": "CLIENT LIST",
    "end others": "CLIENT KILL TYPE normal",
    "stop": "SHUTDOWN NOSAVE",
}


@pytest.mark.parametrize("what", FORBIDDEN_ON_REDIS)
def test_a_producer_may_not_on_redis(what: str, guarded_redis: Guarded) -> None:
    with closing(guarded_redis.redis("admin", ADMIN)) as admin:
        admin.delete("lane.001")
        admin.lpush("lane.001", "kept")
        with closing(guarded_redis.redis("producer", PRODUCER)) as store:
            store.lpush("lane.001", "added")
            with pytest.raises(NoPermissionError):
                store.execute_command(*FORBIDDEN_ON_REDIS[what].split())
        assert admin.lrange("lane.001", 0, -1) == ["added", "kept"]


def test_who_has_not_the_password_stays_outside_redis(guarded_redis: Guarded) -> None:
    for user, password in (("producer", WORKERS), ("creditlane", PRODUCER), ("default", WORKERS), ("nobody", "")):
        with closing(guarded_redis.redis(user, password)) as store, pytest.raises(redis.AuthenticationError):
            store.ping()
    with (
        closing(redis.Redis(host=guarded_redis.host, port=guarded_redis.port)) as store,
        pytest.raises(redis.AuthenticationError),
    ):
        store.ping()
    with CreditClient(guarded_redis.redis_url("producer", WORKERS)) as client:
        with pytest.raises(BrokerUnavailableError) as caught:
            client.open("alice", id="open")
        assert WORKERS not in str(caught.value)


@pytest.mark.skipif(not HAS_SELECTORS, reason="needs selectors, which Redis has from 7 on")
def test_a_plain_celery_client_needs_no_more_on_redis(redis_workers: Guarded) -> None:
    url = redis_workers.redis_url("producer", PRODUCER)
    app = Celery("plain", broker=url, backend=url)
    sent = app.send_task(
        "credits.open", kwargs={"account": "alice"}, task_id="open-alice", queue=lane_of("alice", LANES)
    )
    assert sent.get(timeout=10)["status"] == "applied"
    assert refusals(redis_workers) == []


# --- RabbitMQ ---


@pytest.fixture
def rabbitmq_workers(guarded_rabbitmq: Guarded, database: str, run: Run) -> Guarded:
    """Lane worker and general worker, as their own user."""
    for kind in ("lanes", "general"):
        run(kind, rabbit_url(guarded_rabbitmq, "creditlane", WORKERS), database)
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
    eventually(lambda: has_queue(guarded_rabbitmq, lane_name(LANES - 1)), what="the last lane is made")
    return guarded_rabbitmq


def has_queue(server: Guarded, queue: str) -> bool:
    channel = rabbit_channel(server, "creditlane", WORKERS)
    with closing(channel.connection):
        try:
            channel.queue_declare(queue, passive=True)
        except amqp.NotFound:
            return False
        return True


def test_a_producer_of_ours_needs_no_more_on_rabbitmq(rabbitmq_workers: Guarded, database: str) -> None:
    with CreditClient(rabbit_url(rabbitmq_workers, "producer", PRODUCER), lanes=LANES) as client:
        assert client.open("alice", id="open", wait=10) is not None
        client.grant("alice", 5, source="pack", id="grant")
        with client.buffer() as buffer:
            for number in range(20):
                buffer.open(f"account-{number}", id="open")
        (settled,) = client.batch([("credits.settle", "settle", {"account": "alice"})], id="batch", wait=10)
        assert settled.applied
        eventually(lambda: client.backlog(lane_of("alice", LANES)) == 0)
        eventually(lambda: asked(client), what="the general worker is there")
        found = client.balance("alice")
        assert found is not None
        assert found.available == 55
        assert client.notices("alice").total == client.mark_read("alice", wait=10) == 0
    eventually(lambda: value(database, "SELECT count(*) FROM operations") == 23)


def asked(client: CreditClient) -> Balance | None:
    """Alice's balance, once there is a queue to ask through."""
    try:
        return client.balance("alice")
    except BrokerUnavailableError:
        return None


def test_a_producer_makes_no_lane_on_rabbitmq(guarded_rabbitmq: Guarded) -> None:
    with CreditClient(rabbit_url(guarded_rabbitmq, "producer", PRODUCER), lanes=4096) as client:
        account = next(f"a{number}" for number in range(1000) if lane_of(f"a{number}", 4096) > "lane.0999")
        with pytest.raises(BrokerUnavailableError, match="has no queue lane"):
            client.open(account, id="open")


Attempt = Callable[[Any], object]

LANE = "lane.999"
"""One that no worker of these tests has."""

FORBIDDEN_ON_RABBITMQ: dict[str, Attempt] = {
    "take": lambda channel: channel.basic_get(LANE),
    "consume": lambda channel: channel.basic_consume(LANE),
    "purge": lambda channel: channel.queue_purge(LANE),
    "delete": lambda channel: channel.queue_delete(LANE),
    "declare a lane": lambda channel: channel.queue_declare("lane.998", durable=True),
    "declare a queue": lambda channel: channel.queue_declare("mine"),
    "redirect": lambda channel: channel.queue_bind(LANE, "amq.topic", "#"),
    "listen": lambda channel: channel.queue_bind(
        channel.queue_declare("", exclusive=True).queue, "celeryev", "#"
    ),
    "declare an exchange": lambda channel: channel.exchange_declare("mine", "topic"),
    "delete an exchange": lambda channel: channel.exchange_delete("celeryev"),
    "bind exchanges": lambda channel: channel.exchange_bind("amq.topic", "celeryev", "#"),
    "command workers": lambda channel: publish(channel, "celery.pidbox"),
    "send events": lambda channel: publish(channel, "celeryev"),
    "publish elsewhere": lambda channel: publish(channel, "amq.direct"),
    "reach a queue by its name": lambda channel: publish(channel, "", "lanes@host.celery.pidbox"),
}  # fmt: skip


def publish(channel: Any, exchange: str, routing_key: str = "x") -> None:
    """Publish, and wait until the server has said what it thinks of it."""
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message("x"), exchange, routing_key)


@pytest.mark.parametrize("what", FORBIDDEN_ON_RABBITMQ)
def test_a_producer_may_not_on_rabbitmq(what: str, guarded_rabbitmq: Guarded) -> None:
    owner = rabbit_channel(guarded_rabbitmq, "creditlane", WORKERS)
    with closing(owner.connection):
        for name, kind in (("celery.pidbox", "fanout"), ("celeryev", "topic")):
            owner.exchange_declare(name, kind, durable=kind == "topic", auto_delete=False)
        owner.queue_declare(LANE, durable=True, auto_delete=False)  # a real one lets nobody look at a message
        owner.confirm_select()
        owner.basic_publish_confirm(amqp.Message("kept"), "", LANE)
        channel = rabbit_channel(guarded_rabbitmq, "producer", PRODUCER)
        with closing(channel.connection), pytest.raises(amqp.AccessRefused):
            FORBIDDEN_ON_RABBITMQ[what](channel)
        assert owner.basic_get(LANE, no_ack=True).body == "kept"
        owner.queue_delete(LANE)
        owner.exchange_delete("celery.pidbox")
        owner.exchange_delete("celeryev")


def test_a_producer_cannot_read_anothers_answers_on_rabbitmq(guarded_rabbitmq: Guarded) -> None:
    one, other = (rabbit_channel(guarded_rabbitmq, "producer", PRODUCER) for _ in range(2))
    with closing(one.connection), closing(other.connection):
        queue = one.queue_declare("", exclusive=True).queue
        with pytest.raises(amqp.ResourceLocked):
            other.basic_consume(queue)


def test_who_has_not_the_password_stays_outside_rabbitmq(guarded_rabbitmq: Guarded) -> None:
    for user, password in (("producer", WORKERS), ("creditlane", PRODUCER), ("guest", "guest")):
        with pytest.raises(amqp.AccessRefused):
            rabbit_channel(guarded_rabbitmq, user, password)
    with CreditClient(rabbit_url(guarded_rabbitmq, "producer", WORKERS)) as client:
        with pytest.raises(BrokerUnavailableError) as caught:
            client.open("alice", id="open")
        assert WORKERS not in str(caught.value)


# --- No password, no users ---


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("redis_users", ("REDIS_PASSWORD", "REDIS_PRODUCER_PASSWORD")),
        ("rabbitmq_users", ("RABBITMQ_PASSWORD", "RABBITMQ_PRODUCER_PASSWORD")),
    ],
)
def test_no_password_has_a_default(script: str, names: tuple[str, str]) -> None:
    for missing in names:
        for given in ({}, {missing: ""}):
            with pytest.raises(subprocess.CalledProcessError):
                printed(script, **{name: "given" for name in names if name != missing}, **given)
