"""The norm of all gradients, and what several rules make of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import multiply_, stack, tensor_norms, whole

EPS = 1e-6  # what torch adds to the norm it divides by


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor], norm_type: float = 2.0, accurate: bool = False) -> Tensor:
    r"""Return the p-norm of all gradients, taken as one vector.

    .. math::
        \lVert g \rVert_p = \Bigl(\sum_i \lvert g_i \rvert^p\Bigr)^{1/p}

    Args:
        gradients: At least one tensor, each of any shape.
        norm_type: p, above 0; infinity for the largest magnitude.
        accurate: Add up half precision in float32; the default does so in the type of the gradients, as torch does.

    Returns:
        Tensor: The norm, a scalar on the device of the first gradient; the same on every rank for DTensors.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    return whole(torch.linalg.vector_norm(stack(tensor_norms(gradients, norm_type, accurate)), norm_type))


@torch.no_grad()
def clip_to_threshold_(gradients: Sequence[Tensor], norm: Tensor, threshold: Tensor) -> Tensor:
    r"""Scale gradients whose norm is known to a threshold that is a tensor.

    .. math::
        g \leftarrow g \cdot \begin{cases} \tau / (n + 10^{-6}) & n > \tau \\ 1 & \text{else, or } n \text{ not finite}
        \end{cases}

    Args:
        gradients: At least one tensor; changed in place.
        norm: n, a scalar: their norm.
        threshold: :math:`\tau`, a scalar on the same device.

    Returns:
        Tensor: The coefficient, a scalar.

    Example:
        >>> g = [torch.tensor([3.0, 4.0])]
        >>> clip_to_threshold_(g, torch.tensor(5.0), torch.tensor(2.5))
        tensor(0.5000)
    """
    above = (norm > threshold) & norm.isfinite()
    coefficient = torch.where(above, threshold / (norm + EPS), 1.0)
    multiply_(gradients, coefficient.to(norm.dtype))  # a product with float64 would leave the fast kernels
    return coefficient


def statistic(value: float, device: torch.device) -> Tensor:
    """Return a scalar of a state on a device, in float64 where there is one."""
    # MPS has no float64.
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
