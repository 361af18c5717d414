"""The validation that Lightning skips when a run resumes from a checkpoint written just before it.

If a validation is due after a step, a checkpoint of that step (``every_n_train_steps``, or an
exception in ``on_train_batch_end``) is written before the validation. The run that resumes from it
counts the validation as done. The weights are the same either way, but a callback that acts on
validation metrics must run the validation first.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_grad.core.dispatch import wrap_method


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Return True if a validation follows the batch that was just trained on. Call it in ``on_train_batch_end``."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def run_missed_validation(trainer: pl.Trainer, afterwards: Callable[[], None]) -> Callable[[], None]:
    """Run a whole validation before the first batch, with all hooks and logs. Call it in ``on_train_start``.

    If the checkpoint was written in the middle of the validation, Lightning itself completes it,
    and this does nothing.

    Args:
        trainer: The trainer, in a fit that resumes.
        afterwards: Called after the validation.

    Returns:
        Callable: Cancels the validation if it has not run yet.
    """
    loop = trainer.fit_loop.epoch_loop
    step = loop._batches_that_stepped  # Lightning advances this before the next batch; logs need the current value

    def validate_first(inner: Callable[..., None], *args: Any) -> None:
        undo()
        _validate(trainer, step)
        afterwards()
        inner(*args)

    # Not now: the callbacks later in the list have not had their on_train_start yet.
    undo = wrap_method(loop, "advance", validate_first)
    if loop.val_loop.restarted_mid_evaluation:
        undo()
    return undo


def _validate(trainer: pl.Trainer, step: int) -> None:
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    first_iteration, step_now = connector._first_loop_iter, loop._batches_that_stepped
    loop.val_loop.restarting, loop._batches_that_stepped = False, step
    trainer.validating = True
    try:
        loop.val_loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter, loop._batches_that_stepped = first_iteration, step_now
