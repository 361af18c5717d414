"""A quantized weight: its values on the grid, and the weights that annealing holds fixed.

Used only by :class:`lightning_grad.callbacks.QuantizationAwareTraining`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from typing_extensions import override

from lightning_grad.core import FoundWeight, ViewedWeight
from lightning_grad.functional import (
    near_boundary,
    quantize_weight,
    quantized_values,
    read_quantized_weight,
    round_through,
)
from lightning_grad.functional.gradients.shards import as_shard, as_used, on_shard
from lightning_grad.functional.gradients.tensor_lists import is_sharded, shards, whole
from lightning_grad.functional.quantization.fake_quantization import joined_values
from lightning_grad.functional.quantization.grids import Quantizer
from lightning_grad.utilities.parameters import clean_name


@dataclass(frozen=True)
class Grid:
    """The grid of a weight.

    Args:
        bits: Bits of a weight; ``None`` leaves it as it is.
        quantizer: Name of the grid.
        hadamard: Whether the integers are in the basis of a Hadamard transform.
        dim: Dimension of the output channels.
    """

    bits: int | None
    quantizer: Quantizer
    hadamard: bool
    dim: int

    @property
    def format(self) -> dict[str, Any]:
        """The grid in types that a checkpoint may hold; the arguments of ``quantize_weight``."""
        return {"bits": self.bits, "quantizer": self.quantizer, "dim": self.dim, "hadamard": self.hadamard}

    def __str__(self) -> str:
        basis = " in a Hadamard basis" if self.hadamard else ""
        return "not quantized" if self.bits is None else f"{self.bits}-bit {self.quantizer}{basis}"


class GridWeight(ViewedWeight):
    """A dense parameter and its values on a grid.

    The values are computed once after each optimizer step, and all uses in a step share them.

    Args:
        found: The weight.
        grid: Its grid.
    """

    def __init__(self, found: FoundWeight, grid: Grid) -> None:
        super().__init__(found)
        self.grid = grid
        self.is_on = False
        self._values: Tensor | None = None
        self._mask: Tensor | None = None

    def show(self, values: Tensor | None, mask: Tensor | None = None) -> None:
        """Use other values from now on; ``None`` for those of the weight itself."""
        self.is_on = values is not None
        self._values, self._mask = values, mask

    @override
    def value(self, weight: Tensor) -> Tensor:
        if self._values is None:
            return weight
        mask = None if self._mask is None else as_used(self._mask, weight)
        return round_through(weight, as_used(self._values, weight), mask, self.grid.dim, self.grid.hadamard)

    @override
    def stored(self, weight: Tensor) -> Tensor:
        grid = self.grid
        if not self.is_on or grid.bits is None:
            return weight
        return self._rounded(weight)[0]

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = self.grid
        assert grid.bits is not None
        (own,) = shards([weight])
        values, mask = quantized_values(own, grid.bits, grid.quantizer, grid.dim, grid.hadamard)
        if not is_sharded(weight):
            return values, mask
        return as_shard(values, weight), None if mask is None else as_shard(mask, weight, rows_along=grid.dim)

    def show_rounded(self) -> None:
        """Use the rounded values of the current weight from now on."""
        self.show(*self._rounded(self.incoming))

    @property
    @override
    def passes_gradient(self) -> bool:
        return self.grid.bits is None or self.grid.quantizer != "quest"

    @property
    def levels(self) -> Tensor:
        """Integers of the current weight; of a sharded one, of this rank's shard."""
        assert self.grid.bits is not None
        (own,) = shards([self.incoming])
        return quantize_weight(own, **self.grid.format).integers

    def squared_error(self) -> tuple[Tensor, Tensor]:
        """Return the sum of the squared rounding errors, and that of the squared weights."""
        incoming = self.incoming.float()
        values = incoming if self._values is None else self._values
        return whole((values - incoming).square().sum()), whole(incoming.square().sum())

    def near_boundary(self, width: float) -> Tensor:
        """Return where a weight lies near a boundary between two levels."""
        assert self.grid.bits is not None
        bits, quantizer, dim = self.grid.bits, self.grid.quantizer, self.grid.dim
        return on_shard(lambda own: near_boundary(own, bits, quantizer, dim, width), self.incoming)

    @override
    def why_not_after(self, earlier: ViewedWeight) -> str:
        if not earlier.makes_zeros or self.grid.bits is None or self.grid.quantizer == "ste":
            return ""
        return (
            f"{self.found.display_name} cannot quantize {clean_name(self.name)} with quantizer={self.grid.quantizer!r}, "
            f"because {earlier.found.display_name} makes it {earlier.found.effect} ({earlier}) and that grid has no "
            "level 0. Use quantizer='ste', or separate them with include= or exclude=."
        )

    @property
    @override
    def signature(self) -> list[str | int]:
        grid = self.grid
        return [0 if grid.bits is None else grid.bits, grid.quantizer, int(grid.hadamard), grid.dim]

    @override
    def __str__(self) -> str:
        return str(self.grid)


def follow(weights: Sequence[GridWeight], is_on: bool) -> None:
    """Turn the grids of weights on or off, and compute their values again."""
    joined: dict[int, list[GridWeight]] = {}
    for weight in weights:
        grid = weight.grid
        if not is_on or grid.bits is None:
            weight.show(None)
        elif grid.quantizer == "ste" and not is_sharded(weight.parameter):
            joined.setdefault(grid.bits, []).append(weight)
        else:
            weight.show_rounded()
    for bits, some in joined.items():
        values = joined_values([weight.incoming for weight in some], bits, [weight.grid.dim for weight in some])
        for weight, its in zip(some, values, strict=True):
            weight.show(its)


def dimension_of_outputs(found: FoundWeight) -> int | None:
    """Return the dimension of the output channels; ``None`` if the layer's layout is unknown and no pattern names it."""
    if isinstance(found.module, _ConvTransposeNd):
        return 1
    dim = found.output_dimension()
    return 0 if dim is None and found.is_spelled else dim


class HeldWeights:
    """Confidence-guided annealing: holds the weights fixed that are far from a boundary between two levels.

    Args:
        width: Largest distance of a weight that trains from a boundary, in steps of the grid.
    """

    def __init__(self, width: float) -> None:
        self._width = width
        self._held: list[tuple[GridWeight, Tensor, Tensor]] = []

    @torch.no_grad()
    def hold(self, weights: Sequence[GridWeight]) -> None:
        """Zero the gradients of confident weights and keep their values, before an optimizer step."""
        for weight in weights:
            confident = ~weight.near_boundary(self._width)
            self._held.append((weight, confident, weight.parameter.detach().clone()))
            gradient = weight.parameter.grad
            if gradient is not None and gradient.is_sparse:
                dense = gradient.to_dense().masked_fill_(confident, 0.0)
                weight.parameter.grad = dense.to_sparse(gradient.sparse_dim())
            elif gradient is not None:
                # Not a product: an infinite gradient would become NaN.
                gradient.masked_fill_(confident, 0.0)

    @torch.no_grad()
    def restore(self, weights: Sequence[GridWeight]) -> None:
        """Restore the confident weights, which momentum and weight decay have moved."""
        stepped = set(map(id, weights))
        for weight, confident, before in self._held:
            if id(weight) in stepped:
                weight.parameter.copy_(torch.where(confident, before, weight.parameter))
        self._held = [held for held in self._held if id(held[0]) not in stepped]

    def drop(self, weights: Sequence[GridWeight]) -> None:
        """Drop what a step left that did not happen, such as one that a GradScaler skipped."""
        skipped = set(map(id, weights))
        self._held = [held for held in self._held if id(held[0]) not in skipped]


def off_the_grid(module: nn.Module, formats: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of a module's weights that do not lie on their grids.

    Weights in a Hadamard basis cannot be checked exactly and are skipped.

    Args:
        module: The module.
        formats: Formats of the weights by name, from :attr:`Grid.format`.
    """
    present = {clean_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    found = []
    for name, form in formats.items():
        weight = present.get(name)
        if weight is None or form["hadamard"] or weight.dtype not in (torch.float32, torch.float64):
            continue
        try:
            read_quantized_weight(weight, form["bits"], form["quantizer"], form["dim"])
        except ValueError:
            found.append(name)
    return found
