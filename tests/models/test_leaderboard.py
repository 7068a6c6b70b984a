"""Who used and earned the most: what a plain sum over everything gives, in pages and by days, whatever is rolled up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import psycopg
import pytest

from creditlane.reports import Leaderboard, Ranked
from models import cutoff
from models.catalog import load_catalog, parse_catalog
from models.database import connect
from models.leaderboard import leaderboard
from models.usage import roll_up
from tests.support import Ledger
from tests.workers.test_ledger_writer import freeze, priced_by

START = datetime(2027, 3, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)
PACKS = load_catalog("packs")
NAMES = [f"user-{number}" for number in range(9)] + ["名前 🙂", "Zoë", "%s'; --"]
GIVING = parse_catalog(
    '[catalog]\nname = "giving"\n[sources.bonus]\ntransferable = true\n[sources.contest]\nearned = true\n'
    "[sources.promotion]\nearned = false\n",
    "giving.toml",
)


@pytest.fixture
def connection(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    monkeypatch.setattr(cutoff, "CLOCK_MARGIN", timedelta(0))
    with connect(database, "test of the leaderboard") as reader:
        yield reader


def told(found: Leaderboard) -> list[tuple[int, str, str]]:
    return [(line.rank, line.account, f"{line.credits:f}") for line in found.lines]


def expected(sums: Counter[str]) -> list[tuple[int, str, str]]:
    """Ranks by comparing everybody with everybody."""
    amounts = {name: amount for name, amount in sums.items() if amount > 0}
    ranked = [
        (1 + sum(1 for other in amounts.values() if other > amount), name, f"{Decimal(amount) / 10:f}")
        for name, amount in amounts.items()
    ]
    return sorted(ranked, key=lambda line: (line[0], line[1].encode()))


def all_pages(connection: psycopg.Connection[Any], limit: int, **options: Any) -> list[tuple[int, str, str]]:
    lines: list[tuple[int, str, str]] = []
    after = None
    while True:
        page = leaderboard(connection, PACKS, limit=limit, after=after, **options)
        lines += told(page)
        after = page.next_after
        if after is None:
            return lines
        assert len(page.lines) == limit


def test_who_used_most_ever_and_in_some_days(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    """Tenths of credits, few enough that many have as much as others; each day is rolled up after its half."""
    random = Random(7)
    ever, by_day = Counter[str](), [Counter[str]() for _ in range(4)]
    freeze(ledger, START - DAY)
    ledger.write(*(ledger.job("credits.open", "open", account=name) for name in NAMES))
    for number, used in enumerate(by_day):
        for half in range(2):
            freeze(ledger, START + number * DAY + half * DAY / 3)
            jobs = []
            for place in range(12):
                name, tenths = random.choice(NAMES), random.randint(1, 4)
                used[name] += tenths
                ever[name] += tenths
                id = f"c-{number}-{half}-{place}"
                jobs.append(ledger.job("credits.consume", id, account=name, amount=f"0.{tenths}"))
                if place % 3 == 0:
                    used[name] -= 1
                    ever[name] -= 1
                    jobs.append(ledger.job("credits.refund", f"r{id}", account=name, operation=id, amount="0.1"))
            ledger.write(*jobs)
            if not half:
                with psycopg.connect(database, autocommit=True) as writer:
                    roll_up(writer, lambda counted, until, cutoff: True)
    assert len({rank for rank, _, _ in expected(ever)}) < len(expected(ever)), "some have as much as others"
    for limit in (1, 2, 5, 1000):
        assert all_pages(connection, limit) == expected(ever)
        for first, last in ((0, 4), (1, 3), (2, 3)):
            days: dict[str, Any] = {"since": (START + first * DAY).date(), "until": (START + last * DAY).date()}
            assert all_pages(connection, limit, **days) == expected(sum(by_day[first:last], Counter[str]()))
    whole = leaderboard(connection, PACKS)
    assert (whole.accounts, whole.total) == (len(whole.lines), sum(line.credits for line in whole.lines))
    for line in whole.lines:
        page = leaderboard(connection, PACKS, account=line.account, limit=1, after=whole.lines[2].account)
        assert page.own == line
        assert page.lines == [whole.lines[3]]
    assert leaderboard(connection, PACKS, account="nobody").own is None
    assert leaderboard(connection, PACKS, after="nobody").lines == []
    assert leaderboard(connection, PACKS, until=date(2027, 3, 1)).lines == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"limit": 0}, "1 to 1000"), ({"since": date(2027, 1, 2), "until": date(2027, 1, 2)}, "not before")],
)
def test_what_makes_no_sense(options: dict[str, Any], sentence: str, connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(ValueError, match=sentence):
        leaderboard(connection, PACKS, **options)


def deliver(ledger: Ledger) -> None:
    """What follows from operations, until nothing does."""
    while waiting := ledger.writer.take_outbox():
        for row in waiting:
            ledger.apply(row.task, row.operation, **json.loads(row.arguments))


def test_who_earned_most(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    with priced_by(ledger, GIVING):
        freeze(ledger, START)
        for name in ("a", "b", "c", "d"):
            ledger.apply("credits.open", "open", account=name)
        grants: list[tuple[str, int, dict[str, Any]]] = [
            ("a", 10, {"source": "bonus"}),
            ("a", 500, {"source": "pack", "purchase": "p"}),
            ("b", 4, {"source": "referral"}),
            ("b", 99, {"source": "bonus", "unit_price": {"minor": 1, "currency": "EUR"}}),
            ("b", 99, {"source": "bonus", "purchase": "p-2"}),
            ("c", 50, {"source": "promotion"}),
            ("c", 8, {"source": "contest"}),
        ]
        for place, (name, amount, content) in enumerate(grants):
            ledger.apply("credits.grant", f"g-{place}", account=name, amount=amount, **content)
        ledger.apply("credits.revoke", "v", account="c", grant=2, amount=3)
        freeze(ledger, START + DAY)
        ledger.apply("credits.transfer", "t-1", account="a", to="d", amount=100)
        deliver(ledger)
        ledger.apply("credits.transfer", "t-2", account="d", to="a", amount=30)
        deliver(ledger)
        ledger.apply("codes.issue", "i", account="a", codes=["GIFTCODE"], amount=6)
        ledger.apply("codes.issue", "j", account="a", codes=["PROMOCODE"], amount=7, actor="anna", reason="fair")
        for name, code in (("b", "GIFTCODE"), ("b", "PROMOCODE")):
            assert ledger.apply("codes.redeem", f"of-{code}", account=name, code=code)["status"] == "applied"
        ledger.apply("credits.open", "open", account="lead", kind="lead")
        ledger.apply("credits.grant", "g", account="lead", amount=20, source="lead")
        ledger.apply("credits.open", "open", account="e")
        ledger.apply("credits.convert", "e", account="lead", to="e")
        deliver(ledger)
        asked: dict[str, Any] = {"by": "earned"}
        found = leaderboard(connection, GIVING, account="d", **asked)
        assert told(found) == [(1, "d", "70"), (2, "a", "10"), (2, "b", "10"), (4, "c", "5")]
        assert found.own == Ranked(rank=1, account="d", credits=Decimal(70))
        assert found.total == 95
        second: dict[str, Any] = {"since": date(2027, 3, 2), "until": date(2027, 3, 3)}
        assert told(leaderboard(connection, GIVING, **asked, **second)) == [(1, "d", "70"), (2, "b", "6")]
        assert [line[1:] for line in told(leaderboard(connection, PACKS, **asked))] == [
            ("d", "70"), ("c", "50"), ("b", "17"), ("a", "10"),
        ]  # fmt: skip
