"""What one scoring of a training set has found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScoredSet:
    """The samples of a training set with their scores, and which of them are kept.

    Args:
        name: What the score is called, ``"el2n"`` say.
        epoch: Number of whole epochs after which it was taken.
        values: Scores (n,) in float64 on the CPU, higher is harder; nan where a sample has none.
        kept: Sorted indices of the samples that training goes on with; ``None`` for all.
        labels: Classes (n,), -1 where unknown; ``None`` if the samples have none.
        predictions: Classes (n,) that the module answered, -1 where unknown; ``None`` if there are none.
    """

    name: str
    epoch: int
    values: Tensor
    kept: Tensor | None = None
    labels: Tensor | None = None
    predictions: Tensor | None = None

    @property
    def kept_share(self) -> float:
        """Share of the samples that are kept."""
        return 1.0 if self.kept is None else len(self.kept) / len(self.values)
