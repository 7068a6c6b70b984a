"""Seals on a real Postgres: what was sealed and changed afterwards is found, whoever rewrote the rest to fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest

from models.audit import Report, audit
from models.cutoff import BusyError, declare_reader, quiet_cutoff
from models.seal import Seal, make_seal, read_seals
from tests.proof import START, freeze, job, live, named, rewrite_chain, tamper
from tests.support import Ledger, eventually, travel


def seal(ledger: Ledger) -> Seal:
    """Seal the ledger without waiting."""
    return make_seal(ledger.writer.connection, wait_seconds=0)


def audited(ledger: Ledger, *expected: bytes, seals: int | None = None) -> Report:
    """The audit of all accounts and seals."""
    return audit(ledger.writer.connection, expected=expected, seals=seals)


def three_days(ledger: Ledger) -> list[Seal]:
    """A ledger that was sealed on three days; ``a`` moves on the first and the third, ``b`` on all, ``c`` late."""
    live(ledger, "a", "b")
    seals = []
    for day in range(1, 4):
        freeze(ledger, START + timedelta(days=day))
        ledger.apply("credits.consume", f"day-{day}", account="b", amount=1)
        ledger.apply("credits.consume", f"no-{day}", account="b", amount=10**6)
        if day == 3:
            ledger.write(job("credits.consume", "late", account="a", amount=1), job("credits.open", "o", account="c"))
        freeze(ledger, START + timedelta(days=day, hours=1))
        seals.append(seal(ledger))
    freeze(ledger, START + timedelta(days=3, hours=2))
    ledger.apply("credits.consume", "unsealed", account="b", amount=1)
    return seals


def test_a_sealed_ledger_holds_and_each_seal_has_what_moved(ledger: Ledger) -> None:
    seals = three_days(ledger)
    assert [(one.number, one.accounts) for one in seals] == [(1, 2), (2, 1), (3, 3)]
    assert read_seals(ledger.writer.connection) == seals
    assert [one.previous for one in seals] == [b"", seals[0].root, seals[1].root]
    assert [one.operations for one in seals] == [26, 28, 32]
    report = audited(ledger, seals[0].root, seals[2].root)
    assert report.faults == []
    assert report.seals == 3


def test_sealing_what_did_not_move_makes_an_empty_seal(ledger: Ledger) -> None:
    freeze(ledger, START)
    assert seal(ledger).accounts == 0
    live(ledger, "a")
    assert seal(ledger).accounts == 1
    again = seal(ledger)
    assert (again.number, again.accounts) == (3, 0)
    assert audited(ledger).faults == []


def test_a_root_that_no_seal_has_is_a_fault(tampered_ledger: Ledger) -> None:
    kept = three_days(tampered_ledger)[1].root
    tamper(tampered_ledger, "DELETE FROM seals", "DELETE FROM seal_leaves")
    assert audited(tampered_ledger).holds
    assert named(audited(tampered_ledger, kept)) == {("", "seals", f"root {kept.hex()}")}


def test_only_the_last_seals_are_computed_again_when_asked(tampered_ledger: Ledger) -> None:
    seals = three_days(tampered_ledger)
    assert audited(tampered_ledger, seals=1).seals == 1
    tamper(tampered_ledger, "UPDATE seals SET entries = 0 WHERE number = 1")
    assert audited(tampered_ledger, seals=2).holds
    assert named(audited(tampered_ledger)) == {("", "seals", "seal 1")}
    assert named(audited(tampered_ledger, seals[0].root, seals=2)) == {("", "seals", f"root {seals[0].root.hex()}")}


C = "account = 'b' AND operation = 'c'"
SEALED: dict[str, tuple[list[str], tuple[str, str, str]]] = {
    "an operation's arguments": (
        [f"UPDATE operations SET arguments = '{{\"account\": \"b\",\"amount\":55}}' WHERE {C}"],
        ("b", "operations", "number 1 to 14"),
    ),
    "an operation's result": (
        [f"UPDATE operations SET result = '{{}}' WHERE {C}"], ("b", "operations", "number 1 to 14"),
    ),
    "a later operation's result": (
        ["UPDATE operations SET result = '{}' WHERE account = 'b' AND operation = 'no-2'"],
        ("b", "operations", "number 15 to 16"),
    ),
    "the catalog of a single operation": (
        ["UPDATE operations SET catalog = 'x' WHERE account = 'a' AND operation = 'late'"],
        ("a", "operations", "late"),
    ),
    "a seal's root": (["UPDATE seals SET root = sha256(root) WHERE number = 2"], ("", "seals", "seal 2")),
    "a seal's cutoff": (
        ["UPDATE seals SET cutoff = cutoff - interval '1 s' WHERE number = 2"], ("", "seals", "seal 2"),
    ),
    "a seal's link": (["UPDATE seals SET previous = '' WHERE number = 2"], ("", "seals", "seal 2")),
    "a seal gone": (["DELETE FROM seals WHERE number = 2"], ("", "seals", "seal 3")),
    "the first seal gone": (["DELETE FROM seals WHERE number = 1"], ("", "seals", "seal 2")),
    "a forged seal": (
        ["INSERT INTO seals SELECT 4, cutoff, 0, operations, entries, root, root, sealed_at FROM seals"
         " WHERE number = 3"],
        ("", "seals", "seal 4"),
    ),
    "a leaf's head": (
        ["UPDATE seal_leaves SET head = sha256(head) WHERE account = 'b' AND seal = 1"], ("", "seals", "seal 1"),
    ),
    "a leaf's position": (
        ["UPDATE seal_leaves SET operations = 13 WHERE account = 'b' AND seal = 1"],
        ("b", "operations", "number 1 to 13"),
    ),
    "a leaf gone": (["DELETE FROM seal_leaves WHERE account = 'a' AND seal = 3"], ("", "seals", "seal 3")),
    "two leaves swapped": (
        ["UPDATE seal_leaves SET seal = -seal WHERE account = 'a'",
         "UPDATE seal_leaves SET seal = 4 + seal WHERE account = 'a'"],
        ("", "seals", "seal 1"),
    ),
    "all leaves": (["TRUNCATE seal_leaves"], ("", "seals", "seal 1")),
    "all entries": (["TRUNCATE entries"], ("b", "accounts", "seal 3")),
    "all operations": (["TRUNCATE operations"], ("b", "accounts", "seal 3")),
    "an account with all that it had": (
        [f"DELETE FROM {table} WHERE account = 'a'"
         for table in ("receipts", "holds", "entries", "operations", "grants", "accounts")],
        ("a", "seal_leaves", "1"),
    ),
    "an operation slipped in behind a seal": (
        ["UPDATE operations SET applied_at = applied_at - interval '1 d' WHERE operation = 'unsealed'",
         "UPDATE entries SET at = at - interval '1 d', recorded_at = recorded_at - interval '1 d'"
         " WHERE operation = 'unsealed'"],
        ("b", "operations", "unsealed"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEALED)
def test_a_change_of_what_was_sealed_is_found(name: str, tampered_ledger: Ledger) -> None:
    statements, row = SEALED[name]
    three_days(tampered_ledger)
    tamper(tampered_ledger, *statements)
    report = audited(tampered_ledger)
    assert row in named(report), report.faults


def add_a_credit(ledger: Ledger) -> None:
    """Change an entry of ``b`` and everything that it shows in, the chain included."""
    more = "granted_micro = granted_micro + 1000000, available_micro = available_micro + 1000000"
    tamper(
        ledger,
        "UPDATE entries SET amount_micro = amount_micro + 1000000 WHERE account = 'b' AND seq = 1",
        "UPDATE entries SET balance_after_micro = balance_after_micro + 1000000 WHERE account = 'b'",
        f"UPDATE accounts SET {more} WHERE account = 'b'",
        f"UPDATE grants SET {more}, is_open = true WHERE account = 'b' AND grant_id = 1",
    )
    rewrite_chain(ledger, "b")


def test_a_chain_made_anew_does_not_fit_the_seals(tampered_ledger: Ledger) -> None:
    three_days(tampered_ledger)
    add_a_credit(tampered_ledger)
    report = audited(tampered_ledger)
    assert {(account, table) for account, table, _ in named(report)} == {("b", "entries")}
    assert ["seal 1" in fault.what for fault in report.faults].count(True) == 1


def test_who_makes_the_seals_anew_as_well_is_found_by_a_root_kept_elsewhere(tampered_ledger: Ledger) -> None:
    seals = three_days(tampered_ledger)
    add_a_credit(tampered_ledger)
    tamper(tampered_ledger, "DELETE FROM seals", "DELETE FROM seal_leaves")
    seal(tampered_ledger)
    assert audited(tampered_ledger).holds
    assert not audited(tampered_ledger, seals[0].root).holds


# --- The cutoff --------------------------------------------------------------------------------------


def test_a_seal_waits_for_a_transaction_that_may_still_write(ledger: Ledger, database: str) -> None:
    live(ledger, "a")
    waited: list[list[int]] = []
    made: list[Seal] = []
    with psycopg.connect(database) as writer, psycopg.connect(database, autocommit=True) as sealer:
        writer.execute("SELECT ledger_now()")  # not so much as a transaction id, and yet it may write
        thread = threading.Thread(target=lambda: made.append(make_seal(sealer, 60, waited.append)))
        thread.start()
        eventually(lambda: waited)
        assert waited == [[writer.info.backend_pid]]
        assert not made
        writer.rollback()
        thread.join(30)
    assert [one.number for one in made] == [1]


def test_a_seal_does_not_wait_for_ever(ledger: Ledger, database: str) -> None:
    with psycopg.connect(database) as writer:
        writer.execute("SELECT 1")
        with pytest.raises(BusyError, match=rf"backends have run for more than 0 s.*: {writer.info.backend_pid};"):
            seal(ledger)
    assert seal(ledger).number == 1


def test_an_audit_is_not_waited_for(ledger: Ledger, database: str) -> None:
    with psycopg.connect(database) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        declare_reader(reader)
        assert seal(ledger).number == 1


def test_of_two_seals_at_once_the_second_is_refused(ledger: Ledger, database: str) -> None:
    refused: list[str] = []

    def also(_: int) -> None:
        with psycopg.connect(database, autocommit=True) as other:
            try:
                make_seal(other, 0)
            except BusyError as error:
                refused.append(str(error))

    live(ledger, "a")
    make_seal(ledger.writer.connection, 0, progress=also)
    assert refused == ["a seal is being made by another session; wait until it is done"]
    assert len(read_seals(ledger.writer.connection)) == 1


def test_a_cutoff_is_not_looked_for_within_a_transaction(ledger: Ledger) -> None:
    with ledger.writer.connection.transaction(), pytest.raises(ValueError, match="outside a transaction"):
        quiet_cutoff(ledger.writer.connection)


def test_a_batch_that_was_under_way_belongs_to_the_next_seal(
    ledger: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(ledger, "a")
    travel(database, timedelta())
    held: list[BusyError] = []
    original: Callable[..., None] = ledger.writer._update

    def sealing_meanwhile(*arguments: object) -> None:
        with psycopg.connect(database, autocommit=True) as other:
            try:
                make_seal(other, 0)
            except BusyError as error:
                held.append(error)
        original(*arguments)

    monkeypatch.setattr(ledger.writer, "_update", sealing_meanwhile)
    ledger.apply("credits.consume", "meanwhile", account="a", amount=1)
    assert len(held) == 1
    assert audited(ledger).faults == []


def test_a_clock_that_is_set_back_a_little_breaks_no_seal(ledger: Ledger, database: str) -> None:
    travel(database, timedelta())
    live_now = [job("credits.open", "open", account=name) for name in ("a", "b")]
    ledger.write(*live_now)
    seal(ledger)
    travel(database, timedelta(seconds=-50))
    ledger.apply("credits.open", "open", account="c")
    assert seal(ledger).number == 2
    assert audited(ledger).faults == []
