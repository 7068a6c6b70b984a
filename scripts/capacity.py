"""How much of what a load needs: lane workers, Postgres, broker, lanes, disk; and where the design changes.

A transaction costs so much for itself, for each message, each operation and each account in it (:class:`Line`); lanes
batch elastically, so the batch follows from the load (:func:`elastic_batch`); the rest is division. What is said
here is checked by a simulation (``scripts/capacity_simulation.py``) and by ``scripts/bench``.

Times are CPU microseconds of one core of the machine that the figures were measured on, see :data:`MEASURED`.

Parts are sized by full batches, which is what a worker falls back on when more comes. Below that it does more than is
counted here: on Redis each lane that wakes a waiting worker costs it some tenths of a millisecond, for up to as many
lanes as it has. So real batches of a light load are larger than :func:`elastic_batch` has them.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from creditlane.contract import MAX_BATCH
from creditlane.lanes import LANES, lane_number, lane_of
from scripts.lane_state import MAX_LANES
from scripts.replay import EXPONENT, ReplayError, read_header

DAY_SECONDS, HOUR_SECONDS, YEAR_DAYS = 86_400, 3_600, 365

BATCH_MESSAGES, BATCH_OPERATIONS = 500, 1_000
"""What a transaction takes at the most: the defaults of ``CREDITLANE_BATCH_MESSAGES`` and ``_OPERATIONS``."""

LINGER_SECONDS = 0.005
"""How long :meth:`creditlane.client.CreditClient.buffer` waits for company unless told otherwise."""

LANES_PER_WORKER = 4
"""At least: the share of a worker is whole lanes, and with few of them one has much more than another."""

TARGET_UTILISATION = 0.7
"""How busy a part may be at the peak it is sized for; above, what waits grows out of proportion."""

SINGLE_SHARE = 0.1
"""Operations that come as messages of their own, unless told otherwise: a guess, since it is up to the producers."""

BOX_CORES, POSTGRES_CORES, WAL_MB_PER_S = 8, 32, 200.0
"""The machines that are planned with unless told otherwise."""

ROUND_TRIPS = 10
"""That a lane worker waits for in a batch: about six to Postgres, four to the broker."""


class CapacityError(ValueError):
    """Figures or a file that nothing can be worked out from; the text says what to do."""


# --- What things cost --------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What one transaction has in it, on average."""

    operations: float
    messages: float
    singles: float
    """Messages that have one operation and were sent by themselves."""
    accounts: float
    """Different ones."""


@dataclass(frozen=True, slots=True)
class Line:
    """A cost that is linear in what a transaction has in it."""

    transaction: float = 0.0
    message: float = 0.0
    single: float = 0.0
    """What a message costs on top when it was sent by itself and is answered."""
    operation: float = 0.0
    account: float = 0.0

    def of(self, batch: Batch) -> float:
        """What one such transaction costs."""
        return (
            self.transaction
            + self.message * batch.messages
            + self.single * batch.singles
            + self.operation * batch.operations
            + self.account * batch.accounts
        )

    def per_operation(self, batch: Batch) -> float:
        """What each operation of such a transaction costs."""
        return self.of(batch) / batch.operations

    def scaled(self, factor: float) -> Line:
        """The same on a machine that needs so many times as much."""
        return Line(*(factor * value for value in astuple(self)))


@dataclass(frozen=True, slots=True)
class Costs:
    """What a batch of consumes costs, by part."""

    producer_us: Line
    worker_us: Line
    postgres_us: Line
    broker_us: Line
    """Redis: putting, taking, answering and acknowledging."""
    rabbitmq_us: Line
    """The same of one RabbitMQ node that has the only copy."""
    wait_us: Line
    """What a worker waits beyond the CPU time of others: the flush of the commit. Round trips come on top."""
    event: Event
    wal_bytes: Line
    broker_bytes: Line
    """Over the broker's network, in and out together."""
    stored_bytes: float
    """Tables and indexes, for each operation."""
    source: str
    """Where the figures are from."""

    def service_us(self, batch: Batch, events: float = 0.0, round_trip_us: float = 0.0) -> float:
        """How long a lane worker is at a batch: it waits for Postgres and the broker, one batch at a time.

        :param events: messages to ``credits.events`` for each operation.
        :param round_trip_us: between the machines.
        """
        own = self.worker_us.of(batch) + self.postgres_us.of(batch) + self.broker_us.of(batch) + self.wait_us.of(batch)
        return own + self.event.total_us * events * batch.operations + ROUND_TRIPS * round_trip_us


@dataclass(frozen=True, slots=True)
class Event:
    """What one event out costs, by part, in microseconds; and its bytes."""

    worker_us: float
    postgres_us: float
    broker_us: float
    wal_bytes: float
    broker_bytes: float

    @property
    def total_us(self) -> float:
        """Of all parts."""
        return self.worker_us + self.postgres_us + self.broker_us


MEASURED = Costs(
    producer_us=Line(message=30.0, single=70.0, operation=7.0),
    worker_us=Line(transaction=1_560.0, message=47.0, single=32.0, operation=23.0, account=24.0),
    postgres_us=Line(transaction=690.0, operation=9.5, account=35.0),
    broker_us=Line(transaction=150.0, message=12.5, single=15.0, operation=0.8),
    rabbitmq_us=Line(message=135.0, single=300.0),
    wait_us=Line(transaction=300.0, operation=1.0),
    event=Event(worker_us=95.0, postgres_us=12.0, broker_us=17.0, wal_bytes=540.0, broker_bytes=500.0),
    wal_bytes=Line(transaction=400.0, operation=815.0, account=445.0),
    broker_bytes=Line(transaction=5_000.0, message=300.0, single=2_850.0, operation=300.0),
    stored_bytes=700.0,
    source="measured on 2 cores (AMD EPYC, 2.6 GHz) with PostgreSQL 18, Redis 6.2, RabbitMQ 3.10, everything durable",
)
"""Fitted to batches of 1 to 1,000 consumes on 1 to 1,000 of 100 to 200,000 accounts, in messages of 1 to 1,000; most
of what was measured is within a sixth of it. Accounts whose rows are not in Postgres's memory cost it more."""

FULL_PAGE_BYTES = 1_300
"""What Postgres logs of a page that it changes for the first time after a checkpoint, with ``wal_compression``."""

PAGES_PER_ACCOUNT = 0.125
"""Pages of tables and indexes that an account's next operation changes, shared with its neighbours."""

TOUCHES = 5
"""Pages that one operation changes: account, grant, and an entry in each of three indexes."""

CHECKPOINT_SECONDS = 300.0
"""How often Postgres makes a checkpoint (``checkpoint_timeout``), where ``max_wal_size`` is large enough."""

BENCH_METERING = Batch(970, 50, 0, 280)
BENCH_SINGLE = Batch(500, 500, 500, 190)
"""What a transaction of the bench's cases has in it, as counted in its ledgers: 10,000 accounts in 64 lanes, two
workers. A backlog is taken from one lane after the other, so it has fewer accounts than a stream has."""

_PARTS = {"producer": "producer_us", "workers": "worker_us", "database": "postgres_us", "broker": "broker_us"}
"""What the bench calls the parts, and where their costs are."""

_SINGLES = {"producer": ("publish",), "workers": ("single",), "broker": ("publish", "single")}
"""Which cases together tell what a part does for a message that is sent by itself: sending it is a case of its own."""


def costs_of_bench(path: Path, base: Costs = MEASURED) -> tuple[Costs, list[str]]:
    """Read the costs of a machine from what ``scripts/bench --json`` wrote.

    The case ``metering`` says how many times as much each part needs as in ``base``; the cases ``publish`` and
    ``single``, what a message costs on top that is sent by itself; ``sizes.bytes_per_operation``, what is stored.

    :returns: the costs, and a sentence for each figure that the file does not have; it stays as in ``base``.
    :raises CapacityError: when the file cannot be read, or has none of the figures.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        cases = told["cases"]
        if not isinstance(cases, dict):
            raise TypeError
    except OSError as error:
        raise CapacityError(f"{path} cannot be read ({error.strerror}); scripts/bench --json PATH writes it") from None
    except (ValueError, KeyError, TypeError):
        raise CapacityError(f"{path} is not what scripts/bench --json writes: it has no cases") from None
    changed: dict[str, Any] = {}
    absent: list[str] = []

    def figure(case: str, part: str) -> float | None:
        found = cases.get(case)
        table = found.get("cpu_us_per_op") if isinstance(found, dict) else None
        value = _number(table.get(part)) if isinstance(table, dict) else None
        if value is None:
            absent.append(f"cases.{case}.cpu_us_per_op.{part}")
        return value

    for part, name in _PARTS.items():
        line: Line = getattr(base, name)
        streamed = figure("metering", part)
        if streamed is not None:
            line = line.scaled(streamed / line.per_operation(BENCH_METERING))
        alone = [figure(case, part) for case in _SINGLES.get(part, ())]
        if alone and None not in alone:
            others = replace(line, single=0.0).per_operation(BENCH_SINGLE)
            line = replace(line, single=max(0.0, sum(value for value in alone if value is not None) - others))
        changed[name] = line
    sizes = told.get("sizes")
    stored = _number(sizes.get("bytes_per_operation")) if isinstance(sizes, dict) else None
    if stored is None:
        absent.append("sizes.bytes_per_operation")
    else:
        changed["stored_bytes"] = stored
    if len(absent) == len(_PARTS) + sum(map(len, _SINGLES.values())) + 1:
        raise CapacityError(f"{path} has no cpu_us_per_op and no sizes: write it anew with scripts/bench --json {path}")
    notes = [f"{name} is not in {path}: taken as {base.source}" for name in absent]
    return replace(base, source=f"from {path}", **changed), notes


def _number(value: object) -> float | None:
    """A figure, or the median of a spread; None for anything else. A bytes-by-table figure is their sum."""
    if isinstance(value, dict):
        if "median" in value:
            return _number(value["median"])
        parts = [_number(part) for part in value.values()]
        return sum(part for part in parts if part is not None) if parts and None not in parts else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


# --- What comes: peaks -------------------------------------------------------------------------------

BURSTS = (
    166, 327, 58, 21, 49, 40, 113, 115, 31, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 20, 89, 77, 71, 35, 17, 107, 32,
    0, 0, 54, 123, 106, 44, 72, 0, 0, 0, 0, 0, 0, 72, 6, 0, 0, 0, 52, 71, 32, 46, 105, 42, 10, 61, 139, 146, 49, 128,
)  # fmt: skip
"""How many requests came in each ten seconds of the busiest ten minutes of a service in production: the code
completion trace of AzurePublicDataset (CC-BY 4.0), 8,819 requests in 57 minutes of 2023-11-16."""

BURST_SECONDS = 10.0
BURSTS_MEAN = 25.667
"""Requests in ten seconds, over all of that trace."""

BUSIEST_MINUTE = max(sum(BURSTS[start : start + 6]) for start in range(0, len(BURSTS), 6)) / (6 * BURSTS_MEAN)
BUSIEST_SECOND = 67 / (BURSTS_MEAN / BURST_SECONDS)
"""How many times the mean of the trace came in its busiest minute and second: bursts within an hour."""


class Window(StrEnum):
    """How long a peak lasts."""

    HOUR = "hour"
    MINUTE = "minute"
    SECOND = "second"


@dataclass(frozen=True, slots=True)
class Profile:
    """How many times the mean of a day comes in its busiest hour, minute and second."""

    hour: float
    minute: float
    second: float
    source: str


def profile_of(times: Sequence[float], source: str, hour: float = 1.0) -> Profile:
    """Work out the peaks of a usage file.

    A burst counts when it is more than chance: in a thin file the busiest second has a few rows where the mean has
    next to none, which says how thin it is and nothing of a load. Where the file shows no burst within the hour, those
    of :data:`BURSTS` are taken.

    :param times: of the operations, in seconds, in any order.
    :param source: what it is, for people.
    :param hour: the busiest hour's ratio when the file has less than a day.
    :raises CapacityError: with fewer than 100 rows, or all at one time.
    """
    ordered = sorted(times)
    if len(ordered) < 100 or ordered[-1] - ordered[0] < 60:
        raise CapacityError("a usage file shows its peaks from 100 rows and a minute on; this one has less")
    begin, span = ordered[0], ordered[-1] - ordered[0]
    if span >= DAY_SECONDS:
        hour = _busiest(ordered, begin, HOUR_SECONDS) / (len(ordered) * HOUR_SECONDS / span)
    ratios = []
    steady = len(ordered) / span * (hour if span >= DAY_SECONDS else 1.0)
    for seconds, recorded in ((60, BUSIEST_MINUTE), (1, BUSIEST_SECOND)):
        busiest = _busiest(ordered, begin, seconds)
        chance = _most_by_chance(steady * seconds, max(1, round(span / seconds)))
        ratios.append(hour * (busiest / (steady * seconds) if busiest > chance else recorded))
    return Profile(hour, max(ratios[0], hour), max(ratios), source)


def usage_times(path: Path, column: str | None = None) -> list[float]:
    """When the operations of a usage file were, in seconds.

    :param column: with the times; ``time`` or ``TIMESTAMP`` unless given.
    :raises CapacityError: when the file cannot be read, has no such column, or something else in it.
    """
    try:
        header = read_header(path)
        found = [name for name in ((column,) if column else TIME_COLUMNS) if name in header]
        if not found:
            raise CapacityError(f"{path} has no column with times; it has: {', '.join(header)}")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            texts = [row[found[0]] for row in csv.DictReader(stream, fieldnames=header)][1:]
        moments = map(datetime.fromisoformat, texts)
        return [(moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() for moment in moments]
    except ReplayError as error:
        raise CapacityError(str(error)) from None
    except (OSError, ValueError, TypeError, csv.Error, OverflowError) as error:
        if isinstance(error, CapacityError):
            raise
        raise CapacityError(f"{path}: {error}; each row has a time like 2026-03-01T12:00:00Z") from None


TIME_COLUMNS = ("time", "TIMESTAMP")
SAMPLE = Path(__file__).with_name("sample_usage.csv")


def sample_profile() -> Profile:
    """The peaks unless told otherwise: the hours of ``scripts/sample_usage.csv``, within the hour :data:`BURSTS`.

    That file is made up, office hours and a quiet night; its 2,000 rows are too few to show bursts.
    """
    return profile_of(usage_times(SAMPLE), "hours: scripts/sample_usage.csv, made up; bursts: a recorded service")


def _busiest(ordered: Sequence[float], begin: float, seconds: float) -> int:
    return max(Counter(int((time - begin) // seconds) for time in ordered).values())


def _most_by_chance(mean: float, windows: int) -> int:
    """The most that one of so many windows has when nothing but chance varies them (once in a hundred times)."""
    allowed = 0.01 / windows
    count, likely, left = 0, math.exp(-mean), 1.0
    if likely == 0.0:  # so many that they are distributed normally
        return math.ceil(mean + 6 * math.sqrt(mean))
    while (left := left - likely) > allowed and count < 10 * mean + 100:
        count += 1
        likely *= mean / count
    return count


# --- What comes: accounts ----------------------------------------------------------------------------


@lru_cache(maxsize=256)
def harmonic(count: int, exponent: float) -> float:
    """The sum of 1 / k^exponent for k from 1 to ``count``; exact for the first thousand, then by the integral."""
    exact = min(count, 1_000)
    total = math.fsum(k**-exponent for k in range(1, exact + 1))
    if count > exact:
        low, high = exact + 0.5, count + 0.5
        total += math.log(high / low) if exponent == 1 else (high ** (1 - exponent) - low ** (1 - exponent)) / (
            1 - exponent
        )  # fmt: skip
    return total


def largest_share(accounts: int, exponent: float) -> float:
    """The share of all operations that the busiest account has."""
    return 1 / harmonic(accounts, exponent)


def distinct_accounts(operations: float, accounts: int, exponent: float, parts: float = 1.0) -> float:
    """How many different accounts so many operations are of, on average.

    :param parts: they come from one of so many equal parts of the accounts: a worker's lanes.
    """
    found = 0.0
    for count, share in _shares(accounts, exponent):
        found -= count * math.expm1(-operations * parts * share)
    return min(max(1.0, found / parts), operations)


def worker_shares(load: Load, lanes: int, workers: int) -> list[float]:
    """The share of all operations that each worker with a lane has, by the lanes of the accounts, the largest first.

    Lanes are shared evenly among workers, whatever comes through them.
    """
    total = harmonic(load.population, load.exponent)
    shares = [0.0] * lanes
    for rank, lane in enumerate(_lanes_of_the_busiest(load.population, lanes), 1):
        shares[lane] += rank**-load.exponent / total
    rest = max(0.0, 1 - sum(shares)) / lanes
    each = ([share + rest for share in shares[worker::workers]] for worker in range(min(workers, lanes)))
    return sorted(map(sum, each), reverse=True)


@lru_cache(maxsize=8)
def _lanes_of_the_busiest(accounts: int, lanes: int) -> list[int]:
    digits = len(str(accounts))
    return [lane_number(lane_of(f"user_{rank:0{digits}d}", lanes)) for rank in range(1, min(accounts, HEAD) + 1)]


HEAD = 20_000
"""So many of the busiest accounts are hashed to their lanes one by one; what the others have is spread evenly."""


@lru_cache(maxsize=256)
def _shares(accounts: int, exponent: float) -> list[tuple[int, float]]:
    """How many accounts have which share each: the first 32 one by one, then blocks that grow by a tenth."""
    starts = list(range(1, min(accounts, 32) + 1))
    while (following := math.ceil(starts[-1] * 1.1)) <= accounts:
        starts.append(following)
    total = harmonic(accounts, exponent)
    return [
        (end - start, ((start + end - 1) / 2) ** -exponent / total) for start, end in pairwise([*starts, accounts + 1])
    ]


# --- The load and the machines -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What has to be carried."""

    per_day: int
    """Operations."""
    profile: Profile
    """Its peaks."""
    size_for: Window = Window.MINUTE
    """The peak that parts are sized for; what is above it waits in the lanes."""
    single_share: float = SINGLE_SHARE
    """Operations that come as messages of their own, such as those whose answer is waited for."""
    accounts: int = 0
    """How many there are; 0 for one per hundred operations a day, at least a thousand."""
    exponent: float = EXPONENT
    """How unevenly they are used: the k-th of them in proportion to 1 / k^exponent."""
    events: float = 0.0
    """Messages to ``credits.events`` for each operation."""
    linger_seconds: float = LINGER_SECONDS
    """How long a producer's buffer waits for company."""

    @property
    def population(self) -> int:
        """How many accounts there are."""
        return self.accounts or max(1_000, self.per_day // 100)

    @property
    def mean(self) -> float:
        """Operations a second, over the day."""
        return self.per_day / DAY_SECONDS

    @property
    def peak(self) -> float:
        """Operations a second that parts are sized for."""
        return self.mean * self.peak_factor

    @property
    def peak_factor(self) -> float:
        """How many times the mean that is."""
        return {
            Window.HOUR: self.profile.hour,
            Window.MINUTE: self.profile.minute,
            Window.SECOND: self.profile.second,
        }[self.size_for]

    def messages(self, rate: float, lanes: int, producers: int) -> float:
        """How many messages an operation is, on average.

        :param rate: operations a second.
        :param producers: processes that buffer; a message has operations of one lane, from one of them.
        """
        company = rate * (1 - self.single_share) * self.linger_seconds / (lanes * producers)
        return self.single_share + (1 - self.single_share) / min(MAX_BATCH, 1 + company)


@dataclass(frozen=True, slots=True)
class Machines:
    """What there is to put the parts on; where each part ends."""

    box_cores: int = BOX_CORES
    """Of one machine with everything on it."""
    postgres_cores: int = POSTGRES_CORES
    wal_mb_per_s: float = WAL_MB_PER_S
    """Megabytes a second that Postgres may log: what its disk, its standbys and its archive keep up with."""
    disk_tb: float = 16.0
    """Of one Postgres."""
    network_mb_per_s: float = 1_250.0
    """Of the broker's machine: 10 Gbit/s."""
    round_trip_us: float = 250.0
    """Between two machines, with the kernel's and the driver's part of it."""
    connections: int = 500
    """Of one Postgres, for lane workers: each has one."""
    rabbitmq_cores: int = 16
    """Of one RabbitMQ node; at least three share the lanes' leaders."""
    rabbitmq_queue_messages_per_s: float = 6_000.0
    """Of one quorum queue: what one on a busy machine took in confirmed blocks, so at least."""
    utilisation: float = TARGET_UTILISATION


# --- Batches and workers -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workers:
    """What lane workers do with a load: what their batches are like, and how many they can apply."""

    costs: Costs
    load: Load
    count: int
    messages: float
    """Messages for each operation, those sent by themselves among them."""
    round_trip_us: float

    @property
    def most(self) -> int:
        """Operations of the largest batch: that of a worker with a backlog."""
        return max(1, math.floor(min(BATCH_OPERATIONS, BATCH_MESSAGES / self.messages)))

    def batch(self, operations: float) -> Batch:
        """A batch of so many operations."""
        accounts = distinct_accounts(operations, self.load.population, self.load.exponent, self.count)
        return Batch(operations, operations * self.messages, operations * self.load.single_share, accounts)

    def seconds(self, operations: float) -> float:
        """How long such a batch takes."""
        return self.costs.service_us(self.batch(operations), self.load.events, self.round_trip_us) / 1e6

    @property
    def rate(self) -> float:
        """Operations a second of one worker that has a backlog."""
        return self.most / self.seconds(self.most)

    def elastic(self, rate: float) -> Batch:
        """The batch that so many operations a second make of themselves; see :func:`elastic_batch`."""
        least = 1 / max(self.messages, 1 / self.most)
        return self.batch(elastic_batch(rate / self.count, self.seconds, least, self.most))


def elastic_batch(rate: float, seconds: Any, least: float, most: float) -> float:
    """How many operations a batch has, when each takes what came while the one before was applied.

    :param rate: operations a second that come to one worker.
    :param seconds: tells how long a batch of so many operations takes.
    :param least: operations of one message.
    :param most: operations of the largest batch; so many when more comes than is applied.
    """
    low, high = least, most
    if rate * seconds(low) <= low:
        return low
    if rate * seconds(high) >= high:
        return high
    for _ in range(30):  # the cost of an operation falls as batches grow, so there is one crossing
        middle = (low + high) / 2
        low, high = (middle, high) if rate * seconds(middle) > middle else (low, middle)
    return high


# --- The plan ----------------------------------------------------------------------------------------

ONE_BOX, SERVERS, CITUS = "one box", "one Postgres", "Citus"
REDIS, RABBITMQ = "Redis", "RabbitMQ"

COPIES = 2.0
"""What a quorum queue on three nodes costs in all, as a multiple of one with a single copy: an assumption."""

FEW, FULL = 2, 10
"""Operations in a message: what is hardly a batch, and what is a good one."""

PARTITIONED_BYTES = 1e12
"""From so much a year on, tables are partitioned: vacuum and index builds of one that large take hours."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Where one part of the design ends on the machines that are there."""

    part: str
    per_second: float
    """Operations, at the target utilisation."""
    per_day: float
    """Operations, with the same peaks."""
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load needs."""

    per_day: int
    mean_per_s: float
    peak_per_s: float
    database: str
    """``one box``, ``one Postgres`` or ``Citus``."""
    broker: str
    """``Redis`` or ``RabbitMQ``."""
    workers: int
    """Lane worker processes."""
    worker_cores: float
    """That they keep busy at the peak with full batches, at the target utilisation."""
    lanes: int
    producers: int
    postgres_nodes: int
    postgres_cores: float
    """Of all nodes, likewise."""
    broker_nodes: int
    broker_cores: float
    """Of one Redis, even where it is RabbitMQ that is needed."""
    rabbitmq_cores: float
    """Of all nodes, were it RabbitMQ."""
    broker_mb_per_s: float
    """Over the broker's network at the peak, in and out."""
    wal_mb_per_s: float
    """Megabytes a second at the peak, of all nodes."""
    wal_gb_per_day: float
    stored_gb_per_day: float
    stored_tb_per_year: float
    commits_per_s: float
    """At the peak."""
    batch_at_peak: float
    """Operations of a transaction."""
    batch_at_mean: float
    operations_per_message: float
    worker_per_s: float
    """Operations a second that one lane worker applies when it has a backlog."""
    largest_account: float
    """Its share of all operations."""
    hot_lane_fits: bool
    """Whether one worker keeps up with the busiest account's lane at the peak."""
    busiest_worker: float
    """How many times the mean of all workers the one with the busiest lanes has to do."""
    limits: list[Limit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Why it looks like this, and what changes; sentences for people."""


def choose(load: Load, costs: Costs, machines: Machines) -> Choice:
    """Find the smallest design that carries a load.

    :raises CapacityError: for a load of nothing.
    """
    if load.per_day < 1 or load.peak_factor < 1 or load.accounts < 0 or not 0 <= load.single_share <= 1:
        raise CapacityError("a load has at least one operation a day and one account, and a peak of at least its mean")
    box = _sized(load, costs, machines, 0.0)
    if _box_cores(box, machines) <= machines.box_cores and box.broker(machines) == REDIS:
        return Choice(ONE_BOX, 1, box)
    sized = _sized(load, costs, machines, machines.round_trip_us)
    nodes = _postgres_nodes(sized, machines)
    if nodes == 1:
        return Choice(SERVERS, 1, sized)
    # Each batch has accounts of every node, and each node its part of the fixed costs: so more nodes may be needed.
    for _ in range(20):
        line = costs.postgres_us
        spread = replace(costs, postgres_us=replace(line, transaction=line.transaction * nodes))
        sized = _sized(load, spread, machines, 2 * machines.round_trip_us)
        needed = _postgres_nodes(sized, machines)
        if needed <= nodes:
            break
        nodes = needed
    return Choice(CITUS, nodes, sized)


@dataclass(frozen=True, slots=True)
class Sized:
    """A load with as many workers and lanes as it needs."""

    workers: Workers
    lanes: int
    producers: int
    full: Batch
    """What a transaction has in it when there is a backlog."""
    at_peak: Batch
    at_mean: Batch

    @property
    def load(self) -> Load:
        return self.workers.load

    def cores(self, line: Line, event_us: float) -> float:
        """That a part keeps busy at the peak, with full batches."""
        each = line.per_operation(self.full) + event_us * self.load.events
        return self.load.peak * each / 1e6

    @property
    def worker_cores(self) -> float:
        return self.cores(self.workers.costs.worker_us, self.workers.costs.event.worker_us)

    @property
    def postgres_cores(self) -> float:
        return self.cores(self.workers.costs.postgres_us, self.workers.costs.event.postgres_us)

    @property
    def broker_cores(self) -> float:
        return self.cores(self.workers.costs.broker_us, self.workers.costs.event.broker_us)

    @property
    def producer_cores(self) -> float:
        return self.cores(self.workers.costs.producer_us, 0.0)

    def wal_bytes(self, batch: Batch, rate: float) -> float:
        """What Postgres logs of an operation: rows, and pages that it changes for the first time since a checkpoint."""
        costs = self.workers.costs
        pages = self.load.population * PAGES_PER_ACCOUNT
        changed = rate * CHECKPOINT_SECONDS
        first = pages * -math.expm1(-TOUCHES * changed / pages) / changed
        return (
            costs.wal_bytes.per_operation(batch)
            + costs.event.wal_bytes * self.load.events
            + min(first, TOUCHES) * FULL_PAGE_BYTES
        )

    @property
    def wal_at_peak(self) -> float:
        """Bytes a second."""
        return self.load.peak * self.wal_bytes(self.at_peak, self.load.mean)

    @property
    def broker_bytes_at_peak(self) -> float:
        """Bytes a second."""
        costs = self.workers.costs
        each = costs.broker_bytes.per_operation(self.at_peak) + costs.event.broker_bytes * self.load.events
        return self.load.peak * each

    def broker(self, machines: Machines) -> str:
        """Redis, as long as its one core and its network are enough."""
        cores = self.broker_cores <= machines.utilisation
        network = self.broker_bytes_at_peak <= machines.network_mb_per_s * 1e6 * machines.utilisation
        return REDIS if cores and network else RABBITMQ


def _sized(load: Load, costs: Costs, machines: Machines, round_trip_us: float) -> Sized:
    """Find the number of workers, lanes and producers; each depends on the others, and only ever grows."""
    count, lanes, producers = 1, LANES, 1
    while True:
        messages = load.messages(load.peak, lanes, producers)
        workers = Workers(costs, load, count, messages, round_trip_us)
        needed = max(count, math.ceil(load.peak / (workers.rate * machines.utilisation)))
        sending = load.peak * costs.producer_us.of(Batch(1, messages, load.single_share, 1)) / 1e6
        producers_needed = max(producers, math.ceil(sending / machines.utilisation))
        lanes_needed = min(MAX_LANES, max(lanes, _power_of_two(LANES_PER_WORKER * needed)))
        if (needed, lanes_needed, producers_needed) == (count, lanes, producers):
            break
        count, lanes, producers = needed, lanes_needed, producers_needed
    quiet = replace(workers, messages=load.messages(load.mean, lanes, producers))
    return Sized(
        workers, lanes, producers, workers.batch(workers.most), workers.elastic(load.peak), quiet.elastic(load.mean)
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _box_cores(sized: Sized, machines: Machines) -> float:
    """Of one machine that does everything but produce."""
    return (sized.worker_cores + sized.postgres_cores + sized.broker_cores) / machines.utilisation


def _postgres_nodes(sized: Sized, machines: Machines) -> int:
    """By whatever needs most: cores, log, connections."""
    cores = sized.postgres_cores / (machines.postgres_cores * machines.utilisation)
    log = sized.wal_at_peak / (machines.wal_mb_per_s * 1e6 * machines.utilisation)
    return max(1, math.ceil(max(cores, log, sized.workers.count / machines.connections)))


class Choice(NamedTuple):
    """A design for a load."""

    database: str
    postgres_nodes: int
    sized: Sized


def plan(load: Load, costs: Costs = MEASURED, machines: Machines | None = None) -> Plan:
    """Work out what a load needs.

    :raises CapacityError: for a load of nothing.
    """
    machines = machines or Machines()
    database, nodes, sized = choose(load, costs, machines)
    workers, costs = sized.workers, sized.workers.costs
    peak, share = load.peak, largest_share(load.population, load.exponent)
    broker = sized.broker(machines)
    rabbitmq_cores = COPIES * sized.cores(costs.rabbitmq_us, costs.rabbitmq_us.message) / machines.utilisation
    broker_nodes = 1 if broker == REDIS else max(3, math.ceil(rabbitmq_cores / machines.rabbitmq_cores))
    # The busiest account's lane has one worker, and the lane's share of all other accounts. More comes to it, so
    # that its messages have more in them.
    hot_load = peak * (share + (1 - share) / sized.lanes)
    hot = replace(workers, messages=load.messages(hot_load, 1, sized.producers))
    hot_batch = Batch(hot.most, hot.most * hot.messages, hot.most * load.single_share, 1)
    hot_rate = hot.most / (costs.service_us(hot_batch, load.events, hot.round_trip_us) / 1e6)
    stored = costs.stored_bytes * load.per_day
    found = Plan(
        per_day=load.per_day,
        mean_per_s=load.mean,
        peak_per_s=peak,
        database=database,
        broker=broker,
        workers=workers.count,
        worker_cores=sized.worker_cores / machines.utilisation,
        lanes=sized.lanes,
        producers=sized.producers,
        postgres_nodes=nodes,
        postgres_cores=sized.postgres_cores / machines.utilisation,
        broker_nodes=broker_nodes,
        broker_cores=sized.broker_cores / machines.utilisation,
        rabbitmq_cores=rabbitmq_cores,
        broker_mb_per_s=sized.broker_bytes_at_peak / 1e6,
        wal_mb_per_s=sized.wal_at_peak / 1e6,
        wal_gb_per_day=load.per_day * sized.wal_bytes(sized.at_mean, load.mean) / 1e9,
        stored_gb_per_day=stored / 1e9,
        stored_tb_per_year=stored * YEAR_DAYS / 1e12,
        commits_per_s=peak / sized.at_peak.operations,
        batch_at_peak=sized.at_peak.operations,
        batch_at_mean=sized.at_mean.operations,
        operations_per_message=1 / workers.messages,
        worker_per_s=workers.rate,
        largest_account=share,
        hot_lane_fits=hot_load <= hot_rate,
        busiest_worker=worker_shares(load, sized.lanes, workers.count)[0] * workers.count,
        limits=_limits(sized, machines, hot_rate, share),
    )
    found.notes.extend(_sentences(found, load, machines))
    return found


def _limits(sized: Sized, machines: Machines, hot_rate: float, share: float) -> list[Limit]:
    """The rate at which each part is at its target utilisation, the first to end first."""
    load = sized.load
    used = machines.utilisation

    def reaches(amount: float, per_peak: float) -> float:
        """The operations a second at which a part that now needs ``per_peak`` needs ``amount``."""
        return load.peak * amount * used / per_peak

    found = [
        ("one box", reaches(machines.box_cores, _box_cores(sized, machines) * used),
         f"workers, Postgres and broker on {machines.box_cores} cores"),
        ("Redis", reaches(1, sized.broker_cores), "it works on one core"),
        ("Redis network", reaches(machines.network_mb_per_s * 1e6, sized.broker_bytes_at_peak),
         f"{machines.network_mb_per_s:,.0f} MB/s"),
        ("Postgres CPU", reaches(machines.postgres_cores, sized.postgres_cores), f"{machines.postgres_cores} cores"),
        ("Postgres log", reaches(machines.wal_mb_per_s * 1e6, sized.wal_at_peak),
         f"{machines.wal_mb_per_s:,.0f} MB/s of WAL"),
        ("Postgres connections", machines.connections * sized.workers.rate * used,
         f"{machines.connections} lane workers, one connection each"),
        ("lanes", MAX_LANES / LANES_PER_WORKER * sized.workers.rate * used,
         f"{MAX_LANES:,} lanes, {LANES_PER_WORKER} for each worker"),
        ("RabbitMQ queue", machines.rabbitmq_queue_messages_per_s * used / (share * sized.workers.messages),
         f"the busiest account's lane; a queue takes {machines.rabbitmq_queue_messages_per_s:,.0f} messages/s"),
        ("busiest account", hot_rate * used / share,
         f"it has {share:.2%} of all, and one process applies {hot_rate:,.0f}/s of one account"),
    ]  # fmt: skip
    return sorted(
        (Limit(part, rate, rate / load.peak_factor * DAY_SECONDS, why) for part, rate, why in found),
        key=lambda limit: limit.per_second,
    )


def _sentences(found: Plan, load: Load, machines: Machines) -> list[str]:
    """Why a plan looks as it does, for who runs it."""
    said = []
    if found.database == ONE_BOX:
        said.append(
            f"One machine with {machines.box_cores} cores is fast enough for all of it (docker-compose.yml). What"
            " survives its loss is another question: a standby for Postgres, and RabbitMQ on three nodes, are for that."
        )
    elif found.database == SERVERS:
        said.append(
            f"One machine with {machines.box_cores} cores is too small: Postgres gets one of its own, the broker too,"
            f" and {found.workers} lane workers run where there are cores. Between machines a batch waits for"
            f" {ROUND_TRIPS} round trips; larger batches make up for that by themselves."
        )
    else:
        said.append(
            f"One Postgres is outgrown (at the peak {found.postgres_cores:.0f} cores,"
            f" {found.wal_mb_per_s:,.0f} MB/s of log and {found.workers} connections; it ends at"
            f" {machines.postgres_cores}, {machines.wal_mb_per_s:,.0f} and {machines.connections}):"
            f" {found.postgres_nodes} nodes share the accounts by hash (Citus: every ledger table leads with the"
            " account). A batch has accounts of many nodes then and commits in two phases; that is counted here, and"
            " was not tried. Ledgers of their own for parts of the accounts (database, broker and workers each;"
            " transfers by message) avoid it."
        )
    if found.broker == RABBITMQ:
        said.append(
            f"Redis works on one core and would need {found.broker_cores:.1f}: RabbitMQ instead, quorum queues, the"
            f" lanes' leaders spread over {found.broker_nodes} nodes of {machines.rabbitmq_cores} cores. One node was"
            " measured; that the copies on two others cost as much again is an assumption."
        )
    elif found.database != ONE_BOX:
        said.append(
            f"Redis is enough for speed ({found.broker_cores:.2f} cores of the one it uses). RabbitMQ on three nodes"
            f" ({found.rabbitmq_cores:.1f} cores) is for messages that must survive the loss of a machine."
        )
    if found.operations_per_message < FEW and found.producers > 1 and load.single_share <= 1 / FEW:
        linger = (FULL - 1) * found.lanes * found.producers / (found.peak_per_s * (1 - load.single_share))
        said.append(
            f"{found.producers} producers over {found.lanes:,} lanes put {found.operations_per_message:.1f} operations"
            f" in a message. A linger of {linger:.2g} s would put about {FULL} in each that is buffered: fewer broker"
            " nodes and workers. So would producers that each send for a part of the accounts."
        )
    if found.lanes > LANES:
        said.append(
            f"{found.lanes:,} lanes instead of {LANES} (CREDITLANE_LANES), so that each worker has at least"
            f" {LANES_PER_WORKER}: change it before the load comes, the procedure is in the README."
        )
    if found.stored_tb_per_year * 1e12 > PARTITIONED_BYTES:
        days = machines.disk_tb * 1e3 * found.postgres_nodes / found.stored_gb_per_day
        said.append(
            f"The tables grow by {found.stored_gb_per_day:,.0f} GB a day: partition operations and entries by the hash"
            f" of the account. {machines.disk_tb:g} TB a node are full after {days:,.0f} days; decide before that what"
            " is moved to cheaper storage."
        )
    at_peak = found.busiest_worker * found.peak_per_s / (found.workers * found.worker_per_s)
    if at_peak > 1 and found.workers > 1:
        said.append(
            f"The worker with the busiest lanes has {found.busiest_worker:.1f} times what the others have, at the peak"
            f" {at_peak:.1f} times what it can apply: its lanes lag until that is over, the others do not."
        )
    if not found.hot_lane_fits:
        said.append(
            f"The busiest account has {found.largest_account:.2%} of all operations, more than one process applies at"
            " the peak, and an account is never split: its lane lags until the peak is over. Split it into accounts of"
            " its own, or have its producer send many operations per message."
        )
    return said


@dataclass(frozen=True, slots=True)
class Change:
    """Where the design changes as a load grows."""

    per_day: int
    """The first load that needs the next one, to three digits."""
    database: str
    broker: str


def changes(load: Load, costs: Costs = MEASURED, machines: Machines | None = None) -> list[Change]:
    """From which load on which design is needed, from one operation a day up to :data:`MAX_PER_DAY`.

    :param load: of which all but the operations a day is taken.
    """
    machines = machines or Machines()

    def design(per_day: int) -> tuple[str, str]:
        choice = choose(replace(load, per_day=per_day), costs, machines)
        return choice.database, choice.sized.broker(machines)

    found = [Change(1, *design(1))]
    powers = [10**power for power in range(len(str(MAX_PER_DAY)))]
    for low, high in pairwise(powers):
        while (wanted := design(high)) != (found[-1].database, found[-1].broker):
            below, above = max(low, found[-1].per_day), high
            while above - below > above / 1_000:
                middle = (below + above) // 2
                below, above = (
                    (middle, above) if design(middle) == (found[-1].database, found[-1].broker) else (below, middle)
                )
            found.append(Change(int(float(f"{above:.3g}")), *design(above)))
            if (found[-1].database, found[-1].broker) == wanted:
                break
    return found


MAX_PER_DAY = 10**13
"""The largest load that is planned for."""


def rate_of_cores(costs: Costs, batch: Batch, cores: float, workers: int) -> float:
    """Operations a second when producer, workers, Postgres and broker share so many cores, and nothing is idle.

    :param workers: lane worker processes, each of which waits for Postgres and the broker.
    """
    lines = (costs.producer_us, costs.worker_us, costs.postgres_us, costs.broker_us)
    total = sum(line.per_operation(batch) for line in lines)
    return 1e6 * min(cores / total, workers * batch.operations / costs.service_us(batch))
