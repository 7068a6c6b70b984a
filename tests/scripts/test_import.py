"""``creditlane import``: what a file becomes, exactly once, whatever stands in it and whoever is killed meanwhile."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from creditlane.amounts import format_amount
from creditlane.contract import Grant, Open
from models.catalog import load_catalog
from scripts.command_parts import Commands
from scripts.import_command import IMPORT_EXAMPLES, import_accounts
from scripts.import_reading import BadLine, Checker, Format, LineError, Record, Source
from scripts.importing import CHUNK
from tests.conftest import LANES
from tests.support import ROOT, Ledger, rows, value
from workers.bulk_writer import own_lanes
from workers.ledger_writer import connect

app = typer.Typer(cls=Commands)
app.command("import", epilog=IMPORT_EXAMPLES)(import_accounts)
app.callback()(lambda: None)

Import = Callable[..., Any]


@pytest.fixture
def run(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Import a text; gives what is told as JSON."""
    for name, setting in (
        ("CREDITLANE_DATABASE_URL", database),
        ("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0"),
        ("CREDITLANE_LANES", str(LANES)),
        ("COLUMNS", "160"),
        ("NO_COLOR", "1"),
    ):
        monkeypatch.setenv(name, setting)

    def invoke(text: str | bytes, *options: str, code: int = 0, name: str = "legacy", file: str = "users.csv") -> Any:
        path = tmp_path / file
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        shown = CliRunner().invoke(app, ["import", str(path), "--name", name, "--json", *options])
        assert shown.exit_code == code, shown.output
        return json.loads(shown.stdout) if shown.stdout else shown.stderr

    return invoke


def balances(database: str) -> dict[str, dict[str, str]]:
    """What each account has, by source."""
    found: dict[str, dict[str, str]] = {}
    for account, source, micro in rows(
        database,
        "SELECT a.account, g.source, sum(g.available_micro)::bigint FROM accounts a LEFT JOIN grants g USING (account)"
        " GROUP BY a.account, g.source ORDER BY a.account, g.source",
    ):
        found.setdefault(account, {})
        if source is not None:
            found[account][source] = format_amount(micro)
    return found


def heads(database: str) -> list[tuple[Any, ...]]:
    """Where each account's chain and count of operations stand."""
    return rows(database, "SELECT account, operations, seq, head FROM accounts ORDER BY account")


def wrong(told: dict[str, Any], kind: str = "bad") -> list[tuple[int, str]]:
    """The lines and columns of a kind of finding."""
    return [(line, column) for line, column, _ in told["findings"].get(kind, [])]


WIDE = """account,kind,email,locale,timezone,opened_at,balance:pack,balance:monthly
alice,,alice@example.org,fr,Europe/Paris,2021-05-01,12.5,20
bob,lead,,,,,0,0.000001
studio,pool,,,,,1000000000000,
"""


def test_accounts_with_a_column_for_each_source(run: Import, database: str) -> None:
    told = run(WIDE)
    assert (told["accounts"], told["applied"], told["replayed"], told["counts"]) == (3, 7, 0, {})
    assert told["credits"] == {"monthly": "20.000001", "pack": "1000000000012.5"}
    assert told["audit"] == {"holds": True, "faults": []}
    assert rows(database, "SELECT label FROM catalogs") == [("packs-1",)]
    assert balances(database) == {
        "alice": {"monthly": "20", "pack": "12.5"}, "bob": {"monthly": "0.000001"}, "studio": {"pack": "1000000000000"},
    }  # fmt: skip
    assert rows(database, "SELECT kind, email, locale, timezone, status FROM accounts WHERE account = 'alice'") == [
        ("user", "alice@example.org", "fr", "Europe/Paris", "open")
    ]
    opened = value(
        database, "SELECT occurred_at::date::text FROM operations WHERE account = 'alice' AND name = 'credits.open'"
    )
    assert opened == "2021-05-01"


def test_a_file_is_imported_once_under_a_name(run: Import, database: str) -> None:
    run(WIDE)
    before = heads(database)
    told = run(WIDE)
    assert (told["applied"], told["replayed"], told["counts"], told["missing"]) == (0, 7, {}, {})
    assert told["credits"] == {"monthly": "20.000001", "pack": "1000000000012.5"}
    assert heads(database) == before


def test_what_differs_from_an_earlier_run_is_named_and_left_alone(run: Import, database: str) -> None:
    run(WIDE)
    before = heads(database)
    told = run(WIDE.replace("12.5", "13").replace("alice@", "alicia@"), code=3)
    assert told["findings"]["conflict"] == [
        [2, "", "an earlier run imported this account otherwise"],
        [2, "", "an earlier run imported these pack credits otherwise"],
    ]
    assert (told["applied"], told["replayed"]) == (0, 5)
    assert heads(database) == before


def test_a_source_that_is_added_to_the_file_is_added_to_the_account(run: Import, database: str) -> None:
    run("account,balance:pack\na,1\n")
    assert run("account,balance:pack,balance:gift\na,1,2\n")["applied"] == 1
    assert balances(database) == {"a": {"gift": "2", "pack": "1"}}


LONG = """account,email,source,amount,effective_at,expires_at,priority,features
a,a@example.org,pack,1.5,,,,
a,,monthly,2,,2999-01-01,3,"[""image"", ""video""]"
a,a@example.org,pack,4,2998-01-01T00:00:00+02:00,2999-01-01,,
b,,,,,,,
c,,gift,7,,2020-01-01,,
"""


def test_a_line_for_each_lot(run: Import, database: str) -> None:
    told = run(LONG)
    assert wrong(told, "ended") == [(6, "expires_at")]
    assert (told["accounts"], told["applied"]) == (3, 6)
    assert rows(
        database,
        "SELECT account, source, available_micro, effective_at > now(), expires_at IS NULL, priority, features"
        " FROM grants ORDER BY account, grant_id",
    ) == [
        ("a", "pack", 1_500_000, False, True, 50, None),
        ("a", "monthly", 2_000_000, False, False, 3, ["image", "video"]),
        ("a", "pack", 4_000_000, True, False, 50, None),
    ]
    assert [account for account, *_ in heads(database)] == ["a", "b", "c"]


def test_json_lines(run: Import, database: str) -> None:
    lines = [
        {"account": "a", "email": "a@example.org", "balances": {"pack": "1.5", "gift": 2}},
        {"account": "b", "balances": [{"source": "pack", "amount": 1, "expires_at": "2999-01-01"}], "email": None},
        {"account": "c", "source": "pack", "amount": "3"},
        {"account": "c", "source": "pack", "amount": "3"},
        {"account": "d", "balance:pack": "4"},
    ]
    told = run("".join(json.dumps(line) + "\r\n\n" for line in lines), file="users.jsonl")
    assert told["counts"] == {}
    assert balances(database) == {
        "a": {"gift": "2", "pack": "1.5"}, "b": {"pack": "1"}, "c": {"pack": "6"}, "d": {"pack": "4"},
    }  # fmt: skip


BAD: list[tuple[bytes, tuple[int, str]]] = [
    (b"a\x00b,1", (3, "account")),
    (b"\xff\xfe,1", (3, "")),
    (b'a"b"c,"1"2', (3, "")),
    (b",1", (3, "account")),
    (b"x" * 129 + b",1", (3, "account")),
    (b"x" * (1 << 20) + b",1", (3, "")),
    (b'"' + b"x" * 200_000 + b'",1', (3, "")),
    (b"a", (3, "")),
    (b"a,1,2", (3, "")),
    (b"good,1", (3, "account")),
    (b"a,-1", (3, "balance:pack")),
    (b"a,1e3", (3, "balance:pack")),
    (b"a,NaN", (3, "balance:pack")),
    (b"a,0.0000001", (3, "balance:pack")),
    (b"a,1000000000001", (3, "balance:pack")),
    (b'"a\nb",1', (3, "account")),
    (b"a,=1+1", (3, "balance:pack")),
]


@pytest.mark.parametrize(("line", "where"), BAD, ids=[repr(line[:20]) for line, _ in BAD])
def test_a_line_that_cannot_be_is_named_with_its_column(line: bytes, where: tuple[int, str], tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_bytes(b"\xef\xbb\xbfaccount,balance:pack\r\ngood,1\r\n" + line + b"\r\n\r\n" + "Zoë,2\r\n".encode())
    checker = Checker("x", load_catalog("packs"))
    found: list[Any] = []
    for record in Source(path, Format.CSV).records():
        try:
            found.append(record if isinstance(record, BadLine) else checker.operations(record)[0][-1].message)
        except LineError as error:
            found.append(error.bad)
    assert [(bad.line, bad.column) for bad in found if isinstance(bad, BadLine)] == [where]
    assert [message.account for message in found if not isinstance(message, BadLine)] == ["good", "Zoë"]


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "admin"}, "kind"),
    ({"email": "x" * 255}, "email"),
    ({"locale": "fr FR"}, "locale"),
    ({"timezone": "Europe Paris"}, "timezone"),
    ({"plan": "none"}, "plan"),
    ({"opened_at": "yesterday"}, "opened_at"),
    ({"opened_at": "1969-01-01"}, ""),
    ({"balances": {"pack": 1.5}}, "balances[...]"),
    ({"balances": {"": 1}}, "source"),
    ({"balances": [{"source": "pack"}]}, "balances[0]"),
    ({"balances": {"pack": 1}, "source": "pack", "amount": 1}, "balances"),
    ({"source": "pack"}, "amount"),
    ({"source": "pack", "amount": 1, "expires_at": "2998-01-01", "effective_at": "2999-01-01"}, "expires_at"),
    ({"source": "pack", "amount": 1, "priority": 1001}, "priority"),
    ({"colour": "red"}, "colour"),
    ({"account": 7}, "account"),
]


@pytest.mark.parametrize(("fields", "column"), BAD_FIELDS, ids=[str(list(fields)) for fields, _ in BAD_FIELDS])
def test_a_field_that_cannot_be_is_named(fields: dict[str, Any], column: str, tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text(json.dumps({"account": "a", **fields}))
    (record,) = Source(path, Format.JSONL).records()
    if isinstance(record, Record):
        with pytest.raises(LineError) as error:
            Checker("x", load_catalog("packs")).operations(record)
        record = error.value.bad
    assert (record.line, record.column) == (1, column)
    assert record.reason


def test_a_plan_gives_its_own_credits(run: Import, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITLANE_CATALOG", "dual")
    told = run("account,plan,balance:monthly\na,free,5\n", code=1)
    assert wrong(told) == [(2, "balance:monthly")]
    run("account,plan,balance:purchased\na,free,5\n")
    assert balances(database) == {"a": {"monthly": "20", "purchased": "5"}}
    assert value(database, "SELECT count(*) FROM notices") == 0
    run("account,plan,balance:purchased\nb,free,5\n", "--notify", name="second")
    assert rows(database, "SELECT account, kind FROM notices") == [("b", "plan_started")]


def test_nothing_is_written_when_a_line_is_wrong_unless_told_to(run: Import, database: str) -> None:
    text = "account,balance:pack\na,1\nb,x\nc,3\na,4\n"
    told = run(text, code=1)
    assert (told["written"], told["accounts"], wrong(told)) == (False, 2, [(3, "balance:pack"), (5, "account")])
    assert balances(database) == {}
    told = run(text, "--skip-bad", code=1)
    assert (told["written"], told["applied"], told["counts"]) == (True, 4, {"bad": 2})
    assert balances(database) == {"a": {"pack": "1"}, "c": {"pack": "3"}}


def test_a_dry_run_writes_nothing_and_needs_no_ledger(
    run: Import, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    told = run(WIDE, "--dry-run")
    assert (told["written"], told["accounts"], told["operations"]) == (False, 3, 7)
    assert told["credits"] == {"monthly": "20.000001", "pack": "1000000000012.5"}
    assert balances(database) == {}


def test_accounts_that_are_there_are_left_alone_unless_told_to(run: Import, database: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o", account="a")
    told = run("account,balance:pack\na,1\nb,2\n", code=3)
    assert wrong(told, "exists") == [(2, "account")]
    assert balances(database) == {"a": {"signup": "50"}, "b": {"pack": "2"}}
    run("account,balance:pack\na,1\nb,2\n", "--existing", "add")
    assert balances(database) == {"a": {"pack": "1", "signup": "50"}, "b": {"pack": "2"}}


def test_the_sign_up_credits_come_when_asked_for(run: Import, database: str) -> None:
    run("account\na\n", "--welcome")
    assert balances(database) == {"a": {"signup": "50"}}


def test_a_lane_that_is_served_is_not_taken(run: Import, database: str) -> None:
    with connect(database) as worker:
        own_lanes(worker, [3])
        said = run(WIDE, code=4)
    assert "stop the lane workers" in said
    assert balances(database) == {}
    run(WIDE)


def test_columns_by_other_names(run: Import, database: str) -> None:
    text = "user;credits;created;status\na;1,5;x;open\n".replace(",", ".")
    assert "created" in run(text, "--map", "user=account", "--map", "credits=balance:pack", code=2)
    assert "no column is the account" in run(
        text, "--ignore", "user", "--ignore", "credits", "--ignore=created", code=2
    )
    run(text, "--map", "user=account", "--map", "credits=balance:pack", "--ignore", "created")
    assert balances(database) == {"a": {"pack": "1.5"}}


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", (), "is empty"),
        ("account,account\n", (), "two columns mean 'account'"),
        ("account,amount\n", (), "a column source and a column amount"),
        (WIDE, ("--map", "x"), "write COLUMN=NAME"),
        (WIDE, ("--name", "a b"), "the import's name"),
    ],
)
def test_what_makes_no_sense_is_told(run: Import, text: str, options: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(text, *options, code=2).split())


def test_for_people(run: Import, tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_text("account,balance:pack\na,1\nb,x\n")
    shown = CliRunner().invoke(app, ["import", str(path), "--name", "x", "--skip-bad"])
    assert shown.exit_code == 1
    lines = shown.stdout.splitlines()
    assert lines[0] == "1 lines cannot be imported:"
    assert lines[1].startswith("  line 3: balance:pack: 'x' is not an amount")
    assert "imported 1 accounts, 2 operations (0 of an earlier run)" in shown.stdout
    assert "the audit holds: 1 accounts, 2 operations" in shown.stdout


ACCOUNTS = 5 * CHUNK


@pytest.mark.parametrize("place", ["after-copy:2", "alone"])
def test_killed_half_way_it_goes_on(place: str, database: str, tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    # Lines that are long enough for the file to be shared by two processes.
    path.write_text(
        "account,note,balance:pack,balance:gift\n"
        + "".join(f"user_{i},{'x' * 400},{i % 7},{i}.25\n" for i in range(ACCOUNTS))
    )
    processes = "1" if place == "alone" else "2"
    command = [
        sys.executable, "-c", "from creditlane.command import main; main()", "import", str(path), "--name", "legacy",
        "--ignore", "note", "--json", "--processes", processes,
    ]  # fmt: skip
    environment = {
        **os.environ, "CREDITLANE_DATABASE_URL": database, "CREDITLANE_BROKER_URL": "redis://127.0.0.1:1/0",
        "CREDITLANE_LANES": str(LANES),
    }  # fmt: skip
    crash = {"CREDITLANE_CRASH_AT": "after-commit:3" if place == "alone" else place}
    first = subprocess.run(command, cwd=ROOT, env=environment | crash, capture_output=True)
    assert first.returncode == (-signal.SIGKILL if place == "alone" else 4), first.stderr
    assert 0 < value(database, "SELECT count(*) FROM accounts") < ACCOUNTS
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert second.returncode == 0, second.stderr
    told = json.loads(second.stdout)
    assert told["accounts"] == ACCOUNTS
    assert told["replayed"] > 0
    assert told["applied"] + told["replayed"] == told["operations"]
    assert balances(database) == {
        f"user_{i}": {"gift": f"{i}.25", **({"pack": str(i % 7)} if i % 7 else {})} for i in range(ACCOUNTS)
    }
    assert value(database, "SELECT count(*) FROM operations") == told["operations"]


# --- Properties --------------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]), min_size=1, max_size=40
)
AMOUNTS = st.decimals(min_value=Decimal("0.000001"), max_value=10**12, places=6, allow_nan=False)
ACCOUNT_LOTS = st.dictionaries(NAMES, st.lists(st.tuples(NAMES, AMOUNTS), max_size=4), min_size=1, max_size=6)


@given(lots=ACCOUNT_LOTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_and_json_lines_say_the_same(lots: dict[str, list[tuple[str, Decimal]]], tmp_path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["account", "source", "amount"])
    objects: list[dict[str, Any]] = []
    for account, listed in lots.items():
        for source, amount in listed:
            writer.writerow([account, source, amount])
        if not listed:
            writer.writerow([account, "", ""])
        objects.append(
            {"account": account, "balances": [{"source": source, "amount": str(amount)} for source, amount in listed]}
        )
    (tmp_path / "a.csv").write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    checker = Checker("x", load_catalog("packs"))
    made = []
    for file, format in (("a.csv", Format.CSV), ("a.jsonl", Format.JSONL)):
        records = list(Source(tmp_path / file, format).records())
        operations = [each for record in records for each in checker.operations(record)[0]]  # type: ignore[arg-type]
        made.append([(each.name, each.id, each.arguments) for each in operations])
        assert [each.message.account for each in operations if isinstance(each.message, Open)] == list(lots)
        granted = [(each.message.account, each.message) for each in operations if isinstance(each.message, Grant)]
        assert [(account, message.source, Decimal(message.amount).scaleb(-6)) for account, message in granted] == [
            (account, source, amount) for account, listed in lots.items() for source, amount in listed
        ]
        assert len({(each.message.account, each.id) for each in operations}) == len(operations)
        assert all(len(each.id) <= 128 for each in operations)
    assert made[0] == made[1]


@given(content=st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("format", list(Format))
def test_any_bytes_are_records_or_named_lines(content: bytes, format: Format, tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(b"account,source,amount\n" + content)
    checker = Checker("x", load_catalog("packs"))
    for record in Source(path, format).records():
        if isinstance(record, Record):
            try:
                checker.operations(record)
            except LineError as error:
                record = error.bad
        if isinstance(record, BadLine):
            assert record.line >= 1
            assert record.reason
