"""Tables and figures of wrong labels among the hardest samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plain_project.cifar10 import Images

from studies.claim import Run
from studies.claims.data_pruning import build_data
from studies.claims.label_errors import LabelErrors, Result, read_scores
from studies.common import mean_and_spread, print_rows, tidy, write_table

WRONG = "#D55E00"


def print_table(claim: LabelErrors, results: Sequence[Result]) -> None:
    """Print the number of wrong labels found with scores and in random order, over the seeds."""
    first, seeds = results[0], len({result.seed for result in results})
    last, rows = len(first.looked_at) - 1, []
    for place in (last // 12, last // 6, last // 3, last):
        counts = [found_of(results, order, place) for order in ("el2n", "random")]
        rows.append((str(first.looked_at[place]), *(mean_and_spread(count) for count in counts)))
    print_rows(("samples inspected", "wrong, hardest first", "wrong, random order"), rows)
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    print(f"\n{first.wrong} of {first.total} labels are wrong{spread}")


def found_of(results: Sequence[Result], order: str, place: int) -> list[int]:
    """Return the number of wrong labels that each seed found, by the place in the list of inspected numbers."""
    return [result.found[place] for result in results if result.arm == order]


def draw(claim: LabelErrors, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {"label_errors": draw_label_errors(claim, results)}


def draw_label_errors(claim: LabelErrors, results: Sequence[Result]) -> Figure:
    """Draw the hardest and easiest samples, wrong labels framed, and the found ones; write ``label_errors.csv``."""
    rows = [(each.seed, each.arm, *pair) for each in results for pair in zip(each.looked_at, each.found, strict=True)]
    write_table(claim.output / "label_errors.csv", ("seed", "order", "looked_at", "found"), rows)
    figure = Figure(figsize=(11, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.45, 1])
    draw_samples(halves[0], claim)
    draw_found(halves[1].subplots(), results)
    return figure


def draw_found(axis: Axes, results: Sequence[Result]) -> None:
    """Draw the number of wrong labels by the number of inspected samples, a line for each seed and order."""
    wrong, sizes = results[0].wrong, results[0].looked_at
    last = len(sizes) - 1
    for order, colour, name in (("el2n", WRONG, "hardest first (EL2N)"), ("random", "0.45", "random order")):
        for result in results:
            if result.arm == order:
                axis.plot(sizes, result.found, color=colour, linewidth=1.2, alpha=0.8)
        place = statistics.mean(found_of(results, order, last)) - 0.11 * wrong
        axis.text(sizes[-1], place, name, color=colour, fontsize=9.5, ha="right", va="top")
        count = statistics.mean(found_of(results, order, last // 3))
        words = f"{count:.0f} of the first {wrong}"
        axis.annotate(words, (wrong, count), (5, -13), textcoords="offset points", fontsize=8.5, color=colour)
    axis.plot([0, wrong, sizes[-1]], [0, wrong, wrong], ":", color="0.3", linewidth=1, zorder=0)
    axis.text(0.95 * wrong, 1.01 * wrong, "best possible", fontsize=8.5, color="0.3", ha="right", va="bottom")
    axis.axvline(wrong, color="0.8", linewidth=1, zorder=0)
    axis.set(xlim=(0, sizes[-1]), ylim=(0, 1.1 * wrong))
    axis.set_xlabel(f"samples inspected, of {results[0].total}", fontsize=9)
    axis.set_ylabel("wrong labels found", fontsize=9)
    axis.set_title(f"Wrong labels found ({wrong} in all), a line for each seed", fontsize=10, loc="left")
    tidy(axis)


def draw_samples(figure: Any, claim: LabelErrors, columns: int = 9) -> None:
    """Draw images with their labels. Wrong labels are framed and followed by the correct one."""
    data, right = build_data(claim, 0), build_data(replace(claim, flip=0.0), 0)
    data.setup("fit")
    right.setup("fit")
    images, truths, wrong = inputs(data.train_set), inputs(right.train_set), set(data.flipped.tolist())
    values = read_scores(claim.folder(Run("el2n", 0)), claim.score_epoch).values
    order = values.argsort(descending=True, stable=True).tolist()
    honest = [index for index in order if index not in wrong]
    rows = [order[:columns], order[columns : 2 * columns], honest[:columns], honest[columns : 2 * columns]]
    figure.suptitle("Samples by score. Framed: wrong label (label → correct label)", fontsize=10)
    axes = figure.subplots(5, columns)
    for row, words in ((0, "hardest"), (2, "hardest with\na right label"), (4, "easiest")):
        axes[row, 0].set_ylabel(words, fontsize=9, rotation=0, ha="right", va="center")
    for axis, index in zip(axes.flat, [index for row in [*rows, order[-columns:]] for index in row], strict=True):
        image, given = images[index]
        pixels = image.movedim(0, -1).numpy()
        axis.imshow((pixels - pixels.min()) / (np.ptp(pixels) or 1.0), cmap="gray_r")
        is_wrong = index in wrong
        caption = f"{given} → {truths[index][1]}" if is_wrong else f"{given}"
        axis.set_title(caption, fontsize=8, color=WRONG if is_wrong else "0.2", pad=2)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=WRONG if is_wrong else "0.8", linewidth=2.5 if is_wrong else 0.6)


def inputs(train_set: Any) -> Any:
    """Return the training set without augmentation."""
    return Images(train_set.images, train_set.labels) if isinstance(train_set, Images) else train_set
