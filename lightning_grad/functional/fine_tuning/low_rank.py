"""Weights as products of two thin matrices, with ranks that follow from one threshold for all of them (WeLore)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def global_ranks(singular_values: Sequence[Tensor], reduction: float) -> list[int]:
    r"""Return a rank for each matrix, by one threshold on the singular values of all of them.

    .. math::
        r_l = \left| \left\{ i : \frac{s_{l,i} - \min_j s_{l,j}}{\max_j s_{l,j} - \min_j s_{l,j}} \ge k \right\} \right|

    The threshold k is chosen so that :math:`\sum_l (n_l - r_l)` is the given share of :math:`\sum_l n_l`, rounded. A matrix
    with a few large singular values gets a small rank, one with an even spectrum a large one. The released code of WeLore
    lists k for two models. Here it follows from the reduction, by sorting all normalized values; of equal ones at the
    threshold, the first are dropped, so the total is exact. A matrix keeps its largest singular value, and an even spectrum
    (all values equal) is kept.

    Args:
        singular_values: Singular values of each matrix, (n_l,), in any order.
        reduction: Share of all ranks to drop, at least 0 and below 1.

    Returns:
        list: Rank of each matrix, at least 1.

    Raises:
        ValueError: If ``reduction`` is not at least 0 and below 1, or a singular value is not finite.

    Example:
        >>> steep, even = torch.tensor([8.0, 0.2, 0.1, 0.0]), torch.tensor([1.0, 0.9, 0.8, 0.0])
        >>> global_ranks([steep, even], reduction=0.5)
        [1, 3]

    References:
        Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", 2024,
        arXiv 2407.11239, section 3, and its released code for the normalization.
    """
    if not 0.0 <= reduction < 1.0:
        raise ValueError(f"reduction must be at least 0 and below 1; got {reduction}.")
    values = [each.detach().double().cpu().sort(descending=True).values for each in singular_values]
    if not all(bool(each.isfinite().all()) for each in values):
        raise ValueError("singular_values must be finite; got nan or inf.")
    ranks = [len(each) for each in values]
    normalized = torch.cat([_normalized(each)[1:] for each in values] or [torch.zeros(0)])  # each keeps its largest
    owners = torch.cat(
        [torch.full((max(0, len(each) - 1),), place) for place, each in enumerate(values)] or [torch.zeros(0)]
    )
    dropped = min(round(reduction * sum(ranks)), len(normalized))
    for owner in owners[normalized.argsort(stable=True)[:dropped]].tolist():
        ranks[int(owner)] -= 1
    return ranks


def _normalized(values: Tensor) -> Tensor:
    width = values.max() - values.min()
    return (values - values.min()) / width if width > 0 else torch.ones_like(values)


def uniform_ranks(sizes: Sequence[int], reduction: float) -> list[int]:
    """Return ranks that cut each matrix by the same share.

    They are rounded so that the total is exact: the largest fractions are rounded up. Each is at least 1.

    Args:
        sizes: Full rank of each matrix.
        reduction: Share of each rank to drop, at least 0 and below 1.

    Raises:
        ValueError: If ``reduction`` is not at least 0 and below 1.

    Example:
        >>> uniform_ranks([10, 64, 5], 0.5), uniform_ranks([3, 3, 3], 0.5)
        ([5, 32, 2], [2, 2, 1])
    """
    if not 0.0 <= reduction < 1.0:
        raise ValueError(f"reduction must be at least 0 and below 1; got {reduction}.")
    exact = [(1.0 - reduction) * size for size in sizes]
    ranks = [max(1, int(rank)) for rank in exact]
    missing = max(0, sum(sizes) - round(reduction * sum(sizes)) - sum(ranks))
    for place in sorted(range(len(sizes)), key=lambda place: ranks[place] - exact[place])[:missing]:
        ranks[place] += 1
    return ranks


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return the two factors of the best approximation of a matrix that has a given rank.

    .. math::
        W \approx U V, \qquad U = L_{:, 1:r} S_r^{1/2}, \qquad V = S_r^{1/2} R_{:, 1:r}^T

    with the singular value decomposition :math:`W = L S R^T`. Both factors have the same norm.

    Args:
        weight: W, of shape (out, in).
        rank: Rank r, from 1 to the smaller side.

    Returns:
        tuple: U of shape (out, r) and V of shape (r, in), in the type of the weight.

    Raises:
        ValueError: If the rank is out of range or the weight is not finite.

    Example:
        >>> u, v = low_rank_factors(torch.diag(torch.tensor([4.0, 1.0])), rank=1)
        >>> u @ v
        tensor([[4., 0.],
                [0., 0.]])

    References:
        Eckart and Young, 1936; WeLore, arXiv 2407.11239 (root of the singular values in both factors: its released code).
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must be an integer from 1 to {min(weight.shape)}; got {rank}.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite; got nan or inf.")
    exact = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)
