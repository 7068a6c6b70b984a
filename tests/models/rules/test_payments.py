"""Claw-back: what is to be away follows from what is so, not from how it was told."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.rules.payments import Returned, claw_back_target, returned_minor

amounts = st.integers(0, 10**9)
steps = st.builds(Returned, st.sampled_from(["re_1", "re_2", "dp_1"]), st.integers(0, 3), st.integers(0, 2000))


def away(credits: int, paid: int, heard: list[Returned]) -> int:
    """Take and give back one word after the other, as a lane does."""
    taken = 0
    for number in range(len(heard)):
        taken += claw_back_target(credits, paid, returned_minor(heard[: number + 1])) - taken
    return taken


@pytest.mark.parametrize(
    ("credits", "paid", "refunded", "withdrawn", "target"),
    [
        (100, 1000, 0, 0, 0),
        (100, 1000, 250, 0, 25),
        (100, 1000, 250, 250, 50),
        (100, 1000, 1000, 0, 100),
        (100, 1000, 1000, 1000, 100),  # a dispute on top of a refund takes nothing twice
        (100, 999, 333, 0, 33),
        (100, 3, 1, 0, 33),  # rounded down
        (100, 0, 0, 0, 0),  # a coupon of 100 %
        (100, 0, 500, 0, 0),
        (0, 1000, 500, 0, 0),
    ],
)
def test_target_is_the_returned_share(credits: int, paid: int, refunded: int, withdrawn: int, target: int) -> None:
    assert claw_back_target(credits, paid, refunded, withdrawn) == target


@pytest.mark.parametrize("wrong", [(-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)])
def test_negative_numbers_are_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        claw_back_target(*wrong)


@given(amounts, amounts, amounts, amounts)
def test_target_lies_between_nothing_and_all_and_never_above_the_share(
    credits: int, paid: int, refunded: int, withdrawn: int
) -> None:
    target = claw_back_target(credits, paid, refunded, withdrawn)
    assert 0 <= target <= credits
    assert target * paid <= credits * (refunded + withdrawn)
    if paid and refunded + withdrawn >= paid:
        assert target == credits


@given(amounts, st.integers(1, 5000), st.lists(steps, max_size=5))
def test_any_order_and_any_repetition_end_the_same(credits: int, paid: int, heard: list[Returned]) -> None:
    end = away(credits, paid, heard)
    assert end == away(credits, paid, heard + heard)
    for order in permutations(heard):
        assert away(credits, paid, list(order)) == end


def test_undone_refund_and_won_dispute_restore_exactly_what_they_took() -> None:
    kept = Returned("re_1", 1, 300)
    heard = [kept, Returned("re_2", 1, 200), Returned("dp_1", 1, 700)]
    assert away(10**6, 1000, heard) == 10**6
    heard += [Returned("re_2", 2, 0), Returned("dp_1", 2, 0)]
    assert away(10**6, 1000, heard) == away(10**6, 1000, [kept]) == 300_000
