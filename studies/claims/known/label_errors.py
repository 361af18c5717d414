"""Wrong labels among the samples that a score of a training ranks first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from lightning_grad.callbacks import DataPruning
from studies import claim as base
from studies.arms import PLAIN, Arm, OfEpochs, Use
from studies.claim import Paper, Run
from studies.common import finish_loggers
from studies.on_task import OnTask

RANDOM = "random"


@dataclass(frozen=True)
class Result(base.Result):
    """The share of the wrong labels among the first samples of an order, which is the arm.

    Args:
        share: Found share of the wrong labels, after inspecting as many samples as there are wrong labels.
        wrong: Number of wrong labels.
        total: Number of samples.
    """

    share: float
    wrong: int
    total: int


@dataclass(frozen=True, kw_only=True)
class FoundErrors(OnTask):
    """Wrong labels found by scores, against a random order."""

    result: ClassVar[type[Any]] = Result

    @override
    def train(self, run: Run) -> Result:
        """Order the samples, and count the wrong labels among the first ones."""
        trainer, _, data, _ = self.fitted(run)
        finish_loggers(trainer)
        total, count = len(data.train_set), len(data.flipped)
        # With the seed alone, numpy would draw the very samples whose labels were replaced.
        order = np.random.default_rng([run.seed, 1]).permutation(total) if run.arm == RANDOM else order_of(trainer)
        share = float(np.isin(order[:count], data.flipped.numpy()).mean())
        run.show(1.0, f"{100 * share:3.0f} % of the wrong labels")
        return Result(run.arm, run.seed, run.rate, share, count, total)


def order_of(trainer: Any) -> np.ndarray:
    """Return the indices of the training samples, the most suspect first."""
    (pruning,) = (each for each in trainer.callbacks if isinstance(each, DataPruning))
    if pruning.scored is None:
        raise RuntimeError("the training ended before its samples were scored.")
    order: np.ndarray = pruning.scored.suspicion.argsort(descending=True, stable=True).numpy()
    return order


def scored(score: str) -> Arm:
    """Return a training that scores its samples at the middle, and drops none."""
    return Arm(Use(DataPruning, 0.0, score=score, epoch=OfEpochs(0.5), figure=False, num_shown=0))


def finding(name: str, text: str, says: str, source: str, scores: Sequence[str]) -> FoundErrors:
    """Return the claim about some scores."""
    table = {RANDOM: PLAIN, **{score: scored(score) for score in scores}}
    return FoundErrors(
        name=name,
        text=text,
        paper=Paper("`DataPruning(prune=0)`, scores", "data_pruning", says, source),
        table=table,
        arms=tuple(table),
        reference=RANDOM,
        flip=0.1,
        rates=(0.1,),
        metric="share",
        scale=100,
        unit="%",
        chosen_by="share",
        budget=6,
    )


CLAIMS = (
    finding(
        "label-errors-images",
        "With a tenth of the labels wrong, each score finds more of them than a random order.",
        "Samples with a high score (AUM: a low margin over the training) are often mislabeled.",
        "Identifying Mislabeled Data using the Area Under the Margin Ranking (2001.10528)",
        ("el2n", "grand", "loss", "margin", "aum", "forgetting"),
    ),
    finding(
        "label-errors-others-images",
        "With a tenth of the labels wrong, each of the other scores (LESS: a low influence on correct validation labels) "
        "finds more of them than a random order.",
        "Samples that a score of difficulty ranks high, or that pull away from correct samples, are often mislabeled.",
        "Estimating Example Difficulty Using Variance of Gradients (2008.11600); LESS: Selecting Influential Data for "
        "Targeted Instruction Tuning (2402.04333)",
        ("grand-last", "prototypes", "vog", "less"),
    ),
)
