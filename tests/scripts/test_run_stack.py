"""The whole stack as a user starts it: a replay, the same again, a child that dies, a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr, ValidationError
from typer.testing import CliRunner

from models.settings import Settings, listed
from scripts import command_parts, payments_demo
from scripts.command_line import app
from scripts.embedded import StackError, free_port, process_exists, temporary_directory, wait_until
from scripts.replay import ReplayError, Usage, recognise
from scripts.run_stack import Plan, check_features, parse_credits, parse_scale, prepare_payments, wait_for
from tests.workers.providers.making import body, envelope, signed

ROOT = Path(__file__).resolve().parents[2]
THEIRS = "whsec_of_the_environment"
USAGE = """account,feature,quantity
alice,completion,30
alice,image,8
bob,embedding,0.5
bob,embedding,zero
alice,completion,30
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with temporary_directory() as directory:
        (directory / "usage.csv").write_text(USAGE)
        yield directory


def command(place: Path, *arguments: str) -> list[str]:
    ports = ["--postgres-port", "--redis-port", "--flower-port", "--relay-port"]
    return [
        *(sys.executable, "-m", "scripts.run_stack", "--input", str(place / "usage.csv")),
        *("--data", str(place / "data"), "--workers", "1"),
        *(part for option in ports for part in (option, str(free_port()))),
        *arguments,
    ]


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(place, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )


def figure(output: str, label: str) -> int:
    found = re.search(rf"│ {re.escape(label)}\s*│\s*([0-9,]+)", output)
    assert found is not None, output
    return int(found[1].replace(",", ""))


@pytest.fixture
def started(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A stack that stays up, and its data directory."""
    process = subprocess.Popen(command(place), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "creditlane --help" in line:
                break
        else:
            pytest.fail("it ended before it was up")
        yield process, place / "data"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def state(data: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((data / "stack.json").read_text())
    return content


def assert_gone(pids: dict[str, int]) -> None:
    assert wait_until(lambda: not any(map(process_exists, pids.values())), 20), pids


@pytest.mark.timeout(300)
def test_a_replay_charges_once_however_often_it_runs(place: Path) -> None:
    first = run(place, "--once")
    assert first.returncode == 0, first.stdout + first.stderr
    assert figure(first.stdout, "operations sent") == 8
    assert figure(first.stdout, "applied") == 7
    assert figure(first.stdout, "  insufficient_credits") == 1
    assert figure(first.stdout, "replayed (the ledger had them before)") == 0
    assert figure(first.stdout, "rows not charged") == 1
    assert "line 5: quantity: 'zero' is not a number" in first.stdout
    assert re.search(r"alice\s*│\s*31\s*│\s*9\s*│", first.stdout)
    assert re.search(r"bob\s*│\s*0\.05\s*│\s*39\.95\s*│", first.stdout)
    assert "The audit holds" in first.stdout
    assert not (place / "data" / "stack.json").exists()

    second = run(place, "--once", "--buffer")
    assert second.returncode == 0, second.stdout + second.stderr
    assert figure(second.stdout, "replayed (the ledger had them before)") == 8
    assert figure(second.stdout, "applied") == 0
    assert re.search(r"alice\s*│\s*31\s*│\s*9\s*│", second.stdout)


@pytest.mark.timeout(180)
def test_a_signal_stops_all_that_was_started(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, data = started
    found = state(data)
    assert stat.S_IMODE((data / "stack.json").stat().st_mode) == 0o600
    assert set(found["pids"]) == {"postgres", "redis", "lanes1", "general", "beat", "flower", "relay"}
    with psycopg.connect(found["database_url"]) as connection:
        row = connection.execute("SELECT available_micro FROM accounts WHERE account = 'alice'").fetchone()
    assert row == (9_000_000,)
    made = found["payments"]
    assert stat.S_IMODE((data / "payments.json").stat().st_mode) == 0o600
    event = body(envelope("customer.created", {"id": "cus_made", "object": "customer"}))
    headers = signed(event, datetime.now(UTC), made["stripe_webhook_secrets"])
    with urllib.request.urlopen(
        urllib.request.Request(f"{found['relay_url']}/webhooks/stripe", event, headers), timeout=60
    ) as answer:
        assert answer.status == 200
    with psycopg.connect(found["database_url"]) as connection:
        assert connection.execute("SELECT event_id FROM payment_events").fetchall() == [("evt_made_1",)]
    assert wait_until(lambda: "payment-event-1" in (data / "logs" / "general.log").read_text(), 30)
    for log in [
        *(data / "logs").glob("*.log"),
        data / "redis" / "server.log",
        data / "postgres" / "server.log",
    ]:
        text = log.read_text()
        for server in ("redis", "postgres"):
            assert (data / server / "password").read_text() not in text
        assert made["stripe_webhook_secrets"] not in text
        assert made["stripe_api_key"] not in text
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert_gone(found["pids"])
    assert not (data / "stack.json").exists()


@pytest.mark.timeout(300)
def test_a_month_on_a_fake_provider_closes_to_zero_as_often_as_it_is_played(
    started: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data = started
    for name in ("BROKER_URL", "DATABASE_URL", "RESULT_URL", "LANES", "CATALOG"):
        monkeypatch.delenv(f"CREDITLANE_{name}", raising=False)
    for module in (command_parts, payments_demo):
        monkeypatch.setattr(module, "STATE", data / "stack.json")
    accounts = set()
    for _ in range(2):
        result = CliRunner().invoke(app, ["payments", "demo", "--json"])
        assert result.exit_code == 0, result.output
        played = json.loads(result.stdout)
        assert played["closes"] is True
        accounts.add(played["account"])
        steps = played["steps"]
        spendable = [100, 600, 570, 1070, 1050, 1070, 1050, 1150, 1050, 1050, 1150, 1250, 1150, 1150, 1150, 1250]
        assert [step["available_micro"] // 10**6 for step in steps] == spendable
        assert {step["what"]: step["frozen_micro"] for step in steps if step["frozen_micro"]} == {
            "disputes it: what is left of it is frozen": 100_000_000
        }
        assert not any(step["debt_micro"] for step in steps)
        assert "takes up 1 that was lost" in steps[-1]["what"]
        purchases = played["purchases"]
        money = [(each["paid"]["minor"], each["returned"]["minor"]) for each in purchases]
        assert money == [(500, 100), (1900, 0), (1900, 0), (500, 0), (500, 500), (500, 0)]
        given = [(each["given_micro"] // 10**6, each["left_micro"] // 10**6) for each in purchases]
        assert given == [(100, 80), (500, 470), (500, 500), (100, 100), (100, 0), (100, 100)]
    assert len(accounts) == 2


@pytest.mark.timeout(180)
def test_a_child_that_dies_is_named(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, data = started
    pids = state(data)["pids"]
    os.kill(pids["general"], signal.SIGKILL)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait(20) == 1
    assert "general was ended by SIGKILL; the end of its log" in output
    assert "general@" in output
    assert_gone(pids)


def test_the_secrets_of_payments_are_made_once_and_those_of_the_environment_go_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WEBHOOK_SECRETS", "API_KEY", "API_BASE"):
        monkeypatch.delenv(f"CREDITLANE_STRIPE_{name}", raising=False)
    monkeypatch.setenv("CREDITLANE_PAYMENTS_LIVEMODE", "true")

    def given() -> tuple[dict[str, Any], Settings]:
        payments = prepare_payments(place, 8787)
        with monkeypatch.context() as environment:
            for name, text in payments.settings.items():
                environment.setenv(name, text)
            return payments.state, Settings(
                broker_url=SecretStr("redis://127.0.0.1/0"), database_url=SecretStr("postgresql://127.0.0.1/x")
            )

    state, first = given()
    assert (first.payments_livemode, first.relay_port, first.relay_address) == (False, 8787, "127.0.0.1")
    assert listed(first.stripe_webhook_secrets) == (state["stripe_webhook_secrets"],)
    assert first.stripe_api_key is not None
    assert first.stripe_api_key.get_secret_value() == state["stripe_api_key"]
    assert first.stripe_api_base == state["stripe_api_base"]
    again, second = given()
    assert second.stripe_webhook_secrets == first.stripe_webhook_secrets
    assert again["stripe_api_key"] == state["stripe_api_key"]

    monkeypatch.setenv("CREDITLANE_STRIPE_WEBHOOK_SECRETS", THEIRS)
    monkeypatch.setenv("CREDITLANE_STRIPE_API_KEY", "sk_test_of_the_environment")
    state, theirs = given()
    assert state == {"stripe_webhook_secrets": None, "stripe_api_key": None, "stripe_api_base": None}
    assert listed(theirs.stripe_webhook_secrets) == (THEIRS,)
    assert theirs.stripe_api_base == ""
    monkeypatch.setenv("CREDITLANE_STRIPE_API_KEY", "sk_live_of_the_environment")
    with pytest.raises(ValidationError, match="stripe_api_key is of live mode"):
        given()

    (place / "payments.json").write_text("{}")
    with pytest.raises(StackError, match="delete the file"):
        prepare_payments(place, 0)


def test_a_port_that_is_taken_is_said(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(place, "--relay-port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "taken, so the relay cannot listen there" in done.stderr
    assert "--relay-port" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--quantity-column", "tokens"],
            "There is no column 'tokens'; the file has: account, feature, quantity",
        ),
        (
            ["--feature", "video"],
            "The catalog metering has no feature 'video'; it has: completion, embedding",
        ),
        (["--catalog", "none"], "shipped catalogs: dual, metering, packs"),
        (["--credits", "1.2345678"], "--credits: '1.2345678' is not an amount"),
        (["--quantity-scale", "much"], "--quantity-scale: send a decimal factor such as 0.001"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(place: Path, arguments: list[str], sentence: str) -> None:
    done = run(place, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "data").exists()


def test_each_account_is_opened_and_granted_once_before_its_first_use() -> None:
    usage = [Usage(n, account, "image", None, None, f"id-{n}") for n, account in enumerate("abab")]
    sent = [(kind, account) for kind, account, _, _ in Plan("d" * 64, "40", usage, []).operations()]
    assert sent == [
        *(("open", "a"), ("grant", "a"), ("consume", "a")),
        *(("open", "b"), ("grant", "b"), ("consume", "b")),
        *(("consume", "a"), ("consume", "b")),
    ]
    without = Plan("d" * 64, None, usage, [])
    assert "grant" not in {kind for kind, _, _, _ in without.operations()}


def test_amounts_on_the_command_line_are_exact() -> None:
    assert parse_credits("0.000001") == 1
    assert parse_credits("0") == 0
    assert parse_scale("0.001") == Decimal("0.001")
    assert parse_scale(None) is None
    for text in ("-1", "1e3", "x", ""):
        with pytest.raises(ReplayError, match="--credits"):
            parse_credits(text)
    for text in ("0", "-1", "NaN", "Infinity", "1e99999", "x"):
        with pytest.raises(ReplayError, match="--quantity-scale"):
            parse_scale(text)


def test_a_feature_to_try_is_of_the_catalog() -> None:
    shape = recognise(["account", "feature"])
    assert check_features(shape, "metering") == "completion"


def test_what_does_not_come_in_time_is_said() -> None:
    with pytest.raises(StackError, match="Nothing came within 0 s"):
        wait_for(lambda: False, lambda: None, 0, "Nothing came")


FLOODED = """
import os, signal, subprocess, sys
from scripts.run_stack import Signals

signals = Signals()
signals.install()
flood = f"import os\\nfor _ in range(100_000): os.kill({os.getpid()}, {int(signal.SIGCHLD)})"
process = subprocess.Popen([sys.executable, "-c", flood])
while process.poll() is None:
    signals.wait(60)
"""


@pytest.mark.timeout(60)
def test_children_that_end_in_the_midst_of_one_anothers_news_stop_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FLOODED], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
