"""A catalog replaced under a worker that runs: each operation by the one in force when it is applied."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import psycopg

from creditlane.client import CreditClient
from models.audit import audit
from models.catalog_texts import kept_catalogs
from scripts.embedded import free_port
from tasks.replay import Replayer
from tests.conftest import LANES, Spawn
from tests.support import eventually, owned_lanes, rows, value

MINE = """
[catalog]
name = "mine"
version = {version}

[signup]
credits = 1000

[features.image]
price = "{price}"
"""


def test_a_worker_takes_up_a_changed_catalog_and_the_audit_replays_both(
    spawn: Spawn, client: CreditClient, database: str, tmp_path: Path
) -> None:
    path, port = tmp_path / "mine.toml", free_port()
    path.write_text(MINE.format(version=1, price="1"))
    worker = spawn("worker", CREDITLANE_CATALOG=str(path), CREDITLANE_METRICS_PORT=str(port))
    eventually(lambda: owned_lanes(database) == LANES)
    sent = 0

    def charge(count: int) -> None:
        nonlocal sent
        with client.buffer(linger_ms=1) as buffer:
            for _ in range(count):
                sent += 1
                buffer.consume(f"user-{sent % 3}", feature="image", id=f"c-{sent}")

    def measured(name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name))

    for number in range(3):
        client.open(f"user-{number}", id="open")
    charge(30)
    new = MINE.format(version=2, price="0.5")
    path.write_text(new[: new.index('"0.5')])
    charge(30)
    eventually(lambda: "is refused, mine-1 stays in force" in worker.logged())
    eventually(lambda: measured("creditlane_catalog_refused") == 1)
    charge(30)
    eventually(lambda: value(database, "SELECT count(*) FROM operations WHERE name = 'credits.consume'") == sent)
    assert rows(database, "SELECT DISTINCT catalog FROM operations") == [("mine-1",)]
    (tmp_path / "new").write_text(new)
    os.replace(tmp_path / "new", path)
    charge(30)  # by the one or by the other
    eventually(lambda: measured("creditlane_catalog_version") == 2)
    charge(30)
    eventually(lambda: value(database, "SELECT count(*) FROM operations WHERE name = 'credits.consume'") == sent)
    assert measured("creditlane_catalog_refused") == 0

    charged = rows(
        database,
        "SELECT catalog, charged_micro, count(*)::int FROM operations WHERE name = 'credits.consume' GROUP BY 1, 2",
    )
    by_catalog = {(label, micro): count for label, micro, count in charged}
    assert set(by_catalog) == {("mine-1", 1_000_000), ("mine-2", 500_000)}
    assert by_catalog["mine-1", 1_000_000] >= 90
    assert by_catalog["mine-2", 500_000] >= 30
    assert rows(database, "SELECT label FROM catalogs ORDER BY first_used_at") == [("mine-1",), ("mine-2",)]
    path.write_text(MINE.format(version=1, price="1"))  # set back: it counts, and whoever watches is told
    eventually(lambda: measured("creditlane_catalog_behind") == 1)
    assert "mine-1 is in force here and version 2 was elsewhere" in worker.logged()
    path.unlink()
    with psycopg.connect(database, autocommit=True) as connection:
        report = audit(connection, replayer=Replayer(kept_catalogs(connection)))
    assert report.holds, report.faults
    assert (report.replayed, report.not_replayed) == (sent + 3, {})
