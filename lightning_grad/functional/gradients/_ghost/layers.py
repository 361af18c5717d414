"""Rules for products, normalization layers and lookups in tables.

Rules in :data:`BY_NAME` get the arguments of a call as attributes, with torch's names and defaults.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients._ghost.contributions import (
    Binding,
    Contribution,
    Dense,
    Outer,
    Rows,
    Scattered,
    all_but,
    first,
    flat,
    given,
    per_channel,
    side_by_side,
    sum_of_rows,
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding | None:
    if weight.dim() != 2:
        return None
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Outer(flat(gradient, rows), flat(kept, rows))

    return Binding(given((weight, term), (bias, sum_of_rows)), all_but(1), (input,), call=_folded_linear)


def _folded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # If the weight does not require grad, torch multiplies a strided input one matrix at a time, which takes twice as
    # long.
    if input.dim() < 3 or input.is_contiguous():
        return F.linear(input, weight, bias)
    return F.linear(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], len(weight))


def matmul(input: Tensor, other: Tensor) -> Binding | None:
    if other.dim() != 2 or input.dim() < 2:
        return None
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Outer(flat(kept, rows), flat(gradient, rows))

    return Binding([(other, term)], all_but(1), (input,))


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Binding | None:
    if input.dim() != 1 or beta != 1 or alpha != 1:
        return None
    product = matmul(mat1, mat2)
    return product and Binding([*product.terms, (input, sum_of_rows)], all_but(1), product.kept)


# Normalization: the gradient of the scale is the output's gradient times the normalized input, summed over positions.


def _normalization(
    call: Any,
    dims: Callable[[Sequence[int]], Sequence[int]],
    total: Callable[[Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
    scale: Tensor | float = 1.0,
) -> Binding:
    kept = call.input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Dense(total(rows(gradient) * rows(normalize(kept))) * scale)

    def shift(gradient: Tensor, rows: Rows) -> Contribution:
        return Dense(total(rows(gradient)))

    return Binding(given((call.weight, term), (getattr(call, "bias", None), shift)), dims, (call.input,))


def batch_norm(call: Any) -> Binding | None:
    if call.running_mean is None or call.running_var is None or call.training:
        return None  # it mixes samples, for which the tracer has raised an error
    mean, variance = call.running_mean.detach().clone(), call.running_var.detach().clone()
    if call.input.device.type == "cpu":
        return _batch_norm_on_cpu(call, mean, variance)
    column = mean.view(-1, *(1,) * (call.input.dim() - 2))
    return _normalization(call, first, per_channel, lambda x: x - column, (variance + call.eps).rsqrt())


def _batch_norm_on_cpu(call: Any, mean: Tensor, variance: Tensor) -> Binding:
    """Take both gradients of all samples from one call of the kernel, which reads each tensor only once."""
    kept, known = call.input.detach(), list[tuple[Tensor, list[Tensor]]]()

    def both(gradient: Tensor, rows: Rows) -> list[Tensor]:
        if not (known and known[0][0] is gradient):
            split = rows(gradient)
            samples, kind = len(split), split.dtype
            statistics = [values.to(kind).repeat(samples) for values in (mean, variance)]
            images = [side_by_side(values).contiguous() for values in (split, rows(kept))]
            found = torch.ops.aten.native_batch_norm_backward(
                *images, None, *statistics, None, None, False, call.eps, [False, True, True]
            )
            known[:] = [(gradient, [values.view(samples, -1) for values in found[1:]])]
        return known[0][1]

    scale, shift = ((lambda gradient, rows, i=i: Dense(both(gradient, rows)[i])) for i in range(2))
    return Binding(given((call.weight, scale), (call.bias, shift)), first, (call.input,))


def instance_norm(call: Any) -> Binding | None:
    if not call.use_input_stats:
        return batch_norm(SimpleNamespace(training=False, **vars(call)))
    return _normalization(call, first, per_channel, lambda x: F.instance_norm(x, eps=call.eps))


def group_norm(call: Any) -> Binding | None:
    return _normalization(call, first, per_channel, lambda x: F.group_norm(x, call.num_groups, eps=call.eps))


def _over_last(call: Any, normalize: Callable[..., Tensor]) -> Binding:
    shape = list(call.normalized_shape)

    def total(split: Tensor) -> Tensor:
        return split.reshape(len(split), -1, math.prod(shape)).sum(1)

    return _normalization(call, all_but(len(shape)), total, lambda x: normalize(x, shape, eps=call.eps))


def layer_norm(call: Any) -> Binding | None:
    return _over_last(call, F.layer_norm)


def rms_norm(call: Any) -> Binding | None:
    return _over_last(call, F.rms_norm)


# Lookups in tables.


def embedding(call: Any) -> Binding | None:
    if call.max_norm is not None or call.scale_grad_by_freq:  # sparse=True is fine: it has the same gradient
        return None
    input, table, padding = call.input, len(call.weight), call.padding_idx

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        index, added = rows(input).flatten(1), flat(gradient, rows)
        if padding is not None:
            added = added.masked_fill((index == padding % table).unsqueeze(2), 0)
        return _scattered(index, added, table)

    return Binding([(call.weight, term)], all_but(1), (input,))


def _scattered(index: Tensor, added: Tensor, table: int) -> Scattered:
    """Return the contribution of rows (B, R, D) at the indices (B, R)."""
    sample = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
    return Scattered(sample.flatten(), index.flatten() % table, added.flatten(0, 1), len(index), table)


def getitem(table: Tensor, index: Any) -> Binding | None:
    """Cover ``table[index]`` for a tensor of row indices; other indices are not covered."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        return None
    features = table.dim() - 1

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        places, added = rows(index).flatten(1), rows(gradient)
        return _scattered(places, added.reshape(*places.shape, -1), len(table))

    return Binding([(table, term)], all_but(features), (index,))


def embedding_bag(call: Any) -> Binding | None:
    if call.max_norm is not None or call.scale_grad_by_freq or call.mode == "max" or call.input.is_nested:
        return None

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        bags, table = gradient.shape[0], len(call.weight)
        bag, index = _bag_of_each(call.input, call.offsets, bags), call.input.reshape(-1) % table
        order = rows(torch.arange(bags, device=index.device)).flatten(1)
        sample = torch.empty_like(order.flatten())
        sample[order] = torch.arange(len(order), device=index.device).unsqueeze(1)
        by_bag = torch.empty_like(flat(gradient, rows).flatten(0, 1))
        by_bag[order] = flat(gradient, rows)
        # Round like torch: to the dtype of the gradient first.
        share = _shares(call, index, bag, bags).to(gradient.dtype).to(by_bag.dtype)
        return Scattered(sample[bag], index, by_bag[bag] * share.unsqueeze(1), len(order), table)

    kept = [tensor for tensor in (call.input, call.offsets, call.per_sample_weights) if tensor is not None]
    return Binding([(call.weight, term)], first, kept)


def _bag_of_each(input: Tensor, offsets: Tensor | None, bags: int) -> Tensor:
    if offsets is None:
        return torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    positions = torch.arange(len(input), device=input.device)
    return torch.searchsorted(offsets[:bags].to(positions.dtype), positions, right=True) - 1


def _shares(call: Any, index: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Return the weight of each entry in its bag."""
    counted = torch.ones_like(index, dtype=torch.float64)
    if call.padding_idx is not None:
        counted = (index != call.padding_idx % len(call.weight)).to(torch.float64)
    if call.per_sample_weights is not None:
        counted *= call.per_sample_weights.detach().reshape(-1)
        return counted
    if call.mode == "sum":
        return counted
    return counted / counted.new_zeros(bags).index_add_(0, bag, counted)[bag].clamp(min=1)


BY_NAME = (batch_norm, instance_norm, group_norm, layer_norm, rms_norm, embedding, embedding_bag)
