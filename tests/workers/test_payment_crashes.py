"""Workers that die by kill -9 on the way from an event of the inbox to the lane: what was paid for is given once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from creditlane.client import CreditClient
from creditlane.errors import BrokerUnavailableError
from creditlane.sending import Sender, make_sender
from models.payment_inbox import store
from models.settings import settings
from schedules import outbox, payments
from scripts.fake_stripe import SECRET
from tests.conftest import LANES, Spawn
from tests.lives import Life
from tests.support import Worker, eventually, rows, travel, value
from workers import notices
from workers.crash import OUTBOX_POINTS, PAYMENT_POINTS
from workers.providers.stripe import Stripe
from workers.receiving import applying

LATER = timedelta(seconds=max(outbox.AGE_SECONDS, payments.AGE_SECONDS) + 1)
DIES_SECONDS = 60.0
GIVEN = [(100_000_000,)]
"""What the plan gives in a month."""

WAYS = {
    "payment-before-commit": ("received", 0, 0),
    "payment-after-commit": ("done", 1, 1),
    "before-publish": ("done", 1, 1),
    "after-publish": ("done", 1, 1),
}
"""Where a worker dies, and what it leaves: what became of the event, how many operations were kept, and how many of
them stand in the outbox."""

LEFT = """
SELECT e.status, (SELECT count(*) FROM payment_operations WHERE account = %s),
       (SELECT count(*) FROM outbox WHERE account = %s AND exchange = '')
FROM payment_events e WHERE e.id = %s
"""


@pytest.fixture
def shop(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What workers of payments are set to, and the settings of a sweep in this process."""
    for name, setting in (("DATABASE_URL", database), ("BROKER_URL", broker_url), ("LANES", str(LANES))):
        monkeypatch.setenv(f"CREDITLANE_{name}", setting)
    settings.cache_clear()
    notices.sender.cache_clear()
    yield {
        "CREDITLANE_CATALOG": "rollover",
        "CREDITLANE_PAYMENTS_LIVEMODE": "false",
        "CREDITLANE_STRIPE_WEBHOOK_SECRETS": SECRET,
    }
    settings.cache_clear()
    notices.sender.cache_clear()


def subscribed(account: str, seed: int) -> Life:
    """A customer who has just paid for the first month."""
    life = Life(account, seed, datetime.now(UTC).replace(microsecond=0))
    life.play(("subscribe", "price_rollover_starter"))
    return life


def deliver(life: Life, type: str, database: str, broker_url: str) -> int:
    """Take an event as the relay does: store it, and tell of it; gives its row."""
    (event,) = (each for each in life.stripe.events if each["type"] == type)
    raw, headers = life.stripe.signed(event)
    adapter = Stripe([SECRET], livemode=False)
    with psycopg.connect(database, autocommit=True) as connection, closing(make_sender(broker_url)) as sender:
        row = store(connection, adapter.verify(raw, headers, life.now), raw, "webhook").id
        eventually(lambda: is_sent(sender, row))
    return row


def is_sent(sender: Sender, row: int) -> bool:
    """Tell of a row; on RabbitMQ that is refused until a worker has bound its queue."""
    try:
        sender.send([applying(row)])
    except BrokerUnavailableError:
        return False
    return True


def given(database: str, account: str) -> list[tuple[int, ...]]:
    """Each lot that an account was given."""
    return rows(database, "SELECT granted_micro FROM grants WHERE account = %s", account)


def dies(worker: Worker) -> None:
    """Wait until a worker has come to its crash point."""
    eventually(lambda: not worker.running, DIES_SECONDS, f"{worker.name} dies at its crash point")
    assert worker.process.returncode == -9, worker.logged()


@pytest.mark.timeout(240)
def test_a_worker_killed_on_the_way_of_a_payment_loses_and_doubles_no_credit(
    shop: dict[str, str], spawn: Spawn, client: CreditClient, database: str, broker_url: str
) -> None:
    assert set(WAYS) == {*PAYMENT_POINTS, *OUTBOX_POINTS}
    spawn("lanes", **shop)
    lives = {point: subscribed(f"dies-{point}", seed) for seed, point in enumerate(WAYS)}
    for life in lives.values():
        client.open(life.account, id="open", wait=30)
    events: dict[str, int] = {}
    for point, life in lives.items():
        doomed = spawn(point, kind="general", CREDITLANE_CRASH_AT=point, **shop)
        events[point] = deliver(life, "invoice.paid", database, broker_url)
        dies(doomed)
    for point, left in WAYS.items():
        assert rows(database, LEFT, lives[point].account, lives[point].account, events[point]) == [left], point
    # What was published before the crash is applied, and will be sent once more.
    published = lives["after-publish"].account
    eventually(lambda: given(database, published) == GIVEN)
    assert [given(database, lives[point].account) for point in WAYS if point != "after-publish"] == [[]] * 3

    travel(database, LATER)
    assert outbox.sweep.apply(throw=True).get()["published"] >= 3
    assert payments.sweep.apply(throw=True).get() == {"events": 1, "groups": 0}
    spawn("survivor", kind="general", **shop)
    accounts = [life.account for life in lives.values()]
    eventually(lambda: [given(database, account) for account in accounts] == [GIVEN] * len(WAYS))
    eventually(lambda: value(database, "SELECT count(*) FROM outbox WHERE exchange = ''") == 0)
    # Everything a second time: the events that say so already, and another one that says the same.
    for life in lives.values():
        deliver(life, "invoice.paid", database, broker_url)
        deliver(life, "checkout.session.completed", database, broker_url)
    eventually(lambda: not value(database, "SELECT count(*) FROM payment_events WHERE status = 'received'"))
    client.consume(published, amount=1, id="use", wait=30)  # behind all that its lane was sent
    assert [given(database, account) for account in accounts] == [GIVEN] * len(WAYS)
    applied = "SELECT status, count(*) FROM operations WHERE name = 'plans.renew' GROUP BY 1"
    assert rows(database, applied) == [("applied", len(WAYS))]
    assert value(database, "SELECT count(*) FROM payment_operations") == len(WAYS)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("broker_kind", ["rabbitmq"], indirect=True)
def test_a_broker_that_sees_a_worker_die_gives_its_event_to_another(
    shop: dict[str, str], spawn: Spawn, client: CreditClient, database: str, broker_url: str
) -> None:
    life = Life("alice", 1, datetime.now(UTC).replace(microsecond=0))
    life.play(("pack", "price_rollover_fifty"))
    with life.stripe as provider:
        asking = {**shop, "CREDITLANE_STRIPE_API_KEY": provider.key, "CREDITLANE_STRIPE_API_BASE": provider.url}
        spawn("lanes", **shop)
        doomed = spawn("doomed", kind="general", CREDITLANE_CRASH_AT=PAYMENT_POINTS[0], **asking)
        client.open(life.account, id="open", wait=60)
        deliver(life, "checkout.session.completed", database, broker_url)
        dies(doomed)
        assert value(database, "SELECT count(*) FROM payment_operations") == 0
        spawn("survivor", kind="general", **asking)
        eventually(lambda: given(database, life.account) == [(50_000_000,)])  # and no sweep had to come
    assert value(database, "SELECT count(*) FROM payment_operations") == 1
