"""What lanes promise, shown on real workers: once, in order, never overspent, nothing lost, nobody stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from datetime import timedelta

import pytest

from creditlane.client import CreditClient
from creditlane.contract import BATCH, Result
from creditlane.errors import QuarantinedError
from creditlane.lanes import lane_name, lane_of
from tests.broker import Broker, Message, RedisBroker, on_both_brokers
from tests.conftest import LANES, Spawn
from tests.support import Worker, eventually, execute, owned_lanes, rows, travel, value
from workers.crash import POINTS

pytestmark = on_both_brokers

SETTLED_SECONDS = 60


def done(database: str) -> int:
    """How many operations the ledger has answered."""
    return int(value(database, "SELECT count(*) FROM operations"))


def order(database: str) -> dict[str, list[str]]:
    """The operation ids of each account, in the order in which they were applied."""
    found: dict[str, list[str]] = {}
    for account, operation in rows(database, "SELECT account, operation FROM operations ORDER BY account, number"):
        found.setdefault(account, []).append(operation)
    return found


def send_mixed(client: CreditClient, accounts: int, rounds: int) -> dict[str, list[str]]:
    """Send operations of many names, single and batched, round by round; returns the ids in order per account."""
    sent: dict[str, list[str]] = {f"account-{number}": [] for number in range(accounts)}

    def note(account: str, identity: str) -> str:
        sent[account].append(identity)
        return identity

    for account in sent:
        client.open(account, id=note(account, "open"))
    for turn in range(rounds):
        for account in sent:
            client.grant(account, 1, source="pack", id=note(account, f"grant-{turn}"))
            client.consume(account, feature="context", id=note(account, f"consume-{turn}"))
            client.hold(account, amount="0.5", id=note(account, f"hold-{turn}"))
        with client.buffer() as buffer:
            for account in sent:
                buffer.release(account, f"hold-{turn}", id=note(account, f"release-{turn}"))
                buffer.adjust(account, "-0.25", actor="test", reason="order", id=note(account, f"adjust-{turn}"))
        for account in sent:
            client.refund(account, f"consume-{turn}", id=note(account, f"refund-{turn}"))
    return sent


def operations(message: Message) -> int:
    """How many operations a message carries."""
    _, kwargs, _ = json.loads(message.body)
    return len(kwargs["operations"]) if message.headers["task"] == BATCH else 1


def locks_by_worker(database: str) -> list[int]:
    """How many advisory locks each worker has."""
    found = rows(database, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2"
                           " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                           " GROUP BY pid")  # fmt: skip
    return [count for (count,) in found]


def test_an_accounts_order_is_kept_across_task_names_with_two_workers(
    spawn: Spawn, database: str, client: CreditClient
) -> None:
    workers = [spawn("first"), spawn("second")]
    # Each worker has a lock for itself, and half of the lanes.
    eventually(lambda: sorted(locks_by_worker(database)) == [LANES // 2 + 1, LANES // 2 + 1])
    sent = send_mixed(client, accounts=24, rounds=12)
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
    assert sorted(locks_by_worker(database)) == [LANES // 2 + 1, LANES // 2 + 1]
    assert all(worker.running for worker in workers)


def test_the_same_id_twice_applies_once_and_answers_alike(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    client.open("alice", id="open", wait=10)
    first = client.consume("alice", feature="image", quantity=12, id="order-1", wait=10)
    again = client.consume("alice", feature="image", quantity=12, id="order-1", wait=10)
    other = client.consume("alice", feature="image", quantity=13, id="order-1", wait=10)
    assert first is not None
    assert again is not None
    assert other is not None
    assert (first.replayed, again.replayed) == (False, True)
    assert (first.charged, first.balance) == (again.charged, again.balance)
    assert (other.status, other.code) == ("rejected", "id_conflict")
    assert value(database, "SELECT consumed_micro FROM accounts WHERE account = 'alice'") == 1_500_000


def test_a_thousand_concurrent_consumes_against_a_balance_for_one_give_one_success(
    spawn: Spawn, database: str, client: CreditClient
) -> None:
    spawn("first")
    spawn("second")
    eventually(lambda: owned_lanes(database) == LANES)
    client.open("pool", kind="pool", id="open", wait=10)
    client.grant("pool", 1, source="pack", id="grant", wait=10)
    start = threading.Barrier(10)

    def produce(producer: int) -> None:
        start.wait()
        for number in range(100):
            client.consume("pool", feature="context", id=f"{producer}-{number}")

    threads = [threading.Thread(target=produce, args=(producer,)) for producer in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: done(database) == 1002, SETTLED_SECONDS)
    answers = rows(database, "SELECT status, code, count(*) FROM operations WHERE name = 'credits.consume'"
                             " GROUP BY 1, 2 ORDER BY 1")  # fmt: skip
    assert answers == [("applied", None, 1), ("rejected", "insufficient_credits", 999)]


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_within_a_batch_loses_and_doubles_nothing(
    point: str, spawn: Spawn, database: str, client: CreditClient
) -> None:
    sent = send_mixed(client, accounts=12, rounds=8)
    doomed = spawn("doomed", CREDITLANE_CRASH_AT=f"{point}:2", CREDITLANE_BATCH_MESSAGES="40")
    eventually(lambda: not doomed.running, SETTLED_SECONDS, "the worker dies at its crash point")
    assert done(database) < total(sent)
    spawn("heir")
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
    assert value(database, "SELECT count(*) FROM quarantine") == 0


def test_another_worker_takes_the_lanes_over_within_ten_seconds_and_order_is_kept(
    spawn: Spawn, database: str, client: CreditClient
) -> None:
    doomed, heir = spawn("doomed"), spawn("heir")
    eventually(lambda: owned_lanes(database) == LANES)
    sent: dict[str, list[str]] = {f"account-{number}": ["open"] for number in range(16)}
    for account in sent:
        client.open(account, id="open")
    stop = threading.Event()

    def produce() -> None:
        number = 0
        while not stop.is_set():
            for account, identities in sent.items():
                identities.append(f"consume-{number}")
                client.consume(account, feature="regeneration", id=f"consume-{number}")
            number += 1

    producer = threading.Thread(target=produce)
    producer.start()
    eventually(lambda: done(database) > 200)
    doomed.kill()
    eventually(lambda: owned_lanes(database) == LANES, 10, "the heir owns every lane")
    before = done(database)
    eventually(lambda: done(database) > before + 100, 10, "and serves them")
    stop.set()
    producer.join()
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
    assert heir.running


def test_a_worker_that_hangs_loses_its_lanes_within_ten_seconds_and_writes_no_more(
    spawn: Spawn, database: str, client: CreditClient, broker: Broker
) -> None:
    hanging = spawn("hanging")
    eventually(lambda: owned_lanes(database) == LANES)
    sent = send_mixed(client, accounts=12, rounds=2)
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    (before,) = sessions(database)
    os.kill(hanging.process.pid, signal.SIGSTOP)
    for account, identities in sent.items():
        identities.append("meanwhile")
        client.consume(account, feature="export", id="meanwhile")
    heir = spawn("heir")
    eventually(lambda: before not in sessions(database) and owned_lanes(database) == LANES, 20, "the heir takes all")
    # RabbitMQ waits for two heartbeats of the one that hangs before it gives the lanes' messages to the next.
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    os.kill(hanging.process.pid, signal.SIGCONT)
    eventually(lambda: len(sessions(database)) == 2, what="the one that hung is back")
    for account, identities in sent.items():
        identities.append("after")
        client.consume(account, feature="export", id="after")
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
    assert heir.running


def sessions(database: str) -> set[int]:
    """The database sessions of lane workers."""
    found = rows(
        database,
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name LIKE 'creditlane lanes%%'",
    )
    return {pid for (pid,) in found}


def test_a_terminated_worker_applies_what_it_took_and_leaves_the_rest_in_order(
    spawn: Spawn, database: str, client: CreditClient, broker: Broker
) -> None:
    leaving = spawn("leaving", CREDITLANE_BATCH_MESSAGES="25")
    eventually(lambda: owned_lanes(database) == LANES)
    sent = send_mixed(client, accounts=12, rounds=10)
    eventually(lambda: done(database) > 50)
    assert leaving.stop() == 0
    # What is applied is acknowledged, and nothing else.
    waiting = [message for lane in range(LANES) for message in broker.messages(lane_name(lane))]
    assert done(database) + sum(operations(message) for message in waiting) == total(sent)
    if isinstance(broker, RedisBroker):
        assert sum(broker.unacknowledged(lane_of(account, LANES)) for account in sent) == 0
    broker.close()
    spawn("next")
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent


def test_expired_credits_are_not_spendable_though_no_sweep_ran(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    client.open("pool", kind="pool", id="open", wait=10)
    client.grant("pool", 5, source="promo", expires_in=3600, id="grant", wait=10)
    travel(database, timedelta(seconds=3601))
    refused = client.consume("pool", amount=1, id="late", wait=10)
    assert refused is not None
    assert (refused.status, refused.code) == ("rejected", "insufficient_credits")
    expiry = rows(database, "SELECT e.kind, e.operation, e.amount_micro, e.at = g.expires_at FROM entries e"
                            " JOIN grants g USING (account, grant_id) WHERE kind = 'expired'")  # fmt: skip
    assert expiry == [("expired", None, 5_000_000, True)]


def test_poison_in_the_middle_of_five_hundred_messages_stops_nobody(
    spawn: Spawn, database: str, client: CreditClient, broker: Broker
) -> None:
    client.open("alice", id="open")
    lane = lane_of("alice", LANES)
    for number in range(500):
        if number == 250:
            broker.push(lane, b'{"body": "no task at all"')
        else:
            client.consume("alice", feature="export", id=f"consume-{number}")
    spawn("worker")
    eventually(lambda: done(database) == 500, SETTLED_SECONDS)
    assert rows(database, "SELECT code, body FROM quarantine") == [("malformed", b'{"body": "no task at all"')]


def test_a_bad_member_of_a_batch_of_five_hundred_fails_alone(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    client.open("alice", id="open", wait=10)
    members = [
        ("credits.consume", f"consume-{number}", {"account": "alice", "feature": "export"}) for number in range(500)
    ]
    good = client.batch(members[:249] + members[250:], id="all good", wait=20)
    assert [answer.status for answer in good] == ["applied"] * 499
    # The client refuses to send a bad member; a producer of another make does not.
    names = ["credits.consume", "nothing.known"]
    answers = raw_batch(client, [[names[number == 250], f"raw-{number}", {"account": "alice", "feature": "export"}]
                                 for number in range(500)])  # fmt: skip
    assert [answer.status for answer in answers].count("applied") == 499
    assert (answers[250].status, answers[250].code) == ("quarantined", "unknown_operation")
    assert rows(database, "SELECT code, operation FROM quarantine") == [("unknown_operation", "raw-250")]


def raw_batch(client: CreditClient, members: list[list[object]]) -> list[Result]:
    """Send a batch without the client's checks and wait for its answers."""
    import msgspec

    encoded = msgspec.json.encode({"v": 1, "operations": members})
    answers = client._ask("credits.batch", "raw-batch", lane_of("alice", LANES), encoded, "raw", 20)
    return msgspec.convert(answers, list[Result])


def test_a_row_that_the_database_refuses_is_quarantined_alone(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    execute(database, "ALTER TABLE operations ADD CONSTRAINT cursed CHECK (operation <> 'cursed')")
    with client.buffer() as buffer:
        buffer.open("alice", id="open")
        for number in range(100):
            buffer.consume("alice", feature="context", id="cursed" if number == 40 else f"consume-{number}")
    eventually(lambda: done(database) == 100 and value(database, "SELECT count(*) FROM quarantine"))
    assert rows(database, "SELECT code, operation, account FROM quarantine") == [("out_of_range", "cursed", "alice")]
    assert order(database)["alice"] == ["open", *(f"consume-{number}" for number in range(100) if number != 40)]


def test_a_fault_of_the_infrastructure_is_no_refusal_and_no_quarantine(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    execute(database, "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS"
                      " $$ BEGIN RAISE 'no space left' USING ERRCODE = 'disk_full'; END $$")  # fmt: skip
    execute(database, "CREATE TRIGGER no_space BEFORE INSERT ON operations FOR EACH ROW EXECUTE FUNCTION no_space()")
    for number in range(20):
        client.open(f"account-{number}", id="open")
    eventually(lambda: "53100" in lane_worker.logged(), what="the log names the SQLSTATE")
    assert done(database) == 0
    execute(database, "DROP TRIGGER no_space ON operations")
    eventually(lambda: done(database) == 20)
    assert value(database, "SELECT count(*) FROM quarantine") == 0


def test_a_lost_database_connection_loses_and_doubles_nothing(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    sent = send_mixed(client, accounts=12, rounds=4)
    for _ in range(3):
        rows(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'creditlane lanes%%'",
        )
        for account, identities in sent.items():
            identities.append(f"after-{len(identities)}")
            client.consume(account, feature="export", id=identities[-1])
        moves_on(database, sent)
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent


def test_lost_broker_connections_lose_and_double_nothing(
    spawn: Spawn, database: str, client: CreditClient, broker: Broker
) -> None:
    workers = [spawn("first"), spawn("second")]
    eventually(lambda: owned_lanes(database) == LANES)
    sent = send_mixed(client, accounts=12, rounds=4)
    for turn in range(4):
        broker.cut()
        for account, identities in sent.items():
            identities.append(f"after-{turn}")
            client.consume(account, feature="export", id=identities[-1])
        moves_on(database, sent)
        eventually(lambda: owned_lanes(database) == LANES, 10)
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
    assert all(worker.running for worker in workers)
    # Nobody begins anew with the lanes of its former life: they may be another's by now.
    assert not any("taken over by another process" in worker.logged() for worker in workers)


def moves_on(database: str, sent: dict[str, list[str]]) -> None:
    """Wait until more is applied than now, or everything."""
    before = done(database)
    eventually(lambda: done(database) > before or done(database) == total(sent))


def total(sent: dict[str, list[str]]) -> int:
    """How many operations were sent."""
    return sum(map(len, sent.values()))


def test_a_waiting_sender_is_told_that_its_message_is_in_quarantine(
    lane_worker: Worker, database: str, client: CreditClient
) -> None:
    with pytest.raises(QuarantinedError, match="invalid_message"):
        client._ask("credits.consume", "bad", lane_of("alice", LANES), b'{"account":"alice","amount":1.5}', "", 10)
    assert rows(database, "SELECT code, operation, status FROM quarantine") == [("invalid_message", "bad", "open")]


def test_lanes_are_shared_evenly_and_taken_back_from_one_that_leaves(
    spawn: Spawn, database: str, client: CreditClient
) -> None:
    first = spawn("first")
    eventually(lambda: owned_lanes(database) == LANES)
    second = spawn("second")

    def shares() -> list[int]:
        counts = rows(database, "SELECT count(*) FROM pg_locks l WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'"
                                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                                " GROUP BY pid")  # fmt: skip
        return sorted(count for (count,) in counts)

    eventually(lambda: shares() == [LANES // 2, LANES // 2], 10)
    assert second.stop() == 0
    eventually(lambda: shares() == [LANES], 10)
    answer = client.open("alice", id="open", wait=10)
    assert answer is not None
    assert answer.applied
    assert first.running


def test_workers_killed_five_times_under_load_lose_double_and_invert_nothing(
    spawn: Spawn, database: str, client: CreditClient
) -> None:
    small = {"CREDITLANE_BATCH_MESSAGES": "20"}  # most of what a worker has is only prefetched
    workers = [spawn("worker-0", **small), spawn("worker-1", **small)]
    eventually(lambda: owned_lanes(database) == LANES)
    sent: dict[str, list[str]] = {f"account-{number}": ["open"] for number in range(16)}
    for account in sent:
        client.open(account, id="open")
    stop = threading.Event()

    def produce() -> None:
        for number in range(100_000):
            if stop.is_set():
                return
            for account, identities in sent.items():
                identities.append(f"consume-{number}")
                client.consume(account, feature="regeneration", id=f"consume-{number}")

    producer = threading.Thread(target=produce)
    producer.start()
    for kill in range(5):
        before = done(database)
        eventually(lambda before=before: done(database) > before + 50, SETTLED_SECONDS)  # type: ignore[misc]
        workers.pop(0).kill()
        workers.append(spawn(f"worker-{kill + 2}", **small))
    stop.set()
    producer.join()
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
    assert value(database, "SELECT count(*) FROM quarantine") == 0


def test_a_worker_told_twice_to_end_loses_and_doubles_nothing(
    spawn: Spawn, database: str, client: CreditClient
) -> None:
    leaving = spawn("leaving", CREDITLANE_BATCH_MESSAGES="25")
    eventually(lambda: owned_lanes(database) == LANES)
    sent = send_mixed(client, accounts=12, rounds=6)
    eventually(lambda: done(database) > 50)
    leaving.process.send_signal(signal.SIGTERM)
    leaving.process.send_signal(signal.SIGTERM)
    leaving.stop()
    spawn("next")
    eventually(lambda: done(database) == total(sent), SETTLED_SECONDS)
    assert order(database) == sent
