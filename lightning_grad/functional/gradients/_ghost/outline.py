"""The outline of an autograd graph, to notice that a network has changed since its layouts were learned."""

import functools
from typing import Any

from lightning_grad.functional.gradients._ghost.tracer import Tracer

Outline = tuple[Any, ...]


def outline_of(tracer: Tracer) -> Outline:
    """Return the structure of a forward pass: if two are equal, their uses have the same layouts.

    Which entries of an output belong to a sample depends on the operations between the output and the losses: on their
    order, their shapes, and settings such as the dimensions of a ``permute``. All of them are in the outline; contents
    of tensors are not.
    """
    nodes, waiting = dict[Any, int](), [tracer.losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes[node] = len(nodes)
            waiting += [below for below, _ in node.next_functions]
    operations = [
        (node.name(), [(nodes.get(below), i) for below, i in node.next_functions], _settings_of(node)) for node in nodes
    ]
    uses = [(use.key, use.shape, use.is_batchless, nodes.get(use.node)) for use in tracer.uses]
    return operations, uses, len(tracer.losses)


def _settings_of(node: Any) -> list[Any]:
    return [_plain(getattr(node, name)) for name in _names_of(node.__class__)]


def _plain(value: Any) -> Any:
    """Return numbers and names; other settings, such as the factor of a sum, move no sample."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value if isinstance(value, (int, str)) else None


@functools.cache
def _names_of(kind: Any) -> list[str]:
    """Return the names of the arguments that nodes of a class keep, except tensors."""
    names = set(dir(kind))
    return sorted(name for name in names if name.startswith("_saved_") and f"_raw{name}" not in names)
