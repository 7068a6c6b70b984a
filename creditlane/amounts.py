"""Amounts: the wire's decimal strings and the ledger's integers (ledger rules: amounts).

One credit is 1,000,000 micro-credits. Inside, an amount is an ``int`` of micro-credits and
nothing else; on the wire it is a decimal string (``"0.2"``) or a JSON integer of credits.
"""

from __future__ import annotations

import re
from decimal import Decimal

MICRO = 1_000_000
"""Micro-credits in one credit."""

MAX_CREDITS = 10**12
"""The largest amount, in credits, that one message may name."""

MAX_MICRO = MAX_CREDITS * MICRO

_DECIMAL = re.compile(r"(-?)([0-9]{1,13})(?:\.([0-9]{1,6}))?\Z", re.ASCII)


class Micro(int):
    """An amount in micro-credits, as a field type of the messages: decoded from credits on the wire."""

    __slots__ = ()


def parse_amount(value: object) -> int:
    """Read an amount off the wire.

    :param value: credits, as a decimal string with at most six decimals or as an integer.
    :returns: micro-credits.
    :raises ValueError: for a float, an exponent, a NaN, more than six decimals, or more than
        10^12 credits either way; the text says what to send instead.
    """
    if type(value) is str:
        if len(value) <= 13 and value.isascii() and value.isdigit():
            micro = int(value) * MICRO
        else:
            micro = _parse_decimal(value)
    elif type(value) is int:
        micro = value * MICRO
    else:
        raise ValueError(f"a {type(value).__name__} is not an amount: send credits as a decimal string or an integer")
    if not -MAX_MICRO <= micro <= MAX_MICRO:
        raise ValueError(f"an amount is at most {MAX_CREDITS:,} credits")
    return micro


def _parse_decimal(value: str) -> int:
    match = _DECIMAL.match(value)
    if match is None:
        shown = value if len(value) <= 40 else value[:37] + "..."
        raise ValueError(f"{shown!r} is not an amount: send credits as a decimal string with at most six decimals")
    sign, whole, fraction = match.groups()
    micro = int(whole) * MICRO
    if fraction:
        micro += int(fraction.ljust(6, "0"))
    return -micro if sign else micro


def format_amount(micro: int) -> str:
    """Write micro-credits as the shortest decimal string of credits that is exact."""
    if micro < 0:
        return "-" + format_amount(-micro)
    whole, fraction = divmod(micro, MICRO)
    if not fraction:
        return str(whole)
    return f"{whole}.{fraction:06d}".rstrip("0")


def to_wire(amount: int | str | Decimal) -> str:
    """Bring a caller's amount of credits (``3``, ``"0.2"``, ``Decimal("0.2")``) into its wire form.

    :raises ValueError: for a float, or anything that :func:`parse_amount` refuses.
    """
    if type(amount) is int and -MAX_CREDITS <= amount <= MAX_CREDITS:
        return str(amount)
    if isinstance(amount, Decimal):
        if not amount.is_finite():
            raise ValueError(f"{amount} is not an amount: send a finite number of credits")
        amount = f"{amount:f}"
        if "." in amount:
            amount = amount.rstrip("0").rstrip(".")
    return format_amount(parse_amount(amount))
