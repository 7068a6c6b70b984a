"""Line charts as SVG: panels side by side with one scale, legible on light and on dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

PANEL, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, GAP = 290, 220, 76, 20, 84, 62, 24
"""In pixels: a panel's width and height, and what is around it; the gap between two."""

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #24292f; }
.title { font-size: 17px; font-weight: 600; }
.name { font-weight: 600; }
.soft { fill: #57606a; }
.value { font-size: 12px; paint-order: stroke; stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: #d0d7de; }
.line { stroke: #0969da; stroke-width: 2.5; fill: none; stroke-linejoin: round; }
.spread { stroke: #0969da; stroke-width: 1.5; opacity: 0.55; }
.point { fill: #0969da; }
.ground { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .soft { fill: #9198a1; }
  .value { stroke: #0d1117; }
  .grid { stroke: #3d444d; }
  .line, .spread { stroke: #4493f8; }
  .point { fill: #4493f8; }
  .ground { fill: #0d1117; }
}
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One value with its spread."""

    label: str
    """What stands under it."""
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One line of points, evenly spaced."""

    name: str
    axis: str
    """What the labels are of."""
    points: Sequence[Point]


def draw(title: str, axis: str, panels: Sequence[Panel]) -> str:
    """Draw panels over one scale that begins at 0.

    :param title: of the whole.
    :param axis: what the values are, with their unit.
    :param panels: at least one, each with at least one point.
    :returns: the SVG document.
    """
    step, top = scale(max(point.high for panel in panels for point in panel.points))
    width = LEFT + len(panels) * PANEL + (len(panels) - 1) * GAP + RIGHT
    height = TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
        text(LEFT, 30, title, "title"),
        f'<g transform="translate(18 {TOP + HEIGHT / 2}) rotate(-90)">{text(0, 0, axis, "soft", "middle")}</g>',
    ]
    grid = range(0, top + 1, step)
    parts += [text(LEFT - 8, height_of(value, top) + 4, f"{value:,}", "soft", "end") for value in grid]
    for number, panel in enumerate(panels):
        parts += drawn(panel, LEFT + number * (PANEL + GAP), grid)
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawn(panel: Panel, left: float, grid: range) -> list[str]:
    """The elements of one panel.

    :param grid: the values at which there are lines.
    """
    top = grid[-1]
    parts = [text(left, TOP - 20, panel.name, "name")]
    parts += [f'<path class="grid" d="M{left} {height_of(value, top):.1f}h{PANEL}"/>' for value in grid]
    room = PANEL / len(panel.points)
    places = [(left + (index + 0.5) * room, point) for index, point in enumerate(panel.points)]
    line = "L".join(f"{x:.1f} {height_of(point.value, top):.1f}" for x, point in places)
    parts.append(f'<path class="line" d="M{line}"/>')
    for x, point in places:
        low, y, high = (height_of(value, top) for value in (point.low, point.value, point.high))
        if point.low < point.high:
            parts.append(f'<path class="spread" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(text(x, min(y, high) - 9, f"{point.value:,.0f}", "value", "middle"))
        parts.append(text(x, TOP + HEIGHT + 20, point.label, "", "middle"))
    parts.append(text(left + PANEL / 2, TOP + HEIGHT + 44, panel.axis, "soft", "middle"))
    return parts


def scale(highest: float) -> tuple[int, int]:
    """The distance of the grid's lines and its last one, round numbers with room above the highest value."""
    rough = max(1.0, highest * 1.08 / 5)
    power = 10 ** math.floor(math.log10(rough))
    step = int(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough))
    return step, step * math.ceil(highest * 1.08 / step)


def height_of(value: float, top: int) -> float:
    """Where a value is, in pixels from above."""
    return TOP + HEIGHT * (1 - value / top)


def text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    """A piece of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
