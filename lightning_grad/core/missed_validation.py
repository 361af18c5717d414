"""The validation that Lightning leaves out when a run goes on from a checkpoint written just before it.

A checkpoint of a step after which a validation is due (``every_n_train_steps``, an exception in ``on_train_batch_end``) is
written before that validation. The run that resumes from it takes the validation as done. For weights it makes no difference;
a callback that acts on validation metrics must run it first.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_grad.core.dispatch import wrap_method


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the batch that has just been trained on; for ``on_train_batch_end``."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def run_missed_validation(trainer: pl.Trainer, afterwards: Callable[[], None]) -> Callable[[], None]:
    """Run a whole validation before the first batch, with all hooks and logs; for ``on_train_start``.

    Nothing is run if Lightning does it itself, because the checkpoint was written in the middle of the validation.

    Args:
        trainer: The trainer, in a fit that resumes.
        afterwards: Called when it is done.

    Returns:
        Callable: Takes back what was prepared.
    """
    loop = trainer.fit_loop.epoch_loop
    step = loop._batches_that_stepped  # Lightning counts the batch as done before it goes on

    def validate_first(inner: Callable[..., None], *args: Any) -> None:
        undo()
        _validate(trainer, step)
        afterwards()
        inner(*args)

    # Not at once: the callbacks that come later in the list have not begun yet.
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
