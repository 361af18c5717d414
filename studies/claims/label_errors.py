"""Wrong labels among the hardest samples, by the scores of a short training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_grad.data import SampleScores, load_scores
from studies import claim as base
from studies.claim import Run
from studies.claims.data_pruning import Labelled, build_data, scored
from studies.common import finish_loggers

IN_THE_DEMO = """\
Data pruning (a few seconds). A tenth of the labels of the training digits are wrong.
A small residual network trains for three epochs, then one line scores every sample,
drops none, and shows the hardest. How many wrong labels are among them?

    Trainer(callbacks=[DataPruning(prune=0, epoch=3)])
"""


@dataclass(frozen=True)
class Result(base.Result):
    """The number of wrong labels among the first samples of an order, which is the arm.

    Args:
        total: Number of all samples.
        wrong: Number of all wrong labels.
        looked_at: Numbers of inspected samples, from the first on.
        found: Numbers of wrong labels among these.
        share: Found share, after inspecting as many samples as there are wrong labels.
    """

    total: int
    wrong: int
    looked_at: list[int]
    found: list[int]
    share: float


@dataclass(frozen=True, kw_only=True)
class LabelErrors(Labelled):
    """Wrong labels found by scores, and in random order.

    Args:
        num_shown: Number of samples that the first seed draws.
    """

    result = Result
    least: ClassVar = {"num_shown": 0}
    name: str = "label-errors"
    text: str = (
        "Most wrong labels are among the hardest samples by EL2N, once as many are inspected as there are wrong ones."
    )
    arms: Sequence[str] = ("el2n", "random")
    reference: str = "random"
    metric: str = "share"
    margin: float = 0.5
    scale: float = 100
    unit: str = "%"
    chosen_by: str = "share"
    budget: float = 0.1
    flip: float = 0.1
    num_shown: int = 24

    @override
    def train(self, run: Run) -> Result:
        """Order the samples, and count the wrong labels among the first ones."""
        result = count_found(run, self.order(run))
        run.show(1.0, f"{100 * result.share:3.0f} % of the wrong labels")
        return result

    def order(self, run: Run) -> np.ndarray:
        """Return whether the label of each sample is wrong, in the order of inspection."""
        if run.arm == "random":
            generator = np.random.default_rng([run.seed, 1])  # with the seed alone it finds what flip_labels flipped
            shuffled: np.ndarray = generator.permutation(is_wrong(self, run.seed))
            return shuffled
        shown: dict[str, Any] = {"num_shown": self.num_shown, "figure": True} if run.seed == 0 else {}
        folder = score(self, run, [self.score_epoch], **shown)
        order = read_scores(folder, self.score_epoch).values.argsort(descending=True, stable=True)
        ordered: np.ndarray = is_wrong(self, run.seed)[order.numpy()]
        return ordered

    @override
    def label(self, of: Any) -> str:
        return f"scores/{of.arm}_flip{self.flip:g}_seed{of.seed}"


def is_wrong(claim: Labelled, seed: int) -> np.ndarray:
    """Return whether the label of each training sample is wrong."""
    data = build_data(claim, seed)
    data.setup("fit")
    train_set: Any = data.train_set
    return np.isin(np.arange(len(train_set)), data.flipped.numpy())


def count_found(run: Run, wrong: np.ndarray) -> Result:
    """Count the wrong labels among the first samples, up to three times the number of wrong labels.

    Args:
        run: The order and its seed.
        wrong: Whether the label of each sample is wrong, in the order of inspection.
    """
    total, count = len(wrong), int(wrong.sum())
    sizes = np.unique(np.linspace(0, min(3 * count, total), 43).round().astype(int)).tolist()
    found = [int(wrong[:size].sum()) for size in sizes]
    share = int(wrong[:count].sum()) / count
    return Result(run.arm, run.seed, run.rate, total, count, sizes, found, share)


class StopAfterScoring(Callback):
    """End a training after its samples are scored, without changing the schedule of its learning rate."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


def score(claim: Labelled, run: Run, epochs: Sequence[int], prune: float = 0.0, **settings: Any) -> Path:
    """Score all samples after each of these epochs, end the training, and return the folder of the files."""
    rule = scored([prune] * len(epochs), claim, run.seed, epoch=list(epochs), **settings)
    trainer, *_ = claim.fitted(run, [*rule, StopAfterScoring(max(epochs))])
    finish_loggers(trainer)
    return claim.folder(run)


def read_scores(folder: Path, epoch: int) -> SampleScores:
    """Read the score file of one scoring."""
    return load_scores(folder / f"scores_epoch{epoch}.npz")


CLAIMS = (LabelErrors(about=("DataPruning",)),)
