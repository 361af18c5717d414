"""What one use of a parameter adds to each sample's gradient of it, in the form in which its norm is cheapest.

All stand for a tensor (B, *shape of the parameter) that is rarely written out: :meth:`squared` gives the squared norms of its
rows, :meth:`dense` writes some of them out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries that a temporary may have on a CPU: larger ones leave the cache and cost page faults
CHUNK_ON_DEVICE = 1 << 25


class Contribution(Protocol):
    """What one use of a parameter adds to each sample's gradient."""

    def squared(self) -> Tensor:
        """Return the squared norm of each sample's gradient, (B,)."""

    def dense(self, start: int, stop: int) -> Tensor:
        """Return the gradients of some samples, (stop - start, ...), in the order of the parameter's entries."""


def chunks(of: Tensor, entries: int) -> Iterator[tuple[int, int]]:
    """Cut the samples of a tensor into ranges, so that a temporary of so many entries a sample stays small."""
    samples = len(of)
    step = max(1, (CHUNK if of.device.type == "cpu" else CHUNK_ON_DEVICE) // max(1, entries))
    return ((start, min(start + step, samples)) for start in range(0, samples, step))


def sum_squares(tensor: Tensor) -> Tensor:
    # One pass over memory; a product followed by a sum, as in vecdot, takes three.
    norms: Tensor = torch.linalg.vector_norm(tensor.reshape(tensor.shape[0], -1), dim=1)
    return norms.square()


@dataclass
class Dense:
    """Gradients that are small enough to be written out.

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

    Their squared norm is :math:`\sum_{rs} (l_{br} \cdot l_{bs}) (r_{br} \cdot r_{bs})`, which is cheaper than the product
    when there are few rows.

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
    """Rows added to a table at given places, as for the weight of an Embedding.

    Args:
        sample: To which sample each row belongs, (N,).
        index: Which row of the table it is added to, (N,).
        rows: (N, D).
        samples: B.
        table: Rows of the table.
    """

    sample: Tensor
    index: Tensor
    rows: Tensor
    samples: int
    table: int

    def squared(self) -> Tensor:
        place = self.sample * self.table + self.index
        ordered = place.sort().values
        # All rows of one place of one sample meet at the first position that the place has in the order.
        sums = torch.zeros_like(self.rows).index_add_(0, torch.searchsorted(ordered, place), self.rows)
        squares = self.rows.new_zeros(self.samples)
        return squares.index_add_(0, ordered // self.table, sum_squares(sums))

    def dense(self, start: int, stop: int) -> Tensor:
        chosen = (self.sample >= start) & (self.sample < stop)
        place = (self.sample[chosen] - start) * self.table + self.index[chosen]
        sums = self.rows.new_zeros((stop - start) * self.table, self.rows.shape[1])
        return sums.index_add_(0, place, self.rows[chosen]).view(stop - start, self.table, -1)

    def times(self, outer: Outer) -> Tensor:
        """Return the inner product with the gradients of a Linear that has the same weight, (B,)."""
        # <e_i x^T, l r^T> = l_i (x . r): one number for each row here and each row there.
        values = (outer.left[self.sample, :, self.index] * self._products(outer.right)).sum(1)
        return values.new_zeros(self.samples).index_add_(0, self.sample, values)

    def _products(self, right: Tensor) -> Tensor:
        if self.rows.shape[0] % self.samples == 0 and self._is_in_order():
            return torch.bmm(self.rows.view(self.samples, -1, self.rows.shape[1]), right.mT).flatten(0, 1)
        return torch.einsum("nd,nrd->nr", self.rows, right[self.sample])

    def _is_in_order(self) -> bool:
        each = self.rows.shape[0] // self.samples
        return torch.equal(self.sample, torch.arange(self.samples, device=self.sample.device).repeat_interleave(each))


@dataclass(frozen=True)
class ConvolutionSettings:
    """How a convolution goes over its input; numbers for each spatial dimension."""

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel."""
        return self.weight[2:]

    @property
    def is_pointwise(self) -> bool:
        """Whether each output sees one pixel."""
        return math.prod(self.kernel) == 1 and not any(self.padding)


@dataclass
class Convolution:
    """Gradients of the weight of a convolution, also a transposed one, of any number of groups.

    Args:
        inputs: (B, M, C, ...): M images of each sample.
        gradients: Those of the outputs, (B, M, O, ...).
        settings: How the convolution goes over its input.
    """

    inputs: Tensor
    gradients: Tensor
    settings: ConvolutionSettings

    def squared(self) -> Tensor:
        samples = self.inputs.shape[0]
        if self._is_odd:
            return torch.cat([sum_squares(self.dense(b, b + 1)) for b in range(samples)])
        return torch.cat([self._products(*chunk) for chunk in chunks(self.inputs, self._entries)])

    def dense(self, start: int, stop: int) -> Tensor:
        pairs = zip(self.inputs[start:stop], self.gradients[start:stop], strict=True)
        return torch.stack([self._backward(images, gradients) for images, gradients in pairs])

    def _backward(self, images: Tensor, gradients: Tensor) -> Tensor:
        """Return the gradient of one sample as autograd computes it."""
        s = self.settings
        weight = images.new_empty(1).expand(s.weight)  # only its shape is read
        padding = list(s.output_padding) or [0] * len(s.kernel)
        arguments = (list(s.stride), list(s.padding), list(s.dilation), s.transposed, padding, s.groups)
        mask = [False, True, False]
        gradient: Tensor = torch.ops.aten.convolution_backward(gradients, images, weight, None, *arguments, mask)[1]
        return gradient

    @property
    def _is_odd(self) -> bool:
        """Whether a transposed convolution leaves pixels at the border that no kernel ends at."""
        pairs = zip(self.settings.output_padding, self.settings.stride, strict=False)
        return any(padding >= stride for padding, stride in pairs)

    @property
    def _scanned(self) -> Tensor:
        """What the kernel goes over; a transposed convolution has the roles of input and output exchanged."""
        return self.gradients if self.settings.transposed else self.inputs

    @property
    def _met(self) -> Tensor:
        """What each position of the kernel is multiplied with."""
        return self.inputs if self.settings.transposed else self.gradients

    @property
    def _entries(self) -> int:
        """Entries of a sample's temporaries."""
        s, few = self.settings, self._is_short
        unfolded = self._scanned[0].numel() * (math.prod(s.kernel) if few else s.kernel[-1]) // s.stride[-1]
        return max(unfolded, math.prod(s.weight), 2 * s.groups * self._positions**2 if few else 0)

    @property
    def _positions(self) -> int:
        return self._met.shape[1] * math.prod(self._met.shape[3:])

    @property
    def _is_short(self) -> bool:
        """Whether there are so few positions that Gram matrices are cheaper than the gradient."""
        rows, columns = self.settings.weight[0] // self.settings.groups, math.prod(self.settings.weight[1:])
        return self._positions * (rows + columns) <= rows * columns

    def _products(self, start: int, stop: int) -> Tensor:
        s, positions = self.settings, self._positions
        met = (
            torch.unflatten(self._met[start:stop], 2, (s.groups, -1)).movedim(2, 1).flatten(0, 1)
        )  # (b G, M, rows, ...)
        left = met.flatten(3).transpose(2, 3).reshape(len(met), positions, -1)
        columns = _columns(self._scanned[start:stop], s, tuple(self._met.shape[3:]))
        if self._is_short:
            squares = Outer(left, torch.cat(list(columns), 2)).squared()
        else:  # each position within the kernel is a part of the weight of its own, so that squares may be added
            squares = sum((sum_squares(torch.bmm(left.mT, part)) for part in columns), left.new_zeros(len(met)))
        return squares.view(stop - start, s.groups).sum(1)


def _columns(scanned: Tensor, settings: ConvolutionSettings, size: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield what the kernel sees, (b * groups, M * positions, columns), the part of each of its lines by itself.

    Unfolding along the last dimension only, with channels last, moves far less memory than ``F.unfold``.

    Args:
        scanned: (b, M, C, ...).
        settings: Those of the convolution.
        size: Number of positions in each dimension.
    """
    s = settings
    groups = torch.unflatten(scanned, 2, (s.groups, -1)).movedim(2, 1).flatten(0, 1)
    if s.is_pointwise:
        for dim, (n, step) in enumerate(zip(size, s.stride, strict=True), start=3):
            groups = groups.narrow(dim, 0, (n - 1) * step + 1)[(slice(None),) * dim + (slice(None, None, step),)]
        pixels = groups.flatten(3).transpose(2, 3)
        yield pixels.reshape(len(groups), -1, pixels.shape[3])
        return
    lines = _unfold_lines(_padded_channels_last(groups, s.padding), s, size[-1])
    for offset in itertools.product(*(range(k) for k in s.kernel[:-1])):
        begins = [i * d for i, d in zip(offset, s.dilation, strict=False)]
        seen = [slice(b, b + (n - 1) * t + 1, t) for b, n, t in zip(begins, size, s.stride, strict=False)]
        part = lines[(slice(None), slice(None), *seen)]
        yield part.reshape(len(part), part.shape[1] * math.prod(size), -1)


def _padded_channels_last(images: Tensor, padding: Sequence[int]) -> Tensor:
    """Return (N, M, ..., C) of (N, M, C, ...), with zeros around, in one copy."""
    last = images.movedim(2, -1)
    if not any(padding):
        return last.contiguous()
    sizes = [size + 2 * p for size, p in zip(last.shape[2:-1], padding, strict=True)]
    padded = last.new_zeros(*last.shape[:2], *sizes, last.shape[-1])
    inside = padded
    for dim, (size, p) in enumerate(zip(last.shape[2:-1], padding, strict=True), start=2):
        inside = inside.narrow(dim, p, size)
    inside.copy_(last)
    return padded


def _unfold_lines(last: Tensor, settings: ConvolutionSettings, positions: int) -> Tensor:
    """Return what each line of the kernel sees, (N, M, ..., positions, kernel * C), of (N, M, ..., pixels, C)."""
    step, spread, channels = settings.stride[-1], settings.dilation[-1], last.shape[-1]
    shape = (*last.shape[:-2], positions, settings.kernel[-1], channels)
    strides = (*last.stride()[:-2], step * channels, spread * channels, 1)
    return last.as_strided(shape, strides).flatten(-2)


def combine(contributions: Sequence[Contribution], like: Tensor) -> Tensor:
    """Return the squared norms of the *sums* of what all uses of a parameter contribute, (B,), as ``like`` is."""
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
    """Return the gradients of some samples, (stop - start, entries)."""
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
