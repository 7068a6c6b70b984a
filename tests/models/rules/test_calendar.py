"""Calendar arithmetic: against a calendar that goes day by day, and the examples of the design."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.rules.calendar import LONGEST_MONTH, add_months, month_start, months_passed
from tests.oracle.plans import first_of_month, later

MONTHS = settings(deadline=None, database=None, derandomize=True, max_examples=150)

ZONES = st.sampled_from(
    ["UTC", "Europe/Paris", "Europe/Dublin", "America/New_York", "America/Sao_Paulo", "America/Asuncion",
     "America/Havana", "Pacific/Apia", "Pacific/Chatham", "Asia/Kathmandu", "Asia/Amman", "Asia/Pyongyang",
     "Africa/Casablanca", "Africa/Cairo", "Australia/Lord_Howe", "Antarctica/Troll"]
)  # fmt: skip
EPOCH = datetime(1990, 1, 1, tzinfo=UTC)
ANCHORS = st.one_of(
    st.integers(0, 32_000 * 86_400 * 10**6).map(lambda after: EPOCH + timedelta(microseconds=after)),
    st.integers(0, 32_000 * 48).map(lambda half_hours: EPOCH + timedelta(minutes=30 * half_hours)),
    st.sampled_from([datetime(2024, 1, day, hour, 30, tzinfo=UTC) for day in (29, 30, 31) for hour in range(24)]),
)  # fmt: skip


def at(wall: str, zone: str) -> datetime:
    """When a clock of a zone shows this, for a time that it shows once."""
    return datetime.fromisoformat(wall).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)


def walls(anchor: str, zone: str, months: int) -> list[str]:
    """What the zone's clocks show so many times a month after the other."""
    start = at(anchor, zone)
    return [f"{add_months(start, n, zone).astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M}" for n in range(months + 1)]


@MONTHS
@given(anchor=ANCHORS, months=st.integers(0, 60), zone=ZONES)
@example(datetime(2011, 11, 30, 22, tzinfo=UTC), 1, "Pacific/Apia")
@example(datetime(2011, 11, 30, 9, tzinfo=UTC), 1, "Pacific/Apia")
def test_months_are_those_of_a_calendar_that_goes_day_by_day(anchor: datetime, months: int, zone: str) -> None:
    assert add_months(anchor, months, zone) == later(anchor, months, zone)


@MONTHS
@given(anchor=ANCHORS, zone=ZONES)
def test_each_month_ends_after_it_begins_and_none_is_longer_than_the_longest(anchor: datetime, zone: str) -> None:
    begins = [add_months(anchor, n, zone) for n in range(40)]
    for one, next_one in pairwise(begins):
        assert one < next_one <= one + LONGEST_MONTH


@MONTHS
@given(anchor=ANCHORS, months=st.integers(0, 60), zone=ZONES, after=st.integers(0, 40 * 86_400))
def test_months_passed_is_the_last_one_that_has_begun(anchor: datetime, months: int, zone: str, after: int) -> None:
    begin = add_months(anchor, months, zone)
    assert months_passed(anchor, begin, zone) == months
    assert months_passed(anchor, begin - timedelta.resolution, zone) == max(0, months - 1)
    now = begin + timedelta(seconds=after)
    passed = months_passed(anchor, now, zone)
    assert add_months(anchor, passed, zone) <= now < add_months(anchor, passed + 1, zone)


@MONTHS
@given(anchor=ANCHORS, months=st.integers(1, 120), zone=ZONES)
def test_the_day_is_the_anchors_or_the_months_last(anchor: datetime, months: int, zone: str) -> None:
    start = anchor.astimezone(ZoneInfo(zone))
    end = add_months(anchor, months, zone).astimezone(ZoneInfo(zone))
    if end.replace(tzinfo=None).time() != start.replace(tzinfo=None).time() or zone == "Pacific/Apia":
        return  # put on by the clocks, which may lead to another day: compared above with the other calendar
    assert end.day == start.day or (end.day < start.day and (end + timedelta(days=1)).day == 1)


@MONTHS
@given(now=ANCHORS, zone=ZONES)
def test_a_calendar_month_begins_when_its_first_day_does(now: datetime, zone: str) -> None:
    start = month_start(now, zone)
    assert start == first_of_month(now, zone) <= now
    assert month_start(start, zone) == start
    assert start.astimezone(ZoneInfo(zone)).day == 1
    assert (start - timedelta.resolution).astimezone(ZoneInfo(zone)).month != now.astimezone(ZoneInfo(zone)).month


def test_before_its_beginning_no_month_has_passed() -> None:
    start = datetime(2026, 1, 31, tzinfo=UTC)
    assert months_passed(start, start - timedelta(days=400), "UTC") == 0


@pytest.mark.parametrize(
    ("anchor", "zone", "expected"),
    [
        pytest.param(
            "2026-01-31 09:00", "UTC", ["2026-01-31 09:00", "2026-02-28 09:00", "2026-03-31 09:00", "2026-04-30 09:00"],
            id="no drift to the 28th",
        ),
        pytest.param(
            "2028-01-30 00:00", "Europe/Paris", ["2028-01-30 00:00", "2028-02-29 00:00", "2028-03-30 00:00"],
            id="a leap year's February, and the clocks put on",
        ),
        pytest.param(
            "2026-02-28 02:30", "Europe/Paris", ["2026-02-28 02:30", "2026-03-28 02:30", "2026-04-28 02:30"],
            id="around a change of the clocks",
        ),
        pytest.param(
            "2026-02-08 02:30", "America/New_York", ["2026-02-08 02:30", "2026-03-08 03:30", "2026-04-08 02:30"],
            id="a time that is skipped moves forward, and does not stick",
        ),
        pytest.param(
            "2011-11-30 10:00", "Pacific/Apia", ["2011-11-30 10:00", "2011-12-31 10:00", "2012-01-30 10:00"],
            id="a day that is skipped",
        ),
        pytest.param(
            "2026-08-31 23:45", "Asia/Kathmandu", ["2026-08-31 23:45", "2026-09-30 23:45", "2026-10-31 23:45"],
            id="a quarter of an hour",
        ),
    ],
)  # fmt: skip
def test_examples(anchor: str, zone: str, expected: list[str]) -> None:
    assert walls(anchor, zone, len(expected) - 1) == expected


def test_a_leap_day_and_years_after_it() -> None:
    leap_day = datetime(2028, 2, 29, 12, tzinfo=UTC)
    assert add_months(leap_day, 12, "UTC") == datetime(2029, 2, 28, 12, tzinfo=UTC)
    assert add_months(leap_day, 48, "UTC") == datetime(2032, 2, 29, 12, tzinfo=UTC)


def test_of_a_time_that_occurs_twice_the_first_is_meant() -> None:
    start = at("2026-10-01 01:30", "America/New_York")
    # 1 November 2026, 01:30 is at 05:30 (summer time) and at 06:30 UTC.
    assert add_months(start, 1, "America/New_York") == datetime(2026, 11, 1, 5, 30, tzinfo=UTC)


def test_the_second_time_of_a_double_hour_is_an_anchor_like_any_other() -> None:
    second = datetime(2026, 11, 1, 6, 30, tzinfo=UTC)
    assert add_months(second, 0, "America/New_York") == second
    assert add_months(second, 1, "America/New_York") == at("2026-12-01 01:30", "America/New_York")


def test_a_month_that_begins_at_one_in_the_morning() -> None:
    """In Amman the clocks were put on at midnight: the first of April 2011 had no hour before one."""
    start = month_start(datetime(2011, 4, 10, tzinfo=UTC), "Asia/Amman")
    assert f"{start.astimezone(ZoneInfo('Asia/Amman')):%m-%d %H:%M}" == "04-01 01:00"


def test_the_zone_of_the_anchor_itself_does_not_matter() -> None:
    paris = datetime(2026, 1, 31, 0, 30, tzinfo=ZoneInfo("Europe/Paris"))
    for months in range(14):
        expected = add_months(paris.astimezone(UTC), months, "America/New_York")
        assert add_months(paris, months, "America/New_York") == expected
