"""Waiting for answers: one connection listens for all threads of a client.

A worker writes an answer under a key of its own and announces it on the channel of the same name. Whoever waits
subscribes first and sends after; when the subscription is confirmed the key is read once as well, so an answer that
was quicker than the subscription is not missed, and neither is one that came while the connection was down.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import redis

KEY = "celery-task-meta-"
"""What Celery's result backends put before an id."""

IDLE_CHANNEL = "creditlane.answers"
"""Subscribed to all the time; nothing is ever sent there."""

POLL_SECONDS = 1.0
"""How often the listener looks whether it is still wanted."""

RECONNECT_SECONDS = 0.2

Answer = Future[bytes]


class RedisAnswers:
    """The answers to one client's messages, from a Redis result backend. Safe to share among threads.

    :param url: the result backend.
    """

    def __init__(self, url: str) -> None:
        client: Any = redis.Redis.from_url(
            url, socket_keepalive=True, socket_connect_timeout=5, socket_timeout=30, health_check_interval=25
        )
        self._client = client
        self._pubsub = client.pubsub()
        self._waiting: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def expect(self, id: str) -> Iterator[Answer]:
        """Listen for the answer to ``id`` while the block sends and waits.

        :returns: a future of the answer: Celery's result, as JSON.
        :raises redis.RedisError: when the backend is away.
        """
        key = KEY + id
        answer: Answer = Future()
        self._client.delete(key)  # the answer to an earlier sending of this id: the ledger gives it again
        with self._lock:
            waiting = self._waiting.setdefault(key, [])
            waiting.append(answer)
            if self._thread is None:
                # Never without any subscription: the library stops reading then, and may miss that there is one again.
                self._pubsub.subscribe(IDLE_CHANNEL)
                self._thread = threading.Thread(target=self._listen, name="creditlane answers", daemon=True)
                self._thread.start()
            if len(waiting) == 1:
                self._pubsub.subscribe(key)
        try:
            yield answer
        finally:
            with self._lock:
                waiting.remove(answer)
                if not waiting:
                    del self._waiting[key]
                    self._unsubscribe(key)

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(2 * POLL_SECONDS)
        self._pubsub.close()
        self._client.close()

    def _unsubscribe(self, key: str) -> None:
        try:
            self._pubsub.unsubscribe(key)
        except redis.RedisError:
            pass  # the connection is gone, and its subscriptions with it

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
            except (redis.RedisError, OSError):
                # Whoever waits has a time limit of its own; the next read connects and subscribes anew.
                self._closed.wait(RECONNECT_SECONDS)

    def _resolve(self, key: str, data: bytes) -> None:
        with self._lock:
            for answer in self._waiting.get(key, ()):
                if not answer.done():
                    answer.set_result(data)
