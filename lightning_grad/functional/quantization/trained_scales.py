"""Weights that are integers times scales, of which only the scales change (QZO). Nothing but the scales is stored."""

import torch
from torch import Tensor

from lightning_grad.functional.quantization.grids import (
    quantize_weight,
    read_quantized_weight,
    weight_of_rows,
    weight_rows,
)


@torch.no_grad()
def round_to_scales_(weight: Tensor, bits: int, group_size: int | None = None, dim: int = 0) -> Tensor:
    r"""Round a weight to integers times scales, in place, and return the scales.

    .. math::
        w \leftarrow k \, s, \qquad k \in \{-(2^{b-1} - 1), \dots, 2^{b-1} - 1\}

    Each output channel has one scale s, or one for each group of adjacent entries. It is the grid "ste" of
    :func:`quantize_weight`. A weight that lies on such a grid already does not change.

    Args:
        weight: Weight of two or more dimensions; changed in place.
        bits: Bits b of a weight, 2 to 8.
        group_size: Entries of an output channel that share a scale; must divide its length. Default: all.
        dim: Dimension of the output channels.

    Returns:
        Tensor: The scales, (groups, 1), in float32, or float64 for float64 weights.

    Raises:
        ValueError: If there is no such grid, the weight has fewer than two dimensions, or the groups do not fit.

    Example:
        >>> weight = torch.tensor([[0.9, -0.7, 0.2, 0.3]])
        >>> round_to_scales_(weight, bits=2, group_size=2)
        tensor([[0.9000],
                [0.3000]])
        >>> weight
        tensor([[ 0.9000, -0.9000,  0.3000,  0.3000]])
    """
    rows = weight_rows(weight, dim)
    if rows.shape[1] % (group_size or 1):
        raise ValueError(f"group_size must divide the {rows.shape[1]} entries of an output channel; got {group_size}.")
    groups = rows.reshape(-1, group_size or rows.shape[1])
    try:
        found = read_quantized_weight(groups, bits)
    except ValueError:  # it lies on no such grid
        found = quantize_weight(groups, bits)
    weight.copy_(weight_of_rows(found.dequantize().reshape(rows.shape), weight.shape, dim))
    return found.scales


@torch.no_grad()
def rescale_(weight: Tensor, before: Tensor, after: Tensor, dim: int = 0) -> None:
    r"""Give a weight other scales, in place; its integers stay the same.

    .. math::
        w \leftarrow k \, s', \qquad k = \operatorname{round}(w / s)

    The integers need no memory of their own: half a step is far more than the rounding of a product, also in bfloat16.

    Args:
        weight: Weight with integers of at most 8 bits; changed in place.
        before: Its scales s, (groups, 1), not 0.
        after: The new scales s', (groups, 1).
        dim: Dimension of the output channels.

    Example:
        >>> weight = torch.tensor([[1.5, -0.5]])
        >>> rescale_(weight, torch.tensor([[0.5]]), torch.tensor([[0.25]]))
        >>> weight
        tensor([[ 0.7500, -0.2500]])
    """
    rows = weight_rows(weight, dim)
    values = (rows.reshape(len(before), -1) / before).round_().mul_(after)
    weight.copy_(weight_of_rows(values.reshape(rows.shape), weight.shape, dim))
