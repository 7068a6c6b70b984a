"""A provider's deliveries, from a process of its own: each again until the relay has taken it.

python -m tests.faults.deliverers URL DELIVERIES_FILE STATUSES_FILE
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from scripts.fake_stripe import post

PAUSE_SECONDS = 0.05
"""Between two attempts."""

PATIENCE_SECONDS = 240.0
"""How long one delivery is attempted."""


class Delivery(msgspec.Struct):
    """A signed webhook."""

    body: bytes
    headers: Mapping[str, str]


def write(path: Path, deliveries: Sequence[Delivery]) -> None:
    """Write down what is to be delivered, in that order."""
    path.write_bytes(msgspec.json.encode(deliveries))


def main() -> None:
    """Deliver, and write down what each attempt was answered with: a status, or null."""
    url, deliveries, statuses = sys.argv[1:]
    deadline = time.monotonic() + PATIENCE_SECONDS
    with Path(statuses).open("w", encoding="ascii") as stream:
        for each in msgspec.json.decode(Path(deliveries).read_bytes(), type=list[Delivery]):
            while True:
                status = post(url, each.body, each.headers)
                stream.write(f"{'null' if status is None else status}\n")
                stream.flush()
                if status == 200:
                    break
                if time.monotonic() > deadline:
                    sys.exit(1)
                time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
