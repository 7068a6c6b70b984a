"""The operator's command line, against real servers and real workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psycopg
import pytest
import redis
import typer
from kombu import Connection as Broker
from typer.testing import CliRunner, Result

from creditlane import command
from creditlane.lanes import lane_of
from models.audit import Fault, Report
from models.catalog import load_catalog
from scripts import command_line, command_parts
from scripts.command_line import app
from scripts.command_parts import Deployment, masked, operator, parse_instant, parse_span
from scripts.embedded import free_port
from scripts.requeue import RequeueError, drop
from scripts.showing import plain, signed, span
from tests.conftest import LANES, Spawn
from tests.support import ROOT, Ledger, Worker, eventually, execute, rows, travel, value

Run = Callable[..., Result]


@pytest.fixture
def run(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command of ours on the test's servers."""
    for name, setting in (
        ("CREDITLANE_DATABASE_URL", database),
        ("CREDITLANE_BROKER_URL", broker_url),
        ("CREDITLANE_LANES", str(LANES)),
        ("COLUMNS", "160"),
        ("NO_COLOR", "1"),
    ):
        monkeypatch.setenv(name, setting)
    monkeypatch.delenv("CREDITLANE_RESULT_URL", raising=False)
    runner = CliRunner()

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = runner.invoke(app, list(arguments))
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        assert "Traceback" not in result.output
        for url in (database, broker_url):
            assert url not in result.output
        return result

    return invoke


def one(result: Result) -> Any:
    """The one JSON document on stdout."""
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def several(result: Result) -> list[Any]:
    """The JSON lines on stdout."""
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


def publish(broker_url: str, queue: str, task: str, id: str, body: bytes, **headers: Any) -> None:
    """A message as any producer might send it."""
    with Broker(broker_url) as broker, broker.Producer() as producer:
        producer.publish(
            body,
            exchange="",
            routing_key=queue,
            content_type="application/json",
            content_encoding="utf-8",
            headers={"lang": "py", "task": task, "id": id, **headers},
            correlation_id=id,
        )


# --- Operations --------------------------------------------------------------------------------------


def test_every_operation(run: Run, lane_worker: Worker) -> None:
    opened = one(run("account", "open", "alice", "--email", "a@example.org", "--json"))
    assert (opened["status"], opened["balance"]["available"]) == ("applied", "50")
    made = one(run("grant", "alice", "100", "--source", "pack", "--purchase", "p-1", "--reason", "paid", "--json"))
    assert (made["operation"], made["grant"]) == ("credits.grant", 2)
    scoped = ("--feature", "image", "--feature", "export", "--expires-in", "30d", "--priority", "1")
    run("grant", "alice", "7", "--source", "promotion", *scoped)
    charged = run("consume", "alice", "image", "12", "--id", "order-1")
    assert "applied consume: 1.5 credits charged to alice" in charged.stdout
    assert "1.5 promotion (grant 3)" in charged.stdout
    assert "155.5 available" in charged.stdout
    again = run("consume", "alice", "image", "12", "--id", "order-1")
    assert "this id was answered before" in again.stdout
    assert one(run("consume", "alice", "--amount", "0.5", "--json"))["charged"] == "0.5"
    held = one(run("hold", "alice", "image", "80", "--id", "job-1", "--ttl", "2h", "--json"))
    assert (held["hold"], held["balance"]["held"]) == ("job-1", "10")
    life = datetime.fromisoformat(held["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=119) < life <= timedelta(hours=2)
    assert one(run("capture", "alice", "job-1", "--quantity", "64", "--json"))["charged"] == "8"
    run("hold", "alice", "--amount", "3", "--id", "job-2")
    assert "release: the hold went back to alice" in run("release", "alice", "job-2").stdout
    half = ("refund", "alice", "order-1", "--percent", "50", "--reason", "blurred")
    assert "0.75 credits given back" in run(*half, "--actor", "anna", "--id", "half").stdout
    assert "this id was answered before" in run(*half, "--actor", "anna", "--id", "half").stdout
    assert "one of the two" in run(*half, "--amount", "1", code=2).stderr
    for percent in ("0", "-1", "101", "half", "NaN", "Infinity"):
        assert "more than 0" in run("refund", "alice", "order-1", f"--percent={percent}", code=2).stderr
    assert "charged nothing" in run("refund", "alice", "nothing", "--percent", "50", code=3).stderr
    assert "unknown_charge" in run("refund", "alice", "job-2", "--percent", "50", code=3).stderr
    assert "0.75 credits given back" in run("refund", "alice", "order-1").stdout
    assert "5 credits taken from alice" in run("adjust", "alice", "-5", "--reason", "twice", "--actor", "anna").stdout
    assert "0.25 credits added to alice" in run("adjust", "alice", "0.25", "--reason", "goodwill").stdout
    assert "100 credits taken from alice" in run("revoke", "alice", "--purchase", "p-1").stdout
    assert "settle" in run("settle", "alice").stdout

    shown = one(run("account", "show", "alice", "--json"))
    assert shown["balance"]["available"] == "43.75"
    told = run("account", "show", "alice").stdout
    assert "user, open" in told
    assert "a@example.org" in told

    lines = several(run("account", "history", "alice", "--json"))
    assert [line["number"] for line in lines] == list(range(16, 0, -1))
    assert lines[3]["actor"] == "anna"
    assert lines[2]["actor"] == operator()
    page = run("account", "history", "alice", "--limit", "4").stdout
    assert "twice · anna" in page
    assert "--before 13" in page
    assert len(several(run("account", "history", "alice", "--before", "4", "--json"))) == 3
    assert len(several(run("account", "history", "alice", "--operation", "adjust", "--json"))) == 2
    entries = several(run("account", "history", "alice", "--feature", "image", "--entries", "--json"))
    assert all(line["lines"] for line in entries)
    assert "consumed grant 3 (promotion)" in run("account", "history", "alice", "--entries").stdout


def test_a_lead_and_what_administrators_do(run: Run, lane_worker: Worker) -> None:
    run("account", "open", "visitor", "--kind", "lead")
    run("grant", "visitor", "20", "--source", "lead")
    run("account", "open", "alice")
    converted = run("lead", "convert", "visitor", "alice")
    assert "applied convert: 20 credits on their way from the lead visitor to alice" in converted.stdout
    eventually(lambda: one(run("account", "show", "alice", "--json"))["balance"]["available"] == "70")
    assert "lead, closed: has become alice" in run("account", "show", "visitor").stdout
    assert "convert to alice" in run("account", "history", "visitor").stdout
    assert "account_closed" in run("consume", "visitor", "--amount", "1", code=3).stderr
    run("account", "open", "second", "--kind", "lead")
    run("grant", "second", "5", "--source", "lead")
    run("account", "open", "bob", "--lead", "second")
    eventually(lambda: one(run("account", "show", "bob", "--json"))["balance"]["available"] == "55")

    frozen = run("account", "freeze", "alice", "--reason", "a stolen card", "--actor", "anna")
    assert "applied accounts.freeze: alice is frozen" in frozen.stdout
    assert "account_frozen" in run("consume", "alice", "--amount", "1", code=3).stderr
    assert "user, frozen" in run("account", "show", "alice").stdout
    assert one(run("account", "thaw", "alice", "--reason", "found", "--json"))["account_status"] == "open"
    run("hold", "alice", "--amount", "1", "--id", "job")
    assert "1 open holds" in run("account", "close", "alice", "--reason", "gone", code=3).stderr
    run("release", "alice", "job")
    assert "alice is closed, 70 credits revoked" in run("account", "close", "alice", "--reason", "gone").stdout
    assert "alice is open" in run("account", "reopen", "alice", "--reason", "back again").stdout

    lines = several(run("account", "actions", "--json"))
    assert [(line["name"], line["actor"], line["change"]) for line in lines] == [
        ("accounts.reopen", operator(), "0"),
        ("accounts.close", operator(), "-70"),
        ("accounts.close", operator(), "0"),
        ("accounts.thaw", operator(), "0"),
        ("accounts.freeze", "anna", "0"),
    ]
    told = run("account", "actions", "--limit", "1").stdout
    assert "back again" in told
    before = told.splitlines()[-1].partition("--before ")[2].strip("'")
    assert "gone" in run("account", "actions", "--before", before, "--limit", "1").stdout
    assert "a stolen card" in run("account", "actions", "--actor", "anna", "--since", "2020-01-01").stdout
    assert "nothing since" in run("account", "actions", "--actor", "nobody").stdout
    assert "next_before" in run("account", "actions", "--before", "x", code=2).stderr


def test_a_transfer(run: Run, lane_worker: Worker) -> None:
    run("account", "open", "alice")
    run("grant", "alice", "10", "--source", "pack")
    promotional = run("transfer", "alice", "bob", "20", code=3)
    assert "not_transferable: 20 credits needed, 10 available, 10 short" in promotional.stderr
    given = run("transfer", "alice", "bob", "4", "--message", "thank you", "--id", "gift")
    assert "applied transfer: 4 credits on their way from alice to bob" in given.stdout
    assert "56 available, 4 in transit" in given.stdout
    told = one(run("transfer", "alice", "bob", "4", "--message", "thank you", "--id", "gift", "--json"))
    assert (told["to"], told["balance"]["in_transit"], told["replayed"]) == ("bob", "4", True)
    history = run("account", "history", "alice", "--operation", "transfer").stdout
    assert "transfer of 4 to bob" in history
    assert "thank you" in history
    assert "transfer to bob" in history


def test_a_refusal_names_its_code(run: Run, lane_worker: Worker) -> None:
    unknown = run("consume", "bob", "image", code=3)
    assert unknown.stdout == ""
    assert unknown.stderr.startswith("refused: unknown_account:")
    run("account", "open", "alice")
    short = run("consume", "alice", "--amount", "1000", code=3)
    assert "insufficient_credits: 1000 credits needed, 50 available, 950 short" in short.stderr
    told = one(run("consume", "alice", "--amount", "60", "--json", code=3))
    assert (told["status"], told["code"], told["shortfall"]) == ("rejected", "insufficient_credits", "10")
    assert "covers it: pack decouverte, 4.99 EUR" in run("consume", "alice", "--amount", "60", code=3).stderr
    history = run("account", "history", "alice", "--status", "rejected").stdout
    assert "60 needed, 50 available" in history


def test_a_quarantined_message_is_found_mended_and_replayed(
    run: Run, lane_worker: Worker, database: str, broker_url: str
) -> None:
    run("account", "open", "alice")
    wrong = lane_of("somebody else", LANES)
    assert wrong != lane_of("alice", LANES)
    publish(broker_url, wrong, "credits.consume", "bad-1", b'[[], {"account": "alice", "amount": 1.5}, {}]')
    publish(broker_url, wrong, "credits.cosnume", "bad-2", b'[[], {"account": "alice", "amount": "2"}, {}]')
    publish(broker_url, wrong, "credits.consume", "bad-3", b"\xff\x1b[31m", compression="application/x-nonsense")
    redis.Redis.from_url(broker_url).lpush(wrong, b"garbage \x1b]0;title\x07\x00")
    eventually(lambda: value(database, "SELECT count(*) FROM quarantine") == 4)

    listed = {line["operation"]: line for line in several(run("quarantine", "list", "--json"))}
    table = run("quarantine", "list").stdout
    assert "a float is not an amount" in table
    assert "\x1b" not in table
    numbers = {operation: str(line["id"]) for operation, line in listed.items()}
    shown = run("quarantine", "show", numbers[None])
    assert r"garbage \x1b]0;title\x07" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert one(run("quarantine", "show", numbers["bad-3"], "--json"))["body_base64"]

    def replay(operation: str | None, *options: str, code: int = 0) -> Result:
        return run("quarantine", "replay", numbers[operation], *options, code=code)

    def applied(operation: str) -> bool:
        return bool(rows(database, "SELECT FROM operations WHERE operation = %s AND status = 'applied'", operation))

    assert "was no message" in replay(None, code=2).stderr
    assert "names no task" in replay(None, "--arguments", '{"account": "alice"}', code=2).stderr
    assert "send credits as a decimal string" in replay("bad-1", "--id", "bad-1b", code=2).stderr
    assert "JSON object" in replay("bad-1", "--arguments", "[]", code=2).stderr
    assert "no JSON" in replay("bad-1", "--arguments", "{", code=2).stderr
    assert "cannot be read" in replay("bad-3", "--id", "bad-3b", code=2).stderr
    arguments = '{"account": "alice", "amount": "1.5"}'
    mended = one(replay("bad-1", "--arguments", arguments, "--actor", "anna", "--json"))
    assert mended == {
        "id": listed["bad-1"]["id"], "status": "replayed", "queue": lane_of("alice", LANES), "operation": "bad-1",
        "by": "anna",
    }  # fmt: skip
    assert "bad-2b" in replay("bad-2", "--task", "credits.consume", "--id", "bad-2b").stdout
    eventually(lambda: applied("bad-1") and applied("bad-2b"))
    assert "was replayed before, by anna" in replay("bad-1", code=2).stderr
    assert one(run("account", "show", "alice", "--json"))["balance"]["available"] == "46.5"

    assert "--reason" in run("quarantine", "drop", numbers["bad-3"], code=2).stderr
    run("quarantine", "drop", numbers["bad-3"], "--reason", "a test", "--actor", "anna")
    one(run("quarantine", "drop", numbers[None], "--yes", "--json"))
    assert run("quarantine", "list").stdout == "no message is open\n"
    everything = several(run("quarantine", "list", "--status", "all", "--json"))
    assert [line["resolved_by"] for line in everything if line["operation"] == "bad-3"] == ["anna: a test"]
    assert len(several(run("quarantine", "list", "--status", "replayed", "--json"))) == 2
    assert "no quarantined message 999" in run("quarantine", "replay", "999", code=2).stderr
    assert "no quarantined message 999" in run("quarantine", "show", "999", code=2).stderr


def test_a_message_is_replayed_as_it_was(
    run: Run, spawn: Spawn, lane_worker: Worker, database: str, broker_url: str
) -> None:
    run("account", "open", "alice")
    lane = lane_of("alice", LANES)
    body = b'[[], {"account": "alice", "amount": "1", "v": 2}, {}]'
    publish(broker_url, lane, "credits.consume", "early", body, **{"x-mine": "kept"})
    eventually(lambda: value(database, "SELECT count(*) FROM quarantine") == 1)
    lane_worker.stop()
    number = str(several(run("quarantine", "list", "--json"))[0]["id"])
    run("quarantine", "replay", number)
    message = json.loads(redis.Redis.from_url(broker_url).lindex(lane, 0) or b"")
    with Broker(broker_url) as broker:
        received = broker.SimpleQueue(lane).get(timeout=5)
    assert received.body in (body, body.decode())
    assert (message["headers"]["id"], message["headers"]["x-mine"]) == ("early", "kept")
    assert message["properties"]["correlation_id"] == "early"
    assert message["content-type"] == "application/json"


def test_a_message_stays_open_when_the_broker_is_away(
    run: Run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.writer.connection.execute(
        "INSERT INTO quarantine (digest, status, code, reason, queue, task, operation, content_type, headers, body,"
        " received_at) VALUES ('x', 'open', 'malformed', 'r', 'lane.001', 't', 'o', 'application/json',"
        " '{\"headers\": {}, \"properties\": {}}', '[]', now())"
    )
    monkeypatch.setenv("CREDITLANE_BROKER_URL", f"redis://:hidden@127.0.0.1:{free_port()}/0")
    failed = run("quarantine", "replay", "1", code=4)
    assert "it is still open" in failed.stderr
    assert several(run("quarantine", "list", "--json"))[0]["status"] == "open"


# --- Waiting and faults ------------------------------------------------------------------------------


def test_fire_and_forget_then_ask_again(run: Run, spawn: Spawn, database: str) -> None:
    sent = one(run("account", "open", "alice", "--wait", "0", "--json"))
    assert sent["status"] == "sent"
    late = run("consume", "alice", "image", "--wait", "0.2", code=5)
    assert late.stdout == ""
    assert "no answer to consume within 0.2 s" in late.stderr
    id = late.stderr.split("--id ")[1].strip()
    assert "sent consume" in run("consume", "alice", "image", "--id", id, "--wait", "0").stdout
    spawn("worker")
    answer = one(run("consume", "alice", "image", "--id", id, "--wait", "60", "--json"))
    assert (answer["id"], answer["status"]) == (id, "applied")
    assert one(run("account", "open", "alice", "--id", sent["id"], "--json"))["replayed"] is True
    assert value(database, "SELECT count(*) FROM operations") == 2


def test_a_quarantined_answer(run: Run, monkeypatch: pytest.MonkeyPatch, lane_worker: Worker) -> None:
    # The client checks what it sends, so a worker only quarantines what an older client lets through.
    monkeypatch.setattr("creditlane.client.checked", lambda _name, _id, arguments: msgspec.json.encode(arguments))
    failed = run("adjust", "alice", "0", "--reason", "x", code=1)
    assert "the message was quarantined: invalid_message" in failed.stderr
    assert "creditlane quarantine list" in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("consume", "alice", "image", "--amount", "1"),
        ("consume", "alice"),
        ("consume", "alice", "--amount", "1e3"),
        ("consume", "alice", "--amount", "-1"),
        ("consume", "alice", "image", "0.0000001"),
        ("consume", "a\x07b", "image"),
        ("consume", "alice", "image", "--id", ""),
        ("grant", "alice", "5", "--source", "x", "--expires-in", "30d", "--expires-at", "2099-01-01"),
        ("grant", "alice", "5", "--source", "x", "--expires-in", "soon"),
        ("grant", "alice", "5", "--source", "x", "--expires-at", "tomorrow"),
        ("grant", "alice", "5"),
        ("adjust", "alice", "0", "--reason", "x"),
        ("adjust", "alice", "-5"),
        ("adjust", "alice", "-5", "--raeson", "x"),
        ("revoke", "alice"),
        ("transfer", "alice", "alice", "5"),
        ("transfer", "alice", "bob", "0"),
        ("account", "open", "alice", "--kind", "group"),
        ("account", "history", "alice", "--limit", "1001"),
        ("lanes", "--watch", "--json"),
        ("nonsense",),
    ],
)
def test_what_makes_no_sense(arguments: tuple[str, ...], run: Run, broker_url: str) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr
    assert redis.Redis.from_url(broker_url).dbsize() == 0, "nothing was sent"


def test_servers_that_are_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("CREDITLANE_BROKER_URL", f"redis://:hidden-word@127.0.0.1:{port}/0")
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", f"postgresql://me:hidden-word@127.0.0.1:{port}/x")
    for arguments in (
        ("consume", "alice", "image", "--id", "order-1"),
        ("consume", "alice", "image", "--id", "order-1", "--wait", "0"),
    ):
        sent = run(*arguments, code=4)
        assert "the broker is away" in sent.stderr
        assert "--id order-1" in sent.stderr
        assert "hidden-word" not in sent.output
    for reading in (("account", "show", "alice"), ("lanes",), ("quarantine", "list"), ("audit",)):
        read = run(*reading, code=4)
        assert read.stderr.startswith("error: the database is away")
        assert len(read.stderr.splitlines()) == 1
        assert "hidden-word" not in read.output


def test_a_broker_that_is_away_while_the_database_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITLANE_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    assert "the broker is away" in run("lanes", code=4).stderr


def test_a_database_without_a_ledger(run: Run, stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", stack.postgres.url_of("postgres"))
    assert "python -m models.migrate" in run("account", "show", "alice", code=4).stderr


def test_an_account_that_nobody_named(run: Run) -> None:
    for arguments in (("account", "show", "bob"), ("account", "history", "bob"), ("audit", "bob")):
        assert "unknown_account" in run(*arguments, code=3).stderr


def test_a_fault_of_ours_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(command_line, "account_summary", broken)
    failed = run("account", "show", "alice", code=70)
    assert failed.stderr == (
        "error: something went wrong inside (ZeroDivisionError: oh no); CREDITLANE_TRACEBACK=1 shows where\n"
    )


# --- Lanes and audit ---------------------------------------------------------------------------------


def test_lanes_tell_what_waits_and_who_owns_them(
    run: Run, spawn: Spawn, broker_url: str, database: str, client: Any
) -> None:
    for number in range(20):
        client.consume(f"user-{number}", amount="1", id=f"c-{number}")
    idle = several(run("lanes", "--json"))
    assert len(idle) == LANES
    assert sum(lane["ready"] for lane in idle) == 20
    assert all(lane["owner"] is None and lane["unacknowledged"] == 0 for lane in idle)
    assert "20 messages wait" in run("lanes").stdout
    assert f"{LANES} lanes have no owner" in run("lanes").stdout
    spawn("worker")
    eventually(lambda: value(database, "SELECT count(*) FROM operations") == 20)

    def settled() -> bool:
        lanes = several(run("lanes", "--json"))
        return all(lane["owner"] and not lane["ready"] and not lane["unacknowledged"] for lane in lanes)

    eventually(settled)
    shown = run("lanes", "--all").stdout
    assert "1 worker:" in shown.replace("\n", " ")
    assert "every lane has its owner" in shown
    assert shown.count("creditlane lanes") == LANES + 1


def test_the_age_of_the_oldest_message_is_told_where_its_sender_tells(run: Run, broker_url: str) -> None:
    with Broker(broker_url) as broker, broker.Producer() as producer:
        for lane, properties in (
            ("lane.000", {"timestamp": int(datetime.now(UTC).timestamp()) - 7200}),
            ("lane.001", {}),
        ):
            producer.publish({}, exchange="", routing_key=lane, serializer="json", **properties)
    lanes = several(run("lanes", "--json"))
    assert 7200 <= lanes[0]["lag_seconds"] < 7300
    assert (lanes[1]["ready"], lanes[1]["lag_seconds"], lanes[2]["lag_seconds"]) == (1, None, None)
    shown = run("lanes").stdout
    assert "2h" in shown
    assert "unknown" in shown


def test_watching_ends_with_ctrl_c(run: Run) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.command_line", "lanes", "--watch", "--every", "0.1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    assert process.stdout is not None
    while "lanes" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_an_audit_that_holds(run: Run, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.open", "o-1", account="bob")
    assert run("audit").stdout.startswith("the audit holds: 2 accounts, 2 operations, 2 entries")
    assert one(run("audit", "alice", "--json")) == {
        "holds": True, "accounts": 1, "operations": 1, "entries": 1, "replayed": 0, "not_replayed": {}, "seals": 0,
        "fault_count": 0, "faults": [],
    }  # fmt: skip


def test_an_audit_that_finds_a_row(
    run: Run, tampered_ledger: Ledger, tampered_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", tampered_database)
    tampered_ledger.apply("credits.open", "o-1", account="alice")
    execute(tampered_database, "ALTER TABLE entries DISABLE TRIGGER entries_append_only")
    execute(tampered_database, "UPDATE entries SET amount_micro = amount_micro + 1")
    found = run("audit", code=1)
    assert "fault alice entries seq 1:" in found.stdout
    told = one(run("audit", "--json", code=1))
    assert told["fault_count"] == len(told["faults"]) > 0
    assert not told["holds"]


def test_an_audit_with_replay(run: Run, ledger: Ledger, tmp_path: Path) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    assert re.fullmatch(
        r"the audit holds: 1 accounts, 1 operations, 1 entries, 1 replayed in \d+\.\d s, [\d,]+ operations/s",
        run("audit", "--replay").stdout.strip(),
    )
    assert one(run("audit", "--replay", "--json"))["replayed"] == 1
    unreadable = run("audit", "--replay", "--catalog", str(tmp_path / "mine.toml"), code=2)
    assert "mine.toml: cannot be read" in unreadable.stderr


def test_an_audit_that_cannot_replay_all_says_so(run: Run, ledger: Ledger, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[catalog]\nname = "mine"\nversion = 3\n')
    ledger.writer.catalog = lambda: load_catalog(str(mine))
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.settle", "s-1", account="alice")
    partly = run("audit", "--replay", code=1).stdout
    assert "not replayed: 2 operations, because the catalog mine-3 is not at hand" in partly
    assert "no fault, but not all was proven" in partly
    assert "2 replayed" in run("audit", "--replay", "--catalog", str(mine)).stdout


def test_an_incremental_audit(run: Run, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    assert run("audit", "--incremental").stdout.startswith("the audit holds: 1 accounts, 1 operations")
    assert run("audit", "--incremental").stdout.startswith("the audit holds: 0 accounts, 0 operations")
    for other in (["alice"], ["--replay"], ["--expect", "0" * 64], ["--seals", "1"]):
        assert "give it alone" in run("audit", "--incremental", *other, code=2).stderr


def test_a_seal_and_its_root(
    run: Run, tampered_ledger: Ledger, tampered_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", tampered_database)
    tampered_ledger.apply("credits.open", "o-1", account="alice")
    assert run("seal", "--list").stdout == ""
    shown = run("seal").stdout
    sealed = one(run("seal", "--json"))
    assert (sealed["number"], sealed["accounts"], sealed["operations"]) == (2, 0, 1)
    (first, second) = json.loads(run("seal", "--list", "--json").stdout)
    assert shown.startswith(f"seal 1 {first['root']} of ")
    assert second == sealed
    assert "2 seals" in run("audit", "--expect", first["root"], "--expect", second["root"].upper()).stdout
    assert "1 seals" in run("audit", "--seals", "1").stdout
    assert "64 hexadecimal digits" in run("audit", "--expect", "abc", code=2).stderr
    strange = run("audit", "--expect", "0" * 64, code=1).stdout
    assert f"fault seals root {'0' * 64}: was kept elsewhere, and no seal that was checked has it" in strange
    with psycopg.connect(tampered_database) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE operations SET result = '{}'")
    found = run("audit", code=1).stdout
    assert "fault alice operations o-1: are not as seal 1 has them" in found


def test_a_seal_tells_whom_it_waits_for(run: Run, database: str) -> None:
    with psycopg.connect(database) as writer:
        writer.execute("SELECT 1")
        backend = writer.info.backend_pid
        refused = run("seal", "--wait", "0.3", code=4)
    assert f"waiting for the transactions of backends {backend}" in refused.stderr
    assert "have run for more than 0 s" in refused.stderr


def test_a_long_audit_tells_how_far_it_is(run: Run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    monkeypatch.setattr(command_parts, "LINE_SECONDS", 0)
    assert re.search(r"auditing: 1 of 1 operations, [\d,]+/s", run("audit").stderr)
    assert run("audit", "--json").stderr == ""


def test_an_audit_tells_of_faults_that_it_does_not_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def audit(*_: object, **__: object) -> Report:
        return Report(accounts=1, fault_count=5, faults=[Fault("[bold]x", "grants", "grant 1", "is \x1b[31mwrong")])

    monkeypatch.setattr(command_line, "audit_ledger", audit)
    found = run("audit", code=1).stdout
    assert r"fault [bold]x grants grant 1: is \x1b[31mwrong" in found
    assert "and 4 more" in found
    assert "5 faults" in found


def test_what_time_did_stands_in_the_history(run: Run, ledger: Ledger, database: str) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount="10", source="trial", expires_in=60)
    travel(database, timedelta(seconds=90))
    assert one(run("account", "show", "alice", "--json"))["balance"]["available"] == "50"
    ledger.apply("credits.settle", "s-1", account="alice")
    assert "time: expired grant 2 (trial)" in run("account", "history", "alice").stdout
    assert "no operations" in run("account", "history", "alice", "--feature", "image").stdout


# --- Where the ledger is -----------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing tells where the ledger is; returns where a stack would."""
    for name in [name for name in os.environ if name.startswith("CREDITLANE_")]:
        monkeypatch.delenv(name)
    state = tmp_path / "stack.json"
    monkeypatch.setattr(command_parts, "STATE", state)
    return state


def test_nothing_tells_where_the_ledger_is(nowhere: Path) -> None:
    runner = CliRunner()
    for arguments, variable in (
        (["consume", "alice", "image"], "CREDITLANE_BROKER_URL"),
        (["account", "show", "alice"], "CREDITLANE_DATABASE_URL"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert f"set {variable}" in result.stderr
        assert "scripts/run" in result.stderr


def test_the_embedded_stack_is_found_while_it_runs(nowhere: Path, database: str, broker_url: str) -> None:
    def tell(pid: int) -> None:
        content = {"broker_url": broker_url, "database_url": database, "lanes": 16, "pids": {"postgres": pid}}
        nowhere.write_text(json.dumps(content))

    tell(os.getpid())
    result = CliRunner().invoke(app, ["lanes", "--json"])
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 16)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    tell(ended.pid)
    left_over = CliRunner().invoke(app, ["lanes"])
    assert left_over.exit_code == 2
    assert "set CREDITLANE_DATABASE_URL" in left_over.stderr
    nowhere.write_text("{")
    assert CliRunner().invoke(app, ["lanes"]).exit_code == 2


def test_one_address_of_the_environment_is_not_mixed_with_the_stack(
    nowhere: Path, database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere.write_text(
        json.dumps({"broker_url": broker_url, "database_url": database, "pids": {"postgres": os.getpid()}})
    )
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    result = CliRunner().invoke(app, ["account", "show", "alice"])
    assert result.exit_code == 2
    assert "CREDITLANE_DATABASE_URL" in result.stderr


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("CREDITLANE_BROKER_URL", "hidden-word"),
        ("CREDITLANE_BROKER_URL", "redis://:hidden-word@host:port/0"),
        ("CREDITLANE_DATABASE_URL", "host=hidden-word"),
        ("CREDITLANE_LANES", "0"),
        ("CREDITLANE_LANES", "many"),
    ],
)
def test_an_address_that_makes_no_sense(
    name: str, setting: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, setting)
    result = CliRunner().invoke(app, ["lanes"])
    assert result.exit_code == 2
    assert name in result.stderr
    assert "hidden-word" not in result.output


def test_secrets_are_masked(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://:p%40ss@h/0")
    assert masked("redis://:p%40ss@h/0 said p@ss") == "redis://:***@h/0 said ***"
    assert "p%40ss" not in repr(Deployment(8, "redis://:p%40ss@h/0", None))


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_away_cannot_be_looked_into(scheme: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITLANE_BROKER_URL", f"{scheme}://guest:hidden@127.0.0.1:{free_port()}/0")
    result = run("lanes", code=4)
    assert "broker" in result.stderr
    assert "hidden" not in result.stderr


# --- The rest ----------------------------------------------------------------------------------------


def test_every_help_has_examples() -> None:
    runner = CliRunner()
    whole = runner.invoke(app, ["--help"], env={"COLUMNS": "100"}).stdout
    for code in range(6):
        assert f"\n {code}  " in whole
    for group, commands in (
        (
            [],
            [
                "grant",
                "consume",
                "hold",
                "capture",
                "release",
                "refund",
                "adjust",
                "revoke",
                "transfer",
                "settle",
                "lanes",
                "audit",
                "seal",
            ],
        ),
        (["account"], ["open", "show", "history", "freeze", "thaw", "close", "reopen", "actions"]),
        (["lead"], ["convert"]),
        (["quarantine"], ["list", "show", "replay", "drop"]),
    ):
        for name in commands:
            shown = runner.invoke(app, [*group, name, "--help"], env={"COLUMNS": "100"})
            assert shown.exit_code == 0
            assert "Examples" in shown.stdout
            assert " ".join(["creditlane", *group, name]) in shown.stdout
            assert "--json" in shown.stdout


def test_as_a_process_of_its_own(run: Run, lane_worker: Worker) -> None:
    def creditlane(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "creditlane.command", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    opened = creditlane("account", "open", "alice", "--id", "o-1", "--json")
    assert (opened.returncode, opened.stderr) == (0, "")
    assert json.loads(opened.stdout)["status"] == "applied"
    taken = creditlane("adjust", "alice", "-0.5", "--reason", "by hand")
    assert (taken.returncode, taken.stderr) == (0, "")
    assert "49.5 available" in taken.stdout
    refused = creditlane("adjust", "alice", "-500", "--reason", "by hand")
    assert (refused.returncode, refused.stdout) == (3, "")


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("scripts", "only the client is installed here"),
        ("scripts.command_line", "only the client is installed here"),
        ("typer", "the command line needs typer"),
    ],
)
def test_a_producers_install_has_no_command_line(
    missing: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_there(_name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=not_there))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert sentence in told.err
    assert len(told.err.splitlines()) == 1


def test_durations_and_instants() -> None:
    assert parse_span("1h30m") == 5400
    assert parse_span("2w") == 14 * 86400
    for text in ("", "30", "d", "30d ", "-1d", "1y", "٣d"):
        with pytest.raises(typer.BadParameter):
            parse_span(text)
    assert parse_instant("2027-01-31") == datetime(2027, 1, 31, tzinfo=UTC)
    assert parse_instant("2027-01-31T12:00:00+01:00") == datetime(2027, 1, 31, 11, tzinfo=UTC)


def test_small_words() -> None:
    assert [signed(amount) for amount in ("0", "1.5", "-1.5")] == ["", "+1.5", "-1.5"]
    assert [span(seconds) for seconds in (0, 59.9, 3600, 90061)] == ["0s", "59s", "1h", "1d 1h"]
    assert plain("a\x1b[31m\nb\u202ec") == "a\\x1b[31m\nb\\u202ec"


def test_two_operators_cannot_resolve_one_message(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO quarantine (digest, status, code, reason, queue, headers, body, received_at)"
            " VALUES ('x', 'open', 'malformed', 'r', 'lane.001', '{}', '', now())"
        )
        drop(connection, 1, "anna", None)
        with pytest.raises(RequeueError, match="resolved by somebody else"):
            drop(connection, 1, "bert", None)
