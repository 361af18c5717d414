"""Compare training on part of the samples, selected in several ways, with training on all of them.

::

    python studies/data_pruning.py --seeds 5
    python studies/data_pruning.py --seeds 5 --variants        # only finds wrong labels
    python studies/data_pruning.py --variants full random hard --prunes 0.5 --budget steps
    python studies/data_pruning.py --cifar10 path/to/folder --epochs 200 --score-epoch 20 --prunes 0.5

A small residual network of the plain project learns handwritten digits, once with correct labels and once with a tenth of
the training labels replaced by another class. Each selection is one line in :data:`RULES`; everything else here measures and
draws.

Fair comparison: all variants train for the same epochs, and an epoch of fewer samples has fewer steps (``--budget steps``
keeps the number of steps instead). DataPruning trains on all samples until it scores; RepeatedRandomSubset (RS2) and InfoBatch
drop samples from the first and the second epoch on. The table therefore has the number of samples that each variant has seen,
and ``rs2-equal`` is RS2 with as many samples as the scored variants.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import sys
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import CIFAR10, Digits, ResidualConvNet
from plain_project.cifar10 import Images
from plain_project.data import flip_labels

from lightning_grad.callbacks import DataPruning, InfoBatch, RepeatedRandomSubset
from lightning_grad.data import SampleScores, compare_scores, load_scores
from studies.common import (
    Follow,
    Show,
    build_loggers,
    finish_loggers,
    hush,
    mean_and_spread,
    print_rows,
    progress,
    tidy,
    write_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IN_THE_DEMO = """\
Data pruning (a few seconds). A tenth of the labels of the training digits are wrong.
A small residual network trains for three epochs, then one line scores every sample,
drops none, and shows the hardest. How many wrong labels are among them?

    Trainer(callbacks=[DataPruning(prune=0, epoch=3)])
"""

CLASSES = 10
OFFSET = 0.1  # share of the hardest samples that "offset" and "ccs" drop, because of wrong labels
VALIDATIONS = 4


@dataclass(frozen=True)
class Study:
    """Settings of the study; :func:`parse` describes each field."""

    variants: Sequence[str] = ("full", "random", "rs2", "rs2-equal", "hard", "easy", "offset", "ccs", "infobatch")
    prunes: Sequence[float] = (0.5, 0.8)
    flips: Sequence[float] = (0.0, 0.1)
    seeds: int = 1
    epochs: int = 40
    score_epoch: int = 4
    budget: Literal["epochs", "steps"] = "epochs"
    width: int | None = None
    cifar10: Path | None = None
    limit: int | None = None
    output: Path = Path("runs/data_pruning")
    wandb: str | None = None
    accelerator: str = "auto"
    threads: int = 1

    def trainings(self) -> Iterator[tuple[str, float]]:
        """Yield each variant with each dropped share; training on all samples occurs once."""
        yield from ((variant, 0.0) for variant in self.variants if variant == "full")
        yield from ((variant, prune) for prune in self.prunes for variant in self.variants if variant != "full")

    def name(self, variant: str, prune: float, flip: float, seed: int) -> str:
        """Return the name of one training, which is its folder in the output."""
        return f"flip{flip:g}/{label(variant, prune).replace(' ', '')}_seed{seed}"

    def folder(self, variant: str, prune: float, flip: float, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / self.name(variant, prune, flip, seed)


def label(variant: str, prune: float) -> str:
    """Return the name of a variant with its dropped share.

    Example:
        >>> label("hard", 0.5), label("full", 0.0)
        ('hard 50%', 'full')
    """
    return f"{variant} {100 * prune:g}%" if prune else variant


def scored(prune: float | list[float], study: Study, seed: int, **settings: Any) -> list[Callback]:
    """Return DataPruning without tables and figures, which would be timed too."""
    plain = unaugmented if study.cifar10 else None
    settings = {"epoch": study.score_epoch, "budget": study.budget, "num_shown": 0, "figure": False} | settings
    return [DataPruning(prune, seed=seed, score_dataset=plain, **settings)]


def equal(prune: float, study: Study) -> float:
    """Return the share with which RS2 sees as many samples as DataPruning with ``prune``."""
    return prune * (1 - study.score_epoch / study.epochs)


# The line in Trainer(callbacks=[...]) of each variant, by its dropped share.
RULES: dict[str, Callable[[float, Study, int], list[Callback]]] = {
    "full": lambda prune, study, seed: [],
    "random": lambda prune, study, seed: scored(prune, study, seed, keep="random"),
    "rs2": lambda prune, study, seed: [RepeatedRandomSubset(prune, seed=seed)],
    "rs2-equal": lambda prune, study, seed: [RepeatedRandomSubset(equal(prune, study), seed=seed)],
    "hard": lambda prune, study, seed: scored(prune, study, seed),
    "easy": lambda prune, study, seed: scored(prune, study, seed, keep="easy"),
    "offset": lambda prune, study, seed: scored(prune, study, seed, offset=OFFSET),
    "ccs": lambda prune, study, seed: scored(prune, study, seed, offset=OFFSET, select="ccs"),
    "infobatch": lambda prune, study, seed: [InfoBatch(prune, seed=seed)],
}


@dataclass(frozen=True)
class Result:
    """The result of one training.

    Args:
        variant: The rule, see :data:`RULES`.
        prune: Share of dropped samples.
        flip: Share of wrong training labels.
        seed: Its seed, which also splits the digits and selects the wrong labels.
        test_accuracy: Accuracy on the test images, whose labels are correct.
        samples: Number of samples trained on, with repetitions.
        cpu_seconds: Processor time of training, with validation and scoring.
    """

    variant: str
    prune: float
    flip: float
    seed: int
    test_accuracy: float
    samples: int
    cpu_seconds: float


# Training.


def run_study(study: Study) -> list[Result]:
    """Run all trainings, and write ``results.csv`` and ``comparison.png``."""
    prepare(study)
    names = [label(variant, prune) for variant, prune in study.trainings()]
    results = []
    for flip in study.flips:
        if len(study.flips) > 1:
            print(f"{kind_of_labels(flip)}:", flush=True)
        with progress(names, study.seeds) as show:
            for seed in range(study.seeds):
                results += [train(study, *training, flip, seed, show) for training in study.trainings()]
    write_results(results, study.output / "results.csv")
    draw_comparison(study, results).savefig(study.output / "comparison.png", dpi=140)
    return results


def prepare(study: Study) -> None:
    """Configure the process, and silence two warnings about mistakes that this study makes on purpose."""
    hush()
    warnings.filterwarnings("ignore", ".*(keeps only the hardest|scores at initiali[sz]ation)")
    torch.set_num_threads(study.threads)
    study.output.mkdir(parents=True, exist_ok=True)


def train(study: Study, variant: str, prune: float, flip: float, seed: int, show: Show) -> Result:
    """Run one training, and test the module."""
    recorder, follow = Recorder(), Follow(show, label(variant, prune), seed)
    callbacks = [recorder, follow, *RULES[variant](prune, study, seed)]
    trainer, module = build(
        study, study.name(variant, prune, flip, seed), seed, callbacks, epochs_of(study, variant, prune)
    )
    data = build_data(study, flip, seed)
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start
    accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
    finish_loggers(trainer)
    recorder.write(study.folder(variant, prune, flip, seed))
    return Result(variant, prune, flip, seed, accuracy, sum(recorder.samples), seconds)


def epochs_of(study: Study, variant: str, prune: float) -> int:
    """Return the epochs of a variant. RS2 has no argument budget, so for equal steps it trains for more epochs."""
    if study.budget == "steps" and variant in ("rs2", "rs2-equal"):
        return round(study.epochs / (1 - (prune if variant == "rs2" else equal(prune, study))))
    return study.epochs


def build(
    study: Study, name: str, seed: int, callbacks: list[Callback], epochs: int
) -> tuple[Trainer, LightningModule]:
    """Return a new trainer and a new module of the plain project."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        callbacks=callbacks,
        logger=build_loggers(study.output, name, f"data pruning, budget {study.budget}", study.wandb),
        max_epochs=epochs,
        accelerator=study.accelerator,
        devices=1,
        check_val_every_n_epoch=max(1, epochs // VALIDATIONS),
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, build_module(study)


def build_module(study: Study) -> LightningModule:
    """Return a new module: a small residual network for the digits, one like ResNet-18 for CIFAR-10."""
    if study.cifar10 is None:
        return ResidualConvNet(width=study.width or 8)
    width, stages = study.width or 64, (2, 2, 2, 2)
    return ResidualConvNet(3, width, stages, optimizer="sgd", lr=0.1, weight_decay=5e-4)


def build_data(study: Study, flip: float, seed: int) -> Digits | FlippedCIFAR10:
    """Return new data. Every seed has its own wrong labels and, for digits, its own split."""
    if study.cifar10 is None:
        return Digits(seed=seed, flip=flip)
    return FlippedCIFAR10(study.cifar10, flip, seed, study.limit)


class FlippedCIFAR10(CIFAR10):
    """CIFAR-10 with a share of the training labels replaced by another class.

    Args:
        folder: Folder with the files.
        flip: Share of the training labels to replace.
        seed: Seed of the selection.
        limit: Number of images to read of each file, ``None`` for all.
    """

    train_set: Images

    def __init__(self, folder: Path, flip: float, seed: int, limit: int | None = None) -> None:
        super().__init__(folder, limit=limit)
        self.flip = flip
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        is_new = stage != "test" and not hasattr(self, "train_set")
        super().setup(stage)
        if is_new:
            labels, self.flipped = flip_labels(self.train_set.labels, self.flip, CLASSES, self.seed)
            self.train_set = Images(self.train_set.images, labels, self.augment)


def unaugmented(trainer: Trainer) -> Images:
    """Return the training images of CIFAR-10 without augmentation, for scoring."""
    train_set = trainer.datamodule.train_set  # type: ignore[attr-defined]
    return Images(train_set.images, train_set.labels)


class Recorder(Callback):
    """Record the number of samples and learning rate of every step, and the class counts of the last epoch."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.rates: list[float] = []
        self.classes = np.zeros(CLASSES, dtype=int)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.classes = np.zeros(CLASSES, dtype=int)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        labels = batch[1]
        self.samples.append(len(labels))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.classes += np.bincount(labels.cpu(), minlength=CLASSES)

    def write(self, folder: Path) -> None:
        """Write a table of steps and a table of classes."""
        write_rows(folder / "steps.csv", ("step", "samples", "lr"), zip(self.samples, self.rates, strict=True))
        write_rows(folder / "classes.csv", ("class", "samples"), ((count,) for count in self.classes))


def write_rows(path: Path, header: Sequence[str], rows: Any) -> None:
    """Write numbered rows."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([number, *row] for number, row in enumerate(rows))


def read_column(path: Path, key: str) -> np.ndarray:
    """Read one column of a table of numbers."""
    with path.open(newline="") as file:
        return np.array([float(row[key]) for row in csv.DictReader(file)])


# Scores, and the wrong labels among the hardest samples.


class StopAfterScoring(Callback):
    """End a training after its samples are scored, without changing the schedule of its learning rate."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


def score(
    study: Study, name: str, flip: float, seed: int, epochs: Sequence[int], prune: float = 0.0, **settings: Any
) -> Path:
    """Score all samples after each of these epochs, end the training, and return the folder of the files."""
    name = f"scores/{name}_flip{flip:g}_seed{seed}"
    rule = scored([prune] * len(epochs), study, seed, epoch=list(epochs), **settings)
    trainer, module = build(study, name, seed, [*rule, StopAfterScoring(max(epochs))], study.epochs)
    trainer.fit(module, build_data(study, flip, seed))
    finish_loggers(trainer)
    return study.output / name


def read_scores(folder: Path, epoch: int) -> SampleScores:
    """Read the score file of one scoring."""
    return load_scores(folder / f"scores_epoch{epoch}.npz")


@dataclass(frozen=True)
class Finding:
    """The number of wrong labels among the first samples of an order.

    Args:
        seed: Seed of the scored training, and of the random order.
        order: ``"el2n"``, the hardest first, or ``"random"``.
        total: Number of all samples.
        wrong: Number of all wrong labels.
        looked_at: Number of inspected samples, from the first on.
        found: Number of wrong labels among these.
    """

    seed: int
    order: str
    total: int
    wrong: int
    looked_at: int
    found: int


def find_label_errors(study: Study) -> list[Finding]:
    """Score with EL2N, count wrong labels among the hardest, and write ``label_errors.csv`` and ``.png``."""
    prepare(study)
    flip, findings = max(study.flips), []
    for seed in range(study.seeds):
        shown: dict[str, Any] = {"num_shown": 24, "figure": True} if seed == 0 else {}
        folder = score(study, "el2n", flip, seed, [study.score_epoch], **shown)
        wrong = hardest_wrong(study, folder, flip, seed)
        findings += count_found(wrong, "el2n", seed)
        findings += count_found(np.random.default_rng(seed).permutation(wrong), "random", seed)
    write_results(findings, study.output / "label_errors.csv")
    draw_label_errors(study, findings).savefig(study.output / "label_errors.png", dpi=140)
    return findings


def count_found(is_wrong: np.ndarray, order: str, seed: int) -> list[Finding]:
    """Count the wrong labels among the first samples, up to three times the number of wrong labels.

    Args:
        is_wrong: Whether the label of each sample is wrong, in the order of inspection.
        order: Name of the order.
        seed: Seed of the order.
    """
    total, wrong = len(is_wrong), int(is_wrong.sum())
    sizes = np.unique(np.linspace(0, min(3 * wrong, total), 43).round().astype(int))
    return [Finding(seed, order, total, wrong, int(size), int(is_wrong[:size].sum())) for size in sizes]


def hardest_wrong(study: Study, folder: Path, flip: float, seed: int) -> np.ndarray:
    """Return whether the labels of the samples are wrong, from the hardest sample to the easiest."""
    data = build_data(study, flip, seed)
    data.setup("fit")
    order = read_scores(folder, study.score_epoch).values.argsort(descending=True, stable=True)
    return np.isin(order.numpy(), data.flipped.numpy())


def look_at_scores(study: Study) -> None:
    """Score the first seed with GraNd and EL2N, and write ``scores.png`` and ``histogram.png``."""
    prepare(study)
    flip, epochs = max(study.flips), [0, study.score_epoch]
    score(study, "grand", flip, 0, epochs, score="grand")
    score(study, "el2n", flip, 0, [study.score_epoch])
    cut = score(study, "cut", flip, 0, [study.score_epoch], prune=0.5, offset=OFFSET, num_shown=16, figure=True)
    shutil.copy(cut / f"data_pruning_epoch{study.score_epoch}_scores.png", study.output / "histogram.png")
    draw_scores(study, flip).savefig(study.output / "scores.png", dpi=140)


# Printed tables.


def print_table(results: Sequence[Result], study: Study) -> None:
    """Print a row for each variant, over its seeds, and what the columns mean."""
    for flip in study.flips:
        own = [result for result in results if result.flip == flip]
        full = statistics.mean(r.samples for r in own if r.variant == "full") if "full" in study.variants else None
        print(f"\n{kind_of_labels(flip)}")
        header = ("variant", "dropped", "test accuracy", "samples seen", "of all", "CPU time")
        print_rows(header, [summarise(variant, prune, own, full) for variant, prune in study.trainings()])
    exception = " (infobatch: epochs)" if study.budget == "steps" and "infobatch" in study.variants else ""
    print(f"\nbudget: all train for the same {study.budget}{exception}")
    if study.cifar10 is None:
        print("test accuracy: on 200 images, so one image is 0.5 %")
    if study.seeds > 1:
        print(f"numbers: mean ± standard deviation over {study.seeds} seeds")
    each_epoch = [variant for variant in study.variants if variant in ("rs2", "rs2-equal", "infobatch")]
    once = [variant for variant in study.variants if variant in ("random", "hard", "easy", "offset", "ccs")]
    if each_epoch:
        print(f"{', '.join(each_epoch)}: select again in each epoch")
    if once:
        print(f"{', '.join(once)}: select once, after {study.score_epoch} of {study.epochs} epochs")
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


def print_findings(findings: Sequence[Finding]) -> None:
    """Print the number of wrong labels found with scores and in random order, over the seeds."""
    wrong, total = findings[0].wrong, findings[0].total
    sizes = sorted({finding.looked_at for finding in findings})
    seeds = len({finding.seed for finding in findings})
    rows = []
    for size in [sizes[len(sizes) // 12], sizes[len(sizes) // 6], sizes[len(sizes) // 3], sizes[-1]]:
        counts = [found_of(findings, order, size) for order in ("el2n", "random")]
        rows.append((str(size), *(mean_and_spread(count) for count in counts)))
    print_rows(("samples inspected", "wrong, hardest first", "wrong, random order"), rows)
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    print(f"\n{wrong} of {total} labels are wrong{spread}")


def found_of(findings: Sequence[Finding], order: str, size: int) -> list[int]:
    """Return the number of wrong labels that each seed found among the first ``size`` samples."""
    return [finding.found for finding in findings if (finding.order, finding.looked_at) == (order, size)]


def kind_of_labels(flip: float) -> str:
    """Describe a training set by its share of wrong labels."""
    return f"{100 * flip:g} % of the training labels wrong" if flip else "all labels right"


# Figures.

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
NOTE: dict[str, Any] = {"fontsize": 8, "color": "0.35", "va": "center"}
RIGHT, WRONG, EDGE = "#0072B2", "#D55E00", "0.25"
TICKS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
STRETCH = 0.01  # error at which the axis of accuracies changes from linear to logarithmic


def draw_comparison(study: Study, results: Sequence[Result]) -> Figure:
    """Draw the test accuracy of each variant, a column for each training set and a row for each dropped share."""
    from matplotlib.figure import Figure

    rows, columns = len(study.prunes), len(study.flips)
    height = 0.32 * len(study.variants) + 0.7
    figure = Figure(figsize=(1.6 + 4.2 * columns, 0.9 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for row, prune in zip(axes, study.prunes, strict=True):
        for axis, flip in zip(row, study.flips, strict=True):
            shown = [r for r in results if r.flip == flip and r.prune in (0.0, prune)]
            draw_accuracies(axis, study, shown)
            axis.set_title(f"{100 * prune:g} % dropped, {kind_of_labels(flip)}", fontsize=10, loc="left")
    stretch(axes[0, 0], min(result.test_accuracy for result in results))
    for axis in axes[-1]:
        axis.set_xlabel("test accuracy, stretched towards 100 %", fontsize=9)
    seeds = f"mean, lowest and highest of {study.seeds} seeds" if study.seeds > 1 else "one seed"
    figure.suptitle(f"Training on part of the samples, for the same {study.budget}: {seeds}", fontsize=12)
    return figure


def draw_accuracies(axis: Axes, study: Study, results: Sequence[Result]) -> None:
    """Draw a row for each variant, with the share of seen samples on the right."""
    most = max(result.samples for result in results)
    for place, variant in enumerate(study.variants):
        own = [result for result in results if result.variant == variant]
        accuracies, seen = [result.test_accuracy for result in own], statistics.mean(result.samples for result in own)
        axis.hlines(place, min(accuracies), max(accuracies), color=COLOURS[variant], linewidth=2.5, alpha=0.5)
        axis.plot(statistics.mean(accuracies), place, "o", color=COLOURS[variant], markersize=7, markeredgecolor=EDGE)
        axis.text(1.02, place, f"{100 * seen / most:.0f} %", transform=axis.get_yaxis_transform(), **NOTE)
        if variant == "full":
            axis.axvline(statistics.mean(accuracies), color=COLOURS[variant], linewidth=1, linestyle=":", zorder=0)
    axis.text(1.02, -0.9, "samples seen", transform=axis.get_yaxis_transform(), **NOTE)
    axis.set_yticks(range(len(study.variants)), study.variants)
    axis.set_ylim(len(study.variants) - 0.5, -0.7)
    tidy(axis)


def stretch(axis: Axes, least: float) -> None:
    """Scale accuracies by the logarithm of their error plus 0.01, so that 100 % is on the axis."""
    functions = (lambda share: -np.log(1 + STRETCH - np.minimum(share, 1)), lambda value: 1 + STRETCH - np.exp(-value))
    axis.set_xscale("function", functions=functions)
    axis.set_xticks([tick for tick in TICKS if tick >= least - 0.15])
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axis.minorticks_off()
    axis.set_xlim(least - 0.3 * (1 - least) - 0.005, 1.002)


def draw_label_errors(study: Study, findings: Sequence[Finding]) -> Figure:
    """Draw the hardest and easiest samples, wrong labels framed, and the number of wrong labels found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.45, 1])
    draw_samples(halves[0], study, max(study.flips))
    draw_found(halves[1].subplots(), findings)
    return figure


def draw_found(axis: Axes, findings: Sequence[Finding]) -> None:
    """Draw the number of wrong labels by the number of inspected samples, a line for each seed and order."""
    wrong, sizes = findings[0].wrong, sorted({finding.looked_at for finding in findings})
    for order, colour, name in (("el2n", WRONG, "hardest first (EL2N)"), ("random", "0.45", "random order")):
        for seed in sorted({finding.seed for finding in findings}):
            own = [finding.found for finding in findings if (finding.order, finding.seed) == (order, seed)]
            axis.plot(sizes, own, color=colour, linewidth=1.2, alpha=0.8)
        place = statistics.mean(found_of(findings, order, sizes[-1])) - 0.11 * wrong
        axis.text(sizes[-1], place, name, color=colour, fontsize=9.5, ha="right", va="top")
        count = statistics.mean(found_of(findings, order, sizes[len(sizes) // 3]))
        words = f"{count:.0f} of the first {wrong}"
        axis.annotate(words, (wrong, count), (5, -13), textcoords="offset points", fontsize=8.5, color=colour)
    axis.plot([0, wrong, sizes[-1]], [0, wrong, wrong], ":", color="0.3", linewidth=1, zorder=0)
    axis.text(0.95 * wrong, 1.01 * wrong, "best possible", fontsize=8.5, color="0.3", ha="right", va="bottom")
    axis.axvline(wrong, color="0.8", linewidth=1, zorder=0)
    axis.set(xlim=(0, sizes[-1]), ylim=(0, 1.1 * wrong))
    axis.set_xlabel(f"samples inspected, of {findings[0].total}", fontsize=9)
    axis.set_ylabel("wrong labels found", fontsize=9)
    axis.set_title(f"Wrong labels found ({wrong} in all), a line for each seed", fontsize=10, loc="left")
    tidy(axis)


def draw_samples(figure: Any, study: Study, flip: float, columns: int = 9) -> None:
    """Draw images with their labels. Wrong labels are framed and followed by the correct one."""
    data, right = build_data(study, flip, 0), build_data(study, 0.0, 0)
    data.setup("fit")
    right.setup("fit")
    images, truths, wrong = inputs(data.train_set), inputs(right.train_set), set(data.flipped.tolist())
    values = read_scores(study.output / f"scores/el2n_flip{flip:g}_seed0", study.score_epoch).values
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


def draw_scores(study: Study, flip: float) -> Figure:
    """Draw pairs of scores, the kept share of each class, and the learning rate in shorter epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, 3)
    data, k = build_data(study, flip, 0), study.score_epoch
    data.setup("fit")
    lengths = torch.stack([image.norm() for image, _ in inputs(data.train_set)])
    wrong = np.isin(np.arange(len(lengths)), data.flipped.numpy())
    grand = study.output / f"scores/grand_flip{flip:g}_seed0"
    start, later = (read_scores(grand, epoch).values for epoch in (0, k))
    errors = read_scores(study.output / f"scores/el2n_flip{flip:g}_seed0", k).values
    norm, names = "norm of the input", ("GraNd at initialization", f"GraNd after {k} epochs")
    draw_scatter(axes[0, 0], (lengths, norm), (start, names[0]), wrong)
    draw_scatter(axes[0, 1], (lengths, norm), (later, names[1]), wrong)
    draw_scatter(axes[0, 2], (start, names[0]), (later, names[1]), wrong)
    draw_scatter(axes[1, 0], (errors, f"EL2N after {k} epochs"), (later, names[1]), wrong)
    axes[0, 0].legend(fontsize=8, frameon=False, markerscale=2)
    draw_classes(axes[1, 1], study)
    draw_rates(axes[1, 2], study)
    for axis in axes.flat:
        tidy(axis)
    return figure


def inputs(train_set: Any) -> Any:
    """Return the training set without augmentation."""
    return Images(train_set.images, train_set.labels) if isinstance(train_set, Images) else train_set


def draw_scatter(axis: Axes, x: tuple[Tensor, str], y: tuple[Tensor, str], wrong: np.ndarray) -> None:
    """Draw one score against another, wrong labels in another colour, with the rank correlation."""
    for chosen, colour, name in ((~wrong, RIGHT, "label right"), (wrong, WRONG, "label wrong")):
        axis.plot(x[0].numpy()[chosen], y[0].numpy()[chosen], ".", color=colour, markersize=2.5, alpha=0.6, label=name)
    agreement = compare_scores(x[0], y[0], shares=()).spearman
    axis.set_title(f"Spearman {agreement:.2f}", fontsize=10, loc="left")
    axis.set_xlabel(x[1], fontsize=9)
    axis.set_ylabel(y[1], fontsize=9)


def draw_classes(axis: Axes, study: Study) -> None:
    """Draw the share of each class that a rule keeps, over the seeds."""
    flip, prune = study.flips[0], study.prunes[-1]
    shown = [variant for variant in study.variants if variant in ("random", "hard", "easy", "ccs")]
    total = sum(class_counts(study, flip, seed) for seed in range(study.seeds))
    for place, variant in enumerate(shown):
        folders = [study.folder(variant, prune, flip, seed) for seed in range(study.seeds)]
        kept = sum(read_column(folder / "classes.csv", "samples") for folder in folders)
        width = 0.8 / len(shown)
        places = np.arange(CLASSES) + width * (place - (len(shown) - 1) / 2)
        axis.bar(places, kept / np.maximum(total, 1), width, color=COLOURS[variant], label=variant)
    axis.axhline(1 - prune, color="0.5", linewidth=1, linestyle="--")
    axis.set_xticks(range(CLASSES))
    axis.set_xlabel("class", fontsize=9)
    axis.set_title(f"Kept share of each class, {100 * prune:g} % dropped", fontsize=10, loc="left")
    if shown:
        axis.legend(fontsize=8, frameon=False, ncols=len(shown), columnspacing=1, handlelength=1)


def class_counts(study: Study, flip: float, seed: int) -> np.ndarray:
    """Return the number of training samples of each class."""
    data = build_data(study, flip, seed)
    data.setup("fit")
    return np.bincount([int(target) for _, target in inputs(data.train_set)], minlength=CLASSES)


def draw_rates(axis: Axes, study: Study) -> None:
    """Draw the learning rate of each step for the first seed."""
    for variant, prune in (("full", 0.0), *(("hard", prune) for prune in study.prunes)):
        if (variant, prune) in study.trainings():
            rates = read_column(study.folder(variant, prune, study.flips[0], 0) / "steps.csv", "lr")
            dashes = "-" if prune in (0.0, study.prunes[0]) else "--"
            axis.plot(rates, dashes, color=COLOURS[variant], label=label(variant, prune))
    axis.set_title("Learning rate: the cosine ends at zero", fontsize=10, loc="left")
    axis.set_xlabel("optimizer step", fontsize=9)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)


# Command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Parse the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    rules = (
        "variants to compare: full: all samples; random, hard, easy: DataPruning with this keep; offset and ccs: hard "
        "without the hardest tenth; rs2 and rs2-equal: RepeatedRandomSubset; infobatch. Without a variant, only find "
        "wrong labels"
    )
    add("--variants", nargs="*", choices=RULES, default=default.variants, metavar="VARIANT", help=rules)
    add(
        "--prunes",
        nargs="+",
        type=float,
        default=default.prunes,
        metavar="SHARE",
        help="shares of the samples to drop",
    )
    add(
        "--flips", nargs="+", type=float, default=default.flips, metavar="SHARE", help="shares of wrong training labels"
    )
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains every variant once")
    add("--epochs", type=int, default=default.epochs, help="epochs of each training")
    add("--score-epoch", type=int, default=default.score_epoch, help="epochs after which samples are scored")
    budget = "equal for all variants: epochs (shorter with fewer samples) or steps"
    add("--budget", choices=("epochs", "steps"), default=default.budget, help=budget)
    add("--width", type=int, help="channels of the first stage (default: 8, for CIFAR-10 64)")
    add("--cifar10", type=Path, metavar="FOLDER", help="folder with CIFAR-10; without it, the digits")
    add("--limit", type=int, help="number of CIFAR-10 images to read, for a quick look")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    add("--accelerator", default=default.accelerator, help="accelerator of the Trainer")
    add("--threads", type=int, default=default.threads, help="CPU threads; more do not speed up so small a network")
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    study, written = parse(arguments), []
    if study.variants:
        print_table(run_study(study), study)
        written += ["comparison.png", "results.csv", "a folder for each training"]
    if max(study.flips) > 0:
        print_findings(find_label_errors(study))
        written += ["label_errors.png", "label_errors.csv", "scores/ with tables of the hardest samples"]
        if study.variants:
            look_at_scores(study)
            written += ["histogram.png", "scores.png"]
    print(f"\nWritten to {study.output}/:", *written, sep="\n  ")


if __name__ == "__main__":
    main()
