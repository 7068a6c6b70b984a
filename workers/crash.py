"""Named places at which a worker can be made to die, for the fault tests; off unless asked for.

``CREDITLANE_CRASH_AT=after-commit:3`` kills the process (SIGKILL) when it comes to that place for the third
time. Nothing else reads the variable, and without it a crash point is one comparison.
"""

from __future__ import annotations

import os
import signal

POINTS = ("after-load", "after-copy", "before-commit", "after-commit", "after-results")
"""Places that every batch comes to."""

OUTBOX_POINTS = ("before-publish", "after-publish")
"""Places that a batch comes to which something follows from."""

NOTICE_POINTS = ("after-delivery",)
"""Where a channel has taken a notice, and nobody has noted it."""

RELAY_POINTS = ("after-store",)
"""Where a provider's event is stored, and nobody has been told of it."""

PAYMENT_POINTS = ("payment-before-commit", "payment-after-commit")
"""Where an event's operations are not kept yet, and where they are kept and not sent."""

_wanted, _, _count = os.environ.get("CREDITLANE_CRASH_AT", "").partition(":")
_left = int(_count or 1)


def crash_point(name: str) -> None:
    """Die here if the environment asks for it."""
    if name != _wanted:
        return
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
