"""``creditlane simulate``, ``leaderboard``, ``achievements`` and ``refunds``, as an operator types them."""

from __future__ import annotations

import csv
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from models.catalog import load_catalog
from tests.scripts.test_command_line import Run, one, run
from tests.support import Ledger
from tests.workers.test_ledger_writer import freeze, priced_by

__all__ = ["run"]

START = datetime(2027, 3, 1, 9, tzinfo=UTC)
GOALS = """
[achievements.beginner]
title = "[red]Beginner"
at = "10"
credits = "2"
[achievements.expert]
at = "40"
"""


@pytest.fixture
def used(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two accounts under a catalog with achievements; one is given something back."""
    path = tmp_path / "merits.toml"
    packs = Path("models/catalogs/packs.toml").read_text(encoding="utf-8")
    path.write_text(packs.replace('name = "packs"', 'name = "merits"') + GOALS, encoding="utf-8")
    monkeypatch.setenv("CREDITLANE_CATALOG", str(path))
    with priced_by(ledger, load_catalog(str(path))):
        freeze(ledger, START)
        for account in ("alice", "[b]ob"):
            ledger.apply("credits.open", "open", account=account)
        ledger.apply("credits.consume", "c-1", account="alice", feature="image", quantity=96)
        ledger.apply("credits.consume", "c-2", account="[b]ob", amount=3)
        ledger.apply("credits.refund", "r-1", account="alice", operation="c-1", amount=3, reason="[i]blurred")


def test_what_operations_would_do(run: Run, used: None, tmp_path: Path) -> None:
    shown = run("simulate", "alice", "image", "160", "--times", "3").stdout
    assert "43, afterwards 3" in shown
    assert re.search(r"^ *1 +consume +20 +23 +20 signup \(1\) *$", shown, re.MULTILINE)
    assert "refused  " in shown
    assert "the cheapest that covers it: pack decouverte" in shown
    file = tmp_path / "operations.jsonl"
    lines = (
        '{"name": "credits.hold", "arguments": {"amount": 5}, "id": "h"}', "",
        '{"name": "credits.capture", "arguments": {"hold": "h", "amount": 30}}',
    )  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    found = one(run("simulate", "alice", "--file", str(file), "--at", "2027-04-01", "--json"))
    assert [(result["operation"], result["charged"]) for result in found["results"]] == [
        ("credits.hold", "5"), ("credits.capture", "30"),
    ]  # fmt: skip
    assert found["at"] == "2027-04-01T00:00:00Z"
    assert "cannot be read" in run("simulate", "alice", "--file", str(tmp_path), code=2).stderr
    file.write_text('{"name": 1}\n', encoding="utf-8")
    assert "line 1" in run("simulate", "alice", "--file", str(file), code=2).stderr
    assert "name a feature" in run("simulate", "alice", code=2).stderr
    assert "without operations" in run("simulate", "alice", "image", "--until", "2027-04-01", code=2).stderr
    assert "--pace goes with --until" in run("simulate", "alice", "image", "--pace", "1", code=2).stderr
    assert "behind" in run("simulate", "alice", "image", "--at", "2027-01-01", code=2).stderr
    run("simulate", "nobody", "image", code=3)


def test_who_is_ahead_and_with_what(run: Run, used: None) -> None:
    shown = run("leaderboard", "--account", "[b]ob").stdout
    assert re.search(r"^ *1 +alice +9$", shown, re.MULTILINE)
    assert "[b]ob is number 2: 3" in shown
    earned = one(run("leaderboard", "--by", "earned", "--since", "2027-03-01", "--until", "2027-03-02", "--json"))
    assert [(line["account"], line["credits"]) for line in earned["lines"]] == [("alice", "2")]
    assert "more: --after 'alice'" in run("leaderboard", "--limit", "1").stdout
    assert "not before" in run("leaderboard", "--since", "2027-03-02", "--until", "2027-03-02", code=2).stderr
    trophies = run("achievements", "alice").stdout
    assert re.search(r"^\[red\]Beginner +\+2 +2027-03-01 09:00:00 by c-1", trophies, re.MULTILINE)
    assert "22.5 %: 9 of 40 credits used" in trophies
    assert one(run("achievements", "[b]ob", "--json"))["goals"][0]["percent"] == 30.0
    run("achievements", "nobody", code=3)


def test_what_was_given_back(run: Run, used: None, tmp_path: Path) -> None:
    days = ("--since", "2027-03-01", "--until", "2027-03-02")
    shown = run("refunds", *days).stdout
    assert "3 credits in 1 refund, 20 % of 15 charged" in shown
    assert re.search(r"^\[i\]blurred +image +callers +1 +3 +12 +25 %", shown, re.MULTILINE)
    file = tmp_path / "refunds.csv"
    assert "1 rows in" in run("refunds", *days, "--csv", str(file)).stdout
    with file.open(newline="", encoding="utf-8") as text:
        (row,) = csv.DictReader(text)
    assert row == {
        "reason": "[i]blurred", "feature": "image", "actor": "", "refunds": "1", "credits": "3", "charged": "12",
        "share_percent": "25.0",
    }  # fmt: skip
    found = json.loads(run("refunds", *days, "--by", "reason", "--account", "alice", "--json").stdout)
    assert [(line["reason"], line["feature"]) for line in found["lines"]] == [("[i]blurred", None)]
    run("refunds", "--account", "nobody", code=3)
    assert "no day" in run("refunds", "--since", "yesterday", code=2).stderr
