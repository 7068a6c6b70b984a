"""A refusal: the answer "no", with its code. Raised by the rules before anything was changed."""

from __future__ import annotations

from typing import Any

from creditlane.codes import Code


class RefusedError(Exception):
    """An operation that is understood and refused.

    :param code: what callers decide by.
    :param reason: a sentence of this case; the code's own sentence unless given.
    :param details: further fields of the result, such as ``required`` and ``shortfall``.
    """

    def __init__(self, code: Code, reason: str | None = None, **details: Any) -> None:
        super().__init__(reason or code.sentence)
        self.code = code
        self.reason = reason or code.sentence
        self.details = details
