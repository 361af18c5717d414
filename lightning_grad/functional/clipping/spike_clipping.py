"""Clip entries that are far above their own running mean of squares (SPAM)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import shards


@torch.no_grad()
def clip_spikes_(gradients: Sequence[Tensor], second_moments: Sequence[Tensor], threshold: float = 5000.0) -> None:
    r"""Clip each entry that is far above its own running mean of squares (spike-aware clipping, SPAM).

    .. math::
        g_i \leftarrow \operatorname{sign}(g_i) \sqrt{\theta v_i} \quad\text{where}\quad g_i^2 > \theta v_i, \; v_i > 0

    An entry with :math:`v_i = 0` has no history and is not changed. The published code sets it to 0; since a zero
    gradient keeps v at 0, such an entry then stays frozen while clipping is on.

    Args:
        gradients: g, tensors of any shape; changed in place.
        second_moments: v, of the same shapes: ``exp_avg_sq`` of an Adam-like optimizer.
            It is the value before the step, without bias correction.
        threshold: :math:`\theta`, the largest ratio of a squared entry to its second moment.

    Example:
        >>> g = torch.tensor([9.0, -9.0, 0.5, 9.0])
        >>> clip_spikes_([g], [torch.tensor([1.0, 1.0, 1.0, 0.0])], threshold=4.0)
        >>> g
        tensor([ 2.0000, -2.0000,  0.5000,  9.0000])

    References:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025, arXiv 2501.06842,
        algorithm 1.
    """
    for gradient, moment in zip(shards(gradients), shards(second_moments), strict=True):
        limit = (moment * threshold).sqrt_().masked_fill_(~(moment > 0), torch.inf).to(gradient.dtype)
        torch.minimum(gradient, limit, out=gradient)
        torch.maximum(gradient, limit.neg_(), out=gradient)
