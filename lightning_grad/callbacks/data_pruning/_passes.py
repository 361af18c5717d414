"""Scoring passes of ``DataPruning``, and the check that the rows of a batch follow its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_grad.callbacks.data_pruning._measures import GRADIENT_SCORES, OF_CLASSES, ONE_BY_ONE
from lightning_grad.callbacks.data_pruning._sources import HistoryScores
from lightning_grad.callbacks.data_pruning._target import TargetSet, target_sets
from lightning_grad.core.losses.given_functions import LOSS_FN, OUTPUTS_FN, SCORE_FN, LossRequest, SampleLoss
from lightning_grad.core.losses.look import Measure
from lightning_grad.core.losses.one_sample import cost_of_single_samples, in_words
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.scoring import look_at_all
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.functional import InseparableLossError

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning


@dataclass
class Passes:
    """Runs the module's own step over the samples of one fit to measure them.

    Args:
        callback: The technique; its settings select what is measured.
        trainer: The trainer.
        pl_module: The module.
    """

    callback: DataPruning
    trainer: pl.Trainer
    pl_module: pl.LightningModule
    _unaugmented: Any = field(default=None, init=False)
    _targets: Sequence[TargetSet] = field(default=(), init=False)
    _sample_loss: SampleLoss = field(default=None, init=False)
    _has_checked: bool = field(default=False, init=False)
    # What errors say about scores_by="sample": None until its cost is measured, "" if it does not help.
    _by_sample: str | None = field(default=None, init=False)
    _memory: dict[str, Any] = field(default_factory=dict, init=False)  # what one pass keeps for the next

    @property
    def training_set(self) -> TrainingSet:
        """The training set of the callback."""
        return self.callback.training_set

    @property
    def dataset(self) -> Any:
        """The data set that is scored."""
        if self.callback.score_dataset is None:
            return self.training_set.loader.dataset
        if self._unaugmented is None:
            self._unaugmented = self.callback.score_dataset(self.trainer)
        return self._unaugmented

    @property
    def items(self) -> Any:
        """The samples of the scored data set, by index."""
        return self.training_set.items(self.dataset)

    @property
    def targets(self) -> Sequence[TargetSet]:
        """The sets of samples whose gradients the score "less" compares with."""
        if not self._targets:
            callback, training_set = self.callback, self.training_set
            own = (self.trainer, self.pl_module, self.asked, training_set.loader)
            self._targets = target_sets(*own, callback.target, training_set.is_whole_batch, callback.seed)
        return self._targets

    @property
    def way_out(self) -> str:
        """Advice for a loss that cannot be read."""
        if self.callback.score in OF_CLASSES:
            return f"{SCORE_FN}, or {OUTPUTS_FN}"
        first = "leave scores_by at 'batch', and " if self._runs_single_samples else ""
        return f"{first}{SCORE_FN}, or {LOSS_FN}{self._by_sample or ''}"

    @property
    def _runs_single_samples(self) -> bool:
        return self.callback.scores_by == "sample"

    def run(self, measure: Measure, title: str) -> Mapping[str, Tensor]:
        """Measure every sample."""
        found = self._offering_samples(lambda: self._look(measure, title))
        if self._runs_single_samples:
            self._refuse_other_means(found.get("loss", found["score"]))
        return found

    def rehearse(self, measure: Measure) -> Mapping[str, Tensor]:
        """Measure one batch, to raise early what a pass would raise."""
        return self._offering_samples(lambda: self._look(measure, "", rehearsal=True))

    def _look(self, measure: Measure, title: str, rehearsal: bool = False) -> Mapping[str, Tensor]:
        asked = self.asked if rehearsal else replace(self.asked, kind=self._checked_kind)
        own = (self.trainer, self.pl_module, self.training_set, measure, title, asked, self.dataset)
        return look_at_all(
            *own, self.callback.seed, rehearsal, one_by_one=self._runs_single_samples, memory=self._memory
        )

    @property
    def asked(self) -> LossRequest:
        """The request for the losses of a step."""
        callback = self.callback
        own = (callback.display_name, callback.loss_index, self.way_out, callback.loss_fn, callback.outputs_fn)
        return LossRequest(*own, by_classes=callback.source.by_classes)

    def _rehearsal(self) -> Rehearsal:
        source, runs_the_step = self.callback.source, self.pl_module.automatic_optimization
        dataset = None if isinstance(source, HistoryScores) else self.dataset
        own = (self.trainer, self.pl_module, self.asked, self.training_set, dataset, source.measure, runs_the_step)
        return Rehearsal(*own, by_terms=source.by_terms)

    def _checked_kind(self) -> SampleLoss:
        """Return how the loss of a sample is read if the loss has several terms."""
        if not self._has_checked:  # scoring before the first batch
            self.check_rows()
        return self._sample_loss

    def check_rows(self) -> None:
        """Raise if rows do not follow their samples when these are reordered, or ``loss_fn`` differs from the loss."""
        callback = self.callback
        if not callback.source.pairs_rows:
            return
        rehearsal = self._rehearsal()
        if self._runs_single_samples:
            rehearsal.check_alone()
            return
        rehearsal.check_loader(isinstance(callback.source, HistoryScores) and callback.outputs_fn is None)
        if callback.loss_fn is not None and rehearsal.runs_the_step and self.training_set.is_whole_batch:
            rehearsal.check_function()
        self._sample_loss, self._has_checked = rehearsal.kind, True

    def _offering_samples(self, look: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Run ``look``; add the cost of scoring one sample at a time to its error, if that would work."""
        callback = self.callback
        try:
            return look()
        except (InseparableLossError, ValueError):
            may_offer = callback.score in ONE_BY_ONE and callback.scores_by == "batch" and callback.loss_fn is None
            if not may_offer or self._by_sample is not None or not self.training_set.is_whole_batch:
                raise
        found = cost_of_single_samples(self._rehearsal(), callback.source.name in GRADIENT_SCORES)
        self._by_sample = ""
        if found is not None:
            self._by_sample = (
                ", or set scores_by='sample', which runs the step on one sample at a time: such a pass takes "
                f"{in_words(found[0])} here as one in batches of {found[1]}"
            )
        return look()  # raises again, with the cost in the message

    def _refuse_other_means(self, losses: Tensor) -> None:
        """Raise if the mean loss of single samples differs from the loss of their batch."""

        def mean(indices: list[int]) -> float:
            return float(losses[indices].nanmean())

        self._rehearsal().check_means(mean, "scores_by='sample'", with_constant=False)
