"""Poison through a real lane worker: whatever stands in a lane is applied or kept whole, and stops nobody."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psycopg
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from creditlane.codes import Code
from creditlane.contract import MAX_BATCH, MAX_MESSAGE_BYTES, Result, concluding_id, receiving_id
from creditlane.lanes import lane_name, lane_of
from models.audit import audit
from scripts.embedded import Stack
from tests.conftest import LANES, TEMPLATE
from tests.support import Worker, eventually, owned_lanes, rows, value
from workers.redis_lanes import keys_of

ACCOUNT = "alice"
LANE = lane_of(ACCOUNT, LANES)
EMBED = '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'
PACKING = {"task": "credits.consume", "id": "poison"}

_numbers = itertools.count(1)


class Place(NamedTuple):
    """A lane worker that all tests of this module share, with its broker and its database."""

    worker: Worker
    database: str
    store: redis.Redis

    def push(self, *payloads: bytes) -> None:
        """Put raw payloads into the lane, in order and at once."""
        self.store.lpush(LANE, *payloads)

    def answer(self, identity: str) -> dict[str, Any]:
        """What a sender without our client reads from Redis."""
        stored: Any = eventually(lambda: self.store.get(f"celery-task-meta-{identity}"))
        meta: dict[str, Any] = json.loads(stored)
        return meta

    def counts(self) -> tuple[int, int]:
        """How many operations are answered, and how many messages (redeliveries too) are in quarantine."""
        (found,) = rows(
            self.database,
            "SELECT (SELECT count(*) FROM operations), (SELECT coalesce(sum(times_seen), 0) FROM quarantine)",
        )
        return int(found[0]), int(found[1])


@pytest.fixture(scope="module")
def place(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The worker; in the end it still lives, nothing is left in any lane, and the ledger proves itself."""
    database = stack.create_database("poison", template=TEMPLATE)
    broker = stack.redis.url_of(0)
    log: Path = tmp_path_factory.mktemp("poison") / "worker.log"
    environment = {
        "CREDITLANE_BROKER_URL": broker,
        "CREDITLANE_DATABASE_URL": database,
        "CREDITLANE_CATALOG": "packs",
        "CREDITLANE_LANES": str(LANES),
        "CREDITLANE_BALANCE_SECONDS": "0.5",
    }
    command = [
        "-A", "workers.lane_app", "worker", "--pool", "solo", "--without-gossip", "--without-mingle", "-n", "poison@%h",
        "--loglevel", "INFO",
    ]  # fmt: skip
    with redis.Redis.from_url(broker) as store:
        store.flushdb()
        worker = Worker("poison", command, environment, log)
        try:
            eventually(lambda: owned_lanes(database) == LANES, what="the worker takes all lanes")
            here = Place(worker, database, store)
            here.push(task("credits.open", "open", {"account": ACCOUNT}))
            eventually(lambda: here.counts() == (1, 0))
            yield here
            assert worker.running
            assert "Traceback" not in worker.logged()
            assert worker.logged().count("lanes: took") == 1  # a consumer that began anew would have taken them again
            for number in range(LANES):
                lane, unacked, _ = keys_of(lane_name(number))
                assert store.exists(lane, unacked) == 0
            with psycopg.connect(database, autocommit=True) as connection:
                report = audit(connection)
            assert report.holds, report.faults
        finally:
            if worker.running:
                worker.kill()
            stack.postgres.drop_database("poison")


def wrapped(
    body: bytes | str,
    headers: Any = None,
    content_type: Any = "application/json",
    properties: dict[str, Any] | None = None,
    **fields: Any,
) -> bytes:
    """What kombu puts into a Redis list, around a body."""
    raw = body.encode() if isinstance(body, str) else body
    wrapper = {
        "body": base64.b64encode(raw).decode(),
        "content-type": content_type,
        "content-encoding": "utf-8",
        "headers": {**PACKING, "lang": "py"} if headers is None else headers,
        "properties": {"delivery_tag": "t", "body_encoding": "base64", **(properties or {})},
        **fields,
    }
    return json.dumps(wrapper).encode()


def arguments_body(arguments: str | bytes) -> bytes:
    """A body around keyword arguments that are JSON already."""
    raw = arguments.encode() if isinstance(arguments, str) else arguments
    return b"[[]," + raw + b"," + EMBED.encode() + b"]"


def task(name: str, identity: str, arguments: dict[str, Any], **headers: Any) -> bytes:
    """A good message."""
    return wrapped(arguments_body(json.dumps(arguments)), {"lang": "py", "task": name, "id": identity, **headers})


class Poison(NamedTuple):
    """A raw payload, the code that it is quarantined with, and the body that is kept of it."""

    payload: bytes
    code: Code
    kept: bytes
    says: str = ""
    """A part of the reason."""


def raw(payload: bytes, says: str = "no message of kombu's") -> Poison:
    """What is no message at all is kept as it is."""
    return Poison(payload, Code.MALFORMED, payload, says)


def body(content: bytes | str, code: Code, says: str = "", **parts: Any) -> Poison:
    """A message whose body is kept as it came."""
    kept = content.encode() if isinstance(content, str) else content
    return Poison(wrapped(content, **parts), code, kept, says)


def consume(arguments: str | bytes, says: str = "", code: Code = Code.INVALID_MESSAGE, **parts: Any) -> Poison:
    """A consume of these arguments."""
    return body(arguments_body(arguments), code, says, **parts)


GOOD = '{"account":"alice","feature":"export"}'
MALFORMED, INVALID = Code.MALFORMED, Code.INVALID_MESSAGE
DEEP = "[" * 900 + "]" * 900


def amount(written: str, code: Code = INVALID, says: str = "amount") -> Poison:
    """A consume of an amount as written in JSON."""
    return consume(f'{{"account":"alice","amount":{written}}}', says, code)


def header(says: str = "", code: Code = INVALID, **headers: Any) -> Poison:
    """A good body under other headers."""
    return consume(GOOD, says, code, headers={**PACKING, **headers})


def batch(members: Any, says: str = "") -> Poison:
    """A batch that is refused as a whole."""
    arguments = json.dumps({"v": 1, "operations": members})
    return consume(arguments, says, headers={**PACKING, "task": "credits.batch"})


PROTO_1 = '{"task":"credits.consume","id":"old","args":[],"kwargs":{"account":"alice","feature":"export"}}'
BIG = json.dumps({"account": ACCOUNT, "feature": "export", "metadata": {"x": "y" * 1_000_000}})
TOO_BIG = json.dumps({"account": ACCOUNT, "feature": "export", "metadata": {"x": "y" * MAX_MESSAGE_BYTES}})
MEMBER = ["credits.consume", "m", {"account": ACCOUNT, "feature": "export"}]

POISON: dict[str, Poison] = {
    # The wrapper
    "nothing": raw(b""),
    "broken JSON": raw(b'{"body": "no task at all"'),
    "text": raw(b"hello"),
    "NUL bytes": raw(b"\x00\x00\x00"),
    "invalid UTF-8": raw(b'{"body": "\xff\xfe\x80", "properties": {"delivery_tag": "x"}}'),
    "null": raw(b"null"),
    "a number": raw(b"42"),
    "an empty array": raw(b"[]"),
    "an empty object": raw(b"{}"),
    "a pickle": raw(pickle.dumps({"task": "credits.consume"})),
    "nesting without end": raw(b"[" * 200_000),
    "a lone surrogate in the id": raw(wrapped(b"x").replace(b'"poison"', b'"\\ud800"')),
    "properties that are no object": raw(wrapped(b"x").replace(b'"properties": {', b'"properties": 1, "p": {')),
    "headers that are text": raw(wrapped(b"x", "text")),
    "headers that are an array": raw(wrapped(b"x", ["task", "credits.consume"])),
    "headers that are a number": raw(wrapped(b"x", 5)),
    "delivery info that is text": raw(wrapped(b"x", properties={"delivery_info": "text"})),
    "delivery info that is an array": raw(wrapped(b"x", properties={"delivery_info": ["text"]})),
    "an unknown body encoding": raw(wrapped(b"x", properties={"body_encoding": "rot13"})),
    "a body that is no base64": raw(wrapped(b"x").replace(b'"eA=="', b'"not base64 at all"')),
    "a body of which base64 leaves nothing": raw(wrapped(b"x").replace(b'"eA=="', b'"@@@@"')),
    "a body that is a number": raw(wrapped(b"x", properties={"body_encoding": None}).replace(b'"eA=="', b"5")),
    "a body that is a large number": raw(
        wrapped(b"x", properties={"body_encoding": None}).replace(b'"eA=="', b"100000000000000")
    ),
    "a body that is an array": raw(wrapped(b"x", properties={"body_encoding": None}).replace(b'"eA=="', b'["a"]')),
    "a body that is an object": raw(wrapped(b"x", properties={"body_encoding": None}).replace(b'"eA=="', b'{"a":1}')),
    "a body that is true": raw(wrapped(b"x", properties={"body_encoding": None}).replace(b'"eA=="', b"true")),
    # The headers
    "missing headers": body(arguments_body(GOOD), MALFORMED, headers={}),
    "headers that are null": Poison(
        wrapped(b"{}").replace(b'"headers": {', b'"headers": null, "h": {'), MALFORMED, b"{}"
    ),
    "a task name that is null": header(task=None, code=Code.UNKNOWN_OPERATION),
    "a task name that is an array": header(task=["credits.consume"], code=Code.UNKNOWN_OPERATION),
    "a task name that is an object": header(task={"name": "credits.consume"}, code=Code.UNKNOWN_OPERATION),
    "a task name that is a number": header(task=5, code=Code.UNKNOWN_OPERATION),
    "an unknown task": header("'nothing.known'", Code.UNKNOWN_OPERATION, task="nothing.known"),
    "a task that is no operation": header("'celery.backend_cleanup'", Code.UNKNOWN_OPERATION,
                                          task="celery.backend_cleanup"),
    "a missing id": consume(GOOD, "the operation id", headers={"task": "credits.consume"}),
    "an id of 129 characters": header("the operation id", id="i" * 129),
    "an id of nothing": header("the operation id", id=""),
    "an id that is a number": header("the operation id", id=5),
    "an id that is an array": header("the operation id", id=["poison"]),
    "an id with a control character": header("the operation id", id="a\x00b"),
    "an eta": header("eta", eta="2030-01-01T00:00:00+00:00"),
    "an eta that is no date": header(eta="never", code=MALFORMED),
    "an expiry that is no date": header(expires="never", code=MALFORMED),
    "an unknown compression": header(compression="application/x-nothing", code=MALFORMED),
    "compressed garbage": body(b"\x1f\x8bgarbage", MALFORMED, headers={**PACKING, "compression": "application/x-gzip"}),
    "pickle": body(pickle.dumps([[], {}, {}]), MALFORMED, "application/x-python-serialize",
                   content_type="application/x-python-serialize"),
    "YAML": consume(GOOD, "application/x-yaml", MALFORMED, content_type="application/x-yaml"),
    "no content type": consume(GOOD, "None", MALFORMED, headers={**PACKING, "id": "no type"},
                               content_type=None),
    "a content type that is a number": consume(GOOD, "5", MALFORMED, headers={**PACKING, "id": "type 5"},
                                             content_type=5),
    # The body
    "a body of nothing": body(b"", MALFORMED),
    "a body of broken JSON": body(b'[[], {"account": "alice", ', MALFORMED, "[args, kwargs, embed]"),
    "a body of invalid UTF-8": body(arguments_body(b'{"account":"\xff\xfe","feature":"export"}'), INVALID),
    "a body of two elements": body(b"[[], {}]", MALFORMED, "[args, kwargs, embed]"),
    "a body that is the arguments": body(GOOD, MALFORMED, "[args, kwargs, embed]"),
    "a message of protocol 1": body(PROTO_1, INVALID, "the operation id", headers={}),
    "positional arguments": body(f'[["alice"],{GOOD},{EMBED}]', INVALID, "positional"),
    "arguments that are an array": consume("[]"),
    "arguments that are null": consume("null"),
    # The arguments
    "an account that is a number": consume('{"account":5,"feature":"export"}', "account"),
    "an account of 129 characters": consume(json.dumps({"account": "a" * 129, "feature": "export"}), "account"),
    "a quantity that is an array": consume('{"account":"alice","feature":"export","quantity":[1]}', "quantity"),
    "an unknown argument": consume('{"account":"alice","feature":"export","fast":true}', "fast"),
    "NaN": amount("NaN", MALFORMED, "JSON"),
    "NaN as text": amount('"NaN"'),
    "infinity": amount("-Infinity", MALFORMED, "JSON"),
    "a float": amount("1.5"),
    "an exponent": amount('"1e3"'),
    "a negative amount": amount("-1"),
    "an amount of zero": amount('"0"'),
    "2^63": amount(str(2**63)),
    "an integer of six hundred digits": amount("9" * 600, says=""),
    "six hundred decimals": amount(f'"0.{"3" * 600}"'),
    "a NUL in the account": consume('{"account":"a\\u0000b","feature":"export"}', "account"),
    "a NUL byte": consume(b'{"account":"a\x00b","feature":"export"}', "JSON", MALFORMED),
    "a lone surrogate": consume('{"account":"\\ud800","feature":"export"}', "JSON", MALFORMED),
    "metadata without end": consume('{"account":"alice","feature":"export","metadata":' + "[" * 100_000, "JSON",
                                    MALFORMED),
    "1 MB": consume(BIG, "4096"),
    "more than 1 MiB": consume(TOO_BIG, "1048576"),
    "version 99": consume('{"account":"alice","feature":"export","v":99}', "99", Code.UNKNOWN_VERSION),
    "version 99 of something unknown": consume('{"v":99,"whatever":[1,2]}', "99", Code.UNKNOWN_VERSION),
    "version 0": consume('{"account":"alice","feature":"export","v":0}'),
    # Ids of the ledger's own operations: who had one first, even refused, would keep a transfer from ever ending
    "an id that a recipient's lane waits for": header("derived", id=receiving_id("bob", "gift")),
    "an id that a sender's lane waits for": header("derived", id=concluding_id(ACCOUNT, "gift")),
    "credits received under another transfer's id": consume(
        '{"account":"alice","sender":"eve","transfer":"x","lots":[{"source":"pack","amount":"1","priority":1}]}',
        "derived", headers={"task": "credits.receive", "id": receiving_id("bob", "gift")}),
    "a transfer confirmed under another's id": consume(
        '{"account":"alice","transfer":"x"}', "derived",
        headers={"task": "credits.confirm", "id": concluding_id(ACCOUNT, "gift")}),
    # Batches
    "an empty batch": batch([]),
    "a batch of 1001": batch([MEMBER] * (MAX_BATCH + 1)),
    "a batch with a member that is no array": batch([MEMBER, 5]),
    "a batch with a member without an id": batch([["credits.consume", "", {}]]),
    "a batch with a member of two": batch([MEMBER[:2]]),
    "a batch of version 2": consume('{"v":2,"operations":[]}', "2", Code.UNKNOWN_VERSION,
                                    headers={**PACKING, "task": "credits.batch"}),
}  # fmt: skip


def quarantined_after(place: Place, last: int) -> list[tuple[Any, ...]]:
    """The quarantine rows above an id."""
    return rows(
        place.database, "SELECT code, reason, queue, body, status, times_seen FROM quarantine WHERE id > %s", last
    )


def last_row(place: Place) -> int:
    """The id of the last quarantine row."""
    return int(value(place.database, "SELECT coalesce(max(id), 0) FROM quarantine"))


@pytest.mark.parametrize("name", POISON)
def test_poison_is_kept_whole_with_its_reason_and_its_neighbours_are_applied_in_order(name: str, place: Place) -> None:
    poison = POISON[name]
    number = next(_numbers)
    last = last_row(place)
    applied, quarantined = place.counts()
    good = [task("credits.consume", f"{side}-{number}", {"account": ACCOUNT, "feature": "export"})
            for side in ("before", "after")]  # fmt: skip
    place.push(good[0], poison.payload, good[1])
    eventually(lambda: place.counts() == (applied + 2, quarantined + 1), 4, "two applied, one in quarantine")
    ((code, reason, queue, kept, status, times_seen),) = quarantined_after(place, last)
    assert (code, queue, status, times_seen) == (poison.code, LANE, "open", 1)
    assert kept == poison.kept
    assert len(reason.split()) > 3
    assert poison.says in reason
    assert rows(
        place.database,
        "SELECT operation, status FROM operations WHERE operation LIKE %s ORDER BY number",
        f"%-{number}",
    ) == [(f"before-{number}", "applied"), (f"after-{number}", "applied")]
    assert place.worker.running


def test_a_batch_in_a_batch_fails_alone(place: Place) -> None:
    inner = {"operations": [MEMBER]}
    members = [
        ["credits.consume", "outer-1", {"account": ACCOUNT, "feature": "export"}],
        ["credits.batch", "inner", inner],
        ["credits.consume", "outer-2", {"account": ACCOUNT, "feature": "export"}],
    ]
    last = last_row(place)
    applied, quarantined = place.counts()
    place.push(task("credits.batch", "outer", {"v": 1, "operations": members}))
    eventually(lambda: place.counts() == (applied + 2, quarantined + 1))
    ((code, _, queue, kept, _, _),) = quarantined_after(place, last)
    assert (code, queue) == (Code.UNKNOWN_OPERATION, LANE)
    assert json.dumps(inner).encode() in kept


def test_a_member_of_a_batch_under_a_reserved_id_fails_alone(place: Place) -> None:
    taken = receiving_id("bob", "gift")
    members = [["credits.consume", identity, {"account": ACCOUNT, "feature": "export"}] for identity in ("own", taken)]
    last = last_row(place)
    applied, quarantined = place.counts()
    place.push(task("credits.batch", "reserved", {"v": 1, "operations": members}))
    eventually(lambda: place.counts() == (applied + 1, quarantined + 1))
    ((code, reason, *_),) = quarantined_after(place, last)
    assert code == INVALID
    assert "derived" in reason


def test_poison_delivered_again_is_the_same_row_seen_once_more(place: Place) -> None:
    last = last_row(place)
    payload = wrapped(b"seen before", {**PACKING, "id": "again"})
    _, quarantined = place.counts()
    place.push(payload, payload)
    place.push(payload)
    eventually(lambda: place.counts()[1] == quarantined + 3)
    ((_, _, _, kept, _, times_seen),) = quarantined_after(place, last)
    assert (kept, times_seen) == (b"seen before", 3)


def test_a_compressed_message_is_read(place: Place) -> None:
    applied, quarantined = place.counts()
    packed = zlib.compress(arguments_body(GOOD))
    place.push(wrapped(packed, {**PACKING, "id": "compressed", "compression": "application/x-gzip"}))
    eventually(lambda: place.counts() == (applied + 1, quarantined))


def test_a_message_whose_headers_are_nested_deep_is_applied_or_kept(place: Place) -> None:
    applied, quarantined = place.counts()
    deep = json.loads(DEEP)
    place.push(
        wrapped(arguments_body(GOOD), {**PACKING, "id": "deep", "baggage": deep}),
        wrapped(b"nothing", {**PACKING, "id": "deep", "baggage": deep}),
    )
    eventually(lambda: sum(place.counts()) == applied + quarantined + 2)


def test_callbacks_that_ride_on_a_message_are_never_called(place: Place) -> None:
    applied, quarantined = place.counts()
    follow = {"task": "credits.consume", "args": [], "kwargs": {"account": ACCOUNT, "amount": 1},
              "options": {"queue": "elsewhere", "task_id": "follower"}}  # fmt: skip
    embed = json.dumps({"callbacks": [follow], "errbacks": [follow], "chain": [follow], "chord": follow})
    place.push(wrapped(f"[[],{GOOD},{embed}]", {**PACKING, "id": "leader"}))
    eventually(lambda: sum(place.counts()) == applied + quarantined + 1)
    place.push(task("credits.consume", "after the leader", {"account": ACCOUNT, "feature": "export"}))
    eventually(lambda: sum(place.counts()) == applied + quarantined + 2)
    assert place.store.exists("elsewhere") == 0
    assert value(place.database, "SELECT count(*) FROM operations WHERE operation = 'follower'") == 0


def test_a_message_made_by_hand_in_another_language_is_applied_and_its_answer_read_from_redis(place: Place) -> None:
    content = base64.b64encode(b'[[],{"account":"alice","feature":"image","quantity":8},{}]').decode()
    place.push(
        b'{"body":"%s","content-type":"application/json","content-encoding":"utf-8",'
        b'"headers":{"lang":"go","task":"credits.consume","id":"by-hand"},'
        b'"properties":{"body_encoding":"base64","delivery_tag":"1"}}' % content.encode()
    )
    meta = place.answer("by-hand")
    assert (meta["status"], meta["task_id"]) == ("SUCCESS", "by-hand")
    assert meta["result"]["status"] == "applied"
    assert (meta["result"]["id"], meta["result"]["charged"]) == ("by-hand", "1")
    assert set(meta["result"]) <= set(Result.__struct_fields__)
    assert 0 < place.store.ttl("celery-task-meta-by-hand") <= 24 * 3600


def test_a_sender_without_our_client_is_told_why_its_message_was_refused(place: Place) -> None:
    place.push(wrapped(arguments_body('{"account":"alice","amount":1.5}'), {**PACKING, "id": "refused-by-hand"}))
    meta = place.answer("refused-by-hand")
    assert meta["status"] == "FAILURE"
    assert meta["result"]["exc_type"] == "QuarantinedError"
    assert meta["result"]["exc_message"][0].startswith("invalid_message: ")


def random_list(random: Random) -> list[bytes]:
    """A list of messages: good ones, poison of every kind, noise, and good ones with a few bytes changed."""
    payloads = []
    small = [poison.payload for poison in POISON.values() if len(poison.payload) < 10_000]
    for _ in range(random.randint(1, 40)):
        good = task("credits.consume", f"random-{next(_numbers)}", {"account": ACCOUNT, "feature": "export"})
        kind = random.randrange(6)
        if kind == 0:
            good = random.choice(small)
        elif kind == 1:
            good = random.randbytes(random.randint(0, 50))
        elif kind == 2:
            changed = bytearray(good)
            for _ in range(random.randint(1, 3)):
                changed[random.randrange(len(changed))] = random.randrange(256)
            good = bytes(changed)
        elif kind == 3:
            good = good[: random.randrange(len(good))]
        payloads.append(good)
    return payloads


def test_of_any_list_of_messages_each_is_applied_or_in_quarantine(place: Place) -> None:
    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**64))
    def all_arrive(seed: int) -> None:
        payloads = random_list(Random(seed))
        before = sum(place.counts())
        place.push(*payloads)
        eventually(lambda: sum(place.counts()) == before + len(payloads), 10, "each is somewhere")
        assert place.worker.running

    all_arrive()
