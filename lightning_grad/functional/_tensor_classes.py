"""Tensors of classes of their own: labelled coordinates, images that know their format, tensors that carry a patient's data.

Such a class may lose its attributes in arithmetic, or demand them. So what is computed here is computed on plain tensors that
share their memory, and the result is given the class and the attributes again before a module sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor as one of torch's own, with the same memory and graph.

    Example:
        >>> class Labelled(Tensor): pass
        >>> type(plain(torch.zeros(2).as_subclass(Labelled)))
        <class 'torch.Tensor'>
    """
    if type(tensor) in (Tensor, nn.Parameter) or is_opaque(tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(tensor, Tensor)


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
    attributes = _attributes_of(like)
    if is_opaque(like) or (type(like) in (Tensor, nn.Parameter) and not attributes):
        return tensor
    kind = Tensor if isinstance(like, nn.Parameter) else type(like)
    with torch._C.DisableTorchFunctionSubclass():
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
    own = plain(tensor)
    if own.requires_grad and own.is_leaf and not leaves_in_graph:
        return dressed(own.detach().clone(), tensor, copied).requires_grad_()
    return dressed(own.clone(), tensor, copied)


def is_opaque(tensor: Tensor) -> bool:
    """Say whether a tensor only stands for others (nested, distributed, masked), so that its memory cannot be shared."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _attributes_of(tensor: Tensor) -> dict[str, Any]:
    kind = type(tensor)
    slots = {
        name: getattr(tensor, name)
        for cls in kind.__mro__[: kind.__mro__.index(Tensor)]
        for name in _names(vars(cls).get("__slots__", ()))
        if hasattr(tensor, name)
    }
    return {**slots, **getattr(tensor, "__dict__", {})}


def _names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]
