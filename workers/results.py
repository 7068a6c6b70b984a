"""Results and events of a batch: one pipeline to the result backend, one block of events (messages: results)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from time import time
from typing import TYPE_CHECKING, Any

import amqp
import msgspec
from celery.utils.log import get_logger
from celery.worker import state
from kombu import Connection

from creditlane.contract import BATCH, ContractError, check_id
from creditlane.errors import QuarantinedError
from creditlane.rabbitmq import connect
from creditlane.sending import SHORT_BYTES
from creditlane.tls import TLSOptions
from workers import metrics

if TYPE_CHECKING:
    from workers.lane_consumer import Delivery

logger = get_logger(__name__)

REPLY_SECONDS = 600
"""How long an answer is kept that only the sender that waited for it looks for."""

_encode = msgspec.json.Encoder().encode


BY_QUEUE = "rpc://"
"""Celery's name for results that go to a queue of the sender's."""

REPLY_TIMEOUT_SECONDS = 5
"""How long a broker that takes no answers may hold a batch up."""


class QueueReplies:
    """Answers over RabbitMQ, to the queue that each message names, as Celery's ``rpc`` backend sends them.

    Not confirmed: an answer that is lost is asked for again, with the same id.

    :param broker_url: where the queues are.
    :param tls: the TLS options of a connection to it.
    """

    def __init__(self, broker_url: str, tls: TLSOptions = None) -> None:
        options = {"read_timeout": REPLY_TIMEOUT_SECONDS, "write_timeout": REPLY_TIMEOUT_SECONDS}
        self._connection = Connection(
            broker_url, connect_timeout=REPLY_TIMEOUT_SECONDS, transport_options=options, ssl=tls or False
        )

    def send(self, answers: Iterable[tuple[str, Any, bytes]]) -> None:
        """Send answers. One that is waited for under a longer name than AMQP has room for cannot be sent.

        :param answers: of each, the name it is waited for under, the message that it answers, and the answer.
        """
        wanted = [
            (reply, to, meta)
            for reply, message, meta in answers
            if (to := message.properties.get("reply_to")) and len(reply.encode()) <= SHORT_BYTES
        ]
        if not wanted:
            return
        kept = self._connection.connected
        try:
            self._publish(wanted)
        except self._connection.connection_errors:
            if not kept:
                raise
            self._publish(wanted)  # over a new connection: the old one may have been dead for long

    def _publish(self, answers: Iterable[tuple[str, str, bytes]]) -> None:
        try:
            if not self._connection.connected:
                self._connection.collect()
                connect(self._connection)
            channel = self._connection.default_channel
            for reply, to, meta in answers:
                answer = amqp.Message(
                    meta, correlation_id=reply, content_type="application/json", content_encoding="utf-8"
                )
                channel.basic_publish(answer, "", to)
        except BaseException:
            self._connection.collect()
            raise


class Results:
    """Tells senders that wait, and watchers, what became of messages.

    :param app: the worker's Celery app, for its result backend.
    """

    def __init__(self, app: Any) -> None:
        self.backend = app.backend
        self.expires = int(app.conf.result_expires)
        self.replies = (
            QueueReplies(app.conf.broker_url, app.conf.broker_use_ssl) if app.conf.result_backend == BY_QUEUE else None
        )

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
            if self.replies is not None:
                self.replies.send([(reply, delivery.message, result_meta(delivery, now)) for reply, delivery in waited])
            else:
                with self.backend.client.pipeline(transaction=False) as pipe:
                    for reply, delivery in waited:
                        key = self.backend.get_key_for_task(reply)
                        meta = result_meta(delivery, now)
                        pipe.set(key, meta, ex=self.expires if reply == delivery.id else REPLY_SECONDS)
                        pipe.publish(key, meta)
                    pipe.execute()
        except Exception as error:
            metrics.UNSENT_RESULTS.inc(len(waited))
            logger.warning("%d results could not be sent to their waiting senders: %r", len(waited), error)

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

    def announce_waiting(self, deliveries: Iterable[Delivery], reason: str, dispatcher: Any) -> None:
        """Send the events of messages that wait for the database, which will be tried again."""
        if dispatcher is None or not dispatcher.enabled:
            return
        for delivery in deliveries:
            uuid = self._received(delivery, dispatcher.send)
            dispatcher.send("task-retried", uuid=uuid, exception=f"Waiting({reason!r})", traceback=reason)
        dispatcher.flush()

    def _received(self, delivery: Delivery, send: Any) -> str:
        """Send the event that a message came; returns the name that it is shown under."""
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
        return uuid

    def _send(self, delivery: Delivery, send: Any) -> None:
        uuid = self._received(delivery, send)
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
