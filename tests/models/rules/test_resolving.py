"""What the facts of a payment amount to: what is sold, in which order, what waits, and what is parked."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from models.catalog import parse_catalog
from models.rules.calendar import add_months
from models.rules.catalog import Money
from models.rules.facts import (
    Alias,
    DisputeChanged,
    Fact,
    Item,
    Line,
    Linked,
    PackPaid,
    PaymentFailed,
    PeriodPaid,
    RefundChanged,
    SubscriptionChanged,
)
from models.rules.resolving import PATIENCE_SECONDS, Heard, Order, Resolution, purchase_name, resolve

NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
JANUARY, FEBRUARY, MARCH = (datetime(2027, month, 1, tzinfo=UTC) for month in (1, 2, 3))
PATIENCE = timedelta(seconds=PATIENCE_SECONDS)

CATALOG = parse_catalog("""
[catalog]
name = "shop"
[features.image]
price = "1"
[packs.small]
credits = "25"
price = "4.99 EUR"
prices = ["price_small"]
expires_days = 90
[packs.bundle]
price = "10.00 EUR"
prices = ["price_bundle"]
[[packs.bundle.grants]]
credits = "20"
features = ["image"]
[[packs.bundle.grants]]
credits = "10"
source = "bonus"
[packs.custom]
quote_above = "500"
[plans.basic]
monthly_credits = "100"
price = "9.00 EUR"
prices = ["price_basic"]
trial_credits = "5"
trial_days = 14
[plans.more]
monthly_credits = "300"
price = "20.00 EUR"
prices = ["price_more"]
[plans.yearly]
monthly_credits = "100"
price = "90.00 EUR"
interval = "year"
prices = ["price_yearly"]
[plans.endless]
unlimited = true
price = "5.00 EUR"
prices = ["price_endless"]
""", "shop.toml")  # fmt: skip


def about(*aliases: str, account: str | None = "alice", at: datetime = NOW) -> dict[str, Any]:
    """What every fact says; aliases as ``session:cs_1``."""
    named = tuple(sorted(Alias(*alias.split(":")) for alias in aliases))
    return {"provider": "stripe", "livemode": True, "account": account, "aliases": named, "occurred_at": at}


def pack(*lines: tuple[str, int, int | None], paid: int = 499, key: str = "cs_1", **changes: Any) -> PackPaid:
    """A paid session."""
    sold = tuple(Line(price=price, quantity=quantity, amount_minor=amount) for price, quantity, amount in lines)
    fields = about(f"session:{key}", "payment_intent:pi_1") | {"currency": "EUR", "paid_minor": paid, "lines": sold}
    return PackPaid(key=key, **fields | changes)


def period(start: datetime, invoice: str, price: str = "price_basic", reason: str = "cycle",
           **changes: Any) -> PeriodPaid:  # fmt: skip
    """A paid month of the subscription ``sub_1``."""
    end = add_months(start, 1, "UTC")
    fields = about(f"invoice:{invoice}", f"payment_intent:pi_{invoice}", at=start) | {
        "subscription": "sub_1", "price": price, "period_start": start, "period_end": end, "reason": reason,
        "currency": "EUR", "amount_minor": 900, "paid_minor": 900,
    }  # fmt: skip
    return PeriodPaid(key=f"si_1:{int(start.timestamp())}:{price}", **fields | changes)


def refund(amount: int, key: str = "re_1", status: str = "settled", of: str = "payment_intent:pi_1",
           **changes: Any) -> RefundChanged:  # fmt: skip
    """Money back."""
    fields = about(of, account=None) | {"status": status, "currency": "EUR", "amount_minor": amount}
    return RefundChanged(key=key, **fields | changes)


def dispute(stage: str, withdrawn: int = 0, movements: int = 0, *, is_open: bool = True) -> DisputeChanged:
    """A stage of a dispute of the pack."""
    return DisputeChanged(
        key=f"dp_1:{stage}", dispute="dp_1", stage=stage, status="any", is_open=is_open, currency="EUR",  # type: ignore[arg-type]
        amount_minor=499, withdrawn_minor=withdrawn, movements=movements, **about("payment_intent:pi_1", account=None),
    )  # fmt: skip


def subscribed(status: str = "active", **changes: Any) -> SubscriptionChanged:
    """The state of the subscription."""
    items = (Item(id="si_1", price="price_basic", quantity=1, period_start=FEBRUARY, period_end=MARCH),)
    fields = about("subscription:sub_1") | {"status": status, "items": items}
    return SubscriptionChanged(key="sub_1", **fields | changes)


def settle(*facts: Fact, issued: dict[str, Any] | None = None, at: datetime = NOW,
           orders: dict[str, Order] | None = None, bound: str | None = None,
           current: str | None = None) -> Resolution:  # fmt: skip
    """What facts that were heard just now amount to, whatever order they stand in."""
    found = [
        resolve([Heard(fact, NOW) for fact in order], issued or {}, at, CATALOG, orders or {}, bound, current)
        for order in itertools.islice(itertools.permutations(facts), 120)
    ]
    assert all(each == found[0] for each in found)
    return found[0]


def names(resolution: Resolution) -> list[str]:
    """What is sent, by key."""
    return [effect.key for effect in resolution.effects]


def became(resolution: Resolution, fact: Fact) -> tuple[str, str | None]:
    """What became of a fact."""
    verdict = resolution.verdicts[type(fact).__name__, fact.key]
    return verdict.status, verdict.code


def sent(resolution: Resolution) -> dict[str, Any]:
    """What was sent, as the next call is told of it."""
    return {effect.key: effect.arguments for effect in resolution.effects}


# --- Packs -------------------------------------------------------------------------------------------


def test_a_pack_gives_the_credits_of_its_price_at_what_was_paid() -> None:
    found = settle(pack(("price_small", 2, 798), paid=798))
    (grant,) = found.effects
    assert grant.name == "credits.grant"
    assert grant.arguments == {
        "account": "alice", "amount": "50", "source": "pack", "purchase": "stripe:cs_1", "expires_in": 90 * 86400,
        "unit_price": {"minor": 798, "currency": "EUR", "per": "50"},
    }  # fmt: skip
    assert settle(pack(("price_small", 2, 798), paid=798), issued=sent(found)).effects == []


def test_what_was_paid_for_a_bundle_is_shared_to_the_last_cent() -> None:
    found = settle(pack(("price_bundle", 1, 1000), paid=1000))
    first, second = (effect.arguments for effect in found.effects)
    assert (first["amount"], first["features"], first["unit_price"]["minor"]) == ("20", ["image"], 666)
    assert (second["amount"], second["source"], second["unit_price"]["minor"]) == ("10", "bonus", 334)


def test_each_line_of_a_session_is_given_by_itself() -> None:
    paid = pack(("price_small", 1, 499), ("price_other", 1, 100), ("price_bundle", 1, 1000), paid=1599)
    found = settle(paid)
    assert names(found) == ["grant:cs_1:price_small:0", "grant:cs_1:price_bundle:0", "grant:cs_1:price_bundle:1"]
    assert became(found, paid) == ("parked", "unknown_price")


def test_a_plan_is_not_sold_once() -> None:
    paid = pack(("price_basic", 1, 900), paid=900)
    assert became(settle(paid), paid) == ("parked", "unknown_price")


def test_a_pack_for_nothing_is_given_without_being_worth_anything() -> None:
    (grant,) = settle(pack(("price_small", 1, 0), paid=0)).effects
    assert grant.arguments["unit_price"]["minor"] == 0


def test_whose_it_is_may_be_known_otherwise() -> None:
    paid = pack(("price_small", 1, 499), account=None)
    nobody = settle(paid)
    assert nobody.effects == []
    assert became(nobody, paid) == ("waiting", "unknown_account")
    assert settle(paid, bound="bob").account == "bob"
    linked = Linked(key="ch_1", **about("payment_intent:pi_1", account="carol"))
    assert settle(paid, linked).account == "carol"


QUOTE = Order(id="order.1", account="alice", pack="custom", credits_micro=800_000_000, price=Money(9900, "EUR"))


@pytest.mark.parametrize(
    ("paid", "code"),
    [
        (pack(paid=9900, reference="order.1"), None),
        (pack(paid=9901, reference="order.1"), None),  # more than it costs: tax on top
        (pack(paid=9899, reference="order.1"), "other_amount"),
        (pack(paid=9900, reference="order.1", currency="USD"), "other_amount"),
        (pack(paid=9900, reference="order.1", account="mallory"), "other_account"),
        (pack(paid=9900, reference="order.2"), "unknown_order"),
    ],
)
def test_a_quote_is_given_where_the_amount_fits(paid: PackPaid, code: str | None) -> None:
    found = settle(paid, orders={"order.1": QUOTE})
    assert became(found, paid)[1] == code
    assert [effect.arguments["amount"] for effect in found.effects] == ([] if code else ["800"])
    assert [effect.order for effect in found.effects] == ([] if code else ["order.1"])


PLACED = Order(id="CL1", account="alice", pack="small", credits_micro=25_000_000, price=Money(499, "EUR"))


def test_a_transfer_that_names_an_order_is_for_whoever_ordered() -> None:
    transfer = pack(paid=499, reference="CL1", account=None)
    (grant,) = settle(transfer, orders={"CL1": PLACED}).effects
    assert (grant.arguments["account"], grant.arguments["amount"]) == ("alice", "25")
    assert grant.arguments["expires_in"] == 90 * 86400
    before = msgspec.structs.replace(PLACED, credits_micro=30_000_000)  # the pack had more then
    (grant,) = settle(transfer, orders={"CL1": before}).effects
    assert grant.arguments["amount"] == "30"


def test_a_bundle_that_has_changed_since_it_was_ordered_is_for_people() -> None:
    paid = pack(paid=1000, reference="CL2")
    bundle = Order(id="CL2", account="alice", pack="bundle", credits_micro=30_000_000, price=Money(1000, "EUR"))
    assert len(settle(paid, orders={"CL2": bundle}).effects) == 2
    other = msgspec.structs.replace(bundle, credits_micro=40_000_000)
    assert became(settle(paid, orders={"CL2": other}), paid) == ("parked", "pack_changed")


# --- Periods -----------------------------------------------------------------------------------------


def test_periods_go_out_in_the_order_of_time_whatever_order_they_came_in() -> None:
    facts = (period(JANUARY, "in_1", reason="create"), period(FEBRUARY, "in_2"), period(MARCH, "in_3"))
    found = settle(*facts)
    assert [effect.arguments["period_start"] for effect in found.effects] == [
        start.isoformat() for start in (JANUARY, FEBRUARY, MARCH)
    ]
    assert {effect.name for effect in found.effects} == {"plans.renew"}
    assert found.effects[0].arguments["payment"] == "stripe:in_1"
    assert found.effects[0].arguments["unit_price"] == {"minor": 900, "currency": "EUR", "per": "100"}


def test_a_period_waits_for_the_one_before_it_but_not_for_ever() -> None:
    late = period(FEBRUARY, "in_2")
    found = settle(late)
    assert found.effects == []
    assert became(found, late) == ("waiting", "earlier_period")
    assert found.missing == ("sub_1",)
    assert found.verdicts["PeriodPaid", late.key].until == NOW + PATIENCE
    assert names(settle(late, at=NOW + PATIENCE)) == [f"period:{late.key}"]


def test_other_providers_do_not_say_which_payment_is_the_first() -> None:
    first = period(FEBRUARY, "in_2", provider="paypal")
    assert names(settle(first)) == [f"period:{first.key}"]


def test_what_comes_after_a_period_that_waits_waits_too() -> None:
    february, march = period(FEBRUARY, "in_2"), period(MARCH, "in_3")
    found = settle(february, march)
    assert became(found, march) == ("waiting", "earlier_period")
    assert found.effects == []


def test_a_trial_gives_what_the_catalog_says_and_the_plan_begins_with_its_first_payment() -> None:
    trial = period(NOW, "in_1", reason="create", trial=True, amount_minor=0, paid_minor=0)
    (grant,) = settle(trial).effects
    assert grant.name == "credits.grant"
    assert (grant.arguments["amount"], grant.arguments["source"]) == ("5", "trial")
    assert grant.arguments["expires_at"] == add_months(NOW, 1, "UTC").isoformat()
    assert grant.arguments["unit_price"]["minor"] == 0  # or a referral's bonus came without a purchase
    over = period(JANUARY, "in_1", reason="create", trial=True, amount_minor=0, paid_minor=0)
    found = settle(over, period(FEBRUARY, "in_2"))
    assert [effect.name for effect in found.effects] == ["plans.renew"]
    assert became(found, over) == ("noted", None)


def test_whether_nothing_was_paid_for_a_trial_only_the_subscription_says() -> None:
    unknown = period(NOW, "in_1", reason="create", trial=None, amount_minor=0, paid_minor=0)
    assert became(settle(unknown), unknown) == ("waiting", "unknown_trial")
    assert became(settle(unknown, at=NOW + PATIENCE), unknown) == ("parked", "unknown_trial")
    trying = settle(unknown, subscribed("trialing", trial_end=NOW + timedelta(days=14)))
    assert [effect.name for effect in trying.effects] == ["credits.grant"]
    free = settle(unknown, subscribed())
    assert [effect.name for effect in free.effects] == ["plans.renew"]
    endless = period(NOW, "in_1", "price_endless", "create", trial=False, amount_minor=0, paid_minor=0)
    for effect in (*free.effects, *settle(endless).effects):
        assert effect.arguments["unit_price"]["minor"] == 0  # whatever it gives: it was no purchase


def test_a_change_of_plan_follows_on_what_was_paid_before() -> None:
    first = period(FEBRUARY, "in_1", reason="create")
    change = period(FEBRUARY + timedelta(days=9), "in_2", "price_more", "update", prorated=True)
    assert [effect.name for effect in settle(first, change).effects] == ["plans.renew", "plans.change"]
    assert became(settle(change), change) == ("waiting", "earlier_period")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"price": "price_other"}, "unknown_price"),
        ({"price": "price_small"}, "unknown_price"),
        ({"quantity": 3}, "quantity"),
    ],
)  # fmt: skip
def test_what_is_no_one_plan_of_the_catalog_is_parked(changes: dict[str, Any], code: str) -> None:
    odd = msgspec.structs.replace(period(FEBRUARY, "in_1", reason="create"), **changes)
    found = settle(odd)
    assert became(found, odd) == ("parked", code)
    assert found.effects == []


def test_of_an_invoice_for_two_plans_one_is_given() -> None:
    one = period(FEBRUARY, "in_1", reason="create")
    two = period(FEBRUARY, "in_1", "price_more", reason="create")
    found = settle(one, two)
    assert len(found.effects) == 1
    assert became(found, two) == ("parked", "second_plan")


def test_the_price_of_a_period_may_be_that_of_its_subscription() -> None:
    unsaid = msgspec.structs.replace(period(FEBRUARY, "in_1", reason="create"), price=None)
    assert became(settle(unsaid), unsaid) == ("waiting", "unknown_price")
    assert [effect.arguments["plan"] for effect in settle(unsaid, subscribed()).effects] == ["basic"]


# --- How a subscription ends -------------------------------------------------------------------------


def test_a_subscription_that_ends_waits_for_its_last_period() -> None:
    first, last = period(JANUARY, "in_1", reason="create"), period(FEBRUARY, "in_2")
    over = subscribed("canceled", ended_at=NOW)
    early = settle(msgspec.structs.replace(first, period_end=JANUARY + timedelta(days=28)), over)
    assert names(early) == [f"period:{first.key}"]
    assert became(early, over) == ("waiting", "earlier_period")
    found = settle(first, last, over)
    assert [effect.name for effect in found.effects] == ["plans.renew", "plans.renew", "plans.cancel"]
    assert found.effects[-1].arguments["at"] == "period_end"
    unpaid = settle(first, over, at=NOW + PATIENCE)
    assert unpaid.effects[-1].name == "plans.cancel"


def test_a_subscription_that_ends_waits_for_its_last_change_of_plan() -> None:
    paid = period(FEBRUARY, "in_1", reason="create")
    change = period(FEBRUARY + timedelta(days=9), "in_2", "price_more", "update", prorated=True, period_end=MARCH)
    item = Item(id="si_1", price="price_more", quantity=1, period_start=FEBRUARY, period_end=MARCH)
    over = subscribed("canceled", items=(item,))
    assert became(settle(paid, over), over) == ("waiting", "earlier_period")
    assert [effect.name for effect in settle(paid, change, over).effects] == [
        "plans.renew", "plans.change", "plans.cancel",
    ]  # fmt: skip


def test_a_subscription_may_be_cancelled_and_go_on_and_be_cancelled() -> None:
    paid = period(FEBRUARY, "in_1", reason="create")
    ending = subscribed(ends_at=MARCH)
    issued = sent(settle(paid, ending))
    assert [key.partition(":")[0] for key in issued] == ["period", "cancel"]
    assert settle(paid, ending, issued=issued).effects == []
    resumed = settle(paid, subscribed(), issued=issued)
    (resume,) = resumed.effects
    assert resume.name == "plans.subscribe"
    assert resume.arguments["payment"] == "stripe:in_1"
    issued |= sent(resumed)
    assert settle(paid, subscribed(), issued=issued).effects == []
    (again,) = settle(paid, ending, issued=issued).effects
    assert again.name == "plans.cancel"


def test_a_payment_that_comes_after_a_cancellation_leaves_it_cancelled() -> None:
    first, second = period(JANUARY, "in_1", reason="create"), period(FEBRUARY, "in_2")
    over = subscribed("canceled", items=())
    issued = sent(settle(first, over))
    assert [effect.name for effect in settle(first, second, over, issued=issued).effects] == [
        "plans.renew", "plans.cancel",
    ]  # fmt: skip


def test_what_was_returned_in_full_ends_at_once() -> None:
    paid = period(FEBRUARY, "in_1", "price_yearly", "create", period_end=datetime(2028, 2, 1, tzinfo=UTC))
    back = refund(900, of="payment_intent:pi_in_1")
    over = subscribed("canceled", ended_at=NOW, items=())
    found = settle(paid, back, over)
    assert [effect.name for effect in found.effects] == ["plans.renew", "credits.claw_back", "plans.cancel"]
    assert found.effects[-1].arguments["at"] == "now"
    part = settle(paid, refund(450, of="payment_intent:pi_in_1"), over)
    assert part.effects[-1].arguments["at"] == "period_end"


@pytest.mark.parametrize("status", ["incomplete", "incomplete_expired", "canceled"])
def test_a_subscription_that_was_never_paid_for_leads_to_nothing(status: str) -> None:
    assert settle(subscribed(status), at=NOW + PATIENCE).effects == []


# --- Refunds and disputes ----------------------------------------------------------------------------


def test_a_refund_waits_for_its_purchase() -> None:
    back = refund(100, of="charge:ch_1")
    alone = settle(back, Linked(key="ch_1", **about("charge:ch_1", "payment_intent:pi_1")))
    assert became(alone, back) == ("waiting", "no_purchase")
    paid = pack(("price_small", 1, 499))
    found = settle(back, Linked(key="ch_1", **about("charge:ch_1", "payment_intent:pi_1")), paid)
    assert [effect.name for effect in found.effects] == ["credits.grant", "credits.claw_back"]
    assert found.effects[-1].arguments == {
        "account": "alice", "purchase": "stripe:cs_1", "paid_minor": 499, "returned_minor": 100, "frozen": False,
        "currency": "EUR", "step": 1,
    }  # fmt: skip


def test_what_is_away_is_told_once_and_again_when_it_changes() -> None:
    paid = pack(("price_small", 1, 499))
    first = settle(paid, refund(100))
    issued = sent(first)
    assert settle(paid, refund(100), issued=issued).effects == []
    (more,) = settle(paid, refund(100), refund(200, "re_2"), issued=issued).effects
    assert (more.arguments["returned_minor"], more.arguments["step"]) == (300, 2)
    issued[more.key] = more.arguments
    (less,) = settle(paid, refund(100, status="undone"), refund(200, "re_2"), issued=issued).effects
    assert (less.arguments["returned_minor"], less.arguments["step"]) == (200, 3)


def test_a_dispute_freezes_until_it_is_closed_in_whatever_order() -> None:
    paid = pack(("price_small", 1, 499))
    for stages, frozen, returned in (
        ([dispute("created")], True, 0),
        ([dispute("created"), dispute("funds_withdrawn", 499, 1)], True, 499),
        ([dispute("created"), dispute("funds_withdrawn", 499, 1), dispute("funds_reinstated", 0, 2)], True, 0),
        ([dispute("created"), dispute("closed", 499, 1, is_open=False)], False, 499),
    ):
        (state,) = (effect.arguments for effect in settle(paid, *stages).effects if effect.name == "credits.claw_back")
        assert (state["frozen"], state["returned_minor"]) == (frozen, returned)
    stages = [dispute("created"), dispute("funds_withdrawn", 499, 1), dispute("funds_reinstated", 0, 2),
              dispute("closed", 0, 2, is_open=False)]  # fmt: skip
    assert [effect.name for effect in settle(paid, *stages).effects] == ["credits.grant"]  # as if nothing had been


def test_a_refund_in_another_currency_or_of_one_of_several_is_for_people() -> None:
    paid = pack(("price_small", 1, 499))
    foreign = refund(100, currency="USD")
    found = settle(paid, foreign)
    assert became(found, foreign) == ("parked", "other_currency")
    assert [effect.name for effect in found.effects] == ["credits.grant"]
    other = pack(("price_small", 1, 499), key="cs_2")
    back = refund(100)
    assert became(settle(paid, other, back), back) == ("parked", "ambiguous")


def test_a_refund_of_more_than_was_known_to_be_paid_counts_of_what_was() -> None:
    paid = pack(("price_small", 1, 499))
    (_, state) = settle(paid, refund(599, paid_minor=599)).effects
    assert (state.arguments["paid_minor"], state.arguments["returned_minor"]) == (599, 599)


# --- The rest ----------------------------------------------------------------------------------------


def test_a_payment_that_did_not_come_about_is_told_of() -> None:
    failed = PaymentFailed(key="in_2:1", currency="EUR", amount_minor=900, next_attempt_at=NOW,
                           **about("invoice:in_2"))  # fmt: skip
    found = settle(period(FEBRUARY, "in_1", reason="create"), failed)
    (told,) = found.notices
    assert (told.kind, told.key) == ("payment_failed", "payment_failed:stripe:in_2:1")
    assert (told.details["amount"], told.details["plan"]) == ("9.00 EUR", "basic")
    assert became(found, failed) == ("noted", None)


def test_the_name_of_a_purchase_fits_the_ledger() -> None:
    assert purchase_name(pack(("price_small", 1, 499))) == "stripe:cs_1"
    assert purchase_name(period(FEBRUARY, "in_1")) == "stripe:in_1"
    long = purchase_name(pack(("price_small", 1, 499), key="x" * 255))
    assert long.startswith("stripe:sha256:")
    assert len(long) <= 128


# --- Several in one group ----------------------------------------------------------------------------


def test_a_refund_is_of_the_payment_that_it_names_though_an_order_was_for_several() -> None:
    named = Linked(key="ch_1", **about("order:ord_1", "checkout:ch_1", "transaction:tran_1", "subscription:sub_1"))
    first, second = (
        period(start, f"in_{number}", reason="create", **about(f"transaction:tran_{number}", at=start))
        for number, start in ((1, JANUARY), (2, FEBRUARY))
    )
    back = refund(900, of="transaction:tran_2", aliases=about("order:ord_1", "transaction:tran_2")["aliases"])
    before = settle(named, first, back)
    assert became(before, back) == ("waiting", "no_purchase")
    found = settle(named, first, second, back)
    assert names(found)[-1] == "claw_back:stripe:tran_2:1"
    assert became(found, back) == ("applied", None)
    of_the_order = refund(900, key="re_2", of="order:ord_1")
    assert became(settle(named, first, of_the_order), of_the_order) == ("applied", None)


def test_a_dispute_of_several_payments_freezes_each_and_a_refund_is_of_one() -> None:
    bought = [pack(("price_small", 1, 499), key=key, **about(f"capture:{key}")) for key in ("A", "B")]
    both = about("capture:A", "capture:B", account=None)
    open_, closed = (msgspec.structs.replace(dispute(stage), **both) for stage in ("created", "closed"))
    frozen = settle(*bought, open_)
    assert [effect.arguments["frozen"] for effect in frozen.effects if effect.name == "credits.claw_back"] == [True] * 2
    back = refund(499, of="capture:B")
    thawed = settle(*bought, open_, closed, back, issued=sent(frozen))
    assert {effect.purchase: effect.arguments["returned_minor"] for effect in thawed.effects} == {
        "stripe:A": 0, "stripe:B": 499,
    }  # fmt: skip
    taken = msgspec.structs.replace(dispute("funds_withdrawn", 499, 1), **both)
    assert became(settle(*bought, taken), taken) == ("parked", "ambiguous")


def test_each_payment_is_for_the_account_that_it_names() -> None:
    shared = Linked(key="x", **about("session:A", "session:B", account=None))
    bought = [pack(("price_small", 1, 499), key=key, **about(f"session:{key}", f"capture:{key}", account=account))
              for key, account in (("A", "alice"), ("B", "bob"))]  # fmt: skip
    back = refund(499, of="capture:B")
    found = settle(shared, *bought, back)
    assert [(effect.name, effect.arguments["account"]) for effect in found.effects] == [
        ("credits.grant", "alice"), ("credits.grant", "bob"), ("credits.claw_back", "bob"),
    ]  # fmt: skip
    assert found.accounts["RefundChanged", "re_1"] == "bob"
    # What was given before stays where it was given, whatever is said of it later.
    moved = msgspec.structs.replace(bought[1], account="carol")
    again = settle(shared, bought[0], moved, back, issued=sent(settle(shared, *bought)))
    assert [effect.arguments["account"] for effect in again.effects] == ["bob"]


def test_a_subscription_that_was_given_to_another_account_pays_for_theirs() -> None:
    first = period(FEBRUARY, "in_1", reason="create")
    theirs = period(MARCH, "in_2", account="bob")
    changed = period(MARCH + timedelta(days=9), "in_3", "price_more", "update", account="bob", credited=(
        Line(price="price_basic", quantity=1, amount_minor=-300),
    ))  # fmt: skip
    found = settle(first, theirs, changed, subscribed(ends_at=MARCH + timedelta(days=31)))
    assert [(effect.name, effect.arguments["account"]) for effect in found.effects] == [
        ("plans.renew", "alice"), ("plans.renew", "bob"), ("plans.change", "bob"), ("plans.cancel", "bob"),
    ]  # fmt: skip


def test_a_subscription_that_ends_leaves_the_plan_that_another_one_pays_for() -> None:
    paid, over = period(FEBRUARY, "in_1", reason="create"), subscribed("canceled")
    back = refund(900, of="invoice:in_1")
    for others in ("period:si_2:1:price_more", None):
        found = settle(over, paid, back, issued=sent(settle(paid)), current=others)
        assert names(found)[0] == "claw_back:stripe:in_1:1"
        assert names(found)[1:] == ([] if others else ["cancel:sub_1:1:now:0"])
        assert became(found, over) == (("noted", "other_subscription") if others else ("applied", None))
    assert names(settle(over, paid, current="period:si_2:1:price_more"))[-1].startswith("cancel:")  # it paid since


def test_a_period_waits_for_the_change_of_plan_before_it() -> None:
    year = period(JANUARY, "in_1", "price_yearly", "create", period_end=JANUARY + timedelta(days=365))
    to_month = period(FEBRUARY, "in_2", "price_basic", "update", period_end=MARCH)
    month = period(MARCH, "in_3")
    early = settle(year, month)
    assert became(early, month) == ("waiting", "earlier_period")
    assert early.missing == ("sub_1",)
    assert [effect.name for effect in settle(year, to_month, month).effects] == [
        "plans.renew", "plans.change", "plans.renew",
    ]  # fmt: skip
    soon = period(MARCH + timedelta(hours=1), "in_7", "price_more", "update")
    assert became(settle(to_month, year, soon), soon) == ("applied", None)  # it may be of the year
    ended = msgspec.structs.replace(to_month, reason="create")
    assert became(settle(ended, soon), soon) == ("waiting", "earlier_period")
    # A change says which plan it ended.
    begun = period(FEBRUARY, "in_4", reason="create")
    up = period(FEBRUARY + timedelta(days=3), "in_5", "price_more", "update")
    down = period(FEBRUARY + timedelta(days=6), "in_6", "price_basic", "update", credited=(
        Line(price="price_more", quantity=1, amount_minor=-1500),
    ))  # fmt: skip
    assert became(settle(begun, down), down) == ("waiting", "earlier_period")
    assert names(settle(begun, up, down))[1:] == [f"period:{up.key}", f"period:{down.key}"]
