"""What is told of operations before they are sent is what becomes of them; and nothing is written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from creditlane.contract import Result
from creditlane.reports import Planned
from models.catalog import load_catalog
from models.database import connect
from tasks.simulation import simulate_operations
from tests.support import Ledger, rows, value
from tests.workers.test_ledger_writer import freeze, priced_by

ROLLOVER = load_catalog("rollover")
START = datetime(2027, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)
TABLES = ("accounts", "operations", "entries", "grants", "holds", "receipts", "subscriptions", "notices", "outbox")


def everything(database: str) -> list[Any]:
    return [rows(database, f"SELECT t::text FROM {table} t ORDER BY 1") for table in TABLES]


def used_micro(database: str) -> int:
    return int(value(database, "SELECT consumed_micro - restored_micro FROM accounts WHERE account = 'a'"))


def simulate(database: str, account: str, *planned: Planned, **options: Any) -> Any:
    with connect(database, "test of simulation") as connection:
        return simulate_operations(connection, account, planned, ROLLOVER, **options)


def test_operations_do_what_was_told_of_them(ledger: Ledger, database: str) -> None:
    with priced_by(ledger, ROLLOVER):
        freeze(ledger, START)
        ledger.apply("credits.open", "open", account="a")
        ledger.apply("plans.subscribe", "plan", account="a", plan="starter", payment="in_1")
        ledger.apply("credits.grant", "spent", account="a", amount=5, source="gone", priority=0, purchase="p-0")
        ledger.apply("credits.grant", "pack", account="a", amount=30, source="pack", purchase="p-1", expires_in=86_400)
        ledger.apply("credits.consume", "charge", account="a", amount=12)
        ledger.apply("credits.refund", "back", account="a", operation="charge", amount=1)
        ledger.apply("credits.hold", "job", account="a", amount=7, ttl=86_400)
        ledger.apply("credits.hold", "over", account="a", amount=1)
        ledger.apply("credits.release", "end", account="a", hold="over")
        freeze(ledger, START + DAY / 2)
        planned = [
            Planned("credits.consume", {"amount": "3.5"}, "c-1"),
            Planned("credits.consume", {"amount": 200}, "c-2"),
            Planned("credits.consume", {"amount": 200, "partial": True}, "c-3"),
            Planned("credits.refund", {"operation": "charge"}, "r-1"),
            Planned("credits.refund", {"operation": "c-1", "amount": 1, "actor": "anna"}, "r-2"),
            Planned("credits.refund", {"operation": "unheard of"}, "r-3"),
            Planned("credits.capture", {"hold": "job", "amount": 9}, "k-1"),
            Planned("credits.capture", {"hold": "over"}, "k-2"),
            Planned("credits.hold", {"amount": 2}, "h-1"),
            Planned("credits.capture", {"hold": "h-1"}, "k-3"),
            Planned("credits.revoke", {"purchase": "p-0"}, "v-1"),
            Planned("credits.revoke", {"grant": 3, "amount": 2}, "v-2"),
            Planned("credits.transfer", {"to": "b", "amount": 1}, "t-1"),
            Planned("plans.change", {"plan": "pro", "payment": "in_2"}, "p-1"),
            Planned("plans.cancel", {}, "p-2"),
            Planned("credits.consume", {"amount": 12}, "charge"),
            Planned("credits.consume", {"amount": 13}, "charge"),
        ]
        before, used = everything(database), used_micro(database)
        found = simulate(database, "a", *planned)
        assert everything(database) == before
        answers = [
            msgspec.convert(ledger.apply(each.name, each.id or "", account="a", **each.arguments), Result, strict=False)
            for each in planned
        ]
        assert found.results == answers
        codes = [result.code for result in answers if result.code is not None]
        assert codes == ["insufficient_credits", "unknown_charge", "hold_closed", "id_conflict"]
        assert found.refused == 4
        assert found.results[1].offer is not None
        assert found.after == answers[-3].balance
        assert found.charged * 10**6 == used_micro(database) - used


def test_several_alike_and_a_later_instant(ledger: Ledger, database: str) -> None:
    with priced_by(ledger, ROLLOVER):
        freeze(ledger, START)
        ledger.apply("credits.open", "open", account="a")
        ledger.apply("plans.subscribe", "plan", account="a", plan="starter", payment="in_1")
        thirty = Planned("credits.consume", {"amount": 30}, times=4)
        now = simulate(database, "a", thirty)
        assert [result.status for result in now.results] == ["applied"] * 3 + ["rejected"]
        assert [result.id for result in now.results] == [f"simulated:{place}" for place in range(1, 5)]
        assert (str(now.results[3].shortfall), now.refused, str(now.charged)) == ("20", 1, "90")
        spring = START + 40 * DAY
        later = simulate(database, "a", thirty, at=spring)
        assert (str(later.before.available), later.refused, later.at) == ("200", 0, spring)
        unpaid = simulate(database, "a", thirty, at=spring, paid=False)
        assert (str(unpaid.before.available), unpaid.refused) == ("0", 4)
        renewal = Planned("plans.renew", {"period_start": "2027-02-28T12:00:00Z", "payment": "in_2"})
        (renewed,) = simulate(database, "a", renewal).results
        assert renewed.status == "applied", "what comes is not taken to be paid for before its time"
        for at in (START - DAY, START + 4000 * DAY):
            with pytest.raises(ValueError, match=r"behind|ahead"):
                simulate(database, "a", thirty, at=at)
    ledger.apply("credits.consume", "c", account="mentioned", amount=1)
    (refused,) = simulate(database, "mentioned", Planned("credits.consume", {"amount": 1})).results
    assert refused.code == "unknown_account"


def test_members_of_a_pool_have_their_limits_and_what_they_used(ledger: Ledger, database: str) -> None:
    with priced_by(ledger, ROLLOVER):
        freeze(ledger, START)
        ledger.apply("credits.open", "open", account="a", kind="pool")
        ledger.apply("credits.grant", "grant", account="a", amount=30, source="pack")
        for member in ("ann", "bob", "cy"):
            ledger.apply("pools.set_member", member, account="a", member=member, limit=5)
        ledger.apply("credits.hold", "job", account="a", amount=4, member="ann")
        ledger.apply("credits.consume", "charge", account="a", amount=4, member="bob")
        ledger.apply("pools.remove_member", "gone", account="a", member="cy")
        planned = [
            Planned("credits.capture", {"hold": "job", "amount": 6}, "k-1"),
            Planned("credits.refund", {"operation": "charge"}, "r-1"),
            Planned("credits.consume", {"amount": 5, "member": "bob"}, "c-1"),
            Planned("credits.consume", {"amount": 1, "member": "cy"}, "c-2"),
            Planned("credits.capture", {"hold": "job"}, "k-2"),
        ]
        found = simulate(database, "a", *planned)
        assert [result.code for result in found.results] == ["member_limit", None, None, "unknown_member", None]
        alone = [simulate(database, "a", each).results[0].allowance for each in planned]
        assert [told and str(told.left) for told in alone] == [None, None, None, None, "1"]
        for each, told in zip(planned, found.results, strict=True):
            done = ledger.apply(each.name, each.id or "", account="a", **each.arguments)
            assert msgspec.convert(done, Result, strict=False) == told
