"""How the lanes stand: what waits in the broker, and who owns what in the database."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import msgspec
import redis
from psycopg import Connection

from creditlane.lanes import lane_name
from creditlane.rabbitmq import DEAD, is_rabbitmq
from creditlane.sending import make_sender
from creditlane.tls import TLSOptions
from models.reading import Owner, lane_owners
from workers.ownership import LANE_CLASS, PRESENCE_CLASS
from workers.redis_lanes import keys_of

MAX_LANES = 4096
"""Lanes that one look takes in at the most."""

LOOK = """
-- KEYS: for each lane: the lane, its unacked list. Returns for each: ready, unacknowledged, when the oldest was sent.
-- A message ends with its properties; if its sender put a timestamp there (seconds), it is found near the end.
local found = {}
for i = 1, #KEYS / 2 do
    local lane, sent = KEYS[2 * i - 1], false
    local ready = redis.call('LLEN', lane)
    if ready > 0 then
        sent = string.match(string.sub(redis.call('LINDEX', lane, -1), -2048), '"timestamp": ?(%d+)') or false
    end
    found[i] = {ready, redis.call('LLEN', KEYS[2 * i]), sent}
end
return found
"""


class LaneState(msgspec.Struct, kw_only=True, frozen=True):
    """One lane at this moment."""

    lane: str
    ready: int
    """Messages that wait."""
    unacknowledged: int | None
    """Messages that its owner took and has not finished; None where the broker does not tell."""
    lag_seconds: float | None
    """The age of the oldest message that waits; None when none does, when its sender put no time on it, and where the
    broker does not show a message without delivering it."""
    owner: Owner | None


class LaneStates(msgspec.Struct, kw_only=True, frozen=True):
    """All lanes at this moment."""

    workers: int
    lanes: list[LaneState]
    dead: int = 0
    """Messages that RabbitMQ gave up delivering: they are in its queue ``lanes.dead``."""


Depth = tuple[int, int | None, float | None]
"""Messages that wait in a lane, those taken and not finished, and when the oldest was sent."""


def lane_states(connection: Connection[Any], broker_url: str, lanes: int, tls: TLSOptions = None) -> LaneStates:
    """Look at all lanes: on Redis in one round trip, on RabbitMQ in one for each.

    :param broker_url: ``redis://…`` or ``amqp://…``.
    :param lanes: how many lanes the deployment has, at most :data:`MAX_LANES`.
    :param tls: the TLS options of a connection to the broker.
    :raises redis.RedisError: when a Redis is away, ``BrokerUnavailableError`` when a RabbitMQ is, ``psycopg.Error``
        when the database is.
    """
    if not 1 <= lanes <= MAX_LANES:
        raise ValueError(f"there are 1 to {MAX_LANES} lanes, not {lanes}")
    names = [lane_name(number) for number in range(lanes)]
    dead = 0
    if is_rabbitmq(broker_url):
        with closing(make_sender(broker_url, tls)) as sender:
            depths: list[Depth] = [(sender.depth(name), None, None) for name in names]
            dead = sender.depth(DEAD)
    else:
        depths = _redis_depths(broker_url, names, tls)
    now = time.time()
    owned = lane_owners(connection, LANE_CLASS, PRESENCE_CLASS)
    return LaneStates(
        workers=owned.workers,
        lanes=[
            LaneState(
                lane=name,
                ready=ready,
                unacknowledged=unacknowledged,
                lag_seconds=None if sent is None else max(0.0, round(now - sent, 3)),
                owner=owned.owners.get(number),
            )
            for number, (name, (ready, unacknowledged, sent)) in enumerate(zip(names, depths, strict=True))
        ],
        dead=dead,
    )


def _redis_depths(url: str, names: Sequence[str], tls: TLSOptions) -> list[Depth]:
    with closing(redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5, **(tls or {}))) as client:
        keys = [key for name in names for key in keys_of(name)[:2]]
        found: Any = client.eval(LOOK, len(keys), *keys)
    return [(ready, unacknowledged, None if sent is None else int(sent)) for ready, unacknowledged, sent in found]
