"""Read-only tasks, on a queue of their own, for a general worker (messages: the task table)."""

from __future__ import annotations

from typing import Any

import msgspec
import psycopg
from celery import shared_task

from creditlane.contract import VERSION, Name
from models.catalog import load_catalog
from models.database import reader
from models.reading import account_balance
from models.settings import settings


@shared_task(
    name="queries.balance",
    autoretry_for=(psycopg.OperationalError,),
    max_retries=3,
    retry_backoff=1,
    retry_backoff_max=4,
    retry_jitter=True,
)
def balance(account: str, v: int = 1) -> dict[str, Any] | None:
    """An account's balance as last committed, at the database's time.

    :param account: whose credits.
    :param v: the contract's version.
    :returns: ``available``, and ``held``, ``debt``, ``upcoming``, ``by_source`` where there are any, in credits as
        decimal strings, like a result's balance; None for an account that was never opened.
    :raises ValueError: for what is no account, or a newer version of the contract.
    :raises psycopg.OperationalError: when the database stays away.
    """
    if v != VERSION:
        raise ValueError(f"the query is of contract version {v!r}, this side knows {VERSION}")
    try:
        msgspec.convert(account, Name)
    except msgspec.ValidationError as error:
        raise ValueError(f"account: {error}") from None
    with reader() as connection:
        found = account_balance(connection, account, load_catalog(settings().catalog))
    if found is None:
        return None
    told: dict[str, Any] = msgspec.to_builtins(found)
    return told
