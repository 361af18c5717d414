"""The order in which techniques change gradients, and warnings about other clippers.

``conditioner.py`` and ``GradientMonitor`` use it. Techniques know each other only by their
attribute ``role``.
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
    "set gradient_clip_val=None. If a library builds the Trainer, set trainer.gradient_clip_val = None before fit(), "
    "or in the setup() of a callback that comes before this one"
)
ANSWERS: Mapping[Role, Mapping[str, Answer]] = {
    "clip": {
        "gradient_clip_val": no("and {} would both clip", f"Keep one: drop the callback, or {_TURN_OFF}"),
        "late_gradients": no(
            "would clip what {} accumulated over many steps",
            "Drop the callback, and clip earlier: {value}(local_clip=...) clips on each rank",
        ),
    },
    "noise": {
        "gradient_clip_val": no(
            "must come after clipping, and {} clips after every callback",
            f"Put NormClipping(max_norm={{value}}) before it and {_TURN_OFF}",
        )
    },
}
"""What techniques of each role do not work with."""


def conditioners(trainer: pl.Trainer) -> list[Any]:
    """Return the techniques of this package that have a role, in list order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if getattr(c, "role", None) in ROLES and hasattr(c, "display_name")]


def refuse_order(trainer: pl.Trainer) -> None:
    """Raise if techniques are in an order in which they undo each other's work.

    Raises:
        ValueError: If the roles are out of order; the message shows the right order.
    """
    found = conditioners(trainer)
    right = sorted(found, key=lambda callback: ROLES.index(callback.role))
    if found != right:

        def written(callbacks: Sequence[Any]) -> str:
            return ", ".join(f"{callback.display_name} ({callback.role})" for callback in callbacks)

        raise ValueError(
            f"Techniques that change gradients must be in the order {', '.join(ROLES)}; got "
            f"callbacks=[{written(found)}]. Write callbacks=[{written(right)}]."
        )


def warn_of_other_clippers(trainer: pl.Trainer, pl_module: pl.LightningModule, clipper: Any, mine: set[int]) -> None:
    """Warn if an earlier technique in the list, or the module itself, clips the same gradients.

    Args:
        trainer: The trainer.
        pl_module: The module.
        clipper: The technique that calls this.
        mine: ``id()`` of the parameters whose gradients it clips.
    """
    for other in conditioners(trainer):
        if other is clipper:
            break
        if other.role == "clip" and not mine.isdisjoint(map(id, other.parameters())):
            rank_zero_warn(
                f"{other.display_name} and {clipper.display_name} both clip the same gradients, one after the other. "
                "If this is not intended, keep one, or set include= so that they clip different parameters."
            )
    if overrides(pl_module, "configure_gradient_clipping"):
        rank_zero_warn(
            f"{type(pl_module).__name__} overrides configure_gradient_clipping, which runs after "
            f"{clipper.display_name}. If it clips too, drop one of them."
        )
