"""Gift codes whose time is over, and uses that nobody told the payer of."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from models.settings import settings
from schedules import codes
from tests.schedules.test_transfers import deliver, lose, totals
from tests.support import Ledger, rows, travel

LATER = timedelta(seconds=codes.AGE_SECONDS + 1)


@pytest.fixture
def sweep(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The task, in this process."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    yield lambda: tuple(codes.sweep.apply(throw=True).get().values())
    settings.cache_clear()


def test_codes_end_and_uses_are_told_of_again(ledger: Ledger, database: str, sweep: Any) -> None:
    for account in ("anna", "bert"):
        ledger.apply("credits.open", "open", account=account, kind="pool")
    ledger.apply("credits.grant", "grant", account="anna", amount=20, source="pack")
    ledger.apply("codes.issue", "brief", account="anna", codes=["AAAA", "BBBB"], amount=2, uses=3, expires_in=60)
    ledger.apply("codes.issue", "long", account="anna", codes=["CCCC"], amount=1)
    ledger.apply("codes.issue", "given", account="bert", codes=["GIVN"], amount=1, actor="boss", reason="party",
                 expires_in=60)  # fmt: skip
    for code in ("AAAA", "CCCC", "GIVN"):
        ledger.apply("codes.redeem", code, account="bert", code=code)
    told = rows(database, "SELECT task, operation, arguments::text FROM outbox ORDER BY operation")
    assert len(told) == 2
    lose(database)
    assert sweep() == (0, 0)  # nothing is over, and what tells of the uses may still be on its way
    travel(database, timedelta(seconds=61))
    assert ledger.apply("codes.redeem", "late", account="bert", code="BBBB")["code"] == "code_expired"
    assert sweep() == (2, 0)
    assert sweep() == (0, 0)  # they stand in the outbox
    assert [(each["status"], each["codes"]) for each in deliver(ledger, database)] == [("applied", 2), ("applied", 1)]
    assert rows(database, "SELECT code, status FROM codes ORDER BY 1") == [
        ("AAAA", "closed"), ("BBBB", "closed"), ("CCCC", "open"), ("GIVN", "closed"),
    ]  # fmt: skip
    assert totals(database) == (3, 0, 3)
    travel(database, LATER)
    assert sweep() == (0, 2)
    assert rows(database, "SELECT task, operation, arguments::text FROM outbox ORDER BY operation") == told
    assert {each["status"] for each in deliver(ledger, database)} == {"applied"}
    assert totals(database) == (0, 3, 3)
    assert sweep() == (0, 0)
