"""What becomes of a provider's event that was delivered: verified, stored, told of (payments: the way of a webhook).

The relay does it for webhooks. Another party's relay, which has the broker and not the database, sends them here as
tasks.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Any

import msgspec
import psycopg
from celery import shared_task
from celery.utils.log import get_task_logger

from creditlane.client import PAYMENTS, task_message
from creditlane.contract import VERSION
from creditlane.errors import BrokerUnavailableError
from creditlane.sending import Outgoing
from models.database import connect
from models.payment_inbox import store
from models.settings import settings
from workers.notices import send_all
from workers.providers.base import Adapter, VerificationError
from workers.providers.configured import CertificatesAwayError, adapters

logger = get_task_logger(__name__)

APPLY = "payments.apply"
"""The task that reads a row of the inbox."""

RETRY_SECONDS = (1, 2, 4, 8, 15, 30, 60)
"""How long after each failure a delivery by task is tried again; the last one for as long as it takes."""


def applying(event: int) -> Outgoing:
    """The message that has a row of the inbox read; it may be sent any number of times.

    :param event: the row's id.
    """
    arguments = msgspec.json.encode({"event": event})
    return task_message(APPLY, f"payment-event-{event}", PAYMENTS, arguments, f"event {event}")


@cache
def configured() -> dict[str, Adapter]:
    """The adapters of this process."""
    return adapters(settings())


@shared_task(name="payments.receive", bind=True, max_retries=None)
def receive(
    self: Any, provider: str, body: str, headers: dict[str, str], received_at: str | None = None, v: int = 1
) -> dict[str, Any]:
    """Take a webhook that another party's relay was delivered.

    :param provider: such as ``stripe``.
    :param body: as it came, to the last character: it is what the provider signed.
    :param headers: of the delivery, by name.
    :param received_at: when it was delivered; now unless given. A signature may be no more than five minutes older, so
        give it: then a message may lie in the queue for as long as it must.
    :param v: the contract's version.
    :returns: ``event``, its row in the inbox, and whether it is ``new``; or, when it was refused, ``code`` and
        ``reason``.
    :raises ValueError: for arguments that make no sense, a provider that is not configured, or a newer contract.
    """
    if v != VERSION:
        raise ValueError(f"the message is of contract version {v!r}, this side knows {VERSION}")
    adapter = configured().get(_is(provider, str, "provider"))
    if adapter is None:
        raise ValueError("this provider has no secrets here")
    now = datetime.now(UTC)
    at = now if received_at is None else min(now, _instant(received_at))
    named = _is(headers, dict[str, str], "headers")
    try:
        raw = _is(body, str, "body").encode()
    except UnicodeEncodeError:
        return {"code": "not_json", "reason": "the body is not UTF-8"}
    try:
        event = adapter.verify(raw, named, at)
        with connect(settings().database_url.get_secret_value(), "creditlane payments", read_only=False) as connection:
            stored = store(connection, event, raw, "receive")
    except VerificationError as refused:
        logger.warning("a delivery of %s by task was refused: %s", adapter.name, refused.sentence)
        return {"code": refused.code, "reason": refused.sentence}
    except (psycopg.OperationalError, CertificatesAwayError) as error:
        seconds = RETRY_SECONDS[min(self.request.retries, len(RETRY_SECONDS) - 1)]
        logger.warning("a delivery of %s by task, again in %d s: %s", adapter.name, seconds, type(error).__name__)
        again = {"provider": provider, "body": body, "headers": headers, "received_at": at.isoformat()}
        # Whoever watches is shown neither body nor headers.
        raise self.retry(
            args=(), kwargs=again, exc=error, countdown=seconds, argsrepr="()", kwargsrepr=adapter.name
        ) from None
    if stored.is_new:
        try:
            send_all([applying(stored.id)])
        except BrokerUnavailableError as error:
            logger.warning("event %d waits for the sweep, the broker is away: %s", stored.id, error)
    return {"event": stored.id, "new": stored.is_new}


def _is(value: object, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError):
        raise ValueError(f"{name} is not what it should be") from None


def _instant(text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(_is(text, str, "received_at"))
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None:
        raise ValueError("received_at is no instant with its offset")
    return instant
