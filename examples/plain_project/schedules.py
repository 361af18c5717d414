"""The learning-rate schedules of the project."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "warmup", "constant"]


def warmup_constant(step: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate at ``step``: linear up to one, and one from then on."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate at ``step``: linear up to one, then half a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def with_schedule(optimizer: Optimizer, schedule: Schedule, total_steps: float, warmup: float) -> OptimizerLRScheduler:
    """Return what ``configure_optimizers`` returns for ``optimizer`` under ``schedule``.

    Args:
        optimizer: The optimizer to schedule.
        schedule: ``"cosine"`` for warm-up and cosine decay, ``"warmup"`` for warm-up alone, both stepped every batch;
            ``"constant"`` for none.
        total_steps: Optimizer steps of the whole run, ``trainer.estimated_stepping_batches``.
        warmup: Fraction of ``total_steps`` spent on the linear warm-up.

    Raises:
        ValueError: If a schedule with warm-up is asked for in a run without an end.
    """
    if schedule == "constant":
        return optimizer
    if math.isinf(total_steps):
        raise ValueError(f"schedule={schedule!r} needs a run with an end: set max_epochs or max_steps of the Trainer.")
    total = int(total_steps)
    warmup_steps = int(warmup * total)
    factor: Callable[[int], float] = partial(warmup_constant, warmup_steps=warmup_steps)
    if schedule == "cosine":
        factor = partial(warmup_cosine, total_steps=total, warmup_steps=warmup_steps)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
    }
