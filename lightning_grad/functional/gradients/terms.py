"""The contributions of the samples to a loss, and weights for them in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.gradients.autograd import Node, edge_of
from lightning_grad.functional.gradients.calls import read_call
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.record import NOWHERE, Place, Record
from lightning_grad.functional.gradients.rows import Rows
from lightning_grad.functional.gradients.values import Part, Values
from lightning_grad.functional.gradients.walk import Key, Walk, entries
from lightning_grad.functional.plain_tensors import plain_tensor

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One of the sums over samples in a loss.

    Attributes:
        place: The call that reduces it, with its line in the step.
        shares: B times the contribution of each sample, (B,).
        own: The mean over each sample's own positions, (B,); see :class:`Terms`.
        counts: Sum of the coefficients of each sample's positions, (B,); ``None`` if these are not weights.
    """

    place: Place
    shares: Tensor
    own: Tensor
    counts: Tensor | None = None

    def __str__(self) -> str:
        return str(self.place)


class Terms:
    r"""The contributions of the samples to the loss of one step; created by :meth:`LossTrace.terms`.

    The step reduces tensors with rows, :math:`r_k`, by linear functions. With :math:`a_k = \partial L / \partial r_k`
    along this edge of the graph, and :math:`P_i` the positions of sample i,

    .. math::
        L = c + \frac{1}{B} \sum_i s_i, \qquad s_i = B \sum_k \sum_{p \in P_i} a_{kp} r_{kp}

    The :math:`s_i` are the *shares*, and c is the *constant*, which belongs to no sample: hand-written weight decay,
    "+ 3.0", or a detached term. Samples with more positions have larger shares. The mean over a sample's own positions,

    .. math::
        o_i = \sum_k \frac{\sum_{p \in P_i} a'_{kp} r'_{kp}}{\sum_{p \in P_i} a'_{kp}} \sum_j \sum_{p \in P_j} a'_{kp}

    is the loss of a batch with only this sample, if the step divides by the number of positions. Here r' and a' are
    taken below masks that the step multiplies by (in the sum of l m, r' is l and a' is m). Both are equal if all
    samples have the same coefficients, as without masks; otherwise a batch of one sample shows which of them is its
    loss. Weights always apply to shares:

    .. math::
        L_w = c + \frac{1}{B} \sum_i w_i s_i

    Attributes:
        samples: B.
        terms: The terms by place; only with values.
        dtype: The least precise dtype in which a term was reduced.
        keys: Keys of the cuts of the loss; equal in all steps of the same code.

    Raises:
        InseparableLossError: From the constructor, if the loss is not such a sum, if this cannot be proved, or if the
            terms do not add up to the loss; from :meth:`weight_`, for learned factors.
    """

    def __init__(
        self,
        loss: Tensor,
        record: Record,
        values: bool = True,
        keep_graph: bool = False,
        like: Terms | None = None,
        check: bool = True,
    ) -> None:
        self.samples = record.samples
        self._loss = plain_tensor(loss).detach()
        walk = Walk(loss.grad_fn, record, None if like is None else like.keys)
        self._walk: Walk | None = walk
        self.keys: frozenset[Key] = frozenset(cut.key for cut in walk.cuts)
        self.terms: tuple[Term, ...] = ()
        self.dtype = loss.dtype
        self._shares: Tensor | None = None
        if values:
            found = Values(loss, walk, record, keep_graph)
            self.dtype = found.coarsest
            self._add_up(found)
            if check:
                self._check(found)

    @property
    def shares(self) -> Tensor:
        r""":math:`s_i`, (B,), float32 or float64; detached unless ``keep_graph``."""
        return self._with_values(self._shares)

    @property
    def own(self) -> Tensor:
        r""":math:`o_i`, (B,); nan if all positions of a sample are ignored.

        If the step returns one loss of ``torch.nn.functional`` unchanged, these are bitwise the losses of
        :class:`~lightning_grad.functional.LossCall`.
        """
        return self._with_values(None if self._shares is None else _sum_of_means([t.own for t in self.terms]))

    @property
    def counts(self) -> Tensor | None:
        """The sum of the coefficients of each sample's positions over all terms, (B,); ``None`` if one is unknown."""
        found = [term.counts for term in self.terms if term.counts is not None]
        return sum(found[1:], found[0]).detach() if found and len(found) == len(self.terms) else None

    @property
    def constant(self) -> Tensor:
        """The part of the loss that belongs to no sample, a scalar tensor."""
        shares = self.shares.detach()
        return self._loss.reshape(()).to(shares.dtype) - shares.mean()

    def _with_values(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise RuntimeError("These terms have no values. Use LossTrace(values=True).")
        return value

    def _add_up(self, found: Values) -> None:
        groups: dict[Any, list[Part]] = {}
        for number, part in enumerate(found.parts):
            # Chunks, or the iterations of a loop over samples, are pieces of one term, because none has all samples.
            groups.setdefault(number if part.covers else part.place, []).append(part)
        self.terms = tuple(self._term(parts) for parts in groups.values())
        # Summed in order without a zero, so that a single term stays bitwise unchanged.
        self._shares = sum((term.shares for term in self.terms[1:]), self.terms[0].shares) if self.terms else None

    def _term(self, parts: list[Part]) -> Term:
        """Combine the parts of one term into its shares and own means."""
        place, sums = parts[0].place, sum((part.sums for part in parts[1:]), parts[0].sums)
        shares = sums * self.samples
        counts = [part.counts for part in parts if part.counts is not None]
        total = sum(counts[1:], counts[0]) if len(counts) == len(parts) else None
        if len(parts) == 1 and parts[0].own is not None:
            own = parts[0].own
        else:
            own = shares if total is None else sums / total * total.sum()
        return Term(place, shares, own, total)

    def _check(self, found: Values) -> None:
        """Raise if the terms do not add up to the loss that the step returned."""
        if found.unknown:
            return  # a summand of unknown value explains any difference, which then counts as the constant
        terms = [term.shares.detach() for term in self.terms]
        scale = sum((t.abs().mean() for t in terms), found.constant.abs()) + self._loss.abs().reshape(())
        difference = (self.constant - found.constant).abs()
        if bool(difference > _TOLERANCES.get(self.dtype, 3e-2) * scale):
            seen = self.shares.detach().mean() + found.constant
            raise NOWHERE.refusal(
                f"The terms that were traced add up to {float(seen):.9g}, but the step returned "
                f"{float(self._loss):.9g}. The loss contains a term that was not traced."
            )

    def weighted_loss(self, weights: Tensor) -> Tensor:
        """Return the value of the weighted loss, for logging; the loss of the step keeps its unweighted value."""
        shares = self.shares.detach()
        return self.constant + (self._checked(weights).to(shares) * shares).mean()

    def weight_(self, weights: Tensor) -> WeightHandle:
        """Weight the samples in every backward pass through the graph of this step.

        The gradients become those of the weighted loss. If all weights are 1, they are bitwise unchanged. Constants are
        not weighted. The forward pass and the value of the loss do not change, and nothing is computed twice.

        Args:
            weights: Weight of each sample, (B,).

        Returns:
            WeightHandle: Call its ``remove()`` to remove the weights.

        Raises:
            InseparableLossError: If a factor with a graph multiplies a term: its gradient would not be weighted.
            ValueError: If the weights are not (B,).
        """
        weights, walk = self._checked(weights), self._walk
        if walk is None:
            raise RuntimeError("These terms were released, so there is no graph to weight. Trace another step.")
        if walk.learned:
            raise walk.learned[0].refusal(
                "multiplies a term by a learned factor, whose own gradient would come from the unweighted loss."
            )
        if self._shares is not None:
            weights = without_ignored(weights, self.own)
        return weight_cuts_(walk, weights)

    def release(self) -> None:
        """Let go of the graph, which lives as long as these terms otherwise; values and ``keys`` stay."""
        self._walk = None

    def _checked(self, weights: Tensor) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != (self.samples,):
            found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"The weights must be a tensor of shape ({self.samples},); got {found}.")
        weights = weights.detach().to(self._loss.device)
        return weights if weights.is_floating_point() else weights.to(torch.float32)


def _sum_of_means(means: list[Tensor]) -> Tensor:
    """Sum means, ignoring nan; nan where all are nan."""
    if len(means) == 1:
        return means[0]
    stacked = torch.stack(means)
    return stacked.nansum(0).masked_fill(stacked.isnan().all(0), float("nan"))


class WeightHandle:
    """Handle of the hooks of one call of :meth:`Terms.weight_`."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove the weights; otherwise they exist as long as the graph."""
        while self._handles:
            self._handles.pop().remove()


def weight_cuts_(walk: Walk, weights: Tensor) -> WeightHandle:
    """Weight the rows of the gradients at the cuts of a walk, in every backward pass."""
    # At the edge, not at the tensor: other uses of the tensor, even in another term, must not be weighted here.
    return _weight_inputs([(cut.node, cut.index, cut.rows) for cut in walk.cuts], weights)


def weight_call_(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor, weights: Tensor
) -> bool:
    """Weight the rows of a call of a loss in every backward pass; return False if this is impossible.

    It is impossible if an argument without rows has a graph, such as learned class weights, whose gradient would not be
    weighted.

    Args:
        func: The loss.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        value: Result of the call.
        weights: Weight of each sample, (B,); the rows of a sample are adjacent and in order.
    """
    value, samples = plain_tensor(value), len(weights)
    if value.grad_fn is None:
        return False
    only = _only_input(args, kwargs, samples)
    found = () if only is None else entries(value.grad_fn, (edge_of(only),))
    if inputs := [(node, index, None) for node, index, _ in found]:
        _weight_inputs(inputs, weights)
        return True
    call = read_call(func, args, kwargs, value, samples, lambda _: None, values=False, keep_graph=False)
    if call is None or call.problem or call.others:
        return False
    # The walk does not end at a loss without reduction, so any other reduction is recorded; the hooks do not depend on
    # it.
    record = Record(samples, {}, calls={value.grad_fn: replace(call, reduction="mean")})
    try:
        weight_cuts_(Walk(value.grad_fn, record), weights)
    except InseparableLossError:
        return False
    return True


def _only_input(args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> Tensor | None:
    """Return the input of a loss if only it has a graph and its rows are a multiple of B, as in nearly all steps."""
    first: Any = args[0] if args else kwargs.get("input")
    if first.__class__ is not Tensor or not first.requires_grad or not first.dim() or not first.numel():
        return None
    others = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad and t is not first]
    return None if others or first.shape[0] % samples else first


def without_ignored(weights: Tensor, losses: Tensor) -> Tensor:
    """Replace nan weights with 0 for samples whose positions are all ignored.

    Such a sample has a loss of nan, so its weight may be nan, too; its gradient is zero.

    Args:
        weights: Weight of each sample, (B,).
        losses: Loss of each sample, (B,).
    """
    return torch.where(weights.isnan() & losses.detach().isnan(), 0.0, weights)


def _weight_inputs(inputs: Iterable[tuple[Node, int, Rows | None]], weights: Tensor) -> WeightHandle:
    """Register hooks that weight the rows of the gradients of some inputs of nodes."""
    by_node: dict[Node, dict[int, Rows | None]] = {}
    for node, index, rows in inputs:
        by_node.setdefault(node, {})[index] = rows
    return WeightHandle([node.register_hook(_weighting(rows, weights)) for node, rows in by_node.items()])


def _weighting(inputs: Mapping[int, Rows | None], weights: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    def hook(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        return tuple(
            gradient if gradient is None or index not in inputs else _weighted(gradient, inputs[index], weights)
            for index, gradient in enumerate(gradients)
        )

    return hook


def _weighted(gradient: Tensor, rows: Rows | None, weights: Tensor) -> Tensor:
    factors = _factors(gradient, rows, weights)
    if gradient.dtype == weights.dtype:
        return gradient * factors
    # Multiply in the wider dtype, and round once.
    return (gradient.to(torch.promote_types(gradient.dtype, weights.dtype)) * factors).to(gradient.dtype)


def _factors(gradient: Tensor, rows: Rows | None, weights: Tensor) -> Tensor:
    """Return the weight of each row of a gradient, in a shape that broadcasts."""
    if rows is not None and rows.owner is not None:
        return weights[rows.owner]
    axis, dims = 0 if rows is None else rows.axis, gradient.dim()
    length = gradient.shape[axis] if dims > axis else 1
    if rows is not None and rows.samples is not None:
        factors = weights[rows.samples.to(weights.device)]
    else:
        factors = weights if length == len(weights) else weights.repeat_interleave(length // len(weights))
    return factors if dims == 1 else factors.reshape([length if dim == axis else 1 for dim in range(dims)])
