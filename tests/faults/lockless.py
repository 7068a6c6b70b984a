"""A beat that believes it is alone, and that the sweep of due accounts ticked long ago: it ticks at once, lock or not.

Only for the faults: production code has no switch for this.

    python -m tests.faults.lockless CELERY_ARGUMENTS…
"""

from __future__ import annotations

from celery.__main__ import main as celery

from schedules import beat, expiry

LONG_AGO = f"SELECT '{next(iter(expiry.SCHEDULE))}', %s::timestamptz - interval '99 days'"
"""What it remembers, whatever another has noted."""


def main() -> None:
    """Change what it believes, then run Celery's command line."""
    beat.try_alone = lambda *_: True  # type: ignore[attr-defined]
    beat.LAST_TICKS = LONG_AGO
    celery()


if __name__ == "__main__":
    main()
