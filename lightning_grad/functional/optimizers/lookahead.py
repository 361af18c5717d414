"""Lookahead: slow weights that follow the weights of an optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def look_ahead_(weights: Sequence[Tensor], slow: Sequence[Tensor], alpha: float = 0.5) -> None:
    r"""Move slow weights towards the weights of an optimizer, and continue from there, both in place.

    .. math::
        \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi

    Args:
        weights: :math:`\theta`, the fast weights after k steps.
        slow: :math:`\phi`, of the same shapes.
        alpha: Share of the way, in (0, 1]. 1 leaves the fast weights unchanged, bit for bit.

    Example:
        >>> weights, slow = [torch.tensor([4.0])], [torch.tensor([0.0])]
        >>> look_ahead_(weights, slow, alpha=0.25)
        >>> weights, slow
        ([tensor([1.])], [tensor([1.])])

    References:
        Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019, arXiv 1907.08610, algorithm 1.
    """
    if weights:
        torch._foreach_lerp_(list(slow), list(weights), alpha)
        torch._foreach_copy_(list(weights), list(slow))
