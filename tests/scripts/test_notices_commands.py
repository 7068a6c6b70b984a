"""``creditlane notices``: the inbox as an operator sees it, what was given up, and trying it again."""

from __future__ import annotations

import pytest

from tests.scripts.test_command_line import Run, one, run, several
from tests.support import Ledger, execute, rows

__all__ = ["run"]

MAKE = """
INSERT INTO notices (account, key, kind, at, created_at, details, channels, read_at) VALUES
('alice', 'refunded:1', 'refunded', '2026-11-20T10:00:00Z', '2026-11-20T10:00:00Z', '{"amount": "1.5"}', '{email}',
 now()),
('alice', 'gift_received:2', 'gift_received', '2026-11-21T10:00:00Z', '2026-11-21T10:00:00Z',
 '{"amount": "3", "sender": "bob", "message": "[red]hi"}', '{email,webhook}', NULL);
INSERT INTO deliveries (account, key, channel, status, attempts, next_attempt_at, sent_at, error) VALUES
('alice', 'refunded:1', 'email', 'sent', 0, NULL, now(), NULL),
('alice', 'gift_received:2', 'email', 'parked', 10, NULL, NULL, 'the mail server refused it: reply 450'),
('alice', 'gift_received:2', 'webhook', 'pending', 2, '2026-11-21T10:06:00Z', NULL, 'the receiver answered HTTP 500')
"""


@pytest.fixture
def told(ledger: Ledger, database: str) -> None:
    """An account with two notices, one of which did not go out."""
    ledger.apply("credits.open", "open", account="alice")
    ledger.apply("credits.open", "open", account="parked")
    execute(database, MAKE)


def test_the_inbox(run: Run, told: None) -> None:
    shown = run("notices", "alice").stdout
    newest, older, counts = (line for line in shown.splitlines()[1:] if line.strip())
    assert "You have been given 3 credits" in newest
    assert "unread" in newest
    assert "email parked, webhook pending, again 2026-11-21 10:06:00" in newest
    assert "1.5 credits given back" in older
    assert "email sent" in older
    assert counts == "1 unread of 2"
    assert "refunded:1" not in run("notices", "alice", "--unread").stdout
    page = one(run("notices", "alice", "--limit", "1", "--json"))
    assert ([notice["key"] for notice in page["notices"]], page["unread"], page["total"]) == (["gift_received:2"], 1, 2)
    rest = one(run("notices", "list", "alice", "--before", page["next_before"], "--json"))
    assert [notice["key"] for notice in rest["notices"]] == ["refunded:1"]
    # An account may have a command's name.
    assert "0 unread of 0" in run("notices", "list", "parked").stdout


def test_what_is_no_account_or_no_place(run: Run, told: None) -> None:
    assert "unknown_account" in run("notices", "nobody", code=3).stderr
    assert "no place in an inbox" in run("notices", "alice", "--before", "x", code=2).stderr


def test_what_was_given_up_is_tried_again(run: Run, told: None, database: str) -> None:
    assert "the mail server refused it: reply 450" in run("notices", "parked").stdout
    (given_up,) = several(run("notices", "parked", "--json"))
    assert (given_up["account"], given_up["key"], given_up["channel"]) == ("alice", "gift_received:2", "email")
    assert "by email" in run("notices", "retry", "alice", "gift_received:2", "--channel", "email").stdout
    assert "nothing was given up" in run("notices", "parked").stdout
    assert one(run("notices", "retry", "alice", "gift_received:2", "--json"))["channels"] == ["email", "webhook"]
    due = rows(database, "SELECT channel, status, attempts, next_attempt_at <= ledger_now() FROM deliveries"
                         " WHERE key = 'gift_received:2' ORDER BY 1")  # fmt: skip
    assert due == [("email", "pending", 0, True), ("webhook", "pending", 2, True)]
    for key in ("refunded:1", "none"):
        assert "nothing to try again" in run("notices", "retry", "alice", key, code=2).stderr
