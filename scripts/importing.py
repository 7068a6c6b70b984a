"""Importing a file of accounts and balances: two passes over it, shared by several processes.

The first pass checks every line and writes nothing. The second one writes: each process owns its share of the lanes,
as a lane worker does, through the very connection that it writes with, and sends the accounts of those lanes through
the rules of the ledger. What is done is in the ledger alone: operation ids follow from the import's name and the
account, so whoever was killed half way is started again, and finds what was written before.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self
from zlib import crc32

import msgspec
from psycopg import Connection

from creditlane.codes import Code
from creditlane.contract import Grant, Message
from models.audit_processes import HelperError
from models.catalog import CatalogText, read_catalog
from models.catalog_texts import keep
from models.rules.catalog import Notify
from scripts.import_reading import BadLine, Checker, LineError, Operation, Record, Source, prefix_of
from workers.bulk_writer import BulkWriter, LanesTakenError, known_accounts, own_lanes
from workers.ledger_writer import CONFLICT, REPLAYED, Job, LedgerWriter, connect
from workers.quarantine import Quarantined
from workers.rows import texts

CHUNK = 500
"""Accounts that are handed to a process, and written in one transaction."""

AHEAD = 3
"""Chunks that a process may have before it: it need not wait for the reader."""

EXAMPLES = 20
"""Lines of one kind of finding that are kept; all are counted."""

APPLICATION = "creditlane import"
SILENT_SECONDS = 120.0
"""How long a process may wait for lines before the database takes its lanes from it."""

WRITTEN = """
SELECT o.account, o.operation, o.status, o.arguments::text
FROM unnest(%s::text[], %s::text[]) AS k(account, operation)
JOIN operations o ON o.account = k.account AND o.operation = k.operation
"""


@dataclass(frozen=True)
class Order:
    """What the processes of an import are told; everything in it can be sent to another process."""

    name: str
    database_url: str
    catalog_name: str
    lanes: int
    welcome: bool = False
    notify: bool = False
    """Whether accounts get the notices that the same operations of a producer would give."""
    add_to_existing: bool = False
    """Whether accounts that were opened by others get the credits; they are refused otherwise."""


BAD, ENDED, EXISTS, REFUSED, CONFLICTS = "bad", "ended", "exists", "refused", "conflict"
"""The kinds of finding: lines that cannot be imported; lots that have ended; accounts that others opened; operations
that the ledger refused, now or in an earlier run; operations whose content differs from that of an earlier run."""


class Found(msgspec.Struct, array_like=True):
    """What a part of an import, or all of it, came to."""

    accounts: int = 0
    operations: int = 0
    """Of lines that are good; of a pass that writes, those that are in the ledger now:"""
    applied: int = 0
    replayed: int = 0
    """Operations that an earlier run had applied."""
    micro: dict[str, int] = {}
    """By source, micro-credits: of lines that are good; of a pass that writes, those that are in the ledger now."""
    counts: dict[str, int] = {}
    examples: dict[str, list[BadLine]] = {}
    """By kind, the first lines of it."""

    def note(self, kind: str, line: BadLine) -> None:
        """Count a finding."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(line)

    def add(self, source: str, micro: int) -> None:
        """Count credits."""
        self.micro[source] = self.micro.get(source, 0) + micro

    def count_operation(self, message: Message, *, replayed: bool = False) -> None:
        """Count an operation that is in the ledger."""
        self.operations += 1
        if replayed:
            self.replayed += 1
        else:
            self.applied += 1
        if isinstance(message, Grant):
            self.add(message.source, int(message.amount))

    def take(self, other: Found) -> None:
        """Add what another part came to."""
        self.accounts += other.accounts
        self.operations += other.operations
        self.applied += other.applied
        self.replayed += other.replayed
        for source, micro in other.micro.items():
            self.add(source, micro)
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            lines = sorted([*self.examples.get(kind, ()), *other.examples[kind]], key=lambda line: line.line)
            self.examples[kind] = lines[:EXAMPLES]

    def count(self, *kinds: str) -> int:
        """How many findings there are of some kinds."""
        return sum(self.counts.get(kind, 0) for kind in kinds)


_encode = msgspec.msgpack.Encoder().encode
_decode_records = msgspec.msgpack.Decoder(list[Record]).decode
_decode_found = msgspec.msgpack.Decoder(Found).decode

CHECK, WRITE, OWN = b"c", b"w", b"o"
"""What a message to a process begins with; the records follow."""
DONE, TAKEN, FAILED = b"d", b"t", b"f"
"""What its answer begins with; what was found follows, or the reason."""

Progress = Callable[[int, int], None]
"""Told how many bytes are read and how many there are."""


class Crew:
    """The processes of an import; each has the accounts of its own lanes.

    :param processes: how many; one is this one.
    """

    def __init__(self, order: Order, processes: int) -> None:
        self._order = order
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Pipe] = []
        self._processes: list[BaseProcess] = []
        self._alone = Hand(order, range(order.lanes)) if processes == 1 else None
        several = 0 if processes == 1 else min(processes, order.lanes)
        for number in range(several):
            ours, theirs = context.Pipe()
            lanes = range(number, order.lanes, several)
            process = context.Process(target=_work, args=(theirs, order, lanes), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._waiting = [0] * len(self._pipes)
        self._found = Found()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._alone is not None:
            self._alone.close()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(None if kind is None else 0)
            if process.is_alive():
                process.terminate()
                process.join()

    def own_lanes(self) -> None:
        """Take the lanes, so that no worker serves them.

        :raises LanesTakenError: when a worker does.
        """
        for place in range(self._places):
            self._send(place, OWN, [])
        self._finish()

    @property
    def _places(self) -> int:
        return len(self._pipes) or 1

    def check(self, source: Source, progress: Progress) -> Found:
        """Check every line of a file."""
        return self._pass(CHECK, source, progress)

    def write(self, source: Source, progress: Progress) -> Found:
        """Write every good line of a file into the ledger.

        :raises HelperError: when a process ended or could not go on: what it had committed stands.
        """
        return self._pass(WRITE, source, progress)

    def _pass(self, what: bytes, source: Source, progress: Progress) -> Found:
        self._found = Found()
        size = source.size()
        chunks: list[list[Record]] = [[] for _ in range(self._places)]
        for record in source.records():
            if isinstance(record, BadLine):
                self._found.note(BAD, record)
                continue
            place = crc32(record.account.encode()) % self._order.lanes % self._places
            chunk = chunks[place]
            chunk.append(record)
            if len(chunk) == CHUNK:
                self._send(place, what, chunk)
                chunk.clear()
                progress(source.bytes_read, size)
        for place, chunk in enumerate(chunks):
            if chunk:
                self._send(place, what, chunk)
        self._finish()
        progress(size, size)
        return self._found

    def _send(self, place: int, what: bytes, records: Sequence[Record]) -> None:
        if self._alone is not None:
            self._found.take(self._alone.do(what, records))
            return
        while self._waiting[place] >= AHEAD:
            self._listen([place])
        try:
            self._pipes[place].send_bytes(what + _encode(records))
        except OSError:
            raise HelperError("a process of the import ended before its work was done") from None
        self._waiting[place] += 1

    def _finish(self) -> None:
        while busy := [place for place, waiting in enumerate(self._waiting) if waiting]:
            self._listen(busy)

    def _listen(self, places: Iterable[int]) -> None:
        by_pipe = {self._pipes[place]: place for place in places}
        for ready in wait(list(by_pipe)):
            assert isinstance(ready, Pipe)
            try:
                told = ready.recv_bytes()
            except (EOFError, OSError):
                raise HelperError("a process of the import ended before its work was done") from None
            if told[:1] == TAKEN:
                raise LanesTakenError(told[1:].decode())
            if told[:1] == FAILED:
                raise HelperError(f"a process of the import could not go on ({told[1:].decode().strip()})")
            self._waiting[by_pipe[ready]] -= 1
            self._found.take(_decode_found(told[1:]))


# --- In a process ------------------------------------------------------------------------------------


def _work(pipe: Pipe, order: Order, lanes: Sequence[int]) -> None:
    """What a process does: chunks until there are no more, or until who asked is gone."""
    # What is there stays, and what comes has no circles: looking for them took a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000)
    try:
        hand = Hand(order, lanes)
        try:
            while True:
                told = pipe.recv_bytes()
                pipe.send_bytes(DONE + _encode(hand.do(told[:1], _decode_records(told[1:]))))
        finally:
            hand.close()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except LanesTakenError as error:
        pipe.send_bytes(TAKEN + str(error).encode())
    except Exception as error:
        pipe.send_bytes(FAILED + f"{type(error).__name__}: {error}".encode())


class Hand:
    """Does what a crew is asked for, with the accounts of some lanes."""

    def __init__(self, order: Order, lanes: Sequence[int]) -> None:
        self._order, self._lanes = order, lanes
        self._read = read_catalog(order.catalog_name)
        self._checker = Checker(order.name, self._read.catalog, order.welcome)
        self._importer: Importer | None = None

    def do(self, what: bytes, records: Sequence[Record]) -> Found:
        """Check records, write them, or own the lanes first."""
        found = Found()
        if what == CHECK:
            check_records(records, self._checker, found)
        elif what == OWN:
            self._importer = Importer(self._order, self._read, self._checker, self._lanes)
        else:
            assert self._importer is not None
            found = self._importer.write(records)
        return found

    def close(self) -> None:
        """Give the lanes back."""
        if self._importer is not None:
            self._importer.close()


def check_records(records: Iterable[Record], checker: Checker, found: Found) -> list[tuple[Record, list[Operation]]]:
    """Check records, note what is wrong with them, and count what is good.

    :returns: what is to be written of each good one.
    """
    good = []
    for record in records:
        try:
            operations, ended = checker.operations(record)
        except LineError as error:
            found.note(BAD, error.bad)
            continue
        for lot in ended:
            found.note(ENDED, BadLine(lot.line, "expires_at", f"the {lot.fields.get('source')} credits have ended"))
        found.accounts += 1
        found.operations += len(operations)
        for operation in operations:
            if isinstance(operation.message, Grant):
                found.add(operation.message.source, int(operation.message.amount))
        good.append((record, operations))
    return good


class Importer:
    """Writes the accounts of some lanes, which it owns.

    :param read: the catalog that they are written under.
    :raises LanesTakenError: when somebody else does.
    :raises CatalogError: when other content was used under the catalog's label.
    """

    def __init__(self, order: Order, read: CatalogText, checker: Checker, lanes: Sequence[int]) -> None:
        self._order, self._checker = order, checker
        self._connection: Connection[Any] = connect(order.database_url, APPLICATION, SILENT_SECONDS)
        try:
            own_lanes(self._connection, lanes)
            keep(self._connection, read, order.catalog_name)
        except BaseException:
            self._connection.close()
            raise
        catalog = read.catalog
        if not order.notify:
            catalog = msgspec.structs.replace(catalog, notify=Notify())
        self._bulk = BulkWriter(self._connection, lambda: catalog, _poison)
        self._writer = LedgerWriter(self._connection, lambda: catalog, _poison)

    def close(self) -> None:
        """Give the lanes back."""
        self._connection.close()

    def write(self, records: Sequence[Record]) -> Found:
        """Write the good ones of some accounts: those that are new in one transaction, the others in another.

        :raises psycopg.Error: when it is not known whether they are written: ask again.
        """
        found = Found()
        good = check_records(records, self._checker, found)
        found = Found(counts=found.counts, examples=found.examples)
        there = known_accounts(self._connection, [record.account for record, _ in good])
        opened = {name for name, is_open in there.items() if is_open}
        written = self._written([each for each in good if each[0].account in opened])
        new: list[Job] = []
        known: list[Job] = []
        for record, operations in good:
            found.accounts += 1
            account = record.account
            jobs = [Job(each.name, each.id, each.message, each.arguments, each.line) for each in operations]
            if account not in there:
                new += jobs
            elif account not in opened:
                known += jobs
            elif (account, jobs[0].operation) in written:
                for job in jobs:
                    # Byte for byte what an earlier run wrote: the ledger would answer as it did then.
                    if written.get((account, job.operation)) == ("applied", job.arguments.decode()):
                        found.count_operation(job.message, replayed=True)
                    else:
                        known.append(job)
            elif self._order.add_to_existing:
                known += jobs[1:]
            else:
                found.note(EXISTS, BadLine(record.line, "account", "was opened by others before"))
        for writer, jobs in ((self._bulk, new), (self._writer, known)):
            if jobs:
                writer.write(jobs)
                for job in jobs:
                    self._note(found, job)
        return found

    def _written(self, good: Sequence[tuple[Record, list[Operation]]]) -> dict[tuple[str, str], tuple[str, str]]:
        """What the ledger has of the operations: status and arguments by account and id."""
        pairs = [(record.account, each.id) for record, operations in good for each in operations]
        if not pairs:
            return {}
        accounts, ids = zip(*pairs, strict=True)
        rows = self._connection.execute(WRITTEN, (texts(accounts), texts(ids)))
        return {(account, operation): (status, arguments) for account, operation, status, arguments in rows}

    def _note(self, found: Found, job: Job) -> None:
        answer = job.answer
        assert answer is not None
        if job.status == CONFLICT:
            what = f"these {job.message.source} credits" if isinstance(job.message, Grant) else "this account"
            found.note(CONFLICTS, BadLine(job.source, "", f"an earlier run imported {what} otherwise"))
        elif answer.status != "applied":
            found.note(REFUSED, BadLine(job.source, "", msgspec.json.decode(answer.result)["code"]))
        else:
            found.count_operation(job.message, replayed=job.status == REPLAYED)


def _poison(job: Job, code: Code, reason: str, trace: str | None) -> Quarantined:
    """There is no message to be put aside: nothing of the batch is written."""
    raise RuntimeError(f"line {job.source}: {reason}")


# --- Afterwards --------------------------------------------------------------------------------------

GRANTED = """
SELECT source, sum(granted_micro)::bigint FROM grants WHERE operation ^@ %s GROUP BY source
"""


def granted(connection: Connection[Any], name: str) -> dict[str, int]:
    """What the ledger has of an import, by source, in micro-credits as they were granted."""
    return {source: int(micro) for source, micro in connection.execute(GRANTED, (prefix_of(name),))}
