"""Clip the gradient of each unit by the norm of its weights (AGC)."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.clipping.norms import EPS
from lightning_grad.functional.gradients.tensor_lists import by_device, is_sharded, read_flags

_SMALL = 4096  # entries of a tensor; for a larger one, a call of its own costs little


def unit_norms(tensor: Tensor, output_dim: int = 0) -> Tensor:
    """Return the 2-norm of each unit of a weight, over all dimensions except ``output_dim``.

    A unit is a row of a Linear or a filter of a Conv. A vector or scalar is one unit. Some layers have another layout:
    ConvTranspose has its outputs in dimension 1, attention may pack query, key and value into one weight. Set
    ``output_dim`` to the dimension of the outputs, or the units are not neurons.

    Args:
        tensor: Any shape.
        output_dim: The dimension whose entries are the units.

    Returns:
        Tensor: (units, 1, ..., 1), or (1, units) with ``output_dim=1``; a scalar for vectors and scalars.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[5.],
                [1.]])
    """
    dimensions = tuple(d for d in range(tensor.ndim) if d != output_dim) if tensor.ndim > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dimensions, keepdim=dimensions is not None)
    return norms


def _alike(tensors: Sequence[Sequence[Tensor]], dims: Sequence[int], positions: Sequence[int]) -> list[list[int]]:
    """Group the positions of small tensors of one shape, whose norms one call computes with the bits of separate calls.

    That holds for contiguous tensors on a CPU. Every other position is a group of its own.
    """
    groups: dict[Any, list[int]] = {}
    for i in positions:
        own = [some[i] for some in tensors]
        joins = all(
            t.is_cpu and t.is_contiguous() and t.ndim > 0 and t.numel() <= _SMALL and not t.is_complex() for t in own
        )
        groups.setdefault((own[0].shape, dims[i], *(t.dtype for t in own)) if joins else i, []).append(i)
    return list(groups.values())


def _stacked_norms(tensors: Sequence[Tensor], output_dim: int) -> Tensor:
    """Return :func:`unit_norms` of tensors of one shape, stacked."""
    if len(tensors) == 1:
        return unit_norms(tensors[0], output_dim)[None]
    dimensions = range(tensors[0].ndim)
    others = tuple(d + 1 for d in dimensions if len(dimensions) == 1 or d != output_dim)
    norms: Tensor = torch.linalg.vector_norm(torch.stack(list(tensors)), dim=others, keepdim=len(dimensions) > 1)
    return norms


def _adaptive_coefficients(gradient_norms: Tensor, weight_norms: Tensor, ratio: float, eps: float) -> Tensor:
    limits = weight_norms.clamp(min=eps) * ratio
    return torch.where(gradient_norms < limits, 1.0, limits / gradient_norms.clamp(min=EPS))


def _coefficients_of(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    ratio: float,
    eps: float,
    dims: Sequence[int],
    positions: Sequence[int],
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the coefficients of the gradients at some positions, all on one device; also joined, in the same order."""
    groups = _alike((gradients, weights), dims, positions)
    norms = [_stacked_norms([gradients[i] for i in group], dims[group[0]]) for group in groups]
    sizes = [_stacked_norms([weights[i] for i in group], dims[group[0]]) for group in groups]
    # All units go into one vector: the formula then launches a few kernels in total, not a few per tensor.
    flat_norms, flat_sizes = (torch.cat([norm.flatten() for norm in some]) for some in (norms, sizes))
    units = _adaptive_coefficients(flat_norms, flat_sizes, ratio, eps)
    stacks = zip(norms, torch.split(units, [norm.numel() for norm in norms]), strict=True)
    parts = (part for norm, own in stacks for part in own.view(norm.shape).unbind())
    return dict(zip((i for group in groups for i in group), parts, strict=True)), units


def _clipped(gradients: Sequence[Tensor], coefficients: Mapping[int, Tensor], units: Tensor) -> list[int]:
    """Return the positions of the gradients that need the product: on a CPU, those with a clipped unit."""
    flags = read_flags(units != 1.0)
    if flags is None:
        return list(coefficients)
    ends = list(accumulate(part.numel() for part in coefficients.values()))
    spans = zip(coefficients, [0, *ends], ends, strict=False)  # 1 is the byte of a True
    return [i for i, *span in spans if flags.find(1, *span) >= 0 or gradients[i].is_complex()]


@torch.no_grad()
def clip_adaptively_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    ratio: float = 0.01,
    eps: float = 1e-3,
    output_dims: Sequence[int] | None = None,
) -> list[Tensor]:
    r"""Clip each unit's gradient by the norm of its weights (adaptive gradient clipping, AGC).

    .. math::
        G_i \leftarrow G_i \frac{m_i}{\lVert G_i \rVert} \text{ where } \lVert G_i \rVert > m_i, \quad
        m_i = \lambda \max(\lVert W_i \rVert, \epsilon)

    Args:
        gradients: G, tensors of any shape; changed in place.
        weights: W, of the same shapes; :func:`unit_norms` defines the units i.
        ratio: :math:`\lambda`, the largest allowed ratio of gradient norm to weight norm.
        eps: :math:`\epsilon`, lower bound of the weight norm; it lets zero weights move.
        output_dims: Dimension of the units, one per weight; ``None`` is dimension 0 for all.

    Returns:
        list: The coefficients of the units of each gradient, at most 1.

    Example:
        >>> g, w = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [10.0, 0.0]])
        >>> _ = clip_adaptively_([g], [w], ratio=0.1)
        >>> g
        tensor([[0.0600, 0.0800],
                [0.0000, 1.0000]])

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, arXiv 2102.06171,
        equation 3.
    """
    coefficients: list[Any] = [None] * len(gradients)
    dims = output_dims or [0] * len(gradients)
    if ratio == math.inf:  # inf / inf would be nan
        return [torch.ones_like(unit_norms(weight, dim)) for weight, dim in zip(weights, dims, strict=True)]
    plain = [i for i, gradient in enumerate(gradients) if not is_sharded(gradient)]
    for positions in by_device([gradients[i] for i in plain]):
        found, units = _coefficients_of(gradients, weights, ratio, eps, dims, [plain[i] for i in positions])
        for i, coefficient in found.items():
            coefficients[i] = coefficient
        clipped = _clipped(gradients, found, units)
        if clipped:
            torch._foreach_mul_([gradients[i] for i in clipped], [found[i] for i in clipped])
    for i, gradient in enumerate(gradients):
        if is_sharded(gradient):
            norm, size = unit_norms(gradient, dims[i]), unit_norms(weights[i], dims[i])
            coefficients[i] = _adaptive_coefficients(norm, size, ratio, eps)
            gradient.mul_(coefficients[i])
    return coefficients
