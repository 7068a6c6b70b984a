"""A whole deployment for each of the five systems: its catalog, a broker, a lane worker, a database, a producer.

Each module has one, and each test an account of its own in it. What a test says is sent by the client, goes through the
broker to the worker, and is asked back; nothing is called from the side. In the end everything is audited.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from creditlane.client import CreditClient
from creditlane.codes import Code
from creditlane.contract import Result
from models.audit import audit
from models.catalog import load_catalog
from models.database import connect
from scripts.embedded import Stack
from tasks.replay import Replayer
from tests.broker import RedisBroker
from tests.conftest import LANES, TEMPLATE
from tests.support import Worker, eventually, owned_lanes, rows, travel

ANSWER_SECONDS = 30.0


class System:
    """One of the five, running.

    :param catalog_name: of the catalog in force.
    """

    def __init__(self, catalog_name: str, database: str, broker_url: str, client: CreditClient) -> None:
        self.broker_url = broker_url
        self.catalog = load_catalog(catalog_name)
        self.database = database
        self.client = client
        self.away = timedelta()
        self._numbers = count(1)

    def id(self) -> str:
        """A new operation id."""
        return f"id-{next(self._numbers)}"

    def name(self, who: str) -> str:
        """A new account's name."""
        return f"{who}-{next(self._numbers)}"

    def later(self, **span: float) -> None:
        """Let so much time pass, as ``timedelta`` counts it; for the accounts of this test alone."""
        self.away += timedelta(**span)
        travel(self.database, self.away)

    def open(self, who: str = "user", **content: Any) -> Member:
        """Open a new account, and give it."""
        member = Member(self, self.name(who))
        opened = self.client.open(member.account, id=self.id(), wait=ANSWER_SECONDS, **content)
        assert opened is not None
        assert opened.status == "applied"
        return member

    def connect(self, *, read_only: bool = True) -> psycopg.Connection[Any]:
        """A connection for the functions that read, and for those that sell."""
        return connect(self.database, "tests", read_only=read_only)

    def read(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of the database."""
        return rows(self.database, query, *parameters)


class Member:
    """An account, and what its owner's services send about it."""

    def __init__(self, system: System, account: str) -> None:
        self.system = system
        self.account = account

    def send(self, name: str, /, **content: Any) -> Result:
        """Send an operation of any kind and wait for its answer."""
        id = content.pop("id", None) or self.system.id()
        result = self.system.client.submit(name, id, {"account": self.account, **content}, ANSWER_SECONDS)
        assert result is not None
        return result

    def use(self, feature: str, quantity: int | str = 1, **content: Any) -> Result:
        """Use a feature; it must be paid for."""
        used = self.send("credits.consume", feature=feature, quantity=quantity, **content)
        assert used.status == "applied", used
        return used

    def burn(self, amount: int | str) -> Result:
        """Use so many credits for anything; they must be there."""
        used = self.send("credits.consume", amount=amount)
        assert used.status == "applied", used
        return used

    def buy(self, pack: str) -> Result:
        """What a pack's payment leads to: a lot with its price, for each that the pack is made of."""
        sold = self.system.catalog.packs[pack]
        purchase = f"stripe:{self.system.id()}"
        for lot in sold.lots:
            bought = self.send(
                "credits.grant",
                amount=str(Decimal(lot.credits_micro) / 10**6),
                source=lot.source,
                purchase=purchase,
                expires_in=None if lot.expires_days is None else lot.expires_days * 86_400,
                features=None if lot.features is None else list(lot.features),
            )
            assert bought.status == "applied", bought
        return bought

    def refused(self, code: Code, name: str, /, **content: Any) -> Result:
        """Send what is to be refused with this code."""
        answer = self.send(name, **content)
        assert (answer.status, answer.code) == ("rejected", code), answer
        return answer

    @property
    def available(self) -> Decimal:
        """What can be spent now, time's doings included."""
        balance = self.send("credits.settle").balance
        assert balance is not None
        return balance.available

    @property
    def by_source(self) -> dict[str, str]:
        """The same by source, as plain numbers."""
        balance = self.send("credits.settle").balance
        assert balance is not None
        return {source: f"{amount:f}" for source, amount in balance.by_source.items()}

    def notices(self, *kinds: str) -> list[str]:
        """The kinds of its notices in their order; only these unless none are named."""
        found = self.system.read("SELECT kind FROM notices WHERE account = %s ORDER BY created_at, key", self.account)
        return [kind for (kind,) in found if not kinds or kind in kinds]


@pytest.fixture(scope="module")
def deployment(
    request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """The system that the module's ``CATALOG`` names."""
    name = request.module.CATALOG
    database = stack.create_database(f"system_{name}", template=TEMPLATE)
    broker = RedisBroker(stack.redis)
    log: Path = tmp_path_factory.mktemp(name) / "worker.log"
    worker = Worker(
        name,
        ["-A", "workers.lane_app", "worker", "--pool", "solo", "--without-gossip", "--without-mingle"],
        {
            "CREDITLANE_BROKER_URL": broker.url, "CREDITLANE_DATABASE_URL": database, "CREDITLANE_CATALOG": name,
            "CREDITLANE_LANES": str(LANES), "CREDITLANE_BALANCE_SECONDS": "0.5",
            **getattr(request.module, "SETTINGS", {}),
        },
        log,
    )  # fmt: skip
    try:
        eventually(lambda: owned_lanes(database) == LANES, what=f"the worker takes all lanes: {log}")
        with CreditClient(broker.url, lanes=LANES) as client:
            system = System(name, database, broker.url, client)
            yield system
    finally:
        worker.kill()
    travel(database, timedelta())
    with psycopg.connect(database, autocommit=True) as connection:
        report = audit(connection, replayer=Replayer({system.catalog.label: system.catalog}))
    stack.postgres.drop_database(f"system_{name}")
    assert report.holds, report.faults
    assert report.replayed


@pytest.fixture
def system(deployment: System) -> Iterator[System]:
    """The module's system at the present time."""
    yield deployment
    if deployment.away:
        deployment.away = timedelta()
        travel(deployment.database, timedelta())
