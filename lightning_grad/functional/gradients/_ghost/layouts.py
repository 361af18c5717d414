"""Which entries of a tensor belong to which sample of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAK = 1e-6  # share of the largest entry below which a gradient that reaches another sample is rounding


@dataclass(frozen=True)
class Layout:
    """Where the samples lie: in one dimension, alone or folded together with others.

    Args:
        dim: The dimension; None where the whole tensor belongs to the only sample.
        outer: For a dimension that holds several entries of each sample: whether those of one sample are neighbours, as
            in ``x.flatten(0, 1)`` of (B, T, D), or lie B apart, as in that of (T, B, D).
    """

    dim: int | None
    outer: bool = True

    def fits(self, shape: Sequence[int], samples: int) -> bool:
        """Whether a tensor of this shape can hold so many samples in this way."""
        if self.dim is None:
            return samples == 1
        return self.dim < len(shape) and shape[self.dim] > 0 and shape[self.dim] % samples == 0

    def is_ambiguous(self, shape: Sequence[int], samples: int) -> bool:
        """Whether the dimension holds several entries of each sample, so that their order matters."""
        return self.dim is not None and shape[self.dim] != samples

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """Return a tensor, samples first: (B, ...), with B times fewer entries in the dimension that held them."""
        if self.dim is None:
            return tensor.unsqueeze(0)
        each = tensor.shape[self.dim] // samples
        if each == 1:
            return tensor.movedim(self.dim, 0).unsqueeze(self.dim + 1)
        if self.outer:
            return torch.unflatten(tensor, self.dim, (samples, each)).movedim(self.dim, 0)
        return torch.unflatten(tensor, self.dim, (each, samples)).movedim(self.dim + 1, 0)


def candidates(shape: Sequence[int], dims: Iterable[int], samples: int) -> list[Layout]:
    """Return the layouts that a shape allows, the likeliest first: a dimension of B entries, then one of a multiple of B.

    Args:
        shape: That of the tensor.
        dims: The dimensions in which samples may lie.
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
    """Whether a gradient says anything about where its sample lies."""
    return bool(gradient.count_nonzero() > 0) and bool(gradient.isfinite().all())


def belongs_to(layout: Layout, gradient: Tensor, sample: int, samples: int) -> bool:
    """Whether the gradient of one sample's loss lies where a layout puts that sample, and nowhere else."""
    largest = layout.split(gradient, samples).reshape(samples, -1).abs().amax(1)
    others = torch.cat([largest[:sample], largest[sample + 1 :]])
    return others.numel() == 0 or bool(others.max() <= _LEAK * largest[sample])
