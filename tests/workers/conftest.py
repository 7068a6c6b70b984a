"""Fixtures of notices: those whom they go to, and this process as the worker that sends them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psycopg
import pytest
import redis

from models import database as pools
from models.settings import settings
from tests.receivers import MailServer, Receiver
from tests.support import Ledger
from workers import notices
from workers.channels import Rests

SECRET = "whsec_" + base64.b64encode(b"creditlane tests, 24 bytes").decode()


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    """A mail server."""
    server = MailServer()
    yield server
    server.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver of webhooks."""
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def channels(mail_server: MailServer, receiver: Receiver) -> dict[str, str]:
    """The settings by which notices find them."""
    return {
        "CREDITLANE_SMTP_URL": f"smtp://127.0.0.1:{mail_server.port}",
        "CREDITLANE_MAIL_FROM": "Acme <credits@acme.example>",
        "CREDITLANE_WEBHOOK_URL": receiver.url,
        "CREDITLANE_WEBHOOK_SECRET": SECRET,
    }


@pytest.fixture
def telling(
    database: str, broker_url: str, channels: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """This process as a worker that sends notices."""
    for name, given in (
        ("CREDITLANE_DATABASE_URL", database), ("CREDITLANE_BROKER_URL", broker_url), *channels.items(),
    ):  # fmt: skip
        monkeypatch.setenv(name, given)
    monkeypatch.setattr(notices, "rests", Rests())

    def forget() -> None:
        settings.cache_clear()
        notices.sender.cache_clear()
        pools.close_pool()

    forget()
    yield
    notices.sender().close()
    forget()


Tell = Callable[..., str]


@pytest.fixture
def tell(ledger: Ledger, database: str) -> Tell:
    """Write a notice as an operation does, for an account that is made with it; gives its key."""

    def write(kind: str = "refunded", account: str = "alice", /, **details: Any) -> str:
        opening = {
            "email": "alice@example.org", "locale": "en", "timezone": "UTC",
            **{name: details.pop(name) for name in ("email", "locale", "timezone") if name in details},
        }  # fmt: skip
        channels = details.pop("channels", ["email", "webhook"])
        opening = {name: given for name, given in opening.items() if given is not None}
        ledger.apply("credits.open", "open", account=account, **opening)
        with psycopg.connect(database, autocommit=True) as connection:
            row = connection.execute(
                "INSERT INTO notices (account, key, kind, at, created_at, details, channels)"
                " SELECT %s, %s || ':' || count(*), %s, ledger_now(), ledger_now(), %s, %s FROM notices RETURNING key",
                (account, kind, kind, json.dumps(details or {"amount": "1.5", "charge": "c-1"}), channels),
            ).fetchone()
        assert row is not None
        return str(row[0])

    return write


Work = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def work(telling: None, broker_url: str) -> Work:
    """Do what stands in the queue of notices, until nothing does; gives what each task did."""
    tasks = {task.name: task for task in (notices.deliver, notices.send)}

    def run() -> list[dict[str, Any]]:
        done: list[dict[str, Any]] = []
        with redis.Redis.from_url(broker_url) as store:
            while (raw := store.rpop("notices")) is not None:
                envelope = json.loads(raw)
                arguments = msgspec.json.decode(base64.b64decode(envelope["body"]))[1]
                done.append(tasks[envelope["headers"]["task"]](**arguments))
        return done

    return run
