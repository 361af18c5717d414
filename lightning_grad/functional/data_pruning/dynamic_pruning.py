"""Another subset of the data in each epoch: InfoBatch, which knows the last losses, and repeated random subsets (RS2).

Both are computed on the CPU: from a generator that the caller owns and saves (InfoBatch), or from seed and epoch alone
(RS2). Given the same losses, every rank draws the same subset.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_grad.functional.shuffling import shuffled


def _low_samples(losses: Tensor) -> Tensor:
    if losses.ndim != 1:
        raise ValueError(f"losses must have one entry for each sample, (n,); got the shape {tuple(losses.shape)}.")
    losses = losses.detach().to("cpu", torch.float64)
    seen = losses.isfinite()
    # The mean of none is nan, below which there is nothing.
    return seen & (losses < losses[seen].mean())


def _dropped(low: int, prune: float, extra: int) -> int:
    if not 0.0 <= prune < 1.0:
        raise ValueError(f"prune must be at least 0 and below 1, a share of the samples with low losses; got {prune}.")
    # One low sample stays, or the others would have nobody to stand for them.
    return max(min(math.floor(prune * low + 0.5), low - 1) - extra, 0)


def infobatch_count(losses: Tensor, prune: float) -> int:
    """Return how many samples :func:`infobatch_subset` will keep, without drawing anything.

    What :func:`~lightning_grad.functional.data_pruning.selection.round_up_count` adds to it goes to ``extra``.

    Args:
        losses: (n,): the last loss of each sample, nan or inf if it was never seen.
        prune: Share of the samples with low losses that is left out.

    Returns:
        int: The number of samples.

    Example:
        >>> infobatch_count(torch.tensor([0.1, 0.2, 0.3, 0.2, 9.0, torch.nan]), 0.5)
        4
    """
    return len(losses) - _dropped(int(_low_samples(losses).sum()), prune, 0)


def infobatch_weights(is_low: Tensor, kept: Tensor) -> Tensor:
    r"""Return the weights that make the gradient of a subset that of the whole data set, on average.

    .. math::
        w_i = \begin{cases} n_\text{low} / m_\text{low} & i \text{ low} \\ 1 & \text{else} \end{cases}

    :math:`m_\text{low}` of :math:`n_\text{low}` low samples are kept. As each is as likely to be kept as the other, with
    probability :math:`m_\text{low} / n_\text{low}`, the weighted sum over the kept samples has the sum over all as its
    expectation.

    Args:
        is_low: (n,) bool: which samples are those of which some are left out.
        kept: (m,) int64: indices of the samples kept, all that are not low among them.

    Returns:
        Tensor: (m,) float32: w, aligned with ``kept``.

    Example:
        >>> infobatch_weights(torch.tensor([True, False, True, True]), torch.tensor([0, 1]))
        tensor([3., 1.])
    """
    kept_low = is_low[kept]
    weight = int(is_low.sum()) / max(int(kept_low.sum()), 1)
    return torch.ones(len(kept)).masked_fill_(kept_low, weight)


def infobatch_subset(losses: Tensor, prune: float, generator: torch.Generator, extra: int = 0) -> tuple[Tensor, Tensor]:
    r"""Leave out some of the samples whose last loss is below the mean, and let the others count for more.

    .. math::
        L = \{i : \ell_i < \bar\ell\}, \qquad
        w_i = \begin{cases} n_L / m_L \approx 1 / (1 - r) & i \in L \\ 1 & \text{else} \end{cases}

    :math:`\bar\ell` is the mean of the finite losses, :math:`n_L` the size of L, and :math:`m_L` of them are kept. The paper
    leaves out each sample of L with probability r, and weighs by :math:`1 / (1 - r)`. Here the number that is left out is
    fixed, :math:`r n_L` to the nearest, as in the released code, so that all epochs of equal losses are equally long;
    :math:`n_L / m_L` is the weight for which the expectation is then exact. One sample of L is always kept.

    The loss of a batch is to be divided by the number of its samples, not by the sum of its weights. A mean over a batch of
    kept samples estimates the gradient of the whole data set up to one factor, n over the number kept; that is the
    published method.

    Args:
        losses: :math:`\ell`, (n,): the last loss of each sample; nan or inf if it was never seen, which keeps it.
        prune: r, share of L that is left out, at least 0 and below 1; the paper uses 0.5.
        generator: Of the CPU; its state goes into the checkpoint. Every rank needs the same.
        extra: How many more samples of L are kept, so that no batch of one is left over.

    Returns:
        tuple: Indices of the samples kept, int64 in rising order, and their weights, float32; both on the CPU.

    Raises:
        ValueError: If prune lies outside [0, 1), or the losses are no vector.

    Example:
        >>> losses = torch.tensor([0.1, 5.0, 0.3, 0.2, 0.2, torch.nan])
        >>> infobatch_subset(losses, 0.5, torch.Generator().manual_seed(0))
        (tensor([1, 3, 4, 5]), tensor([1., 2., 2., 1.]))

    References:
        Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", 2024, arXiv 2303.04947.
    """
    is_low = _low_samples(losses)
    low = is_low.nonzero().flatten()
    dropped = _dropped(len(low), prune, extra)
    keep = torch.ones(len(losses), dtype=torch.bool)
    keep[low[torch.randperm(len(low), generator=generator)[:dropped]]] = False
    kept = keep.nonzero().flatten()
    return kept, infobatch_weights(is_low, kept)


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
