"""Render a figure only if none of its kind was rendered in this process: hundreds of fits write the same few figures.

What can make rendering fail or warn counts as a difference between kinds: texts (apart from digits), scales, the number of
artists, and data that are empty, a single point, not finite or not positive.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure

DRAWN: set[Hashable] = set()
"""The kinds that were rendered."""
WRITER = "lightning_grad.utilities.reporting"
"""The module that writes the figures of fits. What a test saves itself is always rendered."""


def draw_each_kind_once() -> None:
    """Replace ``Figure.savefig`` for the rest of the process; of a known kind, an empty figure of that size is written."""
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **rest: Any) -> None:
        kind = kind_of(figure) if sys._getframe(1).f_globals.get("__name__") == WRITER else None
        if kind not in DRAWN:
            save(figure, *arguments, **rest)
            DRAWN.update({kind} - {None})  # one that fails is rendered again
            return
        with patch.object(figure, "draw", lambda *_: None):
            save(figure, *arguments, **rest)

    Figure.savefig = savefig


@contextmanager
def drawn_again() -> Iterator[None]:
    """Render each kind once more, for a test that looks at the pixels."""
    before = set(DRAWN)
    DRAWN.clear()
    try:
        yield
    finally:
        DRAWN.update(before)


def kind_of(figure: Figure) -> Hashable:
    """Return what tells a figure from others whose rendering might go wrong in another way."""
    texts = [_words(text) for text in figure.texts]
    return (*map(_kind_of_axes, figure.axes), *texts, tuple(figure.get_size_inches()), type(figure.get_layout_engine()))


def _kind_of_axes(axes: Any) -> Hashable:
    legend = axes.get_legend()
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else [])]
    artists = [*axes.lines, *axes.collections, *axes.images, *axes.patches]
    counted = Counter((type(artist).__name__, *_look_of(artist)) for artist in artists)
    ticks = [type(part).__name__ for axis in (axes.xaxis, axes.yaxis) for part in (axis.get_major_locator(),)]
    shown = (axes.axison, axes.get_visible(), axes.get_xscale(), axes.get_yscale(), *ticks)
    return (*shown, *map(_words, texts), frozenset(counted.items()))


def _look_of(artist: Any) -> Iterator[Hashable]:
    """Yield what is special about the data of an artist."""
    for name in ("get_xdata", "get_ydata", "get_offsets", "get_array", "get_extents"):
        if not hasattr(artist, name):
            continue
        values = getattr(artist, name)()
        try:
            values = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
        except (TypeError, ValueError):  # dates, words, or a box
            yield name, type(values).__name__
            continue
        finite = np.isfinite(values)
        yield name, min(values.size, 2), bool(finite.all()), bool(finite.any()), bool((values[finite] <= 0).any())


def _words(text: Any) -> str:
    return re.sub(r"\d+", "0", text.get_text())
