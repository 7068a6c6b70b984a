"""Payments as an operator sees them: the inbox, one purchase, and the comparison with the provider."""

from __future__ import annotations

import json
import pty
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from models.catalog import load_catalog
from models.payment_inbox import store
from scripts import payments_demo
from scripts.fake_stripe import KEY, SECRET
from tests.conftest import Spawn
from tests.lives import Books, Life, books
from tests.scripts.test_command_line import Run, one, run, several
from tests.support import ROOT, Ledger, execute, rows
from tests.workers.providers.making import STRIPE, body, envelope

__all__ = ["run"]

HOSTILE = "[red]x[/red][link=file:///etc/passwd]"


@pytest.fixture
def payments(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one of the commands."""
    monkeypatch.setenv("CREDITLANE_CATALOG", "rollover")
    return partial(run, "payments")


@pytest.fixture
def shop(database: str, ledger: Ledger) -> Iterator[Books]:
    """Alice has bought a pack, of which a part was refunded, and one that the catalog does not know."""
    ledger.catalog = catalog = load_catalog("rollover")
    ledger.writer.catalog = lambda: catalog
    with books(
        database, ledger, Life("alice", 1, datetime.now(UTC).replace(microsecond=0) - timedelta(days=2))
    ) as each:
        each.life.stripe.add_price("price_new", 100, "usd")
        for act in (("pack", "price_rollover_fifty"), ("refund", 0, 50), ("pack", "price_new")):
            each.life.play(act)
        for event in each.life.stripe.undelivered():
            each.deliver(event)
        yield each


def park(database: str, number: int = 1, **changes: Any) -> list[int]:
    """Events of the inbox that were parked; gives their rows."""
    made = []
    with psycopg.connect(database, autocommit=True) as connection:
        for each in range(number):
            raw = body(envelope("invoice.paid", {"object": "invoice"}, id=f"evt_parked_{each}", **changes))
            row = store(connection, STRIPE.read(raw), raw, "webhook").id
            connection.execute(
                "UPDATE payment_events SET status = 'parked', code = 'malformed', reason = 'no \x1b[31mid[red]',"
                " attempts = 3, done_at = ledger_now() WHERE id = %s",
                (row,),
            )
            made.append(row)
    return made


# --- The inbox ---------------------------------------------------------------------------------------


def test_an_empty_inbox(payments: Run) -> None:
    assert payments("events").stdout == "no events\n"
    assert several(payments("events", "--json")) == []
    assert "0 events, 0 groups" in payments("retry", "--waiting").stdout


def test_the_inbox(payments: Run, shop: Books, database: str) -> None:
    (parked,) = park(database)
    shown = payments("events", "--limit", "5").stdout
    heading, newest, *_ = shown.splitlines()
    assert heading.split() == ["event", "received", "(UTC)", "provider", "type", "status", "why"]
    assert newest.split()[0] == str(parked)
    assert "parked" in newest
    assert f"older ones: --before {parked - 4}" in shown
    assert "creditlane payments retry" in shown
    assert str(parked) not in payments("events", "--before", str(parked), "--limit", "1").stdout.split()
    (listed,) = several(payments("events", "--status", "parked", "--json"))
    assert (listed["id"], listed["event"], listed["code"], listed["attempts"]) == (
        parked,
        "evt_parked_0",
        "malformed",
        3,
    )
    every = several(payments("events", "--json", "--limit", "200"))
    assert len(every) == len(shop.life.stripe.events) + 1
    assert payments("events", "--status", "dropped").stdout == "no events\n"


def test_a_body_is_printed_as_it_came_but_does_not_drive_a_terminal(payments: Run, database: str) -> None:
    raw = json.dumps(envelope("customer.created", {"object": "customer", "name": "é\x9b31m"}), ensure_ascii=False)
    written = ("  " + raw + "\r\n").encode()
    with psycopg.connect(database, autocommit=True) as connection:
        event = store(connection, STRIPE.read(written), written, "webhook").id
    assert payments("show", str(event)).stdout_bytes == written
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "scripts.command_line", "payments", "show", str(event)]
    with open(master, "rb", buffering=0) as read, open(terminal, "wb") as written_to:
        subprocess.run(command, cwd=ROOT, stdout=written_to, check=True, timeout=60)
        shown = read.read(64 * 1024).decode()
    assert "é\\x9b31m" in shown
    assert "\x9b" not in shown
    assert "no row 999" in payments("show", "999", code=2).stderr
    assert "no row" in payments("show", str(10**30), code=2).stderr


def test_what_is_parked_is_tried_again_or_dropped_by_name(payments: Run, database: str) -> None:
    first, second, third = park(database, 3)
    assert one(payments("retry", str(first), "--json")) == {"events": [first], "groups": 0}
    assert "1 events, 0 groups" in payments("retry", str(second), str(first)).stdout
    assert "none of them is parked" in payments("retry", str(first), "99", code=2).stderr
    assert f"dropped {third}" in payments("drop", str(third), str(first)).stdout
    assert "none of them is parked" in payments("drop", str(third), code=2).stderr
    due = (
        "SELECT id, status, attempts, next_attempt_at <= ledger_now(), resolved_by <> ''"
        " FROM payment_events ORDER BY id"
    )
    assert rows(database, due) == [
        (first, "received", 0, True, True),
        (second, "received", 0, True, True),
        (third, "dropped", 3, None, True),
    ]


def test_what_waits_is_looked_at_again(payments: Run, shop: Books) -> None:
    bought, unknown = shop.life.bought
    assert one(payments("retry", "--waiting", "--of", unknown, "--json")) == {"events": [], "groups": 1}
    assert "0 events, 1 groups" in payments("retry", "--waiting").stdout
    for name in (bought, "cs_none"):
        assert f"nothing of '{name}' waits" in payments("retry", "--waiting", "--of", name, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("events", "--status", "lost"), "'lost' is no status"),
        (("events", "--limit", "0"), "--limit"),
        (("events", "--before", "x"), "--before"),
        (("show",), "EVENT"),
        (("show", "x"), "EVENT"),
        (("retry",), "name events, or --waiting"),
        (("retry", "--of", "cs_1"), "name events, or --waiting"),
        (("retry", "1", "--of", "cs_1"), "--of goes with --waiting"),
        (("drop",), "EVENT"),
        (("purchase",), "ID"),
        (("purchase", "cs_none"), "nothing is known of 'cs_none'"),
        (("purchase", ""), "nothing is known of ''"),
        (("reconcile", "--days", "0"), "--days"),
        (("reconcile", "--wait", "0"), "--wait"),
    ],
)
def test_what_makes_no_sense(payments: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in payments(*arguments, code=2).stderr


# --- One purchase ------------------------------------------------------------------------------------


def test_a_purchase(payments: Run, shop: Books) -> None:
    bought, unknown = shop.life.bought
    shown = payments("purchase", bought).stdout
    for words in (bought, "6.99 USD price_rollover_fifty", "settled", "applied", "grant 50 pack",
                  "3.49 USD of 6.99 USD", "50 credits", "24.964234 credits", "25.035766 credits"):  # fmt: skip
        assert words in shown
    (refund,) = shop.life.refunds
    assert payments("purchase", refund).stdout == shown
    found = one(payments("purchase", f"stripe:{bought}", "--json"))
    assert [each["name"] for each in found["operations"]] == ["credits.grant", "credits.claw_back"]
    assert found["lots"][0]["available_micro"] == 25_035_766
    shown = payments("purchase", unknown).stdout
    assert "unknown_price" in shown
    assert "it led to nothing yet" in shown


def test_what_a_provider_says_cannot_drive_a_terminal(payments: Run, shop: Books, database: str) -> None:
    stripe = shop.life.stripe
    stripe.add_price(HOSTILE, 100, "usd")
    shop.life.play(("pack", HOSTILE))
    session = stripe.find("checkout.session", shop.life.bought[-1])
    for event in stripe.undelivered():
        if event["type"] == "checkout.session.completed" and event["data"]["object"]["id"] == session["id"]:
            shop.deliver(event | {"id": f"evt_{HOSTILE}"})
    park(database, type=f"{HOSTILE}.{200 * 'l'}")
    shown = payments("events", "--limit", "200").stdout
    assert f"{HOSTILE}.ll" in shown
    assert shown.count("l") > 200  # folded, not cut
    assert "no \\x1b[31mid[red]" in shown
    assert "\x1b" not in shown
    shown = payments("purchase", session["id"]).stdout
    assert HOSTILE in shown
    execute(database, "UPDATE payment_facts SET reason = E'a\\x1b[2J[bold]b' WHERE status = 'parked'")
    shown = payments("purchase", session["id"]).stdout
    assert "a\\x1b[2J[bold]b" in shown
    assert "\x1b" not in shown
    failed = payments("purchase", f"{HOSTILE}\x1b[2J", code=2).stderr
    assert HOSTILE in failed
    assert "\x1b" not in failed


# --- Comparing ---------------------------------------------------------------------------------------


def test_without_a_worker_a_comparison_is_not_waited_for_for_ever(payments: Run) -> None:
    assert "no answer" in payments("reconcile", "--wait", "1", code=5).stderr


@pytest.mark.timeout(180)
def test_a_comparison(payments: Run, shop: Books, spawn: Spawn, database: str) -> None:
    stripe = shop.life.stripe
    with stripe:
        asking = {
            "CREDITLANE_CATALOG": "rollover",
            "CREDITLANE_PAYMENTS_LIVEMODE": "false",
            "CREDITLANE_STRIPE_WEBHOOK_SECRETS": SECRET,
            "CREDITLANE_STRIPE_API_KEY": KEY,
            "CREDITLANE_STRIPE_API_BASE": stripe.url,
        }
        spawn("general", kind="general", **asking)
        report = one(payments("reconcile", "--deep", "--json", "--wait", "60", code=1))
        unknown = shop.life.bought[1]
        assert [(each["code"], each["what"]) for each in report["differences"]] == [
            ("unknown_price", f"session {unknown}")
        ]
        assert report["compared"]["session"] == 2
        shown = payments("reconcile", "--wait", "60", code=1).stdout
        assert "1 refunds" in shown
        assert "unknown_price" in shown
        assert unknown in "".join(shown.split())
        # It cannot be placed, and an operator has seen to it.
        execute(database, "UPDATE payment_facts SET status = 'noted', code = NULL WHERE status = 'parked'")
        assert "differences  none" in payments("reconcile", "--wait", "60").stdout
    away = payments("reconcile", "--wait", "60", code=4).stderr
    assert "Stripe is out of reach" in away
    assert "the broker is away" not in away
    assert KEY not in away


# --- The demo, where it cannot be played; tests of the whole stack play it -----------------------------


def test_the_demo_is_played_on_the_embedded_stack_alone(
    payments: Run, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stack.json"
    monkeypatch.setattr(payments_demo, "STATE", file)
    assert "no embedded stack runs here" in payments("demo", code=2).stderr
    state = {"database_url": "postgresql://somewhere/else", "relay_url": "http://127.0.0.1:1"}
    file.write_text(json.dumps(state))
    assert "another ledger than the embedded stack's" in payments("demo", code=2).stderr
    file.write_text(json.dumps(state | {"database_url": database}))
    assert "talks to Stripe itself" in payments("demo", code=2).stderr
    assert rows(database, "SELECT account FROM accounts") == []
