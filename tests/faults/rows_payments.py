"""Row 14: webhooks that are not to be believed, and good ones that come twice, in any order, or not at all.

A fake Stripe sells, is asked by the general worker, and delivers to the relay from several processes. What is sold is
written down before anybody is told of it.
"""

from __future__ import annotations

import http.client
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self

from stripe import WebhookSignature

from creditlane.client import PAYMENTS
from creditlane.errors import CreditlaneError
from schedules.outbox import SCHEDULE as OUTBOX
from schedules.payments import SCHEDULE as PAYING
from scripts.fake_stripe import FakeStripe, Json
from tests.faults import deliverers
from tests.faults.acts import Act, Done, Row, Size
from tests.faults.producers import Client
from tests.faults.stack import (
    PATIENCE_SECONDS,
    READY_SECONDS,
    MissedError,
    Process,
    Scene,
    eventually,
    quiet_port,
)
from workers.crash import PAYMENT_POINTS, RELAY_POINTS
from workers.providers.base import MAX_BODY_BYTES

HOST = "127.0.0.1"

CATALOG = """
[catalog]
name = "shop"
currency = "EUR"
[priorities]
pack = 10
monthly = 30
[plans.starter]
monthly_credits = "100"
price = "9.99 EUR"
prices = ["price_starter"]
mode = "rollover"
balance_cap = "2x"
[packs.fifty]
credits = "50"
price = "6.99 EUR"
prices = ["price_fifty"]
"""
PACK, PLAN = ("price_fifty", "50", 699), ("price_starter", "100", 999)
"""A price, its credits, and what is paid in cents."""

SWEEPS = (next(iter(PAYING)), *OUTBOX)
"""What sends again what was lost on its way."""

CLAIM = timedelta(minutes=16)
"""After that much time what a worker had begun with counts as given up."""

UNFINISHED = """
SELECT (SELECT count(*) FROM payment_events WHERE status = 'received')
     + (SELECT count(*) FROM payment_facts WHERE status = 'waiting')
     + (SELECT count(*) FROM outbox)
     + (SELECT count(*) FROM payment_operations p
        LEFT JOIN operations o ON o.account = p.account AND o.operation = p.operation WHERE o.operation IS NULL)
"""
RECEIVED = "SELECT count(*) FROM payment_events"


class Shop:
    """What is sold, and the processes that make credits of it.

    :param accounts: how many buy something each.
    """

    def __init__(self, scene: Scene, accounts: int) -> None:
        scene.charge_by(CATALOG)
        self.scene = scene
        self.port = quiet_port()
        self.url = f"http://{HOST}:{self.port}/webhooks/stripe"
        self.accounts = [f"buyer:{number}" for number in range(accounts)]
        self.events: dict[str, list[Json]] = {}
        """What the provider says of each account's purchases."""
        self.stripe = FakeStripe(lambda: datetime.now(UTC), random.Random(scene.seed))
        self.stripe.add_price(PACK[0], PACK[2])
        self.stripe.add_price(PLAN[0], PLAN[2], interval="month")
        self.client = Client(scene.broker.url, lanes=scene.lanes, result_url=scene.broker.result_url)
        self._notes = scene.notes("buyers")
        self._numbers = count()

    def __enter__(self) -> Self:
        self.stripe.__enter__()
        self.settings = {
            "CREDITLANE_STRIPE_WEBHOOK_SECRETS": self.stripe.secret,
            "CREDITLANE_STRIPE_API_KEY": self.stripe.key,
            "CREDITLANE_STRIPE_API_BASE": self.stripe.url,
            "CREDITLANE_PAYMENTS_LIVEMODE": "false",
        }
        self.scene.worker("worker")
        self.relay, self.general = self.start_relay(), self.start_general()
        self.scene.owning("worker")
        for number, account in enumerate(self.accounts):
            operation = "credits.open", account, "open", {"account": account}
            self._notes.sent("buyers", operation, replies=[f"open-{number}"])
            self.client.ask(operation, f"open-{number}")
        eventually(lambda: self.scene.done() == len(self.accounts), PATIENCE_SECONDS, "every account is open")
        return self

    def __exit__(self, *_: object) -> None:
        self._notes.done()
        self.client.close()
        self.stripe.__exit__()

    def start_relay(self, **settings: str) -> Process:
        """Start a relay, always on the same port."""
        return self.scene.relay(f"relay-{next(self._numbers)}", self.port, **self.settings, **settings)

    def start_general(self, **settings: str) -> Process:
        """Start a general worker."""
        return self.scene.general(f"general-{next(self._numbers)}", **self.settings, **settings)

    def sell(self) -> None:
        """Have each account buy a pack or a plan; of some packs a part of the money is given back."""
        for number, account in enumerate(self.accounts):
            before = len(self.stripe.events)
            price, credits, paid_minor = PLAN if number % 5 == 4 else PACK
            metadata = {"creditlane_account": account}
            session = self.stripe.open_session(
                [(price, 1)], mode="subscription" if price == PLAN[0] else "payment", client_reference_id=account,
                metadata=metadata, payment_metadata=metadata, subscription_data={"metadata": metadata},
            )  # fmt: skip
            done = self.stripe.complete(session["id"])
            purchase = done["invoice"] if price == PLAN[0] else session["id"]
            returned_minor = self.scene.random.randrange(1, paid_minor + 1) if number % 3 == 2 else 0
            if returned_minor:
                self.stripe.refund(purchase, returned_minor)
            self._notes.sold(f"stripe:{purchase}", account, credits, paid_minor, returned_minor)
            self.events[account] = self.stripe.events[before:]

    def deliver(self, events: Sequence[Json]) -> tuple[Process, Path]:
        """Start a process that delivers events; gives where it writes what it was answered."""
        name = f"deliverer-{next(self._numbers)}"
        path, statuses = (self.scene.directory / f"{name}.{ending}" for ending in ("json", "statuses"))
        deliverers.write(path, [self.stripe.signed(event)[0] for event in events])
        command = ["tests.faults.deliverers", self.url, self.stripe.secret, str(path), str(statuses)]
        process = Process(name, command, {}, self.scene.directory / f"{name}.log")
        self.scene.producers.append(process)
        return process, statuses

    def unfinished(self) -> int:
        """Events, facts and operations that are on their way."""
        return int(self.scene.value(UNFINISHED))

    def settle(self) -> int:
        """Have beats come until nothing is on its way any more; gives how often.

        :raises MissedError: when that does not come.
        """
        for number in range(1, 7):
            with suppress(MissedError):
                eventually(lambda: not self.unfinished(), 5 if number < 6 else PATIENCE_SECONDS, "payments are settled")
                return number - 1
            self.scene.travel(self.scene.now() + CLAIM)
            self.scene.tick(f"beat-{next(self._numbers)}", *SWEEPS)
        raise MissedError(f"{self.unfinished()} payments are on their way still after 6 sweeps")

    def reconcile(self) -> Json:
        """Compare the provider with the ledger, as an operator does; gives the report.

        :raises MissedError: when there is none.
        """
        try:
            report: Json = self.client.query("payments.reconcile", PAYMENTS, READY_SECONDS, deep=True)
        except CreditlaneError as error:
            raise MissedError(f"payments are not reconciled: {error}") from None
        return report


# --- What is not to be believed ----------------------------------------------------------------------


class Bad(NamedTuple):
    """A delivery that must be refused."""

    label: str
    status: int
    body: bytes
    headers: dict[str, str]
    path: str = "/webhooks/stripe"


def bad_deliveries(shop: Shop, event: Json) -> Iterator[Bad]:
    """A good event in every way in which it is not to be believed."""
    now = datetime.now(UTC)

    def signed(ahead_seconds: float = 0, secret: str = "") -> tuple[bytes, dict[str, str]]:
        liar = FakeStripe(lambda: now, random.Random(0), secret=secret or shop.stripe.secret,
                          signing=lambda: now + timedelta(seconds=ahead_seconds))  # fmt: skip
        return liar.signed(event)

    body, headers = signed()
    yield Bad("forged", 400, *signed(secret="whsec_of_somebody_else"))
    yield Bad("not signed", 400, body, {"Content-Type": "application/json"})
    yield Bad("signed with nonsense", 400, body, {**headers, "Stripe-Signature": "t=,v1=é".encode().decode("latin-1")})
    yield Bad("old", 400, *signed(-3600))
    yield Bad("of the future", 400, *signed(3600))
    yield Bad("altered", 400, body.replace(b'"paid"', b'"Paid"') + b" ", headers)
    yield Bad("cut off", 400, body[:-1], headers)
    yield Bad("not UTF-8", 400, body.replace(b"evt_", b"\xff\xfe\xfd\xfc", 1), headers)
    yield Bad("empty", 400, b"", headers)
    yield Bad("huge", 413, body + b" " * MAX_BODY_BYTES, headers)
    yield Bad("of nobody", 404, body, headers, "/webhooks/nobody")
    for label, raw in (("no JSON", b"{"), ("no event", b"[]"), ("nested", b"[" * 100_000)):
        right = WebhookSignature.generate_signature_header(raw.decode(), shop.stripe.secret, int(now.timestamp()))
        yield Bad(label, 400, raw, {"Stripe-Signature": right})


def refused(scene: Scene, size: Size) -> Done:
    """Each bad delivery of what was really bought is refused, by its status, and gives nothing."""
    wrong: list[str] = []
    hits = tried = 0
    with Shop(scene, max(4, size.contenders // 50)) as shop:
        shop.sell()
        shop.relay.says("running on")
        bought = [
            event for event in shop.stripe.events if event["type"] in ("checkout.session.completed", "invoice.paid")
        ]
        for event in bought:
            for bad in bad_deliveries(shop, event):
                status = posted(shop.port, bad)
                tried += 1
                hits += status == bad.status
                if status != bad.status:
                    wrong.append(f"a delivery that is {bad.label} was answered {status} instead of {bad.status}")
        stored = int(scene.value(RECEIVED))
        if stored or scene.done() != len(shop.accounts):
            wrong.append(f"{stored} of the bad deliveries were stored")
        # And what was refused may come as it is.
        process, _ = shop.deliver(shop.stripe.events)
        if process.wait(PATIENCE_SECONDS):
            raise MissedError(f"{process.name} could not deliver everything")
        shop.settle()
    what = f"{hits} bad deliveries of {len(bought)} payments refused, {tried // len(bought)} kinds; the good ones taken"
    return Done(hits, tried, what, wrong)


def posted(port: int, bad: Bad) -> int:
    """What a delivery is answered with."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=READY_SECONDS)) as connection:
        connection.request("POST", bad.path, bad.body, bad.headers)
        return connection.getresponse().status


# --- Good ones, whatever becomes of them -------------------------------------------------------------

PROCESSES = 3
"""That deliver at a time."""

LOST = 4
"""Of so many purchases one is lost."""


def delivered(scene: Scene, size: Size) -> Done:
    """Good deliveries: repeated, in any order, some lost, by several processes, while relay and worker are killed."""
    with Shop(scene, max(16, size.contenders // 10)) as shop:
        shop.sell()
        lost = shop.accounts[::LOST]
        events = [event for account in shop.accounts if account not in lost for event in shop.events[account]]
        told = []
        for _ in range(PROCESSES):
            mixed = events + scene.random.choices(events, k=len(events) // 2)
            scene.random.shuffle(mixed)
            told.append(shop.deliver(mixed))
        processes = [process for process, _ in told]
        hits, killed = kill_meanwhile(shop, size.kills, processes)
        for process in processes:
            if process.wait(300):
                raise MissedError(f"{process.name} could not deliver everything")
        for event in [*events, *(event for account in lost[::2] for event in shop.events[account])]:
            event["pending_webhooks"] = 0  # for all that the provider knows, somebody has taken it
        sweeps = shop.settle()
        missing = len(lost) - int(scene.value(KNOWN, lost))
        report = shop.reconcile()
        sweeps += shop.settle()
        again = shop.reconcile()
    statuses = Counter(status for _, path in told for status in path.read_text(encoding="ascii").split())
    wrong = [f"a good delivery was answered {status}" for status in statuses.keys() - {"200", "503", "null"}]
    if again["total"] or again["taken"]:
        wrong.append(f"the provider and the ledger differ after they were reconciled: {again}")
    what = (
        f"{sum(statuses.values()):,} attempts to deliver {len(events):,} events by {PROCESSES} processes; {killed};"
        f" {sweeps} sweeps; {missing} purchases lost and found by reconciling ({report['taken']} objects)"
    )
    return Done(hits if missing == len(lost) else 0, size.kills, what, wrong)


KNOWN = "SELECT count(DISTINCT account) FROM payment_operations WHERE account = ANY(%s)"


def kill_meanwhile(shop: Shop, kills: int, delivering: Sequence[Process]) -> tuple[int, str]:
    """Kill the general worker and the relay in turn while events are on their way, at random and at named points.

    Who delivers is stopped while the next one starts, so that something is left to be on its way.

    :returns: how many had something in hand when they died, and what was done.
    """
    scene = shop.scene
    hits = 0
    died: Counter[str] = Counter()
    points = {0: PAYMENT_POINTS, 1: RELAY_POINTS}
    doomed = {0: "", 1: ""}
    for number in range(kills):
        which = number % 2
        victim = (shop.general, shop.relay)[which]
        victim.says((" ready.", "running on")[which])
        for each in delivering:
            each.signal(signal.SIGCONT)
        busy = shop.unfinished if which == 0 else partial(running, delivering)
        with suppress(MissedError):
            if doomed[which]:
                victim.wait(LINGER_SECONDS)
            else:
                eventually(busy, LINGER_SECONDS, "something is on its way")
                time.sleep(scene.random.uniform(0, 0.02))
        if victim.running:
            hits += busy() > 0
            died["at random"] += 1
        else:
            hits += 1
            died[doomed[which]] += 1
        victim.kill()
        for each in delivering:
            each.signal(signal.SIGSTOP)
        last = number + 2 >= kills
        doomed[which] = "" if last or number % 4 > 1 else scene.random.choice(points[which])
        settings = {"CREDITLANE_CRASH_AT": f"{doomed[which]}:{scene.random.randint(1, 3)}"} if doomed[which] else {}
        if which == 0:
            shop.general = shop.start_general(**settings)
        else:
            shop.relay = shop.start_relay(**settings)
    for each in delivering:
        each.signal(signal.SIGCONT)
    told = ", ".join(f"{count} {where}" for where, count in sorted(died.items()))
    return hits, f"{kills} × kill -9 of relay and general worker, {hits} with something in hand ({told})"


def running(processes: Sequence[Process]) -> int:
    """How many processes have not ended."""
    return sum(each.running for each in processes)


LINGER_SECONDS = 10.0
"""How long a process may take to come to where it is to die; then it is killed wherever it is."""


ROWS = (
    Row(14, "webhooks: forged, old, of the future, altered, huge; repeated, reordered, lost and reconciled", (
        Act("not to be believed", refused),
        Act("repeated, reordered, lost", delivered),
    )),
)  # fmt: skip
