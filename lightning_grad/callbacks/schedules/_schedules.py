"""The module's own schedulers beside ``AccuracyGradientLR``: kept from acting, or warned of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.steps.chosen_rates import unknown_schedulers


def mute_schedulers(pl_module: pl.LightningModule, optimizers: Sequence[Optimizer], label: str) -> Callable[[], None]:
    """Let no scheduler of some optimizers act.

    Returns:
        Callable: Ends it.

    Raises:
        ValueError: Under manual optimization, where the module steps them itself.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{label}: policy='replace' keeps schedulers from acting, and under manual optimization the module steps them "
            "itself. Use policy='multiply', or leave the schedulers out of configure_optimizers."
        )

    def step(inner: Callable[..., Any], scheduler: Any, *args: Any) -> None:
        if not _concerns(scheduler, optimizers):
            inner(scheduler, *args)

    return wrap_method(pl_module, "lr_scheduler_step", step)


def warn_of_schedulers(trainer: pl.Trainer, optimizers: Sequence[Optimizer], monitor: str, label: str) -> None:
    """Warn of those that may undo a cut, and of one that cuts by the same metric."""
    configs = [config for config in trainer.lr_scheduler_configs if _concerns(config.scheduler, optimizers)]
    unknown = unknown_schedulers(config.scheduler for config in configs)
    if unknown:
        rank_zero_warn(
            f"{label}: {', '.join(unknown)} is no scheduler of torch, and may undo the cuts if it sets rates from base rates "
            "of its own. policy='replace' keeps schedulers from acting."
        )
    if any(config.reduce_on_plateau and config.monitor == monitor for config in configs):
        rank_zero_warn(
            f"{label} and ReduceLROnPlateau both cut the learning rate by {monitor!r}. Keep one: drop the scheduler, or set "
            "policy='replace', which keeps it from acting."
        )


def _concerns(scheduler: Any, optimizers: Sequence[Optimizer]) -> bool:
    """Whether a scheduler sets rates of one of these optimizers, as far as it tells."""
    of = getattr(scheduler, "optimizer", None)
    return of is None or any(of is optimizer for optimizer in optimizers)
