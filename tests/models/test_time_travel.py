"""A year in seconds: however late, often or never the beat ticks, the same credits, line by line.

More than a thousand accounts of every plan live through a leap year, through the real ledger writer on a real Postgres
whose clock is put on. What they do is the same each time; what differs is when time is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
import time_machine

from models.audit import audit
from models.catalog import load_catalog, parse_catalog
from models.rules.calendar import add_months
from models.rules.catalog import Catalog
from schedules.expiry import due, settle_id
from scripts.embedded import Stack
from tasks.replay import Replayer
from tests.conftest import TEMPLATE, _ledger
from tests.proof import job
from tests.support import Ledger
from workers.ledger_writer import Job

pytestmark = [pytest.mark.xdist_group("time travel"), pytest.mark.timeout(300)]

BEGINS, ENDS = datetime(2028, 1, 1, tzinfo=UTC), datetime(2029, 1, 20, tzinfo=UTC)
"""Longer than a leap year, changes of the clocks in Paris and in New York included."""

ACCOUNTS = 260
"""Of each catalog."""

MOMENTS = 70
"""Instants at which somebody does something."""

SWEEPS = 100
BATCH = 500

ELSEWHERE = datetime(2019, 3, 10, 1, 59, 30, tzinfo=ZoneInfo("America/New_York"))
"""A worker's clock that is years behind, in another zone, and about to be put on."""

MIXED = """
[catalog]
name = "mixed"
zone = "Europe/Paris"
[signup]
credits = "5"
expires_days = 40
[features.image]
price = "1"
[plans.percent]
monthly_credits = "40"
mode = "rollover"
rollover_cap = "75%"
rollover_months = 2
[plans.accumulating]
monthly_credits = "7"
mode = "accumulate"
[plans.annual]
monthly_credits = "60"
price = "60 EUR"
interval = "year"
mode = "rollover"
balance_cap = "2x"
rollover_months = 3
[plans.calendar]
monthly_credits = "10"
anchor = "month"
[plans.basic]
monthly_credits = "50"
price = "5 EUR"
[plans.prorated]
monthly_credits = "80"
price = "8 EUR"
upgrade = "prorated"
grace_days = 0
[plans.full]
monthly_credits = "120"
price = "12 EUR"
upgrade = "full"
zone = "America/New_York"
grace_days = 10
[plans.endless]
unlimited = true
price = "50 EUR"
[clawback]
on_spent = "debt"
[notify]
kinds = ["period_renewed", "credits_expired", "plan_ended"]
low_balance = ["20%"]
"""

CATALOGS = [load_catalog("rollover"), load_catalog("dual"), load_catalog("registration"),
            parse_catalog(MIXED, "mixed.toml")]  # fmt: skip

Step = tuple[datetime, str, str, dict[str, Any]]
"""When, which operation, its id, and its arguments."""


class Script:
    """What the accounts of a catalog do in a year.

    :param moments: at which something is done, ascending.
    """

    def __init__(self, catalog: Catalog, moments: Sequence[datetime], random: Random) -> None:
        self.catalog = catalog
        self.random = random
        self.moments = moments
        self.steps: list[Step] = []
        plans = list(catalog.plans)
        for number in range(ACCOUNTS):
            self._live(f"{catalog.catalog.name}-{number}", plans[number % len(plans)])
        self.steps.sort(key=lambda step: step[0])

    def _at(self, wanted: datetime) -> datetime:
        """The moment that comes next."""
        return next((moment for moment in self.moments if moment >= wanted), self.moments[-1])

    def _live(self, account: str, plan: str) -> None:
        random, mine = self.random, list[Step]()
        begins = random.choice(self.moments[:12])

        def do(wanted: datetime, name: str, **arguments: Any) -> str:
            operation = f"{name}-{len(mine)}"
            mine.append((self._at(max(wanted, begins)), name, operation, {"account": account, **arguments}))
            return operation

        def some_day() -> datetime:
            return begins + (ENDS - begins) * random.random()

        do(begins, "credits.open")
        do(begins, "plans.subscribe", plan=plan, payment=f"{account}-0", period_start=begins)
        sold = self.catalog.plans[plan]
        if sold.price is not None and sold.interval == "month":
            for month in range(1, 13):
                starts = add_months(begins, month, self.catalog.zone_of(plan))
                late = random.choice([-5, -1, 0, 1, 1, 2, 2, 20])
                if late == 20 and random.random() < 0.5:
                    break
                payment = f"{account}-{month}"
                do(starts + timedelta(days=late), "plans.renew", period_start=starts, payment=payment)
        for _ in range(random.randint(2, 6)):
            when = some_day()
            if random.random() < 0.3:
                hold = do(when, "credits.hold", amount=random.randint(1, 30), ttl=random.choice([60, 10**6]))
                done = random.choice(["credits.capture", "credits.release"])
                do(when + timedelta(days=random.randint(0, 9)), done, hold=hold)
                continue
            used = do(when, "credits.consume", amount=random.randint(1, 90), partial=True)
            if random.random() < 0.3:
                do(when + timedelta(days=random.randint(0, 60)), "credits.refund", operation=used)
        if random.random() < 0.4:
            do(some_day(), "credits.grant", amount=50, source="pack", expires_in=90 * 86_400, purchase=f"{account}-p")
        if random.random() < 0.3:
            do(some_day(), "credits.revoke", purchase=f"{account}-{random.choice([0, 1, 2, 'p'])}")
        if random.random() < 0.3:
            purchase = f"{account}-{random.choice([0, 0, 1, 'p'])}"
            for step in range(1, random.randint(2, 5)):
                do(some_day(), "credits.claw_back", purchase=purchase, paid_minor=100, step=step,
                   returned_minor=random.choice([0, 30, 50, 100]), frozen=random.random() < 0.3)  # fmt: skip
        for _ in range(random.choice([0, 0, 1, 3])):
            do(some_day(), "plans.change", plan=random.choice(list(self.catalog.plans)))
        if random.random() < 0.2:
            when = some_day()
            do(when, "plans.cancel", at=random.choice(["now", "period_end"]))
            if random.random() < 0.6:
                back = when + timedelta(days=random.choice([0, 10, 50]))
                do(back, "plans.subscribe", plan=random.choice(list(self.catalog.plans)))
        if random.random() < 0.15:
            do(some_day(), "plans.undo", actor="admin", reason="a mistake")
        self.steps += sorted(mine, key=lambda step: step[0])


@dataclass
class Year:
    """A year of one ledger.

    :param ledger: on a database of its own.
    """

    ledger: Ledger
    settled: int = 0

    def __post_init__(self) -> None:
        self.connection = self.ledger.writer.connection
        self.connection.execute(
            "CREATE OR REPLACE FUNCTION ledger_now() RETURNS timestamptz LANGUAGE sql VOLATILE"
            " AS 'SELECT current_setting(''travel.now'')::timestamptz'"
        )

    def at(self, now: datetime) -> None:
        """Put the ledger's clock on."""
        self.connection.execute("SELECT set_config('travel.now', %s, false)", (now.isoformat(),))

    def write(self, jobs: Sequence[Job]) -> None:
        """Write jobs in batches."""
        for start in range(0, len(jobs), BATCH):
            batch = jobs[start : start + BATCH]
            self.ledger.writer.write(batch)
            assert [each.quarantined for each in batch if each.quarantined is not None] == []
        self.ledger.writer.take_outbox()

    def sweep(self, now: datetime, beats: int = 1) -> None:
        """What one or more beats do that tick at the same time."""
        self.at(now)
        found = list(due(self.connection, now))
        settling = [
            job("credits.settle", settle_id(due_at, operations), account=account)
            for _ in range(beats)
            for account, due_at, operations in found
        ]
        self.write(settling)
        self.settled += len(settling)

    def live(self, script: Script, sweeps: Sequence[datetime], beats: int = 1) -> None:
        """Do what a script says, and sweep in between."""
        self.ledger.writer.catalog = lambda: script.catalog
        waiting = list(sweeps)
        for moment, steps in groupby(script.steps, key=lambda step: step[0]):
            while waiting and waiting[0] <= moment:
                self.sweep(waiting.pop(0), beats)
            self.at(moment)
            self.write([job(name, operation, **arguments) for _, name, operation, arguments in steps])
        for sweep in waiting:
            self.sweep(sweep, beats)
        self.at(ENDS)
        accounts = sorted({arguments["account"] for *_, arguments in script.steps})
        self.write([job("credits.settle", "the end", account=account) for account in accounts])

    def outcome(self) -> dict[str, dict[str, list[str]]]:
        """All that must come out the same, by account: in what order operations settled is not among it."""
        return {
            what: self._by_account(query)
            for what, query in {
                "entries": "SELECT account, (seq, operation, kind, grant_id, amount_micro, balance_after_micro, at,"
                " refers_to)::text FROM entries ORDER BY account, seq",
                "grants": "SELECT account, g::text FROM grants g ORDER BY account, grant_id",
                "holds": "SELECT account, h::text FROM holds h ORDER BY account, hold",
                "plans": "SELECT account, s::text FROM subscriptions s ORDER BY account",
                "purchases": "SELECT account, p::text FROM purchases p ORDER BY account, purchase",
                "balances": "SELECT account, (available_micro, held_micro, debt_micro, expired_micro, consumed_micro,"
                " next_due_at)::text FROM accounts ORDER BY account",
                "answers": "SELECT account, (operation, status, code, charged_micro, result::text)::text"
                " FROM operations WHERE name <> 'credits.settle' ORDER BY account, number",
            }.items()
        }

    def _by_account(self, query: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for account, line in self.connection.execute(query):
            found.setdefault(account, []).append(line)
        return found


@contextmanager
def year(stack: Stack, name: str) -> Iterator[Year]:
    """A year on a database of its own."""
    url = stack.create_database(f"year_{name}", template=TEMPLATE)
    with contextmanager(_ledger)(url) as ledger:
        yield Year(ledger)
    stack.postgres.drop_database(f"year_{name}")


def test_the_beat_changes_no_credit(stack: Stack) -> None:
    random = Random(2028)
    span = (ENDS - BEGINS) // timedelta.resolution
    moments = sorted(BEGINS + timedelta(microseconds=random.randrange(span)) for _ in range(MOMENTS))
    scripts = [Script(catalog, moments, random) for catalog in CATALOGS]
    ticks = sorted(BEGINS + timedelta(microseconds=random.randrange(span)) for _ in range(SWEEPS))
    # Down from the end of January to the middle of April, and for a month in summer.
    down = [tick for tick in ticks if not (25 < (tick - BEGINS).days < 105 or 190 < (tick - BEGINS).days < 220)]
    outcomes: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, sweeps, beats in (("on_time", ticks, 1), ("down", down, 1), ("twice", ticks[::3], 2), ("never", [], 0)):
        with year(stack, name) as lived:
            for script in scripts:
                if name == "down":
                    with time_machine.travel(ELSEWHERE, tick=True):
                        lived.live(script, sweeps, beats)
                else:
                    lived.live(script, sweeps, beats)
            assert (lived.settled > len(scripts) * ACCOUNTS) is (name != "never")
            outcomes[name] = lived.outcome()
            if name == "twice":
                check(lived.connection)
    expected = outcomes.pop("on_time")
    assert len(expected["balances"]) == len(CATALOGS) * ACCOUNTS
    assert sum(map(len, expected["entries"].values())) > 10 * len(CATALOGS) * ACCOUNTS
    for name, outcome in outcomes.items():
        for what, accounts in expected.items():
            different = {account for account in accounts if accounts[account] != outcome[what].get(account)}
            assert not different, (
                name,
                what,
                len(different),
                first_difference(accounts, outcome[what], min(different)),
            )
            assert accounts.keys() == outcome[what].keys()


def first_difference(one: dict[str, list[str]], other: dict[str, list[str]], account: str) -> tuple[str, list[str]]:
    """An account, and its first lines that are not the same."""
    pairs = zip(one[account], other.get(account, []), strict=False)
    return account, next(([a, b] for a, b in pairs if a != b), ["one has more lines than the other"])


def check(connection: psycopg.Connection[Any]) -> None:
    """The whole audit, and every operation fed to the rules again."""
    report = audit(connection, replayer=Replayer({catalog.label: catalog for catalog in CATALOGS}))
    assert report.faults == []
    assert report.replayed == report.operations
