"""Select the N largest of every M: the algorithms behind :func:`lightning_grad.functional.nm_mask`.

All functions take magnitudes ``a`` of shape ``(M, ...)`` without NaN, with the members of a group along dimension 0.
They return a bool tensor of that shape with exactly N true entries along dimension 0; ties go to the lowest index.
None of them synchronizes with the host. Every operation runs over whole rows, which is several times faster than
sorting each group.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

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
    threshold = _largest(list(a.unbind()), n)
    keep = a > threshold
    missing = n - keep.sum(0, dtype=torch.int16)
    ties = a == threshold
    for i in range(a.shape[0]):
        taken = ties[i] & (missing > 0)
        missing -= taken.view(torch.int8)
        keep[i] |= taken
    return keep


def _largest(rows: list[Tensor], n: int) -> Tensor:
    """Return the n-th largest of the rows, elementwise.

    Both halves are sorted. The n-th largest of all is then the maximum over i + j = n of
    min(i-th largest of one half, j-th largest of the other).
    """
    if n == 1:
        return functools.reduce(torch.maximum, rows)
    half = len(rows) // 2
    one, other = _sort(rows[:half]), _sort(rows[half:])
    candidates = []
    for i in range(max(0, n - len(other)), min(n, len(one)) + 1):
        ends = [side[k - 1] for side, k in ((one, i), (other, n - i)) if k > 0]
        candidates.append(functools.reduce(torch.minimum, ends))
    return functools.reduce(torch.maximum, candidates)


def _sort(rows: list[Tensor]) -> list[Tensor]:
    """Sort the rows elementwise in descending order (Batcher's odd-even merge sort)."""
    if len(rows) <= 1:
        return rows
    half = len(rows) // 2
    return _merge(_sort(rows[:half]), _sort(rows[half:]))


def _merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    if not one or not other:
        return [*one, *other]
    if len(one) == len(other) == 1:
        return [torch.maximum(one[0], other[0]), torch.minimum(one[0], other[0])]
    even, odd = _merge(one[::2], other[::2]), _merge(one[1::2], other[1::2])
    merged = [even[0]]
    for high, low in zip(odd, even[1:], strict=False):
        merged += [torch.maximum(high, low), torch.minimum(high, low)]
    paired = min(len(odd), len(even) - 1)
    return [*merged, *odd[paired:], *even[1 + paired :]]
