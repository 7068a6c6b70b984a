"""Lanes on Redis: kombu's Redis transport with its holes closed (lanes: brokers).

Stock kombu takes a message off its list first and notes it as unacknowledged after, one per round trip, and
gives back what was not acknowledged an hour later at an arbitrary place. Here, for lane queues only:

- **waiting takes nothing**: ``BLMOVE lane lane RIGHT RIGHT`` returns when there is something to take;
- **taking is atomic and in bulk**: one script moves messages from the lanes to their unacknowledged lists and
  returns them, in order;
- **acknowledging** cuts the oldest off an unacknowledged list, for all lanes of a batch in one script;
- **taking a lane over** puts its unacknowledged messages back at the head, in order, at once;
- **a fence**: each take-over counts the lane's epoch up, and a script of an older epoch changes nothing. So a
  process that lost a lane without noticing can neither take nor acknowledge its messages.

Keys beside ``lane.NNN``: ``lane.NNN:unacked`` (a list, oldest right) and ``lane.NNN:epoch`` (a counter).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import msgspec
import redis
from kombu import Exchange, Queue
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from redis.backoff import NoBackoff
from redis.retry import Retry

from creditlane.lanes import PREFIX
from workers.metrics import stages

MAX_FETCH_BYTES = 1 << 20
"""Bytes of messages that one fetch returns at the most (and one message more)."""

TAKE_OVER = """
-- KEYS: the lane, its unacked list, its epoch
-- A server that is full refuses what may grow, unless the script has written before: this first write changes nothing.
redis.call('LTRIM', KEYS[2], 0, -1)
local epoch = redis.call('INCR', KEYS[3])
local restored = 0
while redis.call('LMOVE', KEYS[2], KEYS[1], 'LEFT', 'RIGHT') do
    restored = restored + 1
end
return {epoch, restored}
"""

FETCH = """
-- KEYS: for each lane: the lane, its unacked list, its epoch. ARGV: messages, bytes, then the epochs
local room, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local out, lost = {}, {}
for i = 1, #KEYS / 3 do
    local lane, unacked, epoch = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
    if redis.call('GET', epoch) ~= ARGV[2 + i] then
        lost[#lost + 1] = lane
    else
        local got = {}
        while room > 0 and bytes > 0 do
            -- Two commands and not LMOVE, which a full server refuses: a full lane must be drained all the same.
            local message = redis.call('RPOP', lane)
            if not message then break end
            redis.call('LPUSH', unacked, message)
            got[#got + 1] = message
            room = room - 1
            bytes = bytes - #message
        end
        if #got > 0 then
            out[#out + 1] = lane
            out[#out + 1] = got
        end
    end
    if room <= 0 or bytes <= 0 then break end
end
return {out, lost}
"""

ACKNOWLEDGE = """
-- KEYS: for each lane: its unacked list, its epoch. ARGV: for each lane: the epoch, how many
local lost = {}
for i = 1, #KEYS / 2 do
    local unacked, epoch = KEYS[2 * i - 1], KEYS[2 * i]
    if redis.call('GET', epoch) ~= ARGV[2 * i - 1] then
        lost[#lost + 1] = unacked
    else
        redis.call('LTRIM', unacked, 0, -(tonumber(ARGV[2 * i]) + 1))
    end
end
return lost
"""


class FencedError(ConnectionError):
    """Another process took lanes over that this one believed to own; nothing was changed in them."""


def keys_of(lane: str) -> tuple[str, str, str]:
    """The Redis keys of a lane: its queue, its unacknowledged list, its epoch."""
    return lane, f"{lane}:unacked", f"{lane}:epoch"


class QoS(kombu_redis.QoS):
    """Nothing of a lane is ever in kombu's own unacknowledged set, so there is nothing to look for there."""

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; kombu's own would need room on the server for its lock."""


class Channel(kombu_redis.Channel):
    """A channel that takes lane queues in bulk; other queues go the ordinary way."""

    QoS = QoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epochs: dict[str, str] = {}
        """The lanes taken over, in the order in which they are looked at, with their epochs."""
        self._waiting: dict[str, Any] = {}
        self._scripts: tuple[Any, Any, Any] | None = None
        self._pool_of_waits: redis.ConnectionPool | None = None
        self._tag = 0

    # What kombu calls

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        """Begin to consume; for a lane, take it over."""
        if not queue.startswith(PREFIX):
            return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        take_over, _, _ = self._lane_scripts()
        epoch, _ = take_over(keys=keys_of(queue))
        self.epochs[queue] = str(epoch)
        self._tag_to_queue[consumer_tag] = queue
        self._consumers.add(consumer_tag)
        self.connection._callbacks[queue] = callback
        return None

    def basic_cancel(self, consumer_tag: str) -> Any:
        """Stop consuming; what is unacknowledged of a lane stays there for its next owner."""
        queue = self._tag_to_queue.get(consumer_tag)
        if queue is None or queue not in self.epochs:
            return super().basic_cancel(consumer_tag)
        del self.epochs[queue]
        self._stop_waiting(queue)
        self._consumers.discard(consumer_tag)
        self._tag_to_queue.pop(consumer_tag, None)
        self.connection._callbacks.pop(queue, None)
        return None

    def close(self) -> None:
        """Close the channel and the connections that wait."""
        for lane in list(self._waiting):
            self._stop_waiting(lane)
        if self._pool_of_waits is not None:
            self._pool_of_waits.disconnect()
        super().close()

    # What the lane consumer calls

    def fetch(self, messages: int, everywhere: bool = False) -> int:
        """Take up to so many messages off the lanes, a lane's in order, and deliver them.

        The lane that stood first stands last the next time, so that a busy lane does not starve the others.

        :param everywhere: look into the lanes as well that are waited for, which are empty if all is well.
        :returns: how many were delivered; 0 when all lanes are empty.
        :raises FencedError: when a lane belongs to another process by now.
        """
        lanes = [lane for lane in self.epochs if everywhere or lane not in self._waiting]
        if not lanes:
            return 0
        _, fetch, _ = self._lane_scripts()
        keys = [key for lane in lanes for key in keys_of(lane)]
        stages.begin()
        out, lost = fetch(keys=keys, args=[messages, MAX_FETCH_BYTES, *(self.epochs[lane] for lane in lanes)])
        stages.end("take")
        if lost:
            raise FencedError(f"lanes taken over by another process: {', '.join(map(bytes_to_str, lost))}")
        count = 0
        for name, payloads in zip(islice(out, 0, None, 2), islice(out, 1, None, 2), strict=True):
            lane = bytes_to_str(name)
            callback = self.connection._callbacks[lane]
            for payload in payloads:
                self._tag += 1
                try:
                    callback(self._message(lane, payload))
                except self.connection_errors:
                    raise
                except Exception:
                    # One message, whatever it is, must not keep the others from being delivered for ever.
                    callback(self._unreadable(lane, payload))
            count += len(payloads)
        self.epochs[lanes[0]] = self.epochs.pop(lanes[0])
        return count

    def acknowledge(self, counts: dict[str, int]) -> None:
        """Drop the oldest unacknowledged messages of lanes, so many of each, in one round trip.

        :raises FencedError: when a lane belongs to another process by now; the others are acknowledged.
        """
        _, _, acknowledge = self._lane_scripts()
        keys: list[str] = []
        args: list[Any] = []
        for lane, count in counts.items():
            _, unacked, epoch = keys_of(lane)
            keys += (unacked, epoch)
            args += (self.epochs.get(lane, "gone"), count)
        lost = acknowledge(keys=keys, args=args)
        if lost:
            raise FencedError(f"lanes taken over by another process: {', '.join(map(bytes_to_str, lost))}")

    def wait(self, loop: Any, wake: Callable[[str], None]) -> None:
        """Have ``wake(lane)`` called when a lane has something to take; takes nothing.

        :param loop: kombu's event loop.
        """
        for lane in self.epochs:
            if lane not in self._waiting:
                connection: Any = self._waits().get_connection()
                connection.send_command("BLMOVE", lane, lane, "RIGHT", "RIGHT", 0)
                self._waiting[lane] = connection
                loop.add_reader(_descriptor(connection), self._woken, loop, lane, wake)

    def _woken(self, loop: Any, lane: str, wake: Callable[[str], None]) -> None:
        connection = self._waiting.pop(lane)
        loop.remove(_descriptor(connection))
        try:
            connection.read_response()
        except redis.ResponseError:
            return  # the server will not have us wait (it is full, say): what comes is found by looking
        except redis.RedisError:
            connection.disconnect()
            raise
        finally:
            self._waits().release(connection)
        wake(lane)

    def _stop_waiting(self, lane: str) -> None:
        connection = self._waiting.pop(lane, None)
        if connection is None:
            return
        if connection._sock is not None:
            loop = getattr(self.connection, "loop", None)
            if loop is not None:
                loop.remove(_descriptor(connection))
        connection.disconnect()
        self._waits().release(connection)

    def _message(self, lane: str, payload: bytes) -> Any:
        """A kombu message of what stood in the list; one that is no message at all comes undecoded."""
        try:
            decoded = msgspec.json.decode(payload)
            message = self.Message(decoded, channel=self)
            if not isinstance(message.body, str | bytes | None) or (decoded.get("body") and not message.body):
                raise ValueError("the body is no text, or nothing is left of it")
            message.delivery_info = {**(message.delivery_info or {}), "exchange": "", "routing_key": lane}
        except Exception:
            return self._unreadable(lane, payload)
        message.delivery_tag = self._tag
        return message

    def _unreadable(self, lane: str, payload: bytes) -> Any:
        """What stood in the list, as it is: it must reach quarantine whole, and as itself."""
        message = self.Message({"properties": {"delivery_tag": self._tag}}, channel=self)
        message.body = payload
        message.content_type = UNREADABLE
        message.delivery_info = {"exchange": "", "routing_key": lane}
        return message

    def _lane_scripts(self) -> tuple[Any, Any, Any]:
        if self._scripts is None:
            client = redis.Redis(connection_pool=redis.ConnectionPool(**self._lane_parameters()))
            take_over, fetch, acknowledge = map(client.register_script, (TAKE_OVER, FETCH, ACKNOWLEDGE))
            self._scripts = take_over, fetch, acknowledge
        return self._scripts

    def _waits(self) -> redis.ConnectionPool:
        if self._pool_of_waits is None:
            self._pool_of_waits = redis.ConnectionPool(**self._lane_parameters())
        return self._pool_of_waits

    def _lane_parameters(self) -> dict[str, Any]:
        """Connections that never repeat a command by themselves: a repeated fetch would lose its first answer."""
        return {**self._connparams(), "max_connections": None, "retry": Retry(NoBackoff(), 0)}


def _descriptor(connection: Any) -> int:
    return int(connection._sock.fileno())


UNREADABLE = "application/x-unreadable"
"""The content type given to what stood in a lane and is not a kombu message."""


class Transport(kombu_redis.Transport):
    """The Redis transport of lane workers: ``broker_transport = "workers.redis_lanes:Transport"``."""

    Channel = Channel
    loop: Any = None

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Remember the loop, so that a closing channel can leave it."""
        self.loop = loop
        super().register_with_event_loop(connection, loop)


class RedisLanes:
    """The broker's side of the lane consumer, on Redis.

    :param consumer: Celery's consumer, connected.
    :param loop: kombu's event loop.
    :param room: how many messages the consumer's buffer has room for.
    :param guard: runs a step that the loop calls, and begins the consumer anew if it fails.
    """

    def __init__(
        self, consumer: Any, loop: Any, room: Callable[[], int], guard: Callable[[Callable[[], None]], None]
    ) -> None:
        self.consumer = consumer
        self.channel: Channel = consumer.task_consumer.channel
        self.loop = loop
        self.room = room
        self.guard = guard
        self._everywhere = False

    def take(self, lanes: Sequence[str]) -> list[str]:
        """Begin to consume lanes; what their last owners left unacknowledged comes first."""
        tasks = self.consumer.task_consumer
        for lane in lanes:
            queue = Queue(lane, exchange=Exchange(""), routing_key=lane)
            self.consumer.app.amqp.queues.select_add(queue)
            tasks.add_queue(queue)
            tasks.consume()
        return list(lanes)

    def forget(self, lanes: Sequence[str]) -> None:
        """Stop consuming lanes; what is unacknowledged of them stays there for their next owner."""
        self.consumer.app.amqp.queues.deselect(lanes)
        for lane in lanes:
            self.consumer.task_consumer.cancel_by_queue(lane)

    def check(self) -> None:
        """Have the next look include the lanes that are waited for, in case a wake-up was lost on its way.

        A connection that broke is found by that look.
        """
        self._everywhere = True

    def close(self) -> None:
        """Select no queue: Celery consumes from what is selected as soon as it is connected again, owned or not."""
        selected = self.consumer.app.amqp.queues
        selected.deselect(list(selected.consume_from))

    def poll(self) -> None:
        """Bring what is waiting into the buffer, or wait for something to come."""
        room = self.room()
        if room <= 0:
            return
        everywhere, self._everywhere = self._everywhere, False
        if not self.channel.fetch(room, everywhere):
            self.channel.wait(self.loop, lambda _lane: self.guard(self.poll))

    def refill(self, messages: int) -> None:
        """Bring up to so many messages into the buffer, as far as there is room, if any wait."""
        room = min(messages, self.room())
        if room > 0:
            self.channel.fetch(room)

    def acknowledge(self, messages: Iterable[Any]) -> None:
        """Acknowledge messages that are the oldest of their lanes, in one round trip."""
        counts: dict[str, int] = {}
        for message in messages:
            lane = message.delivery_info["routing_key"]
            counts[lane] = counts.get(lane, 0) + 1
        if counts:
            self.channel.acknowledge(counts)
