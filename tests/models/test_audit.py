"""The audit on a real Postgres: a ledger that was not touched holds, and whoever touched it is found by the row."""

from __future__ import annotations

import os
import signal
import tracemalloc

import psycopg
import pytest

from models import audit as audit_module
from models import audit_rows
from models import report as report_module
from models.audit import Report, audit
from models.audit_page import Replay
from models.audit_processes import HelperError
from models.rules.posting import chain_hash
from models.rules.state import Entry
from models.seal import make_seal
from tasks.replay import Replayer
from tests.proof import job, live, named, tamper
from tests.support import Ledger


def audited(ledger: Ledger, *accounts: str) -> Report:
    """The audit of all accounts, or of those named."""
    return audit(ledger.writer.connection, accounts or None)


def test_a_ledger_of_every_operation_holds_and_is_counted(ledger: Ledger) -> None:
    live(ledger, "a", "b")
    kinds = ledger.writer.connection.execute("SELECT DISTINCT kind FROM entries ORDER BY 1").fetchall()
    assert [kind for (kind,) in kinds] == [
        "captured", "consumed", "debt_incurred", "debt_paid", "expired", "granted", "held", "released", "restored",
        "revoked",
    ]  # fmt: skip
    report = audited(ledger)
    assert report.holds
    assert (report.accounts, report.operations, report.faults, report.fault_count) == (2, 24, [], 0)
    (entries,) = ledger.writer.connection.execute("SELECT count(*) FROM entries").fetchone() or (0,)
    assert report.entries == entries


def test_an_empty_ledger_holds(ledger: Ledger) -> None:
    report = audited(ledger)
    assert (report.holds, report.accounts, report.entries) == (True, 0, 0)


ENTRY, OPERATION, GRANT = "account = 'b' AND seq = 3", "account = 'b' AND operation = 'c'", "account = 'b' AND grant_id"

TAMPERINGS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "an entry's amount": ([f"UPDATE entries SET amount_micro = amount_micro - 1 WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's balance": (
        [f"UPDATE entries SET balance_after_micro = balance_after_micro + 1 WHERE {ENTRY}"], ("entries", "seq 3"),
    ),
    "an entry's time": ([f"UPDATE entries SET at = at - interval '1 s' WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's time of recording": (
        [f"UPDATE entries SET recorded_at = recorded_at + interval '1 us' WHERE {ENTRY}"], ("entries", "seq 3"),
    ),
    "an entry's operation": ([f"UPDATE entries SET operation = 'k' WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's kind": ([f"UPDATE entries SET kind = 'revoked' WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's kind to an unknown one": ([f"UPDATE entries SET kind = 'gift' WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's grant": ([f"UPDATE entries SET grant_id = 2 WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's reference": ([f"UPDATE entries SET refers_to = 'x' WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry's hash": ([f"UPDATE entries SET hash = sha256(hash) WHERE {ENTRY}"], ("entries", "seq 3")),
    "an entry taken out": ([f"DELETE FROM entries WHERE {ENTRY}"], ("entries", "seq 4")),
    "the last entry taken off": (
        ["DELETE FROM entries e WHERE account = 'b' AND seq = (SELECT max(seq) FROM entries WHERE account = 'b')"],
        ("accounts", "seq"),
    ),
    "the last entry taken off and the count with it": (
        ["DELETE FROM entries e WHERE account = 'b' AND seq = (SELECT max(seq) FROM entries WHERE account = 'b')",
         "UPDATE accounts SET seq = seq - 1 WHERE account = 'b'"],
        ("accounts", "head"),
    ),
    "two entries swapped": (
        ["UPDATE entries SET seq = -seq WHERE account = 'b' AND seq IN (3, 4)",
         "UPDATE entries SET seq = 7 + seq WHERE account = 'b' AND seq < 0"],
        ("entries", "seq 3"),
    ),
    "two operations swapped": (
        ["UPDATE operations SET number = -number WHERE account = 'b' AND number IN (3, 4)",
         "UPDATE operations SET number = 7 + number WHERE account = 'b' AND number < 0"],
        ("operations", "c"),
    ),
    "a forged entry": (
        ["INSERT INTO entries (account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at,"
         " refers_to, recorded_at, hash) SELECT account, seq + 1, operation, 'granted', grant_id, 1000000,"
         " balance_after_micro + 1000000, at, refers_to, recorded_at, hash FROM entries WHERE account = 'b'"
         " ORDER BY seq DESC LIMIT 1"],
        ("entries", "seq 16"),
    ),
    "a forged entry with its counts": (
        ["INSERT INTO entries (account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at,"
         " refers_to, recorded_at, hash) SELECT account, seq + 1, operation, 'granted', grant_id, 1000000,"
         " balance_after_micro + 1000000, at, refers_to, recorded_at, hash FROM entries WHERE account = 'b'"
         " ORDER BY seq DESC LIMIT 1",
         "UPDATE accounts SET seq = seq + 1, granted_micro = granted_micro + 1000000,"
         " available_micro = available_micro + 1000000 WHERE account = 'b'",
         "UPDATE grants SET granted_micro = granted_micro + 1000000, available_micro = available_micro + 1000000,"
         " is_open = true WHERE account = 'b' AND grant_id = 4"],
        ("entries", "seq 16"),
    ),
    "a grant's buckets that still close": (
        [f"UPDATE grants SET granted_micro = granted_micro + 5, consumed_micro = consumed_micro + 5 WHERE {GRANT} = 1"],
        ("grants", "grant 1"),
    ),
    "a grant's available for consumed": (
        [f"UPDATE grants SET available_micro = 5, is_open = true, consumed_micro = consumed_micro - 5"
         f" WHERE {GRANT} = 2"],
        ("grants", "grant 2"),
    ),
    "a grant's row gone": ([f"DELETE FROM grants WHERE {GRANT} = 1"], ("grants", "grant 1")),
    "a forged grant": (
        ["INSERT INTO grants SELECT account, 9, source, priority, features, effective_at, expires_at, created_at,"
         " operation, purchase, price_minor, price_currency, price_per_micro, 0, 0, NULL, true, 7, 0, 0, 7"
         " FROM grants WHERE account = 'b' AND grant_id = 1"],
        ("grants", "grant 9"),
    ),
    "an account's totals that still close": (
        ["UPDATE accounts SET available_micro = available_micro + 5, expired_micro = expired_micro - 5"
         " WHERE account = 'b'"],
        ("accounts", "totals"),
    ),
    "an account's debt": (["UPDATE accounts SET debt_micro = debt_micro + 1 WHERE account = 'b'"],
                          ("accounts", "debt")),
    "an account's head": (["UPDATE accounts SET head = sha256(head) WHERE account = 'b'"], ("accounts", "head")),
    "an account's count of operations": (["UPDATE accounts SET operations = operations + 1 WHERE account = 'b'"],
                                         ("accounts", "operations")),
    "an operation's row gone": ([f"DELETE FROM operations WHERE {OPERATION}"], ("entries", "seq 3")),
    "a refusal's row gone": (["DELETE FROM operations WHERE account = 'b' AND operation = 'no'"],
                             ("operations", "v")),
    "the last operation gone": (["DELETE FROM operations WHERE account = 'b' AND operation = 's'"],
                                ("accounts", "operations")),
    "an operation's id": ([f"UPDATE operations SET operation = 'x' WHERE {OPERATION}"], ("operations", "x")),
    "an operation's count of entries": ([f"UPDATE operations SET entries = 1 WHERE {OPERATION}"],
                                        ("operations", "c")),
    "an operation's first entry": ([f"UPDATE operations SET first_seq = 2 WHERE {OPERATION}"], ("operations", "c")),
    "an applied operation made a refusal": ([f"UPDATE operations SET status = 'rejected' WHERE {OPERATION}"],
                                            ("operations", "c")),
    "a hold's receipt": (
        ["UPDATE receipts SET returned_micro = 0 WHERE account = 'b' AND operation = 'h'"], ("receipts", "hold h"),
    ),
    "an open hold's receipt": (
        ["UPDATE receipts SET taken_micro = taken_micro + 1 WHERE account = 'b' AND operation = 'open-hold'"],
        ("receipts", "hold open-hold"),
    ),
    "a receipt gone": (["DELETE FROM receipts WHERE account = 'b' AND operation = 'h'"], ("receipts", "hold h")),
    "an open hold's amount": (
        ["UPDATE holds SET amount_micro = 1 WHERE account = 'b' AND hold = 'open-hold'"], ("holds", "open holds"),
    ),
    "an open hold closed": (
        ["UPDATE holds SET status = 'released' WHERE account = 'b' AND hold = 'open-hold'"], ("holds", "open holds"),
    ),
    "a hold's row gone": (["DELETE FROM holds WHERE account = 'b' AND hold = 'open-hold'"], ("holds", "open holds")),
    "an account's row gone": (["DELETE FROM accounts WHERE account = 'b'"], ("entries", "1")),
    "an account renamed": (["UPDATE accounts SET account = 'c' WHERE account = 'b'"], ("operations", "1")),
    "a charge's receipt that lets more come back": (
        ["UPDATE receipts SET returned_micro = 0 WHERE account = 'b' AND operation = 'c'"], ("receipts", "charge c"),
    ),
    "a charge's receipt gone": (["DELETE FROM receipts WHERE account = 'b' AND operation = 'c'"],
                                ("receipts", "charge c")),
    "when an account is due": (["UPDATE accounts SET next_due_at = NULL WHERE account = 'b'"],
                               ("accounts", "next_due_at")),
    "an account's time": (["UPDATE accounts SET updated_at = updated_at - interval '1 d' WHERE account = 'b'"],
                          ("accounts", "updated_at")),
    "an operation's time": (
        [f"UPDATE operations SET applied_at = applied_at + interval '1 us' WHERE {OPERATION}"], ("operations", "c"),
    ),
    "an operation's time to one before the others": (
        [f"UPDATE operations SET applied_at = applied_at - interval '1 us' WHERE {OPERATION}"], ("operations", "c"),
    ),
    "a refusal's charge": (
        ["UPDATE operations SET charged_micro = 1 WHERE account = 'b' AND operation = 'no'"], ("operations", "no"),
    ),
    "a grant's charge": (
        ["UPDATE operations SET charged_micro = 1 WHERE account = 'b' AND operation = 'g'"], ("operations", "g"),
    ),
    "an entry of nothing": (["UPDATE entries SET amount_micro = 0 WHERE account = 'b' AND seq = 3"],
                            ("entries", "seq 3")),
    "a hold of nobody": (
        ["INSERT INTO holds SELECT 'c', hold, status, amount_micro, captured_micro, feature, member, created_at,"
         " expires_at, closed_at FROM holds WHERE account = 'b' AND hold = 'h'"],
        ("holds", "h"),
    ),
    "a receipt of nobody": (["INSERT INTO receipts VALUES ('c', 'x', 1, 1, 1, 0)"], ("receipts", "x")),
    "a grant of nobody": (
        ["INSERT INTO grants SELECT 'c', 9, source, priority, features, effective_at, expires_at, created_at,"
         " operation, purchase, price_minor, price_currency, price_per_micro, 0, 0, NULL, true, 7, 0, 0, 7"
         " FROM grants WHERE account = 'b' AND grant_id = 1"],
        ("grants", "9"),
    ),
    "credits received that nobody sent": (
        ["UPDATE accounts SET received_micro = received_micro + 5, granted_micro = granted_micro - 5"
         " WHERE account = 'b'"],
        ("accounts", "received and sent"),
    ),
    "an operation's charge": ([f"UPDATE operations SET charged_micro = charged_micro - 1 WHERE {OPERATION}"],
                              ("operations", "c")),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_is_found_and_the_row_named(name: str, tampered_ledger: Ledger) -> None:
    statements, (table, key) = TAMPERINGS[name]
    live(tampered_ledger, "a", "b", "d")
    assert audited(tampered_ledger).holds
    tamper(tampered_ledger, *statements)
    report = audited(tampered_ledger)
    assert not report.holds
    assert report.fault_count == len(report.faults) > 0
    assert all(fault.account in ("b", "c", "") and fault.what for fault in report.faults)
    assert any((fault.table, fault.key) == (table, key) for fault in report.faults), report.faults


def test_a_forger_who_rebuilds_the_chain_is_found_by_the_balances(tampered_ledger: Ledger) -> None:
    live(tampered_ledger, "a")
    connection = tampered_ledger.writer.connection
    rows = connection.execute(
        "SELECT seq, operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to, recorded_at, hash"
        " FROM entries WHERE account = 'a' ORDER BY seq"
    ).fetchall()
    previous = b""
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        for row in rows:
            entry = Entry(*row)
            if entry.seq == 3:
                entry = entry._replace(amount_micro=entry.amount_micro - 1_000_000)
            if entry.seq >= 3:
                entry = entry._replace(balance_after_micro=entry.balance_after_micro + 1_000_000)
            previous = chain_hash(previous, "a", entry)
            connection.execute(
                "UPDATE entries SET amount_micro = %s, balance_after_micro = %s, hash = %s"
                " WHERE account = 'a' AND seq = %s",
                (entry.amount_micro, entry.balance_after_micro, previous, entry.seq),
            )
        connection.execute("UPDATE accounts SET head = %s WHERE account = 'a'", (previous,))
    report = audited(tampered_ledger)
    assert {("a", "accounts", "totals"), ("a", "grants", "grant 1")} <= named(report)
    assert not [fault for fault in report.faults if "chain" in fault.what]


def test_a_change_in_the_past_is_found_at_its_row_and_not_at_those_after_it(tampered_ledger: Ledger) -> None:
    live(tampered_ledger, "a", "b")
    tamper(tampered_ledger, "UPDATE entries SET refers_to = 'x' WHERE account = 'a' AND seq = 5")
    assert named(audited(tampered_ledger)) == {("a", "entries", "seq 5")}


def test_only_the_named_accounts_are_audited(tampered_ledger: Ledger) -> None:
    live(tampered_ledger, "a", "b", "c")
    tamper(tampered_ledger, "UPDATE entries SET amount_micro = 1 WHERE account = 'b' AND seq = 1")
    report = audited(tampered_ledger, "a", "c", "nobody")
    assert (report.holds, report.accounts, report.operations) == (True, 2, 24)
    assert not audited(tampered_ledger, "b").holds
    assert {account for account, _, _ in named(audited(tampered_ledger))} == {"b"}


def test_progress_is_told_page_by_page(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "PAGE", 500)
    monkeypatch.setattr(audit_module, "ACCOUNTS", audit_module.ACCOUNTS.replace("LIMIT 2000", "LIMIT 500"))
    count = 2 * audit_module.PAGE + 1
    ledger.write(*(job("credits.open", "open", account=f"account-{number}") for number in range(count)))
    told: list[tuple[int, int]] = []
    report = audit(ledger.writer.connection, progress=lambda done, total: told.append((done, total)))
    assert told == [(audit_module.PAGE, count), (2 * audit_module.PAGE, count), (count, count)]
    assert (report.holds, report.accounts, report.operations) == (True, count, count)


def test_faults_over_the_limit_are_counted_but_not_named(
    tampered_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "MAX_FAULTS", 3)
    live(tampered_ledger, "a")
    tamper(tampered_ledger, "UPDATE entries SET hash = sha256(hash) WHERE seq > 2")
    report = audited(tampered_ledger)
    assert len(report.faults) == 3
    assert report.fault_count > 10


def test_the_audit_sees_one_snapshot_while_the_ledger_moves_on(ledger: Ledger, database: str) -> None:
    count = audit_module.PAGE + 10
    ledger.write(*(job("credits.open", "open", account=f"account-{number:04}") for number in range(count)))

    def move_on(done: int, total: int) -> None:
        ledger.write(
            *(job("credits.consume", f"c-{done}", account=f"account-{number:04}", amount=1) for number in range(count))
        )

    with psycopg.connect(database, autocommit=True) as connection:
        report = audit(connection, progress=move_on)
    assert report.holds, report.faults
    assert report.operations == count


def test_the_audit_changes_nothing_and_leaves_no_transaction_open(ledger: Ledger) -> None:
    live(ledger, "a")
    audited(ledger)
    assert ledger.writer.connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert ledger.write(job("credits.consume", "after", account="a", amount=1))[0]["status"] == "applied"


@pytest.mark.parametrize("table", ["entries", "operations", "grants", "holds", "receipts"])
def test_a_table_that_was_emptied_is_found(table: str, tampered_ledger: Ledger) -> None:
    live(tampered_ledger, "a", "b")
    tamper(tampered_ledger, f"TRUNCATE {table}")
    assert {account for account, _, _ in named(audited(tampered_ledger))} >= {"a", "b"}


def test_emptied_accounts_are_found_by_what_belongs_to_nobody(tampered_ledger: Ledger) -> None:
    live(tampered_ledger, "a", "b")
    tamper(tampered_ledger, "ALTER TABLE grants DROP CONSTRAINT grants_account", "TRUNCATE accounts")
    assert {table for _, table, _ in named(audited(tampered_ledger))} == {
        "entries", "operations", "grants", "holds", "receipts",
    }  # fmt: skip


# --- Size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_rows_that_come_in_pieces_are_put_together(chunk: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_rows, "CHUNK", chunk)
    live(ledger, "a", "b", "c")
    report = audited(ledger)
    assert (report.faults, report.operations, report.entries) == ([], 36, 45)


def test_an_account_is_streamed_and_never_held_whole(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_rows, "CHUNK", 200)
    ledger.apply("credits.open", "open", account="a")

    def peak(operations: int) -> int:
        for start in range(0, operations, 1000):
            ledger.write(
                *(
                    job("credits.consume", f"{operations}-{start + n}", account="a", amount="0.0001")
                    for n in range(1000)
                )
            )
        tracemalloc.start()
        try:
            report = audited(ledger)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert report.faults == []

    peak(1000)  # whatever is made once
    small = peak(2000)
    large = peak(20_000)
    assert large < 1.5 * small


def test_several_processes_find_what_one_does(tampered_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "WORTH_HELP", 0)
    monkeypatch.setattr(audit_module, "MAX_ROWS", 50)
    accounts = [f"account-{number:02}" for number in range(12)]
    live(tampered_ledger, *accounts)
    make_seal(tampered_ledger.writer.connection, 0)
    tamper(
        tampered_ledger,
        "UPDATE entries SET amount_micro = 1 WHERE account IN ('account-03', 'account-09') AND seq = 1",
        "UPDATE operations SET result = '{}' WHERE account = 'account-05' AND operation = 'c'",
    )
    told: list[tuple[int, int]] = []
    connection = tampered_ledger.writer.connection
    replayer = Replayer({tampered_ledger.catalog.label: tampered_ledger.catalog})
    alone = audit(connection, replayer=replayer)
    shared = audit(connection, None, lambda done, total: told.append((done, total)), processes=3, replayer=replayer)
    assert named(shared) == named(alone)
    assert {account for account, _, _ in named(shared)} == {"account-03", "account-05", "account-09"}
    assert (shared.accounts, shared.operations, shared.entries, shared.replayed, shared.seals) == (
        alone.accounts, alone.operations, alone.entries, alone.replayed, alone.seals,
    )  # fmt: skip
    assert told[-1] == (144, 144)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_process_that_cannot_go_on_ends_the_audit(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "WORTH_HELP", 0)
    live(ledger, "a")
    with pytest.raises(HelperError, match="could not go on: ZeroDivisionError"):
        audit(ledger.writer.connection, processes=2, replayer=Broken())
    assert audited(ledger).holds


def test_a_process_that_is_killed_ends_the_audit(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "WORTH_HELP", 0)
    live(ledger, "a")
    with pytest.raises(HelperError, match="ended before its work was done"):
        audit(ledger.writer.connection, processes=2, replayer=Killed())


class Broken:
    """A replay whose code raises."""

    naming = ()

    def begin(self, *_: object) -> Replay:
        """Fail."""
        raise ZeroDivisionError("oh no")


class Killed(Broken):
    """A replay in whose process something ends it."""

    def begin(self, *_: object) -> Replay:
        """End this very process."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it goes on")
