"""Find gradients that are not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import any_rank, is_known, joined_norm, shards, stack_norms


@torch.no_grad()
def nonfinite(gradients: Sequence[Tensor]) -> Tensor:
    """Return which gradients contain nan or infinity.

    The test uses the largest magnitude, because a sum of squares can overflow. On a CPU it asks for that sum first.

    Args:
        gradients: At least one tensor, each of any shape.

    Returns:
        Tensor: (gradients,) bool, the same on every rank for DTensors.

    Example:
        >>> nonfinite([torch.tensor([1.0, 3e38, 3e38]), torch.tensor([torch.nan])])
        tensor([False,  True])
    """
    local = shards(gradients)
    # A finite sum of squares has only finite terms.
    if all(gradient.is_cpu for gradient in local) and is_known(joined_norm(local).isfinite()):
        flags = torch.zeros(len(local), dtype=torch.bool, device="cpu")
    else:
        flags = ~stack_norms(local, torch.inf).isfinite()
    return any_rank(flags, gradients)  # of flags, not magnitudes: the maximum over ranks can lose a nan
