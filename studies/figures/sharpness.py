"""Tables and figures of SAM and ASAM."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claims.sharpness import CALLBACKS, LENGTH, Result, Sharpness
from studies.common import mean_and_spread, print_rows, tidy

COLOURS = dict(zip(CALLBACKS, ("0.3", "#56B4E9", "#E69F00", "#009E73"), strict=True))
PANELS: Mapping[str, tuple[str, float]] = {
    "test_accuracy": ("Accuracy, test images, %", 100),
    "rise": (f"Rise of the loss after {LENGTH:g}, 1/1000", 1000),
    "eigenvalue": ("Largest eigenvalue", 1),
    "cpu_seconds": ("Seconds of all steps", 1),
}

# Tables.


def print_table(claim: Sharpness, results: Sequence[Result]) -> None:
    """Print a row for each arm, over its seeds, and what the columns mean."""
    header = ("arm", "rate", "accuracy", "loss", "rise", "eigenvalue", "seconds")
    print_rows(header, [summarise(arm, results) for arm in claim.arms])
    print(f"\naccuracy: of the test images, in percent. plain: {claim.steps} steps; plain-long: twice as many")
    print("rate: chosen for each arm on another seed. loss: on the training images")
    print(f"rise: of this loss after a move of {LENGTH:g} up its gradient")
    print("eigenvalue: the largest of the Hessian of this loss. seconds: of all steps")


def summarise(arm: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one arm."""
    own = [result for result in results if result.arm == arm]
    return (
        arm,
        "-" if own[0].rate is None else f"{own[0].rate:g}",
        mean_and_spread([100 * result.test_accuracy for result in own]),
        mean_and_spread([result.training_loss for result in own], ".3f"),
        mean_and_spread([result.rise for result in own], ".4f"),
        mean_and_spread([result.eigenvalue for result in own]),
        f"{statistics.mean(result.cpu_seconds for result in own):.1f}",
    )


# Figure.


def draw(claim: Sharpness, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: Sharpness, results: Sequence[Result]) -> Figure:
    """Draw accuracy, curvature and time of each seed, a row for each arm."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (metric, (title, scale)) in zip(axes, PANELS.items(), strict=True):
        draw_dots(axis, claim.arms, {arm: values_of(results, arm, metric, scale) for arm in claim.arms}, COLOURS)
        axis.set_title(title, fontsize=10, loc="left")
    axes[0].invert_yaxis()
    labels = f", {100 * claim.flip:g} % wrong labels" if claim.flip else ""
    seeds = f"{claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(f"Digits{labels}: {claim.steps} steps (plain-long: twice as many), {seeds}", fontsize=11)
    return figure


def values_of(results: Sequence[Any], arm: str, metric: str, scale: float = 1) -> list[float]:
    """Return a measurement of all seeds of an arm."""
    return [scale * getattr(result, metric) for result in results if result.arm == arm]


def draw_dots(
    axis: Axes, arms: Sequence[str], values: Mapping[str, Sequence[float]], colours: Mapping[str, str]
) -> None:
    """Draw a row of dots for each arm, and a bar at the mean."""
    for place, arm in enumerate(arms):
        axis.plot(values[arm], [place] * len(values[arm]), "o", color=colours[arm], markersize=5, alpha=0.7)
        mean = [statistics.mean(values[arm])] if values[arm] else []
        axis.plot(mean, [place] * len(mean), "|", color=colours[arm], markersize=18, markeredgewidth=2)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.set_ylim(-0.5, len(arms) - 0.5)
    tidy(axis)
