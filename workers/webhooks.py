"""Notices by webhook, signed as Standard Webhooks has it (https://www.standardwebhooks.com).

A receiver checks the signature with any of that standard's libraries, and drops what it has seen: ``webhook-id`` is the
same however often a notice comes.
"""

from __future__ import annotations

import http.client
from datetime import UTC, datetime
from urllib.parse import urlsplit

import msgspec
from standardwebhooks import Webhook

from models.settings import Settings
from workers.channels import ChannelAwayError, DeliveryError, Told, UndeliverableError, cause, time_limit

CHANNEL = "webhook"

CONNECT_SECONDS = 3.0
READ_SECONDS = 10.0
WHOLE_SECONDS = 15.0
"""How long the receiver may take in all, however little it says at a time."""

GONE = 410
AWAY = frozenset({429, 502, 503, 504})
"""Answers by which a receiver asks to be left alone, or something before it says that it is not there."""

_encode = msgspec.json.Encoder(decimal_format="string").encode


def post(told: Told, config: Settings) -> None:
    """Post a notice; return when the receiver has taken it, by any answer of the 200s. Redirects are not followed.

    :raises ChannelAwayError: when there is no receiver, it is silent, or asks to be left alone.
    :raises UndeliverableError: when it is gone for good (410).
    :raises DeliveryError: for any other answer.
    """
    if config.webhook_url is None or config.webhook_secret is None:
        raise ChannelAwayError("CREDITLANE_WEBHOOK_URL is not set")
    parts = urlsplit(config.webhook_url.get_secret_value())
    body = body_of(told)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.connect()
        connection.sock.settimeout(READ_SECONDS)
        with time_limit(connection, WHOLE_SECONDS):
            connection.request("POST", path, body, headers_of(told.id, body, config.webhook_secret.get_secret_value()))
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise ChannelAwayError(f"the webhook's receiver is away ({cause(error)})") from error
    finally:
        connection.close()
    if 200 <= status < 300:
        return
    if status == GONE:
        raise UndeliverableError("the receiver is gone: HTTP 410")
    raise (ChannelAwayError if status in AWAY else DeliveryError)(f"the receiver answered HTTP {status}")


def body_of(told: Told) -> bytes:
    """A notice as JSON: ``{"type", "timestamp", "data": {"account", "kind", "key", "at", …}}``."""
    data = {**told.details, "account": told.account, "kind": told.kind, "key": told.key, "at": told.at}
    if told.advice is not None:
        data["advice"] = told.advice
    return _encode({"type": f"notice.{told.kind}", "timestamp": told.at, "data": data})


def headers_of(id: str, body: bytes, secrets: str) -> dict[str, str]:
    """What a receiver checks a body by: its id, the time of this attempt, and a signature by each secret.

    :param secrets: with commas between them.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    text = body.decode()
    signatures = [Webhook(secret.strip()).sign(id, now, text) for secret in secrets.split(",")]
    return {
        "Content-Type": "application/json",
        "User-Agent": "creditlane",
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
