"""What each operation of torch contributes to the per-sample gradients of its parameters.

A rule takes the arguments of an operation, exactly as the operation does, and returns a :class:`Binding`: which of them may be
parameters, and how, once the gradient of the output is known, each one's contribution follows. It returns None for options
that it does not cover. :data:`RULES` maps operations to rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional._ghost_contributions import (
    Contribution,
    Convolution,
    ConvolutionSettings,
    Dense,
    Outer,
    Scattered,
)

Rows = Callable[[Tensor], Tensor]  # returns a tensor with the samples first, in the type that norms are computed in
Term = Callable[[Tensor, Rows], Contribution]  # takes the gradient of the output


@dataclass(frozen=True)
class Binding:
    """How one call of an operation depends on what may be parameters.

    Args:
        terms: Each such argument with what gives its contribution.
        dims: Takes the shape of the output; returns the dimensions in which samples may lie.
        kept: The other tensors that the contributions are computed from; they must not change until then.
        aliases: Whether the output shares memory with the argument.
        call: What to call in place of the operation, where that is faster with constant parameters.
    """

    terms: Sequence[tuple[Tensor, Term]]
    dims: Callable[[Sequence[int]], Sequence[int]]
    kept: Sequence[Tensor] = ()
    aliases: bool = False
    call: Callable[..., Tensor] | None = None


Rule = Callable[..., Binding | None]


def _all_but(last: int) -> Callable[[Sequence[int]], Sequence[int]]:
    return lambda shape: range(len(shape) - last)


def _first(shape: Sequence[int]) -> Sequence[int]:
    return range(min(1, len(shape)))


def _given(*terms: tuple[Tensor | None, Term]) -> list[tuple[Tensor, Term]]:
    return [(tensor, term) for tensor, term in terms if tensor is not None]


# Products


def _flat(tensor: Tensor, rows: Rows) -> Tensor:
    """Return (B, R, features)."""
    split = rows(tensor)
    return split.reshape(split.shape[0], -1, split.shape[-1])


def _sum_of_rows(gradient: Tensor, rows: Rows) -> Contribution:
    return Dense(_flat(gradient, rows).sum(1))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding | None:
    if weight.dim() != 2:
        return None
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Outer(_flat(gradient, rows), _flat(kept, rows))

    return Binding(_given((weight, term), (bias, _sum_of_rows)), _all_but(1), (input,), call=_folded_linear)


def _folded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch multiplies a strided input matrix by matrix when the weight requires no gradient, at twice the time.
    if input.dim() < 3 or input.is_contiguous():
        return F.linear(input, weight, bias)
    return F.linear(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], len(weight))


def _matmul(input: Tensor, other: Tensor, *, out: None = None) -> Binding | None:
    if out is not None or other.dim() != 2 or input.dim() < 2:
        return None
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return Outer(_flat(kept, rows), _flat(gradient, rows))

    return Binding([(other, term)], _all_but(1), (input,))


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: None = None
) -> Binding | None:
    if input.dim() != 1 or beta != 1 or alpha != 1 or out is not None:
        return None
    product = _matmul(mat1, mat2)
    return product and Binding([*product.terms, (input, _sum_of_rows)], _all_but(1), product.kept)


# Convolutions


def _sum_of_pixels(gradient: Tensor, rows: Rows) -> Contribution:
    return Dense(rows(gradient).flatten(3).sum((1, 3)))


def _numbers(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _same_padding(weight: Tensor, dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Return what torch pads before and after each dimension for ``padding="same"``."""
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _convolution_term(input: Tensor, settings: ConvolutionSettings, pads: Sequence[tuple[int, int]] = ()) -> Term:
    kept = input.detach()
    before_and_after = [amount for pair in reversed(pads) for amount in pair]

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        padded = F.pad(kept, before_and_after) if any(before_and_after) else kept
        return Convolution(rows(padded), rows(gradient), settings)

    return term


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Binding | None:
    dims = weight.dim() - 2
    if input.dim() != weight.dim():
        return None  # an image without a batch
    steps, spread, pads = _numbers(stride, dims), _numbers(dilation, dims), []
    if padding == "same":
        pads, padding = _same_padding(weight, spread), 0
    elif padding == "valid":
        padding = 0
    settings = ConvolutionSettings(tuple(weight.shape), steps, _numbers(padding, dims), spread, groups)
    term = _convolution_term(input, settings, pads)
    return Binding(_given((weight, term), (bias, _sum_of_pixels)), _first, (input,))


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Binding | None:
    dims = weight.dim() - 2
    if input.dim() != weight.dim():
        return None
    steps, pads, spread, more = (_numbers(value, dims) for value in (stride, padding, dilation, output_padding))
    settings = ConvolutionSettings(tuple(weight.shape), steps, pads, spread, groups, True, more)
    term = _convolution_term(input, settings)
    return Binding(_given((weight, term), (bias, _sum_of_pixels)), _first, (input,))


# Normalization: the gradient of the scale is that of the output times the normalized input, summed over positions.


def _channel_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: Callable[[Tensor], Tensor]
) -> Binding:
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        product = rows(gradient) * rows(normalize(kept).to(gradient.dtype))
        return Dense(product.flatten(3).sum((1, 3)) if product.dim() > 3 else product.sum(1))

    def shift(gradient: Tensor, rows: Rows) -> Contribution:
        split = rows(gradient)
        return Dense(split.flatten(3).sum((1, 3)) if split.dim() > 3 else split.sum(1))

    return Binding(_given((weight, term), (bias, shift)), _first, (input,))


def _batch_norm(
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
    shape = (-1, *(1,) * (input.dim() - 2))
    mean, scale = running_mean.detach().view(shape), (running_var.detach() + eps).rsqrt().view(shape)
    kept = input.detach()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        split, centred = rows(gradient), rows(kept - mean)
        if split.dim() == 3:
            return Dense((split * centred).sum(1) * scale)
        sums = (split * centred).flatten(3).sum((1, 3))
        return Dense(sums * scale.view(-1))

    def shift(gradient: Tensor, rows: Rows) -> Contribution:
        split = rows(gradient)
        return Dense(split.flatten(3).sum((1, 3)) if split.dim() > 3 else split.sum(1))

    return Binding(_given((weight, term), (bias, shift)), _first, (input, running_mean, running_var))


def _instance_norm(
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
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _channel_norm(input, weight, bias, lambda x: F.instance_norm(x, eps=eps))


def _group_norm(
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

    return Binding(_given((weight, term), (bias, shift)), _all_but(size), (input,))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Binding | None:
    shape = list(normalized_shape)
    return _last_dims_norm(input, len(shape), weight, bias, lambda x: F.layer_norm(x, shape, eps=eps))


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Binding | None:
    shape = list(normalized_shape)
    return _last_dims_norm(input, len(shape), weight, None, lambda x: F.rms_norm(x, shape, eps=eps))


# Tables


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Binding | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        index, added = rows(input).flatten(1), _flat(gradient, rows)
        if padding_idx is not None:
            added = added.masked_fill((index == padding_idx % len(weight)).unsqueeze(2), 0)
        return _scattered(index, added, len(weight))

    return Binding([(weight, term)], _all_but(1), (input,))


def _scattered(index: Tensor, added: Tensor, table: int) -> Scattered:
    """Return the contribution of rows (B, R, D) to the places (B, R)."""
    sample = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
    return Scattered(sample.flatten(), index.flatten() % table, added.flatten(0, 1), len(index), table)


def _getitem(table: Tensor, index: Any) -> Binding | None:
    """Cover ``table[index]`` for a tensor of row numbers; anything else is a view."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        return None
    features = table.dim() - 1

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        places, added = rows(index).flatten(1), rows(gradient)
        return _scattered(places, added.reshape(*places.shape, -1), len(table))

    return Binding([(table, term)], _all_but(features), (index,))


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Binding | None:
    if max_norm is not None or scale_grad_by_freq or sparse or mode == "max" or input.is_nested:
        return None

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        bags = gradient.shape[0]
        bag, index = _bag_of_each(input, offsets, bags), input.reshape(-1) % len(weight)
        share = _shares(index, bag, bags, mode, per_sample_weights, padding_idx, len(weight)).to(gradient.dtype)
        order = rows(torch.arange(bags, device=index.device)).flatten(1)
        sample = torch.empty_like(order.flatten())
        sample[order] = torch.arange(len(order), device=index.device).unsqueeze(1)
        by_bag = torch.empty_like(_flat(gradient, rows).flatten(0, 1))
        by_bag[order] = _flat(gradient, rows)
        added = by_bag[bag] * share.to(by_bag.dtype).unsqueeze(1)
        return Scattered(sample[bag], index, added, len(order), len(weight))

    kept = [tensor for tensor in (input, offsets, per_sample_weights) if tensor is not None]
    return Binding([(weight, term)], _first, kept)


def _bag_of_each(input: Tensor, offsets: Tensor | None, bags: int) -> Tensor:
    if offsets is None:
        return torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    positions = torch.arange(len(input), device=input.device)
    return torch.searchsorted(offsets[:bags].to(positions.dtype), positions, right=True) - 1


def _shares(
    index: Tensor,
    bag: Tensor,
    bags: int,
    mode: str,
    weights: Tensor | None,
    padding_idx: int | None,
    table: int,
) -> Tensor:
    """Return by how much each entry of a bag counts."""
    counted = torch.ones_like(index, dtype=torch.float64)
    if padding_idx is not None:
        counted = (index != padding_idx % table).to(torch.float64)
    if weights is not None:
        return counted * weights.detach().reshape(-1)
    if mode == "sum":
        return counted
    return counted / counted.new_zeros(bags).index_add_(0, bag, counted)[bag].clamp(min=1)


# Elementwise: a parameter that is broadcast over samples


def _broadcast(source: Tensor) -> Callable[[Sequence[int]], Sequence[int]]:
    """Return what names the dimensions of an output over which a tensor was broadcast."""

    def dims(shape: Sequence[int]) -> Sequence[int]:
        missing = len(shape) - source.dim()
        return [dim for dim in range(len(shape)) if dim < missing or source.shape[dim - missing] == 1]

    return dims


def _reduced(split: Tensor, shape: Sequence[int]) -> Contribution:
    """Sum (B, *output) over the dimensions along which a tensor of a shape was broadcast."""
    missing = split.dim() - 1 - len(shape)
    over = [d for d in range(1, split.dim()) if d <= missing or shape[d - 1 - missing] == 1]
    return Dense((split.sum(over) if over else split).reshape(len(split), -1))


def _elementwise(source: Tensor, others: Sequence[Tensor], factor: Callable[[Tensor], Tensor]) -> Binding:
    shape = tuple(source.shape)

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        return _reduced(rows(factor(gradient)), shape)

    return Binding([(source, term)], _broadcast(source), others)


Operands = tuple[Any, Any]
IsSource = Callable[[Any], bool]


def _add(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Binding | None:
    if out is not None:
        return None
    if is_source(input):
        return _elementwise(input, (), lambda gradient: gradient)
    return _elementwise(other, (), lambda gradient: gradient * alpha if alpha != 1 else gradient)


def _subtract(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Binding | None:
    return _add(is_source, input, other, alpha=1 if is_source(input) else -alpha, out=out)


def _multiply(is_source: IsSource, input: Any, other: Any, *, out: None = None) -> Binding | None:
    source, factor = (input, other) if is_source(input) else (other, input)
    if out is not None or not isinstance(factor, Tensor):
        return None
    kept = factor.detach()
    return _elementwise(source, (factor,), lambda gradient: gradient * kept)


def _divide(
    is_source: IsSource, input: Any, other: Any, *, rounding_mode: None = None, out: None = None
) -> Binding | None:
    if out is not None or rounding_mode is not None or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    above, below = input.detach(), other.detach()
    if is_source(input):
        return _elementwise(input, (other,), lambda gradient: gradient / below)
    return _elementwise(other, (input,), lambda gradient: -gradient * above / (below * below))


def _prelu(input: Tensor, weight: Tensor) -> Binding | None:
    kept, each = input.detach(), weight.numel()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        split = rows(gradient * kept.clamp(max=0))
        if each == 1:
            return Dense(split.flatten(1).sum(1, keepdim=True))
        return Dense(split.flatten(3).sum((1, 3)) if split.dim() > 3 else split.sum(1))

    return Binding([(weight, term)], _first if each > 1 else _all_but(0), (input,))


def _expand(input: Tensor, *sizes: Any, implicit: bool = False, size: Any = None) -> Binding | None:
    binding = _elementwise(input, (), lambda gradient: gradient)
    return Binding(binding.terms, binding.dims, aliases=True)


def _repeat(input: Tensor, *repeats: Any) -> Binding | None:
    counts = list(repeats[0]) if len(repeats) == 1 and not isinstance(repeats[0], int) else list(repeats)
    sizes = [1] * (len(counts) - input.dim()) + list(input.shape)
    if any(size > 1 and count > 1 for size, count in zip(sizes, counts, strict=True)):
        return None
    return _elementwise(input, (), lambda gradient: gradient)


def _table() -> Mapping[Any, Rule]:
    rules: dict[Any, Rule] = {
        F.linear: _linear,
        torch.addmm: _addmm,
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        F.group_norm: _group_norm,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        F.embedding: _embedding,
        F.embedding_bag: _embedding_bag,
        F.prelu: _prelu,
        torch.prelu: _prelu,
        Tensor.__getitem__: _getitem,
        Tensor.expand: _expand,
        Tensor.expand_as: _expand,
        torch.broadcast_to: _expand,
        Tensor.broadcast_to: _expand,
        Tensor.repeat: _repeat,
    }
    rules |= dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution)
    rules |= dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution)
    rules |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul)
    return rules


def _two_sided() -> Mapping[Any, Callable[..., Binding | None]]:
    names = {
        _add: "add __add__ __radd__",
        _subtract: "sub subtract __sub__",
        _multiply: "mul multiply __mul__ __rmul__",
        _divide: "div divide true_divide __truediv__",
    }
    found: dict[Any, Callable[..., Binding | None]] = {}
    for rule, spellings in names.items():
        for home in (torch, Tensor):
            found |= {getattr(home, name): rule for name in spellings.split() if hasattr(home, name)}
    return found


RULES = _table()
TWO_SIDED_RULES = _two_sided()


def bind(function: Any, is_source: IsSource, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Binding | None:
    """Return how a call depends on its parameters, or None where no rule covers it.

    Args:
        function: The operation.
        is_source: Tells which arguments are parameters, or derived from parameters alone.
        args: The positional arguments of the call.
        kwargs: The named ones.
    """
    if function in TWO_SIDED_RULES:
        rule: Rule = partial(TWO_SIDED_RULES[function], is_source)
    elif function in RULES:
        rule = RULES[function]
    else:
        return None
    try:
        return rule(*args, **kwargs)
    except TypeError:  # a spelling that the rule does not know
        return None
