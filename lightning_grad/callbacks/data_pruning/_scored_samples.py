"""The samples of each batch, with their easiness by score files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.data import average_scores, load_scores
from lightning_grad.functional import easiness

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.curriculum_weighting import CurriculumWeighting


class ScoredSamples:
    """The samples that a fit trains on, and how easy each is.

    If another callback chooses the samples of each epoch, it knows the samples of a batch; otherwise this object finds
    them.

    Args:
        trainer: The trainer, before it has loaded its training data.
        owner: The technique.
    """

    def __init__(self, trainer: pl.Trainer, owner: CurriculumWeighting) -> None:
        self._trainer, self._owner = trainer, owner
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._chooser = next((each for each in callbacks if isinstance(each, SubsetCallback)), None)
        key = None if owner.loader_key is None else str(owner.loader_key)
        self._own = TrainingSet(trainer, owner.display_name, owner.undo, key) if self._chooser is None else None
        self._easiness: Tensor | None = None  # of all samples

    @staticmethod
    def check(paths: Sequence[str], display_name: str) -> None:
        """Raise if a file is missing or not a score file, or if the files do not match each other."""
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"{display_name} finds no score file {path!r}. Correct the path in score_files, or write the file "
                    "first with save_scores."
                )
        average_scores(list(paths))

    @property
    def training_set(self) -> TrainingSet:
        """The training set."""
        if self._chooser is not None:
            return self._chooser.training_set
        assert self._own is not None
        return self._own

    def begin(self) -> None:
        """Start with the fit."""
        if self._own is not None:
            self._own.begin(None)

    def resume(self) -> None:
        """Begin the next epoch if the fit resumes behind the last batch of one; load the scores."""
        if self._own is not None and self._own.resumes_behind_last_batch:
            self._own.keep(None)
            self._own.leave_epoch()
        self._load()

    def _load(self) -> None:
        found = self.training_set
        items = found.items(found.loader.dataset)
        scores = average_scores(
            [load_scores(path, items, self._owner.strict) for path in self._owner.score_files or []]
        )
        self._easiness = easiness(scores.dense(found.sampler.total)).float()

    def begin_epoch(self) -> None:
        """Start with an epoch."""
        if self._own is not None:
            self._own.keep(None)

    def draw(self, batch_idx: int) -> list[int]:
        """Return the samples of the batch that begins; none if another callback knows them."""
        return [] if self._own is None else self._own.draw(batch_idx)

    def of_batch(self, drawn: list[int]) -> list[int]:
        """Return the samples of the current batch, inside its step.

        Args:
            drawn: What :meth:`draw` returned for it.
        """
        return drawn if self._chooser is None else self._chooser.indices

    def easiness(self, indices: list[int], device: torch.device) -> Tensor:
        """Return D of some samples, (B,)."""
        if self._easiness is None:
            self._load()
        assert self._easiness is not None
        self._easiness = self._easiness.to(device)
        return self._easiness[torch.tensor(indices, device=device)]
