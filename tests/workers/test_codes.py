"""Gift codes as rows: batches that share them, two lanes at once, poison among them, and what the audit makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from creditlane.contract import decode_message
from tests.support import Ledger, rows
from workers.ledger_writer import Job


def begin(ledger: Ledger, *accounts: str, credits: int = 100) -> None:
    """Pools, which begin with nothing; anna has credits that may be given away."""
    ledger.write(*(ledger.job("credits.open", "open", account=name, kind="pool") for name in accounts))
    ledger.apply("credits.grant", "priced", account="anna", amount=3, source="pack", priority=7, expires_in=86400 * 400,
                 unit_price={"minor": 499, "currency": "EUR", "per": 50})  # fmt: skip
    ledger.apply("credits.grant", "plain", account="anna", amount=credits - 3, source="pack")


def deliver(ledger: Ledger) -> list[dict[str, Any]]:
    """Take what follows to its lane, and apply it."""
    jobs = []
    for row in ledger.writer.take_outbox():
        jobs.append(Job(row.task, row.operation, decode_message(row.task, row.arguments), row.arguments))
    return ledger.write(*jobs) if jobs else []


def buckets(database: str, account: str) -> dict[str, float]:
    """What is in an account's buckets, in credits."""
    names = ("available", "in_transit", "sent", "received", "granted", "expired", "debt")
    columns = ", ".join(f"{name}_micro" for name in names)
    (row,) = rows(database, f"SELECT {columns} FROM accounts WHERE account = %s", account)
    return {name: micro / 1e6 for name, micro in zip(names, row, strict=True) if micro}


def test_codes_are_paid_for_redeemed_and_withdrawn(ledger: Ledger, database: str) -> None:
    begin(ledger, "anna", "bert", "dora")
    issued = ledger.apply("codes.issue", "issue", account="anna", codes=["AAAA", "BBBB"], amount=2, uses=3,
                          message="enjoy")  # fmt: skip
    assert (issued["status"], issued["charged"], issued["codes"]) == ("applied", "12", 2)
    assert buckets(database, "anna") == {"available": 88, "in_transit": 12, "granted": 100}
    first = ledger.apply("codes.redeem", "r1", account="bert", code="AAAA")
    assert (first["gift_code"], first["credits"], first["sender"], first["message"]) == ("AAAA", "2", "anna", "enjoy")
    assert ledger.apply("codes.redeem", "r1", account="bert", code="AAAA")["replayed"]
    assert ledger.apply("codes.redeem", "r2", account="bert", code="AAAA")["code"] == "code_used"
    # In one batch: anna's own use of her code, which spans both lots, and what is left of it is withdrawn.
    results = ledger.write(
        ledger.job("codes.redeem", "own", account="anna", code="AAAA"),
        ledger.job("codes.withdraw", "end", account="anna", codes=["AAAA"]),
        ledger.job("codes.redeem", "late", account="dora", code="AAAA"),
        ledger.job("codes.redeem", "other", account="dora", code="BBBB"),
    )
    assert [each["status"] for each in results] == ["applied", "applied", "rejected", "applied"]
    assert results[1]["charged"] == "-2"
    assert results[2]["code"] == "code_expired"
    assert {each["status"] for each in deliver(ledger)} == {"applied"}
    assert buckets(database, "anna") == {
        "available": 92, "in_transit": 4, "sent": 6, "received": 2, "granted": 100,
    }  # fmt: skip
    assert rows(database, "SELECT code, slot, account FROM redemptions ORDER BY 1, 2") == [
        ("AAAA", 0, "bert"), ("AAAA", 1, "anna"), ("BBBB", 0, "dora"),
    ]  # fmt: skip
    assert rows(database, "SELECT code, status, used FROM codes ORDER BY 1") == [
        ("AAAA", "closed", 2),
        ("BBBB", "open", 1),
    ]
    lots = rows(
        database,
        "SELECT account, amount_micro / 1e6, price_minor FROM entries JOIN grants USING (account, grant_id)"
        " WHERE kind = 'received' ORDER BY account, seq",
    )
    assert lots == [("anna", 1, 499), ("anna", 1, None), ("bert", 2, 499), ("dora", 2, None)]
