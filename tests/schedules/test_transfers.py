"""Transfers of which a message was lost: found, sent again, ended once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from creditlane.contract import decode_message
from models.settings import settings
from schedules import transfers
from tests.support import Ledger, execute, rows, travel
from workers.ledger_writer import Job

LATER = timedelta(seconds=transfers.AGE_SECONDS + 1)


@pytest.fixture
def sweep(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The task, in this process."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    yield lambda: transfers.sweep.apply(throw=True).get()["again"]
    settings.cache_clear()


def begin(ledger: Ledger, recipient: str) -> None:
    """Two lots, one of them with all that is kept of a lot, given away with one transfer."""
    for account in ("anna", "bert"):
        ledger.apply("credits.open", "open", account=account, kind="pool")
    ledger.apply(
        "credits.grant", "priced", account="anna", amount=3, source="pack", priority=7, expires_in=30 * 86400,
        unit_price={"minor": 499, "currency": "EUR", "per": 50},
    )  # fmt: skip
    ledger.apply("credits.grant", "plain", account="anna", amount=4, source="pack")
    ledger.apply("credits.transfer", "gift", account="anna", to=recipient, amount=6, message="for you")


def pending(database: str) -> list[tuple[str, str, str, Any]]:
    """What stands in the outbox."""
    found = rows(database, "SELECT account, task, operation, arguments::text FROM outbox ORDER BY id")
    return [(*row, msgspec.json.decode(arguments)) for *row, arguments in found]


def deliver(ledger: Ledger, database: str) -> list[dict[str, Any]]:
    """Take what stands in the outbox to its lane, and apply it."""
    found = rows(database, "DELETE FROM outbox RETURNING task, operation, arguments::text")
    ledger.writer.take_outbox()
    jobs = [Job(name, id, decode_message(name, raw.encode()), raw.encode()) for name, id, raw in found]
    return ledger.write(*jobs)


def lose(database: str) -> None:
    """The broker confirmed what was sent, and lost it."""
    execute(database, "DELETE FROM outbox")


def totals(database: str) -> tuple[int, int, int]:
    """What is in transit, sent and received, over all accounts, in credits."""
    found = rows(database, "SELECT sum(in_transit_micro)::bigint / 1000000, sum(sent_micro)::bigint / 1000000,"
                           " sum(received_micro)::bigint / 1000000 FROM accounts")[0]  # fmt: skip
    return int(found[0]), int(found[1]), int(found[2])


@pytest.mark.parametrize("lost", ["on its way", "on its way back", "both"])
@pytest.mark.parametrize(("recipient", "ended"), [("bert", (0, 6, 6)), ("nobody", (0, 0, 0))])
def test_a_transfer_of_which_a_message_was_lost_ends_all_the_same(
    recipient: str, ended: tuple[int, int, int], lost: str, ledger: Ledger, database: str, sweep: Any
) -> None:
    begin(ledger, recipient)
    sent = pending(database)
    if lost != "on its way":
        deliver(ledger, database)
    lose(database)
    assert sweep() == 0  # it may still be on its way
    travel(database, LATER)
    assert sweep() == 1
    assert sweep() == 0  # it stands in the outbox
    assert pending(database) == sent
    if lost == "both":
        deliver(ledger, database)
        lose(database)
        assert sweep() == 1
    (received,) = deliver(ledger, database)
    assert received.get("replayed", False) is (lost != "on its way")
    (told,) = deliver(ledger, database)
    assert told["status"] == "applied"
    assert totals(database) == ended
    assert sweep() == 0
    assert pending(database) == []


def test_transfers_that_ended_are_not_sent_again(ledger: Ledger, database: str, sweep: Any) -> None:
    begin(ledger, "bert")
    deliver(ledger, database)
    deliver(ledger, database)
    ledger.apply("credits.transfer", "second", account="anna", to="bert", amount=1)
    lose(database)
    travel(database, LATER)
    assert sweep() == 1
    assert [arguments["transfer"] for *_, arguments in pending(database)] == ["second"]
