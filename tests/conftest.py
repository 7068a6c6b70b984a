"""Fixtures: a real Postgres and a real Redis for each test process, a database and a broker for each test.

Whatever a test has written, the closing identity and the whole audit hold at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from creditlane.client import CreditClient
from creditlane.codes import Code
from models.audit import audit
from models.catalog import load_catalog, shipped_names
from models.migrate import upgrade
from scripts.embedded import Stack, temporary_directory, temporary_stack
from scripts.rabbitmq import RabbitMQ
from tasks.replay import Replayer
from tests.broker import Broker, RabbitBroker, RedisBroker
from tests.brokers import need_rabbitmq
from tests.databases import Databases
from tests.support import Ledger, Worker, eventually, owned_lanes
from workers.ledger_writer import Job, LedgerWriter, connect
from workers.quarantine import Quarantined

LANES = 8
"""Few lanes, so that two workers have some each and every lane some accounts."""

CATALOGS = [load_catalog(name) for name in shipped_names()]
"""What the operations of the tests are replayed with in the end; those of other catalogs are not."""

TEMPLATE = "migrated"

KEPT_BY_THE_SYSTEM = {"fsync": "off", "full_page_writes": "off"}
"""A server that is killed loses nothing that it has written; only a machine without power would, and none is here."""


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Postgres and Redis of this test process. Both write before they answer; neither waits for the disk."""
    with temporary_stack(appendfsync="no", postgres_settings=KEPT_BY_THE_SYSTEM) as running:
        upgrade(running.create_database(TEMPLATE))
        yield running


@pytest.fixture(scope="session")
def databases(stack: Stack) -> Databases:
    """Migrated databases on that Postgres."""
    return Databases(stack.postgres, TEMPLATE)


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """The URL of a fresh, migrated database, audited when the test is done."""
    yield from _audited(databases, databases.take())


@pytest.fixture
def unused_database(databases: Databases) -> Iterator[str]:
    """As ``database``, and nobody has written to its files before."""
    yield from _audited(databases, databases.take(unused=True))


def _audited(databases: Databases, url: str) -> Iterator[str]:
    yield url
    with psycopg.connect(url, autocommit=True) as connection:
        report = audit(connection, replayer=Replayer({catalog.label: catalog for catalog in CATALOGS}))
    databases.give_back(url)
    assert report.holds, report.faults


@pytest.fixture
def tampered_database(databases: Databases) -> Iterator[str]:
    """A fresh, migrated database whose audit may fail in the end."""
    url = databases.take()
    yield url
    databases.give_back(url)


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """The RabbitMQ of this test process."""
    need_rabbitmq()
    with temporary_directory() as directory:
        node = RabbitMQ(directory / "rabbitmq").start()
        yield node
        node.stop()


@pytest.fixture
def broker_kind(request: pytest.FixtureRequest) -> str:
    """Which broker the test runs on: see :data:`tests.broker.on_both_brokers`."""
    return str(getattr(request, "param", "redis"))


@pytest.fixture
def broker(broker_kind: str, request: pytest.FixtureRequest) -> Iterator[Broker]:
    """An empty broker."""
    if broker_kind == "redis":
        yield RedisBroker(request.getfixturevalue("stack").redis)
        return
    rabbit = RabbitBroker(request.getfixturevalue("rabbitmq"))
    yield rabbit
    rabbit.remove()


@pytest.fixture
def broker_url(broker: Broker) -> str:
    """The URL of an empty broker."""
    return broker.url


@pytest.fixture
def client(broker_url: str) -> Iterator[CreditClient]:
    """A producer's client on the test's broker."""
    with CreditClient(broker_url, lanes=LANES) as credits:
        yield credits


Spawn = Callable[..., Worker]


@pytest.fixture
def spawn(database: str, broker_url: str, tmp_path: Path) -> Iterator[Spawn]:
    """Start lane workers; ``crash_at`` is a crash point. All are killed when the test is done."""
    started: list[Worker] = []

    def start(name: str, kind: str = "lanes", **environment: str) -> Worker:
        command = {
            "lanes": "-A workers.lane_app worker --pool solo --without-gossip --without-mingle",
            "general": "-A workers.app worker --pool threads --concurrency 2 --without-mingle"
            " -Q queries,notices,payments,maintenance",
        }[kind].split()
        settings = {
            "CREDITLANE_BROKER_URL": broker_url,
            "CREDITLANE_DATABASE_URL": database,
            "CREDITLANE_CATALOG": "packs",
            "CREDITLANE_LANES": str(LANES),
            "CREDITLANE_BALANCE_SECONDS": "0.5",
            **environment,
        }
        worker = Worker(name, [*command, "-n", f"{name}@%h"], settings, tmp_path / f"{name}.log")
        started.append(worker)
        return worker

    yield start
    for worker in started:
        if worker.running:
            worker.kill()


@pytest.fixture
def lane_worker(spawn: Spawn, database: str) -> Worker:
    """One lane worker that owns every lane."""
    worker = spawn("worker")
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
    return worker


@pytest.fixture
def ledger(database: str) -> Iterator[Ledger]:
    """The ledger writer in this process."""
    yield from _ledger(database)


@pytest.fixture
def tampered_ledger(tampered_database: str) -> Iterator[Ledger]:
    """The ledger writer on the database that may be tampered with."""
    yield from _ledger(tampered_database)


def _ledger(database: str) -> Iterator[Ledger]:
    catalog = load_catalog("packs")

    def poison(job: Job, code: Code, reason: str, trace: str | None) -> Quarantined:
        return Quarantined(
            code, reason, "test", job.arguments, task=job.name, operation=job.operation, account=job.account,
            traceback=trace,
        )  # fmt: skip

    with connect(database) as connection:
        yield Ledger(LedgerWriter(connection, lambda: catalog, poison), catalog)
