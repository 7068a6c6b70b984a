"""A lane worker that believes it is alone: it takes locks of another class, so every lane looks free to it.

Only for the faults: production code has no switch for this.

    python -m tests.faults.rogue fenced|unfenced CELERY_ARGUMENTS…
"""

from __future__ import annotations

import sys
from typing import Any

from celery.__main__ import main as celery

from workers import ownership, redis_lanes

FOREIGN = 0x726F_6775
"""The class of its locks."""


def share_epochs() -> None:
    """Take lanes without a new epoch: the fence in Redis then takes it for their owner."""
    take_over = redis_lanes.Channel.basic_consume

    def basic_consume(self: Any, queue: str, *args: Any, **kwargs: Any) -> Any:
        _, _, key = redis_lanes.keys_of(queue)
        epoch = self.client.get(key)
        if epoch is None:
            return take_over(self, queue, *args, **kwargs)
        scripts = self._lane_scripts()
        self._scripts = (lambda **_: (int(epoch), 0), *scripts[1:])
        try:
            return take_over(self, queue, *args, **kwargs)
        finally:
            self._scripts = scripts

    redis_lanes.Channel.basic_consume = basic_consume  # type: ignore[method-assign]


def main() -> None:
    """Change what it believes, then run Celery's command line."""
    fence = sys.argv.pop(1)
    ownership.LANE_CLASS = FOREIGN
    ownership.PRESENCE_CLASS = FOREIGN + 1
    if fence == "unfenced":
        share_epochs()
    celery()


if __name__ == "__main__":
    main()
