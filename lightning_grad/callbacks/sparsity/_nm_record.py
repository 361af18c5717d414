"""What a sparse run looked like: rows of scalars, samples of the masks, and the figure drawn of them at the end.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_grad.core.views.portable import pack_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ENTRIES = 2**14  # of a weight's mask that are kept for the divergence: the share's error is below 0.4 %
_MOST_SAMPLES = 64  # of one phase; beyond, every second one is dropped


class SparsityRecord:
    """Rows of a run, one a log step, and the divergence of each row's masks from the last masks of its phase.

    The sparse architecture divergence (SAD) needs the mask with which a phase ended, so it is known only then: a bounded
    sample of mask entries is kept with the rows of the phase that runs.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self._samples: list[tuple[int, Tensor]] = []
        self._phase = ""

    def add(self, row: Mapping[str, Any], phase: str, masks: Mapping[str, Tensor | None]) -> None:
        """Append a row.

        Args:
            row: Scalars of this log step.
            phase: Name of the phase; when it changes, the divergence of the phase before is settled.
            masks: Mask of each weight by name; ``None`` where there is none yet.
        """
        if phase != self._phase:
            self.close_phase()
        self._phase = phase
        self.rows.append({**row, "phase": phase, "divergence": None})
        present = [mask for mask in masks.values() if mask is not None]
        if len(present) == len(masks):
            sample = torch.cat([mask.flatten()[:: mask.numel() // _MOST_ENTRIES | 1] for mask in present])
            packed = pack_bits(sample)
            # A resumed run may have chosen other weights.
            self._samples = [(index, other) for index, other in self._samples if other.shape == packed.shape]
            self._samples.append((len(self.rows) - 1, packed))
        if len(self._samples) > _MOST_SAMPLES:
            self._samples = self._samples[::2]

    def close_phase(self) -> None:
        """Compare the masks of the phase with its last one."""
        if self._samples:
            last = _unpack(self._samples[-1][1])
            for index, sample in self._samples:
                self.rows[index]["divergence"] = (_unpack(sample) != last).float().mean().item()
        self._samples = []

    def add_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember a validation's metrics, for the figure."""
        self.validations.append({"step": step, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in types that a checkpoint may hold."""
        samples = [[index, sample] for index, sample in self._samples]
        rows, validations = [dict(row) for row in self.rows], [dict(row) for row in self.validations]
        return {"rows": rows, "validations": validations, "samples": samples, "phase": self._phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved record."""
        self.rows, self.validations = list(state["rows"]), list(state["validations"])
        self._samples = [(int(index), sample) for index, sample in state["samples"]]
        self._phase = state["phase"]

    def draw(self, title: str, metric: str | None) -> Figure:
        """Draw density and decay, flips and divergence, and the validation metric, over steps.

        Args:
            title: Heading of the figure.
            metric: Validation metric to show; ``None`` takes the first that is an accuracy, if there is one.
        """
        from matplotlib.figure import Figure

        metric = metric or next((key for row in self.validations for key in row if "acc" in key), None)
        figure = Figure(figsize=(8, 7 if metric else 5), layout="constrained")
        axes = figure.subplots(3 if metric else 2, 1, sharex=True)
        figure.suptitle(title)
        shares = {"density": "density (share not zero)"}
        if any(0.0 < row["decay"] < 1.0 for row in self.rows):
            shares["decay"] = "decay value D"
        _curve(axes[0], self.rows, shares, drawstyle="steps-post")
        axes[0].set_ylabel("share")
        axes[0].set_ylim(-0.03, 1.03)
        names = {"flips": "flips since the last log", "divergence": "divergence from the phase's last mask"}
        _curve(axes[1], self.rows, names)
        axes[1].set_ylabel("share of mask entries")
        axes[1].set_ylim(bottom=0.0)
        if metric:
            _curve(axes[2], self.validations, {metric: metric}, marker="o")
            axes[2].set_ylabel(metric)
        for axis in axes:
            self._mark_phases(axis)
        axes[-1].set_xlabel("optimizer step")
        return figure

    def _mark_phases(self, axis: Axes) -> None:
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            if row["phase"] != before["phase"]:
                axis.axvline((before["step"] + row["step"]) / 2, color="0.8", linewidth=0.8, zorder=0)


def _unpack(sample: Tensor) -> Tensor:
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (sample.unsqueeze(1) >> shifts & 1).flatten()


def _curve(axis: Axes, rows: list[dict[str, Any]], names: Mapping[str, str], **style: Any) -> None:
    for key, label in names.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, markersize=3, **style)
    if axis.lines:
        axis.legend(frameon=False, fontsize="small")
