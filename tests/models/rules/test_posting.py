"""Posting: buckets that close, entries without gaps, a chain that breaks where it was touched."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256

import pytest

from models.rules.burning import new_grant
from models.rules.posting import FLOWS, chain_hash, post
from models.rules.state import COUNTERS, Account, Entry, Grant

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
DUE = datetime(2026, 1, 31, 11, 59, 59, 999999, tzinfo=UTC)


def account_with(amount: int) -> tuple[Account, Grant]:
    account = Account("a")
    grant = new_grant(account, "pack", 100, NOW, "g")
    post(account, grant, "granted", amount, NOW, "g")
    return account, grant


def counts(of: Account | Grant) -> dict[str, int]:
    return {counter: getattr(of, counter) for counter in COUNTERS if getattr(of, counter)}


@pytest.mark.parametrize(
    ("kinds", "left"),
    [
        (["granted"], {"granted": 15, "available": 15}),
        (["consumed"], {"granted": 10, "available": 5, "consumed": 5}),
        (["held"], {"granted": 10, "available": 5, "held": 5}),
        (["held", "captured"], {"granted": 10, "available": 5, "consumed": 5}),
        (["held", "released"], {"granted": 10, "available": 10}),
        (["consumed", "restored"], {"granted": 10, "restored": 5, "available": 10, "consumed": 5}),
        (["expired"], {"granted": 10, "available": 5, "expired": 5}),
        (["revoked"], {"granted": 10, "available": 5, "revoked": 5}),
        (["transferred"], {"granted": 10, "available": 5, "in_transit": 5}),
        (["transferred", "sent"], {"granted": 10, "available": 5, "sent": 5}),
        (["transferred", "bounced"], {"granted": 10, "available": 10}),
        (["received"], {"granted": 10, "received": 5, "available": 15}),
        (["debt_incurred"], {"granted": 10, "available": 10}),
        (["debt_incurred", "debt_paid"], {"granted": 10, "available": 5, "revoked": 5}),
    ],
)
def test_each_kind_moves_credits_between_the_buckets_that_it_names(kinds: list[str], left: dict[str, int]) -> None:
    account, grant = account_with(10)
    for kind in kinds:
        post(account, grant, kind, 5, NOW, "x")
    assert counts(grant) == counts(account) == left
    assert account.debt == (5 if kinds == ["debt_incurred"] else 0)


def test_every_kind_keeps_what_came_in_equal_to_where_it_is() -> None:
    for kind, flow in FLOWS.items():
        came = 1 if flow.counted is not None else 0
        entered = 1 if flow.enters is not None else 0
        left = 1 if flow.leaves is not None else 0
        assert came == entered - left, kind
        assert flow.counted in (None, *COUNTERS[:3])
        assert flow.enters in (None, *COUNTERS[3:])
        assert flow.leaves in (None, *COUNTERS[3:])


@pytest.mark.parametrize(
    "kind",
    [
        "consumed", "held", "expired", "revoked", "captured", "released", "debt_paid", "transferred", "sent", "bounced",
    ],
)  # fmt: skip
def test_no_bucket_of_a_grant_falls_below_zero(kind: str) -> None:
    account, grant = account_with(10)
    account.debt = 100
    seq, head = account.seq, account.head
    with pytest.raises(ArithmeticError):
        post(account, grant, kind, 11, NOW, "x")
    assert counts(grant) == counts(account) == {"granted": 10, "available": 10}
    assert (account.seq, account.head, len(account.entries)) == (seq, head, 1)


def test_no_debt_falls_below_zero() -> None:
    account, grant = account_with(10)
    with pytest.raises(ArithmeticError):
        post(account, grant, "debt_paid", 1, NOW, "x")


@pytest.mark.parametrize("amount", [0, -1])
def test_an_entry_is_of_something(amount: int) -> None:
    account, grant = account_with(10)
    with pytest.raises(ArithmeticError):
        post(account, grant, "consumed", amount, NOW, "x")
    assert len(account.entries) == 1


def test_entries_are_numbered_without_gaps_and_carry_the_balance_after_them() -> None:
    account, grant = account_with(10)
    other = new_grant(account, "pack", 100, NOW, "g2")
    post(account, other, "granted", 7, NOW, "g2")
    post(account, grant, "consumed", 4, NOW, "c")
    post(account, grant, "held", 1, NOW, "h")
    post(account, grant, "captured", 1, NOW, "k", "h")
    assert [entry.seq for entry in account.entries] == [1, 2, 3, 4, 5]
    assert [entry.balance_after_micro for entry in account.entries] == [10, 17, 13, 12, 12]
    assert account.seq == 5


def test_an_entry_says_which_operation_and_when_it_holds_from_and_was_recorded() -> None:
    account, grant = account_with(10)
    post(account, grant, "expired", 10, NOW, None, "h", DUE)
    entry = account.entries[-1]
    assert (entry.operation, entry.refers_to, entry.at, entry.recorded_at) == (None, "h", DUE, NOW)
    assert account.entries[0].at == account.entries[0].recorded_at == NOW


def test_posting_marks_the_account_and_the_grant_as_changed() -> None:
    account, grant = account_with(10)
    account.is_dirty = grant.is_dirty = False
    post(account, grant, "consumed", 1, NOW, "x")
    assert account.is_dirty
    assert grant.is_dirty


def test_the_hash_is_sha_256_over_the_previous_one_and_the_fields_as_messagepack() -> None:
    entry = Entry(1, "g", "granted", 1, 10, 10, NOW, None, NOW, b"")
    noon = bytes.fromhex("d6ff697deec0")  # a timestamp of 4 bytes: 2026-01-31T12:00:00Z
    assert int.from_bytes(noon[2:], "big") == int(NOW.timestamp())
    body = b"\x9a\xa1a\x01\xa1g\xa7granted\x01\x0a\x0a" + noon + b"\xc0" + noon
    assert chain_hash(b"", "a", entry) == sha256(body).digest()
    assert chain_hash(b"previous", "a", entry) == sha256(b"previous" + body).digest()


FIRST = "ba9d0fe57f9f1513cb83798df13ab16d7c404285edb360160b243f58e80f5fa2"
SECOND = "dcc9a4709dc89ee0fec3f5dd8579225a8bbcaf9230832c459cb412f718ebf70b"


def test_the_chain_of_a_known_account_has_its_known_hashes() -> None:
    account = Account("kontó")
    grant = new_grant(account, "pack", 100, NOW, "order-991")
    post(account, grant, "granted", 25_000_000, NOW, "order-991")
    assert account.head.hex() == FIRST
    post(account, grant, "expired", 25_000_000, NOW, None, at=DUE)
    assert account.head.hex() == SECOND


def test_posting_writes_the_hash_that_the_documented_function_gives() -> None:
    account, grant = account_with(10)
    post(account, grant, "held", 3, NOW, "h")
    post(account, grant, "released", 3, NOW, None, "h", DUE)
    previous = b""
    for entry in account.entries:
        assert entry.hash == chain_hash(previous, "a", entry)
        assert len(entry.hash) == 32
        previous = entry.hash
    assert account.head == previous


def test_the_hash_changes_with_every_field_and_with_the_account() -> None:
    entry = Entry(1, "g", "granted", 1, 10, 10, NOW, None, NOW, b"")
    others = [
        entry._replace(seq=2),
        entry._replace(operation=None),
        entry._replace(operation="h"),
        entry._replace(operation=""),
        entry._replace(kind="restored"),
        entry._replace(grant=2),
        entry._replace(amount_micro=11),
        entry._replace(balance_after_micro=11),
        entry._replace(at=DUE),
        entry._replace(refers_to="g"),
        entry._replace(recorded_at=DUE),
        entry._replace(operation="gg", kind="ranted"),
    ]
    hashes = {chain_hash(b"", "a", each) for each in (entry, *others)}
    hashes |= {chain_hash(b"", "b", entry), chain_hash(b"\x00", "a", entry)}
    assert len(hashes) == len(others) + 3


def test_the_hash_is_over_the_instant_and_not_over_how_it_is_written() -> None:
    entry = Entry(1, "g", "granted", 1, 10, 10, NOW, None, NOW, b"")
    paris = NOW.astimezone(timezone(timedelta(hours=1)))
    assert chain_hash(b"", "a", entry._replace(at=paris)) == chain_hash(b"", "a", entry)


def test_credits_that_enter_a_lot_with_an_end_are_noted_as_due_then() -> None:
    account = Account("a")
    sooner, later = NOW + timedelta(seconds=10), NOW + timedelta(seconds=20)
    for end, due in ((None, None), (later, later), (sooner, sooner), (later, sooner), (None, sooner)):
        grant = new_grant(account, "pack", 100, NOW, "g", expires_at=end)
        post(account, grant, "granted", 5, NOW, "g")
        assert account.next_due_at == due
    account.next_due_at = None
    post(account, account.grants[3], "held", 5, NOW, "h")
    assert account.next_due_at is None, "what leaves is not waited for"
    post(account, account.grants[3], "released", 5, NOW, "r", "h")
    assert account.next_due_at == sooner
