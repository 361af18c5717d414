"""Tables and figures of optimizers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claims.optimizers import SWAPS, Optimizers, Result
from studies.common import mean_and_spread, print_rows, read_curve, tidy

COLOURS = dict(zip(SWAPS, ("0.3", "#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
WORDS = {"digits": "A vision transformer classifies digits", "characters": "A transformer predicts characters"}

# Tables.


def print_table(claim: Optimizers, results: Sequence[Result]) -> None:
    """Print a row for each optimizer, over its seeds, and what the columns mean."""
    print_rows(("optimizer", "rate", "loss", "accuracy", "state"), [summarise(arm, results) for arm in claim.arms])
    tested = "test images" if claim.model == "digits" else "next characters, validation text"
    print(f"\nloss: on the validation data at the end. accuracy: of {tested}")
    print("rate: chosen for each optimizer on another seed")
    print("state: memory of the optimizer's state, divided by that of the weights")


def summarise(arm: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one optimizer."""
    own = [result for result in results if result.arm == arm]
    rate = own[0].rate
    return (
        arm,
        "-" if rate is None else f"{rate:g}",
        mean_and_spread([result.validation_loss for result in own], ".3f"),
        f"{mean_and_spread([100 * result.test_accuracy for result in own])} %",
        f"{statistics.mean(result.state_share for result in own):.2f}",
    )


# Figure.


def draw(claim: Optimizers, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: Optimizers, results: Sequence[Result]) -> Figure:
    """Draw the validation loss during training, and at the end for each seed."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=[1.5, 1])
    draw_curves(curves, claim, results)
    draw_ends(ends, claim, results)
    seeds = f"{claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(f"{WORDS[claim.model]}: {claim.steps} steps, {seeds}, the best rate of each optimizer", fontsize=11)
    return figure


def draw_curves(axis: Axes, claim: Optimizers, results: Sequence[Result]) -> None:
    """Draw the validation loss of each optimizer, the mean over its seeds and their range."""
    for arm in claim.arms:
        rows = [read_curve(claim.folder(each) / "metrics.csv", "val_loss") for each in results if each.arm == arm]
        steps = sorted(
            set.intersection(*(set(row) for row in rows)) & set(range(claim.steps + 1))
        )  # one more follows the fit
        losses = np.array([[row[step] for step in steps] for row in rows])
        axis.plot(steps, losses.mean(0), color=COLOURS[arm], linewidth=2, label=arm)
        axis.fill_between(steps, losses.min(0), losses.max(0), color=COLOURS[arm], alpha=0.15, linewidth=0)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.set_title("Validation loss (band: all seeds)", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9)
    tidy(axis)


def draw_ends(axis: Axes, claim: Optimizers, results: Sequence[Result]) -> None:
    """Draw the compared measurement of each seed, a row for each optimizer."""
    for place, arm in enumerate(claim.arms):
        values = [claim.scale * getattr(result, claim.metric) for result in results if result.arm == arm]
        axis.plot(values, [place] * len(values), "o", color=COLOURS[arm], markersize=5, alpha=0.7)
        axis.plot([statistics.mean(values)], [place], "|", color=COLOURS[arm], markersize=18, markeredgewidth=2)
    axis.set_yticks(range(len(claim.arms)), list(claim.arms))
    axis.invert_yaxis()
    axis.set_title(f"{claim.metric.replace('_', ' ')} at the end, each seed".capitalize(), fontsize=10, loc="left")
    axis.set_xlabel(claim.unit or "loss", fontsize=9)
    tidy(axis)
