"""What client and workers both know of RabbitMQ: how a lane is declared, and how a block of messages is confirmed."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import amqp

LANE_DELIVERIES = 100_000
"""How often a message may be delivered before it goes to :data:`DEAD`: each take-over of its lane delivers it anew, so
far more often than any fault makes happen. (Newer servers would give up after 20.)"""

LANE_MESSAGES = 10_000_000
"""Messages that a lane holds at the most; then producers are refused until it has room."""

DEAD = "lanes.dead"
"""Where a message goes that was delivered too often, or that expired since its sender gave it a time to live. Nothing
consumes it: ``creditlane lanes`` shows what is in it."""

LANES_EXCHANGE = "credits.lanes"
"""The direct exchange that lanes, and the queue of queries, are bound to by their names. Producers may write to it
alone: through the default exchange they would reach every queue, such as those by which workers are told to stop."""

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
    """Make a lane's queue, unless it is there, and have the exchange lead to it.

    :raises amqp.exceptions.PreconditionFailed: when it is there with other arguments.
    """
    channel.queue_declare(DEAD, durable=True, auto_delete=False, arguments=QUORUM)
    channel.queue_declare(lane, durable=True, auto_delete=False, arguments=LANE)
    declare_exchange(channel)
    channel.queue_bind(lane, LANES_EXCHANGE, lane)


def declare_exchange(channel: Any) -> None:
    """Make the lanes' exchange, unless it is there."""
    channel.exchange_declare(LANES_EXCHANGE, "direct", durable=True, auto_delete=False)


def connect(connection: Any) -> None:
    """Connect kombu's connection, so that no wait for the broker's word is longer than its ``read_timeout``: py-amqp
    would go on waiting for ever."""
    connection.connect()
    connection.connection.transport.raise_on_initial_eintr = True


class UnroutableError(Exception):
    """The broker has no queue of the name that a message was sent to."""

    def __init__(self, queues: Sequence[str], why: str = "") -> None:
        super().__init__(f"the broker has no queue {', '.join(queues)}{why}")
        self.queues = queues


class NackedError(Exception):
    """The broker refused messages: the queue is full, could not be written, or has just begun."""

    def __init__(self, tags: Set[int], returned: Sequence[str]) -> None:
        super().__init__(f"the broker refused {len(tags)} messages: their queue is full, or cannot be written")
        self.tags = tags
        self.returned = returned
        """Queues that do not exist; what was sent there did not arrive either."""


class UnconfirmedError(Exception):
    """The broker said nothing of messages in time."""


class Confirms:
    """Counts what the broker confirms on one channel, so that a block of messages costs one wait.

    :param channel: of py-amqp, not used for publishing by anybody else.
    :param patience_seconds: how long the broker may be without a word; :data:`CONFIRM_SECONDS` unless given.
    """

    def __init__(self, channel: Any, patience_seconds: float | None = None) -> None:
        self.channel = channel
        self._patience_seconds = CONFIRM_SECONDS if patience_seconds is None else patience_seconds
        self._published = 0
        self._open: set[int] = set()
        self._nacked: set[int] = set()
        self._returned: list[str] = []
        channel.confirm_select()
        channel.events["basic_ack"].add(self._ack)
        channel.events["basic_nack"].add(self._nack)
        channel.events["basic_return"].add(self._return)

    def publish(self, message: amqp.Message, exchange: str, routing_key: str) -> int:
        """Send one message, without waiting; one for the lanes' exchange must reach its queue.

        :returns: the tag by which an error names it.
        """
        # Not ``basic_publish``, which looks for answers after each message: :meth:`wait` reads them all.
        arguments = (0, exchange, routing_key, exchange == LANES_EXCHANGE, False)
        self.channel.send_method(amqp.spec.Basic.Publish, "Bssbb", arguments, message)
        self._published += 1
        self._open.add(self._published)
        return self._published

    def wait(self) -> None:
        """Return when everything that was published is confirmed.

        :raises UnroutableError: naming the queues that do not exist; everything else has arrived.
        :raises NackedError: naming what was refused; everything else has arrived.
        :raises UnconfirmedError: when its patience ends without a word.
        """
        while self._open:
            try:
                self.channel.connection.drain_events(timeout=self._patience_seconds)
            except TimeoutError as error:
                raise UnconfirmedError(
                    f"no word of the broker for {self._patience_seconds:g} s; it may be short of memory or disk"
                ) from error
        returned, self._returned = sorted(set(self._returned)), []
        nacked, self._nacked = self._nacked, set()
        if nacked:
            raise NackedError(nacked, returned)
        if returned:
            raise UnroutableError(returned)

    def _ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._open = {other for other in self._open if other > tag}
        else:
            self._open.discard(tag)

    def _nack(self, tag: int, multiple: bool) -> None:
        self._nacked |= {other for other in self._open if other < tag} if multiple else set()
        self._nacked.add(tag)
        self._ack(tag, multiple)

    def _return(self, _error: Exception, _exchange: str, routing_key: str, _message: Any) -> None:
        self._returned.append(routing_key)
