"""Pools: whose limit refuses what, what counts in which period, and what comes back to whom."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from creditlane.codes import Code
from models.catalog import parse_catalog
from models.rules.allowances import period_end, period_start
from models.rules.catalog import NOTICE_KINDS, Catalog
from models.rules.sharing import MEMBER
from tests.tasks.test_operations import CATALOG, Lane, refused

NOVEMBER = datetime(2026, 11, 20, 12, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)


def catalog(pools: str = "", rest: str = "") -> Catalog:
    return parse_catalog(f"{CATALOG}\n[plans.endless]\nunlimited = true\n[pools]\n{pools}\n{rest}\n", "pools.toml")


FREE = catalog()
LISTED = catalog('members = "listed"')
TEN = catalog("member_limit = 10")
DAILY = catalog('member_limit = 10\nperiod = "day"')
TOLD = catalog("member_limit = 10", f"[notify]\nkinds = {list(NOTICE_KINDS)}")


def pool(using: Catalog = FREE, credits: str = "100", now: datetime = NOVEMBER) -> Lane:
    """An open pool with so many credits."""
    made = Lane(using, now=now)
    made("open", kind="pool")
    made("grant", amount=credits, source="pack")
    return made


def listed(lane: Lane, member: str = "ann", **terms: Any) -> dict[str, Any]:
    result = lane("pools.set_member", member=member, **terms)
    assert result["status"] == "applied"
    return result


def used(lane: Lane, member: str = "ann") -> int | None:
    """Whole credits that are counted, None for nobody."""
    allowance = lane.account.allowances.get(MEMBER + member)
    return None if allowance is None else allowance.used // 1_000_000


def take(lane: Lane, amount: int | str, member: str | None = "ann", name: str = "consume", **more: Any) -> Any:
    return lane(name, amount=str(amount), **({} if member is None else {"member": member}), **more)


# Who may use a pool.


def test_nothing_is_kept_of_members_where_nothing_limits_them() -> None:
    lane = pool()
    hold = take(lane, 3, name="hold")
    assert "allowance" not in hold
    assert "allowance" not in take(lane, 3)
    lane("capture", hold=hold["id"], amount="5")
    assert lane.account.allowances == {}
    assert refused(take(lane, 93), Code.POOL_EXHAUSTED)


def test_only_a_pool_has_members_and_limits() -> None:
    lane = Lane(TEN, now=NOVEMBER)
    lane("open", kind="user")
    lane("grant", amount="100", source="pack")
    for name in ("set_member", "remove_member"):
        assert refused(lane(f"pools.{name}", member="ann"), Code.INVALID)
    assert take(lane, 20)["status"] == "applied"
    assert refused(take(lane, 90), Code.INSUFFICIENT_CREDITS)
    assert lane.account.allowances == {}


def test_who_was_removed_uses_the_pool_no_more_whoever_may_otherwise() -> None:
    for using in (FREE, LISTED, TEN):
        lane = pool(using)
        assert refused(lane("pools.remove_member", member="ann"), Code.UNKNOWN_MEMBER)
        listed(lane, limit=5)
        hold, other = take(lane, 1, name="hold"), take(lane, 1, name="hold")
        assert lane("pools.remove_member", member="ann")["status"] == "applied"
        assert refused(lane("pools.remove_member", member="ann"), Code.UNKNOWN_MEMBER)
        for name in ("consume", "hold"):
            assert refused(take(lane, 1, name=name), Code.UNKNOWN_MEMBER)
        assert refused(lane("consume", feature="export", member="ann"), Code.UNKNOWN_MEMBER)
        assert lane("capture", hold=hold["id"], amount="2")["status"] == "applied"
        assert lane("release", hold=other["id"])["status"] == "applied"
        assert used(lane) == 2
        listed(lane, limit=5)
        assert used(lane) == 2
        assert take(lane, 3)["allowance"]["left"] == "0"


def test_who_was_counted_but_never_listed_is_no_member_where_one_must_be() -> None:
    lane = pool(TEN)
    take(lane, 4)
    assert used(lane) == 4
    lane.catalog = LISTED
    assert refused(take(lane, 1), Code.UNKNOWN_MEMBER)
    assert refused(lane("pools.remove_member", member="ann"), Code.UNKNOWN_MEMBER)
    assert take(lane, 1, None)["status"] == "applied", "the pool's own use"
    listed(lane)
    assert take(lane, 90)["allowance"]["counted"] == "90"


# What refuses.


def test_the_limit_refuses_before_the_pool_does() -> None:
    lane = pool(credits="8")
    listed(lane, limit="7.5")
    take(lane, 2)
    for name in ("consume", "hold"):
        result = take(lane, 50, name=name)
        assert refused(result, Code.MEMBER_LIMIT)
        assert (result["required"], result["available"], result["shortfall"]) == ("50", "5.5", "44.5")
        assert (result["member"], result["limit"]) == ("ann", "7.5")
        assert result["period_end"] == "2026-12-01T00:00:00Z"
        assert "offer" not in result
    lane("adjust", amount="-3", actor="root", reason="test")
    for name in ("consume", "hold"):
        result = take(lane, 5, name=name)
        assert refused(result, Code.POOL_EXHAUSTED)
        assert (result["required"], result["available"], result["shortfall"]) == ("5", "3", "2")
        assert result["offer"]["pack"] == "small"
        assert "member" not in result
    assert used(lane) == 2


def test_a_part_is_the_least_of_both() -> None:
    lane = pool(credits="8")
    listed(lane, limit=6)
    result = take(lane, 50, partial=True)
    assert (result["charged"], result["required"], result["available"]) == ("6", "50", "6")
    assert result["allowance"]["left"] == "0"
    assert (result["member"], result["limit"]) == ("ann", "6")
    assert refused(take(lane, 1, partial=True), Code.MEMBER_LIMIT)
    listed(lane, limit=10)
    result = take(lane, 3, partial=True)
    assert (result["charged"], result["required"], result["available"], result["shortfall"]) == ("2", "3", "2", "1")
    assert "member" not in result
    assert refused(take(lane, 1, partial=True), Code.POOL_EXHAUSTED)
    assert used(lane) == 8


def test_what_costs_nothing_counts_nothing() -> None:
    lane = pool(TEN)
    listed(lane, limit=0)
    assert lane("consume", feature="export", member="ann")["status"] == "applied"
    assert refused(take(lane, "0.000001"), Code.MEMBER_LIMIT)
    lane("plans.subscribe", plan="endless")
    assert take(lane, 5)["charged"] == "0"
    assert take(lane, 5, "bob")["charged"] == "0"
    assert used(lane) == 0
    assert used(lane, "bob") is None


def test_a_limit_of_its_own_comes_before_that_of_all_with_its_period() -> None:
    lane = pool(DAILY)
    assert (listed(lane)["limit"], listed(lane)["period_end"]) == ("10", "2026-11-21T00:00:00Z")
    assert take(lane, 10)["allowance"]["period"] == "day"
    assert refused(take(lane, 1), Code.MEMBER_LIMIT)
    own = listed(lane, limit=30, period="week")
    assert (own["limit"], own["period_end"]) == ("30", "2026-11-23T00:00:00Z")
    assert used(lane) == 0, "a period of another kind"
    assert take(lane, 30)["allowance"]["left"] == "0"
    total = listed(lane, limit=1, period="total")
    assert "period_end" not in total
    assert "period_end" not in take(lane, 2)


def test_listing_again_keeps_what_was_used() -> None:
    lane = pool()
    listed(lane)
    assert "left" not in take(lane, 20)["allowance"]
    listed(lane, limit=15)
    assert take(lane, 1)["available"] == "0"
    listed(lane, limit=25)
    assert take(lane, 1)["allowance"]["left"] == "4"
    assert used(lane) == 21


# Periods.


@pytest.mark.parametrize(
    ("period", "now", "start", "end"),
    [
        ("day", "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00"),
        ("day", "2026-10-25T00:30", "2026-10-24T22:00", "2026-10-25T23:00"),
        ("week", "2026-03-29T21:59", "2026-03-22T23:00", "2026-03-29T22:00"),
        ("month", "2026-03-31T21:59", "2026-02-28T23:00", "2026-03-31T22:00"),
        ("month", "2026-12-31T23:00", "2026-12-31T23:00", "2027-01-31T23:00"),
        ("total", "2026-12-31T23:00", "1970-01-01T00:00", None),
    ],
)
def test_periods_are_those_of_the_calendar(period: str, now: str, start: str, end: str | None) -> None:
    at = datetime.fromisoformat(now + "+00:00")
    since = period_start(period, at, "Europe/Berlin")
    assert since == datetime.fromisoformat(start + "+00:00")
    assert period_end(period, since, "Europe/Berlin") == (end and datetime.fromisoformat(end + "+00:00"))


def test_every_day_ends_where_the_next_one_begins() -> None:
    for zone in ("UTC", "Europe/Berlin", "America/Havana", "Pacific/Apia", "Africa/Cairo", "America/Sao_Paulo"):
        for period in ("day", "week", "month"):
            since = period_start(period, datetime(2011, 1, 1, tzinfo=UTC), zone)
            while since < datetime(2012, 2, 1, tzinfo=UTC):
                end = period_end(period, since, zone)
                assert end is not None
                assert period_start(period, end - timedelta(microseconds=1), zone) == since
                assert period_start(period, end, zone) == end > since
                since = end


def test_a_period_is_half_open() -> None:
    lane = pool(TEN)
    take(lane, 10)
    lane.now = DECEMBER - timedelta(microseconds=1)
    assert refused(take(lane, 1), Code.MEMBER_LIMIT)
    lane.now = DECEMBER
    assert take(lane, 10)["allowance"]["since"] == "2026-12-01T00:00:00Z"


# What comes back.


def test_a_capture_corrects_what_its_hold_counted() -> None:
    lane = pool(TEN)
    less, more, most = (take(lane, 3, name="hold")["id"] for _ in range(3))
    assert used(lane) == 9
    result = lane("capture", hold=less, amount="1")
    assert (result["allowance"]["counted"], result["allowance"]["left"], used(lane)) == ("1", "3", 7)
    result = lane("capture", hold=more, amount="7")
    assert refused(result, Code.MEMBER_LIMIT)
    assert (result["required"], result["available"]) == ("4", "3")
    assert lane("capture", hold=more, amount="6")["allowance"] == {
        "member": "ann", "period": "month", "since": "2026-11-01T00:00:00Z", "counted": "6", "limit": "10",
        "period_end": "2026-12-01T00:00:00Z", "left": "0",
    }  # fmt: skip
    assert "allowance" not in lane("capture", hold=most, amount="0")
    assert used(lane) == 7


def test_a_pool_that_cannot_pay_what_is_more_than_held_is_exhausted() -> None:
    lane = pool(TEN, credits="4")
    hold = take(lane, 3, name="hold")
    assert refused(lane("capture", hold=hold["id"], amount="5"), Code.POOL_EXHAUSTED)
    assert used(lane) == 3


def test_what_is_released_or_runs_out_comes_back_to_its_member() -> None:
    lane = pool(TEN)
    first, _ = take(lane, 4, name="hold"), take(lane, 5, name="hold", ttl=60)
    lane("release", hold=first["id"])
    assert used(lane) == 5
    lane.wait(seconds=60)
    take(lane, 1, "bob")
    assert (used(lane), used(lane, "bob")) == (0, 1)


def test_what_was_held_in_an_earlier_period_gives_nothing_back_to_this_one() -> None:
    lane = pool(TEN, now=DECEMBER - timedelta(minutes=1))
    released, captured, _ = (take(lane, 2, name="hold", ttl=ttl)["id"] for ttl in (900, 900, 120))
    lane.now = DECEMBER
    take(lane, 9)
    lane("release", hold=released)
    assert used(lane) == 9
    assert lane("capture", hold=captured, amount="3")["allowance"]["counted"] == "1"
    assert used(lane) == 10
    lane("refund", operation=lane.row.operation if lane.row else "", amount="2")
    assert used(lane) == 9, "only the last credit was taken in this period"
    lane.wait(minutes=2)
    lane("settle")
    assert lane.account.held == 0
    assert used(lane) == 9


def test_a_refund_gives_back_to_the_period_of_its_charge() -> None:
    lane = pool(TEN)
    old = take(lane, 6)
    lane("refund", operation=old["id"], amount="2")
    assert used(lane) == 4
    lane.now = DECEMBER
    new = take(lane, 5)
    lane("refund", operation=old["id"])
    assert used(lane) == 5
    lane("refund", operation=new["id"], amount="5")
    assert used(lane) == 0


def test_what_was_taken_before_a_member_was_counted_gives_it_nothing_back() -> None:
    lane = pool()
    charge, hold, kept = take(lane, 20), take(lane, 4, name="hold"), take(lane, 3, name="hold")
    listed(lane, limit=10)
    assert used(lane) == 7, "what it holds is its use"
    take(lane, 3)
    lane("refund", operation=charge["id"])
    assert used(lane) == 10
    lane("release", hold=hold["id"])
    assert used(lane) == 6
    captured = lane("capture", hold=kept["id"])
    assert (captured["allowance"]["counted"], used(lane)) == ("3", 6)
    lane("refund", operation=captured["id"])
    assert used(lane) == 3


def test_a_count_begins_with_the_first_charge_under_a_limit_for_all() -> None:
    lane = pool()
    hold, later = take(lane, 4, name="hold"), take(lane, 5, name="hold")
    lane.catalog = TEN
    assert refused(take(lane, 2), Code.MEMBER_LIMIT)
    captured = lane("capture", hold=hold["id"], amount="2")
    assert (captured["allowance"]["left"], used(lane)) == ("3", 7)
    lane("release", hold=later["id"])
    assert used(lane) == 2


def test_a_period_of_another_kind_begins_with_what_is_held() -> None:
    lane = pool()
    listed(lane, limit=10, period="month")
    charge, hold = take(lane, 5), take(lane, 2, name="hold")
    listed(lane, limit=10, period="day")
    assert used(lane) == 2
    take(lane, 1)
    lane("refund", operation=charge["id"])
    assert used(lane) == 3, "it was counted by the month"
    lane("release", hold=hold["id"])
    assert used(lane) == 1


def test_a_count_that_began_anew_never_falls_below_nothing() -> None:
    lane = pool(now=DECEMBER)
    listed(lane, limit=10, period="month")
    charge = take(lane, 5)
    listed(lane, limit=10, period="day")
    take(lane, 1)
    lane("refund", operation=charge["id"], amount="2")
    assert used(lane) == 1, "the month began with the day, and is another period"
    listed(lane, limit=10, period="month")
    take(lane, 1)
    lane("refund", operation=charge["id"])
    assert used(lane) == 0


def test_a_thousand_producers_on_the_last_credit_of_a_member() -> None:
    lane = pool(credits="1000000")
    listed(lane, limit=1)
    answers = [take(lane, 1)["status"] for _ in range(1000)]
    assert answers.count("applied") == 1
    assert (used(lane), lane.account.consumed) == (1, 1_000_000)


# Notices.


def test_the_pool_is_told_once_that_a_member_reached_its_limit() -> None:
    lane = pool(TOLD, credits="1000")
    for amount in (9, 2, 2, 1, 1):
        take(lane, amount)
    told = [notice for notice in lane.account.notices if notice.kind == "member_limit"]
    assert len({notice.key for notice in told}) == 1
    assert told[0].details == {"member": "ann", "limit": "10", "period_end": DECEMBER}
    assert take(lane, 11, "bob")["code"] == "member_limit"
    lane.now = DECEMBER
    take(lane, 10)
    assert len({notice.key for notice in lane.account.notices if notice.kind == "member_limit"}) == 3


def test_a_charge_that_leaves_something_is_not_told_of() -> None:
    lane = pool(TOLD)
    take(lane, 9)
    take(lane, 100, None)
    assert [notice.kind for notice in lane.account.notices if notice.kind == "member_limit"] == []
