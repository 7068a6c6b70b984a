"""Tasks of the in-app inbox: reading it, on the queue of queries, and marking notices as read, on that of notices."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from celery import shared_task

from creditlane.contract import VERSION, Name
from models import inbox
from models.database import connect, reader
from models.in_force import catalog_in_force
from models.reading import DEFAULT_PAGE
from models.settings import settings
from tasks.queries import RETRIES


@shared_task(name="queries.notices", **RETRIES)
def notices(
    account: str, unread: bool = False, limit: int = DEFAULT_PAGE, before: str | None = None, v: int = 1
) -> dict[str, Any]:
    """A page of an account's inbox, the newest notice first.

    :param account: whose.
    :param unread: only what was not read.
    :param limit: notices of the page, at most 1,000.
    :param before: ``next_before`` of the page before.
    :param v: the contract's version.
    :returns: a :class:`creditlane.inbox.Inbox` as JSON has it.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    _check(account, v)
    with reader() as connection:
        catalog = catalog_in_force(connection)
        page = inbox.inbox(connection, account, catalog, limit=limit, before=before, unread=unread)
    told: dict[str, Any] = msgspec.to_builtins(page)
    return told


@shared_task(name="notices.read", **RETRIES)
def read(account: str, key: str | None = None, until: str | None = None, v: int = 1) -> int:
    """Note that notices were read; doing so again changes nothing.

    :param account: whose.
    :param key: one of them; all of them unless given.
    :param until: of all of them, those that were made by this instant.
    :param v: the contract's version.
    :returns: how many were not read before.
    :raises ValueError: for arguments that make no sense, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    _check(account, v)
    try:
        instant = None if until is None else msgspec.convert(until, datetime, strict=False)
    except msgspec.ValidationError:
        raise ValueError(f"{until!r} is no instant") from None
    with connect(settings().database_url.get_secret_value(), "creditlane inbox", read_only=False) as connection:
        return inbox.mark_read(connection, account, key=key, until=instant)


def _check(account: str, v: int) -> None:
    if v != VERSION:
        raise ValueError(f"the message is of contract version {v!r}, this side knows {VERSION}")
    try:
        msgspec.convert(account, Name)
    except msgspec.ValidationError as error:
        raise ValueError(f"account: {error}") from None
