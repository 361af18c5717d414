"""Compare clipping rules with training without clipping, at a learning rate where the loss spikes.

::

    python studies/clipping_spikes.py
    python studies/clipping_spikes.py --variants none zclip --lr 0.03 --seeds 5
    python studies/clipping_spikes.py --text path/to/book.txt --steps 1000 --wandb

The plain project's character transformer, with one layer, learns a text of sums ("27 + 58 =  85") with AdamW, at eight
times its usual learning rate, which stays high after a warm-up. Each rule is one line in :data:`RULES`; everything else
here measures and draws.

Why sums: all batches are alike, so the loss is smooth and a spike stands out, and the model easily forgets how to carry
digits. On the source code that ``Text`` reads by default, so small a model did not spike at any rate we tried. A rounding
difference soon changes the whole training, so trust several seeds, not one.
"""

from __future__ import annotations

import csv
import random
import statistics
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import CharTransformer, Text

from lightning_grad.callbacks import AdaptiveGradientClipping, AutoClip, MomentumReset, SpikeClipping, ZClip
from studies.common import (
    Follow,
    GradientRecorder,
    Show,
    build_loggers,
    finish_loggers,
    hush,
    mean_and_spread,
    print_rows,
    read_curve,
    run_trainings,
    write_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = len("27 + 58 =  85\n")
WARMUP = 0.1
SHORTEST = 1000  # characters of a text whose last tenth has a window for validation
EVALUATIONS, LAST_EVALUATIONS, VALIDATION_BATCHES = 8, 3, 5
WINDOW, DEVIATIONS, FLOOR = 50, 4.0, 0.02

# The line in Trainer(callbacks=[...]) of each variant, by the number of training steps.
RULES: dict[str, Callable[[int], list[Callback]]] = {
    "none": lambda steps: [],
    "trainer": lambda steps: [],  # Trainer(gradient_clip_val=1.0)
    "zclip": lambda steps: [ZClip()],
    "zclip-bounded": lambda steps: [ZClip(max_norm=1.0)],  # as published
    "autoclip": lambda steps: [AutoClip()],
    "agc": lambda steps: [AdaptiveGradientClipping()],
    # SPAM is published for long trainings: with a reset every 500 steps, this short training would have none.
    "spam": lambda steps: [MomentumReset(every_n_steps=max(1, steps // 2), warmup_steps=steps // 4), SpikeClipping()],
}


@dataclass(frozen=True)
class Study:
    """Settings of the study; :func:`parse` describes each field."""

    variants: Sequence[str] = tuple(RULES)
    seeds: int = 1
    steps: int = 350
    lr: float = 0.04
    text: Path | None = None
    output: Path = Path("runs/clipping_spikes")
    wandb: str | None = None
    accelerator: str = "auto"
    threads: int = 1

    def folder(self, variant: str, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / f"{variant}_seed{seed}"


@dataclass(frozen=True)
class Result:
    """The result of one training.

    Args:
        variant: The rule, see :data:`RULES`.
        seed: Its seed.
        validation_loss: Median over the last three validations.
        spikes: Number of spikes of the training loss, see :func:`find_spikes`.
        steps_lost: Number of steps until the loss recovered from them.
        clipped_share: Share of steps whose gradients were changed before the optimizer used them.
    """

    variant: str
    seed: int
    validation_loss: float
    spikes: int
    steps_lost: int
    clipped_share: float


# Training.


def run_study(study: Study) -> list[Result]:
    """Run all trainings, and write ``results.csv`` and ``comparison.png``."""
    hush()
    torch.set_num_threads(study.threads)
    train_one = partial(train, study, read_text(study))
    results = run_trainings(study.variants, study.seeds, train_one, "{:6.3f}".format)
    write_results(results, study.output / "results.csv")
    draw_comparison(study).savefig(study.output / "comparison.png", dpi=140)
    return results


def train(study: Study, data: Text, variant: str, seed: int, show: Show) -> Result:
    """Run one training, and find its spikes."""
    seed_everything(seed, verbose=False)
    module, folder = build_module(study, data), study.folder(variant, seed)
    recorder = GradientRecorder("val_loss")
    trainer = Trainer(
        callbacks=[recorder, Follow(show, variant, seed, "val_loss"), *RULES[variant](study.steps)],
        gradient_clip_val=1.0 if variant == "trainer" else None,
        logger=build_loggers(study.output, folder.name, f"clipping lr {study.lr:g}", study.wandb),
        max_steps=study.steps,
        accelerator=study.accelerator,
        devices=1,
        val_check_interval=max(1, study.steps // EVALUATIONS),
        check_val_every_n_epoch=None,
        limit_val_batches=VALIDATION_BATCHES,
        num_sanity_val_steps=0,
        log_every_n_steps=max(1, min(5, study.steps // 40)),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    finish_loggers(trainer)
    recorder.write(folder / "steps.csv")
    spikes = find_spikes(recorder.losses)
    return Result(
        variant,
        seed,
        validation_loss=statistics.median(recorder.validations[-LAST_EVALUATIONS:]),
        spikes=len(spikes),
        steps_lost=sum(lost for _, lost in spikes),
        clipped_share=float(np.mean(recorder.clipped)),
    )


def read_text(study: Study) -> Text:
    """Return the text of the study; each window of the sums is one sum."""
    if study.text:
        return Text(study.text, context=64, batch_size=8)
    return Text(write_sums(study.output / "sums.txt"), context=LINE, batch_size=24)


def write_sums(path: Path, lines: int = 20_000) -> Path:
    """Write a text of sums of two numbers below 100. The text is always the same."""
    numbers = random.Random(0)
    pairs = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{a:2} + {b:2} = {a + b:3}\n" for a, b in pairs), encoding="utf-8")
    return path


def build_module(study: Study, data: Text) -> LightningModule:
    """Return a new module of the plain project."""
    return CharTransformer(data.vocabulary_size, data.context, depth=1, lr=study.lr, schedule="warmup", warmup=WARMUP)


def find_spikes(losses: Sequence[float]) -> list[tuple[int, int]]:
    """Find the spikes of a training loss, and their lengths.

    A spike is a step whose loss exceeds the median of the 50 steps before it by more than 4 robust deviations. A robust
    deviation is 1.4826 times the median distance of those 50 losses from their median, and at least 0.02. The spike lasts
    until the loss is below that median again, or the training ends; no other spike is counted meanwhile. A nan loss
    always counts as a spike. The first 50 steps are ignored.

    Args:
        losses: Loss of every step.

    Returns:
        list: The step of each spike, counted from 0, and its length in steps.
    """
    values, spikes, step = np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf, posinf=np.inf), [], WINDOW
    while step < len(values):
        before = values[step - WINDOW : step]
        median = np.median(before)
        deviation = max(1.4826 * float(np.median(np.abs(before - median))), FLOOR)
        if values[step] <= median + DEVIATIONS * deviation:
            step += 1
            continue
        back = np.flatnonzero(values[step:] < median)
        lost = int(back[0]) if len(back) else len(values) - step
        spikes.append((step, lost))
        step += lost
    return spikes


# Printed tables.


def print_table(results: Sequence[Result], steps: int) -> None:
    """Print a row for each variant, over its seeds, and what the columns mean."""
    variants = dict.fromkeys(result.variant for result in results)
    header = ("variant", "validation loss", "spikes", "steps lost", "steps clipped")
    print_rows(header, [summarise(variant, results) for variant in variants])
    print(f"\nvalidation loss: median of the last {LAST_EVALUATIONS} of {EVALUATIONS} validations")
    print("spikes: steps whose training loss is above the median of the 50 steps before by")
    print("    more than 4 robust deviations (1.4826 MAD of those steps, at least 0.02)")
    print("steps lost: from each spike until the loss is below that median again")
    print("steps clipped: steps whose gradients were changed before AdamW used them")
    if "spam" in variants:
        print(f"spam: one reset of the moments, after {steps // 2} steps, and a warm-up of {steps // 4} after it")


def summarise(variant: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one variant."""
    own = [result for result in results if result.variant == variant]
    return (
        variant,
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


def draw_comparison(study: Study) -> Figure:
    """Draw the loss of all variants, and below it the gradient norms of those with an adaptive threshold."""
    from matplotlib.figure import Figure

    shown = [variant for variant in study.variants if variant in WITH_THRESHOLD]
    figure = Figure(figsize=(8.8, 6.4 if shown else 3.8), layout="constrained")
    panels = [["loss"] * len(shown), shown] if shown else [["loss"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(panels, height_ratios=[1.5, 1][: len(panels)])
    text = study.text.name if study.text else "sums"
    seeds = f"mean of {study.seeds} seeds" if study.seeds > 1 else "one seed"
    figure.suptitle(f"A character transformer learns {text}: AdamW, learning rate {study.lr:g}, {seeds}", fontsize=12)
    draw_losses(axes["loss"], study)
    for variant in shown:
        draw_norms(axes[variant], study, variant)
    for axis in axes.values():
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_xlim(0, study.steps)
    figure.legend(*axes["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_losses(axis: Axes, study: Study) -> None:
    """Draw the loss of each variant, raw for the first seed and smoothed over all, and mark the spikes."""
    floor, top = np.inf, -np.inf
    for variant in study.variants:
        curves = np.array([read_steps(study.folder(variant, seed))["loss"] for seed in range(study.seeds)])
        steps, smoothed, colour = np.arange(1, curves.shape[1] + 1), smooth(curves.mean(0)), COLOURS[variant]
        axis.plot(steps, curves[0], color=colour, linewidth=0.7, alpha=0.35)
        axis.plot(steps, smoothed, color=colour, linewidth=2, label=variant)
        spikes = [steps[step] for step, _ in find_spikes(curves[0])]
        height = 0.985 - 0.03 * study.variants.index(variant)  # a row for each variant, so that marks do not overlap
        axis.plot(spikes, [height] * len(spikes), "v", color=colour, markersize=5, transform=axis.get_xaxis_transform())
        late = smoothed[len(steps) // 4 :]
        floor, top = min(floor, float(late.min())), max(top, float(late.max()))
    floor, top = floor - 0.15 * (top - floor), top + 0.3 * (top - floor)
    if np.isfinite(top - floor):
        axis.set_ylim(floor, top)
    thin = "of the first seed" if study.seeds > 1 else "each step"
    axis.set_title(
        f"Training loss, smoothed (thin: {thin}). Triangles above: steps where it spikes", fontsize=10, loc="left"
    )


def draw_norms(axis: Axes, study: Study, variant: str) -> None:
    """Draw the norms before clipping, the threshold and the clipped steps of the first seed."""
    folder, colour = study.folder(variant, 0), COLOURS[variant]
    recorded = read_steps(folder)
    steps, clipped = np.arange(1, len(recorded["norm"]) + 1), recorded["clipped"] > 0
    threshold = read_threshold(folder / "metrics.csv", variant)
    axis.plot(steps, recorded["norm"], color="0.7", linewidth=0.8, label="norm")
    axis.plot(steps[clipped], recorded["norm"][clipped], ".", color=colour, markersize=4, label="clipped")
    axis.plot(list(threshold), list(threshold.values()), color=DARK[variant], linewidth=1.8, label="threshold")
    axis.set_yscale("log")
    axis.set_ylim(0.5 * recorded["norm"].min(), 8 * recorded["norm"].max())
    share = f"{100 * clipped.mean():.0f} % of steps clipped"
    axis.set_title(f"Gradient norm with {WITH_THRESHOLD[variant]}: {share}", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="upper right", handlelength=1.4, columnspacing=1.2)


def read_steps(folder: Path) -> dict[str, np.ndarray]:
    """Read the columns of ``steps.csv``."""
    with (folder / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {"True": 1.0, "False": 0.0}
    return {
        key: np.array([numbers[row[key]] if row[key] in numbers else float(row[key]) for row in rows])
        for key in rows[0]
    }


def read_threshold(metrics: Path, variant: str) -> dict[int, float]:
    """Return the threshold of a rule by step, from its log."""
    if variant == "autoclip":
        return read_curve(metrics, "grad/autoclip/threshold")
    rule = ZClip()
    mean, deviation = (read_curve(metrics, f"grad/zclip/{key}") for key in ("mean", "deviation"))
    return {step: mean[step] + rule.z_threshold * deviation[step] for step in mean if step > rule.warmup_steps}


def smooth(values: np.ndarray, width: int = 21) -> np.ndarray:
    """Return the running mean, weighted towards the middle, and truncated at the ends."""
    kernel = np.hanning(min(width, len(values)) + 2)[1:-1]
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


# Command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Parse the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    rules = (
        "rules to compare: none; trainer: Trainer(gradient_clip_val=1.0); zclip; zclip-bounded: "
        "ZClip(max_norm=1.0); autoclip; agc: AdaptiveGradientClipping; spam: MomentumReset and SpikeClipping "
        "(default: all)"
    )
    add("--variants", nargs="+", choices=RULES, default=SUPPRESS, metavar="VARIANT", help=rules)
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains every variant once")
    add("--steps", type=int, default=default.steps, help="optimizer steps of each training")
    add("--lr", type=float, default=default.lr, help="learning rate after the warm-up, a tenth of the steps")
    text = "UTF-8 text to learn (default: sums); the loss may not spike on other texts"
    add("--text", type=text_file, default=SUPPRESS, help=text)
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    add("--accelerator", default=default.accelerator, help="accelerator of the Trainer")
    add("--threads", type=int, default=default.threads, help="CPU threads; more do not speed up so small a network")
    return Study(**vars(parser.parse_args(arguments)))


def text_file(name: str) -> Path:
    """Return the path of a text. Raise an error of argparse if it cannot be read or is too short."""
    path = Path(name)
    try:
        length = len(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentTypeError(f"cannot read {name} as UTF-8 text: {error}") from error
    if length < SHORTEST:
        raise ArgumentTypeError(f"{name} must have at least {SHORTEST} characters; got {length}.")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    study = parse(arguments)
    results = run_study(study)
    print_table(results, study.steps)
    print(f"\nWritten to {study.output}/: comparison.png, results.csv, and a folder for each training.")


if __name__ == "__main__":
    main()
