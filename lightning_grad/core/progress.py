"""Where in the run are we?

Read from the counters that the Trainer keeps and restores itself. They know accumulation, resuming and a training set
that shrinks, go on when a GradScaler skips a step, and mean the same for one optimizer or several, so that nothing has
to be counted or saved here. (Counting an optimizer's own steps would run ahead or behind wherever a manual loop steps
it five times a batch, or every second batch.)

Where the data have no length, the first epoch measures it: progress stays 0 until that epoch is over. Where a run has no
end that can be known (``max_epochs=-1``, ``max_time``, one epoch of data without a length), the user states it as
``total_steps=`` of the technique.
"""

import math

import lightning.pytorch as pl

from lightning_grad.utilities.checks import check_count

IN_FIRST_EPOCH = "waits for the end of the first epoch, which shows how long an epoch of these data is"


def check_total_steps(total_steps: int | None) -> int | None:
    """Return the length of a run as the user states it, which must be ``None`` or at least 1.

    Raises:
        ValueError: If it is not.
    """
    return None if total_steps is None else check_count(total_steps, 1, "total_steps")


def run_progress(trainer: pl.Trainer, steps_ahead: int = 0, stated: int | None = None) -> float:
    """Return the share of the fit that is done, 0 to 1.

    It is the share of batches of all epochs or, where ``max_steps`` ends the run earlier, the share of steps.

    Args:
        trainer: The trainer, in a fit.
        steps_ahead: Optimizer steps that are done but that the trainer has not counted yet: 1 in an optimizer's post
            hook.
        stated: Length of the run in optimizer steps, as the user states it; nothing else counts then.
    """
    steps = trainer.global_step + steps_ahead
    if stated is not None:
        return min(steps / stated, 1.0)
    shares = [0.0]
    batches = epoch_batches(trainer)
    if trainer.max_epochs not in (None, -1) and batches is not None and batches > 0:
        done = trainer.current_epoch * batches + _batches_of_epoch(trainer, batches)
        shares.append(done / (trainer.max_epochs * batches))
    if trainer.max_steps not in (None, -1):
        shares.append(steps / max(trainer.max_steps, 1))
    return min(max(shares), 1.0)


def _batches_of_epoch(trainer: pl.Trainer, batches: float) -> float:
    """Return how many batches of the present epoch are done, the present one counted."""
    done = trainer.fit_loop.batch_idx + 1
    if math.isfinite(trainer.num_training_batches):
        return done
    # An epoch may turn out longer or shorter than those that it is measured by.
    return batches if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch else min(done, batches)


def epoch_batches(trainer: pl.Trainer) -> float | None:
    """Return the batches of an epoch; of data without a length the mean of the epochs so far, ``None`` in the first.

    Call it in the hooks of a batch: between epochs Lightning's counters still are those of the epoch before.
    """
    batches = trainer.num_training_batches
    if math.isfinite(batches):
        return batches
    progress = trainer.fit_loop.epoch_loop.batch_progress
    past = progress.total.ready - progress.current.ready
    return past / trainer.current_epoch if trainer.current_epoch > 0 and past > 0 else None


def total_steps(trainer: pl.Trainer, needed_by: str, stated: int | None = None) -> int | None:
    """Return the length of the fit in optimizer steps.

    Call it in ``on_train_start``, not before: it loads the training data, and a loader that continues in mid-epoch must
    not be loaded before Lightning has restored where it stood.

    Args:
        trainer: The trainer, from ``on_train_start`` on.
        needed_by: Who asks, for the error.
        stated: The length, as the user states it.

    Returns:
        int: The length; ``None`` in the first of several epochs of data without a length.

    Raises:
        ValueError: If the fit has no end that is known beforehand, and none is stated.
    """
    if stated is not None:
        return stated
    steps = math.inf if trainer.max_epochs == trainer.max_steps == -1 else trainer.estimated_stepping_batches
    if steps != -1 and math.isfinite(steps):
        return int(steps)
    batches = epoch_batches(trainer) if trainer.max_epochs not in (None, -1) else None
    if batches is not None:
        return math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
    if (trainer.max_epochs or 0) > 1:
        return None
    raise ValueError(
        f"{needed_by} places its phases by the length of the run, and this one has no known end. Set total_steps=... of "
        f"{needed_by} or Trainer(max_steps=...), or max_epochs=... with a data loader that has a length."
    )
