"""Producers in processes of their own: each writes down what it is about to publish, then publishes it.

A publication that the broker does not confirm is repeated with the same id until it does, as the contract asks of
every producer. What is sent is random and comes from the seed alone, so that another process can send the same.

    CREDITLANE_BROKER_URL=… python -m tests.faults.producers SPEC.json
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from creditlane.client import CreditClient, _shown, checked, task_message
from creditlane.errors import BrokerUnavailableError, UnsentError
from creditlane.lanes import lane_of

Operation = tuple[str, str, str, dict[str, Any]]
"""Task name, account, id, arguments as on the wire."""

PATIENCE_SECONDS = 240.0
"""How long a producer goes on sending one message to a broker that does not confirm it."""

PAUSE_SECONDS = 0.2
"""Between two attempts."""

REMEMBERED = 30
"""Charges and holds of an account that later operations may refer to."""


class Spec(msgspec.Struct, kw_only=True):
    """What one producer does."""

    name: str
    seed: str
    file: str
    """Where it writes down what it publishes."""
    after: str = ""
    """Goes on where the producer of this name has ended: what it sends comes after all of that."""
    lanes: int
    accounts: list[str] = []
    count: int = 0
    """Operations to send; 0 for as many as come until it is stopped."""
    per_second: float = 0.0
    """How fast it sends at the most; 0 for as fast as it can."""
    burst: float = 0.15
    """The share of its messages that are batches of a buffer."""
    stop: str = ""
    """It ends when this file is there."""
    go: str = ""
    """It waits for this file before it begins."""
    ids_of: str = ""
    """Sends the operations of the producer of this name, with their ids: it must have the same seed."""
    share: float = 1.0
    """The share of the operations that it sends."""
    altered: float = 0.0
    """The share of what it sends that has other content under the same id."""
    operations: list[Operation] = []
    """What to send instead of random operations."""
    threads: int = 1
    """How many threads send those operations, each every n-th."""
    version: bool = False
    """Whether every message names the contract's version, and its defaults, explicitly."""


class Notes:
    """A producer's file: one line for each publication, written before it."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, *lines: dict[str, Any]) -> None:
        """Append lines; they are in the file when this returns."""
        with self._lock:
            self._stream.write("".join(json.dumps(line) + "\n" for line in lines))
            self._stream.flush()

    def sent(self, producer: str, *operations: Operation, replies: Sequence[str | None] = ()) -> None:
        """Note operations that are about to be published."""
        self.write(
            *(
                {"producer": producer, "name": name, "account": account, "id": id, "arguments": arguments,
                 "reply": replies[place] if replies else None}
                for place, (name, account, id, arguments) in enumerate(operations)
            )
        )  # fmt: skip

    def poison(self, label: str, queue: str, kept: bytes, code: str) -> None:
        """Note a message that must end in quarantine."""
        self.write({"poison": label, "queue": queue, "digest": sha256(kept).hexdigest(), "code": code})

    def swept(self) -> None:
        """Note that schedules settle idle accounts from now on."""
        self.write({"swept": True})

    def sold(self, purchase: str, account: str, credits: str, paid_minor: int, returned_minor: int = 0) -> None:
        """Note what a provider has sold, before anybody is told of it.

        :param credits: as the catalog has them, a decimal number.
        :param returned_minor: what of the money was given back.
        """
        self.write({"sold": purchase, "account": account, "credits": credits, "paid_minor": paid_minor,
                    "returned_minor": returned_minor})  # fmt: skip

    def refused(self, error: Exception) -> None:
        """Note that the broker did not confirm; the same is published again."""
        self.write({"refused": type(error).__name__})

    def done(self) -> None:
        """Note that everything noted was confirmed."""
        self.write({"done": True})
        self._stream.close()


class Client(CreditClient):
    """The client as it is, but one that asks for an answer without waiting for it: it is looked up in the end."""

    def ask(self, operation: Operation, reply: str) -> None:
        """Send an operation.

        :param reply: the name under which its answer is wanted.
        :raises BrokerUnavailableError: when the broker does not confirm it.
        """
        name, account, id, arguments = operation
        encoded = checked(name, id, arguments)
        lane = lane_of(account, self.lanes)
        self._sender.send([task_message(name, id, lane, encoded, _shown(arguments), reply)])


# --- What is sent ------------------------------------------------------------------------------------


def credits(random: Random, most: int) -> str:
    """An amount of credits, more than none, as on the wire."""
    whole, fraction = random.randrange(most), random.choice(("", "", ".5", ".25", ".125", ".000001", ".3"))
    return f"{whole}{fraction}" if whole or fraction else "1"


def load(spec: Spec) -> Iterator[Operation]:
    """Random operations of all kinds: most are applied, some refused, some meet credits that expire meanwhile."""
    random = Random(f"{spec.seed} {spec.ids_of or spec.name}")
    charges: dict[str, list[str]] = {}
    holds: dict[str, list[str]] = {}
    opened: set[str] = set()
    number = 0
    while True:
        number += 1
        account = random.choice(spec.accounts)
        id = f"{spec.ids_of or spec.name}-{number}"
        kind = random.choices(
            ("consume", "grant", "hold", "capture", "release", "refund", "adjust", "revoke", "settle", "open"),
            (50, 7, 10, 8, 4, 8, 4, 2, 4, 1),
        )[0]
        if account not in opened and random.random() < 0.9:
            kind = "open"
        said: dict[str, Any] = {"account": account}
        if kind == "open":
            opened.add(account)
            said |= random.choice(({}, {}, {"kind": "pool"}, {"email": "a@b.example", "locale": "fr", "kind": "lead"}))
        elif kind == "grant":
            said |= {"amount": credits(random, 40), "source": random.choice(("pack", "bonus", "promo"))}
            said |= random.choice(
                ({}, {}, {"expires_in": random.randint(1, 20)}, {"priority": random.randint(0, 90)},
                 {"features": ["image", "context"]}, {"purchase": f"purchase-{random.randint(1, 3)}"},
                 {"unit_price": {"minor": 499, "currency": "EUR", "per": "25"}, "reason": "a pack"})
            )  # fmt: skip
        elif kind in ("consume", "hold"):
            said |= random.choice(
                ({"feature": "regeneration"}, {"feature": "context"}, {"feature": "save_collection"},
                 {"feature": "image", "quantity": str(random.randint(1, 24))}, {"feature": "nothing"},
                 {"amount": credits(random, 6)}, {"amount": credits(random, 6)}, {"feature": "export"})
            )  # fmt: skip
            if kind == "hold":
                said |= random.choice(({}, {"ttl": random.randint(1, 20)}))
                holds.setdefault(account, []).append(id)
            else:
                said |= random.choice(({}, {}, {"partial": True}, {"metadata": {"job": number}, "member": "m-1"}))
                charges.setdefault(account, []).append(id)
        elif kind in ("capture", "release"):
            said["hold"] = random.choice(holds.get(account, ["none"])[-REMEMBERED:])
            if kind == "capture":
                said |= random.choice(({}, {"amount": credits(random, 8)}, {"amount": "0"}))
                charges.setdefault(account, []).append(id)
        elif kind == "refund":
            said["operation"] = random.choice(charges.get(account, ["none"])[-REMEMBERED:])
            said |= random.choice(({}, {"amount": credits(random, 2)}))
        elif kind == "adjust":
            sign = random.choice(("", "-"))
            said |= {"amount": sign + credits(random, 10), "actor": "faults", "reason": "to see"}
        elif kind == "revoke":
            said |= random.choice(({"grant": random.randint(1, 5)}, {"purchase": f"purchase-{random.randint(1, 3)}"}))
            said |= random.choice(({}, {"amount": credits(random, 5)}))
        yield f"credits.{kind}", account, id, said


def altered(operation: Operation, random: Random) -> Operation:
    """The same id with other content."""
    name, account, id, _ = operation
    other = random.choice(("credits.consume", "credits.adjust"))
    if other == "credits.consume":
        return other, account, id, {"account": account, "amount": "0.000007", "metadata": {"altered": name}}
    return other, account, id, {"account": account, "amount": "0.000003", "actor": "faults", "reason": "altered"}


def explicit(operation: Operation) -> Operation:
    """The same operation with its version and its defaults spelt out, as an older producer may write it."""
    name, account, id, said = operation
    said = {**said, "v": 1}
    if name == "credits.consume":
        said.setdefault("partial", False)
        if "feature" in said:
            said.setdefault("quantity", "1")
    elif name == "credits.hold":
        said.setdefault("ttl", 900)
    elif name == "credits.open":
        said.setdefault("kind", "user")
    return name, account, id, said


# --- Sending -----------------------------------------------------------------------------------------


class Producer:
    """Sends what its spec says."""

    def __init__(self, spec: Spec, url: str, result_url: str) -> None:
        self.spec = spec
        self.notes = Notes(Path(spec.file))
        self.url, self.result_url = url, result_url
        self.stop = Path(spec.stop) if spec.stop else None
        self.name = spec.after or spec.name

    def run(self) -> None:
        """Send everything; the file says so in the end."""
        if self.spec.go:
            go = Path(self.spec.go)
            with self.client() as client:
                client.backlog("lane.000")  # connected before it begins
            while not go.exists():
                time.sleep(0.005)
        if self.spec.operations:
            self.send_listed()
        else:
            self.send_load()
        self.notes.done()

    def client(self) -> Client:
        """A client of our own kind."""
        return Client(self.url, lanes=self.spec.lanes, result_url=self.result_url)

    def send_load(self) -> None:
        """Send random operations, one by one and in bursts."""
        random = Random(f"{self.spec.seed} {self.spec.name} sending")
        began, sent = time.monotonic(), 0
        with self.client() as client:
            wanted = self.wanted(random)
            while not (self.stop is not None and self.stop.exists()):
                group = []
                size = random.randint(2, 40) if random.random() < self.spec.burst else 1
                for operation in wanted:
                    group.append(operation)
                    if len(group) >= size:
                        break
                if not group:
                    break
                if size == 1:
                    self.send_one(client, self.name, group[0], f"{self.spec.name}-{sent}")
                else:
                    self.send_burst(client, group)
                sent += len(group)
                if self.spec.per_second:
                    time.sleep(max(0.0, began + sent / self.spec.per_second - time.monotonic()))

    def wanted(self, random: Random) -> Iterator[Operation]:
        """The operations that are this producer's to send, in order."""
        for number, operation in enumerate(load(self.spec)):
            if self.spec.count and number >= self.spec.count:
                return
            if random.random() >= self.spec.share:
                continue
            if random.random() < self.spec.altered:
                yield altered(operation, random)
            elif self.spec.version and number % 2:
                yield explicit(operation)
            else:
                yield operation

    def send_listed(self) -> None:
        """Send the operations of the spec, dealt out to threads."""
        with self.client() as client:
            threads = [
                threading.Thread(target=self.send_every, args=(client, number), daemon=True)
                for number in range(self.spec.threads)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def send_every(self, client: Client, thread: int) -> None:
        """Send one thread's share of the listed operations, as a producer of its own."""
        for number, operation in enumerate(self.spec.operations[thread :: self.spec.threads]):
            self.send_one(client, f"{self.name}.{thread}", operation, f"{self.spec.name}.{thread}-{number}")

    def send_one(self, client: Client, producer: str, operation: Operation, reply: str) -> None:
        """Publish one operation until the broker confirms it."""
        self.notes.sent(producer, operation, replies=[reply])
        self.until_confirmed(lambda: client.ask(operation, reply))

    def send_burst(self, client: Client, group: list[Operation]) -> None:
        """Publish operations through a buffer; what it could not send is sent again, in order."""
        self.notes.sent(self.name, *group)
        left = [(name, id, arguments) for name, _, id, arguments in group]

        def publish() -> None:
            sending, left[:] = left[:], []
            try:
                with client.buffer(linger_ms=5) as buffer:
                    while sending:
                        buffer.submit(*sending[0])
                        sending.pop(0)
            except UnsentError as error:
                left.extend((name, id, json.loads(arguments)) for name, id, arguments in error.operations)
                left.extend(sending)
                raise

        self.until_confirmed(publish)

    def until_confirmed(self, publish: Any) -> None:
        """Repeat a publication while the broker does not confirm it.

        :raises BrokerUnavailableError: when it does not for :data:`PATIENCE_SECONDS`; the file then lacks its end.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                publish()
            except BrokerUnavailableError as error:
                self.notes.refused(error)
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_SECONDS)
            else:
                return


def main() -> None:
    """Send what the spec says to the broker of ``CREDITLANE_BROKER_URL``."""
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Spec)
    url = os.environ["CREDITLANE_BROKER_URL"]
    Producer(spec, url, os.environ.get("CREDITLANE_RESULT_URL", url)).run()


if __name__ == "__main__":
    main()
