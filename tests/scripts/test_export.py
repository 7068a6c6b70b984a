"""``creditlane export``: every row once, in three formats, and back through ``creditlane import``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from pyarrow import parquet
from typer.testing import CliRunner

from models.catalog import load_catalog
from models.reading import account_summary
from models.usage import roll_up
from scripts.command_parts import Commands
from scripts.export_command import EXPORT_EXAMPLES, export
from scripts.import_command import import_accounts
from tests.conftest import LANES
from tests.proof import freeze, live
from tests.support import Ledger, execute, rows

app = typer.Typer(cls=Commands)
app.command("export", epilog=EXPORT_EXAMPLES)(export)
app.command("import")(import_accounts)

NASTY = ['a "quoted", one', "=1+1", "Zoë 组织", "semi;colon|tab", "'", "\\N"]

Run = Callable[..., Any]


@pytest.fixture
def run(database: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the test's ledger, or on another."""
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("CREDITLANE_LANES", str(LANES))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments: object, code: int = 0, on: str = database) -> Any:
        monkeypatch.setenv("CREDITLANE_DATABASE_URL", on)
        shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert shown.exit_code == code, shown.output
        return shown

    return invoke


def filled(ledger: Ledger) -> None:
    """Accounts with a life, with names that are hard to write, with credits to come, and one with nothing."""
    live(ledger, "alice", "bob")
    for number, name in enumerate(NASTY):
        ledger.apply("credits.open", "o", account=name, kind="pool", email=f"{number}@example.org", locale="fr")
        ledger.apply("credits.grant", "g", account=name, amount=f"{number + 1}.000001", source=name, priority=number)
        ledger.apply("credits.grant", "h", account=name, amount=3, source="pack", expires_at="2999-01-01T00:00:00Z",
                     features=["image", 'a "b"'])  # fmt: skip
        ledger.apply("credits.grant", "i", account=name, amount=4, source="pack", effective_at="2998-01-01T00:00:00Z")
    ledger.apply("credits.open", "o", account="poor", kind="pool")
    ledger.apply("credits.settle", "s", account="never opened")


def standing(url: str) -> dict[str, dict[str, Any]]:
    """Of each account, the lots that an operation would find."""
    found = {}
    with psycopg.connect(url, autocommit=True) as connection:
        for (account,) in connection.execute("SELECT account FROM accounts WHERE status = 'open'").fetchall():
            summary = account_summary(connection, account, load_catalog("packs"))
            assert summary is not None
            lots = [
                (lot.source, lot.available, lot.priority, lot.features, lot.effective_at, lot.expires_at)
                for lot in summary.grants
                if lot.available != "0"
            ]
            found[account] = {
                "kind": summary.kind, "email": summary.email, "by_source": summary.balance.by_source, "lots": lots
            }  # fmt: skip
    return found


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_lots_go_out_and_come_back(
    format: str, run: Run, ledger: Ledger, database: str, tampered_database: str, tmp_path: Path
) -> None:
    filled(ledger)
    file = tmp_path / f"lots.{format}"
    assert "rows in" in run("export", "lots", file).stderr
    # The clock stands still there as well, so that neither lot is older than it was.
    execute(
        tampered_database,
        "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE"
        " AS 'SELECT timestamptz ''2026-01-31T14:00:00Z'''",
    )
    told = json.loads(run("import", file, "--name", "back", "--json", on=tampered_database).stdout)
    assert told["audit"]["holds"]
    assert standing(tampered_database) == standing(database)
    assert len(standing(database)) == len(NASTY) + 3


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_accounts_go_out_and_come_back(
    format: str, run: Run, ledger: Ledger, database: str, tampered_database: str, tmp_path: Path
) -> None:
    filled(ledger)
    file = tmp_path / f"accounts.{format}"
    run("export", "accounts", file)
    run("import", file, "--name", "back", on=tampered_database)
    before, after = standing(database), standing(tampered_database)
    assert set(after) == set(before)
    for account, stands in before.items():
        for name in ("kind", "email", "by_source"):
            assert after[account][name] == stands[name], account


def table(shown: Any) -> list[dict[str, str]]:
    """The rows of CSV on stdout."""
    return list(csv.DictReader(io.StringIO(shown.stdout_bytes.decode(), newline="")))


def test_accounts_with_all_that_they_have(run: Run, ledger: Ledger) -> None:
    live(ledger, "alice")
    ledger.apply("credits.grant", "z", account="alice", amount=7, source="pack", effective_at="2998-01-01T00:00:00Z")
    (row,) = table(run("export", "accounts"))
    summary = standing_of(ledger, "alice")
    assert (row["account"], row["status"], row["opened_at"]) == ("alice", "open", "2026-01-31T12:00:00Z")
    assert row["available"] == summary.balance.available
    assert (row["held"], row["upcoming"], row["debt"]) == (summary.balance.held, "7", "0")
    assert {name.partition(":")[2]: text for name, text in row.items() if name.startswith("balance:") and text} == dict(
        summary.balance.by_source
    )


def standing_of(ledger: Ledger, account: str) -> Any:
    """An account as an operation would find it."""
    return account_summary(ledger.writer.connection, account, ledger.catalog)


def test_what_has_ended_is_left_out_before_it_is_swept(run: Run, ledger: Ledger) -> None:
    start = datetime(2026, 1, 31, 12, tzinfo=UTC)
    freeze(ledger, start)
    ledger.apply("credits.open", "o", account="a")
    ledger.apply("credits.grant", "g", account="a", amount=5, source="promo", expires_in=60)
    freeze(ledger, start + timedelta(seconds=60))
    assert [row["source"] for row in table(run("export", "lots"))] == ["signup"]
    (row,) = table(run("export", "accounts"))
    assert (row["available"], "balance:promo" in row) == ("50", False)


def test_entries_in_three_formats(run: Run, ledger: Ledger, database: str, tmp_path: Path) -> None:
    live(ledger, "alice", "bob")
    run("export", "entries", tmp_path / "e.parquet")
    run("export", "entries", tmp_path / "e.jsonl")
    by_csv = table(run("export", "entries", "-"))
    by_json = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    by_parquet = parquet.read_table(tmp_path / "e.parquet").to_pylist()
    expected = rows(
        database, "SELECT account, seq, amount_micro, encode(hash, 'hex') FROM entries ORDER BY account, seq"
    )
    for found in (by_csv, by_json, by_parquet):
        assert [
            (row["account"], int(row["seq"]), int(Decimal(row["amount"]).scaleb(6)), row["hash"]) for row in found
        ] == expected
    instant = by_parquet[0]["recorded_at"]
    assert instant.isoformat().replace("+00:00", "Z") == by_csv[0]["recorded_at"] == by_json[0]["recorded_at"]
    assert by_csv[0]["refers_to"] == ""
    assert "refers_to" not in by_json[0]
    assert by_parquet[0]["refers_to"] is None


def test_a_span_of_time(run: Run, ledger: Ledger) -> None:
    live(ledger, "alice")
    everything = table(run("export", "entries"))
    noon, later = "2026-01-31T12:00:00Z", "2026-01-31T14:00:00Z"
    first = table(run("export", "entries", "--from", noon, "--to", later))
    second = table(run("export", "entries", "--from", later))
    assert first
    assert second
    assert first + second == everything
    assert {row["recorded_at"] for row in second} == {later}
    assert "there is no --from" in run("export", "accounts", "--from", noon, code=2).stderr


def test_usage_by_day(run: Run, ledger: Ledger, tmp_path: Path) -> None:
    live(ledger, "alice")
    ledger.apply("credits.consume", "image", account="alice", feature="image", quantity=4)
    roll_up(ledger.writer.connection, lambda *_: True)
    freeze(ledger, datetime(2026, 2, 2, tzinfo=UTC))
    roll_up(ledger.writer.connection, lambda *_: True)
    file = tmp_path / "usage.parquet"
    run("export", "usage", file, "--from", "2026-01-31", "--to", "2026-02-01")
    found = {row["feature"]: row for row in parquet.read_table(file).to_pylist()}
    assert found["image"]["day"] == date(2026, 1, 31)
    assert (found["image"]["quantity"], found["image"]["charged"]) == (4, Decimal("0.5"))
    assert found[""]["refunded"] == 3
    assert table(run("export", "usage", "--from", "2026-02-01")) == []


def test_a_file_is_whole_or_as_it_was(run: Run, ledger: Ledger, tmp_path: Path) -> None:
    live(ledger, "alice")
    file = tmp_path / "entries.csv"
    file.write_text("before")
    execute_failing = "CREATE FUNCTION encode(bytea, text) RETURNS text LANGUAGE sql AS 'SELECT (1/0)::text'"
    ledger.writer.connection.execute(f"CREATE SCHEMA broken; {execute_failing.replace('encode', 'broken.encode')}")
    ledger.writer.connection.execute("ALTER ROLE CURRENT_USER SET search_path = broken, public, pg_catalog")
    try:
        run("export", "entries", file, code=4)
    finally:
        ledger.writer.connection.execute("ALTER ROLE CURRENT_USER RESET search_path")
    assert [path.name for path in tmp_path.iterdir()] == ["entries.csv"]
    assert file.read_text() == "before"
    run("export", "entries", file)
    assert file.read_bytes().startswith(b"account,seq,operation,kind")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["entries.csv"]
    assert "cannot be written" in run("export", "entries", tmp_path / "none" / "e.csv", code=2).stderr


def test_lines_end_as_the_standard_has_it(run: Run, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o", account='a,"b"')
    text = run("export", "lots").stdout_bytes
    assert text.count(b"\r\n") == 2
    assert text.split(b"\r\n")[1].startswith(b'"a,""b""",user,')


def test_without_pyarrow_it_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = run("export", "usage", tmp_path / "u.parquet", code=2).stderr
    assert "pip install 'creditlane[export]'" in said
    assert list(tmp_path.iterdir()) == []
