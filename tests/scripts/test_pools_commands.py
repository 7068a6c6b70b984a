"""``creditlane pools``, as an operator types it, against a real worker."""

from __future__ import annotations

from tests.scripts.test_command_line import Run, one, run
from tests.support import Worker

__all__ = ["run"]


def test_the_members_of_a_pool(run: Run, lane_worker: Worker) -> None:
    assert "'studio' is no pool" in run("pools", "show", "studio", code=3).stderr
    run("account", "open", "studio", "--kind", "pool")
    run("grant", "studio", "100", "--source", "pack", "--reason", "test")
    assert "whoever is named as one" in run("pools", "show", "studio").stdout
    listed = run("pools", "set-member", "studio", "alice", "--limit", "2.5", "--period", "total").stdout
    assert "alice may use studio for 2.5 credits in each period" in " ".join(listed.split())
    assert one(run("pools", "set-member", "studio", "bob", "--json"))["member"] == "bob"
    run("consume", "studio", "--amount", "1.5", "--member", "alice")
    refused = run("consume", "studio", "--amount", "2", "--member", "alice", code=3).stderr
    assert "member_limit: 2 credits needed, 1 available, 1 short; alice may use 2.5." in " ".join(refused.split())
    assert "no more" in run("pools", "remove-member", "studio", "bob").stdout
    assert "unknown_member" in run("pools", "remove-member", "studio", "bob", code=3).stderr
    assert "unknown_member" in run("consume", "studio", "--amount", "1", "--member", "bob", code=3).stderr
    shown = run("pools", "show", "studio").stdout
    for words in ("98.5", "alice", "2.5", "total", "100 %", "bob", "removed"):
        assert words in shown
    page = one(run("pools", "show", "studio", "--limit", "1", "--json"))
    assert [(each["member"], each["left"]) for each in page["members"]] == [("alice", "1")]
    assert "--after 'alice'" in run("pools", "show", "studio", "--limit", "1").stdout
    rest = one(run("pools", "show", "studio", "--limit", "1", "--after", page["next_after"], "--json"))
    assert [each["member"] for each in rest["members"]] == ["bob"]
    assert "limit must not be negative" in run("pools", "set-member", "studio", "alice", "--limit", "-1", code=2).stderr
    assert "not before" in run("pools", "show", "studio", "--since", "2027-01-01", "--until", "2027-01-01",
                               code=2).stderr  # fmt: skip
