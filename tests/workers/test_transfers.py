"""Transfers on real workers: whatever dies in between, every credit arrives or comes back, once."""

from __future__ import annotations

import random
from datetime import timedelta
from socket import gethostname

import pytest
from celery import Celery
from kombu import Queue

from creditlane.client import CreditClient
from creditlane.contract import concluding_id, receiving_id
from tests.broker import on_both_brokers
from tests.conftest import LANES, Spawn
from tests.support import Worker, eventually, owned_lanes, rows, travel, value

pytestmark = on_both_brokers

ACCOUNTS = 12
TRANSFERS = 150
EACH = 100
SETTLED_SECONDS = 60

MOVED = """
SELECT coalesce(sum(sent_micro), 0)::bigint, coalesce(sum(received_micro), 0)::bigint,
       coalesce(sum(in_transit_micro), 0)::bigint, sum(available_micro)::bigint
FROM accounts
"""


def send_transfers(client: CreditClient, seed: int) -> int:
    """Open accounts with credits and send transfers among them, some to nobody; returns how many go to somebody."""
    chance = random.Random(seed)
    for number in range(ACCOUNTS):
        client.open(f"account-{number}", kind="pool", id="open")
        client.grant(f"account-{number}", EACH, source="pack", id="grant")
    arriving = 0
    for number in range(TRANSFERS):
        sender = chance.randrange(ACCOUNTS)
        recipient = chance.choice([other for other in range(ACCOUNTS + 2) if other != sender])
        arriving += recipient < ACCOUNTS
        client.transfer(f"account-{sender}", f"account-{recipient}", "0.5", id=f"transfer-{number}")
    return arriving


def sweep(database: str, broker_url: str, spawn: Spawn) -> None:
    """Have what was left in the outbox published, as beat would in ten seconds."""
    travel(database, timedelta(seconds=11))
    spawn("general", "general")
    with Celery("tick", broker=broker_url, set_as_current=False) as app:
        eventually(lambda: app.control.ping([f"general@{gethostname()}"], timeout=0.5), what="it listens")
        app.send_task(
            "schedules.outbox", queue=Queue("maintenance", no_declare=True), exchange="", routing_key="maintenance"
        )


def test_what_follows_from_a_transfer_cannot_be_revoked(
    lane_worker: Worker, database: str, client: CreditClient, broker_url: str
) -> None:
    for account in ("anna", "bert"):
        client.open(account, kind="pool", id="open", wait=10)
    client.grant("anna", 5, source="pack", id="grant", wait=10)
    with Celery("tick", broker=broker_url, set_as_current=False) as app:
        ids = [receiving_id("anna", "gift"), concluding_id("anna", "gift"), "dropped"]
        answers = eventually(lambda: app.control.revoke(ids, reply=True, timeout=1), what="the worker knows")
        assert all("ok" in answer for told in answers for answer in told.values())
    client.consume("anna", amount=1, id="dropped")
    client.transfer("anna", "bert", 2, id="gift", wait=10)
    eventually(lambda: rows(database, MOVED) == [(2_000_000, 2_000_000, 0, 5_000_000)], what="it arrives")


@pytest.mark.parametrize("crash", ["after-commit", "before-publish", "after-publish"])
def test_a_worker_killed_on_the_way_of_transfers_loses_and_doubles_no_credit(
    crash: str, spawn: Spawn, database: str, client: CreditClient, broker_url: str
) -> None:
    arriving = send_transfers(client, seed=7)
    doomed = spawn("doomed", CREDITLANE_CRASH_AT=f"{crash}:4", CREDITLANE_BATCH_MESSAGES="25")
    eventually(lambda: not doomed.running, SETTLED_SECONDS, "the worker dies at its crash point")
    spawn("first")
    spawn("second")
    eventually(lambda: owned_lanes(database) == LANES)
    eventually(lambda: value(database, "SELECT count(*) FROM operations WHERE name = 'credits.transfer'") == TRANSFERS)
    sweep(database, broker_url, spawn)
    eventually(lambda: rows(database, MOVED)[0][2] == 0, SETTLED_SECONDS, "nothing is in transit any more")
    eventually(lambda: value(database, "SELECT count(*) FROM outbox") == 0, what="the outbox is empty")
    sent, received, _, available = rows(database, MOVED)[0]
    assert sent == received == arriving * 500_000
    assert available == ACCOUNTS * EACH * 1_000_000
    answers = dict(rows(database, "SELECT name || ' ' || status, count(*) FROM operations"
                                  " WHERE name NOT IN ('credits.open', 'credits.grant') GROUP BY 1"))  # fmt: skip
    assert answers == {
        "credits.transfer applied": TRANSFERS,
        "credits.receive applied": arriving,
        "credits.receive rejected": TRANSFERS - arriving,
        "credits.confirm applied": arriving,
        "credits.bounce applied": TRANSFERS - arriving,
    }
    assert rows(database, "SELECT code, reason, queue, task, body FROM quarantine") == []
