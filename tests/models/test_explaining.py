"""Which grants paid which operation, and what became of each grant: the sums close, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from creditlane.reports import Buckets, GrantExplained, Movement
from models import explaining
from models.database import connect
from models.explaining import explain_balance, explain_grant, explain_operation
from models.reading import account_balance, history
from tests.models.test_reading import rich_history
from tests.support import CATALOG, Ledger, travel

IN = {"granted", "received", "restored", "rolled_in"}


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(database, "test of explaining") as reader:
        yield reader


def operation(connection: psycopg.Connection[Any], id: str, **options: Any) -> Any:
    """An operation of alice's."""
    found = explain_operation(connection, "alice", id, **options)
    assert found is not None
    return found


def explained(connection: psycopg.Connection[Any]) -> Any:
    """The balance of alice."""
    found = explain_balance(connection, "alice", CATALOG)
    assert found is not None
    return found


def closes(buckets: Buckets) -> bool:
    """Whether what came in is what is somewhere."""
    came = buckets.granted + buckets.received + buckets.restored
    lies = buckets.available + buckets.held + buckets.in_transit
    return came == lies + buckets.consumed + buckets.expired + buckets.revoked + buckets.sent


def life(connection: psycopg.Connection[Any], grant: int, **options: Any) -> list[Movement]:
    """All pages of a grant's life."""
    found: list[Movement] = []
    after = 0
    while True:
        page = explain_grant(connection, "alice", grant, after=after, **options)
        assert isinstance(page, GrantExplained)
        found += page.movements
        if page.next_after is None:
            return found
        assert page.next_after > after
        after = page.next_after


def test_a_charge_is_paid_by_the_grants_in_their_order(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount=10, source="trial", priority=1, expires_in=3600)
    ledger.apply("credits.consume", "c-1", account="alice", feature="image", quantity=96, member="mia")
    ledger.apply("credits.refund", "r-1", account="alice", operation="c-1", amount="1.5")
    found = operation(connection, "c-1")
    assert (found.name, found.status, found.charged, found.given_back) == (
        "credits.consume", "applied", 12, Decimal("1.5"),
    )  # fmt: skip
    assert (found.feature, found.member, found.quantity) == ("image", "mia", 96)
    assert [(each.grant, each.source, each.kind, each.amount) for each in found.movements] == [
        (2, "trial", "consumed", 10),
        (1, "signup", "consumed", 2),
    ]
    back = operation(connection, "r-1")
    assert [(each.grant, each.kind, each.amount, each.refers_to) for each in back.movements] == [
        (1, "restored", Decimal("1.5"), "c-1")
    ]
    first = operation(connection, "c-1", limit=1)
    assert first.next_after is not None
    second = operation(connection, "c-1", limit=1, after=first.next_after)
    assert [*first.movements, *second.movements] == found.movements
    assert second.next_after is None


def test_a_refusal_moved_nothing(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.consume", "c-1", account="alice", amount=51)
    found = operation(connection, "c-1")
    assert (found.status, found.code, found.charged, found.movements) == ("rejected", "insufficient_credits", 0, [])


def test_a_balance_is_the_sum_of_every_grant(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    rich_history(ledger, database)
    found = explained(connection)
    balance = account_balance(connection, "alice", CATALOG)
    assert balance is not None
    assert str(found.available) == balance.available
    assert found.total.held == Decimal(balance.held)
    assert all(map(closes, (found.total, found.closed, *found.lots)))
    for name in Buckets.__struct_fields__:
        parts = [found.closed, *found.lots]
        assert getattr(found.total, name) == sum(getattr(part, name) for part in parts), name
    assert (len(found.lots), found.closed_grants) == (2, 1)
    for number in (1, 2, 3):
        told = explain_grant(connection, "alice", number)
        assert told is not None
        assert closes(told.lot)
        came = sum(each.amount for each in told.movements if each.kind in IN)
        assert came == told.lot.granted + told.lot.received + told.lot.restored
        paid = [each for each in told.movements if each.kind in ("consumed", "captured")]
        assert sum(each.amount for each in paid) == told.lot.consumed
        assert {each.name for each in paid} <= {"credits.consume", "credits.capture"}
    (expired,) = [each for each in life(connection, 2) if each.kind == "expired"]
    assert (expired.operation, expired.name) == (None, None)


def test_what_time_has_made_due_counts_as_done(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount=10, source="trial", priority=1, expires_in=60)
    ledger.apply("credits.grant", "g-2", account="alice", amount=7, source="gift", effective_at="2100-01-01T00:00:00Z")
    travel(database, timedelta(seconds=90))
    found = explained(connection)
    assert (found.available, found.upcoming, found.total.expired, found.closed.expired) == (50, 7, 10, 10)


def test_a_life_is_read_in_pages(
    ledger: Ledger, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount=100, source="pack")
    for number in range(12):
        ledger.apply("credits.consume", f"c-{number}", account="alice", amount=5)
    whole = life(connection, 2)
    assert len(whole) == 3
    assert len(life(connection, 1)) == 11
    for limit in (1, 2, 3, 4):
        assert life(connection, 2, limit=limit) == whole
    monkeypatch.setattr(explaining, "MAX_SCANNED", 4)
    assert life(connection, 2, limit=2) == whole
    assert len(life(connection, 1, limit=3)) == 11


def test_what_does_not_exist(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    assert explain_balance(connection, "nobody", CATALOG) is None
    assert explain_operation(connection, "nobody", "x") is None
    assert explain_grant(connection, "nobody", 1) is None
    ledger.apply("credits.open", "o-1", account="alice")
    for hostile in ("'; DROP TABLE entries; --", "%s", "\\", "名前"):
        assert explain_operation(connection, "alice", hostile) is None
    for grant in (-1, 0, 2, 2**31, 10**30):
        assert explain_grant(connection, "alice", grant) is None
    for limit in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            explain_grant(connection, "alice", 1, limit=limit)
        with pytest.raises(ValueError, match="1 to 1000"):
            explain_operation(connection, "alice", "o-1", limit=limit)


def test_history_of_a_member_and_of_a_source(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount=10, source="trial", priority=1, expires_in=3600)
    ledger.apply("credits.consume", "c-1", account="alice", amount=9, member="mia")
    ledger.apply("credits.consume", "c-2", account="alice", amount=9, member="max")
    ledger.apply("credits.consume", "c-3", account="alice", amount=9, member="mia")

    def found(**filters: Any) -> list[str]:
        return [line.operation for line in history(connection, "alice", **filters).lines]

    assert found(member="mia") == ["c-3", "c-1"]
    assert found(source="trial") == ["c-2", "c-1", "g-1"]
    assert found(source="signup") == ["c-3", "c-2", "o-1"]
    assert found(source="signup", member="mia") == ["c-3"]
    assert found(source="' OR true --") == found(member="%") == []
