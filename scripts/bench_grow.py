"""A ledger with a past: many accounts and entries, written in minutes rather than by the lanes in hours.

Every account has the same life: it was opened, was granted credits and was charged one after the other. The rules
apply that life once, to an account that stands for all; the rows that come out are copied for each account, with its
name, its instants and a chain of its own. So it is a ledger as the lanes write one, and an audit holds.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
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
from models.columns import SUBSCRIPTION_COLUMNS
from models.rules.posting import chain_hash
from models.rules.state import Account, Entry, subscription_row
from tasks.ledger import apply
from workers.ledger_writer import (
    COPY_ACCOUNTS,
    COPY_ENTRIES,
    COPY_GRANTS,
    COPY_OPERATIONS,
    _grant_row,
    _text_of,
    account_fields,
)
from workers.rows import entry_line, operation_line, row_line

CATALOG = "metering"
GRANTED_MICRO = 10**15
"""What each account was granted, in micro-credits: nothing is refused."""

DAYS = 30
"""How long ago the first operation was; the others came evenly since then."""

MONTH = timedelta(days=31)
"""The longest month: whose period began so long ago, its period is over."""

SPENT = "30"
"""Credits that a subscriber has spent of a period's."""

BLOCK = 1000
"""Accounts that an operation was applied to at the same instant: as many as a batch of the lanes has at the most."""

SORT_MEMORY = "512MB"
"""For each index that is built."""

LOADED = ("operations", "entries", "accounts", "grants")
"""The tables that are filled."""

Progress = Callable[[int, int], None]
"""Told how many entries are written and how many there will be."""

COPY_SUBSCRIPTIONS = f"COPY subscriptions ({', '.join(SUBSCRIPTION_COLUMNS)}) FROM STDIN"

_NAME, _NOW = "account-of-all", datetime(2000, 1, 1, tzinfo=UTC)
"""What stands in the rows of the life for the name of an account, and for the instant of an operation."""


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
        row = connection.execute("SELECT ledger_now()").fetchone()
        assert row is not None
        of = _processes(accounts)
        stripes = [Stripe(accounts, entries, row[0], number, of) for number in range(of)]
        _fill(connection, database_url, stripes, entries, progress)


def fill_subscribed(database_url: str, accounts: int, catalog: str, plan: str, progress: Progress) -> datetime:
    """Fill an empty ledger with accounts whose plan's first period has just ended, a part of its credits unspent.

    They are named as by :func:`fill`; each has had three operations.

    :param catalog: the path or name of the catalog that has the plan, which has no price.
    :param progress: told how many accounts are written.
    :returns: the instant at which all of them are due.
    :raises ValueError: when the ledger is not empty.
    :raises FillError: when a process could not go on.
    """
    with psycopg.connect(database_url, autocommit=True) as connection:
        row = connection.execute("SELECT ledger_now()").fetchone()
        assert row is not None
        of = _processes(accounts)
        since = row[0].replace(microsecond=0) - MONTH - timedelta(hours=1)
        stripes = [Subscribed(accounts, catalog, plan, since, number, of) for number in range(of)]
        _fill(connection, database_url, stripes, accounts, progress)
        found = connection.execute("SELECT DISTINCT next_due_at FROM accounts").fetchall()
    ((due_at,),) = found
    assert isinstance(due_at, datetime)
    return due_at


def _fill(
    connection: Connection[Any],
    database_url: str,
    stripes: Sequence[Stripe | Subscribed],
    total: int,
    progress: Progress,
) -> None:
    if connection.execute("SELECT FROM accounts LIMIT 1").fetchone() is not None:
        raise ValueError("only an empty ledger is filled")
    definitions = _take_indexes(connection)
    _load(database_url, stripes, total, progress)
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


def _processes(accounts: int) -> int:
    """One for each core, where there is enough to do."""
    return max(1, min(os.cpu_count() or 1, accounts // BLOCK))


def _load(database_url: str, stripes: Sequence[Stripe | Subscribed], total: int, progress: Progress) -> None:
    """Write all rows, a process for each stripe."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Pipe] = []
    started = []
    try:
        for stripe in stripes:
            ours, theirs = context.Pipe(duplex=False)
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
                    progress(done, total)
                else:
                    raise FillError(f"a process that fills the ledger could not go on: {told}")
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join()


def _write(pipe: Pipe, database_url: str, stripe: Stripe | Subscribed) -> None:
    """What such a process does: tells how much each block has, and None in the end."""
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
    """What one operation writes, as lines of COPY in which :data:`_NAME` and :data:`_NOW` stand."""

    operation: str
    entry: Entry | None
    entry_line: str


class Life(NamedTuple):
    """What every account went through, and where it stands after each of its operations."""

    steps: list[Step]
    accounts: list[str]
    """A line of ``accounts`` after each step."""
    grants: list[str]
    """A line of ``grants`` after each step but the first, by which it was opened."""
    heads: list[bytes]
    """The hash in it that stands for that of an account's last entry, after each step."""


def _life(charges: int) -> Life:
    """Let the rules apply the life of an account: opened, granted, charged so many times."""
    catalog = load_catalog(CATALOG)
    account = Account(_NAME)
    life = Life([], [], [], [])
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
        line = "" if entry is None else entry_line(_NAME, entry)
        life.steps.append(Step(operation_line(_NAME, row), entry, line))
        life.accounts.append(row_line((_NAME, *account_fields(account))))
        life.grants.extend(row_line(_grant_row(_NAME, grant)) for grant in account.order)
        life.heads.append(account.head)
    return life


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
        own = _blocks(self.accounts, self.number, self.of)
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
                if step.entry is not None:
                    chain = heads[place]
                    entry = step.entry._replace(at=now, recorded_at=now)
                    for index, name in enumerate(names):
                        chain[index] = chain_hash(chain[index], name, entry)
                    _copy(connection, COPY_ENTRIES, _filled(step.entry_line, names, now, step.entry.hash, chain))
                    yield len(names)
        for place, names in enumerate(own):
            ends = last_of(place)
            opened, granted = at(0, place), at(1, place)
            for end in sorted(set(ends)):
                few = [index for index, last in enumerate(ends) if last == end]
                chosen, chain = [names[index] for index in few], [heads[place][index] for index in few]
                # Opened at its first operation, updated at its last.
                account = life.accounts[end].replace(_NOW.isoformat(), opened.isoformat(), 1)
                _copy(connection, COPY_ACCOUNTS, _filled(account, chosen, at(end, place), life.heads[end], chain))
                _copy(connection, COPY_GRANTS, _filled(life.grants[end - 1], chosen, granted))


class Subscribed(NamedTuple):
    """What one process writes of a ledger of subscribers, block by block; all did the same at the same instants."""

    accounts: int
    catalog: str
    plan: str
    since: datetime
    number: int
    of: int

    def write(self, connection: Connection[Any]) -> Iterator[int]:
        """Write all rows.

        :returns: how many accounts, block by block.
        """
        catalog = load_catalog(self.catalog)
        account = Account(_NAME)
        operations: list[str] = []
        for number, (name, arguments) in enumerate(
            [
                ("credits.open", {}),
                ("plans.subscribe", {"plan": self.plan}),
                ("credits.consume", {"amount": SPENT}),
            ]
        ):
            operation = f"fill-{number:010d}"
            raw = msgspec.json.encode({"account": _NAME, **arguments})
            at = self.since + timedelta(minutes=number)
            row = apply(account, name, operation, decode_message(name, raw), raw, at, catalog).row
            assert row is not None
            operations.append(operation_line(_NAME, row))
        account.next_due_at = account.due_at()
        assert account.subscription is not None
        subscription = row_line(map(_text_of, (_NAME, *subscription_row(account.subscription))))
        entries = [(entry, entry_line(_NAME, entry)) for entry in account.entries]
        totals = row_line((_NAME, *account_fields(account)))
        grants = [row_line(_grant_row(_NAME, grant)) for grant in account.order]
        for names in _blocks(self.accounts, self.number, self.of):
            for line in operations:
                _copy(connection, COPY_OPERATIONS, _filled(line, names, _NOW))
            chain = [b""] * len(names)
            for entry, line in entries:
                chain = [chain_hash(head, name, entry) for head, name in zip(chain, names, strict=True)]
                _copy(connection, COPY_ENTRIES, _filled(line, names, _NOW, entry.hash, chain))
            _copy(connection, COPY_ACCOUNTS, _filled(totals, names, _NOW, account.head, chain))
            for line in grants:
                _copy(connection, COPY_GRANTS, _filled(line, names, _NOW))
            _copy(connection, COPY_SUBSCRIPTIONS, _filled(subscription, names, _NOW))
            yield len(names)


def _blocks(accounts: int, number: int, of: int) -> list[list[str]]:
    """The names of the accounts of one stripe, block by block."""
    return [
        [f"user_{index:05d}" for index in range(block * BLOCK, min((block + 1) * BLOCK, accounts))]
        for block in range(number, -(-accounts // BLOCK), of)
    ]


def _filled(
    line: str, names: Sequence[str], now: datetime, head: bytes = b"", heads: Sequence[bytes] | None = None
) -> str:
    """A line for each account.

    :param head: the hash in the line that those of the accounts take the place of, if it has one.
    """
    line = line.replace(_NOW.isoformat(), now.isoformat()) + "\n"
    if heads is None:
        return "".join([line.replace(_NAME, name) for name in names])
    before, after = line.split(head.hex())
    # What is left over of the chains is of accounts whose life ended a charge earlier.
    return "".join(
        [
            f"{before.replace(_NAME, name)}{own.hex()}{after.replace(_NAME, name)}"
            for name, own in zip(names, heads, strict=False)
        ]
    )


def _copy(connection: Connection[Any], statement: str, lines: str) -> None:
    if lines:
        with connection.cursor() as cursor, cursor.copy(statement) as stream:
            stream.write(lines)
