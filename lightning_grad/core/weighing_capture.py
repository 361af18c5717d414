"""Weighting the samples in the backward pass of one call of a loss; the call itself returns what it returns anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_grad.core.sample_losses import SampleLosses
from lightning_grad.functional import LossCapture
from lightning_grad.functional.gradients import (
    InseparableLossError,
    LossFunction,
    Record,
    Walk,
    edge_of,
    read_call,
    weight_cuts_,
)
from lightning_grad.functional.plain_tensors import plain_tensor

Weigh = Callable[[SampleLosses], Tensor | None]


class WeighingCapture(LossCapture):
    """A capture that weights by hooks, so that the value of the loss stays, and the gradient at weight 1 bit for bit.

    Args:
        samples: As in :class:`LossCapture`.
        weigh: Called with the losses of each call; returns weights (B,), or ``None`` to leave this one as it is.
        way_out: As in :class:`LossCapture`.
    """

    def __init__(self, samples: int | None, weigh: Weigh | None, way_out: str) -> None:
        super().__init__(samples, way_out=way_out)
        self._weigh = weigh

    def _handle(self, func: Any, loss: LossFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._weigh is None:
            return super()._handle(func, loss, args, kwargs)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # hooks need the autograd graph, which does not exist while compiling
        value = func(*args, **kwargs)
        read = self._read(func, loss, args, kwargs, value)
        if read is None:
            return value
        call = read.call
        weights = self._weigh(SampleLosses(call.losses, call, sums=read.sums))
        if weights is None:
            return value
        if weights.shape != (call.samples,):
            raise ValueError(f"The weights must have the shape ({call.samples},); got {tuple(weights.shape)}.")
        # A sample all of whose positions are ignored has a loss of nan, and so may its weight be; its gradient is zero.
        weights = weights.detach().where(~(weights.isnan() & call.losses.isnan()), 0.0)
        if _has_hooks(func, args, kwargs, value, call.samples, weights):
            return value
        # The gradient of what has no rows, as learned class weights, is that of a loss that is computed with the weights.
        with LossCapture(call.samples, lambda _: weights):
            return WithGradientOf.apply(value.detach(), func(*args, **kwargs))  # type: ignore[no-untyped-call]


def _has_hooks(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor, samples: int, weights: Tensor
) -> bool:
    """Hook weights into the graph of a call; return whether that is possible."""
    value = plain_tensor(value)
    call = read_call(func, args, kwargs, value, samples, lambda _: None, edge_of, values=False, keep_graph=False)
    if call is None or call.problem or call.others or value.grad_fn is None:
        return False
    # For the walk a loss without reduction is none that ends here; for the hooks it makes no difference.
    record = Record(samples, {}, calls={value.grad_fn: replace(call, reduction="mean")})
    try:
        weight_cuts_(Walk(value.grad_fn, record), weights)
    except InseparableLossError:
        return False
    return True


class WithGradientOf(torch.autograd.Function):
    """Returns the first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0]
