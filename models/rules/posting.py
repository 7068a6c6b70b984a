"""Posting: the one place where credits move, and the chain that proves they did.

Every entry kind names the bucket that credits leave and the one they enter, so that the closing
identity (granted + received + restored = available + held + in transit + consumed + expired + revoked
+ sent) holds by construction, per grant and per account (ledger rules: proof).
"""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from typing import NamedTuple

import msgspec

from models.rules.state import Account, Entry, Grant


class Flow(NamedTuple):
    """Which bucket credits leave, which they enter, which total of incoming credits grows, and the debt's sign."""

    leaves: str | None
    enters: str | None
    counted: str | None = None
    debt: int = 0


FLOWS: dict[str, Flow] = {
    "granted": Flow(None, "available", "granted"),
    "consumed": Flow("available", "consumed"),
    "held": Flow("available", "held"),
    "captured": Flow("held", "consumed"),
    "released": Flow("held", "available"),
    "restored": Flow(None, "available", "restored"),
    "expired": Flow("available", "expired"),
    "revoked": Flow("available", "revoked"),
    "transferred": Flow("available", "in_transit"),
    "sent": Flow("in_transit", "sent"),
    "bounced": Flow("in_transit", "available"),
    "received": Flow(None, "available", "received"),
    "rolled_out": Flow("available", "sent"),
    "rolled_in": Flow(None, "available", "received"),
    "unexpired": Flow("expired", "available"),
    "debt_incurred": Flow(None, None, None, +1),
    "debt_paid": Flow("available", "revoked", None, -1),
    "debt_cancelled": Flow(None, None, None, -1),
    "reinstated": Flow("revoked", "available"),
}
"""Every kind of entry and what it does to the buckets of its grant and of the account."""

_encode = msgspec.msgpack.Encoder().encode


def chain_hash(previous: bytes, account: str, entry: Entry) -> bytes:
    """The hash of an entry: SHA-256 over the previous entry's hash and every field of this one.

    The fields are MessagePack (each with its type and length in front, so no two different rows encode
    alike), in the order of :class:`Entry`, the account first. The first entry's ``previous`` is empty.
    """
    return sha256(previous + _encode((account, *entry[:-1]))).digest()


def post(
    account: Account,
    grant: Grant,
    kind: str,
    amount_micro: int,
    now: datetime,
    operation: str | None,
    refers_to: str | None = None,
    at: datetime | None = None,
) -> None:
    """Move credits in one grant and its account, and write the entry.

    :param amount_micro: how many, more than 0.
    :param now: when it is recorded; ``at`` is the instant it holds from, where that is earlier.
    :raises ArithmeticError: when a bucket would fall below zero, which no rule may cause.
    """
    leaves, enters, counted, debt = FLOWS[kind]
    if amount_micro <= 0:
        raise ArithmeticError(f"an entry of {amount_micro} micro-credits")
    if leaves is not None:
        left = getattr(grant, leaves) - amount_micro
        if left < 0:
            raise ArithmeticError(f"grant {grant.id} has not {amount_micro} micro-credits {leaves}")
        setattr(grant, leaves, left)
        setattr(account, leaves, getattr(account, leaves) - amount_micro)
    if enters is not None:
        setattr(grant, enters, getattr(grant, enters) + amount_micro)
        setattr(account, enters, getattr(account, enters) + amount_micro)
    if counted is not None:
        setattr(grant, counted, getattr(grant, counted) + amount_micro)
        setattr(account, counted, getattr(account, counted) + amount_micro)
    if debt:
        account.debt += debt * amount_micro
        if account.debt < 0:
            raise ArithmeticError(f"the debt of {account.account!r} would fall below zero")
    account.seq = seq = account.seq + 1
    body = (seq, operation, kind, grant.id, amount_micro, account.available, at or now, refers_to, now)
    account.head = head = sha256(account.head + _encode((account.account, *body))).digest()
    account.entries.append(Entry(*body, head))
    due = grant.expires_at
    if enters == "available" and due is not None and (account.next_due_at is None or due < account.next_due_at):
        account.next_due_at = due
    grant.is_dirty = account.is_dirty = True
