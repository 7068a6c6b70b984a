"""Lives of customers, played on the fake Stripe, and this process as the worker that reads what it says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg

from models.payment_inbox import store
from models.rules.calendar import add_months
from models.rules.catalog import Catalog
from scripts.fake_stripe import FakeStripe, Json, RefusedError
from tests.support import Ledger, rows
from workers.outbox import Outbox, OutboxRow
from workers.payments import Processor
from workers.providers.base import Fetch
from workers.providers.stripe import Stripe
from workers.reconciling import Reconciler, Report
from workers.stripe_api import StripeApi

PRICES = {
    "price_rollover_starter": (999, "month"),
    "price_rollover_pro": (3999, "month"),
    "price_rollover_pro_yearly": (39900, "year"),
    "price_rollover_fifty": (699, None),
    "price_rollover_two_hundred": (2499, None),
}
"""What the catalog ``rollover`` sells, in US cents."""

Act = tuple[Any, ...]


class Life:
    """A customer of the fake Stripe.

    :param account: whose credits the payments are for.
    :param begins_at: when it begins; the clock stands where :meth:`play` moves it.
    """

    def __init__(self, account: str, seed: int, begins_at: datetime) -> None:
        self.account = account
        self.begins_at = begins_at
        self.now = begins_at
        self.stripe = FakeStripe(lambda: self.now, random.Random(seed))
        self.stripe.add_coupon("free", 100)
        for price, (amount, interval) in PRICES.items():
            self.stripe.add_price(price, amount, "usd", interval)
        self.bought: list[str] = []
        """Sessions and invoices that were paid."""
        self.refunds: list[str] = []
        self.disputes: list[str] = []
        self.pending: list[str] = []
        self.subscription: str | None = None

    def play(self, act: Act) -> None:
        """Do something, an hour after what was done last; what makes no sense is left out."""
        self.now += timedelta(hours=1)
        name, *given = act
        try:
            getattr(self, name)(*given)
        except (RefusedError, IndexError):
            pass  # nothing to refund, or no such thing to be done with it any more

    def _session(self, price: str, mode: str, quantity: int = 1, **given: Any) -> Json:
        metadata = {"creditlane_account": self.account}
        return self.stripe.open_session(
            [(price, quantity)], mode=mode, client_reference_id=self.account, metadata=metadata,
            payment_metadata=metadata, subscription_data={"metadata": metadata, **given.pop("subscription_data", {})},
            **given,
        )  # fmt: skip

    def pack(self, price: str, quantity: int = 1, **given: Any) -> None:
        """Buy packs."""
        session = self._session(price, "payment", quantity, **given)
        self.stripe.complete(session["id"])
        self.bought.append(session["id"])

    def gift(self) -> None:
        """Have a pack for nothing, by a coupon."""
        self.pack("price_rollover_fifty", coupon="free")

    def billed(self) -> None:
        """Buy a pack that an invoice is made for."""
        self.pack("price_rollover_fifty", invoice_creation=True)

    def debit(self, outcome: str) -> None:
        """Buy a pack by a debit, which comes about or fails later."""
        session = self._session("price_rollover_two_hundred", "payment")
        self.stripe.complete(session["id"], "pending")
        self.now += timedelta(hours=1)
        self.stripe.settle(session["id"], outcome)  # type: ignore[arg-type]
        if outcome == "succeeded":
            self.bought.append(session["id"])

    def subscribe(self, price: str, trial_days: int = 0, **given: Any) -> None:
        """Begin a subscription, if there is none."""
        if self.subscription is not None:
            return
        data: dict[str, Any] = {}
        if trial_days:
            data["trial_end"] = int((self.now + timedelta(days=trial_days)).timestamp())
        session = self._session(price, "subscription", subscription_data=data, **given)
        done = self.stripe.complete(session["id"])
        self.subscription = done["subscription"]
        self._note_invoice()

    def _note_invoice(self) -> None:
        invoice = self.stripe.all_of("invoice")[0]
        if invoice["status"] == "paid" and invoice["amount_paid"]:
            self.bought.append(invoice["id"])

    def renew(self, outcome: str = "succeeded") -> None:
        """Where the month that was paid for ends, or the trial; a year is longer than a life is played."""
        if self.subscription is None:
            return
        (item,) = self.stripe.within(self.subscription, "items")
        ends = datetime.fromtimestamp(item["current_period_end"], UTC)
        if ends > self.begins_at + timedelta(days=40):
            return
        self.now = max(self.now, ends)
        self.stripe.renew(self.subscription, outcome)  # type: ignore[arg-type]
        self._note_invoice()

    def change(self, price: str) -> None:
        """Change the plan, billed at once."""
        if self.subscription is not None:
            self.stripe.change_plan(self.subscription, price)
            self._note_invoice()

    def cancel(self, at_period_end: bool) -> None:
        """Cancel the subscription."""
        if self.subscription is not None:
            self.stripe.cancel(self.subscription, at_period_end=at_period_end)

    def undo_cancel(self) -> None:
        """Go on with it."""
        if self.subscription is not None:
            self.stripe.undo_cancel(self.subscription)

    def refund(self, which: int, percent: int, outcome: str = "succeeded") -> None:
        """Give a part back of something that was bought."""
        of = self.bought[which % len(self.bought)] if self.bought else ""
        charge = self.stripe.charge_of(of)
        amount = max(1, charge["amount"] * percent // 100)
        self.refunds.append(self.stripe.refund(of, amount, outcome)["id"])  # type: ignore[arg-type]

    def fail_refund(self, which: int) -> None:
        """A refund fails after all."""
        self.stripe.change_refund(self.refunds[which % len(self.refunds) if self.refunds else 0], "failed")

    def settle_refund(self, which: int) -> None:
        """A refund that was pending comes about."""
        self.stripe.change_refund(self.refunds[which % len(self.refunds) if self.refunds else 0], "succeeded")

    def dispute(self, which: int, inquiry: bool = False) -> None:
        """The buyer disputes a payment."""
        of = self.bought[which % len(self.bought)] if self.bought else ""
        self.disputes.append(self.stripe.dispute(of, inquiry=inquiry)["id"])

    def close(self, which: int, status: str) -> None:
        """A dispute is decided."""
        dispute = self.disputes[which % len(self.disputes) if self.disputes else 0]
        self.stripe.close_dispute(dispute, status)  # type: ignore[arg-type]


class Applying:
    """Takes what is published, and has the ledger apply it in this process, in its order."""

    def __init__(self, ledger: Ledger, database: str) -> None:
        self.ledger = ledger
        self.told: list[str] = []
        """The keys of the notices that were to be delivered."""
        self._database = database

    def publish(self, sent: Sequence[OutboxRow]) -> None:
        """Apply operations; notices stay where they are."""
        with psycopg.connect(self._database, autocommit=True) as connection:
            for row in sent:
                if not row.exchange:
                    arguments = json.loads(row.arguments)
                    self.ledger.apply(row.task, row.operation, **arguments)
                else:
                    self.told.append(row.operation)
                connection.execute("DELETE FROM outbox WHERE id = %s", (row.id,))


class Books:
    """The worker's side of one life: its inbox, and what is made of it."""

    def __init__(self, connection: psycopg.Connection[Any], database: str, ledger: Ledger, life: Life) -> None:
        self.connection = connection
        self.life = life
        self.adapter = Stripe([life.stripe.secret], livemode=False)
        self.applying = Applying(ledger, database)
        self.processor = self.make(ledger.catalog)

    def make(
        self,
        catalog: Catalog,
        fetch: Fetch | None = None,
        connection: psycopg.Connection[Any] | None = None,
        outbox: Any = None,
    ) -> Processor:
        """What reads events; by another catalog, connection or way to the ledger, where that is asked for."""
        return Processor(
            connection or self.connection,
            {"stripe": self.adapter},
            {"stripe": fetch or self.life.stripe.fetch},
            catalog,
            cast("Outbox", outbox or self.applying),
        )

    def keep(self, event: Json) -> int:
        """Put an event into the inbox as the relay does; gives its row."""
        body, headers = self.life.stripe.signed(event)
        return store(self.connection, self.adapter.verify(body, headers, self.life.now), body, "webhook").id

    def deliver(self, event: Json) -> None:
        """Take an event as the relay does, and apply it."""
        self.processor.apply(self.keep(event))

    def reconcile(self) -> Report:
        """Compare with the provider over HTTP."""
        report = Report()
        with self.life.stripe.serve() as url:
            api = StripeApi(self.life.stripe.key, False, url)
            reconciler = Reconciler(self.connection, api, self.adapter, self.processor.apply, False)
            reconciler.run(report, deep=True, progress=lambda kind, count: None)
        return report

    def look(self) -> None:
        """Look at what has waited long enough."""
        due = self.connection.execute("SELECT id FROM payment_groups WHERE next_look_at <= ledger_now()").fetchall()
        self.processor.look([group for (group,) in due])


@contextmanager
def books(database: str, ledger: Ledger, life: Life) -> Iterator[Books]:
    """The worker's side of a life, whose account is opened for it."""
    ledger.apply("credits.open", f"open-{life.account}", account=life.account)
    with psycopg.connect(database, autocommit=True) as connection:
        yield Books(connection, database, ledger, life)


def state(database: str, account: str) -> dict[str, Any]:
    """What an account has come to: its credits by what they are, its debt, its plan.

    Not by which way: a refund takes of a month's credits what would be carried later, or of what was carried.
    """
    lots = rows(
        database,
        "SELECT source, features, price_minor, price_per_micro, sum(available_micro) FROM grants"
        " WHERE account = %s AND is_open GROUP BY 1, 2, 3, 4 ORDER BY 1, 3, 4",
        account,
    )
    (totals,) = rows(database, "SELECT available_micro, debt_micro FROM accounts WHERE account = %s", account)
    plan = rows(
        database,
        "SELECT plan, status, period_start, period_end, paid_until, cancels, pending::text FROM subscriptions"
        " WHERE account = %s",
        account,
    )
    return {"lots": lots, "totals": totals, "plan": plan}


def refused(database: str) -> list[tuple[Any, ...]]:
    """Operations of payments that the ledger refused.

    But for the end of a plan that has ended already, and for months that were over before the present plan began.
    """
    return rows(
        database,
        "SELECT p.effect, o.code, o.result::text, p.arguments::text FROM payment_operations p"
        " JOIN operations o ON o.account = p.account AND o.operation = p.operation WHERE o.status = 'rejected'"
        " AND NOT (o.name = 'plans.cancel' AND o.code = 'no_subscription')"
        " AND NOT (o.code = 'already_renewed' AND (p.arguments ->> 'period_end')::timestamptz < ledger_now())",
    )


def a_month_ago() -> datetime:
    """When a life begins whose second month begins today."""
    now = datetime.now(UTC).replace(microsecond=0)
    return add_months(now, -1, "UTC") - timedelta(hours=12)
