"""The figure of a run's communication: bytes per step, residual norm, and ratio by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_grad.core.record import RunRecord
from lightning_grad.strategies._ledger import ByteLedger
from lightning_grad.utilities.reporting import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SENT, _DENSE, _RESIDUAL = "#0072b2", "#9a9a9a", "#d55e00"
_MOST_LAYERS = 24  # in the figure; the table lists all layers
_MANY_MARKS = 30  # from this many log steps on, a line without markers is easier to read


def draw(display_name: str, ledger: ByteLedger, record: RunRecord, layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw bytes per step and residual norm over the run, and the ratio of each layer.

    Args:
        display_name: Name of the strategy.
        ledger: Counts of the run.
        record: One row per log step.
        layers: One row per parameter, as in the table of layers.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = sorted(layers, key=lambda layer: -layer["entries"])[:_MOST_LAYERS]
    figure = Figure(figsize=(11, max(3.6, 1.2 + 0.22 * len(shown))), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    _draw_bytes(left, record, ledger.dense_bytes / ledger.steps / 1e3)
    _draw_residual(middle, record)
    _draw_layers(right, shown, len(layers))
    for axis in (left, middle):
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    for axis in (left, middle, right):
        axis.title.set(fontsize=10, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
    sent, dense = (f"{count / 1e6:,.3g}" for count in (ledger.sent_bytes, ledger.dense_bytes))
    less = f"{ledger.ratio:,.3g} times less than dense gradients"
    figure.suptitle(f"{display_name}: {less} ({sent} of {dense} MB in {counted(ledger.steps, 'step')})", fontsize=11)
    return figure


def _draw_bytes(axis: Axes, record: RunRecord, dense: float) -> None:
    steps, sent = record.series("bytes_sent")
    kilobytes = [count / 1e3 for count in sent]
    axis.axhline(dense, color=_DENSE, linestyle="--")
    axis.plot(steps, kilobytes, color=_SENT, **_marks(steps))
    axis.set(yscale="log", ylabel="kB", title="Sent per rank and step")
    axis.set_ylim(min([*kilobytes, dense]) / 3, 3 * dense)
    axis.yaxis.set_major_formatter("{x:,g}")
    place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": "right"}
    axis.annotate("dense", (1.0, dense), (0, 4), xycoords=("axes fraction", "data"), color=_DENSE, **place)
    axis.annotate("sent", (steps[-1], kilobytes[-1]), (0, 5), color=_SENT, **place)


def _draw_residual(axis: Axes, record: RunRecord) -> None:
    steps, norms = record.series("residual_norm")
    axis.plot(steps, norms, color=_RESIDUAL, **_marks(steps))
    axis.set(ylabel="2-norm on rank 0", title="Residual (not sent yet)")
    axis.set_ylim(bottom=0)


def _draw_layers(axis: Axes, layers: Sequence[Mapping[str, Any]], total: int) -> None:
    places, ratios = range(len(layers)), [layer["ratio"] for layer in layers]
    bars = axis.barh(places, ratios, color=[_SENT if ratio > 1 else _DENSE for ratio in ratios], height=0.7)
    words = [f"{ratio:,.0f}" if ratio > 1 else "dense" for ratio in ratios]
    axis.bar_label(bars, words, padding=3, fontsize=7)
    axis.set_yticks(places, [layer["layer"] for layer in layers], fontsize=7)
    axis.invert_yaxis()
    which = "" if len(layers) == total else f", the largest {len(layers)} of {total}"
    axis.set(xscale="log", xlabel="dense bytes / sent bytes", xlim=(0.7, 3 * max(ratios)))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_title(f"Compression by layer{which}")


def _marks(steps: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o" if len(steps) < _MANY_MARKS else "", "markersize": 3}
