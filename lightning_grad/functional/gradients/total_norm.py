"""The norm of all gradients together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import stack, tensor_norms, whole


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor], norm_type: float = 2.0, accurate: bool = False) -> Tensor:
    r"""Return the p-norm of all gradients, concatenated into one vector.

    .. math::
        \lVert g \rVert_p = \Bigl(\sum_i \lvert g_i \rvert^p\Bigr)^{1/p}

    Args:
        gradients: At least one tensor, each of any shape.
        norm_type: p, above 0; infinity for the largest magnitude.
        accurate: Sum half precision in float32; False sums in the gradients' dtype, like torch.

    Returns:
        Tensor: The norm, a scalar on the device of the first gradient; the same on every rank for DTensors.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    return whole(torch.linalg.vector_norm(stack(tensor_norms(gradients, norm_type, accurate)), norm_type))
