"""The relay: what is stored is answered with yes, what is not is asked for again or refused, and nothing is a 500."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from os import environ
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest
from hypothesis import given
from hypothesis import settings as sampled
from hypothesis import strategies as st

from creditlane.client import PAYMENTS, task_message
from creditlane.sending import Outgoing, make_sender
from models.settings import Settings, settings
from scripts.embedded import HOST, Stack, free_port
from tests.broker import Broker, on_both_brokers
from tests.conftest import Spawn
from tests.support import ROOT, eventually, execute, rows, value
from tests.workers.providers import test_creem, test_paypal, test_sepay
from tests.workers.providers.making import body, envelope, made, signed
from workers import relay as relaying
from workers.notices import sender
from workers.providers.base import MAX_BODY_BYTES, Adapter
from workers.providers.creem import Creem
from workers.providers.paypal import PayPal
from workers.providers.sepay import SePay
from workers.providers.stripe import Stripe
from workers.receiving import configured, receive
from workers.relay import make_app, make_server

SECRET, OLDER = "whsec_made_for_these_tests", "whsec_made_for_these_tests_before"
RAW = body(envelope("customer.created", {"id": "cus_made", "object": "customer", "name": "a-name-that-nobody-logs"}))


class Answer(NamedTuple):
    """What the relay answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of a refusal."""
        return str(json.loads(self.body)["code"])


class Served(NamedTuple):
    """A relay that takes webhooks on a port."""

    port: int

    def send(
        self, raw: Any, headers: Mapping[str, str] | None = None, path: str = "/webhooks/stripe", method: str = "POST"
    ) -> Answer:
        """Send one request; a body that is an iterator goes in chunks, without its length."""
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=60)) as connection:
            connection.request(method, path, raw, dict(headers or {}))
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): text for name, text in found.getheaders()}, found.read())

    def deliver(self, raw: bytes = RAW, **how: Any) -> Answer:
        """Send a webhook of Stripe, signed now."""
        return self.send(raw, now_signed(raw, **how))

    def open(self, sent: bytes) -> socket.socket:
        """Begin a request and say no more."""
        connection = socket.create_connection((HOST, self.port), timeout=60)
        connection.sendall(sent)
        return connection


def now_signed(raw: bytes, seconds: float = 0, secret: str = SECRET) -> dict[str, str]:
    """The headers of a delivery by Stripe, so many seconds from now."""
    return signed(raw, datetime.now(UTC) + timedelta(seconds=seconds), secret)


@cache
def adapters() -> dict[str, Adapter]:
    """All four providers, PayPal with certificates that are valid today."""
    start, end = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC) + timedelta(days=30)
    root = test_paypal.certificate(test_paypal.key("root"), "root", name="root", authority=True, start=start, end=end)
    leaf = test_paypal.certificate(test_paypal.key("leaf"), "root", start=start, end=end)
    found: list[Adapter] = [
        Stripe([OLDER, SECRET], livemode=False),
        PayPal(["WH1"], lambda _: test_paypal.pem(leaf), test_paypal.pem(root), livemode=False),
        Creem(["made"], livemode=False),
        SePay(["made"], livemode=False),
    ]
    return {adapter.name: adapter for adapter in found}


@contextmanager
def serving(database_url: str, broker_url: str, **given: Any) -> Iterator[Served]:
    """A relay in a thread of this process."""
    config = Settings(**{
        "database_url": database_url, "broker_url": broker_url, "relay_port": 0, "relay_connections": 50, **given,
    })  # fmt: skip
    server = make_server(config, make_app(config, adapters()))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started, what="the relay is up")
    try:
        yield Served(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def relay(database: str, broker_url: str) -> Iterator[Served]:
    """A relay with all it needs."""
    with serving(database, broker_url) as served:
        yield served


Start = Callable[..., AbstractContextManager[tuple[Served, subprocess.Popen[bytes], Path]]]


@pytest.fixture
def start(database: str, broker_url: str, tmp_path: Path) -> Start:
    """A relay in a process of its own, with its log."""

    @contextmanager
    def starting(**environment: str) -> Iterator[tuple[Served, subprocess.Popen[bytes], Path]]:
        log = tmp_path / "relay.log"
        given = {
            "CREDITLANE_BROKER_URL": broker_url,
            "CREDITLANE_DATABASE_URL": database,
            "CREDITLANE_STRIPE_WEBHOOK_SECRETS": SECRET,
            "CREDITLANE_PAYMENTS_LIVEMODE": "false",
            "CREDITLANE_RELAY_PORT": "0",
        }
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers.relay"], cwd=ROOT, stdout=stream, stderr=stream,
                env={**environ, **given, **environment},
            )  # fmt: skip
        try:
            found = eventually(lambda: re.findall(rf"running on http://{HOST}:(\d+)", log.read_text()))
            yield Served(int(found[0])), process, log
        finally:
            process.kill()
            process.wait()

    return starting


def stored(database: str) -> list[tuple[Any, ...]]:
    """The inbox: provider, event and body of each row."""
    found = rows(database, "SELECT provider, event_id, body FROM payment_events ORDER BY id")
    return [(provider, event, bytes(raw)) for provider, event, raw in found]


def told(broker: Broker) -> list[int]:
    """The rows that messages are there for."""
    found = broker.messages(PAYMENTS)
    assert {message.headers["task"] for message in found} <= {"payments.apply"}
    return [json.loads(message.body)[1]["event"] for message in found]


# --- What is stored ---


def test_a_webhook_of_each_provider_is_stored_as_it_came_and_told_of(
    relay: Served, database: str, broker: Broker
) -> None:
    now = datetime.now(UTC)
    creem, sepay, paypal = (body(made(name)) for name in ("creem_checkout", "sepay_transfer", "paypal_capture"))
    sent: dict[str, tuple[bytes, Mapping[str, str]]] = {
        "stripe": (RAW, now_signed(RAW)),
        "creem": (creem, test_creem.signed(creem)),
        "sepay": (sepay, test_sepay.signed(sepay, now)),
        "paypal": (paypal, test_paypal.signed(paypal, now.isoformat(timespec="seconds"))),
    }
    for provider, (raw, headers) in sent.items():
        answer = relay.send(raw, headers, f"/webhooks/{provider}")
        assert (answer.status, answer.body) == (200, adapters()[provider].accepted)
    assert [(provider, raw) for provider, _, raw in stored(database)] == [
        (name, raw) for name, (raw, _) in sent.items()
    ]
    assert rows(database, "SELECT DISTINCT status, source, attempts, next_attempt_at, done_at FROM payment_events") == [
        ("received", "webhook", 0, None, None)
    ]
    assert told(broker) == [id for (id,) in rows(database, "SELECT id FROM payment_events ORDER BY id")]


ODD: dict[str, bytes] = {
    "a thin event": body({
        "id": "evt_made_1", "object": "v2.core.event", "type": "v1.billing.meter.error", "livemode": False,
        "created": "2026-11-21T16:00:00Z", "related_object": {"id": "mtr_1"},
    }),
    "an unknown version": body(envelope("invoice.paid", {}, api_version="2031-01-01.later")),
    "the other mode": body(envelope("invoice.paid", {}, livemode=True)),
    "NUL characters": body(envelope("invoice.paid", {"id": "in_\0", "\0": "\0"})),
    "lone surrogates": body(envelope("invoice.paid", {"id": "in_\ud800"})),
    "another alphabet": json.dumps(envelope("invoice.paid", {"id": "Zoë ☃"}), ensure_ascii=False).encode(),
    "large": body(envelope("invoice.paid", {"id": "x" * (MAX_BODY_BYTES - 400)})),
}  # fmt: skip


def test_what_is_signed_and_odd_is_stored_for_an_operator_to_see(relay: Served, database: str) -> None:
    assert len(ODD["large"]) <= MAX_BODY_BYTES
    for number, (odd, raw) in enumerate(ODD.items()):
        raw = raw.replace(b'"evt_made_1"', b'"evt_%d"' % number)
        answer = relay.send(raw, now_signed(raw) | {"Content-Type": "text/html; charset=utf-16"})
        assert answer.status == 200, (odd, answer)
        assert stored(database)[number:] == [("stripe", f"evt_{number}", raw)], odd


def test_a_body_in_chunks_is_as_good(relay: Served, database: str) -> None:
    assert relay.send((RAW[place : place + 7] for place in range(0, len(RAW), 7)), now_signed(RAW)).status == 200
    assert [raw for _, _, raw in stored(database)] == [RAW]


def test_secrets_may_be_replaced(relay: Served, database: str) -> None:
    assert relay.deliver(secret=OLDER).status == 200
    assert relay.deliver(secret=SECRET).status == 200
    assert relay.deliver(secret="whsec_another").status == 400
    assert len(stored(database)) == 1


def test_of_duplicates_at_once_one_is_stored_and_told_of(relay: Served, database: str, broker: Broker) -> None:
    headers = now_signed(RAW)
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda _: relay.send(RAW, headers), range(24)))
    assert {answer.status for answer in answers} == {200}
    assert len(stored(database)) == len(told(broker)) == 1
    execute(database, "UPDATE payment_events SET status = 'done'")
    assert relay.deliver().status == 200
    assert len(told(broker)) == 1
    assert value(database, "SELECT status FROM payment_events") == "done"


# --- What is refused ---


def changed(**changes: Any) -> bytes:
    """An event with fields in place of its own."""
    return body(envelope("invoice.paid", {}, **changes))


def refused() -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """What is not proven, signed now, and the code that it is refused with."""
    return {
        "forged": ("bad_signature", RAW, now_signed(RAW, secret="whsec_forged")),
        "unsigned": ("no_signature", RAW, {}),
        "altered": ("bad_signature", RAW.replace(b"cus_made", b"cus_evil"), now_signed(RAW)),
        "with a line's end": ("bad_signature", RAW + b"\n", now_signed(RAW)),
        "empty": ("bad_signature", b"", now_signed(RAW)),
        "empty and signed": ("not_json", b"", now_signed(b"")),
        "no UTF-8": ("not_json", b"\xff\xfe" + RAW, now_signed(RAW)),
        "a signature that is not ASCII": ("bad_signature", RAW, {"Stripe-Signature": "t=1,v1=\xe9"}),
        "a signature of many": ("bad_signature", RAW, {"Stripe-Signature": "t=1" + ",v1=0" * 1500}),
        "a signature that is none": ("bad_signature", RAW, {"Stripe-Signature": "t=,v1=,=,"}),
        "an array": ("not_an_event", b"[]", now_signed(b"[]")),
        "an array of events": ("not_an_event", b"[%b]" % RAW, now_signed(b"[%b]" % RAW)),
        "no JSON": ("not_json", b"id=evt_1", now_signed(b"id=evt_1")),
        "a number": ("not_an_event", b"1", now_signed(b"1")),
        "an id with NUL": ("not_an_event", changed(id="evt_\0"), now_signed(changed(id="evt_\0"))),
        "an id of half a pair": ("not_an_event", changed(id="evt_\ud800"), now_signed(changed(id="evt_\ud800"))),
        "a type with NUL": ("not_an_event", changed(type="\0"), now_signed(changed(type="\0"))),
        "no livemode": ("not_an_event", changed(livemode=None), now_signed(changed(livemode=None))),
        "no data": ("not_an_event", changed(data=None), now_signed(changed(data=None))),
        "nested deeply": ("not_json", b'{"a":' * 200_000, now_signed(b'{"a":' * 200_000)),
    }


def test_what_is_not_proven_is_refused_with_a_code(relay: Served, database: str, broker: Broker) -> None:
    sent = refused()
    answers = {why: relay.send(raw, headers) for why, (_, raw, headers) in sent.items()}
    assert {why: answer.code for why, answer in answers.items()} == {why: code for why, (code, _, _) in sent.items()}
    assert {answer.status for answer in answers.values()} == {400}
    assert {answer.headers["connection"] for answer in answers.values()} == {"close"}
    assert (stored(database), told(broker)) == ([], [])


def test_another_time_is_refused_both_ways(relay: Served, database: str) -> None:
    assert relay.deliver(seconds=-400).code == "too_old"
    assert relay.deliver(seconds=+400).code == "too_new"
    assert stored(database) == []


def test_of_two_signatures_the_first_counts(relay: Served, database: str) -> None:
    """A proxy that adds one of its own cannot make a wrong one good."""
    good, bad = now_signed(RAW)["Stripe-Signature"], now_signed(RAW, secret="whsec_forged")["Stripe-Signature"]
    for first, second, status in ((bad, good, 400), (good, bad, 200)):
        with closing(http.client.HTTPConnection(HOST, relay.port, timeout=60)) as connection:
            connection.putrequest("POST", "/webhooks/stripe")
            connection.putheader("Stripe-Signature", first)
            connection.putheader("stripe-signature", second)
            connection.putheader("Content-Length", str(len(RAW)))
            connection.endheaders(RAW)
            assert connection.getresponse().status == status
    assert len(stored(database)) == 1


def test_a_body_that_is_too_large_is_cut_off(relay: Served, database: str) -> None:
    huge = b" " * (MAX_BODY_BYTES + 1)
    bodies: list[Any] = [huge, iter([huge]), iter([huge[:100_000]] * 20)]
    for sent in bodies:
        assert (answer := relay.send(sent, now_signed(huge))).status == 413
        assert answer.code == "too_large"
    with closing(
        relay.open(b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    ) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert stored(database) == []


OTHERS = {
    ("POST", "/webhooks/nobody"): 404, ("POST", "/webhooks/"): 404, ("POST", "/webhooks/stripe/"): 404,
    ("POST", "/webhooks/%00"): 404, ("POST", "/webhooks/%ff%0a"): 404, ("POST", "/"): 405,
    ("GET", "/webhooks/stripe"): 405, ("GET", "/"): 200, ("HEAD", "/"): 200, ("GET", "/healthz"): 200,
}  # fmt: skip


def test_other_requests_have_their_answers(relay: Served, database: str) -> None:
    answers = {(method, path): relay.send(RAW, now_signed(RAW), path, method).status for method, path in OTHERS}
    assert answers == OTHERS
    assert stored(database) == []


NAMES = ("stripe-signature", "creem-signature", "x-sepay-signature", "x-sepay-timestamp", "paypal-transmission-id",
         "paypal-transmission-time", "paypal-transmission-sig", "paypal-cert-url", "paypal-auth-algo", "content-type",
         "content-encoding", "transfer-encoding", "expect", "upgrade", "connection", "host", "x-made")  # fmt: skip
latin = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)


def outcome(relay: Served, sent: bytes) -> str | None:
    """What bytes are answered with, when nothing follows them: status and code; None for no answer."""
    found = b""
    with closing(relay.open(sent)) as connection, suppress(ConnectionError):
        while part := connection.recv(4096):
            found += part
    if not found:
        return None
    code = re.search(rb'"code":"(\w+)"', found)
    return found[9:12].decode() + (f" {code[1].decode()}" if code else "")


def test_whatever_comes_is_no_error_of_ours_and_is_not_stored(
    relay: Served, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = set()

    @sampled(max_examples=150, deadline=None)
    @given(
        provider=st.sampled_from([*adapters(), "nobody", "%"]),
        raw=st.binary(max_size=200) | st.sampled_from([RAW, b"{}", b"[]"]),
        signature=st.none() | latin | st.sampled_from(["t=1,v1=00", "0" * 64, "sha256=" + "0" * 64, "SHA256withRSA"]),
        headers=st.dictionaries(st.sampled_from(NAMES), latin, max_size=3),
        length=st.sampled_from(["its own"] * 5 + ["", "-1", "1e3", "9" * 30, "1", "4000"]) | latin,
    )
    def request(provider: str, raw: bytes, signature: str | None, headers: dict[str, str], length: str) -> None:
        length = str(len(raw)) if length == "its own" else length
        signatures = {} if signature is None else dict.fromkeys(NAMES[:9], signature)
        lines = "".join(f"{name}: {text}\r\n" for name, text in {"Host": "x", **signatures, **headers}.items())
        sent = f"POST /webhooks/{provider} HTTP/1.1\r\nContent-Length: {length}\r\n{lines}\r\n".encode("latin-1") + raw
        outcomes.add(outcome(relay, sent))

    @sampled(max_examples=50, deadline=None)
    @given(raw=st.binary(max_size=200), begun=st.sampled_from([b"", b"POST /webhooks/stripe HTTP/1.1\r\n", b"GET "]))
    def bytes_alone(raw: bytes, begun: bytes) -> None:
        outcomes.add(outcome(relay, begun + raw))

    with monkeypatch.context() as waiting:
        waiting.setattr(relaying, "HEADERS_SECONDS", 0.1)
        waiting.setattr(relaying, "BODY_SECONDS", 0.1)
        request()
        bytes_alone()
    assert all(each is None or each.startswith("4") for each in outcomes), outcomes
    assert outcomes >= {"400", "400 no_signature", "400 bad_signature", "404 unknown_provider"}
    assert stored(database) == []
    assert relay.deliver().status == 200


# --- What is away ---


@contextmanager
def shut(stack: Stack, database: str) -> Iterator[None]:
    """The database lets nobody in, and puts those out who were."""
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    execute(stack.database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        execute(stack.database_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        yield
    finally:
        execute(stack.database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_without_the_database_the_provider_comes_again(
    relay: Served, database: str, stack: Stack, broker: Broker
) -> None:
    assert relay.deliver().status == 200
    with shut(stack, database):
        for answer in (relay.deliver(changed()), relay.send(None, path="/healthz", method="GET")):
            assert (answer.status, answer.code) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert relay.send(RAW, {}).status == 400  # what is wrong is wrong all the same
    eventually(lambda: relay.send(None, path="/healthz", method="GET").status == 200)
    assert relay.deliver(changed(id="evt_2")).status == 200
    assert [event for _, event, _ in stored(database)] == ["evt_made_1", "evt_2"]
    assert len(told(broker)) == 2


def test_a_database_that_says_nothing_is_not_waited_for(
    database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "WORK_SECONDS", 0.2)
    with serving(database, broker_url) as relay:
        with psycopg.connect(database) as holder:
            holder.execute("LOCK TABLE payment_events IN EXCLUSIVE MODE")
            assert (answer := relay.deliver()).status == 503
            assert b"took too long" in answer.body
        monkeypatch.setattr(relaying, "WORK_SECONDS", 60)
        assert relay.deliver().status == 200
    assert len(stored(database)) == 1


def test_without_the_broker_the_row_waits_for_the_sweep(database: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving(database, f"redis://{HOST}:{free_port()}/0") as relay:
        for number in range(3):
            assert relay.deliver(changed(id=f"evt_{number}")).status == 200
    assert rows(database, "SELECT status, next_attempt_at FROM payment_events") == [("received", None)] * 3
    # The broker is left alone for a while: not each webhook has to wait for it.
    assert sum("waits for the sweep" in record.message for record in caplog.records) < 3


def test_a_relay_that_dies_before_it_told_anybody_loses_nothing(start: Start, database: str, broker: Broker) -> None:
    with start(CREDITLANE_CRASH_AT="after-store:1") as (served, process, _):
        with pytest.raises((http.client.HTTPException, OSError)):
            served.deliver()
        assert process.wait(30) == -signal.SIGKILL
    assert rows(database, "SELECT status, next_attempt_at FROM payment_events") == [("received", None)]
    assert told(broker) == []
    with start() as (served, _, _):
        assert served.deliver().status == 200  # the provider, which had no answer
    assert len(stored(database)) == 1


def test_what_is_in_hand_is_answered_when_it_is_asked_to_stop(start: Start, database: str) -> None:
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'payment_events'::regclass"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with start() as (served, process, log), psycopg.connect(database) as holder, ThreadPoolExecutor(1) as threads:
        holder.execute("LOCK TABLE payment_events IN EXCLUSIVE MODE")
        answer = threads.submit(served.deliver)
        eventually(lambda: value(database, waiting))
        process.send_signal(signal.SIGTERM)
        eventually(lambda: "Waiting for connections to close" in log.read_text())
        holder.rollback()
        status = answer.result(60).status
        assert process.wait(60) == 0
    # Where that took longer than the database waits for a lock, the provider comes again.
    assert (status, len(stored(database))) in ((200, 1), (503, 0))


def test_nothing_secret_and_nothing_of_a_body_is_logged(start: Start) -> None:
    with start() as (served, _, log):
        assert served.deliver().status == 200
        assert served.send(RAW, now_signed(RAW), "/webhooks/stripe?key=a-query-that-nobody-logs").status == 200
        assert served.deliver(secret="whsec_forged").status == 400
        text = log.read_text()
    assert re.search(r"POST /webhooks/stripe 200 event \d+, ", text)
    assert re.search(r"POST /webhooks/stripe 400 bad_signature, ", text)
    for hidden in (SECRET, "nobody-logs", "v1=", "evt_made"):
        assert hidden not in text


# --- Clients that hold on ---


def test_a_client_that_says_nothing_more_is_not_waited_for(
    database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "HEADERS_SECONDS", 0.2)
    monkeypatch.setattr(relaying, "BODY_SECONDS", 0.2)
    begun = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\n"
    with serving(database, broker_url) as relay:
        for sent in (b"", begun, begun + b"X-Made: "):
            with closing(relay.open(sent)) as connection, suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        with closing(relay.open(begun + b"Content-Length: 10\r\n\r\n12345")) as connection:
            assert connection.recv(12) == b"HTTP/1.1 408"
    assert stored(database) == []


def test_there_is_a_limit_on_clients(database: str, broker_url: str) -> None:
    with serving(database, broker_url, relay_connections=2) as relay:
        with closing(relay.open(b"POST ")):
            eventually(lambda: relay.deliver().status == 503)
        eventually(lambda: relay.deliver().status == 200)
    assert len(stored(database)) == 1


# --- Another party's relay ---


@pytest.fixture
def receiving(database: str, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a general worker that knows Stripe."""
    for name, text in {
        "DATABASE_URL": database, "BROKER_URL": broker_url, "STRIPE_WEBHOOK_SECRETS": SECRET,
        "PAYMENTS_LIVEMODE": "false",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"CREDITLANE_{name}", text)
    caches = (settings, sender, configured)
    for each in caches:
        each.cache_clear()
    yield
    sender().close()
    for each in caches:
        each.cache_clear()


def test_a_delivery_by_task_goes_the_same_way(receiving: None, database: str, broker: Broker) -> None:
    done = receive("stripe", RAW.decode(), now_signed(RAW))
    assert done == {"event": value(database, "SELECT id FROM payment_events WHERE source = 'receive'"), "new": True}
    assert receive("stripe", RAW.decode(), now_signed(RAW)) == done | {"new": False}
    assert told(broker) == [done["event"]]
    assert stored(database) == [("stripe", "evt_made_1", RAW)]


def test_a_delivery_by_task_may_have_waited_when_it_says_since_when(receiving: None, database: str) -> None:
    headers, delivered = now_signed(RAW, -4000), datetime.now(UTC) - timedelta(seconds=3990)
    assert receive("stripe", RAW.decode(), headers)["code"] == "too_old"
    assert (
        receive("stripe", RAW.decode(), headers, (delivered - timedelta(seconds=500)).isoformat())["code"] == "too_new"
    )
    assert receive("stripe", RAW.decode(), now_signed(RAW, 4000), "2999-01-01T00:00:00Z")["code"] == "too_new"
    assert stored(database) == []
    assert receive("stripe", RAW.decode(), headers, delivered.isoformat())["new"]


def test_a_delivery_by_task_that_proves_nothing_is_refused(receiving: None, database: str) -> None:
    assert receive("stripe", RAW.decode(), now_signed(RAW, secret="whsec_forged"))["code"] == "bad_signature"
    assert receive("stripe", "\ud800", now_signed(RAW))["code"] == "not_json"
    wrongs: tuple[dict[str, Any], ...] = (
        {"provider": "nobody"}, {"provider": 1}, {"body": 1}, {"headers": []}, {"headers": {"a": 1}}, {"v": 2},
        {"received_at": "yesterday"}, {"received_at": "2026-11-21T16:00:00"}, {"received_at": 1},
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"provider|should be|contract|instant"):
            receive(**{"provider": "stripe", "body": RAW.decode(), "headers": now_signed(RAW), **wrong})
    assert stored(database) == []


def test_a_delivery_by_task_is_tried_until_the_database_is_there(
    database: str, broker: Broker, spawn: Spawn, stack: Stack
) -> None:
    worker = spawn("general", "general", CREDITLANE_STRIPE_WEBHOOK_SECRETS=SECRET, CREDITLANE_PAYMENTS_LIVEMODE="false")
    with shut(stack, database), closing(make_sender(broker.url)) as producer:
        producer.send([delivery(RAW)])
        eventually(lambda: "by task, again in 1 s" in worker.logged())
    eventually(lambda: stored(database) == [("stripe", "evt_made_1", RAW)])
    assert "nobody-logs" not in worker.logged()


def delivery(raw: bytes) -> Outgoing:
    """A webhook as another party's relay sends it."""
    arguments = {"provider": "stripe", "body": raw.decode(), "headers": now_signed(raw)}
    return task_message("payments.receive", "one-of-theirs", PAYMENTS, msgspec.json.encode(arguments), "stripe")


@on_both_brokers
def test_the_general_worker_hears_of_webhooks_and_takes_those_of_others(
    database: str, broker: Broker, spawn: Spawn
) -> None:
    worker = spawn("general", "general", CREDITLANE_STRIPE_WEBHOOK_SECRETS=SECRET, CREDITLANE_PAYMENTS_LIVEMODE="false")
    eventually(lambda: broker.has_queue(PAYMENTS))
    with serving(database, broker.url) as relay:
        assert relay.deliver().status == 200
    theirs = changed(id="evt_theirs")
    with closing(make_sender(broker.url)) as producer:
        producer.send([delivery(theirs)])
    read = "SELECT source, body FROM payment_events WHERE status <> 'received' ORDER BY id"
    eventually(lambda: len(rows(database, read)) == 2, what="both were read")
    assert [(source, bytes(raw)) for source, raw in rows(database, read)] == [("webhook", RAW), ("receive", theirs)]
    assert "nobody-logs" not in worker.logged()
