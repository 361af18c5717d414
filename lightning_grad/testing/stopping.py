"""Callbacks that interrupt a fit at a chosen step."""

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override


class StopIn(pl.Callback):
    """Raise in a hook of a step, on every rank.

    Args:
        hook: Name of a callback hook whose first argument is the trainer.
        step: The ``trainer.global_step`` at which to raise.
        error: The exception to raise; ``KeyboardInterrupt`` simulates Ctrl-C.
    """

    def __init__(self, hook: str, step: int, error: type[BaseException] = RuntimeError) -> None:
        self.step, self.error = step, error
        self.trainer: Any = None
        """The interrupted trainer; ``None`` until it is."""
        setattr(self, hook, self._raise)

    def _raise(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.trainer = trainer
            raise self.error("stopped on purpose")


class StopAt(StopIn):
    """Raise at the start of a batch."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__("on_train_batch_start", step, error)


class StopAfter(StopIn):
    """Raise at the end of a batch, where Lightning itself resumes bitwise if the loader is resumable."""

    def __init__(self, step: int) -> None:
        super().__init__("on_train_batch_end", step)


class StopInTrainingStep(pl.Callback):
    """Raise in the module's ``training_step``, on every rank."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        training_step = pl_module.training_step

        def raising(batch: Any, batch_idx: int) -> Any:
            if trainer.global_step == self.step:
                raise RuntimeError("stopped on purpose")
            return training_step(batch, batch_idx)

        pl_module.training_step = raising  # type: ignore[method-assign]
