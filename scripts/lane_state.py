"""How the lanes stand: what waits in the broker, and who owns what in the database."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import msgspec
import redis
from psycopg import Connection

from creditlane.lanes import lane_name
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
    unacknowledged: int
    """Messages that its owner took and has not finished."""
    lag_seconds: float | None
    """The age of the oldest message that waits; None when none does, or when its sender put no time on it."""
    owner: Owner | None


class LaneStates(msgspec.Struct, kw_only=True, frozen=True):
    """All lanes at this moment."""

    workers: int
    lanes: list[LaneState]


def lane_states(connection: Connection[Any], broker_url: str, lanes: int) -> LaneStates:
    """Look at all lanes, in one round trip to each server.

    :param broker_url: ``redis://…``.
    :param lanes: how many lanes the deployment has, at most :data:`MAX_LANES`.
    :raises ValueError: for a broker that is no Redis.
    :raises redis.RedisError: when the broker is away; ``psycopg.Error`` when the database is.
    """
    if not broker_url.startswith(("redis://", "rediss://")):
        raise ValueError("the lanes of a Redis broker can be looked at, others by their own tools")
    if not 1 <= lanes <= MAX_LANES:
        raise ValueError(f"there are 1 to {MAX_LANES} lanes, not {lanes}")
    names = [lane_name(number) for number in range(lanes)]
    with closing(redis.Redis.from_url(broker_url, socket_timeout=5, socket_connect_timeout=5)) as client:
        keys = [key for name in names for key in keys_of(name)[:2]]
        found: Any = client.eval(LOOK, len(keys), *keys)
    now = time.time()
    owned = lane_owners(connection, LANE_CLASS, PRESENCE_CLASS)
    return LaneStates(
        workers=owned.workers,
        lanes=[
            LaneState(
                lane=name,
                ready=ready,
                unacknowledged=unacknowledged,
                lag_seconds=None if sent is None else max(0.0, round(now - int(sent), 3)),
                owner=owned.owners.get(number),
            )
            for number, (name, (ready, unacknowledged, sent)) in enumerate(zip(names, found, strict=True))
        ],
    )
