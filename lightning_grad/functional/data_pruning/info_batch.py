"""InfoBatch: leave out some samples with low losses in each epoch, and let the others count for more.

Computed on the CPU, from a generator that the caller owns and saves. Given the same losses, every rank draws the same subset.
"""

import math

import torch
from torch import Tensor


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
