"""Tables and figures of data pruning."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claims.data_pruning import Pruning, Result, split
from studies.common import mean_and_spread, print_rows, tidy

# Tables.


def print_table(claim: Pruning, results: Sequence[Result]) -> None:
    """Print a row for each variant, over its seeds, and what the columns mean."""
    full = statistics.mean(r.samples for r in results if r.variant == "full") if "full" in claim.variants else None
    print(f"\n{kind_of_labels(claim.flip)}")
    header = ("variant", "dropped", "test accuracy", "samples seen", "of all", "CPU time")
    print_rows(header, [summarise(*split(arm), results, full) for arm in claim.arms])
    exception = " (infobatch: epochs)" if claim.equal_by == "steps" and "infobatch" in claim.variants else ""
    print(f"\nbudget: all train for the same {claim.equal_by}{exception}")
    if claim.data is None:
        print("test accuracy: on 200 images, so one image is 0.5 %")
    if claim.seeds > 1:
        print(f"numbers: mean ± standard deviation over {claim.seeds} seeds")
    each_epoch = [variant for variant in claim.variants if variant in ("rs2", "rs2-equal", "infobatch")]
    once = [variant for variant in claim.variants if variant in ("random", "hard", "easy", "offset", "ccs")]
    if each_epoch:
        print(f"{', '.join(each_epoch)}: select again in each epoch")
    if once:
        print(f"{', '.join(once)}: select once, after {claim.score_epoch} of {claim.epochs} epochs")
    if "rs2-equal" in each_epoch:
        print("rs2-equal: drops fewer samples than rs2, so it sees as many as the others")


def summarise(variant: str, prune: float, results: Sequence[Result], full: float | None) -> tuple[str, ...]:
    """Return the row of one variant."""
    own = [result for result in results if (result.variant, result.prune) == (variant, prune)]
    samples = statistics.mean(result.samples for result in own)
    return (
        variant,
        f"{100 * prune:g} %",
        mean_and_spread([100 * result.test_accuracy for result in own]) + " %",
        f"{samples:,.0f}",
        f"{100 * samples / full:.0f} %" if full else "",
        f"{statistics.mean(result.cpu_seconds for result in own):.1f} s",
    )


def kind_of_labels(flip: float) -> str:
    """Describe a training set by its share of wrong labels."""
    return f"{100 * flip:g} % of the training labels wrong" if flip else "all labels right"


# Figure.

COLOURS = {
    "full": "0.45",
    "random": "black",
    "rs2": "#56B4E9",
    "rs2-equal": "#0072B2",
    "hard": "#D55E00",
    "easy": "#F0E442",
    "offset": "#E69F00",
    "ccs": "#009E73",
    "infobatch": "#CC79A7",
}
EDGE = "0.25"
NOTE: dict[str, Any] = {"fontsize": 8, "color": "0.35", "va": "center"}
TICKS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
STRETCH = 0.01  # error at which the axis of accuracies changes from linear to logarithmic


def draw(claim: Pruning, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    from studies.figures import scores

    comparison = {"comparison": draw_comparison(claim, results)}
    return comparison if claim.flip else comparison | scores.draw(claim, results)


def draw_comparison(claim: Pruning, results: Sequence[Result]) -> Figure:
    """Draw the test accuracy of each variant, a row for each dropped share."""
    height = 0.32 * len(claim.variants) + 0.7
    figure = Figure(figsize=(7, 0.9 + height * len(claim.prunes)), layout="constrained")
    axes = figure.subplots(len(claim.prunes), 1, squeeze=False, sharex=True, sharey=True)
    for axis, prune in zip(axes[:, 0], claim.prunes, strict=True):
        draw_accuracies(axis, claim, [result for result in results if result.prune in (0.0, prune)])
        axis.set_title(f"{100 * prune:g} % dropped, {kind_of_labels(claim.flip)}", fontsize=10, loc="left")
    stretch(axes[0, 0], min(result.test_accuracy for result in results))
    for axis in axes[-1]:
        axis.set_xlabel("test accuracy, stretched towards 100 %", fontsize=9)
    seeds = f"mean, lowest and highest of {claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(f"Training on part of the samples, for the same {claim.equal_by}: {seeds}", fontsize=12)
    return figure


def draw_accuracies(axis: Axes, claim: Pruning, results: Sequence[Result]) -> None:
    """Draw a row for each variant, with the share of seen samples on the right."""
    most = max(result.samples for result in results)
    for place, variant in enumerate(claim.variants):
        own = [result for result in results if result.variant == variant]
        accuracies, seen = [result.test_accuracy for result in own], statistics.mean(result.samples for result in own)
        axis.hlines(place, min(accuracies), max(accuracies), color=COLOURS[variant], linewidth=2.5, alpha=0.5)
        axis.plot(statistics.mean(accuracies), place, "o", color=COLOURS[variant], markersize=7, markeredgecolor=EDGE)
        axis.text(1.02, place, f"{100 * seen / most:.0f} %", transform=axis.get_yaxis_transform(), **NOTE)
        if variant == "full":
            axis.axvline(statistics.mean(accuracies), color=COLOURS[variant], linewidth=1, linestyle=":", zorder=0)
    axis.text(1.02, -0.9, "samples seen", transform=axis.get_yaxis_transform(), **NOTE)
    axis.set_yticks(range(len(claim.variants)), claim.variants)
    axis.set_ylim(len(claim.variants) - 0.5, -0.7)
    tidy(axis)


def stretch(axis: Axes, least: float) -> None:
    """Scale accuracies by the logarithm of their error plus 0.01, so 100 % is on the axis."""
    functions = (lambda share: -np.log(1 + STRETCH - np.minimum(share, 1)), lambda value: 1 + STRETCH - np.exp(-value))
    axis.set_xscale("function", functions=functions)
    axis.set_xticks([tick for tick in TICKS if tick >= least - 0.15])
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axis.minorticks_off()
    axis.set_xlim(least - 0.3 * (1 - least) - 0.005, 1.002)
