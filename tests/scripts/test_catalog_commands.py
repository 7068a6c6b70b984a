"""``creditlane catalog``, as an operator types it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import time_machine
from typer.testing import CliRunner

from models.catalog import load_catalog, read_catalog
from models.catalog_texts import keep
from scripts.command_line import app
from tests.scripts.test_command_line import Run, nowhere, one, run
from tests.support import Ledger

__all__ = ["nowhere", "run"]

MINE = """
[catalog]
name = "mine"
version = 1

[features.image]
title = "Image"
price = "1"
per = "8"
rounding = "up"

[packs.small]
credits = "100"
price = "5.00 EUR"

[plans.all]
unlimited = true
price = "20.00 EUR"
"""


@pytest.fixture
def catalog(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command of the group where no ledger is."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["catalog", *map(str, arguments)])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        assert "Traceback" not in result.output
        return result

    return invoke


def test_every_command_has_examples(catalog: Any) -> None:
    for command in ("check", "show", "diff", "price"):
        assert "Examples" in catalog(command, "--help").stdout


def test_files_are_checked_whole(catalog: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(MINE)
    bad.write_text(MINE.replace('"5.00 EUR"', '"5.001 EUR"').replace('"up"', '"down"') + "\n[feature.x]\nprice = 1\n")
    assert catalog("check", good, "tiers").stdout == f"good  {good}: mine-1\ngood  tiers: tiers-1\n"
    shown = catalog("check", good, bad, code=1).stdout.splitlines()
    assert shown == [
        f"good  {good}: mine-1",
        f"wrong {bad}: features.image.rounding: Invalid enum value 'down'",
        f"wrong {bad}: packs.small: EUR has 2 decimals, '5.001 EUR' has 3",
        f"wrong {bad}: feature: unknown section; do you mean features?",
    ]
    told = one(catalog("check", bad, tmp_path / "none.toml", "--json", code=1))
    assert [(each["good"], [problem["key"] for problem in each["problems"]]) for each in told] == [
        (False, ["features.image.rounding", "packs.small", "feature"]), (False, [""]),
    ]  # fmt: skip
    assert one(catalog("check", good, "--json")) == [
        {"file": str(good), "label": "mine-1", "good": True, "problems": []}
    ]
    assert "set CREDITLANE_DATABASE_URL" in catalog("check", good, "--ledger", code=2).stderr


@time_machine.travel("2026-11-25T12:00:00Z")
def test_every_shipped_catalog_is_shown(catalog: Any) -> None:
    assert "packs-1, EUR" in catalog("show").stdout
    for name in ("dual", "metering", "registration", "rollover"):
        assert f"{name}-1" in catalog("show", name).stdout
    shown = catalog("show", "tiers").stdout
    for words in (
        "20 credits, for 90 days", "1 per 2, whole blocks", "free, counted", "rolls over, at most 50%, for 3 months",
        "299.00 EUR a year", "0.0125", "above 10000", "7 days, 50 credits", "black_week  Black Week",
        "1000 credits used", "the ledger cannot be asked", "low_balance = 20%,",
    ):  # fmt: skip
        assert words in shown, words
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith(("first_pack", "black_week"))] == [
        "runs", "runs",
    ]  # fmt: skip
    told = one(catalog("show", "tiers", "--json"))
    assert (told["label"], told["state"], told["used"]) == ("tiers-1", "unknown", [])
    assert told["values"]["features"]["transcription"]["price"] == "0.5"
    assert told["per_credit"][0] == {
        "kind": "plan", "name": "business", "price": "119.00 EUR", "credits": "10000", "per_credit": "0.011900",
        "currency": "EUR",
    }  # fmt: skip
    assert "cannot be read" in catalog("show", "gold", code=2).stderr


def test_what_something_costs(catalog: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    shown = catalog("price", "image", "1", "8", "12", "--catalog", path).stdout
    assert "1 per 8, whole blocks" in shown
    assert [line.split() for line in shown.splitlines() if "block" in line and "×" in line] == [
        ["1", "1", "1", "block", "of", "8", "×", "1", "0.0500", "EUR"],
        ["8", "1", "1", "block", "of", "8", "×", "1", "0.0500", "EUR"],
        ["12", "2", "2", "blocks", "of", "8", "×", "1", "0.1000", "EUR"],
    ]
    counted = one(catalog("price", "image", "12", "--plan", "all", "--catalog", path, "--json"))["prices"]
    assert [(each["credits"], each["money_from"]) for each in counted] == [("0", None)]
    (exact,) = one(catalog("price", "image", "12", "--json"))["prices"]  # by the shipped packs
    assert (exact["credits"], exact["rule"]) == ("1.5", "12 × 1 / 8")
    assert (exact["money_from"], exact["money_to"], exact["currency"]) == ("0.239940", "0.299400", "EUR")
    (rounded,) = one(catalog("price", "image", "0.000001", "--json"))["prices"]
    assert (rounded["credits"], rounded["rule"]) == ("0.000001", "0.000001 × 1 / 8, rounded up to a millionth")
    for arguments, words in (
        (("vidoe", "1"), "packs-1 has no feature 'vidoe'; it has: image"),
        (("image", "1", "--plan", "gold"), "packs-1 has no plan 'gold'"),
        (("image", "many"), "'many' is not an amount"),
        (("image", "0"), "more than 0"),
    ):
        assert words in catalog("price", *arguments, code=2).stderr
    assert "free: counted" in catalog("price", "export", "3").stdout


def test_what_differs_and_what_that_means(catalog: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text(MINE + "[plans.gold]\nmonthly_credits = 5\n[plans.old]\nmonthly_credits = 5\n[priorities]\na = 1\n")
    changed = old.read_text().replace('per = "8"', 'per = "10"').replace("version = 1", "version = 2")
    changed = changed.replace("gold]\nmonthly_credits = 5", "gold]\nmonthly_credits = 6").replace(
        "plans.old", "plans.new"
    )
    new.write_text(changed.replace("a = 1", "a = 2"))
    told = one(catalog("diff", old, new, "--json"))
    assert (told["old"], told["new"], told["same_version"]) == ("mine-1", "mine-2", False)
    found = {each["key"]: (each["kind"], each["old"], each["new"]) for each in told["changes"]}
    assert found == {
        "priorities.a": ("changed", "1", "2"),
        "features.image.per": ("changed", "8", "10"),
        "plans.gold.monthly_credits": ("changed", "5", "6"),
        "plans.old": ("removed", "monthly_credits = 5", None),
        "plans.new": ("added", None, "monthly_credits = 5"),
    }
    meanings = {each["key"]: each["meaning"] for each in told["changes"]}
    assert meanings["plans.gold.monthly_credits"] == "who has it keeps the old terms until the next renewal"
    assert meanings["plans.old"].startswith("who has it goes on by the terms as they were")
    shown = catalog("diff", old, new).stdout
    assert "mine-1 → mine-2" in shown
    assert "until the next renewal" in shown
    assert "lower version" in catalog("diff", new, old).stderr
    assert "they say the same" in catalog("diff", old, old).stdout
    new.write_text(changed.replace("version = 2", "version = 1"))
    assert "raise version" in catalog("diff", old, new, code=1).stderr
    assert one(catalog("diff", old, new, "--json", code=1))["same_version"]


def test_catalogs_of_the_past_are_found_in_the_ledger(
    run: Run, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    connection = ledger.writer.connection
    assert one(run("catalog", "show", str(path), "--json"))["state"] == "unused"
    keep(connection, read_catalog(str(path)), "mine.toml")
    first = load_catalog(str(path))
    path.write_text(MINE.replace("version = 1", "version = 2").replace('"1"', '"2"'))
    keep(connection, read_catalog(str(path)), "mine.toml")
    assert "used since" in run("catalog", "show", str(path)).stdout
    told = one(run("catalog", "show", "mine-1", "--json"))
    assert (told["state"], [each["label"] for each in told["used"]]) == ("used", ["mine-1", "mine-2"])
    assert told["values"]["features"]["image"]["price"] == "1"
    (change,) = one(run("catalog", "diff", "mine-1", str(path), "--json"))["changes"]
    assert (change["key"], change["old"], change["new"]) == ("features.image.price", "1", "2")
    run("catalog", "check", str(path), "--ledger")
    path.write_text(MINE.replace('"1"', '"3"'))
    run("catalog", "check", str(path))
    found = run("catalog", "check", str(path), "--ledger", code=1).stdout
    assert "mine-1 was used with other content (features.image.price was 1, is 3); raise version" in found
    assert one(run("catalog", "show", str(path), "--json"))["state"] == "other"
    assert "cannot be read" in run("catalog", "show", "mine-3", code=2).stderr
    # A replay goes by what the ledger has kept, whatever the file says by now.
    monkeypatch.setenv("CREDITLANE_CATALOG", str(path))
    ledger.writer.catalog = lambda: first
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.adjust", "a-1", account="alice", amount="5", actor="eve", reason="to try")
    assert ledger.apply("credits.consume", "c-1", account="alice", feature="image")["charged"] == "1"
    assert "3 replayed" in run("audit", "--replay").stdout
