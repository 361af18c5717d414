"""DCT-AdamW: Adam in a low-rank part of the gradient, spanned by columns of the discrete cosine transform."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.optimizers._moments import update_moments_


def dct_basis(size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    r"""Return the orthogonal matrix whose columns are cosines of rising frequency (DCT-II).

    .. math::
        Q_{jk} = \sqrt{\frac{2 - \delta_{k0}}{n}} \cos\left(\frac{\pi (2j + 1) k}{2n}\right)

    Args:
        size: n.
        dtype: Type of the entries, which are computed in float64.
        device: Device of the result.

    Example:
        >>> dct_basis(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """
    places = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.outer(2 * places + 1, places) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    basis[:, 0] = 1 / math.sqrt(size)
    return basis.to(device=device, dtype=dtype)


def largest_columns(coefficients: Tensor, rank: int) -> Tensor:
    """Return a mask of the columns with the largest sum of absolute values.

    Args:
        coefficients: (rows, n).
        rank: Number of columns, at most n.

    Returns:
        Tensor: (n,) bool.

    Example:
        >>> largest_columns(torch.tensor([[1.0, -3.0, 2.0]]), rank=2)
        tensor([False,  True,  True])
    """
    exact = torch.promote_types(coefficients.dtype, torch.float32)
    strength = torch.linalg.vector_norm(coefficients, ord=1, dim=0, dtype=exact)
    mask = torch.zeros(len(strength), dtype=torch.bool, device=strength.device)
    return mask.scatter_(0, strength.topk(rank).indices, True)


def columns_of(mask: Tensor, rank: int) -> Tensor:
    """Return the rising numbers of the ``rank`` columns in a mask, without a host sync.

    Example:
        >>> columns_of(torch.tensor([False, True, True]), rank=2)
        tensor([1, 2])
    """
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:rank]


def follow_columns(moment: Tensor, old: Tensor, new: Tensor, size: int) -> Tensor:
    """Return a moment of new columns: columns that stay keep their values, others start at zero.

    For orthogonal columns this is the rotation of the moment into the new subspace.

    Args:
        moment: (rows, rank).
        old: (rank,) numbers of the columns that it belongs to.
        new: (rank,) numbers of the new columns.
        size: Number of all columns.

    Example:
        >>> follow_columns(torch.tensor([[5.0, 7.0]]), torch.tensor([0, 2]), torch.tensor([2, 3]), size=4)
        tensor([[7., 0.]])
    """
    places = torch.full((size,), -1, dtype=torch.long, device=moment.device)
    places.scatter_(0, old, torch.arange(len(old), device=moment.device))
    places = places[new]
    return torch.where(places >= 0, moment[:, places.clamp(min=0)], 0)


@torch.no_grad()
def dct_adamw_(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    refresh: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Make one step of DCT-AdamW with one matrix, in place, and return the mask of its columns.

    .. math::
        S = (g + e) Q, \qquad u = \mathrm{Adam}(S_C), \qquad
        w \leftarrow (1 - \eta \lambda) w - \eta \, u \, Q_C^\top, \qquad e \leftarrow g + e - S_C Q_C^\top

    C are the columns of S with the largest sum of absolute values. A matrix with more columns than rows is transposed
    first.

    Args:
        weight: w, (n, k).
        gradient: g, of the same shape.
        basis: Q, (s, s) with s = min(n, k), from :func:`dct_basis`.
        mask: (s,) the columns C of the step before; None in the first step.
        mean: First moment, (max(n, k), rank); replaced in place.
        square: Second moment, of the same shape.
        step: Number of this step, from 1.
        lr: :math:`\eta`.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: :math:`\lambda`, decoupled.
        refresh: Choose the columns again.
        residual: e, (max(n, k), s): what earlier projections dropped; None drops it for good.

    Example:
        >>> w, m, v = torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(2, 1)
        >>> g = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
        >>> dct_adamw_(w, g, dct_basis(2), None, m, v, step=1, lr=1.0, eps=0.0)
        tensor([ True, False])
        >>> w
        tensor([[-0.7071, -0.7071],
                [-0.7071, -0.7071]])

    References:
        Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", 2025, arXiv
        2505.17967. Moments follow their columns, which is the option ``rotate_subspace`` of the released code.
    """
    tall_weight, tall = (weight, gradient) if len(weight) >= len(weight.mT) else (weight.mT, gradient.mT)
    rank = mean.shape[1]
    if residual is not None:
        tall = residual.add_(tall)
    if mask is None or refresh:
        coefficients = tall @ basis
        chosen = largest_columns(coefficients, rank)
        columns = columns_of(chosen, rank)
        low = coefficients[:, columns]
        if mask is not None:
            old = columns_of(mask, rank)
            for moment in (mean, square):
                moment.copy_(follow_columns(moment, old, columns, len(basis)))
        directions = basis[:, columns]
    else:
        chosen, columns = mask.bool(), columns_of(mask, rank)  # torch turns masks into floats when it loads them
        directions = basis[:, columns]
        low = tall @ directions
    if residual is not None:
        residual.sub_(low @ directions.mT)
    step_low = mean / update_moments_(mean, square, low, step, betas, eps)
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    tall_weight.add_(step_low @ directions.mT, alpha=-lr / (1 - betas[0] ** step))
    return chosen
