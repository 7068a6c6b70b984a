"""``creditlane codes``, as an operator types it, against a real worker."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.scripts.test_command_line import Run, one, run
from tests.support import Worker, value

__all__ = ["run"]


def codes_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_codes_singly_and_in_bulk(run: Run, database: str, lane_worker: Worker, tmp_path: Path) -> None:
    run("account", "open", "alice", "--kind", "pool")
    run("account", "open", "bob", "--kind", "pool")
    run("grant", "alice", "100", "--source", "pack")
    issued = run("codes", "issue", "--account", "alice", "--amount", "2", "--code", "spring-27", "--uses", "2",
                 "--message", "enjoy")  # fmt: skip
    assert "SPRI-NG27" in issued.stderr
    assert "4 credits taken from alice" in issued.stdout
    assert "code_exists" in run("codes", "issue", "--account", "bob", "--amount", "2", "--code", "SPRING27",
                                "--actor", "ann", "--reason", "a try", code=3).stderr  # fmt: skip
    assert one(run("codes", "redeem", "bob", "spring27", "--json"))["credits"] == "2"
    assert "code_used" in run("codes", "redeem", "bob", "SPRING27", code=3).stderr
    shown = run("codes", "show", "SPRING-27").stdout
    assert "1 of 2 times" in shown
    assert "bob" in shown
    assert one(run("codes", "show", "SPRING27", "--json"))["uses"][0]["account"] == "bob"
    assert "code_unknown" in run("codes", "show", "NONE", code=3).stderr
    assert "2 credits back to alice" in run("codes", "withdraw", "alice", "SPRING27").stdout
    assert "code_expired" in run("codes", "redeem", "alice", "SPRING27", code=3).stderr
    # In bulk: the file stands before anything is issued, and the command goes on with it.
    file = tmp_path / "codes.csv"
    bulk = ("codes", "issue", "--account", "alice", "--amount", "0.05", "--count", "2500", "--csv", str(file))
    assert "add --csv" in run(*bulk[:-2], code=2).stderr
    assert "insufficient_credits" in run(*bulk, code=3).stderr  # of three blocks the first was paid for
    assert len({row["code"] for row in codes_of(file)}) == 2500
    assert len({row["operation"] for row in codes_of(file)}) == 3
    assert value(database, "SELECT count(*) FROM codes WHERE account = 'alice'") == 1001
    run("grant", "alice", "100", "--source", "pack")
    assert "issued 1,500 codes, 1,000 were before" in run(*bulk).stdout
    assert one(run(*bulk, "--json")) == {"account": "alice", "codes": 2500, "before": 2500, "file": str(file)}
    assert value(database, "SELECT count(*) FROM codes WHERE account = 'alice'") == 2501
    other = run("codes", "issue", "--account", "alice", "--amount", "1", "--csv", str(file), code=2).stderr
    assert "not of alice, 1, 1" in other
    page = one(run("codes", "list", "--account", "alice", "--limit", "2", "--json"))
    after = run("codes", "list", "--account", "alice", "--limit", "2", "--after", page["next_after"])
    assert "more: --after" in after.stdout
    assert "is no code of" in run("codes", "list", "--account", "bob", "--after", page["next_after"], code=2).stderr
    state = tmp_path / "state.csv"
    assert "2,501 codes in" in run("codes", "list", "--account", "alice", "--csv", str(state)).stdout
    listed = codes_of(state)
    assert len({row["code"] for row in listed}) == 2501
    assert [row["status"] for row in listed if row["code"] == "SPRI-NG27"] == ["closed"]
    given = codes_of(file)[0]
    assert one(run("codes", "redeem", "bob", given["code"].lower(), "--json"))["credits"] == "0.05"
