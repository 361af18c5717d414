"""The learning-rate schedules of the project."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

Schedule = Literal["cosine", "warmup", "linear", "piecewise", "one-cycle", "constant"]


def warmup_constant(step: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate at ``step``: linear up to one, then constant."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate at ``step``: linear up to one, then a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def linear_decay(step: int, total_steps: int) -> float:
    """Return the factor of the learning rate at ``step``: linear from one down to zero."""
    return max(0.0, 1 - step / total_steps)


def with_schedule(optimizer: Optimizer, schedule: Schedule, total_steps: float, warmup: float) -> OptimizerLRScheduler:
    """Return the result of ``configure_optimizers`` for an optimizer with a schedule.

    Args:
        optimizer: The optimizer to schedule.
        schedule: ``"cosine"`` for warm-up and cosine decay, ``"warmup"`` for warm-up alone, ``"linear"`` for a decay to
            zero, ``"piecewise"`` for a tenth of the rate after half of the run and again after three quarters,
            ``"one-cycle"`` for torch's ``OneCycleLR``, all stepped every batch; ``"constant"`` for none.
        total_steps: Optimizer steps of the whole run, ``trainer.estimated_stepping_batches``.
        warmup: Fraction of ``total_steps`` spent on the linear warm-up.

    Raises:
        ValueError: If a schedule needs the length of the run, and the run is infinite.
    """
    if schedule == "constant":
        return optimizer
    if math.isinf(total_steps):
        raise ValueError(
            f"schedule={schedule!r} needs a run of known length. Set max_epochs or max_steps of the Trainer."
        )
    scheduler = _scheduler(optimizer, schedule, int(total_steps), warmup)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _scheduler(optimizer: Optimizer, schedule: Schedule, total: int, warmup: float) -> LRScheduler:
    if schedule == "piecewise":
        return MultiStepLR(optimizer, [total // 2, 3 * total // 4])
    if schedule == "one-cycle":
        return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=total)
    warmup_steps = int(warmup * total)
    factor: Callable[[int], float] = partial(warmup_constant, warmup_steps=warmup_steps)
    if schedule == "cosine":
        factor = partial(warmup_cosine, total_steps=total, warmup_steps=warmup_steps)
    elif schedule == "linear":
        factor = partial(linear_decay, total_steps=total)
    return LambdaLR(optimizer, factor)
