"""Who owns which lane, on real Postgres sessions: evenly shared, never twice, free when a session ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import psycopg
import pytest
from psycopg import Connection

from scripts.embedded import Stack
from tests.conftest import TEMPLATE
from tests.support import eventually, owned_lanes, rows
from workers.ownership import LANE_CLASS, PRESENCE_CLASS, Ownership, check_session

LANES = 64
ROUNDS = 3
"""How many looks at the locks settle any change, whoever looks first."""

Join = Callable[[], Ownership]


@pytest.fixture
def join(database: str) -> Iterator[Join]:
    """Make one more owner, on a connection of its own."""
    connections: list[Connection[Any]] = []

    def make() -> Ownership:
        connections.append(psycopg.connect(database, autocommit=True))
        return Ownership(connections[-1], LANES)

    yield make
    for connection in connections:
        connection.close()


def settle(owners: list[Ownership]) -> None:
    """Let each owner balance a few times, giving up at once what is too much."""
    for owner in owners * ROUNDS:
        found = owner.balance()
        assert not (found.taken and found.excess)
        if found.excess:
            owner.give(found.excess)


def check(database: str, owners: list[Ownership]) -> None:
    """Every lane has one owner, the one that thinks so, and nobody has more than its share."""
    held = rows(
        database,
        "SELECT objid::bigint, pid FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1",
        LANE_CLASS,
    )
    assert [lane for lane, _ in held] == list(range(LANES))
    by_pid = {owner.connection.info.backend_pid: owner.mine for owner in owners}
    assert all(lane in by_pid[pid] for lane, pid in held)
    assert sum(map(len, by_pid.values())) == LANES
    share = -(-LANES // len(owners))
    assert max(len(owner.mine) for owner in owners) == share
    assert min(len(owner.mine) for owner in owners) >= LANES - share * (len(owners) - 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_lanes_are_shared_evenly_among_those_that_begin_together(count: int, join: Join, database: str) -> None:
    owners = [join() for _ in range(count)]
    settle(owners)
    check(database, owners)
    for owner in owners:
        found = owner.balance()
        assert (found.workers, found.taken, found.excess) == (count, [], [])


def test_lanes_are_shared_evenly_whenever_one_joins_or_leaves(join: Join, database: str) -> None:
    owners: list[Ownership] = []
    for _ in range(5):
        owners.append(join())
        settle(owners)
        check(database, owners)
    while len(owners) > 1:
        pid = owners[0].connection.info.backend_pid
        owners.pop(0).connection.close()
        eventually(lambda pid=pid: not rows(database, "SELECT FROM pg_stat_activity WHERE pid = %s", pid))  # type: ignore[misc]
        settle(owners)
        check(database, owners)


def test_one_owner_gives_only_what_is_above_its_share_and_keeps_it_until_it_gives(join: Join, database: str) -> None:
    first = join()
    assert len(first.balance().taken) == LANES
    second = join()
    assert second.balance().taken == []
    excess = first.balance().excess
    assert len(excess) == LANES // 2
    assert set(excess) <= first.mine
    # As long as they are not given up nobody else can have them.
    assert second.balance().taken == []
    assert (len(first.mine), owned_lanes(database)) == (LANES, LANES)
    first.give(excess[:5])
    assert sorted(second.balance().taken) == sorted(excess[:5])
    assert sorted(first.balance().excess) == sorted(excess[5:])
    assert first.mine.isdisjoint(second.mine)


def test_a_closed_connection_frees_its_lanes(join: Join, database: str) -> None:
    first, second = join(), join()
    settle([first, second])
    first.connection.close()
    eventually(lambda: owned_lanes(database) == LANES // 2)
    assert len(second.balance().taken) == LANES // 2
    check(database, [second])


def test_a_session_that_the_server_ended_frees_its_lanes_and_its_owner_is_told(join: Join, database: str) -> None:
    first, second = join(), join()
    settle([first, second])
    rows(database, "SELECT pg_terminate_backend(%s)", first.connection.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        first.balance()
    eventually(lambda: owned_lanes(database) == LANES // 2)
    settle([second])
    check(database, [second])


def test_a_rolled_back_batch_keeps_its_lanes(join: Join, database: str) -> None:
    owner = join()
    owner.balance()
    with pytest.raises(psycopg.errors.DivisionByZero), owner.connection.transaction():
        owner.connection.execute("SELECT 1 / 0")
    assert owned_lanes(database) == LANES
    check(database, [owner])


def test_owners_that_look_at_the_same_time_never_have_one_lane_twice(join: Join, database: str) -> None:
    owners = [join() for _ in range(5)]
    start = threading.Barrier(len(owners))
    guard = threading.Lock()
    owner_of: dict[int, Ownership] = {}
    doubled: list[int] = []

    def live(owner: Ownership) -> None:
        for number in itertools.count():
            start.wait(30)
            found = owner.balance()
            with guard:
                doubled.extend(lane for lane in found.taken if lane in owner_of)
                owner_of.update(dict.fromkeys(found.taken, owner))
            if number == 15:
                return
            given = found.excess or sorted(owner.mine)[:3]
            with guard:
                for lane in given:
                    del owner_of[lane]
            owner.give(given)

    threads = [threading.Thread(target=live, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert doubled == []
    settle(owners)
    check(database, owners)


def test_another_database_on_the_server_has_lanes_of_its_own(join: Join, database: str, stack: Stack) -> None:
    owner = join()
    owner.balance()
    other = stack.create_database("other_lanes", template=TEMPLATE)
    with psycopg.connect(other, autocommit=True) as connection:
        elsewhere = Ownership(connection, LANES)
        found = elsewhere.balance()
        assert (found.workers, len(found.taken)) == (1, LANES)
        found = owner.balance()
        assert (found.workers, found.excess) == (1, [])
    stack.postgres.drop_database("other_lanes")


def test_other_advisory_locks_are_neither_lanes_nor_workers(join: Join, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s, 3)", (LANE_CLASS + 2,))
        connection.execute("SELECT pg_advisory_lock((%s::bigint << 32) + 5)", (LANE_CLASS,))
        connection.execute("SELECT pg_advisory_lock(%s::bigint << 32)", (PRESENCE_CLASS,))
        found = join().balance()
        assert (found.workers, len(found.taken)) == (1, LANES)


class Pooler:
    """Connections of which each statement gets another one, as behind a pooler that shares sessions."""

    def __init__(self, *connections: Connection[Any]) -> None:
        self.turns = itertools.cycle(connections)

    def execute(self, query: str) -> Any:
        return next(self.turns).execute(query)


def test_a_pooler_that_shares_sessions_is_noticed(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as one, psycopg.connect(database, autocommit=True) as other:
        check_session(one)
        check_session(cast(Connection[Any], Pooler(one)))
        with pytest.raises(RuntimeError, match="session pooling"):
            check_session(cast(Connection[Any], Pooler(one, other)))
        with pytest.raises(RuntimeError, match="session pooling"):
            check_session(cast(Connection[Any], Pooler(one, one, other)))
