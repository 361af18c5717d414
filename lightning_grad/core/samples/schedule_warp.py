"""Adapt learning-rate schedules that were made for whole epochs to shorter or longer epochs.

A scheduler that steps with every batch counts steps. If an epoch has half its batches, each step
counts twice, so that a cosine or one-cycle schedule reaches its end. If ``max_steps`` ends the run,
schedules are not changed.
"""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.core.undo import UndoList


def steps_due(done: int, steps: int, full_steps: int) -> int:
    r"""Return how many scheduler steps to take in one step of an epoch of another length.

    .. math::
        \operatorname{round}(s F / N) - \operatorname{round}((s - 1) F / N)

    The N steps of the epoch then add up to the F steps of a whole epoch.

    Args:
        done: s, number of this step in its epoch, counted from 1.
        steps: N, number of steps in this epoch.
        full_steps: F, number of steps in an epoch of the whole training set.

    Example:
        >>> [steps_due(done, 4, 10) for done in range(1, 5)], [steps_due(done, 4, 3) for done in range(1, 5)]
        ([2, 3, 3, 2], [1, 1, 0, 1])
    """
    return round(done * full_steps / steps) - round((done - 1) * full_steps / steps)


def count_steps(batches: int, until: int, accumulate: int, frequency: int) -> int:
    """Return how often a scheduler steps in the first ``until`` batches of an epoch.

    Example:
        >>> count_steps(batches=7, until=7, accumulate=3, frequency=1)
        3
    """
    # It steps after every batch that its frequency divides, if the optimizer steps there. The last
    # batch of an epoch always takes an optimizer step.
    only_at_the_end = until == batches and batches % frequency == 0 and batches % accumulate != 0
    return until // math.lcm(accumulate, frequency) + only_at_the_end


def warp_schedules(trainer: pl.Trainer, pl_module: pl.LightningModule, training_set: TrainingSet) -> Callable[[], None]:
    """Make schedulers that step with batches cover whole epochs, whatever the number of batches.

    Returns:
        Callable: Undoes this.
    """

    def step(inner: Callable[..., Any], scheduler: Any, metric: Any) -> None:
        for _ in range(_steps_now(trainer, training_set, scheduler)):
            inner(scheduler, metric)

    def end_epoch(inner: Callable[..., Any], interval: str, update_plateau_schedulers: bool) -> None:
        # Lightning updates the schedulers that step with epochs last, after those that step with
        # batches.
        if interval == "epoch" and not update_plateau_schedulers and pl_module.automatic_optimization:
            for config in trainer.lr_scheduler_configs:
                # A scheduler may have no step at all in so few batches; all of its steps are made
                # here.
                if _is_warped(trainer, training_set, config) and not _steps_of_epochs(trainer, training_set, config)[0]:
                    pl_module.lr_scheduler_step(config.scheduler, None)
        inner(interval, update_plateau_schedulers=update_plateau_schedulers)

    undo = UndoList()
    undo.push(wrap_method(pl_module, "lr_scheduler_step", step))
    undo.push(wrap_method(trainer.fit_loop.epoch_loop, "update_lr_schedulers", end_epoch))
    return undo.run


def warn_of_two_ends(trainer: pl.Trainer, training_set: TrainingSet, display_name: str) -> bool:
    """Warn, and return True, if schedules are made for ``max_steps`` but ``max_epochs`` will end the run earlier."""
    configs = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    batches, full_batches = training_set.batches, training_set.full_batches
    if not configs or trainer.max_epochs in (None, -1) or batches >= full_batches:
        return False
    left = (trainer.max_epochs - trainer.current_epoch) * math.ceil(batches / trainer.accumulate_grad_batches)
    if _epochs_end_the_run(trainer, full_batches) or trainer.global_step + left >= trainer.max_steps:
        return False
    rank_zero_warn(
        f"With {display_name}, max_epochs={trainer.max_epochs} ends the run before max_steps={trainer.max_steps}. "
        "Schedulers that step with batches are made for max_steps and will not reach their end. Set only one of "
        "max_epochs and max_steps."
    )
    return True


def _steps_now(trainer: pl.Trainer, training_set: TrainingSet, scheduler: Any) -> int:
    config = next((c for c in trainer.lr_scheduler_configs if c.scheduler is scheduler), None)
    if config is None or not _is_warped(trainer, training_set, config):
        return 1
    steps, full_steps = _steps_of_epochs(trainer, training_set, config)
    if not steps:
        return full_steps
    spacing = (trainer.accumulate_grad_batches, config.frequency)
    done = count_steps(int(training_set.batches), trainer.fit_loop.batch_idx + 1, *spacing)
    return steps_due(done, steps, full_steps)


def _is_warped(trainer: pl.Trainer, training_set: TrainingSet, config: Any) -> bool:
    batches, full_batches = training_set.batches, training_set.full_batches
    counts = config.interval == "step" and not config.reduce_on_plateau
    if not counts or batches == full_batches or float("inf") in (batches, full_batches):
        return False
    return _epochs_end_the_run(trainer, full_batches)


def _steps_of_epochs(trainer: pl.Trainer, training_set: TrainingSet, config: Any) -> tuple[int, int]:
    """Return the number of steps of a scheduler in this epoch and in an epoch of the whole training set."""
    spacing = (trainer.accumulate_grad_batches, config.frequency)
    batches, full_batches = int(training_set.batches), int(training_set.full_batches)
    return count_steps(batches, batches, *spacing), count_steps(full_batches, full_batches, *spacing)


def _epochs_end_the_run(trainer: pl.Trainer, full_batches: float) -> bool:
    """Return True if ``max_epochs`` ends the run rather than ``max_steps``, which pruning does not affect."""
    if trainer.max_epochs in (None, -1):
        return False
    steps = trainer.max_epochs * math.ceil(full_batches / trainer.accumulate_grad_batches)
    return trainer.max_steps == -1 or trainer.max_steps >= steps
