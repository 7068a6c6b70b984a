"""What the adapters share: amounts, instants, names."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.rules.catalog import MINOR_DIGITS
from models.rules.facts import Line
from workers.providers.base import (
    ParkedError,
    VerificationError,
    account_of,
    currency_of,
    instant_of,
    merge_lines,
    minor_of,
    parse_json,
    when,
)

CURRENCIES = st.sampled_from(["EUR", "USD", "JPY", "VND", "KWD", *MINOR_DIGITS])


@pytest.mark.parametrize(
    ("text", "currency", "minor"),
    [("10.99", "EUR", 1099), ("10.9", "EUR", 1090), ("10", "EUR", 1000), ("0.01", "USD", 1), ("500", "JPY", 500),
     ("500.00", "JPY", 500), ("1.234", "KWD", 1234), ("999999999999", "VND", 999999999999)],
)  # fmt: skip
def test_decimal_strings_are_minor_units(text: str, currency: str, minor: int) -> None:
    assert minor_of(text, currency) == minor


@pytest.mark.parametrize(
    ("text", "currency"),
    [("10.999", "EUR"), ("0.5", "JPY"), ("-1", "EUR"), ("1e3", "EUR"), ("", "EUR"), (" 1", "EUR"), ("1.", "EUR"),
     ("1,00", "EUR"), ("NaN", "EUR"), ("١", "EUR"), ("1\n", "EUR"), ("1" * 13, "EUR")],
)  # fmt: skip
def test_other_amounts_are_refused(text: str, currency: str) -> None:
    with pytest.raises(ParkedError):
        minor_of(text, currency)


@given(st.integers(0, 10**11), CURRENCIES)
def test_minor_units_come_back_from_their_decimal_string(minor: int, currency: str) -> None:
    digits = MINOR_DIGITS.get(currency, 2)
    assert minor_of(f"{Decimal(minor).scaleb(-digits):f}", currency) == minor


@pytest.mark.parametrize("text", ["eu", "euro", "€€€", "e1r", ""])
def test_other_currencies_are_refused(text: str) -> None:
    assert currency_of("eur") == "EUR"
    with pytest.raises(ParkedError):
        currency_of(text)


def test_instants() -> None:
    noon = datetime(2026, 9, 1, 12, tzinfo=UTC)
    assert instant_of(1788264000) == instant_of(1788264000000, unit="ms") == noon
    assert instant_of("2026-09-01T05:00:00-07:00") == instant_of("2026-09-01T12:00:00Z") == noon
    assert when(None) is None
    for wrong in (
        "2026-09-01T12:00:00",
        "2026-19-12T22:20:32.000Z",
        "",
        "now",
        -1,
        10**30,
        "0001-01-01T00:00:00+14:00",
    ):
        with pytest.raises(ParkedError):
            when(wrong)


def test_numbers_with_a_fraction_are_decimals() -> None:
    assert parse_json(b'{"a": 0.1, "b": 1e2, "c": 12345678901234567890}') == {
        "a": Decimal("0.1"), "b": Decimal("1e2"), "c": 12345678901234567890,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "code"),
    [(b"", "not_json"), (b"{", "not_json"), (b"\xff{}", "not_json"), (b"\xef\xbb\xbf{}", "not_json"),
     (b'{"a":NaN}', "not_json"), (b'{"a":' + b"9" * 5000 + b"}", "not_json"),
     (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not_json"), (b'{"a":1e9999999999999999999}', "not_json"),
     (b"[]", "not_an_event"), (b"null", "not_an_event"), (b'"{}"', "not_an_event"), (b"1", "not_an_event")],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(raw: bytes, code: str) -> None:
    with pytest.raises(VerificationError) as refused:
        parse_json(raw)
    assert refused.value.code == code


def test_account_is_the_first_that_can_be_one() -> None:
    assert account_of(None, 7, "", "a\0b", "a\ud800", "x" * 129, "ann", "bob") == "ann"
    assert account_of({}, []) is None


def test_lines_of_a_price_are_one() -> None:
    one, other = Line(price="a", quantity=1, amount_minor=5), Line(price="b", quantity=1)
    assert merge_lines([one, other, one, other]) == (
        Line(price="a", quantity=2, amount_minor=10), Line(price="b", quantity=2),
    )  # fmt: skip
