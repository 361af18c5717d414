"""Select the N largest of every M: the algorithms behind :func:`lightning_grad.functional.nm_mask`.

All functions take magnitudes ``a`` of shape ``(M, ...)`` without NaN, with the members of a group along dimension 0.
They return a bool tensor of that shape with exactly N true entries along dimension 0; ties go to the lowest index.
None of them synchronizes with the host. Every operation runs over whole rows, which is several times faster than
sorting each group.
"""

import torch
from torch import Tensor

from lightning_grad.functional.sparsity._selection_network import nth_largest

_NETWORK_UP_TO_ON_GPU = 8
_RANK_UP_TO = 4  # largest group size for which counting is faster; see benchmarks/sparsity.py


def top_of_groups(a: Tensor, n: int) -> Tensor:
    """Select the ``n`` largest along dimension 0, with the fastest algorithm for the group size."""
    if n == a.shape[0]:
        return torch.ones_like(a, dtype=torch.bool)
    if a.is_cuda and a.shape[0] > _NETWORK_UP_TO_ON_GPU:
        return top_by_sort(a, n)
    return top_by_rank(a, n) if a.shape[0] <= _RANK_UP_TO else top_by_threshold(a, n)


def top_by_sort(a: Tensor, n: int) -> Tensor:
    """Sort every group; on a GPU, three kernels are faster than the many of a sorting network."""
    order = torch.argsort(a, dim=0, descending=True, stable=True)
    return torch.zeros_like(a, dtype=torch.bool).scatter_(0, order[:n], True)


def top_by_rank(a: Tensor, n: int) -> Tensor:
    """Count how many members of its group are larger than each entry, with M(M-1)/2 comparisons."""
    m = a.shape[0]
    beaten_by = torch.zeros(a.shape, dtype=torch.int8, device=a.device)
    for i in range(m - 1):
        wins = (a[i] >= a[i + 1 :]).view(torch.int8)
        beaten_by[i + 1 :] += wins
        beaten_by[i] += (m - 1 - i) - wins.sum(0, dtype=torch.int8)
    return beaten_by < n


def top_by_threshold(a: Tensor, n: int) -> Tensor:
    """Find the n-th largest with a sorting network, keep everything above it, then fill up with ties."""
    threshold = nth_largest(list(a.unbind()), n)
    keep = a > threshold
    missing = n - keep.sum(0, dtype=torch.int16)
    ties = a == threshold
    for i in range(a.shape[0]):
        taken = ties[i] & (missing > 0)
        missing -= taken.view(torch.int8)
        keep[i] |= taken
    return keep
