"""Clip gradients to a constant norm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.clipping.norms import EPS
from lightning_grad.functional.gradients.tensor_lists import multiply_
from lightning_grad.functional.gradients.total_norm import total_norm


@torch.no_grad()
def clip_norm_(gradients: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    r"""Scale all gradients by one factor to limit their total norm.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    Bitwise equal to ``torch.nn.utils.clip_grad_norm_``. In both, a non-finite norm makes every gradient nan or zero.

    Args:
        gradients: At least one tensor, each of any shape; changed in place.
        max_norm: c, the largest norm allowed.
        norm_type: p, above 0.

    Returns:
        Tensor: The norm before clipping, a scalar.

    Example:
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> clip_norm_(g, max_norm=1.0)
        tensor(5.)
        >>> g
        [tensor([0.6000]), tensor([0.8000])]

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, arXiv 1211.5063, algorithm 1.
    """
    norm = total_norm(gradients, norm_type)
    if max_norm != math.inf:  # inf / inf would be nan
        multiply_(gradients, torch.clamp(max_norm / (norm + EPS), max=1.0))
    return norm
