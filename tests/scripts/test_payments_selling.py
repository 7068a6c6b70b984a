"""Quotes and checkouts as an operator makes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from creditlane.client import CreditClient
from models import orders
from models.catalog import SHIPPED, load_catalog
from models.database import connect
from tests.conftest import Spawn
from tests.scripts.test_command_line import Run, one, run, several
from tests.support import Ledger, rows

__all__ = ["run"]

PAGES = ("--success-url", "https://shop.example/thanks", "--cancel-url", "https://shop.example/")


@pytest.fixture
def sell(run: Run, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one of the commands; alice has an account, and the catalog tells of quotes."""
    catalog = tmp_path / "telling.toml"
    text = (SHIPPED / "packs.toml").read_text(encoding="utf-8")
    catalog.write_text(text + '\n[notify]\nkinds = ["quote_ready"]\nchannels = ["email"]\n', encoding="utf-8")
    monkeypatch.setenv("CREDITLANE_CATALOG", str(catalog))
    ledger.apply("credits.open", "open", account="alice")
    return partial(run, "payments")


@pytest.fixture
def inquiry(sell: Run, database: str) -> str:
    """What alice has asked for; gives the order."""
    with connect(database, "test", read_only=False) as connection:
        return orders.inquire(
            connection, "alice", 700 * 10**6, load_catalog("packs"), request="r", note="[red]by March\x1b[2J"
        ).id


def test_an_inquiry_is_seen_answered_and_told(sell: Run, inquiry: str, database: str, run: Run) -> None:
    shown = sell("inquiries").stdout
    assert all(each in shown for each in (inquiry, "alice", "inquiry", "sur_mesure", "700", "[red]by March"))
    assert "\x1b[2J" not in shown
    answer = sell("quote", inquiry, "--price", "99.00 EUR", "--good-for", "14d", "--actor", "zoe").stdout
    assert all(each in answer for each in (inquiry, "quoted", "99.00 EUR", "zoe"))
    (listed,) = several(sell("inquiries", "--json"))
    assert (listed["id"], listed["status"], listed["price"], listed["credits"]) == (
        inquiry,
        "quoted",
        "99.00 EUR",
        "700",
    )
    ((kind, key, details, channels),) = rows(database, "SELECT kind, key, details, channels FROM notices")
    assert (kind, key, channels) == ("quote_ready", f"quote_ready:{inquiry}", ["email"])
    assert details == {
        "order": inquiry, "credits": "700", "price": "99.00 EUR", "expires_at": listed["expires_at"],
    }  # fmt: skip
    assert "Your quote: 700 credits for €99.00" in run("notices", "alice").stdout.replace("\xa0", " ")
    assert "already_quoted" in sell("quote", inquiry, "--price", "1.00 EUR", code=3).stderr
    assert "cancelled" in sell("withdraw", inquiry).stdout
    assert "quote_over" in sell("withdraw", inquiry, code=3).stderr
    assert "nobody asks" in sell("inquiries").stdout
    assert "cancelled" in sell("inquiries", "--account", "alice").stdout


def test_a_quote_without_an_inquiry(sell: Run) -> None:
    terms = ("--price", "90.00 EUR", "--credits", "650.5", "--until", "2100-01-31")
    made = one(sell("quote", "--account", "alice", *terms, "--note", "as agreed", "--json"))
    assert (made["account"], made["credits"], made["price"], made["status"], made["note"]) == (
        "alice", "650.5", "90.00 EUR", "quoted", "as agreed",
    )  # fmt: skip
    assert made["expires_at"] == "2100-01-31T00:00:00Z"
    assert "unknown_account" in sell("quote", "--account", "nobody", *terms, code=3).stderr


def test_what_makes_no_sense_changes_nothing(sell: Run, inquiry: str, database: str) -> None:
    for code, arguments in (
        (2, ("--price", "99.00 EUR")),
        (2, (inquiry, "--account", "alice", "--price", "99.00 EUR")),
        (2, (inquiry, "--price", "99.00 EUR", "--note", "n")),
        (2, ("--account", "alice", "--price", "99.00 EUR")),
        (2, (inquiry, "--price", "99")),
        (2, (inquiry, "--price", "-99.00 EUR")),
        (2, (inquiry, "--price", "99.00 EUR", "--credits", "many")),
        (2, (inquiry, "--price", "99.00 EUR", "--good-for", "soon")),
        (2, (inquiry, "--price", "99.00 EUR", "--good-for", "999999999w")),
        (3, (inquiry, "--price", "99.00 EUR", "--good-for", "0d")),
        (3, (inquiry, "--price", "99.00 USD")),
        (3, (inquiry, "--price", "99.00 EUR", "--credits", "-5")),
        (3, (inquiry, "--price", "99.00 EUR", "--actor", "a\nb")),
        (3, ("order.none", "--price", "99.00 EUR")),
    ):
        sell("quote", *arguments, code=code)
    assert rows(database, "SELECT status, actor FROM payment_orders") == [("inquiry", None)]
    assert rows(database, "SELECT FROM notices") == []


def test_a_checkout_that_is_refused(sell: Run, spawn: Spawn, client: CreditClient) -> None:
    spawn("general", kind="general")
    assert client.portal("alice", return_url="https://shop.example/", wait=60).code == "not_configured"
    answer = sell("checkout", "alice", "--pack", "pro", *PAGES, code=3)
    assert "refused: not_configured" in answer.stderr
    shown = sell("checkout", "alice", "--pack", "pro", "--plan", "x", *PAGES, "--json", code=3)
    assert one(shown)["code"] == "invalid"


def test_a_checkout_that_nobody_answers_says_how_to_ask_again(sell: Run) -> None:
    answer = sell("checkout", "alice", "--pack", "pro", *PAGES, "--request", "r-7", "--wait", "0.1", code=5)
    assert "--request r-7" in answer.stderr
