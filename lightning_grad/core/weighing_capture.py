"""Weighting the samples in the backward pass of one call of a loss; the call itself returns what it returns anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_grad.core.sample_losses import SampleLosses
from lightning_grad.functional import LossCapture
from lightning_grad.functional.gradients import LossFunction, weight_call_, without_ignored

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
        weights = without_ignored(weights.detach(), call.losses)
        if weight_call_(func, args, kwargs, value, weights):
            return value
        # The gradient of what has no rows, as learned class weights, is that of a loss that is computed with the weights.
        with LossCapture(call.samples, lambda _: weights):
            return WithGradientOf.apply(value.detach(), func(*args, **kwargs))  # type: ignore[no-untyped-call]


class WithGradientOf(torch.autograd.Function):
    """Returns the first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0]
