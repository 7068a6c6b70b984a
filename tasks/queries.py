"""Read-only tasks, on a queue of their own, for a general worker (messages: the task table)."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, TypeVar

import msgspec
import psycopg
from celery import shared_task

from creditlane.amounts import parse_amount
from creditlane.contract import VERSION, Instant, Key, Name
from creditlane.reports import FORECAST_DAYS, MAX_FORECAST_DAYS, Grouping, Status
from models import explaining, forecast, pool_reading, reading, usage_reading
from models.database import reader
from models.in_force import catalog_in_force
from models.reading import DEFAULT_PAGE, MAX_PAGE

RETRIES: dict[str, Any] = {
    "autoretry_for": (psycopg.OperationalError,),
    "dont_autoretry_for": (psycopg.errors.QueryCanceled,),  # what took too long would take too long again
    "max_retries": 3,
    "retry_backoff": 1,
    "retry_backoff_max": 4,
    "retry_jitter": True,
}
"""How a task asks again while the database is away."""

Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)]
Number = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
"""The number of an operation, or the seq of an entry."""


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of one account."""

    account: Name


class BalanceQuery(Query, frozen=True, kw_only=True):
    """``queries.balance``."""


class HistoryQuery(Query, frozen=True, kw_only=True):
    """``queries.history``: see :func:`models.reading.history`."""

    limit: Limit = DEFAULT_PAGE
    before: Number | None = None
    feature: Name | None = None
    name: Name | None = None
    status: Status | None = None
    member: Name | None = None
    source: Name | None = None
    since: Instant | None = None
    until: Instant | None = None
    entries: bool = False
    """Whether each operation comes with its entries."""


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``queries.usage``: see :func:`models.usage_reading.usage`."""

    account: Name | None = None
    by: Grouping = "feature"
    since: date | None = None
    until: date | None = None
    feature: Key | None = None
    member: Key | None = None
    limit: Limit = DEFAULT_PAGE
    after: Key | None = None


class PoolQuery(Query, frozen=True, kw_only=True):
    """``queries.pool``: see :func:`models.pool_reading.pool`."""

    since: date | None = None
    until: date | None = None
    limit: Limit = DEFAULT_PAGE
    after: Name | None = None


class ForecastQuery(Query, frozen=True, kw_only=True):
    """``queries.forecast``: see :func:`models.forecast.forecast`."""

    days: Annotated[int, msgspec.Meta(ge=1, le=MAX_FORECAST_DAYS)] = FORECAST_DAYS
    pace: str | int | None = None
    """Credits a day, as amounts are written."""
    paid: bool = True


class ExplainQuery(Query, frozen=True, kw_only=True):
    """``queries.explain``: an operation, a grant, or the balance where neither is named."""

    operation: Name | None = None
    grant: Annotated[int, msgspec.Meta(ge=1, le=explaining.MAX_GRANT)] | None = None
    limit: Limit = DEFAULT_PAGE
    after: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)] = 0

    def __post_init__(self) -> None:
        if self.operation is not None and self.grant is not None:
            raise ValueError("ask for an operation or a grant, one of the two")


Asked = TypeVar("Asked", bound=msgspec.Struct)


def understood(kind: type[Asked], v: object, arguments: dict[str, Any]) -> Asked:
    """Check what is asked.

    :param v: the contract's version.
    :raises ValueError: naming the argument that makes no sense, or for a newer version of the contract.
    """
    if v != VERSION:
        raise ValueError(f"the query is of contract version {v!r}, this side knows {VERSION}")
    try:
        return msgspec.convert(arguments, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


@shared_task(name="queries.balance", **RETRIES)
def balance(account: str, v: int = 1) -> dict[str, Any] | None:
    """An account's balance as last committed, at the database's time.

    :param account: whose credits.
    :param v: the contract's version.
    :returns: ``available``, and ``held``, ``debt``, ``upcoming``, ``by_source`` where there are any, in credits as
        decimal strings, like a result's balance; None for an account that was never opened.
    :raises ValueError: for what is no account, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    asked = understood(BalanceQuery, v, {"account": account})
    with reader() as connection:
        return _told(reading.account_balance(connection, asked.account, catalog_in_force(connection)))


@shared_task(name="queries.history", **RETRIES)
def history(v: int = 1, **arguments: Any) -> dict[str, Any]:
    """A page of an account's operations, the newest first.

    :param v: the contract's version.
    :param arguments: those of a :class:`HistoryQuery`.
    :returns: a :class:`creditlane.reports.HistoryPage` as JSON has it; empty for an account that does not exist.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away, or takes more than 30 s.
    """
    asked = understood(HistoryQuery, v, arguments)
    values = msgspec.structs.asdict(asked)
    account, entries = values.pop("account"), values.pop("entries")
    with reader() as connection:
        page = reading.history(connection, account, with_entries=entries, **values)
    told: dict[str, Any] = msgspec.to_builtins(page)
    return told


@shared_task(name="queries.usage", **RETRIES)
def usage(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """What an account used in a span of days, or all accounts where none is named.

    :param v: the contract's version.
    :param arguments: those of a :class:`UsageQuery`.
    :returns: a :class:`creditlane.reports.Usage` as JSON has it; None for an account that no operation ever named.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away, or takes more than 30 s.
    """
    values = msgspec.structs.asdict(understood(UsageQuery, v, arguments))
    account = values.pop("account")
    with reader() as connection:
        return _told(usage_reading.usage(connection, account, **values))


@shared_task(name="queries.pool", **RETRIES)
def pool(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """A pool and its members: what each may use, what it used, and its share.

    :param v: the contract's version.
    :param arguments: those of a :class:`PoolQuery`.
    :returns: a :class:`creditlane.reports.Pool` as JSON has it; None for an account that is no pool, or not there.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away, or takes more than 30 s.
    """
    values = msgspec.structs.asdict(understood(PoolQuery, v, arguments))
    account = values.pop("account")
    with reader() as connection:
        return _told(pool_reading.pool(connection, account, catalog_in_force(connection), **values))


@shared_task(name="queries.forecast", **RETRIES)
def ahead(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """How long an account's credits last, how many will end unused, and what there is to do.

    :param v: the contract's version.
    :param arguments: those of a :class:`ForecastQuery`.
    :returns: a :class:`creditlane.reports.Forecast` as JSON has it; None for an account that no operation ever named.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    asked = understood(ForecastQuery, v, arguments)
    pace = None if asked.pace is None else parse_amount(asked.pace)
    with reader() as connection:
        catalog = catalog_in_force(connection)
        return _told(forecast.forecast(connection, asked.account, catalog, days=asked.days, pace=pace, paid=asked.paid))


@shared_task(name="queries.explain", **RETRIES)
def explain(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """Why a balance is what it is; which grants an operation took from; or what became of a grant.

    :param v: the contract's version.
    :param arguments: those of an :class:`ExplainQuery`.
    :returns: a :class:`creditlane.reports.BalanceExplained`, ``OperationExplained`` or ``GrantExplained`` as JSON has
        it; None for what does not exist.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    asked = understood(ExplainQuery, v, arguments)
    account, limit, after = asked.account, asked.limit, asked.after
    with reader() as connection:
        if asked.operation is not None:
            return _told(explaining.explain_operation(connection, account, asked.operation, limit=limit, after=after))
        if asked.grant is not None:
            return _told(explaining.explain_grant(connection, account, asked.grant, limit=limit, after=after))
        return _told(explaining.explain_balance(connection, account, catalog_in_force(connection)))


def _told(found: msgspec.Struct | None) -> dict[str, Any] | None:
    """An answer as JSON has it."""
    told: dict[str, Any] | None = msgspec.to_builtins(found)
    return told
