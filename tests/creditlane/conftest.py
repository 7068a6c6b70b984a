"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scripts.embedded import Redis, free_port, temporary_directory


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis that a test may stop."""
    with temporary_directory() as directory:
        server = Redis(directory / "redis", free_port(), appendfsync="always").start()
        yield server
        server.stop()
