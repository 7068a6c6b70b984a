"""Which queue an account's messages go through.

The hash is CRC-32 (the one of zlib and PNG), so that a producer in any language can compute it;
test vectors are in the README and in ``tests/creditlane/test_lanes.py``.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

LANES = 64
"""How many lanes there are unless a deployment says otherwise (``CREDITLANE_LANES``)."""

PREFIX = "lane."


def lane_of(account: str, lanes: int = LANES) -> str:
    """Name the queue that carries an account's operations.

    :param account: the account that is charged; for a pool's member, the pool.
    :param lanes: how many lanes the deployment has.
    :returns: a queue name such as ``lane.007``.
    """
    return lane_name(crc32(account.encode("utf-8")) % lanes)


@lru_cache(4096)
def lane_name(number: int) -> str:
    """Name the queue of lane ``number``."""
    return f"{PREFIX}{number:03d}"


def lane_number(queue: str) -> int:
    """Read the number back from a lane's queue name.

    :raises ValueError: when ``queue`` is not the name of a lane.
    """
    digits = queue.removeprefix(PREFIX)
    if digits == queue or not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{queue!r} is not a lane")
    return int(digits)
