"""kombu's Redis transport for producers: one Redis client per channel, where kombu makes one per message."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as kombu_redis


class Channel(kombu_redis.Channel):
    """A channel that publishes through one client; its connections come from the channel's pool as before."""

    _publisher: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._publisher is None or self._publisher.connection_pool is not self.pool:
            self._publisher = super()._create_client()
        return self._publisher


class Transport(kombu_redis.Transport):
    """The Redis transport with that channel."""

    Channel = Channel
