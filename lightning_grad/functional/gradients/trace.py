"""Trace a step: record which rows belong to which sample, and what is reduced to the loss."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from lightning_grad.functional.gradients.autograd import Node, edge_of, is_transformed
from lightning_grad.functional.gradients.calls import Call, read_call
from lightning_grad.functional.gradients.follow import RowTracker
from lightning_grad.functional.gradients.loss_functions import LOSSES, LossCall, dropped_weight
from lightning_grad.functional.gradients.record import Record, place_of
from lightning_grad.functional.gradients.rows import (
    ADDITIONS,
    MOVES,
    REDUCTIONS,
    RESHAPES,
    SORTS,
    TRANSPOSES,
    touches_rows,
)
from lightning_grad.functional.gradients.terms import Terms
from lightning_grad.functional.plain_tensors import NO_TENSORS, on_plain_tensors, tensors_in

_ASSIGNMENT = torch.Tensor.__setitem__
_SPECIAL = frozenset([*LOSSES, *MOVES, *RESHAPES, *TRANSPOSES, *REDUCTIONS, *SORTS, _ASSIGNMENT, torch.eye])
_OFTEN_STILL = frozenset([*RESHAPES, torch.Tensor.__getitem__])


class LossTrace(TorchFunctionMode):
    r"""Context around a training step that separates its loss into the losses of the samples.

    The step may compute its loss with functions of ``torch.nn.functional``, by hand, or both, as long as the loss is a
    sum of means (or sums) over samples, plus constants:

    .. math::
        L = c + \frac{1}{B} \sum_i s_i

    The results of the step are bitwise unchanged. Afterwards :meth:`terms` walks the autograd graph from the loss to
    the tensors with rows. If it cannot prove that the loss is such a sum, it raises an error with function and line.

    Args:
        samples: B, the number of samples in the batch.
        values: Keep the data for values; not needed for weights alone.
            It keeps a reference to each reduced tensor until the trace is deleted, and computes the losses of
            ``torch.nn.functional`` again with ``reduction="none"``.
        keep_graph: Keep the graph of the values, so that they can be differentiated.
        constants: Tensors that belong to no sample, in addition to parameters, such as ``module.buffers()``.

    Attributes:
        calls: The calls of losses of ``torch.nn.functional`` that :class:`~lightning_grad.functional.LossCapture` would
            keep, in order; only with ``values``.

    The sample of a row follows from the shape: a tensor with k B rows has them in order. The trace also follows steps
    that move rows by indexing, concatenating, splitting, repeating or transposing. A shape can match by coincidence.
    Therefore run a new step twice in eval mode, the second time with the samples in a different order, and check that
    ``shares`` has that order, too. Then pass these terms as ``like`` to :meth:`terms` in later steps.

    Cost: no host sync, except if rows are moved by an index on a GPU. Functions compiled by ``torch.compile`` run as
    usual, and the trace does not see inside them; a loss computed inside one is rejected.

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
            raise ValueError(f"samples must be at least 1; got {samples}.")
        self.samples = samples
        self.values = values
        self.keep_graph = keep_graph
        self.calls: list[LossCall] = []
        self._record = Record(samples, {id(tensor): tensor for tensor in constants})
        self._rows = RowTracker(self._record)

    @on_plain_tensors
    def terms(self, loss: Tensor, like: Terms | None = None, check: bool = True) -> Terms:
        """Return the contributions of the samples to the loss of the step.

        Call it before ``backward``, which frees the graph.

        Args:
            loss: The loss that the step returned, one number with its graph.
            like: Terms of an earlier step for which shape coincidences were ruled out.
                This step is cut at the same places, even if shapes alone suggest others.
            check: Compare the sum of the terms with the loss, which costs one host sync.

        Raises:
            InseparableLossError: If the loss is not such a sum, or this cannot be proved.
            ValueError: If the loss is not one number that requires grad.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
            found = type(loss).__name__
            if isinstance(loss, Tensor):
                found = f"a tensor {tuple(loss.shape)}{'' if loss.requires_grad else ' that does not require grad'}"
            raise ValueError(f"The loss of a step must be one number that requires grad; got {found}.")
        return Terms(loss, self._record, self.values, self.keep_graph, like, check)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Runs for every torch function of the step. Nearly all of them must return early, or the trace would be slow.
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func in _SPECIAL:
            return self._special(func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        if out.__class__ is not Tensor:
            if out.__class__ in NO_TENSORS:
                return out
        elif not self._rows.moved or not self._rows.may_know(args, kwargs):
            if not out.requires_grad:
                return out
            shape = out.shape
            first = args[0] if args else None
            # Rows in, rows out. Parameters need a closer check: if W has k B rows, W**2 has rows by coincidence.
            if shape and shape[0] and not shape[0] % self.samples and first.__class__ is Tensor:
                before = first.shape
                if before and before[0] == shape[0] and not self._record.is_constant(first):
                    return out
        self._note(func, args, kwargs or {}, out)
        return out

    # torch disables the mode while these methods run, so calls made in them are not intercepted again.

    def _special(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that moves or reduces rows, or a loss, and record the rows of its result."""
        if func in LOSSES:
            kwargs = {**kwargs, **dropped_weight(func, kwargs)}
        out = func(*args, **kwargs)
        if out.__class__ is Tensor:
            if func in _OFTEN_STILL and self._stays(func, args, kwargs, out):
                return out
            if func in TRANSPOSES and self._is_transposed(func, args, kwargs, out):
                return out
        self._follow(func, args, kwargs, out)
        return out

    def _stays(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Return True if rows by the shape rule are certainly not moved, as for attention heads or x[:, 0].

        This is a cheap check: False means that a closer look is needed.
        """
        data: Any = args[0] if args else None
        if data.__class__ is not Tensor or self._record.is_constant(data):
            return False
        if self._rows.moved and self._rows.may_know(args, kwargs):
            return False
        shape, before = out.shape, data.shape
        if not shape or not before or shape[0] != before[0] or not shape[0] or shape[0] % self.samples:
            return False
        return func in RESHAPES or not touches_rows(func, args, kwargs)

    def _is_transposed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Record the rows of a transposed plain tensor, as in every attention layer; return False for other tensors."""
        data: Any = args[0] if args else None
        if data.__class__ is not Tensor or self._record.is_constant(data) or is_transformed(data):
            return False
        self._rows.reshape(func, args, kwargs, out)
        node = out.grad_fn
        if node is not None and self._begins_terms(func, data, out):
            self._keep(node, func, (data,))
        return True

    def _begins_terms(self, func: Any, data: Tensor, out: Tensor) -> bool:
        """Return True if the walk may reach a result: it has no rows, or other rows than its input."""
        return (
            not self._rows.has_rows(out)
            or out.shape[:1] != data.shape[:1]
            or (func in TRANSPOSES and out.dim() == 2)  # (T, B) with T = B; proven terms (`like`) are cut above it
        )

    def _keep(self, node: Node, func: Any, inputs: Sequence[Tensor]) -> None:
        """Record where a result was computed, and from which tensors."""
        record = self._record
        record.places[node] = place_of(func)
        for t in inputs:
            if t.requires_grad and t.__class__ is not Parameter:
                record.seen[edge_of(t)] = (t, t._version) if self.values else None

    # On plain tensors: our own calls on a tensor subclass would go through its class, which may reject or count them.
    @on_plain_tensors
    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record the rows of the results of a special function, and read calls of losses."""
        if func in LOSSES:
            if not self._read_call(func, args, kwargs, out):
                self._note(func, args, kwargs, out)
            return
        args, kwargs = _by_position(args, kwargs)
        data: Any = args[0] if args else None
        is_followed = False
        if func is _ASSIGNMENT:
            self._rows.assign(args)
            out, is_followed = data, True
        elif func in MOVES or func in SORTS:
            is_followed = touches_rows(func, args, kwargs) or self._rows.lies_elsewhere(data)
            if is_followed:
                self._rows.move(func, args, kwargs, out)
        elif func not in REDUCTIONS and isinstance(data, Tensor):
            is_followed = not self._record.is_constant(data) and not is_transformed(data)
            if is_followed:
                self._rows.reshape(func, args, kwargs, out)
        self._note(func, args, kwargs, out, inherit=not is_followed)

    @on_plain_tensors
    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, inherit: bool = True) -> None:
        """Record what the walk through the graph needs to know about a call."""
        record, inputs = self._record, tensors_in((args, kwargs))
        for output in tensors_in(out):
            node = output.grad_fn
            if inherit and (self._rows.moved or (node is not None and func in REDUCTIONS)):
                self._rows.set(output, self._rows.inherited(func, args, kwargs, inputs, output))
            if node is None or is_transformed(output):
                if func is torch.eye:
                    record.constants[id(output)] = output
            elif self._is_fixed(inputs):
                record.fixed.add(node)
            elif self._begins_terms(func, inputs[0], output):
                self._keep(node, func, inputs)
                if self.values and func in ADDITIONS:
                    record.arguments[node] = args

    def _read_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Read a call of a loss; return False if it must also be recorded like any other function."""
        if is_transformed(out):
            return True
        if self._is_fixed(tensors_in((args, kwargs))):
            return False
        call: Call | None
        try:
            call = read_call(func, args, kwargs, out, self.samples, self._rows.of, self.values, self.keep_graph)
        except Exception as error:  # observing must not break the step; the walk reports the error later
            call = Call(LOSSES[func].name, "", {}, frozenset(), f"could not be read: {error}")
        if call is not None and call.loss_call is not None:
            self.calls.append(call.loss_call)
        if call is None or out.grad_fn is None:
            return call is not None
        self._record.calls[out.grad_fn] = call
        if call.reduction == "none":
            return False
        self._record.places[out.grad_fn] = place_of(func)
        return True

    def _is_fixed(self, inputs: list[Tensor]) -> bool:
        """Return True if a result belongs to no sample: it depends on parameters, constants and numbers only."""
        return all(self._record.is_constant(t) or (t.dim() == 0 and not t.requires_grad) for t in inputs)


def _by_position(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the first one passed by position."""
    if args:
        return args, kwargs
    name = next((name for name in ("input", "tensors", "self") if name in kwargs), None)
    if name is None:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
