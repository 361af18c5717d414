"""Tables and figures of N:M sparsity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_grad.functional import RECIPES
from studies.claims.sparsity import Result, Sparsity
from studies.common import mean_and_spread, print_rows, read_curve, tidy

# Tables.


def print_table(claim: Sparsity, results: Sequence[Result]) -> None:
    """Print a row for each recipe, over its seeds, and what the columns mean."""
    pattern = claim.pattern
    header = ("recipe", "test accuracy", f"exactly {pattern}", "step time", "plain strict load")
    rows = [summarise(recipe, results) for recipe in dict.fromkeys(result.arm for result in results)]
    print_rows(header, rows)
    print(f"\nexactly {pattern}: selected weights that follow the pattern in every group")
    print("step time: relative to the dense training of the same seed, roughly")
    print("plain strict load: logits of a plain module with the checkpoint")
    spread = f"mean ± standard deviation of {claim.seeds} seeds\n    " if claim.seeds > 1 else ""
    images = "" if claim.data else "one of 200 images is 0.5 %, so small differences are chance"
    print(f"test accuracy: {spread}{images}")


def summarise(recipe: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one recipe."""
    own = [result for result in results if result.arm == recipe]
    accuracy = mean_and_spread([100 * result.test_accuracy for result in own])
    exact, chosen = (sum(counts) for counts in zip(*((r.exact_weights, r.chosen_weights) for r in own), strict=True))
    dense = {result.seed: result.step_quotient for result in results if result.arm == "dense"}
    ratio = statistics.mean(result.step_quotient / dense.get(result.seed, math.nan) for result in own)
    loads = "same logits" if all(result.loads_strictly for result in own) else "OTHER LOGITS"
    weights = f"{exact} of {chosen}" if chosen else "-"
    return recipe, f"{accuracy} %", weights, f"{ratio:.2f} x", loads


# Figure.

PALETTE = ("#CC79A7", "#D55E00", "#8C510A", "#56B4E9", "#0072B2", "#009E73", "#E69F00")
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": "0.35", "ha": "right"}
COLOURS = {"dense": "0.5", **dict(zip(RECIPES, PALETTE, strict=True))}


def draw(claim: Sparsity, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: Sparsity, results: Sequence[Result]) -> Figure:
    """Draw the validation accuracy, the share of nonzero weights, and the share of mask changes."""
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    panels = [["accuracy", "density"], ["accuracy", "flips"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(panels, width_ratios=[1.25, 1], sharex=True)
    data = "CIFAR-10" if claim.data else "handwritten digits"
    figure.suptitle(f"Training with {claim.pattern} sparsity: {claim.model} on {data}", fontsize=12)
    for recipe in claim.arms:
        own = [result for result in results if result.arm == recipe]
        draw_curves(axes["accuracy"], claim, own, "val_acc", label=recipe)
        if recipe != "dense":
            draw_curves(axes["density"], claim, own, "sparsity/density", drawstyle="steps-post")
            draw_curves(axes["flips"], claim, own, "sparsity/flips")
    style_axes(axes, claim)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_curves(axis: Axes, claim: Sparsity, own: Sequence[Result], key: str, label: str = "", **style: Any) -> None:
    """Draw the mean over the seeds and, if there are several, a thin line for each."""
    curves = [read_curve(claim.folder(result) / "metrics.csv", key) for result in own]
    steps, colour = list(curves[0]), COLOURS[own[0].arm]
    for curve in curves if len(curves) > 1 else []:
        axis.plot(list(curve), list(curve.values()), color=colour, linewidth=0.6, alpha=0.5, **style)
    means = np.mean([list(curve.values()) for curve in curves], axis=0)
    axis.plot(steps, means, color=colour, linewidth=2, label=label, **style)


def style_axes(axes: dict[str, Axes], claim: Sparsity) -> None:
    """Label the panels and their axes, and set limits that show the relevant range."""
    seeds = f", {claim.seeds} seeds (thin) and their mean" if claim.seeds > 1 else ", one seed"
    titles = {
        "accuracy": f"Validation accuracy{seeds}",
        "density": "Nonzero weights",
        "flips": "Mask entries that changed since the last log",
    }
    axes["flips"].set_yscale("log", nonpositive="mask")
    for name, axis in axes.items():
        axis.set_title(titles[name], fontsize=10, loc="left")
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        tidy(axis)
        if name != "density":
            axis.set_xlabel("optimizer step", fontsize=9)
    axes["flips"].yaxis.set_minor_formatter("")
    last = [float(np.asarray(line.get_ydata())[-1]) for line in axes["accuracy"].lines]
    axes["accuracy"].set_ylim(max(0.0, min(last) - 0.12), min(1.005, max(last) + 0.05))
    axes["density"].set_ylim(-0.03, 1.03)
    if not claim.data:
        where = axes["accuracy"].transAxes
        axes["accuracy"].text(0.98, 0.04, "one of the 197 images is 0.5 %", transform=where, **NOTE)
