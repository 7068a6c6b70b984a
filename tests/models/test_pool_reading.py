"""A pool as it is reported: every member once, by the rules that charge it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from creditlane.reports import Pool
from models import cutoff
from models.catalog import parse_catalog
from models.pool_reading import pool
from models.usage import roll_up
from tests.proof import freeze, job
from tests.support import Ledger

START = datetime(2027, 3, 31, 9, tzinfo=UTC)
CATALOG = parse_catalog(
    '[catalog]\nname = "pools"\n[features.export]\nprice = "0"\n[pools]\nmember_limit = 10\nperiod = "day"\n',
    "pools.toml",
)


def charge(identity: str, amount: int, member: str | None, name: str = "consume", **more: Any) -> Any:
    named = {} if member is None else {"member": member}
    return job(f"credits.{name}", identity, account="studio", amount=amount, **named, **more)


def lines(found: Pool) -> list[tuple[Any, ...]]:
    return [
        (each.member, each.status, each.limit, each.period, each.used, each.left, each.charged, each.share_percent)
        for each in found.members
    ]


def test_a_pool_and_its_members(ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutoff, "CLOCK_MARGIN", timedelta(0))
    ledger.writer.catalog = lambda: CATALOG
    freeze(ledger, START)
    ledger.write(
        job("credits.open", "open", account="studio", kind="pool"),
        job("credits.open", "open", account="user"),
        job("credits.grant", "grant", account="studio", amount=100, source="pack"),
        *(
            job("pools.set_member", f"list-{name}", account="studio", member=name, **terms)
            for name, terms in (
                ("ann", {"limit": 30, "period": "month"}),
                ("bob", {}),
                ("Zoë", {"limit": 0}),
                ("old", {"limit": 5}),
            )
        ),
        charge("c-1", 16, "ann"),
        charge("c-2", 4, "bob"),
        charge("c-3", 2, "cy"),
        charge("c-4", 1, "old"),
        charge("c-5", 5, None),
        charge("h-1", 3, "bob", name="hold", ttl=60),
        charge("h-2", 3, "ann", name="hold", ttl=86400),
        job("pools.remove_member", "remove", account="studio", member="old"),
        job("credits.consume", "c-6", account="user", amount=1, member="ann"),
    )
    with psycopg.connect(database, autocommit=True) as connection:
        roll_up(connection, lambda counted, until, cutoff: True)
        ledger.write(charge("c-7", 2, "ann"), job("credits.refund", "r-1", account="studio", operation="c-1", amount=4))
        freeze(ledger, START + timedelta(minutes=2))  # a hold's time is over, and nobody came since

        found = pool(connection, "studio", CATALOG)
        assert found is not None
        d = Decimal
        assert lines(found) == [
            ("Zoë", "listed", d(0), "month", d(0), d(0), d(0), 0.0),
            ("ann", "listed", d(30), "month", d(17), d(13), d(14), 53.8),
            ("bob", "listed", d(10), "day", d(4), d(6), d(4), 15.4),
            ("cy", "unlisted", d(10), "day", d(2), d(8), d(2), 7.7),
            ("old", "removed", d(5), "month", d(1), d(4), d(1), 3.8),
        ]
        assert (found.available, found.held, found.charged, found.own) == (d(71), d(3), d(26), d(5))
        assert found.open_to == "any"
        assert found.members[1].period_end == datetime(2027, 4, 1, tzinfo=UTC)
        assert found.members[2].period_end == datetime(2027, 4, 1, tzinfo=UTC)

        # A page has each of them once, with the same sums.
        pages, after = [], None
        while True:
            page = pool(connection, "studio", CATALOG, limit=2, after=after)
            assert page is not None
            assert (page.charged, page.own) == (found.charged, found.own)
            pages += page.members
            after = page.next_after
            if after is None:
                break
        assert pages == found.members
        whole = pool(connection, "studio", CATALOG, limit=5)
        assert whole is not None
        assert whole.next_after is None

        # The next period has begun, and in the days asked for nothing was charged.
        freeze(ledger, START + timedelta(days=1))
        later = pool(connection, "studio", CATALOG, since=date(2027, 4, 1), until=date(2027, 4, 2))
        assert later is not None
        assert [(each.member, each.used, each.charged, each.share_percent) for each in later.members] == [
            (name, d(0), d(0), None) for name in ("Zoë", "ann", "bob", "cy", "old")
        ]
        assert pool(connection, "user", CATALOG) is None
        assert pool(connection, "nobody", CATALOG) is None
        with pytest.raises(ValueError, match="1 to 1000"):
            pool(connection, "studio", CATALOG, limit=0)
        with pytest.raises(ValueError, match="not before"):
            pool(connection, "studio", CATALOG, since=date(2027, 4, 1), until=date(2027, 4, 1))


def test_a_pool_of_nobody(ledger: Ledger, database: str) -> None:
    ledger.apply("credits.open", "open", account="empty", kind="pool")
    with psycopg.connect(database, autocommit=True) as connection:
        found = pool(connection, "empty", CATALOG)
    assert found is not None
    assert not found.members
    assert (found.next_after, str(found.charged)) == (None, "0")
