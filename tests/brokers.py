"""Which brokers the tests have: Redis always, RabbitMQ where it is installed."""

from __future__ import annotations

import os

import pytest

from scripts.rabbitmq import is_installed

REQUIRE = "CREDITLANE_REQUIRE_BROKERS"
"""Set in the environment, a test that needs RabbitMQ fails where there is none, instead of being skipped."""


def need_rabbitmq() -> None:
    """Skip the test where RabbitMQ is not installed; fail it when every broker is required."""
    if is_installed():
        return
    sentence = "needs RabbitMQ, which is not installed here (on Debian and Ubuntu: apt install rabbitmq-server)"
    if os.environ.get(REQUIRE):
        pytest.fail(f"{sentence}, and {REQUIRE} is set", pytrace=False)
    pytest.skip(sentence)
