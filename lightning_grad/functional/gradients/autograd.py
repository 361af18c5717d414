"""The undocumented parts of autograd; no other module of this package uses them.

A test checks that the installed torch has each of them, so it shows what a new or old version changes.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Node = Any  # nodes written in C++ are not instances of torch.autograd.graph.Node
Edge = tuple[Node, int]

REENTRANT = (
    "CheckpointFunctionBackward"  # a node of checkpoint(..., use_reentrant=True); it hides the operations inside
)

_BUILT_IN = re.compile(r"(\w+)Backward\d+")
_WITHOUT_NUMBER = {"CopySlices": "CopySlices", "CopyBackwards": "Copy"}


def edge_of(tensor: Tensor) -> Edge:
    """Return the edge of the graph to a tensor that requires grad."""
    node = tensor.grad_fn
    return (node, tensor.output_nr) if node is not None else torch.autograd.graph.get_gradient_edge(tensor)[:2]


def nodes_of(tensor: Tensor) -> Iterator[Node]:
    """Yield all nodes of the graph of a tensor."""
    waiting = [tensor.grad_fn]
    seen = {*waiting, None}
    while waiting:
        node: Node = waiting.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def output_shape(node: Node, number: int) -> tuple[int, ...]:
    """Return the shape of an output of a node in the forward pass."""
    return tuple(node._input_metadata[number].shape)


def output_count(node: Node) -> int:
    """Return the number of outputs of a node in the forward pass."""
    return len(node._input_metadata)


def kind_of(node: Node) -> str:
    """Return the kind of a built-in node, such as "Mean" for ``MeanBackward0``; an empty string for other nodes.

    A custom ``autograd.Function`` named ``Mean`` has a node ``MeanBackward`` without a number, which distinguishes it.
    """
    return _kind_of_name(node.name())


@lru_cache(4096)
def _kind_of_name(name: str) -> str:
    name = name.rsplit("::", 1)[-1]
    found = _BUILT_IN.fullmatch(name)
    return found[1] if found else _WITHOUT_NUMBER.get(name, "")


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf tensor of an AccumulateGrad node; ``None`` for other nodes."""
    return node.variable if node.name().endswith("AccumulateGrad") else None


def apply_backward(node: Node, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Compute the gradients of a node's inputs from the gradients of its outputs.

    Unlike a backward pass, it calls no hooks, frees no buffers, and stops after this node.
    """
    with torch.no_grad():
        found = node(*gradients)
    return found if isinstance(found, tuple) else (found,)


def is_transformed(tensor: Tensor) -> bool:
    """Return True for a tensor inside a ``torch.func`` transform, whose shape differs from the batch's."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
