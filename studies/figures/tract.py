"""Tables and figures of TrAct."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claims.tract import CALLBACKS, Result, StepsToTarget
from studies.common import mean_and_spread, print_rows, tidy
from studies.figures.sharpness import draw_dots, values_of

COLOURS = dict(zip(CALLBACKS, ("0.3", "#0072B2"), strict=True))
WORDS = {"transformer": "A vision transformer with AdamW", "convolutional": "A convolutional network with SGD"}

# Tables.


def print_table(claim: StepsToTarget, results: Sequence[Result]) -> None:
    """Print a row for each arm, over its seeds, and what the columns mean."""
    print_rows(("arm", "rate", "steps", "loss", "accuracy"), [summarise(arm, results) for arm in claim.arms])
    print(f"\nsteps: until the mean of three validations is {100 * claim.target:g} %")
    print("loss: on the validation images at the end. accuracy: of the test images at the end")
    print("rate: chosen for each arm on another seed")


def summarise(arm: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one arm."""
    own = [result for result in results if result.arm == arm]
    steps = values_of(own, arm, "steps_to_target")
    missed = sum(map(math.isinf, steps))
    return (
        arm,
        "-" if own[0].rate is None else f"{own[0].rate:g}",
        f"{missed} of {len(steps)} did not reach it" if missed else mean_and_spread(steps, ".0f"),
        mean_and_spread(values_of(own, arm, "validation_loss"), ".3f"),
        f"{mean_and_spread(values_of(own, arm, 'test_accuracy', 100))} %",
    )


# Figure.


def draw(claim: StepsToTarget, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: StepsToTarget, results: Sequence[Result]) -> Figure:
    """Draw the validation accuracy during training, and the steps to the target of each seed."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=[1.5, 1])
    draw_curves(curves, claim, results)
    reached = {arm: [s for s in values_of(results, arm, "steps_to_target") if math.isfinite(s)] for arm in claim.arms}
    draw_dots(ends, claim.arms, reached, COLOURS)
    ends.invert_yaxis()
    ends.set_title(f"Steps to {100 * claim.target:g} %, each seed", fontsize=10, loc="left")
    seeds = f"{claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(f"{WORDS[claim.model]} on digits, {seeds}, the best rate of each arm", fontsize=11)
    return figure


def draw_curves(axis: Axes, claim: StepsToTarget, results: Sequence[Result]) -> None:
    """Draw the validation accuracy of each arm, the mean over its seeds and their range."""
    for arm in claim.arms:
        curves = 100 * np.array([result.curve for result in results if result.arm == arm])
        steps = claim.every * np.arange(1, curves.shape[1] + 1)
        axis.plot(steps, curves.mean(0), color=COLOURS[arm], linewidth=2, label=arm)
        axis.fill_between(steps, curves.min(0), curves.max(0), color=COLOURS[arm], alpha=0.15, linewidth=0)
    axis.axhline(100 * claim.target, color="0.5", linewidth=1, linestyle=":")
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.set_title("Validation accuracy, % (band: all seeds)", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9)
    tidy(axis)
