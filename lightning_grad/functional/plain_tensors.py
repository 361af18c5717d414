"""Treating tensors of a class of their own as plain ones, and giving results their class back.

Libraries derive from ``torch.Tensor`` to carry labels, units or coordinates. Such a class may refuse or relabel an
operation, lose its attributes in arithmetic, or demand them. So what is computed here is computed on plain tensors that
share their memory, and what a module is to see is given the class and the attributes again.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

# Under it no class's __torch_function__ is asked. DTensors are not concerned: theirs is __torch_dispatch__.
PlainTensors = torch._C.DisableTorchFunctionSubclass

# Arguments and results in which no tensor can be.
NO_TENSORS = frozenset([type(None), torch.Size, int, bool, float, str, torch.dtype, torch.device])


def is_opaque(tensor: Tensor) -> bool:
    """Return whether a tensor only stands for others (nested, distributed, masked), so that its memory cannot be shared."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor as one of torch's own, with the same memory and graph; parameters and opaque tensors as they are.

    Under :data:`PlainTensors` methods that a class has overridden would still run.

    Example:
        >>> class Stubborn(torch.Tensor):
        ...     def square(self):
        ...         raise TypeError("no")
        >>> plain_tensor(torch.tensor(3.0).as_subclass(Stubborn)).square()
        tensor(9.)
    """
    if type(tensor) in (Tensor, nn.Parameter) or is_opaque(tensor):
        return tensor
    with PlainTensors():
        return Tensor.as_subclass(tensor, Tensor)


def on_plain_tensors(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that treats tensors of any class as plain ones.

    Example:
        >>> class Stubborn(torch.Tensor):
        ...     @classmethod
        ...     def __torch_function__(cls, func, types, args=(), kwargs=None):
        ...         raise TypeError("no")
        >>> on_plain_tensors(torch.square)(torch.tensor(3.0).as_subclass(Stubborn))
        tensor(9.)
    """

    @functools.wraps(function)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> T:
        with PlainTensors():
            return function(*args, **kwargs)

    return plainly


def dressed(tensor: Tensor, like: Tensor, copied: Callable[[Any], Any] = lambda value: value) -> Tensor:
    """Return a plain tensor with the class and the attributes of another one, and with its own memory and graph.

    Args:
        tensor: The plain tensor.
        like: The other one.
        copied: What is done with each attribute.

    Example:
        >>> class Labelled(Tensor): pass
        >>> like = torch.zeros(2).as_subclass(Labelled)
        >>> like.labels = ["x", "t"]
        >>> dressed(torch.ones(2), like).labels
        ['x', 't']
    """
    attributes = attributes_of(like)
    if is_opaque(like) or (type(like) in (Tensor, nn.Parameter) and not attributes):
        return tensor
    kind = Tensor if isinstance(like, nn.Parameter) else type(like)
    with PlainTensors():
        other = Tensor.as_subclass(tensor, kind)
    for name, value in attributes.items():
        object.__setattr__(other, name, copied(value))
    return other


def clone_of(
    tensor: Tensor, copied: Callable[[Any], Any] = lambda value: value, leaves_in_graph: bool = False
) -> Tensor:
    """Return a tensor's copy, of its class, with its attributes and in its graph; of a leaf that learns, another leaf.

    Args:
        tensor: The tensor.
        copied: What is done with each attribute.
        leaves_in_graph: Copy a leaf into its own graph, so that the copy's gradient reaches it.

    Example:
        >>> class Labelled(Tensor): pass
        >>> one = torch.zeros(2).as_subclass(Labelled)
        >>> one.labels = ["x", "t"]
        >>> clone_of(one).labels
        ['x', 't']
    """
    own = plain_tensor(tensor)
    if own.requires_grad and own.is_leaf and not leaves_in_graph:
        return dressed(own.detach().clone(), tensor, copied).requires_grad_()
    return dressed(own.clone(), tensor, copied)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments; torch's pytree takes ten times as long."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    kind = value.__class__
    if kind is Tensor or isinstance(value, Tensor):
        found.append(value)
    elif kind not in NO_TENSORS and isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            if v.__class__ not in NO_TENSORS:
                _collect(v, found)


def attributes_of(value: Any) -> dict[str, Any]:
    """Return an object's attributes by name, also those in slots.

    Example:
        >>> class Point:
        ...     __slots__ = ("x", "__dict__")
        >>> point = Point()
        >>> point.x, point.name = 1, "origin"
        >>> attributes_of(point)
        {'x': 1, 'name': 'origin'}
    """
    kind: Any = type(value)
    slots = {name: getattr(value, name) for name in _slots_of(kind) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


@functools.cache
def _slots_of(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
