"""Quantized values in the forward pass, with the gradients that train the weights behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_grad.functional.quantization.grids import (
    GAUSSIAN_CLIPS,
    Quantizer,
    check_grid,
    exact_scales,
    grid_offset,
    grid_values,
    integer_range,
    root_mean_square,
    round_to_grid,
    row_scales,
    transformed_rows,
    weight_of_rows,
    weight_rows,
)
from lightning_grad.functional.quantization.hadamard import hadamard_block, hadamard_transform

ActivationQuantizer = Literal["affine", "quest"]
_SMALL = 1 << 15  # entries of a weight; for a larger one, a call of its own costs little


@torch.no_grad()
def quantized_values(
    weight: Tensor, bits: int, quantizer: Quantizer = "ste", dim: int = 0, hadamard: bool = False
) -> tuple[Tensor, Tensor | None]:
    r"""Return a weight rounded to its grid, and the mask of the entries whose gradient passes.

    Only "quest" has a mask, the trust mask of QuEST in the basis of its rows x (after the Hadamard transform):

    .. math::
        m = 1 \iff |q - x| \le T \operatorname{rms}(x), \qquad T = C_b / (2^b - 1)

    T rms(x) is half a step, so the mask only cuts entries that lie more than half a step beyond the last level.

    Args:
        weight: Weight of two or more dimensions.
        bits: Bits b of a weight, 1 to 8.
        quantizer: Name of the grid.
        dim: Dimension of the output channels.
        hadamard: Quantize in the basis of a Hadamard transform of each row.

    Returns:
        tuple: The values, in the shape and type of the weight, and the mask: a bool matrix with one row for each output
        channel, in the basis of the transform, or ``None`` if every gradient passes.

    Raises:
        ValueError: If there is no such grid, or the weight has fewer than two dimensions.

    Example:
        >>> quantized_values(torch.tensor([[0.9, -0.2]]), bits=2)[0]
        tensor([[0.9000, -0.0000]])
    """
    check_grid(bits, quantizer)
    rows, block = transformed_rows(weight.detach(), dim, hadamard)
    scales = row_scales(rows, bits, quantizer)
    values = grid_values(round_to_grid(rows, scales, bits, quantizer), scales, quantizer)
    mask = _trust_mask(rows, values, bits) if quantizer == "quest" else None
    restored = weight_of_rows(hadamard_transform(values, block), weight.shape, dim)
    return _laid_out_like(weight, restored), mask


@torch.no_grad()
def joined_values(weights: Sequence[Tensor], bits: int, dims: Sequence[int]) -> list[Tensor]:
    """Return many weights rounded to their "ste" grids, with joined calls for small weights with rows of equal length.

    The values are bitwise those of :func:`quantized_values`: the scale of a row depends on its largest entry only, which
    no order of summation changes. Joined values share memory.

    Args:
        weights: Weights of two or more dimensions.
        bits: Bits of a weight.
        dims: Dimension of the output channels of each weight.
    """
    values: dict[int, Tensor] = {}
    joined: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i, weight in enumerate(weights):
        if weight.numel() > _SMALL:
            values[i] = quantized_values(weight, bits, dim=dims[i])[0]
        else:
            length = weight.numel() // weight.shape[dims[i]]
            joined.setdefault((length, weight.dtype, weight.device), []).append(i)
    for of in joined.values():
        rows = [weight_rows(weights[i].detach(), dims[i]) for i in of]
        both = quantized_values(rows[0] if len(rows) == 1 else torch.cat(rows), bits)[0]
        for i, part in zip(of, torch.split(both, [len(each) for each in rows]), strict=True):
            values[i] = _laid_out_like(weights[i], weight_of_rows(part, weights[i].shape, dims[i]))
    return [values[i] for i in range(len(weights))]


def _laid_out_like(weight: Tensor, values: Tensor) -> Tensor:
    """Return values in the type and the memory format of a weight, on which the kernel of a convolution depends."""
    if values.dtype == weight.dtype and values.stride() == weight.stride():
        return values
    return torch.empty_like(weight, requires_grad=False).copy_(values)


def _trust_mask(rows: Tensor, values: Tensor, bits: int) -> Tensor:
    trust = GAUSSIAN_CLIPS[bits] / float(2**bits - 1)
    return (values - rows).abs_() <= root_mean_square(rows) * trust


class _Rounded(torch.autograd.Function):
    """Return values in place of a weight; pass the gradient through the mask, in the basis of the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, mask: Tensor | None, dim: int, block: int) -> Tensor:
        ctx.dim, ctx.block = dim, block
        if mask is not None:
            ctx.save_for_backward(mask)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        saved = ctx.saved_tensors
        passed = masked_gradient(gradient, saved[0], ctx.dim, ctx.block) if saved else gradient
        return passed, None, None, None, None


def masked_gradient(gradient: Tensor, mask: Tensor, dim: int = 0, block: int = 1) -> Tensor:
    r"""Return the gradient of a weight whose rows are masked in the basis of a Hadamard transform.

    .. math::
        G \leftarrow H (m \odot H G)

    Args:
        gradient: Gradient at the quantized weight.
        mask: Mask m of :func:`quantized_values`.
        dim: Dimension of the output channels.
        block: Block of the transform; 1 is none.
    """
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    rows = hadamard_transform(weight_rows(dense, dim), block)
    passed = hadamard_transform(torch.where(mask, rows, 0.0), block)
    result = weight_of_rows(passed, gradient.shape, dim).to(gradient.dtype)
    return result.to_sparse(gradient.sparse_dim()) if gradient.is_sparse else result


def round_through(
    weight: Tensor, values: Tensor, mask: Tensor | None = None, dim: int = 0, hadamard: bool = False
) -> Tensor:
    """Return quantized values, with a gradient that passes to the weight (straight-through estimator).

    Args:
        weight: Weight that trains.
        values: Its quantized values.
        mask: Mask of :func:`quantized_values`; ``None`` passes the gradient unchanged.
        dim: Dimension of the output channels.
        hadamard: Whether the mask is in the basis of a Hadamard transform of each row.

    Example:
        >>> weight = torch.tensor([[0.9, -0.2]], requires_grad=True)
        >>> round_through(weight, *quantized_values(weight, bits=2)).sum().backward()
        >>> weight.grad
        tensor([[1., 1.]])
    """
    block = hadamard_block(weight.numel() // weight.shape[dim]) if hadamard and mask is not None else 1
    return _Rounded.apply(weight, values, mask, dim, block)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize_weight(
    weight: Tensor, bits: int, quantizer: Quantizer = "ste", dim: int = 0, hadamard: bool = False
) -> Tensor:
    """Round a weight to its grid in the forward pass; the gradient passes to the weight.

    With "ste" and "statsq" the gradient passes unchanged, with "quest" through the trust mask of
    :func:`quantized_values`.

    Args:
        weight: Weight of two or more dimensions.
        bits: Bits b of a weight, 1 to 8.
        quantizer: Name of the grid: "ste", "quest" or "statsq".
        dim: Dimension of the output channels.
        hadamard: Quantize in the basis of a Hadamard transform of each row, as QuEST does.

    Returns:
        Tensor: In the shape and type of the weight.

    Raises:
        ValueError: If there is no such grid, or the weight has fewer than two dimensions.

    Example:
        >>> weight = torch.tensor([[0.9, -0.2]], requires_grad=True)
        >>> fake_quantize_weight(weight, bits=1, quantizer="statsq")
        tensor([[ 0.5500, -0.5500]], grad_fn=<_RoundedBackward>)

    References:
        Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations", 2025, arXiv 2502.05003.
        Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers", 2023, arXiv 2302.02210 (statsq).
    """
    return round_through(weight, *quantized_values(weight, bits, quantizer, dim, hadamard), dim, hadamard)


@torch.no_grad()
def near_boundary(
    weight: Tensor, bits: int, quantizer: Quantizer = "statsq", dim: int = 0, width: float = 0.005
) -> Tensor:
    r"""Return where a weight lies near a boundary between two levels (confidence-guided annealing).

    The other weights are confident. Annealing holds them fixed, so only weights that may still change their level train.

    Args:
        weight: Weight of two or more dimensions, before rounding.
        bits: Bits b of a weight.
        quantizer: Name of the grid.
        dim: Dimension of the output channels.
        width: Largest distance from a boundary, in steps of the grid; 0.005 in the released code.

    Returns:
        Tensor: Bool, in the shape of the weight.

    Raises:
        ValueError: If there is no such grid, or the weight has fewer than two dimensions.

    Example:
        >>> near_boundary(torch.tensor([[0.501, 0.4, 1.0]]), bits=2, quantizer="ste")
        tensor([[ True, False, False]])

    References:
        Liu et al., 2023, arXiv 2302.02210, section 3.3.
    """
    check_grid(bits, quantizer)
    low, high = integer_range(bits, quantizer)
    rows = weight_rows(weight.detach(), dim)
    units = rows / row_scales(rows, bits, quantizer) - grid_offset(quantizer)
    below = units.floor()
    is_near = ((units - below - 0.5).abs() <= width) & (below >= low) & (below < high)
    return weight_of_rows(is_near, weight.shape, dim)


def fake_quantize_activation(
    rows: Tensor, bits: int, quantizer: ActivationQuantizer = "affine", hadamard: bool = False
) -> Tensor:
    r"""Round activations to a grid in the forward pass; the gradient passes to them. One scale for each row.

    "affine" has the levels

    .. math::
        q = s (k - z), \quad s = \frac{\max(x, 0) - \min(x, 0)}{2^b - 1}, \quad z = \operatorname{round}(-\min(x, 0) / s),
        \quad k = \operatorname{clamp}(\operatorname{round}(x / s) + z, 0, 2^b - 1)

    so it uses all levels behind a ReLU, where a symmetric grid would waste half of them. Its gradient passes unchanged.
    "quest" is the Gaussian grid and the trust mask of :func:`quantized_values`.

    Args:
        rows: Activations of shape (..., features); each row of the last dimension has its own grid.
        bits: Bits b of an activation, 1 to 8.
        quantizer: Name of the grid.
        hadamard: With "quest": quantize in the basis of a Hadamard transform of each row.

    Returns:
        Tensor: In the shape and type of ``rows``.

    Raises:
        ValueError: If there is no such grid.

    Example:
        >>> fake_quantize_activation(torch.tensor([0.0, 0.4, 3.0]), bits=2)
        tensor([0., 0., 3.])
    """
    flat = rows.reshape(-1, rows.shape[-1])
    if quantizer == "affine":
        check_grid(bits, "quest")
        result = round_through(flat, _affine_values(flat.detach(), bits))
    else:
        result = fake_quantize_weight(flat, bits, quantizer, hadamard=hadamard)
    return result.reshape(rows.shape)


@torch.no_grad()
def _affine_values(rows: Tensor, bits: int) -> Tensor:
    exact, most = weight_rows(rows), float(2**bits - 1)
    low = exact.amin(-1, keepdim=True).clamp_max_(0.0)
    scale = exact_scales(((exact.amax(-1, keepdim=True).clamp_min_(0.0) - low) / most).clamp_min_(1e-30))
    zero = (low / -scale).round_()
    integers = (exact / scale).round_().add_(zero).clamp_(0.0, most)
    return (integers - zero).mul_(scale).to(rows.dtype)
