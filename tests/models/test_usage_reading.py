"""Usage over days is what a plain sum over everything that was sent gives, however much of it is rolled up."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, get_args

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creditlane.reports import Grouping, Usage
from models import cutoff, usage_reading
from models.bisecting import first_entry, first_operation
from models.database import connect
from models.usage import roll_up
from models.usage_reading import usage
from tests.support import Ledger, rows
from tests.workers.test_ledger_writer import freeze

START = datetime(2027, 3, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)
HOSTILE = ["'; DROP TABLE usage_days; --", "%s %(account)s", "{which}", "\\x00", "名前 🙂", "a" * 128]


@pytest.fixture(autouse=True)
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock is set back in these tests, so everything that is committed is counted."""
    monkeypatch.setattr(cutoff, "CLOCK_MARGIN", timedelta(0))


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(database, "test of usage") as reader:
        yield reader


def count(database: str) -> None:
    """Roll up what is new."""
    with psycopg.connect(database, autocommit=True) as connection:
        roll_up(connection, lambda counted, until, cutoff: True)


def asked(connection: psycopg.Connection[Any], account: str | None = "a", **options: Any) -> Any:
    found = usage(connection, account, **options)
    assert found is not None
    return found


def told(found: Usage) -> list[tuple[str, int, str, str, str | None, float | None]]:
    return [
        (
            line.key, line.charges, str(line.credits), str(line.refunded),
            None if line.used_before is None else str(line.used_before), line.change_percent,
        )
        for line in found.lines
    ]  # fmt: skip


def two_weeks(ledger: Ledger) -> None:
    """A week of 2 pictures and a context, and one of 3 pictures of which one is given back."""
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    for day, quantity in ((0, 8), (1, 8), (7, 8), (8, 8), (8, 8)):
        freeze(ledger, START + day * DAY)
        ledger.apply("credits.consume", f"c{ledger_number()}", account="a", feature="image", quantity=quantity)
        if day == 1:
            ledger.apply("credits.consume", "context", account="a", feature="context")
    ledger.apply("credits.consume", "plain", account="a", amount="0.5")
    ledger.apply("credits.refund", "r", account="a", operation="plain", amount="0.25")


_numbers = iter(range(10**9))


def ledger_number() -> int:
    return next(_numbers)


@pytest.mark.parametrize("rolled_up", [False, True])
def test_by_feature_with_the_trend(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any], rolled_up: bool
) -> None:
    two_weeks(ledger)
    freeze(ledger, START + 9 * DAY)
    if rolled_up:
        count(database)
        assert rows(database, "SELECT count(*) FROM usage_days") != [(0,)]
    week: dict[str, Any] = {"since": date(2027, 3, 8), "until": date(2027, 3, 15)}
    found = asked(connection, **week)
    assert told(found) == [
        ("image", 3, "3", "0", "2", 50.0),
        ("", 1, "0.5", "0.25", "0", None),
        ("context", 0, "0", "0", "1", -100.0),
    ]
    assert [line.quantity for line in found.lines] == [24, 0, 0]
    total = found.total
    assert (total.charges, total.credits, total.refunded, total.used) == (4, Decimal("3.5"), Decimal("0.25"), 3.25)
    assert (total.used_before, total.change_percent, total.quantity) == (3, 8.3, None)
    assert found.before == date(2027, 3, 1)
    used = found.utilisation
    assert used is not None
    assert (used.used, used.left, used.expired, used.percent) == (Decimal("3.25"), Decimal("43.75"), 0, 6.9)
    assert told(asked(connection, by="day", **week)) == [
        ("2027-03-08", 1, "1", "0", None, None),
        ("2027-03-09", 3, "2.5", "0.25", None, None),
    ]
    fortnight: dict[str, Any] = {"since": date(2027, 3, 3), "until": date(2027, 3, 10)}
    assert [line[:3] for line in told(asked(connection, by="week", **fortnight))] == [("2027-03-08", 4, "3.5")]
    march: dict[str, Any] = {"since": date(2027, 2, 1), "until": date(2027, 4, 1)}
    assert [line[:3] for line in told(asked(connection, by="month", **march))] == [("2027-03-01", 7, "6.5")]
    images = asked(connection, by="day", feature="image", **week)
    assert (images.total.quantity, images.utilisation) == (24, None)
    assert asked(connection, None, **week).total == total
    assert asked(connection, None, **week).utilisation is None


def test_what_expired_unused_lowers_the_utilisation(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    ledger.apply("credits.grant", "g", account="a", amount=30, source="trial", priority=1, expires_in=3600)
    ledger.apply("credits.consume", "c", account="a", amount=20)
    freeze(ledger, START + DAY)
    ledger.apply("credits.settle", "s", account="a")
    used = asked(connection).utilisation
    assert used is not None
    assert (used.used, used.left, used.expired, used.percent) == (20, 50, 10, 25.0)


def test_an_account_that_is_empty_and_one_that_nobody_named(
    ledger: Ledger, connection: psycopg.Connection[Any]
) -> None:
    assert usage(connection, "a") is None
    assert asked(connection, None).lines == []
    ledger.apply("credits.consume", "c", account="a", amount=1)
    found = asked(connection)
    assert (found.lines, found.total.charges, found.total.change_percent) == ([], 0, None)
    assert found.utilisation is not None
    assert found.utilisation.percent is None
    assert found.until == found.as_of.date() + DAY
    assert found.until - found.since == 30 * DAY


def test_pages_hold_every_line_once(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    ledger.apply("credits.open", "open", account="a")
    ledger.write(
        *(
            ledger.job("credits.consume", f"c{number}", account="a", amount=f"0.{number % 3 + 1}", member=name)
            for number, name in enumerate(HOSTILE)
        )
    )
    whole = asked(connection, by="member")
    assert sorted(line.key for line in whole.lines) == sorted(HOSTILE)
    assert [line.used for line in whole.lines] == sorted((line.used for line in whole.lines), reverse=True)
    assert whole.next_after is None
    for limit in (1, 4, len(HOSTILE)):
        read, after = [], None
        while True:
            page = asked(connection, by="member", limit=limit, after=after)
            assert page.total == whole.total
            read += page.lines
            after = page.next_after
            if after is None:
                break
            assert len(page.lines) == limit
        assert read == whole.lines
    for name in HOSTILE:
        (line,) = asked(connection, by="member", member=name).lines
        assert line.charges == 1
        assert asked(connection, feature=name).lines == []
        assert asked(connection, by="member", after=f"{name}!").lines == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"limit": 0}, "1 to 1000"),
        ({"limit": 1001}, "1 to 1000"),
        ({"since": date(2027, 1, 2), "until": date(2027, 1, 2)}, "not before"),
        ({"since": date(2017, 1, 1), "until": date(2027, 1, 20)}, "3660 days"),
        ({"since": date(1, 1, 1), "until": date(1, 1, 2)}, "calendar"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], sentence: str, connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(ValueError, match=sentence):
        usage(connection, None, **options)


def test_a_span_of_too_many_entries_has_no_utilisation(
    ledger: Ledger, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.apply("credits.open", "open", account="a")
    ledger.apply("credits.consume", "c", account="a", amount=1)
    monkeypatch.setattr(usage_reading, "MAX_ENTRIES", 1)
    assert asked(connection).utilisation is None


def test_an_instant_is_found_among_operations_and_entries(ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
    assert first_operation(connection, "a", START) == first_entry(connection, "a", START) == 1
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    for day in (1, 1, 3, 3, 3, 4):
        freeze(ledger, START + day * DAY)
        ledger.apply("credits.grant", f"g{ledger_number()}", account="a", amount=1, source="pack")
    places = {-1: 1, 0: 1, 1: 2, 2: 4, 3: 4, 4: 7, 5: 8}
    for day, place in places.items():
        assert first_operation(connection, "a", START + day * DAY) == place
        assert first_entry(connection, "a", START + day * DAY) == place


# --- Against a model ---------------------------------------------------------------------------------


class Event(NamedTuple):
    """One charge or refund as whoever sent it knows it; credits and units as decimals."""

    account: str
    day: date
    feature: str
    member: str
    charges: int
    quantity: Decimal
    charged: Decimal
    refunded: Decimal


FEATURES = ["image", "context", "regeneration"]
MEMBERS = ["", "mia", "max"]
amounts = st.integers(1, 40).map(lambda tenths: Decimal(tenths) / 10)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("consume"), st.sampled_from(FEATURES), st.integers(1, 20), st.sampled_from(MEMBERS),
            st.integers(0, 9),
        ),
        st.tuples(st.just("amount"), amounts, st.sampled_from(MEMBERS)),
        st.tuples(st.just("capture"), st.sampled_from(FEATURES), st.integers(1, 20), st.sampled_from(MEMBERS)),
        st.tuples(st.just("refund"), st.integers(0, 99), st.integers(1, 100)),
        st.tuples(st.just("pass"), st.integers(1, 50)),
        st.tuples(st.just("roll up")),
    ),
    min_size=4, max_size=12,
)  # fmt: skip
questions = st.lists(
    st.tuples(
        st.sampled_from(get_args(Grouping)), st.integers(0, 6), st.integers(1, 12),
        st.sampled_from([None, "", *FEATURES]), st.sampled_from([None, *MEMBERS]), st.integers(1, 5),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


class Sender:
    """Sends what it is told to, and keeps its own books; its clock never goes back."""

    def __init__(self, ledger: Ledger, database: str) -> None:
        self.ledger = ledger
        self.database = database
        self.now = START
        self.events: list[Event] = []

    def send(self, account: str, script: list[tuple[Any, ...]]) -> None:
        """Do what a script says."""
        charges: list[tuple[str, Event, Decimal]] = []
        self.apply("credits.open", account=account)
        self.apply("credits.grant", account=account, amount=10**6, source="pack")
        for what, *rest in script:
            if what == "consume":
                feature, quantity, member, ago = rest
                when = {"occurred_at": (self.now - ago * DAY).isoformat()} if ago else {}
                whose = {"member": member} if member else {}
                answer = self.apply(
                    "credits.consume", account=account, feature=feature, quantity=quantity, **when, **whose
                )
                day = (self.now - ago * DAY).date()
                self.book(
                    charges, answer, Event(account, day, feature, member, 1, Decimal(quantity), *_charged(answer))
                )
            elif what == "amount":
                amount, member = rest
                whose = {"member": member} if member else {}
                answer = self.apply("credits.consume", account=account, amount=str(amount), **whose)
                self.book(
                    charges, answer, Event(account, self.now.date(), "", member, 1, Decimal(0), amount, Decimal(0))
                )
            elif what == "capture":
                feature, quantity, member = rest
                whose = {"member": member} if member else {}
                held = self.apply("credits.hold", account=account, feature=feature, quantity=5, **whose)
                answer = self.apply("credits.capture", account=account, hold=held["id"], quantity=quantity)
                event = Event(account, self.now.date(), feature, member, 1, Decimal(quantity), *_charged(answer))
                self.book(charges, answer, event)
            elif what == "refund" and charges:
                which, share = rest
                charge, event, left = charges.pop(which % len(charges))
                amount = (left * share / 100).quantize(Decimal("0.000001"))
                if not amount:
                    continue
                self.apply("credits.refund", account=account, operation=charge, amount=str(amount))
                zero = Decimal(0)
                self.events.append(Event(account, self.now.date(), event.feature, event.member, 0, zero, zero, amount))
                charges.append((charge, event, left - amount))
            elif what == "pass":
                self.at(self.now + rest[0] * timedelta(hours=1))
            elif what == "roll up":
                count(self.database)

    def at(self, instant: datetime) -> None:
        """Go on in time."""
        self.now = instant
        freeze(self.ledger, instant)

    def apply(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Send one operation, a moment after the last."""
        self.at(self.now + timedelta(seconds=1))
        answer = self.ledger.apply(name, f"op-{ledger_number()}", **arguments)
        assert answer["status"] == "applied", answer
        return answer

    def book(self, charges: list[tuple[str, Event, Decimal]], answer: dict[str, Any], event: Event) -> None:
        """Note a charge."""
        self.events.append(event)
        charges.append((answer["id"], event, event.charged))


def _charged(answer: dict[str, Any]) -> tuple[Decimal, Decimal]:
    return Decimal(answer["charged"]), Decimal(0)


def key_of(by: str, event: Event) -> str:
    """What an event is told under."""
    day = event.day
    match by:
        case "feature":
            return event.feature
        case "member":
            return event.member
        case "day":
            return day.isoformat()
        case "week":
            return (day - day.weekday() * DAY).isoformat()
        case _:
            return day.replace(day=1).isoformat()


def summed(events: list[Event]) -> tuple[int, Decimal, Decimal]:
    zero = Decimal(0)
    charged, refunded = (sum((getattr(each, name) for each in events), zero) for name in ("charged", "refunded"))
    return sum(each.charges for each in events), charged, refunded


def used(events: list[Event]) -> Decimal:
    _, charged, refunded = summed(events)
    return charged - refunded


def test_any_use_is_told_as_whoever_sent_it_would(
    ledger: Ledger, database: str, connection: psycopg.Connection[Any]
) -> None:
    sender = Sender(ledger, database)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(script=steps, asking=questions)
    def check(script: list[tuple[Any, ...]], asking: list[Any]) -> None:
        account = f"account-{ledger_number()}"
        sender.send(account, script)
        for by, ago, days, feature, member, limit in asking:
            until = sender.now.date() + DAY - ago * DAY
            since, before = until - days * DAY, until - 2 * days * DAY
            for whose in (account, None):
                events = [
                    each
                    for each in sender.events
                    if (whose is None or each.account == whose)
                    and (feature is None or each.feature == feature)
                    and (member is None or each.member == member)
                    and before <= each.day < until
                ]
                now = [each for each in events if each.day >= since]
                then = [each for each in events if each.day < since]
                ranked = by in ("feature", "member")
                expected = {}
                for key in {key_of(by, each) for each in (events if ranked else now)}:
                    of_key = [each for each in now if key_of(by, each) == key]
                    earlier = used([each for each in then if key_of(by, each) == key]) if ranked else None
                    expected[key] = (*summed(of_key), earlier)
                lines, after = [], None
                while True:
                    page = asked(
                        connection, whose, by=by, since=since, until=until, feature=feature, member=member,
                        limit=limit, after=after,
                    )  # fmt: skip
                    lines += page.lines
                    after = page.next_after
                    if after is None:
                        break
                assert {
                    line.key: (line.charges, line.credits, line.refunded, line.used_before) for line in lines
                } == expected
                assert len(lines) == len(expected)
                order = [(-line.used, line.key) if ranked else (Decimal(0), line.key) for line in lines]
                assert order == sorted(order)
                total = page.total
                assert (total.charges, total.credits, total.refunded) == summed(now)
                assert (total.used, total.used_before) == (used(now), used(then))
                if feature is not None:
                    assert total.quantity == sum((each.quantity for each in now), Decimal(0))

    check()
