"""Sources of the scores of a training set: one pass, several passes, the batches of the training, files, or chance.

:func:`source_of` builds the source that the arguments of ``DataPruning`` select. ``_measures.py`` defines the
measurements of a batch, ``_score_source.py`` the base, and ``_influence.py`` the influence on a target.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.callbacks.data_pruning import _measures as measures
from lightning_grad.callbacks.data_pruning._epoch_record import EpochRecord
from lightning_grad.callbacks.data_pruning._influence import InfluenceScores
from lightning_grad.callbacks.data_pruning._score_source import ScoreSource, SeveralPasses, classes_of
from lightning_grad.callbacks.data_pruning._scored import LESS, ScoredSet
from lightning_grad.core.losses.look import Look, Measure
from lightning_grad.core.ranks import first_of_ranks, sum_over_ranks
from lightning_grad.data import SampleScores, average_scores, load_scores
from lightning_grad.functional import LossCall
from lightning_grad.functional import data_pruning as rules
from lightning_grad.functional.data_pruning.scores import is_correct

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning._passes import Passes
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning

CHANCE = "chance"
BINS = "dq"
_PROTOTYPES = 10  # number of prototypes if the samples have no classes


def refuse_offset(is_influence: bool, offset: float) -> None:
    """Raise if an offset would drop influential samples."""
    if is_influence and offset:
        raise ValueError(
            "offset drops the samples with the highest scores, which are the most influential ones with score='less'. "
            "Leave offset at 0."
        )


def source_of(settings: DataPruning) -> ScoreSource:
    """Return the source for settings that have been checked."""
    source: ScoreSource
    if settings.score_files:
        source = FileScores("files")
    elif settings.score_fn is not None:
        source = PassScores(getattr(settings.score_fn, "__name__", "score_fn"), settings.score_fn)
    elif settings.select == BINS:
        source = BinScores(BINS)
    elif settings.keep == "random":
        source = PassScores(CHANCE) if settings.balances_classes else Chance(CHANCE)
    elif settings.score in measures.HISTORIES:
        source = HistoryScores(settings.score)
    elif settings.score == LESS:
        source = InfluenceScores(LESS)
    elif settings.score == "vog":
        source = VarianceScores("vog")
    else:
        source = PassScores(settings.score, one_by_one=settings.scores_by == "sample")
    if settings.loss_fn is not None or settings.outputs_fn is not None:  # they replace the step
        source.runs_the_step = False
    return source


class Chance(ScoreSource):
    """Equal scores for all samples; the seed decides their order."""

    pairs_rows = False

    def take(self, passes: Passes) -> ScoredSet:
        return self._scored(passes, torch.zeros(passes.training_set.sampler.total), {})


class FileScores(ScoreSource):
    """The mean of score files."""

    pairs_rows = False
    _found: ScoredSet | None = None  # its epoch is -1 if the files have none
    _says = ""  # name of the scores in the files

    @property
    def is_influence(self) -> bool:
        return self._says == LESS

    def check(self, settings: DataPruning) -> None:
        """Raise if a file is missing or not a score file, if the files do not match, or if offset drops what helps."""
        for path in settings.score_files or []:
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"{settings.display_name} finds no score file {path!r}. Correct the path in score_files, or "
                    "write the file first with save_scores."
                )
        self._says = average_scores(settings.score_files or []).name
        refuse_offset(self.is_influence, settings.offset)

    def look(self, passes: Passes) -> ScoredSet:
        """Return the scores of the samples.

        Raises:
            ValueError: If they belong to another data set.
        """
        paths, strict = passes.callback.score_files or [], passes.callback.strict
        total = passes.training_set.sampler.total
        scores = average_scores([load_scores(path, passes.items, strict) for path in paths])
        labels = None
        if scores.labels is not None:
            labels = classes_of(SampleScores(scores.labels.double(), "labels", index=scores.index).dense(total))
        epoch = -1 if scores.epoch is None else int(scores.epoch)
        self._found = ScoredSet(scores.name, epoch, scores.dense(total), labels=labels)
        return self._found

    def take(self, passes: Passes) -> ScoredSet:
        found = self._found or self.look(passes)
        return replace(found, epoch=passes.trainer.current_epoch) if found.epoch < 0 else found


class PassScores(ScoreSource):
    """Scores of one pass through the training set.

    Args:
        name: Name of the scores; for ``"chance"`` the pass only reads the classes.
        score_fn: Callable (module, batch) -> scores, used instead of ``training_step``.
        one_by_one: Whether to measure one sample at a time.
    """

    def __init__(self, name: str, score_fn: measures.ScoreFunction | None = None, one_by_one: bool = False) -> None:
        super().__init__(name)
        self.runs_the_step = score_fn is None
        self.measure = None if score_fn is None else partial(measures.scores_of, score_fn)
        self.by_terms = score_fn is None and name in measures.ONE_BY_ONE
        self.by_classes = score_fn is None and name in measures.BY_CLASSES
        self._one_by_one = one_by_one

    @property
    def _measure(self) -> Measure:  # looked up at each use, because the lambdas of the table cannot be pickled
        return self.measure or (measures.MEASURES_ALONE if self._one_by_one else measures.MEASURES)[self.name]

    def rehearse(self, passes: Passes) -> Mapping[str, Tensor] | None:
        return passes.rehearse(self._measure)

    def take(self, passes: Passes) -> ScoredSet:
        found = passes.run(self._measure, f"Scoring by {self.name}")
        # Not by name: a score_fn may be called "prototypes" too.
        values = found["score"] if "score" in found else _distances(found, passes.callback.seed)
        return self._scored(passes, values, found)


class BinScores(PassScores):
    """Places of the samples in the order in which Dataset Quantization puts them into bins."""

    def take(self, passes: Passes) -> ScoredSet:
        found, callback = passes.run(self._measure, "Collecting features for dq"), passes.callback
        places = torch.empty(0)
        if passes.trainer.is_global_zero:
            labels = classes_of(found.get("label")) if callback.balance is not None else None
            places = rules.dataset_quantization(found["embedding"], callback.num_strata, labels, callback.seed)
        # The choices compare sums, whose rounding may differ between machines.
        return self._scored(passes, passes.trainer.strategy.broadcast(places), found)


def _distances(found: Mapping[str, Tensor], seed: int) -> Tensor:
    """Return the distances of the last layer's inputs to their nearest prototype, one prototype per class."""
    embeddings, labels = found["embedding"], classes_of(found.get("label"))
    known = embeddings.isfinite().all(1)
    clusters = min(int(labels.max()) + 1 if labels is not None else _PROTOTYPES, int(known.sum()))
    scores = torch.full((len(embeddings),), float("nan"), dtype=torch.float64)
    if clusters:
        scores[known] = rules.prototype_distance(embeddings[known], clusters, seed).double()
    return scores


class VarianceScores(SeveralPasses):
    """The variance of gradients over several passes, evenly spread over the epochs before a round."""

    epochs_needed = 2
    by_classes = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._gradients: dict[str, Tensor] = {}  # sums per sample
        self._measured: list[int] = []  # samples that this rank has measured in the current pass
        self._found: Mapping[str, Tensor] = {}

    def rehearse(self, passes: Passes) -> Mapping[str, Tensor] | None:
        return passes.rehearse(VarianceScores(self.name)._take_in)

    def _take_in(self, look: Look) -> Mapping[str, Tensor]:
        gradients, classes = measures.gradient_by_input(look)
        self._gradients = self._gradients or rules.vog_state(look.total, gradients.shape[1:])
        rules.update_vog_(self._gradients, torch.tensor(look.indices), gradients)
        self._measured += look.indices
        return classes or {"seen": torch.ones(len(look.indices))}  # a pass must return at least one value

    def epoch_begins(self, passes: Passes) -> None:
        if self._is_due(passes):
            self._found = passes.run(self._take_in, "Collecting gradients for vog")
            self._share(passes.trainer)

    def _share(self, trainer: pl.Trainer) -> None:
        """Exchange the gradients of this pass between the ranks, so that each rank can save them all."""
        own, self._measured = torch.tensor(self._measured, dtype=torch.long), []
        if trainer.world_size == 1:
            return
        layout = {key: (tuple(value.shape), value.dtype) for key, value in self._gradients.items()}
        for key, (shape, kind) in first_of_ranks(trainer, layout).items():
            share = torch.zeros(shape, dtype=kind)
            value = self._gradients.get(key, share)
            share[own] = value[own]
            self._gradients[key] = sum_over_ranks(trainer, share)

    def take(self, passes: Passes) -> ScoredSet:
        count = self._gradients.get("count")
        if count is None or not (count > 1).any():
            raise ValueError(
                "score='vog' needs at least 2 passes, each at a different epoch; there was "
                f"{'none' if count is None else 'one'} before epoch {passes.trainer.current_epoch}. Set checkpoints "
                "to at least 2, and epoch so that this fit trains for at least 2 epochs before each round."
            )
        values, labels = rules.vog(self._gradients).double(), classes_of(self._found.get("label"))
        self._gradients = {}
        return self._scored(passes, values if labels is None else rules.normalize_by_class(values, labels), self._found)

    @property
    def is_recording(self) -> bool:  # type: ignore[override]
        return bool(self._gradients)

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self._gradients, "begun_in": self._begun_in}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gradients, self._begun_in = state["gradients"], state["begun_in"]


class HistoryScores(ScoreSource):
    """Scores recorded from the batches of the training: ``"aum"`` or ``"forgetting"``.

    Args:
        name: ``"aum"`` or ``"forgetting"``.
    """

    epochs_needed = 1
    by_classes = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._values = EpochRecord()
        self._labels = EpochRecord()
        self._history: dict[str, Tensor] = {}
        self._is_aum = name == "aum"

    def read(self, callback: DataPruning, call: LossCall) -> None:
        """Record the loss call of a batch."""
        indices, total = callback.indices, callback.training_set.sampler.total
        with measures.errors_of(callback.display_name):
            self._values.put(indices, rules.margin(call) if self._is_aum else is_correct(call), total)
        if call.labels is not None:
            self._labels.put(indices, call.labels, total)

    def epoch_begins(self, passes: Passes) -> None:
        self.gather(passes.trainer)

    def gather(self, trainer: pl.Trainer) -> None:
        values, labels = self._values.take(trainer), self._labels.take(trainer)
        if values is None:
            return
        update = rules.update_aum_ if self._is_aum else rules.update_forgetting_
        self._history = self._history or (rules.aum_state if self._is_aum else rules.forgetting_state)(len(values))
        update(self._history, torch.arange(len(values)), values)
        if labels is not None:
            self._history["labels"] = torch.where(labels.isnan(), self._history.get("labels", labels), labels)

    def take(self, passes: Passes) -> ScoredSet:
        if not self._history:
            raise ValueError(
                f"score={self.name!r} is recorded during training, but no step has had a loss so far: each batch was "
                "None, or training_step returned None. Return a loss for some batches, or set epoch to a later one."
            )
        values = -rules.aum(self._history) if self._is_aum else rules.forgetting(self._history)
        labels = self._history.get("labels")
        return self._scored(passes, values, {} if labels is None else {"label": labels})

    @property
    def is_recording(self) -> bool:  # type: ignore[override]
        return bool(self._history) or self._values.values is not None

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values.values, "labels": self._labels.values, "history": self._history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values.values, self._labels.values = state["values"], state["labels"]
        self._history = state["history"]
