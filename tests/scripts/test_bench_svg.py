"""The chart of the bench: every point is in it, at the right height, and whatever a label says it is XML."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from scripts.bench_chart import short
from scripts.bench_svg import HEIGHT, TOP, Panel, Point, draw, scale

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*panels: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(draw('A "title" & more', "per second", panels))


def test_every_point_is_drawn_with_its_label_and_value() -> None:
    chart = drawn(
        Panel("First", "things", [Point("1", 500.0, 500.0, 500.0), Point("<10>", 1000.0, 900.0, 1100.0)]),
        Panel("Second", "others", [Point("none", 0.0, 0.0, 0.0)]),
    )
    texts = [element.text for element in chart.iter(f"{SVG}text")]
    for expected in ('A "title" & more', "First", "things", "1", "<10>", "500", "1,000", "Second", "others", "none"):
        assert expected in texts
    heights = [float(circle.attrib["cy"]) for circle in chart.iter(f"{SVG}circle")]
    # The scale ends at 1,500, at the top.
    assert heights == pytest.approx([TOP + HEIGHT * 2 / 3, TOP + HEIGHT / 3, TOP + HEIGHT], abs=0.1)
    spreads = [path for path in chart.iter(f"{SVG}path") if path.attrib["class"] == "spread"]
    assert len(spreads) == 1  # what was the same in every run has none


@pytest.mark.parametrize(
    ("highest", "step", "top"),
    [(1100, 500, 1500), (1000, 500, 1500), (33_000, 10_000, 40_000), (0.5, 1, 1), (7, 2, 8), (99_999, 50_000, 150_000)],
)
def test_the_scale_is_of_round_numbers_with_room_above(highest: float, step: int, top: int) -> None:
    assert scale(highest) == (step, top)
    assert top % step == 0
    assert top > highest


@pytest.mark.parametrize(("number", "shown"), [(10_000_000, "10 M"), (1_500_000, "1.5 M"), (20_000, "20,000")])
def test_large_numbers_are_short(number: int, shown: str) -> None:
    assert short(number) == shown
