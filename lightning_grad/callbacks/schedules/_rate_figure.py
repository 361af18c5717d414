"""The figure of ``AccuracyGradientLR``: the metric, its gradient and the learning rate, with the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_grad.core.record import Row, RunRecord, panels, style_axis
from lightning_grad.utilities.reporting import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VALUE, _MEAN, _RATE, _CUT, _THRESHOLD = "#9a9a9a", "#0072b2", "#009e73", "#d55e00", "#333333"
_MANY_CUTS = 3.0  # factor between learning rates; a smaller one is readable on a linear axis
_DASHED: dict[str, Any] = {"color": _CUT, "linewidth": 0.9, "linestyle": (0, (4, 2))}


def draw_rates(record: RunRecord, title: str, monitor: str, window: int, threshold: float) -> Figure:
    """Draw the value, its gradient and the learning rate over epochs, with the cuts.

    Args:
        record: One row per observation.
        title: Heading of the figure.
        monitor: Name of the metric.
        window: Observations in a mean.
        threshold: Gradient below which the learning rate is cut.
    """
    from matplotlib.ticker import MaxNLocator

    rows = record.rows()
    # In an epoch of unknown length, all observations have the same position.
    x = "epoch" if all(before["epoch"] < row["epoch"] for before, row in pairwise(rows)) else "step"
    xs, size = [row[x] for row in rows], 3.5 if len(rows) <= 100 else 0.0
    cuts = [row[x] for row in rows if row["cut"]]
    figure, axes = panels(f"{title}: {_outcome(rows)}", [35 / 13, 28 / 13, 28 / 13])
    for axis in axes:
        for cut in cuts:
            axis.axvline(cut, alpha=0.75, **_DASHED)
        style_axis(axis)
    axes[0].plot(xs, [row[monitor] for row in rows], "o-", color=_VALUE, markersize=size, linewidth=0.9, label=monitor)
    means = [row["mean"] for row in rows]
    axes[0].plot(xs, means, color=_MEAN, linewidth=1.8, label=f"mean of the last {window}")
    if cuts:
        axes[0].plot([], [], label="cut of the learning rate", **_DASHED)
    axes[0].set_ylabel(monitor)
    axes[0].legend(frameon=False, fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)
    known = [(row[x], row["accuracy_gradient"]) for row in rows if row["accuracy_gradient"] is not None]
    _draw_gradient(axes[1], known, threshold, size)
    _draw_rate(axes[2], xs, [row["learning_rate"] for row in rows])
    axes[-1].set_xlabel("epoch" if x == "epoch" else "optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    return figure


def _outcome(rows: Sequence[Row]) -> str:
    """Return the number of cuts and the learning rates, for the title."""
    cuts = sum(row["cut"] for row in rows)
    if not cuts:
        return "no cut"
    first, last = rows[0]["learning_rate"], rows[-1]["learning_rate"]
    return f"{counted(cuts, 'cut')}, learning rate from {first:.3g} to {last:.3g}"


def _draw_gradient(axis: Axes, known: list[tuple[float, float]], threshold: float, size: float) -> None:
    if known:
        xs, gradients = (list(column) for column in zip(*known, strict=True))
        below = [gradient < threshold for gradient in gradients]
        axis.fill_between(xs, gradients, threshold, where=below, interpolate=True, color=_CUT, alpha=0.15)
        axis.plot(xs, gradients, "o-", color=_MEAN, markersize=size, linewidth=1.2)
    axis.axhline(threshold, color=_THRESHOLD, linewidth=1.0)
    # On the left, where there is no gradient yet.
    place = (0.0, threshold), (3, 3), ("axes fraction", "data"), "offset points"
    axis.annotate(f"cut below {threshold:g}", *place, ha="left", fontsize="small", color=_THRESHOLD)
    axis.set_ylabel("gain of the mean\nper observation")


def _draw_rate(axis: Axes, xs: list[float], rates: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.step(xs, rates, where="post", color=_RATE, linewidth=1.8)
    positive = [rate for rate in rates if rate > 0.0]
    if positive and max(positive) > _MANY_CUTS * min(positive):
        axis.set_yscale("log")
        axis.margins(y=0.12)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.minorticks_off()
    axis.set_ylabel("learning rate")
