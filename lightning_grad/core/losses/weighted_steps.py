"""Three ways to weight the samples of a training step: by its loss call, by its terms, or by a function.

The weights act in the backward pass. The value of the loss that the step returns does not change.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core.losses import sample_losses
from lightning_grad.core.losses.given_functions import GivenFunction, LossRequest, checked_losses, refuse_other_means
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.quiet import aside
from lightning_grad.functional import LossCapture, Terms
from lightning_grad.functional.gradients.autograd import Node
from lightning_grad.functional.gradients.loss_functions import LossFunction
from lightning_grad.functional.gradients.terms import weight_call_, without_ignored
from lightning_grad.utilities.batch_copies import copy_of

_OUTLINE = 16  # number of graph nodes that are compared
Weigh = Callable[[SampleLosses], Tensor | None]


class WeighingCapture(LossCapture):
    """A capture that weights by hooks: the value of the loss, and the gradient at weight 1, do not change bitwise.

    Args:
        samples: As in :class:`LossCapture`.
        weigh: Function (losses) -> weights (B,), or ``None`` to change nothing; called for the
            weighted call.
        way_out: As in :class:`LossCapture`.
        loss_index: Index of the call to weight. Default: every call with a graph.
    """

    def __init__(self, samples: int | None, weigh: Weigh | None, way_out: str, loss_index: int | None = None) -> None:
        super().__init__(samples, way_out=way_out)
        self._weigh, self._loss_index = weigh, loss_index
        self.nodes: list[Node] = []  # graph nodes of the values that the calls returned

    def _handle(self, func: Any, loss: LossFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a loss call and weight its gradient, by hooks if possible."""
        if self._weigh is None:
            return super()._handle(func, loss, args, kwargs)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # hooks need the autograd graph, which does not exist while compiling
        value = self._noted(func(*args, **kwargs))
        read = self._read(func, loss, args, kwargs, value)
        if read is None:
            return value
        call = read.call
        counts = call.has_graph if self._loss_index is None else len(self.calls) - 1 == self._loss_index
        weights = self._weigh(SampleLosses(call.losses, call, sums=read.sums)) if counts else None
        if weights is None:
            return value
        if weights.shape != (call.samples,):
            raise ValueError(f"The weights must have the shape ({call.samples},); got {tuple(weights.shape)}.")
        weights = without_ignored(weights.detach(), call.losses)
        if weight_call_(func, args, kwargs, value, weights):
            return value
        # Hooks cannot weight the gradient of tensors without rows, such as learned class weights.
        # It is taken from a loss that is computed with the weights.
        with LossCapture(call.samples, lambda _: weights):
            weighted = WithGradientOf.apply(value.detach(), func(*args, **kwargs))  # type: ignore[no-untyped-call]
        return self._noted(weighted)

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.grad_fn is not None:
            self.nodes.append(value.grad_fn)
        return value


def outline_of(loss: Tensor, calls: Sequence[Node]) -> tuple[str, ...]:
    """Return the names of the first graph nodes between a loss and its loss calls.

    The outline is equal for steps that compute their loss in the same way, and nearly free if the
    loss is one call.
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


@dataclass(frozen=True)
class Weighing:
    """The arguments of a technique that weights samples; see :func:`~.loss_tap.reweight_losses`."""

    reweight: Weigh
    asked: LossRequest
    acts: bool
    needs: Callable[[], bool]


@dataclass(frozen=True)
class Step:
    """A training step that is about to run.

    Args:
        module: The module.
        inner: Its ``training_step``.
        args: Positional arguments of the step.
        kwargs: Keyword arguments of the step.
        samples: Number of samples in the batch, if known.
        is_read: Whether a technique reads the losses.
        may_skip: Whether the step may return None to skip the batch.
    """

    module: pl.LightningModule
    inner: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int | None
    is_read: bool
    may_skip: bool

    @property
    def batch(self) -> Any:
        """The batch."""
        return next(iter((*self.args, *self.kwargs.values())))

    def run(self) -> Any:
        """Run the step."""
        return self.inner(*self.args, **self.kwargs)

    def run_on_copies(self) -> Any:
        """Run the step on copies of its arguments."""
        args, kwargs = copy_of([list(self.args), self.kwargs], leaves_in_graph=True)
        return self.inner(*args, **kwargs)

    def is_skipped(self, output: Any) -> bool:
        """Return True if the step skipped its batch by returning None."""
        return output is None and self.may_skip


Seen = tuple[Any, LossCapture | None]


class ByCall:
    """Weights the one loss call of a step, or only captures it.

    Args:
        asked: Requirements on the loss.
        reweight: Function (losses) -> weights; ``None`` to capture only.
    """

    def __init__(self, asked: LossRequest, reweight: Weigh | None = None) -> None:
        self._asked, self._reweight = asked, reweight
        self.outlines: set[tuple[str, ...]] = set()  # outlines of steps that were checked; empty if none was
        self.changed: tuple[str, ...] | None = None  # outline of a later step that differs from them

    def run(self, step: Step) -> Seen:
        """Run a step; return what it returns, and the losses seen for readers; ``None`` for these if it was skipped."""
        with WeighingCapture(step.samples, self._reweight, self._asked.way_out, self._asked.loss_index) as capture:
            output = step.run()
        if step.is_skipped(output):
            return None, None
        if self._reweight is not None:
            # Raises if the loss was not captured or is ambiguous: the step would otherwise train
            # without weights.
            sample_losses.only_loss(capture, self._asked, self._asked.loss_index)
            loss = sample_losses.loss_of_output(output)
            if self.outlines and loss is not None and loss.grad_fn is not None:
                outline = outline_of(loss, capture.nodes)
                self.changed = self.changed if outline in self.outlines else outline
        return output, capture


class ByTerms:
    """Weights the terms in the graph of the step's loss.

    Args:
        weighing: Arguments of the technique that weights.
        like: Terms of the first step.
    """

    def __init__(self, weighing: Weighing, like: Terms) -> None:
        self._weighing = weighing
        self._like = like

    def run(self, step: Step) -> Seen:
        """Run a step; return what it returns, and the losses seen for readers; ``None`` for these if it was skipped."""
        assert step.samples is not None
        trace = sample_losses.trace_of(step.module, step.samples)
        with trace:
            output = step.run()
        if step.is_skipped(output):
            return None, None
        asked = self._weighing.asked
        terms = sample_losses.terms_of(trace, output, asked.needs_losses(), self._like, check=False)
        weights = self._weighing.reweight(SampleLosses.of_terms(terms, asked.kind()))
        if weights is not None:
            terms.weight_(weights)
        terms.release()
        capture = LossCapture(step.samples)
        capture.calls = trace.calls
        return output, capture


class ByFunction:
    """Replaces the gradient of the step's loss with the gradient of a function's weighted losses.

    Args:
        weighing: Arguments of the technique that weights.
        loss_fn: Function (module, batch) -> losses of the samples.
    """

    def __init__(self, weighing: Weighing, loss_fn: GivenFunction) -> None:
        self._weighing, self._loss_fn = weighing, loss_fn
        self._pairs: list[tuple[float, float]] = []  # mean of loss_fn and loss of the step, for the first batches

    def run(self, step: Step) -> Seen:
        """Run a step; return what it returns, and the losses seen for readers; ``None`` for these if it was skipped."""
        given = copy_of(step.batch)  # a copy, because the function may write into it
        with aside(step.module):  # so that the step draws the same random numbers as the function
            found = self._loss_fn(step.module, given)
        capture = LossCapture(step.samples)
        with capture if step.is_read else nullcontext():
            output = step.run()
        if step.is_skipped(output):
            return None, None
        losses, loss = checked_losses(found, step.samples), sample_losses.loss_of_output(output)
        if loss is None or loss.numel() != 1:
            raise ValueError(
                "training_step must return a scalar loss, or None to skip the batch; "
                f"{self._weighing.asked.display_name} found neither."
            )
        self._compare(losses, loss)
        rest = (loss.detach() - losses.detach().mean()).reshape(())
        weights = self._weighing.reweight(SampleLosses(losses.detach(), rest=rest))
        if weights is None:
            return output, capture
        # Terms of the step that belong to no sample, such as manual weight decay, keep their
        # gradient.
        change = ((weights.to(losses) - 1.0) * losses).mean().reshape(loss.shape)
        weighted = loss + change.to(loss.dtype)
        weighted = WithGradientOf.apply(loss.detach(), weighted)  # type: ignore[no-untyped-call]
        return sample_losses.with_loss(output, weighted), capture

    def _compare(self, losses: Tensor, loss: Tensor) -> None:
        """Raise if the function's mean differs from the loss of the first two steps by more than a constant."""
        if len(self._pairs) == 2:
            return
        self._pairs.append((float(losses.detach().mean()), float(loss.detach())))
        coarse = losses.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(loss.device.type)
        refuse_other_means(self._pairs, self._weighing.asked.display_name, "loss_fn", 5e-2 if coarse else 1e-3)


Way = ByCall | ByTerms | ByFunction
"""A way to run a step such that its samples are weighted in the backward pass."""
