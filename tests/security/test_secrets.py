"""No password is shown: not by what runs, not by what fails, not to who asks, at the most talkative level."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import Celery

from scripts.embedded import HOST, Stack, free_port
from tests.broker import Broker, on_both_brokers
from tests.conftest import LANES
from tests.security.conftest import Run
from tests.support import ROOT, Worker, eventually, owned_lanes

SECRET = "pa55word"
FLOWER = "flowerpassword"
KINDS = ("lanes", "general", "beat")


def password_of(url: str) -> str:
    found = urlsplit(url).password
    assert found
    return found


def assert_shown_nowhere(secrets: list[str], texts: Mapping[str, str]) -> None:
    """No text holds a secret; says where one does, and not what."""
    found = [name for name, text in texts.items() if any(secret in text for secret in secrets)]
    assert found == []


def start(run: Run, broker_url: str, database: str) -> tuple[dict[str, Worker], int]:
    """Everything, at the most talkative level, and Flower's port."""
    port = free_port()
    processes = {kind: run(kind, broker_url, database, "--loglevel=DEBUG") for kind in KINDS}
    options = (f"--address={HOST}", f"--port={port}", "--debug")
    processes["flower"] = run("flower", broker_url, database, *options, FLOWER_BASIC_AUTH=f"operator:{FLOWER}")
    return processes, port


def page(port: int, path: str) -> str:
    """A page of Flower's; nothing while it does not answer."""
    headers = {"Authorization": "Basic " + b64encode(f"operator:{FLOWER}".encode()).decode()}
    try:
        with closing(http.client.HTTPConnection(HOST, port, timeout=20)) as connection:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.read().decode() if answer.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return ""


@on_both_brokers
def test_what_runs_shows_no_password(broker: Broker, database: str, run: Run) -> None:
    processes, port = start(run, broker.url, database)
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
    with Celery("asks", broker=broker.url) as app:

        def ask(command: str, **arguments: Any) -> dict[str, Any]:
            def answers() -> dict[str, Any]:
                found: dict[str, Any] = app.control.inspect(timeout=2)._request(command, **arguments) or {}
                return found if len(found) == 2 else {}

            return eventually(answers, what=f"both workers answer {command}")

        conf = ask("conf")
        told = {
            "conf": conf,
            "conf with defaults": ask("conf", with_defaults=True),
            "stats": ask("stats"),
            "report": ask("report"),
            "active queues": ask("active_queues"),
        }
    texts = {name: json.dumps(answers) for name, answers in told.items()}
    assert "broker_url" in texts["conf"]
    paths = ["/workers", "/api/workers?refresh=1", "/tasks", "/broker", *(f"/worker/{name}" for name in conf)]
    texts |= {path: eventually(partial(page, port, path), what=path) for path in paths}

    # What a broker and a database that go away make them say.
    broker.cut()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes again")
    for process in processes.values():
        if process.running:
            process.stop(60)
    texts |= {f"the log of {kind}": process.logged() for kind, process in processes.items()}
    assert all(texts.values())
    assert_shown_nowhere([password_of(broker.url), password_of(database), FLOWER], texts)


NOBODY = f"{HOST}:1"
REFUSED = ("ACCESS_REFUSED", "invalid username")
UNREACHABLE = ("refused", "Traceback", "Cannot connect")


def says(process: Worker, words: tuple[str, ...]) -> bool:
    """Whether a process has logged one of these."""
    return any(word in process.logged() for word in words)


@pytest.mark.parametrize(
    "broker_url",
    [
        f"redis://creditlane:{SECRET}@{NOBODY}/0",
        f"amqp://creditlane:{SECRET}@{NOBODY}/creditlane",
        f"redis//creditlane:{SECRET}@{HOST}/0",
    ],
)
def test_what_finds_no_broker_shows_no_password(broker_url: str, database: str, run: Run) -> None:
    processes, _ = start(run, broker_url, database)
    for kind, process in processes.items():
        eventually(partial(says, process, UNREACHABLE), 60, f"{kind} says so")
    texts = {kind: process.logged() for kind, process in processes.items()}
    assert_shown_nowhere([SECRET, password_of(database), FLOWER], texts | command_line(broker_url, database))


@on_both_brokers
def test_what_is_refused_by_a_broker_shows_no_password(broker: Broker, database: str, run: Run) -> None:
    known = password_of(broker.url)
    wrong = broker.url.replace(known, SECRET)
    processes, _ = start(run, wrong, database)
    for kind, process in processes.items():
        eventually(partial(says, process, REFUSED), 60, kind)
    texts = {kind: process.logged() for kind, process in processes.items()}
    assert_shown_nowhere([SECRET, known, password_of(database), FLOWER], texts | command_line(wrong, database))


@pytest.mark.parametrize("what", ["nobody there", "wrong password", "no URL"])
def test_what_finds_no_database_shows_no_password(what: str, stack: Stack, broker_url: str, run: Run) -> None:
    database = {
        "nobody there": f"postgresql://creditlane:{SECRET}@{NOBODY}/creditlane",
        "wrong password": f"postgresql://creditlane:{SECRET}@{HOST}:{stack.postgres.port}/creditlane",
        "no URL": f"postgresql//creditlane:{SECRET}@{HOST}/creditlane",
    }[what]
    process = run("lanes", broker_url, database, "--loglevel=DEBUG")
    word = {"no URL": "not a connection URL", "wrong password": "password authentication failed"}.get(what, "port")
    eventually(lambda: word in process.logged(), 60, "it says so")
    texts = {"lanes": process.logged()} | command_line(broker_url, database)
    assert_shown_nowhere([SECRET, password_of(broker_url)], texts)


COMMANDS = (["creditlane.command", "lanes"], ["celery", "-A", "workers.app", "report"])


def command_line(broker_url: str, database: str) -> dict[str, str]:
    """What the command line, and Celery's own, say."""
    environment = {**os.environ, "CREDITLANE_BROKER_URL": broker_url, "CREDITLANE_DATABASE_URL": database}
    found = {}
    for words in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        found[" ".join(words)] = done.stdout + done.stderr
    assert all(found.values())
    return found
