"""``creditlane payments revenue`` on a real ledger: the table, CSV, JSON, and the exit code when it does not close."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scripts import command_parts
from scripts.command_parts import Commands
from scripts.payments_revenue import REVENUE_EXAMPLES, revenue
from tests.proof import freeze, tamper
from tests.support import Ledger

app = typer.Typer(cls=Commands)
app.command(epilog=REVENUE_EXAMPLES)(revenue)
app.callback()(lambda: None)

MONTHS = ("--from", "2026-01", "--to", "2026-03")


def run(*options: str) -> Any:
    """Run the command."""
    return CliRunner().invoke(app, ["revenue", *options])


@pytest.fixture(autouse=True)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the test's ledger."""
    name = "tampered_database" if "tampered_ledger" in request.fixturenames else "database"
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", request.getfixturevalue(name))
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


def live(ledger: Ledger) -> None:
    """Two currencies and free credits; a pack is sold at the end of January in Paris, and used in February."""
    freeze(ledger, datetime(2026, 1, 31, 22, 30, tzinfo=UTC))
    ledger.apply("credits.open", "o", account="a")
    for account, currency in (("a", "EUR"), ("b", "JPY")):
        price = {"minor": 499, "currency": currency, "per": 25}
        ledger.apply("credits.open", "o", account=account)
        ledger.apply("credits.grant", "g", account=account, amount=25, source="pack", priority=0, unit_price=price)
    freeze(ledger, datetime(2026, 1, 31, 23, 30, tzinfo=UTC))
    ledger.apply("credits.consume", "c", account="a", amount=10)


def test_for_people(ledger: Ledger) -> None:
    live(ledger)
    shown = run(*MONTHS, "--zone", "Europe/Paris")
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines() if line]
    assert lines == [
        "EUR opening sold earned closing",
        "2026-01 0.00 4.99 0.00 4.99",
        "2026-02 4.99 0.00 2.00 2.99",
        "in all 0.00 4.99 2.00 2.99",
        "JPY opening sold closing",
        "2026-01 0 499 499",
        "2026-02 499 0 499",
        "in all 0 499 499",
        "free credits opening sold closing",
        "2026-01 0 100 100",
        "2026-02 100 0 100",
        "in all 0 100 100",
        "it closes: 5 entries of 2 accounts",
    ]
    by_source = " ".join(run(*MONTHS, "--by", "source").stdout.split())
    assert "EUR sold earned closing pack 4.99 2.00 2.99 in all 4.99 2.00 2.99" in by_source
    by_account = " ".join(run(*MONTHS, "--by", "account").stdout.split())
    assert "JPY sold closing b 499 499 in all 499 499 free credits sold closing a 50 50 b 50 50" in by_account


def test_from_the_beginning_of_the_month_until_now_unless_told(ledger: Ledger) -> None:
    live(ledger)
    told = json.loads(run("--zone", "Europe/Paris", "--json").stdout)
    assert (told["from"], told["to"]) == ("2026-02-01T00:00:00+01:00", "2026-02-01T00:30:00+01:00")


def test_for_programs(ledger: Ledger, tmp_path: Path) -> None:
    live(ledger)
    told = json.loads(run(*MONTHS, "--json").stdout)
    assert (told["closes"], told["faults"], told["entries"]) == (True, [], 5)
    assert list(told["currencies"]) == ["free", "EUR", "JPY"]
    euro = told["currencies"]["EUR"]
    assert euro["closing"] == {"credits": "15", "minor": 299, "amount": "2.99"}
    assert [row["name"] for row in euro["rows"]] == ["2026-01", "2026-02"]
    assert told["currencies"]["free"]["closing"] == {"credits": "100"}
    file = tmp_path / "revenue.csv"
    shown = run(*MONTHS, "--csv", str(file))
    assert f"rows in {file}" in shown.stdout
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["currency"] for row in rows} == {"", "EUR", "JPY"}
    assert sum(int(row["amount_minor"]) for row in rows if row["part"] == "sold" and row["currency"]) == 998
    piped = run(*MONTHS, "--csv", "-")
    assert piped.stdout_bytes == file.read_bytes()
    assert "it closes" in piped.stderr


def test_how_far_it_is_is_told(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    live(ledger)
    monkeypatch.setattr(command_parts, "LINE_SECONDS", 0)
    assert "adding up: 5 of 5 entries" in run(*MONTHS).stderr
    assert run(*MONTHS, "--json").stderr == ""


def test_what_does_not_close_is_named_and_ends_in_1(tampered_ledger: Ledger) -> None:
    live(tampered_ledger)
    tamper(tampered_ledger, "UPDATE entries SET amount_micro = amount_micro - 1 WHERE kind = 'consumed'")
    shown = run(*MONTHS)
    assert shown.exit_code == 1
    assert "fault a grants grant 2: has 15 credits left, its entries leave 15.000001" in shown.stdout
    assert "it does not close" in shown.stdout
    told = run(*MONTHS, "--json")
    assert (told.exit_code, json.loads(told.stdout)["closes"]) == (1, False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--from", "yesterday"), "--from: 'yesterday' is no instant"),
        (("--from", "2026-13"), "--from: '2026-13' is no instant"),
        (("--from", "2026-03", "--to", "2026-03"), "--to is not after --from"),
        (("--zone", "Paris"), "--zone: 'Paris' is no IANA time zone"),
        (("--zone", "../etc"), "--zone: '../etc' is no IANA time zone"),
        ((*MONTHS, "--csv", "/nowhere/at/all.csv"), "--csv: /nowhere/at/all.csv cannot be written"),
    ],
)
def test_what_makes_no_sense_is_said(database: str, options: tuple[str, ...], sentence: str) -> None:
    shown = run(*options)
    assert (shown.exit_code, sentence in shown.stderr) == (2, True), shown.output
