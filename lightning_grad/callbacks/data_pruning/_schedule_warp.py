"""Learning-rate schedules that were made for whole epochs, in epochs that are shorter or longer.

A scheduler that steps with every batch counts steps. When an epoch has half its batches, it gets two steps for one, so
that a cosine or a one-cycle schedule ends where it should. Where ``max_steps`` ends the run, schedules are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_grad.utilities.dispatch import wrap_method
from lightning_grad.utilities.training_set import TrainingSet


def steps_due(done: int, steps: int, full_steps: int) -> int:
    r"""Return how many steps of the whole epoch's schedule belong to one step of an epoch of another length.

    .. math::
        \operatorname{round}(s F / N) - \operatorname{round}((s - 1) F / N)

    so that the N steps of the epoch add up to the F of the whole one.

    Args:
        done: s, the number of this step in its epoch, from 1.
        steps: N, steps of this epoch.
        full_steps: F, steps of an epoch of the whole training set.

    Example:
        >>> [steps_due(done, 4, 10) for done in range(1, 5)], [steps_due(done, 4, 3) for done in range(1, 5)]
        ([2, 3, 3, 2], [1, 1, 0, 1])
    """
    return round(done * full_steps / steps) - round((done - 1) * full_steps / steps)


def count_steps(batches: int, until: int, accumulate: int, frequency: int) -> int:
    """Return how often a scheduler steps in the first ``until`` of an epoch's batches.

    Example:
        >>> count_steps(batches=7, until=7, accumulate=3, frequency=1)
        3
    """
    return sum(
        number % frequency == 0 and (number % accumulate == 0 or number == batches) for number in range(1, until + 1)
    )


def warp_schedules(trainer: pl.Trainer, pl_module: pl.LightningModule, training_set: TrainingSet) -> Callable[[], None]:
    """Let schedulers that step with batches follow the whole training set, however many batches an epoch has.

    Returns:
        Callable: Ends it.
    """

    def step(inner: Callable[..., Any], scheduler: Any, metric: Any) -> None:
        for _ in range(_steps_now(trainer, training_set, scheduler)):
            inner(scheduler, metric)

    return wrap_method(pl_module, "lr_scheduler_step", step)


def _steps_now(trainer: pl.Trainer, training_set: TrainingSet, scheduler: Any) -> int:
    batches, full_batches = training_set.batches, training_set.full_batches
    config = next((c for c in trainer.lr_scheduler_configs if c.scheduler is scheduler), None)
    counts = config is not None and config.interval == "step" and not config.reduce_on_plateau
    if not counts or batches == full_batches or float("inf") in (batches, full_batches):
        return 1
    assert config is not None
    if not _epochs_end_the_run(trainer, full_batches):
        return 1
    spacing = (trainer.accumulate_grad_batches, config.frequency)
    steps = count_steps(int(batches), int(batches), *spacing)
    full_steps = count_steps(int(full_batches), int(full_batches), *spacing)
    done = count_steps(int(batches), trainer.fit_loop.batch_idx + 1, *spacing)
    return steps_due(done, steps, full_steps)


def _epochs_end_the_run(trainer: pl.Trainer, full_batches: float) -> bool:
    """Whether schedules were made for a number of epochs, and not for ``max_steps``, which pruning does not change."""
    if trainer.max_epochs in (None, -1):
        return False
    steps = trainer.max_epochs * math.ceil(full_batches / trainer.accumulate_grad_batches)
    return trainer.max_steps == -1 or trainer.max_steps >= steps
