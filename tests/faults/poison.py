"""Poison: messages that no worker can apply, as they come from a client in another language, or from no client at all.

Every one is unlike every other, by a mark of its own, so that each can be found again in quarantine.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from tests.faults.stack import Message

EMBED = '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'
MALFORMED, INVALID, UNKNOWN, NEWER = "malformed", "invalid_message", "unknown_operation", "unknown_version"


class Poison(NamedTuple):
    """A message, or a raw payload that is none, and what must be kept of it."""

    label: str
    message: Message | bytes
    kept: bytes
    code: str


def body_of(arguments: str | bytes) -> bytes:
    """The body of a task of protocol 2 around keyword arguments that are JSON already."""
    raw = arguments.encode() if isinstance(arguments, str) else arguments
    return b"[[]," + raw + b"," + EMBED.encode() + b"]"


def by_hand(name: str, id: str, arguments: dict[str, Any]) -> Message:
    """A good message, put together without any client of ours."""
    return Message(body=body_of(json.dumps(arguments)), headers={"lang": "go", "task": name, "id": id})


def _said(label: str, arguments: str | bytes, code: str = INVALID, **headers: Any) -> Callable[[str], Poison]:
    def make(mark: str) -> Poison:
        raw = arguments.encode() if isinstance(arguments, str) else arguments
        body = body_of(raw.replace(b"MARK", mark.encode()))
        named = {"lang": "go", "task": "credits.consume", "id": mark, **headers}
        return Poison(label, Message(body=body, headers={k: v for k, v in named.items() if v is not None}), body, code)

    return make


def _amount(label: str, written: str, code: str = INVALID) -> Callable[[str], Poison]:
    return _said(label, f'{{"account":"MARK","amount":{written}}}', code)


def _body(label: str, body: bytes, code: str, **parts: Any) -> Callable[[str], Poison]:
    def make(mark: str) -> Poison:
        marked = body.replace(b"MARK", mark.encode())
        named = {"headers": {"lang": "go", "task": "credits.consume", "id": mark}, **parts}
        return Poison(label, Message(body=marked, **named), marked, code)

    return make


def _raw(label: str, payload: bytes) -> Callable[[str], Poison]:
    def make(mark: str) -> Poison:
        marked = payload.replace(b"MARK", mark.encode())
        return Poison(label, marked, marked, MALFORMED)

    return make


GOOD = '{"account":"MARK","feature":"export"}'

MESSAGES: tuple[Callable[[str], Poison], ...] = (
    _body("a body of broken JSON", b'[[], {"account": "MARK", ', MALFORMED),
    _body("a body that is the arguments", GOOD.encode(), MALFORMED),
    _body("a body of invalid UTF-8", body_of(b'{"account":"MARK\xff\xfe","feature":"export"}'), INVALID),
    _body("pickle", pickle.dumps(["MARK", {}, {}], 0), MALFORMED, content_type="application/x-python-serialize"),
    _body("no headers", body_of(GOOD), MALFORMED, headers={}),
    _body("positional arguments", b'[["MARK"],{},{}]', INVALID),
    _said("an account that is a number", '{"account":5,"feature":"MARK"}'),
    _said("a quantity that is an array", '{"account":"MARK","feature":"export","quantity":[1]}'),
    _said("an argument too many", '{"account":"MARK","feature":"export","fast":true}'),
    _said("an argument too few", '{"account":"MARK"}'),
    _amount("NaN", "NaN", MALFORMED),
    _amount("infinity", "-Infinity", MALFORMED),
    _amount("NaN as text", '"NaN"'),
    _amount("a float", "0.1"),
    _amount("an exponent", '"1e3"'),
    _amount("a negative amount", "-1"),
    _amount("zero", '"0"'),
    _amount("2^63", str(2**63)),
    _amount("an integer of six hundred digits", "9" * 600),
    _amount("six hundred decimals", f'"0.{"3" * 600}"'),
    _said("1 MB", '{"account":"MARK","feature":"export","metadata":{"x":"' + "y" * 1_000_000 + '"}}'),
    _said("more than a message may be", '{"account":"MARK","feature":"export","metadata":{"x":"' + "y" * 2**20 + '"}}'),
    _said("a NUL", '{"account":"MARK\\u0000","feature":"export"}'),
    _said("a NUL byte", b'{"account":"MARK\x00","feature":"export"}', MALFORMED),
    _said("a lone surrogate", '{"account":"MARK\\ud800","feature":"export"}', MALFORMED),
    _said("nesting without end", '{"account":"MARK","metadata":' + "[" * 100_000, MALFORMED),
    _said("an unknown task", GOOD, UNKNOWN, task="credits.nothing"),
    _said("a task of somebody else", GOOD, UNKNOWN, task="celery.backend_cleanup"),
    _said("no id", GOOD, INVALID, id=None),
    _said("an eta", GOOD, INVALID, eta="2030-01-01T00:00:00+00:00"),
    _said("version 99", '{"account":"MARK","feature":"export","v":99}', NEWER),
    _said("version 99 of something unknown", '{"v":99,"whatever":"MARK"}', NEWER),
    _said("version 0", '{"account":"MARK","feature":"export","v":0}'),
    _said("an empty batch", '{"v":1,"operations":[]}', INVALID, task="credits.batch", parent_id="MARK"),
)
"""What any broker can carry."""

PAYLOADS: tuple[Callable[[str], Poison], ...] = (
    _raw("no JSON at all", b"MARK"),
    _raw("JSON cut off", b'{"body": "MARK"'),
    _raw("NUL bytes", b"\x00\x00MARK"),
    _raw("invalid UTF-8", b'{"body": "MARK\xff\xfe\x80", "properties": {"delivery_tag": "x"}}'),
    _raw("an array", b'["MARK"]'),
    _raw("without properties", b'{"body": "MARK"}'),
    _raw("headers that are text", b'{"body": "MARK", "headers": "text", "properties": {"delivery_tag": "x"}}'),
    _raw("a pickled payload", pickle.dumps("MARK", 0)),
)
"""What only a broker can carry that takes anything: a Redis list."""


def poisons(random: Random, mark: str, payloads: bool) -> list[Poison]:
    """Every poison once, in random order.

    :param mark: what makes them unlike any others.
    :param payloads: whether the broker takes what is no message.
    """
    makers = [*MESSAGES, *(PAYLOADS if payloads else ())]
    random.shuffle(makers)
    return [make(f"{mark}-{number}") for number, make in enumerate(makers)]
