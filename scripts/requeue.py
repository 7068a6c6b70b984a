"""What an operator does with a quarantined message: send it again, as it was or mended, or let it go."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import msgspec
from psycopg import Connection

from creditlane.contract import BATCH, MAX_MESSAGE_BYTES, check_id, decode_batch, decode_message
from creditlane.errors import BrokerUnavailableError
from creditlane.lanes import lane_of
from creditlane.sending import Outgoing, make_sender
from creditlane.tls import TLSOptions
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
    operation: str | None
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
        operation=line.operation,
        body=message.body,
        headers=headers,
        properties={name: properties[name] for name in KEPT_PROPERTIES if properties.get(name) is not None},
        content_type=line.content_type or "application/octet-stream",
    )


def mended(
    message: QuarantinedMessage,
    lanes: int,
    arguments: bytes | None = None,
    operation: str | None = None,
    task: str | None = None,
) -> Ready:
    """Make a good message out of a quarantined one, with other arguments, another id or another task.

    :param lanes: how many lanes there are: with another account it goes to another lane.
    :param arguments: the keyword arguments as a JSON object; None for those that it has.
    :param operation: the operation id; None for the one that it has.
    :param task: the task name; None for the one that it has.
    :raises RequeueError: when it has none of its own of what is not given.
    :raises ContractError: when the message would not fit the contract.
    """
    line = message.line
    task = task or line.task
    if task is None:
        raise RequeueError(f"message {line.id} names no task; give it one with --task, or drop it")
    if operation is None and line.operation is None:
        raise RequeueError(f"message {line.id} has no operation id; give it one with --id, or drop it")
    identity = check_id(operation or line.operation)
    if arguments is None:
        arguments = _arguments_of(message)
    if task == BATCH:
        members = [decode_message(name, raw) for name, _, raw in decode_batch(arguments).operations]
    else:
        members = [decode_message(task, arguments)]
    queues = {lane_of(member.account, lanes) for member in members}
    if len(queues) != 1:
        raise RequeueError("the operations of a batch belong to one lane; send them one by one, then drop it")
    body = b"[[]," + arguments + BODY_END
    if len(body) > MAX_MESSAGE_BYTES:
        raise RequeueError(f"the message has more than {MAX_MESSAGE_BYTES} bytes; split it")
    headers = {
        "lang": "py", "task": task, "id": identity, "root_id": identity, "parent_id": None, "group": None,
        "argsrepr": "()", "kwargsrepr": arguments[:400].decode("utf-8", "replace"), "ignore_result": True,
    }  # fmt: skip
    return Ready(
        queue=queues.pop(),
        operation=identity,
        body=body,
        headers=headers,
        properties={"correlation_id": identity},
        content_type="application/json",
    )


def _arguments_of(message: QuarantinedMessage) -> bytes:
    try:
        _, kwargs, _ = msgspec.json.decode(message.body, type=tuple[list[Any], msgspec.Raw, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise RequeueError(
            f"the arguments of message {message.line.id} cannot be read; give them with --arguments"
        ) from None
    return bytes(kwargs)


def replay(
    connection: Connection[Any], broker_url: str, id: int, ready: Ready, who: str, tls: TLSOptions = None
) -> None:
    """Publish a message and note that it was replayed.

    The note is committed after the broker has the message: a crash in between leaves the message open, and
    sending it twice is harmless, since its operation id is the same.

    :param connection: one that may write.
    :param who: who replays it.
    :param tls: the TLS options of a connection to the broker.
    :raises RequeueError: when somebody resolved it meanwhile.
    :raises BrokerUnavailableError: when the broker does not confirm it; it stays open.
    """
    with connection.transaction():
        _resolve(connection, id, "replayed", who)
        _publish(broker_url, ready, tls)


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


def _publish(broker_url: str, ready: Ready, tls: TLSOptions) -> None:
    message = Outgoing(
        ready.queue, ready.body, ready.headers, content_type=ready.content_type, properties=ready.properties
    )
    with closing(make_sender(broker_url, tls)) as sender:
        try:
            sender.send([message])
        except BrokerUnavailableError as error:
            raise BrokerUnavailableError(f"{error}; it is still open") from error
