"""The producer's check: what was found to fit is not looked at again, and nothing passes that a worker would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from creditlane import client
from creditlane.client import checked
from creditlane.contract import ContractError, check_id, decode_message

CHARGES = sorted(client._known)

texts = st.sampled_from(
    ["a", "user_1", "é", "", '"', "\\", '","feature":"', "a\n", "\x7f", "\u2028", "x" * 129, "\ud800"]
)
values: st.SearchStrategy[object] = st.sampled_from(
    [0, 1, 1.0, True, False, "1", "0.5", "-1", None, 10**13, "x", Decimal(1), [], {}, {"a": 1}]
)
names = st.sampled_from(["feature", "quantity", "amount", "member", "partial", "ttl", "metadata", "v", "more"])


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Begin with nothing that was found before."""
    yield
    for known in client._known.values():
        known.clear()


def whole(name: str, id: str, arguments: dict[str, Any]) -> bytes | None:
    """The check without what is known: all that goes to the worker, as the worker reads it."""
    try:
        check_id(id)
        encoded = msgspec.json.encode({key: value for key, value in arguments.items() if value is not None})
        decode_message(name, encoded)
    except (TypeError, ValueError):
        return None
    return encoded


def short(name: str, id: str, arguments: dict[str, Any]) -> bytes | None:
    try:
        return checked(name, id, arguments)
    except ContractError:
        return None


@given(
    st.sampled_from([*CHARGES, "credits.capture", "credits.transfer"]),
    st.lists(st.tuples(texts, texts, st.dictionaries(names, values | texts, max_size=3)), min_size=1, max_size=8),
)
@example("credits.consume", [("a", "a", {"feature": "a", "partial": one}) for one in (True, 1, 1.0, "1", False, 0)])
@example("credits.hold", [("a", account, {"amount": "1"}) for account in ("a", "é", "", '"', "a\n", "\ud800")])
@settings(deadline=None, max_examples=300)
def test_what_passes_is_what_a_worker_takes_however_often_it_comes(
    name: str, calls: list[tuple[str, str, dict[str, Any]]]
) -> None:
    for id, account, more in [*calls, *calls]:
        for arguments in ({"account": account, **more}, {**more, "account": account}, more):
            assert short(name, id, arguments) == whole(name, id, arguments)


def test_what_repeats_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(client, "decode_message", lambda _, encoded: decoded.append(encoded))
    for number in range(100):
        checked("credits.consume", f"c-{number}", {"account": f"user_{number}", "feature": "image", "quantity": "2"})
    assert decoded == [b'{"account":"user_0","feature":"image","quantity":"2"}']


def test_what_is_known_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "KNOWN", 10)
    for names in client._known.values():  # what other tests left
        names.clear()
    for number in range(100):
        checked("credits.consume", "c", {"account": "alice", "amount": number + 1})
        assert 1 <= len(client._known["credits.consume"]) <= 10
    checked("credits.hold", "h", {"account": "alice", "amount": 1, "metadata": {"x": "y" * client.KNOWN_BYTES}})
    assert client._known["credits.hold"] == set()
