"""The N largest of every M: the selection algorithms behind :func:`lightning_grad.functional.nm_mask`.

All take magnitudes ``a`` of shape ``(M, ...)``, group members first and without NaN, and return a bool tensor of that
shape with exactly N true entries along dimension 0, the lowest index first among equals. None of them looks at a value
on the host, so none makes a GPU wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below these sizes the first algorithm is the faster one; see benchmarks/nm_sparsity.py.
_RANK_UP_TO = 4
_RUNNING_UP_TO = 256


def top_of_groups(a: Tensor, n: int) -> Tensor:
    """Choose the ``n`` largest along dimension 0, by the algorithm that suits ``n`` and the group's size."""
    m = a.shape[0]
    if n == m:
        return torch.ones_like(a, dtype=torch.bool)
    if m <= _RANK_UP_TO:
        return top_by_rank(a, n)
    if n * m <= _RUNNING_UP_TO:
        return top_by_running_threshold(a, n)
    if (m - n) * m <= _RUNNING_UP_TO:
        # Few are dropped: choose those, smallest first and the highest index first among equals.
        return top_by_running_threshold(-a.flip(0), m - n).flip(0).logical_not_()
    return top_by_sort(a, n)


def top_by_rank(a: Tensor, n: int) -> Tensor:
    """Count for every entry how many of its group beat it: M(M-1)/2 comparisons, no temporary of the full width."""
    m = a.shape[0]
    beaten_by = torch.zeros(a.shape, dtype=torch.int8, device=a.device)
    for i in range(m - 1):
        wins = (a[i] >= a[i + 1 :]).view(torch.int8)
        beaten_by[i + 1 :] += wins
        beaten_by[i] += (m - 1 - i) - wins.sum(0, dtype=torch.int8)
    return beaten_by < n


def top_by_running_threshold(a: Tensor, n: int) -> Tensor:
    """Carry the sorted n largest through the M entries, then keep what lies above the last of them, and ties in order."""
    largest = [a[0]]
    for x in a[1:]:
        merged = []
        for t in largest:
            merged.append(torch.maximum(t, x))
            x = torch.minimum(t, x)
        largest = [*merged, x][:n]
    threshold = largest[-1]
    keep = a > threshold
    missing = n - keep.sum(0, dtype=torch.int16)
    ties = a == threshold
    for i in range(a.shape[0]):
        taken = ties[i] & (missing > 0)
        missing -= taken.view(torch.int8)
        keep[i] |= taken
    return keep


def top_by_sort(a: Tensor, n: int) -> Tensor:
    """Sort every group, stably."""
    order = torch.argsort(a, dim=0, descending=True, stable=True)
    return torch.zeros_like(a, dtype=torch.bool).scatter_(0, order[:n], True)
