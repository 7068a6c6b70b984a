"""Flower is never open to others without a password, whoever starts it."""

from __future__ import annotations

import http.client
from base64 import b64encode
from contextlib import closing
from types import SimpleNamespace
from typing import NamedTuple

import click
import pytest

from scripts.embedded import HOST, free_port, port_is_free
from tests.security.conftest import Run
from tests.support import ROOT, Worker, eventually
from workers.flower_guard import check_flower

AUTH = "operator:flowerpassword"


class Started(NamedTuple):
    """A Flower that was started, and where it would listen."""

    process: Worker
    port: int

    def status(self, auth: str | None = None, path: str = "/workers") -> int:
        """What it answers; 0 when nobody does."""
        headers = {} if auth is None else {"Authorization": "Basic " + b64encode(auth.encode()).decode()}
        try:
            with closing(http.client.HTTPConnection(HOST, self.port, timeout=10)) as connection:
                connection.request("GET", path, headers=headers)
                return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def flower(run: Run, broker_url: str, database: str, *options: str, **environment: str) -> Started:
    port = free_port()
    return Started(run("flower", broker_url, database, f"--port={port}", *options, **environment), port)


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ([], {}),
        (["--address=0.0.0.0"], {"FLOWER_BASIC_AUTH": "operator:", "FLOWER_UNAUTHENTICATED_API": "1"}),
        ([], {"FLOWER_ADDRESS": "0.0.0.0"}),
    ],
)
def test_it_does_not_start_open_to_others(
    options: list[str], environment: dict[str, str], broker_url: str, database: str, run: Run
) -> None:
    started = flower(run, broker_url, database, *options, **environment)
    assert started.process.process.wait(60) == 2
    assert "without a password" in started.process.logged()
    assert "Traceback" not in started.process.logged()
    assert port_is_free(started.port)


def options(address: str, *basic_auth: str, auth: str = "", unix_socket: str = "") -> SimpleNamespace:
    return SimpleNamespace(address=address, basic_auth=list(basic_auth), auth=auth, unix_socket=unix_socket)


@pytest.mark.parametrize("address", ["", "0.0.0.0", "::", "10.0.0.1", "some.host", "localhost.example"])
@pytest.mark.parametrize("basic_auth", [[], [""], ["operator"], ["operator:"], [AUTH, "guest:"]])
def test_what_is_refused(address: str, basic_auth: list[str]) -> None:
    with pytest.raises(click.UsageError, match="without a password") as caught:
        check_flower(options(address, *basic_auth))
    assert "flowerpassword" not in str(caught.value)


@pytest.mark.parametrize(
    "good",
    [
        options("127.0.0.1"), options("127.1.2.3"), options("::1"), options("localhost"), options("0.0.0.0", AUTH),
        options("", AUTH, "other:password"), options("", auth=".*@example.com"), options("", unix_socket="/run/flower"),
    ],
)  # fmt: skip
def test_what_is_not(good: SimpleNamespace) -> None:
    check_flower(good)


def test_with_a_password_it_asks_for_it(broker_url: str, database: str, run: Run) -> None:
    started = flower(run, broker_url, database, "--address=0.0.0.0", FLOWER_BASIC_AUTH=AUTH)
    eventually(lambda: started.status() == 401, what="it answers")
    for path in ("/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks"):
        assert started.status(path=path) == 401
        assert started.status("operator:wrong", path) == 401
    assert started.status(AUTH) == 200
    assert AUTH.partition(":")[2] not in started.process.logged()


def test_on_this_machine_alone_it_needs_none(broker_url: str, database: str, run: Run) -> None:
    started = flower(run, broker_url, database, f"--address={HOST}", FLOWER_ADDRESS="0.0.0.0")
    eventually(lambda: started.status() == 200, what="it answers")
    assert started.status(path="/api/workers") == 401


def test_other_commands_do_not_mind(broker_url: str, database: str, run: Run) -> None:
    worker = run("general", broker_url, database, "--loglevel=INFO", FLOWER_ADDRESS="0.0.0.0")
    eventually(lambda: "ready." in worker.logged())


def test_whoever_starts_it_says_where() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    assert "FLOWER_BASIC_AUTH: ${FLOWER_BASIC_AUTH:?" in compose
    assert "${FLOWER_BIND:-127.0.0.1}:5555:5555" in compose
    assert 'f"--address={HOST}"' in (ROOT / "scripts" / "run_stack.py").read_text()
