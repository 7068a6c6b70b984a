"""How operations reach the lanes in a measurement, and what is looked at meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from creditlane.client import Buffer
from scripts.bench_figures import Sample
from scripts.bench_harness import FEATURE, QUANTITY, Bench, Lanes, Operation, Side
from scripts.bench_processes import resident_mib

LOOK = 5_000
"""Operations that are published between two looks at how far the workers are."""


def measure_backlog(bench: Bench, side: Side, operations: list[Operation]) -> Sample:
    """What waits in the queue, one message each: from the first delivery to the last commit.

    What the broker uses to take the messages in is counted, what the sender uses is not.
    """
    side.sent(operations)
    with bench.metered(len(operations), side.workers) as costs:
        side.workers.hold()
        side.fill(operations)
        started = side.workers.release()
        side.wait_until_quiet(len(operations))
    return Sample(len(operations) / (side.last_commit() - started), **costs.as_fields)


def measure_stream(
    bench: Bench, side: Lanes, operations: list[Operation], watch: Callable[[int], None] = lambda written: None
) -> Sample:
    """Consumes through ``buffer()`` while the workers apply them: from the first publish to the last commit.

    :param watch: told every now and then how many are applied.
    """
    side.sent(operations)

    def send(buffer: Buffer, index: int) -> None:
        account, operation, member = operations[index]
        buffer.consume(account, feature=FEATURE, quantity=QUANTITY, member=member, id=operation)

    return measure_sending(bench, side, len(operations), send, watch)


def measure_sending(
    bench: Bench,
    side: Lanes,
    operations: int,
    send: Callable[[Buffer, int], None],
    watch: Callable[[int], None] = lambda written: None,
) -> Sample:
    """As :func:`measure_stream`, for operations of any kind.

    :param operations: how many there are.
    :param send: sends the one with this index.
    """
    first = side.written()
    stored = side.stored_bytes()
    with bench.metered(operations, side.workers) as costs:
        started = time.time()
        with costs.producing(), side.client.buffer() as buffer:
            for begin in range(0, operations, LOOK):
                for index in range(begin, min(begin + LOOK, operations)):
                    send(buffer, index)
                written = side.written() - first
                watch(written)
                bench.show.advance(min(written, operations), operations)
        side.wait_until_quiet(operations, first=first, watch=watch)
    return Sample(
        operations / (side.last_commit() - started),
        bytes_per_op=(side.stored_bytes() - stored) / operations,
        **costs.as_fields,
    )


class Memory:
    """The resident memory of processes, early in a measurement and since.

    :param pids: whose.
    :param early: operations until which it is early.
    """

    def __init__(self, pids: Sequence[int], early: int) -> None:
        self._early = early
        self._then = dict.fromkeys(pids, 0.0)
        self._since = dict.fromkeys(pids, 0.0)

    def look(self, written: int) -> None:
        """Look at it.

        :param written: operations that are applied.
        """
        seen = self._then if written <= self._early else self._since
        for pid in seen:
            seen[pid] = max(seen[pid], resident_mib(pid))

    @property
    def as_fields(self) -> dict[str, Any]:
        """As fields of a sample: of the process that grew most, and of the one that has most; a last look."""
        for pid in self._since:
            self._since[pid] = max(self._since[pid], resident_mib(pid))
        return {
            "memory_ratio": max(self._since[pid] / (then or self._since[pid]) for pid, then in self._then.items()),
            "memory_mib": max(self._since.values()),
        }
