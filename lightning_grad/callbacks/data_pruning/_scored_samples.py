"""The samples of each batch, with their easiness by score files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._drawn_samples import DrawnSamples
from lightning_grad.data import average_scores, load_scores
from lightning_grad.functional import easiness

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.curriculum_weighting import CurriculumWeighting


class ScoredSamples(DrawnSamples):
    """The samples that a fit trains on, and how easy each is.

    Args:
        trainer: The trainer, before it has loaded its training data.
        owner: The technique.
    """

    def __init__(self, trainer: pl.Trainer, owner: CurriculumWeighting) -> None:
        super().__init__(trainer, owner.display_name, owner.undo, owner.loader_key)
        self._owner = owner
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

    @override
    def resume(self) -> None:
        """Begin the next epoch if the fit resumes behind the last batch of one; load the scores."""
        super().resume()
        self._load()

    def _load(self) -> None:
        found = self.training_set
        items = found.items(found.loader.dataset)
        scores = average_scores(
            [load_scores(path, items, self._owner.strict) for path in self._owner.score_files or []]
        )
        self._easiness = easiness(scores.dense(found.sampler.total)).float()

    def easiness(self, indices: list[int], device: torch.device) -> Tensor:
        """Return D of some samples, (B,)."""
        if self._easiness is None:
            self._load()
        assert self._easiness is not None
        self._easiness = self._easiness.to(device)
        return self._easiness[torch.tensor(indices, device=device)]
