"""What the ways out of a notice have in common: what there is to tell, how an attempt may fail, and a time limit."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

import msgspec

from creditlane.inbox import Advice

REST_SECONDS = 60.0
"""How long a channel that is away is left alone; then one delivery tries it."""


class Told(msgspec.Struct, kw_only=True, frozen=True):
    """A notice, and whom it is for."""

    account: str
    key: str
    kind: str
    at: datetime
    details: dict[str, Any]
    email: str | None
    locale: str | None
    timezone: str | None
    advice: Advice | None = None

    @property
    def id(self) -> str:
        """What a receiver knows it by, however often it comes."""
        return hashlib.sha256(f"{self.account}\0{self.key}".encode()).hexdigest()[:32]


class DeliveryError(Exception):
    """A notice did not go out; it is tried again later."""


class ChannelAwayError(DeliveryError):
    """None would go out by this channel at present: it is left alone for a while."""


class UndeliverableError(DeliveryError):
    """This one will never go out: it is parked at once."""


class NoAddressError(DeliveryError):
    """The account has no address for this channel: there is nothing to do."""


class Rests:
    """Which channels are left alone, so that one that is away does not hold up the worker's other tasks.

    Of one process; safe to share among threads.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def admits(self, channel: str) -> bool:
        """Whether a delivery may try it: always, but of a channel that was away only one each :data:`REST_SECONDS`."""
        with self._lock:
            until = self._until.get(channel)
            now = time.monotonic()
            if until is not None and now < until:
                return False
            if until is not None:
                self._until[channel] = now + REST_SECONDS
            return True

    def begin(self, channel: str) -> None:
        """It is away."""
        with self._lock:
            self._until[channel] = time.monotonic() + REST_SECONDS

    def end(self, channel: str) -> None:
        """It took one."""
        with self._lock:
            self._until.pop(channel, None)


class Connected(Protocol):
    """A client of the standard library's, with its socket."""

    sock: Any


@contextmanager
def time_limit(connection: Connected, seconds: float) -> Iterator[None]:
    """End a connection after so many seconds, however little its peer says at a time.

    What is under way in the block then fails as on any connection that breaks.
    """

    def end() -> None:
        try:
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is over already

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def cause(error: BaseException) -> str:
    """What went wrong, for people: a class and the system's word, nothing that came over the network."""
    word = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {word}" if word else type(error).__name__
