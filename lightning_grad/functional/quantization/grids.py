r"""The grids of quantized weights: scales, integers and the values that they stand for.

A row is one output channel of a weight. All grids have the form

.. math::
    q = s \, (k + o), \qquad k = \operatorname{clamp}(\operatorname{round}(w / s - o), k_{min}, k_{max})

with one scale s for each row, an integer k for each entry, and an offset o of 0 or 1/2:

========== ============================ ====== ========================= ==================
quantizer  s                            o      k                         levels
========== ============================ ====== ========================= ==================
ste        max|w| / (2^(b-1) - 1)       0      +-(2^(b-1) - 1)           2^b - 1, with 0
quest      2 (C_b rms(w)) / (2^b - 1)   1/2    -2^(b-1) .. 2^(b-1) - 1   2^b, without 0
statsq     2 mean|w| / 2^(b-1)          1/2    -2^(b-1) .. 2^(b-1) - 1   2^b, without 0
========== ============================ ====== ========================= ==================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grad.functional.quantization.hadamard import hadamard_block, hadamard_transform

Quantizer = Literal["ste", "quest", "statsq"]
QUANTIZERS: tuple[Quantizer, ...] = get_args(Quantizer)
MOST_BITS = 8

# C_b minimizes the mean squared error E(x - q)^2 of a standard normal x for 2^b levels between -C_b and C_b. These are the
# numbers of QuEST's released code; those of 7 and 8 bits are 0.3 and 1 percent below the minimum.
GAUSSIAN_CLIPS = {
    1: 0.7978845587140913,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}
_LEAST_SCALE = 1e-30  # of a row of zeros
_SPLITTER = float(2**8 + 1)


def check_grid(bits: int, quantizer: Quantizer, parameter: str = "bits") -> None:
    """Raise if there is no such grid.

    Raises:
        ValueError: If the quantizer is unknown, ``bits`` is not an integer from 1 to 8, or the quantizer is "ste" with
            1 bit.
    """
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer must be 'ste', 'quest' or 'statsq'; got {quantizer!r}.")
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in GAUSSIAN_CLIPS:
        raise ValueError(f"{parameter} must be an integer from 1 to {MOST_BITS}; got {bits!r}.")
    if bits == 1 and quantizer == "ste":
        raise ValueError(
            "quantizer='ste' has no grid of 1 bit, because its grids are symmetric around 0 and contain it. Use 2 bits "
            "(-1, 0, 1), or quantizer='quest' or 'statsq'."
        )


def grid_offset(quantizer: Quantizer) -> float:
    """Return the offset o of a quantizer's levels: 0 if one of them is 0, else 1/2.

    Example:
        >>> grid_offset("ste"), grid_offset("quest")
        (0.0, 0.5)
    """
    return 0.0 if quantizer == "ste" else 0.5


def integer_range(bits: int, quantizer: Quantizer = "ste") -> tuple[int, int]:
    """Return the smallest and the largest integer of a grid.

    Args:
        bits: Bits b of a weight, 1 to 8.
        quantizer: Name of the grid.

    Raises:
        ValueError: If there is no such grid.

    Example:
        >>> integer_range(8), integer_range(2), integer_range(2, "quest")
        ((-127, 127), (-1, 1), (-2, 1))
    """
    check_grid(bits, quantizer)
    half = 2 ** (bits - 1)
    return (1 - half, half - 1) if quantizer == "ste" else (-half, half - 1)


def exact_scales(scales: Tensor) -> Tensor:
    """Round scales to 8 bits less than their type holds, so every level of a grid is exact.

    An integer of at most 8 bits times such a scale needs no rounding. Therefore an 'ste' weight that is quantized again
    does not change, and :func:`read_quantized_weight` recovers integers and scales from the values alone.

    Args:
        scales: Positive scales of type float32 or float64, any shape.

    Example:
        >>> scale = exact_scales(torch.tensor(0.1))
        >>> abs(scale.item() - 0.1) < 0.1 * 2**-16, (scale * 127 / 127 == scale).item()
        (True, True)
    """
    product = scales * _SPLITTER  # Veltkamp's splitting
    return product - (product - scales)


def weight_rows(weight: Tensor, dim: int = 0) -> Tensor:
    """Return a weight as a matrix with one row for each output channel, at least in float32.

    Args:
        weight: Weight of two or more dimensions.
        dim: Dimension of the output channels.

    Raises:
        ValueError: If the weight has fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise ValueError(f"A weight must have at least two dimensions; got the shape {tuple(weight.shape)}.")
    rows = weight if dim == 0 else weight.movedim(dim, 0)
    rows = rows if rows.ndim == 2 else rows.flatten(1)
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def weight_of_rows(rows: Tensor, shape: torch.Size, dim: int = 0) -> Tensor:
    """Return a matrix of :func:`weight_rows` in the shape of its weight.

    Args:
        rows: Matrix with one row for each output channel.
        shape: Shape of the weight.
        dim: Dimension of the output channels in it.
    """
    if dim == 0:
        return rows.reshape(shape)
    moved = [shape[dim], *(size for at, size in enumerate(shape) if at != dim % len(shape))]
    return rows.reshape(moved).movedim(0, dim)


def root_mean_square(rows: Tensor) -> Tensor:
    """Return the root mean square of each row, of shape (rows, 1)."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm / math.sqrt(rows.shape[-1])


def row_scales(rows: Tensor, bits: int, quantizer: Quantizer = "ste") -> Tensor:
    """Return the scale s of each row, as :func:`weight_scales` does for a weight.

    Args:
        rows: Matrix of type float32 or float64 with one row for each output channel.
        bits: Bits of a weight.
        quantizer: Name of the grid.

    Returns:
        Tensor: Shape (rows, 1).
    """
    if quantizer == "ste":
        scales = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)  # a norm would take longer
    elif quantizer == "quest":
        scales = (GAUSSIAN_CLIPS[bits] * root_mean_square(rows) + 1e-8) * (2 / (2**bits - 1))
    else:
        scales = rows.abs().mean(-1, keepdim=True) * (2 / 2 ** (bits - 1))
    return exact_scales(scales.clamp_min_(_LEAST_SCALE))


def weight_scales(weight: Tensor, bits: int, quantizer: Quantizer = "ste", dim: int = 0) -> Tensor:
    """Return the scale s of each output channel of a weight.

    Args:
        weight: Weight of two or more dimensions.
        bits: Bits b of a weight, 1 to 8.
        quantizer: Name of the grid, which determines the scale (see the table in ``functional/quantization/grids.py``).
        dim: Dimension of the output channels.

    Returns:
        Tensor: In the shape of the weight with size 1 in every other dimension; float32, or float64 for float64 weights.

    Raises:
        ValueError: If there is no such grid, or the weight has fewer than two dimensions.

    Example:
        >>> weight_scales(torch.tensor([[0.5, -1.0], [2.0, 0.0]]), bits=2)
        tensor([[1.],
                [2.]])
    """
    check_grid(bits, quantizer)
    scales = row_scales(weight_rows(weight.detach(), dim), bits, quantizer)
    return scales.reshape([-1 if at == dim % weight.ndim else 1 for at in range(weight.ndim)])


def round_to_grid(rows: Tensor, scales: Tensor, bits: int, quantizer: Quantizer = "ste") -> Tensor:
    """Return the integers k of the levels nearest to the entries of rows, in the type of the rows.

    Args:
        rows: Any floating-point tensor.
        scales: Scale of each row; must broadcast against ``rows``.
        bits: Bits of a weight.
        quantizer: Name of the grid.
    """
    low, high = integer_range(bits, quantizer)
    units, offset = rows / scales, grid_offset(quantizer)
    return (units.sub_(offset) if offset else units).round_().clamp_(low, high)


def grid_values(integers: Tensor, scales: Tensor, quantizer: Quantizer = "ste") -> Tensor:
    """Return the values s (k + o) of the integers of a grid.

    Args:
        integers: Integers k, in any type.
        scales: Scale of each row; must broadcast against ``integers``. Its type is that of the result.
        quantizer: Name of the grid.
    """
    offset = grid_offset(quantizer)
    levels = integers.to(scales.dtype)
    return (levels + offset if offset else levels) * scales


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as integers and scales: :func:`quantize_weight` and :func:`read_quantized_weight` return it.

    Args:
        integers: Integers k as int8, in the shape of the weight.
        scales: Scale s of each output channel; broadcasts against ``integers``.
        bits: Bits of a weight.
        quantizer: Name of the grid, which determines the offset o.
        dim: Dimension of the output channels.
        block: Entries of a block of the Hadamard transform in whose basis the integers are; 1 is none.
    """

    integers: Tensor
    scales: Tensor
    bits: int
    quantizer: Quantizer = "ste"
    dim: int = 0
    block: int = 1

    @property
    def offset(self) -> float:
        """Offset o of the levels."""
        return grid_offset(self.quantizer)

    def dequantize(self) -> Tensor:
        """Return the weight, in the type of the scales.

        Without a Hadamard transform, it is bitwise the weight that training and checkpoints used.
        """
        values = grid_values(self.integers, self.scales, self.quantizer)
        if self.block == 1:
            return values
        rows = hadamard_transform(weight_rows(values, self.dim), self.block)
        return weight_of_rows(rows, values.shape, self.dim)


def transformed_rows(weight: Tensor, dim: int, hadamard: bool) -> tuple[Tensor, int]:
    """Return the rows of a weight in the basis in which they are quantized, and the block of its Hadamard transform."""
    rows = weight_rows(weight, dim)
    block = hadamard_block(rows.shape[-1]) if hadamard else 1
    return hadamard_transform(rows, block), block


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    bits: int,
    quantizer: Quantizer = "ste",
    dim: int = 0,
    hadamard: bool = False,
    scales: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a weight to integers and scales, one scale for each output channel.

    Args:
        weight: Weight of two or more dimensions.
        bits: Bits b of a weight, 1 to 8.
        quantizer: Name of the grid: "ste", "quest" or "statsq".
        dim: Dimension of the output channels.
        hadamard: Quantize in the basis of a Hadamard transform of each row, as QuEST does.
        scales: Scales instead of those of the quantizer, in the shape that :func:`weight_scales` returns.

    Returns:
        QuantizedTensor: Integers and scales.

    Raises:
        ValueError: If there is no such grid, or the weight has fewer than two dimensions.

    Example:
        >>> quantized = quantize_weight(torch.tensor([[0.6, -1.0, 0.1]]), bits=3)
        >>> quantized.integers
        tensor([[ 2, -3,  0]], dtype=torch.int8)
        >>> quantized.dequantize()
        tensor([[ 0.6667, -1.0000,  0.0000]])
    """
    check_grid(bits, quantizer)
    rows, block = transformed_rows(weight.detach(), dim, hadamard)
    of_rows = row_scales(rows, bits, quantizer) if scales is None else scales.reshape(-1, 1).to(rows.dtype)
    integers = round_to_grid(rows, of_rows, bits, quantizer).to(torch.int8)
    shape = [-1 if at == dim % weight.ndim else 1 for at in range(weight.ndim)]
    return QuantizedTensor(
        weight_of_rows(integers, weight.shape, dim), of_rows.reshape(shape), bits, quantizer, dim, block
    )


@torch.no_grad()
def read_quantized_weight(weight: Tensor, bits: int, quantizer: Quantizer = "ste", dim: int = 0) -> QuantizedTensor:
    """Recover the integers and scales of a weight that already lies on a grid, such as one from a checkpoint.

    Quantizing such a weight again would change it with "quest" and "statsq", whose scales depend on all entries. This
    function finds the finest grid that contains all entries of a row exactly; its ``dequantize()`` returns the weight
    bit for bit. A Hadamard transform cannot be undone exactly, so the weight must be without one.

    Args:
        weight: Weight of type float32 or float64.
        bits: Bits b of its grid.
        quantizer: Name of its grid. Only the offset of the grid matters.
        dim: Dimension of the output channels.

    Returns:
        QuantizedTensor: Integers and scales.

    Raises:
        ValueError: If a row lies on no such grid.

    Example:
        >>> weight = quantize_weight(torch.randn(4, 16), 4, "statsq").dequantize()
        >>> torch.equal(read_quantized_weight(weight, 4, "statsq").dequantize(), weight)
        True
    """
    low, high = integer_range(bits, quantizer)
    rows, offset = weight_rows(weight.detach(), dim), grid_offset(quantizer)
    largest = rows.abs().amax(-1, keepdim=True)
    scales = torch.where(largest > 0, largest, 1.0) if not offset else largest.clamp_min(_LEAST_SCALE)
    is_found = torch.zeros_like(scales, dtype=torch.bool)
    result = scales.clone()
    for top in range(high, -1 if offset else 0, -1):  # the level of the largest entry, from the finest grid on
        tried = scales / (top + offset)
        units = rows / tried - offset
        integers = units.round().clamp_(low, high)
        fits = (grid_values(integers, tried, quantizer) == rows).all(-1, keepdim=True) & ~is_found
        result, is_found = torch.where(fits, tried, result), is_found | fits
        if bool(is_found.all()):
            break
    if not bool(is_found.all()):
        count = int((~is_found).sum())
        raise ValueError(
            f"{count} of {len(rows)} output channels lie on no grid of {bits} bits of quantizer={quantizer!r}. Use the "
            "bits and the quantizer of the training, or quantize_weight, which rounds."
        )
    return quantize_weight(weight, bits, quantizer, dim, scales=result)
