"""Rules: the contributions of torch operations to the per-sample gradients of their parameters.

A rule has the signature of its operation and returns a :class:`Binding`: the arguments that may be parameters, and a
function for each that computes its contribution from the output's gradient. It returns None for options that it does
not cover. :data:`RULES` maps operations to rules.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients._ghost.contributions import (
    Binding,
    Contribution,
    Dense,
    Rows,
    all_but,
    first,
    per_channel,
)
from lightning_grad.functional.gradients._ghost.convolutions import convolution
from lightning_grad.functional.gradients._ghost.layers import BY_NAME, addmm, getitem, linear, matmul
from lightning_grad.functional.plain_tensors import plain_tensor

Rule = Callable[..., Binding | None]


# Parameters that are broadcast over samples.


def _broadcast(source: Tensor) -> Callable[[Sequence[int]], Sequence[int]]:
    """Return a function that returns the dimensions of an output along which a tensor was broadcast."""

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


def add(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1) -> Binding | None:
    if is_source(input):
        return _elementwise(input, (), lambda gradient: gradient)
    return _elementwise(other, (), lambda gradient: gradient * alpha if alpha != 1 else gradient)


def subtract(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1) -> Binding | None:
    return add(is_source, input, other, alpha=1 if is_source(input) else -alpha)


def add_(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1) -> Binding | None:
    # The gradient of a view also arrives through its base, where no hook receives it.
    if is_source(input) or not input.requires_grad or input._is_view():
        return None
    return add(is_source, input, other, alpha=alpha)


def subtract_(is_source: IsSource, input: Any, other: Any, *, alpha: float = 1) -> Binding | None:
    return add_(is_source, input, other, alpha=-alpha)


def multiply(is_source: IsSource, input: Any, other: Any) -> Binding | None:
    source, factor = (input, other) if is_source(input) else (other, input)
    if not isinstance(factor, Tensor):
        return None
    kept = factor.detach()
    return _elementwise(source, (factor,), lambda gradient: gradient * kept)


def divide(is_source: IsSource, input: Any, other: Any) -> Binding | None:
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    above, below = input.detach(), other.detach()
    if is_source(input):
        return _elementwise(input, (other,), lambda gradient: gradient / below)
    return _elementwise(other, (input,), lambda gradient: -gradient * above / (below * below))


def prelu(input: Tensor, weight: Tensor) -> Binding | None:
    kept, each = input.detach(), weight.numel()

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        split = rows(gradient * kept.clamp(max=0))
        return Dense(split.flatten(1).sum(1, keepdim=True) if each == 1 else per_channel(split))

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


def _by_name(rule: Callable[[Any], Binding | None]) -> Rule:
    """Wrap a rule that takes arguments as attributes, to have the signature of the torch function of its name."""
    parameters = inspect.signature(getattr(F, rule.__name__)).parameters
    names = list(parameters)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def called(*args: Any, **kwargs: Any) -> Binding | None:
        # This runs in every call of a layer, and Signature.bind takes as long as a small layer.
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        is_complete = len(args) <= len(names) and given.keys() == parameters.keys()
        return rule(SimpleNamespace(**given)) if is_complete else None

    return called


def _transposed_convolution(*args: Any, **kwargs: Any) -> Binding | None:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    return convolution(**{"output_padding": 0, **dict(zip(names, args, strict=False)), **kwargs})


RULES: dict[Any, Rule] = {
    **{getattr(F, rule.__name__): _by_name(rule) for rule in BY_NAME},
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), matmul),
    **dict.fromkeys((Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to), expand),
    **dict.fromkeys((torch.prelu, F.prelu), prelu),
    F.linear: linear,
    torch.addmm: addmm,
    Tensor.__getitem__: getitem,
    Tensor.repeat: repeat,
}
_SPELLINGS: dict[Rule, str] = {
    add: "add __add__ __radd__",
    add_: "add_ __iadd__",
    subtract_: "sub_ __isub__",
    subtract: "sub subtract __sub__",
    multiply: "mul multiply __mul__ __rmul__",
    divide: "div divide true_divide __truediv__",
}
TWO_SIDED_RULES: dict[Any, Rule] = {
    getattr(home, name): rule
    for rule, spellings in _SPELLINGS.items()
    for home in (torch, Tensor)
    for name in spellings.split()
    if hasattr(home, name)
}


def find_binding(function: Any, is_source: IsSource, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Binding | None:
    """Return how a call depends on its parameters, or None if no rule covers it.

    Args:
        function: The operation.
        is_source: Returns True for parameters, and tensors computed from parameters only.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """

    def _plain(value: Any) -> Any:  # a tensor of a class of its own may not allow what a rule does with it
        return plain_tensor(value) if isinstance(value, Tensor) and not is_source(value) else value

    if function in TWO_SIDED_RULES:
        rule: Rule = partial(TWO_SIDED_RULES[function], is_source)
    elif function in RULES:
        rule = RULES[function]
    else:
        return None
    try:
        return rule(*(_plain(each) for each in args), **{name: _plain(each) for name, each in kwargs.items()})
    except TypeError:  # the rule does not know this way of calling, or an option such as out=
        return None
