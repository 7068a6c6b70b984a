"""What an operation is to the ledger writer: a function, what it is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec

from creditlane.codes import Code
from creditlane.contract import Message
from models.rules.catalog import Catalog
from models.rules.state import Account, Grant, Line


class Context(msgspec.Struct, frozen=True, gc=False):
    """What an operation is given besides the account and the message."""

    now: datetime
    """The account's time: the transaction's, or the account's last if that is later."""
    catalog: Catalog
    operation: str
    """The operation id."""


class FollowUp(NamedTuple):
    """An operation that follows from this one; it is sent to its account's lane once this one is committed."""

    name: str
    operation: str
    """Its operation id, the same each time it is derived."""
    arguments: dict[str, Any]
    """As on the wire."""

    @property
    def account(self) -> str:
        """Whose lane it goes through."""
        account: str = self.arguments["account"]
        return account


class Outcome(msgspec.Struct, frozen=True, gc=False):
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
    follow: Sequence[FollowUp] = ()


class Need(NamedTuple):
    """A past row that an operation works on, beyond the account's open grants and holds."""

    kind: Literal[
        "hold", "charge", "transfer", "grant", "purchase", "subscription", "allowance", "code", "referral", "referee"
    ]
    """``referee``: the allowance that tells whether the account has referred the owner of a code."""
    key: str | int
    """Of a subscription, and of what an account was referred by, nothing: it has one."""


class Operation(NamedTuple):
    """One operation of the contract."""

    name: str
    run: Callable[[Account, Any, Context], Outcome]
    need: Callable[[Any], Sequence[Need]] | None = None
    opens: bool = False
    """Whether it may be applied to an account that was not opened."""
    concludes: bool = False
    """Whether it ends what the account began, and so is applied to a closed account as well."""
    returns: bool = False
    """Whether it may bring back what the account has spent or set aside, and so is applied to a lead that was converted
    as well: what comes back follows to the user."""
    spends: bool = False
    """Whether it gives credits out, or begins something that does: a frozen account may not."""
    refused: Callable[[Any, str, Code], Sequence[FollowUp]] | None = None
    """What follows from its being refused, by the message, the operation id and the code."""
    repeated: Callable[[Any, str, Code | None], Sequence[FollowUp]] | None = None
    """What follows again from its coming again, by the message, the operation id and the code it was refused with: for
    what nobody else would send again."""


def operation(
    kind: type[Message],
    need: Callable[[Any], Sequence[Need]] | None = None,
    opens: bool = False,
    concludes: bool = False,
    returns: bool = False,
    spends: bool = False,
    refused: Callable[[Any, str, Code], Sequence[FollowUp]] | None = None,
    repeated: Callable[[Any, str, Code | None], Sequence[FollowUp]] | None = None,
) -> Callable[[Callable[[Account, Any, Context], Outcome]], Operation]:
    """Make a function the implementation of a message type."""

    def register(run: Callable[[Account, Any, Context], Outcome]) -> Operation:
        return Operation(kind.operation, run, need, opens, concludes, returns, spends, refused, repeated)

    return register
