"""Requests of Stripe's API: form fields as nested values, and refusals of parameters that the API has not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import stripe.params
import stripe.params.billing_portal
import stripe.params.checkout
from stripe import RequestOptions

from scripts.fake_stripe.objects import Json

_KEY = re.compile(r"[^\[\]]+|\[\]")
_PARAMETERS = re.compile(r"\b\w+Params\w+\b")


class RefusedError(Exception):
    """A request that Stripe answers with an error.

    :param status: of the answer.
    :param code: Stripe's own, where it has one.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None,
                 type: str = "invalid_request_error") -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        error = {"code": code, "message": message, "param": param, "type": type}
        self.body: Json = {"error": {key: value for key, value in error.items() if value is not None}}


def nested(fields: Iterable[tuple[str, str]]) -> Json:
    """Form fields such as ``line_items[0][price]``, as dictionaries and lists."""
    root: Json = {}
    for name, value in fields:
        at = root
        *path, last = _KEY.findall(name)
        for key in path:
            at = at.setdefault(key, {})
        at[str(len(at)) if last == "[]" else last] = value
    return {key: _lists(value) for key, value in root.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(key.isdigit() for key in value):
        return [_lists(value[key]) for key in sorted(value, key=int)]
    return {key: _lists(each) for key, each in value.items()}


def check_parameters(given: Mapping[str, Any], name: str) -> None:
    """Refuse parameters that stripe-python's own types do not have.

    :param name: of the type, below ``stripe.params``, such as ``checkout.SessionCreateParams``.
    :raises RefusedError: for the first unknown one, with its path.
    """
    space: Any = stripe.params
    *path, last = name.split(".")
    for each in path:
        space = getattr(space, each)
    _check(given, getattr(space, last), "")


def _check(given: Mapping[str, Any], kind: type, path: str) -> None:
    known = kind.__annotations__
    for name, value in given.items():
        where = f"{path}[{name}]" if path else name
        if name not in known or (not path and name in RequestOptions.__annotations__):
            raise RefusedError(400, f"Received unknown parameter: {where}", code="parameter_unknown", param=where)
        below = _PARAMETERS.search(repr(known[name]))
        if below is None:
            continue
        type = getattr(sys.modules[kind.__module__], below[0])
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, dict):
                _check(each, type, f"{where}[{index}]" if isinstance(value, list) else where)


def whole(given: Mapping[str, Any], name: str, *, least: int = 0) -> int | None:
    """A parameter that is a whole number; None where it is not given.

    :raises RefusedError: for another value, or one below ``least``.
    """
    text = given.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,15}", str(text)):
        raise RefusedError(400, f"Invalid integer: {text}", code="parameter_invalid_integer", param=name)
    if int(text) < least:
        raise RefusedError(400, f"{name} must be at least {least}", code="parameter_invalid_integer", param=name)
    return int(text)


def flag(given: Mapping[str, Any], name: str) -> bool:
    """A parameter that is true or false; false where it is not given.

    :raises RefusedError: for another value.
    """
    text = str(given.get(name, "false")).lower()
    if text not in ("true", "false"):
        raise RefusedError(400, f"Invalid boolean: {text}", param=name)
    return text == "true"


def metadata(given: Mapping[str, Any], where: str = "metadata") -> dict[str, str]:
    """The metadata of a request: at most 50 keys of 40 characters, with values of 500.

    :raises RefusedError: for more.
    """
    found = given.get("metadata") or {}
    if not isinstance(found, dict):
        raise RefusedError(400, "Invalid metadata", param=where)
    if len(found) > 50 or any(len(key) > 40 or len(str(value)) > 500 for key, value in found.items()):
        raise RefusedError(400, "Metadata is too large", param=where)
    return {key: str(value) for key, value in found.items()}
