"""Claw-back through Postgres: each operation in a batch of its own, so that every state is loaded anew.

What is written is compared, after every operation, with the same sequence applied in memory at the same instants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec
import psycopg
import pytest
from rich.console import Console

from creditlane.contract import decode_message
from models.audit import audit
from models.catalog import parse_catalog
from models.database import connect
from models.reading import account_balance, account_summary
from models.rules.state import COUNTERS, Account, purchase_row
from scripts.showing import summary_lines
from tasks.ledger import apply
from tasks.replay import Replayer
from tests.proof import named, tamper
from tests.support import Ledger, travel

CATALOG = """
[catalog]
name = "clawing"
[priorities]
pack = 50
[plans.yearly]
monthly_credits = "12"
price = "120 EUR"
interval = "year"
[clawback]
on_spent = "{on_spent}"
[refunds]
refund_days = 30
"""

CATALOGS = {
    on_spent: parse_catalog(CATALOG.replace("{on_spent}", on_spent), f"{on_spent}.toml")
    for on_spent in ("debt", "forgive")
}

BOUGHT = {"amount": "5", "source": "pack", "purchase": "pi_1"}
OWNER = "anna"


@dataclass
class Written:
    """One account in Postgres and the same in memory."""

    ledger: Ledger
    database: str
    on_spent: str = "debt"
    account: Account = field(default_factory=lambda: Account(OWNER))
    ahead: timedelta = timedelta()
    sent: int = 0

    def __post_init__(self) -> None:
        catalog = CATALOGS[self.on_spent]
        self.ledger.catalog = catalog
        self.ledger.writer.catalog = lambda: catalog

    def __call__(self, name: str, id: str | None = None, /, **content: Any) -> dict[str, Any]:
        """Write ``credits.<name>``, or a task by its whole name, apply it in memory, and compare all that is known."""
        self.sent += 1
        identity = id or f"operation-{self.sent}"
        job = self.ledger.job(name if "." in name else f"credits.{name}", identity, account=OWNER, **content)
        (result,) = self.ledger.write(job)
        applied_at = self._one("SELECT applied_at FROM operations WHERE account = %s AND operation = %s", identity)
        message = decode_message(job.name, job.arguments)
        answer = apply(self.account, job.name, identity, message, job.arguments, applied_at, CATALOGS[self.on_spent])
        assert result == msgspec.json.decode(answer.result)
        self._compare()
        return result

    def wait(self, **for_: float) -> None:
        """Let time pass for the ledger."""
        self.ahead += timedelta(**for_)
        travel(self.database, self.ahead)

    def state(self) -> tuple[int, int, int]:
        """Micro-credits that can be spent, that are held, and that are owed."""
        return self.account.available, self.account.held, self.account.debt

    def _compare(self) -> None:
        account = self.account
        grants = self._all(
            f"SELECT grant_id, {', '.join(f'{counter}_micro' for counter in COUNTERS)}, clawed_back_micro,"
            " forgiven_micro, origin, purchase, expires_at, is_open FROM grants WHERE account = %s ORDER BY grant_id"
        )
        assert grants == [
            (
                lot.id,
                *(getattr(lot, counter) for counter in COUNTERS),
                lot.clawed_back,
                lot.forgiven,
                lot.origin,
                lot.purchase,
                lot.expires_at,
                lot.is_open,
            )
            for _, lot in sorted(account.grants.items())
        ]
        purchases = self._all(
            "SELECT purchase, step, paid_minor, returned_minor, currency, is_frozen, taken_micro, lots, takings::text"
            " FROM purchases WHERE account = %s ORDER BY purchase"
        )
        assert purchases == [purchase_row(each) for _, each in sorted(account.purchases.items())]
        totals = self._all(
            f"SELECT {', '.join(f'{counter}_micro' for counter in COUNTERS)}, debt_micro FROM accounts"
            " WHERE account = %s"
        )
        assert totals == [(*(getattr(account, counter) for counter in COUNTERS), account.debt)]
        entries = self._all(
            "SELECT seq, kind, grant_id, amount_micro, hash FROM entries WHERE account = %s ORDER BY seq"
        )
        assert entries == [
            (entry.seq, entry.kind, entry.grant, entry.amount_micro, entry.hash) for entry in account.entries
        ]

    def _all(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        connection: psycopg.Connection[Any] = self.ledger.writer.connection
        return connection.execute(query, (OWNER, *parameters)).fetchall()

    def _one(self, query: str, *parameters: Any) -> datetime:
        ((value,),) = self._all(query, *parameters)
        assert isinstance(value, datetime)
        return value


def opened(ledger: Ledger, database: str, *grants: dict[str, Any], on_spent: str = "debt") -> Written:
    """An open account with these grants and nothing else."""
    made = Written(ledger, database, on_spent)
    made("open", kind="pool")
    for each in grants:
        made("grant", **each)
    return made


def uses(result: dict[str, Any]) -> list[tuple[int, str]]:
    return [(use["grant"], use["amount"]) for use in result.get("grants", [])]


@pytest.mark.parametrize("what", [{"grant": 1}, {"grant": 2}, {"purchase": "pi_1"}])
def test_a_lot_whose_purchase_was_revoked_is_not_revoked_again(
    ledger: Ledger, database: str, what: dict[str, Any]
) -> None:
    own = opened(ledger, database, BOUGHT, BOUGHT)
    own("consume", amount="10")
    assert own("revoke", purchase="pi_1")["owed"] == "10"
    assert own("revoke", **what)["code"] == "exceeds_original"
    assert own.state() == (0, 0, 10_000_000)


def test_what_was_forgiven_of_a_purchase_is_taken_whichever_of_its_lots_it_comes_back_to(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database, BOUGHT, {**BOUGHT, "amount": "2", "priority": 1}, on_spent="forgive")
    assert uses(own("consume", "c", amount="2")) == [(2, "2")]
    result = own("revoke", purchase="pi_1")
    assert (uses(result), result["forgiven"]) == ([(1, "5")], "2")
    assert own("refund", operation="c")["balance"] == {"available": "0"}
    assert own.state() == (0, 0, 0)
    assert own("revoke", purchase="pi_1")["code"] == "exceeds_original"


@pytest.mark.parametrize("by", ["release", "time"])
def test_what_returns_unspent_to_an_ended_lot_of_a_revoked_purchase_pays_what_is_owed_for_it(
    ledger: Ledger, database: str, by: str
) -> None:
    own = opened(ledger, database, BOUGHT, {**BOUGHT, "expires_in": 60})
    assert uses(own("hold", "h", amount="5", ttl=120)) == [(2, "5")]
    assert own("revoke", purchase="pi_1")["owed"] == "5"
    own.wait(seconds=60)
    if by == "release":
        own("release", hold="h")
    else:
        own.wait(seconds=60)
        own("settle")
    assert own.state() == (0, 0, 0)
    assert own.account.entries[-1].kind == "debt_paid"


def test_what_returns_unspent_to_an_ended_lot_that_continues_a_revoked_one_pays_what_is_owed_for_it(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database, {**BOUGHT, "expires_in": 20})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    assert uses(own("refund", operation="c")) == [(2, "5")]
    own.wait(days=29)
    assert uses(own("hold", "h", amount="5", ttl=2 * 86_400)) == [(2, "5")]
    assert own("revoke", purchase="pi_1")["owed"] == "5"
    own.wait(days=1)
    assert own("release", hold="h")["balance"] == {"available": "0"}
    assert own.state() == (0, 0, 0)
    assert own.account.entries[-1].kind == "debt_paid"


@pytest.mark.parametrize("what", [{"grant": 1}, {"grant": 2}, {"purchase": "pi_1"}])
def test_what_was_forgiven_of_a_used_up_lot_is_taken_out_of_what_the_one_that_continues_it_gets_back(
    ledger: Ledger, database: str, what: dict[str, Any]
) -> None:
    own = opened(ledger, database, {**BOUGHT, "amount": "1", "expires_in": 20}, on_spent="forgive")
    own("consume", "c1", amount="1")
    own.wait(seconds=60)
    own("refund", operation="c1")
    assert uses(own("consume", "c2", amount="1")) == [(2, "1")]
    assert own("revoke", **what)["forgiven"] == "1"
    assert own("refund", operation="c2")["balance"] == {"available": "0"}
    assert own.state() == (0, 0, 0)
    assert [(entry.kind, entry.grant) for entry in own.account.entries[-2:]] == [("restored", 2), ("revoked", 2)]
    assert (own.account.grants[1].clawed_back, own.account.grants[1].forgiven) == (1_000_000, 0)


def test_what_an_administrator_took_of_a_lot_that_continues_a_used_up_one_is_not_taken_again(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database, {**BOUGHT, "expires_in": 20})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("refund", operation="c")
    assert uses(own("adjust", amount="-2", actor="anna", reason="wrong")) == [(2, "2")]
    assert own.account.grants[1].clawed_back == 2_000_000
    assert own("revoke", grant=2, amount="3.000001")["code"] == "exceeds_original"
    assert uses(own("revoke", grant=2)) == [(2, "3")]
    assert own.state() == (0, 0, 0)


@pytest.mark.parametrize("on_spent", ["debt", "forgive"])
def test_what_a_time_out_gives_back_to_a_lot_that_continues_a_used_up_one_is_taken(
    ledger: Ledger, database: str, on_spent: str
) -> None:
    own = opened(ledger, database, {**BOUGHT, "expires_in": 20}, on_spent=on_spent)
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("refund", operation="c")
    own("hold", "h", amount="5", ttl=60)
    own("revoke", grant=1)
    own.wait(seconds=60)
    own("settle")
    assert own.state() == (0, 0, 0)


def test_a_tiny_hold_that_is_released_pays_no_more_than_itself_of_the_debt(ledger: Ledger, database: str) -> None:
    own = opened(ledger, database, BOUGHT)
    own("consume", amount="5")
    own("grant", amount="9", source="gift")
    own("hold", "h", amount="0.000001")
    own("revoke", purchase="pi_1")
    assert own("release", hold="h")["balance"]["debt"] == "4.999999"
    assert own.state() == (8_999_999, 0, 4_999_999)


def away(own: Written, returned: int, step: int, purchase: str = "pi_1", frozen: bool = False) -> dict[str, Any]:
    """So much of a hundred that was paid is away."""
    return own("claw_back", purchase=purchase, paid_minor=100, returned_minor=returned, step=step, frozen=frozen)


def test_used_up_lots_that_paid_for_a_dispute_get_their_credits_back_when_it_is_won(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database, BOUGHT)
    own("consume", amount="5")
    assert away(own, 100, 1)["owed"] == "5"
    own("grant", amount="2", source="gift", expires_in=60)
    own("grant", amount="1", source="gift", purchase="pi_2")
    own.wait(seconds=60)
    own("settle")
    won = away(own, 0, 2)
    assert uses(won) == [(3, "1"), (4, "2")]
    assert own.state() == (3_000_000, 0, 0)
    assert own.account.grants[4].origin == 2


def test_a_claw_back_waits_for_its_lots_and_finds_them_in_the_same_batch_and_in_later_ones(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database)
    away(own, 50, 1, frozen=True)
    assert own("grant", **BOUGHT)["balance"] == {"available": "0", "frozen": "2.5"}
    assert own("consume", amount="1")["code"] == "insufficient_credits"
    assert own("grant", **BOUGHT)["taken_back"] == "2.5"
    assert away(own, 0, 2)["balance"]["available"] == "10"
    job = ledger.job
    state = {"account": OWNER, "purchase": "pi_1", "paid_minor": 100}
    results = ledger.write(
        job("credits.claw_back", "three", **state, returned_minor=100, step=3),
        job("credits.grant", "more", account=OWNER, **BOUGHT),
        job("credits.claw_back", "four", **state, returned_minor=20, step=4),
        job("credits.claw_back", "three", **state, returned_minor=100, step=3),
    )
    assert [result.get("charged") for result in results] == ["10", "0", "-12", "10"]
    assert results[2]["balance"]["available"] == "12"
    assert ledger.writer.connection.execute("SELECT step, taken_micro FROM purchases").fetchall() == [(4, 3_000_000)]


def test_a_lot_that_comes_when_others_of_its_purchase_are_used_up_counts_together_with_them(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database, BOUGHT)
    own("consume", amount="5")
    own("revoke", purchase="pi_1", amount="2")
    assert away(own, 20, 1)["charged"] == "0"
    granted = own("grant", **BOUGHT)
    assert "taken_back" not in granted, "of 10 that were given 2 are to be away, and are"
    assert granted["balance"] == {"available": "3", "by_source": {"pack": "3"}}


def test_what_is_read_of_a_disputed_purchase_is_what_was_answered(ledger: Ledger, database: str) -> None:
    own = opened(ledger, database, BOUGHT, {**BOUGHT, "purchase": "pi_2"})
    told = away(own, 20, 1, frozen=True)["balance"]
    with connect(database, "tests") as connection:
        read = account_balance(connection, OWNER, CATALOGS["debt"])
        summary = account_summary(connection, OWNER, CATALOGS["debt"])
    assert msgspec.to_builtins(read) == told == {"available": "5", "frozen": "4", "by_source": {"pack": "5"}}
    assert summary is not None
    assert {line.grant: line.frozen for line in summary.grants} == {1: True, 2: False}
    console = Console(width=200, no_color=True)
    with console.capture() as shown:
        console.print(summary_lines(summary))
    assert "pi_1 (frozen)" in shown.get()
    assert [line.split() for line in shown.get().splitlines() if line.strip().startswith("frozen")] == [["frozen", "4"]]


def test_a_month_of_a_returned_year_comes_to_the_same_by_the_calendar_as_it_is_read(
    ledger: Ledger, database: str
) -> None:
    own = opened(ledger, database)
    own("plans.subscribe", plan="yearly", payment="pi_1")
    away(own, 50, 1)
    own.wait(days=32)
    with connect(database, "tests") as connection:
        read = account_balance(connection, OWNER, CATALOGS["debt"])
    assert read is not None
    assert read.available == "6"
    assert own("settle")["balance"] == {"available": "6", "by_source": {"monthly": "6"}}
    assert own.account.entries[-1].operation is None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("UPDATE purchases SET is_frozen = false", "purchase pi_1"),
        ("UPDATE purchases SET taken_micro = 0", "purchase pi_1"),
        ("UPDATE purchases SET takings = '[[1, 1, \"revoked\", 2]]'", "purchase pi_1"),
        ("DELETE FROM purchases", "purchase pi_1"),
    ],
)
def test_a_changed_state_of_a_purchase_is_named_by_the_audit(
    ledger: Ledger, database: str, change: str, key: str
) -> None:
    own = opened(ledger, database, BOUGHT)
    away(own, 20, 1, frozen=True)
    replayer = Replayer({CATALOGS["debt"].label: CATALOGS["debt"]})
    assert audit(ledger.writer.connection, replayer=replayer).faults == []
    tamper(ledger, change)
    assert named(audit(ledger.writer.connection, replayer=replayer)) == {(OWNER, "purchases", key)}


def test_a_purchase_of_nobody_is_named_by_the_audit(ledger: Ledger, database: str) -> None:
    tamper(ledger, "INSERT INTO purchases VALUES ('nobody', 'pi_1', 1, 1, 0, NULL, false, 0, '{}', '[]')")
    assert named(audit(ledger.writer.connection)) == {("nobody", "purchases", "pi_1")}
    tamper(ledger, "DELETE FROM purchases")
