"""Holding still the second moment of an Adam-like optimizer, which is what the recipe ``step`` adds to SR-STE."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_grad.core.steps.frozen_moments import FrozenMoments

NO_VARIANCE = (
    "freezes the variance (exp_avg_sq) of an Adam-like optimizer, and {} keeps none. Set recipe='sr-ste', or train with "
    "Adam or AdamW."
)


class FrozenVariance(FrozenMoments):
    """Keeps the bias-corrected second moments of an optimizer as they are, so that masked gradients cannot pile up in them.

    Args:
        optimizer: An Adam-like optimizer that has stepped.
        resumed: Whether its moments come from a checkpoint and are frozen already.
        needed_by: Who asks, for the error.

    Raises:
        ValueError: If it keeps no ``exp_avg_sq``.

    References:
        Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", 2023, arXiv 2302.01172,
        algorithm 1.
    """

    def __init__(self, optimizer: Optimizer, resumed: bool = False, needed_by: str = "FrozenVariance") -> None:
        super().__init__(optimizer, resumed)
        if not len(self):
            raise ValueError(f"{needed_by} {NO_VARIANCE.format(type(optimizer).__name__)}")
