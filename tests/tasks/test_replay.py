"""Replay on a real Postgres: the rules write the same again, and what no chain tells is found by them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from models import audit_page
from models.audit import Report, audit
from models.catalog import load_catalog
from models.rules.catalog import Catalog
from tasks import replay as replay_module
from tasks.replay import Replayer
from tests.proof import START, freeze, job, live, named, rewrite_chain, tamper
from tests.support import Ledger

PACKS = load_catalog("packs")


def replayed(ledger: Ledger, *catalogs: Catalog) -> Report:
    """The whole audit with replay, under some catalogs; the one of the tests unless given."""
    replayer = Replayer({catalog.label: catalog for catalog in catalogs or (PACKS,)})
    return audit(ledger.writer.connection, replayer=replayer)


def test_a_ledger_of_every_operation_comes_out_again(ledger: Ledger) -> None:
    live(ledger, "a", "b")
    report = replayed(ledger)
    assert report.faults == []
    assert (report.replayed, report.operations, report.is_whole) == (24, 24, True)


@pytest.mark.parametrize("kept", [0, 10**9])
@pytest.mark.parametrize("lines", [0, 16])
def test_what_an_operation_works_on_is_at_hand_however_long_ago(
    kept: int, lines: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_page, "KEPT_OPERATIONS", kept)
    monkeypatch.setattr(replay_module, "LINES", lines)
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    for number in range(40):
        ledger.write(
            job("credits.grant", f"g-{number}", account="a", amount=1, source="pack", purchase=f"p-{number % 4}",
                expires_in=600 + number % 2 * 10**6),
            job("credits.hold", f"h-{number}", account="a", amount=1, ttl=300),
            job("credits.consume", f"c-{number}", account="a", amount="0.9"),
            job("credits.release" if number % 3 else "credits.capture", f"e-{number}", account="a", hold=f"h-{number}"),
        )  # fmt: skip
    freeze(ledger, START + timedelta(hours=1))
    for number in range(0, 40, 3):
        ledger.write(
            job("credits.refund", f"r-{number}", account="a", operation=f"c-{number}", amount="0.4"),
            job("credits.refund", f"s-{number}", account="a", operation=f"c-{number}"),
            job("credits.release", f"t-{number}", account="a", hold=f"h-{number}"),
            job("credits.refund", f"u-{number}", account="a", operation=f"h-{number}"),
        )
    ledger.write(
        job("credits.revoke", "v-1", account="a", purchase="p-1"),
        job("credits.revoke", "v-2", account="a", grant=4, amount="0.5"),
        job("credits.revoke", "v-3", account="a", grant=4),
    )
    ledger.write(
        job("credits.claw_back", "w-1", account="a", purchase="p-3", paid_minor=1, returned_minor=1, step=1),
        job("credits.claw_back", "w-2", account="a", purchase="p-3", paid_minor=1, returned_minor=0, step=2),
        job("credits.consume", "w-3", account="a", amount=100, partial=True),
    )
    report = replayed(ledger)
    assert report.faults == []
    assert report.replayed == report.operations == 1 + 160 + 56 + 3 + 3


def test_what_a_repeated_message_settled_is_settled_at_its_time(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.write(
        job("credits.open", "open", account="a"),
        job("credits.grant", "g", account="a", amount=5, source="promo", expires_in=60),
        job("credits.grant", "h", account="a", amount=5, source="promo", expires_in=7200),
        job("credits.hold", "nothing", account="a", feature="export", ttl=90),
    )
    freeze(ledger, START + timedelta(hours=1))
    ledger.apply("credits.open", "open", account="a")  # answered before: it leaves entries, and no row
    freeze(ledger, START + timedelta(hours=2))
    ledger.apply("credits.consume", "no", account="a", amount=10**6)  # refused: it settles as well
    assert replayed(ledger).faults == []
    ledger.write(job("credits.hold", "more", account="a", amount=1, ttl=60))
    freeze(ledger, START + timedelta(hours=3))
    ledger.apply("credits.open", "open", account="a")
    report = replayed(ledger)
    assert report.faults == []
    assert report.replayed == report.operations == 6


def test_a_hold_of_nothing_that_runs_out(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "open", account="a")
    held = ledger.apply("credits.hold", "nothing", account="a", feature=free_feature(), ttl=60)
    assert held["status"] == "applied"
    freeze(ledger, START + timedelta(hours=1))
    ledger.apply("credits.open", "open", account="a")  # known: nothing changes
    assert ledger.writer.connection.execute("SELECT status FROM holds").fetchall() == [("open",)]
    assert replayed(ledger).faults == []
    ledger.apply("credits.settle", "settle", account="a")
    assert ledger.writer.connection.execute("SELECT status FROM holds").fetchall() == [("expired",)]
    assert replayed(ledger).faults == []


def free_feature() -> str:
    """A feature of the catalog that costs nothing."""
    return next(name for name, feature in PACKS.features.items() if not feature.price)


def test_a_catalog_that_is_not_at_hand_is_named_and_its_operations_counted(ledger: Ledger) -> None:
    live(ledger, "a", "b")
    report = replayed(ledger, load_catalog("metering"))
    assert report.holds
    assert not report.is_whole
    assert report.not_replayed == {PACKS.label: 24}
    assert report.replayed == 0


def test_another_catalog_under_the_same_label_is_found(tampered_ledger: Ledger) -> None:
    freeze(tampered_ledger, START)
    live(tampered_ledger, "a")
    tampered_ledger.apply("credits.consume", "image", account="a", feature="image")
    import msgspec

    features = {**PACKS.features, "image": msgspec.structs.replace(PACKS.features["image"], per=1_000_000)}
    report = replayed(tampered_ledger, msgspec.structs.replace(PACKS, features=features))
    assert ("a", "operations", "image") in named(report)


AT = "account = 'b' AND"
ONLY_BY_REPLAY: dict[str, tuple[list[str], tuple[str, str]]] = {
    "an operation's arguments": (
        [f"UPDATE operations SET arguments = '{{\"account\":\"b\",\"amount\":54}}' WHERE {AT} operation = 'c'"],
        ("operations", "c"),
    ),
    "an operation's arguments to those of another account": (
        [f"UPDATE operations SET arguments = '{{\"account\":\"a\",\"amount\":55}}' WHERE {AT} operation = 'c'"],
        ("operations", "c"),
    ),
    "an operation's arguments to nonsense": (
        [f"UPDATE operations SET arguments = '[]' WHERE {AT} operation = 'c'"], ("operations", "c"),
    ),
    "an operation's result": (
        [f"UPDATE operations SET result = '{{\"charged\":\"1\"}}' WHERE {AT} operation = 'c'"], ("operations", "c"),
    ),
    "a refusal's code": (
        [f"UPDATE operations SET code = 'invalid' WHERE {AT} operation = 'no'"], ("operations", "no"),
    ),
    "an operation's feature": (
        [f"UPDATE operations SET feature = 'image' WHERE {AT} operation = 'c'"], ("operations", "c"),
    ),
    "an operation's quantity": (
        [f"UPDATE operations SET quantity_micro = 1 WHERE {AT} operation = 'c'"], ("operations", "c"),
    ),
    "an operation's member": (
        [f"UPDATE operations SET member = 'x' WHERE {AT} operation = 'c'"], ("operations", "c"),
    ),
    "an operation's time of use": (
        [f"UPDATE operations SET occurred_at = applied_at WHERE {AT} operation = 'c'"], ("operations", "c"),
    ),
    "an operation's name": (
        [f"UPDATE operations SET name = 'credits.settle' WHERE {AT} operation = 'g-3'"], ("operations", "g-3"),
    ),
    "an operation's name to an unknown one": (
        [f"UPDATE operations SET name = 'credits.gift' WHERE {AT} operation = 'g-3'"], ("operations", "g-3"),
    ),
    "a refusal made an applied operation": (
        [f"UPDATE operations SET status = 'applied', code = NULL WHERE {AT} operation = 'no'"], ("operations", "no"),
    ),
    "a grant's source": ([f"UPDATE grants SET source = 'x' WHERE {AT} grant_id = 2"], ("grants", "grant 2")),
    "a grant's priority": ([f"UPDATE grants SET priority = 1 WHERE {AT} grant_id = 2"], ("grants", "grant 2")),
    "a grant's scope": ([f"UPDATE grants SET features = '{{image}}' WHERE {AT} grant_id = 3"], ("grants", "grant 3")),
    "a spent grant's end": (
        [f"UPDATE grants SET expires_at = expires_at + interval '1 y' WHERE {AT} grant_id = 2"], ("grants", "grant 2"),
    ),
    "a grant's start": (
        [f"UPDATE grants SET effective_at = effective_at - interval '1 d' WHERE {AT} grant_id = 3"],
        ("grants", "grant 3"),
    ),
    "a grant's purchase": ([f"UPDATE grants SET purchase = NULL WHERE {AT} grant_id = 2"], ("grants", "grant 2")),
    "a grant's price": (
        [f"UPDATE grants SET price_minor = 1, price_currency = 'EUR', price_per_micro = 1 WHERE {AT} grant_id = 2"],
        ("grants", "grant 2"),
    ),
    "what was clawed back": (
        [f"UPDATE grants SET clawed_back_micro = 0 WHERE {AT} grant_id = 2"], ("grants", "grant 2"),
    ),
    "what was forgiven": ([f"UPDATE grants SET forgiven_micro = 1 WHERE {AT} grant_id = 2"], ("grants", "grant 2")),
    "which grant it continues": ([f"UPDATE grants SET origin = 1 WHERE {AT} grant_id = 3"], ("grants", "grant 3")),
    "an account's e-mail": (["UPDATE accounts SET email = 'x@example.org' WHERE account = 'b'"],
                            ("accounts", "opening")),
    "an account closed": (["UPDATE accounts SET status = 'closed' WHERE account = 'b'"], ("accounts", "opening")),
    "an account's time": (
        ["UPDATE accounts SET updated_at = updated_at + interval '1 s' WHERE account = 'b'"],
        ("accounts", "updated_at"),
    ),
    "a hold's feature": ([f"UPDATE holds SET feature = 'image' WHERE {AT} hold = 'h'"], ("holds", "hold h")),
    "a closed hold's status": ([f"UPDATE holds SET status = 'expired' WHERE {AT} hold = 'h'"], ("holds", "hold h")),
    "a hold's time": (
        [f"UPDATE holds SET created_at = created_at - interval '1 s' WHERE {AT} hold = 'open-hold'"],
        ("holds", "hold open-hold"),
    ),
    "a forged hold": (
        ["INSERT INTO holds SELECT account, 'forged', 'released', 1, 0, NULL, NULL, created_at, expires_at, closed_at"
         " FROM holds WHERE account = 'b' AND hold = 'h'"],
        ("holds", "hold forged"),
    ),
    "a forged receipt": (
        ["INSERT INTO receipts VALUES ('b', 'k', 1, 1, 1000000, 0)"], ("receipts", "line 1 of k"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ONLY_BY_REPLAY)
def test_what_no_chain_tells_is_found_by_the_rules(name: str, tampered_ledger: Ledger) -> None:
    statements, row = ONLY_BY_REPLAY[name]
    live(tampered_ledger, "a", "b")
    tamper(tampered_ledger, *statements)
    report = replayed(tampered_ledger)
    assert not report.holds
    assert {fault.account for fault in report.faults} == {"b"}
    assert row in {(table, key) for _, table, key in named(report)}, report.faults


def test_a_forger_who_makes_everything_fit_is_found_by_the_rules(tampered_ledger: Ledger) -> None:
    live(tampered_ledger, "a", "b")
    # Five credits more were granted than the rules say, from the entry to the totals, and the chain is made anew.
    tamper(
        tampered_ledger,
        "UPDATE entries SET amount_micro = amount_micro + 5000000 WHERE account = 'b' AND seq = 1",
        "UPDATE entries SET balance_after_micro = balance_after_micro + 5000000 WHERE account = 'b'",
        *(
            f"UPDATE {table} SET granted_micro = granted_micro + 5000000, available_micro = available_micro + 5000000"
            f"{more} WHERE account = 'b'{which}"
            for table, more, which in (("accounts", "", ""), ("grants", ", is_open = true", " AND grant_id = 1"))
        ),
    )
    rewrite_chain(tampered_ledger, "b")
    assert audit(tampered_ledger.writer.connection).holds
    report = replayed(tampered_ledger)
    assert ("b", "entries", "seq 1") in named(report)
