"""The brokers as tests see them from outside: where one is, what stands in it, and how to make trouble in it."""

from __future__ import annotations

import base64
import itertools
import json
from abc import ABC, abstractmethod
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import amqp
import pytest
import redis

from creditlane.rabbitmq import declare_lane
from scripts.embedded import Redis
from scripts.rabbitmq import RabbitMQ
from workers.redis_lanes import keys_of

KINDS = ("redis", "rabbitmq")

on_both_brokers = pytest.mark.parametrize("broker_kind", KINDS, indirect=True)
"""Runs tests that use ``broker``, ``broker_url``, ``client`` or ``spawn`` on each broker; others run on Redis."""

_numbers = itertools.count(1)


class Broker(ABC):
    """An empty broker for one test."""

    kind: str
    url: str

    @abstractmethod
    def push(self, lane: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Put something into a lane that no client of ours would send."""

    @abstractmethod
    def cut(self) -> None:
        """Close everybody's connections, whatever they are doing."""

    @abstractmethod
    def messages(self, lane: str) -> list[Message]:
        """What stands in a lane, the oldest first; it stays there."""

    def has_queue(self, queue: str) -> bool:
        """Whether what is sent to a queue is kept there."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Leave what was looked at to others."""

    @abstractmethod
    def remove(self) -> None:
        """Delete everything in it."""


class Message(NamedTuple):
    """One message of a lane."""

    headers: dict[str, Any]
    body: bytes


class RedisBroker(Broker):
    """One database of a Redis."""

    kind = "redis"

    def __init__(self, server: Redis, database: int | None = None) -> None:
        """Look at a database as it is; at a new one unless it is named."""
        self.url = server.url_of(next(_numbers) % 15 + 1 if database is None else database)
        if database is None:
            self.remove()

    def push(self, lane: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Push bytes as they are: kombu's envelope would be part of them."""
        with redis.Redis.from_url(self.url) as store:
            store.lpush(lane, body)

    def cut(self) -> None:
        """Among them those that wait for messages, and those that are about to acknowledge."""
        with redis.Redis.from_url(self.url) as store:
            store.client_kill_filter(_type="normal", skipme=True)

    def messages(self, lane: str) -> list[Message]:
        """Read the list."""
        with redis.Redis.from_url(self.url) as store:
            payloads: Any = store.lrange(lane, 0, -1)
        wrappers = map(json.loads, reversed(payloads))
        return [Message(wrapper["headers"], base64.b64decode(wrapper["body"])) for wrapper in wrappers]

    def close(self) -> None:
        """Nothing is kept from others."""

    def remove(self) -> None:
        """Flush the database."""
        with redis.Redis.from_url(self.url) as store:
            store.flushdb()

    def unacknowledged(self, lane: str) -> int:
        """How many messages of a lane are taken and not acknowledged."""
        with redis.Redis.from_url(self.url) as store:
            return int(store.llen(keys_of(lane)[1]))


class RabbitBroker(Broker):
    """One virtual host of a RabbitMQ."""

    kind = "rabbitmq"

    def __init__(self, server: RabbitMQ) -> None:
        self.server = server
        self.vhost = f"test-{next(_numbers)}"
        self.url = server.create_vhost(self.vhost)
        self._reader: Any = None
        self._read: dict[str, tuple[Any, list[Message]]] = {}

    def push(self, lane: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Publish a body with no properties but these headers."""
        self.publish(lane, amqp.Message(body, application_headers=headers or {}))

    def publish(self, lane: str, *messages: amqp.Message) -> None:
        """Publish messages as they are."""
        with closing(self.connect()) as connection:
            channel = connection.channel()
            declare_lane(channel, lane)
            for message in messages:
                channel.basic_publish_confirm(message, "", lane)

    def cut(self) -> None:
        """By the server, as an operator would."""
        for connection in self.server.manage("GET", f"/api/vhosts/{quote(self.vhost, safe='')}/connections"):
            name = quote(connection["name"], safe="")
            self.server.manage("DELETE", f"/api/connections/{name}", missing_ok=True)

    def messages(self, lane: str) -> list[Message]:
        """Take what there is, as a consumer that acknowledges nothing."""
        if self._reader is None:
            self._reader = self.connect()
        if self.depth(lane) is None:
            return []
        if lane not in self._read:
            channel, found = self._reader.channel(), list[Message]()
            channel.auto_decode = False
            self._read[lane] = channel, found
            channel.basic_consume(
                lane, callback=lambda message: found.append(Message(message.headers or {}, bytes(message.body)))
            )
        while True:
            waits = self.depth(lane)
            try:
                while True:
                    self._reader.drain_events(timeout=0.05)
            except TimeoutError:
                if not waits:
                    return list(self._read[lane][1])

    def close(self) -> None:
        """What was looked at goes back to its place."""
        if self._reader is not None:
            self._reader.close()
        self._reader, self._read = None, {}

    def has_queue(self, queue: str) -> bool:
        """Whether somebody has made it: what is sent before comes back."""
        return self.depth(queue) is not None

    def depth(self, queue: str) -> int | None:
        """How many messages of a queue nobody has; None when there is no such queue."""
        with closing(self.connect()) as connection:
            try:
                return int(connection.channel().queue_declare(queue, passive=True).message_count)
            except amqp.NotFound:
                return None

    def remove(self) -> None:
        """Delete the virtual host."""
        self.close()
        self.server.delete_vhost(self.vhost)

    def connect(self) -> Any:
        """A plain connection."""
        found = urlsplit(self.url)
        connection = amqp.Connection(
            f"{found.hostname}:{found.port}", found.username, found.password, virtual_host=self.vhost
        )
        connection.connect()
        return connection
