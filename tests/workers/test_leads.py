"""Leads and what administrators do as rows: batches, lanes at once, what is loaded of a conversion, who did what."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from creditlane.contract import decode_message
from models.actions import actions
from models.settings import settings
from schedules import transfers
from tests.support import Ledger, execute, rows, travel
from workers.ledger_writer import Job


def deliver(ledger: Ledger) -> list[dict[str, Any]]:
    """Take what follows to its lane, and apply it."""
    taken = ledger.writer.take_outbox()
    jobs = [Job(row.task, row.operation, decode_message(row.task, row.arguments), row.arguments) for row in taken]
    return ledger.write(*jobs) if jobs else []


def quiet(ledger: Ledger) -> None:
    while deliver(ledger):
        pass


def has(database: str, account: str) -> dict[str, float]:
    """What is in an account's buckets, in credits."""
    names = ("available", "held", "in_transit", "sent", "received", "debt")
    columns = ", ".join(f"{name}_micro" for name in names)
    (row,) = rows(database, f"SELECT {columns} FROM accounts WHERE account = %s", account)
    return {name: micro / 1e6 for name, micro in zip(names, row, strict=True) if micro}


def status(database: str, account: str) -> tuple[str, str | None]:
    ((state, to),) = rows(database, "SELECT status, converted_to FROM accounts WHERE account = %s", account)
    return state, to


def lead(ledger: Ledger, name: str, **granted: Any) -> None:
    """A lead of ten credits."""
    ledger.apply("credits.open", "open", account=name, kind="lead", welcome=False)
    ledger.apply("credits.grant", "grant", account=name, **{"amount": 10, "source": "lead", **granted})


@pytest.fixture
def users(ledger: Ledger) -> None:
    """Two users without credits."""
    ledger.write(*(ledger.job("credits.open", "open", account=name, welcome=False) for name in ("anna", "bert")))


@pytest.mark.usefixtures("users")
def test_a_lead_is_converted_from_batch_to_batch(ledger: Ledger, database: str) -> None:
    lead(ledger, "lena", features=["image"], expires_in=86400, effective_at="2031-01-01T00:00:00Z")
    ledger.apply("credits.grant", "bought", account="lena", amount=5, source="pack", purchase="p")
    ledger.apply("credits.consume", "spent", account="lena", amount=5)
    ledger.apply("credits.revoke", "revoked", account="lena", purchase="p", amount=2)
    # Twice in one batch, and to two users at once; then again in a batch of its own.
    results = ledger.write(
        ledger.job("credits.convert", "one", account="lena", to="anna"),
        ledger.job("credits.convert", "one", account="lena", to="anna"),
        ledger.job("credits.convert", "two", account="lena", to="bert"),
        ledger.job("credits.convert", "three", account="lena", to="anna"),
    )
    assert [each.get("charged", each.get("code")) for each in results] == ["8", "8", "already_converted", "0"]
    assert results[1]["replayed"]
    assert ledger.apply("credits.convert", "one", account="lena", to="anna")["replayed"]
    assert has(database, "lena") == {"in_transit": 8}
    quiet(ledger)  # what is loaded of the conversion begins with the debt that it paid
    assert has(database, "lena") == {"sent": 8}
    assert has(database, "anna") == {"available": 8, "received": 8}
    (kept,) = rows(database, "SELECT features, effective_at::date::text FROM grants WHERE account = 'anna'")
    assert kept == (["image"], "2031-01-01")
    ledger.apply("credits.refund", "back", account="lena", operation="spent", amount=3)
    quiet(ledger)
    assert has(database, "anna") == {"available": 11, "received": 11}
    assert status(database, "lena") == ("closed", "anna")


@pytest.mark.usefixtures("users")
def test_a_conversion_that_comes_back_and_one_that_is_named_at_sign_up(ledger: Ledger, database: str) -> None:
    lead(ledger, "lena")
    ledger.apply("credits.hold", "work", account="lena", amount=4, ttl=60)
    ledger.apply("credits.convert", "one", account="lena", to="dora")
    assert status(database, "lena") == ("closed", "dora")
    deliver(ledger)
    deliver(ledger)
    assert status(database, "lena") == ("open", None)
    assert has(database, "lena") == {"available": 6, "held": 4}
    ledger.apply("credits.open", "open now", account="dora", lead="lena", welcome=False)
    quiet(ledger)
    assert has(database, "dora") == {"available": 6, "received": 6}
    travel(database, timedelta(seconds=61))
    ledger.apply("credits.settle", "sweep", account="lena")
    quiet(ledger)
    assert has(database, "dora") == {"available": 10, "received": 10}


@pytest.mark.usefixtures("users")
def test_what_the_broker_lost_of_a_conversion_is_sent_again(
    ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    lead(ledger, "lena", features=["image", "block"])
    ledger.apply("credits.hold", "used", account="lena", feature="image", quantity=8)
    ledger.apply("credits.convert", "one", account="lena", to="anna")
    ledger.apply("credits.release", "released", account="lena", hold="used")
    ledger.apply("credits.convert", "to another", account="lena", to="bert")  # refused, and it tells as well

    def lose() -> None:
        ledger.writer.take_outbox()
        execute(database, "DELETE FROM outbox")

    def found() -> int:
        sent: int = transfers.sweep.apply(throw=True).get()["again"]
        taken = rows(database, "DELETE FROM outbox RETURNING task, operation, arguments::text")
        ledger.write(*(Job(task, id, decode_message(task, raw.encode()), raw.encode()) for task, id, raw in taken))
        return sent

    lose()
    assert found() == 0
    travel(database, timedelta(seconds=transfers.AGE_SECONDS + 1))
    assert found() == 2  # what was on its way, and what was to follow
    lose()
    assert has(database, "anna") == {"available": 9, "received": 9}
    # The end of a lot may have changed since: what the recipient has decides.
    travel(database, timedelta(seconds=2 * transfers.AGE_SECONDS + 2))
    assert found() == 2
    quiet(ledger)
    assert found() == 0
    assert has(database, "anna") == {"available": 10, "received": 10}
    assert has(database, "lena") == {"sent": 10}
    settings.cache_clear()


@pytest.mark.usefixtures("users")
def test_what_administrators_do_is_written_and_told(ledger: Ledger, database: str) -> None:
    def by_hand(name: str, account: str, actor: str = "ann") -> dict[str, Any]:
        return ledger.apply(f"accounts.{name}", f"{name} {account} {actor}", account=account, actor=actor,
                            reason=f"{name} it")  # fmt: skip

    ledger.apply("credits.grant", "grant", account="anna", amount=10, source="pack")
    ledger.apply("plans.subscribe", "plan", account="bert", plan="none")
    assert by_hand("freeze", "anna")["account_status"] == "frozen"
    assert ledger.apply("credits.consume", "c", account="anna", amount=1)["code"] == "account_frozen"
    by_hand("close", "bert")
    with psycopg.connect(database, autocommit=True) as connection:
        assert by_hand("thaw", "anna", "bob")["account_status"] == "open"
        assert by_hand("reopen", "bert", "bob")["account_status"] == "open"
        assert by_hand("reopen", "anna", "bob")["code"] == "invalid"
        ledger.apply("credits.adjust", "minus", account="anna", amount=-4, actor="bob", reason="too much")
        told = actions(connection)
        assert [(each.name, each.account, each.actor, each.code, each.change) for each in told.actions] == [
            ("credits.adjust", "anna", "bob", None, "-4"),
            ("accounts.reopen", "anna", "bob", "invalid", "0"),
            ("accounts.reopen", "bert", "bob", None, "0"),
            ("accounts.thaw", "anna", "bob", None, "0"),
            ("accounts.close", "bert", "ann", None, "0"),
            ("accounts.freeze", "anna", "ann", None, "0"),
        ]
        assert told.next_before is None
        assert told.actions[0].reason == "too much"
        pages, before = [], None
        while True:
            page = actions(connection, actor="bob", limit=3, before=before)
            pages.append([each.name for each in page.actions])
            before = page.next_before
            if before is None:
                break
        assert pages == [["credits.adjust", "accounts.reopen", "accounts.reopen"], ["accounts.thaw"]]
        assert actions(connection, since=told.actions[0].applied_at, until=told.actions[0].applied_at).actions == []
        alone = actions(connection, since=told.actions[0].applied_at)
        assert [each.operation for each in alone.actions] == ["minus"]
        # Far back as well, in spans that grow.
        travel(database, timedelta(days=29))
        assert len(actions(connection).actions) == 6
        travel(database, timedelta(days=31))
        assert actions(connection).actions == []
        for wrong in ("", "yesterday", "2026-01-01 x anna"):
            with pytest.raises(ValueError, match="next_before"):
                actions(connection, before=wrong)
