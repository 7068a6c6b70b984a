"""What an operator does with a quarantined message: send it again, as it was or mended, or let it go."""

from __future__ import annotations

from typing import Any

import msgspec
from kombu import Connection as Broker
from kombu.exceptions import KombuError
from psycopg import Connection

from creditlane.client import RETRIES
from creditlane.contract import BATCH, MAX_MESSAGE_BYTES, Message, check_id, decode_batch, decode_message
from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import PREFIX, lane_of
from models.reading import QuarantinedMessage, quarantined_message
from workers.redis_lanes import UNREADABLE

BODY_END = b',{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority", "expiration", "message_id", "type", "app_id", "user_id")
"""What a message keeps when it is sent again; the rest of its properties belonged to its delivery."""

RESOLVE = """
UPDATE quarantine SET status = %s, resolved_at = ledger_now(), resolved_by = %s WHERE id = %s AND status = 'open'
"""


class RequeueError(ValueError):
    """A message that cannot be sent again or let go; the text says why and what to do."""


class Ready(msgspec.Struct, kw_only=True, frozen=True):
    """A message that is ready to be published."""

    queue: str
    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str


def open_message(connection: Connection[Any], id: int) -> QuarantinedMessage:
    """Fetch a quarantined message that nobody resolved yet.

    :raises RequeueError: when there is none.
    """
    message = quarantined_message(connection, id)
    if message is None:
        raise RequeueError(f"there is no quarantined message {id}")
    line = message.line
    if line.status != "open":
        raise RequeueError(f"message {id} was {line.status} before, by {line.resolved_by or 'somebody unknown'}")
    return message


def as_it_was(message: QuarantinedMessage) -> Ready:
    """Put a message together as it came.

    :raises RequeueError: for one that was never a readable message.
    """
    line = message.line
    if line.content_type == UNREADABLE:
        raise RequeueError(
            f"message {line.id} cannot be replayed: what stood in {line.queue} was no message, so nothing tells "
            "what to send; look at it with 'quarantine show', then drop it"
        )
    try:
        stored = msgspec.json.decode(message.headers)
        headers, properties = dict(stored["headers"] or {}), dict(stored["properties"] or {})
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise RequeueError(
            f"message {line.id} cannot be replayed as it was: its headers cannot be read; mend it with --arguments"
        ) from None
    # It was unpacked on its way in; its body is kept plain.
    headers.pop("compression", None)
    return Ready(
        queue=line.queue,
        body=message.body,
        headers=headers,
        properties={name: properties[name] for name in KEPT_PROPERTIES if properties.get(name) is not None},
        content_type=line.content_type or "application/octet-stream",
    )


def mended(
    message: QuarantinedMessage, arguments: bytes | None, operation: str | None, lanes: int
) -> tuple[Ready, str]:
    """Make a good message out of a quarantined one: its task, with other arguments or another id.

    :param arguments: the keyword arguments as a JSON object; None for those that it has.
    :param operation: the operation id; None for the one that it has.
    :param lanes: how many lanes there are: with another account it goes to another lane.
    :returns: the message, and its operation id.
    :raises RequeueError: when it has no task name or no arguments.
    :raises ContractError: when what is given does not fit the contract.
    """
    line = message.line
    if line.task is None:
        raise RequeueError(
            f"message {line.id} names no task, so it cannot be mended; send the operation anew, then drop it"
        )
    identity = check_id(operation or line.operation)
    if arguments is None:
        arguments = _arguments_of(message)
    if line.task == BATCH:
        batch = decode_batch(arguments)
        name, _, first = batch.operations[0]
        checked: Message = decode_message(name, first)
    else:
        checked = decode_message(line.task, arguments)
    body = b"[[]," + arguments + BODY_END
    if len(body) > MAX_MESSAGE_BYTES:
        raise RequeueError(f"the message has more than {MAX_MESSAGE_BYTES} bytes; split it")
    headers = {
        "lang": "py", "task": line.task, "id": identity, "root_id": identity, "parent_id": None, "group": None,
        "argsrepr": "()", "kwargsrepr": arguments[:400].decode("utf-8", "replace"), "ignore_result": True,
    }  # fmt: skip
    queue = lane_of(checked.account, lanes) if line.queue.startswith(PREFIX) else line.queue
    ready = Ready(
        queue=queue,
        body=body,
        headers=headers,
        properties={"correlation_id": identity},
        content_type="application/json",
    )
    return ready, identity


def _arguments_of(message: QuarantinedMessage) -> bytes:
    try:
        _, kwargs, _ = msgspec.json.decode(message.body, type=tuple[list[Any], msgspec.Raw, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise RequeueError(
            f"the arguments of message {message.line.id} cannot be read; give them with --arguments"
        ) from None
    return bytes(kwargs)


def replay(connection: Connection[Any], broker_url: str, id: int, ready: Ready, who: str) -> None:
    """Publish a message and note that it was replayed.

    The note is committed after the broker has the message: a crash in between leaves the message open, and
    sending it twice is harmless, since its operation id is the same.

    :param connection: one that may write.
    :param who: who replays it.
    :raises RequeueError: when somebody resolved it meanwhile.
    :raises BrokerUnavailableError: when the broker does not confirm it; it stays open.
    """
    with connection.transaction():
        _resolve(connection, id, "replayed", who)
        _publish(broker_url, ready)


def drop(connection: Connection[Any], id: int, who: str, reason: str | None) -> None:
    """Note that a message is let go; it stays in the table, whole.

    :param connection: one that may write.
    :raises RequeueError: when somebody resolved it meanwhile.
    """
    with connection.transaction():
        _resolve(connection, id, "dropped", who if reason is None else f"{who}: {reason}")


def _resolve(connection: Connection[Any], id: int, status: str, who: str) -> None:
    if connection.execute(RESOLVE, (status, who, id)).rowcount != 1:
        raise RequeueError(f"message {id} was resolved by somebody else meanwhile")


def _publish(broker_url: str, ready: Ready) -> None:
    options = {"socket_connect_timeout": 5, "socket_timeout": 30, "confirm_publish": True}
    with Broker(broker_url, transport_options=options) as broker:
        try:
            with broker.Producer() as producer:
                producer.publish(
                    ready.body,
                    exchange="",
                    routing_key=ready.queue,
                    headers=ready.headers,
                    content_type=ready.content_type,
                    content_encoding="utf-8",
                    delivery_mode=2,
                    retry=True,
                    retry_policy=RETRIES,
                    **ready.properties,
                )
        except (KombuError, *broker.connection_errors) as error:
            raise BrokerUnavailableError(
                f"the broker did not take the message ({type(error).__name__}); it is still open"
            ) from error
