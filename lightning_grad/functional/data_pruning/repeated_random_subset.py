"""RS2: a new random subset of the data in each epoch, computed on the CPU from seed and epoch only."""

import torch
from torch import Tensor

from lightning_grad.functional.shuffling import shuffled


def _carried(total: int, count: int, cycle: int) -> int:
    """Return how many samples at the end of a cycle belong to an epoch that continues in the next cycle."""
    return (cycle + 1) * total % count


def _deferred(permutation: Tensor, taken: Tensor, head: int) -> Tensor:
    """Move taken entries out of the first ``head`` entries of a permutation, behind the next free ones."""
    is_taken = torch.zeros(len(permutation), dtype=torch.bool)
    is_taken[taken] = True
    free = (~is_taken[permutation]).nonzero().flatten()[:head]
    in_head = torch.zeros(len(permutation), dtype=torch.bool)
    in_head[free] = True
    return torch.cat([permutation[free], permutation[~in_head]])


def _cycle(total: int, count: int, cycle: int, seed: int) -> Tensor:
    """Return the order in which a cycle visits all samples.

    Its head depends on the tail of the previous cycle, which may depend on the cycle before that. Only the first
    ``count`` entries are ever moved, so the recursion stops at a cycle whose tail starts after them.
    """
    start = cycle
    while start > 0 and _carried(total, count, start - 1):
        start -= 1
        if count + _carried(total, count, start) <= total:
            break
    order = shuffled(total, seed, start)
    for number in range(start + 1, cycle + 1):
        carried = _carried(total, count, number - 1)
        taken = order[total - carried :]
        order = shuffled(total, seed, number)
        order = _deferred(order, taken, count - carried) if carried else order
    return order


def repeated_random_subset(total: int, count: int, epoch: int, seed: int, replacement: bool = False) -> Tensor:
    r"""Return the random subset for one epoch.

    Without replacement, successive epochs take consecutive parts of a permutation of all samples, and then of the next
    permutation: every sample is used once before any is used twice. If an epoch extends into the next permutation, the
    samples that it already has are moved to a later position there, so no epoch contains a sample twice. With
    replacement, the subsets of different epochs are independent.

    The result depends only on the arguments, so it is the same on every rank and in a resumed run. It costs a few
    permutations, and up to n / (n - k) of them if the subset of k contains nearly all n samples.

    Args:
        total: Number of samples.
        count: Number of samples in an epoch.
        epoch: Index of the epoch, starting at 0.
        seed: Seed of the run.
        replacement: Draw each subset independently, even before all samples were used.

    Returns:
        Tensor: (count,) int64, on the CPU, in ascending order, without duplicates.

    Raises:
        ValueError: If count is outside [0, total], or epoch is negative.

    Example:
        >>> first, second = (repeated_random_subset(6, 3, epoch, seed=0) for epoch in (0, 1))
        >>> torch.cat([first, second]).sort().values
        tensor([0, 1, 2, 3, 4, 5])

    References:
        Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning", 2023,
        arXiv 2305.18424.
    """
    if not 0 <= count <= total:
        raise ValueError(f"count must be between 0 and the number of samples, {total}; got {count}.")
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0; got {epoch}.")
    if replacement or count == 0:
        return shuffled(total, seed, epoch)[:count].sort().values
    start, end = epoch * count, (epoch + 1) * count
    cycles = range(start // total, (end - 1) // total + 1)
    parts = [_cycle(total, count, c, seed)[max(start - c * total, 0) : end - c * total] for c in cycles]
    return torch.cat(parts).sort().values
