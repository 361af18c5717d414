"""The base of the sources of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_grad.callbacks.data_pruning._scored import LESS, ScoredSet
from lightning_grad.core.losses.look import Measure

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning._passes import Passes


class ScoreSource:
    """Source of the scores of all samples.

    Args:
        name: Name of the scores.
    """

    runs_the_step = False  # whether a pass runs training_step just to score
    epochs_needed = 0  # whole epochs of recording before a round
    is_recording = False  # whether anything has been recorded so far
    pairs_rows = True  # whether rows of a batch are assigned to its samples
    measure: Measure | None = None  # measurement of a batch that does not run training_step
    by_terms = False  # whether only the loss of each sample is needed
    by_classes = False  # whether only logits and classes are needed

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def is_influence(self) -> bool:
        """Whether high scores mark influential samples, not hard ones."""
        return self.name == LESS

    @property
    def kind(self) -> str:
        """Kind of the scores; a checkpoint of another kind is not used."""
        return f"{type(self).__name__}({self.name})"

    def rehearse(self, passes: Passes) -> Mapping[str, Tensor] | None:
        """Measure one batch, to raise early what a pass would raise, and return the measurements."""
        return None

    def gather(self, trainer: pl.Trainer) -> None:
        """Gather the records of all ranks."""

    def epoch_begins(self, passes: Passes) -> None:
        """Record the values that are due at the start of an epoch."""

    def prepare(self, passes: Passes) -> None:
        """Raise before the first batch if the data does not suit the scores."""

    def take(self, passes: Passes) -> ScoredSet:
        """Return the current scores."""
        raise NotImplementedError

    def begin(self, epoch: int) -> None:
        """Start recording at this epoch, if there is no record from a checkpoint."""

    def _scored(self, passes: Passes, values: Tensor, found: Mapping[str, Tensor]) -> ScoredSet:
        labels, predictions = classes_of(found.get("label")), classes_of(found.get("prediction"))
        epoch = passes.trainer.current_epoch
        return ScoredSet(self.name, epoch, values.double(), labels=labels, predictions=predictions)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""


class SeveralPasses(ScoreSource):
    """A source that measures all samples several times, evenly spread over the epochs before a round.

    Args:
        name: Name of the scores.
    """

    runs_the_step = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._begun_in = 0

    def _is_due(self, passes: Passes) -> bool:
        """Return True if a pass is due at the start of the current epoch."""
        rounds, count = [epoch for epoch, _ in passes.callback.rounds], passes.callback.checkpoints
        later = [epoch for epoch in rounds if epoch >= passes.trainer.current_epoch]
        if not later:
            return False
        first = max([self._begun_in, *(epoch for epoch in rounds if epoch < passes.trainer.current_epoch)])
        spacing = (min(later) - first) / count
        return passes.trainer.current_epoch in {first + math.ceil(spacing * (number + 1)) for number in range(count)}

    def begin(self, epoch: int) -> None:
        self._begun_in = epoch


def classes_of(values: Tensor | None) -> Tensor | None:
    """Return measured classes as integers, -1 where unknown."""
    return None if values is None else values.nan_to_num(nan=-1.0).clamp(min=-1).long()
