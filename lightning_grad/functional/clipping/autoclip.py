"""AutoClip: a threshold that follows a percentile of the gradient norms seen so far.

The state is a dict of tensors on the device, created by one function and updated in place by another. It can be saved
in a checkpoint unchanged, and updates need no host sync. Non-finite norms do not change it.
"""

import math

import torch
from torch import Tensor

from lightning_grad.functional.clipping.norms import statistic


def autoclip_state(window: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the initial state of AutoClip.

    Args:
        window: Number of most recent norms to keep.
        device: Device of the gradients.

    Returns:
        dict: ``norms``, (window,), infinity in unused entries; ``count``, a scalar int64.
    """
    none = statistic(math.inf, torch.device(device))
    return {"norms": none.repeat(window), "count": torch.zeros((), dtype=torch.int64, device=device)}


@torch.no_grad()
def autoclip_threshold_(norm: Tensor, state: dict[str, Tensor], percentile: float = 10.0) -> Tensor:
    r"""Add a norm to the state and return the percentile of the norms seen so far.

    .. math::
        \tau_t = \operatorname{percentile}_p(\lVert g_1 \rVert, \ldots, \lVert g_t \rVert)

    Equals ``np.percentile`` (linear interpolation) over the last ``window`` finite norms; the published code keeps all.

    Args:
        norm: :math:`\lVert g_t \rVert`, a scalar; ignored if it is not finite.
        state: From :func:`autoclip_state`; changed in place.
        percentile: p, 0 to 100.

    Returns:
        Tensor: The threshold, a scalar; infinite until a finite norm was added.

    Example:
        >>> state = autoclip_state(window=4)
        >>> [autoclip_threshold_(torch.tensor(n), state, 50.0).item() for n in (1.0, 3.0, torch.inf, 2.0)]
        [1.0, 2.0, 2.0, 2.0]

    References:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", 2020, arXiv
        2007.14469, algorithm 1.
    """
    norms, count = state["norms"], state["count"]
    finite = norm.isfinite()
    slot = (count % len(norms)).reshape(1)
    norms.index_copy_(0, slot, torch.where(finite, norm.to(norms.dtype), norms[slot]).reshape(1))
    count.add_(finite)
    share = percentile / 100.0
    # The percentile needs at most this many of the smallest norms. The number does not depend on the count on the
    # device, so topk needs no host sync, and it is cheaper than a sort.
    needed = min(len(norms), math.floor(share * (len(norms) - 1)) + 2)
    least = norms.topk(needed, largest=False).values
    rank = (count.clamp(1, len(norms)) - 1).to(norms.dtype) * share
    below, above = least[torch.stack([rank.floor(), rank.ceil()]).long()].unbind()
    return torch.where(below == above, below, torch.lerp(below, above, rank.frac()))
