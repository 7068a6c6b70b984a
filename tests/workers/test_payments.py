"""Payments from the inbox to the ledger: each once, whatever order, repetition or loss its events come in."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from models.catalog import load_catalog
from models.payment_reading import body, drop, events, look_now, retry
from scripts.fake_stripe import Json
from tests.lives import Act, Books, Life, a_month_ago, books, refused, state
from tests.support import Ledger, execute, rows, travel, value
from workers.outbox import OutboxRow
from workers.payments import RETRY_SECONDS
from workers.reconciling import Report, operations
from workers.stripe_api import UnavailableError

CATALOG = load_catalog("rollover")

THOROUGH = os.environ.get("CREDITLANE_HYPOTHESIS") == "thorough"

_lives = itertools.count(1)


@pytest.fixture
def ledger(ledger: Ledger) -> Ledger:
    """The ledger, by the catalog that has both plans and packs."""
    ledger.catalog = CATALOG
    ledger.writer.catalog = lambda: CATALOG
    ledger.writer.connection.execute("SET idle_session_timeout = 0")  # whole lives are played between two operations
    return ledger


def acts() -> st.SearchStrategy[list[Act]]:
    """What may happen in a month and a bit of a customer's life."""
    which = st.integers(0, 3)
    first = st.one_of(
        st.tuples(st.just("subscribe"), st.just("price_rollover_starter")),
        st.tuples(st.just("subscribe"), st.just("price_rollover_starter"), st.just(7)),
        st.tuples(st.just("subscribe"), st.just("price_rollover_pro_yearly")),
        st.tuples(st.just("pack"), st.just("price_rollover_fifty"), st.integers(1, 2)),
    )
    other = st.one_of(
        st.tuples(st.just("pack"), st.sampled_from(["price_rollover_fifty", "price_rollover_two_hundred"])),
        st.tuples(st.sampled_from(["gift", "billed"])),
        st.tuples(st.just("debit"), st.sampled_from(["succeeded", "failed"])),
        st.tuples(st.just("change"), st.sampled_from(["price_rollover_pro", "price_rollover_starter"])),
        st.tuples(st.just("cancel"), st.booleans()),
        st.tuples(st.just("undo_cancel")),
        st.tuples(st.just("refund"), which, st.sampled_from([10, 50, 100]),
                  st.sampled_from(["succeeded", "succeeded", "pending"])),
        st.tuples(st.sampled_from(["fail_refund", "settle_refund"]), which),
        st.tuples(st.just("dispute"), which, st.booleans()),
        st.tuples(st.just("close"), which, st.sampled_from(["won", "lost", "warning_closed"])),
    )  # fmt: skip
    later = st.sampled_from([("renew",), ("renew",), ("renew", "failed")])

    def life(parts: tuple[Act, list[Act], Act, list[Act]]) -> list[Act]:
        """Months of a year go by the calendar: of a year that is heard of a month late, that month is over."""
        played = [parts[0], *parts[1], parts[2], *parts[3]]
        is_yearly = parts[0][-1] == "price_rollover_pro_yearly"
        return [act for act in played if not (is_yearly and act[0] == "change")]

    return st.tuples(first, st.lists(other, max_size=6), later, st.lists(other, max_size=4)).map(life)


def begin(number: int) -> tuple[Life, Life]:
    """Two lives that begin now, of accounts of their own."""
    begins_at = datetime.now(UTC).replace(microsecond=0)
    first, second = (Life(f"life-{number}-{twin}", 2 * number + twin, begins_at) for twin in (0, 1))
    return first, second


def forget(database: str) -> None:
    """Forget all payments, as if the next life had a provider of its own."""
    tables = ("events", "facts", "groups", "aliases", "bindings", "operations", "watermarks")
    execute(database, f"TRUNCATE {', '.join(f'payment_{table}' for table in tables)}")


def finish(database: str, each: Books) -> None:
    """What waits for something that never comes has waited long enough."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE payment_facts SET heard_at = heard_at - interval '2 hours'")
        connection.execute("UPDATE payment_groups SET next_look_at = ledger_now() WHERE next_look_at IS NOT NULL")
    each.look()


@settings(
    max_examples=400 if THOROUGH else 12,
    deadline=None,
    derandomize=not THOROUGH,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a life is too long to be shrunk within a test's time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(acts(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.3]), st.booleans())
def test_any_order_repetition_and_loss_ends_in_the_same_balances(
    database: str, ledger: Ledger, played: list[Act], chance: random.Random, loss: float, is_listed: bool
) -> None:
    """One hears of everything in its time, the other in the end: the ledger's clock goes with the life.

    :param is_listed: whether what was lost is listed as undelivered; else only the objects tell of it.
    """
    number = next(_lives)
    forget(database)
    one, other = begin(number)
    travel(database, timedelta(0))
    with books(database, ledger, one) as told, books(database, ledger, other) as shuffled:
        for act in played:
            note(str(act))
            for each in (told, shuffled):
                each.life.play(act)
            travel(database, told.life.now - datetime.now(UTC))
            for event in told.life.stripe.undelivered():
                told.deliver(event)
                event["pending_webhooks"] = 0
        events = [event for event in shuffled.life.stripe.events if chance.random() >= loss]
        events += [event for event in events if chance.random() < 0.3]
        chance.shuffle(events)
        note(f"delivered: {[(event['type'], event['created']) for event in events]}")
        for event in events:
            shuffled.deliver(event)
        for event in shuffled.life.stripe.events:
            if event in events or not is_listed:
                event["pending_webhooks"] = 0
        if loss:
            report = shuffled.reconcile()
            note(str(report))
        for each in (told, shuffled):
            finish(database, each)
            ledger.apply("credits.settle", f"settle-{each.life.account}", account=each.life.account)
        assert state(database, shuffled.life.account) == state(database, told.life.account)
        assert not refused(database)
        again = told.reconcile()
        assert not again.taken


# --- What goes wrong ---------------------------------------------------------------------------------


@pytest.fixture
def shop(database: str, ledger: Ledger) -> Iterator[Books]:
    """A life that has only begun."""
    with books(database, ledger, Life("alice", 1, a_month_ago())) as found:
        yield found


def tell(each: Books, *acts: Act) -> None:
    """Play, and deliver what is heard of it at once."""
    for act in acts:
        each.life.play(act)
    for event in each.life.stripe.undelivered():
        each.deliver(event)
        event["pending_webhooks"] = 0


def became(database: str, kind: str) -> list[tuple[str, str | None]]:
    """What became of facts of a kind."""
    return rows(database, "SELECT status, code FROM payment_facts WHERE kind = %s ORDER BY key", kind)


def available(database: str, account: str = "alice") -> int:
    """Credits."""
    return int(value(database, "SELECT available_micro FROM accounts WHERE account = %s", account)) // 1_000_000


FIFTY = ("pack", "price_rollover_fifty")


def test_what_was_paid_for_waits_for_an_account_that_is_not_open(database: str, ledger: Ledger) -> None:
    with books(database, ledger, Life("alice", 1, a_month_ago())) as each:
        each.life.account = "bob"
        tell(each, FIFTY, ("refund", 0, 50))
        assert became(database, "PackPaid") == [("waiting", "account_not_open")]
        assert value(database, "SELECT count(*) FROM payment_operations") == 0
        ledger.apply("credits.open", "open-bob", account="bob")
        each.look()
        assert value(database, "SELECT count(*) FROM payment_operations") == 0  # its time has not come
        travel(database, timedelta(minutes=2))
        each.look()
    assert available(database, "bob") == 25
    assert became(database, "PackPaid") == [("applied", None)]
    assert value(database, "SELECT next_look_at FROM payment_groups") is None


def test_a_price_that_the_catalog_has_not_is_parked_until_it_has(shop: Books, database: str, ledger: Ledger) -> None:
    shop.life.stripe.add_price("price_new", 100, "usd")
    tell(shop, ("pack", "price_new"))
    assert became(database, "PackPaid") == [("parked", "unknown_price")]
    with_it = msgspec.structs.replace(
        CATALOG, packs={**CATALOG.packs, "new": msgspec.structs.replace(CATALOG.packs["fifty"], prices=["price_new"])}
    )
    shop.processor = shop.make(with_it)
    assert look_now(shop.connection) == 1
    shop.look()
    assert became(database, "PackPaid") == [("applied", None)]
    assert available(database) == 50


def test_a_provider_out_of_reach_is_asked_again_and_in_the_end_given_up(shop: Books, database: str) -> None:
    away = UnavailableError("unreachable", "no answer")

    def fetch(kind: str, id: str) -> Json:
        raise away

    shop.life.play(FIFTY)
    event = next(each for each in shop.life.stripe.events if each["type"] == "checkout.session.completed")
    shop.processor = shop.make(CATALOG, fetch)
    shop.deliver(event)
    (inbox,) = events(shop.connection)
    assert (inbox.status, inbox.code, inbox.attempts) == ("received", "provider_away", 1)
    assert inbox.next_attempt_at is not None
    for _ in RETRY_SECONDS:
        shop.processor.apply(inbox.id)
    (inbox,) = events(shop.connection, status="parked")
    assert inbox.code == "provider_away"
    assert retry(shop.connection, [inbox.id], "ann") == [inbox.id]
    shop.processor = shop.make(CATALOG)
    assert shop.processor.apply(inbox.id).status == "done"
    assert available(database) == 50


def test_what_cannot_be_read_is_parked_with_its_reason(shop: Books, database: str) -> None:
    shop.life.play(FIFTY)
    event = next(each for each in shop.life.stripe.events if each["type"] == "checkout.session.completed")
    shop.deliver(event | {"api_version": "2031-01-01.unheard"})
    (parked,) = events(shop.connection, status="parked")
    assert parked.code == "unknown_release"
    assert body(shop.connection, parked.id) is not None
    assert drop(shop.connection, [parked.id], "ann") == [parked.id]
    assert drop(shop.connection, [parked.id], "ann") == []
    assert shop.processor.apply(parked.id).status == "nothing to do"
    assert available(database) == 0


def test_an_event_that_says_nothing_to_us_is_ignored(shop: Books) -> None:
    tell(shop, FIFTY)
    found = {each.type: each.status for each in events(shop.connection)}
    assert found["payment_intent.created"] == "ignored"
    assert found["checkout.session.completed"] == "done"


def test_a_payment_that_fails_is_told_of_once(shop: Books, database: str) -> None:
    tell(shop, ("subscribe", "price_rollover_starter"), ("renew", "failed"))
    for event in shop.life.stripe.events:
        shop.deliver(event)
    told = rows(database, "SELECT kind, details::text FROM notices WHERE kind = 'payment_failed'")
    assert len(told) == 1
    assert json.loads(told[0][1])["amount"] == "9.99 USD"
    assert len([key for key in shop.applying.told if key.startswith("payment_failed:")]) == 1


def test_two_workers_with_the_same_payment_give_it_once(shop: Books, database: str, ledger: Ledger) -> None:
    shop.life.play(FIFTY)
    told = [event for event in shop.life.stripe.events if event["type"] in ("checkout.session.completed",
                                                                           "payment_intent.succeeded")]  # fmt: skip
    ids = [shop.keep(each | {"id": f"{each['id']}_{copy}"}) for each in told for copy in range(4)]
    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(apply_apart, shop, database, ids[start::4]) for start in range(4)]
        assert sum(each.result() for each in working) == len(ids)
    assert value(database, "SELECT count(*) FROM payment_operations") == 1
    assert value(database, "SELECT count(*) FROM payment_groups") == 1
    shop.applying.publish(left_in_outbox(database))
    assert available(database) == 50


def apply_apart(shop: Books, database: str, ids: Sequence[int]) -> int:
    """Apply events on a connection of one's own, without publishing; gives how many."""
    with psycopg.connect(database, autocommit=True) as connection:
        processor = shop.make(CATALOG, connection=connection, outbox=Keeping())
        return sum(processor.apply(event).status == "done" for event in ids)


class Keeping:
    """Publishes nothing: what was committed stays for the sweep."""

    def publish(self, sent: Sequence[OutboxRow]) -> None:
        """Leave it."""


def left_in_outbox(database: str) -> list[OutboxRow]:
    """What was not published."""
    found = rows(
        database,
        "SELECT id, account, exchange, task, operation, arguments::text, created_at FROM outbox"
        " WHERE exchange = '' ORDER BY id",
    )
    return [
        OutboxRow(id, account, exchange, task, operation, arguments.encode(), created_at)
        for id, account, exchange, task, operation, arguments, created_at in found
    ]


def test_nothing_overtakes_what_was_left_behind(shop: Books, database: str) -> None:
    shop.processor = shop.make(CATALOG, outbox=Keeping())
    tell(shop, ("subscribe", "price_rollover_starter"))
    shop.processor = shop.make(CATALOG)
    tell(shop, ("renew",))
    waiting = left_in_outbox(database)
    assert [row.task for row in waiting] == ["plans.renew", "plans.renew"]
    assert waiting[0].arguments < waiting[1].arguments  # the earlier period stands first
    shop.applying.publish(waiting)
    assert available(database) == 200
    assert not refused(database)


def test_a_year_that_is_given_up_for_a_month_ends_with_the_month(database: str, ledger: Ledger) -> None:
    begins_at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=3)
    with books(database, ledger, Life("alice", 1, begins_at)) as each:
        tell(each, ("subscribe", "price_rollover_pro_yearly"), ("change", "price_rollover_starter"))
        assert available(database) == 500
        travel(database, timedelta(days=32))
        tell(each, ("renew",))
    assert not refused(database)
    assert rows(database, "SELECT plan, status, pending FROM subscriptions") == [("starter", "active", None)]
    assert value(database, "SELECT paid_until - period_start < interval '32 days' FROM subscriptions")
    assert value(database, "SELECT sum(granted_micro) FROM grants") == 600_000_000


def test_a_plan_for_nothing_is_given_without_being_worth_anything(shop: Books, database: str) -> None:
    shop.life.subscribe("price_rollover_starter", coupon="free")
    tell(shop)
    assert rows(database, "SELECT granted_micro, price_minor FROM grants") == [(100_000_000, 0)]


# --- Comparing ---------------------------------------------------------------------------------------


def test_what_was_lost_is_found_and_what_differs_is_named(shop: Books, database: str, ledger: Ledger) -> None:
    for act in (FIFTY, ("subscribe", "price_rollover_starter"), ("refund", 0, 50)):
        shop.life.play(act)  # and nothing is heard of it
    report = shop.reconcile()
    assert report.taken == 3
    assert report.total == 0
    assert report.compared["session"] == 2
    assert available(database) == 25 + 100
    assert shop.reconcile().taken == 0
    # The provider has something that we cannot place, and we something that it has not.
    shop.life.stripe.add_price("price_other", 100, "usd")
    shop.life.play(("pack", "price_other"))
    session = shop.life.bought[0]
    shop.life.stripe._store["checkout.session"].pop(session)
    codes = {(each.code, each.what.split()[0]) for each in shop.reconcile().differences}
    assert codes == {("unknown_price", "session"), ("not_at_provider", "session")}


def test_what_a_subscription_has_become_is_found_though_no_event_says_so(database: str, ledger: Ledger) -> None:
    begins_at = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
    with books(database, ledger, Life("alice", 1, begins_at)) as each:
        tell(each, ("subscribe", "price_rollover_starter"), ("change", "price_rollover_pro"))
        told: tuple[tuple[Act, bool], ...] = (
            (("cancel", True), True),
            (("undo_cancel",), False),
            (("cancel", True), True),
        )
        for hour, (act, cancels) in enumerate(told):
            each.life.play(act)
            for event in each.life.stripe.events:
                event["pending_webhooks"] = 0
            travel(database, timedelta(hours=hour))
            each.reconcile()
            assert rows(database, "SELECT plan, cancels FROM subscriptions") == [("pro", cancels)]
        known = value(database, "SELECT count(*) FROM payment_events")
        travel(database, timedelta(hours=len(told)))
        each.reconcile()
        assert value(database, "SELECT count(*) FROM payment_events") == known


def test_what_is_paid_for_reaches_a_frozen_account_and_waits_for_a_closed_one(
    shop: Books, database: str, ledger: Ledger
) -> None:
    def by_hand(what: str) -> str:
        done = ledger.apply(f"accounts.{what}", what, account=shop.life.account, actor="ann", reason="a test")
        return str(done["status"])

    assert by_hand("freeze") == "applied"
    tell(shop, FIFTY)
    assert became(database, "PackPaid") == [("applied", None)]
    assert available(database) == 50
    assert by_hand("close") == "applied"
    tell(shop, FIFTY)
    assert became(database, "PackPaid") == [("applied", None), ("parked", "account_closed")]
    assert by_hand("reopen") == "applied"
    assert look_now(shop.connection) == 1
    shop.look()
    assert available(database) == 50


def test_what_a_lead_paid_for_before_it_signed_up_reaches_its_user(shop: Books, database: str, ledger: Ledger) -> None:
    shop.life.account = "visitor"
    ledger.apply("credits.open", "open", account="visitor", kind="lead")
    ledger.apply("credits.convert", "signed up", account="visitor", to="alice")
    tell(shop, FIFTY)
    tell(shop, ("subscribe", "price_rollover_starter"))
    assert became(database, "PackPaid") == [("applied", None)]
    assert became(database, "PeriodPaid") == [("parked", "account_closed")]
    assert value(database, "SELECT reason FROM payment_facts WHERE kind = 'PeriodPaid'").endswith("has become 'alice'")
    ((after, lead),) = rows(
        database, "SELECT arguments::jsonb ->> 'after', account FROM outbox WHERE task = 'credits.convert'"
    )
    assert lead == "visitor"
    assert value(database, "SELECT name FROM operations WHERE operation = %s", after) == "credits.grant"
    assert available(database, "visitor") == 50


def test_what_the_ledger_refused_is_a_difference(shop: Books, database: str) -> None:
    tell(shop, ("subscribe", "price_rollover_starter"))
    execute(
        database,
        "INSERT INTO payment_operations (operation, provider, livemode, effect, group_id, account, name, arguments,"
        " created_at) VALUES ('payment.x', 'stripe', false, 'x', 1, 'alice', 'plans.subscribe', '{}', ledger_now()),"
        " ('payment.y', 'stripe', false, 'y', 1, 'alice', 'plans.subscribe', '{}', ledger_now() - interval '1 hour')",
    )
    shop.applying.ledger.apply("plans.subscribe", "payment.x", account="alice", plan="pro")
    report = Report()
    operations(shop.connection, report, shop.life.begins_at)
    assert {each.code for each in report.differences} == {"refused_already_subscribed", "not_applied"}


def test_what_breaks_inside_is_parked_with_the_rest_undone(
    shop: Books, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.life.play(FIFTY)
    event = next(each for each in shop.life.stripe.events if each["type"] == "checkout.session.completed")

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("workers.payments.settle", broken)
    shop.deliver(event)
    (parked,) = events(shop.connection, status="parked")
    assert (parked.code, value(database, "SELECT count(*) FROM payment_facts")) == ("internal_error", 0)
    monkeypatch.undo()
    retry(shop.connection, [parked.id], "ann")
    assert shop.processor.apply(parked.id).status == "done"
    assert available(database) == 50
