"""What ``AccuracyGradientLR`` has seen and done: one row an observation, as table and figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_grad.functional.schedules.accuracy_gradient_lr import accuracy_gradient
from lightning_grad.utilities.imports import is_installed
from lightning_grad.utilities.reporting import log_figure, log_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VALUE, _MEAN, _RATE, _CUT, _THRESHOLD = "#9a9a9a", "#0072b2", "#009e73", "#d55e00", "#333333"
_MANY_CUTS = 3.0  # of the rate: what is cut less is seen well enough on a linear axis
_COLUMNS = ("values", "epochs", "steps", "scales", "rates")


class RateRecord:
    """The observations of a run, in types that a checkpoint may hold.

    Args:
        monitor: Name of the metric.
        window: Observations in a mean.
        rising: Whether larger is better.
    """

    def __init__(self, monitor: str, window: int, rising: bool) -> None:
        self._monitor, self._window, self._sign = monitor, window, 1.0 if rising else -1.0
        self.values: list[float] = []
        self.gains: list[float] = []
        self.epochs: list[float] = []
        self.steps: list[int] = []
        self.scales: list[float] = []
        self.rates: list[float] = []
        self.cuts: list[int] = []
        self.earlier_cuts = 0

    @property
    def cut_count(self) -> int:
        """Cuts so far, also those by observations that were dropped."""
        return self.earlier_cuts + len(self.cuts)

    def __len__(self) -> int:
        return len(self.values)

    def observe(self, value: float, epoch: float, step: int) -> None:
        """Take in a value, after so many epochs and optimizer steps."""
        self.values.append(value)
        self.gains.append(self._sign * value)
        self.epochs.append(epoch)
        self.steps.append(step)

    def conclude(self, scale: float, rate: float, is_cut: bool) -> None:
        """Take in what followed from it."""
        self.scales.append(scale)
        self.rates.append(rate)
        if is_cut:
            self.cuts.append(len(self.values))

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {**{name: list(getattr(self, name)) for name in (*_COLUMNS, "cuts")}, "earlier_cuts": self.earlier_cuts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved record."""
        for name in (*_COLUMNS, "cuts"):
            setattr(self, name, list(state[name]))
        self.gains = [self._sign * value for value in self.values]
        self.earlier_cuts = state.get("earlier_cuts", 0)

    def restart(self) -> None:
        """Drop the observations, because the next ones are of something else."""
        self.earlier_cuts = self.cut_count
        for name in (*_COLUMNS, "cuts", "gains"):
            setattr(self, name, [])

    def means(self) -> list[float]:
        """Return the mean of the last values at each observation, of fewer at the beginning."""
        recent = [self.values[max(0, end - self._window) : end] for end in range(1, len(self) + 1)]
        return [sum(part) / len(part) for part in recent]

    def gradients(self) -> list[float | None]:
        """Return the gradient at each observation."""
        return [accuracy_gradient(self.gains[: end + 1], self._window) for end in range(len(self))]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of a table for each observation."""
        lists = (self.epochs, self.steps, self.values, self.means(), self.gradients(), self.scales, self.rates)
        names = ("epoch", "step", self._monitor, "mean", "accuracy_gradient", "scale", "learning_rate")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]
        return [{"observation": n, **row, "cut": n in self.cuts} for n, row in enumerate(rows, 1)]

    # The figure.

    def draw(self, title: str, threshold: float) -> Figure:
        """Draw the value, its gradient and the learning rate over epochs, with the cuts."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 7), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=[1.25, 1.0, 1.0])
        figure.suptitle(title)
        for axis in axes:
            self._draw_cuts(axis)
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        self._draw_values(axes[0])
        self._draw_gradient(axes[1], threshold)
        self._draw_rate(axes[2])
        axes[-1].set_xlabel(self._x_label)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels(axes)
        return figure

    @property
    def _has_epochs(self) -> bool:
        # An epoch without a known length has no parts.
        return all(earlier < later for earlier, later in zip(self.epochs, self.epochs[1:], strict=False))

    @property
    def _x(self) -> Sequence[float]:
        return self.epochs if self._has_epochs else self.steps

    @property
    def _x_label(self) -> str:
        return "epoch" if self._has_epochs else "optimizer step"

    def _draw_cuts(self, axis: Axes) -> None:
        for cut in self.cuts:
            axis.axvline(self._x[cut - 1], color=_CUT, linewidth=0.9, alpha=0.75, linestyle=(0, (4, 2)))

    def _draw_values(self, axis: Axes) -> None:
        size = 3.5 if len(self) <= 100 else 0.0
        axis.plot(self._x, self.values, "o-", color=_VALUE, markersize=size, linewidth=0.9, label=self._monitor)
        axis.plot(self._x, self.means(), color=_MEAN, linewidth=1.8, label=f"mean of the last {self._window}")
        if self.cuts:
            noun = "cut" if len(self.cuts) == 1 else "cuts"
            axis.plot([], [], color=_CUT, linewidth=0.9, linestyle=(0, (4, 2)), label=f"{len(self.cuts)} {noun}")
        axis.set_ylabel(self._monitor)
        axis.legend(
            frameon=False, fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.0
        )

    def _draw_gradient(self, axis: Axes, threshold: float) -> None:
        known = [(x, gradient) for x, gradient in zip(self._x, self.gradients(), strict=True) if gradient is not None]
        if known:
            xs, gradients = (list(column) for column in zip(*known, strict=True))
            axis.fill_between(
                xs,
                gradients,
                threshold,
                where=[g < threshold for g in gradients],
                interpolate=True,
                color=_CUT,
                alpha=0.15,
            )
            size = 3.5 if len(self) <= 100 else 0.0
            axis.plot(xs, gradients, "o-", color=_MEAN, markersize=size, linewidth=1.2)
        axis.axhline(threshold, color=_THRESHOLD, linewidth=1.0)
        axis.annotate(
            f"threshold {threshold:g}",
            (0.0, threshold),  # on the left, where there is no gradient yet
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            ha="left",
            fontsize="small",
            color=_THRESHOLD,
        )
        axis.set_ylabel("gain of the mean")

    def _draw_rate(self, axis: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.step(self._x, self.rates, where="post", color=_RATE, linewidth=1.8)
        positive = [rate for rate in self.rates if rate > 0.0]
        if positive and max(positive) > _MANY_CUTS * min(positive):
            axis.set_yscale("log")
            axis.margins(y=0.12)
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("learning rate")


def write_record(
    trainer: pl.Trainer,
    record: RateRecord,
    key: Callable[[str], str],
    path: Path,
    title: str,
    threshold: float,
    draw: bool,
) -> None:
    """Write the record as ``path.csv`` and, if wanted and possible, as ``path.png``, and send both to the loggers."""
    log_table(trainer, key("observations"), record.rows(), path.with_name(f"{path.name}.csv"))
    if draw and trainer.is_global_zero and is_installed("matplotlib"):
        log_figure(trainer, key("figure"), record.draw(title, threshold), path.with_name(f"{path.name}.png"))
