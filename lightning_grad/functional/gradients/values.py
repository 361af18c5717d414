"""The values of the terms: rows that the trace kept, times coefficients from the graph's own backward functions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grad.functional.gradients.autograd import Edge, Node, apply_backward, kind_of, output_count
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.record import Place, Record
from lightning_grad.functional.gradients.rows import Rows
from lightning_grad.functional.gradients.walk import HOMOGENEOUS, LINEAR, Cut, Input, Walk
from lightning_grad.functional.plain_tensors import plain_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The contribution of the samples at one cut, or in one call of a loss.

    Attributes:
        place: Place of the call in the step.
        sums: Contribution of each sample to the loss, (B,).
        counts: Sum of the coefficients of each sample's positions, (B,); ``None`` if these are not weights.
        own: Mean over each sample's own positions, scaled like the loss; ``None`` if computed from the other fields.
        covers: Whether each sample of the batch has a row here.
    """

    place: Place
    sums: Tensor
    counts: Tensor | None
    own: Tensor | None
    covers: bool


class Values:
    """The parts of a loss, and its known constants.

    Args:
        loss: The loss.
        walk: The walk through its graph.
        record: The record of the step.
        keep_graph: Whether the values keep their graph.

    Attributes:
        parts: One part for each cut and call.
        constant: The sum of all known constants.
        unknown: Places that add something of unknown value.
        coarsest: The least precise dtype in which a term was reduced.
    """

    def __init__(self, loss: Tensor, walk: Walk, record: Record, keep_graph: bool) -> None:
        self._record = record
        self._keep_graph = keep_graph
        self._dtype = torch.float64 if loss.dtype == torch.float64 else torch.float32
        self._device = loss.device
        self.constant = torch.zeros((), dtype=self._dtype, device=loss.device)
        self.unknown: list[Place] = []
        self.parts: list[Part] = []
        self.coarsest = loss.dtype
        at_cuts, at_calls = self._coefficients(loss, walk)
        with torch.set_grad_enabled(keep_graph):
            for node in walk.calls:
                if node in at_calls:
                    self.parts.append(self._of_call(node, at_calls[node]))
            for cut in walk.cuts:
                wanted = cut.call is None and (keep_graph or not cut.is_second)
                if wanted and (cut.node, cut.index) in at_cuts:
                    self.parts.append(self._of_cut(cut, at_cuts[cut.node, cut.index]))

    def _coefficients(self, loss: Tensor, walk: Walk) -> tuple[dict[tuple[Node, int], Tensor], dict[Node, Tensor]]:
        """Return the derivatives of the loss by the tensor at each cut, *along this edge*, and by each call's value.

        This is a manual backward pass through the nodes of the walk only. If one cut lies below another,
        ``autograd.grad`` would continue below the cuts, through the network. It also differentiates by tensor and not
        by edge: in the loss mean(r) + mean(2 r) it would count r twice, because the second mean depends on r, too.
        """
        at_cuts: dict[tuple[Node, int], Tensor] = {}
        at_calls: dict[Node, Tensor] = {}
        pending: dict[Node, list[Tensor | None]] = {walk.order[0]: [torch.ones_like(loss.detach())]}
        for node in walk.order:
            gradients = pending.pop(node, None)
            if gradients is None:
                continue
            if node not in walk.inputs:
                assert gradients[0] is not None
                self._note_dtype(gradients[0])
                at_calls[node] = gradients[0].to(self._dtype).reshape(())
                continue
            if node in walk.adding:
                self._add_constant(node, walk, gradients[0])
            whole = self._of_whole_reduction(node, gradients[0], walk)
            if whole is not None:
                self._note_dtype(whole)
                at_cuts[node, 0] = whole
                continue
            found = zip(apply_backward(node, gradients), walk.inputs[node], node.next_functions, strict=False)
            for index, (gradient, kind, edge) in enumerate(found):
                if gradient is None:
                    continue
                if kind is Input.ROWS:
                    self._note_dtype(gradient)
                    at_cuts[node, index] = gradient
                elif kind is Input.FIXED and kind_of(node) in LINEAR:  # in other nodes it is a factor
                    self._add_fixed(edge, gradient)
                elif kind is Input.DEEPER:
                    below = pending.setdefault(edge[0], [None] * output_count(edge[0]))
                    before = below[edge[1]]
                    below[edge[1]] = gradient if before is None else before + gradient
        return at_cuts, at_calls

    def _of_whole_reduction(self, node: Node, gradient: Tensor | None, walk: Walk) -> Tensor | None:
        """Return the coefficient of a mean or sum over a whole tensor, expanded without memory: the common case."""
        kind, is_last = kind_of(node), walk.inputs[node] == [Input.ROWS]
        if kind not in ("Mean", "Sum") or not is_last or gradient is None or gradient.numel() != 1:
            return None
        edge = node.next_functions[0]
        tensor = self._record.tensor_at(edge)
        one = gradient.reshape(()) / (tensor.numel() if kind == "Mean" else 1)
        return one.expand(tensor.shape)

    def _note_dtype(self, gradient: Tensor) -> None:
        if torch.finfo(gradient.dtype).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = gradient.dtype

    def _add_fixed(self, edge: Edge, gradient: Tensor) -> None:
        record = self._record
        try:
            self.constant += (record.tensor_at(edge).detach() * gradient).sum().to(self._dtype)
        except (KeyError, InseparableLossError):
            self.unknown.append(record.places.get(edge[0], Place("a function of parameters")))

    def _add_constant(self, node: Node, walk: Walk, gradient: Tensor | None) -> None:
        """Add a summand without a graph to the constant: "+ 3.0", or a detached tensor."""
        args = self._record.arguments.get(node, ())
        values = [a for a in args[:2] if not (isinstance(a, Tensor) and a.requires_grad)]
        kind, kinds = kind_of(node), walk.inputs[node]
        if kind not in ("Add", "Sub", "Rsub") or len(args) != 2 or len(values) != 1 or gradient is None:
            self.unknown.append(self._record.places.get(node, Place(node.name())))
            return
        sign = -1 if kind == "Sub" and kinds[0] is not Input.NO_GRAPH else 1
        self.constant += sign * (gradient * values[0]).sum().to(self._dtype)

    def _of_call(self, node: Node, a: Tensor) -> Part:
        """Return the part of a loss of ``torch.nn.functional``."""
        call = self._record.calls[node]
        assert call.sums is not None
        numerators, denominators = (v.to(self._dtype) for v in call.sums)
        total = denominators.sum()
        if call.reduction == "sum":
            sums, counts, scale = a * numerators, a * denominators, a * total
        else:
            sums, counts, scale = a * numerators / total, a * denominators / total, a
        # This order of operations makes the plain mean bitwise equal to LossCapture's.
        own = scale * (numerators / denominators)
        return Part(self._record.places[node], sums, counts, own, call.covers)

    def _of_cut(self, cut: Cut, a: Tensor) -> Part:
        """Return the part at a cut: rows times coefficients, summed for each sample."""
        rows = cut.rows
        tensor = self._record.tensor_at(cut.edge)
        tensor, a = plain_tensor(tensor), plain_tensor(a)
        values = (tensor if self._keep_graph else tensor.detach()).to(self._dtype)
        if a.dim() and not any(a.stride()):
            one = a.reshape(-1)[:1].to(self._dtype)
            sums = torch.where(one == 0, 0.0, one * self._per_sample(values, rows))
        else:
            # Ignored positions may have any value, such as nan in nanmean.
            sums = self._per_sample(torch.where(a == 0, 0.0, a.to(self._dtype) * values), rows)
        if cut.is_second:
            sums = sums - sums.detach()  # zero value, but the gradient by this factor
        counts = None if cut.is_product else self._counts(cut, a)
        return Part(cut.place, sums, counts, None, rows is None or (rows.covers and rows.owner is None))

    def _counts(self, cut: Cut, a: Tensor) -> Tensor:
        """Return the sum of coefficients of each sample, below the masks and weights that the step multiplies by.

        In ``(l * m).sum() / m.sum()`` every position of ``l * m`` has the same coefficient, and l has the coefficient
        m / sum(m). The coefficients are therefore pushed down through products and means as long as the rows stay the
        same.
        """
        gradients, edge, rows = a, cut.edge, cut.rows
        for _ in range(_DEEPEST):
            node, number = edge
            inputs = [i for i, e in enumerate(node.next_functions) if e[0] is not None]
            if kind_of(node) not in HOMOGENEOUS or len(inputs) != 1 or node in self._record.calls:
                break
            below = node.next_functions[inputs[0]]
            has_rows, rows_below = self._record.rows_at(below)
            if not has_rows or self._record.is_constant_at(below):
                break
            outputs: list[Tensor | None] = [None] * output_count(node)
            outputs[number] = gradients
            found = apply_backward(node, outputs)[inputs[0]]
            if found is None:
                break
            gradients, edge, rows = plain_tensor(found), below, rows_below
        return self._per_sample(gradients.detach().to(self._dtype), rows)

    def _per_sample(self, values: Tensor, rows: Rows | None) -> Tensor:
        """Sum values over the rows of each sample, (B,)."""
        samples = self._record.samples
        if rows is None or (rows.samples is None and rows.owner is None):
            return values.reshape(samples, -1).sum(1)
        zeros = torch.zeros(samples, dtype=self._dtype, device=self._device)
        if rows.owner is not None:
            at, sums = torch.tensor([rows.owner], device=self._device), values.sum().reshape(1)
        else:
            assert rows.samples is not None
            at, sums = rows.samples.to(self._device), values.reshape(rows.length, -1).sum(1)
        return zeros.index_add(0, at, sums)


_DEEPEST = 20  # largest number of nodes between a reduction and the tensor that the masks were multiplied by
