"""In which order techniques change gradients, and who else clips.

Used by ``conditioner.py`` and by ``GradientMonitor``. Techniques know of each other only by what they carry: a ``role``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.core.compatibility import Answer, no
from lightning_grad.core.dispatch import overrides

Role = Literal["guard", "center", "clip", "noise", "observe"]
ROLES: tuple[Role, ...] = get_args(Role)

_TURN_OFF = (
    "set gradient_clip_val=None. If a library builds the Trainer, set trainer.gradient_clip_val = None before fit(), or in "
    "the setup() of a callback that stands before this one"
)
ANSWERS: Mapping[Role, Mapping[str, Answer]] = {
    "clip": {
        "gradient_clip_val": no("and {} would both clip", f"Keep one: drop the callback, or {_TURN_OFF}"),
        "late_gradients": no(
            "would clip what {} accumulated over many steps",
            "Drop the callback, and clip before that: {value}(local_clip=...) does so on each rank",
        ),
    },
    "noise": {
        "gradient_clip_val": no(
            "comes after clipping, and {} clips after every callback",
            f"Put NormClipping(max_norm={{value}}) before it and {_TURN_OFF}",
        )
    },
}
"""What techniques of a role do not work with."""


def conditioners(trainer: pl.Trainer) -> list[Any]:
    """Return the techniques of this package that have a role, in the order of the list."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if getattr(c, "role", None) in ROLES and hasattr(c, "display_name")]


def refuse_order(trainer: pl.Trainer) -> None:
    """Raise if techniques stand in an order in which they undo each other's work, and show the right one.

    Raises:
        ValueError: If the roles are out of order.
    """
    found = conditioners(trainer)
    right = sorted(found, key=lambda callback: ROLES.index(callback.role))
    if found != right:

        def written(callbacks: Sequence[Any]) -> str:
            return ", ".join(f"{callback.display_name} ({callback.role})" for callback in callbacks)

        raise ValueError(
            f"What changes gradients acts in the order {', '.join(ROLES)}. Got callbacks=[{written(found)}]; write "
            f"callbacks=[{written(right)}]."
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
        if other.role == "clip" and not mine.isdisjoint(map(id, other.parameters())):
            rank_zero_warn(
                f"{other.display_name} and {clipper.display_name} both clip the same gradients, one after the other. If "
                "that is not meant, keep one, or separate them by include=."
            )
    if overrides(pl_module, "configure_gradient_clipping"):
        rank_zero_warn(
            f"{type(pl_module).__name__}.configure_gradient_clipping is the module's own and runs after "
            f"{clipper.display_name}. If it clips too, drop one of them."
        )
