"""What an operation is to the ledger writer: a function, what it is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, NamedTuple

from creditlane.contract import Message
from models.rules.catalog import Catalog
from models.rules.state import Account, Grant, Line


class Context(NamedTuple):
    """What an operation is given besides the account and the message."""

    now: datetime
    """The account's time: the transaction's, or the account's last if that is later."""
    catalog: Catalog
    operation: str
    """The operation id."""


class Outcome(NamedTuple):
    """What an applied operation answers."""

    charged: int = 0
    """Micro-credits taken out of the balance for good (or set aside, for a hold)."""
    uses: list[tuple[Grant, int]] | tuple[()] = ()
    """Which grants gave or got how many micro-credits."""
    receipt: list[Line] | None = None
    """What a later refund may give back, in the order of taking."""
    details: dict[str, Any] | None = None
    """Further fields of the result."""
    quantity_micro: int | None = None
    """Units of the feature, in millionths, for usage reports."""
    feature: str | None = None


class Need(NamedTuple):
    """A past row that an operation works on, beyond the account's open grants and holds."""

    kind: Literal["hold", "charge", "grant", "purchase"]
    key: str | int


class Operation(NamedTuple):
    """One operation of the contract."""

    name: str
    run: Callable[[Account, Any, Context], Outcome]
    need: Callable[[Any], Need] | None = None
    opens: bool = False
    """Whether it may be applied to an account that was not opened."""


def operation(
    kind: type[Message], need: Callable[[Any], Need] | None = None, opens: bool = False
) -> Callable[[Callable[[Account, Any, Context], Outcome]], Operation]:
    """Make a function the implementation of a message type."""

    def register(run: Callable[[Account, Any, Context], Outcome]) -> Operation:
        return Operation(kind.operation, run, need, opens)

    return register
