"""SePay: transfers to a bank account, told of as the bank books them (payments: other providers).

A transfer knows no price: the code in its text names an order of ours, and that order says what was sold and for how
much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, ClassVar, Literal

import msgspec

from models.rules.facts import PackPaid
from workers.providers.base import (
    Event,
    Facts,
    Fetch,
    Parked,
    ParkedError,
    VerificationError,
    aliases_of,
    check_size,
    check_time,
    created_at,
    header_of,
    order_of,
    parse_json,
    read_envelope,
    read_object,
)
from workers.providers.signing import check_hmac, check_secrets

_STAMP = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_LOCAL = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)\Z", re.ASCII)

OFFSET = "+07:00"
"""The time of Vietnam, which its instants are written in without saying so; it has had no summer time since 1975."""


class _Transfer(msgspec.Struct):
    id: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    transferType: Literal["in", "out"]
    transferAmount: Annotated[int, msgspec.Meta(ge=0, le=10**15)]
    """Whole dong."""
    transactionDate: str
    code: str | None = None
    referenceCode: str | None = None


class SePay:
    """The adapter of SePay.

    :param secrets: of the endpoint; each is tried.
    :param livemode: whether they are of a live endpoint: the events do not say.
    """

    name = "sepay"
    accepted: ClassVar[bytes] = b'{"success": true}'

    def __init__(self, secrets: Sequence[str], *, livemode: bool) -> None:
        self._keys = check_secrets(secrets, "SePay")
        self._livemode = livemode

    def verify(self, raw: bytes, headers: Mapping[str, str], now: datetime) -> Event:
        """See :class:`~workers.providers.base.Adapter`."""
        check_size(raw)
        signature = header_of(headers, "x-sepay-signature")
        stamp = header_of(headers, "x-sepay-timestamp")
        if not signature.startswith("sha256=") or _STAMP.match(stamp) is None:
            raise VerificationError("bad_signature", "the signature is not one")
        check_hmac(stamp.encode() + b"." + raw, signature.removeprefix("sha256="), self._keys)
        check_time(int(stamp), now)
        return self.read(raw)

    def read(self, raw: bytes) -> Event:
        """See :class:`~workers.providers.base.Adapter`."""
        transfer = read_envelope(raw, _Transfer)
        local = _LOCAL.match(transfer.transactionDate)
        if local is None:
            raise VerificationError("not_an_event", "the transfer's time is not one")
        return Event(
            provider=self.name,
            id=str(transfer.id),
            type=f"transfer.{transfer.transferType}",
            livemode=self._livemode,
            created=created_at(f"{local.group(1)}T{local.group(2)}{OFFSET}"),
            object=parse_json(raw),
        )

    def normalise(self, event: Event, fetch: Fetch) -> Facts | Parked:
        """See :class:`~workers.providers.base.Adapter`. Nothing is fetched: a booked transfer does not change."""
        if event.type != "transfer.in":
            return ()
        try:
            transfer = read_object(event.object, _Transfer)
        except ParkedError as parked:
            return parked.parked
        reference = order_of(transfer.code)
        if reference is None:
            return Parked("no_reference", "a transfer whose text names no order")
        return (
            PackPaid(
                provider=self.name,
                livemode=event.livemode,
                key=event.id,
                occurred_at=event.created,
                currency="VND",
                paid_minor=transfer.transferAmount,
                lines=(),
                reference=reference,
                aliases=aliases_of(("transfer", event.id)),
            ),
        )
