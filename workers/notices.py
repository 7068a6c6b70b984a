"""Notices go out (schedules: notices): a task for each notice, and one for each channel of it.

What has to be sent stands in the table ``deliveries``: how often it failed, when it is tried again, why it failed last.
A message only says that there is something to do. One that is lost is made good by ``schedules/notices.py``, one that
comes twice finds that the attempt which it is for has been made. So a channel that is away delays no other, and a
delivery that was sent is not sent again, except where a worker dies, or the database goes away, between the channel's
word that it has it and the commit: a receiver then knows it by its id.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import msgspec
from celery import shared_task
from celery.utils.log import get_task_logger
from psycopg import Connection

from creditlane.client import NOTICES, SHOWN_CHARACTERS, task_message
from creditlane.inbox import ADVISED
from creditlane.sending import Outgoing, Sender, make_sender
from models.advice_reading import account_advice
from models.database import connect, reader
from models.in_force import catalog_in_force
from models.rules.catalog import Catalog
from models.settings import Settings, settings
from workers import mail, webhooks
from workers.channels import (
    ChannelAwayError,
    DeliveryError,
    NoAddressError,
    Rests,
    Told,
    UndeliverableError,
)
from workers.crash import crash_point
from workers.outbox import DELIVER

logger = get_task_logger(__name__)

SEND = "notices.send"

RETRY_SECONDS = (60, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 72_000)
"""How long after each failure a delivery is tried again, more or less: three days in all. Then it is parked."""

JITTER = 0.2
"""What of that is left to chance, so that what failed together does not come together."""

CLAIM_SECONDS = 900
"""How long after a message was sent its delivery counts as forgotten, and gets another one."""

ERROR_CHARACTERS = 200

NOTICE = """
SELECT n.kind, n.at, n.details, a.email, a.locale, a.timezone
FROM notices n LEFT JOIN accounts a ON a.account = n.account WHERE n.account = %s AND n.key = %s
"""
CHANNELS = "SELECT channels FROM notices WHERE account = %s AND key = %s"
BEGIN = f"""
INSERT INTO deliveries (account, key, channel, status, attempts, next_attempt_at)
SELECT %s, %s, unnest(%s::text[]), 'pending', 0, ledger_now() + interval '{CLAIM_SECONDS} seconds'
ON CONFLICT DO NOTHING RETURNING channel
"""
LOCK = """
SELECT FROM deliveries WHERE account = %s AND key = %s AND channel = %s AND status = 'pending' AND attempts = %s
FOR UPDATE SKIP LOCKED
"""
"""What another worker has in hand is its own to end."""
END = """
UPDATE deliveries SET status = %(status)s, attempts = attempts + %(failed)s, error = %(error)s,
       next_attempt_at = ledger_now() + %(pause)s, sent_at = CASE %(status)s WHEN 'sent' THEN ledger_now() END
WHERE account = %(account)s AND key = %(key)s AND channel = %(channel)s
"""
HOLD_NOTICE = "SELECT FROM notices WHERE account = %s AND key = %s FOR UPDATE"
"""So that of two channels that end at once the second one sees the first."""
FINISH = """
UPDATE notices n SET delivered_at = ledger_now() WHERE account = %s AND key = %s AND delivered_at IS NULL
  AND NOT EXISTS (SELECT FROM deliveries d WHERE d.account = n.account AND d.key = n.key AND d.status = 'pending')
"""

rests = Rests()


@shared_task(name=DELIVER, ignore_result=True)
def deliver(account: str, key: str) -> dict[str, Any]:
    """Begin the delivery of a notice: a row and a message for each of its channels that has none yet.

    :returns: the channels that it was begun for.
    :raises psycopg.Error: the sweep makes good for it, as for a broker that is away.
    """
    with (
        connect(settings().database_url.get_secret_value(), "creditlane notices", read_only=False) as connection,
        connection.transaction(),
    ):
        row = connection.execute(CHANNELS, (account, key)).fetchone()
        channels = [] if row is None else row[0]
        begun = [channel for (channel,) in connection.execute(BEGIN, (account, key, channels))]
        if not channels:
            finish(connection, account, key)
    send_all(sending(account, key, channel, 0) for channel in begun)
    return {"channels": begun}


@shared_task(name=SEND, ignore_result=True)
def send(account: str, key: str, channel: str, attempt: int) -> dict[str, Any]:
    """Send a notice by one channel, and note what became of it.

    :param attempt: how often it has failed before: each attempt is made once, however many messages ask for it.
    :returns: its ``status``, or ``nothing to do``.
    """
    config = settings()
    with (
        connect(config.database_url.get_secret_value(), "creditlane notices", read_only=False) as connection,
        connection.transaction(),
    ):
        if connection.execute(LOCK, (account, key, channel, attempt)).fetchone() is None:
            return {"status": "nothing to do"}
        end = _attempt(account, key, channel, attempt, config)
        crash_point("after-delivery")
        connection.execute(
            END,
            {
                "account": account,
                "key": key,
                "channel": channel,
                "failed": int(end.failed),
                **msgspec.structs.asdict(end),
            },
        )
        if end.status != PENDING:
            finish(connection, account, key)
    return {"status": end.status, "error": end.error}


def finish(connection: Connection[Any], account: str, key: str) -> None:
    """Note that a notice is done with, if none of its channels has anything left to do.

    :param connection: in the transaction that ends one of them.
    """
    connection.execute(HOLD_NOTICE, (account, key))
    connection.execute(FINISH, (account, key))


PENDING, SENT, SKIPPED, PARKED = "pending", "sent", "skipped", "parked"


class End(msgspec.Struct, frozen=True):
    """What became of an attempt."""

    status: str
    error: str | None = None
    pause: timedelta | None = None
    """When it comes again."""

    @property
    def failed(self) -> bool:
        """Whether it counts as a failure; so does one that was not made because its channel is left alone."""
        return self.status in (PENDING, PARKED)


def _attempt(account: str, key: str, channel: str, attempt: int, config: Settings) -> End:
    """Try to send; every way in which that ends has its own end."""
    way = CHANNEL_OF.get(channel)
    if way is None:
        return End(PARKED, f"there is no channel {channel!r}"[:ERROR_CHARACTERS])
    if not rests.admits(channel):
        return _again(account, key, channel, attempt, "not tried: the channel was away a moment ago")
    try:
        with reader() as connection:
            catalog = catalog_in_force(connection)
        way(told_of(account, key, catalog), catalog, config)
    except NoAddressError as error:
        rests.end(channel)
        return End(SKIPPED, str(error))
    except UndeliverableError as error:
        logger.warning("notice %r of %r is parked: %s", key, account, error)
        rests.end(channel)
        return End(PARKED, str(error))
    except ChannelAwayError as error:
        rests.begin(channel)
        return _again(account, key, channel, attempt, str(error))
    except DeliveryError as error:
        rests.end(channel)
        return _again(account, key, channel, attempt, str(error))
    except Exception as error:
        logger.exception("notice %r of %r by %s", key, account, channel)
        return _again(account, key, channel, attempt, f"internal error: {type(error).__name__}")
    rests.end(channel)
    return End(SENT)


def _again(account: str, key: str, channel: str, attempt: int, error: str) -> End:
    """Try it later, or park it when it was tried often enough."""
    if attempt >= len(RETRY_SECONDS):
        logger.error("notice %r of %r by %s is parked after %d attempts: %s", key, account, channel, attempt + 1, error)
        return End(PARKED, error[:ERROR_CHARACTERS])
    seconds = RETRY_SECONDS[attempt] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - nothing secret
    logger.warning("notice %r of %r by %s failed, again in %.0f s: %s", key, account, channel, seconds, error)
    return End(PENDING, error[:ERROR_CHARACTERS], timedelta(seconds=seconds))


def told_of(account: str, key: str, catalog: Catalog) -> Told:
    """A notice and whom it is for, with advice as it is now."""
    with reader() as connection:
        row = connection.execute(NOTICE, (account, key)).fetchone()
        if row is None:
            raise UndeliverableError("the notice is not there any more")
        kind, at, details, email, locale, timezone = row
        advice = account_advice(connection, account, catalog) if kind in ADVISED else None
    return Told(
        account=account, key=key, kind=kind, at=at, details=details, email=email, locale=locale, timezone=timezone,
        advice=advice,
    )  # fmt: skip


CHANNEL_OF: dict[str, Callable[[Told, Catalog, Settings], None]] = {
    mail.CHANNEL: mail.send,
    webhooks.CHANNEL: lambda told, _, config: webhooks.post(told, config),
}
"""How each channel sends."""


# --- Messages ----------------------------------------------------------------------------------------


def delivering(account: str, key: str) -> Outgoing:
    """The message that begins a notice's delivery."""
    return _message(DELIVER, f"{account}\0{key}", account=account, key=key)


def sending(account: str, key: str, channel: str, attempt: int) -> Outgoing:
    """The message for one attempt by one channel."""
    return _message(
        SEND, f"{account}\0{key}\0{channel}\0{attempt}", account=account, key=key, channel=channel, attempt=attempt
    )


def _message(task: str, name: str, **arguments: Any) -> Outgoing:
    shown = ", ".join(map(str, arguments.values()))[:SHOWN_CHARACTERS]
    return task_message(task, str(uuid5(NAMESPACE_OID, name)), NOTICES, msgspec.json.encode(arguments), shown)


@cache
def sender() -> Sender:
    """What this process sends such messages by; safe to share among threads."""
    config = settings()
    return make_sender(config.broker_url.get_secret_value(), config.tls(config.broker_url))


def send_all(messages: Iterable[Outgoing]) -> int:
    """Send messages in one block.

    :returns: how many.
    :raises BrokerUnavailableError: when the broker does not confirm them.
    """
    block = list(messages)
    sender().send(block)
    return len(block)
