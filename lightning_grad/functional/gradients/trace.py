"""The context that watches a step: which rows belong to which sample, and what is reduced to the loss."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_grad.functional._loss_functions import LOSSES, dropped_weight
from lightning_grad.functional.gradients._autograd import Edge, is_transformed
from lightning_grad.functional.gradients._calls import Call, read_call
from lightning_grad.functional.gradients._record import Place, Record
from lightning_grad.functional.gradients._rows import (
    MOVES,
    REDUCTIONS,
    RESHAPES,
    SORTS,
    TRANSPOSES,
    Rows,
    assigned_rows,
    moved_rows,
    obeys_shape_rule,
    reduces_samples,
    touches_rows,
    transposed_rows,
)
from lightning_grad.functional.gradients.terms import Terms
from lightning_grad.functional.loss_capture import LossCall

_ASSIGNMENT = torch.Tensor.__setitem__
_SPECIAL = frozenset([*LOSSES, *MOVES, *RESHAPES, *TRANSPOSES, *REDUCTIONS, *SORTS, _ASSIGNMENT])
_NO_TENSORS = (type(None), torch.Size, int, bool, float, str, torch.dtype, torch.device)
_NOT_THE_STEP = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class LossTrace(TorchFunctionMode):
    r"""Context around a training step, from whose loss it then finds the loss of every sample.

    The step may compute its loss by functions of ``torch.nn.functional``, by hand, or both, as long as the loss is a sum of
    means (or sums) over samples, and of constants:

    .. math::
        L = c + \frac{1}{B} \sum_i s_i

    The step runs as it is; what it computes does not change by a bit. :meth:`terms` then walks the autograd graph from the
    loss to the tensors that have rows, and refuses what it cannot prove to be such a sum, with function and line.

    Args:
        samples: B, the number of samples in the batch.
        values: Keep what the values need: a reference to each tensor that is reduced, until the trace is dropped, and the
            losses of ``torch.nn.functional`` computed once more with ``reduction="none"``. Weights alone need no values.
        keep_graph: Keep the graph of the values, so that they can be differentiated.
        constants: Tensors besides parameters that belong to no sample, such as ``module.buffers()``.

    Attributes:
        calls: The calls of losses of ``torch.nn.functional`` that :class:`~lightning_grad.functional.LossCapture` would
            have kept, in order; with ``values`` only.

    Which sample a row belongs to follows from the shape, k B rows in order, unless the step moves rows by indexing,
    concatenating, splitting, repeating or transposing, which is followed. A shape can agree by coincidence; so prove a step
    once with :func:`prove_terms`, and pass the proven terms to :meth:`terms` in later steps.

    Cost: no host sync, except where rows are moved by an index on a GPU. While ``torch.compile`` compiles, nothing is
    watched: compiled parts run as without the trace, and a loss inside of one is refused.

    Raises:
        ValueError: If ``samples`` is less than 1.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
        >>> with LossTrace(samples=2) as trace:
        ...     loss = (x**2).mean() + 0.5 * x.abs().sum(1).mean()
        >>> terms = trace.terms(loss)
        >>> terms.shares, loss.item()
        (tensor([ 4., 21.]), 12.5)
        >>> handle = terms.weight_(torch.tensor([1.0, 0.0]))
        >>> loss.backward(retain_graph=True)
        >>> x.grad
        tensor([[0.7500, 1.2500],
                [0.0000, 0.0000]])
        >>> handle.remove()
    """

    def __init__(
        self, samples: int, values: bool = True, keep_graph: bool = False, constants: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"LossTrace needs samples of at least 1; got {samples}.")
        self.samples = samples
        self.values = values
        self.keep_graph = keep_graph
        self.calls: list[LossCall] = []
        self.record = Record(samples, {id(tensor): tensor for tensor in constants})
        self._moved: dict[int, tuple[ref[Tensor], Rows]] = {}  # by tensor, also those without a graph

    def terms(self, loss: Tensor, like: Terms | None = None, check: bool = True) -> Terms:
        """Return what each sample contributes to the loss that the step returned.

        Call it before ``backward``, which frees the graph.

        Args:
            loss: What the step returned, one number with its graph.
            like: Terms of an earlier step, whose shape coincidences were ruled out by a proof. Where the shapes alone would
                cut this step elsewhere, it is cut as that one was.
            check: Compare the terms with the value of the loss, at the price of one host sync.

        Raises:
            InseparableLossError: If the loss is not such a sum, or not known to be one.
            ValueError: If the loss is not one number that requires a gradient.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
            found = (
                f"a tensor {tuple(loss.shape)}{'' if loss.requires_grad else ' that requires no gradient'}"
                if isinstance(loss, Tensor)
                else type(loss).__name__
            )
            raise ValueError(f"The loss of a step must be one number, computed from what is trained; got {found}.")
        return Terms(loss, self.record, self.values, self.keep_graph, like, check)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Runs for every function of torch in the step. For nearly all of them the first block is all that happens.
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func in _SPECIAL:
            return self._special(func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        if out.__class__ is not Tensor:
            if out.__class__ in _NO_TENSORS:
                return out
        elif not self._moved:
            if out.grad_fn is None and func is not torch.eye:
                return out
            shape = out.shape
            first = args[0] if args else None
            # Rows in, rows out. Parameters take the long way: W**2 has rows by coincidence, if W has k B.
            if shape and shape[0] and not shape[0] % self.samples and first.__class__ is Tensor:
                before = first.shape
                if before and before[0] == shape[0] and not self.record.is_constant(first):
                    return out
        self._note(func, args, kwargs or {}, out)
        return out

    # While these run, torch has taken the mode off, so that the calls in here are not seen again.

    def _special(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in LOSSES:
            kwargs = {**kwargs, **dropped_weight(func, kwargs)}
        out = func(*args, **kwargs)
        if func in LOSSES:
            if self._read_call(func, args, kwargs, out):
                return out
        elif not isinstance(args[0], (Tensor, tuple, list)):
            return out
        elif func is _ASSIGNMENT:
            if not self.record.is_constant(args[0]):
                self._set_rows(args[0], assigned_rows(args, self.samples, self._rows_of))
            out, result = args[0], out
            self._note(func, args, kwargs, out, inherit=False)
            return result
        elif func in MOVES:
            if touches_rows(func, args, kwargs) or self._lies_elsewhere(args[0]):
                self._move(func, args, kwargs, out)
                self._note(func, args, kwargs, out, inherit=False)
                return out
        elif func in SORTS:
            if touches_rows(func, args, kwargs) or self._lies_elsewhere(args[0]):
                self._sort(args[0], out)
                self._note(func, args, kwargs, out, inherit=False)
                return out
        elif func not in REDUCTIONS and not self.record.is_constant(args[0]) and not is_transformed(args[0]):
            rows = self._rows_of(args[0])
            if func in TRANSPOSES:
                self._set_rows(out, transposed_rows(func, args, kwargs, rows, self.samples))
            elif rows is not None:
                self._move(func, args, kwargs, out)
            self._note(func, args, kwargs, out, inherit=False)
            return out
        self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, inherit: bool = True) -> None:
        """Keep what the walk through the graph will ask for."""
        record, inputs = self.record, _tensors((args, kwargs))
        for output in _tensors(out):
            node = output.grad_fn
            if inherit and (self._moved or (node is not None and func in REDUCTIONS)):
                self._set_rows(output, self._inherited(func, args, kwargs, inputs, output))
            if node is None or is_transformed(output):
                if func is torch.eye:
                    record.constants[id(output)] = output
            elif self._is_fixed(inputs):
                record.fixed.add(node)
            elif not self._has_rows(output) or output.shape[:1] != inputs[0].shape[:1]:
                record.places[node] = _place(func)
                if self.values:
                    record.arguments[node] = args
                for t in inputs:
                    if t.requires_grad:
                        record.seen[_edge(t)] = (t, t._version) if self.values else None

    def _read_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Read a call of a loss; return whether that is all there is to note."""
        if is_transformed(out):
            return True
        if self._is_fixed(_tensors((args, kwargs))):
            return False
        call: Call | None
        try:
            call = read_call(func, args, kwargs, out, self.samples, self._rows_of, _edge, self.values, self.keep_graph)
        except Exception as error:  # the step must go on as if nobody had looked; the walk says what was wrong
            call = Call(LOSSES[func].name, "", {}, frozenset(), f"could not be read: {error}")
        if call is not None and call.loss_call is not None:
            self.calls.append(call.loss_call)
        if call is None or out.grad_fn is None:
            return call is not None
        self.record.calls[out.grad_fn] = call
        if call.reduction == "none":
            return False
        self.record.places[out.grad_fn] = _place(func)
        return True

    def _is_fixed(self, inputs: list[Tensor]) -> bool:
        """Return whether a result belongs to no sample, as it depends on parameters, constants and numbers only."""
        return all(self.record.is_constant(t) or (t.dim() == 0 and not t.requires_grad) for t in inputs)

    # Rows.

    def _rows_of(self, tensor: Tensor) -> Rows | None:
        """Return what is known of a tensor's rows beyond the shape rule."""
        found = self._moved.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _set_rows(self, tensor: Tensor, rows: Rows | None) -> None:
        if rows is not None:
            # A weak reference: the trace keeps no activation alive, and finds out if another tensor got the same id.
            self._moved[id(tensor)] = (ref(tensor), rows)
        elif self._moved.pop(id(tensor), None) is None:
            return
        if tensor.grad_fn is not None:
            if rows is not None:
                self.record.moved[_edge(tensor)] = rows
            else:
                self.record.moved.pop(_edge(tensor), None)

    def _has_rows(self, tensor: Tensor) -> bool:
        rows = self._rows_of(tensor) if self._moved else None
        return obeys_shape_rule(tensor.shape, self.samples) if rows is None else not rows.mixed and rows.axis == 0

    def _lies_elsewhere(self, data: Any) -> bool:
        rows = self._rows_of(data) if isinstance(data, Tensor) else None
        return rows is not None and rows.axis != 0

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        data = _tensors(args[0])
        if not data or is_transformed(data[0]) or all(self.record.is_constant(t) for t in data):
            return
        moved = moved_rows(func, args, kwargs, self.samples, self._rows_of)
        for output, rows in zip(_tensors(out), moved, strict=False):
            self._set_rows(output, rows)

    def _sort(self, data: Any, out: Any) -> None:
        found = _tensors(out)
        values = found[0]
        if values.requires_grad:
            self._set_rows(values, Rows(length=values.shape[0], mixed=True) if values.dim() else None)
        elif len(found) == 2 and values.dim() == 1:
            self._move(torch.Tensor.__getitem__, (data, found[1]), {}, values)

    def _inherited(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], output: Tensor
    ) -> Rows | None:
        """Return the rows of a result, from those of what went into it.

        Where there are tensors with a graph, they decide: of labels, masks and tables only the shape is known.
        """
        mixed = Rows(length=output.shape[0], mixed=True) if output.dim() else None
        if func in REDUCTIONS and args and isinstance(args[0], Tensor):
            rows = self._rows_of(args[0])
            axis = 0 if rows is None else rows.axis
            if (rows is None or rows.owner is None) and reduces_samples(args, kwargs, axis):
                # A mean over the batch whose (C,) values look like B rows.
                return mixed if obeys_shape_rule(output.shape, self.samples) else None
        group = [t for t in inputs if not self.record.is_constant(t)]
        with_graph = [t for t in group if t.requires_grad]
        group = with_graph or group
        known = [rows for t in group if (rows := self._rows_of(t)) is not None and rows.fits(output.shape)]
        if not known:
            return None
        first, others = known[0], [t for t in group if self._rows_of(t) is None and t.dim()]
        if first.owner is not None:
            alone = not (with_graph and others) and all(rows.owner == first.owner for rows in known)
            return first if alone else None
        if any(rows is not first and not first.same_as(rows) for rows in known):
            return mixed if with_graph else None
        if not first.covers and any(t.shape[:1] == output.shape[:1] for t in others):
            return mixed if with_graph else None
        return first


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments; torch's pytree takes ten times as long."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)) and value.__class__ is not torch.Size:
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    return []


def _edge(tensor: Tensor) -> Edge:
    """Return the edge of the graph that leads to a tensor with a graph."""
    node = tensor.grad_fn
    return (node, tensor.output_nr) if node is not None else torch.autograd.graph.get_gradient_edge(tensor)[:2]


def _place(func: Any) -> Place:
    """Return a function's name, and the line of the step that called it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and not _is_step(frame.f_code.co_filename):
        frame = frame.f_back
    # T, mT ... are the getters of properties.
    owner = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else None
    name = getattr(func if owner is None else owner, "__name__", str(func)).strip("_")
    return Place(name, frame.f_code, frame.f_lineno)


@lru_cache(1024)
def _is_step(filename: str) -> bool:
    return not filename.startswith(_NOT_THE_STEP)
