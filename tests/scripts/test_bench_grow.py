"""The ledger that is filled for the bench: a true one, with every index that was there before."""

from __future__ import annotations

import psycopg
import pytest

from scripts.bench_grow import fill, sizes
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


def test_only_an_empty_ledger_is_filled(database: str, ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="not enough"):
        fill(database, 2, 1, lambda done, total: None)
    ledger.apply("credits.open", "open", account="a")
    before = schema(database)
    with pytest.raises(ValueError, match="empty"):
        fill(database, 1, 1, lambda done, total: None)
    assert schema(database) == before


def test_sizes_are_of_every_table_and_index(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        assert sizes(connection)["operations.operations_pkey"] == 8192  # a page, for no operation yet
        fill(database, 1_000, 2_000, lambda done, total: None)
        taken = sizes(connection)
        indexes = connection.execute("SELECT tablename || '.' || indexname FROM pg_indexes WHERE tablename = ANY(%s)",
                                     (["operations", "entries", "accounts", "grants"],)).fetchall()  # fmt: skip
    assert {index for (index,) in indexes} == {name for name in taken if "." in name}
    assert taken["total"] == pytest.approx(sum(size for name, size in taken.items() if name != "total"))
    assert 100 < taken["operations"] < 1000
