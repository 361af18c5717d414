"""Treating tensors of a class of their own as plain ones.

Libraries derive from ``torch.Tensor`` to carry labels, units or coordinates, and their classes may refuse or relabel an
operation. Code that only reads numbers from such tensors, or changes them in place, has no use for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

# Under it no class's __torch_function__ is asked. DTensors are not concerned: theirs is __torch_dispatch__.
PlainTensors = torch._C.DisableTorchFunctionSubclass


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of any class as a plain one that shares its memory; parameters and DTensors as they are.

    Under :data:`PlainTensors` methods that a class has overridden would still run.

    Example:
        >>> class Stubborn(torch.Tensor):
        ...     def square(self):
        ...         raise TypeError("no")
        >>> plain_tensor(torch.tensor(3.0).as_subclass(Stubborn)).square()
        tensor(9.)
    """
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
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
