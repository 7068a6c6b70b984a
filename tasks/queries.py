"""Read-only tasks, on a queue of their own, for a general worker (messages: the task table)."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, TypeVar

import msgspec
import psycopg
from celery import shared_task

from creditlane.amounts import parse_amount
from creditlane.contract import MAX_BATCH, VERSION, Instant, Key, Name, Text
from creditlane.reports import (
    FORECAST_DAYS,
    MAX_FORECAST_DAYS,
    Grouping,
    Merit,
    Planned,
    RefundGrouping,
    Status,
)
from models import (
    achievement_reading,
    explaining,
    forecast,
    leaderboard,
    pool_reading,
    reading,
    referral_reading,
    refund_reading,
    usage_reading,
)
from models.actions import actions as read_actions
from models.database import reader
from models.in_force import catalog_in_force
from models.reading import DEFAULT_PAGE, MAX_PAGE
from models.referral_reading import MAX_PLACE
from tasks.simulation import simulate_operations

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


class ActionsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``queries.actions``: see :func:`models.actions.actions`."""

    actor: Text | None = None
    since: Instant | None = None
    until: Instant | None = None
    limit: Limit = DEFAULT_PAGE
    before: Annotated[str, msgspec.Meta(max_length=256)] | None = None


class ExplainQuery(Query, frozen=True, kw_only=True):
    """``queries.explain``: an operation, a grant, or the balance where neither is named."""

    operation: Name | None = None
    grant: Annotated[int, msgspec.Meta(ge=1, le=explaining.MAX_GRANT)] | None = None
    limit: Limit = DEFAULT_PAGE
    after: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)] = 0

    def __post_init__(self) -> None:
        if self.operation is not None and self.grant is not None:
            raise ValueError("ask for an operation or a grant, one of the two")


class SimulateQuery(Query, frozen=True, kw_only=True):
    """``queries.simulate``: see :func:`tasks.simulation.simulate_operations`."""

    operations: Annotated[list[Planned], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
    at: Instant | None = None
    paid: bool = True


class AchievementsQuery(Query, frozen=True, kw_only=True):
    """``queries.achievements``."""


class LeaderboardQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``queries.leaderboard``: see :func:`models.leaderboard.leaderboard`."""

    by: Merit = "used"
    since: date | None = None
    until: date | None = None
    account: Name | None = None
    limit: Limit = DEFAULT_PAGE
    after: Name | None = None


class RefundsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``queries.refunds``: see :func:`models.refund_reading.refunds`."""

    account: Name | None = None
    by: tuple[RefundGrouping, ...] = refund_reading.ALL
    since: date | None = None
    until: date | None = None
    feature: Key | None = None
    limit: Limit = DEFAULT_PAGE
    after: Annotated[int, msgspec.Meta(ge=0, le=refund_reading.MAX_LINES)] = 0


class ReferralsQuery(Query, frozen=True, kw_only=True):
    """``queries.referrals``: see :func:`models.referral_reading.referrals`."""

    limit: Limit = DEFAULT_PAGE
    before: Annotated[str, msgspec.Meta(max_length=MAX_PLACE)] | None = None


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


@shared_task(name="queries.actions", **RETRIES)
def actions(v: int = 1, **arguments: Any) -> dict[str, Any]:
    """A page of what administrators did, in all accounts, the newest first.

    :param v: the contract's version.
    :param arguments: those of an :class:`ActionsQuery`.
    :returns: a :class:`creditlane.reports.ActionsPage` as JSON has it.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away, or takes more than 30 s.
    """
    asked = understood(ActionsQuery, v, arguments)
    with reader() as connection:
        told: dict[str, Any] = msgspec.to_builtins(read_actions(connection, **msgspec.structs.asdict(asked)))
    return told


@shared_task(name="queries.simulate", **RETRIES)
def simulate(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """What operations would cost, which grants would pay, and which would be refused with which offer.

    :param v: the contract's version.
    :param arguments: those of a :class:`SimulateQuery`.
    :returns: a :class:`creditlane.reports.Simulation` as JSON has it; None for an account that no operation ever named.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    asked = understood(SimulateQuery, v, arguments)
    with reader() as connection:
        catalog = catalog_in_force(connection)
        return _told(
            simulate_operations(connection, asked.account, asked.operations, catalog, at=asked.at, paid=asked.paid)
        )


@shared_task(name="queries.leaderboard", **RETRIES)
def ranking(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """The accounts that used or earned the most, for all time or in a span of days.

    :param v: the contract's version.
    :param arguments: those of a :class:`LeaderboardQuery`.
    :returns: a :class:`creditlane.reports.Leaderboard` as JSON has it.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away, or takes more than 30 s.
    """
    values = msgspec.structs.asdict(understood(LeaderboardQuery, v, arguments))
    with reader() as connection:
        return _told(leaderboard.leaderboard(connection, catalog_in_force(connection), **values))


@shared_task(name="queries.refunds", **RETRIES)
def refunds(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """What was given back in a span of days, by reason, feature and by whom; of all accounts where none is named.

    :param v: the contract's version.
    :param arguments: those of a :class:`RefundsQuery`.
    :returns: a :class:`creditlane.reports.Refunds` as JSON has it; None for an account that no operation ever named.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away, or takes more than 30 s.
    """
    values = msgspec.structs.asdict(understood(RefundsQuery, v, arguments))
    account = values.pop("account")
    with reader() as connection:
        return _told(refund_reading.refunds(connection, account, **values))


@shared_task(name="queries.referrals", **RETRIES)
def referrals(v: int = 1, **arguments: Any) -> dict[str, Any] | None:
    """By which code an account refers others, who referred it, and a page of those whom it referred.

    :param v: the contract's version.
    :param arguments: those of a :class:`ReferralsQuery`.
    :returns: a :class:`creditlane.reports.Referrals` as JSON has it; None for an account that no operation ever named.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    asked = understood(ReferralsQuery, v, arguments)
    with reader() as connection:
        return _told(referral_reading.referrals(connection, asked.account, limit=asked.limit, before=asked.before))


@shared_task(name="queries.achievements", **RETRIES)
def achievements(account: str, v: int = 1) -> dict[str, Any] | None:
    """What an account has achieved, and how far it is with the rest.

    :param account: whose.
    :param v: the contract's version.
    :returns: a :class:`creditlane.reports.Achievements` as JSON has it; None for an account that no operation ever
        named.
    :raises ValueError: for what is no account, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    asked = understood(AchievementsQuery, v, {"account": account})
    with reader() as connection:
        return _told(achievement_reading.achievements(connection, asked.account, catalog_in_force(connection)))


def _told(found: msgspec.Struct | None) -> dict[str, Any] | None:
    """An answer as JSON has it."""
    told: dict[str, Any] | None = msgspec.to_builtins(found)
    return told
