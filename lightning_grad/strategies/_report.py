"""The figure of a run's communication: bytes a step, residual norm, and ratio by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_grad.strategies._ledger import ByteLedger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SENT, _DENSE, _RESIDUAL = "#0072b2", "#9a9a9a", "#d55e00"
_MOST_LAYERS = 24  # in the figure; the table has all


def draw(display_name: str, ledger: ByteLedger, layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw bytes a step and residual norm over the run, and the ratio of each layer."""
    from matplotlib.figure import Figure

    shown = sorted(layers, key=lambda layer: -layer["entries"])[:_MOST_LAYERS]
    figure = Figure(figsize=(11, max(3.6, 1.2 + 0.22 * len(shown))), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    _draw_bytes(left, ledger)
    _draw_residual(middle, ledger)
    _draw_layers(right, shown, len(layers))
    title = f"{display_name}: {ledger.ratio:,.0f} times less than dense gradients over {ledger.steps:,} steps"
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_bytes(axes: Axes, ledger: ByteLedger) -> None:
    steps, sent = ledger.record.series("bytes_sent")
    dense = ledger.dense_bytes / ledger.steps
    axes.axhline(dense, color=_DENSE, linestyle="--", label="dense")
    axes.plot(steps, sent, color=_SENT, marker="o" if len(steps) < 30 else "", markersize=3, label="sent")
    axes.set(yscale="log", xlabel="step", ylabel="bytes a step and rank", title="Communication")
    axes.set_ylim(min([*sent, dense]) / 3, 3 * dense)
    axes.legend(frameon=False, fontsize=8)


def _draw_residual(axes: Axes, ledger: ByteLedger) -> None:
    steps, norms = ledger.record.series("residual_norm")
    axes.plot(steps, norms, color=_RESIDUAL, marker="o" if len(steps) < 30 else "", markersize=3)
    axes.set(xlabel="step", ylabel="2-norm on rank 0", title="Not sent yet")
    axes.set_ylim(bottom=0)


def _draw_layers(axes: Axes, layers: Sequence[Mapping[str, Any]], total: int) -> None:
    places, ratios = range(len(layers)), [layer["ratio"] for layer in layers]
    bars = axes.barh(places, ratios, color=[_SENT if ratio > 1 else _DENSE for ratio in ratios], height=0.7)
    axes.bar_label(bars, [f"{ratio:,.0f}" for ratio in ratios], padding=3, fontsize=7)
    axes.set_yticks(places, [layer["layer"] for layer in layers], fontsize=7)
    axes.invert_yaxis()
    title = "By layer" if len(layers) == total else f"By layer, the largest {len(layers)} of {total}"
    axes.set(xscale="log", xlabel="dense bytes / sent bytes", title=title, xlim=(0.7, 3 * max(ratios)))
