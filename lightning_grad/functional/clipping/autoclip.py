"""A threshold that follows the percentile of the gradient norms seen so far (AutoClip).

A state is a dict of scalars and vectors on the device, made by one function and changed in place by another, so that it
goes into a checkpoint as it is and nothing waits for the device. A norm that is not finite changes no state.
"""

import math

import torch
from torch import Tensor

from lightning_grad.functional.clipping.norms import statistic


def autoclip_state(window: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the state of AutoClip before the first step.

    Args:
        window: How many of the last norms are kept.
        device: Where the gradients are.

    Returns:
        dict: ``norms``, (window,) with infinity where there is none yet; ``count``, a scalar int64.
    """
    none = statistic(math.inf, torch.device(device))
    return {"norms": none.repeat(window), "count": torch.zeros((), dtype=torch.int64, device=device)}


@torch.no_grad()
def autoclip_threshold_(norm: Tensor, state: dict[str, Tensor], percentile: float = 10.0) -> Tensor:
    r"""Take in a norm, and return the percentile of the norms seen.

    .. math::
        \tau_t = \operatorname{percentile}_p(\lVert g_1 \rVert, \ldots, \lVert g_t \rVert)

    Equal to ``np.percentile`` (linear interpolation) over the last ``window`` finite norms; the published code keeps all.

    Args:
        norm: :math:`\lVert g_t \rVert`, a scalar. One that is not finite is passed over.
        state: From :func:`autoclip_state`; changed in place.
        percentile: p, 0 to 100.

    Returns:
        Tensor: The threshold, a scalar; infinite as long as no norm was finite.

    Example:
        >>> state = autoclip_state(window=4)
        >>> [autoclip_threshold_(torch.tensor(n), state, 50.0).item() for n in (1.0, 3.0, torch.inf, 2.0)]
        [1.0, 2.0, 2.0, 2.0]

    References:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", 2020, arXiv 2007.14469,
        algorithm 1.
    """
    norms, count = state["norms"], state["count"]
    finite = norm.isfinite()
    slot = (count % len(norms)).reshape(1)
    norms.index_copy_(0, slot, torch.where(finite, norm.to(norms.dtype), norms[slot]).reshape(1))
    count.add_(finite)
    share = percentile / 100.0
    # As many of the least as can be needed: known beforehand, so the host need not wait, and cheaper than a sort.
    needed = min(len(norms), math.floor(share * (len(norms) - 1)) + 2)
    least = norms.topk(needed, largest=False).values
    rank = (count.clamp(1, len(norms)) - 1).to(norms.dtype) * share
    below, above = least[torch.stack([rank.floor(), rank.ceil()]).long()].unbind()
    return torch.where(below == above, below, torch.lerp(below, above, rank.frac()))
