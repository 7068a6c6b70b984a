"""What goes wrong on the producer's side, and what a waiting producer is told of a quarantined message."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from creditlane.contract import Result


class CreditlaneError(Exception):
    """The base of every error of the client."""


class BrokerUnavailableError(CreditlaneError):
    """The broker did not confirm the message in time. It may or may not have it: send the same id again."""


class NoAnswerError(CreditlaneError):
    """No answer came in time. The operation is in its lane and will be applied; ask again with the same id."""


class QuarantinedError(CreditlaneError):
    """The message could not be understood or applied; it is kept in quarantine, whole, with the reason."""


class RefusedError(CreditlaneError):
    """The ledger said no, inside :meth:`creditlane.CreditClient.reserve`; ``result`` has code and details."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.code}: {result.reason}")
        self.result = result


class AlreadyReservedError(CreditlaneError):
    """The hold of this id was made by an earlier attempt, and may have been captured or given back since."""


class UnsentError(BrokerUnavailableError):
    """A buffer could not hand everything to the broker; ``operations`` are those to send again, ids unchanged."""

    def __init__(self, operations: list[tuple[str, str, bytes]], cause: str) -> None:
        super().__init__(f"{len(operations)} operations were not confirmed by the broker ({cause}); send them again")
        self.operations = operations
