"""InfoBatch: drop some low-loss samples in each epoch, and give the other low-loss samples more weight.

The functions run on the CPU with a generator that the caller owns and saves. With equal losses and generators, every
rank draws the same subset.
"""

import math

import torch
from torch import Tensor


def _low_samples(losses: Tensor) -> Tensor:
    if losses.ndim != 1:
        raise ValueError(f"losses must have one entry for each sample, (n,); got shape {tuple(losses.shape)}.")
    losses = losses.detach().to("cpu", torch.float64)
    seen = losses.isfinite()
    # Without finite losses the mean is nan, and no loss is below nan.
    return seen & (losses < losses[seen].mean())


def _dropped(low: int, prune: float, extra: int) -> int:
    if not 0.0 <= prune < 1.0:
        raise ValueError(f"prune must be at least 0 and below 1, a fraction of the low-loss samples; got {prune}.")
    # Keep at least one low-loss sample: its weight represents the dropped ones.
    return max(min(math.floor(prune * low + 0.5), low - 1) - extra, 0)


def infobatch_count(losses: Tensor, prune: float) -> int:
    """Return how many samples :func:`infobatch_subset` will keep, without drawing anything.

    If :func:`~lightning_grad.functional.data_pruning.selection.round_up_count` adds samples to this number, pass them
    to :func:`infobatch_subset` as ``extra``.

    Args:
        losses: (n,): the last loss of each sample, nan or inf if it was never seen.
        prune: Fraction of the low-loss samples to drop.

    Returns:
        int: The number of samples kept.

    Example:
        >>> infobatch_count(torch.tensor([0.1, 0.2, 0.3, 0.2, 9.0, torch.nan]), 0.5)
        4
    """
    return len(losses) - _dropped(int(_low_samples(losses).sum()), prune, 0)


def infobatch_weights(is_low: Tensor, kept: Tensor) -> Tensor:
    r"""Return weights that make the expected gradient of a subset equal to that of the full data set.

    .. math::
        w_i = \begin{cases} n_\text{low} / m_\text{low} & i \text{ low} \\ 1 & \text{else} \end{cases}

    :math:`m_\text{low}` of the :math:`n_\text{low}` low-loss samples are kept. Each is kept with the same probability
    :math:`m_\text{low} / n_\text{low}`, so the expected weighted sum over the kept samples is the sum over all samples.

    Args:
        is_low: (n,) bool: True for low-loss samples, some of which are dropped.
        kept: (m,) int64: indices of the samples kept; they include all samples that are not low.

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
    r"""Drop some of the samples whose last loss is below the mean, and give the rest of them more weight.

    .. math::
        L = \{i : \ell_i < \bar\ell\}, \qquad
        w_i = \begin{cases} n_L / m_L \approx 1 / (1 - r) & i \in L \\ 1 & \text{else} \end{cases}

    :math:`\bar\ell` is the mean of the finite losses, :math:`n_L` the size of L, and :math:`m_L` of them are kept. The
    paper drops each sample of L with probability r and uses the weight :math:`1 / (1 - r)`. Here, as in the released
    code, the number of dropped samples is fixed, :math:`r n_L` rounded to the nearest integer, which keeps the length
    of an epoch constant for equal losses. The weight :math:`n_L / m_L` then makes the expectation exact. At least one
    sample of L is kept.

    Divide the loss of a batch by the number of its samples, not by the sum of its weights. The mean over a batch of
    kept samples then estimates the gradient of the full data set times n over the number kept. This is the published
    method.

    Args:
        losses: :math:`\ell`, (n,): the last loss of each sample.
            Samples with nan or inf, which were never seen, are kept.
        prune: r, fraction of L to drop, at least 0 and below 1; the paper uses 0.5.
        generator: CPU generator, in the same state on every rank; save its state in checkpoints.
        extra: Number of samples of L to keep in addition, to avoid a last batch of one sample.

    Returns:
        tuple: Indices of the samples kept, int64 in ascending order, and their weights, float32; both on the CPU.

    Raises:
        ValueError: If prune is outside [0, 1), or losses is not a vector.

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
