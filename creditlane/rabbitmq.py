"""What client and workers both know of RabbitMQ: how a lane is declared, and how a block of messages is confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import amqp

LANE_DELIVERIES = 100_000
"""How often a message may be delivered before it goes to :data:`DEAD`: each take-over of its lane delivers it anew, so
far more often than any fault makes happen. (Newer servers would give up after 20.)"""

LANE_MESSAGES = 10_000_000
"""Messages that a lane holds at the most; then producers are refused until it has room."""

DEAD = "lanes.dead"
"""Where a message goes that was delivered too often. Nothing consumes it: ``creditlane lanes`` shows what is in it."""

QUORUM = {"x-queue-type": "quorum"}

LANE = {
    **QUORUM,
    "x-single-active-consumer": True,
    "x-delivery-limit": LANE_DELIVERIES,
    "x-max-length": LANE_MESSAGES,
    "x-overflow": "reject-publish",
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": DEAD,
    "x-dead-letter-strategy": "at-least-once",
}
"""The arguments of a lane: replicated, in order, one consumer at a time, refusing rather than dropping."""

DELIVERY_HEADERS = ("x-delivery-count", "x-acquired-count")
"""Headers that the broker adds when it delivers again."""

CONFIRM_SECONDS = 30
"""How long the broker may take to confirm a block; a broker short of memory or disk takes for ever."""


def is_rabbitmq(url: str) -> bool:
    """Whether a broker's URL is one of RabbitMQ's."""
    return url.startswith(("amqp", "pyamqp"))


def declare_lane(channel: Any, lane: str) -> None:
    """Make a lane's queue, unless it is there.

    :raises amqp.exceptions.PreconditionFailed: when it is there with other arguments.
    """
    channel.queue_declare(DEAD, durable=True, auto_delete=False, arguments=QUORUM)
    channel.queue_declare(lane, durable=True, auto_delete=False, arguments=LANE)


class UnroutableError(Exception):
    """The broker has no queue of the name that a message was sent to."""

    def __init__(self, queues: Sequence[str]) -> None:
        super().__init__(f"the broker has no queue {', '.join(queues)}")
        self.queues = queues


class NackedError(Exception):
    """The broker refused messages: the queue is full, or could not be written."""


class Confirms:
    """Counts what the broker confirms on one channel, so that a block of messages costs one wait.

    :param channel: of py-amqp, not used for publishing by anybody else.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._published = 0
        self._open: set[int] = set()
        self._nacked = False
        self._returned: list[str] = []
        channel.confirm_select()
        channel.events["basic_ack"].add(self._ack)
        channel.events["basic_nack"].add(self._nack)
        channel.events["basic_return"].add(self._return)

    def publish(self, message: amqp.Message, exchange: str, routing_key: str) -> None:
        """Send one message, without waiting; one for the default exchange must reach its queue."""
        self._channel.basic_publish(message, exchange, routing_key, mandatory=not exchange)
        self._published += 1
        self._open.add(self._published)

    def wait(self) -> None:
        """Return when everything that was published is confirmed.

        :raises UnroutableError: naming the queues that do not exist; everything else has arrived.
        :raises NackedError: when the broker refused some.
        :raises TimeoutError: after :data:`CONFIRM_SECONDS` without a word.
        """
        while self._open:
            self._channel.connection.drain_events(timeout=CONFIRM_SECONDS)
        returned, self._returned = self._returned, []
        nacked, self._nacked = self._nacked, False
        if nacked:
            raise NackedError("the broker refused a message: its queue is full, or cannot be written")
        if returned:
            raise UnroutableError(sorted(set(returned)))

    def _ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._open = {other for other in self._open if other > tag}
        else:
            self._open.discard(tag)

    def _nack(self, tag: int, multiple: bool) -> None:
        self._nacked = True
        self._ack(tag, multiple)

    def _return(self, _error: Exception, _exchange: str, routing_key: str, _message: Any) -> None:
        self._returned.append(routing_key)
