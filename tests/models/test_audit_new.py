"""The incremental audit: it reads what is new, goes on from what held, and finds what does not fit."""

from __future__ import annotations

import threading
from datetime import timedelta

import psycopg
import pytest

from models.audit import audit, audit_new
from models.cutoff import CLOCK_MARGIN, BusyError
from models.report import Report
from tests.proof import START, freeze, job, live, named, tamper
from tests.support import Ledger

LATER = START + timedelta(days=1)


def audited(ledger: Ledger) -> Report:
    """An incremental audit, without waiting for anybody."""
    return audit_new(ledger.writer.connection, wait_seconds=0)


def positions(ledger: Ledger) -> list[tuple[str, int, int]]:
    """Where the checkpoints stand."""
    return ledger.writer.connection.execute(
        "SELECT account, operations, seq FROM checkpoints ORDER BY account"
    ).fetchall()


def test_it_goes_on_where_the_last_one_held(ledger: Ledger) -> None:
    live(ledger, "a", "b")
    first = audited(ledger)
    assert (first.faults, first.accounts, first.operations) == ([], 2, 24)
    freeze(ledger, LATER)
    ledger.write(
        job("credits.refund", "back", account="a", operation="c", amount=1),
        job("credits.consume", "new", account="a", amount=1),
        job("credits.consume", "no-2", account="a", amount=10**6),
        job("credits.capture", "k-2", account="a", hold="open-hold"),
        job("credits.hold", "h-2", account="a", amount=1),
        job("credits.open", "open", account="c"),
        job("credits.adjust", "plus", account="a", amount=3, actor="x", reason="y"),
    )
    second = audited(ledger)
    assert (second.faults, second.accounts, second.operations) == ([], 2, 7)
    assert (
        positions(ledger)
        == ledger.writer.connection.execute("SELECT account, operations, seq FROM accounts ORDER BY account").fetchall()
    )
    third = audited(ledger)
    assert (third.faults, third.accounts, third.operations) == ([], 0, 0)
    freeze(ledger, LATER + timedelta(days=1))
    ledger.apply("credits.open", "open", account="a")  # answered before: nothing is new
    ledger.apply("credits.settle", "settle", account="a")  # the hold's time-out
    fourth = audited(ledger)
    assert (fourth.faults, fourth.operations, fourth.entries) == ([], 1, 1)
    assert audit(ledger.writer.connection).holds


def test_what_it_reads_grows_with_what_is_new_and_not_with_the_ledger(ledger: Ledger) -> None:
    freeze(ledger, START)
    accounts = [f"account-{number:03}" for number in range(200)]
    ledger.write(*(job("credits.open", "open", account=name) for name in accounts))

    def use(day: int, each: int, count: int) -> Report:
        freeze(ledger, START + timedelta(days=day))
        for number in range(each):
            ledger.write(
                *(job("credits.consume", f"c-{day}-{number}", account=name, amount="0.1") for name in accounts[:count])
            )
        freeze(ledger, START + timedelta(days=day, hours=1))
        return audited(ledger)

    use(1, 1, 200)
    small = use(2, 3, 5)
    use(3, 100, 200)  # a ledger fifty times as large
    large = use(4, 3, 5)
    assert (small.accounts, small.operations) == (large.accounts, large.operations) == (5, 15)
    assert large.rows_read == small.rows_read < 60


def test_the_new_rows_are_found_by_the_time_indexes(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.write(*(job("credits.open", "open", account=f"account-{number}") for number in range(1000)))
    connection = ledger.writer.connection
    for query in ("SELECT account FROM operations WHERE applied_at", "SELECT account FROM entries WHERE recorded_at"):
        plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {query} >= '2026-02-01Z'"))
        assert "_by_time" in plan
        assert "Seq Scan" not in plan


AT = "account = 'a' AND operation = 'new'"
TAMPERINGS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "a new entry's amount": ([f"UPDATE entries SET amount_micro = 1 WHERE {AT}"], ("entries", "seq 17")),
    "a new entry gone": ([f"DELETE FROM entries WHERE {AT}"], ("operations", "new")),
    "a new operation gone": ([f"DELETE FROM operations WHERE {AT}"], ("accounts", "operations")),
    "a new operation's charge": ([f"UPDATE operations SET charged_micro = 1 WHERE {AT}"], ("operations", "new")),
    "the totals": (
        ["UPDATE accounts SET available_micro = available_micro + 5, expired_micro = expired_micro - 5"
         " WHERE account = 'a'"],
        ("accounts", "totals"),
    ),
    "the debt": (["UPDATE accounts SET debt_micro = debt_micro + 1 WHERE account = 'a'"], ("accounts", "debt")),
    "a grant that moved": (
        ["UPDATE grants SET granted_micro = granted_micro + 5, available_micro = available_micro + 5"
         " WHERE account = 'a' AND grant_id = 3"],
        ("grants", "grant 3"),
    ),
    "an open grant that did not move": (
        ["UPDATE grants SET granted_micro = granted_micro + 5, available_micro = available_micro + 5"
         " WHERE account = 'a' AND grant_id = 5"],
        ("grants", "grant 5"),
    ),
    "the entry it goes on from": (
        ["UPDATE entries SET hash = sha256(hash) WHERE account = 'a' AND seq = 16"], ("entries", "seq 16"),
    ),
    "the account's row gone": (["DELETE FROM accounts WHERE account = 'a'"], ("accounts", "row")),
    "an open hold": (["UPDATE holds SET amount_micro = 1 WHERE account = 'a' AND status = 'open'"],
                     ("holds", "open holds")),
    "when it is due": (["UPDATE accounts SET next_due_at = NULL WHERE account = 'a'"], ("accounts", "next_due_at")),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_does_not_fit_is_found_and_looked_at_again(name: str, tampered_ledger: Ledger) -> None:
    statements, row = TAMPERINGS[name]
    live(tampered_ledger, "a")
    tampered_ledger.apply("credits.grant", "spare", account="a", amount=1, source="spare")
    assert audited(tampered_ledger).holds
    before = positions(tampered_ledger)
    freeze(tampered_ledger, START + timedelta(hours=3))
    tampered_ledger.apply("credits.consume", "new", account="a", amount=1)
    tamper(tampered_ledger, *statements)
    for _ in range(2):  # as often as it is asked, until it is mended
        report = audited(tampered_ledger)
        assert ("a", *row) in named(report), report.faults
        assert positions(tampered_ledger) == before


def test_a_transaction_that_is_still_open_is_not_overlooked(ledger: Ledger, database: str) -> None:
    live(ledger, "a")
    audited(ledger)
    connection = ledger.writer.connection
    with psycopg.connect(database) as writer:
        writer.execute("SELECT ledger_now()")
        audited(ledger)  # it may not advance: this transaction has its time already
    last = "SELECT cutoff FROM audits ORDER BY number DESC LIMIT 2"
    ((held,), (before,)) = connection.execute(last).fetchall()
    assert held == before
    freeze(ledger, LATER)
    audited(ledger)
    assert connection.execute(last).fetchone() == (LATER - CLOCK_MARGIN,)


def test_of_two_at_once_the_second_is_refused(ledger: Ledger, database: str) -> None:
    live(ledger, "a")
    refused: list[BusyError] = []

    def also(_done: int, _total: int) -> None:
        def other() -> None:
            with psycopg.connect(database, autocommit=True) as connection:
                try:
                    audit_new(connection, wait_seconds=0)
                except BusyError as error:
                    refused.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert audit_new(ledger.writer.connection, also, wait_seconds=0).holds
    assert refused
