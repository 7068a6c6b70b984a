"""The ledger writer: one batch of messages, one transaction (lanes: the batch).

read database time, lock the accounts in order, load their open grants, holds and the operation ids of the
batch in one round trip -> apply each message in order, in memory -> COPY operations and entries, update
accounts, grants, holds and receipts set by set -> commit.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from operator import attrgetter, itemgetter
from typing import Any

import psycopg
from psycopg import Connection, Cursor

from creditlane.client import NOTICES
from creditlane.codes import Code
from creditlane.contract import IssueReferral, Message, WithdrawCodes
from creditlane.events import EXCHANGE
from models.columns import (
    ALLOWANCE_COLUMNS,
    CODE_COLUMNS,
    PURCHASE_COLUMNS,
    PURCHASE_VALUES,
    REFERRAL_COLUMNS,
    SUBSCRIPTION_COLUMNS,
    SUBSCRIPTION_VALUES,
)
from models.rules.catalog import Catalog
from models.rules.sharing import (
    MEMBER,
    REFEREE,
    SharedCode,
    allowance_of,
    allowance_row,
    code_of,
    code_row,
    referral_of,
    referral_row,
)
from models.rules.state import (
    ACCOUNT_FIELDS,
    COUNTERS,
    POOL,
    Account,
    Grant,
    Hold,
    Known,
    Line,
    Notice,
    purchase_of,
    purchase_row,
    subscription_of,
    subscription_row,
)
from tasks.events import events_of
from tasks.ledger import Answer, Row, apply, encode
from tasks.operation import FollowUp, Need
from tasks.pools import charged_member
from tasks.registry import OPERATIONS
from workers.crash import crash_point
from workers.metrics import stages
from workers.outbox import DELIVER, OutboxRow
from workers.quarantine import Quarantined, store
from workers.rows import (
    Changing,
    Column,
    Values,
    copy,
    entry_line,
    instants,
    operation_line,
    plain,
    row_line,
    texts,
    update,
)

BUCKETS = ", ".join(f"{counter}_micro" for counter in COUNTERS)

LOCK_ACCOUNTS = f"""
SELECT account, kind, status, email, locale, timezone, opened_at, updated_at, next_due_at, operations, seq, head,
       last_grant, {BUCKETS}, debt_micro, reference_micro, converted_to, achieved
FROM accounts WHERE account = ANY(%s::text[]) ORDER BY account FOR UPDATE
"""
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
SELECT o.account, o.operation, o.name, o.status, CASE WHEN e.line = 1 THEN o.arguments::text END,
       CASE WHEN e.line = 1 THEN o.result::text END, e.grant_id, e.amount_micro, 0
FROM {PAIRS} JOIN operations o ON o.account = k.account AND o.operation = k.key
JOIN LATERAL (
    SELECT e.seq, e.grant_id, e.amount_micro, row_number() OVER (ORDER BY e.seq) AS line FROM entries e
    WHERE e.account = o.account AND e.seq >= o.first_seq AND e.seq < o.first_seq + o.entries
      AND e.kind = 'transferred'
) e ON true
WHERE o.name IN ('credits.transfer', 'credits.convert', 'codes.issue')
ORDER BY o.account, o.operation, e.seq
"""
"""Arguments and result come with the first line alone: those of an issue of many codes are long, and it may have many
lines."""

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

PURCHASES = f"SELECT {PURCHASE_VALUES} FROM purchases p WHERE p.account = ANY(%s::text[])"
RETURNED_GRANTS = (
    f"SELECT {GRANT_COLUMNS} FROM purchases p JOIN grants g ON g.account = p.account AND g.purchase = p.purchase"
    " WHERE p.account = ANY(%s::text[])"
)
TAKEN_GRANTS = f"""
SELECT {GRANT_COLUMNS} FROM purchases p CROSS JOIN LATERAL unnest(p.lots) AS named(grant_id)
JOIN grants g ON g.account = p.account AND g.grant_id = named.grant_id
WHERE p.account = ANY(%s::text[])
"""
"""Lots that paid a debt of a returned purchase may be of others."""

SUBSCRIPTIONS = f"SELECT {SUBSCRIPTION_VALUES} FROM subscriptions WHERE account = ANY(%s::text[])"
SUBSCRIBED_GRANTS = f"""
SELECT {GRANT_COLUMNS}
FROM subscriptions s CROSS JOIN LATERAL unnest(s.lots || s.renewal_lots) AS named(grant_id)
JOIN grants g ON g.account = s.account AND g.grant_id = named.grant_id
WHERE s.account = ANY(%s::text[])
"""

ALLOWANCES = (
    f"SELECT {', '.join(f'a.{column}' for column in ALLOWANCE_COLUMNS)}"
    f" FROM {PAIRS} JOIN allowances a ON a.account = k.account AND a.key = k.key"
)
COUNTING = """
SELECT k.account FROM unnest(%s::text[]) AS k(account)
WHERE EXISTS (SELECT FROM allowances a WHERE a.account = k.account)
"""
"""Of pools those that count anything of their members: nearly none has limits, and nothing is looked for there."""

REFERRALS = f"SELECT {', '.join(REFERRAL_COLUMNS)} FROM referrals WHERE account = ANY(%s::text[])"
CODES = "SELECT status, used, closed_at, terms::text FROM codes WHERE code = ANY(%s::text[]) ORDER BY code FOR UPDATE"
"""Sorted, so that of two batches that name the same codes one waits for the other, and neither for both."""


def _upsert(table: str, columns: dict[str, str], key: Sequence[str]) -> str:
    """A statement that writes whole rows. All values travel as text: an array of arrays would come out flat."""
    return (
        f"INSERT INTO {table} ({', '.join(columns)})"
        f" SELECT {', '.join(f'u.{column}::{kind}' for column, kind in columns.items())}"
        f" FROM (SELECT {', '.join(f'unnest(%s::text[]) AS {column}' for column in columns)}) u"
        f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET "
        + ", ".join(f"{column} = excluded.{column}" for column in columns if column not in key)
    )


UPSERT_SUBSCRIPTIONS = _upsert("subscriptions", SUBSCRIPTION_COLUMNS, ("account",))
UPSERT_PURCHASES = _upsert("purchases", PURCHASE_COLUMNS, ("account", "purchase"))
UPSERT_ALLOWANCES = _upsert("allowances", ALLOWANCE_COLUMNS, ("account", "key"))
UPSERT_REFERRALS = _upsert("referrals", REFERRAL_COLUMNS, ("account",))

INSERT_NOTICES = """
INSERT INTO notices (account, key, kind, at, created_at, details, channels, delivered_at)
SELECT u.account, u.key, u.kind, u.at, %s, u.details::json, %s, %s
FROM (SELECT unnest(%s::text[]) AS account, unnest(%s::text[]) AS key, unnest(%s::text[]) AS kind,
             unnest(%s::timestamptz[]) AS at, unnest(%s::text[]) AS details) u
ON CONFLICT DO NOTHING
"""

COPY_ACCOUNTS = (
    "COPY accounts (account, kind, status, email, locale, timezone, opened_at, updated_at, next_due_at, operations,"
    f" seq, head, last_grant, {BUCKETS}, debt_micro, reference_micro, converted_to, achieved) FROM STDIN"
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
COPY_CODES = f"COPY codes ({', '.join(CODE_COLUMNS)}) FROM STDIN"
COPY_REDEMPTIONS = "COPY redemptions (code, slot, account, operation, amount_micro, at) FROM STDIN"
OUTBOX_IDS = "SELECT nextval('outbox_id_seq') FROM generate_series(1, %s)"
"""Taken before the rows are written, since COPY does not tell which it gave them; the accounts are locked by then, so
the rows of one account have ascending ids."""

ACCOUNTS = Changing(
    "accounts",
    (Column("account", "text"),),
    (
        *(Column(name, "text") for name in ("kind", "status", "email", "locale", "timezone")),
        *(Column(name, "timestamptz") for name in ("opened_at", "updated_at", "next_due_at")),
        Column("operations", "bigint"),
        Column("seq", "bigint"),
        Column("head", "bytea"),
        Column("last_grant", "int"),
        *(Column(f"{bucket}_micro", "bigint") for bucket in (*COUNTERS, "debt", "reference")),
        *(Column(name, "text") for name in ("converted_to", "achieved")),
    ),
)
"""In the order of :data:`models.rules.state.ACCOUNT_FIELDS`."""

KIND, NEXT_DUE_AT = ACCOUNT_FIELDS.index("kind"), ACCOUNT_FIELDS.index("next_due_at")

HOLDER, RESULT = 5, 4
"""Where a loaded hold's row, without its account, has its member; and a loaded charge's its result."""

account_fields = attrgetter(*ACCOUNT_FIELDS)

GRANTS = Changing(
    "grants",
    (Column("account", "text"), Column("grant_id", "int")),
    (
        *(Column(f"{bucket}_micro", "bigint") for bucket in (*COUNTERS, "clawed_back", "forgiven")),
        Column("expires_at", "timestamptz"),
        Column("is_open", "bool"),
    ),
)
BUCKETS_OF_GRANT, EXPIRES_AT = slice(12, 24), 5
"""Where a loaded grant's row, without its account, has the columns above, but for ``is_open``, which is not read."""

changing_fields = attrgetter(*COUNTERS, "clawed_back", "forgiven", "expires_at", "is_open")

CODES_CHANGING = Changing(
    "codes",
    (Column("code", "text"),),
    (Column("status", "text"), Column("used", "bigint"), Column("closed_at", "timestamptz")),
)
code_fields = attrgetter("status", "uses", "closed_at")

HOLDS = Changing(
    "holds",
    (Column("account", "text"), Column("hold", "text")),
    (Column("status", "text"), Column("captured_micro", "bigint"), Column("closed_at", "timestamptz")),
)
hold_fields = attrgetter("status", "captured", "closed_at")

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


AHEAD_OPERATIONS = 16
"""Operations per account from which a batch's rows go to the database while the rules still make others. With fewer
they are sorted by account first, which is cheaper for its indexes."""


REPLAYED, CONFLICT = "replayed", "conflict"
"""What becomes of an operation whose id was answered before: with the same content, and with other content."""


class Job:
    """One operation of a batch on its way through the writer."""

    __slots__ = (
        "account",
        "answer",
        "arguments",
        "message",
        "name",
        "operation",
        "quarantined",
        "source",
    )

    def __init__(self, name: str, operation: str, message: Message, arguments: bytes, source: Any = None) -> None:
        self.name = name
        self.operation = operation
        self.account = message.account
        self.message = message
        self.arguments = arguments
        self.source = source
        """What :attr:`LedgerWriter.poison` makes a quarantine row from."""
        self.answer: Answer | None = None
        self.quarantined: Quarantined | None = None

    @property
    def result(self) -> bytes | None:
        """The answer as it is sent; put together when it is asked for, since nobody waits for most."""
        return None if self.answer is None else self.answer.result

    @property
    def status(self) -> str:
        """What became of it: applied, rejected, or one of the two above."""
        if self.answer is None:
            return ""
        if self.answer.conflict:
            return CONFLICT
        return REPLAYED if self.answer.replayed else self.answer.status


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

    @property
    def loads(self) -> type[Loaded]:
        """What reads the accounts of a batch."""
        return Loaded

    def write(
        self,
        jobs: Sequence[Job],
        quarantined: Sequence[Quarantined] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Apply jobs in order and store quarantine rows, in one transaction.

        Afterwards each job has a ``result``, or is ``quarantined`` because its code raised.

        :param meanwhile: is called while the database works on the last rows; what it raises undoes the transaction.
        :raises psycopg.Error: when nothing was committed, or when that is unknown because the connection broke.
        """
        if self._written >= self._plan_anew_at:
            self._plan_anew_at = 2 * self._written
            self.connection.execute("DISCARD PLANS")
        self._written += len(jobs)
        try:
            try:
                self._write(jobs, quarantined, meanwhile, True)
            except PoisonError:
                self.connection.rollback()
                self._write(jobs, quarantined, meanwhile, False)
        except BaseException:
            if not self.connection.closed:
                try:
                    # Not as a statement: what a pipeline that failed was to prepare would be taken for prepared.
                    self.connection.rollback()
                except psycopg.Error:
                    self.connection.close()
            raise

    def _write(
        self,
        jobs: Sequence[Job],
        quarantined: Sequence[Quarantined],
        meanwhile: Callable[[], None] | None,
        ahead: bool,
    ) -> None:
        """Write in one transaction; with ``ahead``, operations on their way to the database while others are applied.

        :raises PoisonError: when a job's code raises then.
        """
        stages.begin()
        loaded = self.loads(self.connection, jobs)
        stages.end("read")
        crash_point("after-load")
        spendable_before = (
            {name: account.spendable(loaded.now) for name, account in loaded.accounts.items()} if self.events else {}
        )
        cursor = self.connection.cursor()
        catalog = self.catalog()
        ahead = ahead and len(jobs) >= AHEAD_OPERATIONS * len(loaded.accounts)
        if ahead:
            applied = apply_each(loaded, jobs, catalog)
            copy(cursor, COPY_OPERATIONS, (operation_line(account, row) for account, row in applied))
        else:
            apply_all(loaded, jobs, catalog, self.poison)
        follow = conclude(loaded, jobs)
        poisoned = [*quarantined, *(job.quarantined for job in jobs if job.quarantined is not None)]
        accounts = [account for account in loaded.accounts.values() if account.is_dirty]
        messages = [(each.account, "", each.name, each.operation, encode(each.arguments)) for each in follow]
        # Of what is told again and again, such as a limit that many run into, once in a batch.
        notices = [
            (account.account, notice)
            for account in accounts
            if account.notices
            for notice in {notice.key: notice for notice in account.notices}.values()
        ]
        channels = catalog.notify.channels
        if channels:
            messages += [
                (account, NOTICES, DELIVER, notice.key, encode({"account": account, "key": notice.key}))
                for account, notice in notices
            ]
        if self.events:
            messages += [
                (account.account, EXCHANGE, event["type"], event["id"], encode(event))
                for account in accounts
                for event in events_of(account, spendable_before[account.account], self.events)
            ]
        stages.end("rules")
        with cursor:
            self._insert(cursor, accounts, () if ahead else rows_of(jobs), meanwhile)
            if loaded.codes:
                self._write_codes(cursor, loaded.codes.values())
            outbox = insert_outbox(cursor, messages, loaded.now) if messages else []
            crash_point("after-copy")
            with self.connection.pipeline():
                self._update(cursor, loaded, accounts)
                if notices:
                    insert_notices(cursor, notices, channels, loaded.now)
                store(self.connection, poisoned)
            stages.end("write")
            crash_point("before-commit")
            # Not in the pipeline: the flush that ends one keeps the server from counting the silence after it.
            cursor.execute("COMMIT")
            if cursor.statusmessage != "COMMIT":
                # A transaction that failed is rolled back by this, without an error.
                raise psycopg.OperationalError(f"COMMIT was answered with {cursor.statusmessage}")
        stages.end("commit")
        self.outbox += outbox
        crash_point("after-commit")

    def _insert(
        self,
        cursor: Cursor[Any],
        accounts: Sequence[Account],
        rows: Iterable[tuple[str, Row]],
        meanwhile: Callable[[], None] | None,
    ) -> None:
        new = [row_line((account.account, *account_fields(account))) for account in accounts if account.is_new]
        copy(cursor, COPY_ACCOUNTS, new)
        grants = [
            row_line(_grant_row(account.account, grant))
            for account in accounts
            for grant in account.grants.values()
            if grant.is_new
        ]
        copy(cursor, COPY_GRANTS, grants)
        # By account, as the entries are: neighbours in the indexes one after the other.
        operations = (operation_line(account, row) for account, row in sorted(rows, key=itemgetter(0)))
        entries: list[str] = []

        def make_entries() -> None:
            entries.extend(entry_line(account.account, entry) for account in accounts for entry in account.entries)

        copy(cursor, COPY_OPERATIONS, operations, make_entries)
        copy(cursor, COPY_ENTRIES, entries, meanwhile)
        holds = [
            row_line(_hold_row(account.account, hold))
            for account in accounts
            for hold in account.holds.values()
            if hold.is_new
        ]
        copy(cursor, COPY_HOLDS, holds)

    @staticmethod
    def _write_codes(cursor: Cursor[Any], codes: Iterable[SharedCode]) -> None:
        """Write codes that were issued, what became of others, and each use of them."""
        # By their text: of two batches that make the same codes one waits for the other, and neither for both.
        codes = sorted(codes, key=lambda code: code.terms.code)
        copy(cursor, COPY_CODES, [row_line(code_row(code)) for code in codes if code.is_new])
        old = [code for code in codes if not code.is_new and (code.is_dirty or code.taken)]
        if old:
            update(cursor, CODES_CHANGING, [(code.terms.code,) for code in old], None, list(map(code_fields, old)))
        uses = [
            row_line((code.terms.code, slot, use.account, use.operation, use.amount, use.at))
            for code in codes
            for slot, use in sorted(code.taken.items())
        ]
        copy(cursor, COPY_REDEMPTIONS, uses)

    def _update(self, cursor: Cursor[Any], loaded: Loaded, accounts: Sequence[Account]) -> None:
        old = [account for account in accounts if not account.is_new]
        if old:
            names = [account.account for account in old]
            before = [loaded.account_row(name) for name in names]
            update(cursor, ACCOUNTS, [(name,) for name in names], before, [account_fields(account) for account in old])
        grants = [
            (account.account, grant)
            for account in old
            for grant in account.grants.values()
            if grant.is_dirty and not grant.is_new
        ]
        if grants:
            keys = [(account, grant.id) for account, grant in grants]
            rows = loaded.grant_rows()
            before = [(*rows[key][BUCKETS_OF_GRANT], rows[key][EXPIRES_AT], None) for key in keys]
            update(cursor, GRANTS, keys, before, [changing_fields(grant) for _, grant in grants])
        holds = [
            (account.account, hold)
            for account in old
            for hold in account.holds.values()
            if hold.is_dirty and not hold.is_new
        ]
        if holds:
            update(
                cursor,
                HOLDS,
                [(account, hold.id) for account, hold in holds],
                None,
                [hold_fields(hold) for _, hold in holds],
            )
        subscriptions = [
            (account.account, *subscription_row(account.subscription))
            for account in accounts
            if account.subscription is not None and account.subscription.is_dirty
        ]
        purchases = [
            (account.account, *purchase_row(purchase))
            for account in accounts
            if account.purchases
            for purchase in account.purchases.values()
            if purchase.is_dirty
        ]
        allowances = [
            (account.account, *allowance_row(allowance))
            for account in accounts
            if account.allowances
            for allowance in account.allowances.values()
            if allowance.is_dirty
        ]
        referrals = [
            (account.account, *referral_row(account.referral))
            for account in accounts
            if account.referral is not None and account.referral.is_dirty
        ]
        for statement, whole in (
            (UPSERT_SUBSCRIPTIONS, subscriptions), (UPSERT_PURCHASES, purchases), (UPSERT_ALLOWANCES, allowances),
            (UPSERT_REFERRALS, referrals),
        ):  # fmt: skip
            if whole:
                columns = zip(*whole, strict=True)
                cursor.execute(statement, [texts(map(_text_of, column)) for column in columns])
        receipts = list(_receipts(accounts))
        if receipts:
            holders, operations, *numbers = zip(*receipts, strict=True)
            cursor.execute(UPSERT_RECEIPTS, (texts(holders), texts(operations), *map(plain, numbers)))


class Loaded:
    """What one transaction read, and the accounts made of it; keeps the rows to make an account anew.

    Begins the transaction and locks the accounts of the jobs, in order, so that whatever else writes them
    comes before or after, never between.
    """

    def __init__(self, connection: Connection[Any], jobs: Sequence[Job]) -> None:
        names = sorted({job.account for job in jobs})
        ids = (texts(names),)
        keys = (texts(job.account for job in jobs), texts(job.operation for job in jobs))
        needs = _needs(jobs)
        with connection.pipeline():
            connection.execute("BEGIN")
            accounts = connection.execute(LOCK_ACCOUNTS, ids, binary=True)
            clock = connection.execute("SELECT ledger_now()")
            grants = [connection.execute(OPEN_GRANTS, ids, binary=True)]
            holds: list[Cursor[Any]] = []
            hold_lines = None
            purchases = connection.execute(PURCHASES, ids)
            known = connection.execute(KNOWN, keys)
            charges = connection.execute(CHARGES, needs["charge"]) if "charge" in needs else None
            transfers = connection.execute(TRANSFERS, needs["transfer"]) if "transfer" in needs else None
            subscriptions = []
            if "subscription" in needs:
                subscribers = (texts(needs["subscription"][0]),)
                subscriptions.append(connection.execute(SUBSCRIPTIONS, subscribers))
                grants.append(connection.execute(SUBSCRIBED_GRANTS, subscribers))
            if "hold" in needs:
                holds.append(connection.execute(NAMED_HOLDS, needs["hold"]))
            if "charge" in needs:
                grants.append(connection.execute(CHARGED_GRANTS, needs["charge"]))
            if "grant" in needs:
                grants.append(connection.execute(NAMED_GRANTS, needs["grant"]))
            if "purchase" in needs:
                grants.append(connection.execute(PURCHASED_GRANTS, needs["purchase"]))
            allowances = connection.execute(ALLOWANCES, needs["allowance"]) if "allowance" in needs else None
            referrals = None
            if "referral" in needs:
                referrals = connection.execute(REFERRALS, (texts(needs["referral"][0]),))
            # Last: they are of all lanes, and locked no longer than must be.
            codes = connection.execute(CODES, (texts(sorted(needs["code"][1])),)) if "code" in needs else None
            now = clock.fetchone()
            assert now is not None
            self.now: datetime = now[0]
            self._accounts: dict[str, Values] = {row[0]: row[1:] for row in accounts.fetchall()}
            # A hold that is open runs out some day: nothing is looked for where nothing is ever due.
            due = [name for name, row in self._accounts.items() if row[NEXT_DUE_AT] is not None]
            if due:
                holds.append(connection.execute(OPEN_HOLDS, (texts(due),)))
                hold_lines = connection.execute(OPEN_HOLD_LINES, (texts(due),))
                subscriptions.append(connection.execute(SUBSCRIPTIONS, (texts(due),)))
            pools = [name for name, row in self._accounts.items() if row[KIND] == POOL]
            counting = connection.execute(COUNTING, (texts(pools),)) if pools else None
            self._purchases = _by_account([purchases])
            if self._purchases:
                returned = (texts(self._purchases),)
                grants.append(connection.execute(RETURNED_GRANTS, returned))
                grants.append(connection.execute(TAKEN_GRANTS, returned))
            self._grants = _by_account(grants)
            missing = self._missing_roots()
            if missing:
                for account, *grant in connection.execute(ROOT_GRANTS, missing):
                    self._grants[account].append(tuple(grant))
            self._holds = _by_account(holds)
            self._hold_lines = _by_account([hold_lines])
            self._subscriptions = _by_account(subscriptions)
            self._known = _by_account([known])
            self._referrals = _by_account([referrals])
            self._codes: list[Values] = [] if codes is None else codes.fetchall()
            self.codes: dict[str, SharedCode] = {}
            """The codes that the jobs name, and those that they make: the same for all accounts."""
            self._make_codes()
            issues = self._withdrawn(jobs) - set(zip(*needs.get("transfer", ((), ())), strict=True))
            issued = connection.execute(TRANSFERS, _pairs(issues)) if issues else None
            self._charges = _by_account([charges, transfers, issued])
            pairs = self._members(jobs, {row[0] for row in counting}) if counting is not None else None
            members = connection.execute(ALLOWANCES, pairs) if pairs is not None else None
            referees = None
            if "referee" in needs:
                referees = connection.execute(ALLOWANCES, self._referees(jobs, needs["referee"]))
            self._allowances = _by_account([allowances, members, referees])
        self._sharing = frozenset(needs["code"][0]) if "code" in needs else frozenset()
        self.accounts = {name: self.make(name) for name in names}

    def _make_codes(self) -> None:
        """The codes as the database has them, before anything of this batch."""
        self.codes.clear()
        for row in self._codes:
            code = code_of(*row)
            self.codes[code.terms.code] = code

    def _withdrawn(self, jobs: Sequence[Job]) -> set[tuple[str, str]]:
        """Account and issue of the codes that jobs end, as far as somebody paid for them."""
        named = (
            (job.account, self.codes[code].terms)
            for job in jobs
            if isinstance(job.message, WithdrawCodes)
            for code in job.message.codes
            if code in self.codes
        )
        return {(account, terms.operation) for account, terms in named if terms.account == account and terms.lots}

    def make_anew(self, name: str) -> Collection[str]:
        """Make an account anew, and with one that had to do with codes all others that had: they saw what it did.

        :returns: the accounts that are as before this batch.
        """
        names = self._sharing if name in self._sharing else (name,)
        if names is self._sharing:
            self._make_codes()
        for each in names:
            self.accounts[each] = self.make(each)
        return names

    def _referees(self, jobs: Sequence[Job], claims: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
        """Where it stands whether accounts have referred the owners of codes, those of this batch included.

        :param claims: accounts, and the code that each claims.
        :returns: accounts, and the key of the allowance.
        """
        owners = {text: {code.terms.account} for text, code in self.codes.items()}
        for job in jobs:
            if isinstance(job.message, IssueReferral):
                owners.setdefault(job.message.code, set()).add(job.account)
        pairs = [
            (account, REFEREE + owner)
            for account, text in zip(*claims, strict=True)
            for owner in sorted(owners.get(text, ()))
        ]
        return [account for account, _ in pairs], [key for _, key in pairs]

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
        return texts(account for account, _ in missing), plain(root for _, root in missing)

    def _members(self, jobs: Sequence[Job], pools: set[str]) -> tuple[str, str] | None:
        """The members of pools that the jobs, or the time that passes with them, may charge or give back to.

        :returns: pairs of account and the key of its allowance.
        """
        pairs: dict[tuple[str, str], None] = {}
        for job in jobs:
            if job.account in pools:
                member = getattr(job.message, "member", None)
                if member is not None:
                    pairs[job.account, member] = None
        for name in pools:
            holders = {hold[HOLDER] for hold in self._holds.get(name, ())}
            results = (charge[RESULT] for charge in self._charges.get(name, ()))
            charged = {charged_member(result) for result in results if result is not None}
            pairs.update(((name, member), None) for member in holders | charged if member is not None)
        if not pairs:
            return None
        return texts(name for name, _ in pairs), texts(MEMBER + member for _, member in pairs)

    def account_row(self, name: str) -> Values:
        """The :data:`~models.rules.state.ACCOUNT_FIELDS` of an account as they were read."""
        return self._accounts[name]

    def grant_rows(self) -> dict[tuple[str, int], Values]:
        """The grants as they were read, by account and number."""
        return {(account, row[0]): row for account, rows in self._grants.items() for row in rows}

    def make(self, name: str) -> Account:
        """An account as the database has it, before anything of this batch."""
        row = self._accounts.get(name)
        account = Account(name) if row is None else Account(name, row)
        account.is_new = row is None
        account.codes = self.codes
        for grant_id, source, priority, features, *rest in self._grants.get(name, ()):
            if grant_id not in account.grants:
                scope = None if features is None else frozenset(features)
                account.add_grant(Grant(grant_id, source, priority, scope, *rest))
        for subscription in self._subscriptions.get(name, ()):
            account.subscription = subscription_of(subscription)
        for purchase in self._purchases.get(name, ()):
            account.purchases[purchase[0]] = purchase_of(purchase)
        for allowance in self._allowances.get(name, ()):
            account.allowances[allowance[0]] = allowance_of(allowance)
        for referral in self._referrals.get(name, ()):
            account.referral = referral_of(referral)
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


class PoisonError(Exception):
    """A job's code raised, and nothing of its batch may stand as it is."""


def apply_each(loaded: Loaded, jobs: Sequence[Job], catalog: Catalog) -> Iterator[tuple[str, Row]]:
    """Apply jobs in order to the loaded accounts, in memory, one by one as they are asked for.

    :returns: the operation rows to write, with their accounts.
    :raises PoisonError: when a job's code raises.
    """
    for job in jobs:
        job.quarantined = job.answer = None
        try:
            job.answer = answer = _apply_one(loaded, job, catalog)
        except Exception as error:
            raise PoisonError from error
        if answer.row is not None:
            yield job.account, answer.row


def apply_all(loaded: Loaded, jobs: Sequence[Job], catalog: Catalog, poison: Poison) -> None:
    """Apply jobs in order to the loaded accounts, in memory.

    A job whose code raises is taken out: its account is made anew from the rows that were read, and the jobs
    of that account before it are applied again, so that nothing half done is left. The others stand, but for those
    that shared codes with it: see :meth:`Loaded.make_anew`.
    """
    for place, job in enumerate(jobs):
        job.quarantined = job.answer = None
        try:
            job.answer = _apply_one(loaded, job, catalog)
        except Exception as error:
            trace = traceback.format_exc()
            reason = f"{type(error).__name__}: {error}"
            job.quarantined = poison(job, Code.INTERNAL_ERROR, reason, trace)
            anew = loaded.make_anew(job.account)
            for before in jobs[:place]:
                if before.account in anew and before.quarantined is None:
                    before.answer = _apply_one(loaded, before, catalog)


def rows_of(jobs: Iterable[Job]) -> Iterator[tuple[str, Row]]:
    """The operation rows of applied jobs, with their accounts."""
    for job in jobs:
        if job.answer is not None and job.answer.row is not None:
            yield job.account, job.answer.row


def conclude(loaded: Loaded, jobs: Iterable[Job]) -> list[FollowUp]:
    """Note when each account is due next, after all jobs are applied.

    :returns: what follows from the jobs, in order.
    """
    for account in loaded.accounts.values():
        if account.is_dirty:
            account.next_due_at = account.due_at()
    return [follow for job in jobs if job.answer is not None for follow in job.answer.follow]


def _apply_one(loaded: Loaded, job: Job, catalog: Catalog) -> Answer:
    account = loaded.accounts[job.account]
    now = loaded.now
    if account.updated_at is not None and account.updated_at > now:
        now = account.updated_at
    return apply(account, job.name, job.operation, job.message, job.arguments, now, catalog)


def insert_notices(
    cursor: Cursor[Any], notices: Sequence[tuple[str, Notice]], channels: Sequence[str], now: datetime
) -> None:
    """Write notices with their accounts; one that is there already stays as it is.

    :param channels: how they go out, beside the inbox; without any they are delivered as they stand.
    """
    accounts, told = zip(*notices, strict=True)
    delivered_at = None if channels else now
    cursor.execute(
        INSERT_NOTICES,
        (
            now, list(channels), delivered_at, texts(accounts), texts(each.key for each in told),
            texts(each.kind for each in told), instants(each.at for each in told),
            texts(encode(each.details).decode() for each in told),
        ),
    )  # fmt: skip


def _text_of(value: Any) -> str | None:
    """A value in the text form that Postgres casts to its type."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    return plain(value) if isinstance(value, list) else str(value)


def insert_outbox(
    cursor: Cursor[Any], messages: Sequence[tuple[str, str, str, str, bytes]], now: datetime
) -> list[OutboxRow]:
    """COPY messages to the outbox.

    :param messages: account, exchange, task, operation and arguments of each.
    :returns: the rows as they are written.
    """
    ids = cursor.execute(OUTBOX_IDS, (len(messages),)).fetchall()
    rows = [OutboxRow(id, *message, now) for (id,), message in zip(ids, messages, strict=True)]
    copy(cursor, COPY_OUTBOX, [row_line((*row[:5], row.arguments.decode(), row.created_at)) for row in rows])
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


def _grant_row(account: str, grant: Grant) -> Values:
    features = None
    if grant.features is not None:
        features = texts(sorted(grant.features))
    return (
        account, grant.id, grant.source, grant.priority, features, grant.effective_at, grant.expires_at,
        grant.created_at, grant.operation, grant.purchase, grant.price_minor, grant.price_currency, grant.price_per,
        *_counters(grant), grant.clawed_back, grant.forgiven, grant.origin, grant.is_open,
    )  # fmt: skip


def _hold_row(account: str, hold: Hold) -> Values:
    return (
        account, hold.id, hold.status, hold.amount, hold.captured, hold.feature, hold.member, hold.created_at,
        hold.expires_at, hold.closed_at,
    )  # fmt: skip


_counters = attrgetter(*COUNTERS)


def _receipts(accounts: Iterable[Account]) -> Iterator[tuple[str, str, int, int, int, int]]:
    """The receipt lines to write: of holds that are new or changed, of charges that were given back from."""
    for account in accounts:
        for hold in account.holds.values():
            if hold.is_new or hold.is_dirty:
                yield from _receipt(account.account, hold.id, hold.lines)
        for operation, known in account.known.items():
            if known.is_dirty and known.lines is not None:
                yield from _receipt(account.account, operation, known.lines)


def _receipt(account: str, operation: str, lines: Iterable[Line]) -> Iterator[tuple[str, str, int, int, int, int]]:
    for number, line in enumerate(lines, 1):
        yield account, operation, number, line.grant, line.taken, line.returned


def _by_account(cursors: Iterable[Cursor[Any] | None]) -> dict[str, list[Values]]:
    grouped: dict[str, list[Values]] = {}
    for cursor in cursors:
        for row in cursor.fetchall() if cursor is not None else ():
            grouped.setdefault(row[0], []).append(row[1:])
    return grouped


def _pairs(pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Pairs as two arrays."""
    first, second = zip(*pairs, strict=True)
    return texts(first), texts(second)


def _needs(jobs: Sequence[Job]) -> dict[str, tuple[list[str], list[str]]]:
    """The past rows that the jobs work on, as pairs of account and key, by kind."""
    needs: dict[str, dict[tuple[str, str], None]] = {}
    for job in jobs:
        find = OPERATIONS[job.name].need
        if find is not None:
            need: Need
            for need in find(job.message):
                # Once each: a charge that two refunds of a batch name must not have its receipt twice.
                needs.setdefault(need.kind, {})[job.account, str(need.key)] = None
    return {kind: ([account for account, _ in pairs], [key for _, key in pairs]) for kind, pairs in needs.items()}
