"""Expiry warnings: of each grant once at each of the catalog's days, while it has credits that will really expire."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from models.catalog import load_catalog
from models.settings import settings
from schedules import warnings
from tests.support import Ledger, execute, rows, travel, value
from workers import notices

DAY = 24 * 3600
CATALOG = """
[catalog]
name = "warned"
[plans.monthly]
monthly_credits = "100"
mode = "rollover"
rollover_cap = "100%"
[plans.paid]
monthly_credits = "100"
price = "9.00 EUR"
grace_days = 5
[notify]
expiry_days = [30, 7, 1]
channels = ["email"]
"""


@pytest.fixture
def environment(
    database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ledger: Ledger
) -> Iterator[None]:
    """The settings of a sweep in this process, pages that a few grants fill, and the ledger with the catalog."""
    (tmp_path / "warned.toml").write_text(CATALOG)
    for name, given in (
        ("DATABASE_URL", database), ("BROKER_URL", broker_url), ("CATALOG", str(tmp_path / "warned.toml")),
    ):  # fmt: skip
        monkeypatch.setenv(f"CREDITLANE_{name}", given)
    whole = warnings.EXPIRING_GRANTS
    assert whole.rstrip().endswith(f"LIMIT {warnings.PAGE}")
    monkeypatch.setattr(warnings, "EXPIRING_GRANTS", whole.replace(f"LIMIT {warnings.PAGE}", "LIMIT 2"))
    settings.cache_clear()
    notices.sender.cache_clear()
    catalog = load_catalog(settings().catalog)
    ledger.writer.catalog = lambda: catalog
    for account in ("alice", "bob", "carl"):
        ledger.apply("credits.open", "open", account=account)
    yield
    notices.sender().close()
    notices.sender.cache_clear()
    settings.cache_clear()


def sweep() -> int:
    """Run the task in this process."""
    return int(warnings.sweep.apply(throw=True).get()["warned"])


def warned(database: str) -> list[tuple[Any, ...]]:
    """The warnings, in order of account and grant."""
    return rows(
        database,
        "SELECT account, key, details->>'amount', (details->>'days')::int FROM notices WHERE kind = 'expiring'"
        " ORDER BY account, created_at, key",
    )


def test_each_grant_is_warned_of_once_at_each_of_the_days(
    environment: None, ledger: Ledger, database: str, broker_url: str
) -> None:
    for name, days in (("late", 40), ("soon", 5), ("month", 20), ("same", 20), ("other", 20), ("never", None)):
        life = {} if days is None else {"expires_in": days * DAY}
        ledger.apply("credits.grant", name, account="alice", amount=3, source="pack", **life)
    ledger.apply("credits.grant", "spent", account="bob", amount=3, source="pack", expires_in=5 * DAY)
    ledger.apply("credits.consume", "all", account="bob", amount=3)
    ledger.apply("credits.grant", "held", account="bob", amount=3, source="pack", expires_in=5 * DAY)
    ledger.apply("credits.hold", "all-held", account="bob", amount=3, ttl=30 * DAY)
    first = [("alice", f"expiring:{grant}:{days}", "3", days) for grant, days in ((2, 7), (3, 30), (4, 30), (5, 30))]
    assert sweep() == 4
    assert warned(database) == first
    with redis.Redis.from_url(broker_url) as store:
        assert store.llen("notices") == 4
    assert sweep() == 0
    ledger.apply("credits.consume", "one", account="alice", amount=1)
    travel(database, timedelta(days=13, hours=1))
    ledger.apply("credits.settle", "settled", account="alice")
    second = [("alice", f"expiring:{grant}:{days}", "3", days) for grant, days in ((1, 30), (3, 7), (4, 7), (5, 7))]
    assert sweep() == 4
    assert warned(database) == first + second
    travel(database, timedelta(days=33, hours=1))
    assert sweep() == 1, "the others have expired"
    assert warned(database)[-1] == ("alice", "expiring:1:7", "3", 7)
    details = value(database, "SELECT details FROM notices WHERE key = 'expiring:1:7'")
    assert set(details) == {"grant", "source", "amount", "expires_at", "days"}
    assert value(database, "SELECT %s::timestamptz = expires_at FROM grants WHERE grant_id = 1 AND account = 'alice'",
                 details["expires_at"])  # fmt: skip


def test_credits_of_a_plan_that_goes_on_are_not_warned_of(environment: None, ledger: Ledger, database: str) -> None:
    ledger.apply("plans.subscribe", "free", account="alice", plan="monthly")
    ledger.apply("plans.subscribe", "paid", account="bob", plan="paid")
    ledger.apply("plans.subscribe", "left", account="carl", plan="paid")
    assert sweep() == 0
    ledger.apply("plans.cancel", "leaves", account="carl")
    (end,) = rows(database, "SELECT period_end, period_end - ledger_now() FROM subscriptions WHERE account = 'carl'")
    travel(database, end[1] - timedelta(days=6))
    assert sweep() == 1, "carl's end with the period, and not five days later"
    assert [row[:2] for row in warned(database)] == [("carl", "expiring:1:7")]
    details = value(database, "SELECT details->>'expires_at' FROM notices")
    assert value(database, "SELECT %s::timestamptz", details) == end[0]
    # bob has not paid: his end with the days of grace.
    travel(database, end[1] + timedelta(hours=1))
    assert sweep() == 1
    assert warned(database)[0][:2] == ("bob", "expiring:1:7")


def test_without_channels_a_warning_stands_in_the_inbox_alone(
    environment: None, ledger: Ledger, database: str, tmp_path: Path, broker_url: str
) -> None:
    (tmp_path / "warned.toml").write_text(CATALOG.replace('channels = ["email"]', ""))
    ledger.apply("credits.grant", "soon", account="alice", amount=3, source="pack", expires_in=5 * DAY)
    assert sweep() == 1
    assert rows(database, "SELECT channels, delivered_at IS NULL FROM notices") == [([], False)]
    with redis.Redis.from_url(broker_url) as store:
        assert store.llen("notices") == 0


def test_without_days_nobody_is_warned(environment: None, ledger: Ledger, database: str, tmp_path: Path) -> None:
    (tmp_path / "warned.toml").write_text(CATALOG.replace("expiry_days = [30, 7, 1]", ""))
    ledger.apply("credits.grant", "soon", account="alice", amount=3, source="pack", expires_in=5 * DAY)
    assert value(database, "SELECT count(*) FROM grants") == 1
    assert sweep() == 0


def test_its_page_is_read_by_the_index(environment: None, ledger: Ledger, database: str) -> None:
    ledger.apply("credits.grant", "soon", account="alice", amount=3, source="pack", expires_in=5 * DAY)
    execute(
        database,
        "INSERT INTO grants (account, grant_id, source, priority, effective_at, expires_at, created_at, operation,"
        " granted_micro, available_micro, is_open)"
        " SELECT account, n, source, priority, effective_at, expires_at + n * interval '1 hour', created_at, operation,"
        " 0, 0, false FROM grants, generate_series(2, 5000) n",
    )
    execute(database, "VACUUM (ANALYZE) grants")
    connection = ledger.writer.connection
    now = value(database, "SELECT ledger_now()")
    place = {"now": now, "until": now + timedelta(days=30), "expires_at": now, "account": "", "grant": 0}
    plan = str(connection.execute(f"EXPLAIN {warnings.EXPIRING_GRANTS}", place).fetchall())
    assert len(connection.execute(warnings.EXPIRING_GRANTS, place).fetchall()) == 1
    execute(database, "DELETE FROM grants WHERE grant_id > 1")
    assert "Index Scan using grants_expiring" in plan
    assert "Seq Scan on grants" not in plan
