"""The in-app inbox: its pages, what was read, and advice drawn from the account's own rows."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import msgspec
import pytest

from creditlane.amounts import MICRO, Micro
from models.advice_reading import account_advice
from models.inbox import inbox, mark_read
from tests.support import CATALOG, Ledger, execute, rows, travel, value

MAKE = """
INSERT INTO notices (account, key, kind, at, created_at, details, channels)
SELECT 'alice', 'refunded:' || n, 'refunded', now(), now() - interval '1 second' * (n / 2), '{"amount": "1"}', '{}'
FROM generate_series(1, 7) n
"""
"""Some made at the same instant."""


@pytest.fixture
def told(ledger: Ledger, database: str) -> Ledger:
    """An account with notices."""
    ledger.apply("credits.open", "open", account="alice")
    execute(database, MAKE)
    return ledger


def test_its_pages_hold_each_notice_once_the_newest_first(told: Ledger) -> None:
    connection, found = told.writer.connection, []
    place = None
    for size in (2, 2, 2, 1):
        page = inbox(connection, "alice", CATALOG, limit=2, before=place)
        assert len(page.notices) == size
        assert (page.unread, page.total) == (7, 7)
        found += page.notices
        place = page.next_before
    assert place is None
    assert found == inbox(connection, "alice", CATALOG).notices
    order = [(notice.created_at, notice.key) for notice in found]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) == 7


def test_what_was_read(told: Ledger, database: str) -> None:
    connection = told.writer.connection
    assert mark_read(connection, "alice", key="refunded:3") == 1
    (first,) = rows(database, "SELECT read_at FROM notices WHERE key = 'refunded:3'")
    assert mark_read(connection, "alice", key="refunded:3") == 0
    assert mark_read(connection, "alice", key="none") == 0
    page = inbox(connection, "alice", CATALOG, unread=True)
    assert ("refunded:3" in [notice.key for notice in page.notices], page.unread, page.total) == (False, 6, 7)
    seen = page.notices[2]
    assert mark_read(connection, "alice", until=seen.created_at) == 6 - len(
        [notice for notice in page.notices if notice.created_at > seen.created_at]
    )
    assert mark_read(connection, "alice") > 0
    assert inbox(connection, "alice", CATALOG, unread=True).notices == []
    assert rows(database, "SELECT read_at FROM notices WHERE key = 'refunded:3'") == [first]
    assert mark_read(connection, "bob") == 0


@pytest.mark.parametrize("place", ["nowhere", "2026-01-01 x", ""])
def test_a_place_that_is_none(place: str, told: Ledger) -> None:
    with pytest.raises(ValueError, match="no place in an inbox"):
        inbox(told.writer.connection, "alice", CATALOG, before=place)


@pytest.mark.parametrize("limit", [0, 1001])
def test_a_limit_that_is_none(limit: int, told: Ledger) -> None:
    with pytest.raises(ValueError, match="a page has"):
        inbox(told.writer.connection, "alice", CATALOG, limit=limit)


def test_advice_comes_with_a_notice_that_carries_it(told: Ledger, database: str) -> None:
    connection = told.writer.connection
    assert inbox(connection, "alice", CATALOG).advice is None
    execute(database, "INSERT INTO notices (account, key, kind, at, created_at, details, channels)"
                      " VALUES ('alice', 'depleted:9', 'depleted', now(), now(), '{}', '{}')")  # fmt: skip
    assert inbox(connection, "alice", CATALOG).advice is not None


def test_advice_is_of_the_accounts_own_use(ledger: Ledger, database: str) -> None:
    connection = ledger.writer.connection
    ledger.apply("credits.open", "open", account="alice")
    price = {"minor": 1499, "currency": "EUR", "per": "85"}
    for source, purchase in (("pack", "p-1"), ("monthly", "of-a-plan")):
        ledger.apply("credits.grant", purchase, account="alice", amount=85, source=source, purchase=purchase,
                     unit_price=price)  # fmt: skip
    ledger.apply("credits.open", "open", account="bob")
    travel(database, timedelta(days=10))
    for number in range(4):
        ledger.apply("credits.consume", f"i-{number}", account="alice", feature="image", quantity=80)
    ledger.apply("credits.consume", "s", account="alice", feature="save_collection")
    ledger.apply("credits.consume", "refused", account="alice", feature="save_collection", quantity=1000)
    # An image for a credit, so that there is something cheaper.
    image = msgspec.structs.replace(CATALOG.features["image"], per=Micro(MICRO))
    catalog = msgspec.structs.replace(CATALOG, features={**CATALOG.features, "image": image})
    advice = account_advice(connection, "alice", catalog)
    assert advice is not None
    assert advice.pace == 5, "fifty credits in ten days"
    assert advice.missing == 0
    (alternative,) = advice.alternatives
    assert (alternative.feature, alternative.alternative) == ("image", "regeneration")
    assert account_advice(connection, "nobody", CATALOG) is None
    bob = account_advice(connection, "bob", CATALOG)
    assert bob is not None
    assert (bob.pace, bob.pack, bob.alternatives) == (Decimal(0), None, [])
    assert value(database, "SELECT count(*) FROM operations") == 10
