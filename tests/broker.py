"""The brokers as tests see them from outside: where one is, what stands in it, and how to make trouble in it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from contextlib import closing
from typing import Any
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
    def remove(self) -> None:
        """Delete everything in it."""


class RedisBroker(Broker):
    """One database of a Redis."""

    kind = "redis"

    def __init__(self, server: Redis) -> None:
        self.url = server.url_of(next(_numbers) % 15 + 1)
        self.remove()

    def push(self, lane: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Push bytes as they are: kombu's envelope would be part of them."""
        with redis.Redis.from_url(self.url) as store:
            store.lpush(lane, body)

    def cut(self) -> None:
        """Among them those that wait for messages, and those that are about to acknowledge."""
        with redis.Redis.from_url(self.url) as store:
            store.client_kill_filter(_type="normal", skipme=True)

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

    def push(self, lane: str, body: bytes, headers: dict[str, Any] | None = None) -> None:
        """Publish a body with no properties but these headers."""
        with closing(self.connect()) as connection:
            channel = connection.channel()
            declare_lane(channel, lane)
            channel.confirm_select()
            channel.basic_publish_confirm(amqp.Message(body, application_headers=headers or {}), "", lane)

    def cut(self) -> None:
        """By the server, as an operator would."""
        for connection in self.server.manage("GET", f"/api/vhosts/{quote(self.vhost, safe='')}/connections"):
            name = quote(connection["name"], safe="")
            self.server.manage("DELETE", f"/api/connections/{name}", missing_ok=True)

    def remove(self) -> None:
        """Delete the virtual host."""
        self.server.delete_vhost(self.vhost)

    def connect(self) -> Any:
        """A plain connection."""
        found = urlsplit(self.url)
        connection = amqp.Connection(
            f"{found.hostname}:{found.port}", found.username, found.password, virtual_host=self.vhost
        )
        connection.connect()
        return connection
