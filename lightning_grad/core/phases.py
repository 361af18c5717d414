"""In which order techniques change gradients, and who else clips.

Used by ``conditioner.py`` and by ``GradientMonitor``. Techniques know of each other only by what they carry: a ``phase``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.core.dispatch import overrides

Phase = Literal["guard", "center", "clip", "noise", "observe"]
PHASES: tuple[Phase, ...] = get_args(Phase)


def conditioners(trainer: pl.Trainer) -> list[Any]:
    """Return the techniques of this package that stand in some phase, in the order of the list."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if getattr(c, "phase", None) in PHASES and hasattr(c, "label")]


def refuse_order(trainer: pl.Trainer) -> None:
    """Raise if techniques stand in an order in which they undo each other's work, and show the right one.

    Raises:
        ValueError: If the phases do not follow each other.
    """
    found = conditioners(trainer)
    right = sorted(found, key=lambda callback: PHASES.index(callback.phase))
    if found != right:

        def written(callbacks: Sequence[Any]) -> str:
            return ", ".join(f"{callback.label} ({callback.phase})" for callback in callbacks)

        raise ValueError(
            f"What changes gradients acts in the order {', '.join(PHASES)}. Got callbacks=[{written(found)}]; write "
            f"callbacks=[{written(right)}]."
        )


def refuse_trainer_clipping(trainer: pl.Trainer, technique: str, phase: Phase) -> None:
    """Raise if Lightning's own clipping would clip a second time, or would clip noise.

    Raises:
        ValueError: For a technique of the phase clip or noise together with ``gradient_clip_val``.
    """
    if not trainer.gradient_clip_val or phase not in ("clip", "noise"):
        return
    option = f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
    turn_off = (
        "set gradient_clip_val=None. If a library builds the Trainer, set trainer.gradient_clip_val = None before fit(), or "
        "in the setup() of a callback that stands before this one"
    )
    if phase == "clip":
        raise ValueError(f"{technique} and {option} would both clip. Keep one: drop the callback, or {turn_off}.")
    raise ValueError(
        f"{technique} comes after clipping, and {option} clips after every callback. Put NormClipping(max_norm="
        f"{trainer.gradient_clip_val}) before it and {turn_off}."
    )


def refuse_compressed_gradients(trainer: pl.Trainer, technique: str, phase: Phase) -> None:
    """Raise if the strategy hands over gradients that it has accumulated over many steps: clipping loses part of them.

    Raises:
        ValueError: For a technique of the phase clip.
    """
    if phase == "clip" and getattr(trainer.strategy, "gradient_is_compressed", False):
        strategy = type(trainer.strategy).__name__
        raise ValueError(
            f"{technique} would clip what {strategy} has accumulated over many steps. Drop the callback, and clip before "
            "that: DGCStrategy(local_clip=...) does so on each rank."
        )


def warn_of_other_clippers(trainer: pl.Trainer, pl_module: pl.LightningModule, clipper: Any, mine: set[int]) -> None:
    """Warn of who else clips the same gradients: a technique before this one in the list, or the module itself.

    Args:
        trainer: The trainer.
        pl_module: The module.
        clipper: The technique that asks.
        mine: Identities of the parameters whose gradients it clips.
    """
    for other in conditioners(trainer):
        if other is clipper:
            break
        if other.phase == "clip" and not mine.isdisjoint(map(id, other.parameters())):
            rank_zero_warn(
                f"{other.label} and {clipper.label} both clip the same gradients, one after the other. If that is not "
                "meant, keep one, or separate them by include=."
            )
    if overrides(pl_module, "configure_gradient_clipping"):
        rank_zero_warn(
            f"{type(pl_module).__name__}.configure_gradient_clipping is the module's own and runs after {clipper.label}. "
            "If it clips too, drop one of them."
        )
