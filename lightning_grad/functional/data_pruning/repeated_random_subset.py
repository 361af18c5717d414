"""Another random subset of the data in each epoch (RS2), computed on the CPU from seed and epoch alone."""

import torch
from torch import Tensor

from lightning_grad.functional.shuffling import shuffled


def _carried(total: int, count: int, cycle: int) -> int:
    """Return how many samples at the end of a cycle belong to an epoch that goes on in the next one."""
    return (cycle + 1) * total % count


def _deferred(permutation: Tensor, taken: Tensor, head: int) -> Tensor:
    """Return the permutation with those of its first ``head`` entries that are taken put behind the next free ones."""
    is_taken = torch.zeros(len(permutation), dtype=torch.bool)
    is_taken[taken] = True
    free = (~is_taken[permutation]).nonzero().flatten()[:head]
    in_head = torch.zeros(len(permutation), dtype=torch.bool)
    in_head[free] = True
    return torch.cat([permutation[free], permutation[~in_head]])


def _cycle(total: int, count: int, cycle: int, seed: int) -> Tensor:
    """Return the order in which a cycle walks through all samples.

    Its head depends on the tail of the cycle before it, whose tail may depend on the one before that. Only the first
    ``count`` entries are ever moved, so we go back to a cycle whose tail lies behind them.
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
    r"""Return the random subset of one epoch, another in each.

    Without replacement, successive epochs walk through one permutation of all samples after the other, so that each sample
    is seen once before any is seen twice. Where an epoch reaches into the next permutation, what it already has comes a
    little later in that one: no epoch has a sample twice. With replacement, the subsets of epochs are independent.

    The result depends on nothing but the arguments, so that a resumed run and every rank have the same subset. The cost is
    that of a few permutations, and of up to n / (n - k) of them for a subset of k that is nearly all of n.

    Args:
        total: Number of samples.
        count: Samples in an epoch.
        epoch: Number of the epoch, from 0 on.
        seed: Seed of the run.
        replacement: Whether a sample may come again before all were seen.

    Returns:
        Tensor: (count,) int64, on the CPU, in rising order, without duplicates.

    Raises:
        ValueError: If count lies outside [0, total], or the epoch is negative.

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
