"""Figures of differences with their intervals, as SVG: the same bytes on every machine, and sharp at every size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from studies.evidence import Row
from studies.report import shown_unit
from studies.verdict import CONTRADICTED, HOLDS, Comparison

WIDTH, LABELS, EDGE, LINE = 760, 330, 16, 20  # pixels: figure, column of labels, border, height of a line
COLOURS = {HOLDS: "#0072B2", CONTRADICTED: "#C44601"}
OTHER = "#6E6E6E"
MOST = 44  # characters of a label


def draw(rows: Sequence[Row], title: str) -> str:
    """Return the figure of some claims that have results: a scale for each claim, since their units differ."""
    parts, top = [_text(EDGE, 26, title, "bold", 15)], 40.0
    for row in rows:
        block, top = _block(row, top)
        parts += block
    parts += _legend(top + 14)
    height = round(top + 30)
    style = "font-family: Arial, Helvetica, sans-serif; font-size: 12px"
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    frame = f'<rect width="{WIDTH}" height="{height}" rx="6" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">', frame, *parts, "</svg>\n"])


def _block(row: Row, top: float) -> tuple[list[str], float]:
    """Return the lines of one claim, and where they end."""
    scale = row.claim.compared[1]
    shown = [each for each in row.comparisons if each.differences]
    axis = Axis([scale * end for each in shown for end in [*_ends(each), each.margin]] + [0.0])
    parts = [_text(EDGE, top + 14, f"{row.claim.name}, {row.data}: {row.word}", "bold")]
    first, bottom = top + LINE, top + LINE * (1 + len(shown))
    for tick in axis.ticks:
        colour = "#9A9A9A" if tick == 0 else "#E4E4E4"
        parts.append(_line(axis.at(tick), first, axis.at(tick), bottom, colour))
        parts.append(_text(axis.at(tick), bottom + 12, f"{tick:g}", size=10, anchor="middle"))
    parts.append(_text(EDGE, bottom + 12, f"{shown_unit(row.claim)}, right is better", size=10))
    for number, each in enumerate(shown):
        upper, place = first + LINE * number, axis.at(scale * each.margin)
        if each.margin:
            parts.append(_line(place, upper, place, upper + LINE, "#4D4D4D", dashed=True))
        parts += _comparison(each, axis, scale, upper + LINE / 2)
    return parts, bottom + 26


def _comparison(comparison: Comparison, axis: Axis, scale: float, middle: float) -> Iterator[str]:
    """Yield the marks of one comparison."""
    colour = COLOURS.get(comparison.word, OTHER)
    label = f"{comparison.arm} against {comparison.reference}"
    yield _text(EDGE + 10, middle + 4, label if len(label) <= MOST else f"{label[: MOST - 1]}…")
    if not all(map(math.isfinite, comparison.differences)):
        failed = sum(map(math.isinf, comparison.differences))
        words = f"one of the two fails in {failed} of {len(comparison.differences)} seeds"
        yield _text(axis.at(0) + 6, middle + 4, words, size=10, colour=colour)
        return
    ends = [axis.at(scale * end) for end in _ends(comparison)]
    yield _line(ends[0], middle, ends[-1], middle, colour, width=2)
    yield f'<circle cx="{axis.at(scale * comparison.mean):.1f}" cy="{middle:.1f}" r="4" fill="{colour}"/>'


def _ends(comparison: Comparison) -> list[float]:
    """Return what a comparison needs room for."""
    if not all(map(math.isfinite, comparison.differences)):
        return []
    return [end for end in (comparison.interval[0], comparison.mean, comparison.interval[1]) if math.isfinite(end)]


class Axis:
    """The horizontal axis of a claim.

    Args:
        values: The values that it must show.
    """

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 1.0
        self.low, self.high = low - room, high + room
        step = _step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        self.ticks = [round(number * step, 9) for number in range(first, last + 1)]

    def at(self, value: float) -> float:
        """Return the place of a value in pixels."""
        return LABELS + (WIDTH - EDGE - LABELS) * (value - self.low) / (self.high - self.low)


def _step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10 ... that is at least a number.

    Example:
        >>> _step(0.3), _step(7.0)
        (0.5, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _legend(middle: float) -> Iterator[str]:
    """Yield what the marks mean."""
    words = [(COLOURS[HOLDS], HOLDS), (COLOURS[CONTRADICTED], CONTRADICTED), (OTHER, "not shown, or seeds are missing")]
    left = EDGE
    for colour, word in words:
        yield f'<circle cx="{left + 4}" cy="{middle:.1f}" r="4" fill="{colour}"/>'
        yield _text(left + 14, middle + 4, word, size=11)
        left += 34 + 6 * len(word)
    yield _text(left, middle + 4, "line: 95 % interval; dashed: margin, if it is not 0", size=11)


def _text(
    left: float,
    bottom: float,
    words: str,
    weight: str = "normal",
    size: int = 12,
    anchor: str = "start",
    colour: str = "#262626",
) -> str:
    style = f'font-weight="{weight}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{left:.1f}" y="{bottom:.1f}" {style}>{escape(words)}</text>'


def _line(
    left: float, top: float, right: float, bottom: float, colour: str, width: float = 1, dashed: bool = False
) -> str:
    dashes = ' stroke-dasharray="3 3"' if dashed else ""
    ends = f'x1="{left:.1f}" y1="{top:.1f}" x2="{right:.1f}" y2="{bottom:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"{dashes}/>'
