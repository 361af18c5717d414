"""Where in the run are we?

Read from the counters that the Trainer keeps and restores itself. They know accumulation, resuming and a training set
that shrinks, go on when a GradScaler skips a step, and mean the same for one optimizer or several, so that nothing has
to be counted or saved here. (Counting an optimizer's own steps would run ahead or behind wherever a manual loop steps
it five times a batch, or every second batch.)
"""

from __future__ import annotations

import math

import lightning.pytorch as pl


def run_progress(trainer: pl.Trainer, steps_ahead: int = 0) -> float:
    """Return the share of the fit that is done, 0 to 1.

    It is the share of batches of all epochs or, where ``max_steps`` ends the run earlier, the share of steps.

    Args:
        trainer: The trainer, in a fit.
        steps_ahead: Optimizer steps that are done but that the trainer has not counted yet: 1 in an optimizer's post
            hook.
    """
    shares = [0.0]
    batches = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and math.isfinite(batches) and batches > 0:
        done = trainer.current_epoch * batches + trainer.fit_loop.batch_idx + 1
        shares.append(done / (trainer.max_epochs * batches))
    if trainer.max_steps not in (None, -1):
        shares.append((trainer.global_step + steps_ahead) / max(trainer.max_steps, 1))
    return min(max(shares), 1.0)


def total_steps(trainer: pl.Trainer, needed_by: str) -> int:
    """Return the length of the fit in optimizer steps.

    Call it in ``on_train_start``, not before: it loads the training data, and a loader that continues in mid-epoch must
    not be loaded before Lightning has restored where it stood.

    Args:
        trainer: The trainer, from ``on_train_start`` on.
        needed_by: Who asks, for the error.

    Raises:
        ValueError: If the fit has no end that is known beforehand.
    """
    steps = math.inf if trainer.max_epochs == trainer.max_steps == -1 else trainer.estimated_stepping_batches
    if steps == -1 or math.isinf(steps):
        raise ValueError(
            f"{needed_by} places its phases by the length of the run, and this one has no known end. Set "
            "Trainer(max_steps=...), or max_epochs=... with a data loader that has a length."
        )
    return int(steps)
