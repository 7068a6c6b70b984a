"""The ledger writer: one batch of messages, one transaction (lanes: the batch).

read database time, lock the accounts in order, load their open grants, holds and the operation ids of the
batch in one round trip -> apply each message in order, in memory -> COPY operations and entries, update
accounts, grants, holds and receipts set by set -> commit.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any

import psycopg
from psycopg import Connection, Cursor

from creditlane.codes import Code
from creditlane.contract import Message
from creditlane.events import EXCHANGE
from models.rules.catalog import Catalog
from models.rules.state import COUNTERS, Account, Grant, Hold, Known, Line
from tasks.events import events_of, spendable
from tasks.ledger import Answer, Row, apply, encode
from tasks.operation import FollowUp, Need
from tasks.registry import OPERATIONS
from workers.crash import crash_point
from workers.outbox import OutboxRow
from workers.quarantine import Quarantined, store

BUCKETS = ", ".join(f"{counter}_micro" for counter in COUNTERS)

LOCK_ACCOUNTS = f"""
SELECT account, kind, status, email, locale, timezone, opened_at, updated_at, next_due_at, operations, seq, head,
       last_grant, {BUCKETS}, debt_micro
FROM accounts WHERE account = ANY(%s::text[]) ORDER BY account FOR UPDATE
"""
ACCOUNT_FIELDS = (
    "kind", "status", "email", "locale", "timezone", "opened_at", "updated_at", "next_due_at", "operations", "seq",
    "head", "last_grant", *COUNTERS, "debt",
)  # fmt: skip

GRANT_COLUMNS = f"""
g.account, g.grant_id, g.source, g.priority, g.features, g.effective_at, g.expires_at, g.created_at, g.operation,
g.purchase, g.price_minor, g.price_currency, g.price_per_micro,
{", ".join(f"g.{counter}_micro" for counter in COUNTERS)}, g.clawed_back_micro,
g.forgiven_micro, g.origin
"""
OPEN_GRANTS = f"SELECT {GRANT_COLUMNS} FROM grants g WHERE g.account = ANY(%s::text[]) AND g.is_open"

HOLD_COLUMNS = "h.account, h.hold, h.amount_micro, h.expires_at, h.created_at, h.feature, h.member, h.status"
OPEN_HOLDS = f"SELECT {HOLD_COLUMNS} FROM holds h WHERE h.account = ANY(%s::text[]) AND h.status = 'open'"
OPEN_HOLD_LINES = """
SELECT r.account, r.operation, r.grant_id, r.taken_micro, r.returned_micro
FROM holds h JOIN receipts r ON r.account = h.account AND r.operation = h.hold
WHERE h.account = ANY(%s::text[]) AND h.status = 'open' ORDER BY r.account, r.operation, r.line
"""
PAIRS = "unnest(%s::text[], %s::text[]) AS k(account, key)"
TRANSFERS = f"""
SELECT o.account, o.operation, o.name, o.status, o.arguments::text, o.result::text, e.grant_id, e.amount_micro, 0
FROM {PAIRS} JOIN operations o ON o.account = k.account AND o.operation = k.key
JOIN entries e ON e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
WHERE o.name = 'credits.transfer' AND e.kind = 'transferred'
ORDER BY o.account, o.operation, e.seq
"""
KNOWN = f"""
SELECT o.account, o.operation, o.name, o.status, o.arguments::text, o.result::text
FROM {PAIRS} JOIN operations o ON o.account = k.account AND o.operation = k.key
"""
NAMED_HOLDS = (
    f"SELECT {HOLD_COLUMNS} FROM {PAIRS} JOIN holds h ON h.account = k.account AND h.hold = k.key"
    " WHERE h.status <> 'open'"
)
CHARGES = f"""
SELECT o.account, o.operation, o.name, o.status, o.arguments::text, o.result::text, e.grant_id, e.amount_micro,
       coalesce(r.returned_micro, 0)
FROM {PAIRS} JOIN operations o ON o.account = k.account AND o.operation = k.key
LEFT JOIN LATERAL (
    SELECT e.grant_id, e.amount_micro, row_number() OVER (ORDER BY e.seq) AS line FROM entries e
    WHERE e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
      AND e.kind IN ('consumed', 'captured')
) e ON true
LEFT JOIN receipts r ON r.account = o.account AND r.operation = o.operation AND r.line = e.line
WHERE o.status = 'applied' AND o.name IN ('credits.consume', 'credits.capture')
ORDER BY o.account, o.operation, e.line
"""
CHARGED_GRANTS = f"""
SELECT DISTINCT {GRANT_COLUMNS}
FROM {PAIRS} JOIN operations o ON o.account = k.account AND o.operation = k.key
JOIN entries e ON e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id
"""
NAMED_GRANTS = (
    f"SELECT {GRANT_COLUMNS} FROM {PAIRS} JOIN grants n ON n.account = k.account AND n.grant_id = k.key::int"
    " JOIN grants g ON g.account = n.account"
    " AND (g.grant_id = coalesce(n.origin, n.grant_id) OR g.origin = coalesce(n.origin, n.grant_id))"
)
ROOT_GRANTS = (
    f"SELECT {GRANT_COLUMNS} FROM unnest(%s::text[], %s::int[]) AS k(account, key)"
    " JOIN grants g ON g.account = k.account AND g.grant_id = k.key"
)
ORIGIN = -1
"""Where a loaded grant's row has its origin."""

PURCHASED_GRANTS = f"SELECT {GRANT_COLUMNS} FROM {PAIRS} JOIN grants g ON g.account = k.account AND g.purchase = k.key"

COPY_ACCOUNTS = (
    "COPY accounts (account, kind, status, email, locale, timezone, opened_at, updated_at, next_due_at, operations,"
    f" seq, head, last_grant, {BUCKETS}, debt_micro) FROM STDIN"
)
COPY_GRANTS = (
    "COPY grants (account, grant_id, source, priority, features, effective_at, expires_at, created_at, operation,"
    f" purchase, price_minor, price_currency, price_per_micro, {BUCKETS}, clawed_back_micro,"
    " forgiven_micro, origin, is_open) FROM STDIN"
)
COPY_OPERATIONS = (
    "COPY operations (account, operation, number, name, status, code, charged_micro, feature, quantity_micro, member,"
    " first_seq, entries, arguments, result, occurred_at, applied_at, catalog) FROM STDIN"
)
COPY_ENTRIES = (
    "COPY entries (account, seq, operation, kind, grant_id, amount_micro, balance_after_micro, at, refers_to,"
    " recorded_at, hash) FROM STDIN"
)
COPY_HOLDS = (
    "COPY holds (account, hold, status, amount_micro, captured_micro, feature, member, created_at, expires_at,"
    " closed_at) FROM STDIN"
)
COPY_OUTBOX = "COPY outbox (id, account, exchange, task, operation, arguments, created_at) FROM STDIN"
OUTBOX_IDS = "SELECT nextval('outbox_id_seq') FROM generate_series(1, %s)"
"""Taken before the rows are written, since COPY does not tell which it gave them; the accounts are locked by then, so
the rows of one account have ascending ids."""

UPDATE_ACCOUNTS = f"""
UPDATE accounts a SET updated_at = u.updated_at, next_due_at = u.next_due_at, operations = u.operations, seq = u.seq,
    head = u.head, last_grant = u.last_grant, debt_micro = u.debt_micro,
    {", ".join(f"{counter}_micro = u.{counter}_micro" for counter in COUNTERS)}
FROM unnest(%s::text[], %s::timestamptz[], %s::timestamptz[], %s::bigint[], %s::bigint[], %s::bytea[], %s::int[],
            %s::bigint[], {", ".join(["%s::bigint[]"] * len(COUNTERS))})
    AS u(account, updated_at, next_due_at, operations, seq, head, last_grant, debt_micro, {BUCKETS})
WHERE a.account = u.account
"""
OPEN_ACCOUNT = """
UPDATE accounts SET kind = %s, status = %s, email = %s, locale = %s, timezone = %s, opened_at = %s WHERE account = %s
"""
UPDATE_GRANTS = f"""
UPDATE grants g SET is_open = u.is_open, clawed_back_micro = u.clawed_back_micro,
    forgiven_micro = u.forgiven_micro,
    {", ".join(f"{counter}_micro = u.{counter}_micro" for counter in COUNTERS)}
FROM unnest(%s::text[], %s::int[], %s::bool[], %s::bigint[], %s::bigint[],
            {", ".join(["%s::bigint[]"] * len(COUNTERS))})
    AS u(account, grant_id, is_open, clawed_back_micro, forgiven_micro, {BUCKETS})
WHERE g.account = u.account AND g.grant_id = u.grant_id
"""
UPDATE_HOLDS = """
UPDATE holds h SET status = u.status, captured_micro = u.captured_micro, closed_at = u.closed_at
FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::timestamptz[])
    AS u(account, hold, status, captured_micro, closed_at)
WHERE h.account = u.account AND h.hold = u.hold
"""
UPSERT_RECEIPTS = """
INSERT INTO receipts (account, operation, line, grant_id, taken_micro, returned_micro)
SELECT * FROM unnest(%s::text[], %s::text[], %s::int[], %s::int[], %s::bigint[], %s::bigint[])
ON CONFLICT (account, operation, line) DO UPDATE SET returned_micro = excluded.returned_micro
"""


APPLICATION = "creditlane lanes"
"""How a lane worker's database session calls itself, its host name after it."""


FIRST_PLANS = 500
"""Operations after which the statements are planned anew, and again each time that their number has doubled: a plan
made for empty tables may scan all operations of an account for each id, and would be kept."""


REPLAYED, CONFLICT = "replayed", "conflict"
"""What becomes of an operation whose id was answered before: with the same content, and with other content."""


class Job:
    """One operation of a batch on its way through the writer."""

    __slots__ = (
        "account",
        "arguments",
        "message",
        "name",
        "operation",
        "quarantined",
        "result",
        "source",
        "status",
    )

    def __init__(self, name: str, operation: str, message: Message, arguments: bytes, source: Any = None) -> None:
        self.name = name
        self.operation = operation
        self.account = message.account
        self.message = message
        self.arguments = arguments
        self.source = source
        """What :attr:`LedgerWriter.poison` makes a quarantine row from."""
        self.result: bytes | None = None
        self.quarantined: Quarantined | None = None
        self.status = ""
        """What became of it: applied, rejected, or one of the two above."""


Poison = Callable[[Job, Code, str, str | None], Quarantined]


class LedgerWriter:
    """Applies batches over one connection, the one that holds the lanes' locks.

    :param connection: in autocommit mode; see :func:`connect`.
    :param catalog: gives the catalog in force.
    :param poison: makes the quarantine row of a job that cannot be applied, from its code, reason and traceback.
    :param events: the types of events to write to the outbox, see :func:`creditlane.events.matching`.
    """

    def __init__(
        self,
        connection: Connection[Any],
        catalog: Callable[[], Catalog],
        poison: Poison,
        events: frozenset[str] = frozenset(),
    ) -> None:
        self.connection = connection
        self.catalog = catalog
        self.poison = poison
        self.events = events
        self.outbox: list[OutboxRow] = []
        """Committed to the outbox, and not taken to be published yet."""
        self._written = 0
        self._plan_anew_at = FIRST_PLANS

    def take_outbox(self) -> list[OutboxRow]:
        """The outbox rows committed since the last call: :meth:`workers.outbox.Outbox.publish` is for them."""
        taken, self.outbox = self.outbox, []
        return taken

    def write(self, jobs: Sequence[Job], quarantined: Sequence[Quarantined] = ()) -> None:
        """Apply jobs in order and store quarantine rows, in one transaction.

        Afterwards each job has a ``result``, or is ``quarantined`` because its code raised.

        :raises psycopg.Error: when nothing was committed, or when that is unknown because the connection broke.
        """
        if self._written >= self._plan_anew_at:
            self._plan_anew_at = 2 * self._written
            self.connection.execute("DISCARD PLANS")
        self._written += len(jobs)
        try:
            self._write(jobs, quarantined)
        except BaseException:
            if not self.connection.closed:
                try:
                    self.connection.execute("ROLLBACK")
                except psycopg.Error:
                    self.connection.close()
            raise

    def _write(self, jobs: Sequence[Job], quarantined: Sequence[Quarantined]) -> None:
        loaded = Loaded(self.connection, jobs)
        crash_point("after-load")
        spendable_before = (
            {name: spendable(account, loaded.now) for name, account in loaded.accounts.items()} if self.events else {}
        )
        rows, follow = apply_all(loaded, jobs, self.catalog(), self.poison)
        poisoned = [*quarantined, *(job.quarantined for job in jobs if job.quarantined is not None)]
        accounts = [account for account in loaded.accounts.values() if account.is_dirty]
        messages = [(each.account, "", each.name, each.operation, encode(each.arguments)) for each in follow]
        if self.events:
            messages += [
                (account.account, EXCHANGE, event["type"], event["id"], encode(event))
                for account in accounts
                for event in events_of(account, spendable_before[account.account], self.events)
            ]
        with self.connection.cursor() as cursor:
            self._insert(cursor, accounts, rows)
            outbox = insert_outbox(cursor, messages, loaded.now) if messages else []
            crash_point("after-copy")
            with self.connection.pipeline():
                self._update(cursor, accounts)
                store(self.connection, poisoned)
            crash_point("before-commit")
            # Not in the pipeline: the flush that ends one keeps the server from counting the silence after it.
            cursor.execute("COMMIT")
            if cursor.statusmessage != "COMMIT":
                # A transaction that failed is rolled back by this, without an error.
                raise psycopg.OperationalError(f"COMMIT was answered with {cursor.statusmessage}")
        self.outbox += outbox
        crash_point("after-commit")

    def _insert(self, cursor: Cursor[Any], accounts: Sequence[Account], rows: Iterable[tuple[str, Row]]) -> None:
        copy(cursor, COPY_ACCOUNTS, (_account_row(account) for account in accounts if account.is_new))
        copy(
            cursor,
            COPY_GRANTS,
            (
                _grant_row(account.account, grant)
                for account in accounts
                for grant in account.grants.values()
                if grant.is_new
            ),
        )
        copy(cursor, COPY_OPERATIONS, ((account, *row) for account, row in rows))
        copy(
            cursor,
            COPY_ENTRIES,
            ((account.account, *entry[:-1], Hash(entry.hash)) for account in accounts for entry in account.entries),
        )
        copy(
            cursor,
            COPY_HOLDS,
            (
                _hold_row(account.account, hold)
                for account in accounts
                for hold in account.holds.values()
                if hold.is_new
            ),
        )

    def _update(self, cursor: Cursor[Any], accounts: Sequence[Account]) -> None:
        old = [account for account in accounts if not account.is_new]
        if old:
            cursor.execute(
                UPDATE_ACCOUNTS,
                (
                    _texts(account.account for account in old),
                    _array(map(_instant, (account.updated_at for account in old))),
                    _array(map(_instant, (account.next_due_at for account in old))),
                    _array(account.operations for account in old),
                    _array(account.seq for account in old),
                    _array('"\\\\x' + account.head.hex() + '"' for account in old),
                    _array(account.last_grant for account in old),
                    _array(account.debt for account in old),
                    *(_array(map(attrgetter(counter), old)) for counter in COUNTERS),
                ),
            )
        for account in old:
            if account.was_opened:
                cursor.execute(
                    OPEN_ACCOUNT,
                    (
                        account.kind, account.status, account.email, account.locale, account.timezone,
                        account.opened_at, account.account,
                    ),
                )  # fmt: skip
        grants = [
            (account.account, grant)
            for account in accounts
            for grant in account.grants.values()
            if grant.is_dirty and not grant.is_new
        ]
        if grants:
            lots = [grant for _, grant in grants]
            cursor.execute(
                UPDATE_GRANTS,
                (
                    _texts(account for account, _ in grants),
                    _array(grant.id for grant in lots),
                    _array("t" if grant.is_open else "f" for grant in lots),
                    _array(grant.clawed_back for grant in lots),
                    _array(grant.forgiven for grant in lots),
                    *(_array(map(attrgetter(counter), lots)) for counter in COUNTERS),
                ),
            )
        holds = [
            (account.account, hold)
            for account in accounts
            for hold in account.holds.values()
            if hold.is_dirty and not hold.is_new
        ]
        if holds:
            cursor.execute(
                UPDATE_HOLDS,
                (
                    _texts(account for account, _ in holds),
                    _texts(hold.id for _, hold in holds),
                    _texts(hold.status for _, hold in holds),
                    _array(hold.captured for _, hold in holds),
                    _array(map(_instant, (hold.closed_at for _, hold in holds))),
                ),
            )
        receipts = list(_receipts(accounts))
        if receipts:
            names, operations, *numbers = zip(*receipts, strict=True)
            cursor.execute(UPSERT_RECEIPTS, (_texts(names), _texts(operations), *map(_array, numbers)))


class Loaded:
    """What one transaction read, and the accounts made of it; keeps the rows to make an account anew.

    Begins the transaction and locks the accounts of the jobs, in order, so that whatever else writes them
    comes before or after, never between.
    """

    def __init__(self, connection: Connection[Any], jobs: Sequence[Job]) -> None:
        names = sorted({job.account for job in jobs})
        ids = (_texts(names),)
        keys = (_texts(job.account for job in jobs), _texts(job.operation for job in jobs))
        needs = _needs(jobs)
        with connection.pipeline():
            connection.execute("BEGIN")
            accounts = connection.execute(LOCK_ACCOUNTS, ids)
            clock = connection.execute("SELECT ledger_now()")
            grants = [connection.execute(OPEN_GRANTS, ids)]
            holds = [connection.execute(OPEN_HOLDS, ids)]
            hold_lines = connection.execute(OPEN_HOLD_LINES, ids)
            known = connection.execute(KNOWN, keys)
            charges = None
            transfers = connection.execute(TRANSFERS, needs["transfer"]) if "transfer" in needs else None
            if "hold" in needs:
                holds.append(connection.execute(NAMED_HOLDS, needs["hold"]))
            if "charge" in needs:
                charges = connection.execute(CHARGES, needs["charge"])
                grants.append(connection.execute(CHARGED_GRANTS, needs["charge"]))
            if "grant" in needs:
                grants.append(connection.execute(NAMED_GRANTS, needs["grant"]))
            if "purchase" in needs:
                grants.append(connection.execute(PURCHASED_GRANTS, needs["purchase"]))
            now = clock.fetchone()
            assert now is not None
            self.now: datetime = now[0]
            self._accounts = {row[0]: row[1:] for row in accounts}
            self._grants = _by_account(row for cursor in grants for row in cursor)
            missing = self._missing_roots()
            if missing:
                for account, *grant in connection.execute(ROOT_GRANTS, missing):
                    self._grants[account].append(tuple(grant))
            self._holds = _by_account(row for cursor in holds for row in cursor)
            self._hold_lines = _by_account(hold_lines)
            self._known = _by_account(known)
            self._charges = _by_account((*(charges or ()), *(transfers or ())))
        self.accounts = {name: self.make(name) for name in names}

    def _missing_roots(self) -> tuple[str, str] | None:
        """The lots that loaded ones continue and that are not loaded themselves: revocations are booked there."""
        roots = {
            (account, grant[ORIGIN]) for account, grants in self._grants.items() for grant in grants if grant[ORIGIN]
        }
        if not roots:
            return None  # as in nearly every batch
        loaded = {(account, grant[0]) for account, grants in self._grants.items() for grant in grants}
        missing = sorted(roots - loaded)
        if not missing:
            return None
        return _texts(account for account, _ in missing), _array(root for _, root in missing)

    def make(self, name: str) -> Account:
        """An account as the database has it, before anything of this batch."""
        row = self._accounts.get(name)
        account = Account(name) if row is None else Account(name, **dict(zip(ACCOUNT_FIELDS, row, strict=True)))
        account.is_new = row is None
        for grant_id, source, priority, features, *rest in self._grants.get(name, ()):
            if grant_id not in account.grants:
                scope = None if features is None else frozenset(features)
                account.add_grant(Grant(grant_id, source, priority, scope, *rest))
        for hold in self._holds.get(name, ()):
            account.holds[hold[0]] = Hold(*hold)
        for operation, grant_id, taken, returned in self._hold_lines.get(name, ()):
            account.holds[operation].lines.append(Line(grant_id, taken, returned))
        for operation, task, status, arguments, result in self._known.get(name, ()):
            account.known[operation] = Known(task, status, result.encode(), None, arguments.encode())
        for operation, task, status, arguments, result, grant_id, taken, returned in self._charges.get(name, ()):
            charge = account.known.get(operation)
            if charge is None:
                charge = account.known[operation] = Known(task, status, result.encode(), None, arguments.encode())
            if charge.lines is None:
                charge.lines = []
            if grant_id is not None:
                charge.lines.append(Line(grant_id, taken, returned))
        return account


def apply_all(
    loaded: Loaded, jobs: Sequence[Job], catalog: Catalog, poison: Poison
) -> tuple[list[tuple[str, Row]], list[FollowUp]]:
    """Apply jobs in order to the loaded accounts, in memory.

    A job whose code raises is taken out: its account is made anew from the rows that were read, and the jobs
    of that account before it are applied again, so that nothing half done is left. The others stand.

    :returns: the operation rows to write, by account, and what follows from them, in order per account.
    """
    answers: dict[str, list[tuple[Job, Answer]]] = {}
    for job in jobs:
        job.quarantined = job.result = None
        done = answers.setdefault(job.account, [])
        try:
            done.append((job, _apply_one(loaded, job, catalog)))
        except Exception as error:
            trace = traceback.format_exc()
            reason = f"{type(error).__name__}: {error}"
            job.quarantined = poison(job, Code.INTERNAL_ERROR, reason, trace)
            loaded.accounts[job.account] = loaded.make(job.account)
            answers[job.account] = [(before, _apply_one(loaded, before, catalog)) for before, _ in done]
    for account in loaded.accounts.values():
        if account.is_dirty:
            account.next_due_at = account.due_at()
    given = [(name, answer) for name, done in answers.items() for _, answer in done]
    rows = [(name, answer.row) for name, answer in given if answer.row is not None]
    return rows, [follow for _, answer in given for follow in answer.follow]


def _apply_one(loaded: Loaded, job: Job, catalog: Catalog) -> Answer:
    account = loaded.accounts[job.account]
    now = loaded.now if account.updated_at is None else max(loaded.now, account.updated_at)
    given = apply(account, job.name, job.operation, job.message, job.arguments, now, catalog)
    job.result = given.result
    if given.row is not None:
        job.status = given.row.status
    else:
        job.status = CONFLICT if given.conflict else REPLAYED
    return given


def insert_outbox(
    cursor: Cursor[Any], messages: Sequence[tuple[str, str, str, str, bytes]], now: datetime
) -> list[OutboxRow]:
    """COPY messages to the outbox.

    :param messages: account, exchange, task, operation and arguments of each.
    :returns: the rows as they are written.
    """
    ids = cursor.execute(OUTBOX_IDS, (len(messages),)).fetchall()
    rows = [OutboxRow(id, *message, now) for (id,), message in zip(ids, messages, strict=True)]
    copy(cursor, COPY_OUTBOX, rows)
    return rows


SILENT_SECONDS = 8
"""How long a lane worker may be silent before the server ends its session, and with it frees its lanes: the process may
hang, or its machine be gone without a word. It asks for something every ``balance_seconds``."""

TRANSACTION_SECONDS = 30
"""How long one batch may take in the database, from PostgreSQL 17 on: one that hangs half way is ended as well."""

LOCK_SECONDS = 5
"""How long a batch waits for an account that somebody else has locked; then it is tried again, with back-off."""


def connect(
    database_url: str, application: str = APPLICATION, silent_seconds: float = SILENT_SECONDS
) -> Connection[Any]:
    """Open the connection of a lane worker.

    All its reads are look-ups by key; the planner is kept from ever choosing another way, however small or
    large the tables are when a statement is prepared.

    Whichever end goes silent, the other notices within seconds, by the settings of this session alone.

    :param silent_seconds: after so long without a statement the server ends the session.
    :raises psycopg.OperationalError: when the database is away.
    """
    silent_ms = int(1000 * silent_seconds)
    connection: Connection[Any] = psycopg.connect(
        database_url,
        autocommit=True,
        application_name=application,
        connect_timeout=5,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=silent_ms,
        options="-c timezone=UTC -c enable_hashjoin=off -c enable_mergejoin=off -c enable_seqscan=off"
        f" -c plan_cache_mode=force_generic_plan -c jit=off -c lock_timeout={LOCK_SECONDS}s"
        f" -c idle_session_timeout={silent_ms} -c idle_in_transaction_session_timeout={silent_ms}"
        " -c tcp_keepalives_idle=3 -c tcp_keepalives_interval=1 -c tcp_keepalives_count=3"
        f" -c tcp_user_timeout={silent_ms}",
    )
    if connection.info.server_version >= 170000:
        connection.execute(f"SET transaction_timeout = '{TRANSACTION_SECONDS}s'")
    connection.prepare_threshold = 1
    return connection


def copy(cursor: Cursor[Any], statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """COPY rows in text form; nothing is sent when there are none."""
    lines = ["\t".join(map(_field, row)) for row in rows]
    if lines:
        with cursor.copy(statement) as stream:
            stream.write("\n".join(lines) + "\n")


def _field(value: Any) -> str:
    kind = type(value)
    if kind is int:
        return str(value)
    if kind is str:
        text: str = value
        return _escape(text) if "\\" in text else text
    if value is None:
        return "\\N"
    if kind is datetime:
        return _iso(value)
    if kind is bytes:
        # JSON as it came off the wire: white space between its tokens may be any.
        return _escape(str(value, "utf-8"))
    if kind is bool:
        return "t" if value else "f"
    if kind is Hash:
        digest: bytes = value.value
        return "\\\\x" + digest.hex()
    raise TypeError(f"a {kind.__name__} in a row")


class Hash:
    """Bytes for a ``bytea`` column, apart from those that are JSON text."""

    __slots__ = ("value",)

    def __init__(self, value: bytes) -> None:
        self.value = value


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


@lru_cache(maxsize=4096)
def _iso(instant: datetime) -> str:
    return instant.isoformat()


def _instant(instant: datetime | None) -> str:
    return "NULL" if instant is None else f'"{_iso(instant)}"'


def _texts(values: Iterable[str]) -> str:
    """An array literal of texts; far quicker than having the driver adapt a list."""
    listed = list(values)
    together = "".join(listed)
    if '"' in together or "\\" in together:
        listed = [text.replace("\\", "\\\\").replace('"', '\\"') for text in listed]
    return '{"' + '","'.join(listed) + '"}' if listed else "{}"


def _array(values: Iterable[Any]) -> str:
    """An array literal of numbers, or of values that are quoted already."""
    return "{" + ",".join(map(str, values)) + "}"


def _account_row(account: Account) -> tuple[Any, ...]:
    return (
        account.account, account.kind, account.status, account.email, account.locale, account.timezone,
        account.opened_at, account.updated_at, account.next_due_at, account.operations, account.seq,
        Hash(account.head), account.last_grant, *_counters(account), account.debt,
    )  # fmt: skip


def _grant_row(account: str, grant: Grant) -> tuple[Any, ...]:
    features = None
    if grant.features is not None:
        features = _texts(sorted(grant.features))
    return (
        account, grant.id, grant.source, grant.priority, features, grant.effective_at, grant.expires_at,
        grant.created_at, grant.operation, grant.purchase, grant.price_minor, grant.price_currency, grant.price_per,
        *_counters(grant), grant.clawed_back, grant.forgiven, grant.origin, grant.is_open,
    )  # fmt: skip


def _hold_row(account: str, hold: Hold) -> tuple[Any, ...]:
    return (
        account, hold.id, hold.status, hold.amount, hold.captured, hold.feature, hold.member, hold.created_at,
        hold.expires_at, hold.closed_at,
    )  # fmt: skip


_counters = attrgetter(*COUNTERS)


def _receipts(accounts: Iterable[Account]) -> Iterator[tuple[str, str, int, int, int, int]]:
    """The receipt lines to write: of holds that are new or changed, of charges that were given back from."""
    for account in accounts:
        receipts: list[tuple[str, list[Line]]] = [
            (hold.id, hold.lines) for hold in account.holds.values() if hold.is_new or hold.is_dirty
        ]
        receipts += [(name, known.lines or []) for name, known in account.known.items() if known.is_dirty]
        for operation, lines in receipts:
            for number, line in enumerate(lines, 1):
                yield account.account, operation, number, line.grant, line.taken, line.returned


def _by_account(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    grouped: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        grouped.setdefault(row[0], []).append(row[1:])
    return grouped


def _needs(jobs: Sequence[Job]) -> dict[str, tuple[list[str], list[str]]]:
    """The past rows that the jobs work on, as pairs of account and key, by kind."""
    needs: dict[str, dict[tuple[str, str], None]] = {}
    for job in jobs:
        find = OPERATIONS[job.name].need
        if find is not None:
            need: Need = find(job.message)
            # Once each: a charge that two refunds of a batch name must not have its receipt twice.
            needs.setdefault(need.kind, {})[job.account, str(need.key)] = None
    return {kind: ([account for account, _ in pairs], [key for _, key in pairs]) for kind, pairs in needs.items()}
