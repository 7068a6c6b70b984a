"""What an adapter of a payment provider is, and what the adapters share (payments: from event to fact)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

import msgspec

from creditlane.contract import FIRST_INSTANT, LAST_INSTANT, MAX_TEXT, Name
from models.rules.catalog import MINOR_DIGITS, Money
from models.rules.facts import Alias, Fact, Line

MAX_BODY_BYTES = 1024 * 1024
"""The largest body that is looked at."""

MAX_HEADER_CHARS = 8192
"""The longest header that is looked at."""

TOLERANCE_SECONDS = 300
"""How far a signed time may lie from now, either way."""

MAX_MINOR = 10**15
"""The largest amount of money that an event may name, in minor units."""

ACCOUNT_KEY = "creditlane_account"
"""The metadata under which a checkout names the account; set by the seller's server, so it goes before any other."""

ORDER_KEY = "creditlane_order"
"""The metadata under which a checkout names the order or quote of ours that it is for."""

_PRINTED = r"^[^\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]+\Z"

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_PRINTED)]
"""An id as a provider gives it: no blanks or control characters, so it can be stored and shown."""

Minor = Annotated[int, msgspec.Meta(ge=-MAX_MINOR, le=MAX_MINOR)]
Quantity = Annotated[int, msgspec.Meta(ge=0, le=10**9)]

Refusal = Literal[
    "too_large", "no_signature", "bad_signature", "bad_certificate", "too_old", "too_new", "not_json", "not_an_event"
]  # fmt: skip
"""Why a webhook was refused, in the order of the checks."""


class VerificationError(Exception):
    """A webhook that is not proven to come from the provider, or is none.

    :param code: what callers decide by.
    :param sentence: what is wrong, for the log; nothing of the body is in it.
    """

    def __init__(self, code: Refusal, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class Parked(msgspec.Struct, frozen=True):
    """An event that cannot be made facts of, for an operator to see; never a reason to refuse the delivery."""

    code: str
    reason: str


class ParkedError(Exception):
    """Raised on the way to the facts, and answered by the adapter as :class:`Parked`."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.parked = Parked(code, reason[:MAX_TEXT])


Facts = tuple[Fact, ...]

Fetch = Callable[[str, str], Mapping[str, Any] | None]
"""Gets an object again from the provider's API: kind and id, to the object as plain JSON with its lists complete, or
None when there is no API key. What it raises (the provider is out of reach) goes through, for the event to be tried
again."""

Body = TypeVar("Body", bound=msgspec.Struct)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook's envelope."""

    provider: str
    id: str
    """The provider's id of it: with provider and livemode what the inbox is unique by."""
    type: str
    livemode: bool
    created: datetime
    release: str | None = None
    """The API version that it was written by."""
    thin: bool = False
    """Whether it only names its object."""
    merchant: str | None = None
    """The connected account that it is of, where it is not our own."""
    object: dict[str, Any]
    """What it is about, as it came; numbers with a fraction are Decimals."""


class Adapter(Protocol):
    """A payment provider."""

    name: str
    accepted: ClassVar[bytes]
    """The body of a 200 that the provider takes for a yes."""

    def verify(self, raw: bytes, headers: Mapping[str, str], now: datetime) -> Event:
        """Check that a webhook comes from the provider.

        :param raw: the body as it came.
        :param headers: of the request; names in any case.
        :param now: an aware instant.
        :raises VerificationError: for anything that is wrong with it.
        """

    def read(self, raw: bytes) -> Event:
        """Read a body that was verified when it came.

        :raises VerificationError: when it is no event.
        """

    def normalise(self, event: Event, fetch: Fetch) -> Facts | Parked:
        """Make facts of an event; none of one that says nothing to us. Raises only what ``fetch`` raises."""


def no_fetch(kind: str, id: str) -> None:
    """The fetch of a deployment without an API key."""


def header_of(headers: Mapping[str, str], name: str) -> str:
    """A header that the signature needs.

    :param name: in lower case.
    :raises VerificationError: when it is missing, empty, not ASCII or far too long.
    """
    value = next((value for key, value in headers.items() if key.lower() == name), "")
    if not value:
        raise VerificationError("no_signature", f"the {name} header is missing")
    if not value.isascii() or len(value) > MAX_HEADER_CHARS:
        raise VerificationError("bad_signature", f"the {name} header is not one")
    return value


def check_size(raw: bytes) -> None:
    """Refuse a body that is too large.

    :raises VerificationError: above :data:`MAX_BODY_BYTES`.
    """
    if len(raw) > MAX_BODY_BYTES:
        raise VerificationError("too_large", f"the body is more than {MAX_BODY_BYTES} bytes")


def check_time(signed_at: float, now: datetime, *, past: bool = True) -> None:
    """Refuse a signature of another time.

    :param signed_at: in seconds since 1970.
    :param past: whether an old one is refused too.
    :raises VerificationError: beyond :data:`TOLERANCE_SECONDS`.
    """
    seconds = now.timestamp()
    if signed_at > seconds + TOLERANCE_SECONDS:
        raise VerificationError("too_new", "the signature is of the future")
    if past and signed_at < seconds - TOLERANCE_SECONDS:
        raise VerificationError("too_old", f"the signature is more than {TOLERANCE_SECONDS} s old")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json(raw: bytes) -> dict[str, Any]:
    """Read a JSON object without floats.

    :returns: plain values; a number with a fraction or an exponent is a Decimal.
    :raises VerificationError: when it is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        value = json.loads(raw.decode(), parse_float=Decimal, parse_constant=_no_constant)
    except (ValueError, ArithmeticError, RecursionError):
        raise VerificationError("not_json", "the body is not JSON") from None
    if not isinstance(value, dict):
        raise VerificationError("not_an_event", "the body is not a JSON object")
    return value


_UNREADABLE = (msgspec.ValidationError, UnicodeError)
"""What ``msgspec`` raises on a value of another shape: JSON has halves of surrogate pairs."""


def read_envelope(raw: bytes, envelope: type[Body]) -> Body:
    """Read an event's envelope.

    :raises VerificationError: when it is not of that shape.
    """
    try:
        return msgspec.convert(parse_json(raw), envelope)
    except _UNREADABLE:
        raise VerificationError("not_an_event", "the body is not an event of this provider") from None


def read_object(value: Mapping[str, Any], body: type[Body]) -> Body:
    """Read what an event is about, or what was fetched.

    :raises ParkedError: when it is not of that shape.
    """
    try:
        return msgspec.convert(value, body)
    except _UNREADABLE as error:
        name = body.__name__.strip("_").lower()
        raise ParkedError("malformed", f"not the {name} that was expected: {error}") from None


def read_again(event: Event, fetch: Fetch, kind: str, body: type[Body], id: str) -> tuple[Body, bool]:
    """Read the object of an event as it is now, where there is an API key, else as it was.

    :param kind: what to fetch.
    :param id: the name of the field that holds the object's id.
    :returns: the object, and whether it was fetched.
    :raises ParkedError: when it is not of that shape, or another one.
    """
    told = read_object(event.object, body)
    current = fetch(kind, getattr(told, id))
    if current is None:
        return told, False
    newer = read_object(current, body)
    if getattr(newer, id) != getattr(told, id):
        raise ParkedError("malformed", f"the {kind} that was fetched is another one")
    return newer, True


def _is(value: object, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except _UNREADABLE:
        return False
    return True


def event_fields(event: Event) -> dict[str, Any]:
    """What every fact of an event says of it."""
    return {"provider": event.provider, "livemode": event.livemode, "occurred_at": event.created}


def account_of(*candidates: object) -> str | None:
    """The first that can be the name of an account."""
    return next((value for value in candidates if isinstance(value, str) and _is(value, Name)), None)


def order_of(*candidates: object) -> str | None:
    """The first that can be the id of an order of ours."""
    return next((value for value in candidates if isinstance(value, str) and _is(value, Id)), None)


def aliases_of(*pairs: tuple[str, str | None]) -> tuple[Alias, ...]:
    """Aliases of those that are known."""
    return tuple(sorted({Alias(kind, id) for kind, id in pairs if id is not None}))


def merge_lines(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Make lines of equal price one: the key of a line is its price."""
    merged: dict[str, Line] = {}
    for line in lines:
        known = merged.get(line.price)
        if known is not None:
            amounts = (known.amount_minor, line.amount_minor)
            line = Line(
                price=line.price,
                quantity=known.quantity + line.quantity,
                amount_minor=None if None in amounts else sum(amount or 0 for amount in amounts),
            )
        merged[line.price] = line
    return tuple(merged.values())


def currency_of(text: str) -> str:
    """An ISO 4217 currency in upper case.

    :raises ParkedError: when it is none.
    """
    currency = text.upper()
    if len(currency) != 3 or not (currency.isascii() and currency.isalpha()):
        raise ParkedError("malformed", "the currency is not one")
    return currency


_DECIMAL = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?\Z", re.ASCII)


def minor_of(text: str, currency: str) -> int:
    """Minor units of a decimal string, such as ``"10.99"``; noughts beyond the currency's decimals are let pass.

    :param currency: in upper case.
    :raises ParkedError: for another shape, a sign, or more decimals than the currency has.
    """
    match = _DECIMAL.match(text)
    if match is None:
        raise ParkedError("malformed", "an amount is not a decimal string")
    digits = MINOR_DIGITS.get(currency, 2)
    fraction = (match.group(2) or "").rstrip("0")
    if len(fraction) > digits:
        raise ParkedError("malformed", f"an amount has more decimals than {currency}")
    number = f"{match.group(1)}.{fraction}" if fraction else match.group(1)
    return Money.parse(f"{number} {currency}").minor


def instant_of(value: int | str, *, unit: Literal["s", "ms"] = "s") -> datetime:
    """An instant as a number since 1970, or in ISO 8601 with its offset.

    :raises ValueError: when it is none, or lies outside the ledger's calendar.
    """
    if isinstance(value, str):
        instant = datetime.fromisoformat(value)
        if instant.tzinfo is None:
            raise ValueError("an instant without an offset")
    else:
        seconds, milliseconds = divmod(value, 1000) if unit == "ms" else (value, 0)
        instant = datetime.fromtimestamp(seconds, UTC).replace(microsecond=milliseconds * 1000)
    if not FIRST_INSTANT <= instant <= LAST_INSTANT:
        raise ValueError("an instant outside the calendar")
    return instant.astimezone(UTC)


def when(value: int | str | None, *, unit: Literal["s", "ms"] = "s") -> datetime | None:
    """An instant of an object, or None when there is none.

    :raises ParkedError: when it is not one.
    """
    if value is None:
        return None
    try:
        return instant_of(value, unit=unit)
    except (ValueError, OverflowError, OSError):
        raise ParkedError("malformed", "an instant is not one") from None


def created_at(value: int | str, *, unit: Literal["s", "ms"] = "s") -> datetime:
    """The instant of an event.

    :raises VerificationError: when it is not one.
    """
    try:
        return instant_of(value, unit=unit)
    except (ValueError, OverflowError, OSError):
        raise VerificationError("not_an_event", "the event's time is not one") from None
