"""Burn-down order, and putting credits back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creditlane.codes import Code
from models.rules.burning import (
    burn,
    check_room,
    give_back_held,
    is_spendable,
    new_grant,
    pay_debt,
    plan_burn,
    restore_consumed,
)
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import Account, Grant, burn_key

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def lot(
    account: Account,
    amount: int,
    priority: int = 100,
    features: set[str] | None = None,
    start: float | None = None,
    end: float | None = None,
    born: float = 0,
) -> Grant:
    """A grant of so many micro-credits; times in seconds from now."""
    grant = new_grant(
        account,
        source="pack",
        priority=priority,
        now=at(born),
        operation="g",
        features=None if features is None else frozenset(features),
        effective_at=None if start is None else at(start),
        expires_at=None if end is None else at(end),
    )
    post(account, grant, "granted", amount, at(born), "g")
    return grant


def comes_before(one: Grant, other: Grant) -> bool:
    """The four documented steps, one after the other."""
    # 1. priority, lowest first
    if one.priority < other.priority:
        return True
    if one.priority > other.priority:
        return False
    # 2. scoped to features before unscoped
    if one.features is not None and other.features is None:
        return True
    if one.features is None and other.features is not None:
        return False
    # 3. expires_at, soonest first, never last
    if one.expires_at is not None and other.expires_at is None:
        return True
    if one.expires_at is None and other.expires_at is not None:
        return False
    if one.expires_at is not None and other.expires_at is not None and one.expires_at != other.expires_at:
        return one.expires_at < other.expires_at
    # 4. created_at, then id
    if one.created_at != other.created_at:
        return one.created_at < other.created_at
    return one.id < other.id


lots = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from([0, 50, 100]),
        st.sampled_from([None, frozenset({"image"}), frozenset({"image", "video"}), frozenset({"video"})]),
        st.sampled_from([None, None, -5, 0, 5]),
        st.sampled_from([None, 1, 1, 2, 0.000001]),
        st.sampled_from([0, 0, -1, -0.000001]),
    ),
    max_size=8,
)


@given(lots=lots, wanted=st.integers(1, 12), feature=st.sampled_from([None, "image", "video", "other"]))
def test_credits_burn_in_the_four_documented_steps(
    lots: list[tuple[int, int, frozenset[str] | None, float | None, float | None, float]],
    wanted: int,
    feature: str | None,
) -> None:
    account = Account("a")
    for amount, priority, features, start, end, born in lots:
        lot(account, amount, priority, None if features is None else set(features), start, end, born)
    for earlier, later in zip(account.order, account.order[1:], strict=False):
        assert comes_before(earlier, later)
        assert not comes_before(later, earlier)
    plan, missing = plan_burn(account, wanted, feature, NOW)
    eligible = [
        grant
        for grant in account.grants.values()
        if (grant.features is None or (feature is not None and feature in grant.features))
        and grant.effective_at <= NOW
        and (grant.expires_at is None or grant.expires_at > NOW)
    ]
    assert missing == max(0, wanted - sum(grant.available for grant in eligible))
    assert sum(taken for _, taken in plan) == wanted - missing
    used = [grant for grant, _ in plan]
    for grant, taken in plan[:-1]:
        assert taken == grant.available, "each is emptied before the next is touched"
    for grant in eligible:
        if grant not in used:
            assert all(comes_before(payer, grant) for payer in used)
    assert all(grant in eligible and 0 < taken <= grant.available for grant, taken in plan)


def test_each_step_decides_only_among_equals_of_the_step_before() -> None:
    steps = [
        {"priority": 1},
        {"priority": 2, "features": {"image"}, "end": 500.0},
        {"priority": 2, "features": {"image"}},
        {"priority": 2, "end": 10.0, "born": -1.0},
        {"priority": 2, "end": 10.0, "born": 0.0},
        {"priority": 2, "end": 20.0, "born": -2.0},
        {"priority": 2, "born": -3.0},
        {"priority": 3, "features": {"image"}, "end": 1.0},
    ]
    for shift in range(len(steps)):
        account = Account("a")
        made = {}
        for place in (*range(shift, len(steps)), *range(shift)):
            grant = lot(account, 1, **steps[place])
            made[grant.id] = place
        plan, missing = plan_burn(account, len(steps), "image", NOW)
        assert missing == 0
        assert [made[grant.id] for grant, _ in plan] == list(range(len(steps)))


def test_of_full_equals_the_lower_id_burns_first() -> None:
    account = Account("a")
    grants = [lot(account, 1) for _ in range(3)]
    assert [grant.id for grant, _ in plan_burn(account, 3, None, NOW)[0]] == [1, 2, 3]
    for shuffled in permutations(grants):
        assert sorted(shuffled, key=burn_key) == grants


def test_the_documentation_of_the_burn_key_names_the_four_steps_in_order() -> None:
    text = " ".join((burn_key.__doc__ or "").split())
    steps = [
        "1. ``priority``",
        "2. scoped to features before unscoped",
        "3. ``expires_at``, soonest first, never last",
        "4. ``created_at``, then ``id``",
    ]
    places = [text.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)
    account = Account("a")
    grant = lot(account, 1, priority=7, end=5.0)
    assert len(burn_key(grant)) == len(["priority", "scoped", "expires_at", "created_at", "id"])
    assert burn_key(grant)[0] == 7
    assert burn_key(grant)[-1] == grant.id


def test_expiries_a_microsecond_apart_are_told_apart() -> None:
    account = Account("a")
    later = lot(account, 1, end=10.000001)
    sooner = lot(account, 1, end=10.0)
    assert [grant for grant, _ in plan_burn(account, 2, None, NOW)[0]] == [sooner, later]


def test_instants_a_microsecond_apart_are_told_apart_however_late_they_are() -> None:
    account = Account("a")
    late = datetime(8999, 12, 31, 23, 59, 59, 999_998, tzinfo=UTC)
    for later in (True, False):
        grant = new_grant(account, "pack", 100, NOW, "g", expires_at=late + timedelta(microseconds=1 if later else 0))
        post(account, grant, "granted", 1, NOW, "g")
    lot(account, 1)
    assert [grant.id for grant, _ in plan_burn(account, 3, None, NOW)[0]] == [2, 1, 3], "never comes last"
    for born in (late + timedelta(microseconds=1), late):
        post(account, new_grant(account, "pack", 1, born, "g", effective_at=NOW), "granted", 1, NOW, "g")
    assert [grant.id for grant, _ in plan_burn(account, 2, None, NOW)[0]] == [5, 4]


@pytest.mark.parametrize(
    ("start", "end", "spendable"),
    [
        (0, None, True),
        (-1, None, True),
        (0.000001, None, False),
        (-1, 0, False),
        (-1, 0.000001, True),
        (-2, -1, False),
        (1, 2, False),
    ],
)
def test_a_grant_is_active_at_its_start_and_gone_at_its_end(start: float, end: float | None, spendable: bool) -> None:
    grant = lot(Account("a"), 1, start=start, end=end)
    assert is_spendable(grant, None, NOW) is spendable


def test_a_charge_without_a_feature_is_paid_by_unscoped_grants_alone() -> None:
    account = Account("a")
    lot(account, 5, features={"image"})
    unscoped = lot(account, 3)
    assert plan_burn(account, 4, None, NOW) == ([(unscoped, 3)], 1)


def test_an_empty_plan_burns_nothing() -> None:
    account = Account("a")
    assert plan_burn(account, 0, None, NOW) == ([], 0)
    assert burn(account, [], "consumed", NOW, "c") == []
    assert account.entries == []


def test_planning_changes_nothing() -> None:
    account = Account("a")
    grant = lot(account, 5)
    grant.is_dirty = account.is_dirty = False
    entries = list(account.entries)
    plan_burn(account, 9, None, NOW)
    assert (grant.available, account.entries) == (5, entries)
    assert not grant.is_dirty
    assert not account.is_dirty


def test_held_credits_go_back_in_reverse_order_of_taking() -> None:
    account = Account("a")
    first, second = lot(account, 5, priority=1), lot(account, 5, priority=2)
    lines = burn(account, plan_burn(account, 8, None, NOW)[0], "held", NOW, "h")
    give_back_held(account, lines, 4, NOW, "r", "h")
    assert (first.available, first.held, second.available, second.held) == (1, 4, 5, 0)
    give_back_held(account, lines, 4, NOW, "r", "h")
    assert (first.available, first.held, second.available, second.held) == (5, 0, 5, 0)
    assert [(line.taken, line.returned) for line in lines] == [(5, 5), (3, 3)]


def test_held_credits_of_a_grant_that_has_ended_lapse_at_once() -> None:
    account = Account("a")
    grant = lot(account, 5, end=10)
    lines = burn(account, plan_burn(account, 3, None, NOW)[0], "held", NOW, "h")
    account.debt = 2
    give_back_held(account, lines, 3, at(10), "r", "h")
    assert (grant.available, grant.held, grant.expired) == (2, 0, 3)
    assert account.debt == 2, "what lapses pays no debt"


def test_held_credits_that_come_back_pay_the_debt_first() -> None:
    account = Account("a")
    grant = lot(account, 5)
    lines = burn(account, plan_burn(account, 5, None, NOW)[0], "held", NOW, "h")
    post(account, grant, "debt_incurred", 2, NOW, "v")
    give_back_held(account, lines, 5, NOW, "r", "h")
    assert (account.debt, grant.available, grant.revoked) == (0, 3, 2)


def test_consumed_credits_go_back_to_a_live_grant_and_a_successor_of_an_expired_one() -> None:
    account = Account("a")
    ending = lot(account, 5, priority=1, features={"image"}, end=10)
    staying = lot(account, 5, priority=2)
    lines = burn(account, plan_burn(account, 8, "image", NOW)[0], "consumed", NOW, "c")
    given_back = restore_consumed(account, lines, 6, at(10), "r", "c", refund_days=30)
    successor = account.grants[3]
    assert given_back == [(staying, 3), (successor, 3)]
    assert (staying.available, staying.restored) == (5, 3)
    assert (ending.available, ending.restored) == (0, 0)
    assert (successor.available, successor.restored, successor.granted) == (3, 3, 0)
    assert (successor.source, successor.priority, successor.features) == ("pack", 1, frozenset({"image"}))
    assert (successor.effective_at, successor.expires_at) == (at(10), at(10) + timedelta(days=30))


def test_a_successor_is_like_the_lot_that_it_continues_and_names_the_first_of_them() -> None:
    account = Account("a")
    price = (499, "EUR", 25_000_000)
    first = new_grant(
        account, "pack", 7, NOW, "g", frozenset({"image"}), expires_at=at(10), purchase="pi_1", price=price
    )
    post(account, first, "granted", 5, NOW, "g")
    lines = burn(account, plan_burn(account, 5, "image", NOW)[0], "consumed", NOW, "c")
    ((second, _),) = restore_consumed(account, lines, 5, at(10), "r", "c", refund_days=30)
    again = burn(account, plan_burn(account, 5, "image", at(10))[0], "consumed", at(10), "c2")
    late = at(10) + timedelta(days=30)
    ((third, _),) = restore_consumed(account, again, 5, late, "r2", "c2", refund_days=30)
    assert (first.origin, second.origin, third.origin) == (None, first.id, first.id)
    for each in (second, third):
        assert (each.source, each.priority, each.features, each.purchase) == (
            "pack",
            7,
            first.features,
            "pi_1",
        )
        assert (each.price_minor, each.price_currency, each.price_per) == price
        assert (each.granted, each.restored) == (0, 5)


def test_what_was_forgiven_of_a_lot_is_taken_out_of_what_comes_in_before_the_debt() -> None:
    account = Account("a")
    grant = lot(account, 9)
    lines = burn(account, plan_burn(account, 9, None, NOW)[0], "held", NOW, "h")
    grant.forgiven = 4
    account.debt = 3
    give_back_held(account, lines, 5, NOW, "r", "h")
    assert [(entry.kind, entry.amount_micro) for entry in account.entries[-3:]] == [
        ("released", 5),
        ("revoked", 4),
        ("debt_paid", 1),
    ]
    assert (grant.forgiven, account.debt, grant.available) == (0, 2, 0)


def test_what_was_forgiven_is_taken_only_as_far_as_it_comes_back_and_only_once() -> None:
    account = Account("a")
    grant = lot(account, 9)
    lines = burn(account, plan_burn(account, 9, None, NOW)[0], "held", NOW, "h")
    grant.forgiven = 4
    for back, available, forgiven in ((1, 0, 3), (5, 2, 0), (3, 5, 0)):
        give_back_held(account, lines, back, NOW, "r", "h")
        assert (grant.available, grant.forgiven) == (available, forgiven)


def test_what_was_forgiven_of_a_lot_is_taken_out_of_what_its_successor_gets() -> None:
    account = Account("a")
    ending = lot(account, 5, end=10)
    other = lot(account, 2)
    lines = burn(account, plan_burn(account, 5, None, NOW)[0], "consumed", NOW, "c")
    ending.forgiven = 3
    ending.is_dirty = False
    restore_consumed(account, lines, 4, at(10), "r", "c", refund_days=30)
    successor = account.grants[3]
    assert (successor.available, successor.revoked, successor.forgiven) == (1, 3, 0)
    assert ending.forgiven == 0
    assert ending.is_dirty
    assert other.available == 2


@pytest.mark.parametrize(
    ("forgiven", "debt", "revoked", "expired"), [(0, 0, 0, 5), (2, 0, 2, 3), (0, 2, 2, 3), (1, 2, 3, 2), (9, 9, 5, 0)]
)
def test_of_an_ended_lot_that_was_clawed_back_only_what_is_left_lapses(
    forgiven: int, debt: int, revoked: int, expired: int
) -> None:
    account = Account("a")
    grant = lot(account, 5, end=10)
    lines = burn(account, plan_burn(account, 5, None, NOW)[0], "held", NOW, "h")
    grant.clawed_back, grant.forgiven, account.debt = 5, forgiven, debt
    give_back_held(account, lines, 5, at(10), "r", "h")
    assert (grant.available, grant.revoked, grant.expired) == (0, revoked, expired)
    assert account.debt == debt - (revoked - min(forgiven, 5))


def test_what_ends_with_the_return_lapses_at_its_own_turn() -> None:
    account = Account("a")
    grant = lot(account, 9, end=10)
    lines = burn(account, plan_burn(account, 5, None, NOW)[0], "held", NOW, "h")
    give_back_held(account, lines, 5, at(10), "r", "h")
    assert (grant.available, grant.expired) == (4, 5), "only what came back lapses here"


@pytest.mark.parametrize("over", [0, 1])
def test_there_is_room_for_what_an_account_may_get_in_all_its_life_and_no_more(over: int) -> None:
    account = Account("a")
    account.granted, account.received, account.restored = 4 * 10**18, 3 * 10**18, 10**18
    if over:
        with pytest.raises(RefusedError) as caught:
            check_room(account, 10**18 + over)
        assert caught.value.code is Code.LIMIT_REACHED
    else:
        check_room(account, 10**18)
    assert account.entries == []


def test_a_debt_is_paid_only_as_far_as_the_grant_goes() -> None:
    account = Account("a")
    spent = lot(account, 9)
    post(account, spent, "consumed", 9, NOW, "c")
    post(account, spent, "debt_incurred", 9, NOW, "v")
    grant = lot(account, 4)
    pay_debt(account, grant, 4, NOW, "g")
    assert (account.debt, grant.available, grant.revoked) == (5, 0, 4)
    pay_debt(account, grant, 0, NOW, "g")
    assert account.debt == 5


@pytest.mark.parametrize(
    ("forgiven", "debt", "taken", "paid"), [(0, 9, 0, 2), (1, 9, 1, 1), (9, 9, 2, 0), (1, 0, 1, 0), (0, 1, 0, 1)]
)
def test_no_more_than_what_came_in_is_taken_and_what_lay_there_before_is_left_alone(
    forgiven: int, debt: int, taken: int, paid: int
) -> None:
    account = Account("a")
    grant = lot(account, 9)
    grant.forgiven, account.debt = forgiven, debt
    entries = len(account.entries)
    pay_debt(account, grant, 2, NOW, "g")
    assert (grant.forgiven, account.debt) == (forgiven - taken, debt - paid)
    assert (grant.available, grant.revoked) == (9 - taken - paid, taken + paid)
    assert [(entry.kind, entry.amount_micro) for entry in account.entries[entries:]] == [
        (kind, amount) for kind, amount in (("revoked", taken), ("debt_paid", paid)) if amount
    ]


def test_what_comes_back_to_an_ended_lot_lapses_by_what_came_back_and_not_by_what_lay_there() -> None:
    account = Account("a")
    root = lot(account, 9, end=10)
    lines = burn(account, plan_burn(account, 5, None, NOW)[0], "held", NOW, "h")
    root.clawed_back, account.debt = 1, 2
    give_back_held(account, lines, 5, at(10), "r", "h")
    assert (root.available, root.revoked, root.expired, account.debt) == (4, 2, 3, 0)


def test_what_comes_back_to_an_ended_successor_of_a_lot_that_was_clawed_back_is_taken_before_it_lapses() -> None:
    account = Account("a")
    root = lot(account, 5, end=10)
    charge = burn(account, plan_burn(account, 5, None, NOW)[0], "consumed", NOW, "c")
    ((after, _),) = restore_consumed(account, charge, 5, at(10), "r", "c", refund_days=1)
    lines = burn(account, plan_burn(account, 5, None, at(10))[0], "held", at(10), "h")
    root.clawed_back, root.forgiven, account.debt = 5, 1, 2
    give_back_held(account, lines, 5, at(10) + timedelta(days=1), "r2", "h")
    assert (root.forgiven, account.debt) == (0, 0)
    assert (after.available, after.revoked, after.expired) == (0, 3, 2)
