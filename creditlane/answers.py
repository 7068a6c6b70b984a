"""Waiting for answers: one connection listens for all threads of a client.

On Redis a worker writes an answer under a key of its own and announces it on the channel of the same name. Whoever
waits subscribes first and sends after; when the subscription is confirmed the key is read once as well, so an answer
that was quicker than the subscription is not missed, and neither is one that came while the connection was down.

On RabbitMQ a client has a queue of its own that ends with its connection, and each message names it. An answer that
was on its way when the connection broke is lost: whoever waited asks again, with the same id.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import amqp
import msgspec
import redis
from kombu import Connection

from creditlane.errors import BrokerUnavailableError
from creditlane.rabbitmq import connect, is_rabbitmq
from creditlane.tls import TLSOptions, tls_options

KEY = "celery-task-meta-"
"""What Celery's result backends put before an id."""

IDLE_CHANNEL = "creditlane.answers"
"""Subscribed to all the time; nothing is ever sent there."""

POLL_SECONDS = 1.0
"""How often the listener looks whether it is still wanted."""

RECONNECT_SECONDS = 0.2

HEARTBEAT_SECONDS = 30
"""After two of them without a word the broker is taken for gone."""

CONNECT_SECONDS = 5
"""How long a client's queue for answers may take to be there."""

READY = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
"""The states in which a task is done; those before it, such as that it has started, are no answer."""


class Outcome(msgspec.Struct):
    """A result as Celery's backends keep it."""

    status: str
    result: Any = None


Answer = Future[Outcome]
_decode = msgspec.json.Decoder(Outcome).decode


def _deaf(fault: BaseException | None) -> BrokerUnavailableError:
    why = "no word of the broker yet" if fault is None else f"{type(fault).__name__}: {fault}"
    return BrokerUnavailableError(f"no answer can be waited for ({why}); nothing was sent, send it again")


class Expected(NamedTuple):
    """What is waited for."""

    answer: Answer
    reply_to: str | None = None
    """The queue that it comes through, where answers travel by queue: the message names it."""


class Answers(ABC):
    """The answers to one client's messages. Safe to share among threads."""

    def __init__(self) -> None:
        self._waiting: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: int | None = None

    @abstractmethod
    @contextmanager
    def expect(self, id: str) -> Iterator[Expected]:
        """Listen for the answer that comes under ``id`` while the block sends and waits.

        :param id: unlike any other's: what is waited for is removed when the block ends.
        :raises BrokerUnavailableError: when nothing can be listened to.
        """
        yield NotImplemented

    @abstractmethod
    def close(self) -> None:
        """Stop listening."""

    def _listening(self) -> bool:
        """Whether this process has a listening thread; a fork inherits none."""
        return self._process == os.getpid() and self._thread is not None and self._thread.is_alive()

    def _start(self, listen: Any) -> None:
        self._process = os.getpid()
        self._thread = threading.Thread(target=listen, name="creditlane answers", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(2 * POLL_SECONDS)

    def _resolve(self, key: str, data: bytes) -> None:
        outcome = _decode(data)
        with self._lock:
            answer = self._waiting.get(key)
            if answer is not None and outcome.status in READY and not answer.done():
                answer.set_result(outcome)


class RedisAnswers(Answers):
    """Answers from a Redis result backend.

    :param url: the result backend.
    :param tls: its TLS options.
    """

    def __init__(self, url: str, tls: TLSOptions = None) -> None:
        super().__init__()
        self._url = url
        self._tls = tls or {}
        self._client = self._connect()
        self._pubsub = self._client.pubsub()

    @contextmanager
    def expect(self, id: str) -> Iterator[Expected]:
        """Subscribe to the answer's key while the block sends and waits."""
        key = KEY + id
        answer: Answer = Future()
        try:
            with self._lock:
                self._waiting[key] = answer
                try:
                    self._begin()
                    self._pubsub.subscribe(key)
                except redis.RedisError as error:
                    raise _deaf(error) from error
            yield Expected(answer)
        finally:
            with self._lock:
                del self._waiting[key]
                try:
                    self._pubsub.unsubscribe(key)
                    self._client.unlink(key)
                except redis.RedisError:
                    pass  # the connection is gone, and its subscriptions with it; the key has a time limit

    def _begin(self) -> None:
        """Have a listening thread in this process."""
        if self._listening():
            return
        if self._process not in (None, os.getpid()):
            self._client = self._connect()
            self._pubsub = self._client.pubsub()
        # Never without any subscription: the library stops reading then, and may miss that there is one again.
        self._pubsub.subscribe(IDLE_CHANNEL)
        self._start(self._listen)

    def _connect(self) -> Any:
        return redis.Redis.from_url(
            self._url,
            socket_keepalive=True,
            socket_connect_timeout=5,
            socket_timeout=30,
            health_check_interval=25,
            **self._tls,
        )

    def close(self) -> None:
        """Stop listening."""
        self._end()
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


class RabbitAnswers(Answers):
    """Answers through a queue that only this client can read, and that ends with its connection.

    :param url: the broker.
    :param tls: its TLS options.
    """

    def __init__(self, url: str, tls: TLSOptions = None) -> None:
        super().__init__()
        self._url = url
        self._tls = tls
        self._queue: str | None = None
        self._ready = threading.Condition(self._lock)
        self._fault: BaseException | None = None

    @contextmanager
    def expect(self, id: str) -> Iterator[Expected]:
        """Have the client's queue, and note who waits, while the block sends and waits."""
        answer: Answer = Future()
        with self._ready:
            if not self._listening():
                self._queue = self._fault = None
                self._start(self._listen)
            # A broker that is away is tried for a while, as it is by what sends.
            self._ready.wait_for(lambda: self._queue is not None, CONNECT_SECONDS)
            if self._queue is None:
                raise _deaf(self._fault)
            self._waiting[id] = answer
            queue = self._queue
        try:
            yield Expected(answer, queue)
        finally:
            with self._lock:
                del self._waiting[id]

    def close(self) -> None:
        """Stop listening; the queue ends."""
        self._end()

    def _listen(self) -> None:
        while not self._closed.is_set():
            connection = Connection(
                self._url,
                connect_timeout=CONNECT_SECONDS,
                heartbeat=HEARTBEAT_SECONDS,
                transport_options={"read_timeout": CONNECT_SECONDS, "write_timeout": CONNECT_SECONDS},
                ssl=self._tls or False,
            )
            try:
                connect(connection)
                self._read(connection)
            except Exception as error:
                # Whoever waits has a time limit of its own.
                with self._ready:
                    self._queue, self._fault = None, error
                    self._ready.notify_all()
                self._closed.wait(RECONNECT_SECONDS)
            finally:
                connection.release()

    def _read(self, connection: Connection) -> None:
        channel = connection.default_channel
        queue = channel.queue_declare("", exclusive=True, auto_delete=True).queue
        channel.basic_consume(queue, no_ack=True, callback=self._received)
        with self._ready:
            self._queue, self._fault = queue, None
            self._ready.notify_all()
        while not self._closed.is_set():
            try:
                connection.drain_events(timeout=POLL_SECONDS)
            except TimeoutError:
                pass
            # Between answers, too: the broker hears nothing else of us.
            connection.heartbeat_check()

    def _received(self, message: amqp.Message) -> None:
        body = message.body
        try:
            self._resolve(
                str(message.properties.get("correlation_id")), body.encode() if isinstance(body, str) else bytes(body)
            )
        except msgspec.MsgspecError:
            return  # nothing of ours


def make_answers(url: str, tls: TLSOptions = None) -> Answers:
    """The answers that come from a result backend: a Redis, or RabbitMQ.

    :param tls: what :func:`creditlane.tls.tls_options` gives for it; by itself it trusts whom the system trusts.
    """
    options = tls_options(url) if tls is None else tls
    return RabbitAnswers(url, options) if is_rabbitmq(url) else RedisAnswers(url, options)
