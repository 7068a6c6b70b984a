"""Lanes on RabbitMQ: quorum queues, each consumed over a channel of its own (lanes: brokers).

- **A channel per lane.** Closing it is how a lane is let go: that returns what was delivered and not acknowledged to
  its place in the queue and promotes the next consumer, in one step. (To cancel the consumer and return messages
  after would let newer ones overtake.)
- **Acknowledging** is one frame per lane and batch: everything up to the newest message of the batch.
- **Single active consumer** stands below the ownership of lanes: a process that lost a lane without noticing gets no
  more of it than what it has, and cannot write it.
- **Reading stops while the buffer is full**: what was sent ahead waits in the connection, not in our memory. Only
  while the broker's answer is awaited (a lane is opened or let go) what comes before it is read as well: at the most
  the prefetch of each lane.
- **A connection that was replaced** behind our back (kombu does that), a channel that the library opened again after
  the broker had closed it, and a consumer that the broker cancelled consume nothing: looked for at each balance.
- **A lane that the broker does not let us consume** (it is there with other arguments, say) waits alone, and is told
  in the log; the others are served.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import amqp
from amqp.method_framing import frame_handler
from celery.utils.log import get_logger
from kombu.serialization import prepare_accept_content
from kombu.transport import pyamqp

from creditlane.rabbitmq import DELIVERY_HEADERS, declare_lane
from workers.redis_lanes import UNREADABLE

logger = get_logger(__name__)

READ_SECONDS = 30
"""How long the broker may take to answer, such as that a channel is closed, before the connection is given up."""

FRAME_SECONDS = 1.0
"""How long the rest of a frame may take to come before the event loop goes on without it."""

REFUSED_SECONDS = 30
"""How long a lane that cannot be consumed is left alone before it is tried again."""

HEADER_FRAME = 2

HEADER_BYTES = 12
"""What stands before the properties in a header frame."""


class ReplacedError(ConnectionError):
    """What the lanes were consumed over is gone, and nobody said so."""


def tolerant_frames(connection: Any, callback: Any) -> Any:
    """py-amqp's handler of frames; a message whose properties it cannot decode comes with its content type and one
    header that say so, instead of ending the connection, again and again.

    The broker takes any bytes for a text, and any number for a time. (Such a message is not recognised when it comes
    again: it makes another row in quarantine.)
    """
    handle = frame_handler(connection, callback)

    def on_frame(frame: tuple[int, int, bytes]) -> Any:
        try:
            return handle(frame)
        except Exception:
            kind, channel, payload = frame
            if kind != HEADER_FRAME or _decodes(payload):
                raise
        told = amqp.Message(content_type=UNREADABLE, application_headers={"undecoded": bytes(payload).hex()})
        return handle((kind, channel, bytes(payload[:HEADER_BYTES]) + told._serialize_properties()))

    return on_frame


def _decodes(payload: bytes) -> bool:
    try:
        amqp.Message().inbound_header(payload)
    except Exception:
        return False
    return True


class Connection(pyamqp.Connection):
    """A connection with that handler."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, frame_handler=tolerant_frames, **options)


class Transport(pyamqp.Transport):
    """The RabbitMQ transport of lane workers: ``broker_transport = "workers.rabbit_lanes:Transport"``."""

    Connection = Connection


class LaneChannel:
    """The channel of one lane."""

    def __init__(self, connection: Any) -> None:
        self.openings = 0
        """How often it was opened: twice when the broker closed it, since py-amqp opens it again at once."""
        self.channel = connection.channel(callback=self._opened)
        # A body is bytes, whatever it says of itself.
        self.channel.auto_decode = False

    def _opened(self, _channel: Any) -> None:
        self.openings += 1

    @property
    def consumes(self) -> bool:
        """Whether the broker still delivers over it."""
        return self.openings == 1 and bool(self.channel.is_open and self.channel.callbacks)


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
        self.accept = prepare_accept_content(consumer.app.conf.accept_content)
        self.channels: dict[str, LaneChannel] = {}
        self.refused: dict[str, float] = {}
        """When lanes that could not be consumed are to be tried again."""
        self._reading = False
        # What has not arrived yet is no fault, from the first byte on.
        self.connection.transport.raise_on_initial_eintr = True
        self._arrived = select.poll()
        self._arrived.register(self.connection.sock, select.POLLIN)
        self._read_on()

    def take(self, lanes: Sequence[str]) -> list[str]:
        """Begin to consume lanes; what their last owners left unacknowledged comes first.

        :returns: those that are consumed now; the others are told in the log, and tried again later.
        """
        opened = {lane: channel for lane in lanes if (channel := self._open(lane)) is not None}
        # Nothing is awaited from here on: whatever waits for an answer of the broker takes what is delivered before
        # it, room or no room.
        for lane, channel in opened.items():
            self.channels[lane] = channel
            channel.channel.basic_consume(lane, consumer_tag=lane, nowait=True, callback=self._receiver(lane, channel))
        return list(opened)

    def _open(self, lane: str) -> LaneChannel | None:
        """A channel for a lane whose queue is there; none when the broker refuses."""
        if self.refused.get(lane, 0.0) > time.monotonic():
            return None
        channel = LaneChannel(self.connection)
        try:
            channel.channel.basic_qos(0, self.prefetch, False)
            declare_lane(channel.channel, lane)
        except amqp.ChannelError as error:
            if channel.openings == 1:
                raise  # it was another channel that the broker closed meanwhile
            self.refused[lane] = time.monotonic() + REFUSED_SECONDS
            logger.error(
                "%s is not consumed, its messages wait: the broker refuses (%s). If its queue is there with other"
                " arguments, let producers pause, move its messages away, delete it, and move them back; if the user"
                " may not declare it, give it that right. Trying again in %d s",
                lane, error, REFUSED_SECONDS,
            )  # fmt: skip
            channel.channel.close()
            return None
        self.refused.pop(lane, None)
        return channel

    def _receiver(self, lane: str, channel: LaneChannel) -> Callable[[Any], None]:
        on_message = self.consumer.task_consumer.on_message

        def receive(raw: Any) -> None:
            # A closing channel still delivers while it waits for the broker's word: that goes back.
            if self.channels.get(lane) is not channel:
                return
            message = channel.channel.message_to_python(raw)
            message.accept = self.accept
            _plain(message, lane)
            if message.errors:
                self.consumer.on_decode_error(message, message.errors[0][1])
            else:
                on_message(message)

        return receive

    def forget(self, lanes: Sequence[str]) -> None:
        """Stop consuming lanes; what was delivered of them and not acknowledged goes back to its place."""
        channels = [self.channels.pop(lane, None) for lane in lanes]
        for channel in channels:
            if channel is not None and channel.channel.is_open:
                try:
                    channel.channel.close()
                except self.consumer.connection_errors as error:
                    logger.info("a channel did not close, its connection is gone: %r", error)

    def poll(self) -> None:
        """Bring what has arrived into the buffer, as far as there is room."""
        if not self.connection.connected:
            raise ReplacedError("the broker connection is gone")
        while self._wanted() and self._readable():
            try:
                self.connection.blocking_read(FRAME_SECONDS)
            except TimeoutError:
                break  # the rest of a frame is on its way
        if self._wanted():
            self._read_on()
            return
        if self._readable():
            # What we do not read says all the same that the broker is there, as a heartbeat behind it would.
            self.connection.last_heartbeat_received = time.monotonic()
        if self._reading:
            self.loop.remove_reader(self.connection.sock)
            self._reading = False

    def refill(self, messages: int) -> None:
        """Nothing: what comes over AMQP is read in the loop's turn, with whatever else the connection says."""

    def _wanted(self) -> bool:
        """Whether what arrives is to be read: without lanes there are only the broker's heartbeats."""
        return not self.channels or self.room() > 0

    def _readable(self) -> bool:
        """Whether something has arrived; with TLS it may be decrypted already."""
        pending = getattr(self.connection.sock, "pending", None)
        return bool((pending is not None and pending()) or self._arrived.poll(0))

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
            self.channels[lane].channel.basic_ack(tag, multiple=True)

    def check(self) -> None:
        """Make sure that the lanes are still consumed over the connection that we know.

        :raises ReplacedError: when they are not.
        """
        current = self.consumer.connection
        if current is None or not current.connected or current.connection is not self.connection:
            raise ReplacedError("the broker connection was replaced")
        lost = [lane for lane, channel in self.channels.items() if not channel.consumes]
        if lost:
            raise ReplacedError(f"the broker consumes no longer for us: {', '.join(lost)}")

    def close(self) -> None:
        """Stop consuming everything."""
        self.forget(list(self.channels))


def _plain(message: Any, lane: str) -> None:
    """Have a message look alike however often, and through whatever exchange, it comes."""
    # What kombu calls headers is one object with those among the properties.
    for header in DELIVERY_HEADERS:
        message.headers.pop(header, None)
    if not message.headers:
        message.properties.pop("application_headers", None)
    message.delivery_info["routing_key"] = lane
