"""Sending to the broker, confirmed: what was sent has arrived, or an error says that it may not have.

One interface over both brokers. On Redis a block of messages is one pipeline, on RabbitMQ one wait for the publisher
confirms of all. A block whose connection broke is sent again whole, in order: receivers know each message by its id.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakSet

import amqp
from kombu import Connection, Exchange
from kombu.connection import ConnectionPool
from kombu.exceptions import KombuError
from kombu.pools import ProducerPool
from redis.exceptions import RedisError

from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import PREFIX
from creditlane.rabbitmq import (
    LANES_EXCHANGE,
    Confirms,
    NackedError,
    UnconfirmedError,
    UnroutableError,
    connect,
    declare_exchange,
    declare_lane,
    is_rabbitmq,
)
from creditlane.tls import TLSOptions, tls_options

CONNECTIONS = 10
"""Broker connections that one sender opens at the most."""

ACQUIRE_SECONDS = 30
"""How long a thread waits for one of them."""

RETRIES = {"max_retries": 5, "interval_start": 0.05, "interval_step": 0.2, "interval_max": 1.0}
"""How long a broker that is away is tried: six attempts within about three seconds."""

CONNECT_SECONDS = 5
"""How long a broker may take to accept a connection."""

READ_SECONDS = 30
"""How long it may take for anything else."""

SHORT_BYTES = 255
"""The longest property that AMQP has room for; an operation id may be twice as long."""

JSON = "application/json"

FINAL = (UnconfirmedError, UnroutableError, amqp.IrrecoverableChannelError)
"""What trying again at once does not mend. (A queue that refuses may: it does so while it begins.)"""


class Outgoing(NamedTuple):
    """One message on its way."""

    queue: str
    """The queue; for an exchange, the routing key."""
    body: bytes
    """JSON in UTF-8, unless ``content_type`` says otherwise."""
    headers: dict[str, Any]
    """``id`` among them names the message, and is its correlation id as well."""
    exchange: str = ""
    """A topic exchange; without it the message goes to its queue."""
    reply_to: str | None = None
    """The queue that the answer is to go to, where answers travel by queue."""
    content_type: str = JSON
    properties: Mapping[str, Any] = MappingProxyType({})
    """Further properties."""


class Sender(ABC):
    """Sends blocks of messages. Safe to share among threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._connections = ConnectionPool(connection, limit=CONNECTIONS)
        self.errors: tuple[type[BaseException], ...] = (
            KombuError, RedisError, amqp.AMQPError, UnroutableError, NackedError, UnconfirmedError,
            *connection.connection_errors, *connection.channel_errors,
        )  # fmt: skip
        """What goes wrong when the broker is away, or refuses."""

    def send(self, messages: Sequence[Outgoing], retry: bool = True) -> None:
        """Send messages in order; return when the broker has confirmed them all.

        :param retry: try a broker that is away for about three seconds.
        :raises BrokerUnavailableError: when they are not all confirmed; some may have arrived.
        """
        if not messages:
            return
        first = messages[0]
        name = first.headers.get("id") or f"a message for {first.queue}"
        what = repr(name) if len(messages) == 1 else f"{len(messages)} messages"
        with self._unavailable(f"did not confirm {what}", "send it again, with its id"):
            self._send(messages, retry)

    @abstractmethod
    def _send(self, messages: Sequence[Outgoing], retry: bool) -> None:
        """Send messages, raising what the broker's library raises."""

    @abstractmethod
    def _depth(self, queue: str) -> int:
        """How many messages wait in a queue, raising what the broker's library raises."""

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue; 0 for one that nothing was ever sent to.

        :raises BrokerUnavailableError: when the broker is away.
        """
        with self._unavailable(f"does not tell what waits in {queue}", "ask again later"):
            return self._depth(queue)

    def close(self) -> None:
        """Close the connections; everything that was sent stays sent."""
        self._connections.force_close_all()
        self._connection.release()

    @contextmanager
    def _unavailable(self, what: str, advice: str) -> Iterator[None]:
        try:
            yield
        except self.errors as error:
            raise BrokerUnavailableError(f"the broker {what} ({type(error).__name__}: {error}); {advice}") from error


class RedisSender(Sender):
    """Sends over Redis.

    :param url: ``redis://…`` or ``rediss://…``.
    :param tls: its TLS options.
    :param patience_seconds: how long the broker may take for anything; :data:`READ_SECONDS` unless given.
    """

    def __init__(self, url: str, tls: TLSOptions = None, patience_seconds: float | None = None) -> None:
        patience = READ_SECONDS if patience_seconds is None else patience_seconds
        options = {
            "socket_keepalive": True,
            "socket_connect_timeout": min(CONNECT_SECONDS, patience),
            "socket_timeout": patience,
        }
        super().__init__(
            Connection(
                url,
                transport="creditlane.redis_transport:Transport",
                transport_options=options,
                ssl=tls or False,
            )
        )
        self._producers = ProducerPool(self._connections, limit=CONNECTIONS)

    def close(self) -> None:
        """Close the connections; everything that was sent stays sent."""
        self._producers.force_close_all()
        super().close()

    def _send(self, messages: Sequence[Outgoing], retry: bool) -> None:
        with self._producers.acquire(block=True, timeout=ACQUIRE_SECONDS) as producer:
            if len(messages) == 1:
                _publish(producer, messages[0], retry)
                return
            with producer.batch(max_size=len(messages)):
                for message in messages:
                    _publish(producer, message, retry)

    def _depth(self, queue: str) -> int:
        with self._producers.acquire(block=True, timeout=ACQUIRE_SECONDS) as producer:
            try:
                return int(producer.channel.queue_declare(queue=queue, passive=True).message_count)
            except self._connection.channel_errors:
                return 0


def _publish(producer: Any, message: Outgoing, retry: bool) -> None:
    exchange: Exchange | str = Exchange(message.exchange, type="topic") if message.exchange else ""
    producer.publish(
        message.body,
        exchange=exchange,
        declare=[exchange] if exchange else [],
        routing_key=message.queue,
        headers=message.headers,
        content_type=message.content_type,
        content_encoding="utf-8",
        delivery_mode=2,
        retry=retry,
        retry_policy=RETRIES,
        **_properties(message),
    )


def _properties(message: Outgoing) -> dict[str, Any]:
    properties = {"timestamp": int(time.time()), **message.properties}
    name = message.headers.get("id")
    if name is not None and len(name.encode()) <= SHORT_BYTES:
        properties.setdefault("correlation_id", name)  # a longer one is in the headers alone
    if message.reply_to is not None:
        properties["reply_to"] = message.reply_to
    return properties


class RabbitSender(Sender):
    """Sends over RabbitMQ.

    A lane that does not exist yet is declared, where the user may; a producer that may only publish is told to have a
    worker started first. What the broker refuses of a block is sent again after the rest of it. A forked process makes
    connections of its own, and leaves its parent's alone.

    :param url: ``amqp://…`` or ``amqps://…``.
    :param tls: its TLS options.
    :param patience_seconds: how long the broker may take for anything; :data:`READ_SECONDS` unless given.
    """

    def __init__(self, url: str, tls: TLSOptions = None, patience_seconds: float | None = None) -> None:
        patience = READ_SECONDS if patience_seconds is None else patience_seconds
        options = {"read_timeout": patience, "write_timeout": patience}
        connect_seconds = min(CONNECT_SECONDS, patience)
        super().__init__(Connection(url, connect_timeout=connect_seconds, transport_options=options, ssl=tls or False))
        self._patience_seconds = patience_seconds
        self._begin()
        _senders.add(self)

    def _begin(self) -> None:
        self._confirms: dict[Connection, Confirms] = {}
        self._declared: set[str] = set()
        self._opened: WeakSet[amqp.Connection] = WeakSet()

    def forked(self) -> None:
        """Forget the parent's connections. py-amqp ends the parent's, too, when it closes one."""
        for connection in self._opened:
            transport = connection.transport
            if transport is not None and transport.sock is not None:
                transport.sock.close()
                transport.sock, transport.connected = None, False
        self._connections = ConnectionPool(self._connection, limit=CONNECTIONS)
        self._begin()

    def _send(self, messages: Sequence[Outgoing], retry: bool) -> None:
        left = list(messages)

        def send(connection: Connection) -> None:
            try:
                self._send_block(connection, left)
            except UnroutableError as error:
                # Only what came back is missing: the others arrived, and are known by their ids.
                left[:] = [message for message in left if message.queue in error.queues]
                self._declare(connection, error.queues)
                self._send_block(connection, left)

        self._over_connection(send, retry)

    def _depth(self, queue: str) -> int:
        found = 0

        def look(connection: Connection) -> None:
            nonlocal found
            # A channel of its own: the server closes one that asks for a queue that is not there.
            with connection.channel() as channel:
                try:
                    found = int(channel.queue_declare(queue, passive=True).message_count)
                except amqp.NotFound:
                    found = 0

        self._over_connection(look, retry=True)
        return found

    def _over_connection(self, step: Callable[[Connection], None], retry: bool) -> None:
        """Run a step over a connection that stands, again over a new one if it falls."""
        attempts = int(RETRIES["max_retries"]) if retry else 0
        pause = RETRIES["interval_start"]
        with self._connections.acquire(block=True, timeout=ACQUIRE_SECONDS) as connection:
            while True:
                kept = connection.connected
                try:
                    if not kept:
                        connection.collect()
                        connect(connection)
                        self._opened.add(connection.connection)
                    step(connection)
                    return
                except self.errors as error:
                    # Whatever it was, what the channel has heard and not heard is known no longer.
                    self._confirms.pop(connection, None)
                    self._declared.clear()
                    connection.collect()
                    if isinstance(error, FINAL):
                        raise
                    if kept:
                        continue  # it may have been dead for long, which says nothing of the broker
                    if not attempts or isinstance(error, TimeoutError):
                        raise
                attempts -= 1
                time.sleep(pause)
                pause = min(pause + RETRIES["interval_step"], RETRIES["interval_max"])

    def _send_block(self, connection: Connection, messages: list[Outgoing]) -> None:
        """Send messages and wait for their confirms; of those that are refused the list is what is left to do."""
        confirms = self._confirms.get(connection)
        if confirms is None:
            self._need_exchange(connection, [message.queue for message in messages])
            confirms = self._confirms[connection] = Confirms(connection.default_channel, self._patience_seconds)
        tags = []
        for message in messages:
            if message.exchange and message.exchange not in self._declared:
                confirms.channel.exchange_declare(message.exchange, "topic", durable=True, auto_delete=False)
                self._declared.add(message.exchange)
            tags.append(
                confirms.publish(
                    amqp.Message(
                        message.body,
                        content_type=message.content_type,
                        content_encoding="utf-8",
                        delivery_mode=2,
                        application_headers=message.headers,
                        **_properties(message),
                    ),
                    message.exchange or LANES_EXCHANGE,
                    message.queue,
                )
            )
        try:
            confirms.wait()
        except NackedError as error:
            missing = {tag for tag, message in zip(tags, messages, strict=True) if message.queue in error.returned}
            missing |= error.tags
            messages[:] = [message for tag, message in zip(tags, messages, strict=True) if tag in missing]
            raise

    def _need_exchange(self, connection: Connection, queues: Sequence[str]) -> None:
        """Have the lanes' exchange, where nothing was ever sent or consumed before.

        :raises UnroutableError: for a user who may not make it; nothing was sent.
        """
        with connection.channel() as channel:
            try:
                channel.exchange_declare(LANES_EXCHANGE, "direct", passive=True)
                return
            except amqp.NotFound:
                pass
        with connection.channel() as channel:
            try:
                declare_exchange(channel)
            except amqp.AccessRefused:
                raise UnroutableError(sorted(set(queues))) from None

    def _declare(self, connection: Connection, queues: Sequence[str]) -> None:
        """Make lanes that are not there.

        :raises UnroutableError: for a queue that is no lane, and for a user who may not.
        """
        if not all(queue.startswith(PREFIX) for queue in queues):
            raise UnroutableError(queues, "; the worker that serves it makes it")
        try:
            with connection.channel() as channel:
                for lane in queues:
                    declare_lane(channel, lane)
        except amqp.AccessRefused:
            raise UnroutableError(queues, ", and this user may not make it: start a lane worker first") from None


_senders: WeakSet[RabbitSender] = WeakSet()


def _forked() -> None:
    for sender in list(_senders):
        sender.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def make_sender(broker_url: str, tls: TLSOptions = None, patience_seconds: float | None = None) -> Sender:
    """A sender for the broker at a URL: ``redis://…``, ``rediss://…``, ``amqp://…`` or ``amqps://…``.

    :param tls: what :func:`creditlane.tls.tls_options` gives for it; by itself it trusts whom the system trusts.
    :param patience_seconds: how long the broker may take for anything, such as to confirm a block.
    """
    options = tls_options(broker_url) if tls is None else tls
    kind = RabbitSender if is_rabbitmq(broker_url) else RedisSender
    return kind(broker_url, options, patience_seconds)
