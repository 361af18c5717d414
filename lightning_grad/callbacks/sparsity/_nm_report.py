"""How a sparse run ends: its masks as a file, a schedule that did not come to its end, and a look at the best checkpoint.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

import os
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.callbacks.sparsity._nm_weight import SparseWeight
from lightning_grad.functional import NMPhase, is_nm
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import log_file, output_file


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
        f"{technique}: the run stopped at {100 * progress:.0f} % of its schedule, before the final pattern. {outcome}"
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
