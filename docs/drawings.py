"""Draw the pictures of the documentation that need no training: ``python docs/drawings.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

IMAGES = Path(__file__).parent / "images"

# Name: left edge, bottom and text of a box. All boxes have the same size.
WIDTH, HEIGHT = 2.55, 1.0
CONCEPTS = {
    "Source": (0.3, 4.5, "a parameter, or a tensor\ncomputed from parameters alone"),
    "Binding": (3.5, 4.5, "contribution of the call\nas a function of $g$"),
    "Use": (6.7, 4.5, "one call with detached\nparameters and a hook on $y$"),
    "Layout": (6.7, 2.7, "the dimension of $y$\nthat holds the samples"),
    "Contribution": (6.7, 0.9, "the gradient of each sample,\nin its cheapest form"),
    "SquaredNorms": (3.5, 0.9, "adds the uses of a parameter,\nthen squares of all parameters"),
    "Leaf": (0.3, 2.7, "a parameter without a rule,\nstill in the graph"),
}
ARROWS = [("Source", "Binding"), ("Binding", "Use"), ("Use", "Layout"), ("Layout", "Contribution")]
PASSES = [  # left edge, bottom, height, title, colour
    (0.1, 4.3, 1.65, "Forward pass, under the Tracer", "#EAF2FA"),
    (3.3, 2.5, 1.4, "First batch only: backward\npasses of single losses", "#FBF3E4"),
    (3.3, 0.6, 1.65, "One backward pass of all losses", "#E9F5EF"),
]
INK, BLUE = "0.25", "#0072B2"


def draw_per_sample_gradients() -> Figure:
    """Draw the steps from a forward pass to the norm of each sample's gradient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 9.55), ylim=(0.5, 6.05))
    axis.axis("off")
    for left, bottom, height, title, colour in PASSES:
        axis.add_patch(_rounded(left, bottom, 9.45 - left, height, colour, "none"))
        axis.text(left + 0.2, bottom + height - 0.12, title, fontsize=10, color=INK, va="top", style="italic")
    for number, (name, (left, bottom, words)) in enumerate(CONCEPTS.items(), 1):
        axis.add_patch(_rounded(left, bottom, WIDTH, HEIGHT, "white", BLUE))
        axis.text(left + 0.12, bottom + 0.76, f"{number}  {name}", fontsize=11, color=BLUE, weight="bold", va="center")
        axis.text(left + 0.12, bottom + 0.33, words, fontsize=9, color=INK, va="center", linespacing=1.3)
    for start, end in ARROWS:
        _join(axis, start, end)
    _join(axis, "Contribution", "SquaredNorms", backwards=True)
    _point(axis, (1.55, 4.5), (1.55, 3.7), "no rule", (1.65, 4.05))
    _point(axis, (1.55, 2.7), (3.5, 1.6), "one backward pass\nfor each sample", (0.5, 2.05))
    _point(axis, (3.5, 1.15), (2.6, 1.15), "the norms, (B,)", (1.2, 1.15))
    axis.text(7.85, 2.38, "gradient $g$ of $y$, samples first", fontsize=9, color=INK, va="center", ha="right")
    return figure


def _rounded(left: float, bottom: float, width: float, height: float, fill: str, edge: str) -> FancyBboxPatch:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    return FancyBboxPatch((left, bottom), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.4)


def _join(axis: Axes, start: str, end: str, backwards: bool = False) -> None:
    """Draw an arrow from one box to the next, which is to its right or below it."""
    (left, bottom, _), (right, below, _) = CONCEPTS[start], CONCEPTS[end]
    if backwards:
        _point(axis, (left, bottom + 0.5), (right + WIDTH, below + 0.5))
    elif bottom == below:
        _point(axis, (left + WIDTH, bottom + 0.5), (right, below + 0.5))
    else:
        _point(axis, (left + WIDTH / 2, bottom), (right + WIDTH / 2, below + HEIGHT))


def _point(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], words: str = "", at: tuple[float, float] = (0, 0)
) -> None:
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    )
    if words:
        axis.text(*at, words, fontsize=9, color=INK, va="center")


def main() -> None:
    """Draw all pictures."""
    draw_per_sample_gradients().savefig(IMAGES / "per_sample_gradients.png", dpi=140)


if __name__ == "__main__":
    main()
