"""Find gradients that are not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import any_rank, shards, stack_norms


@torch.no_grad()
def nonfinite(gradients: Sequence[Tensor]) -> Tensor:
    """Return which gradients contain nan or infinity.

    The test uses the largest magnitude, because a sum of squares can overflow.

    Args:
        gradients: At least one tensor, each of any shape.

    Returns:
        Tensor: (gradients,) bool, the same on every rank for DTensors.

    Example:
        >>> nonfinite([torch.tensor([1.0, 3e38, 3e38]), torch.tensor([torch.nan])])
        tensor([False,  True])
    """
    # Reduce flags, not magnitudes: the maximum over ranks can lose a nan.
    return any_rank(~stack_norms(shards(gradients), torch.inf).isfinite(), gradients)
