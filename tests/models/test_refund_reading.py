"""What was given back, by reason, feature and by whom, beside what was charged."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest

from creditlane.reports import Refunds
from models import cutoff
from models.database import connect
from models.refund_reading import refunds
from models.usage import roll_up
from tests.support import Ledger
from tests.workers.test_ledger_writer import freeze

START = datetime(2027, 3, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def connection(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    monkeypatch.setattr(cutoff, "CLOCK_MARGIN", timedelta(0))
    with connect(database, "test of refunds") as reader:
        yield reader


def told(found: Refunds | None) -> list[tuple[str | None, str | None, str | None, int, str, str, float | None]]:
    assert found is not None
    return [
        (
            line.reason, line.feature, line.actor, line.refunds, f"{line.credits:f}", f"{line.charged:f}",
            line.share_percent,
        )
        for line in found.lines
    ]  # fmt: skip


def test_by_reason_feature_and_by_whom(ledger: Ledger, database: str, connection: psycopg.Connection[Any]) -> None:
    freeze(ledger, START)
    for name in ("a", "b"):
        ledger.apply("credits.open", "open", account=name)
    for place in range(4):
        ledger.apply("credits.consume", f"i-{place}", account="a", feature="image", quantity=16)
    ledger.apply("credits.consume", "x", account="b", feature="context")
    ledger.apply("credits.consume", "plain", account="b", amount=5)
    ledger.apply("credits.hold", "job", account="b", feature="image", quantity=8)
    ledger.apply("credits.capture", "done", account="b", hold="job")
    ledger.apply("credits.refund", "early", account="a", operation="i-0", amount="0.5", reason="late")
    freeze(ledger, START + DAY)
    by: dict[str, dict[str, Any]] = {
        "r-1": {"account": "a", "operation": "i-0", "amount": 1, "reason": "blurred", "actor": "anna"},
        "r-2": {"account": "a", "operation": "i-1", "amount": 1, "reason": "blurred"},
        "r-3": {"account": "b", "operation": "done", "amount": "0.5", "reason": "blurred"},
        "r-4": {"account": "b", "operation": "x"},
        "r-5": {"account": "b", "operation": "plain", "amount": 3, "reason": "%s'; --", "actor": "anna"},
        "too much": {"account": "b", "operation": "plain", "amount": 3, "reason": "blurred"},
    }
    for id, content in by.items():
        ledger.apply("credits.refund", id, **content)
    ledger.apply("credits.consume", "i-9", account="a", feature="image", quantity=8)
    both: dict[str, Any] = {"since": date(2027, 3, 1), "until": date(2027, 3, 3)}
    second: dict[str, Any] = {"since": date(2027, 3, 2), "until": date(2027, 3, 3)}

    def look() -> None:
        found = refunds(connection, None, **both)
        assert told(found) == [
            ("%s'; --", "", "anna", 1, "3", "5", 60.0),
            ("blurred", "image", "", 2, "1.5", "10", 15.0),
            ("", "context", "", 1, "1", "1", 100.0),
            ("blurred", "image", "anna", 1, "1", "10", 10.0),
            ("late", "image", "", 1, "0.5", "10", 5.0),
        ]
        assert found is not None
        total = found.total
        assert (total.refunds, str(total.credits), str(total.charged), total.share_percent) == (6, "7", "16", 43.8)
        assert told(refunds(connection, None, by=["actor"], **both)) == [
            (None, None, "anna", 2, "4", "16", 25.0),
            (None, None, "", 4, "3", "16", 18.8),
        ]
        assert told(refunds(connection, None, by=["reason"], feature="image", **both)) == [
            ("blurred", None, None, 3, "2.5", "10", 25.0),
            ("late", None, None, 1, "0.5", "10", 5.0),
        ]
        assert told(refunds(connection, "a", by=["feature"], **second)) == [(None, "image", None, 2, "2", "1", 200.0)]
        assert told(refunds(connection, "b", by=["feature"], feature="", **second)) == [
            (None, "", None, 1, "3", "0", None)
        ]
        pages = []
        after: int | None = 0
        while after is not None:
            page = refunds(connection, None, limit=2, after=after, **both)
            assert page is not None
            assert page.total == found.total
            pages += page.lines
            after = page.next_after
        assert pages == found.lines

    look()
    with psycopg.connect(database, autocommit=True) as writer:
        roll_up(writer, lambda counted, until, cutoff: True)
    look()
    assert refunds(connection, "nobody") is None
    empty = refunds(connection, "a", until=date(2027, 1, 1))
    assert empty is not None
    assert (empty.lines, empty.total.refunds, empty.total.share_percent) == ([], 0, None)
    for options, sentence in (({"by": []}, "at least one"), ({"limit": 0}, "1 to 1000"), ({"after": -1}, "after")):
        with pytest.raises(ValueError, match=sentence):
            refunds(connection, None, **options)
