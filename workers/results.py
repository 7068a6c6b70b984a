"""Results of a batch: one round trip to the result backend (messages: results)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import amqp
import msgspec
from celery.utils.log import get_logger
from kombu import Connection

from creditlane.contract import ContractError, check_id
from creditlane.errors import QuarantinedError
from creditlane.rabbitmq import connect
from creditlane.sending import SHORT_BYTES
from creditlane.tls import TLSOptions
from workers import metrics

if TYPE_CHECKING:
    from workers.lane_consumer import Delivery

logger = get_logger(__name__)

STORE = """
-- KEYS: where each answer is looked for. ARGV: for each: the answer, and for how many seconds it is kept
local failed
for i, key in ipairs(KEYS) do
    -- A server that is full keeps nothing more; whoever waits at this moment is told all the same.
    local stored = redis.pcall('SET', key, ARGV[2 * i - 1], 'EX', ARGV[2 * i])
    if type(stored) == 'table' and stored.err then failed = stored end
    local told = redis.pcall('PUBLISH', key, ARGV[2 * i - 1])
    if type(told) == 'table' and told.err then failed = told end
end
return failed or 'OK'
"""
"""One command for all answers of a batch: packing and reading one reply for each took as long as the rules."""

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
    """Tells senders that wait what became of messages.

    :param app: the worker's Celery app, for its result backend.
    """

    def __init__(self, app: Any) -> None:
        self.backend = app.backend
        self.expires = int(app.conf.result_expires)
        self._script: Any = None
        self.replies = (
            QueueReplies(app.conf.broker_url, app.conf.broker_use_ssl) if app.conf.result_backend == BY_QUEUE else None
        )

    def store(self, batch: Sequence[Delivery]) -> None:
        """Write the results that somebody waits for, in one round trip.

        Every result is in ``operations`` as well: when the backend is away, a sender that got no answer sends
        the same id again. So a fault here is logged and stops nothing.
        """
        waited = [(delivery.reply, delivery) for delivery in batch if delivery.reply is not None]
        if not waited:
            return
        now = datetime.now(UTC).isoformat().encode()
        try:
            if self.replies is not None:
                self.replies.send([(reply, delivery.message, result_meta(delivery, now)) for reply, delivery in waited])
            else:
                self._store(waited, now)
        except Exception as error:
            metrics.UNSENT_RESULTS.inc(len(waited))
            logger.warning("%d results could not be sent to their waiting senders: %r", len(waited), error)

    def _store(self, waited: Sequence[tuple[str, Delivery]], now: bytes) -> None:
        if self._script is None:
            self._script = self.backend.client.register_script(STORE)
        keys: list[Any] = []
        values: list[Any] = []
        for reply, delivery in waited:
            keys.append(self.backend.get_key_for_task(reply))
            values += (result_meta(delivery, now), self.expires if reply == delivery.id else REPLY_SECONDS)
        self._script(keys=keys, args=values)


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
