"""The parts of autograd that torch does not document; nothing else in this package touches them.

A test asks the installed torch for each of them, so a new or an old version shows at once what must be replaced here.
"""

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node is the type of none of the nodes written in C++
Edge = tuple[Node, int]

_BUILT_IN = re.compile(r"(\w+)Backward\d+")
_WITHOUT_NUMBER = {"CopySlices": "CopySlices", "CopyBackwards": "Copy"}


def edge_of(tensor: Tensor) -> Edge:
    """Return the edge of the graph that leads to a tensor with a graph."""
    node = tensor.grad_fn
    return (node, tensor.output_nr) if node is not None else torch.autograd.graph.get_gradient_edge(tensor)[:2]


def output_shape(node: Node, number: int) -> tuple[int, ...]:
    """Return the shape of what a node gave out in the forward pass."""
    return tuple(node._input_metadata[number].shape)


def output_count(node: Node) -> int:
    """Return the number of tensors that a node gave out in the forward pass."""
    return len(node._input_metadata)


def kind_of(node: Node) -> str:
    """Return the kind of a built-in node, as "Mean" of ``MeanBackward0``; else an empty string.

    A custom ``autograd.Function`` called ``Mean`` has a node ``MeanBackward``, without a number, and is not the built-in
    mean.
    """
    return _kind_of_name(node.name())


@lru_cache(4096)
def _kind_of_name(name: str) -> str:
    name = name.rsplit("::", 1)[-1]
    found = _BUILT_IN.fullmatch(name)
    return found[1] if found else _WITHOUT_NUMBER.get(name, "")


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf tensor whose gradient a node accumulates; ``None`` for other nodes."""
    return node.variable if node.name().endswith("AccumulateGrad") else None


def apply_backward(node: Node, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a node's inputs, given those of its outputs.

    Unlike a backward pass it calls no hook, frees no buffer and goes no further than this node.
    """
    with torch.no_grad():
        found = node(*gradients)
    return found if isinstance(found, tuple) else (found,)


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor lives inside a transform of ``torch.func``, where its shape is not that of the batch."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
