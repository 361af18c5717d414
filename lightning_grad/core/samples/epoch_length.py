"""Telling a Trainer in mid-fit that its training epochs have become shorter or longer.

Lightning counts an epoch's batches once, when it loads the data. What follows from that count (the progress bar, the end of
the epoch, when it validates, ``limit_train_batches``) is brought up to date by :meth:`EpochLength.update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn

_INFINITE = float("inf")


class EpochLength:
    """The number of batches in a training epoch of a fit.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._warned_of_interval = False

    @property
    def batches(self) -> float:
        """Batches of an epoch as it is now."""
        return float(self._trainer.fit_loop.max_batches)

    def batches_if(self, length_of: Callable[[Any], float]) -> float:
        """Return how many batches an epoch would have if its loaders had the lengths that ``length_of`` gives."""
        loaders = self._trainer.fit_loop._combined_loader
        if loaders is None:
            return _INFINITE
        lengths = [self._limited(length_of(loader)) for loader in loaders.flattened]
        return float(min(lengths) if loaders._mode == "min_size" else max(lengths))

    def update(self) -> None:
        """Make the Trainer count by the loaders' present lengths. Call it before an epoch's first batch."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        loaders = loop._combined_loader
        if loaders is None:
            return
        loaders.limits = [self._limited(length_of(loader)) for loader in loaders.flattened]
        if loaders._iterator is not None:
            loaders._iterator.limits = loaders.limits
        batches = sized_len(loaders)
        loop.max_batches = _INFINITE if batches is None else batches
        if trainer.val_check_batch is None or batches is None:
            return
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))
        elif trainer.check_val_every_n_epoch is not None:
            self._fit_interval(batches)

    def _fit_interval(self, batches: int) -> None:
        trainer = self._trainer
        if trainer.val_check_interval > batches and trainer.enable_validation and not self._warned_of_interval:
            self._warned_of_interval = True
            rank_zero_warn(
                f"val_check_interval={trainer.val_check_interval} is more than the {batches} batches of a pruned epoch: "
                "validation comes at the end of each such epoch."
            )
        trainer.val_check_batch = min(trainer.val_check_interval, batches)

    def _limited(self, length: float) -> float:
        limit = self._trainer.limit_train_batches
        if isinstance(limit, float) and 0 < limit < 1 and 0 < length < _INFINITE:
            return max(
                1, int(length * limit)
            )  # a share of the whole epoch's batches may be less than one of a pruned one's
        return _parse_num_batches(RunningStage.TRAINING, length, limit)


def length_of(loader: Any) -> float:
    """Return the number of batches of a loader, infinity if it has no length."""
    length = sized_len(loader)
    return _INFINITE if length is None else length
