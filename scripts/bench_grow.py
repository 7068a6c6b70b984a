"""A ledger with a past: many accounts and entries, written in minutes rather than by the lanes in hours.

Every account has the same life: it was opened, was granted credits and was charged one after the other. The rules
apply that life once, to an account that stands for all; the rows that come out are copied for each account, with its
name, its instants and a chain of its own. So it is a ledger as the lanes write one, and an audit holds.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import msgspec
import psycopg
from psycopg import Connection, sql

from creditlane.amounts import format_amount
from creditlane.contract import decode_message
from models.catalog import load_catalog
from models.rules.posting import chain_hash
from models.rules.state import COUNTERS, Account, Entry
from tasks.ledger import apply
from workers.ledger_writer import COPY_ENTRIES, COPY_OPERATIONS

CATALOG = "metering"
GRANTED_MICRO = 10**15
"""What each account was granted, in micro-credits: nothing is refused."""

DAYS = 30
"""How long ago the first operation was; the others came evenly since then."""

BLOCK = 1000
"""Accounts that an operation was applied to at the same instant: as many as a batch of the lanes has at the most."""

SORT_MEMORY = "512MB"
"""For each index that is built."""

LOADED = ("operations", "entries", "accounts", "grants")
"""The tables that are filled."""

BUCKETS = ", ".join(f"{counter}_micro" for counter in COUNTERS)

Progress = Callable[[int, int], None]
"""Told how many entries are written and how many there will be."""

_NAME, _NOW = "account-of-all", datetime(2000, 1, 1, tzinfo=UTC)
"""What stands in the rows of the life for the name of an account, and for the instant of an operation."""
_HASH = "hash-of-entry"


class FillError(RuntimeError):
    """The ledger could not be filled; the text says why."""


def fill(database_url: str, accounts: int, entries: int, progress: Progress) -> None:
    """Fill an empty ledger; what was written lately lies behind what was written before, as in one that grew.

    Accounts are named ``user_00000`` and on. Each has one entry for its grant, the others are for charges of one
    credit, which are spread over the accounts evenly; the ids of its operations begin with ``fill-``.

    The indexes are taken away meanwhile and built in the end, as they were. If it fails, the database is of no use.

    :param database_url: a migrated database without accounts, in the role that owns the tables.
    :param accounts: how many, at least one.
    :param entries: how many, at least one for each account.
    :param progress: told how many entries are written; a build of the indexes follows the last.
    :raises ValueError: when there are more accounts than entries, or the ledger is not empty.
    :raises FillError: when a process could not go on.
    """
    if not 1 <= accounts <= entries:
        raise ValueError(f"{entries} entries are not enough for {accounts} accounts: each has one at least")
    with psycopg.connect(database_url, autocommit=True) as connection:
        if connection.execute("SELECT FROM accounts LIMIT 1").fetchone() is not None:
            raise ValueError("only an empty ledger is filled")
        definitions = _take_indexes(connection)
        row = connection.execute("SELECT ledger_now()").fetchone()
        assert row is not None
        _load(database_url, accounts, entries, row[0], progress)
        connection.execute("SELECT set_config('maintenance_work_mem', %s, false)", (SORT_MEMORY,))
        for definition in definitions:
            connection.execute(definition)
        connection.execute("VACUUM (FREEZE, ANALYZE)")
        connection.execute("CHECKPOINT")


def sizes(connection: Connection[Any], operations: int | None = None) -> dict[str, float]:
    """What the ledger takes on disk for each operation, in bytes, by table and index.

    :param operations: how many there are; counted unless given.
    :returns: by ``table`` (without its indexes) and ``table.index``, what an operation takes of it, and ``total``.
    """
    if operations is None:
        row = connection.execute("SELECT count(*) FROM operations").fetchone()
        operations = row[0] if row else 0
    found = connection.execute(
        "SELECT t.relname, NULL, pg_table_size(t.oid) FROM pg_class t"
        " WHERE t.relname = ANY(%(tables)s) AND t.relnamespace = current_schema()::regnamespace"
        " UNION ALL SELECT t.relname, i.relname, pg_relation_size(i.oid) FROM pg_class t"
        " JOIN pg_index x ON x.indrelid = t.oid JOIN pg_class i ON i.oid = x.indexrelid"
        " WHERE t.relname = ANY(%(tables)s) AND t.relnamespace = current_schema()::regnamespace ORDER BY 1, 2",
        {"tables": list(LOADED)},
    )
    taken = {table if index is None else f"{table}.{index}": size / max(1, operations) for table, index, size in found}
    return {**taken, "total": sum(taken.values())}


# --- Indexes -----------------------------------------------------------------------------------------


def _take_indexes(connection: Connection[Any]) -> list[str]:
    """Drop foreign keys, keys and indexes of the tables.

    :returns: the statements that make them again, in order.
    """
    tables = {"tables": list(LOADED)}
    constraints = connection.execute(
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid = ANY(%(tables)s::regclass[]) AND contype IN ('f', 'p', 'u')"
        " ORDER BY contype = 'f' DESC, conname",
        tables,
    ).fetchall()
    indexes = connection.execute(
        "SELECT c.relname, pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " WHERE i.indrelid = ANY(%(tables)s::regclass[])"
        " AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = i.indexrelid) ORDER BY 1",
        tables,
    ).fetchall()
    for table, name, _ in constraints:
        connection.execute(
            sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(sql.Identifier(table), sql.Identifier(name))
        )
    for name, _ in indexes:
        connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(name)))
    again = [
        sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {}")
        .format(sql.Identifier(table), sql.Identifier(name), sql.SQL(definition))
        .as_string(connection)
        for table, name, definition in reversed(constraints)  # a foreign key needs the key that it refers to
    ]
    return again + [definition for _, definition in indexes]


# --- Processes ---------------------------------------------------------------------------------------


def _load(database_url: str, accounts: int, entries: int, now: datetime, progress: Progress) -> None:
    """Write all rows, by one process for each core."""
    context = multiprocessing.get_context("spawn")
    processes = max(1, min(os.cpu_count() or 1, accounts // BLOCK))
    pipes: list[Pipe] = []
    started = []
    try:
        for number in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            stripe = Stripe(accounts, entries, now, number, processes)
            process = context.Process(target=_write, args=(theirs, database_url, stripe), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        done = 0
        while pipes:
            for ready in wait(pipes):
                assert isinstance(ready, Pipe)
                try:
                    told = ready.recv()
                except (EOFError, OSError):
                    raise FillError("a process that fills the ledger ended before its work was done") from None
                if told is None:
                    pipes.remove(ready)
                elif isinstance(told, int):
                    done += told
                    progress(done, entries)
                else:
                    raise FillError(f"a process that fills the ledger could not go on: {told}")
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join()


def _write(pipe: Pipe, database_url: str, stripe: Stripe) -> None:
    """What such a process does: tells how many entries each block has, and None in the end."""
    try:
        with psycopg.connect(database_url, autocommit=True) as connection:
            for written in stripe.write(connection):
                pipe.send(written)
        pipe.send(None)
    except (BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


# --- Rows --------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one operation writes, as lines of COPY in which :data:`_NAME`, :data:`_NOW` and :data:`_HASH` stand."""

    operation: str
    entry_line: str | None
    entry: Entry | None


class Life(NamedTuple):
    """What every account went through, and where it stands after each of its charges."""

    steps: list[Step]
    account: list[str]
    """A line of ``accounts`` after each step."""
    grant: list[str]


def _life(charges: int) -> Life:
    """Let the rules apply the life of an account: opened, granted, charged so many times."""
    catalog = load_catalog(CATALOG)
    account = Account(_NAME)
    life = Life([], [], [])
    operations: list[tuple[str, dict[str, Any]]] = [
        ("credits.open", {}),
        ("credits.grant", {"amount": format_amount(GRANTED_MICRO), "source": "bench"}),
        *([("credits.consume", {"feature": "completion", "quantity": "1"})] * charges),
    ]
    for number, (name, arguments) in enumerate(operations):
        operation = f"fill-{number:010d}"
        raw = msgspec.json.encode({"account": _NAME, **arguments})
        row = apply(account, name, operation, decode_message(name, raw), raw, _NOW, catalog).row
        assert row is not None
        entry = account.entries.pop() if account.entries else None
        line = None if entry is None else _line(_NAME, *entry[:-1], _HASH)
        life.steps.append(Step(_line(_NAME, *row), line, entry))
        life.account.append(
            _line(
                _NAME, account.kind, account.status, account.opened_at, account.updated_at, account.operations,
                account.seq, _HASH, account.last_grant, *(getattr(account, counter) for counter in COUNTERS),
            )
        )  # fmt: skip
        life.grant.extend(
            _line(
                _NAME, grant.id, grant.source, grant.priority, grant.effective_at, grant.created_at, grant.operation,
                grant.is_open, *(getattr(grant, counter) for counter in COUNTERS),
            )
            for grant in account.order
        )  # fmt: skip
    return life


def _line(*values: Any) -> str:
    """A row as COPY takes it; nothing in a life has to be escaped."""
    line = "\t".join(
        "\\N" if value is None else str(value, "utf-8") if isinstance(value, bytes) else str(value) for value in values
    )
    assert "\\" not in line.replace("\\N", "")
    return line.replace(_HASH, "\\\\x" + _HASH)


class Stripe(NamedTuple):
    """What one process writes: every so many blocks of accounts, one operation after the other."""

    accounts: int
    entries: int
    now: datetime
    number: int
    of: int

    def write(self, connection: Connection[Any]) -> Iterator[int]:
        """Write all rows.

        :returns: how many entries, block by block.
        """
        charges, more = divmod(self.entries - self.accounts, self.accounts)
        life = _life(charges + 1)
        blocks = -(-self.accounts // BLOCK)
        own = [
            [f"user_{number:05d}" for number in range(block * BLOCK, min((block + 1) * BLOCK, self.accounts))]
            for block in range(self.number, blocks, self.of)
        ]
        heads = [[b""] * len(names) for names in own]
        steps = charges + (3 if more else 2)
        moment = timedelta(days=DAYS) / (steps * blocks)

        def at(step: int, place: int) -> datetime:
            return self.now - moment * ((steps - step) * blocks - (place * self.of + self.number))

        def last_of(place: int) -> list[int]:
            first = (place * self.of + self.number) * BLOCK
            return [charges + 1 + (first + index < more) for index in range(len(own[place]))]

        for number, step in enumerate(life.steps[:steps]):
            for place, names in enumerate(own):
                if number == charges + 2:
                    names = [name for name, last in zip(names, last_of(place), strict=True) if last == number]
                now = at(number, place)
                _copy(connection, COPY_OPERATIONS, _filled(step.operation, names, now))
                if step.entry is not None and step.entry_line is not None:
                    chain = heads[place]
                    entry = step.entry._replace(at=now, recorded_at=now)
                    for index, name in enumerate(names):
                        chain[index] = chain_hash(chain[index], name, entry)
                    _copy(connection, COPY_ENTRIES, _filled(step.entry_line, names, now, chain))
                    yield len(names)
        for place, names in enumerate(own):
            ends = last_of(place)
            opened, granted = at(0, place), at(1, place)
            for end in sorted(set(ends)):
                few = [index for index, last in enumerate(ends) if last == end]
                chosen, chain = [names[index] for index in few], [heads[place][index] for index in few]
                # Opened at its first operation, updated at its last.
                account = life.account[end].replace(str(_NOW), str(opened), 1)
                _copy(connection, COPY_ACCOUNTS, _filled(account, chosen, at(end, place), chain))
                _copy(connection, COPY_GRANTS, _filled(life.grant[end - 1], chosen, granted))


COPY_ACCOUNTS = (
    "COPY accounts (account, kind, status, opened_at, updated_at, operations, seq, head, last_grant,"
    f" {BUCKETS}) FROM STDIN"
)
COPY_GRANTS = (
    "COPY grants (account, grant_id, source, priority, effective_at, created_at, operation, is_open,"
    f" {BUCKETS}) FROM STDIN"
)


def _filled(line: str, names: Iterable[str], now: datetime, heads: Iterable[bytes] | None = None) -> str:
    """A line for each account."""
    line = line.replace(str(_NOW), str(now)) + "\n"
    if heads is None:
        return "".join([line.replace(_NAME, name) for name in names])
    return "".join(
        [line.replace(_NAME, name).replace(_HASH, head.hex()) for name, head in zip(names, heads, strict=False)]
    )


def _copy(connection: Connection[Any], statement: str, lines: str) -> None:
    if lines:
        with connection.cursor() as cursor, cursor.copy(statement) as stream:
            stream.write(lines)
