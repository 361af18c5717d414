"""Figures of scores: GraNd against EL2N, what a selection keeps, and learning rates. They train what they need."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_grad.data import compare_scores
from studies.claim import Run
from studies.claims.data_pruning import CLASSES, OFFSET, Pruning, Result, build_data
from studies.claims.label_errors import LabelErrors, read_scores, score
from studies.common import read_table, tidy
from studies.figures.data_pruning import COLOURS
from studies.figures.label_errors import WRONG, inputs

RIGHT = "#0072B2"


def draw(claim: Pruning, results: Sequence[Result]) -> dict[str, Figure]:
    """Score the first seed with GraNd and EL2N, return ``scores``, and write ``histogram.png``."""
    settings = {name: getattr(claim, name) for name in ("data", "output", "device", "wandb", "width", "limit")}
    scorer = LabelErrors(epochs=claim.epochs, score_epoch=claim.score_epoch, **settings)
    k = scorer.score_epoch
    score_seed(scorer, "grand", [0, k], score="grand")
    score_seed(scorer, "el2n", [k])
    cut = score_seed(scorer, "cut", [k], prune=0.5, offset=OFFSET, num_shown=16, figure=True)
    shutil.copy(cut / f"data_pruning_epoch{k}_scores.png", claim.output / "histogram.png")
    return {"scores": draw_scores(claim, scorer, results)}


def score_seed(scorer: LabelErrors, name: str, epochs: Sequence[int], **settings: Any) -> Path:
    """Score the first seed, and return the folder of the files."""
    seed_everything(0, verbose=False)
    return score(scorer, Run(name, 0), epochs, **settings)


def draw_scores(claim: Pruning, scorer: LabelErrors, results: Sequence[Result]) -> Figure:
    """Draw pairs of scores, the kept share of each class, and the learning rate in shorter epochs."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, 3)
    data, k = build_data(scorer, 0), scorer.score_epoch
    data.setup("fit")
    lengths = torch.stack([image.norm() for image, _ in inputs(data.train_set)])
    wrong = np.isin(np.arange(len(lengths)), data.flipped.numpy())
    start, later = (read_scores(scorer.folder(Run("grand", 0)), epoch).values for epoch in (0, k))
    errors = read_scores(scorer.folder(Run("el2n", 0)), k).values
    norm, names = "norm of the input", ("GraNd at initialization", f"GraNd after {k} epochs")
    draw_scatter(axes[0, 0], (lengths, norm), (start, names[0]), wrong)
    draw_scatter(axes[0, 1], (lengths, norm), (later, names[1]), wrong)
    draw_scatter(axes[0, 2], (start, names[0]), (later, names[1]), wrong)
    draw_scatter(axes[1, 0], (errors, f"EL2N after {k} epochs"), (later, names[1]), wrong)
    axes[0, 0].legend(fontsize=8, frameon=False, markerscale=2)
    draw_classes(axes[1, 1], claim, results)
    draw_rates(axes[1, 2], claim, results)
    for axis in axes.flat:
        tidy(axis)
    return figure


def draw_scatter(axis: Axes, x: tuple[Tensor, str], y: tuple[Tensor, str], wrong: np.ndarray) -> None:
    """Draw one score against another, wrong labels in another colour, with the rank correlation."""
    for chosen, colour, name in ((~wrong, RIGHT, "label right"), (wrong, WRONG, "label wrong")):
        axis.plot(x[0].numpy()[chosen], y[0].numpy()[chosen], ".", color=colour, markersize=2.5, alpha=0.6, label=name)
    agreement = compare_scores(x[0], y[0], shares=()).spearman
    axis.set_title(f"Spearman {agreement:.2f}", fontsize=10, loc="left")
    axis.set_xlabel(x[1], fontsize=9)
    axis.set_ylabel(y[1], fontsize=9)


def draw_classes(axis: Axes, claim: Pruning, results: Sequence[Result]) -> None:
    """Draw the share of each class that a rule keeps, over the seeds."""
    prune = claim.prunes[-1]
    shown = [variant for variant in claim.variants if variant in ("random", "hard", "easy", "ccs")]
    total = sum(class_counts(claim, seed) for seed in sorted({result.seed for result in results}))
    for place, variant in enumerate(shown):
        folders = [claim.folder(r) for r in results if (r.variant, r.prune) == (variant, prune)]
        kept = sum(read_table(folder / "classes.csv")["samples"] for folder in folders)
        width = 0.8 / len(shown)
        places = np.arange(CLASSES) + width * (place - (len(shown) - 1) / 2)
        axis.bar(places, kept / np.maximum(total, 1), width, color=COLOURS[variant], label=variant)
    axis.axhline(1 - prune, color="0.5", linewidth=1, linestyle="--")
    axis.set_xticks(range(CLASSES))
    axis.set_xlabel("class", fontsize=9)
    axis.set_title(f"Kept share of each class, {100 * prune:g} % dropped", fontsize=10, loc="left")
    if shown:
        axis.legend(fontsize=8, frameon=False, ncols=len(shown), columnspacing=1, handlelength=1)


def class_counts(claim: Pruning, seed: int) -> np.ndarray:
    """Return the number of training samples of each class."""
    data = build_data(claim, seed)
    data.setup("fit")
    return np.bincount([int(target) for _, target in inputs(data.train_set)], minlength=CLASSES)


def draw_rates(axis: Axes, claim: Pruning, results: Sequence[Result]) -> None:
    """Draw the learning rate of each step for the first seed."""
    for result in results:
        if result.seed == results[0].seed and result.variant in ("full", "hard"):
            rates = read_table(claim.folder(result) / "steps.csv")["lr"]
            dashes = "-" if result.prune in (0.0, claim.prunes[0]) else "--"
            axis.plot(rates, dashes, color=COLOURS[result.variant], label=result.arm)
    axis.set_title("Learning rate: the cosine ends at zero", fontsize=10, loc="left")
    axis.set_xlabel("optimizer step", fontsize=9)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)
