"""Notices go out: once by each channel, whatever else is away, and what fails is tried again until it is parked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from creditlane.client import CreditClient
from creditlane.errors import BrokerUnavailableError
from creditlane.inbox import Inbox
from models.deliveries import parked, retry
from models.settings import settings
from schedules import notices as sweeps
from scripts.embedded import free_port
from tests.broker import Broker, on_both_brokers
from tests.conftest import LANES, Spawn
from tests.receivers import MailServer, Receiver
from tests.support import ROOT, Ledger, eventually, owned_lanes, rows, travel, value
from tests.workers.conftest import Tell, Work
from workers import notices, webhooks
from workers.channels import Rests
from workers.notices import JITTER, RETRY_SECONDS, deliver, send


def states(database: str) -> dict[str, tuple[str, int, str | None]]:
    """Each channel's status, failures and error."""
    found = rows(database, "SELECT channel, status, attempts, error FROM deliveries")
    return {channel: (status, attempts, error) for channel, status, attempts, error in found}


def is_delivered(database: str) -> bool:
    """Whether the one notice is done with."""
    return bool(value(database, "SELECT delivered_at IS NOT NULL FROM notices"))


def again(database: str) -> int:
    """Run the sweep of deliveries in this process; returns for how many it sent a message."""
    return int(sweeps.retry.apply(throw=True).get()["again"])


def test_a_notice_goes_out_by_each_channel(
    tell: Tell, work: Work, database: str, mail_server: MailServer, receiver: Receiver
) -> None:
    key = tell()
    assert deliver("alice", key) == {"channels": ["email", "webhook"]}
    assert not is_delivered(database)
    assert work() == [{"status": "sent", "error": None}] * 2
    assert states(database) == {"email": ("sent", 0, None), "webhook": ("sent", 0, None)}
    assert is_delivered(database)
    assert (mail_server.recipients, len(receiver.hooks)) == (["alice@example.org"], 1)
    assert rows(database, "SELECT DISTINCT next_attempt_at, sent_at IS NULL FROM deliveries") == [(None, False)]


def test_delivered_twice_it_is_sent_once(
    tell: Tell, work: Work, database: str, mail_server: MailServer, receiver: Receiver
) -> None:
    key = tell()
    assert deliver("alice", key) == {"channels": ["email", "webhook"]}
    assert deliver("alice", key) == {"channels": []}
    work()
    for channel in ("email", "webhook"):
        assert send("alice", key, channel, 0) == {"status": "nothing to do"}
        assert send("alice", key, channel, 1) == {"status": "nothing to do"}
    assert (len(mail_server.mails), len(receiver.hooks)) == (1, 1)


def test_what_one_worker_is_sending_another_leaves_to_it(
    tell: Tell, telling: None, database: str, receiver: Receiver
) -> None:
    key = tell(channels=["webhook"])
    deliver("alice", key)
    arrived, go_on = threading.Event(), threading.Event()

    def first() -> None:
        arrived.set()
        go_on.wait(30)

    receiver.first = first
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(send("alice", key, "webhook", 0)))
    thread.start()
    assert arrived.wait(30)
    assert send("alice", key, "webhook", 0) == {"status": "nothing to do"}
    travel(database, timedelta(hours=1))
    assert again(database) == 0, "the sweep leaves it to its worker, too"
    go_on.set()
    thread.join()
    assert done == [{"status": "sent", "error": None}]
    assert len(receiver.hooks) == 1


def test_of_two_channels_that_end_at_once_the_last_one_ends_the_notice(
    tell: Tell, telling: None, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sees what the other has not committed: unless one waits for the other, nobody would end it."""
    key = tell()
    deliver("alice", key)
    together, finish = threading.Barrier(2), notices.finish

    def meet(*arguments: Any) -> None:
        # Each has written its own row, and committed nothing, before either looks at the other's.
        together.wait(30)
        finish(*arguments)

    monkeypatch.setattr(notices, "finish", meet)
    threads = [threading.Thread(target=send, args=("alice", key, channel, 0)) for channel in ("email", "webhook")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in states(database).values()} == {"sent"}
    assert is_delivered(database)


def test_a_channel_that_fails_delays_no_other_and_is_tried_again(
    tell: Tell, work: Work, database: str, mail_server: MailServer, receiver: Receiver
) -> None:
    receiver.status = 500
    deliver("alice", tell())
    work()
    assert len(mail_server.mails) == 1
    assert states(database) == {
        "email": ("sent", 0, None),
        "webhook": ("pending", 1, "the receiver answered HTTP 500"),
    }
    assert not is_delivered(database)
    assert again(database) == 0, "its time has not come"
    travel(database, timedelta(minutes=2))
    assert again(database) == 1
    assert again(database) == 0, "one message is under way"
    receiver.status = 204
    assert work() == [{"status": "sent", "error": None}]
    assert is_delivered(database)
    assert {hook.headers["webhook-id"] for hook in receiver.hooks} == {receiver.hooks[0].headers["webhook-id"]}
    assert len(receiver.hooks) == 2


def test_a_message_that_is_lost_is_sent_again(tell: Tell, work: Work, database: str, mail_server: MailServer) -> None:
    tell(channels=["email"])

    def swept() -> int:
        return int(sweeps.sweep.apply(throw=True).get()["again"])

    assert swept() == 0, "it is not left behind yet"
    travel(database, timedelta(minutes=11))
    assert swept() == 1
    lose(broker_of())
    assert swept() == 1
    (begun,) = [done for done in work() if "channels" in done]
    assert begun == {"channels": ["email"]}
    assert swept() == 0
    assert len(mail_server.mails) == 1


def test_a_message_for_a_channel_that_is_lost_is_sent_again(
    tell: Tell, work: Work, database: str, mail_server: MailServer
) -> None:
    deliver("alice", tell(channels=["email"]))
    lose(broker_of())
    assert work() == []
    travel(database, timedelta(minutes=16))
    assert again(database) == 1
    work()
    assert len(mail_server.mails) == 1
    assert is_delivered(database)


def broker_of() -> str:
    """The broker of the worker that this process is."""
    return settings().broker_url.get_secret_value()


def lose(broker_url: str) -> None:
    """Everything in the queue of notices is gone."""
    with redis.Redis.from_url(broker_url) as store:
        assert store.delete("notices") == 1


def test_after_three_days_it_is_parked_and_an_operator_has_it_tried_again(
    tell: Tell, work: Work, database: str, ledger: Ledger, receiver: Receiver
) -> None:
    receiver.status = 500
    key = tell(channels=["webhook"])
    deliver("alice", key)
    work()
    ahead = timedelta(0)
    for attempt, seconds in enumerate(RETRY_SECONDS, start=1):
        (pause,) = rows(database, "SELECT attempts, next_attempt_at - ledger_now() FROM deliveries")
        assert pause[0] == attempt
        assert seconds * (1 - JITTER) - 60 < pause[1].total_seconds() <= seconds * (1 + JITTER)
        ahead += timedelta(seconds=seconds * (1 + JITTER))
        travel(database, ahead)
        assert again(database) == 1
        work()
    assert timedelta(days=2.9) < timedelta(seconds=sum(RETRY_SECONDS)) < timedelta(days=3.1)
    assert states(database) == {"webhook": ("parked", len(RETRY_SECONDS) + 1, "the receiver answered HTTP 500")}
    assert is_delivered(database)
    assert again(database) == 0
    connection = ledger.writer.connection
    (given_up,) = parked(connection)
    assert (given_up.account, given_up.key, given_up.channel) == ("alice", key, "webhook")
    assert retry(connection, "alice", key, "email") == []
    assert retry(connection, "alice", key) == ["webhook"]
    receiver.status = 200
    assert again(database) == 1
    assert work() == [{"status": "sent", "error": None}]
    assert parked(connection) == []
    assert retry(connection, "alice", key) == []


def test_a_receiver_that_is_gone_for_good_is_parked_at_once(
    tell: Tell, work: Work, database: str, receiver: Receiver
) -> None:
    receiver.status = 410
    deliver("alice", tell(channels=["webhook"]))
    work()
    assert states(database) == {"webhook": ("parked", 1, "the receiver is gone: HTTP 410")}
    assert is_delivered(database)


def test_a_channel_that_is_away_is_left_alone_for_a_while(
    tell: Tell, work: Work, database: str, monkeypatch: pytest.MonkeyPatch, mail_server: MailServer, receiver: Receiver
) -> None:
    monkeypatch.setenv("CREDITLANE_WEBHOOK_URL", f"http://127.0.0.1:{free_port()}/")
    settings.cache_clear()
    keys = [tell(), tell(), tell()]
    for key in keys:
        deliver("alice", key)
    work()
    assert len(mail_server.mails) == 3
    found = rows(database, "SELECT error FROM deliveries WHERE channel = 'webhook' AND attempts = 1 ORDER BY 1")
    # One was tried; the others did not wait for it to fail.
    assert [error for (error,) in found] == [
        "not tried: the channel was away a moment ago",
        "not tried: the channel was away a moment ago",
        "the webhook's receiver is away (ConnectionRefusedError: Connection refused)",
    ]
    monkeypatch.setenv("CREDITLANE_WEBHOOK_URL", receiver.url)
    settings.cache_clear()
    monkeypatch.setattr(notices, "rests", Rests())
    travel(database, timedelta(minutes=2))
    assert again(database) == 3
    work()
    assert len(receiver.hooks) == 3
    assert {status for status, _, _ in states(database).values()} == {"sent"}


def test_after_its_rest_one_delivery_at_a_time_tries_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("workers.channels.time.monotonic", lambda: clock[0])
    rests = Rests()
    assert rests.admits("email")
    rests.begin("webhook")
    assert [rests.admits("email"), rests.admits("webhook")] == [True, False]
    clock[0] += 61
    assert [rests.admits("webhook"), rests.admits("webhook")] == [True, False]
    clock[0] += 61
    assert rests.admits("webhook")
    rests.end("webhook")
    assert [rests.admits("webhook"), rests.admits("webhook")] == [True, True]


def test_a_receiver_that_speaks_and_never_ends_is_left(
    tell: Tell, work: Work, database: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold the worker for ever: no single wait is long."""
    monkeypatch.setattr(webhooks, "WHOLE_SECONDS", 0.3)
    receiver.drips.set()
    deliver("alice", tell(channels=["webhook"]))
    work()
    ((status, attempts, error),) = states(database).values()
    assert (status, attempts) == ("pending", 1)
    assert error is not None
    assert "the webhook's receiver is away" in error


def test_without_an_address_there_is_nothing_to_send(
    tell: Tell, work: Work, database: str, mail_server: MailServer, receiver: Receiver
) -> None:
    deliver("alice", tell(email=None))
    work()
    assert states(database) == {
        "email": ("skipped", 0, "the account has no e-mail address"),
        "webhook": ("sent", 0, None),
    }
    assert is_delivered(database)
    assert mail_server.mails == []


def test_a_channel_that_nobody_knows_is_parked(tell: Tell, work: Work, database: str) -> None:
    deliver("alice", tell(channels=["pigeon"]))
    work()
    assert states(database) == {"pigeon": ("parked", 1, "there is no channel 'pigeon'")}


def test_a_fault_of_ours_is_tried_again_as_well(
    tell: Tell, work: Work, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("with words of an account in it")

    monkeypatch.setitem(notices.CHANNEL_OF, "email", break_down)
    deliver("alice", tell(channels=["email"]))
    work()
    assert states(database) == {"email": ("pending", 1, "internal error: ZeroDivisionError")}


def test_nothing_is_set(tell: Tell, work: Work, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SMTP_URL", "MAIL_FROM", "WEBHOOK_URL", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"CREDITLANE_{name}", "")
    settings.cache_clear()
    deliver("alice", tell())
    work()
    assert states(database) == {
        "email": ("pending", 1, "CREDITLANE_SMTP_URL is not set"),
        "webhook": ("pending", 1, "CREDITLANE_WEBHOOK_URL is not set"),
    }


def test_without_channels_there_is_nothing_to_deliver(tell: Tell, telling: None, database: str) -> None:
    assert deliver("alice", tell(channels=[])) == {"channels": []}
    assert is_delivered(database)
    assert deliver("alice", "no such notice") == {"channels": []}


def test_killed_between_sending_and_noting_it_is_sent_again_under_its_id(
    tell: Tell, work: Work, database: str, mail_server: MailServer
) -> None:
    key = tell(channels=["email"])
    deliver("alice", key)
    lose(broker_of())
    died = subprocess.run(
        [sys.executable, "-c", f"from workers.notices import send; send('alice', {key!r}, 'email', 0)"],
        cwd=ROOT,
        env={**os.environ, "CREDITLANE_CRASH_AT": "after-delivery"},
        timeout=60,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert len(mail_server.mails) == 1
    assert states(database) == {"email": ("pending", 0, None)}
    travel(database, timedelta(minutes=16))
    assert again(database) == 1
    assert work() == [{"status": "sent", "error": None}]
    first, second = (mail["Message-ID"] for mail in mail_server.mails)
    assert first == second


CATALOG = """
[catalog]
name = "told"
[signup]
credits = "10"
[features.image]
price = "1"
[packs.small]
credits = "20"
price = "5.00 EUR"
[notify]
kinds = ["pack_bought", "depleted"]
channels = ["email", "webhook"]
"""


@on_both_brokers
def test_from_the_operation_to_the_inbox(
    spawn: Spawn,
    database: str,
    broker: Broker,
    client: CreditClient,
    channels: dict[str, str],
    mail_server: MailServer,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    catalog = tmp_path / "told.toml"
    catalog.write_text(CATALOG)
    general = spawn("general", kind="general", CREDITLANE_CATALOG=str(catalog), **channels)
    spawn("worker", CREDITLANE_CATALOG=str(catalog))
    eventually(lambda: owned_lanes(database) == LANES)
    eventually(lambda: broker.has_queue("notices"))
    client.open("alice", id="open", email="alice@example.org", locale="fr", timezone="Europe/Paris", wait=20)
    client.grant("alice", 20, source="pack", purchase="order-1", id="bought", wait=20)
    client.consume("alice", feature="image", quantity=30, id="all", wait=20)
    eventually(lambda: len(mail_server.mails) == 2 and len(receiver.hooks) == 2, what=general.logged())
    assert {mail["Subject"] for mail in mail_server.mails} == {
        "Votre compte est crédité de 20 crédits", "Vos crédits sont épuisés",
    }  # fmt: skip
    eventually(lambda: value(database, "SELECT count(*) FROM notices WHERE delivered_at IS NULL") == 0)
    assert value(database, "SELECT count(*) FROM outbox") == 0

    def ask() -> Inbox | None:
        try:
            return client.notices("alice", wait=60)
        except BrokerUnavailableError:
            return None  # the worker has declared its queue and not bound it yet

    page = eventually(ask)
    assert page is not None
    assert ([notice.kind for notice in page.notices], page.unread) == (["depleted", "pack_bought"], 2)
    assert page.advice is not None
    assert page.advice.pack is not None
    assert page.advice.pack.pack == "small"
    bodies = [msgspec.json.decode(hook.body) for hook in receiver.hooks]
    assert {body["data"]["key"] for body in bodies} == {notice.key for notice in page.notices}
    assert client.mark_read("alice", page.notices[0].key, wait=60) == 1
    assert client.mark_read("alice", page.notices[0].key, wait=60) == 0
    assert [notice.key for notice in client.notices("alice", unread=True).notices] == [page.notices[1].key]
    client.mark_read("alice")
    eventually(lambda: client.notices("alice").unread == 0)
    assert client.notices("nobody") == Inbox(notices=[], unread=0, total=0)
