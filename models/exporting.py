"""What is exported: accounts with their balances, lots, entries and usage, row by row out of one snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from psycopg import Connection, sql

from models.audit_page import begin_reading

FETCH = 5000
"""Rows that are read at once."""

BALANCE = "balance:"
"""What the name of a column begins with that holds an account's credits of one source."""


class What(StrEnum):
    """What is exported."""

    ACCOUNTS = "accounts"
    LOTS = "lots"
    ENTRIES = "entries"
    USAGE = "usage"


class Type(StrEnum):
    """What a column holds; an amount comes in micro-credits."""

    TEXT = "text"
    NUMBER = "number"
    AMOUNT = "amount"
    INSTANT = "instant"
    DAY = "day"
    TEXTS = "texts"


class Column(NamedTuple):
    """A column of an export, and the SQL of its value."""

    name: str
    type: Type
    value: str


@dataclass(frozen=True)
class Export:
    """What is read for an export.

    :ivar timed: what :func:`read` may be bounded by, if anything.
    """

    columns: tuple[Column, ...]
    source: str
    order: str
    timed: str | None = None


LIVE = "g.is_open AND g.available_micro > 0 AND (g.expires_at IS NULL OR g.expires_at > t.now)"
"""Lots with credits that have not ended by the time of the snapshot, whether that was noted yet or not."""

PERSON = (
    Column("account", Type.TEXT, "a.account"),
    Column("kind", Type.TEXT, "a.kind"),
    Column("status", Type.TEXT, "a.status"),
    Column("email", Type.TEXT, "a.email"),
    Column("locale", Type.TEXT, "a.locale"),
    Column("timezone", Type.TEXT, "a.timezone"),
    Column("opened_at", Type.INSTANT, "a.opened_at"),
)
OPENED = "accounts a CROSS JOIN (SELECT ledger_now() AS now) t"

EXPORTS = {
    What.ACCOUNTS: Export(
        (
            *PERSON,
            Column("updated_at", Type.INSTANT, "a.updated_at"),
            Column("operations", Type.NUMBER, "a.operations"),
            Column("current_plan", Type.TEXT, "s.plan"),
            Column("available", Type.AMOUNT, "b.available"),
            Column("upcoming", Type.AMOUNT, "b.upcoming"),
            Column("frozen", Type.AMOUNT, "b.frozen"),
            Column("held", Type.AMOUNT, "a.held_micro"),
            Column("in_transit", Type.AMOUNT, "a.in_transit_micro"),
            Column("debt", Type.AMOUNT, "a.debt_micro"),
        ),
        f"""{OPENED}
        LEFT JOIN subscriptions s ON s.account = a.account AND s.status = 'active'
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(micro) FILTER (WHERE place = 'available'), 0) AS available,
                   coalesce(sum(micro) FILTER (WHERE place = 'upcoming'), 0) AS upcoming,
                   coalesce(sum(micro) FILTER (WHERE place = 'frozen'), 0) AS frozen,
                   json_object_agg(source, micro) FILTER (WHERE place = 'available') AS by_source
            FROM (
                SELECT g.source, sum(g.available_micro) AS micro,
                       CASE WHEN p.is_frozen THEN 'frozen' WHEN g.effective_at > t.now THEN 'upcoming'
                            ELSE 'available' END AS place
                FROM grants g LEFT JOIN purchases p ON p.account = g.account AND p.purchase = g.purchase
                WHERE g.account = a.account AND {LIVE}
                GROUP BY g.source, place
            ) sums
        ) b
        WHERE a.status <> 'unopened'""",
        "a.account",
    ),
    What.LOTS: Export(
        (
            *PERSON,
            Column("lot", Type.NUMBER, "g.grant_id"),
            Column("source", Type.TEXT, "g.source"),
            Column("amount", Type.AMOUNT, "g.available_micro"),
            Column("effective_at", Type.INSTANT, "g.effective_at"),
            Column("expires_at", Type.INSTANT, "g.expires_at"),
            Column("priority", Type.NUMBER, "g.priority"),
            Column("features", Type.TEXTS, "g.features"),
        ),
        f"{OPENED} LEFT JOIN grants g ON g.account = a.account AND {LIVE} WHERE a.status <> 'unopened'",
        "a.account, g.grant_id",
    ),
    What.ENTRIES: Export(
        (
            Column("account", Type.TEXT, "e.account"),
            Column("seq", Type.NUMBER, "e.seq"),
            Column("operation", Type.TEXT, "e.operation"),
            Column("kind", Type.TEXT, "e.kind"),
            Column("lot", Type.NUMBER, "e.grant_id"),
            Column("source", Type.TEXT, "g.source"),
            Column("amount", Type.AMOUNT, "e.amount_micro"),
            Column("balance_after", Type.AMOUNT, "e.balance_after_micro"),
            Column("at", Type.INSTANT, "e.at"),
            Column("recorded_at", Type.INSTANT, "e.recorded_at"),
            Column("refers_to", Type.TEXT, "e.refers_to"),
            Column("hash", Type.TEXT, "encode(e.hash, 'hex')"),
        ),
        "entries e JOIN grants g ON g.account = e.account AND g.grant_id = e.grant_id WHERE true",
        "e.account, e.seq",
        "e.recorded_at",
    ),
    What.USAGE: Export(
        (
            Column("account", Type.TEXT, "u.account"),
            Column("day", Type.DAY, "u.day"),
            Column("feature", Type.TEXT, "u.feature"),
            Column("member", Type.TEXT, "u.member"),
            Column("operations", Type.NUMBER, "u.operations"),
            Column("quantity", Type.AMOUNT, "u.quantity_micro::numeric(38, 0)"),
            Column("charged", Type.AMOUNT, "u.charged_micro::numeric(38, 0)"),
            Column("refunded", Type.AMOUNT, "u.refunded_micro::numeric(38, 0)"),
        ),
        "usage_days u WHERE true",
        "u.account, u.day, u.feature, u.member",
        "u.day::timestamp AT TIME ZONE 'UTC'",
    ),
}
"""What is read, by name. Columns of accounts and lots are called as an import has them."""

SOURCES = f"SELECT DISTINCT g.source FROM grants g, (SELECT ledger_now() AS now) t WHERE {LIVE} ORDER BY g.source"

Row = Sequence[Any]
Progress = Callable[[int, int], None]
"""Told how many rows are read and how many there are."""


class TimelessError(ValueError):
    """A span of time was asked of something that is as it is now."""


class Rows(NamedTuple):
    """The columns of an export, and its rows."""

    columns: tuple[Column, ...]
    pages: Iterator[list[Row]]


def read(
    connection: Connection[Any],
    what: What,
    since: datetime | None = None,
    until: datetime | None = None,
    progress: Progress | None = None,
) -> Rows:
    """Read everything for an export, in order, as one snapshot has it; a page at a time.

    :param connection: within a transaction that has just begun; needs no more than the right to read.
    :param since: what was recorded then or later; of usage, what was used.
    :param until: what was before.
    :raises TimelessError: for a span of time of accounts or lots.
    """
    export = EXPORTS[what]
    if (since is not None or until is not None) and export.timed is None:
        raise TimelessError(f"{what} are exported as they stand: there is no --from and --to")
    begin_reading(connection)
    columns, values = export.columns, [column.value for column in export.columns]
    sources: list[str] = []
    if what is What.ACCOUNTS:
        sources = [source for (source,) in connection.execute(SOURCES)]
        columns += tuple(Column(f"{BALANCE}{source}", Type.AMOUNT, "b.by_source") for source in sources)
        values.append("b.by_source")
    bounds = "".join(
        f" AND {export.timed} {sign} %({name})s"
        for sign, name, bound in ((">=", "since", since), ("<", "until", until))
        if bound is not None
    )
    given = {"since": since, "until": until}
    selected = f"FROM {export.source}{bounds}"
    counted = connection.execute(f"SELECT count(*) {selected}", given).fetchone()
    query = f"SELECT {', '.join(values)} {selected} ORDER BY {export.order}"
    return Rows(columns, _pages(connection, query, given, sources, int(counted[0]) if counted else 0, progress))


def _pages(
    connection: Connection[Any],
    query: str,
    given: dict[str, Any],
    sources: Sequence[str],
    total: int,
    progress: Progress | None,
) -> Iterator[list[Row]]:
    done = 0
    with connection.cursor(name="export") as cursor:
        cursor.execute(sql.SQL(query), given)
        while page := cursor.fetchmany(FETCH):
            done += len(page)
            yield [(*row[:-1], *map((row[-1] or {}).get, sources)) for row in page] if sources else page
            if progress is not None:
                progress(done, max(total, done))
