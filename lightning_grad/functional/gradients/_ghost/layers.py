"""Rules for products and normalization layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients._ghost.binding import Binding, Rows, all_but, first, flat, given, sum_of_rows
from lightning_grad.functional.gradients._ghost.contributions import Contribution, Dense, Outer


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding | None:
    if weight.dim() != 2:
        return None
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Outer(flat(gradient, rows), flat(kept, rows))

    return Binding(given((weight, term), (bias, sum_of_rows)), all_but(1), (input,), call=_folded_linear)


def _folded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch multiplies a strided input matrix by matrix when the weight requires no gradient, at twice the time.
    if input.dim() < 3 or input.is_contiguous():
        return F.linear(input, weight, bias)
    return F.linear(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], len(weight))


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Binding | None:
    if out is not None or other.dim() != 2 or input.dim() < 2:
        return None
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Outer(flat(kept, rows), flat(gradient, rows))

    return Binding([(other, term)], all_but(1), (input,))


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Binding | None:
    if input.dim() != 1 or beta != 1 or alpha != 1 or out is not None:
        return None
    product = matmul(mat1, mat2)
    return product and Binding([*product.terms, (input, sum_of_rows)], all_but(1), product.kept)


# Normalization: the gradient of the scale is that of the output times the normalized input, summed over positions.


def _per_channel(split: Tensor) -> Tensor:
    """Sum (B, M, C, ...) to (B, C)."""
    return split.flatten(3).sum((1, 3)) if split.dim() > 3 else split.sum(1)


def _channel_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    scale: Tensor | float = 1.0,
) -> Binding:
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Dense(_per_channel(rows(gradient) * rows(normalize(kept))) * scale)

    def shift(gradient: Tensor, rows: Rows) -> Contribution:
        return Dense(_per_channel(rows(gradient)))

    return Binding(given((weight, term), (bias, shift)), first, (input,))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Binding | None:
    if running_mean is None or running_var is None or training:
        return None  # mixes samples; told before
    mean = running_mean.detach().clone().view(-1, *(1,) * (input.dim() - 2))
    scale = (running_var.detach() + eps).rsqrt()
    return _channel_norm(input, weight, bias, lambda x: x - mean, scale)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Binding | None:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _channel_norm(input, weight, bias, lambda x: F.instance_norm(x, eps=eps))


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Binding | None:
    return _channel_norm(input, weight, bias, lambda x: F.group_norm(x, num_groups, eps=eps))


def _last_dims_norm(
    input: Tensor, size: int, weight: Tensor | None, bias: Tensor | None, normalize: Callable[[Tensor], Tensor]
) -> Binding:
    kept = input.detach()

    def total(split: Tensor) -> Contribution:
        return Dense(split.reshape(split.shape[0], -1, math.prod(split.shape[-size:])).sum(1))

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return total(rows(gradient) * rows(normalize(kept)))

    def shift(gradient: Tensor, rows: Rows) -> Contribution:
        return total(rows(gradient))

    return Binding(given((weight, term), (bias, shift)), all_but(size), (input,))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Binding | None:
    shape = list(normalized_shape)
    return _last_dims_norm(input, len(shape), weight, bias, lambda x: F.layer_norm(x, shape, eps=eps))


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Binding | None:
    shape = list(normalized_shape)
    return _last_dims_norm(input, len(shape), weight, None, lambda x: F.rms_norm(x, shape, eps=eps))
