"""Layouts: which entries of a tensor belong to which sample of a batch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAK = 1e-6  # gradients of other samples below this fraction of the largest entry are rounding errors


@dataclass(frozen=True)
class Layout:
    """The dimension of the samples, possibly merged with another dimension.

    Args:
        dim: The dimension of the samples; None if the batch has only one sample.
        outer: For a merged dimension, whether the entries of a sample are adjacent.
            They are adjacent in ``x.flatten(0, 1)`` of (B, T, D), and B apart in that of (T, B, D).
    """

    dim: int | None
    outer: bool = True

    def fits(self, shape: Sequence[int], samples: int) -> bool:
        """Return True if a tensor of this shape can have this layout."""
        if self.dim is None:
            return samples == 1
        return self.dim < len(shape) and shape[self.dim] > 0 and shape[self.dim] % samples == 0

    def is_ambiguous(self, shape: Sequence[int], samples: int) -> bool:
        """Return True if the dimension has several entries per sample, whose order then matters."""
        return self.dim is not None and shape[self.dim] != samples

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """Move the samples to the first dimension: (B, ...), with their old dimension divided by B."""
        if self.dim is None:
            return tensor.unsqueeze(0)
        each = tensor.shape[self.dim] // samples
        if each == 1:
            return tensor.movedim(self.dim, 0).unsqueeze(self.dim + 1)
        if self.outer:
            return torch.unflatten(tensor, self.dim, (samples, each)).movedim(self.dim, 0)
        return torch.unflatten(tensor, self.dim, (each, samples)).movedim(self.dim + 1, 0)


def candidates(shape: Sequence[int], dims: Iterable[int], samples: int) -> list[Layout]:
    """Return the possible layouts of a shape, most likely first: dimensions of size B, then multiples of B.

    Args:
        shape: Shape of the tensor.
        dims: Dimensions that may contain the samples.
        samples: B.

    Example:
        >>> candidates((6, 3, 8), (0, 1), 3)
        [Layout(dim=1, outer=True), Layout(dim=0, outer=True), Layout(dim=0, outer=False)]
    """
    if samples == 1:
        return [Layout(None)]
    fitting = [dim for dim in dims if shape[dim] > 0 and shape[dim] % samples == 0]
    exact = [Layout(dim) for dim in fitting if shape[dim] == samples]
    return exact + [Layout(dim, outer) for dim in fitting if shape[dim] != samples for outer in (True, False)]


def has_mass(gradient: Tensor) -> bool:
    """Return True if a gradient is nonzero and finite, and can therefore show the place of its sample."""
    return gradient.numel() > 0 and 0.0 < float(gradient.abs().max()) < math.inf  # the maximum keeps nan and inf


def belongs_to(layout: Layout, gradient: Tensor, sample: int, samples: int) -> bool:
    """Return True if the gradient of one sample's loss is zero outside the place of that sample in a layout."""
    largest = layout.split(gradient, samples).reshape(samples, -1).abs().amax(1)
    others = torch.cat([largest[:sample], largest[sample + 1 :]])
    return others.numel() == 0 or bool(others.max() <= _LEAK * largest[sample])
