"""The lane consumer: collects messages of a worker's lanes in one ordered buffer and has them written in batches.

It sits in Celery by its own extension points: ledger tasks share a strategy that appends to the buffer
whatever the task's name, a consumer sends what Celery cannot understand into the same buffer instead of
dropping it, and a boot step owns buffer, lanes and flushing (lanes: the batch).
"""

from __future__ import annotations

import gc
import socket
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Protocol

import msgspec
import psycopg
from celery import Task, bootsteps
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request

from creditlane.codes import Code
from creditlane.contract import (
    BATCH,
    INTERNAL,
    MAX_MESSAGE_BYTES,
    ContractError,
    check_id,
    check_reserved,
    decode_batch,
    decode_message,
)
from creditlane.events import matching
from creditlane.lanes import lane_name
from creditlane.rabbitmq import is_rabbitmq
from creditlane.sending import make_sender
from models.in_force import InForce
from models.settings import settings
from workers import metrics, task_events
from workers.crash import crash_point
from workers.ledger_writer import APPLICATION, CONFLICT, SILENT_SECONDS, Job, LedgerWriter, connect
from workers.metrics import stages
from workers.outbox import PATIENCE_SECONDS, Outbox
from workers.ownership import Ownership, check_session
from workers.quarantine import Quarantined, printable
from workers.rabbit_lanes import RabbitLanes
from workers.redis_lanes import UNREADABLE, RedisLanes
from workers.results import Results, reply_of

logger = get_logger(__name__)

FIRST_RETRY_SECONDS = 0.1
"""The pause before the second attempt at a batch; each further one is twice as long, up to a setting."""

FAILURES_PER_CONNECTION = 8
"""Attempts at a batch over one connection; after that the lanes are let go and a new one is made, in case it is the
connection that is at fault (a statement prepared before a migration, say)."""

QUICK_SECONDS, SLOW_SECONDS = 0.5, 2.0
"""Transactions that take less may be followed by one of twice as many operations, one that takes more by one of half as
many: the database ends a session that is silent in the middle of a transaction (see
:data:`workers.ledger_writer.SILENT_SECONDS`), and a batch that takes longer than that would be begun anew for ever."""

SILENT_BALANCES = 3
"""Looks at the lanes that a worker may miss before the database takes it for gone."""

REPR_CHARACTERS = 400
"""How much of an operation's arguments Flower shows."""

GC_ALLOCATIONS = 200_000
"""Live objects that a batch may add before the garbage collector looks for cycles: more than one batch makes, so
that it does not search the middle of each."""

_body = msgspec.json.Decoder(tuple[list[Any], msgspec.Raw, msgspec.Raw])
_json = msgspec.json.Encoder(enc_hook=repr)
_sorted = msgspec.json.Encoder(enc_hook=repr, order="deterministic")


class LedgerTask(Task):
    """A ledger operation as Celery knows it: a name and a strategy."""

    Strategy = "workers.lane_consumer:strategy"
    acks_late = True
    typing = False

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Never called in a lane worker: operations are applied in batches."""
        raise RuntimeError("ledger operations are applied by lane workers, through their lane")


def strategy(task: Task, app: Any, consumer: LaneConsumer, **_options: Any) -> Any:
    """Celery's hook for what to do with a message of a task: put it into the one ordered buffer."""
    receive = consumer.lanes.receive

    def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
        receive(message, task)

    return handle


class RestartError(ConnectionError):
    """Makes Celery restart the consumer: it takes every connection error for a reason to."""


class Strategies(dict[str, Any]):
    """What to do with a message, by its task's name; a name that is no text is unknown like any other."""

    def __getitem__(self, name: Any) -> Any:
        if not isinstance(name, str):
            raise KeyError(name)
        return super().__getitem__(name)


class LaneConsumer(Consumer):
    """A consumer that quarantines what Celery would log and drop, in the message's turn."""

    lanes: LaneStep

    def update_strategies(self) -> None:
        """Ledger operations only: whatever else arrives in a lane is no operation."""
        super().update_strategies()
        self.strategies: dict[str, Any] = Strategies(
            (name, handler) for name, handler in self.strategies.items() if isinstance(self.app.tasks[name], LedgerTask)
        )

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's own handler; a message that makes it raise is poison like any other."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> None:
            stages.begin()
            try:
                handle(message)
            except Exception as error:
                reason = f"the message cannot be read: {type(error).__name__}: {error}"
                self.lanes.receive_poison(message, Code.MALFORMED, reason)
            stages.end("decode")

        return on_message

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """A body that is not JSON, or not allowed."""
        self.lanes.receive_poison(message, Code.MALFORMED, f"the body cannot be read: {exc}")

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """A message that is no Celery task."""
        self.lanes.receive_poison(message, Code.MALFORMED, "the message is no Celery task: it has no task name")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """A task name that is no operation."""
        name = message.headers.get("task") if isinstance(message.headers, dict) else None
        self.lanes.receive_poison(message, Code.UNKNOWN_OPERATION, f"{name!r} is no operation of the ledger")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """A task whose headers Celery cannot read."""
        self.lanes.receive_poison(message, Code.MALFORMED, f"the headers cannot be read: {exc}")


class Delivery:
    """One message in the buffer, with what is to be done for it."""

    __slots__ = (
        "id", "lane", "members", "message", "name", "quarantined", "received_at", "reply", "request", "result",
        "revoked", "started_at",
    )  # fmt: skip

    def __init__(self, message: Any, lane: str) -> None:
        self.message = message
        self.lane = lane
        self.name: str | None = None
        self.id: str | None = None
        self.request: Request | None = None
        self.members: list[Job | Quarantined] = []
        """The message's operations: one, or those of a batch."""
        self.quarantined: Quarantined | None = None
        """Why the message as a whole cannot be understood."""
        self.revoked = False
        self.received_at = time.time()
        self.started_at = 0.0
        self.reply: str | None = None
        """The name under which the answer is waited for, once it is there."""
        self.result: bytes | None = None

    def jobs(self) -> list[Job]:
        """The operations that can be applied."""
        return [member for member in self.members if isinstance(member, Job)]


class Doorbell:
    """Has the event loop call something in its next round, through a socket of its own.

    A timer with delay 0 would do, but after ten timers in a row kombu's loop sleeps for a second, however many
    more are due; and what it is asked to do soon by a timer waits until something else wakes it.
    """

    def __init__(self) -> None:
        self._button: socket.socket | None = None
        self._bell: socket.socket | None = None

    def hang(self, hub: Any, answer: Callable[[], None]) -> None:
        """Call ``answer`` from ``hub`` after each ring; an earlier hub is forgotten."""
        for end in (self._button, self._bell):
            if end is not None:
                end.close()
        self._button, self._bell = socket.socketpair()
        self._button.setblocking(False)
        self._bell.setblocking(False)
        hub.add_reader(self._bell, self._answer, answer)

    def ring(self) -> None:
        """Ask for one call."""
        assert self._button is not None
        self._button.send(b"!")

    def _answer(self, answer: Callable[[], None]) -> None:
        assert self._bell is not None
        self._bell.recv(64)
        answer()


class LaneBroker(Protocol):
    """What a broker does for the lane consumer."""

    def take(self, lanes: Sequence[str]) -> list[str]:
        """Begin to consume lanes; what their last owners left unacknowledged comes first.

        :returns: those that are consumed now; the broker may refuse some, which is told in the log.
        """

    def forget(self, lanes: Sequence[str]) -> None:
        """Stop consuming lanes; what is unacknowledged of them is for their next owner."""

    def poll(self) -> None:
        """Bring what is waiting into the buffer, as far as there is room, and have more brought when it comes."""

    def refill(self, messages: int) -> None:
        """Bring up to so many messages that wait into the buffer, as far as there is room; between two statements of
        a transaction, so no longer than that takes."""

    def acknowledge(self, messages: Iterable[Any]) -> None:
        """Acknowledge messages, which are the oldest of their lanes."""

    def check(self) -> None:
        """Raise a connection error when the lanes are consumed no longer, though nobody said so."""

    def close(self) -> None:
        """Stop consuming everything."""


class LaneStep(bootsteps.StartStopStep):
    """Owns the buffer, the lanes and the flushing of one lane worker."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: LaneConsumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        consumer.lanes = self
        self.consumer = consumer
        self.settings = settings()
        self.in_force = InForce(self.settings.catalog, applies=True)
        self.buffer: deque[Delivery] = deque()
        self.writer: LedgerWriter | None = None
        self.ownership: Ownership | None = None
        self.broker: LaneBroker | None = None
        self.results: Results | None = None
        self.consuming: set[int] = set()
        self.flush_armed = False
        self.pause_seconds = 0.0
        self.failures = 0
        """Attempts in a row at the present batch that the database refused."""
        self.buffered = 0
        """Operations in the buffer."""
        self.pieces = Pieces(self.settings.batch_operations)
        self.events = matching(self.settings.events)
        self.sender = make_sender(
            self.settings.broker_url.get_secret_value(),
            self.settings.tls(self.settings.broker_url),
            PATIENCE_SECONDS,
        )
        self.outbox: Outbox | None = None
        self.hub: Any = None
        self.doorbell = Doorbell()
        self.outage = metrics.Outage()
        metrics.LANES.set_function(lambda: len(self.consuming))
        metrics.BUFFERED.set_function(lambda: self.buffered)
        metrics.CATALOG_REFUSED.set_function(lambda: self.in_force.refused is not None)
        metrics.serve(self.settings)

    # Celery's life cycle

    def register_with_event_loop(self, consumer: LaneConsumer, hub: Any) -> None:
        """Begin: the event loop is about to run."""
        if self.hub is None:
            gc.freeze()
            gc.set_threshold(GC_ALLOCATIONS, 20, 50)
        self.hub = hub
        self.drop_buffer()
        self.flush_armed = False
        self.doorbell.hang(hub, lambda: self.guarded(self.flush))
        self.broker = self.connect_broker(consumer, hub)
        self.results = Results(consumer.app)
        self.guarded(self.balance)
        hub.call_repeatedly(self.settings.balance_seconds, self.guarded, self.balance)

    def connect_broker(self, consumer: LaneConsumer, hub: Any) -> LaneBroker:
        """The adapter for the broker that the consumer is connected to."""
        if is_rabbitmq(self.settings.broker_url.get_secret_value()):
            return RabbitLanes(consumer, hub, self.room, self.guarded, self.settings.batch_messages)
        return RedisLanes(consumer, hub, self.room, self.guarded)

    def stop(self, consumer: LaneConsumer) -> None:
        """Warm shutdown: apply what is buffered, then let the lanes go. After a lost broker connection: only
        let go, since the broker delivers again."""
        self.pause_seconds = 0.0
        if consumer.connection is not None:
            try:
                while self.buffer and self.writer is not None and not self.pause_seconds:
                    self.flush(more=False)
            except Exception as error:
                logger.warning("stopping with %d messages unapplied, they go back: %r", len(self.buffer), error)
        try:
            if self.broker is not None:
                self.broker.close()
        finally:
            self.drop_buffer()
            self.consuming.clear()
            self.close_database()

    def close_database(self) -> None:
        """Close the connection, and with it give every lane up."""
        if self.writer is not None:
            self.writer.connection.close()
        self.writer = self.ownership = None

    # Lanes

    def balance(self) -> None:
        """Take and give lanes so that all workers have their share; connect first, if need be.

        Runs every ``balance_seconds``; also looks for messages that no wake-up told of.
        """
        assert self.broker is not None
        self.broker.check()
        try:
            if self.ownership is None:
                self.open_database()
            assert self.ownership is not None
            found = self.ownership.balance()
            if found.excess:
                self.give_up(found.excess)
                if self.ownership is None:
                    return  # the database was lost meanwhile
            self.show_catalog()
            # A lane may be held without being consumed: when giving it up failed half way, or the broker refused.
            self.consume(sorted(self.ownership.mine - self.consuming))
        except psycopg.Error as error:
            self.lose_database(error)
            return
        if not self.failures:
            self.recover()
        if found.taken or found.excess:
            logger.info(
                "lanes: took %d, gave %d, have %d of %d among %d workers",
                len(found.taken), len(found.excess), len(self.consuming), self.settings.lanes, found.workers,
            )  # fmt: skip
        self.broker.poll()

    def show_catalog(self) -> None:
        """Have metrics and log say which catalog is in force, and whether a later one was elsewhere.

        :raises psycopg.Error: when the database is away.
        """
        assert self.writer is not None
        metrics.CATALOG_VERSION.set(self.in_force.catalog(self.writer.connection).catalog.version)
        metrics.CATALOG_BEHIND.set(self.in_force.compare(self.writer.connection))

    def open_database(self) -> None:
        """Connect to Postgres; from here on lanes can be owned.

        :raises psycopg.Error: when it is away.
        """
        application = f"{APPLICATION} {self.consumer.hostname}"[:63]
        silent_seconds = max(SILENT_SECONDS, SILENT_BALANCES * self.settings.balance_seconds)
        connection = connect(self.settings.database_url.get_secret_value(), application, silent_seconds)
        check_session(connection)
        self.ownership = Ownership(connection, self.settings.lanes)
        self.in_force.forget()
        self.writer = LedgerWriter(connection, lambda: self.in_force.last, poison_of_job, self.events)
        if self.outbox is None:
            self.outbox = Outbox(connection, self.sender, self.settings.lanes)
        self.outbox.connection = connection  # the same outbox: that the broker is away is not forgotten
        self.pause_seconds = 0.0

    def consume(self, lanes: Sequence[int]) -> None:
        """Begin to consume lanes that this worker owns; what their last owners left unacknowledged comes first."""
        assert self.broker is not None
        taken = set(self.broker.take([lane_name(lane) for lane in lanes]))
        self.consuming.update(lane for lane in lanes if lane_name(lane) in taken)

    def give_up(self, lanes: Sequence[int]) -> None:
        """Give lanes to other workers, once everything that is buffered is applied."""
        while self.buffer and not self.pause_seconds and self.writer is not None:
            self.flush(more=False)
        if self.buffer or self.ownership is None:
            return
        self.forget(lanes)
        self.ownership.give(list(lanes))

    def forget(self, lanes: Iterable[int]) -> None:
        """Stop consuming lanes. What of them is buffered was not acknowledged: it is for their next owner."""
        assert self.broker is not None
        numbers = list(lanes)
        names = [lane_name(number) for number in numbers]
        self.broker.forget(names)
        self.consuming.difference_update(numbers)
        self.drop_buffer(names)

    def lose_database(self, error: Exception) -> None:
        """The connection is gone, and with it every lane: drop the buffer, begin anew at the next balance.

        What was buffered was not acknowledged; the lanes' next owner (maybe this worker) gets it again, in
        order, and the operation ids tell what of it had been committed.
        """
        self.outage.begin(getattr(error, "sqlstate", None))
        logger.error(
            "database away for %.0f s (%s): %d lanes let go, %d messages go back; trying again every %.0f s",
            self.outage.seconds, describe(error), len(self.consuming), len(self.buffer), self.settings.balance_seconds,
        )  # fmt: skip
        self.tell_waiting(f"{describe(error)}; the message went back to its lane")
        self.close_database()
        self.drop_buffer()
        self.flush_armed = False
        self.failures = 0
        self.pause_seconds = 0.0
        self.forget(self.consuming)

    # Messages

    def room(self) -> int:
        """How many messages may still be taken off the broker: none while a batch is tried again, or enough
        operations for the next two wait."""
        if self.pause_seconds or self.writer is None or self.buffered >= 2 * self.settings.batch_operations:
            return 0
        return self.settings.batch_messages - len(self.buffer)

    def receive(self, message: Any, task: Task) -> None:
        """Take an operation's message into the buffer, in its turn."""
        delivery = Delivery(message, lane_of_message(message))
        try:
            self.understand(delivery, task)
        except ContractError as error:
            self.refuse(delivery, error.code, str(error))
        except Exception as error:
            self.refuse(delivery, Code.MALFORMED, f"{type(error).__name__}: {error}", traceback.format_exc())
        self.append(delivery)

    def receive_poison(self, message: Any, code: Code, reason: str) -> None:
        """Take a message that Celery cannot understand into the buffer: its quarantine has its turn as well."""
        delivery = Delivery(message, lane_of_message(message))
        headers = message.headers if isinstance(message.headers, dict) else {}
        name, identity = headers.get("task"), headers.get("id")
        delivery.name = name if isinstance(name, str) else None
        delivery.id = identity if isinstance(identity, str) else None
        if message.content_type == UNREADABLE:
            reason = "what stood in the lane is no message of kombu's: its properties or headers cannot be read"
        self.refuse(delivery, code, reason)
        self.append(delivery)

    def understand(self, delivery: Delivery, task: Task) -> None:
        """Decode a message once, into its operations.

        :raises ContractError: when it does not fit the contract.
        """
        message = delivery.message
        headers = message.headers
        delivery.name = task.name
        delivery.id = headers.get("id") if isinstance(headers.get("id"), str) else None
        body = message.body
        if isinstance(body, str):
            body = body.encode()
        if len(body) > MAX_MESSAGE_BYTES:
            raise ContractError(Code.INVALID_MESSAGE, f"the body has more than {MAX_MESSAGE_BYTES} bytes; split it")
        if message.content_type != "application/json":
            raise ContractError(Code.MALFORMED, f"only application/json is accepted, not {message.content_type!r}")
        operation = check_id(headers.get("id"))
        try:
            args, kwargs, _embedded = _body.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ContractError(Code.MALFORMED, f"the body is no [args, kwargs, embed] in JSON: {error}") from None
        delivery.request = self.request(delivery, task, args, kwargs)
        if args:
            raise ContractError(Code.INVALID_MESSAGE, "send keyword arguments; positional ones have no names")
        if headers.get("eta") or headers.get("expires"):
            raise ContractError(
                Code.INVALID_MESSAGE, "lanes apply in order, at once: send without eta, countdown and expires"
            )
        if task.name == BATCH:
            delivery.members = [
                self.member(delivery, name, identity, arguments)
                for name, identity, arguments in decode_batch(kwargs).operations
            ]
        else:
            arguments = bytes(kwargs)
            content = decode_message(task.name, arguments)
            check_reserved(task.name, operation, content)
            delivery.members = [Job(task.name, operation, content, arguments, delivery)]
        # What follows from committed operations cannot be called off: nobody would send it again.
        delivery.revoked = operation in state.revoked and task.name not in INTERNAL

    def member(self, delivery: Delivery, name: str, identity: str, arguments: msgspec.Raw) -> Job | Quarantined:
        """One operation of a batch; one that does not fit the contract fails alone."""
        raw = bytes(arguments)
        try:
            content = decode_message(name, raw)
            check_reserved(name, identity, content)
            return Job(name, identity, content, raw, delivery)
        except ContractError as error:
            return member_row(delivery, name, identity, raw, error.code, str(error))

    def request(self, delivery: Delivery, task: Task, args: list[Any], kwargs: msgspec.Raw) -> Request:
        """Celery's own request, for its events, its inspection and its revocation."""
        consumer = self.consumer
        message = delivery.message
        headers = message.headers
        shown = headers.get("kwargsrepr")
        if not isinstance(shown, str) or not shown:
            headers["kwargsrepr"] = bytes(kwargs)[:REPR_CHARACTERS].decode("utf-8", "replace")
        return Request(
            message,
            app=consumer.app,
            hostname=consumer.hostname,
            eventer=consumer.event_dispatcher,
            task=task,
            connection_errors=consumer.connection_errors,
            body=(args, {}, {}),
            headers=headers,
            decoded=True,
            utc=True,
        )

    def refuse(self, delivery: Delivery, code: Code, reason: str, trace: str | None = None) -> None:
        """Mark a whole message for quarantine."""
        delivery.members = []
        delivery.quarantined = message_row(delivery, code, reason, trace)

    def append(self, delivery: Delivery) -> None:
        """Buffer a message, and see to it that the buffer is flushed in the loop's next round.

        Never here: this may run inside a read of kombu's that waits for something else.
        """
        if delivery.request is not None:
            state.task_reserved(delivery.request)
        self.buffer.append(delivery)
        self.buffered += len(delivery.members)
        self.arm(0)

    def drop_buffer(self, lanes: Sequence[str] | None = None) -> None:
        """Forget what is buffered, of all lanes or some; it was not acknowledged, so the broker still has it."""
        kept = deque(delivery for delivery in self.buffer if lanes is not None and delivery.lane not in lanes)
        for delivery in self.buffer:
            if delivery.request is not None and (lanes is None or delivery.lane in lanes):
                state.task_ready(delivery.request)
        self.buffer = kept
        self.buffered = sum(len(delivery.members) for delivery in kept)

    def arm(self, seconds: float) -> None:
        """Have the buffer flushed after so many seconds, unless that is under way."""
        if self.flush_armed:
            return
        self.flush_armed = True
        if seconds:
            self.hub.call_later(seconds, self.guarded, self.flush)
        else:
            self.doorbell.ring()

    def guarded(self, step: Callable[[], None]) -> None:
        """Run a step from the event loop's timer, which would only log what it raises and carry on.

        Carrying on could break the order: the consumer begins anew instead, and what was not acknowledged
        comes again.
        """
        try:
            step()
        except self.consumer.connection_errors:
            raise
        except Exception as error:
            logger.exception("the lane consumer begins anew after a fault of its own")
            raise RestartError(f"{type(error).__name__}: {error}") from error

    # Batches

    def flush(self, more: bool = True) -> None:
        """Apply the next batch, answer, acknowledge; then look for more."""
        self.flush_armed = False
        if self.writer is None or not self.buffer:
            return
        batch = self.next_batch()
        started = time.time()
        for delivery in batch:
            delivery.started_at = started
            if delivery.request is not None:
                state.task_accepted(delivery.request)
        try:
            self.in_force.catalog(self.writer.connection)  # that the rules go by until the next batch
            self.write(batch, more)
        except psycopg.Error as error:
            self.hold_on(error)
            return
        self.pause_seconds = 0.0
        self.failures = 0
        self.recover()
        assert self.results is not None
        assert self.broker is not None
        stages.begin()
        for delivery in batch:
            finish(delivery)
        self.results.store(batch)
        stages.end("results")
        crash_point("after-results")
        for delivery in batch:
            self.buffer.popleft()
            self.buffered -= len(delivery.members)
        self.broker.acknowledge(delivery.message for delivery in batch)
        stages.end("ack")
        assert self.outbox is not None
        self.outbox.publish(self.writer.take_outbox())
        stages.end("outbox")
        task_events.announce(batch, self.consumer.event_dispatcher)
        stages.end("events")
        self.measure(batch, time.time() - started)
        for delivery in batch:
            delivery.members = []  # each knows its delivery: a circle that only the garbage collector could find
        if more:
            self.broker.poll()
        if self.buffer:
            self.arm(0)

    def next_batch(self) -> list[Delivery]:
        """The oldest messages of the buffer, up to the limits of a transaction; at least one."""
        batch: list[Delivery] = []
        operations = 0
        for delivery in self.buffer:
            operations += len(delivery.members)
            if batch and operations > self.pieces.size:
                break
            batch.append(delivery)
        return batch

    def write(self, batch: Sequence[Delivery], more: bool) -> None:
        """Write a batch, and make sure that one bad operation stops nobody.

        One transaction, unless it is a message of more operations than one may take at present.

        :param more: take as many messages off the lanes meanwhile, if there are so many that more will wait.
        :raises psycopg.Error: for what is no operation's fault; the batch is to be tried again whole.
        """
        assert self.writer is not None
        jobs = jobs_of(batch)
        quarantined = [delivery.quarantined for delivery in batch if delivery.quarantined is not None]
        quarantined += [member for delivery in batch for member in delivery.members if isinstance(member, Quarantined)]
        more = more and 2 * len(jobs) >= self.settings.batch_operations
        self.pieces.write(self.writer, jobs, quarantined, (lambda: self.refill(len(batch))) if more else None)
        for job in jobs:
            if job.status == CONFLICT:
                logger.warning("id conflict: %s %s of %s", job.name, shown(job.operation), shown(job.account))
            elif job.quarantined is not None:
                log_quarantined(job.quarantined)
        for row in quarantined:
            log_quarantined(row)

    def refill(self, messages: int) -> None:
        """Take up to so many messages off the lanes while the database works."""
        assert self.broker is not None
        stages.end("write")
        self.broker.refill(messages)
        stages.begin()

    def hold_on(self, error: psycopg.Error) -> None:
        """A fault of the infrastructure is no refusal: keep the batch and try again, visibly."""
        assert self.writer is not None
        self.failures += 1
        if self.writer.connection.closed or self.failures > FAILURES_PER_CONNECTION:
            self.lose_database(error)
            return
        self.outage.begin(error.sqlstate)
        self.pause_seconds = min(
            self.settings.max_retry_seconds,
            self.pause_seconds * 2 if self.pause_seconds else FIRST_RETRY_SECONDS,
        )
        logger.error(
            "the database refused a batch for %.0f s now (%s): %d messages wait, next attempt in %.1f s",
            self.outage.seconds, describe(error), len(self.buffer), self.pause_seconds,
        )  # fmt: skip
        self.tell_waiting(f"{describe(error)}; next attempt in {self.pause_seconds:.1f} s")
        self.arm(self.pause_seconds)

    def tell_waiting(self, reason: str) -> None:
        """Have Flower show what waits for the database, and why: as tasks that are tried again."""
        task_events.announce_waiting(islice(self.buffer, SHOWN_WAITING), reason, self.consumer.event_dispatcher)

    def recover(self) -> None:
        """The database works: say so, if it did not."""
        lasted = self.outage.end()
        if lasted:
            logger.warning("the database is back after %.0f s", lasted)

    def measure(self, batch: Sequence[Delivery], seconds: float) -> None:
        """Count a batch that is done."""
        metrics.BATCH_SECONDS.observe(seconds)
        metrics.BATCH_OPERATIONS.observe(sum(len(delivery.members) for delivery in batch))
        jobs = jobs_of(batch)
        for status, count in Counter(job.status for job in jobs if job.quarantined is None).items():
            metrics.OPERATIONS.labels(status).inc(count)
        sent = batch[0].message.properties.get("timestamp")
        if isinstance(sent, datetime):  # RabbitMQ's own type, in UTC
            sent = sent.replace(tzinfo=UTC).timestamp()
        if isinstance(sent, int | float):
            metrics.WAITED_SECONDS.set(max(0.0, time.time() - sent))


SHOWN_WAITING = 1000
"""How many of the messages that wait for the database are told of in Flower at the most."""


def log_quarantined(row: Quarantined) -> None:
    """Say in the log what was quarantined and why; what came from outside is escaped and cut."""
    metrics.QUARANTINED.labels(str(row.code)).inc()
    logger.error("quarantined as %s: %s %s: %s", row.code, shown(row.task), shown(row.operation), shown(row.reason))


def shown(text: object) -> str:
    """Foreign text for the log, on one line."""
    return printable(repr(text), LOG_CHARACTERS)


LOG_CHARACTERS = 300
"""How much of a foreign text the log shows."""

DATA_FAULTS = ("22", "23", "54")
"""SQLSTATE classes that a row can be at fault for: data exception, constraint violation, program limit."""

UNIQUE_VIOLATION = "23505"


class Pieces:
    """How many operations one transaction takes: all that wait, up to a limit, and fewer while they take long.

    :param limit: the most that one takes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = limit
        """The most that the next one takes."""

    def write(
        self,
        writer: LedgerWriter,
        jobs: Sequence[Job],
        quarantined: Sequence[Quarantined] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Write in one transaction, or in some, one after the other.

        :param meanwhile: see :meth:`LedgerWriter.write`; called in the first one.
        :raises psycopg.Error: for what is no operation's fault; what was committed before is found again by its ids.
        """
        done = self.size
        slowest = self._write(writer, jobs[:done], quarantined, meanwhile)
        while done < len(jobs):
            size = self.size
            slowest = max(slowest, self._write(writer, jobs[done : done + size]))
            done += size
        # Not before all are written: those that were written before are quick, and say nothing of the others.
        if slowest < QUICK_SECONDS:
            self.size = min(self.limit, 2 * self.size)

    def _write(
        self,
        writer: LedgerWriter,
        jobs: Sequence[Job],
        quarantined: Sequence[Quarantined] = (),
        meanwhile: Callable[[], None] | None = None,
    ) -> float:
        """Write in one transaction; returns the seconds that it took."""
        began = time.monotonic()
        try:
            write_around(writer, jobs, quarantined, meanwhile)
        except psycopg.Error:
            if writer.connection.closed:  # maybe because it took too long: a smaller one gets through
                self._halve(len(jobs))
            raise
        seconds = time.monotonic() - began
        if seconds > SLOW_SECONDS:
            self._halve(len(jobs))
        return seconds

    def _halve(self, operations: int) -> None:
        self.size = max(1, min(self.size, operations) // 2)


def write_around(
    writer: LedgerWriter,
    jobs: Sequence[Job],
    quarantined: Sequence[Quarantined] = (),
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Write jobs in one transaction; if a row is at fault, find it by halves, quarantine it, write the rest.

    Two writers of one new account can collide on its row once; the second attempt finds it there.

    :raises psycopg.Error: for every other fault; what was committed before is found again by its ids.
    """
    for attempt in (1, 2):
        try:
            writer.write(jobs, quarantined, meanwhile)
        except psycopg.Error as error:
            if (error.sqlstate or "")[:2] not in DATA_FAULTS:
                raise
            if attempt == 1 and error.sqlstate == UNIQUE_VIOLATION:
                continue
            fault = error
            break
        else:
            return
    if quarantined:
        writer.write((), quarantined)
    if len(jobs) == 1:
        job = jobs[0]
        job.answer = None
        job.quarantined = poison_of_job(job, Code.OUT_OF_RANGE, f"SQLSTATE {fault.sqlstate}: {fault}", None)
        writer.write((), [job.quarantined])
        return
    middle = len(jobs) // 2
    write_around(writer, jobs[:middle])
    write_around(writer, jobs[middle:])


def jobs_of(batch: Iterable[Delivery]) -> list[Job]:
    """The operations of a batch that are to be applied, in order."""
    return [job for delivery in batch if not delivery.revoked for job in delivery.jobs()]


def finish(delivery: Delivery) -> None:
    """Find out what became of a message whose operations are written, and put its result together if it is waited for.

    A single operation's quarantine row is the message's.
    """
    delivery.reply = reply_of(delivery)
    if delivery.revoked or delivery.quarantined is not None:
        return
    if delivery.name != BATCH:
        (member,) = delivery.members
        assert isinstance(member, Job)
        delivery.quarantined = member.quarantined
        if delivery.reply is not None:
            delivery.result = member.result
        return
    if delivery.reply is None:
        return
    answers: list[bytes] = []
    for member in delivery.members:
        row = member if isinstance(member, Quarantined) else member.quarantined
        if row is not None:
            answers.append(
                _json.encode(
                    {"operation": row.task, "id": row.operation, "status": "quarantined", "code": row.code,
                     "reason": row.reason}
                )
            )  # fmt: skip
        else:
            assert isinstance(member, Job)
            assert member.result is not None
            answers.append(member.result)
    delivery.result = b"[" + b",".join(answers) + b"]"


def lane_of_message(message: Any) -> str:
    """The lane that a message came through."""
    return str((message.delivery_info or {}).get("routing_key", ""))


def envelope(message: Any) -> bytes:
    """A message's headers and properties as JSON; as text where they are more than JSON can say.

    Sorted: RabbitMQ gives the headers back in another order when it delivers again.
    """
    try:
        return _sorted.encode({"headers": message.headers, "properties": message.properties})
    except Exception:
        return _json.encode(printable(repr((message.headers, message.properties)), MAX_MESSAGE_BYTES))


def message_row(delivery: Delivery, code: Code, reason: str, trace: str | None = None) -> Quarantined:
    """The quarantine row of a whole message."""
    message = delivery.message
    body = message.body if message.body is not None else b""
    return Quarantined(
        code,
        reason,
        delivery.lane,
        body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body),
        envelope(message),
        message.content_type,
        delivery.name,
        delivery.id,
        None,
        trace,
    )


def member_row(
    delivery: Delivery,
    name: str,
    operation: str,
    arguments: bytes,
    code: Code,
    reason: str,
    account: str | None = None,
    trace: str | None = None,
) -> Quarantined:
    """The quarantine row of one operation, as a message of its own: so it can be replayed alone."""
    headers = {"headers": {"task": name, "id": operation, "lang": "py"}, "properties": {}}
    return Quarantined(
        code,
        reason,
        delivery.lane,
        b"[[]," + arguments + b",{}]",
        _json.encode(headers),
        "application/json",
        name,
        operation,
        account,
        trace,
    )


def poison_of_job(job: Job, code: Code, reason: str, trace: str | None) -> Quarantined:
    """The quarantine row of a job that could not be applied."""
    return member_row(job.source, job.name, job.operation, job.arguments, code, reason, job.account, trace)


def describe(error: BaseException) -> str:
    """An error for the log: its SQLSTATE if it has one, and the first line of its text."""
    state_code = getattr(error, "sqlstate", None)
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__} {state_code}: {text}" if state_code else f"{type(error).__name__}: {text}"
