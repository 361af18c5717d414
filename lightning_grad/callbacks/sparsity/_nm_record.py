"""The results of a sparse run: its rows, its figure, the mask file, and warnings about an unfinished schedule.

Used only by :class:`lightning_grad.callbacks.NMSparsity`.
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
from lightning_grad.core.record import Row, RunRecord, panels, style_axis
from lightning_grad.core.views.portable import pack_bits
from lightning_grad.functional import NMPhase, is_nm
from lightning_grad.functional.gradients.tensor_lists import shards, whole
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import log_file, output_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ENTRIES = 2**14  # mask entries of a weight kept for the divergence: the error of the share is below 0.4 %
_MOST_NAMED = 6  # with more phases, their names do not fit into the figure
_COLORS = ("#0072b2", "#d55e00")
_MOST_SAMPLES = 64  # mask samples of the current phase; with more, every second one is dropped


class SparsityRecord(RunRecord):
    """Rows of a run, one per log step, with the divergence of each row's masks from the last masks of its phase.

    The sparse architecture divergence (SAD) needs the mask at the end of a phase, so it is computed only then: the
    rows of the current phase keep a bounded sample of mask entries.
    """

    def __init__(self) -> None:
        super().__init__(weight=_has_masks)
        self.validations = RunRecord()

    def add_step(self, row: Row, phase: str, masks: Mapping[str, Tensor | None]) -> None:
        """Append a row.

        Args:
            row: Scalars of this log step.
            phase: Name of the phase; when it changes, the divergence of the previous phase is computed.
            masks: Mask of each weight by name, or ``None`` if it has none yet.
        """
        if self.count and self.last["phase"] != phase:
            self.close_phase()
        present = [mask for mask in masks.values() if mask is not None]
        sample = {}
        if len(present) == len(masks):
            own = shards(present)  # of sharded masks, the shards of rank 0, which writes the record, are the sample
            entries = torch.cat([mask.flatten()[:: mask.numel() // _MOST_ENTRIES | 1] for mask in own])
            sample = {"masks": pack_bits(entries)}
        self.add({**row, "phase": phase, "divergence": None, **sample})
        sampled = [row for row in self.kept if "masks" in row]
        if len(sampled) > _MOST_SAMPLES:
            for row in sampled[1::2]:
                del row["masks"]

    def close_phase(self) -> None:
        """Compare the masks of the phase with its last mask."""
        sampled = [row for row in self.kept if "masks" in row]
        last = _unpack(sampled[-1]["masks"]) if sampled else None
        for row in sampled:
            masks = _unpack(row.pop("masks"))
            if last is not None and masks.shape == last.shape:  # a resumed run may use other weights
                row["divergence"] = (masks != last).float().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Return the record in types that a checkpoint may contain."""
        return {**super().state_dict(), "validations": self.validations.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved record."""
        super().load_state_dict(state)
        self.validations.load_state_dict(state["validations"])

    def draw_run(self, title: str, metric: str | None) -> Figure:
        """Draw validation metric, share of nonzero weights, and mask changes over the steps.

        Args:
            title: Title of the figure.
            metric: Validation metric to show; ``None`` shows the first accuracy, if there is one.
        """
        metric = metric or next((key for key in self.validations.columns if "acc" in key), None)
        has_metric = metric in self.validations.columns
        if metric and not has_metric:
            rank_zero_warn(
                f"NMSparsity: figure_metric={metric!r} was not logged in validation, so the figure does not show it. "
                "Set it to a metric that validation_step logs."
            )
        figure, axes = panels(title, [2.6] * (2 + has_metric), rest=0.6)
        if metric and has_metric:
            self._draw_metric(axes[0], metric)
        sizes = {"density": "not zero"}
        if any(0.0 < row["decay"] < 1.0 for row in self.kept):
            sizes["decay"] = "factor on pruned weights (D)"
        _draw_shares(axes[-2], self, sizes, "Weights that are not zero", drawstyle="steps-post")
        axes[-2].set_ylim(-0.03, 1.09)
        changes = {"flips": "since the last log step", "divergence": "until the end of the phase"}
        _draw_shares(axes[-1], self, changes, "Mask entries that changed")
        axes[-1].set_ylim(bottom=0.0)
        self._mark_phases(axes)
        axes[-1].set_xlabel("optimizer step")
        return figure

    def _draw_metric(self, axis: Axes, metric: str) -> None:
        steps, values = self.validations.series(metric)
        final = next((row["step"] for row in self.kept if row["exact"]), 0)
        before = [value for step, value in zip(steps, values, strict=True) if step <= final]
        axis.plot(steps, values, "o-", color=_COLORS[0], markersize=3.5)
        start = f", {before[-1]:.4g} before the final pattern" if before else ""
        axis.set_title(f"{metric}: {values[-1]:.4g} at the end{start}", fontsize=10, loc="left", parse_math=False)
        style_axis(axis)

    def _mark_phases(self, axes: Sequence[Axes]) -> None:
        starts = self.kept[:1] + [row for before, row in pairwise(self.kept) if row["phase"] != before["phase"]]
        for row in starts:
            for axis in axes if row is not starts[0] else []:
                axis.axvline(row["step"], color="0.7", linewidth=0.8, zorder=0)
            if len(starts) <= _MOST_NAMED:
                axes[-2].text(row["step"], 1.03, f" {row['phase']}", fontsize=8, color="0.35")


def _has_masks(row: Row) -> float:
    return float("masks" in row or row["divergence"] is not None)


def _unpack(sample: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(sample.numpy()))


def _draw_shares(axis: Axes, record: RunRecord, names: Mapping[str, str], title: str, **style: Any) -> None:
    """Draw columns that are shares, in percent, with the last value of the first column in the title."""
    known = {key: record.series(key) for key in names if record.series(key)[0]}
    for color, (key, (steps, values)) in zip(_COLORS, known.items(), strict=False):
        axis.plot(steps, values, color=color, label=names[key], **style)
    end = f": {100 * next(iter(known.values()))[1][-1]:.3g} % at the end" if known else ""
    axis.set_title(f"{title}{end}", fontsize=10, loc="left")
    if len(known) > 1:
        axis.legend(frameon=False, fontsize="small")
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    style_axis(axis)


# The end of the run.


def write_masks(trainer: pl.Trainer, weights: Sequence[SparseWeight], technique: str) -> None:
    """Save the final masks as bool tensors by name, and log the file as an artifact."""
    path = output_file(trainer, technique, "_masks.pt")
    masks = {clean_name(w.name): whole(w.parameter.detach() != 0).cpu() for w in weights}  # by all ranks, if sharded
    if trainer.is_global_zero and path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(masks, path)
        log_file(trainer, path, name=path.stem, kind="masks")


def settle_unfinished(weights: Sequence[SparseWeight], progress: float, bake: bool, technique: str) -> None:
    """Warn if the run stopped before its schedule ended, and apply the final pattern if ``bake`` is set.

    Args:
        weights: The sparse weights.
        progress: Share of the schedule that is done.
        bake: Whether to prune to the final pattern all the same.
        technique: Name of the callback.
    """
    if all(weight.phase.final for weight in weights):
        return
    outcome = "The weights stay as they were validated; bake_on_early_stop=True would prune them to the final pattern."
    if bake:
        outcome = "The weights are pruned to the final pattern without training for it."
        for weight in weights:
            weight.phase = NMPhase(weight.pattern, 0.0, True)
    rank_zero_warn(
        f"{technique}: the run stopped at {100 * progress:.0f} % of its schedule, before the final pattern was reached. "
        f"{outcome}"
    )


def warn_of_inexact_best(trainer: pl.Trainer, weights: Sequence[SparseWeight], technique: str) -> None:
    """Warn if a best checkpoint dates from before the final pattern."""
    for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else []:
        path = getattr(callback, "best_model_path", "")
        if path and os.path.isfile(path) and not _holds_pattern(path, weights):
            rank_zero_warn(
                f"{technique}: the best checkpoint {path} is from before the final pattern was reached. Use the last "
                "one, or start to save checkpoints later."
            )


def _holds_pattern(path: str, weights: Sequence[SparseWeight]) -> bool:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception:  # another file format, or objects that weights_only=True does not load
        return True
    return all(is_nm(saved[w.name], w.pattern.n, w.pattern.m, w.dim) for w in weights if w.name in saved)
