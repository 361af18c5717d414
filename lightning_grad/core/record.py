"""Rows that a technique records during a run: thinned, saved in checkpoints and on disk, drawn at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
from torch import Tensor

from lightning_grad.utilities.reporting import log_figure, log_summary, log_table, output_file, tolerated, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_LAG = 10  # the file on disk lacks at most one tenth of the rows
_MOST_DRAWN = 8  # columns drawn, each in its own panel
_MANY_MARKS = 100  # above this number of rows, lines are drawn without dots
_LONG_RANGE = 30.0  # above this ratio of the largest to the smallest value, the axis is logarithmic


class Recorder(Protocol):
    """The owner of a record: any callback or strategy of this package."""

    @property
    def display_name(self) -> str:
        """Class and name, for titles, files and messages."""

    def log_key(self, quantity: str) -> str:
        """Return the log key of a quantity."""


class RunRecord:
    """Rows of a run, one per recorded step, limited in number.

    All rows are kept until there are more than ``most``. Then one row is kept of every 2, 4, 8 ...
    neighbors, so the kept rows stay evenly spread over the run. The first and the last row are
    always kept.

    - :meth:`state_dict` puts the rows into checkpoints: a resumed run has the same rows as an
      uninterrupted one.
    - :meth:`save` updates a CSV file during the run, so a run that is killed keeps its rows.
    - :meth:`report` writes the summary, the table and the figure at the end.

    Args:
        most: Largest number of rows, an even number; the last row is kept in addition.
        weight: Callable (row) -> number. The row with the largest weight is kept. Default: the
            first row.

    Attributes:
        count: Number of rows added.
        last: The last row added; empty before the first.

    Example:
        >>> record = RunRecord(most=4)
        >>> for step in range(100):
        ...     record.add({"step": step, "loss": 1 / (1 + step)})
        >>> record.series("step")[0], record.count
        ([0, 1, 65, 99], 100)
    """

    def __init__(self, most: int = 2048, weight: Callable[[Row], float] | None = None) -> None:
        self._most = most
        self._weight = weight or _no_weight
        self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self._rows: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self._every = 1
        self.count = self._saved = 0

    def add(self, row: Row) -> None:
        """Append a row: numbers, strings or tensors by column. Tensors are saved in checkpoints only."""
        self.last = dict(row)
        if self.count == 0 or (self.count - 1) % self._every == 0:  # the first row is never thinned
            self._rows.append(self.last)
        elif self._weight(self.last) > self._weight(self._rows[-1]):
            self._rows[-1] = self.last
        self.count += 1
        if len(self._rows) > self._most:
            first, *others = self._rows
            pairs = zip(others[::2], others[1::2], strict=True)
            self._rows = [first, *(max(pair, key=self._weight) for pair in pairs)]
            self._every *= 2

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The kept rows, in order. They are not copies: changing them changes the record."""
        has_last = not self.count or self._rows[-1] is self.last
        return [*self._rows, *([] if has_last else [self.last])]

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.kept for key in row if not isinstance(row[key], Tensor)))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table, all with the same columns; missing values are ``None``."""
        columns = self.columns
        return [{column: row.get(column) for column in columns} for row in self.kept]

    def series(self, column: str) -> tuple[list[Any], list[Any]]:
        """Return the steps at which a column has a value, and the values."""
        known = [row for row in self.kept if row.get(column) is not None]
        return [row["step"] for row in known], [row[column] for row in known]

    # The state of the run.

    def state_dict(self) -> dict[str, Any]:
        """Return the record in types that a checkpoint may hold."""
        rows = [dict(row) for row in self.kept]
        return {"rows": rows, "has_last": len(rows) > len(self._rows), "every": self._every, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved record."""
        self._rows = [dict(row) for row in state["rows"]]
        self.last = self._rows[-1] if self._rows else {}
        if state["has_last"]:
            self._rows.pop()
        self._every, self.count, self._saved = state["every"], state["count"], 0

    # Files and loggers.

    def save(self, trainer: pl.Trainer, owner: Recorder, part: str = "", *, now: bool = False) -> None:
        """Write the rows so far to a CSV file in the log folder, if enough of them are new.

        Call it after each added row. The file is rewritten each time, so a resumed run duplicates
        no rows, and replaced atomically, so a killed run leaves the old file or the new one. The
        file lacks at most a tenth of the rows.

        Args:
            trainer: The trainer. Only rank zero writes, and only with a logger that has a folder.
            owner: Owner of the record; the file is named after it.
            part: Name of the record, if the owner has several.
            now: Write all rows in any case, because the run may end here.
        """
        if self.count - self._saved > (0 if now else self.count // _LAG):
            self._saved = self.count
            if trainer.is_global_zero:
                with tolerated(owner.display_name, "the table of the run"):
                    path = _file(trainer, owner, part, ".csv")
                    if path is not None:
                        write_csv(path, self.rows())

    def report(
        self,
        trainer: pl.Trainer,
        owner: Recorder,
        draw: Callable[[], Figure] | None = None,
        *,
        summary: Mapping[str, float] | None = None,
        part: str = "",
        table: str = "record",
        figure: str = "figure",
    ) -> None:
        """Write the summary, the CSV file and the PNG file of a run, and log them.

        Args:
            trainer: The trainer. Only rank zero writes.
            owner: Owner of the record; keys and files are named after it.
            draw: Returns the figure. It is not called if the owner's ``figure`` is False or
                matplotlib is missing. Default: :meth:`draw`.
            summary: Final figures of merit by quantity.
            part: Name of the record, if the owner has several.
            table: Last part of the table's log key.
            figure: Last part of the figure's log key.
        """
        self._saved, before = self.count, f"{part}/" if part else ""
        log_summary(trainer, {owner.log_key(f"{before}{key}"): value for key, value in (summary or {}).items()})
        with tolerated(owner.display_name, "the table of the run"):
            log_table(trainer, owner.log_key(f"{before}{table}"), self.rows(), _file(trainer, owner, part, ".csv"))
        if self.count and getattr(owner, "figure", True):
            with tolerated(owner.display_name, "the figure of the run"):
                drawn = draw or partial(self.draw, owner.display_name)
                log_figure(trainer, owner.log_key(f"{before}{figure}"), drawn, _file(trainer, owner, part, ".png"))

    def draw(self, title: str) -> Figure:
        """Draw each numeric column over the steps, in its own panel. Needs matplotlib."""
        from matplotlib.ticker import MaxNLocator

        names = [name for name in self.columns if name not in ("epoch", "step") and _is_number(self.series(name)[1])]
        shown = names[:_MOST_DRAWN]
        more = f" (first {len(shown)} of {len(names)} values)" if len(names) > len(shown) else ""
        figure, axes = panels(f"{title}{more}", [1.9] * max(len(shown), 1), rest=1.2)
        for axis, name in zip(axes, shown, strict=False):
            steps, values = self.series(name)
            size = 3.5 if len(steps) <= _MANY_MARKS else 0.0
            axis.plot(steps, values, "o-", color="#0072b2", markersize=size, linewidth=1.4)
            finite = [value for value in values if math.isfinite(value)]
            if finite and min(finite) > 0 and max(finite) > _LONG_RANGE * min(finite):
                axis.set_yscale("log")
            axis.set_ylabel(name.replace("/", "\n"), parse_math=False)
            style_axis(axis)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels(axes)
        return figure


def _no_weight(row: Row) -> float:  # not a lambda, so that a record can be pickled
    return 0.0


def panels(title: str, heights: Sequence[float], width: float = 8.0, rest: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Return a figure of stacked panels that share the x axis. Needs matplotlib.

    Args:
        title: Title in plain text.
        heights: Heights of the panels in inches.
        width: Width in inches.
        rest: Height of everything else in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights) + rest), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=list(heights))
    return figure, list(axes[:, 0])


def style_axis(axis: Axes) -> None:
    """Draw horizontal grid lines and remove the top and right spines."""
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _file(trainer: pl.Trainer, owner: Recorder, part: str, ending: str) -> Path | None:
    return output_file(trainer, owner.display_name, f"_{part}{ending}" if part else ending)


def _is_number(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
