"""The scheduled audits and the seal, as tasks: what they answer, what Flower sees, how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from models.catalog import read_catalog
from models.catalog_texts import keep
from models.settings import settings
from schedules import audit, seal
from tests.proof import live, tamper
from tests.support import Ledger, rows, value


def configure(monkeypatch: pytest.MonkeyPatch, database: str, **more: str) -> None:
    """This process as a worker of a database."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    for name, setting in more.items():
        monkeypatch.setenv(name, setting)
    settings.cache_clear()


@pytest.fixture
def configured(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of the test's database."""
    configure(monkeypatch, database)
    yield
    settings.cache_clear()


@pytest.fixture
def tampered(tampered_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings of a database that may be tampered with."""
    configure(monkeypatch, tampered_database)
    yield
    settings.cache_clear()


def states(monkeypatch: pytest.MonkeyPatch, task: Any) -> list[dict[str, Any]]:
    """What a task tells of its progress, as Flower sees it."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(task, "update_state", lambda *, state, meta: told.append({"state": state, **meta}))
    return told


def test_the_daily_audit_replays_everything(configured: None, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    live(ledger, "a", "b")
    told = states(monkeypatch, audit.audit_all)
    assert audit.audit_all.apply(throw=True).get() == {
        "accounts": 2, "operations": 24, "entries": 30, "replayed": 24, "not_replayed": {}, "seals": 0,
    }  # fmt: skip
    assert told[-1]["state"] == "PROGRESS"
    assert (told[-1]["done"], told[-1]["total"]) == (24, 24)
    assert told[-1]["per_second"] > 0


def test_a_catalog_that_is_not_at_hand_is_told(
    database: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live(ledger, "a")
    configure(monkeypatch, database, CREDITLANE_CATALOG="metering")
    assert audit.audit_all.apply(throw=True).get()["not_replayed"] == {"packs-1": 12}
    assert "12 operations cannot be replayed: the catalog packs-1 is not at hand" in caplog.text
    configure(monkeypatch, database, CREDITLANE_CATALOG="metering", CREDITLANE_AUDIT_CATALOGS=" packs, ")
    assert audit.audit_all.apply(throw=True).get()["replayed"] == 12
    # What the ledger has kept is at hand, even where the file of today cannot be used.
    keep(ledger.writer.connection, read_catalog("packs"), "packs")
    configure(monkeypatch, database, CREDITLANE_CATALOG="nonesuch", CREDITLANE_AUDIT_CATALOGS="")
    assert audit.audit_all.apply(throw=True).get()["replayed"] == 12
    assert "without the catalog in force, which cannot be used: " in caplog.text
    settings.cache_clear()


def test_an_audit_that_finds_a_fault_fails_and_names_it(
    tampered: None, tampered_ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    live(tampered_ledger, "a")
    tamper(tampered_ledger, "UPDATE operations SET result = '{}' WHERE operation = 'c'")
    with pytest.raises(audit.AuditError, match="1 faults; the first: a, operations c: has another result"):
        audit.audit_all.apply(throw=True)
    assert "audit: a, operations c: has another result than the rules give" in caplog.text


def test_the_hourly_audit_goes_on_from_the_last(configured: None, ledger: Ledger, database: str) -> None:
    live(ledger, "a")
    assert audit.audit_since.apply(throw=True).get()["operations"] == 12
    assert audit.audit_since.apply(throw=True).get()["operations"] == 0
    assert value(database, "SELECT count(*) FROM audits") == 2


def test_the_daily_seal(configured: None, ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live(ledger, "a", "b")
    told = states(monkeypatch, seal.seal)
    made = seal.seal.apply(throw=True).get()
    ((number, root),) = rows(database, "SELECT number, encode(root, 'hex') FROM seals")
    assert made == {"number": number, "root": root, "accounts": 2}
    assert told[-1] == {"state": "PROGRESS", "accounts": 2}


def test_a_seal_that_has_to_wait_too_long_is_tried_again(
    database: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, database, CREDITLANE_SEAL_WAIT_SECONDS="0.2")
    told = states(monkeypatch, seal.seal)
    with psycopg.connect(database) as writer:
        writer.execute("SELECT 1")
        pid = writer.info.backend_pid

        def retry(*, exc: BaseException, **_: object) -> Exception:
            writer.rollback()
            return RuntimeError(f"again, because {exc}")

        monkeypatch.setattr(seal.seal, "retry", retry)
        with pytest.raises(RuntimeError, match=f"again, because transactions of these backends .* {pid};"):
            seal.seal.apply(throw=True)
        assert told == [{"state": "PROGRESS", "waiting_for": [pid]}]
        assert seal.seal.apply(throw=True).get()["number"] == 1
    settings.cache_clear()
