"""The result of scoring a training set, and its score file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.data import SampleScores, save_scores
from lightning_grad.data.fingerprints import Fingerprint
from lightning_grad.data.score_files import check_writable
from lightning_grad.utilities.reporting import log_file, output_folder

if TYPE_CHECKING:
    from lightning_grad.callbacks.data_pruning.data_pruning import DataPruning

LESS = "less"  # its high scores mark influential samples, not hard ones


@dataclass(frozen=True)
class ScoredSet:
    """The scores of a training set and the indices of the kept samples.

    Args:
        name: Name of the score, such as ``"el2n"``.
        epoch: Number of whole epochs before the scores were taken.
        values: Scores (n,) in float64 on the CPU, higher is harder (``"less"``: more influential); nan where a
            sample has none.
        kept: Sorted indices of the kept samples; ``None`` for all.
        labels: Classes (n,), -1 where unknown; ``None`` if the samples have none.
        predictions: Predicted classes (n,), -1 where unknown; ``None`` if there are none.
    """

    name: str
    epoch: int
    values: Tensor
    kept: Tensor | None = None
    labels: Tensor | None = None
    predictions: Tensor | None = None

    def __repr__(self) -> str:
        kept = len(self.values) if self.kept is None else len(self.kept)
        return f"ScoredSet(name={self.name!r}, epoch={self.epoch}, kept {kept} of {len(self.values)} samples)"

    @property
    def is_influence(self) -> bool:
        """Whether the scores are the influence on a target."""
        return self.name == LESS

    @property
    def suspicion(self) -> Tensor:
        """How suspect each label is, (n,): the scores, or minus the influence: a wrong label pulls away from a target."""
        return -self.values if self.is_influence else self.values

    @property
    def label_errors(self) -> Tensor:
        """Indices of the samples whose predicted class differs from their label, most suspect first.

        The predicted class, in ``predictions``, is the suggested label.
        """
        if self.labels is None or self.predictions is None:
            return torch.empty(0, dtype=torch.int64)
        known = (self.labels >= 0) & (self.predictions >= 0) & ~self.values.isnan()
        order = self.suspicion.argsort(descending=True, stable=True)
        return order[(known & (self.labels != self.predictions))[order]]


def check_score_file(callback: DataPruning, trainer: pl.Trainer) -> None:
    """Check on every rank that the file in ``save_scores`` can be written.

    Raises:
        ValueError: If the folder cannot be created or written to.
    """
    fault, path = None, _named_path(callback, callback.rounds[-1][0])
    if trainer.is_global_zero and path is not None:
        try:
            check_writable(path)
        except (OSError, ValueError) as error:
            fault = f"{callback.display_name} cannot write save_scores={callback.save_scores!r}: {error}. "
            fault += "Set it to a path that can be written."
    fault = trainer.strategy.broadcast(fault)  # if only rank zero raised, the other ranks would hang
    if fault is not None:
        raise ValueError(fault)


def write_score_file(callback: DataPruning, trainer: pl.Trainer, scored: ScoredSet, mark: Fingerprint) -> None:
    """Write scores on rank zero, to ``save_scores`` or next to the logs, and send the file to the loggers."""
    if not trainer.is_global_zero:
        return
    scores = SampleScores(scored.values, scored.name, scored.epoch, callback.seed, mark, scored.labels)
    stem = "_".join(part for part in ("scores", callback.name, f"epoch{scored.epoch}") if part)
    stem = re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII)
    path, folder = _named_path(callback, scored.epoch), output_folder(trainer)
    if path is None and folder is not None:
        path = folder / f"{stem}.npz"
    if path is not None:
        # Named after the data, so that scores of the same data from several runs become versions of one artifact.
        data = "_".join(str(part) for part in ("scores", mark.class_name, mark.length, (mark.items or "")[:8]) if part)
        log_file(trainer, save_scores(scores, path), data, "scores", [scored.name, f"epoch{scored.epoch}"])


def _named_path(callback: DataPruning, epoch: int) -> Path | None:
    """Return the path in ``save_scores`` for a round, with the epoch added if there are several rounds."""
    if callback.save_scores is None:
        return None
    named = Path(callback.save_scores)
    return named.with_stem(f"{named.stem}_epoch{epoch}") if len(callback.rounds) > 1 else named
