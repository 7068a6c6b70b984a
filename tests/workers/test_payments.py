"""Payments from the inbox to the ledger: each once, whatever order, repetition or loss its events come in."""

from __future__ import annotations

import itertools
import random

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from models.catalog import load_catalog
from tests.lives import Act, Books, Life, a_month_ago, books, ends, refused, state
from tests.support import Ledger, execute

CATALOG = load_catalog("rollover")

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
        st.tuples(st.just("debit"), st.sampled_from(["succeeded", "declined"])),
        st.tuples(st.just("change"), st.sampled_from(["price_rollover_pro", "price_rollover_starter"])),
        st.tuples(st.just("cancel"), st.booleans()),
        st.tuples(st.just("undo_cancel")),
        st.tuples(st.just("refund"), which, st.sampled_from([10, 50, 100]),
                  st.sampled_from(["succeeded", "succeeded", "pending"])),
        st.tuples(st.sampled_from(["fail_refund", "settle_refund"]), which),
        st.tuples(st.just("dispute"), which, st.booleans()),
        st.tuples(st.just("close"), which, st.sampled_from(["won", "lost", "warning_closed"])),
    )  # fmt: skip
    later = st.sampled_from([("renew",), ("renew",), ("renew", "declined")])
    return st.tuples(first, st.lists(other, max_size=6), later, st.lists(other, max_size=4)).map(
        lambda parts: [parts[0], *parts[1], parts[2], *parts[3]]
    )


def begin(number: int) -> tuple[Life, Life]:
    """Two lives that begin at one instant, of accounts of their own."""
    begins_at = a_month_ago()
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
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a life is too long to be shrunk within a test's time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(acts(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.3]))
def test_any_order_repetition_and_loss_ends_in_the_same_balances(
    database: str, ledger: Ledger, played: list[Act], chance: random.Random, loss: float
) -> None:
    number = next(_lives)
    forget(database)
    one, other = begin(number)
    with books(database, ledger, one) as told, books(database, ledger, other) as shuffled:
        for act in played:
            note(str(act))
            for each in (told, shuffled):
                each.life.play(act)
            for event in told.life.stripe.undelivered():
                told.deliver(event)
                event["pending_webhooks"] = 0
        events = [event for event in shuffled.life.stripe.events if chance.random() >= loss]
        events += [event for event in events if chance.random() < 0.3]
        chance.shuffle(events)
        note(f"delivered: {[(event['type'], event['created']) for event in events]}")
        for event in events:
            shuffled.deliver(event)
            event["pending_webhooks"] = 0
        if loss:
            report = shuffled.reconcile()
            note(str(report))
        for each in (told, shuffled):
            finish(database, each)
        assert state(database, shuffled.life.account) == state(database, told.life.account)
        assert ends(database, shuffled.life.account) == pytest.approx(ends(database, told.life.account), abs=600)
        assert not refused(database)
        again = told.reconcile()
        assert not again.taken
