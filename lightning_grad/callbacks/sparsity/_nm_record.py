"""What a sparse run leaves: its rows, the figure drawn of them, the masks as a file, and warnings of an unfinished schedule.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.callbacks.sparsity._nm_weight import SparseWeight
from lightning_grad.core.record import Row, RunRecord, panels
from lightning_grad.core.views.portable import pack_bits
from lightning_grad.functional import NMPhase, is_nm
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import log_file, output_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ENTRIES = 2**14  # of a weight's mask that are kept for the divergence: the share's error is below 0.4 %
_MOST_SAMPLES = 64  # of masks in the phase that runs; beyond, every second one is dropped


class SparsityRecord(RunRecord):
    """Rows of a run, one a log step, and the divergence of each row's masks from the last masks of its phase.

    The sparse architecture divergence (SAD) needs the mask with which a phase ended, so it is known only then: a bounded
    sample of mask entries is kept in the rows of the phase that runs.
    """

    def __init__(self) -> None:
        super().__init__(weight=_has_masks)
        self.validations = RunRecord()

    def add_step(self, row: Row, phase: str, masks: Mapping[str, Tensor | None]) -> None:
        """Append a row.

        Args:
            row: Scalars of this log step.
            phase: Name of the phase; when it changes, the divergence of the phase before is settled.
            masks: Mask of each weight by name; ``None`` where there is none yet.
        """
        if self.count and self.last["phase"] != phase:
            self.close_phase()
        present = [mask for mask in masks.values() if mask is not None]
        sample = {}
        if len(present) == len(masks):
            entries = torch.cat([mask.flatten()[:: mask.numel() // _MOST_ENTRIES | 1] for mask in present])
            sample = {"masks": pack_bits(entries)}
        self.add({**row, "phase": phase, "divergence": None, **sample})
        sampled = [row for row in self.kept if "masks" in row]
        if len(sampled) > _MOST_SAMPLES:
            for row in sampled[1::2]:
                del row["masks"]

    def close_phase(self) -> None:
        """Compare the masks of the phase with its last one."""
        sampled = [row for row in self.kept if "masks" in row]
        last = _unpack(sampled[-1]["masks"]) if sampled else None
        for row in sampled:
            masks = _unpack(row.pop("masks"))
            if last is not None and masks.shape == last.shape:  # a resumed run may have chosen other weights
                row["divergence"] = (masks != last).float().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in types that a checkpoint may hold."""
        return {**super().state_dict(), "validations": self.validations.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved record."""
        super().load_state_dict(state)
        self.validations.load_state_dict(state["validations"])

    def draw_run(self, title: str, metric: str | None) -> Figure:
        """Draw density and decay, flips and divergence, and the validation metric, over steps.

        Args:
            title: Heading of the figure.
            metric: Validation metric to show; ``None`` takes the first that is an accuracy, if there is one.
        """
        metric = metric or next((key for key in self.validations.columns if "acc" in key), None)
        figure, axes = panels(title, [7 / 3] * 3 if metric else [2.5] * 2)
        shares = {"density": "density (share not zero)"}
        if any(0.0 < row["decay"] < 1.0 for row in self.kept):
            shares["decay"] = "decay value D"
        _curves(axes[0], self, shares, drawstyle="steps-post")
        axes[0].set(ylabel="share", ylim=(-0.03, 1.03))
        names = {"flips": "flips since the last log", "divergence": "divergence from the phase's last mask"}
        _curves(axes[1], self, names)
        axes[1].set_ylabel("share of mask entries")
        axes[1].set_ylim(bottom=0.0)
        if metric:
            _curves(axes[2], self.validations, {metric: metric}, marker="o")
            axes[2].set_ylabel(metric)
        for before, row in pairwise(self.kept):
            if row["phase"] != before["phase"]:
                for axis in axes:
                    axis.axvline((before["step"] + row["step"]) / 2, color="0.8", linewidth=0.8, zorder=0)
        axes[-1].set_xlabel("optimizer step")
        return figure


def _has_masks(row: Row) -> float:
    return float("masks" in row or row["divergence"] is not None)


def _unpack(sample: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(sample.numpy()))


def _curves(axis: Axes, record: RunRecord, names: Mapping[str, str], **style: Any) -> None:
    for key, label in names.items():
        steps, values = record.series(key)
        if steps:
            axis.plot(steps, values, label=label, markersize=3, **style)
    if axis.lines:
        axis.legend(frameon=False, fontsize="small")


# The end of the run.


def write_masks(trainer: pl.Trainer, weights: Sequence[SparseWeight], technique: str) -> None:
    """Save the final masks as bool tensors by name, and send the file as an artifact."""
    path = output_file(trainer, technique, "_masks.pt")
    if trainer.is_global_zero and path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({clean_name(w.name): (w.parameter != 0).cpu() for w in weights}, path)
        log_file(trainer, path, name=path.stem, kind="masks")


def settle_unfinished(weights: Sequence[SparseWeight], progress: float, bake: bool, technique: str) -> None:
    """Decide what a run leaves behind that ended before its schedule did, and warn.

    Args:
        weights: The sparse weights.
        progress: Share of the schedule that is done.
        bake: Whether they are to get the final pattern all the same.
        technique: Who makes them sparse.
    """
    if all(weight.phase.final for weight in weights):
        return
    outcome = "The weights are left as validated; bake_on_early_stop=True would prune them to the final pattern."
    if bake:
        outcome = "The weights are pruned to the final pattern, untrained for it."
        for weight in weights:
            weight.phase = NMPhase(weight.pattern, 0.0, True)
    rank_zero_warn(
        f"{technique}: the run stopped at {100 * progress:.0f} % of its schedule, before the final pattern was reached. "
        f"{outcome}"
    )


def warn_of_inexact_best(trainer: pl.Trainer, weights: Sequence[SparseWeight], technique: str) -> None:
    """Name a best checkpoint that was kept from before the final pattern."""
    for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else []:
        path = getattr(callback, "best_model_path", "")
        if path and os.path.isfile(path) and not _holds_pattern(path, weights):
            rank_zero_warn(
                f"{technique}: the best checkpoint {path} is from before the final pattern was reached. Use the last "
                "one, or start to keep checkpoints later."
            )


def _holds_pattern(path: str, weights: Sequence[SparseWeight]) -> bool:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception:  # a file of another format, or one with objects that are not loaded by default
        return True
    return all(is_nm(saved[w.name], w.pattern.n, w.pattern.m, w.dim) for w in weights if w.name in saved)
