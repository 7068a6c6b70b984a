"""``creditlane referrals``, as an operator types it, against a real worker."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from creditlane.client import CODE_CHARACTERS, CreditClient, made_code
from tests.conftest import LANES, Spawn
from tests.scripts.test_command_line import Run, one, run
from tests.support import eventually, owned_lanes, travel, value

__all__ = ["run"]

CATALOG = """
[catalog]
name = "refer"
[referrals]
referrer = "5"
referee = "3"
claim_days = 30
"""


@pytest.fixture
def refer_worker(spawn: Spawn, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane worker whose catalog gives bonuses at once."""
    path = tmp_path / "refer.toml"
    path.write_text(CATALOG, encoding="utf-8")
    monkeypatch.setenv("CREDITLANE_CATALOG", str(path))
    spawn("worker", CREDITLANE_CATALOG=str(path))
    eventually(lambda: owned_lanes(database) == LANES)


def test_the_life_of_a_code(run: Run, database: str, client: CreditClient, refer_worker: None) -> None:
    for account in ("alice", "bob"):
        run("account", "open", account)
    assert "none yet" in run("referrals", "show", "alice").stdout
    issued = run("referrals", "issue", "alice", "--code", "alice-2026").stdout
    assert "alice refers others by the code ALICE2026" in issued
    assert one(run("referrals", "issue", "alice", "--json"))["referral_code"] == "ALICE2026"
    assert "code_exists" in run("referrals", "issue", "bob", "--code", "ALICE 2026", code=3).stderr
    claimed = run("referrals", "claim", "bob", "Alice-2026").stdout
    assert "bob was referred by alice" in claimed
    assert "3 credits" in claimed
    assert "already_referred" in run("referrals", "claim", "bob", "alice-2026", code=3).stderr
    assert "code_unknown" in run("referrals", "claim", "bob", "nobodys", code=3).stderr
    assert "self_referral" in run("referrals", "claim", "alice", "alice-2026", code=3).stderr
    opened = one(run("account", "open", "carol", "--referral-code", "alice-2026", "--json"))
    assert (opened["referral"], opened["referrer"], opened["bonus"]) == ("claimed", "alice", "3")
    assert "code_unknown" in run("account", "open", "dave", "--referral-code", "nobodys").stdout
    eventually(lambda: value(database, "SELECT referees FROM referrals WHERE account = 'alice'") == 2)
    shown = run("referrals", "show", "alice").stdout
    assert "ALICE2026" in shown
    assert shown.index("carol") < shown.index("bob")
    assert shown.count("rewarded ") >= 2
    page = one(run("referrals", "show", "alice", "--limit", "1", "--json"))
    assert [(each["account"], each["status"], each["reward"]) for each in page["referees"]] == [
        ("carol", "rewarded", "5")
    ]
    assert "bob" in run("referrals", "show", "alice", "--before", page["next_before"]).stdout
    assert "alice, by ALICE2026" in run("referrals", "show", "bob").stdout
    assert "no place" in run("referrals", "show", "alice", "--before", "x", code=2).stderr
    assert "unknown_account" in run("referrals", "show", "nobody", code=3).stderr
    assert "$.code" in run("referrals", "claim", "bob", "ä", code=2).stderr
    made = client.issue_referral("bob", id="issue", wait=20)
    again = client.issue_referral("bob", id="issue", wait=20)
    assert made is not None
    assert again is not None
    assert made.referral_code == again.referral_code == made_code("bob", "issue")
    assert len(made_code("bob", "issue")) == CODE_CHARACTERS
    assert again.replayed
    travel(database, timedelta(days=31))
    assert "within 30 days" in run("referrals", "claim", "dave", "alice-2026", code=3).stderr
