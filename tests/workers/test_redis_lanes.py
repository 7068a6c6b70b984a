"""Lanes on a real Redis: taking, acknowledging, taking over, waiting, and the fence around an owner of before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu import Connection, Queue
from kombu.asynchronous import Hub

from creditlane.lanes import lane_name
from tests.support import ROOT, eventually
from workers.redis_lanes import MAX_FETCH_BYTES, UNREADABLE, Channel, FencedError, RedisLanes, keys_of

TRANSPORT = "workers.redis_lanes:Transport"
LANE, SECOND, THIRD = lane_name(0), lane_name(1), lane_name(2)


def body_of(got: Any) -> Any:
    """The text of a message; of one that is unreadable, its bytes."""
    return got.body if got.content_type == UNREADABLE else got.body.decode()


def message(text: str) -> bytes:
    """A kombu message with a text for its body."""
    return json.dumps(
        {
            "body": text,
            "content-type": "text/plain",
            "content-encoding": "utf-8",
            "headers": {},
            "properties": {"delivery_tag": text[:20]},
        }
    ).encode()


class Owner:
    """One process's channel on the lanes, and what it was given."""

    def __init__(self, url: str) -> None:
        self.connection = Connection(url, transport=TRANSPORT)
        self.channel: Channel = self.connection.channel()
        self.got: list[Any] = []

    def take(self, *lanes: str) -> None:
        """Begin to consume lanes."""
        for lane in lanes:
            self.channel.basic_consume(lane, False, self.got.append, f"tag of {lane}")

    def fetch(self, count: int = 1000) -> list[Any]:
        """The bodies that one fetch gives."""
        before = len(self.got)
        assert self.channel.fetch(count) == len(self.got) - before
        return [body_of(got) for got in self.got[before:]]


@pytest.fixture
def owners(broker_url: str) -> Iterator[list[Owner]]:
    """Two channels on connections of their own."""
    made = [Owner(broker_url), Owner(broker_url)]
    yield made
    for owner in made:
        owner.channel.close()
        owner.connection.release()


@pytest.fixture
def store(broker_url: str) -> Iterator[redis.Redis]:
    """A plain client, to look at the keys."""
    with redis.Redis.from_url(broker_url) as client:
        yield client


def push(store: redis.Redis, lane: str, *texts: str) -> None:
    """Put messages into a lane, in order."""
    store.lpush(lane, *map(message, texts))


def texts(store: redis.Redis, key: str) -> list[str]:
    """The bodies in a list, the oldest first."""
    return [json.loads(payload)["body"] for payload in reversed(store.lrange(key, 0, -1))]


def unacked(lane: str) -> str:
    """The key of a lane's unacknowledged list."""
    return keys_of(lane)[1]


def test_what_a_fetch_returns_is_unacknowledged_and_no_more_in_the_lane(
    owners: list[Owner], store: redis.Redis
) -> None:
    owner, _ = owners
    push(store, LANE, "1", "2", "3")
    owner.take(LANE)
    assert owner.fetch(2) == ["1", "2"]
    assert (texts(store, LANE), texts(store, unacked(LANE))) == (["3"], ["1", "2"])
    assert owner.fetch() == ["3"]
    assert owner.fetch() == []
    assert (texts(store, LANE), texts(store, unacked(LANE))) == ([], ["1", "2", "3"])
    assert [got.delivery_info["routing_key"] for got in owner.got] == [LANE] * 3


def test_taking_over_puts_what_was_unacknowledged_back_at_the_head_in_order(
    owners: list[Owner], store: redis.Redis
) -> None:
    dead, heir = owners
    push(store, LANE, *map(str, range(10)))
    dead.take(LANE)
    dead.fetch(6)
    dead.channel.acknowledge({LANE: 2})
    push(store, LANE, "10")
    heir.take(LANE)
    assert store.exists(unacked(LANE)) == 0
    assert heir.fetch() == [str(number) for number in range(2, 11)]


def test_taking_over_twice_or_an_empty_lane_changes_nothing(owners: list[Owner], store: redis.Redis) -> None:
    first, second = owners
    first.take(LANE)
    assert first.fetch() == []
    push(store, LANE, "1", "2")
    first.fetch(1)
    second.take(LANE)
    second.take(LANE)
    assert second.fetch() == ["1", "2"]


def test_acknowledging_drops_exactly_the_oldest_of_each_lane(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    push(store, LANE, "1", "2", "3", "4")
    push(store, SECOND, "a", "b")
    owner.take(LANE, SECOND, THIRD)
    owner.fetch()
    owner.channel.acknowledge({LANE: 3, SECOND: 1})
    assert (texts(store, unacked(LANE)), texts(store, unacked(SECOND))) == (["4"], ["b"])
    owner.channel.acknowledge({LANE: 1, SECOND: 1})
    assert store.exists(unacked(LANE), unacked(SECOND), LANE, SECOND) == 0


def consumer_of(owner: Owner) -> Any:
    """As much of Celery's consumer as is asked for here."""
    return SimpleNamespace(task_consumer=SimpleNamespace(channel=owner.channel))


def test_the_consumer_acknowledges_by_the_lane_of_each_message(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    push(store, LANE, "1", "2")
    push(store, SECOND, "a")
    owner.take(LANE, SECOND)
    lanes = RedisLanes(consumer_of(owner), Hub(), lambda: 100, lambda step: step())
    lanes.poll()
    lanes.acknowledge(got for got in owner.got if got.body in (b"1", b"a"))
    assert (texts(store, unacked(LANE)), texts(store, unacked(SECOND))) == (["2"], [])
    lanes.acknowledge([])
    assert texts(store, unacked(LANE)) == ["2"]


def test_an_owner_of_before_can_neither_fetch_nor_acknowledge_nor_change_anything(
    owners: list[Owner], store: redis.Redis
) -> None:
    before, now = owners
    push(store, LANE, *map(str, range(6)))
    before.take(LANE)
    before.fetch(3)
    now.take(LANE)
    now.fetch(2)

    def everything() -> list[Any]:
        return [texts(store, LANE), texts(store, unacked(LANE)), store.get(keys_of(LANE)[2])]

    standing = everything()
    assert standing[:2] == [["2", "3", "4", "5"], ["0", "1"]]
    with pytest.raises(FencedError, match=LANE):
        before.channel.fetch(10)
    with pytest.raises(FencedError, match=LANE):
        before.channel.acknowledge({LANE: 1})
    assert everything() == standing
    assert len(before.got) == 3
    now.channel.acknowledge({LANE: 2})
    assert now.fetch() == ["2", "3", "4", "5"]


def test_a_fence_at_one_lane_leaves_the_acknowledgement_of_the_others(owners: list[Owner], store: redis.Redis) -> None:
    before, now = owners
    push(store, LANE, "1")
    push(store, SECOND, "a")
    before.take(LANE, SECOND)
    before.fetch()
    now.take(LANE)
    with pytest.raises(FencedError):
        before.channel.acknowledge({LANE: 1, SECOND: 1})
    assert texts(store, LANE) == ["1"]
    assert store.exists(unacked(SECOND)) == 0


def test_a_lane_given_up_keeps_what_is_unacknowledged_and_takes_no_acknowledgement(
    owners: list[Owner], store: redis.Redis
) -> None:
    leaving, heir = owners
    push(store, LANE, "1", "2")
    leaving.take(LANE)
    leaving.fetch(1)
    leaving.channel.basic_cancel(f"tag of {LANE}")
    assert leaving.fetch() == []
    with pytest.raises(FencedError):
        leaving.channel.acknowledge({LANE: 1})
    heir.take(LANE)
    assert heir.fetch() == ["1", "2"]


def test_a_fetch_takes_no_more_messages_than_asked_over_all_lanes(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    push(store, LANE, "1", "2", "3")
    push(store, SECOND, "a", "b", "c")
    owner.take(LANE, SECOND)
    assert owner.fetch(4) == ["1", "2", "3", "a"]
    assert texts(store, SECOND) == ["b", "c"]


def test_a_fetch_takes_no_more_bytes_than_allowed_and_one_message(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    sizes = MAX_FETCH_BYTES // 4
    push(store, LANE, *(f"{number}" * sizes for number in range(6)))
    push(store, SECOND, "later")
    owner.take(LANE, SECOND)
    assert [text[0] for text in owner.fetch()] == ["0", "1", "2", "3"]
    assert (store.llen(unacked(LANE)), store.llen(LANE), store.llen(SECOND)) == (4, 2, 1)
    assert [text[0] for text in owner.fetch()] == ["l", "4", "5"]


def test_a_busy_lane_does_not_starve_the_others(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    push(store, LANE, *map(str, range(100)))
    push(store, SECOND, "a")
    push(store, THIRD, "b")
    owner.take(LANE, SECOND, THIRD)
    assert owner.fetch(10) == [str(number) for number in range(10)]
    assert owner.fetch(10) == ["a", "b", *(str(number) for number in range(10, 18))]
    push(store, SECOND, *map(str, range(200, 300)))
    push(store, THIRD, "c")
    seen = [owner.fetch(10) for _ in range(3)]
    assert any("c" in texts for texts in seen)
    assert any("200" in texts for texts in seen)
    assert any("18" in texts for texts in seen)


def test_waiting_takes_nothing_and_wakes_when_something_comes(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    owner.take(LANE, SECOND)
    hub = Hub()
    woken: list[tuple[str, int]] = []
    owner.channel.wait(hub, lambda lane: woken.append((lane, store.llen(lane))))
    owner.channel.wait(hub, lambda lane: woken.append(("again", 0)))
    eventually(lambda: store.info("clients")["blocked_clients"] == 2)
    push(store, SECOND, "a", "b")
    loop = hub.create_loop()
    eventually(lambda: [next(loop), woken][1])
    assert woken == [(SECOND, 2)]
    assert texts(store, SECOND) == ["a", "b"]
    assert store.exists(unacked(SECOND)) == 0
    assert owner.fetch() == ["a", "b"]
    # The other lane waits on, and the woken one can be waited for anew.
    owner.channel.wait(hub, lambda lane: woken.append((lane, store.llen(lane))))
    push(store, SECOND, "c")
    push(store, LANE, "1")
    eventually(lambda: [next(loop), len(woken) == 3][1])
    assert sorted(woken[1:]) == [(LANE, 1), (SECOND, 1)]
    hub.close()


def test_a_poll_that_finds_nothing_waits_and_brings_what_comes_later(owners: list[Owner], store: redis.Redis) -> None:
    owner, _ = owners
    owner.take(LANE)
    hub = Hub()
    full = False
    lanes = RedisLanes(consumer_of(owner), hub, lambda: 0 if full else 10, lambda step: step())
    lanes.poll()
    push(store, LANE, "1")
    loop = hub.create_loop()
    eventually(lambda: [next(loop), owner.got][1])
    assert [got.body for got in owner.got] == [b"1"]
    full = True
    push(store, LANE, "2")
    lanes.poll()
    assert texts(store, LANE) == ["2"]
    hub.close()


def test_a_lane_that_is_waited_for_is_looked_into_again_when_a_wake_up_may_be_lost(
    owners: list[Owner], store: redis.Redis
) -> None:
    owner, _ = owners
    owner.take(LANE, SECOND)
    hub = Hub()
    lanes = RedisLanes(consumer_of(owner), hub, lambda: 10, lambda step: step())
    lanes.poll()
    # The loop does not turn: the wake-up stays on its way.
    push(store, LANE, "1")
    lanes.poll()
    assert owner.got == []
    lanes.check()
    lanes.poll()
    assert [got.body for got in owner.got] == [b"1"]
    hub.close()


def test_a_wait_ends_with_its_channel_and_leaves_no_client_blocked(broker_url: str, store: redis.Redis) -> None:
    owner = Owner(broker_url)
    owner.take(LANE, SECOND)
    hub = Hub()
    owner.channel.connection.loop = hub
    owner.channel.wait(hub, lambda lane: None)
    eventually(lambda: store.info("clients")["blocked_clients"] == 2)
    owner.channel.basic_cancel(f"tag of {LANE}")
    eventually(lambda: store.info("clients")["blocked_clients"] == 1)
    owner.channel.close()
    eventually(lambda: store.info("clients")["blocked_clients"] == 0)
    assert not hub.readers
    owner.connection.release()
    hub.close()
    push(store, LANE, "1")
    assert texts(store, LANE) == ["1"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"not JSON at all",
        b'{"body": "cut off',
        b"\xff\xfe\x80 no UTF-8",
        b"null",
        b"[]",
        b"42",
        b"{}",
        b'{"body": "x", "properties": 1}',
        b'{"body": "x", "properties": {}}',
        b'{"body": "x", "headers": "text", "properties": {"delivery_tag": "x"}}',
        b'{"body": "x", "properties": {"delivery_tag": "x", "body_encoding": "rot13"}}',
        b'{"body": "x", "properties": {"delivery_tag": "x", "delivery_info": "text"}}',
        b'{"body": "\\ud800", "properties": {"delivery_tag": "x"}}',
        b"[" * 100_000,
    ],
    ids=lambda payload: repr(payload[:70]),
)
def test_what_is_no_message_comes_through_in_its_turn_and_whole(
    payload: bytes, owners: list[Owner], store: redis.Redis
) -> None:
    owner, _ = owners
    push(store, LANE, "before")
    store.lpush(LANE, payload)
    push(store, LANE, "after")
    owner.take(LANE)
    assert owner.fetch() == ["before", payload, "after"]
    assert [got.content_type for got in owner.got] == ["text/plain", UNREADABLE, "text/plain"]
    assert owner.got[1].delivery_info["routing_key"] == LANE
    owner.channel.acknowledge({LANE: 3})
    assert store.exists(LANE, unacked(LANE)) == 0


DOOMED = f"""
import sys
from kombu import Connection
with Connection(sys.argv[1], transport={TRANSPORT!r}) as connection:
    channel = connection.channel()
    channel.basic_consume({LANE!r}, False, lambda message: None, "tag")
    fetched = 0
    while True:
        fetched += channel.fetch(7)
        if fetched >= 21 and fetched % 3 == 0:
            channel.acknowledge({{{LANE!r}: 1}})
            print("acknowledged", flush=True)
"""


@pytest.mark.parametrize("run", range(3))
def test_a_process_killed_while_it_fetches_loses_nothing_and_keeps_the_order(
    run: int, broker_url: str, owners: list[Owner], store: redis.Redis
) -> None:
    count = 3000
    push(store, LANE, *map(str, range(count)))
    process = subprocess.Popen([sys.executable, "-c", DOOMED, broker_url], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(1 + 20 * run):
        assert process.stdout.readline() == b"acknowledged\n"
    process.kill()
    process.wait(10)
    process.stdout.close()
    assert store.llen(unacked(LANE)) > 0
    left = texts(store, unacked(LANE)) + texts(store, LANE)
    assert left == [str(number) for number in range(count - len(left), count)]
    heir, _ = owners
    heir.take(LANE)
    assert heir.fetch(count) == left
    assert len(left) < count


def test_queues_that_are_no_lanes_go_the_ordinary_way(broker_url: str, store: redis.Redis) -> None:
    with Connection(broker_url, transport=TRANSPORT) as connection:
        with connection.SimpleQueue("other") as queue:
            queue.put({"number": 1})
            queue.put({"number": 2})
            first = queue.get(timeout=5)
            assert first.payload == {"number": 1}
            first.ack()
            second = queue.get(timeout=5)
            assert second.payload == {"number": 2}
            assert store.hlen("unacked") == 1
            second.ack()
        assert store.hlen("unacked") == 0
        assert store.keys("other:*") == []
        got: list[Any] = []
        with connection.Producer() as producer:
            producer.publish({"number": 3}, routing_key="plain")
        with connection.Consumer(
            Queue("plain", exchange="", routing_key="plain"),
            callbacks=[lambda body, received: got.append(body), lambda body, received: received.ack()],
        ):
            connection.drain_events(timeout=5)
        assert got == [{"number": 3}]
