"""Reading gift codes: one with its uses, and those of an account page by page. Nothing here writes."""

from __future__ import annotations

from datetime import datetime

import msgspec
from psycopg import Connection

from creditlane.amounts import format_amount
from models.reading import MAX_PAGE

_COLUMNS = """
SELECT c.code, c.account, c.operation, c.amount_micro, c.uses, c.used, c.terms ->> 'per_account', c.expires_at,
       c.status, c.closed_at, c.terms ->> 'source', c.terms ->> 'message', c.place, ledger_now()
FROM codes c
"""
ONE = f"{_COLUMNS} WHERE c.code = %s AND c.kind = 'gift'"
OF_ACCOUNT = f"""
{_COLUMNS} WHERE c.account = %(account)s AND (c.operation, c.place) > (%(operation)s, %(place)s) AND c.kind = 'gift'
ORDER BY c.operation, c.place LIMIT %(limit)s
"""
USES = "SELECT slot, account, operation, at FROM redemptions WHERE code = %s AND slot >= %s ORDER BY slot LIMIT %s"


class Use(msgspec.Struct, frozen=True):
    """One time that a code was redeemed."""

    slot: int
    """From 0."""
    account: str
    operation: str
    at: datetime


class CodeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A gift code, its terms and what became of it."""

    code: str
    account: str
    """Who issued it."""
    operation: str
    """By which operation."""
    credits: str
    """For each use."""
    uses: int
    used: int
    per_account: int
    status: str
    """``open``, ``used`` (no use is left), ``over`` (its time is) or ``closed`` (withdrawn, or ended when over)."""
    expires_at: datetime
    closed_at: datetime | None
    source: str | None
    """Of the credits that an administrator's code gives; none of one that the account paid for."""
    message: str | None
    place: int
    """Among the codes of its operation."""


class CodePage(msgspec.Struct, frozen=True, kw_only=True):
    """Codes of an account, in the order of their operations' ids and their places."""

    codes: list[CodeSummary]
    next_after: str | None
    """The code after which the next page begins; none after the last page."""


def code_summary(connection: Connection[tuple[object, ...]], code: str) -> CodeSummary | None:
    """Read one gift code; none where there is no such.

    :param code: its text as :func:`creditlane.contract.normal_code` gives it.
    """
    row = connection.execute(ONE, (code,)).fetchone()
    return None if row is None else _summary(row)


def uses_of(connection: Connection[tuple[object, ...]], code: str, *, limit: int, first: int = 0) -> list[Use]:
    """Read uses of a code, in order.

    :param first: the first slot.
    """
    return [Use(*row) for row in connection.execute(USES, (code, first, limit))]  # type: ignore[arg-type]


def codes_of(
    connection: Connection[tuple[object, ...]], account: str, *, limit: int, after: str | None = None
) -> CodePage:
    """Read a page of the codes that an account issued.

    :param limit: codes of the page, at most :data:`models.reading.MAX_PAGE`.
    :param after: ``next_after`` of the page before.
    :raises ValueError: for a limit or a code that is none.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} rows, not {limit}")
    last = None if after is None else code_summary(connection, after)
    if after is not None and (last is None or last.account != account):
        raise ValueError(f"{after!r} is no code of {account!r}")
    operation, place = ("", -1) if last is None else (last.operation, last.place)
    values = {"account": account, "operation": operation, "place": place, "limit": limit + 1}
    found = [_summary(row) for row in connection.execute(OF_ACCOUNT, values)]
    return CodePage(codes=found[:limit], next_after=found[limit - 1].code if len(found) > limit else None)


def _summary(row: tuple[object, ...]) -> CodeSummary:
    (
        code, account, operation, amount, uses, used, per_account, expires_at, status, closed_at, source, message,
        place, now,
    ) = row  # fmt: skip
    assert isinstance(amount, int)
    assert isinstance(uses, int)
    assert isinstance(used, int)
    assert isinstance(expires_at, datetime)
    assert isinstance(now, datetime)
    if status == "open":
        status = "used" if used >= uses else "over" if expires_at <= now else "open"
    return msgspec.convert(
        {
            "code": code, "account": account, "operation": operation, "credits": format_amount(amount), "uses": uses,
            "used": used, "per_account": int(str(per_account)), "status": status, "expires_at": expires_at,
            "closed_at": closed_at, "source": source, "message": message, "place": place,
        },
        CodeSummary,
    )  # fmt: skip
