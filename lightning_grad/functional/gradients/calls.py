"""Read the contributions of the samples from a call of a loss of ``torch.nn.functional``, by calling it again."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_grad.functional.gradients.autograd import Edge, edge_of
from lightning_grad.functional.gradients.loss_functions import LOSSES, LossCall, SampleSums, bind_arguments, read
from lightning_grad.functional.gradients.rows import Rows, obeys_shape_rule
from lightning_grad.functional.plain_tensors import plain_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of a loss.

    Attributes:
        name: Name of the function.
        reduction: "mean", "sum", "batchmean" or "none".
        inputs: The rows of each input with a graph, by its edge; ``None`` for the shape rule.
        others: Edges of inputs with a graph but without rows, such as learned class weights.
        problem: Why the call cannot be read; empty if it can.
        covers: Whether each sample of the batch has a row.
        sums: Numerators and denominators of the samples' losses; only with values.
        loss_call: The call that :class:`~lightning_grad.functional.LossCapture` would keep, if any.
    """

    name: str
    reduction: str
    inputs: Mapping[Edge, Rows | None]
    others: frozenset[Edge]
    problem: str = ""
    covers: bool = True
    sums: SampleSums | None = None
    loss_call: LossCall | None = None


def read_call(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    value: Tensor,
    samples: int,
    rows_of: Callable[[Tensor], Rows | None],
    values: bool,
    keep_graph: bool,
) -> Call | None:
    """Read a call of a loss; ``None`` if the function cannot be read.

    Args:
        func: The loss.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        value: Result of the call.
        samples: B.
        rows_of: Function that returns the known rows of a tensor.
        values: Compute the sums, which calls the loss again.
        keep_graph: Keep the graph of the sums.
    """
    loss = LOSSES[func]
    if loss.defaults is None:
        return None
    name, given = loss.name, bind_arguments(loss.defaults, args, kwargs)
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    first = tensors[0]
    axis = 1 if name == "ctc_loss" and first.dim() == 3 else 0  # its log-probabilities are (T, B, C)
    rows = Rows(1, first.shape[1]) if axis else rows_of(first)
    count = first.shape[axis] if first.dim() > axis else 0
    with_rows = {edge_of(t): rows for t in tensors if t.requires_grad and t.dim() > axis and t.shape[axis] == count > 0}
    others = frozenset(edge_of(t) for t in tensors if t.requires_grad) - set(with_rows)
    call = Call(name, given["reduction"], with_rows, others, covers=rows is None or rows.covers)
    if rows is None or (rows.samples is None and rows.owner is None):
        is_known = count > 0 and count % samples == 0
    else:
        is_known = rows.owner is not None or rows.length == count
    if not is_known or (rows is not None and (rows.mixed or rows.axis != axis)):
        problem = f"got {count} rows for {samples} samples; it is unknown which row belongs to which sample."
        return replace(call, problem=problem)
    if not values:
        return call
    # Checkpointing compares the number of tensors saved in the forward pass with that in the backward pass, where there
    # is no trace. These hooks hide the tensors that our extra call saves.
    with saved_tensors_hooks(lambda saved: saved, lambda saved: saved) if keep_graph else nullcontext():
        given = {key: plain_tensor(v) if isinstance(v, Tensor) else v for key, v in given.items()}
        return _with_sums(func, call, given, plain_tensor(value), samples, rows, keep_graph)


def _with_sums(
    func: Callable[..., Any],
    call: Call,
    given: dict[str, Any],
    value: Tensor,
    samples: int,
    rows: Rows | None,
    keep_graph: bool,
) -> Call:
    """Compute the loss again for each position, and sum the positions of each sample."""
    name, ids = call.name, None if rows is None else rows.samples
    detached = {key: v.detach() if isinstance(v, Tensor) else v for key, v in given.items()}
    if call.reduction == "none":
        positions = value if keep_graph else value.detach()
    else:
        with torch.set_grad_enabled(keep_graph):
            positions = func(**{**(given if keep_graph else detached), "reduction": "none"})
    owner = None if rows is None else rows.owner
    length = 1 if owner is not None else samples if ids is None else len(ids)
    if owner is None and positions.numel() != length and not obeys_shape_rule(positions.shape, length):
        problem = f"got {tuple(positions.shape)} positions for {samples} samples."
        return replace(call, problem=problem)
    if name == "ctc_loss" and call.reduction == "mean":
        # The mean of ctc_loss first divides each loss by the length of its target.
        positions = positions / detached["target_lengths"].to(positions).clamp(min=1)
    loss_call = None
    if LOSSES[func].is_readable:
        loss_call, sums = read(name, given, detached, positions, length, keep_graph, value.requires_grad)
    else:
        sums = SampleSums.of(positions, 1.0, length)
    if owner is not None:
        ids = torch.tensor([owner])
    if ids is not None:
        at, loss_call = ids.to(positions.device), None
        sums = SampleSums(*(v.new_zeros(samples).index_add(0, at, v) for v in sums))
    return replace(call, sums=sums, loss_call=loss_call)
