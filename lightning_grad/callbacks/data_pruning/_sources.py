"""Where the scores of a training set come from: a pass, several passes, the training's own batches, files, or chance.

:func:`source_of` builds what the arguments of ``DataPruning`` ask for. What a pass measures of a batch is in
``_measures.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.callbacks.data_pruning._epoch_record import EpochRecord
from lightning_grad.callbacks.data_pruning._measures import (
    BY_CLASSES,
    BY_TERMS,
    HISTORIES,
    ScoreFunction,
    VarianceOfGradients,
    measure_for,
)
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.core.losses.look import Measure
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.data import SampleScores, average_scores, load_scores
from lightning_grad.functional import (
    LossCall,
    aum,
    aum_state,
    forgetting,
    forgetting_state,
    margin,
    normalize_by_class,
    prototype_distance,
    update_aum_,
    update_forgetting_,
    vog,
)
from lightning_grad.functional.data_pruning.scores import is_correct

Pass = Callable[[Measure, str], Mapping[str, Tensor]]  # a measure and a title give values by name
CHANCE = "chance"
_PROTOTYPES = 10  # of samples without classes


class ScoreSource:
    """Gives the scores of all samples when asked for them.

    Args:
        name: What the scores are called.
    """

    runs_the_step = False  # in a pass of its own
    epochs_needed = 0  # whole epochs before a round, to record what the score is made of
    is_recording = False  # whether something of each sample is recorded by now
    pairs_rows = True  # with the samples of a batch
    measure: Measure | None = None  # of a batch, where it is not its loss
    by_terms = False  # whether only the loss of each sample has to be known
    by_classes = False  # whether only logits and classes have to be known

    def __init__(self, name: str) -> None:
        self.name = name

    def rehearse(self, run_pass: Pass) -> Mapping[str, Tensor] | None:
        """Raise if scores could not be taken; ``run_pass`` looks at one batch only. Return what it has found."""
        return None

    def gather(self, trainer: pl.Trainer) -> None:
        """Bring together what the ranks have recorded."""

    def epoch_begins(self, trainer: pl.Trainer, run_pass: Pass, rounds: Sequence[int]) -> None:
        """Collect what is due when an epoch begins; ``rounds`` are the epochs after which scores will be taken."""

    def take(self, trainer: pl.Trainer, run_pass: Pass, training_set: TrainingSet, dataset: Any) -> ScoredSet:
        """Return the scores as they are now, of the samples as ``dataset`` gives them."""
        raise NotImplementedError

    def begin(self, epoch: int) -> None:
        """Record from this epoch on, in a run that resumes without a record."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


def source_of(
    score: str,
    score_fn: ScoreFunction | None,
    score_files: Sequence[str] | None,
    strict: bool,
    by_chance: bool,
    needs_classes: bool,
    checkpoints: int,
    seed: int,
    one_by_one: bool = False,
) -> ScoreSource:
    """Return the source for arguments that are checked already."""
    if score_files:
        return FileScores(score_files, strict)
    if score_fn is not None:
        return PassScores(getattr(score_fn, "__name__", "score_fn"), score_fn)
    if by_chance:
        return PassScores(CHANCE) if needs_classes else Chance(CHANCE)
    if score in HISTORIES:
        return HistoryScores(score)
    if score == "vog":
        return VarianceScores(checkpoints)
    if score == "prototypes":
        return PrototypeScores(seed)
    return PassScores(score, one_by_one=one_by_one)


class Chance(ScoreSource):
    """No scores: all are equal, and their order is left to a seed."""

    pairs_rows = False

    def take(self, trainer: pl.Trainer, run_pass: Pass, training_set: TrainingSet, dataset: Any) -> ScoredSet:
        return ScoredSet(self.name, trainer.current_epoch, torch.zeros(training_set.sampler.total, dtype=torch.float64))


class FileScores(ScoreSource):
    """The mean of score files.

    Args:
        paths: The files.
        strict: Whether those of another data set are refused.
    """

    pairs_rows = False

    def __init__(self, paths: Sequence[str], strict: bool) -> None:
        super().__init__("files")
        self._paths = paths
        self._strict = strict
        self._found: ScoredSet | None = None
        self._knows_epoch = False

    def check(self, label: str) -> None:
        """Raise if a file is missing or no score file, or if they do not go together."""
        for path in self._paths:
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"{label} finds no score file {path!r}. Correct the path in score_files, or write the file first with "
                    "save_scores."
                )
        average_scores(self._paths)

    def look(self, total: int, dataset: Any) -> ScoredSet:
        """Return the scores of a data set.

        Raises:
            ValueError: If they belong to another one.
        """
        scores = average_scores([load_scores(path, dataset, self._strict) for path in self._paths])
        labels = None
        if scores.labels is not None:
            labels = _classes(SampleScores(scores.labels.double(), "labels", index=scores.index).dense(total))
        self._found = ScoredSet(scores.name, int(scores.epoch or 0), scores.dense(total), labels=labels)
        self._knows_epoch = scores.epoch is not None
        return self._found

    def take(self, trainer: pl.Trainer, run_pass: Pass, training_set: TrainingSet, dataset: Any) -> ScoredSet:
        found = self._found or self.look(training_set.sampler.total, dataset)
        return found if self._knows_epoch else replace(found, epoch=trainer.current_epoch)


class PassScores(ScoreSource):
    """Scores of one pass over the training set.

    Args:
        name: What they are called; a score, or ``"chance"``, for which a pass only finds the classes.
        score_fn: Function of the module and a batch that returns the scores, instead of ``training_step``.
        one_by_one: Whether batches of one sample are measured.
    """

    def __init__(self, name: str, score_fn: ScoreFunction | None = None, one_by_one: bool = False) -> None:
        super().__init__(name)
        self._score_fn, self._one_by_one = score_fn, one_by_one
        self.runs_the_step = score_fn is None
        self.measure = None if score_fn is None else measure_for(name, score_fn)
        self.by_terms = score_fn is None and name in BY_TERMS
        self.by_classes = score_fn is None and name in BY_CLASSES

    def _measure(self) -> Measure:
        return measure_for(f"{self.name}, one by one" if self._one_by_one else self.name, self._score_fn)

    def rehearse(self, run_pass: Pass) -> Mapping[str, Tensor] | None:
        return run_pass(self._measure(), "")

    def take(self, trainer: pl.Trainer, run_pass: Pass, training_set: TrainingSet, dataset: Any) -> ScoredSet:
        found = run_pass(self._measure(), f"Scoring by {self.name}")
        labels, predictions = _classes(found.get("label")), _classes(found.get("prediction"))
        values = self._values(found, labels)
        return ScoredSet(self.name, trainer.current_epoch, values, labels=labels, predictions=predictions)

    def _values(self, found: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        return found["score"]


class PrototypeScores(PassScores):
    """Distances to prototypes of the last layer's input, as many as there are classes.

    Args:
        seed: Seed of the clusters.
    """

    def __init__(self, seed: int) -> None:
        super().__init__("prototypes")
        self._seed = seed

    def _values(self, found: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        embeddings = found["embedding"]
        known = embeddings.isfinite().all(1)
        clusters = min(int(labels.max()) + 1 if labels is not None else _PROTOTYPES, int(known.sum()))
        scores = torch.full((len(embeddings),), float("nan"), dtype=torch.float64)
        if not clusters:
            return scores  # no sample has an embedding
        scores[known] = prototype_distance(embeddings[known], clusters, self._seed).double()
        return scores


class VarianceScores(ScoreSource):
    """The variance of gradients over several passes, the last of them when scores are taken.

    Args:
        checkpoints: Number of passes, evenly spread over the epochs before.
    """

    runs_the_step = True
    epochs_needed = 2
    by_classes = True

    def __init__(self, checkpoints: int) -> None:
        super().__init__("vog")
        self._begun_in = 0
        self._checkpoints = checkpoints
        self._gradients = VarianceOfGradients()
        self._classes: Mapping[str, Tensor] = {}

    def rehearse(self, run_pass: Pass) -> Mapping[str, Tensor] | None:
        return run_pass(VarianceOfGradients().measure, "")

    def epoch_begins(self, trainer: pl.Trainer, run_pass: Pass, rounds: Sequence[int]) -> None:
        earlier = [epoch for epoch in rounds if epoch < trainer.current_epoch]
        later = [epoch for epoch in rounds if epoch >= trainer.current_epoch]
        if not later:
            return
        first, last = max([*earlier, self._begun_in]), min(later)
        spacing = (last - first) / self._checkpoints
        if trainer.current_epoch in {first + math.ceil(spacing * (number + 1)) for number in range(self._checkpoints)}:
            self._classes = run_pass(self._gradients.measure, "Collecting gradients for vog")
            self._gradients.gather(trainer)

    def take(self, trainer: pl.Trainer, run_pass: Pass, training_set: TrainingSet, dataset: Any) -> ScoredSet:
        count = self._gradients.state.get("count")
        if count is None or not (count > 1).any():
            raise ValueError(
                "score='vog' is the variance over at least two passes, which come at different epochs; before epoch "
                f"{trainer.current_epoch} there was {'none' if count is None else 'one'}. Set checkpoints to at least 2, and "
                "epoch so that this fit trains for at least 2 epochs before each round."
            )
        values, labels = vog(self._gradients.state).double(), _classes(self._classes.get("label"))
        self._gradients.state = {}
        scores = values if labels is None else normalize_by_class(values, labels)
        answers = _classes(self._classes.get("prediction"))
        return ScoredSet(self.name, trainer.current_epoch, scores, labels=labels, predictions=answers)

    @property
    def is_recording(self) -> bool:  # type: ignore[override]
        return bool(self._gradients.state)

    def begin(self, epoch: int) -> None:
        self._begun_in = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self._gradients.state, "begun_in": self._begun_in}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gradients.state, self._begun_in = state["gradients"], state["begun_in"]


class HistoryScores(ScoreSource):
    """What the samples' own batches have shown: ``"aum"`` or ``"forgetting"``.

    Args:
        name: Which of both.
    """

    epochs_needed = 1
    by_classes = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._values = EpochRecord()
        self._labels = EpochRecord()
        self._history: dict[str, Tensor] = {}

    def read(self, call: LossCall, indices: list[int], total: int) -> None:
        """Take in the loss of a batch."""
        self._values.put(indices, margin(call) if self.name == "aum" else is_correct(call), total)
        if call.labels is not None:
            self._labels.put(indices, call.labels, total)

    def epoch_begins(self, trainer: pl.Trainer, run_pass: Pass, rounds: Sequence[int]) -> None:
        self.gather(trainer)

    def gather(self, trainer: pl.Trainer) -> None:
        values, labels = self._values.take(trainer), self._labels.take(trainer)
        if values is None:
            return
        make, update = (aum_state, update_aum_) if self.name == "aum" else (forgetting_state, update_forgetting_)
        self._history = self._history or make(len(values))
        update(self._history, torch.arange(len(values)), values)
        if labels is not None:
            self._history["labels"] = torch.where(labels.isnan(), self._history.get("labels", labels), labels)

    def take(self, trainer: pl.Trainer, run_pass: Pass, training_set: TrainingSet, dataset: Any) -> ScoredSet:
        if not self._history:
            raise ValueError(
                f"score={self.name!r} is recorded while training, and no step has had a loss so far: each batch was None, or "
                "training_step returned None for it. Return something for some batches, or set epoch to a later one."
            )
        values = -aum(self._history) if self.name == "aum" else forgetting(self._history)
        labels = _classes(self._history.get("labels"))
        return ScoredSet(self.name, trainer.current_epoch, values.double(), labels=labels)

    @property
    def is_recording(self) -> bool:  # type: ignore[override]
        return bool(self._history) or self._values.values is not None

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values.values, "labels": self._labels.values, "history": self._history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values.values, self._labels.values = state["values"], state["labels"]
        self._history = state["history"]


def _classes(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.nan_to_num(nan=-1.0).clamp(min=-1).long()
