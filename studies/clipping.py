"""Compare clipping rules in a training with one bad batch: which rules save the run, and which do not.

::

    python studies/clipping.py --seeds 10
    python studies/clipping.py --factor nan
    python studies/clipping.py --optimizer adamw --factor 1e5 --variants none norm spike

Three linear layers learn handwritten digits. In the middle of the training, one image of a batch is multiplied by 1000 and
carries a wrong label, as a corrupt record would. Each rule is one line in :data:`RULES`; everything else here measures
and draws. ``studies/clipping_spikes.py`` compares the rules in a training whose loss spikes by itself.
"""

from __future__ import annotations

import csv
import statistics
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import Digits, ImageClassifier

from lightning_grad.callbacks import (
    AdaptiveGradientClipping,
    AutoClip,
    GradientCentralization,
    LayerwiseClipping,
    NormClipping,
    SkipNonFinite,
    SpikeClipping,
    ValueClipping,
    ZClip,
)
from studies.common import (
    Follow,
    GradientRecorder,
    Show,
    build_loggers,
    finish_loggers,
    hush,
    mean_and_spread,
    print_rows,
    run_trainings,
    tidy,
    write_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IN_THE_DEMO = """\
Clipped gradients (half a minute). A small network learns handwritten digits.
In the middle of the training, one image of one batch is multiplied by 1000 and
has a wrong label. Each rule is one line, and some of them do not help:

    Trainer(callbacks=[NormClipping(1.0)])
"""

WIDTH, CLASSES = 128, 10
BEFORE, TWICE, HALF = 50, 2.0, 0.5  # steps that define the usual loss, limit of its multiple, least accuracy


@dataclass(frozen=True)
class Rule:
    """A rule, as in the list of callbacks.

    Args:
        text: The call, for titles; AGC stands for AdaptiveGradientClipping.
        build: Function that returns the callbacks.
    """

    text: str
    build: Callable[[], list[Callback]]


# The line in Trainer(callbacks=[...]) of each variant.
RULES = {
    "none": Rule("no rule", list),
    "norm": Rule("NormClipping(1.0)", lambda: [NormClipping(1.0)]),
    "layerwise": Rule("LayerwiseClipping(1.0)", lambda: [LayerwiseClipping(1.0)]),
    "zclip": Rule("ZClip()", lambda: [ZClip()]),
    "autoclip": Rule("AutoClip()", lambda: [AutoClip()]),
    "value": Rule("ValueClipping(1.0)", lambda: [ValueClipping(1.0)]),
    "agc": Rule("AGC(0.1)", lambda: [AdaptiveGradientClipping(0.1)]),
    "agc-head": Rule("AGC(0.1, head=None)", lambda: [AdaptiveGradientClipping(0.1, head=None)]),
    "centralization": Rule("GradientCentralization()", lambda: [GradientCentralization()]),
    "skip": Rule("SkipNonFinite()", lambda: [SkipNonFinite()]),
    "spike": Rule("SpikeClipping()", lambda: [SpikeClipping()]),
}
NEEDS_ADAM = "spike"  # it compares a gradient with Adam's second moment


@dataclass(frozen=True)
class Study:
    """Settings of the study; :func:`parse` describes each field."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    variants: Sequence[str] | None = None
    factor: float = 1000.0
    seeds: int = 3
    steps: int = 220
    output: Path = Path("runs/clipping")
    wandb: str | None = None
    accelerator: str = "auto"
    threads: int = 1

    @property
    def rules(self) -> list[str]:
        """The rules to compare; by default all that work with the optimizer."""
        usable = [name for name in RULES if name != NEEDS_ADAM or self.optimizer == "adamw"]
        return list(self.variants or usable)

    @property
    def bad_step(self) -> int:
        """The step of the bad batch, counted from 0."""
        return self.steps // 2

    def folder(self, variant: str, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / f"{variant}_seed{seed}"


@dataclass(frozen=True)
class Result:
    """The result of one training.

    Args:
        variant: The rule, see :data:`RULES`.
        seed: Its seed, which also splits the digits.
        usual_norm: Median gradient norm of the 50 steps before the bad batch, before the rule acts.
        bad_norm: Gradient norm of the bad batch, before the rule acts.
        used_norm: Gradient norm of the bad batch after the rule acts.
        accuracy_before: Validation accuracy just before the bad batch.
        accuracy: Validation accuracy at the end.
        steps_lost: Steps after the bad batch whose loss is nan or more than twice the largest of the 50 before it.
        outcome: ``"saved"``, ``"damaged"`` or ``"lost"``, see :func:`judge`.
    """

    variant: str
    seed: int
    usual_norm: float
    bad_norm: float
    used_norm: float
    accuracy_before: float
    accuracy: float
    steps_lost: int
    outcome: str


# Training.


def run_study(study: Study) -> list[Result]:
    """Run all trainings, and write ``results.csv`` and ``comparison.png``."""
    hush()
    torch.set_num_threads(study.threads)
    study.output.mkdir(parents=True, exist_ok=True)
    results = run_trainings(study.rules, study.seeds, partial(train, study))
    write_results(results, study.output / "results.csv")
    draw_comparison(study, results).savefig(study.output / "comparison.png", dpi=140)
    return results


def train(study: Study, variant: str, seed: int, show: Show) -> Result:
    """Run one training with one bad batch, and write ``steps.csv``."""
    seed_everything(seed, verbose=False)
    folder, recorder = study.folder(variant, seed), GradientRecorder("val_acc")
    trainer = Trainer(
        callbacks=[
            BadBatch(study.bad_step, study.factor),
            recorder,
            Follow(show, variant, seed),
            *RULES[variant].build(),
        ],
        logger=build_loggers(study.output, folder.name, f"clipping, one bad batch, {study.optimizer}", study.wandb),
        max_steps=study.steps,
        accelerator=study.accelerator,
        devices=1,
        val_check_interval=study.bad_step,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, data = build_module(study.optimizer), Digits(seed=seed)
    trainer.fit(module, data)
    finish_loggers(trainer)
    recorder.write(folder / "steps.csv")
    return measure(variant, seed, recorder, study.bad_step)


def build_module(optimizer: Literal["sgd", "adamw"]) -> LightningModule:
    """Return a new module of the plain project."""
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    rate = {"sgd": 0.05, "adamw": 3e-3}[optimizer]
    net = nn.Sequential(nn.Flatten(), *layers)
    return ImageClassifier(net, optimizer=optimizer, lr=rate, schedule="constant")


class BadBatch(Callback):
    """Corrupt the first sample of one batch: multiply the image by a factor and change the label to the next class.

    The label must be wrong: a network of linear layers and ReLU tends to classify a multiple of an image like the image,
    so with the right label the sample would do no harm.

    Args:
        step: Step of the batch, counted from 0.
        factor: Factor of the image.
    """

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            images, labels = batch
            images[0] *= self.factor
            labels[0] = (labels[0] + 1) % CLASSES


def measure(variant: str, seed: int, recorder: GradientRecorder, bad: int) -> Result:
    """Compute the result of a training from the record."""
    lost = count_lost(recorder.losses, bad)
    return Result(
        variant,
        seed,
        usual_norm=statistics.median(recorder.norms[max(0, bad - BEFORE) : bad]),
        bad_norm=recorder.norms[bad],
        used_norm=recorder.norms_used[bad],
        accuracy_before=recorder.validations[0],
        accuracy=recorder.validations[-1],
        steps_lost=lost,
        outcome=judge(lost, recorder.validations[-1]),
    )


def count_lost(losses: Sequence[float], bad: int) -> int:
    """Count the steps after the bad one whose loss is nan or more than twice the largest of the 50 before it.

    Args:
        losses: Loss of every step.
        bad: The bad step, counted from 0.
    """
    limit = TWICE * max(losses[max(0, bad - BEFORE) : bad])
    return sum(not loss <= limit for loss in losses[bad + 1 :])


def judge(steps_lost: int, accuracy: float) -> str:
    """Return the outcome of a training: lost below half accuracy at the end, else damaged if steps are lost, else saved.

    Example:
        >>> judge(0, 0.97), judge(40, 0.95), judge(120, 0.1)
        ('saved', 'damaged', 'lost')
    """
    if accuracy < HALF:
        return "lost"
    return "damaged" if steps_lost else "saved"


# Printed tables.


def print_table(results: Sequence[Result], study: Study) -> None:
    """Print a row for each rule, over its seeds, and what the columns mean."""
    header = ("rule", "outcome", "steps lost", "accuracy", "norm used")
    print_rows(header, [summarise(variant, results) for variant in study.rules])
    usual, bad = (statistics.median(getattr(r, key) for r in results) for key in ("usual_norm", "bad_norm"))
    print(f"\nThe usual gradient norm is {short_number(usual)}, that of the bad batch {bad:,.0f}.")
    print("norm used: gradient norm of the bad batch after the rule")
    print("steps lost: steps after it with a loss more than twice the largest of the")
    print(f"    {BEFORE} before. damaged: such steps. lost: less than {100 * HALF:.0f} % accuracy at the end")
    print("accuracy: before the bad batch → at the end, on 197 images: too few to rank rules")
    if any("AGC" in RULES[variant].text for variant in study.rules):
        print("AGC: AdaptiveGradientClipping, which exempts the last layer unless head=None")
    if study.seeds > 1:
        print(f"numbers: mean of {study.seeds} seeds, of steps lost with the standard deviation")
    if study.factor == study.factor:
        print("SkipNonFinite skips nan and infinity; this gradient is large but finite.")


def summarise(variant: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one rule."""
    own = [result for result in results if result.variant == variant]
    return (
        RULES[variant].text,
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


def draw_comparison(study: Study, results: Sequence[Result]) -> Figure:
    """Draw the training loss of every step, a panel for each rule, in the color of the outcome."""
    from matplotlib.figure import Figure

    columns = min(5, len(study.rules))
    rows = -(-len(study.rules) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.5, 2.4 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(study.rules) :]:
        axis.set_visible(False)
    tops = [
        draw_rule(axis, study, [result for result in results if result.variant == variant])
        for axis, variant in zip(axes.flat, study.rules, strict=False)
    ]
    axes[0, 0].set_ylim(top=FAR_ABOVE * np.nanmax([*tops, 1.0]))
    axes[0, 0].text(study.bad_step - 3, 0.97, "bad batch", transform=axes[0, 0].get_xaxis_transform(), **NOTE)
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=9)
    seeds = f"{study.seeds} seeds, a line each" if study.seeds > 1 else "one seed"
    image = f"one image times {study.factor:g}" if study.factor == study.factor else "one image all nan"
    bad = f"One bad batch ({image}, with a wrong label) in a training with {OPTIMIZERS[study.optimizer]}"
    accuracy = "validation accuracy before it → at the end"
    figure.suptitle(f"{bad}: which rules save the run\n{accuracy}; {seeds}", fontsize=11)
    return figure


def draw_rule(axis: Axes, study: Study, own: Sequence[Result]) -> float:
    """Draw the losses and the outcome of one rule, and return the largest loss of the bad batch."""
    name, call, top = own[0].variant, RULES[own[0].variant].text, 0.0
    for result in own:
        losses = read_losses(study.folder(name, result.seed))
        top = max(top, losses[study.bad_step])
        axis.plot(np.arange(1, len(losses) + 1), losses, color=OUTCOMES[result.outcome], linewidth=1)
    axis.axvline(study.bad_step + 1, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    worst = max((result.outcome for result in own), key=list(OUTCOMES).index)
    axis.set_title(f"{call}\n", fontsize=9.5, loc="left")
    before, end = (100 * statistics.mean(getattr(r, key) for r in own) for key in ACCURACIES)
    words = f"{outcome_of(own)}: {before:.0f} → {end:.0f} %"
    axis.text(0, 1.03, words, transform=axis.transAxes, fontsize=9, color=OUTCOMES[worst]).set_in_layout(False)
    axis.set_yscale("log")
    axis.set_xlim(0, study.steps)
    axis.margins(y=0)
    tidy(axis)
    return top


def read_losses(folder: Path) -> np.ndarray:
    """Return the loss of every step from ``steps.csv``."""
    with (folder / "steps.csv").open(newline="") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


# Command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Parse the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--optimizer", choices=("sgd", "adamw"), default=default.optimizer, help="optimizer of the training")
    rules = f"rules to compare: {', '.join(RULES)} (default: all that work with the optimizer)"
    add("--variants", nargs="+", choices=RULES, default=SUPPRESS, metavar="RULE", help=rules)
    add("--factor", type=float, default=default.factor, help="factor of the bad image; nan is possible")
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains every rule once")
    add("--steps", type=int, default=default.steps, help="optimizer steps of each training")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    add("--accelerator", default=default.accelerator, help="accelerator of the Trainer")
    add("--threads", type=int, default=default.threads, help="CPU threads; more do not speed up so small a network")
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    study = parse(arguments)
    print_table(run_study(study), study)
    print(f"\nWritten to {study.output}/: comparison.png, results.csv, and steps.csv in a folder for each training.")


if __name__ == "__main__":
    main()
