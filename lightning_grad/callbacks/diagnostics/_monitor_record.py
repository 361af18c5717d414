"""What ``GradientMonitor`` has seen of one optimizer: norms of every step, layers at log steps, and the figure of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 4096  # of the norm curve; beyond, of each two steps the one with the larger norm stays
_MOST_COLUMNS = 256  # of the heat map; beyond, every second one is dropped
_CLIPPED = 1.0 - 1e-5  # a coefficient below it is no rounding


class MonitorRecord:
    """The record of one optimizer, in types that a checkpoint may hold."""

    def __init__(self) -> None:
        self.counts = {"steps": 0, "clipped": 0, "skipped": 0}
        self.layers: list[str] = []
        self._points: list[list[float]] = []
        self._interval: list[list[float]] = []
        self._columns: list[list[Any]] = []

    def add(self, step: int, before: float, after: float, skipped: bool, unclipped: float | None = None) -> None:
        """Take in one optimizer step.

        Args:
            step: Its number.
            before: Norm of the gradient before anything changed it.
            after: Norm of what the optimizer used; not a number if it used nothing.
            skipped: Whether the optimizer did not step.
            unclipped: Norm just before the first that clips, if something else came before that.
        """
        clipped = not skipped and after < (before if unclipped is None else unclipped) * _CLIPPED
        self.counts["steps"] += 1
        self.counts["clipped"] += clipped
        self.counts["skipped"] += skipped
        self._interval.append([before, after])
        self._points.append([step, before, after, float(clipped), float(skipped)])
        if len(self._points) > _MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._points = [max(pair, key=_height) for pair in pairs]

    def add_layers(self, step: int, norms: Mapping[str, float]) -> None:
        """Take in the norms of the layers at a log step."""
        self.layers = list(dict.fromkeys([*self.layers, *norms]))  # parameters may be added in mid-fit
        self._columns.append([step, dict(norms)])
        if len(self._columns) > _MOST_COLUMNS:
            self._columns = self._columns[::2]

    def summary(self) -> dict[str, float]:
        """Return what is logged of the steps since the last log step, and of all."""
        if not self._interval:
            return {}
        before, after = self._interval[-1]
        largest = max((norm for norm, _ in self._interval if math.isfinite(norm)), default=math.nan)
        self._interval = []
        return {
            "norm": before,
            "norm_after": after,
            "coefficient": after / before if before > 0 else 1.0,
            "norm_max": largest,
            "clipped_share": self.counts["clipped"] / self.counts["steps"],
            "skipped_steps": float(self.counts["skipped"]),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "counts": dict(self.counts),
            "layers": list(self.layers),
            "points": [list(point) for point in self._points],
            "interval": [list(pair) for pair in self._interval],
            "columns": [[step, dict(norms)] for step, norms in self._columns],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved record."""
        self.counts = dict(state["counts"])
        self.layers = list(state["layers"])
        self._points = [list(point) for point in state["points"]]
        self._interval = [list(pair) for pair in state["interval"]]
        self._columns = [[step, dict(norms)] for step, norms in state["columns"]]

    def rows(self) -> list[dict[str, Any]]:
        """Return the norm curve as rows of a table."""
        names = ("step", "norm", "norm_after", "clipped", "skipped")
        return [dict(zip(names, [int(point[0]), *point[1:]], strict=True)) for point in self._points]

    def draw(self, title: str) -> Figure:
        """Draw norms before and after clipping over steps, with clip events, above a heat map of layers over steps."""
        from matplotlib.figure import Figure

        shown = self._columns and len(self._columns) > 1
        height = 3.2 + (1.2 + 0.16 * min(len(self.layers), 40) if shown else 0.0)
        figure = Figure(figsize=(9, height), layout="constrained")
        ratios = [3.2, height - 3.2] if shown else [1.0]
        axes = figure.subplots(len(ratios), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
        figure.suptitle(title)
        self._draw_norms(axes[0])
        if shown:
            self._draw_layers(figure, axes[1])
        axes[-1].set_xlabel("optimizer step")
        return figure

    def _draw_norms(self, axis: Axes) -> None:
        steps = [point[0] for point in self._points]
        axis.plot(steps, [point[1] for point in self._points], color="#9a9a9a", linewidth=1.0, label="before")
        axis.plot(steps, [point[2] for point in self._points], color="#0072b2", linewidth=1.2, label="after")
        clipped = [point for point in self._points if point[3]]
        skipped = [point for point in self._points if point[4]]
        if clipped:
            share = self.counts["clipped"] / max(self.counts["steps"], 1)
            axis.plot(
                *_corners(clipped), ".", color="#d55e00", markersize=4, label=f"clipped ({100 * share:.1f} % of steps)"
            )
        for point in skipped:
            axis.axvline(point[0], color="#cc79a7", linewidth=0.8, label="skipped" if point is skipped[0] else None)
        if any(point[1] > 0 for point in self._points):
            axis.set_yscale("log")
        axis.set_ylabel("gradient norm")
        axis.legend(frameon=False, fontsize="small", ncols=4, loc="upper right")

    def _draw_layers(self, figure: Figure, axis: Axes) -> None:
        import numpy as np

        norms = np.array([[column[1].get(layer, np.nan) for layer in self.layers] for column in self._columns]).T
        image = np.log10(np.where(norms > 0, norms, np.nan))
        steps = [column[0] for column in self._columns]
        mesh = axis.pcolormesh(steps, np.arange(len(self.layers)), image, shading="nearest", cmap="viridis")
        every = max(1, math.ceil(len(self.layers) / 40))
        axis.set_yticks(range(0, len(self.layers), every), self.layers[::every], fontsize=6)
        axis.invert_yaxis()
        figure.colorbar(mesh, ax=axis, label="log10 norm", pad=0.01)


def _height(point: Sequence[float]) -> float:
    return point[1] if math.isfinite(point[1]) else math.inf


def _corners(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]
