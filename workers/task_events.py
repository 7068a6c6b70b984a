"""Task events of a batch, for Flower and other watchers: one block, encoded in one go (messages: results).

The same events that Celery's dispatcher sends, with the same fields. Made here because encoding them one dictionary at
a time took a quarter of a worker's time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from time import time
from typing import TYPE_CHECKING, Any

import msgspec
from celery.utils.log import get_logger
from celery.utils.time import utcoffset
from celery.worker import state
from kombu.utils.json import dumps

from creditlane.contract import BATCH
from workers.quarantine import Quarantined

if TYPE_CHECKING:
    from workers.lane_consumer import Delivery

logger = get_logger(__name__)

ROUTING_KEY = "task.multi"
"""What Celery sends blocks of task events under."""

_encode = msgspec.json.Encoder().encode

Event = dict[str, Any]


def announce(batch: Sequence[Delivery], dispatcher: Any) -> None:
    """Tell watchers what became of messages, and Celery's own books that they are done.

    :param dispatcher: the consumer's event dispatcher; none where it has none.
    """
    for delivery in batch:
        if delivery.request is not None:
            state.task_ready(delivery.request, successful=delivery.quarantined is None and not delivery.revoked)
    if is_on(dispatcher):
        ended = time()
        _send([event for delivery in batch for event in _ended(delivery, ended)], dispatcher)


def announce_waiting(deliveries: Iterable[Delivery], reason: str, dispatcher: Any) -> None:
    """Tell watchers of messages that wait for the database and will be tried again."""
    if is_on(dispatcher):
        retried = {"exception": f"Waiting({reason!r})", "traceback": reason}
        _send([event for delivery in deliveries for event in _waiting(delivery, retried)], dispatcher)


def is_on(dispatcher: Any) -> bool:
    """Whether task events are wanted."""
    return dispatcher is not None and dispatcher.enabled and (not dispatcher.groups or "task" in dispatcher.groups)


def _waiting(delivery: Delivery, retried: Event) -> tuple[Event, Event]:
    received = _received(delivery)
    return received, {"type": "task-retried", "uuid": received["uuid"], "timestamp": time(), **retried}


def _ended(delivery: Delivery, ended: float) -> tuple[Event, ...]:
    received = _received(delivery)
    uuid = received["uuid"]
    if delivery.revoked:
        revoked = {"type": "task-revoked", "uuid": uuid, "terminated": False, "signum": None, "expired": False}
        return received, {**revoked, "timestamp": ended}
    started = {"type": "task-started", "uuid": uuid, "timestamp": delivery.started_at}
    if delivery.quarantined is not None:
        text = f"{delivery.quarantined.code}: {delivery.quarantined.reason}"
        failed = {"exception": f"QuarantinedError({text!r})", "traceback": text}
        return received, started, {"type": "task-failed", "uuid": uuid, "timestamp": ended, **failed}
    succeeded = {"result": summary(delivery), "runtime": max(0.0, ended - delivery.started_at)}
    return received, started, {"type": "task-succeeded", "uuid": uuid, "timestamp": ended, **succeeded}


def _received(delivery: Delivery) -> Event:
    # What has no id of its own is shown all the same, under the digest of its quarantine row.
    uuid = delivery.id
    if uuid is None:
        assert delivery.quarantined is not None
        uuid = f"quarantined-{delivery.quarantined.digest.hex()[:16]}"
    return {
        "type": "task-received",
        "uuid": uuid,
        "name": delivery.name or "unreadable",
        "args": "",
        "kwargs": delivery.request.kwargsrepr if delivery.request is not None else "",
        "root_id": uuid,
        "parent_id": None,
        "retries": 0,
        "eta": None,
        "expires": None,
        "exchange": "",
        "routing_key": delivery.lane,
        "queue": delivery.lane,
        "timestamp": delivery.received_at,
    }


def _send(events: Sequence[Event], dispatcher: Any) -> None:
    """Send events in one block. They are for watching: one that cannot be sent stops nothing."""
    common = {"hostname": dispatcher.hostname, "utcoffset": utcoffset(), "pid": dispatcher.pid}
    for event in events:
        event.update(common, clock=dispatcher.clock.forward())
    try:
        body = _encode(events)
    except Exception:
        body = dumps(events)  # a foreign name with half a character in it
    try:
        with dispatcher.mutex:
            dispatcher.producer.publish(
                body,
                routing_key=ROUTING_KEY,
                exchange=dispatcher.exchange.name,
                declare=[dispatcher.exchange],
                content_type="application/json",
                content_encoding="utf-8",
                headers=dispatcher.headers,
                delivery_mode=dispatcher.delivery_mode,
                retry=False,
            )
    except Exception as error:
        logger.warning("%d events could not be sent: %r", len(events), error)


class _Balance(msgspec.Struct):
    available: str


class _Stored(msgspec.Struct):
    code: str | None = None
    charged: str | None = None
    balance: _Balance | None = None
    allotted: str | None = None


_decode = msgspec.json.Decoder(_Stored).decode


def summary(delivery: Delivery) -> str:
    """A result as Flower shows it: what became of the operation, or of how many, in one short line."""
    if delivery.name == BATCH:
        counts = Counter(
            "quarantined" if isinstance(member, Quarantined) or member.quarantined is not None else member.status
            for member in delivery.members
        )
        return ", ".join(f"{count} {status}" for status, count in counts.items())
    (job,) = delivery.jobs()
    assert job.answer is not None
    told = _decode(job.answer.stored)
    parts = [job.answer.status if told.code is None else f"{job.answer.status} {told.code}"]
    if told.charged not in (None, "0"):
        parts.append(f"charged {told.charged}")
    if told.allotted is not None:
        parts.append(f"allotted {told.allotted}")
    if told.balance is not None:
        parts.append(f"available {told.balance.available}")
    if job.answer.replayed:
        parts.append("replayed")
    return ", ".join(parts)
