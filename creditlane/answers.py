"""Waiting for answers: one connection listens for all threads of a client.

A worker writes an answer under a key of its own and announces it on the channel of the same name. Whoever waits
subscribes first and sends after; when the subscription is confirmed the key is read once as well, so an answer that
was quicker than the subscription is not missed, and neither is one that came while the connection was down.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import msgspec
import redis

KEY = "celery-task-meta-"
"""What Celery's result backends put before an id."""

IDLE_CHANNEL = "creditlane.answers"
"""Subscribed to all the time; nothing is ever sent there."""

POLL_SECONDS = 1.0
"""How often the listener looks whether it is still wanted."""

RECONNECT_SECONDS = 0.2

READY = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
"""The states in which a task is done; those before it, such as that it has started, are no answer."""


class Outcome(msgspec.Struct):
    """A result as Celery's backends keep it."""

    status: str
    result: Any = None


Answer = Future[Outcome]
_decode = msgspec.json.Decoder(Outcome).decode


class RedisAnswers:
    """The answers to one client's messages, from a Redis result backend. Safe to share among threads.

    :param url: the result backend.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = self._connect()
        self._pubsub = self._client.pubsub()
        self._waiting: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: int | None = None

    @contextmanager
    def expect(self, id: str) -> Iterator[Answer]:
        """Listen for the answer that comes under ``id`` while the block sends and waits.

        :param id: unlike any other's: what is waited for is removed when the block ends.
        :returns: a future of the answer.
        :raises redis.RedisError: when the backend is away.
        """
        key = KEY + id
        answer: Answer = Future()
        try:
            with self._lock:
                self._waiting[key] = answer
                self._begin()
                self._pubsub.subscribe(key)
            yield answer
        finally:
            with self._lock:
                del self._waiting[key]
                try:
                    self._pubsub.unsubscribe(key)
                    self._client.unlink(key)
                except redis.RedisError:
                    pass  # the connection is gone, and its subscriptions with it; the key has a time limit

    def _begin(self) -> None:
        """Have a listening thread in this process; a fork inherits none."""
        if self._process == os.getpid() and self._thread is not None and self._thread.is_alive():
            return
        if self._process not in (None, os.getpid()):
            self._client = self._connect()
            self._pubsub = self._client.pubsub()
        self._process = os.getpid()
        # Never without any subscription: the library stops reading then, and may miss that there is one again.
        self._pubsub.subscribe(IDLE_CHANNEL)
        self._thread = threading.Thread(target=self._listen, name="creditlane answers", daemon=True)
        self._thread.start()

    def _connect(self) -> Any:
        return redis.Redis.from_url(
            self._url, socket_keepalive=True, socket_connect_timeout=5, socket_timeout=30, health_check_interval=25
        )

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(2 * POLL_SECONDS)
        self._pubsub.close()
        self._client.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                message = self._pubsub.get_message(timeout=POLL_SECONDS)
                if message is None:
                    continue
                key = message["channel"].decode()
                if message["type"] == "message":
                    self._resolve(key, message["data"])
                elif message["type"] == "subscribe" and key != IDLE_CHANNEL:
                    early = self._client.get(key)
                    if early is not None:
                        self._resolve(key, early)
            except Exception:
                # Whoever waits has a time limit of its own; the next read connects and subscribes anew.
                self._closed.wait(RECONNECT_SECONDS)

    def _resolve(self, key: str, data: bytes) -> None:
        outcome = _decode(data)
        with self._lock:
            answer = self._waiting.get(key)
            if answer is not None and outcome.status in READY and not answer.done():
                answer.set_result(outcome)
