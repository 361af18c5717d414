"""Tables and figures of compressed gradients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from studies.claims.communication import REFERENCE, STRATEGIES, Communication, Result
from studies.common import mean_and_spread, print_rows, read_table, tidy

MEANINGS = {
    "dense": "every entry of the gradient, as in DDP",
    "fp16": "every entry, in half precision, by torch's own hook",
    "powersgd": "two thin matrices with this number of columns (PowerSGD)",
    "dgc-99": "the largest 1 % of the entries; the others wait until they grow (DGC)",
    "dgc-99.9": "the same with the largest 0.1 % of the entries",
    "one-bit": "signs of Adam's momentum, once its variance is frozen (1-bit Adam)",
    "unmasked": "without momentum masking",
}


# Tables.


def print_table(claim: Communication, results: Sequence[Result]) -> None:
    """Print a row for each way to send gradients, over its seeds, and what the columns mean."""
    print()
    header = ("gradients", "test accuracy", "kB a step", "MB in all", "smaller by", "unsent")
    print_rows(header, [summarise(gradients, results) for gradients in claim.arms])
    for gradients in claim.arms if claim.metric == "validation_loss" else ():
        losses = [result.validation_loss for result in of(gradients, results)]
        print(
            f"validation loss of {gradients}: {statistics.mean(losses):.4f} (from {min(losses):.4f} to {max(losses):.4f})"
        )
    print(f"\nkB a step: sent by each of the {claim.ranks} ranks in the last step")
    print("MB in all: over the whole training; the first four epochs of DGC are denser")
    print("smaller by: ratio of all gradients to the sent bytes, over the whole training")
    print("unsent: norm of the gradients that a rank has not sent at the end")
    for word, meaning in MEANINGS.items():
        if any(names(word, gradients) for gradients in claim.arms):
            print(f"{word}: {meaning}")
    if claim.seeds > 1:
        print(f"numbers: mean ± standard deviation over {claim.seeds} seeds")
    print("test accuracy: of 200 images, so one image is 0.5 %: ignore small differences")


def names(word: str, gradients: str) -> bool:
    """Return True if a word of :data:`MEANINGS` describes a way to send gradients."""
    return gradients == word or gradients.startswith(f"{word}-") or gradients.endswith(f"-{word}")


def summarise(gradients: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one way to send gradients."""
    own = of(gradients, results)
    residual = statistics.mean(result.residual for result in own)
    return (
        gradients,
        mean_and_spread([100 * result.test_accuracy for result in own]) + " %",
        f"{statistics.mean(result.step_kilobytes for result in own):,.1f}",
        f"{statistics.mean(result.megabytes for result in own):,.1f}",
        f"{statistics.mean(result.ratio for result in own):,.0f} x",
        f"{residual:.2f}" if residual else "-",
    )


def of(gradients: str, results: Sequence[Result]) -> list[Result]:
    """Return the results of one way to send gradients."""
    return [result for result in results if result.arm == gradients]


# Figure.

PALETTE = ("0.45", "black", "#00493A", "#009E73", "#7FCDB5", "#0072B2", "#56B4E9", "#D55E00", "#E69F00")
COLOURS = {**dict(zip(STRATEGIES, PALETTE, strict=True)), "one-bit": "#CC79A7"}


def draw(claim: Communication, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: Communication, results: Sequence[Result]) -> Figure:
    """Draw validation accuracy by epoch and by megabytes sent, and test accuracy at the end."""
    figure = Figure(figsize=(12.5, 2.6 + 0.3 * max(6, len(claim.arms))), layout="constrained")
    by_epoch, by_bytes, at_end = figure.subplots(1, 3)
    for gradients in claim.arms:
        draw_curves(by_epoch, by_bytes, claim, of(gradients, results))
    by_epoch.set_title("Accuracy by epoch", fontsize=10, loc="left")
    by_epoch.set_xlabel("epoch", fontsize=9)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    by_epoch.set_ylabel("validation accuracy in %", fontsize=9)
    by_bytes.sharey(by_epoch)
    by_bytes.set_title("Accuracy by megabytes sent", fontsize=10, loc="left")
    by_bytes.set_xlabel("MB sent by each rank", fontsize=9)
    by_bytes.set_xscale("log")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    draw_test_accuracies(at_end, claim, results)
    for axis in (by_epoch, by_bytes, at_end):
        tidy(axis)
    seeds = f"mean of {claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(
        f"Digits learned by {claim.ranks} processes that send less of their gradients: {seeds}", fontsize=11
    )
    return figure


def draw_curves(by_epoch: Axes, by_bytes: Axes, claim: Communication, own: Sequence[Result]) -> None:
    """Draw the validation accuracy of one way to send gradients, averaged over seeds, with a mark at the end."""
    columns, gradients = [read_table(claim.folder(result) / "epochs.csv") for result in own], own[0].arm
    accuracies, sent = (np.mean([column[key] for column in columns], axis=0) for key in ("val_acc", "megabytes"))
    look: dict[str, Any] = {"color": COLOURS[gradients], "linewidth": 3.0 if gradients == REFERENCE else 1.6}
    by_epoch.plot(columns[0]["epoch"], 100 * accuracies, **look)
    by_bytes.plot(sent, 100 * accuracies, **look)
    by_bytes.plot(sent[-1:], 100 * accuracies[-1:], "o", markersize=7, markeredgecolor="white", zorder=3, **look)


def draw_test_accuracies(axis: Axes, claim: Communication, results: Sequence[Result]) -> None:
    """Draw the test accuracy of every seed and their mean, and the sent megabytes; gray: range of dense."""
    names = []
    for place, gradients in enumerate(claim.arms):
        own, colour = of(gradients, results), COLOURS[gradients]
        shown = [100 * result.test_accuracy for result in own]
        axis.plot([min(shown), max(shown)], [place, place], color=colour, linewidth=1, alpha=0.6)
        axis.plot(shown, [place] * len(shown), "o", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
        axis.vlines(statistics.mean(shown), place - 0.25, place + 0.25, color=colour, linewidth=2.5)
        less = "" if gradients == REFERENCE else f", {statistics.mean(result.ratio for result in own):,.0f} x less"
        names.append(f"{gradients}\n{statistics.mean(result.megabytes for result in own):,.1f} MB{less}")
        if gradients == REFERENCE and len(shown) > 1:
            axis.axvspan(min(shown), max(shown), color="0.93", zorder=0)
            style: dict[str, Any] = {"fontsize": 8, "color": "0.4", "ha": "right", "va": "bottom"}
            axis.text(min(shown) - 0.05, len(claim.arms) - 0.55, f"gray: seeds of {REFERENCE}", **style)
    axis.set_title("Final test accuracy, and megabytes sent", fontsize=10, loc="left")
    axis.set_yticks(range(len(names)), names)
    for label, gradients in zip(axis.get_yticklabels(), claim.arms, strict=True):
        label.set_color(COLOURS[gradients])
    axis.set_ylim(len(names) - 0.5, -0.5)
    lowest = min(100 * result.test_accuracy for result in results)
    axis.set_xlim(min(94.0, lowest - 1), 100.2)  # wide enough that one image looks like a small difference
    axis.set_xlabel("% of 200 test images" + " (dots: seeds, bar: mean)" * (claim.seeds > 1), fontsize=9)
