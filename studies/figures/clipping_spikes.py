"""Tables and figures of clipping rules where the loss spikes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_grad.callbacks import ZClip
from studies.claims.clipping_spikes import EVALUATIONS, LAST_EVALUATIONS, RULES, Result, Spikes, find_spikes
from studies.common import mean_and_spread, print_rows, read_curve, read_table

# Tables.


def print_table(claim: Spikes, results: Sequence[Result]) -> None:
    """Print a row for each arm, over its seeds, and what the columns mean."""
    arms = dict.fromkeys(result.arm for result in results)
    header = ("variant", "validation loss", "spikes", "steps lost", "steps clipped")
    print_rows(header, [summarise(arm, results) for arm in arms])
    print(f"\nvalidation loss: median of the last {LAST_EVALUATIONS} of {EVALUATIONS} validations")
    print("spikes: steps whose training loss is above the median of the 50 steps before by")
    print("    more than 4 robust deviations (1.4826 MAD of those steps, at least 0.02)")
    print("steps lost: from each spike until the loss is below that median again")
    print("steps clipped: steps whose gradients were changed before AdamW used them")
    if "spam" in arms:
        print(
            f"spam: one reset of the moments, after {claim.steps // 2} steps, and a warm-up of {claim.steps // 4} after it"
        )


def summarise(arm: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one arm."""
    own = [result for result in results if result.arm == arm]
    return (
        arm,
        mean_and_spread([result.validation_loss for result in own], ".3f"),
        mean_and_spread([result.spikes for result in own], ".0f" if len(own) == 1 else ".1f"),
        mean_and_spread([result.steps_lost for result in own], ".0f"),
        f"{100 * statistics.mean(result.clipped_share for result in own):.0f} %",
    )


# Figure.

PALETTE = ("0.3", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
COLOURS = dict(zip(RULES, PALETTE, strict=True))
WITH_THRESHOLD = {"zclip": "ZClip", "autoclip": "AutoClip"}
DARK = {"zclip": "#00344F", "autoclip": "#00493A"}  # colours of the thresholds, over the clipped steps


def draw(claim: Spikes, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"comparison": draw_comparison(claim, results)}


def draw_comparison(claim: Spikes, results: Sequence[Result]) -> Figure:
    """Draw the loss of all arms, and below it the gradient norms of those with an adaptive threshold."""
    shown = [arm for arm in claim.arms if arm in WITH_THRESHOLD]
    figure = Figure(figsize=(8.8, 6.4 if shown else 3.8), layout="constrained")
    panels = [["loss"] * len(shown), shown] if shown else [["loss"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(panels, height_ratios=[1.5, 1][: len(panels)])
    text = claim.data.name if claim.data else "sums"
    seeds = f"mean of {claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(
        f"A character transformer learns {text}: AdamW, learning rate {results[0].rate:g}, {seeds}", fontsize=12
    )
    draw_losses(axes["loss"], claim, results)
    for arm in shown:
        first = next(result for result in results if result.arm == arm)
        draw_norms(axes[arm], arm, claim.folder(first))
    for axis in axes.values():
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_xlim(0, claim.steps)
    figure.legend(*axes["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_losses(axis: Axes, claim: Spikes, results: Sequence[Result]) -> None:
    """Draw the loss of each arm, raw for the first seed and smoothed over all, and mark the spikes."""
    floor, top = np.inf, -np.inf
    for place, arm in enumerate(claim.arms):
        own = [result for result in results if result.arm == arm]
        curves = np.array([read_table(claim.folder(result) / "steps.csv")["loss"] for result in own])
        steps, smoothed, colour = np.arange(1, curves.shape[1] + 1), smooth(curves.mean(0)), COLOURS[arm]
        axis.plot(steps, curves[0], color=colour, linewidth=0.7, alpha=0.35)
        axis.plot(steps, smoothed, color=colour, linewidth=2, label=arm)
        spikes = [steps[step] for step, _ in find_spikes(curves[0])]
        height = 0.985 - 0.03 * place  # a row for each arm, so marks do not overlap
        axis.plot(spikes, [height] * len(spikes), "v", color=colour, markersize=5, transform=axis.get_xaxis_transform())
        late = smoothed[len(steps) // 4 :]
        floor, top = min(floor, float(late.min())), max(top, float(late.max()))
    floor, top = floor - 0.15 * (top - floor), top + 0.3 * (top - floor)
    if np.isfinite(top - floor):
        axis.set_ylim(floor, top)
    thin = "of the first seed" if claim.seeds > 1 else "each step"
    axis.set_title(
        f"Training loss, smoothed (thin: {thin}). Triangles above: steps where it spikes", fontsize=10, loc="left"
    )


def draw_norms(axis: Axes, arm: str, folder: Path) -> None:
    """Draw the norms before clipping, the threshold and the clipped steps of the first seed."""
    recorded, colour = read_table(folder / "steps.csv"), COLOURS[arm]
    steps, clipped = np.arange(1, len(recorded["norm"]) + 1), recorded["clipped"] > 0
    threshold = read_threshold(folder / "metrics.csv", arm)
    axis.plot(steps, recorded["norm"], color="0.7", linewidth=0.8, label="norm")
    axis.plot(steps[clipped], recorded["norm"][clipped], ".", color=colour, markersize=4, label="clipped")
    axis.plot(list(threshold), list(threshold.values()), color=DARK[arm], linewidth=1.8, label="threshold")
    axis.set_yscale("log")
    axis.set_ylim(0.5 * recorded["norm"].min(), 8 * recorded["norm"].max())
    share = f"{100 * clipped.mean():.0f} % of steps clipped"
    axis.set_title(f"Gradient norm with {WITH_THRESHOLD[arm]}: {share}", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="upper right", handlelength=1.4, columnspacing=1.2)


def read_threshold(metrics: Path, arm: str) -> dict[int, float]:
    """Return the threshold of a rule by step, from its log."""
    if arm == "autoclip":
        return read_curve(metrics, "grad/autoclip/threshold")
    rule = ZClip()
    mean, deviation = (read_curve(metrics, f"grad/zclip/{key}") for key in ("mean", "deviation"))
    return {step: mean[step] + rule.z_threshold * deviation[step] for step in mean if step > rule.warmup_steps}


def smooth(values: np.ndarray, width: int = 21) -> np.ndarray:
    """Return the running mean, weighted towards the middle, and truncated at the ends."""
    kernel = np.hanning(min(width, len(values)) + 2)[1:-1]
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
