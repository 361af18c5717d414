"""Weighting the samples in the backward pass of one call of a loss; the call itself returns what it returns anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grad.core.sample_losses import SampleLosses
from lightning_grad.functional import LossCapture
from lightning_grad.functional.gradients import LossFunction, weight_call_, without_ignored
from lightning_grad.functional.gradients.autograd import Node

_OUTLINE = 16  # nodes that are compared
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
        self._nodes: list[Node] = []  # of what the calls returned

    def _handle(self, func: Any, loss: LossFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._weigh is None:
            return super()._handle(func, loss, args, kwargs)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # hooks need the autograd graph, which does not exist while compiling
        value = self._noted(func(*args, **kwargs))
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
            weighted = WithGradientOf.apply(value.detach(), func(*args, **kwargs))  # type: ignore[no-untyped-call]
        return self._noted(weighted)

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.grad_fn is not None:
            self._nodes.append(value.grad_fn)
        return value

    def outline_of(self, loss: Tensor) -> tuple[str, ...]:
        """See :func:`outline_of`."""
        return outline_of(loss, self._nodes)


def outline_of(loss: Tensor, calls: Sequence[Node]) -> tuple[str, ...]:
    """Return what stands between a loss and calls of losses, by the names of its first nodes.

    It is equal in steps that compute their loss in the same way, and costs next to nothing where the loss is a call.
    """
    waiting, names, known = deque([loss.grad_fn]), list[str](), set(calls)
    while waiting and len(names) < _OUTLINE:
        node = waiting.popleft()
        if node is not None:
            names.append("call" if node in known else node.name())
            waiting.extend(() if node in known else (below for below, _ in node.next_functions))
    return tuple(names)


class WithGradientOf(torch.autograd.Function):
    """Returns the first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0]
