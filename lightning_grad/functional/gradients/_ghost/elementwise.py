"""Rules for parameters that are broadcast over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_grad.functional.gradients._ghost.binding import Binding, Rows, all_but, first
from lightning_grad.functional.gradients._ghost.contributions import Contribution, Dense


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


IsSource = Callable[[Any], bool]


def add(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1, out: Tensor | None = None) -> Binding | None:
    if out is not None:
        return None
    if is_source(input):
        return _elementwise(input, (), lambda gradient: gradient)
    return _elementwise(other, (), lambda gradient: gradient * alpha if alpha != 1 else gradient)


def subtract(
    is_source: IsSource, input: Any, other: Any, *, alpha: float = 1, out: Tensor | None = None
) -> Binding | None:
    return add(is_source, input, other, alpha=1 if is_source(input) else -alpha, out=out)


def add_(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1) -> Binding | None:
    # The gradient of a view also arrives through its base, where no hook sees it.
    if is_source(input) or not input.requires_grad or input._is_view():
        return None
    return add(is_source, input, other, alpha=alpha)


def subtract_(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1) -> Binding | None:
    return add_(is_source, input, other, alpha=-alpha)


def multiply(is_source: IsSource, input: Any, other: Any, *, out: Tensor | None = None) -> Binding | None:
    source, factor = (input, other) if is_source(input) else (other, input)
    if out is not None or not isinstance(factor, Tensor):
        return None
    kept = factor.detach()
    return _elementwise(source, (factor,), lambda gradient: gradient * kept)


def divide(
    is_source: IsSource, input: Any, other: Any, *, rounding_mode: str | None = None, out: Tensor | None = None
) -> Binding | None:
    if out is not None or rounding_mode is not None or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    above, below = input.detach(), other.detach()
    if is_source(input):
        return _elementwise(input, (other,), lambda gradient: gradient / below)
    return _elementwise(other, (input,), lambda gradient: -gradient * above / (below * below))


def prelu(input: Tensor, weight: Tensor) -> Binding | None:
    kept, each = input.detach(), weight.numel()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        split = rows(gradient * kept.clamp(max=0))
        if each == 1:
            return Dense(split.flatten(1).sum(1, keepdim=True))
        return Dense(split.flatten(3).sum((1, 3)) if split.dim() > 3 else split.sum(1))

    return Binding([(weight, term)], first if each > 1 else all_but(0), (input,))


def expand(input: Tensor, *sizes: Any, implicit: bool = False, size: Any = None) -> Binding | None:
    binding = _elementwise(input, (), lambda gradient: gradient)
    return Binding(binding.terms, binding.dims, aliases=True)


def repeat(input: Tensor, *repeats: Any) -> Binding | None:
    counts = list(repeats[0]) if len(repeats) == 1 and not isinstance(repeats[0], int) else list(repeats)
    sizes = [1] * (len(counts) - input.dim()) + list(input.shape)
    if any(size > 1 and count > 1 for size, count in zip(sizes, counts, strict=True)):
        return None
    return _elementwise(input, (), lambda gradient: gradient)
