"""Tables and figures of local steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claims.local_steps import REFERENCE, STRATEGIES, LocalSteps, Result
from studies.common import mean_and_spread, print_rows, read_table, tidy

MEANINGS = {
    "dense": "DDP: the gradient of every step",
    "local": "local SGD: the mean of the weights, every so many steps",
    "diloco": "DiLoCo: the same with an outer momentum",
    "int8": "moves are sent as bytes",
    "topk": "only the largest 3 % of the moves are sent",
    "overlap": "ranks train on during an exchange",
}
PALETTE = ("0.45", "#00493A", "#009E73", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7")
COLOURS = dict(zip(STRATEGIES, PALETTE, strict=True))


# Tables.


def print_table(claim: LocalSteps, results: Sequence[Result]) -> None:
    """Print a row for each way to exchange, over its seeds, and what the columns mean."""
    print()
    measured = "test accuracy" if claim.model == "digits" else "loss"
    print_rows(("exchange", measured, "MB in all", "smaller by", "seconds"), [_row(arm, results) for arm in claim.arms])
    print(f"\nMB in all: sent by each of the {claim.ranks} ranks over the whole training")
    print("smaller by: ratio of all gradients to the sent bytes")
    print("seconds: of the training steps, on ranks that share one machine")
    for word, meaning in MEANINGS.items():
        if any(word in arm.split("-") for arm in claim.arms):
            print(f"{word}: {meaning}")
    if claim.seeds > 1:
        print(f"numbers: mean ± standard deviation over {claim.seeds} seeds")


def _row(arm: str, results: Sequence[Result]) -> tuple[str, ...]:
    own = of(arm, results)
    accuracy = mean_and_spread([100 * result.test_accuracy for result in own]) + " %"
    loss = mean_and_spread([result.validation_loss for result in own], ".3f")
    is_tested = any(result.test_accuracy != result.validation_accuracy for result in results)
    return (
        arm,
        accuracy if is_tested else loss,
        f"{statistics.mean(result.megabytes for result in own):,.1f}",
        f"{statistics.mean(result.ratio for result in own):,.0f} x",
        f"{statistics.mean(result.seconds for result in own):,.1f}",
    )


def of(arm: str, results: Sequence[Result]) -> list[Result]:
    """Return the results of one way to exchange."""
    return [result for result in results if result.arm == arm]


# Figure.


def draw(claim: LocalSteps, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    for arm in claim.arms:
        columns = [read_table(claim.folder(result) / "evaluations.csv") for result in of(arm, results)]
        _draw_curve(by_bytes, arm, columns, "megabytes")
        _draw_curve(by_time, arm, columns, "seconds")
    by_bytes.set(xscale="log", xlabel="MB sent by each rank", ylabel="validation loss")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_time.set(xlabel="seconds on one machine, without validation")
    for axis in (by_bytes, by_time):
        tidy(axis)
    data = "Digits" if claim.model == "digits" else "Characters"
    seeds = f"mean of {claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(
        f"{data} learned by {claim.ranks} ranks that exchange weights once in a while: {seeds}", fontsize=11
    )
    figure.legend(*by_bytes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return {"comparison": figure}


def _draw_curve(axis: Axes, arm: str, columns: Sequence[dict[str, np.ndarray]], key: str) -> None:
    """Draw the mean loss over seeds, from the first validation before which something was sent."""
    losses, places = (np.mean([column[name] for column in columns], axis=0) for name in ("val_loss", key))
    width, sent = (2.6 if arm == REFERENCE else 1.6), places > 0
    axis.plot(places[sent], losses[sent], color=COLOURS[arm], linewidth=width, marker="o", markersize=3, label=arm)
