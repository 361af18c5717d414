"""Clamp the entries of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import shards

_SMALL = 4096  # entries; for fewer, one call for all of them is faster than one pass for each


@torch.no_grad()
def clip_value_(gradients: Sequence[Tensor], clip_value: float) -> None:
    r"""Clamp every entry of every gradient.

    .. math::
        g_i \leftarrow \max(-c, \min(c, g_i))

    Bitwise equal to ``torch.nn.utils.clip_grad_value_``.

    Args:
        gradients: Tensors of any shape; changed in place.
        clip_value: c, at least 0.

    Example:
        >>> g = torch.tensor([-2.0, 0.5])
        >>> clip_value_([g], 1.0)
        >>> g
        tensor([-1.0000,  0.5000])
    """
    local = shards(gradients)
    large = [gradient for gradient in local if gradient.is_cpu and gradient.numel() > _SMALL]
    for gradient in large:  # one pass instead of two
        gradient.clamp_(-clip_value, clip_value)
    others = [gradient for gradient in local if not (gradient.is_cpu and gradient.numel() > _SMALL)] if large else local
    if others:
        torch._foreach_clamp_min_(others, -clip_value)
        torch._foreach_clamp_max_(others, clip_value)
