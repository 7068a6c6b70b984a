"""A lane worker whose clock is wrong, and is set back again and again.

python -m tests.faults.skewed SECONDS_AHEAD SECONDS_BACK CELERY_ARGUMENTS…
"""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta

import time_machine

STEP_SECONDS = 2.0
"""How often the clock is set back."""

READS = "this clock reads "
"""What the log says of it, followed by seconds since 1970."""


def main() -> None:
    """Set the clock, then run Celery's command line."""
    ahead, back = float(sys.argv.pop(1)), float(sys.argv.pop(1))
    traveller = time_machine.travel(time.time() + ahead, tick=True)
    clock = traveller.start()

    def step() -> None:
        while True:
            sys.stdout.write(f"{READS}{time.time()}\n")
            sys.stdout.flush()
            if not back:
                return
            pause.wait(STEP_SECONDS)
            clock.shift(timedelta(seconds=-back))

    pause = threading.Event()
    threading.Thread(target=step, name="wrong clock", daemon=True).start()
    from celery.__main__ import main as celery

    celery()


if __name__ == "__main__":
    main()
