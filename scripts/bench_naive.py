"""What one would write without creditlane: one Celery task per operation, one row-locked transaction per task.

The yardstick of ``scripts/bench``, with the same guarantees towards the database: late acknowledgement, an
idempotency key, durable commits. Written as well as it is usually written, not slowed down: a pool of two
processes, each with a database connection of its own that stays open.

``celery -A scripts.bench_naive worker --concurrency 2``, with ``CREDITLANE_BENCH_BROKER_URL`` and
``CREDITLANE_BENCH_DATABASE_URL`` in the environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import datetime
from functools import cache
from typing import Any

from celery import Celery
from celery.signals import worker_process_init
from sqlalchemy import BigInteger, CheckConstraint, Engine, Text, create_engine, func, insert
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from creditlane.amounts import format_amount, parse_amount
from models.migrate import sqlalchemy_url

QUEUE = "naive"
CONCURRENCY = 2
"""Processes of the pool: as many as there are lane workers."""

BROKER_VARIABLE = "CREDITLANE_BENCH_BROKER_URL"
DATABASE_VARIABLE = "CREDITLANE_BENCH_DATABASE_URL"

_PR_SET_PDEATHSIG = 1


class Base(DeclarativeBase):
    """The tables of this ledger; amounts are micro-credits."""


class NaiveAccount(Base):
    """An account and what it has."""

    __tablename__ = "naive_accounts"
    __table_args__ = (CheckConstraint("available_micro >= 0", name="naive_not_negative"),)

    account: Mapped[str] = mapped_column(Text, primary_key=True)
    available_micro: Mapped[int] = mapped_column(BigInteger)


class NaiveOperation(Base):
    """One charge; its id is the idempotency key."""

    __tablename__ = "naive_operations"

    operation: Mapped[str] = mapped_column(Text, primary_key=True)
    account: Mapped[str] = mapped_column(Text)
    feature: Mapped[str] = mapped_column(Text)
    amount_micro: Mapped[int] = mapped_column(BigInteger)
    balance_after_micro: Mapped[int] = mapped_column(BigInteger)
    applied_at: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True), server_default=func.now())


app = Celery("scripts.bench_naive")
app.conf.update(
    accept_content=["json"],
    task_serializer="json",
    result_serializer="json",
    task_default_queue=QUEUE,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=False,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    enable_utc=True,
    timezone="UTC",
)


def configure(broker_url: str) -> Celery:
    """Let the app use a broker, for its results as well.

    :param broker_url: a Redis database of its own.
    """
    app.conf.update(broker_url=broker_url, result_backend=broker_url)
    return app


if BROKER_VARIABLE in os.environ:
    configure(os.environ[BROKER_VARIABLE])


@cache
def engine() -> Engine:
    """The database connection of this process, opened at its first use: after the fork."""
    return create_engine(sqlalchemy_url(os.environ[DATABASE_VARIABLE]), pool_size=1, max_overflow=0)


@worker_process_init.connect
def end_with_parent(**_: Any) -> None:
    """A killed worker leaves no pool behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


@app.task(name="naive.consume")
def consume(account: str, operation: str, feature: str, quantity: str) -> dict[str, str]:
    """Charge ``quantity`` units at one credit each, once per operation id."""
    amount = parse_amount(quantity)
    with Session(engine()) as session, session.begin():
        found = session.get(NaiveAccount, account, with_for_update=True)
        if found is None:
            return {"operation": operation, "status": "rejected", "code": "unknown_account"}
        known = session.get(NaiveOperation, operation)
        if known is not None:
            after = known.balance_after_micro
        elif found.available_micro < amount:
            return {"operation": operation, "status": "rejected", "code": "insufficient_credits"}
        else:
            found.available_micro -= amount
            after = found.available_micro
            session.add(
                NaiveOperation(
                    operation=operation,
                    account=account,
                    feature=feature,
                    amount_micro=amount,
                    balance_after_micro=after,
                )
            )
    return {"operation": operation, "status": "applied", "balance": format_amount(after)}


@app.task(name="naive.nothing")
def nothing() -> None:
    """Return at once: what a round trip through Celery costs by itself."""


def prepare(database_url: str, accounts: list[str], available_micro: int) -> None:
    """Make the tables, and the accounts with what each of them has.

    :param database_url: of an empty database.
    :param available_micro: micro-credits.
    """
    made = create_engine(sqlalchemy_url(database_url))
    Base.metadata.create_all(made)
    with made.begin() as connection:
        connection.execute(
            insert(NaiveAccount), [{"account": account, "available_micro": available_micro} for account in accounts]
        )
    made.dispose()
