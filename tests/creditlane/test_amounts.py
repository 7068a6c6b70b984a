"""Amounts on the wire and in the ledger."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creditlane.amounts import MAX_CREDITS, MAX_MICRO, MICRO, format_amount, parse_amount, to_wire


@pytest.mark.parametrize(
    ("written", "micro"),
    [
        ("0.2", 200_000),
        ("0.125", 125_000),
        ("0.000001", 1),
        ("-0.000001", -1),
        ("1", 1_000_000),
        ("1.0", 1_000_000),
        ("1.500000", 1_500_000),
        ("007", 7_000_000),
        ("0", 0),
        ("-0", 0),
        (0, 0),
        (12, 12_000_000),
        (-3, -3_000_000),
        ("1000000000000", 10**18),
        ("-1000000000000.000000", -(10**18)),
        (10**12, 10**18),
    ],
)
def test_a_decimal_string_or_an_integer_is_read_exactly(written: str | int, micro: int) -> None:
    assert parse_amount(written) == micro
    assert type(parse_amount(written)) is int


@pytest.mark.parametrize(
    "written",
    [
        0.2,
        1.0,
        float("nan"),
        float("inf"),
        True,
        False,
        None,
        b"1",
        [1],
        {},
        Decimal(1),
        "",
        " 1",
        "1 ",
        "1\n",
        "+1",
        "--1",
        "1.",
        ".5",
        "-",
        "1e3",
        "1E3",
        "0x10",
        "1_000",
        "1,5",
        "1,000",
        "NaN",
        "nan",
        "Infinity",
        "-inf",
        "0.0000001",
        "0.2000000",
        "0." + "0" * 600 + "1",
        "1" * 600,
        "٣",
        "１",
        "²",
        "1\x00",
        "1 EUR",
    ],
)
def test_anything_else_is_refused_and_told_what_to_send_instead(written: object) -> None:
    with pytest.raises(ValueError, match="send credits as a decimal string"):
        parse_amount(written)


@pytest.mark.parametrize(
    "written",
    [
        "1000000000000.000001",
        "-1000000000000.000001",
        10**12 + 1,
        -(10**12) - 1,
        "9999999999999",
        2**63,
        10**4000,
    ],
)
def test_more_than_the_largest_amount_is_refused_either_way(written: str | int) -> None:
    with pytest.raises(ValueError, match=r"at most 1,000,000,000,000 credits"):
        parse_amount(written)


def test_the_reason_quotes_no_more_than_forty_characters_of_what_was_sent() -> None:
    with pytest.raises(ValueError, match="is not an amount") as refused:
        parse_amount("9" * 100_000)
    assert len(str(refused.value)) < 160


@pytest.mark.parametrize(
    ("micro", "written"),
    [
        (0, "0"),
        (1, "0.000001"),
        (-1, "-0.000001"),
        (200_000, "0.2"),
        (1_000_000, "1"),
        (10_000_000, "10"),
        (100_000_000, "100"),
        (48_500_000, "48.5"),
        (-1_250_000, "-1.25"),
        (10**18, "1000000000000"),
        (10**24 + 1, "1000000000000000000.000001"),
    ],
)
def test_micro_credits_are_written_as_the_shortest_exact_decimal(micro: int, written: str) -> None:
    assert format_amount(micro) == written


@given(st.integers(-MAX_MICRO, MAX_MICRO))
def test_what_is_written_reads_back_as_the_same_amount(micro: int) -> None:
    assert parse_amount(format_amount(micro)) == micro
    assert Decimal(format_amount(micro)) * MICRO == micro


@given(st.integers(-MAX_MICRO, MAX_MICRO))
def test_no_shorter_decimal_says_the_same(micro: int) -> None:
    written = format_amount(micro)
    assert "." not in written or written[-1] not in ".0"
    assert not written.startswith("-0") or written.startswith("-0.")


@given(st.one_of(st.text(max_size=20), st.text("0123456789.-+eE", max_size=18), st.integers(), st.floats()))
def test_reading_an_amount_either_gives_an_exact_number_or_refuses(written: Any) -> None:
    try:
        micro = parse_amount(written)
    except ValueError:
        return
    assert Decimal(written) * MICRO == micro
    assert abs(micro) <= MAX_CREDITS * MICRO


@pytest.mark.parametrize(
    ("given_amount", "wire"),
    [
        (3, "3"),
        ("0.2", "0.2"),
        ("0.20", "0.2"),
        ("10", "10"),
        (Decimal("0.2"), "0.2"),
        (Decimal("0.2000000000"), "0.2"),
        (Decimal(100), "100"),
        (Decimal("100.000"), "100"),
        (Decimal("1E+3"), "1000"),
        (Decimal("1E-6"), "0.000001"),
        (Decimal("-2.5"), "-2.5"),
        (Decimal(0), "0"),
        (Decimal("-0"), "0"),
        (Decimal("0E+5"), "0"),
    ],
)
def test_a_callers_amount_is_brought_into_its_wire_form(given_amount: int | str | Decimal, wire: str) -> None:
    assert to_wire(given_amount) == wire


@pytest.mark.parametrize(
    "given_amount",
    [
        0.2,
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("-Infinity"),
        Decimal("0.0000001"),
        Decimal(1) / 3,
        Decimal("1E+13"),
        "abc",
        True,
    ],
)
def test_a_callers_amount_that_has_no_wire_form_is_refused(given_amount: Any) -> None:
    with pytest.raises(ValueError, match="amount"):
        to_wire(given_amount)
