"""Weights for the samples in the backward pass, as hooks on the graph: no value changes, and nothing is computed twice."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.gradients.autograd import Node, edge_of
from lightning_grad.functional.gradients.calls import read_call
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.record import Record
from lightning_grad.functional.gradients.rows import Rows
from lightning_grad.functional.gradients.walk import Walk, entries
from lightning_grad.functional.plain_tensors import plain_tensor


class WeightHandle:
    """The hooks of one call of :meth:`Terms.weight_`."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the weights away. Without it they go with the graph."""
        while self._handles:
            self._handles.pop().remove()


def weight_cuts_(walk: Walk, weights: Tensor) -> WeightHandle:
    """Weight the rows in what flows through the cuts of a walk in every backward pass."""
    # On the edge, not on the tensor: what else the tensor is used for, also in another term, is not weighted here.
    return _weight_inputs([(cut.node, cut.index, cut.rows) for cut in walk.cuts], weights)


def weight_call_(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor, weights: Tensor
) -> bool:
    """Weight the rows of a call of a loss in every backward pass; return whether that is possible.

    It is not if something without rows has a graph, such as learned class weights: its gradient would be that of the plain
    loss.

    Args:
        func: The loss.
        args: Of the call.
        kwargs: Of the call.
        value: What it returned.
        weights: One for each sample, (B,). The rows of a sample stand together, in order.
    """
    value, samples = plain_tensor(value), len(weights)
    if value.grad_fn is None:
        return False
    only = _only_input(args, kwargs, samples)
    found = () if only is None else entries(value.grad_fn, (edge_of(only),))
    if inputs := [(node, index, None) for node, index, _ in found]:
        _weight_inputs(inputs, weights)
        return True
    call = read_call(func, args, kwargs, value, samples, lambda _: None, values=False, keep_graph=False)
    if call is None or call.problem or call.others:
        return False
    # For the walk a loss without reduction is none that ends here; for the hooks it makes no difference.
    record = Record(samples, {}, calls={value.grad_fn: replace(call, reduction="mean")})
    try:
        weight_cuts_(Walk(value.grad_fn, record), weights)
    except InseparableLossError:
        return False
    return True


def _only_input(args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> Tensor | None:
    """Return the input of a loss if it alone has a graph and its rows divide by the samples, as in nearly all steps."""
    first: Any = args[0] if args else kwargs.get("input")
    if first.__class__ is not Tensor or not first.requires_grad or not first.dim() or not first.numel():
        return None
    others = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad and t is not first]
    return None if others or first.shape[0] % samples else first


def without_ignored(weights: Tensor, losses: Tensor) -> Tensor:
    """Return weights in which nan is 0 for a sample without a position that counts.

    Such a sample has a loss of nan, and so may its weight be; its gradient is zero.

    Args:
        weights: One for each sample, (B,).
        losses: Of the samples, (B,).
    """
    return torch.where(weights.isnan() & losses.detach().isnan(), 0.0, weights)


def _weight_inputs(inputs: Iterable[tuple[Node, int, Rows | None]], weights: Tensor) -> WeightHandle:
    """Weight the rows in the gradients of some inputs of nodes."""
    by_node: dict[Node, dict[int, Rows | None]] = {}
    for node, index, rows in inputs:
        by_node.setdefault(node, {})[index] = rows
    return WeightHandle([node.register_hook(_weighting(rows, weights)) for node, rows in by_node.items()])


def _weighting(inputs: Mapping[int, Rows | None], weights: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    def hook(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        return tuple(
            gradient if gradient is None or index not in inputs else _weighted(gradient, inputs[index], weights)
            for index, gradient in enumerate(gradients)
        )

    return hook


def _weighted(gradient: Tensor, rows: Rows | None, weights: Tensor) -> Tensor:
    factors = _factors(gradient, rows, weights)
    if gradient.dtype == weights.dtype:
        return gradient * factors
    # The product in the wider type, and rounded once.
    return (gradient.to(torch.promote_types(gradient.dtype, weights.dtype)) * factors).to(gradient.dtype)


def _factors(gradient: Tensor, rows: Rows | None, weights: Tensor) -> Tensor:
    """Return the weight of each row of a gradient, in a shape to multiply it with."""
    if rows is not None and rows.owner is not None:
        return weights[rows.owner]
    axis, dims = 0 if rows is None else rows.axis, gradient.dim()
    length = gradient.shape[axis] if dims > axis else 1
    if rows is not None and rows.samples is not None:
        factors = weights[rows.samples.to(weights.device)]
    else:
        factors = weights if length == len(weights) else weights.repeat_interleave(length // len(weights))
    return factors if dims == 1 else factors.reshape([length if dim == axis else 1 for dim in range(dims)])
