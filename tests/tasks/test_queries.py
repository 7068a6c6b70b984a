"""The read-only tasks, in this process and through a real worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest

from creditlane.client import CreditClient
from creditlane.codes import Code
from creditlane.contract import Balance
from creditlane.errors import BrokerUnavailableError, CreditlaneError
from creditlane.reports import Planned
from models import database as pools
from models.settings import settings
from tasks.queries import achievements, ahead, balance, explain, history, pool, ranking, refunds, simulate, usage
from tests.broker import Broker, on_both_brokers
from tests.conftest import Spawn
from tests.support import Ledger, eventually, execute, rows


@pytest.fixture
def configured(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process as a worker of the test's database."""
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", database)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", broker_url)
    settings.cache_clear()
    pools.close_pool()
    yield database
    pools.close_pool()
    settings.cache_clear()


def test_the_balance_is_that_of_the_last_answer(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    answer = ledger.apply("credits.hold", "h-1", account="alice", amount="0.5")
    assert balance("alice") == answer["balance"] == {
        "available": "49.5", "held": "0.5", "by_source": {"signup": "49.5"},
    }  # fmt: skip


def test_an_account_that_was_never_opened_has_none(configured: str, ledger: Ledger) -> None:
    assert balance("nobody") is None
    ledger.apply("credits.consume", "c-1", account="mentioned", amount="1")
    assert balance("mentioned") is None


@pytest.mark.parametrize("account", ["", "x" * 129, "a\x00b", 7, None])
def test_what_is_no_account_is_refused(account: object, configured: str) -> None:
    with pytest.raises(ValueError, match="account"):
        balance(account)


def test_a_newer_query_is_not_guessed_at(configured: str) -> None:
    with pytest.raises(ValueError, match="contract version 2"):
        balance("alice", v=2)


ASKED = {
    "history": history, "usage": usage, "pool": pool, "forecast": ahead, "explain": explain, "simulate": simulate,
    "leaderboard": ranking, "refunds": refunds, "achievements": achievements,
}  # fmt: skip
ONE = [{"name": "credits.settle"}]


NONSENSE: list[tuple[str, dict[str, object], str]] = [
    ("history", {}, "account"),
    ("history", {"account": "a\x00b"}, "account"),
    ("history", {"account": "a", "limit": 1001}, "limit"),
    ("history", {"account": "a", "limit": 2.5}, "limit"),
    ("history", {"account": "a", "before": 2**63}, "before"),
    ("history", {"account": "a", "since": "2027-01-01T00:00:00"}, "since"),
    ("history", {"account": "a", "status": "open"}, "status"),
    ("history", {"account": "a", "member": "x" * 129}, "member"),
    ("history", {"account": "a", "nonsense": 1}, "nonsense"),
    ("usage", {"account": ""}, "account"),
    ("usage", {"account": "a", "by": "hour"}, "by"),
    ("usage", {"account": "a", "since": "2027-02-30"}, "since"),
    ("usage", {"account": "a", "since": "2027-02-01T00:00:00Z"}, "since"),
    ("usage", {"account": "a", "since": "2027-02-01", "until": "2027-02-01"}, "not before"),
    ("usage", {"account": "a", "since": "0001-01-01", "until": "0001-01-02"}, "calendar"),
    ("usage", {"account": "a", "limit": 0}, "limit"),
    ("usage", {"account": "a", "after": "a\ud800"}, "after"),
    ("usage", {"account": "a", "feature": "a\x00"}, "feature"),
    ("pool", {"limit": 5}, "account"),
    ("pool", {"account": "a", "limit": 0}, "limit"),
    ("pool", {"account": "a", "since": "2027-02-30"}, "since"),
    ("pool", {"account": "a", "after": ""}, "after"),
    ("forecast", {"account": "a", "days": 367}, "days"),
    ("forecast", {"account": "a", "days": True}, "days"),
    ("forecast", {"account": "a", "pace": 1.5}, "pace"),
    ("forecast", {"account": "a", "pace": "-1"}, "pace"),
    ("forecast", {"account": "a", "pace": "1e9"}, "amount"),
    ("explain", {"account": "a", "operation": "o", "grant": 1}, "one of the two"),
    ("explain", {"account": "a", "grant": 2**31}, "grant"),
    ("explain", {"account": "a", "grant": 1, "after": -1}, "after"),
    ("explain", {"account": "a", "operation": "\n"}, "operation"),
    ("simulate", {"account": "a", "operations": []}, "operations"),
    ("simulate", {"account": "a", "operations": ONE * 1001}, "operations"),
    ("simulate", {"account": "a", "operations": [{"name": "credits.settle", "times": 1001}]}, "times"),
    ("simulate", {"account": "a", "operations": [{**ONE[0], "times": 600}] * 2}, "1 to 1000"),
    ("simulate", {"account": "a", "operations": [{**ONE[0], "times": 2, "id": "x"}]}, "applied once"),
    ("simulate", {"account": "a", "operations": [{"name": "credits.receive"}]}, "operation 1: 'credits.receive' is no"),
    ("simulate", {"account": "a", "operations": [*ONE, {"name": "credits.consume"}]}, "operation 2: .*feature"),
    ("simulate", {"account": "a", "operations": [{**ONE[0], "arguments": {"account": "b"}}]}, "all are of one"),
    ("simulate", {"account": "a", "operations": [{**ONE[0], "id": "transfer.receive:1"}]}, "operation 1: .*derived"),
    ("simulate", {"account": "a", "operations": ONE, "at": "2027-01-01T00:00:00"}, "at"),
    ("leaderboard", {"by": "owed"}, "by"),
    ("leaderboard", {"since": "2027-02-01", "until": "2027-02-01"}, "not before"),
    ("leaderboard", {"limit": 1001}, "limit"),
    ("refunds", {"by": []}, "at least one"),
    ("refunds", {"by": ["day"]}, "by"),
    ("refunds", {"after": 10**6 + 1}, "after"),
    ("achievements", {"account": ""}, "account"),
]


def test_what_makes_no_sense_is_refused_by_name(configured: str) -> None:
    for query, arguments, named in NONSENSE:
        with pytest.raises(ValueError, match=named):
            ASKED[query](**arguments)


def test_what_is_not_there_is_none_and_a_newer_version_is_not_guessed_at(configured: str) -> None:
    for name, query in ASKED.items():
        more = {"operations": ONE} if name == "simulate" else {}
        found = query(account="nobody", **more)
        if name == "leaderboard":
            assert (found["accounts"], found["lines"], found["own"]) == (0, [], None)
        else:
            assert found == ({"lines": [], "next_before": None} if name == "history" else None), name
        for version in (2, "1", None):
            with pytest.raises(ValueError, match="contract version"):
                query(account="nobody", v=version)


def test_its_sessions_cannot_write(configured: str) -> None:
    with pools.reader() as connection, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        connection.execute("TRUNCATE quarantine")


def test_a_session_that_the_server_ended_is_replaced(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    assert balance("alice") is not None
    ended = rows(
        configured,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'creditlane queries'",
    )
    assert ended == [(True,)]
    assert balance("alice") is not None


def test_a_closed_pool_opens_again(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    before = pools.reading_pool()
    pools.close_pool()
    assert before.closed
    assert balance("alice") is not None
    assert pools.reading_pool() is not before


def test_a_forked_child_has_a_pool_of_its_own(configured: str, ledger: Ledger) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    assert balance("alice") is not None
    with pools.reader() as connection:
        ours = connection.info.backend_pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with pools.reader() as connection:
                theirs = connection.info.backend_pid
            os.write(write, b"%d %d" % (theirs, balance("alice") is not None))
        finally:
            os._exit(0)
    os.close(write)
    told = os.read(read, 100).split()
    os.close(read)
    os.waitpid(child, 0)
    assert told[1:] == [b"1"]
    assert int(told[0]) != ours
    with pools.reader() as connection:
        assert connection.info.backend_pid == ours, "the child left our session alone"
        assert connection.execute("SELECT 1").fetchone() == (1,)


def ask_all(client: CreditClient, ledger: Ledger) -> None:
    """Everything else that may be asked of alice, who has used 12 pictures, and of nobody."""
    ledger.apply("credits.consume", "c-1", account="alice", feature="image", quantity=12, member="mia")
    page = client.history("alice", limit=2, entries=True, member="mia", source="signup")
    assert [(line.operation, line.charged) for line in page.lines] == [("c-1", "1.5")]
    assert page.lines[0].lines is not None
    used = client.usage("alice", since=datetime.now(UTC).date() - timedelta(days=7))
    assert used is not None
    assert [(line.key, str(line.quantity), str(line.credits)) for line in used.lines] == [("image", "12", "1.5")]
    assert used.utilisation is not None
    everyone = client.usage(None, by="day", feature="image", after="2020-01-01")
    assert everyone is not None
    assert str(everyone.total.used) == "1.5"
    ahead = client.forecast("alice", days=10, pace="6")
    assert ahead is not None
    assert str(ahead.available) == "48.500001"
    assert ahead.runs_out_at is not None
    explained = client.explain("alice")
    assert explained is not None
    assert [lot.source for lot in explained.lots] == ["signup", "pack"]
    charge = client.explain_operation("alice", "c-1")
    assert charge is not None
    assert [(each.grant, str(each.amount)) for each in charge.movements] == [(1, "1.5")]
    grant = client.explain_grant("alice", 1, limit=1)
    assert grant is not None
    assert grant.next_after == 1
    rest = client.explain_grant("alice", 1, after=grant.next_after)
    assert rest is not None
    assert [each.operation for each in rest.movements] == ["c-1"]
    ask_reports(client, ledger)
    studio = client.pool("studio", limit=1)
    assert studio is not None
    assert [(each.member, str(each.left)) for each in studio.members] == [("mia", "2.5")]
    assert client.pool("alice") is None
    assert client.history("nobody").lines == []
    assert (client.usage("nobody"), client.forecast("nobody"), client.explain("nobody")) == (None, None, None)
    referred = client.referrals("alice")
    assert referred is not None
    assert (referred.code, referred.referees, client.referrals("nobody")) == (None, [], None)
    assert client.explain_operation("alice", "none") is None
    assert client.explain_grant("alice", 9) is None
    with pytest.raises(CreditlaneError, match="1000"):
        client.history("alice", limit=1001)


def ask_reports(client: CreditClient, ledger: Ledger) -> None:
    """What ten more pictures would do; who is ahead; what is given back."""
    planned = client.simulate("alice", [Planned("credits.hold", {"amount": "40"}, "h")], feature="image", times=10)
    assert planned is not None
    assert [result.status for result in planned.results] == ["applied"] * 11
    assert (str(planned.charged), str(planned.after.available)) == ("1.25", "7.250001")
    dear = client.simulate("alice", amount=50)
    assert dear is not None
    (refused,) = dear.results
    assert (refused.code, refused.offer is not None, dear.refused) == (Code.INSUFFICIENT_CREDITS, True, 1)
    assert client.simulate("nobody", feature="image") is None
    board = client.leaderboard(account="alice", limit=1)
    assert board.own is not None
    assert board.lines == [board.own]
    assert (board.own.rank, str(board.own.credits), board.accounts) == (1, "1.5", 1)
    assert client.leaderboard(by="earned", since=date(2027, 1, 1), until=date(2027, 2, 1)).lines == []
    ledger.apply("credits.refund", "r-1", account="alice", operation="c-1", amount="0.5", reason="blurred")
    back = client.refunds("alice", by=["reason"])
    assert back is not None
    assert [(line.reason, str(line.credits), line.share_percent) for line in back.lines] == [("blurred", "0.5", 33.3)]
    assert client.refunds("nobody") is None
    reached = client.achievements("alice")
    assert reached is not None
    assert (reached.reached, reached.goals, client.achievements("nobody")) == ([], [], None)


@on_both_brokers
def test_through_a_real_worker(
    spawn: Spawn, database: str, client: CreditClient, broker: Broker, ledger: Ledger
) -> None:
    ledger.apply("credits.open", "o-1", account="alice")
    ledger.apply("credits.grant", "g-1", account="alice", amount="0.000001", source="pack")
    ledger.apply("credits.open", "o-1", account="studio", kind="pool")
    ledger.apply("pools.set_member", "m-1", account="studio", member="mia", limit="2.5")
    spawn("general", kind="general")
    eventually(lambda: broker.has_queue("queries"))

    def ask() -> Balance | None:
        try:
            return client.balance("alice", wait=60)
        except BrokerUnavailableError:
            return None  # the worker has declared its queue and not bound it yet

    found = eventually(ask)
    assert found is not None
    assert str(found.available) == "50.000001"
    assert {source: str(amount) for source, amount in found.by_source.items()} == {"signup": "50", "pack": "0.000001"}
    assert client.balance("nobody") is None
    ask_all(client, ledger)
    execute(
        database,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'creditlane queries'"
        " AND datname = current_database()",
    )
    assert client.balance("alice", wait=60) is not None
