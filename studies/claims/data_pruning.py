"""Data pruning: training on part of the samples, selected in several ways, against training on all of them.

A small residual network of the plain project learns handwritten digits, with correct labels or with a tenth of the training
labels replaced by another class. Each selection is one line in :data:`RULES`; everything else here measures.

Fair comparison: all arms train for the same epochs, and an epoch of fewer samples has fewer steps (``--set equal_by=steps``
keeps the number of steps instead). DataPruning trains on all samples until it scores; RepeatedRandomSubset (RS2) and InfoBatch
drop samples from the first and the second epoch on. The table therefore has the number of samples that each arm has seen,
and ``rs2-equal`` is RS2 with as many samples as the scored arms.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project import CIFAR10, Digits, ResidualConvNet
from plain_project.cifar10 import Images
from plain_project.data import flip_labels
from typing_extensions import override

from lightning_grad.callbacks import DataPruning, InfoBatch, RepeatedRandomSubset
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers, write_columns

CLASSES = 10
OFFSET = 0.1  # share of the hardest samples that "offset" and "ccs" drop, because of wrong labels
VALIDATIONS = 4
PRUNES = (0.5, 0.8)


@dataclass(frozen=True, kw_only=True)
class Labelled(Claim[Any]):
    """A claim about images of which some training labels may be wrong.

    Args:
        flip: Share of wrong training labels.
        epochs: Epochs of each training.
        score_epoch: Epochs after which samples are scored.
        equal_by: What is equal for all arms: ``"epochs"`` (shorter with fewer samples) or ``"steps"``.
        width: Channels of the first stage; by default 8, for CIFAR-10 64.
        limit: Number of CIFAR-10 images to read, for a quick look.
    """

    reads = "a folder with CIFAR-10"
    choices: ClassVar = {"equal_by": ("epochs", "steps")}
    flip: float = 0.0
    epochs: int = 40
    score_epoch: int = 4
    equal_by: str = "epochs"
    width: int | None = None
    limit: int | None = None

    def fitted(
        self, run: Run, callbacks: list[Callback], epochs: int | None = None
    ) -> tuple[Trainer, LightningModule, Digits | FlippedCIFAR10, float]:
        """Train, and return the Trainer, the module, the data and the processor time."""
        silence()
        epochs = epochs or self.epochs
        trainer = self.trainer(run, callbacks, max_epochs=epochs, check_val_every_n_epoch=max(1, epochs // VALIDATIONS))
        module, data = build_module(self, run.rate), build_data(self, run.seed)
        start = time.process_time()
        trainer.fit(module, data)
        return trainer, module, data, time.process_time() - start


def silence() -> None:
    """Silence two warnings about mistakes that the claims make on purpose."""
    warnings.filterwarnings("ignore", ".*(keeps only the hardest|scores at initiali[sz]ation)")


def scored(prune: float | list[float], claim: Labelled, seed: int, **settings: Any) -> list[Callback]:
    """Return DataPruning without tables and figures, which would be timed too."""
    plain = unaugmented if claim.data else None
    given: dict[str, Any] = {"epoch": claim.score_epoch, "budget": claim.equal_by, "num_shown": 0, "figure": False}
    return [DataPruning(prune, seed=seed, score_dataset=plain, **given | settings)]


def equal(prune: float, claim: Labelled) -> float:
    """Return the share with which RS2 sees as many samples as DataPruning with ``prune``."""
    return prune * (1 - claim.score_epoch / claim.epochs)


# The line in Trainer(callbacks=[...]) of each selection, by its dropped share.
RULES: dict[str, Callable[[float, Labelled, int], list[Callback]]] = {
    "full": lambda prune, claim, seed: [],
    "random": lambda prune, claim, seed: scored(prune, claim, seed, keep="random"),
    "rs2": lambda prune, claim, seed: [RepeatedRandomSubset(prune, seed=seed)],
    "rs2-equal": lambda prune, claim, seed: [RepeatedRandomSubset(equal(prune, claim), seed=seed)],
    "hard": lambda prune, claim, seed: scored(prune, claim, seed),
    "easy": lambda prune, claim, seed: scored(prune, claim, seed, keep="easy"),
    "offset": lambda prune, claim, seed: scored(prune, claim, seed, offset=OFFSET),
    "ccs": lambda prune, claim, seed: scored(prune, claim, seed, offset=OFFSET, select="ccs"),
    "infobatch": lambda prune, claim, seed: [InfoBatch(prune, seed=seed)],
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is the selection, see :data:`RULES`, with the dropped share.

    Args:
        validation_accuracy: Accuracy on the validation images at the end.
        test_accuracy: Accuracy on the test images, whose labels are correct.
        samples: Number of samples trained on, with repetitions.
        cpu_seconds: Processor time of training, with validation and scoring.
    """

    validation_accuracy: float
    test_accuracy: float
    samples: int
    cpu_seconds: float

    @property
    def variant(self) -> str:
        """The selection."""
        return split(self.arm)[0]

    @property
    def prune(self) -> float:
        """The dropped share."""
        return split(self.arm)[1]


def label(variant: str, prune: float) -> str:
    """Return the name of a variant with its dropped share.

    Example:
        >>> label("hard", 0.5), label("full", 0.0)
        ('hard 50%', 'full')
    """
    return f"{variant} {100 * prune:g}%" if prune else variant


def split(arm: str) -> tuple[str, float]:
    """Return the selection and the dropped share of an arm.

    Example:
        >>> split("hard 50%"), split("full")
        (('hard', 0.5), ('full', 0.0))
    """
    variant, _, share = arm.partition(" ")
    return variant, float(share.rstrip("%") or 0) / 100


ARMS = ("full", *(label(variant, prune) for prune in PRUNES for variant in RULES if variant != "full"))


@dataclass(frozen=True, kw_only=True)
class Pruning(Labelled):
    """Training on part of the samples."""

    result = Result
    name: str = "data-pruning"
    text: str = "With correct labels, selected samples are at most one point worse than all samples."
    arms: Sequence[str] = ARMS
    reference: str = "full"
    metric: str = "test_accuracy"
    margin: float = -0.01
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    chosen_by: str = "validation_accuracy"
    budget: float = 8

    @property
    @override
    def known(self) -> list[str]:
        return [arm for arm in self.arms if split(arm)[0] in RULES and 0 <= split(arm)[1] < 1] + list(ARMS)

    @property
    def variants(self) -> list[str]:
        """The selections of the arms."""
        return list(dict.fromkeys(split(arm)[0] for arm in self.arms))

    @property
    def prunes(self) -> list[float]:
        """The dropped shares of the arms."""
        return list(dict.fromkeys(prune for prune in (split(arm)[1] for arm in self.arms) if prune))

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        """Compare the selections that are meant to replace all samples."""
        meant = ("offset", "ccs") if self.flip else ("rs2", "hard", "ccs", "infobatch")
        return [pair for pair in super().comparisons() if split(pair[0])[0] in meant]

    @override
    def train(self, run: Run) -> Result:
        """Run one training, and test the module."""
        recorder, (variant, prune) = Recorder(), split(run.arm)
        callbacks = [recorder, Follow(run.show), *RULES[variant](prune, self, run.seed)]
        trainer, module, data, seconds = self.fitted(run, callbacks, epochs_of(self, variant, prune))
        validation = trainer.callback_metrics["val_acc"].item()
        accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
        finish_loggers(trainer)
        steps: dict[str, list[Any]] = {"samples": recorder.samples, "lr": recorder.rates}
        write_columns(self.folder(run) / "steps.csv", "step", steps, first=0)
        write_columns(self.folder(run) / "classes.csv", "class", {"samples": recorder.classes}, first=0)
        return Result(run.arm, run.seed, run.rate, validation, accuracy, sum(recorder.samples), seconds)


def epochs_of(claim: Pruning, variant: str, prune: float) -> int:
    """Return the epochs of a variant. RS2 has no argument budget, so for equal steps it trains for more epochs."""
    if claim.equal_by == "steps" and variant in ("rs2", "rs2-equal"):
        return round(claim.epochs / (1 - (prune if variant == "rs2" else equal(prune, claim))))
    return claim.epochs


def build_module(claim: Labelled, rate: float | None = None) -> LightningModule:
    """Return a new module: a small residual network for the digits, one like ResNet-18 for CIFAR-10."""
    if claim.data is None:
        return ResidualConvNet(width=claim.width or 8, lr=rate or 3e-3)
    width, stages = claim.width or 64, (2, 2, 2, 2)
    return ResidualConvNet(3, width, stages, optimizer="sgd", lr=rate or 0.1, weight_decay=5e-4)


def build_data(claim: Labelled, seed: int) -> Digits | FlippedCIFAR10:
    """Return new data. Every seed has its own wrong labels and, for digits, its own split."""
    if claim.data is None:
        return Digits(seed=seed, flip=claim.flip)
    return FlippedCIFAR10(claim.data, claim.flip, seed, claim.limit)


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


_DATA_DIET = "Deep Learning on a Data Diet (2107.07075)"
CLAIMS = (
    Pruning(
        paper=Paper(
            "DataPruning",
            "data_pruning",
            "Scores from early in training select half of CIFAR-10 without a loss of accuracy",
            _DATA_DIET,
        )
    ),
    Pruning(
        name="data-pruning-wrong-labels",
        text="With a tenth of the labels wrong, a selection without the hardest samples is better than all samples.",
        paper=Paper(
            "DataPruning",
            "data_pruning",
            "With wrong labels, training is better without the samples of the highest scores",
            _DATA_DIET,
        ),
        margin=0.0,
        flip=0.1,
    ),
)
