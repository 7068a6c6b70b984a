"""What the bench measures is made of: samples, their spread over several runs, ratios, goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


class BenchError(RuntimeError):
    """A figure that cannot stand: something was lost, doubled or refused, or did not come."""


# --- Statistics --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several runs, the least and the most of them."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def as_json(self) -> dict[str, float]:
        """As it stands in the report, to five digits."""
        return {"median": rounded(self.median), "min": rounded(self.min), "max": rounded(self.max)}


def rounded(value: float) -> float:
    """A figure to five digits: no measurement here is more exact."""
    return float(f"{value:.5g}")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that so many percent of them do not exceed (nearest rank).

    :param percent: above 0, at most 100.
    """
    ranked = sorted(values)
    rank = -(-len(ranked) * percent // 100)
    return ranked[max(0, int(rank) - 1)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The ratio round by round: each to what was measured in the same round."""
    return Spread.of(own / other for own, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measurement of a case or peer gave."""

    ops_per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    memory_ratio: float | None = None
    """The resident memory of the process that grew most, as a multiple of what it was early in the measurement."""
    memory_mib: float | None = None
    """The resident memory in the end, of the process that has most."""
    bytes_per_op: float | None = None
    """What the database keeps of each operation for ever, indexes included."""
    cpu_us_per_op: Mapping[str, float] = field(default_factory=dict)
    """CPU time in microseconds per operation, of ``producer``, ``workers``, ``database`` and ``broker``."""
    stages_us_per_op: Mapping[str, float] = field(default_factory=dict)
    """Seconds that pass in each stage of the lane workers, in microseconds per operation, waiting included."""
    note: str = ""
    """What is to be known about it, such as with how many clients."""

    @classmethod
    def of_latencies(cls, seconds: Sequence[float], **more: Any) -> Sample:
        """Of operations that were made one after the other, from how many seconds each took.

        :param more: further fields.
        """
        rate = len(seconds) / sum(seconds)
        return cls(rate, percentile(seconds, 50) * 1000, percentile(seconds, 99) * 1000, **more)


FIGURES = ("ops_per_s", "p50_ms", "p99_ms", "memory_ratio", "memory_mib", "bytes_per_op")
"""The fields of :class:`Sample` that are one number."""

TABLES = ("cpu_us_per_op", "stages_us_per_op")
"""Those that are one number for each of several names."""


# --- What is measured --------------------------------------------------------------------------------

_NAMES = {"p50_ms": "p50 ", "p99_ms": "p99 ", "memory_ratio": "memory ", "memory_mib": "memory "}
_UNITS = {"ops_per_s": "/s", "p50_ms": " ms", "p99_ms": " ms", "memory_ratio": " × early", "memory_mib": " MiB"}


@dataclass(frozen=True, slots=True)
class Bound:
    """One condition of a goal, on medians."""

    figure: str
    """One of :data:`FIGURES`."""
    sign: str
    """``≥``, ``≤`` or ``<``."""
    limit: float
    against: str | None = None
    """The peer or case that the limit is a multiple of; None for a limit as it stands."""

    def __str__(self) -> str:
        what = f" × {self.against}" if self.against else _UNITS[self.figure]
        return f"{_NAMES.get(self.figure, '')}{self.sign} {self.limit:,g}{what}"

    def met(self, results: Results, case: str) -> bool:
        """Whether the measurements are within it."""
        if self.against is None:
            value = results.spread(case, self.figure).median
        else:
            value = results.ratio(case, self.against, self.figure).median
        return {"≥": value >= self.limit, "≤": value <= self.limit, "<": value < self.limit}[self.sign]


@dataclass(frozen=True, slots=True)
class Step:
    """A case or a peer: a name, what it is, how it is measured."""

    name: str
    what: str
    measure: Callable[[Any], Sample]
    """Given the bench."""
    bounds: tuple[Bound, ...] = ()
    """The goal of a case; what these name is measured beside it."""
    beside: tuple[str, ...] = ()
    """What it is compared with though no goal says so."""
    after: tuple[str, ...] = ()
    """What must be measured before, without a comparison."""
    once: bool = False
    """In the first run alone, and with ``--quick`` only when it is asked for by name: it takes minutes."""

    @property
    def goal(self) -> str:
        """The goal in a line."""
        return ", ".join(map(str, self.bounds))

    @property
    def against(self) -> list[str]:
        """What it is compared with, each once."""
        return list(dict.fromkeys([*(bound.against for bound in self.bounds if bound.against), *self.beside]))

    @property
    def figure(self) -> str:
        """What its ratios are of: the latency where that is the goal, else the rate."""
        return next((bound.figure for bound in self.bounds if bound.against), "ops_per_s")

    def met(self, results: Results) -> bool:
        """Whether the goal is reached."""
        return all(bound.met(results, self.name) for bound in self.bounds)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many operations each measurement has, unless it says otherwise."""

    accounts: int = 10_000
    publish: int = 20_000
    single: int = 20_000
    naive: int = 20_000
    sql: int = 40_000
    copy: int = 100_000
    metering: int = 200_000
    mix: int = 100_000
    answer: int = 1_000
    memory: int = 1_000_000
    memory_early: int = 50_000
    """Operations after which the workers' memory is looked at first."""
    grow_accounts: int = 1_000_000
    """Accounts that are there before ``grow``."""
    grow_entries: int = 10_000_000
    """Entries that are there before ``grow``."""
    month: int = 1_000_000
    """Accounts whose period ends at the same instant."""
    warm: int = 2_000
    """Operations that lane workers have applied before anything is measured."""
    warm_naive: int = 200

    @classmethod
    def quick(cls) -> Sizes:
        """Enough to see where one stands."""
        return cls(
            publish=5_000,
            single=10_000,
            naive=1_000,
            sql=6_000,
            copy=30_000,
            metering=40_000,
            mix=20_000,
            answer=150,
            memory=200_000,
            memory_early=50_000,
            grow_accounts=100_000,
            grow_entries=1_000_000,
            month=50_000,
            warm=1_000,
            warm_naive=100,
        )

    @classmethod
    def each(cls, operations: int) -> Sizes:
        """So many for each measurement, for trying whether everything works."""
        same = {every.name: operations for every in fields(cls)}
        return cls(**{**same, "accounts": min(10_000, operations), "memory_early": max(1, operations // 2)})

    def differences(self) -> list[str]:
        """In what they are not those of a whole run, such as ``single 10,000 (20,000)``."""
        whole = Sizes()
        return [
            f"{every.name} {own:,} ({usual:,})"
            for every in fields(self)
            if (own := getattr(self, every.name)) != (usual := getattr(whole, every.name))
        ]


@dataclass
class Results:
    """The samples of every step, round by round."""

    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)

    def add(self, step: str, sample: Sample, round: int) -> None:
        """Note a measurement."""
        self.samples.setdefault(step, {})[round] = sample

    def figures(self, step: str, figure: str) -> dict[int, float]:
        """One figure, by round."""
        found: dict[int, float | None] = {
            round: getattr(sample, figure) for round, sample in self.samples[step].items()
        }
        return {round: value for round, value in sorted(found.items()) if value is not None}

    def spread(self, step: str, figure: str) -> Spread:
        """One figure over all rounds."""
        return Spread.of(self.figures(step, figure).values())

    def ratio(self, step: str, against: str, figure: str) -> Spread:
        """A step's figure as a multiple of another's, over the rounds in which both were measured."""
        ours, theirs = self.figures(step, figure), self.figures(against, figure)
        both = [round for round in ours if round in theirs]
        return ratios([ours[round] for round in both], [theirs[round] for round in both])

    def table(self, step: str, table: str) -> dict[str, float]:
        """The medians of one of :data:`TABLES`, by its names; empty when there are none."""
        found: dict[str, list[float]] = {}
        for sample in self.samples[step].values():
            for name, value in getattr(sample, table).items():
                found.setdefault(name, []).append(value)
        return {name: statistics.median(values) for name, values in found.items()}

    def notes(self, step: str) -> list[str]:
        """What is to be known about the measurements, each once."""
        return list(dict.fromkeys(sample.note for sample in self.samples[step].values() if sample.note))
