"""Gift codes as rows: batches that share them, two lanes at once, poison among them, and what the audit makes of it."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import msgspec
import pytest

from creditlane.contract import MAX_CODES, MAX_MESSAGE_BYTES, decode_message, redeemed_id
from models.audit_codes import check_codes
from models.report import Report
from models.rules.sharing import Redemption
from models.rules.state import Account
from tasks.operation import Need
from tasks.registry import OPERATIONS
from tests.conftest import _ledger
from tests.support import Ledger, rows
from workers.lane_consumer import write_around
from workers.ledger_writer import Job, LedgerWriter

CONCLUDED = redeemed_id("BBBB", 0)
ISSUE = ("anna", "operations", "issue")


class Undone(Exception):
    """What was tampered with is as it was."""


def begin(ledger: Ledger, *accounts: str, credits: int = 100) -> None:
    """Pools, which begin with nothing; anna has credits that may be given away."""
    ledger.write(*(ledger.job("credits.open", "open", account=name, kind="pool") for name in accounts))
    ledger.apply("credits.grant", "priced", account="anna", amount=3, source="pack", priority=7, expires_in=86400 * 400,
                 unit_price={"minor": 499, "currency": "EUR", "per": 50})  # fmt: skip
    ledger.apply("credits.grant", "plain", account="anna", amount=credits - 3, source="pack")


def deliver(ledger: Ledger) -> list[dict[str, Any]]:
    """Take what follows to its lane, and apply it."""
    taken = ledger.writer.take_outbox()
    jobs = [Job(row.task, row.operation, decode_message(row.task, row.arguments), row.arguments) for row in taken]
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


def checked(ledger: Ledger) -> set[tuple[str, str, str]]:
    """What the audit of the codes names."""
    report = Report()
    with ledger.writer.connection.transaction():
        check_codes(ledger.writer.connection, report)
    return {(fault.account, fault.table, fault.key) for fault in report.faults}


TAMPERED = {
    "a use is gone": ("DELETE FROM redemptions WHERE code = 'AAAA' AND slot = 0",
                      {("anna", "codes", "AAAA"), ("bert", "operations", "r1"), ISSUE,
                       ("anna", "operations", redeemed_id("AAAA", 0))}),
    "the last use is gone, and its count": (
        "DELETE FROM redemptions WHERE code = 'BBBB' AND slot = 1; UPDATE codes SET used = 1 WHERE code = 'BBBB'",
        {("bert", "operations", "r3"), ISSUE, ("anna", "operations", redeemed_id("BBBB", 1))}),
    "a use is another account's": ("UPDATE redemptions SET account = 'x' WHERE code = 'BBBB' AND slot = 0",
        {("x", "redemptions", "BBBB 0"), ("dora", "operations", "r2"), ("anna", "operations", CONCLUDED)}),
    "a use is of another amount": ("UPDATE redemptions SET amount_micro = 1 WHERE code = 'BBBB' AND slot = 0",
                                   {("dora", "redemptions", "BBBB 0")}),
    "a use that nobody made": ("INSERT INTO redemptions VALUES ('BBBB', 2, 'dora', 'r2', 2000000, now());"
                               " UPDATE codes SET used = 3 WHERE code = 'BBBB'", {("dora", "redemptions", "BBBB 2")}),
    "a slot between": ("UPDATE redemptions SET slot = 2 WHERE code = 'BBBB' AND slot = 1",
        {("anna", "codes", "BBBB"), ("bert", "redemptions", "BBBB 2"), ("bert", "operations", "r3"), ISSUE,
         ("anna", "operations", redeemed_id("BBBB", 1))}),
    "how often it was used": ("UPDATE codes SET used = 0 WHERE code = 'BBBB'", {("anna", "codes", "BBBB")}),
    "how often it may be": ("UPDATE codes SET uses = 4 WHERE code = 'BBBB'",
                            {("anna", "codes", "BBBB"), ISSUE}),
    "what it gives": ("UPDATE codes SET amount_micro = 1, terms = (terms::jsonb || '{\"amount\": 1}')::json"
                      " WHERE code = 'GIVN'", {("anna", "codes", "GIVN")}),
    "its end": ("UPDATE codes SET expires_at = expires_at + interval '1 y' WHERE code = 'GIVN'",
                {("anna", "codes", "GIVN")}),
    "whose it is": ("UPDATE codes SET account = 'bert', terms = (terms::jsonb || '{\"account\": \"bert\"}')::json"
                    " WHERE code = 'GIVN'", {("anna", "codes", "GIVN"), ("bert", "codes", "GIVN")}),
    "the code itself": ("DELETE FROM codes WHERE code = 'GIVN'", {("anna", "codes", "GIVN")}),
    "it is open again": ("UPDATE codes SET status = 'open', closed_at = NULL WHERE code = 'AAAA'",
                         {("anna", "codes", "AAAA"), ISSUE}),
    "it is closed": ("UPDATE codes SET status = 'closed', closed_at = now() WHERE code = 'BBBB'",
                     {("anna", "codes", "BBBB"), ISSUE}),
    "it was closed at another time": ("UPDATE codes SET closed_at = now() + interval '1 h' WHERE code = 'AAAA'",
                                      {("anna", "codes", "AAAA")}),
    "a use was not concluded, it says": (
        f"UPDATE operations SET status = 'rejected' WHERE operation = '{CONCLUDED}'",
        {("anna", "operations", CONCLUDED), ISSUE}),
}  # fmt: skip


def test_whoever_tampers_with_codes_is_named(tampered_ledger: Ledger) -> None:
    ledger = tampered_ledger
    begin(ledger, "anna", "bert", "dora")
    ledger.apply("codes.issue", "issue", account="anna", codes=["AAAA", "BBBB"], amount=2, uses=3)
    ledger.apply("codes.issue", "given", account="anna", codes=["GIVN"], amount=5, actor="boss", reason="party")
    ledger.apply("codes.redeem", "r1", account="bert", code="AAAA")
    ledger.apply("codes.redeem", "r2", account="dora", code="BBBB")
    deliver(ledger)
    ledger.apply("codes.redeem", "r3", account="bert", code="BBBB")  # who paid is not told yet
    assert checked(ledger) == set()
    ledger.apply("codes.withdraw", "end", account="anna", codes=["AAAA"])
    ledger.apply("codes.withdraw", "again", account="anna", codes=["AAAA"])
    assert checked(ledger) == set()
    deliver(ledger)
    assert checked(ledger) == set()
    found = {}
    for what, (statements, _) in TAMPERED.items():
        with contextlib.suppress(Undone), ledger.writer.connection.transaction():
            ledger.writer.connection.execute("SET LOCAL session_replication_role = replica")
            ledger.writer.connection.execute(statements)
            found[what] = checked(ledger)
            raise Undone
    assert found == {what: named for what, (_, named) in TAMPERED.items()}
    assert checked(ledger) == set()


def test_what_raises_in_a_batch_that_shares_codes_changes_nothing_for_the_others(
    ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever's account is made anew: what others saw of its codes, or it of theirs, is as if nobody had raised."""
    begin(ledger, "anna", "bert", "dora")
    ledger.apply("codes.issue", "issue", account="anna", codes=["AAAA"], amount=2, uses=2)
    settle = OPERATIONS["credits.settle"]

    def run(account: Account, message: Any, context: Any) -> Any:
        code = account.codes["AAAA"]
        code.taken[code.uses] = Redemption(account.account, context.operation, 1, context.now)  # half done
        raise LookupError("no such thing")

    monkeypatch.setitem(
        OPERATIONS, "credits.settle", settle._replace(run=run, need=lambda message: (Need("code", "AAAA"),))
    )
    jobs = [
        ledger.job("codes.redeem", "first", account="bert", code="AAAA"),
        ledger.job("codes.issue", "new", account="anna", codes=["NEWS"], amount=3, uses=2),
        ledger.job("codes.redeem", "of-new", account="dora", code="NEWS"),
        ledger.job("credits.settle", "poison-1", account="anna"),
        ledger.job("codes.redeem", "of-new", account="bert", code="NEWS"),
        ledger.job("codes.withdraw", "end", account="anna", codes=["AAAA", "NEWS"]),
        ledger.job("credits.settle", "poison-2", account="bert"),
        ledger.job("codes.redeem", "late", account="dora", code="AAAA"),
        ledger.job("credits.settle", "poison-3", account="dora"),
    ]
    results = ledger.write(*jobs)
    assert [job.operation for job in jobs if job.quarantined] == ["poison-1", "poison-2", "poison-3"]
    assert [each["status"] for each in results if each] == ["applied"] * 5 + ["rejected"]
    assert (results[5]["charged"], results[7]["code"]) == ("-2", "code_expired")
    assert rows(database, "SELECT code, slot, account FROM redemptions ORDER BY 1, 2") == [
        ("AAAA", 0, "bert"), ("NEWS", 0, "dora"), ("NEWS", 1, "bert"),
    ]  # fmt: skip
    monkeypatch.undo()
    assert [each["status"] for each in deliver(ledger)] == ["applied"] * 3
    assert buckets(database, "anna") == {"available": 92, "sent": 8, "granted": 100}
    assert buckets(database, "dora") == {"available": 3, "received": 3}


def test_two_lanes_want_the_last_use_of_a_code_and_the_same_text(ledger: Ledger, database: str) -> None:
    begin(ledger, "anna", "bert", "dora")
    ledger.apply("codes.issue", "issue", account="anna", codes=["AAAA", "BBBB"], amount=2)
    ledger.apply("credits.grant", "plain", account="bert", amount=9, source="pack")
    ledger.apply("credits.grant", "plain", account="dora", amount=9, source="pack")
    wanted = {
        name: [
            ledger.job("codes.redeem", "a", account=name, code=first),
            ledger.job("codes.redeem", "b", account=name, code=second),
            ledger.job("codes.issue", "new", account=name, codes=["NEWS", f"OF{name.upper()}"], amount=1),
        ]
        for name, first, second in (("bert", "AAAA", "BBBB"), ("dora", "BBBB", "AAAA"))
    }
    begun = threading.Barrier(2)

    def work(writer: LedgerWriter, jobs: list[Job]) -> None:
        begun.wait(30)
        write_around(writer, jobs)

    for other in _ledger(database):
        writers = {"bert": ledger.writer, "dora": other.writer}
        threads = [threading.Thread(target=work, args=(writers[name], jobs)) for name, jobs in wanted.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [job.quarantined for jobs in wanted.values() for job in jobs] == [None] * 6
    results = {name: [msgspec.json.decode(job.result or b"") for job in jobs] for name, jobs in wanted.items()}
    winners = [name for name, jobs in results.items() if [each["status"] for each in jobs] == ["applied"] * 3]
    assert len(winners) == 1, results
    (loser,) = set(results) - set(winners)
    assert [each.get("code") for each in results[loser]] == ["code_used", "code_used", "code_exists"]
    assert results[loser][2]["existing"] == ["NEWS"]
    assert rows(database, "SELECT code, used FROM codes ORDER BY 1") == [
        ("AAAA", 1), ("BBBB", 1), ("NEWS", 0), (f"OF{winners[0].upper()}", 0),
    ]  # fmt: skip


def test_an_issue_of_as_many_lots_and_codes_as_there_may_be(ledger: Ledger, database: str) -> None:
    begin(ledger, "anna", "bert", credits=4)
    source = "s" * 128
    for block in range(2):
        ledger.write(*(
            ledger.job("credits.grant", f"{block} {number}", account="anna", amount=1, source=source, priority=99)
            for number in range(499)
        ))  # fmt: skip
    codes = [f"{number:064d}" for number in range(MAX_CODES)]
    issued = ledger.apply("codes.issue", "issue", account="anna", codes=codes, amount="1.002",
                          message="m" * 500)  # fmt: skip
    assert issued["status"] == "applied"
    assert len(msgspec.json.encode(issued)) < MAX_MESSAGE_BYTES / 4
    assert ledger.apply("codes.redeem", "one", account="bert", code=codes[500])["status"] == "applied"
    poor = ledger.apply("codes.issue", "all", account="anna", codes=["ABCD"], amount=1)
    assert poor["code"] == "insufficient_credits"
    assert [each["status"] for each in deliver(ledger)] == ["applied"]
    ended = ledger.apply("codes.withdraw", "end", account="anna", codes=codes)
    assert (ended["codes"], ended["charged"]) == (MAX_CODES, "-1000.998")
    assert len(msgspec.json.encode(ended)) < MAX_MESSAGE_BYTES
    whole = ledger.apply("codes.issue", "whole", account="anna", codes=["ABCD"], amount="1000.998")
    assert whole["status"] == "applied"
    redeemed = ledger.apply("codes.redeem", "whole", account="bert", code="ABCD")
    assert (redeemed["code"], redeemed.get("status")) == ("limit_reached", "rejected")  # he has two lots already
