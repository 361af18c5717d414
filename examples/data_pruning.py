"""Training on a part of the samples, chosen in several ways, against training on all: with right labels and with wrong ones.

::

    python examples/data_pruning.py --seeds 5
    python examples/data_pruning.py --variants full random hard --prunes 0.5 --budget steps
    python examples/data_pruning.py --cifar10 path/to/folder --epochs 200 --score-epoch 20 --prunes 0.5

A small residual network of the plain project learns handwritten digits, once as they are and once with a tenth of the
training labels replaced by another class. What chooses the samples is one line in :data:`RULES`; all else here measures and
draws.

What is fair to compare: all train for the same epochs, and an epoch of fewer samples has fewer steps (``--budget steps`` keeps
the steps instead). DataPruning trains on everything until it scores, RepeatedRandomSubset (RS2) and InfoBatch leave samples out
before. So the table says how many samples each has seen, and ``rs2-equal`` is RS2 with as many as the scored variants.
"""

from __future__ import annotations

import csv
import shutil
import statistics
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
from plain_project import CIFAR10, Digits, ResidualConvNet
from plain_project.cifar10 import Images
from plain_project.data import flip_labels
from study import Follow, Show, build_loggers, finish_loggers, hush, print_rows, progress, write_results
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks import DataPruning, InfoBatch, RepeatedRandomSubset
from lightning_grad.data import SampleScores, compare_scores, load_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = 10
OFFSET = 0.1  # share of the hardest that "offset" and "ccs" leave out, against wrong labels
VALIDATIONS = 4
FOLLOWS = "full", "infobatch"  # variants that have nothing to do with a score


@dataclass(frozen=True)
class Study:
    """What is trained and where the results go; :func:`parse` says what each field means."""

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
        """Yield each variant with the share that it leaves out; training on all leaves out none, and comes once."""
        yield from ((variant, 0.0) for variant in self.variants if variant == "full")
        yield from ((variant, prune) for prune in self.prunes for variant in self.variants if variant != "full")

    def name(self, variant: str, prune: float, flip: float, seed: int) -> str:
        """Return the name of one training, which is its folder in the output."""
        return f"flip{flip:g}/{label(variant, prune).replace(' ', '')}_seed{seed}"

    def folder(self, variant: str, prune: float, flip: float, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / self.name(variant, prune, flip, seed)


def label(variant: str, prune: float) -> str:
    """Name a variant with what it leaves out.

    Example:
        >>> label("hard", 0.5), label("full", 0.0)
        ('hard 50%', 'full')
    """
    return f"{variant} {100 * prune:g}%" if prune else variant


def scored(prune: float, study: Study, seed: int, **settings: Any) -> list[Callback]:
    """Return DataPruning as this study uses it: no page, table or figure, which are not part of what is timed."""
    plain = unaugmented if study.cifar10 else None
    settings = {"epoch": study.score_epoch, "budget": study.budget, "show": 0, "figure": False} | settings
    return [DataPruning(prune, seed=seed, score_dataset=plain, **settings)]


def equal(prune: float, study: Study) -> float:
    """Return the share that RS2 leaves out of every epoch to see as many samples as what prunes after the scoring epoch."""
    return prune * (1 - study.score_epoch / study.epochs)


# The line in Trainer(callbacks=[...]) of each variant, for the share it leaves out.
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
    """What one training came to.

    Args:
        variant: Its rule, see :data:`RULES`.
        prune: Share that it leaves out.
        flip: Share of the training labels that are wrong.
        seed: Its seed, also of the split of the digits and of the wrong labels.
        test_accuracy: On the test images, whose labels are right.
        samples: Samples trained on, each as often as it came.
        cpu_seconds: Time of the process in training, with validation and scoring, whatever else the machine did.
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
    """Train everything, and write ``results.csv`` and ``comparison.png``."""
    prepare(study)
    names = [label(variant, prune) for variant, prune in study.trainings()]
    results = []
    for flip in study.flips:
        print(f"{kind_of_labels(flip)}:", flush=True)
        with progress(names, study.seeds) as show:
            for seed in range(study.seeds):
                results += [train(study, *training, flip, seed, show) for training in study.trainings()]
    write_results(results, study.output / "results.csv")
    draw_comparison(study, results).savefig(study.output / "comparison.png", dpi=140)
    return results


def prepare(study: Study) -> None:
    """Set what holds for the process, and silence two warnings about what this study does to show why they are there."""
    hush()
    warnings.filterwarnings("ignore", ".*(keeps only the hardest|scores at initialisation)")
    torch.set_num_threads(study.threads)
    study.output.mkdir(parents=True, exist_ok=True)


def train(study: Study, variant: str, prune: float, flip: float, seed: int, show: Show) -> Result:
    """Train once, and test."""
    recorder, follow = Recorder(), Follow(show, label(variant, prune), seed)
    callbacks = [recorder, follow, *RULES[variant](prune, study, seed)]
    trainer, module = build(study, study.name(variant, prune, flip, seed), seed, callbacks, epochs_of(study, variant, prune))
    data = build_data(study, flip, seed)
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start
    accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
    finish_loggers(trainer)
    recorder.write(study.folder(variant, prune, flip, seed))
    return Result(variant, prune, flip, seed, accuracy, sum(recorder.samples), seconds)


def epochs_of(study: Study, variant: str, prune: float) -> int:
    """Return how many epochs a variant trains for: RS2 has no budget of its own, so for equal steps it trains for more."""
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
    stages, sgd = (2, 2, 2, 2), {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
    return ResidualConvNet(3, study.width or 64, blocks_per_stage=stages, **sgd)


def build_data(study: Study, flip: float, seed: int) -> Digits | FlippedCIFAR10:
    """Return new data; every seed has its own wrong labels, and of the digits its own split."""
    if study.cifar10 is None:
        return Digits(seed=seed, flip=flip)
    return FlippedCIFAR10(study.cifar10, flip, seed, study.limit)


class FlippedCIFAR10(CIFAR10):
    """CIFAR-10 with a share of the training labels replaced by another class.

    Args:
        folder: Folder with the files.
        flip: Share of the training labels that are replaced.
        seed: Seed of the choice.
        limit: Read only so many images of each file, ``None`` for all.
    """

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
    """Return the training images of CIFAR-10 as they are, to be scored."""
    train_set = trainer.datamodule.train_set  # type: ignore[attr-defined]
    return Images(train_set.images, train_set.labels)


class Recorder(Callback):
    """Keep the number of samples and the learning rate of every step, and the classes of the samples of the last epoch."""

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
        """Write a row for each step, and one for each class."""
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
    """End a training when its samples are scored; its learning rate until then is that of the whole training."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


def score(study: Study, kind: str, flip: float, seed: int, epochs: Sequence[int], **settings: Any) -> Path:
    """Score all samples after these epochs, prune none (or as said), and return the folder of what is written."""
    name = f"scores/{kind}_flip{flip:g}_seed{seed}"
    rule = scored(0.0, study, seed, epoch=list(epochs), **{"prune": [0.0] * len(epochs), "score": kind} | settings)
    trainer, module = build(study, name, seed, [*rule, StopAfterScoring(max(epochs))], study.epochs)
    trainer.fit(module, build_data(study, flip, seed))
    finish_loggers(trainer)
    return study.output / name
