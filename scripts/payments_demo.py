"""``creditlane payments demo``: a month of a customer's life on a fake Stripe, over real HTTP, on a running stack."""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import typer
from psycopg import Connection
from rich.console import Console

from creditlane.amounts import format_amount
from creditlane.client import PAYMENTS, CreditClient
from creditlane.errors import CreditlaneError
from models.audit import audit
from models.rules.calendar import add_months
from models.rules.catalog import Catalog, Money
from scripts.command_parts import FAULTS, STATE, USAGE, JsonOption, deployment, fail, ledger, show_json
from scripts.fake_stripe import FakeStripe, Json
from scripts.showing import console, credits, plain_table, said
from workers.providers.stripe import STRIPE_DIGITS

PATIENCE_SECONDS = 60.0
"""How long one step may take until the ledger has it."""

POLL_SECONDS = 0.05

UNREAD = "SELECT count(*) FROM payment_events WHERE status = 'received' AND event_id = ANY(%s)"
UNAPPLIED = """
SELECT count(*) FROM payment_operations p LEFT JOIN operations o ON o.account = p.account AND o.operation = p.operation
WHERE p.account = %s AND o.operation IS NULL
"""
BALANCE = """
SELECT coalesce(sum(g.available_micro) FILTER (WHERE p.is_frozen IS NOT TRUE), 0),
       coalesce(sum(g.available_micro) FILTER (WHERE p.is_frozen), 0), max(a.debt_micro)
FROM accounts a LEFT JOIN grants g ON g.account = a.account
LEFT JOIN purchases p ON p.account = g.account AND p.purchase = g.purchase WHERE a.account = %s
"""
PURCHASES = """
SELECT purchase, sum(granted_micro), sum(available_micro + held_micro + in_transit_micro), sum(consumed_micro),
       sum(expired_micro), sum(revoked_micro), sum(clawed_back_micro)
FROM grants WHERE account = %s AND purchase IS NOT NULL GROUP BY purchase ORDER BY min(grant_id)
"""


class Step(NamedTuple):
    """One thing that happened."""

    what: str
    events: int
    """Webhooks that were posted because of it, copies included."""
    available_micro: int
    frozen_micro: int
    debt_micro: int


class Purchase(NamedTuple):
    """A purchase as the provider and as the ledger have it. All that came in went somewhere, and money and credits that
    were taken back are the same share: both differences are 0."""

    purchase: str
    paid: Money
    returned: Money
    given_micro: int
    left_micro: int
    used_micro: int
    expired_micro: int
    taken_back_micro: int
    credits_differ_micro: int
    money_differs: Money


class Demo:
    """The customer, the provider, and the stack that they meet at."""

    def __init__(self, connection: Connection[Any], client: CreditClient, stripe: FakeStripe, catalog: Catalog,
                 relay_url: str, out: Console) -> None:  # fmt: skip
        self._connection = connection
        self._client = client
        self._stripe = stripe
        self._relay_url = relay_url
        self._out = out
        self.account = f"demo-{uuid4().hex[:8]}"
        self.steps: list[Step] = []
        self.pack = next((name for name, pack in catalog.packs.items() if pack.prices and pack.price), None)
        self.plan = next((name for name, plan in catalog.plans.items() if plan.prices and plan.price), None)

    def step(self, what: str, *, lose: Callable[[Json], bool] | None = None) -> None:
        """Deliver what the provider has to say, each event twice and in any order, until the ledger has it all."""
        delivered = self._stripe.deliver(f"{self._relay_url}/webhooks/stripe", copies=2, shuffle=True, lose=lose)
        failed = [each for each in delivered if not each.is_taken]
        if failed:
            fail(f"the relay answered {failed[0].status} to {failed[0].type}", FAULTS)
        self.await_ledger([each.event for each in delivered])
        row = self._connection.execute(BALANCE, (self.account,)).fetchone()
        assert row is not None
        step = Step(what, len(delivered), *(int(amount or 0) for amount in row))
        self.steps.append(step)
        self._out.print(
            f"  {said(what):<58} {credits(format_amount(step.available_micro)):>10}"
            + (f"  [yellow]{credits(format_amount(step.frozen_micro))} frozen[/]" if step.frozen_micro else "")
            + (f"  [red]{credits(format_amount(step.debt_micro))} owed[/]" if step.debt_micro else "")
        )

    def await_ledger(self, events: list[str]) -> None:
        """Wait until all events were read, and all that they led to was applied."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._count(UNREAD, events) or self._count(UNAPPLIED, self.account):
            if time.monotonic() > deadline:
                fail("the ledger does not apply what came: creditlane payments events, creditlane lanes", FAULTS)
            time.sleep(POLL_SECONDS)

    def _count(self, query: str, about: Any) -> int:
        row = self._connection.execute(query, (about,)).fetchone()
        assert row is not None
        return int(row[0])

    def buy(self, **what: str) -> str:
        """Go through a checkout that creditlane makes; gives its id at the provider."""
        page = self._client.checkout(
            self.account, request=uuid4().hex, success_url="https://shop.example/thanks",
            cancel_url="https://shop.example/", **what,  # type: ignore[arg-type]
        )  # fmt: skip
        if page.id is None:
            fail(f"no checkout was made: {page.code}: {page.reason}", FAULTS)
        self._stripe.complete(page.id)
        return page.id

    def use(self, amount: str) -> None:
        """Use credits, as a service of the seller's would say."""
        self._client.consume(self.account, amount=amount, id=f"use-{uuid4().hex}", wait=PATIENCE_SECONDS)

    def purchases(self) -> list[Purchase]:
        """Each purchase, by the provider's books and by the ledger's."""
        found = []
        for purchase, *amounts in self._connection.execute(PURCHASES, (self.account,)):
            given, left, used, expired, revoked, clawed_back = map(int, amounts)
            paid, returned = self._money(purchase.partition(":")[2])
            kept = given - clawed_back
            differ = kept * paid.minor - given * (paid.minor - returned.minor)
            found.append(
                Purchase(
                    purchase, paid, returned, given, left, used, expired, clawed_back,
                    given - left - used - expired - revoked, Money(abs(differ) // max(1, given), paid.currency),
                )
            )  # fmt: skip
        return found

    def _money(self, id: str) -> tuple[Money, Money]:
        """What the provider took in for a session or an invoice, and what of it is away."""
        charge = self._stripe.charge_of(id)
        refunded = sum(
            refund["amount"] for refund in self._stripe.all_of("refund")
            if refund["charge"] == charge["id"] and refund["status"] == "succeeded"
        )  # fmt: skip
        moved = [
            movement["amount"] for dispute in self._stripe.all_of("dispute") if dispute["charge"] == charge["id"]
            for movement in dispute["balance_transactions"]
        ]  # fmt: skip
        currency = charge["currency"].upper()
        return Money(charge["amount"], currency), Money(refunded - sum(moved), currency)


def play(demo: Demo, stripe: FakeStripe, months: Callable[[], None]) -> None:
    """The month."""
    first = demo.buy(pack=demo.pack or "")
    demo.step(f"buys the pack {demo.pack}")
    subscribed = demo.buy(plan=demo.plan or "")
    demo.step(f"subscribes to {demo.plan}")
    demo.use("30")
    demo.step("uses 30 credits")
    months()
    stripe.renew(stripe.find("checkout.session", subscribed)["subscription"])
    demo.step("a month later the plan renews")
    charge = stripe.charge_of(first)
    refund = stripe.refund(first, charge["amount"] // 5)
    demo.step("a fifth of the pack is refunded")
    stripe.change_refund(refund["id"], "failed")
    demo.step("the refund fails at the bank")
    stripe.refund(first, charge["amount"] // 5)
    demo.step("and is made again")
    second = demo.buy(pack=demo.pack or "")
    demo.step(f"buys {demo.pack} again")
    dispute = stripe.dispute(second, withdrawn=False)["id"]
    demo.step("disputes it: what is left of it is frozen")
    stripe.withdraw(dispute)
    demo.step("the bank takes the money")
    stripe.close_dispute(dispute, "won")
    demo.step("the dispute is won: all of it is back")
    third = demo.buy(pack=demo.pack or "")
    demo.step(f"buys {demo.pack} a third time")
    dispute = stripe.dispute(third)["id"]
    demo.step("disputes that, and the bank takes the money")
    stripe.close_dispute(dispute, "lost")
    demo.step("the dispute is lost")
    demo.buy(pack=demo.pack or "")
    demo.step(f"buys {demo.pack} once more: its webhooks are lost", lose=lambda event: True)


@contextmanager
def _provider(state: dict[str, Any], catalog: Catalog, now: Callable[[], datetime]) -> Iterator[FakeStripe]:
    """A fake Stripe where the stack's workers look for Stripe, selling what the catalog sells."""
    known = state.get("payments") or {}
    base = known.get("stripe_api_base")
    if not state.get("relay_url") or not base:
        fail("this stack takes no webhooks, or talks to Stripe itself; start it by scripts/run without a key", USAGE)
    stripe = FakeStripe(
        now,
        random.Random(secrets.randbits(64)),  # noqa: S311 - ids of a fake
        key=known["stripe_api_key"],
        secret=known["stripe_webhook_secrets"].split(",")[0],
        signing=lambda: datetime.now(UTC),
    )
    sold: list[tuple[list[str], str | None, str | None]]
    sold = [(pack.prices, pack.price, None) for pack in catalog.packs.values()]
    sold += [(plan.prices, plan.price, plan.interval) for plan in catalog.plans.values()]
    for prices, money, interval in sold:
        cost = None if money is None else Money.parse(money)
        if cost is not None and cost.currency not in STRIPE_DIGITS:
            for price in prices:
                stripe.add_price(price, cost.minor, cost.currency, interval)
    with stripe.serve(urlsplit(base).port or 0):
        yield stripe


def _show(out: Console, purchases: list[Purchase], account: str, held: bool) -> None:
    """The ledger beside the payments."""
    names = ("paid", "returned", "gave", "left", "used", "expired", "taken back", "credits", "money")
    table = plain_table("purchase", *names, right=names)
    for each in purchases:
        amounts = (each.given_micro, each.left_micro, each.used_micro, each.expired_micro, each.taken_back_micro)
        colour = "red" if each.money_differs.minor or each.credits_differ_micro else "green"
        table.add_row(
            said(each.purchase[:28]), str(each.paid), str(each.returned),
            *(credits(format_amount(amount)) for amount in amounts),
            f"[{colour}]{credits(format_amount(each.credits_differ_micro))}[/]",
            f"[{colour}]{each.money_differs}[/]",
        )  # fmt: skip
    out.print("\nThe ledger beside the payments; the last two columns are what is left over, and have to be 0")
    out.print(table)
    out.print("[green]the audit of the account holds[/]" if held else "[red]the audit of the account fails[/]")
    out.print(
        f"[dim]more: creditlane account history {account}; creditlane payments purchase {purchases[0].purchase}[/]"
    )


def demo(as_json: JsonOption = False) -> None:
    """Play a month of a customer's life through a fake Stripe, and show the ledger beside the payments.

    Needs the embedded stack (scripts/run). Checkouts go through the workers, webhooks through the relay, each twice and
    in any order; one is lost and found by reconciling. Ends with 1 when anything does not close to zero.
    """
    try:
        state = json.loads(STATE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fail("no embedded stack runs here; start one by scripts/run", USAGE)
    where = deployment()
    if where.database_url != state["database_url"]:
        fail("the environment tells of another ledger than the embedded stack's; unset its CREDITLANE_…", USAGE)
    catalog = where.catalog
    clock = [add_months(datetime.now(UTC).replace(microsecond=0), -1, "UTC") - timedelta(hours=12)]

    def now() -> datetime:
        clock[0] += timedelta(seconds=1)
        return clock[0]

    def month() -> None:
        clock[0] = add_months(clock[0], 1, "UTC") + timedelta(hours=1)

    out = console(stderr=as_json)
    with (
        ledger() as connection,
        CreditClient(where.broker_url, lanes=where.lanes, **where.tls_files) as client,
        _provider(state, catalog, now) as stripe,
    ):
        played = Demo(connection, client, stripe, catalog, state["relay_url"], out)
        if played.pack is None or played.plan is None:
            fail(f"the catalog {where.catalog_name!r} sells no pack or no plan by a provider's price", USAGE)
        client.open(played.account, id=f"open-{played.account}", wait=PATIENCE_SECONDS)
        out.print(f"[bold]{played.account}[/], and what it may spend after each step\n")
        play(played, stripe, month)
        try:
            report = client.query("payments.reconcile", PAYMENTS, PATIENCE_SECONDS, deep=True, days=1)
        except CreditlaneError as error:
            fail(f"reconciling failed: {error}", FAULTS)
        played.step(f"reconciling takes up {report['taken']} that was lost")
        purchases = played.purchases()
        held = audit(connection, [played.account]).holds
    closes = held and not any(each.credits_differ_micro or each.money_differs.minor for each in purchases)
    if as_json:
        show_json({"account": played.account, "steps": [step._asdict() for step in played.steps],
                   "purchases": [each._asdict() for each in purchases], "closes": closes})  # fmt: skip
    else:
        _show(out, purchases, played.account, held)
    if not closes:
        raise typer.Exit(FAULTS)
