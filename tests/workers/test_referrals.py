"""Referrals on a real Postgres: two lanes at once, codes of one batch, rewards that were lost, and the audit of all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from creditlane.contract import decode_message, rewarding_id
from models.audit import audit
from models.audit_referrals import check_referrals
from models.catalog import parse_catalog
from models.database import connect as connect_reader
from models.referral_reading import MAX_PLACE, referrals
from models.report import Report
from models.settings import settings
from schedules import referrals as schedule
from tasks.queries import referrals as query
from tasks.registry import OPERATIONS
from tasks.replay import Replayer
from tests.support import Ledger, eventually, execute, rows, travel, value
from workers.ledger_writer import Job, LedgerWriter, connect

TEXT = """
[catalog]
name = "refer"
[referrals]
referrer = "5"
referee = "3"
"""
CATALOG = parse_catalog(TEXT, "refer.toml")


@pytest.fixture
def lane(ledger: Ledger) -> Ledger:
    """A writer with a catalog that gives bonuses at once."""
    ledger.writer.catalog = lambda: CATALOG
    return ledger


@pytest.fixture
def other(lane: Ledger, database: str) -> Iterator[Ledger]:
    """Another lane's."""
    with connect(database) as connection:
        yield Ledger(LedgerWriter(connection, lambda: CATALOG, lane.writer.poison), CATALOG)


def proven(lane: Ledger) -> int:
    """Audit and replay everything; how many operations there are."""
    report = audit(lane.writer.connection, replayer=Replayer({CATALOG.label: CATALOG}))
    assert report.faults == []
    assert report.replayed == report.operations
    return report.operations


def opened(lane: Ledger, *accounts: str) -> None:
    """Users, each with a code of its name."""
    for account in accounts:
        lane.write(
            lane.job("credits.open", "open", account=account),
            lane.job("referrals.issue", "issue", account=account, code=account.upper()),
        )


def claim(lane: Ledger, account: str, code: str, operation: str = "claim") -> Job:
    return lane.job("referrals.claim", operation, account=account, code=code)


def letters(*lanes: Ledger) -> list[Job]:
    """What follows from what was committed, and was not taken yet."""
    found = [row for lane in lanes for row in lane.writer.take_outbox()]
    return [Job(row.task, row.operation, decode_message(row.task, row.arguments), row.arguments) for row in found]


def told(job: Job) -> dict[str, Any]:
    assert job.result is not None
    answer: dict[str, Any] = msgspec.json.decode(job.result)
    return answer


def within(lane: Ledger, job: Job, meanwhile: Callable[[], None]) -> None:
    """Write a job, and do something while its transaction has all its locks."""
    lane.writer.write([job], meanwhile=meanwhile)


@pytest.mark.parametrize("rewarded_first", ["anna", "bert"])
@pytest.mark.parametrize("committed_last", ["anna", "bert"])
def test_two_that_claim_each_other_in_two_lanes_at_once_are_not_rewarded_for_it(
    committed_last: str, rewarded_first: str, lane: Ledger, other: Ledger, database: str
) -> None:
    opened(lane, "anna", "bert")
    first, second = ("anna", "bert") if committed_last == "anna" else ("bert", "anna")
    inner, outer = claim(other, second, first.upper()), claim(lane, first, second.upper())
    # The other lane's claim begins and ends while this one's is not committed.
    within(lane, outer, lambda: other.writer.write([inner]))
    assert [told(job)["referral"] for job in (inner, outer)] == ["claimed"] * 2
    rewards = sorted(letters(lane, other), key=lambda job: job.account != rewarded_first)
    assert rewards[0].account == rewarded_first
    for job in rewards:
        lane.writer.write([job])
    assert [told(job)["code"] for job in rewards] == ["self_referral"] * 2
    assert rows(database, "SELECT available_micro FROM accounts") == [(3_000_000,)] * 2
    assert rows(database, "SELECT referees FROM referrals") == [(0,)] * 2
    proven(lane)


def test_claims_of_one_code_in_two_lanes_wait_for_one_commit_and_count_both(
    lane: Ledger, other: Ledger, database: str
) -> None:
    opened(lane, "anna", "bert", "carl")
    late = claim(other, "carl", "ANNA")
    thread = threading.Thread(target=lambda: other.writer.write([late]))

    def begin_and_wait_for_it_to_wait() -> None:
        thread.start()
        blocked = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        eventually(lambda: value(database, blocked, other.writer.connection.info.backend_pid), what="it waits")

    within(lane, claim(lane, "bert", "ANNA"), begin_and_wait_for_it_to_wait)
    thread.join(30)
    assert told(late)["bonus"] == "3"
    assert [each["bonus"] for each in lane.write(*letters(lane, other))] == ["5", "5"]
    assert value(database, "SELECT referees FROM referrals WHERE account = 'anna'") == 2
    proven(lane)


def test_one_batch_sees_the_codes_that_it_makes_and_whom_their_owners_were_referred_by(
    lane: Ledger, database: str
) -> None:
    lane.write(
        lane.job("credits.open", "open", account="anna"),
        lane.job("referrals.issue", "issue", account="anna", code="ANNA"),
        lane.job("credits.open", "open", account="bert", referral_code="ANNA"),
    )
    (reward,) = letters(lane)
    assert reward.operation == rewarding_id("anna", "bert")
    lane.write(reward)
    issued, twice, mutual, unknown, by_carl = lane.write(
        lane.job("referrals.issue", "issue", account="bert", code="BERT"),
        lane.job("referrals.issue", "again", account="anna", code="BERT"),
        claim(lane, "anna", "BERT"),
        claim(lane, "anna", "CARL", "claim-2"),
        lane.job("credits.open", "open", account="carl", referral_code="BERT"),
    )
    assert (issued["referral_code"], twice["referral_code"]) == ("BERT", "ANNA")
    assert (mutual["code"], unknown["code"], by_carl["referral"]) == ("self_referral", "code_unknown", "claimed")
    lane.write(lane.job("credits.open", "open", account="dora"))
    taken = lane.apply("referrals.issue", "issue", account="dora", code="BERT")
    assert taken["code"] == "code_exists"
    assert lane.apply("referrals.claim", "own", account="bert", code="BERT")["code"] == "self_referral"
    assert rows(database, "SELECT code, account, status, used, uses FROM codes ORDER BY code") == [
        ("ANNA", "anna", "open", 0, None), ("BERT", "bert", "open", 0, None),
    ]  # fmt: skip
    assert proven(lane) == 12


def test_an_account_that_is_made_anew_keeps_its_code_and_takes_no_claim_of_another_with_it(
    lane: Ledger, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> Any:
        raise LookupError("no such thing")

    monkeypatch.setitem(OPERATIONS, "credits.settle", OPERATIONS["credits.settle"]._replace(run=run))
    opened(lane, "anna")
    *answers, nothing = lane.write(
        lane.job("credits.open", "open", account="bert"),
        lane.job("referrals.issue", "issue", account="bert", code="BERT"),
        lane.job("credits.open", "open", account="carl", referral_code="BERT"),
        claim(lane, "bert", "ANNA"),
        lane.job("credits.settle", "settle", account="bert"),
    )
    assert [answer["status"] for answer in answers] == ["applied"] * 4
    assert nothing == {}
    assert rows(database, "SELECT account, code, referrer FROM referrals ORDER BY 1") == [
        ("anna", "ANNA", None), ("bert", "BERT", "anna"), ("carl", None, "bert"),
    ]  # fmt: skip
    assert sorted(job.account for job in letters(lane)) == ["anna", "bert"]
    assert proven(lane) == 6


TAMPERED = {
    "whose a code is": ("UPDATE codes SET account = 'bert' WHERE code = 'ANNA'",
                        {("bert", "codes", "ANNA"), ("anna", "referrals", "ANNA"), ("bert", "referrals", "ANNA"),
                         ("carl", "referrals", "ANNA")}),
    "which one an account has": ("UPDATE referrals SET code = 'BERT' WHERE account = 'anna'",
                                 {("anna", "codes", "ANNA"), ("anna", "referrals", "BERT")}),
    "a code is gone": ("DELETE FROM codes WHERE code = 'BERT'",
                       {("bert", "referrals", "BERT"), ("anna", "referrals", "BERT")}),
    "who referred an account": ("UPDATE referrals SET referrer = 'bert' WHERE account = 'carl'",
        {("carl", "referrals", "ANNA"), ("anna", "operations", rewarding_id("anna", "carl"))}),
    "that it was given its bonus": ("UPDATE referrals SET settled_at = NULL WHERE account = 'carl'",
                                    {("anna", "operations", rewarding_id("anna", "carl"))}),
    "two are rewarded for each other": (
        "UPDATE operations SET status = 'applied' WHERE name = 'referrals.reward' AND account IN ('anna', 'bert')",
        {("anna", "operations", rewarding_id("anna", "bert")), ("bert", "operations", rewarding_id("bert", "anna"))}),
}  # fmt: skip


def test_whoever_tampers_with_referrals_is_named(tampered_ledger: Ledger) -> None:
    lane = tampered_ledger
    lane.writer.catalog = lambda: CATALOG
    opened(lane, "anna", "bert")
    lane.write(claim(lane, "anna", "BERT"), claim(lane, "bert", "ANNA"))
    lane.write(*letters(lane))  # refused: each was referred by the other
    lane.write(lane.job("credits.open", "open", account="carl", referral_code="ANNA"))
    lane.write(*letters(lane))
    connection = lane.writer.connection
    found = {}
    for what, (statement, _) in {"nothing": ("SELECT 1", set()), **TAMPERED}.items():
        report = Report()
        with connection.transaction(force_rollback=True):
            connection.execute("SET LOCAL session_replication_role = replica")
            connection.execute(statement)
            check_referrals(connection, report)
        found[what] = {(fault.account, fault.table, fault.key) for fault in report.faults}
    assert found == {"nothing": set(), **{what: named for what, (_, named) in TAMPERED.items()}}


@pytest.fixture
def sweep(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The schedule, in this process."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    yield lambda: schedule.sweep.apply(throw=True).get()["again"]
    settings.cache_clear()


def test_a_reward_that_was_lost_is_sent_again_and_one_that_was_refused_is_not(
    lane: Ledger, database: str, sweep: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "PAGE", 2)
    opened(lane, "anna", "bert", "carl")
    execute(database, "UPDATE accounts SET status = 'closed' WHERE account = 'carl'")
    for number, code in enumerate(("ANNA", "ANNA", "BERT", "CARL", "ANNA")):
        lane.write(lane.job("credits.open", "open", account=f"referee-{number}", referral_code=code))
    lost, *sent = letters(lane)
    answers = lane.write(*sent)
    assert [answer.get("code") for answer in answers] == [None, None, "account_closed", None]
    execute(database, "DELETE FROM outbox")
    assert sweep() == 0  # it may still be on its way
    travel(database, timedelta(seconds=schedule.AGE_SECONDS + 1))
    assert sweep() == 1
    assert sweep() == 0  # it stands in the outbox
    found = rows(database, "DELETE FROM outbox RETURNING task, operation, arguments::text")
    assert [(task, operation, raw.encode()) for task, operation, raw in found] == [
        (lost.name, lost.operation, lost.arguments)
    ]
    assert lane.write(lost)[0]["bonus"] == "5"
    assert sweep() == 0
    execute(database, "UPDATE accounts SET status = 'open' WHERE account = 'carl'")


def test_what_an_account_is_told_of_its_referrals(lane: Ledger, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(lane, "anna", "bert")
    lane.write(*(lane.job("credits.open", "open", account=f"r-{number}", referral_code="ANNA") for number in range(3)))
    lane.writer.catalog = lambda: parse_catalog(TEXT + 'trigger = "purchase"\n', "refer.toml")
    lane.apply("referrals.claim", "claim", account="bert", code="ANNA")
    refused, rewarded, _ = letters(lane)
    lane.writer.catalog = lambda: parse_catalog(TEXT + "per_day = 1\n", "refer.toml")
    lane.write(rewarded, refused)
    with connect_reader(database, "test of referrals") as connection:
        found = referrals(connection, "anna")
        assert found is not None
        assert (found.code, found.referrer, found.rewarded, found.next_before) == ("ANNA", None, 1, None)
        assert [(each.account, each.status, each.reward) for each in found.referees] == [
            ("bert", "waiting", "0"), ("r-2", "settled", "0"), ("r-1", "rewarded", "5"), ("r-0", "daily_limit", "0"),
        ]  # fmt: skip
        page, seen = referrals(connection, "anna", limit=3), []
        while page is not None:
            seen += [each.account for each in page.referees]
            page = referrals(connection, "anna", before=page.next_before) if page.next_before else None
        assert seen == ["bert", "r-2", "r-1", "r-0"]
        own = referrals(connection, "bert")
        assert own is not None
        assert (own.referrer, own.claimed_code, own.settled_at, own.referees) == ("anna", "ANNA", None, [])
        assert referrals(connection, "nobody") is None
        for wrong in ({"limit": 0}, {"limit": 1001}, {"before": "x"}):
            with pytest.raises(ValueError, match=r"page|place"):
                referrals(connection, "anna", **wrong)
    assert len(f"{found.referees[0].claimed_at.isoformat()} {'x' * 128}") <= MAX_PLACE
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    try:
        assert query(account="anna") == msgspec.to_builtins(found)
        assert query(account="nobody") is None
        with pytest.raises(ValueError, match="limit"):
            query(account="anna", limit=0)
    finally:
        settings.cache_clear()
