"""Lanes: which queue an account's messages go through. The vectors are for other languages, too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creditlane.lanes import LANES, lane_name, lane_number, lane_of

VECTORS = [
    # account, CRC-32 of its UTF-8, lane of 64, lane of 7, lane of 4,096
    ("123456789", 0xCBF43926, "lane.038", "lane.005", "lane.2342"),
    ("a", 3904355907, "lane.003", "lane.004", "lane.3651"),
    ("user_42", 712180813, "lane.013", "lane.001", "lane.1101"),
    ("user 1", 3414702169, "lane.025", "lane.004", "lane.2137"),
    ("order-991", 164408826, "lane.058", "lane.001", "lane.3578"),
    ("pool:acme", 3535295300, "lane.004", "lane.005", "lane.836"),
    ("andré", 4169463771, "lane.027", "lane.004", "lane.2011"),
    ("ユーザー42", 3301836851, "lane.051", "lane.005", "lane.2099"),
    ("пользователь", 769093134, "lane.014", "lane.005", "lane.3598"),
    ("\U0001f600", 88978756, "lane.004", "lane.006", "lane.1348"),
    ("\u00e9", 235179326, "lane.062", "lane.004", "lane.3390"),
    ("e\u0301", 1286470445, "lane.045", "lane.001", "lane.2861"),
    ("A" * 128, 68717278, "lane.030", "lane.000", "lane.2782"),
]


def crc32_by_hand(data: bytes) -> int:
    """CRC-32 bit by bit: polynomial 0x04C11DB7 reflected, all ones in and out."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("account", "crc", "of_64", "of_7", "of_4096"), VECTORS)
def test_an_account_has_the_lane_of_the_published_vector(
    account: str, crc: int, of_64: str, of_7: str, of_4096: str
) -> None:
    assert crc32_by_hand(account.encode("utf-8")) == crc
    assert lane_of(account) == of_64 == f"lane.{crc % 64:03d}"
    assert lane_of(account, 7) == of_7
    assert lane_of(account, 4096) == of_4096


def test_there_are_64_lanes_unless_configured() -> None:
    assert LANES == 64
    assert {lane_of(f"user_{number}") for number in range(2000)} == {lane_name(n) for n in range(64)}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=128), st.integers(1, 4096))
def test_every_account_has_a_lane_among_those_configured(account: str, lanes: int) -> None:
    number = lane_number(lane_of(account, lanes))
    assert number == crc32_by_hand(account.encode("utf-8")) % lanes
    assert 0 <= number < lanes


def test_composed_and_decomposed_spellings_are_two_accounts() -> None:
    assert lane_of("\u00e9") != lane_of("e\u0301")


def test_an_account_that_is_no_text_has_no_lane() -> None:
    with pytest.raises(UnicodeEncodeError):
        lane_of("\ud800")


@given(st.integers(0, 10_000))
def test_a_lanes_name_gives_its_number_back(number: int) -> None:
    assert lane_number(lane_name(number)) == number


@pytest.mark.parametrize(
    "queue",
    ["", "lane", "lane.", "007", "celery", "lane.x", "lane.-1", "lane.1.2", "lane.²", "lane.٣", "Lane.001"],
)
def test_other_queues_are_no_lanes(queue: str) -> None:
    with pytest.raises(ValueError, match="is not a lane"):
        lane_number(queue)
