"""The read side: what an operator and a query are told is what the ledger would answer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import psycopg
import pytest

from creditlane.codes import Code
from creditlane.contract import decode_message
from creditlane.reports import HistoryLine
from models import reading
from models.database import connect
from models.reading import (
    MAX_PAGE,
    account_balance,
    account_exists,
    account_summary,
    history,
    lane_owners,
    quarantine,
    quarantined_message,
)
from tests.support import CATALOG, Ledger, travel
from workers.ledger_writer import Job
from workers.ownership import LANE_CLASS, PRESENCE_CLASS, Ownership
from workers.quarantine import Quarantined, store


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(database, "test of reading") as reader:
        yield reader


def balance(connection: psycopg.Connection[Any], account: str) -> Any:
    return msgspec.to_builtins(account_balance(connection, account, CATALOG))


def total(lines: list[HistoryLine]) -> Decimal:
    changes = [line.change for line in lines] + [entry.change for line in lines for entry in line.lapsed]
    return sum(map(Decimal, changes), Decimal(0))


def rich_history(ledger: Ledger, database: str) -> None:
    """Every operation once, refusals among them, and time that does something in between."""
    soon = {"expires_in": 60}
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount="10", source="trial", **soon)
    ledger.apply("credits.grant", "g-2", account="alice", amount="100", source="pack", purchase="p-1", reason="paid")
    ledger.apply("credits.consume", "c-1", account="alice", feature="image", quantity=12)
    ledger.apply("credits.consume", "c-2", account="alice", amount="100000")
    ledger.apply("credits.consume", "c-3", account="alice", feature="no such thing")
    ledger.apply("credits.hold", "h-1", account="alice", amount="20", ttl=30)
    ledger.apply("credits.hold", "h-2", account="alice", amount="5")
    travel(database, timedelta(seconds=90))
    ledger.apply("credits.capture", "k-1", account="alice", hold="h-2", amount="2")
    refund = b'{"account": "alice", "operation": "c-1", "amount": "0.5", "reason": "blurred"}'
    ledger.write(Job("credits.refund", "r-1", decode_message("credits.refund", refund), refund))
    ledger.apply("credits.adjust", "a-1", account="alice", amount="-1", actor="anna", reason="twice")
    ledger.apply("credits.revoke", "v-1", account="alice", purchase="p-1", amount="7")
    ledger.apply("credits.hold", "h-3", account="alice", amount="1")
    ledger.apply("credits.release", "l-1", account="alice", hold="h-3")
    ledger.apply("credits.settle", "s-1", account="alice")


def test_an_account_that_nobody_named(connection: psycopg.Connection[Any]) -> None:
    assert account_summary(connection, "nobody", CATALOG) is None
    assert account_balance(connection, "nobody", CATALOG) is None
    assert not account_exists(connection, "nobody")
    assert history(connection, "nobody").lines == []


def test_an_account_that_was_only_mentioned(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    ledger.apply("credits.consume", "c-1", account="bob", amount="1")
    summary = account_summary(connection, "bob", CATALOG)
    assert summary is not None
    assert (summary.status, summary.balance.available, summary.operations) == ("unopened", "0", 1)
    assert account_balance(connection, "bob", CATALOG) is None
    assert account_exists(connection, "bob")


def test_the_balance_is_the_one_of_the_last_answer(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    steps: list[tuple[str, dict[str, Any]]] = [
        ("credits.open", {}),
        ("credits.grant", {"amount": "3.25", "source": "pack", "purchase": "p-1", "priority": 0}),
        ("credits.grant", {"amount": "9", "source": "later", "effective_at": later}),
        ("credits.grant", {"amount": "2", "source": "scoped", "features": ["image"]}),
        ("credits.hold", {"amount": "1"}),
        ("credits.consume", {"feature": "image", "quantity": 24}),
        ("credits.consume", {"amount": "51.5"}),
        ("credits.revoke", {"purchase": "p-1"}),
    ]
    for number, (name, arguments) in enumerate(steps):
        answer = ledger.apply(name, f"op-{number}", account="alice", **arguments)
        assert balance(connection, "alice") == answer["balance"]
    assert {"held", "debt", "upcoming"} <= set(balance(connection, "alice"))


def test_what_is_due_counts_as_done(ledger: Ledger, database: str, connection: psycopg.Connection[Any]) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount="10", source="trial", expires_in=60, priority=0)
    ledger.apply("credits.hold", "h-1", account="alice", amount="15", ttl=30)
    travel(database, timedelta(seconds=45))
    summary = account_summary(connection, "alice", CATALOG)
    assert summary is not None
    assert (summary.balance.available, summary.balance.held, summary.holds) == ("60", "0", [])
    travel(database, timedelta(seconds=90))
    summary = account_summary(connection, "alice", CATALOG)
    assert summary is not None
    assert summary.balance.available == "50"
    assert [grant.source for grant in summary.grants] == ["signup"]
    assert summary.operations == 3, "reading settles nothing in the database"
    told = balance(connection, "alice")
    assert told == ledger.apply("credits.settle", "s-1", account="alice")["balance"]


def test_a_summary_names_grants_in_burn_down_order_and_holds(
    ledger: Ledger, connection: psycopg.Connection[Any]
) -> None:
    ledger.apply("credits.open", "o-1", account="alice", email="a@example.org", locale="fr", timezone="Europe/Paris")
    for number, fields in enumerate(
        (
            {"source": "last", "priority": 90},
            {"source": "never", "priority": 10},
            {"source": "sooner", "priority": 10, "expires_in": 3600},
            {"source": "scoped", "priority": 10, "features": ["image", "export"]},
            {"source": "first", "priority": 0, "purchase": "p-1"},
        )
    ):
        ledger.apply("credits.grant", f"g-{number}", account="alice", amount="2", **fields)
    ledger.apply("credits.hold", "h-1", account="alice", feature="image", quantity=8, member="mia")
    ledger.apply("credits.hold", "h-2", account="alice", amount="0.000001")
    summary = account_summary(connection, "alice", CATALOG)
    assert summary is not None
    assert [grant.source for grant in summary.grants] == ["first", "scoped", "sooner", "signup", "never", "last"]
    first = summary.grants[0]
    assert (first.available, first.held, first.granted, first.purchase) == ("0.999999", "1.000001", "2", "p-1")
    assert summary.grants[1].features == ["export", "image"]
    assert [(hold.hold, hold.amount, hold.feature, hold.member) for hold in summary.holds] == [
        ("h-1", "1", "image", "mia"),
        ("h-2", "0.000001", None, None),
    ]
    assert (summary.email, summary.locale, summary.timezone) == ("a@example.org", "fr", "Europe/Paris")
    assert summary.next_due_at == summary.holds[0].expires_at
    assert msgspec.json.decode(msgspec.json.encode(summary))["balance"]["available"] == "58.999999"


def test_a_history_says_what_happened_and_why(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    rich_history(ledger, database)
    lines = history(connection, "alice").lines
    assert [line.number for line in lines] == list(range(15, 0, -1))
    by_id = {line.operation: line for line in lines}
    assert (by_id["c-1"].feature, by_id["c-1"].quantity, by_id["c-1"].change) == ("image", "12", "-1.5")
    assert (by_id["c-2"].status, by_id["c-2"].code, by_id["c-2"].change) == ("rejected", "insufficient_credits", "0")
    assert by_id["c-2"].refusal == "100000 needed, 158.5 available"
    assert (by_id["c-3"].code, by_id["c-3"].refusal) == ("unknown_feature", None)
    assert (by_id["h-2"].change, by_id["k-1"].change, by_id["k-1"].charged) == ("-5", "3", "2")
    assert (by_id["r-1"].charged, by_id["r-1"].subject, by_id["r-1"].reason) == ("-0.5", "c-1", "blurred")
    assert (by_id["a-1"].change, by_id["a-1"].actor, by_id["a-1"].reason) == ("-1", "anna", "twice")
    assert by_id["v-1"].subject == "p-1"
    assert by_id["g-2"].subject == "pack"
    assert (by_id["l-1"].subject, by_id["l-1"].change) == ("h-3", "1")
    assert [(entry.kind, entry.change) for entry in by_id["k-1"].lapsed] == [("released", "20"), ("expired", "-10")]
    assert [line.operation for line in lines if line.lapsed] == ["k-1"]
    assert Decimal(lines[0].balance or 0) == total(lines)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 14, 15, 16])
def test_pages_tell_everything_once(
    limit: int, ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    rich_history(ledger, database)
    whole = history(connection, "alice", with_entries=True).lines
    read: list[HistoryLine] = []
    before: int | None = None
    while True:
        page = history(connection, "alice", limit=limit, before=before, with_entries=True)
        assert len(page.lines) <= limit
        read += page.lines
        if page.next_before is None:
            break
        before = page.next_before
    assert read == whole


def test_what_time_did_is_told_once_though_a_batch_has_one_instant(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount="10", source="trial", expires_in=60)
    travel(database, timedelta(seconds=90))
    ledger.write(
        ledger.job("credits.consume", "c-1", account="alice", amount="1000"),
        ledger.job("credits.consume", "c-2", account="alice", amount="1"),
        ledger.job("credits.consume", "c-3", account="alice", amount="1"),
    )
    for limit in (1, 2, 3, 4, 5):
        read: list[HistoryLine] = []
        before: int | None = None
        while True:
            page = history(connection, "alice", limit=limit, before=before)
            read += page.lines
            before = page.next_before
            if before is None:
                break
        assert [(line.operation, len(line.lapsed)) for line in read] == [
            ("c-3", 0), ("c-2", 0), ("c-1", 1), ("g-1", 0), ("o-1", 0),
        ]  # fmt: skip


def test_a_history_can_be_filtered(ledger: Ledger, database: str, connection: psycopg.Connection[Any]) -> None:
    rich_history(ledger, database)

    def found(**filters: Any) -> list[str]:
        return [line.operation for line in history(connection, "alice", **filters).lines]

    assert found(feature="image") == ["c-1"]
    assert found(status="rejected") == ["c-3", "c-2"]
    assert found(name="credits.hold") == ["h-3", "h-2", "h-1"]
    assert found(name="credits.hold", before=9) == ["h-2", "h-1"]
    moment = history(connection, "alice", limit=8).lines[-1].applied_at
    assert found(until=moment) == ["h-1", "c-3", "c-2", "c-1", "g-2", "g-1", "o-1"]
    assert found(since=moment, name="credits.hold") == ["h-3", "h-2"]
    assert all(not line.lapsed for line in history(connection, "alice", name="credits.capture").lines)


def test_a_history_has_entries_when_they_are_asked_for(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rich_history(ledger, database)
    assert all(line.lines is None for line in history(connection, "alice").lines)
    lines = {line.operation: line for line in history(connection, "alice", with_entries=True).lines}
    assert all(len(line.lines or ()) == line.entries for line in lines.values())
    entry = (lines["c-1"].lines or [])[0]
    assert (entry.kind, entry.amount, entry.change, entry.source, entry.grant) == (
        "consumed",
        "1.5",
        "-1.5",
        "signup",
        1,
    )
    assert [entry.refers_to for entry in lines["k-1"].lines or ()] == ["h-2", "h-2"]
    monkeypatch.setattr(reading, "MAX_PAGE_ENTRIES", 2)
    page = history(connection, "alice", with_entries=True)
    assert page.next_before is not None
    assert sum(line.entries for line in page.lines) <= 2


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1])
def test_a_page_has_a_limit(limit: int, connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(ValueError, match="a page has 1 to 1000 rows"):
        history(connection, "alice", limit=limit)
    with pytest.raises(ValueError, match="a page has 1 to 1000 rows"):
        quarantine(connection, limit=limit)


def test_the_quarantine_is_paged_and_each_message_is_whole(database: str, connection: psycopg.Connection[Any]) -> None:
    bodies = [b"\xff\x00 %d" % number for number in range(5)]
    with psycopg.connect(database) as writer:
        store(writer, [Quarantined(Code.MALFORMED, "broken", "lane.001", body, b'{"x": 1}') for body in bodies])
        store(writer, [Quarantined(Code.MALFORMED, "broken", "lane.001", bodies[0], b'{"x": 1}')])
        writer.execute("UPDATE quarantine SET status = 'dropped', resolved_by = 'anna' WHERE body = %s", (bodies[4],))
    page = quarantine(connection, limit=3)
    assert len(page.lines) == 3
    rest = quarantine(connection, limit=3, before=page.next_before)
    assert rest.next_before is None
    lines = page.lines + rest.lines
    assert [line.id for line in lines] == sorted((line.id for line in lines), reverse=True)
    assert len(lines) == 4
    assert lines[-1].times_seen == 2
    assert [line.resolved_by for line in quarantine(connection, status="dropped").lines] == ["anna"]
    assert len(quarantine(connection, status=None).lines) == 5
    message = quarantined_message(connection, lines[0].id)
    assert message is not None
    assert (message.body, message.headers, message.line) == (bodies[3], b'{"x": 1}', lines[0])
    assert quarantined_message(connection, 10**6) is None


def test_lane_owners(database: str, connection: psycopg.Connection[Any]) -> None:
    assert lane_owners(connection, LANE_CLASS, PRESENCE_CLASS).workers == 0
    with connect(database, "worker one") as one, connect(database, "worker two") as two:
        first, second = Ownership(one, 4), Ownership(two, 4)
        first.balance()
        second.balance()
        found = lane_owners(connection, LANE_CLASS, PRESENCE_CLASS)
        assert found.workers == 2
        assert {lane for lane, owner in found.owners.items() if owner.application == "worker one"} == first.mine
        assert {owner.pid for owner in found.owners.values()} == {one.info.backend_pid, two.info.backend_pid}
        assert all(owner.client and owner.client.startswith("127.0.0.1:") for owner in found.owners.values())


def test_a_reading_session_cannot_write(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("TRUNCATE quarantine")
