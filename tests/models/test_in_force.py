"""The catalog in force: what is taken up of a file that changes, what is refused, and what the ledger keeps of it."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest

from models import in_force
from models.catalog import CatalogError
from models.catalog_texts import kept_catalogs, kept_texts
from models.in_force import InForce
from tests.support import rows

MINE = """
[catalog]
name = "mine"
version = {version}

[features.image]
price = "{price}"
"""


def text(version: int, price: str) -> str:
    """A catalog's file."""
    return MINE.format(version=version, price=price)


@pytest.fixture(autouse=True)
def looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look comes with the second call."""
    monkeypatch.setattr(in_force, "LOOK_SECONDS", 0.0)


def test_a_file_that_changes_is_taken_up_and_one_that_is_wrong_is_refused(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.toml"
    with psycopg.connect(database, autocommit=True) as connection:

        def looked(found: InForce, times: int = 2) -> str:
            for _ in range(times):
                catalog = found.catalog(connection)
            return f"{catalog.label} at {catalog.features['image'].price // 1_000_000}"

        path.write_text(text(1, "1"))
        mine = InForce(str(path), applies=True)
        assert rows(database, "SELECT label FROM catalogs") == []
        assert looked(mine, 1) == "mine-1 at 1"
        assert rows(database, "SELECT label, text FROM catalogs") == [("mine-1", text(1, "1"))]

        # Half a file: what cannot be read is refused, what might make sense is not read before it stands still.
        path.write_text(text(2, "2")[:-3])
        assert looked(mine, 5) == "mine-1 at 1"
        assert mine.refused is not None
        assert mine.refused.startswith(f"{path}: not TOML: ")
        assert caplog.text.count("is refused, mine-1 stays in force") == 1
        for price in ("20", "21", "22"):
            path.write_text(text(2, price))
            assert looked(mine, 1) == "mine-1 at 1"
        (tmp_path / "new").write_text(text(2, "2"))
        os.replace(tmp_path / "new", path)
        assert looked(mine) == "mine-2 at 2"
        assert mine.refused is None
        assert "mine-2 is in force, after mine-1" in caplog.text

        # Other content under a label that was used is refused; other comments are no other content.
        path.write_text(text(2, "3"))
        assert looked(mine) == "mine-2 at 2"
        assert mine.refused == (
            f"{path}: catalog.version: mine-2 was used with other content (features.image.price was 2, is 3);"
            " raise version"
        )
        begun = InForce(str(path), applies=True)
        assert looked(begun) == "mine-2 at 2"
        assert begun.refused == mine.refused
        begun.forget()
        assert looked(begun) == "mine-2 at 2"
        path.write_text("# as it was\n" + text(2, "2.000"))
        assert looked(mine) == looked(begun) == "mine-2 at 2"
        assert (mine.refused, begun.refused) == (None, None)
        path.unlink()
        assert looked(mine) == "mine-2 at 2"
        assert "cannot be read" in str(mine.refused)

        # Whoever only reads notes nothing, and heeds what is noted. Who is behind is told once.
        path.write_text(text(3, "7"))
        reader = InForce(str(path))
        assert looked(reader) == "mine-3 at 7"
        path.write_text(text(1, "9"))
        assert looked(reader) == "mine-3 at 7"
        path.write_text(text(1, "1"))
        assert looked(mine) == "mine-1 at 1"
        caplog.clear()
        assert [mine.compare(connection) for _ in range(3)] == [True] * 3
        assert caplog.text.count("mine-1 is in force here and version 2 was elsewhere") == 1
        assert [label for label, *_ in kept_texts(connection)] == ["mine-1", "mine-2"]
        assert kept_catalogs(connection)["mine-2"].features["image"].price == 2_000_000

        # A text of before that the rules of today would not take is other content, and nothing to replay with.
        connection.execute("INSERT INTO catalogs VALUES ('mine-5', '[catalog]', now()), ('other-7', '[', now())")
        assert set(kept_catalogs(connection)) == {"mine-1", "mine-2"}
        path.write_text(text(5, "1"))
        with pytest.raises(CatalogError):
            InForce(str(path)).catalog(connection)
        assert looked(mine) == "mine-1 at 1"
        assert "mine-5 was used with other content (which cannot be read any more" in str(mine.refused)


def test_a_process_does_not_begin_without_a_catalog(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(CatalogError, match="cannot be read"):
        InForce(str(path))
    path.write_text("[catalog]\n")
    with pytest.raises(CatalogError, match="missing required field `name`"):
        InForce(str(path))


def test_a_ledger_that_is_away_is_asked_again(database: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text(1, "1"))
    mine = InForce(str(path), applies=True)
    with psycopg.connect(database, autocommit=True) as gone:
        pass
    for _ in range(2):
        with pytest.raises(psycopg.OperationalError):
            mine.catalog(gone)
    with psycopg.connect(database, autocommit=True) as connection:
        mine.catalog(connection)
        path.write_text(text(2, "2"))
        mine.catalog(connection)
        with pytest.raises(psycopg.OperationalError):
            mine.catalog(gone)
        assert mine.last.label == "mine-1"
        assert mine.catalog(connection).label == "mine-2"
