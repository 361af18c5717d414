"""Capture the loss of every sample from a training step that returns the mean over the batch.

A training step computes one number for a batch. :class:`LossCapture` is a context around it that intercepts the calls
of losses of ``torch.nn.functional`` and keeps the losses of the samples; with ``reweight`` it also weights them. The
step itself is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_grad.functional.gradients.autograd import is_transformed
from lightning_grad.functional.gradients.loss_functions import (
    LOSSES,
    LossCall,
    LossFunction,
    SampleSums,
    bind_arguments,
    dropped_weight,
    read,
    reweighted,
)
from lightning_grad.functional.plain_tensors import PlainTensors, plain_tensor
from lightning_grad.functional.torch_version import TORCH

_WAY_OUT = "pass `score_fn=`, a function that returns one score per sample"


@dataclass(frozen=True, slots=True)
class UnreadLoss:
    """A call of a loss that could not be read, with the reason and whether it had a graph."""

    name: str
    reason: str
    has_graph: bool
    indivisible: bool = False


class LossCapture(TorchFunctionMode):
    r"""Context that captures the loss of every sample from calls of losses of ``torch.nn.functional``.

    Each loss is computed again with ``reduction="none"``, whether it is called as a function or a module, inside
    another module's ``forward`` or under autocast. The call still returns its own value, bitwise. With weights
    :math:`w_i` from ``reweight`` it returns instead

    .. math::
        L = \frac{\sum_i w_i \sum_{p \in P_i} \ell_{ip}}{\sum_i \sum_{p \in P_i} w_{ip}}

    (see :class:`LossCall`; with "sum" there is no denominator). The denominator is the one of the unweighted mean over the
    batch. If all weights are 1, the result is the original loss; weights with a sum below B reduce it.

    Args:
        samples: B, if a loss has several rows per sample, such as token losses of shape (B T, C).
            The rows of a sample must be adjacent. By default every row is a sample. A loss whose number of rows is not
            a multiple of B (packed tokens) is not read; a multiple by coincidence is not noticed.
        reweight: Function called with each :class:`LossCall`; returns weights (B,), or ``None`` for none.
        keep_graph: Keep the graph of ``losses`` and of the network's ``output``; by default none is kept.
        way_out: Advice for the error if no loss can be read: a clause that starts with a verb.

    Attributes:
        calls: The calls that were read, in order.
        unread: Calls that could not be read: ``ctc_loss`` and other losses of several inputs, functions of ``torch``
            that are called directly, and calls inside a ``torch.func`` transform.

    Hand-written, scripted and fused losses are not captured. A loss inside a checkpointed function is read once, but
    can neither be reweighted nor keep its graph: the backward pass computes it again outside the context, and torch
    raises an error if the results differ. A loss inside a compiled function is read. It can be reweighted unless
    compiled with ``fullgraph=True``, because reweighting breaks the graph.

    Raises:
        ValueError: If ``samples`` is less than 1. With ``reweight``, also if a loss with a graph has a number of rows
            that is not a multiple of ``samples``, or if the weights are not (B,).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
        >>> with LossCapture() as capture:
        ...     loss = torch.nn.CrossEntropyLoss()(logits, torch.tensor([0, 0, 1]))
        >>> loss, capture.only().losses
        (tensor(0.7111, grad_fn=<NllLossBackward0>), tensor([0.1269, 1.3133, 0.6931]))
        >>> with LossCapture(reweight=lambda call: torch.tensor([1.0, 0.0, 1.0])):
        ...     torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1])).item()
        0.27335...
    """

    def __init__(
        self,
        samples: int | None = None,
        reweight: Callable[[LossCall], Tensor | None] | None = None,
        keep_graph: bool = False,
        way_out: str = _WAY_OUT,
    ) -> None:
        super().__init__()
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be at least 1; got {samples}.")
        self.samples = samples
        self.reweight = reweight
        self.keep_graph = keep_graph
        self.way_out = way_out
        self.calls: list[LossCall] = []
        self.unread: list[UnreadLoss] = []

    def only(self, loss_index: int | None = None) -> LossCall:
        """Return the call that computed the loss of the step.

        Args:
            loss_index: Index into :attr:`calls`; ``None`` selects the only call.
                Calls without a graph are ignored if others have one.

        Returns:
            LossCall: The call.

        Raises:
            RuntimeError: If no loss was captured, if there are several and ``loss_index`` is ``None``, or if the index
                is out of range.
            ValueError: If the number of rows of the only loss is not a multiple of ``samples``.
        """
        if not self.calls:
            self._refuse_without_calls()
        if loss_index is not None:
            if not 0 <= loss_index < len(self.calls):
                raise RuntimeError(
                    f"loss_index={loss_index} is out of range: the step has {len(self.calls)} losses: "
                    f"{_listed(self.calls)}. Choose one of these, or {self.way_out}."
                )
            return self.calls[loss_index]
        seen: list[LossCall | UnreadLoss] = [*self.calls, *self.unread]
        counted = [c for c in seen if c.has_graph] or seen
        if len(counted) == 1 and isinstance(counted[0], LossCall):
            return counted[0]
        unread = f"; not readable: {', '.join(u.name for u in self.unread)}" if self.unread else ""
        chunks = len(counted) > 2 and len({call.name for call in counted}) == 1
        advice = "If they are chunks of one loss, compute it in one call. " if chunks else ""
        raise RuntimeError(
            f"The step has {len(counted)} losses, so it is not clear which one to use: "
            f"{_listed(self.calls)}{unread}. {advice}Set loss_index=0 for the first, 1 for the next, or {self.way_out}."
        )

    def _refuse_without_calls(self) -> NoReturn:
        for unread in self.unread:
            if unread.indivisible:
                raise ValueError(unread.reason)
        names = "; ".join(f"{u.name} ({u.reason})" for u in self.unread)
        raise RuntimeError(
            "No loss of torch.nn.functional was captured that can be read per sample"
            f"{f': only {names}' if names else ''}. Hand-written, scripted and fused losses are not captured: "
            f"{self.way_out}."
        )

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Runs for every torch function of the step, so calls of other functions must cost only this lookup.
        loss = LOSSES.get(func)
        if loss is not None and not in_backward():
            kwargs = kwargs or {}
            return self._handle(func, loss, args, {**kwargs, **dropped_weight(func, kwargs)})
        return func(*args, **kwargs) if kwargs else func(*args)

    # torch disables the mode while this runs, so calls made here are not intercepted again.
    def _handle(self, func: Any, loss: LossFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.reweight is None:
            value = func(*args, **kwargs)
            self._read(func, loss, args, kwargs, value)
            return value
        if torch.compiler.is_compiling():
            # Some backends call the functions of a graph under this context, which would then apply the weights twice.
            torch._dynamo.graph_break()
        read = self._read(func, loss, args, kwargs)
        weights = None if read is None else self.reweight(read.call)
        if read is None or weights is None:
            return func(*args, **kwargs)
        call = read.call
        if weights.shape != (call.samples,):
            raise ValueError(f"`reweight` must return weights of shape ({call.samples},); got {tuple(weights.shape)}.")
        return reweighted(read.positions, read.sums, weights, call.options["reduction"])

    def _read(
        self, func: Any, loss: LossFunction, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any = None
    ) -> _Read | None:
        """Read a call and store it, or store the reason why it cannot be read and return None."""
        try:
            read = self._read_or_raise(func, loss, args, kwargs, value)
        except Exception as error:  # observing must not break the step; `only` reports the error later
            indivisible = isinstance(error, IndivisibleError)
            graph = differentiable([*args, *kwargs.values()])
            if indivisible and graph and self.reweight is not None:
                raise
            self.unread.append(UnreadLoss(loss.name, str(error), graph, indivisible))
            return None
        self.calls.append(read.call)
        return read

    def _read_or_raise(
        self, func: Any, loss: LossFunction, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> _Read:
        """Read a call of a loss; raise with the reason if it cannot be read."""
        if loss.defaults is None or not loss.is_readable:
            raise TypeError("it does not have one input and one target per sample")
        # Tensor subclasses may reject the operations below.
        bound = bind_arguments(loss.defaults, args, kwargs)
        given = {name: plain_tensor(v) if isinstance(v, Tensor) else v for name, v in bound.items()}
        value = plain_tensor(value) if isinstance(value, Tensor) else value
        if transformed(given.values()):
            raise TypeError("it was called inside a transform of torch.func")
        detached = {name: v.detach() if isinstance(v, Tensor) else v for name, v in given.items()}
        positions = self._positions(func, given, detached, value)
        samples = _samples(loss.name, positions, self.samples, self.way_out)
        has_graph = differentiable(given.values())
        call, sums = read(loss.name, given, detached, positions, samples, self.keep_graph, has_graph)
        return _Read(call, positions, sums)

    def _positions(self, func: Any, given: dict[str, Any], detached: dict[str, Any], value: Any) -> Tensor:
        """Return the loss of every position, for which the loss is called again unless it is unreduced."""
        if self.reweight is not None:
            positions: Tensor = func(**{**given, "reduction": "none"})
        elif given["reduction"] == "none":
            positions = value if self.keep_graph else value.detach()
        else:
            arguments = {**(given if self.keep_graph else detached), "reduction": "none"}
            # All modes are disabled, so that an outer capture does not see a second loss. Before torch 2.8 compiled
            # functions cannot enter this context, so an outer capture counts the loss twice there.
            limited = TORCH < (2, 8) and torch.compiler.is_compiling()
            with (PlainTensors if limited else torch._C.DisableTorchFunction)():
                positions = func(**arguments)
        return positions


class _Read(NamedTuple):
    call: LossCall
    positions: Tensor
    sums: SampleSums


class IndivisibleError(ValueError):
    """Raised if the number of rows of a loss is not a multiple of the number of samples."""


def _samples(name: str, positions: Tensor, samples: int | None, way_out: str) -> int:
    rows = positions.shape[0] if positions.dim() else 1
    if samples is None:
        return rows
    if rows % samples or rows == 0:
        raise IndivisibleError(
            f"{name} got {rows} rows for {samples} samples, so it is unknown which row belongs to which sample (packed "
            "tokens, a loss of only some of the rows, a collate_fn that drops samples, or chunks of a loss). Pad "
            f"instead of packing, compute chunks in one call, or {way_out}."
        )
    return samples


def differentiable(values: Iterable[Any]) -> bool:
    """Return True if a gradient can flow to one of the values."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def in_backward() -> bool:
    """Return True during a backward pass, which computes checkpointed losses again."""
    # Since torch 2.11 torch.autograd.backward disables the context, as Tensor.backward always did.
    if TORCH >= (2, 11) or torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def transformed(values: Iterable[Any]) -> bool:
    """Return True if one of the values belongs to a transform of ``torch.func``."""
    if torch.compiler.is_compiling():  # is_transformed cannot be traced
        return False
    return any(isinstance(v, Tensor) and is_transformed(v) for v in values)


def _listed(calls: list[LossCall]) -> str:
    return ", ".join(f"{i}: {call.name}" for i, call in enumerate(calls))
