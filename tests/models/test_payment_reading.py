"""Payments as an operator reads them: one purchase by whatever name it has, and the inbox page by page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.catalog import load_catalog
from models.payment_reading import Explanation, events, explain, look_now
from tests.lives import Books, Life, a_month_ago, books
from tests.support import Ledger, execute, rows

PACK, PLAN = "price_rollover_fifty", "price_rollover_starter"


@pytest.fixture
def shop(database: str, ledger: Ledger) -> Iterator[Books]:
    """Alice has bought two packs and a plan; of one pack a half was refunded, the other is in dispute."""
    ledger.catalog = catalog = load_catalog("rollover")
    ledger.writer.catalog = lambda: catalog
    with books(database, ledger, Life("alice", 1, a_month_ago())) as found:
        for act in (("pack", PACK), ("refund", 0, 50), ("pack", PACK), ("dispute", 1), ("subscribe", PLAN)):
            found.life.play(act)
        for event in found.life.stripe.undelivered():
            found.deliver(event)
        yield found


def of(each: Books, name: str) -> Explanation:
    """What is known by a name."""
    found = explain(each.connection, name)
    assert found is not None, name
    return found


def test_a_purchase_is_found_by_each_of_its_names(shop: Books) -> None:
    stripe = shop.life.stripe
    first, second, invoice = shop.life.bought
    for bought, ids in (
        (first, shop.life.refunds),
        (second, [*shop.life.disputes, f"{shop.life.disputes[0]}:created"]),
        (invoice, [stripe.all_of("checkout.session")[0]["id"], shop.life.subscription]),
    ):
        charge = stripe.charge_of(bought)
        found = of(shop, bought)
        assert len(found.operations) > 0
        names = [charge["id"], charge["payment_intent"], *ids, f"stripe:{bought}"]
        names += [each.operation for each in found.operations]
        names += [fact.key for fact in found.facts]
        for name in names:
            assert of(shop, str(name)) == found, name


def test_nothing_is_known_by_names_that_are_not_its_own(shop: Books) -> None:
    first, *_ = shop.life.bought
    known = of(shop, first)
    for name in ("", "cs_none", first[:-1], first + "x", first.swapcase(), "%", f"paypal:{first}", "alice"):
        assert explain(shop.connection, name) is None, name
    assert not {fact.key for fact in of(shop, shop.life.bought[1]).facts} & {fact.key for fact in known.facts}


def test_what_became_of_a_refunded_pack(shop: Books) -> None:
    first, *_ = shop.life.bought
    (refund,) = shop.life.refunds
    found = of(shop, first)
    assert {first, shop.life.stripe.charge_of(first)["id"]} <= set(found.names)
    assert {(fact.kind, fact.key, fact.status) for fact in found.facts if fact.kind != "Linked"} == {
        ("PackPaid", first, "applied"),
        ("RefundChanged", refund, "applied"),
    }
    grant, claw_back = found.operations
    assert (grant.name, grant.status, grant.purchase) == ("credits.grant", "applied", f"stripe:{first}")
    taken_back = 50_000_000 * 349 // 699  # a half, in whole cents
    assert (claw_back.name, claw_back.status, claw_back.charged_micro) == ("credits.claw_back", "applied", taken_back)
    (lot,) = found.lots
    assert (lot.account, lot.source, lot.purchase) == ("alice", "pack", f"stripe:{first}")
    assert (lot.granted_micro, lot.available_micro) == (50_000_000, 50_000_000 - taken_back)
    # All that was given is somewhere.
    assert lot.granted_micro == (
        lot.available_micro + lot.held_micro + lot.consumed_micro + lot.expired_micro + lot.revoked_micro
    )


def test_an_operation_that_no_lane_has_applied_is_sent(shop: Books, database: str) -> None:
    execute(
        database,
        "INSERT INTO payment_operations (operation, provider, livemode, effect, group_id, account, name, arguments,"
        " created_at) SELECT 'payment.x', 'stripe', false, 'x', min(group_id), 'alice', 'credits.grant', '{}',"
        " ledger_now() FROM payment_facts",
    )
    last = of(shop, "payment.x").operations[-1]
    assert (last.operation, last.status, last.applied_at, last.charged_micro) == ("payment.x", "sent", None, None)
    execute(database, "DELETE FROM payment_operations WHERE operation = 'payment.x'")


def test_the_inbox_is_read_page_by_page(shop: Books) -> None:
    every = events(shop.connection, limit=200)
    assert [each.id for each in every] == sorted((each.id for each in every), reverse=True)
    assert len(every) == len(shop.life.stripe.events)
    paged, before = [], None
    while page := events(shop.connection, limit=7, before=before):
        paged += page
        before = page[-1].id
    assert paged == every
    ignored = events(shop.connection, status="ignored", limit=200)
    assert ignored == [each for each in every if each.status == "ignored"]
    assert ignored != []


def test_what_waits_is_looked_at_again_of_one_purchase_or_of_all(shop: Books, database: str) -> None:
    shop.life.stripe.add_price("price_new", 100, "usd")
    for _ in range(2):
        shop.life.play(("pack", "price_new"))
    for event in shop.life.stripe.undelivered():
        shop.deliver(event)
    one, other = shop.life.bought[-2:]
    due = "SELECT count(*) FROM payment_groups WHERE next_look_at <= ledger_now()"
    assert look_now(shop.connection, shop.life.bought[0]) == 0  # nothing of it waits
    assert look_now(shop.connection, "cs_none") == 0
    assert rows(database, due) == [(0,)]
    assert look_now(shop.connection, one) == 1
    assert rows(database, due) == [(1,)]
    assert look_now(shop.connection) == 2
    assert {fact.status for fact in of(shop, other).facts if fact.kind == "PackPaid"} == {"parked"}
