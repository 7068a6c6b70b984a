"""What a row is made of: acts, each with a stage of its own, a fault, and a count of how often the fault really hit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.stack import Scene

REDIS, RABBITMQ = "redis", "rabbitmq"


@dataclass(frozen=True, slots=True)
class Size:
    """How much of a fault: what the command runs, and what the test suite has time for."""

    kills: int
    """Processes that row 1 kills, and connections that row 3 cuts."""
    rounds: int
    """Times that row 2 dies at each point, and row 4 is told to end."""
    operations: int
    """Operations of a producer that sends so many and ends."""
    outage_seconds: float
    """How long a server is away."""
    lock_seconds: float
    """How long somebody else holds a lock: a worker waits a few seconds for it at a time, and tries again."""
    stir_seconds: float
    """How long row 13 starts, stops and kills workers."""
    contenders: int
    """Producers who want the same thing."""


FULL = Size(
    kills=20, rounds=3, operations=3000, outage_seconds=30, lock_seconds=30, stir_seconds=60, contenders=1000
)  # fmt: skip
SMALL = Size(kills=3, rounds=1, operations=250, outage_seconds=3, lock_seconds=3, stir_seconds=6, contenders=100)


@dataclass(frozen=True, slots=True)
class Done:
    """What an act says of itself."""

    hits: int
    """How often the fault really hit."""
    wanted: int
    """How often it had to: fewer is a fault that missed, and no pass."""
    what: str
    """What was done, in one line for the operator."""
    wrong: list[str] = field(default_factory=list)
    """What the act itself saw that must not be; the oracle judges the ledger."""


@dataclass(frozen=True, slots=True)
class Act:
    """One fault, on one stage."""

    name: str
    run: Callable[[Scene, Size], Done]
    order: bool = True
    """Whether the order published must be kept."""
    answered: bool = True
    """Whether every sender that asked must be told; not where the store of the answers is broken itself."""
    replays: bool = False
    """Whether operations must have been delivered again after they were committed: none is a fault that missed."""
    brokers: tuple[str, ...] = (REDIS, RABBITMQ)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table of faults."""

    number: int
    title: str
    acts: tuple[Act, ...]
