"""The ledger that is filled for the bench: a true one, with every index that was there before."""

from __future__ import annotations

import psycopg
import pytest

from models.catalog import load_catalog
from scripts.bench_grow import fill, fill_subscribed, sizes
from scripts.bench_long import CATALOG, PLAN
from tests.models.test_migrate import schema
from tests.support import Ledger, rows, value


def test_it_is_a_ledger_as_the_lanes_write_one(database: str, ledger: Ledger) -> None:
    """Audited and replayed at the end of the test, as every ledger is; the lanes go on with it."""
    before = schema(database)
    told: list[tuple[int, int]] = []
    fill(database, 2_300, 5_000, lambda done, total: told.append((done, total)))
    assert schema(database) == before
    assert value(database, "SELECT count(*) FROM accounts") == 2_300
    assert value(database, "SELECT count(*) FROM entries") == 5_000
    assert value(database, "SELECT count(*) FROM operations") == 2_300 + 5_000  # opened; granted or charged
    assert value(database, "SELECT count(*) FROM operations WHERE status <> 'applied'") == 0
    assert rows(database, "SELECT min(seq), max(seq) FROM accounts") == [(2, 3)]  # spread evenly
    assert rows(database, "SELECT min(account), max(account) FROM accounts") == [("user_00000", "user_02299")]
    assert told[-1] == (5_000, 5_000)
    assert told == sorted(told)
    result = ledger.apply("credits.consume", "next", account="user_02299", amount="0.5")
    assert result["status"] == "applied"
    assert result["balance"]["available"] == "999999998.5"


def test_subscribers_whose_period_is_over_are_renewed_by_a_settle(database: str, ledger: Ledger) -> None:
    """Likewise audited; replayed not, as the catalog is the bench's own."""
    catalog = load_catalog(str(CATALOG))
    ledger.writer.catalog = lambda: catalog
    before = schema(database)
    due_at = fill_subscribed(database, 2_300, str(CATALOG), PLAN, lambda done, total: None)
    assert schema(database) == before
    assert rows(database, "SELECT DISTINCT next_due_at <= ledger_now(), available_micro / 1000000 FROM accounts") == [
        (True, 70)
    ]
    assert value(database, "SELECT count(*) FROM subscriptions WHERE period_end = %s", due_at) == 2_300
    result = ledger.apply("credits.settle", "s", account="user_02299")
    assert result["balance"]["by_source"] == {"rollover": "70", "monthly": "100"}
    (plan,) = rows(database, "SELECT number, period_start FROM subscriptions WHERE account = 'user_02299'")
    assert plan == (1, due_at)


def test_only_an_empty_ledger_is_filled(database: str, ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="not enough"):
        fill(database, 2, 1, lambda done, total: None)
    ledger.apply("credits.open", "open", account="a")
    before = schema(database)
    with pytest.raises(ValueError, match="empty"):
        fill(database, 1, 1, lambda done, total: None)
    assert schema(database) == before


def test_sizes_are_of_every_table_and_index(unused_database: str) -> None:
    with psycopg.connect(unused_database, autocommit=True) as connection:
        assert sizes(connection)["operations.operations_pkey"] == 8192  # a page, for no operation yet
        fill(unused_database, 1_000, 2_000, lambda done, total: None)
        taken = sizes(connection)
        indexes = connection.execute("SELECT tablename || '.' || indexname FROM pg_indexes WHERE tablename = ANY(%s)",
                                     (["operations", "entries", "accounts", "grants"],)).fetchall()  # fmt: skip
    assert {index for (index,) in indexes} == {name for name in taken if "." in name}
    assert taken["total"] == pytest.approx(sum(size for name, size in taken.items() if name != "total"))
    assert 100 < taken["operations"] < 1000
