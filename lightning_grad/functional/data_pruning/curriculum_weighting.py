"""Weights that begin with the easy samples and end equal: a training curriculum (MacAvaney et al., 2020)."""

import torch
from torch import Tensor


def easiness(difficulty: Tensor) -> Tensor:
    r"""Return the share of the other samples that are harder.

    .. math::
        D_i = \frac{1}{n - 1} \sum_{j \ne i} \Bigl( [d_j > d_i] + \tfrac 1 2 [d_j = d_i] \Bigr)

    The hardest sample has D = 0 and the easiest D = 1; equal difficulties have equal D. The mean is 1/2.

    Args:
        difficulty: d, (n,): losses or scores, higher = harder. nan if unknown.

    Returns:
        Tensor: D, (n,), at least float32, detached, computed without a host sync; 1 where the difficulty is unknown, or
        if there is only one sample. Unknown samples do not count in n.

    Raises:
        ValueError: If difficulty is not a vector.

    Example:
        >>> easiness(torch.tensor([0.1, 3.0, 0.5, 3.0, float("nan")]))
        tensor([1.0000, 0.1667, 0.6667, 0.1667, 1.0000])
    """
    if difficulty.ndim != 1:
        raise ValueError(f"difficulty must have one entry for each sample, (n,); got shape {tuple(difficulty.shape)}.")
    values = difficulty.detach()
    values = values if values.dtype == torch.float64 else values.float()
    known = ~values.isnan()
    values = values.nan_to_num(nan=torch.inf, posinf=torch.finfo(values.dtype).max)  # unknown ones behind all others
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    others = known.sum() - 1
    harder = others + 1 - up_to + (up_to - below - 1) / 2.0
    return torch.where(known & (others > 0), harder / others.clamp(min=1), 1.0).to(values.dtype)


def curriculum_weights(easiness: Tensor, epoch: float, epochs: float) -> Tensor:
    r"""Return the weights of samples at an epoch of a curriculum.

    .. math::
        w_i = \begin{cases} D_i + \frac e m (1 - D_i) & e < m \\ 1 & \text{else} \end{cases}

    Args:
        easiness: D, any shape, from 0 (hard) to 1 (easy).
        epoch: e, epochs done, from 0.
        epochs: m, at least 0: from this epoch on, all weights are 1.

    Returns:
        Tensor: w, in the shape of ``easiness``.

    Raises:
        ValueError: If epoch or epochs is negative.

    Example:
        >>> D = torch.tensor([0.0, 0.5, 1.0])
        >>> [curriculum_weights(D, epoch, 4).tolist() for epoch in (0, 2, 4)]
        [[0.0, 0.5, 1.0], [0.5, 0.75, 1.0], [1.0, 1.0, 1.0]]

    References:
        MacAvaney et al., "Training Curricula for Open Domain Answer Re-Ranking", SIGIR 2020, arXiv 2004.14269, section
        3.1.
    """
    for name, value in (("epoch", epoch), ("epochs", epochs)):
        if not value >= 0.0:
            raise ValueError(f"{name} must be at least 0; got {value}.")
    if epoch >= epochs:
        return torch.ones_like(easiness)
    return easiness + epoch / epochs * (1.0 - easiness)
