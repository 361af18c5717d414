"""Tables and figures of clipping rules with one bad batch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.claims.clipping import BEFORE, HALF, RULES, BadBatch, Result
from studies.common import mean_and_spread, print_rows, read_table, tidy

# Tables.


def print_table(claim: BadBatch, results: Sequence[Result]) -> None:
    """Print a row for each rule, over its seeds, and what the columns mean."""
    header = ("rule", "outcome", "steps lost", "accuracy", "norm used")
    print_rows(header, [summarise(arm, results) for arm in claim.arms])
    usual, bad = (statistics.median(getattr(r, key) for r in results) for key in ("usual_norm", "bad_norm"))
    print(f"\nThe usual gradient norm is {short_number(usual)}, that of the bad batch {bad:,.0f}.")
    print("norm used: gradient norm of the bad batch after the rule")
    print("steps lost: steps after it with a loss more than twice the largest of the")
    print(f"    {BEFORE} before. damaged: such steps. lost: less than {100 * HALF:.0f} % accuracy at the end")
    print("accuracy: before the bad batch → at the end, on 197 images: too few to rank rules")
    if any("AGC" in RULES[arm].text for arm in claim.arms):
        print("AGC: AdaptiveGradientClipping, which exempts the last layer unless head=None")
    if claim.seeds > 1:
        print(f"numbers: mean of {claim.seeds} seeds, of steps lost with the standard deviation")
    if claim.factor == claim.factor:
        print("SkipNonFinite skips nan and infinity; this gradient is large but finite.")


def summarise(arm: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one rule."""
    own = [result for result in results if result.arm == arm]
    return (
        RULES[arm].text,
        outcome_of(own),
        mean_and_spread([result.steps_lost for result in own], ".0f"),
        " → ".join(f"{100 * statistics.mean(getattr(r, key) for r in own):.1f}" for key in ACCURACIES) + " %",
        short_number(statistics.mean(result.used_norm for result in own)),
    )


def short_number(value: float) -> str:
    """Format a number with two decimals, or none from 10 on."""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def outcome_of(own: Sequence[Result]) -> str:
    """Return the outcome of all seeds, or the count of each outcome if they differ."""
    counts = {word: sum(result.outcome == word for result in own) for word in OUTCOMES}
    found = {word: counts[word] for word in sorted(counts, key=counts.__getitem__, reverse=True) if counts[word]}
    return ", ".join(found if len(found) == 1 else (f"{count} {word}" for word, count in found.items()))


# Figure.

ACCURACIES = ("accuracy_before", "accuracy")
OUTCOMES = {"saved": "#00805D", "damaged": "#B87700", "lost": "#C4341A"}
FAR_ABOVE = 30.0  # top of the axis, times the loss of the bad batch; larger losses are cut off
NOTE: dict[str, Any] = {"fontsize": 8, "color": "0.35", "ha": "right", "va": "top"}
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


def draw(claim: BadBatch, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: BadBatch, results: Sequence[Result]) -> Figure:
    """Draw the training loss of every step, a panel for each rule, in the color of the outcome."""
    columns = min(5, len(claim.arms))
    rows = -(-len(claim.arms) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.5, 2.4 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(claim.arms) :]:
        axis.set_visible(False)
    tops = [
        draw_rule(axis, claim, [result for result in results if result.arm == arm])
        for axis, arm in zip(axes.flat, claim.arms, strict=False)
    ]
    axes[0, 0].set_ylim(top=FAR_ABOVE * np.nanmax([*tops, 1.0]))
    axes[0, 0].text(claim.bad_step - 3, 0.97, "bad batch", transform=axes[0, 0].get_xaxis_transform(), **NOTE)
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=9)
    seeds = f"{claim.seeds} seeds, a line each" if claim.seeds > 1 else "one seed"
    image = f"one image times {claim.factor:g}" if claim.factor == claim.factor else "one image all nan"
    bad = f"One bad batch ({image}, with a wrong label) in a training with {OPTIMIZERS[claim.optimizer]}"
    accuracy = "validation accuracy before it → at the end"
    figure.suptitle(f"{bad}: which rules save the run\n{accuracy}; {seeds}", fontsize=11)
    return figure


def draw_rule(axis: Axes, claim: BadBatch, own: Sequence[Result]) -> float:
    """Draw the losses and the outcome of one rule, and return the largest loss of the bad batch."""
    call, top = RULES[own[0].arm].text, 0.0
    for result in own:
        losses = read_table(claim.folder(result) / "steps.csv")["loss"]
        top = max(top, losses[claim.bad_step])
        axis.plot(np.arange(1, len(losses) + 1), losses, color=OUTCOMES[result.outcome], linewidth=1)
    axis.axvline(claim.bad_step + 1, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    worst = max((result.outcome for result in own), key=list(OUTCOMES).index)
    axis.set_title(f"{call}\n", fontsize=9.5, loc="left")
    before, end = (100 * statistics.mean(getattr(r, key) for r in own) for key in ACCURACIES)
    words = f"{outcome_of(own)}: {before:.0f} → {end:.0f} %"
    axis.text(0, 1.03, words, transform=axis.transAxes, fontsize=9, color=OUTCOMES[worst]).set_in_layout(False)
    axis.set_yscale("log")
    axis.set_xlim(0, claim.steps)
    axis.margins(y=0)
    tidy(axis)
    return top
