"""Results and events of a batch: one pipeline to the result backend, one block of events (messages: results)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from time import time
from typing import TYPE_CHECKING, Any

import msgspec
from celery.utils.log import get_logger
from celery.worker import state

from creditlane.contract import BATCH, ContractError, check_id
from creditlane.errors import QuarantinedError

if TYPE_CHECKING:
    from workers.lane_consumer import Delivery

logger = get_logger(__name__)

REPLY_SECONDS = 600
"""How long an answer is kept that only the sender that waited for it looks for."""

_encode = msgspec.json.Encoder().encode


class Results:
    """Tells senders that wait, and watchers, what became of messages.

    :param app: the worker's Celery app, for its result backend.
    """

    def __init__(self, app: Any) -> None:
        self.backend = app.backend
        self.expires = int(app.conf.result_expires)
        self.is_redis = hasattr(self.backend, "client") and hasattr(self.backend, "result_consumer")

    def store(self, batch: Sequence[Delivery]) -> None:
        """Write the results that somebody waits for, in one round trip.

        Every result is in ``operations`` as well: when the backend is away, a sender that got no answer sends
        the same id again. So a fault here is logged and stops nothing.
        """
        waited = [(reply, delivery) for delivery in batch if (reply := reply_of(delivery)) is not None]
        if not waited:
            return
        now = datetime.now(UTC).isoformat().encode()
        try:
            if self.is_redis:
                with self.backend.client.pipeline(transaction=False) as pipe:
                    for reply, delivery in waited:
                        key = self.backend.get_key_for_task(reply)
                        meta = result_meta(delivery, now)
                        pipe.set(key, meta, ex=self.expires if reply == delivery.id else REPLY_SECONDS)
                        pipe.publish(key, meta)
                    pipe.execute()
            else:
                for reply, delivery in waited:
                    self._store_one(reply, delivery)
        except Exception as error:
            logger.warning("%d results could not be sent to their waiting senders: %r", len(waited), error)

    def _store_one(self, reply: str, delivery: Delivery) -> None:
        if delivery.revoked:
            self.backend.mark_as_revoked(reply, "revoked", request=delivery.request)
        elif delivery.quarantined is not None:
            error = QuarantinedError(f"{delivery.quarantined.code}: {delivery.quarantined.reason}")
            self.backend.mark_as_failure(reply, error, request=delivery.request)
        else:
            assert delivery.result is not None
            self.backend.store_result(reply, msgspec.json.decode(delivery.result), "SUCCESS")

    def announce(self, batch: Sequence[Delivery], dispatcher: Any) -> None:
        """Send the events of a batch in one block, and tell Celery's own books that its messages are done."""
        enabled = dispatcher is not None and dispatcher.enabled
        for delivery in batch:
            request = delivery.request
            if request is not None:
                state.task_ready(request, successful=delivery.quarantined is None and not delivery.revoked)
            if enabled:
                self._send(delivery, dispatcher.send)
        if enabled:
            dispatcher.flush()

    def _send(self, delivery: Delivery, send: Any) -> None:
        # What has no id of its own is shown all the same, under the digest of its quarantine row.
        uuid = delivery.id
        if uuid is None:
            assert delivery.quarantined is not None
            uuid = f"quarantined-{delivery.quarantined.digest.hex()[:16]}"
        request = delivery.request
        send(
            "task-received",
            uuid=uuid,
            name=delivery.name or "unreadable",
            args="",
            kwargs=request.kwargsrepr if request is not None else "",
            root_id=uuid,
            parent_id=None,
            retries=0,
            eta=None,
            expires=None,
            exchange="",
            routing_key=delivery.lane,
            queue=delivery.lane,
            timestamp=delivery.received_at,
        )
        if delivery.revoked:
            send("task-revoked", uuid=uuid, terminated=False, signum=None, expired=False)
            return
        send("task-started", uuid=uuid, timestamp=delivery.started_at)
        if delivery.quarantined is not None:
            text = f"{delivery.quarantined.code}: {delivery.quarantined.reason}"
            send("task-failed", uuid=uuid, exception=f"QuarantinedError({text!r})", traceback=text)
            return
        assert delivery.result is not None
        send(
            "task-succeeded",
            uuid=uuid,
            result=summary(delivery),
            runtime=max(0.0, time() - delivery.started_at),
        )


def reply_of(delivery: Delivery) -> str | None:
    """The name under which the answer to a message is waited for, if it is.

    A client of ours names each sending in the header ``reply``, since an operation id is unique in its account only;
    other senders look under the task's id.
    """
    headers = delivery.message.headers
    if not isinstance(headers, dict) or headers.get("ignore_result"):
        return None
    for name in (headers.get("reply"), delivery.id):
        try:
            return check_id(name)
        except ContractError:
            continue
    return None


class _Balance(msgspec.Struct):
    available: str


class _Summary(msgspec.Struct):
    status: str
    code: str | None = None
    charged: str | None = None
    balance: _Balance | None = None
    replayed: bool = False


_decode_one = msgspec.json.Decoder(_Summary).decode
_decode_many = msgspec.json.Decoder(list[_Summary]).decode


def summary(delivery: Delivery) -> str:
    """A result as Flower shows it: what became of the operation, in one short line."""
    assert delivery.result is not None
    if delivery.name == BATCH:
        counts = Counter(member.status for member in _decode_many(delivery.result))
        return ", ".join(f"{count} {status}" for status, count in counts.items())
    one = _decode_one(delivery.result)
    parts = [one.status if one.code is None else f"{one.status} {one.code}"]
    if one.charged not in (None, "0"):
        parts.append(f"charged {one.charged}")
    if one.balance is not None:
        parts.append(f"available {one.balance.available}")
    if one.replayed:
        parts.append("replayed")
    return ", ".join(parts)


def result_meta(delivery: Delivery, now: bytes) -> bytes:
    """A result as Celery's backends keep it, as JSON."""
    if delivery.revoked:
        status, result = b"REVOKED", _exception("TaskRevokedError", "celery.exceptions", "revoked")
    elif delivery.quarantined is not None:
        text = f"{delivery.quarantined.code}: {delivery.quarantined.reason}"
        status, result = b"FAILURE", _exception(QuarantinedError.__name__, QuarantinedError.__module__, text)
    else:
        assert delivery.result is not None
        status, result = b"SUCCESS", delivery.result
    return b'{"status":"%s","result":%s,"traceback":null,"children":[],"date_done":"%s","task_id":%s}' % (
        status,
        result,
        now,
        _encode(delivery.id),
    )


def _exception(name: str, module: str, text: str) -> bytes:
    return _encode({"exc_type": name, "exc_message": [text], "exc_module": module})
