"""What several rules of clipping share: how a norm becomes a coefficient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import multiply_

EPS = 1e-6  # the value that torch adds to a norm before dividing by it


@torch.no_grad()
def clip_to_threshold_(gradients: Sequence[Tensor], norm: Tensor, threshold: Tensor) -> Tensor:
    r"""Scale gradients of known norm down to a threshold, without a host sync.

    .. math::
        g \leftarrow g \cdot \begin{cases} \tau / (n + 10^{-6}) & n > \tau \\ 1 & \text{else, or } n \text{ not finite}
        \end{cases}

    Args:
        gradients: At least one tensor; changed in place.
        norm: n, a scalar: the norm of the gradients.
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
    multiply_(gradients, coefficient.to(norm.dtype))  # a float64 factor would not use the fast kernels
    return coefficient


def statistic(value: float, device: torch.device) -> Tensor:
    """Return a scalar tensor for a state: float64, or float32 on MPS, which has no float64."""
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
