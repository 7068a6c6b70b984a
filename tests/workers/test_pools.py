"""Limits of a pool's members on a real Postgres: what is at hand decides the same as if everything were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import msgspec
import pytest

from creditlane.contract import decode_message
from models.audit import audit
from models.catalog import parse_catalog
from models.columns import ALLOWANCE_COLUMNS
from models.rules.catalog import NOTICE_KINDS, Catalog
from models.rules.sharing import allowance_row
from models.rules.state import Account
from tasks.ledger import apply
from tasks.operation import Context, Outcome
from tasks.registry import OPERATIONS
from tasks.replay import Replayer
from tests.proof import freeze, job, named, tamper
from tests.support import Ledger, value
from workers.ledger_writer import Job, LedgerWriter, connect

START = datetime(2026, 11, 30, 22, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)

CATALOG = f"""
[catalog]
name = "pools"
version = %d
[features.export]
price = "0"
[pools]
%s
[notify]
kinds = {list(NOTICE_KINDS)}
"""
VARIANTS = ("", 'member_limit = 9\nperiod = "day"', 'members = "listed"\nmember_limit = 12')
CATALOGS = [parse_catalog(CATALOG % (version, text), "pools.toml") for version, text in enumerate(VARIANTS, 1)]
FREE, DAILY, LISTED = CATALOGS
REPLAYER = Replayer({catalog.label: catalog for catalog in CATALOGS})

MEMBERS = ("ann", "bob", "cy")
ALLOWANCES = f"SELECT {', '.join(ALLOWANCE_COLUMNS)} FROM allowances ORDER BY account, key"


@pytest.fixture
def pools(ledger: Ledger) -> Iterator[Ledger]:
    """A ledger of pools; in the end the rules give every one of its rows again."""
    freeze(ledger, START)
    price_by(ledger, FREE)
    yield ledger
    report = audit(ledger.writer.connection, replayer=REPLAYER)
    assert report.faults == []
    assert report.is_whole
    assert report.replayed == report.operations


def price_by(ledger: Ledger, catalog: Catalog) -> None:
    ledger.writer.catalog = lambda: catalog


def opened(name: str, credits: int = 1000) -> tuple[Job, Job]:
    return (
        job("credits.open", "open", account=name, kind="pool"),
        job("credits.grant", "grant", account=name, amount=credits, source="pack"),
    )


def allowances(ledger: Ledger) -> dict[tuple[str, str], tuple[Any, ...]]:
    return {(row[0], row[1]): row[1:] for row in ledger.writer.connection.execute(ALLOWANCES)}


def used(ledger: Ledger, account: str, member: str = "ann") -> int | None:
    """Whole credits that are counted of a member, None for nobody."""
    row = allowances(ledger).get((account, f"member:{member}"))
    return None if row is None else row[4] // 1_000_000


# Whatever is loaded.


class Life:
    """A pool as random operations make it, in memory, where all its members are at hand."""

    def __init__(self, name: str, random: Random) -> None:
        self.account = Account(name)
        self.random = random
        self.sent = 0
        self.holds: list[str] = []
        self.charges: list[str] = []

    def next(self) -> tuple[str, str, dict[str, Any]]:
        """Any operation that concerns members."""
        random = self.random
        self.sent += 1
        member = random.choice((*MEMBERS, None))
        amount = str(random.randint(1, 12))
        name = random.choice(("set", "remove", "consume", "consume", "hold", "hold", "capture", "release", "refund",
                              "refund", "settle"))  # fmt: skip
        identity = f"{name}-{self.sent}"
        content: dict[str, Any] = {}
        if name in ("consume", "hold"):
            content = {"amount": amount} if random.random() < 0.9 else {"feature": "export"}
            content |= {} if member is None else {"member": member}
            if name == "hold":
                content["ttl"] = random.choice((60, 3600, 90_000))
                self.holds.append(identity)
            else:
                content["partial"] = random.random() < 0.3
                self.charges.append(identity)
        elif name in ("capture", "release"):
            content = {"hold": random.choice(self.holds or ["none"])}
            if name == "capture":
                content |= {"amount": amount} if random.random() < 0.7 else {}
                self.charges.append(identity)
        elif name == "refund":
            content = {"operation": random.choice(self.charges or ["none"])}
            content |= {"amount": "1"} if random.random() < 0.6 else {}
        elif name == "set":
            limit = random.choice((None, "0", "5", "20"))
            content = {"member": member or "ann", "period": random.choice(("day", "week", "month", "total"))}
            content |= {} if limit is None else {"limit": limit}
            return "pools.set_member", identity, content
        elif name == "remove":
            return "pools.remove_member", identity, {"member": member or "ann"}
        return f"credits.{name}", identity, content

    def apply(self, name: str, identity: str, content: dict[str, Any], now: datetime, catalog: Catalog) -> Any:
        raw = msgspec.json.encode({"account": self.account.account, **content})
        return apply(self.account, name, identity, decode_message(name, raw), raw, now, catalog).result


def test_whatever_is_loaded_of_a_pool_decides_as_if_all_its_members_were(pools: Ledger) -> None:
    lives = [Life(f"pool-{seed}", Random(seed)) for seed in range(25)]
    random = Random(7)
    now, catalog, codes = START, FREE, set()
    pools.write(*(each for life in lives for each in opened(life.account.account)))
    for life in lives:
        life.apply("credits.open", "open", {"kind": "pool"}, now, catalog)
        life.apply("credits.grant", "grant", {"amount": 1000, "source": "pack"}, now, catalog)
    for _ in range(40):
        now += timedelta(seconds=random.choice((0, 30, 3600, 40_000)))
        if random.random() < 0.2:
            catalog = random.choice(CATALOGS)
        freeze(pools, now)
        price_by(pools, catalog)
        batch, expected = [], []
        for life in random.choices(lives, k=60):
            name, identity, content = life.next()
            batch.append(job(name, identity, account=life.account.account, **content))
            expected.append(msgspec.json.decode(life.apply(name, identity, content, now, catalog)))
        assert pools.write(*batch) == expected
        codes |= {answer.get("code") for answer in expected}
    made = {
        (life.account.account, key): allowance_row(allowance)
        for life in lives
        for key, allowance in life.account.allowances.items()
    }
    assert allowances(pools) == made
    assert {"member_limit", "unknown_member", "hold_closed", "exceeds_original"} <= codes
    kept = pools.writer.connection.execute("SELECT account, key FROM notices WHERE kind = 'member_limit'").fetchall()
    told = {(life.account.account, notice.key) for life in lives for notice in life.account.notices}
    assert set(kept) == {(account, key) for account, key in told if key.startswith("member_limit:")}


# Step by step.


def test_limits_from_batch_to_batch(pools: Ledger, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pools.write(*(each for name in ("plain", "edge", "time", "back", "bad", "race") for each in opened(name)))
    listed = {"member": "ann", "limit": 10}
    for name in ("edge", "time", "back", "bad"):
        pools.apply("pools.set_member", "list", account=name, **listed)

    # Where nothing limits anybody, nothing is kept.
    pools.write(*(job("credits.consume", f"c-{n}", account="plain", amount=1, member=f"m-{n}") for n in range(20)))
    assert [key for key in allowances(pools) if key[0] == "plain"] == []

    # Two batches around a period's end, and holds, charges of one in the other.
    freeze(pools, DECEMBER - timedelta(microseconds=1))
    last = pools.write(
        job("credits.consume", "c-1", account="edge", amount=10, member="ann"),
        job("credits.consume", "c-2", account="edge", amount=1, member="ann"),
        job("credits.hold", "h", account="time", amount=6, member="ann", ttl=3600),
        job("credits.consume", "c", account="back", amount=8, member="ann"),
    )
    assert [answer.get("code") for answer in last] == [None, "member_limit", None, None]
    freeze(pools, DECEMBER)
    first = pools.write(
        job("credits.consume", "c-3", account="edge", amount=10, member="ann"),
        job("credits.consume", "c-4", account="edge", amount=1, member="ann"),
        job("credits.consume", "c", account="time", amount=4, member="ann"),
        job("credits.consume", "c-2", account="back", amount=7, member="ann"),
    )
    assert [answer.get("code") for answer in first] == [None, "member_limit", None, None]

    # A refund across periods gives the pool its credits and the member nothing; one within gives it both.
    pools.apply("credits.refund", "r-1", account="back", operation="c")
    assert used(pools, "back") == 7
    pools.apply("credits.refund", "r-2", account="back", operation="c-2", amount=3)
    assert used(pools, "back") == 4

    # A time-out is settled by whoever comes next: of an earlier period it gives nothing back, of this one it does.
    pools.apply("credits.hold", "h-2", account="time", amount=5, member="ann", ttl=3600)
    assert used(pools, "time") == 9
    freeze(pools, DECEMBER + timedelta(hours=1))
    pools.apply("credits.consume", "bob", account="time", amount=1, member="bob")
    assert used(pools, "time") == 4
    assert value(database, "SELECT held_micro FROM accounts WHERE account = 'time'") == 0

    # An operation whose code raises counts nothing; its mates count once.
    consume = OPERATIONS["credits.consume"]

    def run(account: Account, message: Any, context: Context) -> Outcome:
        outcome = consume.run(account, message, context)
        if context.operation == "cursed":
            raise LookupError("no such thing")
        return outcome

    monkeypatch.setitem(OPERATIONS, "credits.consume", consume._replace(run=run))
    answers = pools.write(
        job("credits.consume", "b-1", account="bad", amount=6, member="ann"),
        job("credits.consume", "cursed", account="bad", amount=3, member="ann"),
        job("credits.consume", "b-2", account="bad", amount=4, member="ann"),
        job("credits.consume", "b-3", account="bad", amount=1, member="ann"),
    )
    assert [answer.get("status") for answer in answers] == ["applied", None, "applied", "rejected"]
    assert used(pools, "bad") == 10
    monkeypatch.undo()

    # Two writers at once, as if a lane had two owners: one of them gets the last credit.
    pools.apply("pools.set_member", "list", account="race", member="ann", limit=1)
    answers = many_producers(pools, database, 8, 25)
    assert [answer["status"] for answer in answers].count("applied") == 1
    assert {answer.get("code") for answer in answers} == {None, "member_limit"}
    assert used(pools, "race") == 1

    # What a limit was used of cannot be changed unseen.
    tamper(pools, "UPDATE allowances SET used_micro = 0 WHERE account = 'race'")
    report = audit(pools.writer.connection, replayer=REPLAYER)
    assert named(report) == {("race", "allowances", "allowance member:ann")}
    tamper(pools, "UPDATE allowances SET used_micro = 1000000 WHERE account = 'race'")


def many_producers(pools: Ledger, database: str, writers: int, each: int) -> list[dict[str, Any]]:
    """Take a credit for one member of one pool, from several connections at once."""
    together = threading.Barrier(writers)
    answers: list[dict[str, Any]] = []

    def produce(number: int) -> None:
        with connect(database) as connection:
            writer = LedgerWriter(connection, pools.writer.catalog, pools.writer.poison)
            together.wait()
            for place in range(each):
                one = job("credits.consume", f"last-{number}-{place}", account="race", amount=1, member="ann")
                writer.write([one])
                assert one.result is not None
                answers.append(msgspec.json.decode(one.result))

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == writers * each
    return answers
