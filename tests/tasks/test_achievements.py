"""Achievements: once for ever, in the operation that reaches them, however much is given back and used again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psycopg
import pytest

from creditlane.amounts import MICRO
from creditlane.contract import ReopenAccount, RewardReferral, ThawAccount
from creditlane.events import BY_NOTICE, matching
from models.achievement_reading import achievements
from models.audit import audit
from models.catalog import parse_catalog
from models.rules import state
from models.rules.catalog import NOTICE_KINDS
from models.rules.sharing import Referral
from models.rules.state import FROZEN, OPEN, achieved_at
from tasks.achievements import WITH_REFERRALS, reach
from tasks.events import events_of
from tasks.operation import Context, Need
from tasks.registry import OPERATIONS
from tasks.replay import Replayer
from tests.support import Ledger
from tests.tasks.test_operations import Lane, lane
from tests.workers.test_ledger_writer import freeze, priced_by

HEAD = """
[catalog]
name = "merits"
[priorities]
achievement = 5
[features.image]
price = "1"
"""
GOALS = """
[achievements.expert]
title = "Expert"
at = "10"
credits = "4"
expires_days = 1
[achievements.badge]
at = "5"
[achievements.friend]
measure = "referrals"
at = "2"
credits = "7"
"""
PLAIN = parse_catalog(HEAD, "merits.toml")
MERITS = parse_catalog(HEAD + GOALS + f"[notify]\nkinds = {list(NOTICE_KINDS)}\n", "merits.toml")


def brought(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(each["achievement"], each["credits"]) for each in result.get("achieved", [])]


def test_it_comes_with_the_operation_that_reaches_it_and_never_again() -> None:
    user = lane("100", catalog=MERITS)
    assert "achieved" not in user("consume", amount="4.999999")
    assert brought(user("consume", "second", amount="0.000001")) == [("badge", "0")]
    charged = user("consume", "third", amount=7)
    assert charged["achieved"] == [{"achievement": "expert", "credits": "4", "grant": 2}]
    assert charged["charged"] == "7"
    assert charged["grants"] == [{"grant": 1, "source": "pack", "amount": "7"}]
    assert charged["balance"]["by_source"] == {"achievement": "4", "pack": "88"}
    assert user.row is not None
    assert user.row.entries == 2, "the credits are of the same operation"
    assert [(entry.operation, entry.kind, entry.grant) for entry in user.account.entries[-2:]] == [
        ("third", "consumed", 1), ("third", "granted", 2),
    ]  # fmt: skip
    assert user.account.grants[2].expires_at == user.now + timedelta(days=1)
    for round in range(3):
        user("refund", operation="third", amount=1)
        assert "achieved" not in user("consume", f"again-{round}", amount=6)
    assert user.account.granted == 104 * MICRO
    assert achieved_at(user.account.achieved) == {"badge": 4, "expert": 5}


def test_what_is_given_back_is_not_used() -> None:
    user = lane("100", catalog=MERITS)
    for _ in range(20):
        charge = user("consume", amount=4)
        user("refund", operation=charge["id"])
    assert user.account.achieved is None
    user("hold", "job", amount=9)
    assert user.account.achieved is None, "what is held is not used"
    assert brought(user("capture", hold="job", amount=12)) == [("badge", "0"), ("expert", "4")]


def test_what_was_used_before_the_catalog_knew_of_it_counts_with_the_next_operation() -> None:
    user = lane("100", catalog=PLAIN)
    user("consume", amount=50)
    user.catalog = MERITS
    assert brought(user("consume", amount=1000)) == [], "a refused operation brings nothing"
    assert brought(user("settle")) == [("badge", "0"), ("expert", "4")]


def test_a_catalog_without_achievements_pays_none() -> None:
    user = lane("100", catalog=PLAIN)
    assert "achieved" not in user("consume", amount=100)
    assert user.account.achieved is None


def test_an_account_that_cannot_take_them_gets_them_later() -> None:
    user = lane("100", catalog=MERITS)
    user.account.status = FROZEN
    assert reach(user.account, user_message(), Context(user.now, MERITS, "x")) == []
    user.account.status = OPEN
    full = lane(*["1"] * 11, catalog=MERITS)
    for number in range(state.MAX_OPEN_GRANTS - 11):
        full("grant", amount=1, source="pack", priority=200 + number % 2)
    full("consume", amount="9.5")
    assert brought(full("adjust", amount="0.5", actor="a", reason="r")) == []
    assert brought(full("consume", amount="0.25")) == []
    full("grant", amount=1, source="pack")
    assert brought(full("consume", amount="0.25")) == [("expert", "4")], "a lot was used up, so there is room"


def user_message() -> RewardReferral:
    return RewardReferral(account="user_42", referee="bob", code="ABCDEFGH")


def test_referrals_count_where_they_grow() -> None:
    user = lane("100", catalog=MERITS)
    user.account.referral = Referral(referees=1)
    now = Context(user.now, MERITS, "x")
    assert reach(user.account, user_message(), now) == []
    user.account.referral.referees = 2
    assert "achieved" not in user("settle"), "others do not have referrals at hand"
    (friend,) = reach(user.account, user_message(), now)
    assert (friend.name, user.account.available) == ("friend", 107 * MICRO)
    assert reach(user.account, user_message(), now) == []


@pytest.mark.parametrize(("before", "after"), [("freeze", "thaw"), ("close", "reopen")])
def test_what_was_reached_by_referrals_while_an_account_was_shut_comes_when_it_opens(before: str, after: str) -> None:
    user = lane("100", catalog=MERITS)
    user(f"accounts.{before}", actor="ann", reason="a test")
    user.account.referral = Referral(referees=2)
    assert brought(user("settle")) == []
    assert brought(user(f"accounts.{after}", actor="ann", reason="a test")) == [("friend", "7")]


def test_what_measures_referrals_has_them_at_hand() -> None:
    thaw = ThawAccount(account="user_42", actor="ann", reason="a test")
    reopen = ReopenAccount(account="user_42", actor="ann", reason="a test")
    for message in (user_message(), thaw, reopen):
        assert isinstance(message, WITH_REFERRALS)
        find = OPERATIONS[message.operation].need
        assert find is not None
        assert Need("referral", "") in find(message)


def test_it_pays_a_debt_first_and_tells_of_itself() -> None:
    user = Lane(MERITS)
    user("open", kind="pool")
    user("grant", amount=10, source="pack", purchase="p-1")
    user("consume", amount=9)
    user("revoke", purchase="p-1")
    assert user.account.debt == 9 * MICRO
    user("grant", amount=12, source="pack")
    user.account.notices.clear()
    user.account.entries.clear()
    assert brought(user("consume", amount=1)) == [("expert", "4")]
    (notice,) = [each for each in user.account.notices if each.kind == "achievement"]
    assert (notice.key, notice.details) == (
        "achievement:expert", {"achievement": "expert", "title": "Expert", "amount": "4"},
    )  # fmt: skip
    (event,) = events_of(user.account, 0, matching("achievement.*"))
    assert (event["type"], event["details"]["title"]) == (BY_NOTICE["achievement"], "Expert")


def test_achievements_are_told_with_their_dates_and_stand_a_replay(ledger: Ledger, database: str) -> None:
    start = datetime(2027, 3, 1, 9, tzinfo=UTC)
    with priced_by(ledger, MERITS):
        freeze(ledger, start)
        ledger.apply("credits.open", "open", account="a")
        ledger.apply("credits.grant", "grant", account="a", amount=50, source="pack")
        ledger.apply("credits.consume", "c-1", account="a", amount=6)
        found = achievements(ledger.writer.connection, "a", MERITS)
        assert found is not None
        assert [(each.achievement, each.reached_at, each.operation) for each in found.reached] == [
            ("badge", start, "c-1")
        ]
        assert [(goal.title, goal.percent, str(goal.done), str(goal.at)) for goal in found.goals] == [
            ("Expert", 60.0, "6", "10"), ("friend", 0.0, "0", "2"),
        ]  # fmt: skip
        freeze(ledger, start + timedelta(hours=1))
        jobs = [ledger.job("credits.consume", f"d-{number}", account="a", amount=2) for number in range(20)]
        results = ledger.write(*jobs, ledger.job("credits.refund", "r", account="a", operation="d-0"))
        assert [brought(result) for result in results].count([("expert", "4")]) == 1
        assert brought(results[1]) == [("expert", "4")]
        again = ledger.apply("credits.consume", "d-1", account="a", amount=2)
        assert (again["replayed"], brought(again)) == (True, [("expert", "4")])
        found = achievements(ledger.writer.connection, "a", MERITS)
        assert found is not None
        assert [(each.title, str(each.credits), each.operation, each.grant) for each in found.reached] == [
            ("badge", "0", "c-1", None), ("Expert", "4", "d-1", 2),
        ]  # fmt: skip
    with psycopg.connect(database, autocommit=True) as connection:
        report = audit(connection, replayer=Replayer({MERITS.label: MERITS}))
        assert report.holds, report.faults
        assert report.is_whole
        changed = msgspec.structs.replace(MERITS, achievements={})
        report = audit(connection, replayer=Replayer({MERITS.label: changed}))
        assert not report.holds, "who would pay none would not have written this"
