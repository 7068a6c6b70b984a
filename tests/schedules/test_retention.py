"""Retention: what the catalog says is kept no longer goes, page by page, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from models.cutoff import alone
from models.settings import settings
from schedules import retention
from tests.proof import live
from tests.support import Ledger, execute, rows, travel, value

PAGE = 2

CATALOG = """
[catalog]
name = "brief"

[retention]
notices_days = 30
quarantine_days = 7
"""
NOTICES = """
INSERT INTO notices (account, key, kind, at, created_at, details, channels, delivered_at, read_at)
SELECT a, a || ':' || days, 'depleted', now(), now() - make_interval(days => days), '{}', '{email}',
       CASE WHEN days <> 99 THEN now() - make_interval(days => days) END, CASE WHEN days = 40 THEN now() END
FROM unnest('{a,b}'::text[]) AS a, unnest('{1,29,31,40,50,99}'::int[]) AS days
"""
DELIVERIES = """
INSERT INTO deliveries (account, key, channel, status, attempts)
SELECT account, key, channel, 'sent', 1 FROM notices, unnest('{email,webhook}'::text[]) AS channel
"""
QUARANTINE = """
INSERT INTO quarantine (digest, status, code, reason, queue, headers, body, received_at, resolved_at)
SELECT sha256(days::text::bytea), CASE WHEN days < 0 THEN 'open' WHEN days = 9 THEN 'replayed' ELSE 'dropped' END,
       '', '', '', '', '', now() - interval '1 year', CASE WHEN days > 0 THEN now() - make_interval(days => days) END
FROM unnest('{-1,6,8,9,-2,10,1,11}'::int[]) AS days
"""

Run = Callable[[str], dict[str, int]]


@pytest.fixture
def retain(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the task in this process, by a catalog; pages that a few rows fill."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    for name in ("OLD_NOTICES", "QUARANTINE"):
        statement = getattr(retention, name)
        assert f"LIMIT {retention.PAGE}" in statement
        monkeypatch.setattr(retention, name, statement.replace(f"LIMIT {retention.PAGE}", f"LIMIT {PAGE}"))

    def run(catalog: str) -> dict[str, int]:
        file = tmp_path / "catalog.toml"
        file.write_text(catalog, encoding="utf-8")
        monkeypatch.setenv("CREDITLANE_CATALOG", str(file))
        settings.cache_clear()
        found: dict[str, int] = retention.retain.apply(throw=True).get()
        return found

    for statement in (NOTICES, DELIVERIES, QUARANTINE):
        execute(database, statement)
    yield run
    settings.cache_clear()


def test_what_is_kept_no_longer_goes_and_nothing_else(
    retain: Run, ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(ledger, "a", "b")
    travel(database, timedelta(0))
    counted = "SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {})".format
    before = rows(database, counted("operations", "holds"))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(retention.retain, "update_state", lambda *, state, meta: told.append({"state": state, **meta}))
    assert retain(CATALOG) == {"notices": 6, "quarantined": 4}
    left = [(name, f"{name}:{days}") for name in "ab" for days in ("1", "29", "99")]
    assert rows(database, "SELECT account, key FROM notices WHERE kind = 'depleted' ORDER BY account, key") == left
    assert rows(database, "SELECT DISTINCT account, key FROM deliveries ORDER BY account, key") == left
    assert rows(database, "SELECT status, count(*) FROM quarantine GROUP BY status ORDER BY status") == [
        ("dropped", 2), ("open", 2),
    ]  # fmt: skip
    assert rows(database, counted("operations", "holds")) == before
    assert [each["notices"] for each in told[:1]] == [PAGE]
    assert told[-1]["quarantined"] == 4
    assert retain(CATALOG) == {"notices": 0, "quarantined": 0}


def test_a_quarantined_message_that_is_open_cannot_be_deleted(retain: Run, database: str) -> None:
    with pytest.raises(psycopg.errors.RestrictViolation, match="is open"):
        execute(database, "DELETE FROM quarantine")


def test_nothing_goes_unless_the_catalog_says_so(retain: Run, database: str) -> None:
    assert retain('[catalog]\nname = "long"') == {"notices": 0, "quarantined": 0}
    assert value(database, "SELECT count(*) FROM notices") == 12


def test_one_beside_another_leaves_at_once(retain: Run, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection, alone(connection, "retention"):
        assert retain(CATALOG) == {"notices": 0, "quarantined": 0}


def test_it_ends_in_time(retain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_SECONDS", 0)
    assert retain(CATALOG)["notices"] == PAGE
    assert retain(CATALOG)["notices"] == PAGE
