"""A fake Stripe for tests and demonstrations: its API over HTTP, and its webhooks.

State is in memory, the clock is given, nothing is drawn but from the generator that is given: a run can be repeated. ::

    with FakeStripe(now, random.Random(1)) as stripe:
        stripe.add_price("price_pack", 1500)
        session = stripe.open_session([("price_pack", 1)], mode="payment", client_reference_id="ann")
        stripe.complete(session["id"])
        stripe.deliver(webhook_url)
        client = StripeClient(stripe.key, base_addresses={"api": stripe.url})
"""

from __future__ import annotations

import http.client
import json
import random
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self
from urllib.parse import parse_qsl, urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from stripe import WebhookSignature

from scripts.fake_stripe.api import Answer, Api, Request
from scripts.fake_stripe.forms import RefusedError, nested
from scripts.fake_stripe.objects import API_VERSION, Json

__all__ = [
    "API_VERSION",
    "KEY",
    "SECRET",
    "Answer",
    "Clock",
    "Delivered",
    "FakeStripe",
    "Json",
    "RefusedError",
    "Request",
    "Send",
    "post",
]

HOST = "127.0.0.1"
KEY = "sk_test_of_the_fake"
SECRET = "whsec_of_the_fake_stripe"  # noqa: S105 - of nothing
SEND_SECONDS = 30.0
"""How long a webhook's receiver may take to answer."""

Send = Callable[[str, bytes, Mapping[str, str]], int | None]
"""Posts a webhook to a URL: body and headers, to the status of the answer, or None where there was none."""


@dataclass(frozen=True)
class Delivered:
    """One delivery of an event."""

    event: str
    type: str
    status: int | None
    """Of the answer; None where there was none, as nobody listened."""

    @property
    def is_taken(self) -> bool:
        """Whether the receiver said that it has it."""
        return self.status is not None and 200 <= self.status < 300


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, start: datetime) -> None:
        self.at = start

    def __call__(self) -> datetime:
        return self.at

    def move(self, **by: float) -> None:
        """Move it on, by ``days``, ``hours`` or ``seconds``."""
        self.at += timedelta(**by)


def post(url: str, body: bytes, headers: Mapping[str, str]) -> int | None:
    """Post a webhook over HTTP."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=SEND_SECONDS)
    try:
        connection.request("POST", parts.path or "/", body, dict(headers))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class FakeStripe(Api):
    """Stripe, with knobs.

    :param now: the clock.
    :param rng: what ids, and the order of a shuffled delivery, are drawn from.
    :param key: the API key that requests must bear.
    :param secret: of the webhook's endpoint.
    :param page: the most that stands in one page of any list.
    :param send: how webhooks are posted.
    :param signing: the clock that they are signed by, where that is another: their receiver refuses old ones.
    """

    def __init__(self, now: Callable[[], datetime], rng: random.Random, *, key: str = KEY,
                 secret: str = SECRET, livemode: bool = False, page: int = 100, send: Send = post,
                 signing: Callable[[], datetime] | None = None) -> None:  # fmt: skip
        super().__init__(now, rng, livemode=livemode, page=page)
        self.key = key
        self.secret = secret
        self.url = ""
        self.send = send
        self._signing = signing
        self._rng = rng
        self._lost: set[str] = set()
        self._tried: set[str] = set()
        self._failures: list[tuple[int, bool]] = []
        self._open = threading.Event()
        self._open.set()

    # Webhooks

    @property
    def events(self) -> list[Json]:
        """All events so far, the oldest first."""
        return list(reversed(self.all_of("event")))

    def undelivered(self) -> list[Json]:
        """Events that nobody has taken yet and that are not lost, the oldest first."""
        return [event for event in self.events if event["pending_webhooks"] and event["id"] not in self._lost]

    def deliver(self, url: str, events: Sequence[Json] | None = None, *, copies: int = 1,
                order: Sequence[int] | None = None, shuffle: bool = False, delay_seconds: float = 0,
                lose: Callable[[Json], bool] | None = None) -> list[Delivered]:  # fmt: skip
        """Post events to a webhook, one after the other.

        :param events: by default those that were not tried yet and are not lost.
        :param copies: how often each is posted.
        :param order: a permutation of the indices of all that is posted (events times ``copies``, each event's copies
            side by side).
        :param shuffle: whether to draw a permutation.
        :param delay_seconds: events younger than this are left for later.
        :param lose: tells events that never arrive: these are not posted, by no later call either; the API goes on
            saying that they were not delivered.
        :returns: what came of each.
        """
        with self.lock:
            if events is None:
                events = [event for event in self.undelivered() if event["id"] not in self._tried]
            wanted = [event for event in events if event["created"] <= self.now() - delay_seconds]
            if lose is not None:
                self._lost |= {event["id"] for event in wanted if lose(event)}
            queue = [event for event in wanted if event["id"] not in self._lost for _ in range(copies)]
            if order is not None:
                if sorted(order) != list(range(len(queue))):
                    raise ValueError(f"not a permutation of {len(queue)} deliveries")
                queue = [queue[index] for index in order]
            if shuffle:
                self._rng.shuffle(queue)
            bodies = [(event, *self.signed(event)) for event in queue]
        return [self._deliver(url, *each) for each in bodies]  # without the lock: the receiver asks the API meanwhile

    def retry(self, url: str) -> list[Delivered]:
        """Post again what was posted and not taken."""
        return self.deliver(url, [event for event in self.undelivered() if event["id"] in self._tried])

    def signed(self, event: Json) -> tuple[bytes, dict[str, str]]:
        """An event as it is posted, body and headers, signed now."""
        body = json.dumps(event, indent=2)
        signed_at = self.now() if self._signing is None else int(self._signing().timestamp())
        signature = WebhookSignature.generate_signature_header(body, self.secret, signed_at)
        return body.encode(), {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": signature,
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
        }

    def _deliver(self, url: str, event: Json, body: bytes, headers: dict[str, str]) -> Delivered:
        delivered = Delivered(event["id"], event["type"], self.send(url, body, headers))
        with self.lock:
            self._tried.add(event["id"])
            if delivered.is_taken:
                event["pending_webhooks"] = 0
        return delivered

    # The API over HTTP

    def fail(self, times: int, status: int = 500, *, done: bool = False) -> None:
        """Answer the next requests with an error.

        :param done: whether the request is carried out nevertheless, so that only its answer is lost.
        """
        with self.lock:
            self._failures.extend([(status, done)] * times)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Requests that come within are answered only at its end."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    @property
    def app(self) -> Starlette:
        """The API as an ASGI application."""
        return Starlette(routes=[Route("/{path:path}", self._handle, methods=["GET", "POST", "DELETE"])])

    async def _handle(self, http: HttpRequest) -> Response:
        fields = parse_qsl(http.url.query, keep_blank_values=True)
        fields += parse_qsl((await http.body()).decode(), keep_blank_values=True)
        return await run_in_threadpool(self._respond, http.method, http.url.path, dict(http.headers), fields)

    def _respond(self, method: str, path: str, headers: Mapping[str, str], fields: list[tuple[str, str]]) -> Response:
        self._open.wait()
        given = {"Request-Id": f"req_{len(self.requests):014d}", "Stripe-Version": API_VERSION}
        if not secrets.compare_digest(headers.get("authorization", ""), f"Bearer {self.key}"):
            return _error(401, "Invalid API Key provided.", given)
        if headers.get("stripe-version", API_VERSION) != API_VERSION:
            return _error(400, "The fake knows only its own version of the API.", given)
        with self.lock:
            failure, done = self._failures.pop(0) if self._failures else (None, True)
        answer = self.call(method, path, nested(fields), headers.get("idempotency-key")) if done else None
        if failure is not None:
            return _error(failure, "An error occurred.", given, "api_error")
        assert answer is not None
        if answer.is_replayed:
            given["Idempotent-Replayed"] = "true"
        return JSONResponse(answer.body, answer.status, given)

    @contextmanager
    def serve(self, port: int = 0) -> Iterator[str]:
        """Serve the API on a port of this machine, 0 for any.

        :returns: its URL, which is :attr:`url` too.
        """
        listening = socket.create_server((HOST, port), backlog=128)
        config = uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off",
                                timeout_graceful_shutdown=1)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), name="fake-stripe", daemon=True)
        thread.start()
        self.url = self.base = f"http://{HOST}:{listening.getsockname()[1]}"
        try:
            yield self.url
        finally:
            self._open.set()
            server.should_exit = True
            thread.join()
            listening.close()

    def __enter__(self) -> Self:
        self._serving = self.serve()
        self._serving.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)


def _error(status: int, message: str, headers: Mapping[str, str], type: str = "invalid_request_error") -> Response:
    return JSONResponse({"error": {"message": message, "type": type}}, status, headers)
