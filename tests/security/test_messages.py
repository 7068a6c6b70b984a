"""Messages of strangers through real workers: only JSON, only so large, and any language may speak it."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import pickle
import zlib
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import amqp
import pytest
import redis

from creditlane.codes import Code
from creditlane.contract import MAX_MESSAGE_BYTES
from creditlane.lanes import lane_of
from tests.broker import Broker, RabbitBroker, RedisBroker, on_both_brokers
from tests.conftest import LANES
from tests.support import Worker, eventually, rows, value
from workers import unpacking

ACCOUNT = "alice"
LANE = lane_of(ACCOUNT, LANES)
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
MORE_MEMORY_BYTES = 150 << 20
"""How much memory a worker may need for all of these at the most; the bombs alone would unpack to far more."""

LZMA = partial(lzma.LZMACompressor, preset=0)
BOMB_BYTES = 300 << 20


class Strange(NamedTuple):
    """A message that no client of ours would send."""

    body: bytes
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    headers: dict[str, Any] | None = None


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def good(**arguments: Any) -> bytes:
    return json.dumps([[], {"account": ACCOUNT, "feature": "export", **arguments}, EMBED]).encode()


@cache
def bomb(kind: Any) -> bytes:
    """Blanks, packed by pieces."""
    packer = kind()
    piece = b" " * (1 << 20)
    return b"".join([*(packer.compress(piece) for _ in range(BOMB_BYTES >> 20)), packer.flush()])


def strange(canary: Path) -> dict[str, Strange]:
    """Messages by what is strange about them."""
    pickled = pickle.dumps([[], {"account": Canary(canary)}, EMBED])
    yaml = f"- []\n- account: !!python/object/apply:os.mkdir ['{canary}']\n- {{}}\n".encode()
    return {
        "pickle": Strange(pickled, "application/x-python-serialize", "binary"),
        "pickle called JSON": Strange(pickled, "application/json", "binary"),
        "pickle called data": Strange(pickled, "application/data", "binary"),
        "YAML": Strange(yaml, "application/x-yaml"),
        "YAML called JSON": Strange(yaml),
        "msgpack": Strange(b"\x93\x90\x81\xa7account\xa5alice\x80", "application/x-msgpack", "binary"),
        "text": Strange(good(), "text/plain"),
        "5 MiB": Strange(good(metadata={"x": "y" * (5 * MAX_MESSAGE_BYTES)})),
        "a gzip bomb": Strange(bomb(zlib.compressobj), headers={"compression": "application/x-gzip"}),
        "a bzip2 bomb": Strange(bomb(bz2.BZ2Compressor), headers={"compression": "application/x-bz2"}),
        "an xz bomb": Strange(bomb(LZMA), headers={"compression": "application/x-lzma"}),
        "half of a gzip": Strange(zlib.compress(good())[:40], headers={"compression": "application/x-gzip"}),
        "thousands of headers, and no sense": Strange(b"{}", headers={f"x-{number}": "y" for number in range(5000)}),
        "nesting without end": Strange(good(metadata={}).replace(b"{}", b'{"a":' * 5000 + b"1" + b"}" * 5000, 1)),
    }  # fmt: skip


def send(broker: Broker, message: Strange, identity: str, name: str = "credits.consume") -> None:
    """Put a message into the lane as the broker's other clients would."""
    headers = {"lang": "xx", "task": name, "id": identity, **(message.headers or {})}
    if isinstance(broker, RabbitBroker):
        with closing(broker.connect()) as connection:
            channel = connection.channel()
            channel.confirm_select()
            raw = amqp.Message(
                message.body,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                application_headers=headers,
                correlation_id=identity,
            )
            channel.basic_publish_confirm(raw, "", LANE, mandatory=True)
        return
    wrapped = {
        "body": base64.b64encode(message.body).decode(),
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
        "headers": headers,
        "properties": {"body_encoding": "base64", "delivery_tag": identity, "correlation_id": identity},
    }
    broker.push(LANE, json.dumps(wrapped).encode())


def memory(worker: Worker) -> int:
    """The most memory that a worker has needed so far, in bytes."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def has_lane(broker: Broker) -> bool:
    if isinstance(broker, RedisBroker):
        return True
    assert isinstance(broker, RabbitBroker)
    with closing(broker.connect()) as connection:
        try:
            connection.channel().queue_declare(LANE, passive=True)
        except amqp.NotFound:
            return False
        return True


def is_applied(database: str, identity: str) -> bool:
    return bool(value(database, "SELECT count(*) FROM operations WHERE operation = %s", identity))


@on_both_brokers
def test_what_is_no_plain_json_is_kept_and_nothing_else_happens(
    broker: Broker, database: str, lane_worker: Worker, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    messages = strange(canary)
    eventually(lambda: has_lane(broker), what="the lane is made")
    send(broker, Strange(b'[[],{"account":"alice"},{}]'), "open", "credits.open")
    eventually(lambda: value(database, "SELECT count(*) FROM operations") == 1)
    before = memory(lane_worker)
    for number, (what, message) in enumerate(messages.items()):
        send(broker, message, f"strange-{number}")
        send(broker, Strange(good()), f"good-{number}")
        eventually(partial(is_applied, database, f"good-{number}"), 60, f"after {what}")
    assert value(database, "SELECT count(*) FROM operations") == len(messages) + 1
    kept = dict(rows(database, "SELECT operation, code FROM quarantine"))
    assert kept.keys() == {f"strange-{number}" for number in range(len(messages))}
    assert set(kept.values()) <= {Code.MALFORMED, Code.INVALID_MESSAGE}
    bodies = dict(rows(database, "SELECT operation, body FROM quarantine"))
    # As it came: a bomb is not unpacked to be kept.
    assert [bodies[f"strange-{number}"] == message.body for number, message in enumerate(messages.values())] == [
        True
    ] * len(messages)
    assert not canary.exists()
    assert lane_worker.running
    assert "Traceback" not in lane_worker.logged()
    assert memory(lane_worker) - before < MORE_MEMORY_BYTES


@pytest.mark.parametrize("content_type", unpacking.KNOWN)
def test_unpacking_ends_at_the_limit(content_type: str) -> None:
    pack, start, _ = unpacking.KNOWN[content_type]
    unpack = unpacking.bounded(start)
    assert unpack(pack(b"x" * MAX_MESSAGE_BYTES)) == b"x" * MAX_MESSAGE_BYTES
    with pytest.raises(ValueError, match="1048576"):
        unpack(pack(b"x" * (MAX_MESSAGE_BYTES + 1)))
    with pytest.raises(ValueError, match="cut off"):
        unpack(pack(b"x" * 100)[:-3])


def as_celery_node_sends_it(identity: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The headers and the body of task protocol 2, as a client in JavaScript makes them."""
    headers = {
        "lang": "js", "task": "credits.consume", "id": identity, "shadow": None, "eta": None, "expires": None,
        "group": None, "retries": 0, "timelimit": [None, None], "root_id": identity, "parent_id": None,
        "argsrepr": "[]", "kwargsrepr": json.dumps(arguments), "origin": "1@node",
    }  # fmt: skip
    return headers, json.dumps([[], arguments, {**EMBED, "chain": None}], separators=(",", ":"))


@on_both_brokers
def test_another_language_needs_no_library_of_ours(broker: Broker, database: str, lane_worker: Worker) -> None:
    eventually(lambda: has_lane(broker), what="the lane is made")
    send(broker, Strange(b'[[],{"account":"alice"},{}]'), "open", "credits.open")
    headers, body = as_celery_node_sends_it("js-1", {"account": ACCOUNT, "amount": "1.25"})
    answer = over_redis(broker.url, headers, body) if broker.kind == "redis" else over_amqp(broker, headers, body)
    assert (answer["status"], answer["task_id"]) == ("SUCCESS", "js-1")
    assert (answer["result"]["status"], answer["result"]["charged"]) == ("applied", "1.25")


def over_redis(url: str, headers: dict[str, Any], body: str) -> dict[str, Any]:
    """Send with plain commands of Redis, and read the answer from its key."""
    message = {
        "body": base64.b64encode(body.encode()).decode(),
        "headers": headers,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "correlation_id": headers["id"], "reply_to": "7a5c", "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": LANE}, "body_encoding": "base64", "delivery_tag": "d-1",
        },
    }  # fmt: skip
    with redis.Redis.from_url(url) as store:
        store.lpush(LANE, json.dumps(message))
        stored: Any = eventually(lambda: store.get(f"celery-task-meta-{headers['id']}"), what="the answer")
    found: dict[str, Any] = json.loads(stored)
    return found


def over_amqp(broker: Broker, headers: dict[str, Any], body: str) -> dict[str, Any]:
    """Send with plain AMQP, and read the answer from a queue of our own."""
    assert isinstance(broker, RabbitBroker)
    answers: list[Any] = []
    with closing(broker.connect()) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).queue
        channel.basic_consume(queue, no_ack=True, callback=answers.append)
        message = amqp.Message(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            application_headers=headers,
            correlation_id=headers["id"],
            reply_to=queue,
            delivery_mode=2,
        )
        channel.basic_publish(message, "", LANE)
        while not answers:
            connection.drain_events(timeout=30)
    assert answers[0].properties["correlation_id"] == headers["id"]
    found: dict[str, Any] = json.loads(answers[0].body)
    return found
