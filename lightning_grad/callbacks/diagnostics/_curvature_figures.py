"""Figures of ``HessianSpectrum``: the density of the eigenvalues in one look, and the curvature over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_grad.core import RunRecord
from lightning_grad.core.record import style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _EDGE = "#0072b2", "#e69f00", "#b3261e"
_FLOOR = 0.02  # times the height of a single eigenvalue: where the axis of the density begins
_ABOVE: dict[str, Any] = {"frameon": False, "fontsize": "small", "loc": "lower left", "bbox_to_anchor": (0, 1)}
_BESIDE = 1.5  # the edge of stability is drawn up to this many times the largest eigenvalue


def draw_density(at: Tensor, density: Tensor, size: int, largest: Sequence[float], edge: Any, title: str) -> Figure:
    """Draw the density of ``size`` eigenvalues, the largest of them, and the edge of stability. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axis = figure.subplots()
    places, heights = at.numpy(), density.clamp(min=1e-30).numpy()
    axis.fill_between(places, heights, color=_BLUE, alpha=0.25, linewidth=0)
    axis.plot(places, heights, color=_BLUE, linewidth=1.4)
    for number, value in enumerate(largest):
        label = f"largest: {', '.join(f'{each:.3g}' for each in largest)}" if number == 0 else None
        axis.axvline(value, color=_ORANGE, linewidth=1.1, linestyle="--", label=label)
    if edge is not None:
        is_near = edge <= _BESIDE * max(largest[0], 0)
        label = f"edge of stability: {edge:.3g}{'' if is_near else ', beyond this axis'}"
        axis.axvline(edge if is_near else float("nan"), color=_EDGE, linewidth=1.4, label=label)
    axis.set_yscale("log")
    axis.set_ylim(_floor(at, size), 2 * float(density.max()))
    axis.set_xlabel("eigenvalue of the Hessian")
    axis.set_ylabel("density")
    axis.legend(ncols=2, **_ABOVE)
    style_axis(axis)
    return figure


def draw_run(record: RunRecord, kept: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the largest eigenvalues, the trace and the densities over the run. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = ["eigenvalues", *(["trace"] if "trace" in record.columns else []), *(["density"] if kept else [])]
    figure = Figure(figsize=(8, 0.6 + 2.6 * len(panels)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = dict(zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True))
    _draw_eigenvalues(axes["eigenvalues"], record)
    if "trace" in axes:
        _draw_trace(axes["trace"], record)
    if "density" in axes:
        _draw_densities(axes["density"], kept)
    for axis in axes.values():
        style_axis(axis)
    return figure


def _draw_eigenvalues(axis: Axes, record: RunRecord) -> None:
    names = [name for name in record.columns if name.startswith("eigenvalue_") and name[11:].isdecimal()]
    highest = 0.0
    for number, name in enumerate(names):
        steps, values = record.series(name)
        axis.plot(
            steps, values, "o-", color=_BLUE, alpha=1.0 / (1 + number) ** 0.5, markersize=3.5, label=_ordinal(number)
        )
        highest = max(highest, *values)
    steps, values = record.series("eigenvalue_min")
    axis.plot(steps, values, "o-", color="0.5", markersize=3, label="smallest")
    if "stability_edge" in record.columns:
        steps, edges = record.series("stability_edge")
        is_far = min(edges) > _BESIDE * highest  # it would flatten the other curves
        axis.plot(
            steps, edges, color=_EDGE, label=f"edge of stability{f': at least {min(edges):.3g}' if is_far else ''}"
        )
        lowest, top = min(*values, 0), min(max(highest, *edges), _BESIDE * highest)
        if top > lowest:
            axis.set_ylim(lowest - 0.05 * (top - lowest), top + 0.15 * (top - lowest))
    axis.set_ylabel("eigenvalue")
    axis.set_xlabel("step")
    axis.legend(ncols=5, **_ABOVE)


def _ordinal(number: int) -> str:
    return ("largest", "second", "third")[number] if number < 3 else f"number {number + 1}"


def _draw_trace(axis: Axes, record: RunRecord) -> None:
    steps, values = record.series("trace")
    _, errors = record.series("trace_error")
    axis.errorbar(steps, values, errors, fmt="o-", color=_BLUE, markersize=3.5, capsize=3)
    axis.set_ylabel("trace\n± standard error")
    axis.set_xlabel("step")


def _draw_densities(axis: Axes, kept: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis_r"]
    highest = max(float(row["density"].max()) for row in kept)
    for number, row in enumerate(kept):
        color = colors(0.1 + 0.9 * number / max(len(kept) - 1, 1))
        heights = row["density"].clamp(min=1e-30).numpy()
        axis.plot(row["at"].numpy(), heights, color=color, linewidth=1.2, label=f"step {row['step']}")
    axis.set_yscale("log")
    axis.set_ylim(min(_floor(row["at"], int(row["size"])) for row in kept), 2 * highest)
    axis.set_xlabel("eigenvalue of the Hessian")
    axis.set_ylabel("density")
    lines = axis.get_lines()  # a legend is filled column by column
    axis.legend(handles=[line for column in range(5) for line in lines[column::5]], ncols=5, **_ABOVE)


def _floor(at: Tensor, size: int) -> float:
    width = float(at[-1] - at[0]) / 110  # of the bell of one eigenvalue, in spectral_density
    return _FLOOR / (size * width * math.sqrt(2 * math.pi))
