"""``creditlane due`` on a real ledger: what waits, why, and when the schedules were last sent."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from models import due
from models.catalog import load_catalog
from models.cutoff import alone
from scripts.command_line import app
from tests.support import Ledger, execute, travel

PLAN = """
[catalog]
name = "due"

[plans.free]
monthly_credits = "10"

[plans.paid]
monthly_credits = "10"
price = "1.00 EUR"
grace_days = 2
"""


@pytest.fixture
def run(database: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on the test's ledger."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*options: str) -> str:
        result = CliRunner().invoke(app, ["due", *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


@pytest.fixture
def lived(ledger: Ledger, database: str, tmp_path: Any) -> None:
    """Accounts to which each kind of thing falls due within forty days, one of which has two."""
    file = tmp_path / "due.toml"
    file.write_text(PLAN, encoding="utf-8")
    catalog = load_catalog(str(file))
    ledger.writer.catalog = lambda: catalog
    for name in ("renews", "ends", "unpaid", "expires", "held", "idle"):
        ledger.apply("credits.open", "open", account=name)
    for name, plan in (("renews", "free"), ("ends", "free"), ("unpaid", "paid")):
        ledger.apply("plans.subscribe", "subscribe", account=name, plan=plan)
    ledger.apply("plans.cancel", "cancel", account="ends")
    for name in ("expires", "held", "idle"):
        lives = {} if name == "idle" else {"expires_in": 86400}
        ledger.apply("credits.grant", "grant", account=name, amount=5, source="gift", **lives)
    ledger.apply("credits.hold", "hold", account="held", amount=2, ttl=60)
    ledger.apply("credits.transfer", "gift", account="idle", to="expires", amount=3)


def test_what_falls_due_and_why(run: Any, lived: None, database: str) -> None:
    now = json.loads(run("--json"))
    assert now["due"] == {"accounts": 0, "oldest": None, "by": dict.fromkeys(now["due"]["by"], 0), "looked_at": 0}
    travel(database, timedelta(minutes=2))
    assert json.loads(run("--json"))["due"]["by"] == {"hold": 1, "expiry": 0, "renewal": 0, "end": 0}
    travel(database, timedelta(days=40))
    then = json.loads(run("--json"))["due"]
    assert (then["accounts"], then["looked_at"]) == (5, 5)
    assert then["by"] == {"hold": 1, "expiry": 2, "renewal": 1, "end": 2}
    travel(database, timedelta(0))
    ahead = json.loads(run("--json", "--until", "2999-01-01"))
    assert ahead["due"] == then


def test_what_waits(run: Any, lived: None, database: str) -> None:
    execute(database, "INSERT INTO schedules VALUES ('outbox', 'schedules.outbox', now() - interval '90 seconds')")
    execute(database, "INSERT INTO usage_watermark VALUES (1, '2026-01-31T12:00:00Z')")
    execute(database, "INSERT INTO notices SELECT 'idle', key, 'depleted', now(), now(), '{}', '{email}', NULL, sent"
                      " FROM (VALUES ('a', now()), ('b', NULL), ('c', NULL)) AS n(key, sent)")  # fmt: skip
    found = json.loads(run("--json"))
    assert found["notices"]["count"] == 2
    assert found["outbox"]["count"] == 1
    assert (found["transferring"], found["in_transit"]) == (1, "3")
    assert found["usage_until"] == "2026-01-31T12:00:00Z"
    assert found["beat"] is False
    assert [tick["name"] for tick in found["schedules"]] == ["outbox"]
    with psycopg.connect(database, autocommit=True) as connection, alone(connection, due.BEAT):
        shown = run()
    for words in (
        "due accounts  0", "because of    nothing", "notices       2 wait, the oldest since", "outbox        1 wait",
        "in transit    3 credits of 1 accounts", "usage         counted until 2026-01-31 12:00:00 UTC",
        "beat          ticks", "schedules.outbox", "1m 3",
    ):  # fmt: skip
        assert words in shown


def test_of_more_than_are_looked_at(run: Any, lived: None, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    travel(database, timedelta(days=40))
    monkeypatch.setattr(due, "OLDEST", due.OLDEST.replace(f"LIMIT {due.SAMPLE}", "LIMIT 2"))
    monkeypatch.setattr(due, "SAMPLE", 2)
    shown = run()
    assert "due accounts  5, the oldest since" in shown
    assert "1 hold, 2 expiry (of the 2 longest overdue)" in shown
