"""Sum the contributions of all uses: as gradients within a parameter, as squared norms between parameters."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grad.functional.gradients._ghost.contributions import Contribution, add_up, chunks, combine, sum_squares
from lightning_grad.functional.gradients._ghost.graph import rows_of_jacobian
from lightning_grad.functional.gradients._ghost.tracer import Source, Use

Place = tuple[int, ...]  # the part of a parameter's memory that a tensor covers, and its order


@dataclass
class _Group:
    """Contributions to the same entries of the same parameters, which must be added as gradients.

    Args:
        uses: Number of contributions to expect.
        is_derived: Whether gradients must be propagated from computed tensors to the parameters.
        parts: Contributions received so far, by the id of the tensor.
    """

    uses: int = 0
    is_derived: bool = False
    parts: dict[int, tuple[Source, list[Contribution]]] = field(default_factory=dict)


class SquaredNorms:
    """The sum of squared norms over all covered parameters.

    Args:
        uses: All uses of the forward pass.
        parameters: The parameters by name.
        like: A tensor (B,) with the dtype and device of the sum.
    """

    def __init__(self, uses: Iterable[Use], parameters: Mapping[str, Tensor], like: Tensor) -> None:
        self._parameters = parameters
        self.total = torch.zeros_like(like)
        self._group_of: dict[int, _Group] = {}
        sources = [source for use in uses for source, _ in use.terms]
        for group in connected(sources):
            self._open(group)

    def _open(self, sources: list[Source]) -> None:
        """Group sources that share parameters: by disjoint parts of a parameter if possible, else all in one group."""
        places = [self._place(source) for source in sources]
        if None in places or not _are_disjoint({place for place in places if place is not None}):
            group = _Group(len(sources), True)
            self._group_of |= {id(source.tensor): group for source in sources}
            return
        groups: dict[Place | None, _Group] = {}
        for source, place in zip(sources, places, strict=True):
            group = groups.setdefault(place, _Group())
            group.uses += 1
            self._group_of[id(source.tensor)] = group

    def _place(self, source: Source) -> Place | None:
        """Return the part of its parameter that a tensor is, or None if it is not a dense part of a single one."""
        tensor, parameter = source.tensor, self._parameters[next(iter(source.roots))]
        if tensor is not parameter and (len(source.roots) > 1 or tensor._base is not parameter):
            return None
        strides = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
        expected = 1
        for stride, size in strides:
            if stride != expected:
                return None
            expected *= size
        order = tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
        return (int(tensor.storage_offset()), tensor.numel(), *order)

    def add(self, source: Source, contribution: Contribution) -> None:
        """Add one contribution."""
        group = self._group_of[id(source.tensor)]
        if group.uses == 1 and not group.is_derived:
            self.total += contribution.squared().to(self.total)
            return
        group.parts.setdefault(id(source.tensor), (source, []))[1].append(contribution)

    def finish(self) -> Tensor:
        """Return the sum, (B,)."""
        for group in {id(group): group for group in self._group_of.values()}.values():
            if group.is_derived:
                self._carry_on(group)
            elif group.parts:
                parts = [contribution for _, part in group.parts.values() for contribution in part]
                self.total += combine(parts, self.total).to(self.total)
        return self.total

    def _carry_on(self, group: _Group) -> None:
        """Propagate gradients of computed tensors to their parameters and add the squared norms, in small chunks."""
        parts = list(group.parts.values())
        names = sorted(frozenset().union(*(source.roots for source, _ in parts)))
        leaves = [self._parameters[name] for name in names]
        entries = sum(source.tensor.numel() for source, _ in parts) + sum(leaf.numel() for leaf in leaves)
        for start, stop in chunks(self.total, entries):
            sums = [leaf.new_zeros(stop - start, *leaf.shape, dtype=self.total.dtype) for leaf in leaves]
            for source, contributions in parts:
                rows = add_up(contributions, start, stop).view(stop - start, *source.tensor.shape)
                for total, gradient in zip(sums, carried(source.tensor, leaves, rows), strict=True):
                    if gradient is not None:
                        total += gradient
            for total in sums:
                self.total[start:stop] += sum_squares(total).to(self.total)


def carried(tensor: Tensor, leaves: list[Tensor], rows: Tensor) -> list[Tensor | None]:
    if tensor.grad_fn is None:  # the tensor is a parameter
        return [rows if leaf is tensor else None for leaf in leaves]
    return rows_of_jacobian(tensor, leaves, rows.to(tensor.dtype))


def connected(sources: list[Source]) -> list[list[Source]]:
    """Group sources that share parameters, directly or through other sources."""
    group_of: dict[str, list[Source]] = {}  # by root
    for source in sources:
        known = {id(group): group for root in source.roots if (group := group_of.get(root)) is not None}
        joined = max(known.values(), key=len, default=[])
        for group in known.values():
            if group is not joined:
                joined += group
        joined.append(source)
        group_of |= {root: joined for member in (joined if len(known) > 1 else [source]) for root in member.roots}
    return list({id(group): group for group in group_of.values()}.values())


def _are_disjoint(places: set[Place]) -> bool:
    ordered = sorted(places)
    return all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(ordered))
