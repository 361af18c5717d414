"""Track the rows of the tensors of one step from call to call."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_grad.functional.gradients import rows as row_rules
from lightning_grad.functional.gradients.autograd import edge_of, is_transformed
from lightning_grad.functional.gradients.record import Record
from lightning_grad.functional.gradients.rows import Rows
from lightning_grad.functional.plain_tensors import tensors_in


class RowTracker:
    """Stores the rows of all tensors that do not follow the shape rule.

    Args:
        record: The record of the step, which gets the rows of tensors with a graph.

    Attributes:
        moved: These rows by the id of the tensor. While it is empty, there is nothing to follow.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self.moved: dict[int, tuple[ref[Tensor], Rows]] = {}

    def of(self, tensor: Tensor) -> Rows | None:
        """Return the rows of a tensor, or None for the shape rule."""
        found = self.moved.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def may_know(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Return True if an argument may have rows that do not follow the shape rule."""
        for value in (*args, *kwargs.values()) if kwargs else args:
            found = self.moved.get(id(value))
            if found is not None:
                if found[0]() is value:
                    return True
                del self.moved[id(value)]  # that tensor was deleted, and this one has its id
            if value.__class__ in (list, tuple) and value and isinstance(value[0], (Tensor, list, tuple)):
                return True
        return False

    def set(self, tensor: Tensor, rows: Rows | None) -> None:
        if rows is not None:
            # A weak reference keeps no activation alive, and shows whether another tensor has got the same id.
            self.moved[id(tensor)] = (ref(tensor), rows)
        elif self.moved.pop(id(tensor), None) is None:
            return
        if tensor.grad_fn is not None:
            if rows is not None:
                self._record.moved[edge_of(tensor)] = rows
            else:
                self._record.moved.pop(edge_of(tensor), None)

    def has_rows(self, tensor: Tensor) -> bool:
        rows = self.of(tensor) if self.moved else None
        if rows is None:
            return row_rules.obeys_shape_rule(tensor.shape, self._record.samples)
        return not rows.mixed and rows.axis == 0

    def lies_elsewhere(self, data: Any) -> bool:
        rows = self.of(data) if isinstance(data, Tensor) else None
        return rows is not None and rows.axis != 0

    def move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record the rows of the results of a function that moves, sorts or selects rows."""
        data, found = tensors_in(args[0]), tensors_in(out)
        if not data or is_transformed(data[0]) or all(self._record.is_constant(t) for t in data):
            return
        if func in row_rules.SORTS:
            values = found[0]
            if values.requires_grad:
                self.set(values, Rows(length=values.shape[0], mixed=True) if values.dim() else None)
                return
            if len(found) != 2 or values.dim() != 1:
                return
            func, args, kwargs = torch.Tensor.__getitem__, (data[0], found[1]), {}
        moved = row_rules.moved_rows(func, args, kwargs, self._record.samples, self._of_part)
        for output, rows in zip(found, moved, strict=False):
            self.set(output, rows)

    def _of_part(self, tensor: Tensor) -> Rows | None:
        """Return a tensor's rows for a call that joins several tensors: rows of a constant belong to no sample."""
        return Rows(mixed=True) if self._record.is_constant(tensor) else self.of(tensor)

    def reshape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        rows = self.of(args[0])
        if func in row_rules.TRANSPOSES:
            self.set(out, row_rules.transposed_rows(func, args, kwargs, rows, self._record.samples))
        elif rows is not None:
            self.move(func, args, kwargs, out)

    def assign(self, args: tuple[Any, ...]) -> None:
        if not self._record.is_constant(args[0]) and not is_transformed(args[0]):
            self.set(args[0], row_rules.assigned_rows(args, self._record.samples, self._of_part))

    def inherited(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], output: Tensor
    ) -> Rows | None:
        """Return the rows of a result from the rows of its inputs.

        Inputs with a graph take priority, because only the shape of labels, masks and tables is known.
        """
        mixed = Rows(length=output.shape[0], mixed=True) if output.dim() else None
        if func in row_rules.REDUCTIONS and args and isinstance(args[0], Tensor):
            rows = self.of(args[0])
            axis = 0 if rows is None else rows.axis
            if (rows is None or rows.owner is None) and row_rules.reduces_samples(args, kwargs, axis):
                # A mean over the batch of shape (C,) may look like B rows.
                return mixed if row_rules.obeys_shape_rule(output.shape, self._record.samples) else None
        if not any(id(t) in self.moved for t in inputs):
            return None
        if func in row_rules.PRODUCTS:
            inputs = inputs[:1]
        group = [(t, self.of(t)) for t in inputs if not self._record.is_constant(t)]
        with_graph = [(t, rows) for t, rows in group if t.requires_grad]
        group, shape = with_graph or group, output.shape
        known = [rows for _, rows in group if rows is not None and rows.fits(shape)]
        if not known:
            return None
        first, others = known[0], [t for t, rows in group if rows is None]
        if first.owner is not None:
            alone = not (with_graph and others) and all(rows.owner == first.owner for rows in known)
            return first if alone else None
        if any(rows is not first and not first.same_as(rows) for rows in known):
            return mixed if with_graph else None
        if any(t.shape[:1] == shape[:1] and row_rules.obeys_shape_rule(t.shape, self._record.samples) for t in others):
            if first.length == self._record.samples and first.covers:
                return None  # x + x[permutation], as in mixup and triplets: the row belongs to its own sample
            if with_graph or not first.covers:
                return mixed if with_graph else None
        return first
