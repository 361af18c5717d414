"""The record of ``GradientMonitor`` for one optimizer: norms of every step, layers at log steps, and the figure of both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.core.record import Row, RunRecord, panels, style_axis
from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.reporting import listed, log_file, log_summary, output_file, send_alert

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 256  # of the heat map
_MOST_NAMES = 40  # of layers, next to the heat map
_CLIPPED = 1.0 - 1e-5  # a smaller coefficient is not a rounding error
_RECENT, _LEAST = 64, 8  # finite steps whose median is the usual norm, and how many it needs
_MOST_SPIKES = 256
_MOST_SAMPLES = 8  # indices in a message; the table has all
_BAD = "#f7d4c0"  # light orange, behind the lines


class MonitorRecord(RunRecord):
    """One row per step of one optimizer. When the record is thinned, the largest norm of neighboring steps stays."""

    def __init__(self) -> None:
        super().__init__(weight=_norm)
        self.clipped = self.skipped = 0  # steps
        self.layers = RunRecord(_MOST_COLUMNS)
        self.reference: dict[str, float] = {}  # norm of each parameter's gradient at the last log step
        self._recent: list[float] = []
        self._largest: float | None = None  # of the steps since the last log step, if there was one

    def add_step(self, step: int, before: float, after: float, skipped: bool, unclipped: float | None = None) -> None:
        """Add one optimizer step.

        Args:
            step: Number of the step.
            before: Norm of the gradient before anything changed it.
            after: Norm of the gradient that the optimizer used; nan if it used none.
            skipped: Whether the optimizer skipped the step.
            unclipped: Norm just before the first rule that clips, if another rule precedes it.
        """
        clipped = not skipped and after < (before if unclipped is None else unclipped) * _CLIPPED
        self.clipped += clipped
        self.skipped += skipped
        known = math.nan if self._largest is None else self._largest
        self._largest = before if math.isfinite(before) and not before <= known else known
        if math.isfinite(before):
            self._recent = [*self._recent, before][-_RECENT:]
        events = {"clipped": float(clipped), "skipped": float(skipped)}
        self.add({"step": step, "norm": before, "norm_after": after, **events})

    def usual_norm(self) -> float | None:
        """Return the median norm of the last finite steps; ``None`` while there are too few."""
        return statistics.median(self._recent) if len(self._recent) >= _LEAST else None

    def add_layers(self, step: int, norms: Mapping[str, float]) -> None:
        """Add the norms of the layers at a log step."""
        self.layers.add({"step": step, "norms": dict(norms)})

    def summary(self) -> dict[str, float]:
        """Return the values to log for the steps since the last log step, and for all; empty if there was no step."""
        last, largest, self._largest = self.last, self._largest, None
        if largest is None:
            return {}
        norms = {"norm": last["norm"], "norm_after": last["norm_after"], "norm_max": largest}
        coefficient = last["norm_after"] / last["norm"] if last["norm"] > 0 else 1.0
        return {**norms, "coefficient": coefficient, **self.totals()}

    def totals(self) -> dict[str, float]:
        """Return the share of clipped steps and the number of skipped steps so far."""
        return {"clipped_share": self.clipped / max(self.count, 1), "skipped_steps": float(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        """Return the record in types that a checkpoint may hold."""
        own: dict[str, Any] = {"clipped": self.clipped, "skipped": self.skipped, "largest": self._largest}
        own |= {"recent": list(self._recent), "reference": dict(self.reference)}
        return {**super().state_dict(), **own, "layers": self.layers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved record."""
        super().load_state_dict(state)
        self.clipped, self.skipped, self._largest = state["clipped"], state["skipped"], state["largest"]
        self.layers.load_state_dict(state["layers"])
        self._recent, self.reference = list(state["recent"]), dict(state["reference"])

    def draw(self, title: str) -> Figure:
        """Draw the norms of all steps, their changes, and a heat map of the layers."""
        from matplotlib.ticker import MaxNLocator

        names = list(dict.fromkeys(name for row in self.layers.kept for name in row["norms"]))  # some are added later
        shown = self.layers.count > 1 and bool(names)
        heights = [3.2, 1.2 + 0.16 * min(len(names), _MOST_NAMES)] if shown else [3.2]
        figure, axes = panels(f"{title}: {self._outcome()}", heights, width=9)
        bad = [row["step"] for row in self.kept if not math.isfinite(row["norm"])]
        for axis in axes if bad else ():
            whole = axis.get_xaxis_transform()  # from the lower edge of the panel to the upper one
            axis.bar(bad, 1.0, width=self._every, color=_BAD, transform=whole, zorder=0, label="not finite")
        self._draw_norms(axes[0])
        if shown:
            self._draw_layers(figure, axes[1], names)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        return figure

    def _outcome(self) -> str:
        """Return the number of steps, clipped steps and skipped steps, for the title."""
        bad = next((row["step"] for row in self.kept if not math.isfinite(row["norm"])), None)
        clipped, skipped = self.totals().values()
        found = [f"{100 * clipped:.1f} % clipped"] * bool(clipped) + [f"{skipped:.0f} skipped"] * bool(skipped)
        found += [] if bad is None else [f"first non-finite gradient at step {bad}"]
        return ", ".join([f"{self.count:,} steps", *found])

    def _draw_norms(self, axis: Axes) -> None:
        clipped, skipped = ([row for row in self.kept if row[event]] for event in ("clipped", "skipped"))
        finite = [row for row in self.kept if math.isfinite(row["norm_after"])]
        changed = any(row["norm"] != row["norm_after"] for row in finite)
        if changed or not finite:
            axis.plot(*self.series("norm"), color="#9a9a9a", linewidth=1.0, label="before clipping or other changes")
        if finite:
            label = "as the optimizer used it" if changed else None
            axis.plot(*self.series("norm_after"), color="#0072b2", linewidth=1.2, label=label)
        if clipped:
            points = [row["step"] for row in clipped], [row["norm"] for row in clipped]
            axis.plot(*points, ".", color="#d55e00", markersize=4, label="clipped")
        for row in skipped:
            axis.axvline(row["step"], color="#cc79a7", linewidth=0.8, label="skipped" if row is skipped[0] else None)
        if any(0 < row["norm"] < math.inf for row in self.kept):
            axis.set_yscale("log")
        axis.set_ylabel("gradient norm")
        style_axis(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(
                frameon=False, fontsize="small", ncols=5, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0
            )

    def _draw_layers(self, figure: Figure, axis: Axes, names: list[str]) -> None:
        from matplotlib.colors import LogNorm

        steps, columns = self.layers.series("norms")
        norms = np.array([[column.get(name, np.nan) for column in columns] for name in names])
        norms[~((norms > 0) & np.isfinite(norms))] = np.nan  # not drawn
        scale = None if np.isnan(norms).all() else LogNorm()
        mesh = axis.pcolormesh(steps, np.arange(len(names)), norms, shading="nearest", cmap="viridis", norm=scale)
        every = max(1, math.ceil(len(names) / _MOST_NAMES))
        axis.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.spines[["top", "right"]].set_visible(False)
        figure.colorbar(mesh, ax=axis, label="norm by layer", pad=0.01)


def _norm(row: Row) -> float:
    return float(row["norm"]) if math.isfinite(row["norm"]) else math.inf


class SpikeTable(RunRecord):
    """One row for each spike and non-finite step: where it was, the suspected parameter, and the samples of the batch."""

    def __init__(self) -> None:
        super().__init__(_MOST_SPIKES, weight=_norm)

    def note(self, optimizer: str, facts: Mapping[str, Any], order: ForwardOrder) -> None:
        """Add a step of one optimizer, with the suspect that the others follow from."""
        suspects: dict[str, float] = facts["suspects"]
        bad = not all(map(math.isfinite, suspects.values()))
        first = _origin(list(suspects), facts["loss"] if bad else math.nan, order) if suspects else None
        row = {key: facts[key] for key in ("step", "epoch", "batch_idx", "loss", "norm", "usual_norm")}
        own = {"parameter": first, "growth": suspects.get(first or ""), "suspects": len(suspects)}
        self.add({**row, "optimizer": optimizer, **own, "samples": " ".join(map(str, facts["samples"]))})


def _origin(names: list[str], loss: float, order: ForwardOrder) -> str:
    """Return the parameter from which a bad value spread to those of other layers.

    If the loss is finite, the value arose in the backward pass and spread to all layers before; otherwise the first layer
    of the forward pass counts.
    """
    return order.last(names[::-1]) if math.isfinite(loss) else order.sort(names)[0]


class FirstBadStep:
    """The facts of the first step with a non-finite gradient, reported once."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._is_reported = False

    def note(self, facts: dict[str, Any], order: ForwardOrder) -> None:
        """Keep the facts of a bad step of one optimizer, unless an earlier one is known."""
        if not facts or self._facts:
            return
        names = facts.pop("parameters")
        first = _origin(names, facts["loss"], order) if names else "no single gradient: the sum of squares overflows"
        self._facts = {**facts, "parameter": first, "bad_parameters": len(names)}

    def warn(self, trainer: pl.Trainer, display_name: str, key: Callable[[str], str], alert: bool) -> None:
        """Warn once about the step, and write its facts to a file."""
        if not self._facts or self._is_reported:
            return
        self._is_reported, facts = True, self._facts
        count, parameter = facts["bad_parameters"], facts["parameter"]
        text = (
            f"the gradient was not finite for the first time at step {facts['step']}, epoch {facts['epoch']}, batch "
            f"{facts['batch_idx']}, loss {facts['loss']:g}: "
            f"{f'{count} bad parameters, starting with {parameter}' if count else parameter}."
        )
        if facts["samples"]:
            text += f" The batch has the samples {listed(facts['samples'], _MOST_SAMPLES)} of the training set."
        rank_zero_warn(f"{display_name}: {text}")
        log_summary(trainer, {key(f"first_bad_{fact}"): float(facts[fact]) for fact in ("step", "batch_idx")})
        path = output_file(trainer, display_name, "_first_bad_step.json")
        if path is not None and trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**facts, "loss": str(facts["loss"]), "norm": str(facts["norm"])}, indent=2))
            log_file(trainer, path, name=path.stem, kind="facts")
        if alert:
            send_alert(trainer, f"{display_name}: gradient not finite", text)

    def state_dict(self) -> dict[str, Any]:
        """Return the facts, and whether they were reported."""
        return {"first_bad": dict(self._facts), "told": self._is_reported}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with saved facts."""
        self._facts, self._is_reported = dict(state["first_bad"]), bool(state["told"])
