"""Clip entries that are far above their own running mean of squares (SPAM)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import is_known, shards

Pair = tuple[Tensor, Tensor]

_PIECE = 1 << 15  # entries; three such pieces of float32 stay in the processor's cache
_ALMOST_ONE = 1 - 1e-5  # the roundings of a test in float32 together are below 1e-6
_LEAST = 1e-37  # above float32's subnormal numbers, which have fewer digits
_LARGEST = 1e30  # of a threshold; the square divided by it does not underflow where it matters


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
    if threshold == math.inf:
        return
    may_ask = 1.0 <= threshold <= _LARGEST
    groups: list[list[Pair]] = []
    room = 0
    for gradient, moment in zip(shards(gradients), shards(second_moments), strict=True):
        size = gradient.numel()
        if not (may_ask and gradient.is_cpu and moment.is_cpu and gradient.dtype == moment.dtype == torch.float32):
            _clip_(gradient, moment, threshold)
        elif size >= _PIECE:
            _clip_large_(gradient, moment, threshold)
        elif size > room:
            groups.append([(gradient, moment)])
            room = _PIECE - size
        elif size:
            groups[-1].append((gradient, moment))
            room -= size
    for group in groups:
        _clip_small_([gradient for gradient, _ in group], [moment for _, moment in group], threshold)


def _clip_(gradient: Tensor, moment: Tensor, threshold: float) -> None:
    limit = (moment * threshold).sqrt_().masked_fill_(~(moment > 0), torch.inf).to(gradient.dtype)
    torch.minimum(gradient, limit, out=gradient)
    torch.maximum(gradient, limit.neg_(), out=gradient)


def _clip_large_(gradient: Tensor, moment: Tensor, threshold: float) -> None:
    """Clip only the pieces that may have a spike. To find that out is one read, while clipping makes five passes."""
    if not (gradient.is_contiguous() and moment.is_contiguous()):
        _clip_(gradient, moment, threshold)
        return
    pieces = torch.split(gradient.view(-1), _PIECE), torch.split(moment.view(-1), _PIECE)
    for piece, past in zip(*pieces, strict=True):
        if not _is_calm(piece, past, threshold):
            _clip_(piece, past, threshold)


def _clip_small_(gradients: Sequence[Tensor], moments: Sequence[Tensor], threshold: float) -> None:
    """Clip tensors of together one piece, if they may have a spike."""
    joined, past = (torch._utils._flatten_dense_tensors(tensors) for tensors in (gradients, moments))  # type: ignore[no-untyped-call]
    if not _is_calm(joined, past, threshold):
        _clip_(joined, past, threshold)
        torch._foreach_copy_(list(gradients), torch._utils._unflatten_dense_tensors(joined, gradients))  # type: ignore[no-untyped-call]


def _is_calm(gradient: Tensor, moment: Tensor, threshold: float) -> bool:
    """Return True if no entry can be a spike: v - g^2 / threshold is above zero by more than rounding can change.

    Pieces with nan, infinity or v = 0 are not calm.
    """
    room = torch.addcmul(moment, gradient, gradient, value=-1.0 / (threshold * _ALMOST_ONE))
    return is_known(room.amin() > _LEAST)
