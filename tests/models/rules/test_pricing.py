"""Prices of features: exact or in whole blocks, never a fraction of a micro-credit for nothing."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creditlane.amounts import MICRO, Micro
from models.rules.catalog import Feature, price_of

Rounding = Literal["exact", "up"]


def feature(price: int, per: int, rounding: Rounding) -> Feature:
    return Feature(price=Micro(price), per=Micro(per), rounding=rounding)


IMAGES = (MICRO, 8 * MICRO)


@pytest.mark.parametrize(
    ("units", "rounding", "credits"),
    [
        (12, "exact", "1.5"),
        (12, "up", "2"),
        (1, "exact", "0.125"),
        (1, "up", "1"),
        (8, "exact", "1"),
        (8, "up", "1"),
        (9, "up", "2"),
        (16, "up", "2"),
    ],
)
def test_images_at_1_credit_for_8(units: int, rounding: Rounding, credits: str) -> None:
    assert price_of(feature(*IMAGES, rounding), units * MICRO) == Fraction(credits) * MICRO


def test_a_price_of_0_costs_nothing_in_any_quantity() -> None:
    for rounding in ("exact", "up"):
        assert price_of(feature(0, MICRO, rounding), 10**18) == 0


def test_a_third_of_a_credit_is_charged_to_the_next_micro_credit_up() -> None:
    third = feature(MICRO, 3 * MICRO, "exact")
    assert [price_of(third, units * MICRO) for units in (1, 2, 3)] == [333_334, 666_667, 1_000_000]


def test_the_smallest_quantity_of_what_costs_anything_costs_something() -> None:
    assert price_of(feature(1, 10**18, "exact"), 1) == 1
    assert price_of(feature(1, 10**18, "up"), 1) == 1


amounts = st.integers(1, 10**18)


@given(price=st.integers(0, 10**18), per=amounts, quantity=amounts)
def test_prices_are_what_fractions_say(price: int, per: int, quantity: int) -> None:
    share = Fraction(quantity, per)
    assert price_of(feature(price, per, "exact"), quantity) == ceil(share * price)
    assert price_of(feature(price, per, "up"), quantity) == ceil(share) * price


@given(price=amounts, per=amounts, quantity=amounts)
def test_whole_blocks_never_cost_less_than_their_parts(price: int, per: int, quantity: int) -> None:
    exact = price_of(feature(price, per, "exact"), quantity)
    blocks = price_of(feature(price, per, "up"), quantity)
    assert exact <= blocks < exact + price


@given(price=amounts, per=amounts, one=st.integers(1, 10**12), other=st.integers(1, 10**12))
def test_splitting_a_quantity_never_makes_it_cheaper(price: int, per: int, one: int, other: int) -> None:
    for rounding in ("exact", "up"):
        priced = feature(price, per, rounding)
        assert price_of(priced, one + other) <= price_of(priced, one) + price_of(priced, other)
