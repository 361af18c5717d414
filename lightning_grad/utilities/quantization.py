"""Report which weights of a module lie on a grid of few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_grad.functional import QuantizedTensor, integer_range, read_quantized_weight
from lightning_grad.functional.quantization.grids import MOST_BITS, Quantizer, weight_rows
from lightning_grad.utilities.parameters import clean_name, named_owners, selects
from lightning_grad.utilities.reporting import format_table
from lightning_grad.utilities.weight_axes import output_dimension


@dataclass(frozen=True)
class LayerQuantization:
    """The grid of one weight, from :func:`quantization_report`.

    Args:
        name: Name of the parameter.
        shape: Shape of the parameter.
        levels: Largest number of different values in an output channel.
        quantized: Integers and scales; ``None`` if the weight lies on no grid of at most 8 bits.
        error: Root mean square of the rounding error, relative to that of the weight before it was rounded; ``None`` if
            that is not known.
    """

    name: str
    shape: tuple[int, ...]
    levels: int
    quantized: QuantizedTensor | None
    error: float | None

    @property
    def bits(self) -> int | None:
        """Bits of the smallest grid that holds the weight."""
        return None if self.quantized is None else self.quantized.bits

    @property
    def saturated(self) -> float | None:
        """Share of the entries on the lowest or the highest level of their grid."""
        if self.quantized is None:
            return None
        low, high = integer_range(self.quantized.bits, self.quantized.quantizer)
        integers = self.quantized.integers
        return float(((integers == low) | (integers == high)).float().mean())


Report = Sequence[LayerQuantization] | Mapping[str, QuantizedTensor] | Mapping[str, Mapping[str, Any]]
"""The grids of a module's weights: from :func:`quantization_report`, :func:`round_weights`, or ``formats`` of a callback."""


def quantization_report(
    module: nn.Module,
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    include: Sequence[str] | None = None,
    verbose: bool = True,
) -> list[LayerQuantization]:
    """Report the bits, levels and rounding error of every weight with two or more dimensions.

    Works on any module, however it was trained: the grid is found from the values. Each output channel has its own scale.
    Weights in a Hadamard basis lie on no grid of their layer. During a fit, the report is about the weights that a
    checkpoint would contain, and the error is that of the trained weights.

    Args:
        module: Any module.
        reference: The module, or its state dict, before its weights were rounded, for the error.
        include: Name patterns of the parameters to report; ``None`` reports all.
        verbose: Also print the table.

    Returns:
        list[LayerQuantization]: One row per weight, in the order of the module. Exporters take it as ``report``.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.5, -1.5, 0.0, 1.5]])
        >>> rows = quantization_report(nn.Sequential(layer))
        layer     shape  bits  levels  error  saturated
        0.weight  1x4    3     4       -      50.0 %
    """
    stored, rows = module.state_dict(), []
    known = reference.state_dict() if isinstance(reference, nn.Module) else dict(reference or {})
    before = {clean_name(name): weight for name, weight in known.items()}
    for name, owner, attribute in named_owners(module):
        weight = stored.get(name)
        if weight is None or weight.ndim < 2 or not weight.is_floating_point() or not selects(name, include):
            continue
        dim = channel_dimension(owner, attribute)
        dense = before.get(clean_name(name), owner._parameters[attribute] if reference is None else None)
        levels = most_levels(weight, dim)
        found = find_grid(weight, dim, levels)
        rows.append(LayerQuantization(clean_name(name), tuple(weight.shape), levels, found, _error(weight, dense)))
    if verbose:
        print(format_table([_cells(row) for row in rows], ["layer", "shape", "bits", "levels", "error", "saturated"]))
    return rows


def channel_dimension(owner: nn.Module, attribute: str) -> int:
    """Return the dimension of the output channels of a weight."""
    return 1 if isinstance(owner, _ConvTransposeNd) else output_dimension(owner, attribute) or 0


def most_levels(weight: Tensor, dim: int = 0) -> int:
    """Return the largest number of different values in an output channel.

    Example:
        >>> most_levels(torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]]))
        2
    """
    rows = weight_rows(weight, dim).sort(-1).values
    return int((rows.diff(dim=-1) != 0).sum(-1).max()) + 1 if rows.numel() else 0


def find_grid(weight: Tensor, dim: int = 0, levels: int | None = None) -> QuantizedTensor | None:
    """Return the integers and scales of a weight on the smallest grid that holds it, or ``None``.

    Args:
        weight: Weight of two or more dimensions.
        dim: Dimension of the output channels.
        levels: Result of :func:`most_levels`, if it is known.

    Example:
        >>> find_grid(torch.tensor([[0.5, -1.5, 0.5]])).bits
        2
        >>> find_grid(torch.randn(4, 300)) is None
        True
    """
    levels = most_levels(weight, dim) if levels is None else levels
    if weight.dtype not in (torch.float32, torch.float64) or not levels:
        return None
    grids: list[tuple[int, Quantizer]] = [(b, q) for b in range(1, MOST_BITS + 1) for q in ("ste", "statsq")]
    for bits, quantizer in grids:
        if levels <= 2**bits - (quantizer == "ste") and (bits > 1 or quantizer != "ste"):
            try:
                return read_quantized_weight(weight, bits, quantizer, dim)
            except ValueError:
                continue
    return None


def _error(weight: Tensor, dense: Tensor | None) -> float | None:
    if dense is None or torch.equal(dense, weight):
        return None
    exact = dense.detach().double()
    return float((weight.double() - exact).norm() / exact.norm())


def _cells(row: LayerQuantization) -> list[str]:
    shape = "x".join(map(str, row.shape))
    error = "-" if row.error is None else f"{100 * row.error:.2f} %"
    saturated = "-" if row.saturated is None else f"{100 * row.saturated:.1f} %"
    return [row.name, shape, str(row.bits or "float"), str(row.levels), error, saturated]


def quantized_weights(module: nn.Module, report: Report, needed_by: str) -> dict[str, QuantizedTensor]:
    """Return integers and scales of the weights in a report, after comparing them with the module's weights.

    A tied weight is returned once, with its first name.

    Args:
        module: The module, after the fit.
        report: Grids of its weights.
        needed_by: Name of the exporter, for errors.

    Raises:
        ValueError: If the report names no grid, a weight is not the module's, differs from it or is not in float32, or its
            integers are in a Hadamard basis.
    """
    named = {clean_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    given: Mapping[str, Any] = report if isinstance(report, Mapping) else {row.name: row.quantized for row in report}
    found = {}
    for name, grid in given.items():
        if grid is None:
            continue
        if name not in named:
            raise ValueError(f"{needed_by}: the report names {name!r}, which the module does not have.")
        if (grid.block > 1) if isinstance(grid, QuantizedTensor) else grid.get("hadamard"):
            raise ValueError(
                f"{needed_by} writes integers of the layer, but {name} has integers only in a Hadamard basis, which would "
                "need a transform of the inputs at run time. Train with QuantizationAwareTraining(hadamard=False)."
            )
        weight = named[name].detach()
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{needed_by} needs weights in float32, but {name} is {weight.dtype}. Train in float32 or with "
                "precision='bf16-mixed', or call module.float() and then round_weights."
            )
        found[first[id(named[name])]] = _matching(name, weight, grid, needed_by)
    if not found:
        raise ValueError(
            f"{needed_by}: no weight of the report lies on a grid of at most 8 bits. Train with QuantizationAwareTraining "
            "or LearnedRounding, and export the module after the fit."
        )
    return found


def _matching(name: str, weight: Tensor, grid: Any, needed_by: str) -> QuantizedTensor:
    if not isinstance(grid, QuantizedTensor):
        try:
            return read_quantized_weight(weight, grid["bits"], grid["quantizer"], grid["dim"])
        except ValueError as error:
            raise ValueError(f"{needed_by}: {name} is not on the grid of the report. {error}") from error
    values = grid.dequantize().to(weight.device, weight.dtype)
    if values.shape != weight.shape or not torch.equal(values, weight):
        raise ValueError(
            f"{needed_by}: {name} differs from the report. Make the report from this module, or load the weights that it "
            "was made from."
        )
    return grid


def int8_grid(name: str, grid: QuantizedTensor, needed_by: str) -> tuple[Tensor, Tensor]:
    """Return int8 integers and scales whose product is the weight, without an offset.

    Levels without 0, s (k + 1/2), become (2 k + 1) s / 2.

    Outliers that keep their values are 0 among the integers.

    Raises:
        ValueError: If there are 256 levels without 0.

    Example:
        >>> weight = torch.tensor([[0.5, -1.5, 0.5]])
        >>> int8_grid("weight", find_grid(weight), "doctest")
        (tensor([[ 1, -3,  1]], dtype=torch.int8), tensor([[0.5000]]))
    """
    if not grid.offset:
        return grid.integers, grid.scales
    if grid.bits == MOST_BITS:
        raise ValueError(
            f"{needed_by}: {name} has 256 levels without 0, of which int8 with a scale holds 255. Train with 7 bits, or "
            "with quantizer='ste'."
        )
    return 2 * grid.integers + 1, grid.scales / 2
