"""Usage by day is what a plain GROUP BY over all operations gives, whoever writes meanwhile."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from models import cutoff, usage
from models.cutoff import BusyError
from models.settings import settings
from schedules import usage as schedule
from tests.conftest import _ledger
from tests.support import Ledger, execute, rows, travel, value

USED = "SELECT * FROM usage_days ORDER BY account, day, feature, member"

PLAIN = """
WITH feature AS (
    SELECT account, operation, feature, coalesce(member, (SELECT h.member FROM operations h
        WHERE h.account = o.account AND o.name = 'credits.capture' AND h.operation = o.arguments ->> 'hold')) AS member
    FROM operations o
)
SELECT o.account, (coalesce(o.occurred_at, o.applied_at) AT TIME ZONE 'UTC')::date AS day,
       coalesce(f.feature, '') AS feature, coalesce(f.member, '') AS member,
       count(*) FILTER (WHERE o.name <> 'credits.refund'),
       coalesce(sum(o.quantity_micro) FILTER (WHERE o.name <> 'credits.refund'), 0),
       coalesce(sum(o.charged_micro) FILTER (WHERE o.name <> 'credits.refund'), 0),
       coalesce(-sum(o.charged_micro) FILTER (WHERE o.name = 'credits.refund'), 0)
FROM operations o JOIN feature f ON f.account = o.account
  AND f.operation = CASE o.name WHEN 'credits.refund' THEN o.arguments ->> 'operation' ELSE o.operation END
WHERE o.status = 'applied' AND o.name IN ('credits.consume', 'credits.capture', 'credits.refund')
GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
"""


def on(told: int, until: datetime, cutoff: datetime) -> bool:
    """Go on."""
    return True


def count(database: str, **options: Any) -> int:
    """Count what is new."""
    with psycopg.connect(database, autocommit=True) as connection:
        return usage.roll_up(connection, on, **options)


@pytest.fixture(autouse=True)
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock is set back in these tests, so everything that is committed is counted."""
    monkeypatch.setattr(cutoff, "CLOCK_MARGIN", timedelta(0))


def use(ledger: Ledger, account: str) -> None:
    """Charges of every kind."""
    ledger.apply("credits.open", "open", account=account)
    ledger.apply("credits.consume", "c1", account=account, feature="image", quantity=8, member="mia")
    ledger.apply("credits.consume", "c2", account=account, feature="image", quantity=4, member="mia")
    ledger.apply("credits.consume", "late", account=account, feature="context", occurred_at="2026-03-31T23:59:59Z")
    ledger.apply("credits.consume", "plain", account=account, amount="0.5")
    ledger.apply("credits.consume", "too much", account=account, amount=1000)
    ledger.apply("credits.hold", "h", account=account, feature="image", quantity=16, member="max")
    ledger.apply("credits.capture", "k", account=account, hold="h", quantity=12)
    ledger.apply("credits.hold", "given up", account=account, amount=3)
    ledger.apply("credits.release", "r", account=account, hold="given up")
    ledger.apply("credits.refund", "back", account=account, operation="c1", amount="0.25")
    ledger.apply("credits.refund", "back-k", account=account, operation="k")


def test_by_account_day_feature_and_member(ledger: Ledger, database: str) -> None:
    use(ledger, "a")
    assert count(database) == 7
    today = datetime.now(UTC).date()
    late = datetime(2026, 3, 31, tzinfo=UTC).date()
    assert rows(database, USED) == [
        ("a", late, "context", "", 1, 1_000_000, 1_000_000, 0),
        ("a", today, "", "", 1, 0, 500_000, 0),
        ("a", today, "image", "max", 1, 12_000_000, 1_500_000, 1_500_000),
        ("a", today, "image", "mia", 2, 12_000_000, 1_500_000, 250_000),
    ]
    assert rows(database, PLAIN) == rows(database, USED)
    assert count(database) == 0
    travel(database, timedelta(days=3))
    use(ledger, "b")
    ledger.apply("credits.consume", "next", account="a", feature="image", quantity=1)
    assert count(database) == 8
    assert rows(database, PLAIN) == rows(database, USED)
    assert count(database, anew=True) == 15
    assert rows(database, PLAIN) == rows(database, USED)


def test_while_others_write_every_operation_is_counted_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that take their time before one another and commit after; a roll-up that never rests."""
    monkeypatch.setattr(usage, "FIRST_STEP", timedelta(milliseconds=20))
    monkeypatch.setattr(usage, "FEW", 3)
    monkeypatch.setattr(usage, "MANY", 10)
    monkeypatch.setattr(cutoff, "POLL_SECONDS", 0.001)
    failures: list[BaseException] = []
    done = threading.Event()

    def write(number: int) -> None:
        try:
            for ledger in _ledger(database):
                account = f"account-{number}"
                ledger.apply("credits.open", "open", account=account)
                for each in range(40):
                    jobs = [
                        ledger.job(
                            "credits.consume", f"{each}-{index}", account=account, amount="0.01", member=f"{index}"
                        )
                        for index in range(3)
                    ]
                    ledger.write(*jobs)
                    if each % 5 == 0:
                        ledger.apply("credits.refund", f"back-{each}", account=account, operation=f"{each}-0")
        except BaseException as error:
            failures.append(error)

    def roll() -> None:
        try:
            while not done.is_set():
                count(database)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    roller = threading.Thread(target=roll)
    for thread in (*writers, roller):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    roller.join()
    assert failures == []
    count(database)
    assert value(database, "SELECT sum(operations) FROM usage_days") == 4 * 40 * 3
    assert rows(database, PLAIN) == rows(database, USED)


def test_what_is_not_committed_yet_is_waited_for_and_not_passed_by(
    ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(ledger, "a")
    monkeypatch.setattr(usage, "WAIT_SECONDS", 0.2)
    with psycopg.connect(database) as writer:
        writer.execute("SELECT ledger_now()")
        with pytest.raises(BusyError):
            count(database)
    assert value(database, "SELECT count(*) FROM usage_watermark") == 0
    assert count(database) == 7


def test_a_transaction_that_fails_counts_nothing(ledger: Ledger, database: str) -> None:
    use(ledger, "a")
    execute(database, "ALTER TABLE usage_watermark ADD CONSTRAINT never CHECK (counted_until IS NULL)")
    with pytest.raises(psycopg.errors.CheckViolation):
        count(database)
    assert rows(database, USED) == []
    execute(database, "ALTER TABLE usage_watermark DROP CONSTRAINT never")
    assert count(database) == 7


def test_two_at_once_take_turns(ledger: Ledger, database: str) -> None:
    use(ledger, "a")
    with (
        psycopg.connect(database, autocommit=True) as other,
        cutoff.alone(other, usage.ROLL_UP),
        pytest.raises(BusyError, match="another session"),
    ):
        count(database)
    assert count(database) == 7


def test_an_empty_ledger(database: str) -> None:
    assert count(database) == 0


def test_the_schedule_ends_in_time_and_goes_on(ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    use(ledger, "a")
    travel(database, timedelta(hours=1))
    use(ledger, "b")
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "MAX_SECONDS", 0)
        assert schedule.count.apply(throw=True).get() == {"counted": 7}
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(schedule.count, "update_state", lambda *, state, meta: told.append({"state": state, **meta}))
    assert schedule.count.apply(throw=True).get() == {"counted": 7}
    assert told[-1]["done"] == 7
    assert schedule.count.apply(kwargs={"anew": True}, throw=True).get() == {"counted": 14}
    assert rows(database, PLAIN) == rows(database, USED)
    settings.cache_clear()
