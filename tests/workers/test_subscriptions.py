"""Plans through the ledger writer on a real Postgres: the same rows however batches are cut, audited and replayed."""

from __future__ import annotations

from datetime import datetime, timedelta
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creditlane.contract import decode_message
from models.audit import audit
from models.rules.catalog import Catalog
from models.rules.state import Account, subscription_row
from tasks.ledger import apply
from tasks.replay import Replayer
from tests.oracle.test_plans import CATALOGS, PLANS
from tests.support import Ledger
from tests.workers.test_ledger_writer import (
    START,
    Lived,
    Step,
    compare_with_memory,
    other_ledger,
    priced_by,
    written,
)

__all__ = ["other_ledger"]

PAUSES = [timedelta(0)] * 7 + [timedelta(hours=3), timedelta(days=3), timedelta(days=16), timedelta(days=31)]
KINDS = [
    "credits.consume", "credits.consume", "credits.consume", "credits.hold", "credits.capture", "credits.release",
    "credits.refund", "credits.refund", "credits.revoke", "credits.grant", "credits.settle", "plans.subscribe",
    "plans.change", "plans.change", "plans.cancel", "plans.renew", "plans.renew", "plans.renew", "plans.undo", "again",
]  # fmt: skip
AMOUNTS = ["0.5", "2", "4", "7", "11"]


class Author:
    """Writes the life of two accounts, each operation fitting to what has become of its account so far."""

    def __init__(self, random: Random, catalog: Catalog) -> None:
        self.random = random
        self.catalog = catalog
        self.now = START
        self.accounts = {name: Account(name) for name in ("first", "second")}
        self.holds: dict[str, list[str]] = {name: ["never"] for name in self.accounts}
        self.charges: dict[str, list[str]] = {name: ["never"] for name in self.accounts}

    def life(self) -> list[Step]:
        """A life of some thirty operations."""
        pick = self.random.choice
        life: list[Step] = []
        for number in range(self.random.randint(15, 40)):
            pause = pick(PAUSES)
            name, kind = pick(["first", "first", "first", "second"]), pick(KINDS)
            if number < 2:
                name, kind = ("first", "second")[number], "credits.open"
            self.now += pause
            if kind == "again":
                step = pick(life)._replace(pause=pause)
            else:
                given = {"account": name, **self.arguments(kind, name)}
                present = {key: value for key, value in given.items() if value is not None}
                step = Step(pause, kind, f"{kind}-{number}", present)
            life.append(step)
            self.apply(step)
        return life

    def apply(self, step: Step) -> None:
        raw = msgspec.json.encode(step.arguments)
        name = step.arguments["account"]
        message = decode_message(step.name, raw)
        answer = apply(self.accounts[name], step.name, step.operation, message, raw, self.now, self.catalog)
        if answer.row is not None and answer.row.status == "applied":
            if step.name == "credits.hold":
                self.holds[name].append(step.operation)
            if step.name in ("credits.consume", "credits.capture"):
                self.charges[name].append(step.operation)

    def arguments(self, kind: str, name: str) -> dict[str, Any]:
        pick = self.random.choice
        subscription = self.accounts[name].subscription
        payment = pick([None, "p-1", "p-2", "p-3"])
        match kind:
            case "credits.open":
                return {"plan": pick([None, *PLANS])}
            case "credits.consume":
                return {"amount": pick(AMOUNTS), "partial": True}
            case "credits.hold":
                return {"amount": pick(AMOUNTS), "ttl": pick([60, 86_400, 2_000_000])}
            case "credits.capture" | "credits.release":
                amount = pick([None, "0", "1", "3"]) if kind == "credits.capture" else None
                return {"hold": pick(self.holds[name][-3:]), "amount": amount}
            case "credits.refund":
                return {"operation": pick(self.charges[name][-4:]), "amount": pick([None, None, "1"])}
            case "credits.revoke":
                which: dict[str, Any] = pick(
                    [{"purchase": "p-1"}, {"purchase": "p-2"}, {"grant": pick([1, 2, 3, 4, 5])}]
                )
                return {**which, "amount": pick([None, None, "1"])}
            case "credits.grant":
                return {
                    "amount": pick(AMOUNTS),
                    "source": pick(["pack", "rollover"]),
                    "expires_in": pick([None, 10**6]),
                }
            case "plans.subscribe" | "plans.change":
                return {"plan": pick(PLANS), "payment": payment}
            case "plans.cancel":
                return {"at": pick([None, "now"])}
            case "plans.renew":
                start: datetime = self.now
                if subscription is not None:
                    start = max(subscription.period_end, subscription.paid_until or subscription.period_end)
                return {"payment": payment, "period_start": start, "plan": pick([None, None, None, *PLANS])}
            case "plans.undo":
                return {"actor": "admin", "reason": "a mistake"}
        return {}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("on_spent", ["debt", "forgive"])
def test_however_plans_are_cut_into_batches_the_rows_and_answers_are_the_same(
    on_spent: str, ledger: Ledger, other_ledger: Ledger
) -> None:
    catalog = CATALOGS[on_spent]

    @settings(
        max_examples=25, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.integers(0, 2**64))
    def same(seed: int) -> None:
        lived = Lived(Author(Random(seed), catalog).life())
        answers = lived.one_by_one(ledger)
        assert None not in answers
        assert lived.together(other_ledger) == answers
        assert written(other_ledger, lived.accounts) == written(ledger, lived.accounts)
        accounts, in_memory = lived.in_memory(catalog)
        assert in_memory == answers
        for account in accounts.values():
            compare_with_memory(ledger, account)
            compare_subscription(ledger, account)

    with priced_by(ledger, catalog), priced_by(other_ledger, catalog):
        same()
    for each in (ledger, other_ledger):
        report = audit(each.writer.connection, replayer=Replayer({catalog.label: catalog}))
        assert report.faults == []
        assert report.replayed == report.operations > 500


def compare_subscription(ledger: Ledger, account: Account) -> None:
    """The row of an account's subscription says what the one in memory does."""
    rows = ledger.writer.connection.execute(
        "SELECT plan, status, number, period_start, period_end, paid_until, ended_at, allotted_micro, payment, lots,"
        " renewal_lots FROM subscriptions WHERE account = %s", (account.account,)
    ).fetchall()  # fmt: skip
    if account.subscription is None:
        assert rows == []
        return
    (
        plan, status, _, _, number, start, end, paid_until, ended_at, _, allotted, payment, _, _, _, lots, renewal_lots,
        *_,
    ) = subscription_row(account.subscription)  # fmt: skip
    expected = (plan, status, number, start, end, paid_until, ended_at, allotted, payment, lots, renewal_lots)
    assert rows == [expected]
