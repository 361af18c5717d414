"""Contributions of one use of a parameter to each sample's gradient, in the form whose norm is cheapest.

Each contribution represents a tensor (B, *shape of the parameter) that is rarely materialized: :meth:`squared` returns
the squared norms of its rows, :meth:`dense` materializes some of them. A :class:`Binding` describes the contributions
of one call of an operation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries of a temporary on a CPU: larger ones do not fit the cache and cause page faults
CHUNK_ON_DEVICE = 1 << 25


class Contribution(Protocol):
    """The contribution of one use of a parameter to each sample's gradient."""

    def squared(self) -> Tensor:
        """Return the squared norm of each sample's gradient, (B,)."""

    def dense(self, start: int, stop: int) -> Tensor:
        """Return the gradients of a range of samples, (stop - start, ...), in the order of the parameter's entries."""


def chunks(of: Tensor, entries: int, on_cpu: int | None = None) -> Iterator[tuple[int, int]]:
    """Split the samples of a tensor into ranges, to limit a temporary with this many entries per sample."""
    samples = len(of)
    step = max(1, ((on_cpu or CHUNK) if of.device.type == "cpu" else CHUNK_ON_DEVICE) // max(1, entries))
    return ((start, min(start + step, samples)) for start in range(0, samples, step))


def sum_squares(tensor: Tensor) -> Tensor:
    # Reads the memory once; a product followed by a sum, as in vecdot, accesses it three times.
    norms: Tensor = torch.linalg.vector_norm(tensor.reshape(tensor.shape[0], -1), dim=1)
    return norms.square()


@dataclass
class Dense:
    """Gradients that are small enough to be materialized.

    Args:
        gradients: (B, ...).
    """

    gradients: Tensor

    def squared(self) -> Tensor:
        return sum_squares(self.gradients)

    def dense(self, start: int, stop: int) -> Tensor:
        return self.gradients[start:stop]


@dataclass
class Outer:
    r"""Sums of outer products, :math:`G_b = \sum_r l_{br} r_{br}^T`, as for the weight of a Linear.

    Their squared norm is :math:`\sum_{rs} (l_{br} \cdot l_{bs}) (r_{br} \cdot r_{bs})`, which is cheaper than the
    product if there are few rows.

    Args:
        left: l, (B, R, P).
        right: r, (B, R, Q).
    """

    left: Tensor
    right: Tensor

    def squared(self) -> Tensor:
        (_, rows, p), q = self.left.shape, self.right.shape[2]
        if rows == 1:
            return sum_squares(self.left) * sum_squares(self.right)
        if rows * (p + q) > p * q:
            return torch.cat([sum_squares(self.dense(*chunk)) for chunk in chunks(self.left, p * q)])
        return torch.cat([self._gram(slice(*chunk)) for chunk in chunks(self.left, 2 * rows * rows)])

    def _gram(self, chunk: slice) -> Tensor:
        left, right = self.left[chunk], self.right[chunk]
        lefts, rights = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
        return (lefts * rights).sum((1, 2))

    def dense(self, start: int, stop: int) -> Tensor:
        return torch.bmm(self.left[start:stop].mT, self.right[start:stop])


@dataclass
class Scattered:
    """Rows added to a table at given indices, as for the weight of an Embedding.

    Args:
        sample: The sample of each row, (N,).
        index: The row of the table that it is added to, (N,).
        rows: (N, D).
        samples: B.
        table: Number of rows of the table.
    """

    sample: Tensor
    index: Tensor
    rows: Tensor
    samples: int
    table: int

    def squared(self) -> Tensor:
        place = self.sample * self.table + self.index
        ordered = place.sort().values
        # Rows with the same place (sample and index) are summed at the first position of that place in the sorted
        # order.
        sums = torch.zeros_like(self.rows).index_add_(0, torch.searchsorted(ordered, place), self.rows)
        squares = self.rows.new_zeros(self.samples)
        return squares.index_add_(0, ordered // self.table, sum_squares(sums))

    def dense(self, start: int, stop: int) -> Tensor:
        chosen = (self.sample >= start) & (self.sample < stop)
        place = (self.sample[chosen] - start) * self.table + self.index[chosen]
        sums = self.rows.new_zeros((stop - start) * self.table, self.rows.shape[1])
        return sums.index_add_(0, place, self.rows[chosen]).view(stop - start, self.table, -1)

    def times(self, outer: Outer) -> Tensor:
        """Return the inner products with the gradients of a Linear that shares the weight, (B,)."""
        # <e_i x^T, l r^T> = l_i (x . r): one number for each pair of rows.
        values = (outer.left[self.sample, :, self.index] * self._products(outer.right)).sum(1)
        return values.new_zeros(self.samples).index_add_(0, self.sample, values)

    def _products(self, right: Tensor) -> Tensor:
        if self.rows.shape[0] % self.samples == 0 and self._is_in_order():
            return torch.bmm(self.rows.view(self.samples, -1, self.rows.shape[1]), right.mT).flatten(0, 1)
        return torch.einsum("nd,nrd->nr", self.rows, right[self.sample])

    def _is_in_order(self) -> bool:
        each = self.rows.shape[0] // self.samples
        return torch.equal(self.sample, torch.arange(self.samples, device=self.sample.device).repeat_interleave(each))


def combine(contributions: Sequence[Contribution], like: Tensor) -> Tensor:
    """Return the squared norms of the *sums* of all contributions to a parameter, (B,), in chunks over ``like``."""
    if len(contributions) == 1:
        return contributions[0].squared()
    outers = [each for each in contributions if isinstance(each, Outer)]
    tables = [each for each in contributions if isinstance(each, Scattered)]
    if len(outers) + len(tables) == len(contributions):
        outer, table = _joined(outers), _scattered(tables)
        if outer is None or table is None:
            return (outer or table or contributions[0]).squared()
        return outer.squared() + table.squared() + 2 * table.times(outer)
    entries = contributions[0].dense(0, 1).numel()
    return torch.cat([sum_squares(add_up(contributions, *chunk)) for chunk in chunks(like, entries)])


def add_up(contributions: Sequence[Contribution], start: int, stop: int) -> Tensor:
    """Sum the gradients of a range of samples over all contributions, (stop - start, entries)."""
    total = contributions[0].dense(start, stop).flatten(1)
    for contribution in contributions[1:]:
        total = total + contribution.dense(start, stop).flatten(1)
    return total


def _joined(outers: list[Outer]) -> Outer | None:
    if not outers:
        return None
    return Outer(torch.cat([o.left for o in outers], 1), torch.cat([o.right for o in outers], 1))


def _scattered(tables: list[Scattered]) -> Scattered | None:
    if len(tables) < 2:
        return tables[0] if tables else None
    sample, index, rows = (torch.cat([getattr(t, name) for t in tables]) for name in ("sample", "index", "rows"))
    return Scattered(sample, index, rows, tables[0].samples, tables[0].table)


Rows = Callable[[Tensor], Tensor]  # moves the samples to the first dimension, and converts to the dtype of norms
Term = Callable[[Tensor, Rows], Contribution]  # maps the gradient of the output to a contribution


@dataclass(frozen=True)
class Binding:
    """How one call of an operation depends on arguments that may be parameters.

    Args:
        terms: Each such argument, with the function that computes its contribution.
        dims: Function from the shape of the output to the dimensions that may contain the samples.
        kept: Other tensors that the contributions need; they must not change before.
        aliases: Whether the output shares memory with the argument.
        call: Faster replacement of the operation for constant parameters, if any.
    """

    terms: Sequence[tuple[Tensor, Term]]
    dims: Callable[[Sequence[int]], Sequence[int]]
    kept: Sequence[Tensor] = ()
    aliases: bool = False
    call: Callable[..., Tensor] | None = None


def all_but(last: int) -> Callable[[Sequence[int]], Sequence[int]]:
    return lambda shape: range(len(shape) - last)


def first(shape: Sequence[int]) -> Sequence[int]:
    return range(min(1, len(shape)))


def given(*terms: tuple[Tensor | None, Term]) -> list[tuple[Tensor, Term]]:
    return [(tensor, term) for tensor, term in terms if tensor is not None]


def flat(tensor: Tensor, rows: Rows) -> Tensor:
    """Reshape a tensor to (B, R, features)."""
    split = rows(tensor)
    return split.reshape(split.shape[0], -1, split.shape[-1])


def sum_of_rows(gradient: Tensor, rows: Rows) -> Contribution:
    return Dense(flat(gradient, rows).sum(1))


def side_by_side(split: Tensor) -> Tensor:
    """Make the channels of all samples those of one: (B, M, C, ...) to (M, B C, ...)."""
    return split.transpose(0, 1).flatten(1, 2)


def per_channel(split: Tensor) -> Tensor:
    """Sum (B, M, C, ...) to (B, C)."""
    return split.flatten(3).sum((1, 3)) if split.dim() > 3 else split.sum(1)
