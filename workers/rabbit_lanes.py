"""Lanes on RabbitMQ: quorum queues, each consumed over a channel of its own (lanes: brokers).

- **A channel per lane.** Closing it is how a lane is let go: that returns what was delivered and not acknowledged to
  its place in the queue and promotes the next consumer, in one step. (To cancel the consumer and return messages
  after would let newer ones overtake.)
- **Acknowledging** is one frame per lane and batch: everything up to the newest message of the batch.
- **Single active consumer** stands below the ownership of lanes: a process that lost a lane without noticing gets no
  more of it than what it has, and cannot write it.
- **Reading stops while the buffer is full**: what was sent ahead waits in the connection, not in our memory.
- **A connection that was replaced** behind our back (kombu does that) has no consumers: looked for at each balance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from celery.utils.log import get_logger
from kombu import Consumer, Queue

from creditlane.rabbitmq import DELIVERY_HEADERS, declare_lane

logger = get_logger(__name__)


class ReplacedError(ConnectionError):
    """The connection that the lanes were consumed over is gone, and nobody said so."""


class RabbitLanes:
    """The broker's side of the lane consumer, on RabbitMQ.

    :param consumer: Celery's consumer, connected.
    :param loop: kombu's event loop.
    :param room: how many messages the consumer's buffer has room for.
    :param guard: runs a step that the loop calls, and begins the consumer anew if it fails.
    :param prefetch: how many unacknowledged messages of a lane the broker sends: a batch of one lane must fit.
    """

    def __init__(
        self,
        consumer: Any,
        loop: Any,
        room: Callable[[], int],
        guard: Callable[[Callable[[], None]], None],
        prefetch: int,
    ) -> None:
        self.consumer = consumer
        self.connection: Any = consumer.connection.connection
        self.loop = loop
        self.room = room
        self.guard = guard
        self.prefetch = prefetch
        self.channels: dict[str, Any] = {}
        self._reading = False
        # What has not arrived yet is no fault, from the first byte on.
        self.connection.transport.raise_on_initial_eintr = True
        self._read_on()

    def take(self, lane: str) -> None:
        """Begin to consume a lane; what its last owner left unacknowledged comes first.

        :raises amqp.exceptions.PreconditionFailed: when its queue is there with other arguments.
        """
        channel = self.connection.channel()
        # Before the first message: whatever waits for an answer of the broker may deliver.
        self.channels[lane] = channel
        channel.basic_qos(0, self.prefetch, False)
        declare_lane(channel, lane)
        on_message = self.consumer.task_consumer.on_message

        def receive(message: Any) -> None:
            # A closing channel still delivers while it waits for the broker's word: that goes back.
            if self.channels.get(lane) is channel:
                _plain(message, lane)
                on_message(message)

        Consumer(
            channel,
            [Queue(lane, no_declare=True)],
            accept=self.consumer.app.conf.accept_content,
            auto_declare=False,
            on_message=receive,
            on_decode_error=self._on_decode_error(lane, channel),
        ).consume()

    def _on_decode_error(self, lane: str, channel: Any) -> Callable[[Any, Exception], None]:
        def refuse(message: Any, error: Exception) -> None:
            if self.channels.get(lane) is channel:
                _plain(message, lane)
                self.consumer.on_decode_error(message, error)

        return refuse

    def forget(self, lanes: Sequence[str]) -> None:
        """Stop consuming lanes; what was delivered of them and not acknowledged goes back to its place."""
        channels = [self.channels.pop(lane, None) for lane in lanes]
        for channel in channels:
            if channel is not None and channel.is_open:
                try:
                    channel.close()
                except self.consumer.connection_errors as error:
                    logger.info("a channel did not close, its connection is gone: %r", error)

    def poll(self) -> None:
        """Bring what has arrived into the buffer, as far as there is room."""
        if not self.connection.connected:
            raise ReplacedError("the broker connection is gone")
        try:
            while self.room() > 0:
                self.connection.drain_events(timeout=0)
        except TimeoutError:
            pass
        if self.room() > 0:
            self._read_on()
        elif self._reading:
            self.loop.remove_reader(self.connection.sock)
            self._reading = False

    def _read_on(self) -> None:
        if not self._reading:
            self.loop.add_reader(self.connection.sock, self.guard, self.poll)
            self._reading = True

    def acknowledge(self, messages: Iterable[Any]) -> None:
        """Acknowledge messages that are the oldest of their lanes, with one frame for each lane."""
        newest: dict[str, int] = {}
        for message in messages:
            newest[message.delivery_info["routing_key"]] = message.delivery_tag
        for lane, tag in newest.items():
            self.channels[lane].basic_ack(tag, multiple=True)

    def check(self) -> None:
        """Make sure that the lanes are still consumed over the connection that we know.

        :raises ReplacedError: when they are not.
        """
        current = self.consumer.connection
        if current is None or not current.connected or current.connection is not self.connection:
            raise ReplacedError("the broker connection was replaced")
        closed = [lane for lane, channel in self.channels.items() if not channel.is_open]
        if closed:
            raise ReplacedError(f"the broker closed the channels of {', '.join(closed)}")

    def close(self) -> None:
        """Stop consuming everything."""
        self.forget(list(self.channels))


def _plain(message: Any, lane: str) -> None:
    """Have a message look alike however often, and through whatever exchange, it comes."""
    # What kombu calls headers is one object with those among the properties.
    for header in DELIVERY_HEADERS:
        message.headers.pop(header, None)
    message.delivery_info["routing_key"] = lane
