"""A provider's deliveries, from a process of its own: each signed and posted again until the relay has taken it.

python -m tests.faults.deliverers URL SECRET BODIES_FILE STATUSES_FILE
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from stripe import WebhookSignature

from scripts.fake_stripe import post

PAUSE_SECONDS = 0.05
"""Between two attempts."""

PATIENCE_SECONDS = 900.0
"""How long it goes on."""


def write(path: Path, bodies: Sequence[bytes]) -> None:
    """Write down what is to be delivered, in that order."""
    path.write_bytes(msgspec.json.encode([body.decode() for body in bodies]))


def main() -> None:
    """Deliver, and write down what each attempt was answered with: a status, or null."""
    url, secret, bodies, statuses = sys.argv[1:]
    deadline = time.monotonic() + PATIENCE_SECONDS
    with Path(statuses).open("w", encoding="ascii") as stream:
        for body in msgspec.json.decode(Path(bodies).read_bytes(), type=list[str]):
            while True:
                signature = WebhookSignature.generate_signature_header(body, secret, int(time.time()))
                status = post(url, body.encode(), {"Stripe-Signature": signature})
                stream.write(f"{'null' if status is None else status}\n")
                stream.flush()
                if status == 200:
                    break
                if time.monotonic() > deadline:
                    sys.exit(1)
                time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
