"""Flip single roundings of a linear layer while the error of its output falls."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grad.functional.quantization.grids import QuantizedTensor, weight_of_rows, weight_rows
from lightning_grad.functional.quantization.learned_rounding import SoftRounding

_LEAST_GAIN = 1e-5  # of the error that a flip alone would make; smaller gains are rounding errors


@torch.no_grad()
def flip_roundings(
    weight: SoftRounding,
    rounded: QuantizedTensor,
    gram: Tensor,
    cross: Tensor,
    max_flips: int = 10_000,
) -> QuantizedTensor:
    r"""Flip single roundings between down and up, always the best one of each output channel, until none helps.

    For a layer that is linear in its weight, the error of an output channel is quadratic in its row q. A flip of the
    entry j by :math:`\delta_j = \pm s` changes it by

    .. math::
        \Delta_j = 2\, \delta_j\, c_j + \delta_j^2\, G_{jj}, \qquad G = \tfrac 1 n X^T X, \qquad c = \tfrac 1 n X^T (X q - y)

    The output channels are independent, so all of them flip an entry at the same time. AdaRound stops where its penalty
    has decided; from there, single flips remove much of the remaining error, and need no pass over the data.

    Args:
        weight: The weight and its choices.
        rounded: Roundings to start from.
        gram: G of each group of output channels, of shape (groups, inputs, inputs). Most layers have one group.
        cross: c for the starting roundings, one row for each output channel.
        max_flips: Upper limit of flips in an output channel.

    Returns:
        QuantizedTensor: Roundings whose error is at most that of ``rounded``, up to rounding errors of the float type.

    Example:
        >>> weight, inputs = torch.tensor([[0.9, 0.45, 0.45]]), torch.tensor([[1.0, 2.0, 2.0]])
        >>> rounding = SoftRounding(weight, bits=2, scales=torch.tensor([[1.0]]))
        >>> nearest = rounding.nearest
        >>> nearest.integers
        tensor([[1, 0, 0]], dtype=torch.int8)
        >>> residual = inputs @ (nearest.dequantize() - weight).T
        >>> flip_roundings(rounding, nearest, (inputs.T @ inputs)[None], residual.T @ inputs).integers
        tensor([[1, 1, 0]], dtype=torch.int8)
    """
    groups, size = gram.shape[0], gram.shape[-1]
    integers = weight_rows(rounded.integers, rounded.dim).to(gram.dtype).reshape(groups, -1, size)
    below = weight_rows(weight.below, rounded.dim).to(gram.dtype).reshape(groups, -1, size)
    has_choice = weight_rows(weight.has_choice.to(gram.dtype), rounded.dim).reshape(groups, -1, size) > 0
    scales = rounded.scales.to(gram.dtype).reshape(groups, -1, 1)
    moves = torch.where(has_choice, torch.where(integers == below, scales, -scales), 0.0)
    slopes, curvature = cross.to(gram.dtype).reshape(groups, -1, size).clone(), gram.diagonal(dim1=1, dim2=2)[:, None]
    least = -_LEAST_GAIN * (scales.square() * curvature).amax(-1)
    group = torch.arange(groups, device=gram.device)[:, None]
    for _ in range(max_flips):
        change = (2 * moves * slopes + moves.square() * curvature).masked_fill_(moves == 0, torch.inf)
        best, at = change.min(-1)
        helps = best < least
        if not bool(helps.any()):
            break
        step = torch.where(helps, moves.gather(-1, at[..., None])[..., 0], 0.0)[..., None]
        slopes += step * gram[group, at]
        integers.scatter_add_(-1, at[..., None], step / scales)
        moves.scatter_add_(-1, at[..., None], -2 * step)
    flat = integers.round_().to(torch.int8).reshape(-1, size)
    found = weight_of_rows(flat, rounded.integers.shape, rounded.dim)
    return QuantizedTensor(found, rounded.scales, rounded.bits, rounded.quantizer, rounded.dim)
