"""The samples of each batch, for techniques that weight samples by index but do not choose them."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.core.undo import UndoList


class DrawnSamples:
    """The samples that a fit trains on.

    If another callback chooses the samples of each epoch, it knows the samples of a batch; otherwise this object finds
    them.

    Args:
        trainer: The trainer, before it has loaded its training data.
        display_name: Name of the technique, for errors.
        undo: List that receives the undo steps.
        loader_key: Key or list position of the training loader, if there are several.

    Raises:
        ValueError: If the other callback chooses the samples of another loader.
    """

    def __init__(
        self, trainer: pl.Trainer, display_name: str, undo: UndoList, loader_key: str | int | None = None
    ) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._chooser = next((each for each in callbacks if isinstance(each, SubsetCallback)), None)
        key = None if loader_key is None else str(loader_key)
        other = None if self._chooser is None else self._chooser.loader_key
        if self._chooser is not None and key is not None and other is not None and key != str(other):
            raise ValueError(
                f"{display_name} weights samples of the loader {loader_key!r}, but {self._chooser.display_name} chooses "
                f"those of the loader {other!r}, and only one can be followed. Set the same loader_key for both."
            )
        self._own = TrainingSet(trainer, display_name, undo, key) if self._chooser is None else None

    @property
    def training_set(self) -> TrainingSet:
        """The training set."""
        if self._chooser is not None:
            return self._chooser.training_set
        assert self._own is not None
        return self._own

    def begin(self) -> None:
        """Start with the fit."""
        if self._own is not None:
            self._own.begin(None)

    def resume(self) -> None:
        """Begin the next epoch if the fit resumes behind the last batch of one."""
        if self._own is not None and self._own.resumes_behind_last_batch:
            self._own.keep(None)
            self._own.leave_epoch()

    def begin_epoch(self) -> None:
        """Start with an epoch."""
        if self._own is not None:
            self._own.keep(None)

    def draw(self, batch_idx: int) -> list[int]:
        """Return the samples of the batch that begins; none if another callback knows them."""
        return [] if self._own is None else self._own.draw(batch_idx)

    def of_batch(self, drawn: list[int]) -> list[int]:
        """Return the samples of the current batch, inside its step.

        Args:
            drawn: What :meth:`draw` returned for it.
        """
        return drawn if self._chooser is None else self._chooser.indices
