"""Sending to the broker, confirmed: what was sent has arrived, or an error says that it may not have.

One interface over both brokers. On Redis a block of messages is one pipeline, on RabbitMQ one wait for the publisher
confirms of all. A block whose connection broke is sent again whole, in order: receivers know each message by its id.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4
from weakref import WeakSet

import amqp
import msgspec
import redis
from kombu import Connection
from kombu.connection import ConnectionPool
from kombu.exceptions import KombuError
from kombu.transport.redis import Channel as RedisChannel
from kombu.transport.virtual.exchange import TopicExchange
from redis.connection import parse_url
from redis.exceptions import NoPermissionError

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

FORBIDDEN = ", and this user may not make it: start a lane worker first"
"""What is said of a lane that is not there to a producer that may only publish."""

_TOPIC = TopicExchange(None)
_encode = msgspec.json.Encoder().encode


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
    """Sends blocks of messages. Safe to share among threads; a forked process makes connections of its own."""

    errors: tuple[type[BaseException], ...]
    """What goes wrong when the broker is away, or refuses."""
    final: tuple[type[BaseException], ...]
    """What of it trying again at once does not mend."""
    timeouts: tuple[type[BaseException], ...]
    """What of it has taken all the time there is."""

    def __init__(self) -> None:
        _senders.add(self)

    def send(self, messages: Sequence[Outgoing], retry: bool = True) -> None:
        """Send messages in order; return when the broker has confirmed them all.

        :param retry: try a broker that is away for about three seconds.
        :raises BrokerUnavailableError: when they are not all confirmed; some may have arrived.
        """
        if not messages:
            return
        try:
            self._send(messages, retry)
        except self.errors as error:
            name = messages[0].headers.get("id") or f"a message for {messages[0].queue}"
            what = repr(name) if len(messages) == 1 else f"{len(messages)} messages"
            raise _unavailable(f"did not confirm {what}", "send it again, with its id", error) from error

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue; 0 for one that nothing was ever sent to.

        :raises BrokerUnavailableError: when the broker is away.
        """
        try:
            return self._depth(queue)
        except self.errors as error:
            raise _unavailable(f"does not tell what waits in {queue}", "ask again later", error) from error

    @abstractmethod
    def close(self) -> None:
        """Close the connections; everything that was sent stays sent."""

    @abstractmethod
    def forked(self) -> None:
        """Forget the parent's connections, and leave them alone."""

    @abstractmethod
    def _send(self, messages: Sequence[Outgoing], retry: bool) -> None:
        """Send messages, raising what the broker's library raises."""

    @abstractmethod
    def _depth(self, queue: str) -> int:
        """How many messages wait in a queue, raising what the broker's library raises."""

    @abstractmethod
    def _open(self, connection: Any) -> None:
        """Connect a connection that does not stand."""

    @abstractmethod
    def _drop(self, connection: Any) -> None:
        """Close a connection of which nobody knows any longer what it has heard; it may be opened again."""

    def _over(self, connection: Any, kept: bool, step: Callable[[Any], None], retry: bool) -> None:
        """Run a step over a connection, again over a new one if it falls.

        :param kept: whether it stands since an earlier step.
        """
        attempts = int(RETRIES["max_retries"]) if retry else 0
        pause = RETRIES["interval_start"]
        while True:
            try:
                if not kept:
                    self._open(connection)
                step(connection)
                return
            except self.errors as error:
                self._drop(connection)
                if isinstance(error, self.final):
                    raise
                if kept:
                    kept = False
                    continue  # it may have been dead for long, which says nothing of the broker
                if not attempts or isinstance(error, self.timeouts):
                    raise
            except BaseException:
                self._drop(connection)  # in the middle of something
                raise
            attempts -= 1
            time.sleep(pause)
            pause = min(pause + RETRIES["interval_step"], RETRIES["interval_max"])


def _unavailable(what: str, advice: str, error: BaseException) -> BrokerUnavailableError:
    return BrokerUnavailableError(f"the broker {what} ({type(error).__name__}: {error}); {advice}")


class RedisSender(Sender):
    """Sends over Redis, as kombu does: a queue is a list, a message the JSON of its body, headers and properties.

    A block is one ``LPUSH`` for each queue, all in one round trip; what of it the server refuses is sent again.

    :param url: ``redis://…`` or ``rediss://…``.
    :param tls: its TLS options.
    :param patience_seconds: how long the broker may take for anything; :data:`READ_SECONDS` unless given.
    """

    errors = (redis.RedisError, OSError)
    final = (redis.AuthenticationError, NoPermissionError)
    timeouts = (redis.TimeoutError,)

    def __init__(self, url: str, tls: TLSOptions = None, patience_seconds: float | None = None) -> None:
        patience = READ_SECONDS if patience_seconds is None else patience_seconds
        self._options = {
            "socket_keepalive": True,
            "socket_connect_timeout": min(CONNECT_SECONDS, patience),
            "socket_timeout": patience,
            **parse_url(url),  # type: ignore[no-untyped-call]
            **(tls or {}),
        }
        if "db" not in self._options and urlsplit(url).path.strip("/") and "path" not in self._options:
            raise ValueError(f"the database of a Redis URL is a number, not {urlsplit(url).path.strip('/')!r}")
        self._kind = self._options.pop("connection_class", redis.Connection)
        self._closed = False
        self.forked()
        super().__init__()

    def forked(self) -> None:
        """Forget the parent's connections, and leave them alone: closed by a child, they stay open to the parent."""
        self._idle: list[Any] = []
        self._room = threading.Semaphore(CONNECTIONS)
        # A message has to have a name of its own for consumers that note by it what they have in hand.
        self._name = uuid4().hex
        self._numbers = count()

    def close(self) -> None:
        """Close the connections; everything that was sent stays sent."""
        self._closed = True
        while self._idle:
            self._idle.pop().disconnect()

    def _send(self, messages: Sequence[Outgoing], retry: bool) -> None:
        left: list[tuple[str, list[bytes]]] = []

        def push(connection: Any) -> None:
            if not left:
                left.extend(self._routed(connection, messages).items())
            connection.send_packed_command([b"".join(_push(queue, payloads) for queue, payloads in left)])
            refused, error = [], None
            for command in left:
                try:
                    connection.read_response()
                except redis.ResponseError as refusal:
                    error = refusal
                    refused.append(command)
            if error is not None:
                left[:] = refused
                raise error

        self._over_connection(push, retry)

    def _depth(self, queue: str) -> int:
        found = 0

        def look(connection: Any) -> None:
            nonlocal found
            connection.send_command("LLEN", queue)
            found = int(connection.read_response())

        self._over_connection(look, retry=True)
        return found

    def _over_connection(self, step: Callable[[Any], None], retry: bool) -> None:
        room = self._room
        if not room.acquire(timeout=ACQUIRE_SECONDS):
            raise redis.ConnectionError(f"{CONNECTIONS} connections are in use for {ACQUIRE_SECONDS} s")
        try:
            try:
                connection, kept = self._idle.pop(), True
            except IndexError:
                connection, kept = self._kind(**self._options), False
            self._over(connection, kept, step, retry)
            if self._closed:
                connection.disconnect()
            else:
                self._idle.append(connection)
        finally:
            room.release()

    def _open(self, connection: Any) -> None:
        connection.connect()

    def _drop(self, connection: Any) -> None:
        connection.disconnect()

    def _routed(self, connection: Any, messages: Sequence[Outgoing]) -> dict[str, list[bytes]]:
        """What goes into each list, in order."""
        lists: dict[str, list[bytes]] = {}
        bindings: dict[str, list[tuple[str, str, str]]] = {}
        for message in messages:
            queues: Iterable[str] = (message.queue,)
            if message.exchange:
                if message.exchange not in bindings:
                    bindings[message.exchange] = self._bindings(connection, message.exchange)
                queues = _TOPIC.lookup(bindings[message.exchange], message.exchange, message.queue, None)
            payload = self._encoded(message) if queues else b""
            for queue in queues:
                lists.setdefault(queue, []).append(payload)
        return lists

    def _bindings(self, connection: Any, exchange: str) -> list[tuple[str, str, str]]:
        """Who listens to an exchange, as kombu notes it: routing key, pattern and queue of each."""
        connection.send_command("SMEMBERS", RedisChannel.keyprefix_queue % exchange)
        members = connection.read_response()
        return [tuple(member.decode().split(RedisChannel.sep)) for member in members]

    def _encoded(self, message: Outgoing) -> bytes:
        """A message as kombu has it in a list; the properties stand last."""
        return _encode(
            {
                "body": message.body,  # becomes base64
                "content-encoding": "utf-8",
                "content-type": message.content_type,
                "headers": message.headers,
                "properties": {
                    "delivery_mode": 2,
                    "delivery_info": {"exchange": message.exchange, "routing_key": message.queue},
                    "priority": 0,
                    "body_encoding": "base64",
                    "delivery_tag": f"{self._name}-{next(self._numbers)}",
                    **_properties(message),
                },
            }
        )


def _push(queue: str, payloads: Sequence[bytes]) -> bytes:
    """The command that puts messages into a list, as Redis reads it."""
    key = queue.encode()
    parts = [b"*%d\r\n$5\r\nLPUSH\r\n$%d\r\n%b\r\n" % (len(payloads) + 2, len(key), key)]
    parts += [b"$%d\r\n%b\r\n" % (len(payload), payload) for payload in payloads]
    return b"".join(parts)


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

    final = (UnconfirmedError, UnroutableError, amqp.IrrecoverableChannelError)  # a queue that refuses may just begin
    timeouts = (TimeoutError,)

    def __init__(self, url: str, tls: TLSOptions = None, patience_seconds: float | None = None) -> None:
        patience = READ_SECONDS if patience_seconds is None else patience_seconds
        options = {"read_timeout": patience, "write_timeout": patience}
        connect_seconds = min(CONNECT_SECONDS, patience)
        self._connection = Connection(url, connect_timeout=connect_seconds, transport_options=options, ssl=tls or False)
        self.errors = (
            KombuError, amqp.AMQPError, UnroutableError, NackedError, UnconfirmedError,
            *self._connection.connection_errors, *self._connection.channel_errors,
        )  # fmt: skip
        self._connections = ConnectionPool(self._connection, limit=CONNECTIONS)
        self._patience_seconds = patience_seconds
        self._begin()
        super().__init__()

    def close(self) -> None:
        """Close the connections; everything that was sent stays sent."""
        self._connections.force_close_all()
        self._connection.release()

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
            self._begin_lanes(connection, left)
            self._send_made(connection, left)

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
        with self._connections.acquire(block=True, timeout=ACQUIRE_SECONDS) as connection:
            self._over(connection, connection.connected, step, retry)

    def _open(self, connection: Any) -> None:
        connection.collect()
        connect(connection)
        self._opened.add(connection.connection)

    def _drop(self, connection: Any) -> None:
        self._confirms.pop(connection, None)
        self._declared.clear()
        connection.collect()

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
                raise UnroutableError(sorted(set(queues)), FORBIDDEN) from None

    def _begin_lanes(self, connection: Connection, left: list[Outgoing]) -> None:
        """Send the first message of each lane that nothing was sent to before, by itself, and take it out of the list.

        Only when it has arrived is the lane known to be there *and bound*: one that somebody is making at this moment
        would give the beginning of a block back and take its end.
        """
        firsts: dict[str, Outgoing] = {}
        for message in left:
            if not message.exchange and message.queue.startswith(PREFIX) and message.queue not in self._declared:
                firsts.setdefault(message.queue, message)
        if not firsts:
            return
        waiting = list(firsts.values())
        try:
            self._send_made(connection, waiting)
            waiting.clear()
        finally:
            refused = {id(message) for message in waiting}
            arrived = {id(message) for message in firsts.values()} - refused
            left[:] = [message for message in left if id(message) not in arrived]
        self._declared.update(firsts)

    def _send_made(self, connection: Connection, messages: list[Outgoing]) -> None:
        """Send messages, and make the lanes that turn out not to be there."""
        if not messages:
            return
        try:
            self._send_block(connection, messages)
        except UnroutableError as error:
            # Only what came back is missing: the others arrived, and are known by their ids.
            messages[:] = [message for message in messages if message.queue in error.queues]
            self._declare(connection, error.queues)
            self._send_block(connection, messages)

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
            raise UnroutableError(queues, FORBIDDEN) from None


_senders: WeakSet[Sender] = WeakSet()


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
