"""What a lane worker counts, for Prometheus: ``CREDITLANE_METRICS_PORT`` serves it, and without it nothing listens.

From the worker itself, since events may be dropped by whoever watches them: Flower falls behind at some tens of
thousands a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from models.settings import Settings

registry = CollectorRegistry()

OPERATIONS = Counter(
    "creditlane_operations", "Operations answered, by what became of them.", ["status"], registry=registry
)
"""``status``: applied, rejected, replayed (an id that was answered before), conflict (an id with other content)."""

QUARANTINED = Counter(
    "creditlane_quarantined", "Messages and members put into quarantine.", ["code"], registry=registry
)

BATCH_SECONDS = Histogram(
    "creditlane_batch_seconds",
    "From the first read of a batch to its acknowledgement.",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
    registry=registry,
)
BATCH_OPERATIONS = Histogram(
    "creditlane_batch_operations",
    "Operations in one transaction.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000),
    registry=registry,
)
WAITED_SECONDS = Gauge(
    "creditlane_waited_seconds",
    "How long the oldest message of the last batch had been on its way, where its sender put the time on it.",
    registry=registry,
)
LANES = Gauge("creditlane_lanes_owned", "Lanes that this worker owns and consumes.", registry=registry)
BUFFERED = Gauge(
    "creditlane_buffered_operations", "Operations taken off the broker and not applied.", registry=registry
)
RETRIES = Counter(
    "creditlane_database_retries", "Attempts that the database failed, by SQLSTATE class.", ["sqlstate_class"],
    registry=registry,
)  # fmt: skip
AWAY_SECONDS = Gauge(
    "creditlane_database_away_seconds",
    "Since when no batch and no look at the lanes has succeeded; 0 while all is well. Nothing is lost, lanes wait.",
    registry=registry,
)
UNSENT_RESULTS = Counter(
    "creditlane_unsent_results", "Answers that could not be handed to a waiting sender; the ledger has them.",
    registry=registry,
)  # fmt: skip

CATALOG_VERSION = Gauge("creditlane_catalog_version", "The version of the catalog in force.", registry=registry)
CATALOG_REFUSED = Gauge(
    "creditlane_catalog_refused",
    "1 while the catalog's file as it stands is wrong, and the last good one is in force; the log says why.",
    registry=registry,
)
CATALOG_BEHIND = Gauge(
    "creditlane_catalog_behind", "1 while a later version than that in force here was in force elsewhere.",
    registry=registry,
)  # fmt: skip


STAGES = ("take", "decode", "read", "rules", "write", "commit", "results", "ack", "outbox", "events")
"""The way of a message through a lane worker, from the broker's bytes to the watchers' events. ``take`` is counted on
Redis alone: RabbitMQ sends."""


class Stages(Collector):
    """A clock for the steps of a worker's loop, which come one after the other: it shows where the time goes."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def end(self, stage: str) -> None:
        """The step ends that this is, and the next one begins."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._began
        self._began = now

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What Prometheus reads."""
        family = CounterMetricFamily(
            "creditlane_stage_seconds",
            "Where the time of a lane worker goes, by step of a message's way.",
            labels=["stage"],
        )
        for stage, seconds in self.seconds.items():
            family.add_metric([stage], seconds)
        yield family


stages = Stages()
registry.register(stages)


class Outage:
    """Since when the database has not let us work."""

    def __init__(self) -> None:
        self._since: float | None = None
        AWAY_SECONDS.set_function(lambda: self.seconds)

    @property
    def seconds(self) -> float:
        """How long it has lasted; 0 when there is none."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def begin(self, sqlstate: str | None) -> None:
        """Note one more failure.

        :param sqlstate: none where the database did not answer at all.
        """
        RETRIES.labels((sqlstate or "08")[:2]).inc()
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> float:
        """Note that it works; returns how long it did not."""
        lasted, self._since = self.seconds, None
        return lasted


def serve(settings: Settings) -> None:
    """Listen for Prometheus, if a port is set.

    :raises OSError: when the port is taken.
    """
    if settings.metrics_port:
        start_http_server(settings.metrics_port, settings.metrics_address, registry)
