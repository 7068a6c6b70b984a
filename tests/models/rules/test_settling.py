"""Settling: what is due happens, in order, each at its own instant, however late."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from models.rules.burning import burn, new_grant, plan_burn
from models.rules.posting import post
from models.rules.settling import settle
from models.rules.state import OPEN, Account, Entry, Grant, Hold
from tests.support import CATALOG

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def opened() -> Account:
    account = Account("a")
    account.status = OPEN
    return account


def lot(account: Account, amount: int, end: float | None, priority: int = 100) -> Grant:
    grant = new_grant(account, "pack", priority, NOW, "g", expires_at=None if end is None else at(end))
    post(account, grant, "granted", amount, NOW, "g")
    return grant


def hold(account: Account, id: str, amount: int, end: float) -> Hold:
    plan, missing = plan_burn(account, amount, None, NOW)
    assert not missing
    made = Hold(id, amount, at(end), NOW, lines=burn(account, plan, "held", NOW, id))
    account.holds[id] = made
    account.next_due_at = account.due_at()
    return made


def settled(account: Account, now: datetime) -> list[Entry]:
    """The entries that settling wrote."""
    before = len(account.entries)
    settle(account, now, CATALOG)
    return account.entries[before:]


def test_nothing_is_due_on_an_account_without_ends() -> None:
    account = opened()
    lot(account, 5, None)
    account.is_dirty = False
    assert settle(account, at(10**9), CATALOG) is False
    assert not account.is_dirty


def test_nothing_is_due_before_the_first_end() -> None:
    account = opened()
    lot(account, 5, 10)
    assert settle(account, at(9.999999), CATALOG) is False
    assert account.available == 5


def test_credits_expire_at_their_end_and_not_a_microsecond_later() -> None:
    account = opened()
    grant = lot(account, 5, 10)
    assert settle(account, at(10), CATALOG) is True
    assert (grant.available, grant.expired, account.available, account.expired) == (0, 5, 0, 5)


def test_a_late_expiry_is_stamped_with_the_instant_it_was_due() -> None:
    account = opened()
    lot(account, 5, 10)
    (entry,) = settled(account, at(99_999))
    assert (entry.kind, entry.amount_micro, entry.at, entry.recorded_at) == ("expired", 5, at(10), at(99_999))
    assert entry.operation is None


def test_what_is_due_is_applied_oldest_first() -> None:
    account = opened()
    lot(account, 1, 30)
    lot(account, 2, 10)
    lot(account, 3, 20)
    entries = settled(account, at(60))
    assert [(entry.grant, entry.at) for entry in entries] == [(2, at(10)), (3, at(20)), (1, at(30))]


def test_a_hold_whose_time_is_out_goes_back_whole() -> None:
    account = opened()
    grant = lot(account, 5, None)
    held = hold(account, "h", 4, 10)
    (entry,) = settled(account, at(11))
    assert (entry.kind, entry.amount_micro, entry.refers_to, entry.at) == ("released", 4, "h", at(10))
    assert entry.operation is None
    assert (grant.available, grant.held) == (5, 0)
    assert (held.status, held.closed_at, held.captured) == ("expired", at(10), 0)


def test_at_the_same_instant_holds_time_out_before_grants_expire() -> None:
    account = opened()
    grant = lot(account, 5, 10)
    hold(account, "h", 4, 10)
    entries = settled(account, at(10))
    assert [(entry.kind, entry.amount_micro) for entry in entries] == [
        ("released", 4),
        ("expired", 4),
        ("expired", 1),
    ]
    assert (grant.available, grant.held, grant.expired) == (0, 0, 5)


def test_a_hold_that_times_out_before_its_grant_ends_gives_back_first_and_the_grant_expires_then() -> None:
    account = opened()
    lot(account, 5, 20)
    hold(account, "h", 5, 10)
    entries = settled(account, at(30))
    assert [(entry.kind, entry.amount_micro, entry.at) for entry in entries] == [
        ("released", 5, at(10)),
        ("expired", 5, at(20)),
    ]


def test_a_hold_outlives_the_grant_that_it_was_taken_from() -> None:
    account = opened()
    grant = lot(account, 5, 10)
    hold(account, "h", 4, 20)
    assert [(entry.kind, entry.amount_micro) for entry in settled(account, at(10))] == [("expired", 1)]
    assert grant.held == 4
    assert [(entry.kind, entry.at) for entry in settled(account, at(25))] == [
        ("released", at(20)),
        ("expired", at(20)),
    ]
    assert grant.expired == 5


def test_what_a_time_out_gives_back_pays_the_debt_at_the_instant_of_the_time_out() -> None:
    account = opened()
    grant = lot(account, 5, None)
    hold(account, "h", 5, 10)
    post(account, grant, "debt_incurred", 2, NOW, "v")
    entries = settled(account, at(60))
    assert [(entry.kind, entry.amount_micro, entry.at) for entry in entries] == [
        ("released", 5, at(10)),
        ("debt_paid", 2, at(10)),
    ]
    assert (account.debt, account.available) == (0, 3)


def test_settling_twice_settles_once() -> None:
    account = opened()
    lot(account, 5, 10)
    hold(account, "h", 2, 5)
    assert settle(account, at(60), CATALOG) is True
    seq = account.seq
    assert settle(account, at(60), CATALOG) is False
    assert account.seq == seq


def test_settling_tells_when_the_account_is_due_next() -> None:
    account = opened()
    lot(account, 5, 10)
    lot(account, 5, 50)
    hold(account, "h", 2, 30)
    assert account.due_at() == at(10)
    for now, next_due in ((10, at(30)), (30, at(50)), (50, None)):
        settle(account, at(now), CATALOG)
        assert account.next_due_at == next_due == account.due_at()


def test_what_was_noted_too_early_is_looked_at_again_and_nothing_happens() -> None:
    account = opened()
    lot(account, 5, 50)
    account.next_due_at = at(10)
    assert settle(account, at(20), CATALOG) is False
    assert account.next_due_at == at(50)
    assert account.available == 5


def test_what_was_forgiven_is_taken_at_the_instant_of_the_time_out() -> None:
    account = opened()
    grant = lot(account, 5, None)
    hold(account, "h", 5, 10)
    grant.forgiven = 2
    entries = settled(account, at(60))
    assert [(entry.kind, entry.amount_micro, entry.at, entry.operation) for entry in entries] == [
        ("released", 5, at(10), None),
        ("revoked", 2, at(10), None),
    ]
    assert (grant.forgiven, account.available) == (0, 3)


def test_a_time_out_after_the_end_of_a_lot_that_was_clawed_back_pays_the_debt_and_the_rest_lapses() -> None:
    account = opened()
    grant = lot(account, 5, 10)
    hold(account, "h", 5, 20)
    grant.clawed_back = 2
    post(account, grant, "debt_incurred", 2, NOW, "v")
    entries = settled(account, at(60))
    assert [(entry.kind, entry.amount_micro, entry.at) for entry in entries] == [
        ("released", 5, at(20)),
        ("debt_paid", 2, at(20)),
        ("expired", 3, at(20)),
    ]


def test_an_empty_grant_and_a_closed_hold_are_never_due() -> None:
    account = opened()
    grant = lot(account, 5, 10)
    held = hold(account, "h", 5, 5)
    assert account.due_at() == at(5)
    held.status = "captured"
    post(account, grant, "captured", 5, NOW, "c", "h")
    assert account.due_at() is None
