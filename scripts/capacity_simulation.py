"""A simulation that checks the capacity model: bursts of messages, lanes, and workers with elastic batches.

Workers share nothing but Postgres and the broker, which the model keeps below their target utilisation; a message
belongs to one lane, a lane to one worker, and Poisson arrivals that are split at random stay Poisson. So each worker is
simulated by itself, message by message, and a part of many workers stands for all.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

from scripts.capacity import (
    BATCH_MESSAGES,
    BATCH_OPERATIONS,
    BURST_SECONDS,
    BURSTS,
    BURSTS_MEAN,
    BUSIEST_MINUTE,
    HOUR_SECONDS,
    Choice,
    Load,
    Workers,
    worker_shares,
)

WINDOW_SECONDS = BURST_SECONDS * len(BURSTS)

MESSAGES = 3_000_000
"""About so many are simulated; where more come, some workers stand for all."""

TICK = 20_000
"""Messages between two reports of progress."""

AT_LEAST = 3
"""So many workers are simulated however long it takes: the busiest, one in the middle and the last."""

Progress = Callable[[int, int], None]
"""Told how many messages are simulated, and about how many there will be."""


@dataclass(frozen=True, slots=True)
class Served:
    """What one server did."""

    waited: array[float]
    """Seconds from the arrival of each message that was served to the beginning of its batch, in order."""
    answered: array[float]
    """Seconds from the arrival of each to the end of its batch."""
    arrived: int
    """Operations."""
    served: int
    """Operations whose batch ended in time."""
    waiting: int
    """The others."""
    batches: int
    busy_seconds: float
    depths: list[int]
    """Operations that were there and not done, at the end of each second."""


def arrivals(draw: random.Random, rates: Sequence[float], seconds: float) -> list[float]:
    """When messages come, as a Poisson process whose rate changes.

    :param rates: messages a second, for one stretch after the other.
    :param seconds: how long a stretch is.
    """
    found = []
    for number, rate in enumerate(rates):
        time, end = number * seconds, (number + 1) * seconds
        while rate > 0 and (time := time + draw.expovariate(rate)) < end:
            found.append(time)
    return found


def serve(
    times: Sequence[float],
    sizes: Sequence[int],
    took: Callable[[int, int], float],
    end: float,
    most_messages: int = BATCH_MESSAGES,
    most_operations: int = BATCH_OPERATIONS,
    tick: Callable[[int], None] | None = None,
) -> Served:
    """Serve messages in batches: each takes what waits when it begins, up to the limits of a transaction.

    :param times: when each message comes, in seconds, ascending.
    :param sizes: how many operations it has.
    :param took: seconds for a batch of so many operations in so many messages.
    :param end: when to stop, in seconds.
    :param tick: is told now and then how many messages were served.
    """
    waited, answered = array("d"), array("d")
    seconds = int(end) + 1
    came, went = [0] * seconds, [0] * seconds
    for time, size in zip(times, sizes, strict=True):
        came[int(time)] += size
    count, position, batches, served = len(times), 0, 0, 0
    free = busy = 0.0
    told = 0
    while position < count:
        start = max(free, times[position])
        if start >= end:
            break
        first = position
        operations = sizes[position]
        position += 1
        last = min(count, first + most_messages)
        while position < last and times[position] <= start and operations + sizes[position] <= most_operations:
            operations += sizes[position]
            position += 1
        free = start + took(operations, position - first)
        busy += min(free, end) - start
        batches += 1
        if free > end:
            break
        served += operations
        went[int(free)] += operations
        for time in times[first:position]:
            waited.append(start - time)
            answered.append(free - time)
        if tick is not None and position - told >= TICK:
            told = position
            tick(position)
    arrived = sum(sizes)
    depths = [came - went for came, went in zip(accumulate(came), accumulate(went), strict=True)]
    return Served(waited, answered, arrived, served, arrived - served, batches, busy, depths)


def drain(
    draw: random.Random, backlog: float, rate: float, took: Callable[[int, int], float], most: int, messages: float
) -> float | None:
    """How many seconds a backlog takes to be gone while more comes; None when it never is.

    :param backlog: operations.
    :param rate: operations a second that come meanwhile.
    :param most: operations of the largest batch.
    :param messages: for each operation.
    """
    if rate * took(most, round(most * messages)) >= most:
        return None
    left, passed = backlog, 0.0
    while left >= most:
        seconds = took(most, round(most * messages))
        expected = rate * seconds
        # A batch takes long enough for many to come: they are distributed almost normally.
        left += max(0.0, draw.gauss(expected, expected**0.5)) - most
        passed += seconds
    return passed


class ServiceTime:
    """How long a worker takes for a batch, as the model has it, for any number of operations and messages."""

    def __init__(self, workers: Workers) -> None:
        """Prepare what every batch needs: how many different accounts so many operations have."""
        costs = workers.costs
        lines = (costs.worker_us, costs.postgres_us, costs.broker_us, costs.wait_us)
        single = workers.load.single_share / workers.messages
        self._message = sum(line.message + line.single * single for line in lines) / 1e6
        steps = sorted({1, *(min(BATCH_OPERATIONS, round(1.15**power)) for power in range(51))})
        known = {count: workers.batch(count) for count in steps}
        fixed = {
            count: workers.costs.service_us(
                batch._replace(messages=0.0, singles=0.0), workers.load.events, workers.round_trip_us
            )
            for count, batch in known.items()
        }
        self._fixed = [fixed[1] / 1e6]
        for low, high in pairwise(steps):
            step = (fixed[high] - fixed[low]) / (high - low)
            self._fixed += [(fixed[low] + step * (count - low)) / 1e6 for count in range(low, high)]
        self._fixed.append(fixed[steps[-1]] / 1e6)

    def __call__(self, operations: int, messages: int) -> float:
        """Seconds."""
        return self._fixed[min(operations, BATCH_OPERATIONS)] + self._message * messages


@dataclass(frozen=True, slots=True)
class Simulated:
    """What the busiest ten minutes of a day are like."""

    seconds: float
    workers: int
    workers_simulated: int
    """The one with the most to do among them."""
    arrived: int
    """Operations, at the workers simulated."""
    served: int
    waiting: int
    """Operations that were not done at the end."""
    peak_per_s: float
    """Operations a second in the busiest ten seconds, of all workers."""
    waited_p50_ms: float
    waited_p99_ms: float
    """From the broker to the beginning of a batch."""
    answered_p50_ms: float
    answered_p99_ms: float
    """From the broker to the commit and the answer."""
    busiest_p99_ms: float
    """The same, of the worker with the most to do."""
    largest_backlog: int
    """Operations that waited at once, estimated for all workers."""
    batch: float
    """Operations of a transaction."""
    utilisation: list[float]
    """The part of the time that each worker was at a batch, the one with the most to do first. Batches grow with what
    waits, so workers are seldom idle long before they are at their limit."""
    needed: list[float]
    """The part of the time that each would have been, had all its batches been full."""
    drain_seconds: float | None
    """How long the busiest worker takes for the backlog of an outage of an hour while the busiest hour goes on; None
    when it never catches up."""


def simulate(load: Load, choice: Choice, seed: int = 1, progress: Progress | None = None) -> Simulated:
    """Simulate the busiest ten minutes of a day, and what follows an outage.

    The bursts are those of :data:`scripts.capacity.BURSTS`, so high that the busiest minute is the load's.

    :param seed: the same one gives the same figures.
    :param progress: is told how far it is.
    """
    sized = choice.sized
    count = sized.workers.count
    shares = worker_shares(load, sized.lanes, count)
    rates = [load.mean * load.profile.minute / BUSIEST_MINUTE * burst / BURSTS_MEAN for burst in BURSTS]
    messages = [load.messages(rate, sized.lanes, sized.producers) for rate in rates]
    expected = [
        share * BURST_SECONDS * sum(rate * each for rate, each in zip(rates, messages, strict=True)) for share in shares
    ]
    chosen = _chosen(expected)
    total, done = round(sum(expected[number] for number in chosen)), 0
    took = ServiceTime(sized.workers)
    full = sized.workers.seconds(sized.workers.most) / sized.workers.most
    found = []
    for number in chosen:
        draw = random.Random(f"{seed} {number}")  # noqa: S311 - to be repeatable is its purpose
        times, sizes = _messages(draw, rates, messages, shares[number], load.single_share)
        tick = None if progress is None else partial(_tick, progress, done, total)
        found.append(serve(times, sizes, took, WINDOW_SECONDS, tick=tick))
        done += len(times)
    if progress is not None:
        progress(total, total)
    # Where some stand for all, the busiest one stands for itself only.
    busiest, others = found[0], found if len(found) == count else found[1:]
    scale = (1 - shares[0]) / sum(shares[number] for number in chosen[1:]) if others != found else 1.0
    rest = (
        [0] * len(busiest.depths) if len(found) == 1 else map(sum, zip(*(one.depths for one in found[1:]), strict=True))
    )
    depths = [own + scale * other for own, other in zip(busiest.depths, rest, strict=True)]
    waited = sorted(wait for one in others for wait in one.waited)
    answered = sorted(wait for one in others for wait in one.answered)
    draw = random.Random(f"{seed} outage")  # noqa: S311 - to be repeatable is its purpose
    hour = load.mean * load.profile.hour * shares[0]
    return Simulated(
        seconds=WINDOW_SECONDS,
        workers=count,
        workers_simulated=len(chosen),
        arrived=sum(one.arrived for one in found),
        served=sum(one.served for one in found),
        waiting=sum(one.waiting for one in found),
        peak_per_s=max(rates),
        waited_p50_ms=_percentile(waited, 0.5) * 1e3,
        waited_p99_ms=_percentile(waited, 0.99) * 1e3,
        answered_p50_ms=_percentile(answered, 0.5) * 1e3,
        answered_p99_ms=_percentile(answered, 0.99) * 1e3,
        busiest_p99_ms=_percentile(sorted(busiest.answered), 0.99) * 1e3,
        largest_backlog=round(max(depths)),
        batch=sum(one.served for one in found) / max(1, sum(one.batches for one in found)),
        utilisation=[one.busy_seconds / WINDOW_SECONDS for one in found],
        needed=[one.arrived * full / WINDOW_SECONDS for one in found],
        drain_seconds=drain(draw, hour * HOUR_SECONDS, hour, took, sized.workers.most, sized.workers.messages),
    )


def _tick(progress: Progress, before: int, total: int, served: int) -> None:
    progress(min(before + served, total), total)


def _chosen(expected: Sequence[float]) -> list[int]:
    """The workers to simulate: the busiest, and others from all over the order, as many as there is time for."""
    affordable = max(AT_LEAST, int(MESSAGES / max(1.0, expected[0])))
    if affordable >= len(expected):
        return list(range(len(expected)))
    return sorted({round(place * (len(expected) - 1) / max(1, affordable - 1)) for place in range(affordable)})


def _messages(
    draw: random.Random, rates: Sequence[float], messages: Sequence[float], share: float, single_share: float
) -> tuple[list[float], list[int]]:
    """When the messages of one worker come, and how many operations each has."""
    times = arrivals(draw, [rate * each * share for rate, each in zip(rates, messages, strict=True)], BURST_SECONDS)
    sizes = []
    for time in times:
        each = messages[int(time / BURST_SECONDS)]
        alone = single_share / each
        if draw.random() < alone:
            sizes.append(1)
            continue
        company = (1 - single_share) / (each - single_share) if each > single_share else 1.0
        sizes.append(int(company) + (draw.random() < company % 1))
    return times, sizes


def _percentile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0
