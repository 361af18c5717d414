"""The scalars of all looks of a probe: kept in the checkpoint, thinned, and drawn over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS = 2048  # beyond, every second one is dropped
_MOST_DRAWN = 8  # scalars, each in a panel of its own
_MANY_MARKS = 100  # looks: a line shows more of them better than dots do
_LONG_RANGE = 30.0  # from the least to the largest value: beyond, the axis is logarithmic


class ProbeHistory:
    """One row a look, in types that a checkpoint may hold.

    Example:
        >>> history = ProbeHistory()
        >>> history.add(epoch=0, step=5, numbers={"norm": 2.0})
        >>> history.add(epoch=1, step=11, numbers={"norm": 1.0})
        >>> history.series("norm")
        ([5, 11], [2.0, 1.0])
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self.looks = 0

    def add(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        """Take in the numbers of a look."""
        self.looks += 1
        self._rows.append({"epoch": epoch, "step": step, **numbers})
        if len(self._rows) > _MOST_ROWS:
            self._rows = self._rows[::2]

    @property
    def names(self) -> list[str]:
        """Names of the numbers, in the order in which they first came."""
        return list(dict.fromkeys(name for row in self._rows for name in row if name not in ("epoch", "step")))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of a table; a look lacks no column."""
        names = ["epoch", "step", *self.names]
        return [{name: row.get(name, math.nan) for name in names} for row in self._rows]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a number was found, and its values."""
        known = [row for row in self._rows if name in row]
        return [row["step"] for row in known], [row[name] for row in known]

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {"rows": [dict(row) for row in self._rows], "looks": self.looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved history."""
        self._rows, self.looks = [dict(row) for row in state["rows"]], state["looks"]

    def draw(self, title: str) -> Figure:
        """Draw each number over the steps of the run, in a panel of its own."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        names = self.names
        shown = names[:_MOST_DRAWN]
        figure = Figure(figsize=(8, 1.2 + 1.9 * max(len(shown), 1)), layout="constrained")
        axes = figure.subplots(max(len(shown), 1), 1, squeeze=False, sharex=True)[:, 0]
        more = f" (first {len(shown)} of {len(names)} values)" if len(names) > len(shown) else ""
        figure.suptitle(f"{title}{more}", parse_math=False)
        for axis, name in zip(axes, shown, strict=False):
            self._draw_series(axis, name)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels(axes)
        return figure

    def _draw_series(self, axis: Axes, name: str) -> None:
        steps, values = self.series(name)
        size = 3.5 if len(steps) <= _MANY_MARKS else 0.0
        axis.plot(steps, values, "o-", color="#0072b2", markersize=size, linewidth=1.4)
        finite = [value for value in values if math.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) > _LONG_RANGE * min(finite):
            axis.set_yscale("log")
        axis.set_ylabel(name.replace("/", "\n"), parse_math=False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
