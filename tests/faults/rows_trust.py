"""Rows 8, 10, 15: two processes on one lane, workers whose clocks are wrong, and hands in the tables."""

from __future__ import annotations

import re
import signal
import time
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import psycopg

from models.audit import audit
from tests.faults.acts import REDIS, Act, Done, Row, Size
from tests.faults.oracle import judge, read_ledger, read_policy, read_record
from tests.faults.rogue import FOREIGN
from tests.faults.rows_workers import BATCH_MESSAGES, producers
from tests.faults.skewed import READS
from tests.faults.stack import (
    CATALOG,
    PATIENCE_SECONDS,
    READY_SECONDS,
    RedisBroker,
    Scene,
    eventually,
    logged_lines,
)
from workers.ownership import LANE_CLASS

WRITERS = """
CREATE TABLE writers (account text, writer text, PRIMARY KEY (account, writer));
CREATE FUNCTION note_writer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO writers SELECT DISTINCT account, current_setting('application_name') FROM written
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER note_writer AFTER INSERT ON operations REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT EXECUTE FUNCTION note_writer();
"""
"""Notes which worker wrote operations of which account: shown to have been two, the fault has hit."""

HOUR = 3600.0

RESTRICTED = "23001"
"""The SQLSTATE of the triggers that keep rows as they were written."""


# --- Two on one lane ---------------------------------------------------------------------------------


def two_on_a_lane(fence: str, scene: Scene, size: Size) -> Done:
    """Row 8: a second process serves the same lanes: it holds locks of another class, and so owns them all as well."""
    scene.rows(WRITERS)
    producers(scene)
    worker = scene.worker("worker", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
    scene.owning(worker.name)
    rogue = scene.worker("rogue", ("tests.faults.rogue", fence), CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
    shared = eventually(lambda: doubly_owned(scene), READY_SECONDS, "the second process owns the lanes too")
    wanted = 10
    deadline = time.monotonic() + PATIENCE_SECONDS
    while written_by_two(scene) < wanted and time.monotonic() < deadline:
        # RabbitMQ gives a lane to one of them only: to the other when the one is cut off.
        if not isinstance(scene.broker, RedisBroker):
            scene.broker.cut()
        time.sleep(1)
    scene.finish()
    hits = written_by_two(scene)
    fenced = logged_lines([worker, rogue], "taken over by another process")
    wrong = [f"{process.name} did not survive" for process in (worker, rogue) if not process.running]
    what = (
        f"{shared} lanes served by two processes at once ({fence}), {hits} accounts written by both; fenced {fenced} ×"
    )
    return Done(hits, wanted, what, wrong)


def doubly_owned(scene: Scene) -> int:
    """How many lanes are held in both classes of locks."""
    return int(
        scene.value(
            "SELECT count(*) FROM pg_locks a JOIN pg_locks b USING (database, objid)"
            " WHERE a.classid = %s AND b.classid = %s AND a.granted AND b.granted",
            LANE_CLASS,
            FOREIGN,
        )
    )


def written_by_two(scene: Scene) -> int:
    """How many accounts were written by more than one worker."""
    query = "SELECT count(*) FROM (SELECT account FROM writers GROUP BY account HAVING count(*) > 1) shared"
    return int(scene.value(query))


def lock_lost(scene: Scene, size: Size) -> Done:
    """Row 8: a worker sleeps in the middle of its work, loses its lock behind its back, and wakes up."""
    scene.rows(WRITERS)
    producers(scene)
    sleeper = scene.worker("sleeper", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
    scene.owning(sleeper.name)
    other = scene.worker("other", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
    scene.owning(sleeper.name, other.name)
    hits = 0
    for _ in range(size.rounds):
        scene.under_load(50)
        lanes = scene.owners()[sleeper.name]
        # Caught with messages in hand: those that the other applies meanwhile.
        for _ in range(20):
            sleeper.signal(signal.SIGSTOP)
            time.sleep(scene.broker.counts_late)
            in_hand = scene.broker.depth(lanes).unacknowledged
            if in_hand:
                break
            sleeper.signal(signal.SIGCONT)
            time.sleep(0.05)
        for pid in scene.sessions(sleeper.name):
            scene.rows("SELECT pg_terminate_backend(%s)", pid)
        eventually(
            lambda: len(scene.owners().get(other.name, [])) == scene.lanes, READY_SECONDS, "the other owns every lane"
        )
        scene.under_load(50)
        hits += in_hand > 0
        sleeper.signal(signal.SIGCONT)
        scene.owning(sleeper.name, other.name)
    wrong = [f"{process.name} did not survive" for process in (sleeper, other) if not process.running]
    what = f"{hits} × lock taken from a stopped worker with messages in hand, its lanes served on, then woken"
    return Done(hits, size.rounds, what, wrong)


# --- Clocks ------------------------------------------------------------------------------------------


def wrong_clocks(scene: Scene, size: Size) -> Done:
    """Row 10: workers an hour ahead, an hour behind, and stepping back: only the database's clock counts."""
    clocks = {"ahead": (HOUR, 0.0), "behind": (-HOUR, 0.0), "stepping": (HOUR, HOUR / 4)}
    workers = [
        scene.worker(name, ("tests.faults.skewed", str(ahead), str(back))) for name, (ahead, back) in clocks.items()
    ]
    scene.owning(*clocks)
    producers(scene)
    scene.under_load()
    stepping = workers[-1]
    steps = 3 if size.rounds == 1 else 10
    eventually(lambda: logged_lines([stepping], READS) > steps, PATIENCE_SECONDS, "the clock steps back")
    scene.under_load()
    now = time.time()
    read = [float(found) for worker in workers for found in re.findall(READS + r"([0-9.]+)", worker.logged())]
    hits = sum(abs(reading - now) > HOUR / 8 for reading in read)
    told = [float(found) for found in re.findall(READS + r"([0-9.]+)", stepping.logged())]
    back = sum(later < earlier for earlier, later in pairwise(told))
    wrong = [f"{worker.name} did not survive" for worker in workers if not worker.running]
    what = f"workers an hour ahead, an hour behind, and {back} times stepping back a quarter: no row bears their time"
    return Done(min(hits, back), steps, what, wrong)


# --- Tampering ---------------------------------------------------------------------------------------


class Tampering(NamedTuple):
    """A change that nobody may make, and the row that the audit must name."""

    statement: str
    table: str
    key: str
    """What the key that the audit names begins with."""


TAMPERINGS = {
    "an amount": Tampering(
        "UPDATE entries SET amount_micro = amount_micro + 1 WHERE account = %(account)s AND seq = 2", "entries", "seq 2"
    ),
    "a balance": Tampering(
        "UPDATE entries SET balance_after_micro = 7 WHERE account = %(account)s AND seq = 2", "entries", "seq 2"
    ),
    "a time": Tampering(
        "UPDATE entries SET at = at - interval '1 day' WHERE account = %(account)s AND seq = 2", "entries", "seq 2"
    ),
    "whose": Tampering(
        "UPDATE entries SET operation = 'other' WHERE account = %(account)s AND seq = 2", "entries", "seq 2"
    ),
    "a kind": Tampering(
        "UPDATE entries SET kind = 'revoked' WHERE account = %(account)s AND seq = 2", "entries", "seq 2"
    ),
    "a deleted entry": Tampering("DELETE FROM entries WHERE account = %(account)s AND seq = 2", "entries", "seq 3"),
    "the last entry deleted": Tampering(
        "DELETE FROM entries e USING accounts a WHERE e.account = %(account)s AND a.account = e.account"
        " AND e.seq = a.seq",
        "accounts",
        "seq",
    ),
    "entries that change places": Tampering(
        "WITH gone AS (DELETE FROM entries WHERE account = %(account)s AND seq IN (2, 3) RETURNING *)"
        " INSERT INTO entries (account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at,"
        " refers_to, recorded_at, hash) SELECT account, 5 - seq + 10000, operation, kind, grant_id, amount_micro,"
        " balance_after_micro, at, refers_to, recorded_at, hash FROM gone; "
        "UPDATE entries SET seq = seq - 10000 WHERE seq > 10000",
        "entries",
        "seq 2",
    ),
    "a doubled entry": Tampering(
        "INSERT INTO entries (account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at,"
        " refers_to, recorded_at, hash) SELECT account, (SELECT max(seq) + 1 FROM entries WHERE account = %(account)s),"
        " operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to, recorded_at, hash FROM entries"
        " WHERE account = %(account)s AND seq = 2",
        "entries",
        "seq ",
    ),
    "all entries": Tampering("TRUNCATE entries", "accounts", "seq"),
    "a deleted operation": Tampering(
        "DELETE FROM operations WHERE account = %(account)s AND number = 2", "operations", ""
    ),
    "a charge": Tampering(
        "UPDATE operations SET charged_micro = charged_micro + 1 WHERE account = %(account)s AND number ="
        " (SELECT min(number) FROM operations"
        " WHERE account = %(account)s AND name = 'credits.consume' AND entries > 0)",
        "operations",
        "",
    ),
    "all operations": Tampering("TRUNCATE operations", "", ""),
    "a grant made larger": Tampering(
        "UPDATE grants SET granted_micro = granted_micro + 1000000, available_micro = available_micro + 1000000,"
        " is_open = true WHERE account = %(account)s AND grant_id = 1",
        "grants",
        "grant 1",
    ),
    "an account made richer": Tampering(
        "UPDATE accounts SET granted_micro = granted_micro + 1000000, available_micro = available_micro + 1000000"
        " WHERE account = %(account)s",
        "accounts",
        "totals",
    ),
}
"""What the audit must find, by name."""

BEYOND_THE_AUDIT = {
    "what was asked for": "UPDATE operations SET arguments = '{}' WHERE account = %(account)s AND number = 2",
    "what was answered": "UPDATE operations SET result = '{}' WHERE account = %(account)s AND number = 2",
}
"""What the audit does not look at, and a replay finds."""

REFUSED = (
    "UPDATE entries SET amount_micro = 1",
    "UPDATE operations SET result = '{}'",
    "DELETE FROM entries",
    "DELETE FROM operations",
    "TRUNCATE entries",
    "TRUNCATE operations",
    "TRUNCATE entries, operations",
)


def tampering(scene: Scene, size: Size) -> Done:
    """Row 15: rows that are written once are changed, by the workers' role and by one that can do everything."""
    scene.worker("worker")
    scene.owning("worker")
    scene.producer("producer", count=size.operations)
    scene.finish()
    for worker in scene.workers:
        worker.process.terminate()
        worker.wait(60)
    # An account with charges and with entries enough to change in the middle.
    account = scene.value(
        "SELECT account FROM operations WHERE name = 'credits.consume' AND entries > 0 AND account IN"
        " (SELECT account FROM accounts WHERE seq > 4) GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1"
    )
    wrong: list[str] = []
    hits = 0
    for statement in REFUSED:
        state = refusal_of(scene, statement)
        hits += state == RESTRICTED
        if state != RESTRICTED:
            wrong.append(f"{statement}: {'was not refused' if state is None else f'refused with {state}'}")
    for name, tamper in TAMPERINGS.items():
        audited, judged = tampered(scene, tamper.statement, account)
        hits += bool(audited)
        named = any(table == tamper.table and key.startswith(tamper.key) for table, key in audited)
        if not audited or (tamper.table and not named):
            wrong.append(f"{name}: the audit names {audited[:3]} instead of {tamper.table} {tamper.key}")
        if not judged:
            wrong.append(f"{name}: the oracle finds nothing")
    unseen = []
    for name, statement in BEYOND_THE_AUDIT.items():
        audited, judged = tampered(scene, statement, account)
        hits += judged
        if not audited:
            unseen.append(name)
        if not judged:
            wrong.append(f"{name}: the oracle finds nothing")
    what = f"{len(REFUSED)} changes refused by the triggers; {len(TAMPERINGS)} forced ones named by the audit"
    if unseen:
        what += f"; found by the oracle's replay alone: {' and '.join(unseen)} of an operation"
    return Done(hits, len(REFUSED) + len(TAMPERINGS) + len(BEYOND_THE_AUDIT), what, wrong)


def refusal_of(scene: Scene, statement: str) -> str | None:
    """The SQLSTATE with which the workers' role is refused; None when it is not."""
    with psycopg.connect(scene.database) as connection:
        try:
            connection.execute(statement)
        except psycopg.Error as error:
            return error.sqlstate
        finally:
            connection.rollback()
    return None


def tampered(scene: Scene, statement: str, account: str) -> tuple[list[tuple[str, str]], bool]:
    """Change a copy of the ledger past its triggers.

    :returns: the rows that the audit names, and whether the oracle finds anything.
    """
    copy = f"{scene.name}_tampered"
    url = scene.postgres.create_database(copy, template=scene.name)
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")
            for part in statement.split("; "):
                connection.execute(part, {"account": account})
            connection.execute("RESET session_replication_role")
            audited = [(fault.table, fault.key) for fault in audit(connection).faults]
        judged = judge(read_ledger(url), read_record(scene.files), read_policy(CATALOG), started=scene.started)
    finally:
        scene.postgres.drop_database(copy)
    return audited, not judged.holds


ROWS = (
    Row(8, "two processes made to serve one lane", (
        Act("another lock", partial(two_on_a_lane, "fenced")),
        Act("neither lock nor fence", partial(two_on_a_lane, "unfenced"), order=False, brokers=(REDIS,)),
        Act("lock lost while asleep", lock_lost),
    )),
    Row(10, "workers' clocks an hour off, and stepping back", (Act("clocks", wrong_clocks),)),
    Row(15, "tampering: refused as the workers' role, named by the audit as owner", (Act("tampering", tampering),)),
)  # fmt: skip
