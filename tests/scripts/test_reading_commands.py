"""``creditlane usage``, ``forecast`` and ``explain``, as an operator types them, against a real database."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

import pytest

from scripts.showing import BLOCKS
from tests.scripts.test_command_line import Run, one, run, several
from tests.support import Ledger
from tests.workers.test_ledger_writer import freeze

__all__ = ["run"]

START = datetime(2027, 3, 1, 9, tzinfo=UTC)


@pytest.fixture
def used(ledger: Ledger) -> None:
    """An account that has used pictures on the first and third day of March, and been given one back."""
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="alice")
    ledger.apply(
        "credits.grant", "trial", account="alice", amount=10, source="trial", priority=1, expires_in=86_400 * 8
    )
    ledger.apply("credits.consume", "c-1", account="alice", feature="image", quantity=96, member="[red]mia")
    freeze(ledger, START + timedelta(days=2))
    ledger.apply("credits.consume", "c-2", account="alice", feature="image", quantity=24)
    ledger.apply("credits.consume", "c-3", account="alice", amount="1.5")
    ledger.apply("credits.refund", "r-1", account="alice", operation="c-2", amount=1)


def test_usage_by_feature_and_by_day(run: Run, used: None) -> None:
    shown = run("usage", "alice").stdout
    assert "15.5 in 3 charges, 1 given back" in shown
    assert re.search("utilisation +25.8 %: 15.5 used, 44.5 left, 0 expired", shown)
    image, none = (line for line in shown.splitlines() if line.startswith(("image", "none named")))
    assert re.match(r"image +2 +120 +15 +1 +0 +█+", image)
    assert image.count("█") > none.count("█") > 0
    days = run("usage", "alice", "--by", "day", "--since", "2027-03-01", "--until", "2027-03-05").stdout
    bars = {line[:10]: "█" in line for line in days.splitlines() if re.match(r"2027-03-0\d ", line)}
    assert bars == {"2027-03-01": True, "2027-03-02": False, "2027-03-03": True, "2027-03-04": False}
    assert re.search("12 in 1 charge +$", run("usage", "alice", "--member", "[red]mia").stdout, re.MULTILINE)
    assert "[red]mia" in run("usage", "alice", "--by", "member").stdout
    found = one(run("usage", "--by", "week", "--since", "2027-03-01", "--feature", "image", "--json"))
    assert [(line["key"], line["used"], line["quantity"]) for line in found["lines"]] == [("2027-03-01", "14", "120")]
    assert (found["account"], found["total"]["used"]) == (None, "14")


def test_pages_of_usage(run: Run, used: None) -> None:
    first = run("usage", "alice", "--limit", "1").stdout
    assert "more: --after 'image'" in first
    assert "none named" not in first
    rest = run("usage", "alice", "--limit", "1", "--after", "image").stdout
    assert "none named" in rest
    assert "more:" not in rest
    unnamed = one(run("usage", "alice", "--feature", "", "--json"))
    assert [(line["key"], line["used"]) for line in unnamed["lines"]] == [("", "1.5")]


def test_a_forecast(run: Run, used: None) -> None:
    shown = run("forecast", "alice", "--pace", "2", "--days", "40").stdout
    assert "available  " in shown
    assert "2 credits a day" in shown
    assert "expires unused" in shown
    assert any(block in shown for block in BLOCKS[1:])
    found = one(run("forecast", "alice", "--pace", "2", "--days", "40", "--json"))
    assert found["available"] == "44.5"
    assert found["runs_out_at"].startswith("2027-03-26")
    assert len(found["daily"]) == 40
    assert "none arrives" in run("forecast", "alice", "--unpaid").stdout
    assert "a pace is 0 or more" in run("forecast", "alice", "--pace", "-1", code=2).stderr
    assert "not an amount" in run("forecast", "alice", "--pace", "1e3", code=2).stderr
    run("forecast", "alice", "--days", "367", code=2)


def test_explanations(run: Run, used: None) -> None:
    shown = run("explain", "alice").stdout
    assert "60 granted, 1 restored" in shown
    assert re.search(r"^ +1 used up +10 ", shown, re.MULTILINE)
    charge = run("explain", "alice", "c-1").stdout
    rows = [line.split()[2:] for line in charge.splitlines() if " consumed " in line]
    assert [row[:4] for row in rows] == [["consumed", "10", "2", "trial"], ["consumed", "2", "1", "signup"]]
    assert "[red]mia" in charge
    assert one(run("explain", "alice", "c-2", "--json"))["given_back"] == "1"
    life = run("explain", "alice", "--grant", "1").stdout
    assert re.search("came in +50 granted, 1 restored", life)
    assert re.search(r"consumed +2 +consume c-1 +image by \[red\]mia", life)
    page = run("explain", "alice", "--grant", "1", "--limit", "2").stdout
    found = one(run("explain", "alice", "--grant", "1", "--limit", "2", "--json"))
    rest = one(run("explain", "alice", "--grant", "1", "--after", str(found["next_after"]), "--json"))
    kinds = [each["kind"] for each in (*found["movements"], *rest["movements"])]
    assert kinds == ["granted", "consumed", "consumed", "consumed", "restored"]
    assert f"more: --after {found['next_after']}" in page


def test_history_of_a_source_and_of_a_member(run: Run, used: None) -> None:
    of_trial = several(run("account", "history", "alice", "--source", "trial", "--json"))
    assert [line["operation"] for line in of_trial] == ["c-1", "trial"]
    of_mia = several(run("account", "history", "alice", "--member", "[red]mia", "--json"))
    assert [line["operation"] for line in of_mia] == ["c-1"]


def test_what_is_not_there_or_makes_no_sense(run: Run, used: None) -> None:
    for command in ("usage", "forecast", "explain"):
        assert "unknown_account" in run(command, "nobody", code=3).stderr
    assert "no operation 'none'" in run("explain", "alice", "none", code=3).stderr
    assert "no grant 9" in run("explain", "alice", "--grant", "9", code=3).stderr
    assert "one of the two" in run("explain", "alice", "c-1", "--grant", "1", code=2).stderr
    assert "no day" in run("usage", "alice", "--since", "2027-02-30", code=2).stderr
    today = date(2027, 3, 1).isoformat()
    assert "not before" in run("usage", "alice", "--since", today, "--until", today, code=2).stderr


def test_an_empty_ledger(run: Run, ledger: Ledger) -> None:
    assert "0 in 0 charges" in run("usage").stdout
    ledger.apply("credits.open", "open", account="alice")
    assert "50 granted" in run("explain", "alice").stdout
    assert "not by" in run("forecast", "alice", "--days", "3").stdout
