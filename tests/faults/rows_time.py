"""Row 11: beat twice, or away across the ends of periods; clocks that are changed; a sweep that is killed.

Time is the ledger's: it is set ahead in the database, and everything else goes on as it does.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import count
from typing import Self
from zoneinfo import ZoneInfo

import psycopg
from celery import Celery
from kombu import Queue

from schedules.expiry import SCHEDULE
from tests.faults.acts import Act, Done, Row, Size
from tests.faults.producers import Client, Operation
from tests.faults.stack import PATIENCE_SECONDS, READY_SECONDS, MissedError, Scene, eventually

PARIS = ZoneInfo("Europe/Paris")

CATALOG = """
[catalog]
name = "calendar"
zone = "Europe/Paris"
[priorities]
rollover = 20
monthly = 30
[plans.reset]
monthly_credits = "10"
[plans.keep]
monthly_credits = "4"
mode = "accumulate"
zone = "Asia/Kathmandu"
[plans.carry]
monthly_credits = "6"
mode = "rollover"
balance_cap = "2x"
zone = "America/New_York"
"""
"""Plans that the calendar renews; what was used leaves something to be carried, and something to lapse."""

PLANS = ("reset", "keep", "carry")
SWEEPS = 5
"""How often a sweep is begun until all that is due is done."""

MONTH = timedelta(days=32)
"""So much later one period more has begun, for a year and longer."""

SWEEP, *_ = SCHEDULE
SENT = "due accounts: sent credits.settle to"
TICKS, STANDS_BY, SENDS = "beat: has the lock, and ticks", "beat: another beat ticks", f"Sending due task {SWEEP}"


class Calendar:
    """Accounts with plans, and workers who have nothing to go by but the ledger's clock.

    :param accounts: how many.
    """

    def __init__(self, scene: Scene, accounts: int) -> None:
        scene.charge_by(CATALOG)
        self.scene = scene
        self.names = [f"subscriber:{number}" for number in range(accounts)]
        self.start = scene.now()
        self._numbers = count()
        self._notes = scene.notes("subscribers")
        self._notes.swept()
        self._client = Client(scene.broker.url, lanes=scene.lanes, result_url=scene.broker.result_url)
        self._beat = Celery("ticks", broker=scene.broker.url, set_as_current=False)
        scene.worker("worker")
        self.general = scene.general("general-0")
        scene.owning("worker")
        self.general.says(" ready.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._notes.done()
        self._client.close()
        self._beat.close()

    def send(self, *operations: Operation) -> None:
        """Send operations, and wait until the ledger has them."""
        before = self.scene.accounted()
        for operation in operations:
            reply = f"reply-{next(self._numbers)}"
            self._notes.sent("subscribers", operation, replies=[reply])
            self._client.ask(operation, reply)
        eventually(
            lambda: self.scene.accounted() >= before + len(operations), PATIENCE_SECONDS, "what was sent is applied"
        )

    def subscribe(self, names: Sequence[str] = ()) -> None:
        """Open accounts, each with a plan."""
        self.send(*(
            ("credits.open", name, "open", {"account": name, "kind": "pool", "plan": PLANS[number % len(PLANS)]})
            for number, name in enumerate(names or self.names)
        ))  # fmt: skip

    def use(self) -> None:
        """Have every other account use some of its credits: it settles itself, and nobody else has to."""
        number = next(self._numbers)
        self.send(*(
            ("credits.consume", name, f"use-{number}", {"account": name, "amount": str(1 + number % 3)})
            for name in self.names[::2]
        ))  # fmt: skip

    def months_on(self, months: int) -> int:
        """Set the clock that many periods after the beginning; gives how many accounts are due then."""
        self.scene.travel(self.start + months * MONTH)
        return self.scene.overdue()

    def settled(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until nobody is due any more."""
        eventually(lambda: not self.scene.overdue(), seconds, "every account that is due is settled")

    def swept(self, times: int) -> int:
        """Wait until the general worker has ended so many sweeps, and give how many."""

        def ended() -> int:
            return len(re.findall(r"Task schedules\.expiry\[[^]]+\] succeeded", self.general.logged()))

        eventually(lambda: ended() >= times, READY_SECONDS, f"{times} sweeps have ended")
        return ended()

    def sweep(self) -> None:
        """Have the general worker sweep until nobody is due.

        More than once where it takes Postgres a while to notice that the last one was killed.
        """
        for _ in range(SWEEPS):
            self.tick()
            with suppress(MissedError):
                return self.settled(PATIENCE_SECONDS / SWEEPS)
        raise MissedError(f"{self.scene.overdue()} accounts are due after {SWEEPS} sweeps")

    def tick(self) -> None:
        """Send what beat sends."""
        queue = Queue("maintenance", no_declare=True)
        self._beat.send_task("schedules.expiry", queue=queue, exchange="", routing_key=queue.name, ignore_result=True)


def one_of_two_killed(scene: Scene, size: Size) -> Done:
    """Two beats, of which one ticks; it is killed each time, and the other takes over."""
    rounds = 2 * size.rounds - 1
    hits = renewed = 0
    with Calendar(scene, size.contenders) as calendar:
        calendar.subscribe()
        scene.have_due(SWEEP)
        ticking = scene.beat("beat-0")
        ticking.says(SENDS)
        for number in range(1, rounds + 1):
            waiting = scene.beat(f"beat-{number}")
            waiting.says(STANDS_BY)
            hits += ticking.running and TICKS not in waiting.logged()
            renewed += calendar.months_on(number)
            scene.have_due(SWEEP)
            ticking.kill()
            if number % 2:
                calendar.use()
            calendar.settled()
            waiting.says(SENDS)
            ticking = waiting
    what = f"{rounds} × kill -9 of the one that ticked of two beats, {renewed:,} periods ended meanwhile"
    return Done(hits, rounds, what)


def both_tick(scene: Scene, size: Size) -> Done:
    """Two beats that do not know of each other: what is due is sent twice."""
    with Calendar(scene, size.contenders) as calendar:
        calendar.subscribe()
        for number in range(1, size.rounds + 1):
            calendar.months_on(number)
            entry = ("tests.faults.lockless", "-A", "schedules.app")
            pair = [scene.beat(f"beat-{number}-{twin}", entry) for twin in range(2)]
            calendar.use()
            calendar.settled()
            calendar.swept(2 * number)
            for each in pair:
                each.kill()
        ticks = calendar.swept(2 * size.rounds)
    what = f"{size.rounds} × two beats that both ticked, {ticks} sweeps of {size.rounds} ends of periods"
    return Done(ticks, 2 * size.rounds, what)


def no_beat(scene: Scene, size: Size) -> Done:
    """No beat while two periods end: accounts that are used catch up by themselves, the others when it is back."""
    with Calendar(scene, size.contenders) as calendar:
        calendar.subscribe()
        calendar.use()
        calendar.months_on(1)
        calendar.use()
        hits = late = 0
        for number in range(2, 2 * size.rounds + 1, 2):
            late = calendar.months_on(number)
            calendar.use()
            hits += int(scene.value(TWO_ENDS))
            scene.tick(f"beat-{number}", SWEEP)
            calendar.settled()
    what = f"{late:,} of {len(calendar.names):,} accounts overdue, those that nobody used by two periods: {hits:,}"
    return Done(hits, size.rounds * len(calendar.names) // 4, what)


TWO_ENDS = "SELECT count(*) FROM subscriptions WHERE period_end < ledger_now() - interval '31 days'"


# --- Clocks that are changed -------------------------------------------------------------------------


def changes(after: datetime) -> list[datetime]:
    """When clocks are put on, and when they are put back, in Paris; the next of each."""
    found: dict[bool, datetime] = {}
    hour = after.replace(minute=0, second=0, microsecond=0)
    while len(found) < 2:
        before, hour = hour, hour + timedelta(hours=1)
        step = utc_offset(hour) - utc_offset(before)
        if step:
            found.setdefault(step > timedelta(0), hour)
    return sorted(found.values())


def utc_offset(instant: datetime) -> timedelta:
    """What clocks in Paris are ahead by."""
    offset = instant.astimezone(PARIS).utcoffset()
    assert offset is not None
    return offset


def clocks_change(scene: Scene, size: Size) -> Done:
    """Periods that end in the hour that is skipped, or shown twice, and about it."""
    with Calendar(scene, 0) as calendar:
        hits = 0
        wanted = 0
        told: list[str] = []
        for change in changes(calendar.start + timedelta(days=70))[: 1 if size.rounds == 1 else 2]:
            wall = change.astimezone(PARIS)
            # Two months before, on the same day: the month between may have fewer days.
            month = wall.month - 2
            night = wall.replace(month=month, hour=1, minute=30, fold=0)
            names: list[str] = []
            for quarter in range(7):
                scene.travel(night + quarter * timedelta(minutes=20))
                group = [f"{wall:%B}:{quarter}:{number}" for number in range(max(2, size.contenders // 50))]
                calendar.send(*(
                    ("credits.open", name, "open", {"account": name, "kind": "pool", "plan": "reset"}) for name in group
                ))  # fmt: skip
                names += group
            for later in (timedelta(minutes=-40), timedelta(minutes=20), timedelta(minutes=50), timedelta(hours=3)):
                scene.travel(change + later)
                calendar.sweep()
            near = scene.value(
                "SELECT count(*) FROM entries WHERE kind = 'granted' AND account = ANY(%s)"
                " AND at BETWEEN %s - interval '2 hours' AND %s + interval '2 hours'",
                names, change, change,
            )  # fmt: skip
            hits += near
            wanted += len(names)
            told.append(f"{near} periods began within two hours of {wall:%d %B %Y, %H:%M %Z}")
            scene.travel(change + MONTH)
            calendar.sweep()
    return Done(hits, wanted, "; ".join(told))


# --- A sweep that is killed --------------------------------------------------------------------------

SWEEPING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
WAITING = f"{SWEEPING} AND wait_event_type = 'Lock'"
SWEEPER = "creditlane sweep"


def killed_sweeping(scene: Scene, size: Size) -> Done:
    """The general worker is killed amid a sweep, and the next one goes on where it ended."""
    with Calendar(scene, size.operations) as calendar:
        calendar.subscribe()
        hits = tries = left = 0
        while hits < size.rounds and tries < 12:  # in a year's months
            tries += 1
            due = calendar.months_on(tries)
            done = calendar.general.logged().count(SENT)
            with psycopg.connect(scene.database) as holding:
                holding.execute("LOCK TABLE accounts")  # so that it is known when the sweep begins
                calendar.tick()
                eventually(lambda: scene.value(WAITING, SWEEPER), READY_SECONDS, "a sweep is under way")
            time.sleep(scene.random.uniform(0, due / 50_000))
            calendar.general.signal(signal.SIGSTOP)
            amid = calendar.general.logged().count(SENT) == done and scene.value(SWEEPING, SWEEPER) > 0
            if amid:
                hits += 1
                left += scene.overdue()
                calendar.general.kill()
                calendar.general = scene.general(f"general-{tries}")
            else:
                calendar.general.signal(signal.SIGCONT)
            calendar.sweep()
    return Done(hits, size.rounds, f"{hits} × kill -9 amid a sweep, {tries} tries; {left:,} accounts were left due")


ROWS = (
    Row(11, "beat twice; beat away across two ends of periods; clocks that are changed", (
        Act("two beats, one killed", one_of_two_killed),
        Act("two beats that both tick", both_tick),
        Act("no beat", no_beat),
        Act("clocks are changed", clocks_change),
        Act("kill -9 amid a sweep", killed_sweeping),
    )),
)  # fmt: skip
