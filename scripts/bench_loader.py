"""A process that the bench loads a server with: ``python -m scripts.bench_loader``, its order on standard input.

The order is a line of JSON; when all is prepared, a line is printed; the next line of the input is the start; what
there is to tell in the end is a line of JSON again. See :class:`scripts.bench_processes.Loaders`.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from kombu import Connection

from creditlane.client import CreditClient
from creditlane.lanes import lane_name
from models.catalog import load_catalog
from scripts.bench_harness import CATALOG, FEATURE, QUANTITY, consume_message, job, unexpected
from workers.ledger_writer import LedgerWriter, connect

FETCH = 500
"""Messages that are taken at once, as by a lane worker."""

WRITES = ("COPY", "UPDATE", "INSERT")
"""How the statements begin that write rows."""

STREAM_SECONDS = 0.005
"""How often a stream sends what has become due: often, or what is sent at once would be a load by itself."""

Write = tuple[str, Any]
"""A statement that writes, and its parameters; for a COPY, its lines."""


class Recorder(psycopg.Cursor[Any]):
    """A cursor that keeps what is written through it, to be written again elsewhere."""

    recorded: list[Write]
    """Where it is kept: set by who makes the class."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Recorder:
        """Execute a statement, and keep it if it writes."""
        if str(query).lstrip().startswith(WRITES):
            self.recorded.append((query, params))
        return super().execute(query, params, **options)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **options: Any) -> Iterator[psycopg.Copy]:
        """Copy, and keep the lines."""
        with super().copy(statement, params, **options) as stream:
            write = stream.write
            lines: list[str] = []

            def keep(block: Any) -> None:
                lines.append(block)
                write(block)

            stream.write = keep  # type: ignore[method-assign, assignment]
            yield stream
        self.recorded.append((statement, "".join(lines)))


def record(order: dict[str, Any]) -> list[list[Write]]:
    """Have the ledger writer write batches to a scratch ledger; returns what it wrote, batch by batch.

    So the rows are those of the ledger to the last column, whatever its rules, and cost the copying nothing.
    """
    batches: list[list[Write]] = []
    catalog = load_catalog(CATALOG)
    operations, size = order["operations"], order["batch"]
    with connect(order["scratch"], "creditlane bench") as connection:
        connection.execute("SET synchronous_commit = off")
        writer = LedgerWriter(connection, lambda: catalog, unexpected)
        for start in range(0, len(operations), size):
            kept: list[Write] = []
            connection.cursor_factory = type("Recording", (Recorder,), {"recorded": kept})
            writer.write(
                [
                    job("credits.consume", account, {"feature": FEATURE, "quantity": str(QUANTITY)}, operation)
                    for account, operation in operations[start : start + size]
                ]
            )
            batches.append(kept)
    return batches


def copy(order: dict[str, Any]) -> dict[str, Any]:
    """Write rows that are there already, each batch in a transaction, and do nothing else."""
    batches = record(order)
    with connect(order["database"], "creditlane bench") as connection, connection.cursor() as cursor:
        connection.execute("SET idle_session_timeout = 0")  # preparing the others takes as long as it takes
        start()
        for batch in batches:
            cursor.execute("BEGIN")
            for statement, lines in batch:
                if statement.lstrip().startswith("COPY"):
                    with cursor.copy(statement) as stream:
                        stream.write(lines)
            with connection.pipeline():
                for statement, parameters in batch:
                    if not statement.lstrip().startswith("COPY"):
                        cursor.execute(statement, parameters)
            cursor.execute("COMMIT")
    return {"ended": time.time()}


def drop(order: dict[str, Any]) -> dict[str, Any]:
    """Take the messages of lanes as a lane worker takes them, acknowledge them, and do nothing else."""
    taken: Counter[str] = Counter()
    messages = 0
    with Connection(order["broker"], transport="workers.redis_lanes:Transport") as connection:
        channel: Any = connection.channel()

        def receive(message: Any) -> None:
            taken[message.delivery_info["routing_key"]] += 1

        for number in order["lanes"]:
            channel.basic_consume(lane_name(number), False, receive, f"bench-{number}")
        start()
        while channel.fetch(FETCH):
            messages += taken.total()
            channel.acknowledge(dict(taken))
            taken.clear()
    return {"ended": time.time(), "messages": messages}


def stream(order: dict[str, Any]) -> dict[str, Any]:
    """Send so many consumes a second, one message each, until the next line comes."""
    accounts, rate = order["accounts"], order["per_second"]
    sent = 0
    with CreditClient(order["broker"], lanes=order["lanes"]) as client:
        start()
        began = time.monotonic()
        while not select.select([sys.stdin], [], [], STREAM_SECONDS)[0]:
            due = int((time.monotonic() - began) * rate)
            client._sender.send(
                [
                    consume_message(accounts[number % len(accounts)], f"stream-{number}", None, client.lanes)
                    for number in range(sent, due)
                ]
            )
            sent = due
    return {"seconds": time.monotonic() - began, "sent": sent}


def start() -> None:
    """Say that all is prepared, and wait for the start."""
    print("{}", flush=True)
    sys.stdin.readline()


KINDS = {"copy": copy, "drop": drop, "stream": stream}


def main() -> None:
    """Read the order, do it, tell what came of it."""
    order = json.loads(sys.stdin.readline())
    print(json.dumps(KINDS[order["kind"]](order)), flush=True)


if __name__ == "__main__":
    main()
