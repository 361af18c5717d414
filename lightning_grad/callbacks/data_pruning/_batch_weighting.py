"""Base of techniques that weight each batch by itself: ``LossReweighting`` and ``CurriculumWeighting``."""

import math
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._weighting import LossWeighting
from lightning_grad.core.compatibility import yes
from lightning_grad.core.fit import during_fit
from lightning_grad.core.losses.batch_sizes import batch_size_of, size_by_sampler
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import is_sharded

ONE_SIZE = yes(
    "Each batch is weighted separately. Ranks need batches of the same size, which Lightning's sampler provides."
)
_REHEARSALS = 4  # number of first batches that may have no loss before the check of rows is given up


class BatchWeighting(LossWeighting):
    """Weights the samples of a batch relative to each other, so it needs no indices of samples.

    It checks on the first batch that adjacent rows of the loss belong to one sample.
    """

    of_batch: ClassVar[tuple[str, ...]] = ("_batch_idx", "_samples")

    _trainer = during_fit[pl.Trainer]()
    _first = during_fit[Any](lambda _: None)
    _rehearsals_left = during_fit[int](lambda _: _REHEARSALS)
    _batch_idx = during_fit.of(int)
    _samples = during_fit[int | None](lambda _: None)  # of the batch

    @override
    def samples_of(self, batch: Any) -> int | None:
        self._samples = batch_size_of(batch, lambda: size_by_sampler(self._trainer, self._batch_idx))
        return self._samples

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._trainer = trainer

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx, self._samples = batch_idx, None
        if self.acts and self._rehearsals_left:
            self._first = copy_of(batch)  # the step may change it

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            is_done = self._rehearse(trainer, pl_module, first)
            self._rehearsals_left = 0 if is_done else self._rehearsals_left - 1
        super().on_train_batch_end(trainer, pl_module, *args)

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> bool:
        """Check that adjacent rows of the loss belong to one sample; return False if the batch has no loss."""
        rehearsal = Rehearsal(trainer, pl_module, self.asked, by_terms=True)
        # A callback that chooses samples may no longer know the samples of this batch, so use the number from the step.
        samples = self._samples or self.samples_of(batch)
        if is_sharded(trainer) and self.loss_fn is None:  # otherwise the first step has been checked
            rehearsal.check_whole_loss(batch, samples)
        if samples is None:
            return True  # each row of the loss is a sample
        if samples * trainer.world_size == 1:
            rank_zero_warn(
                f"{self.display_name} compares the samples of a batch, but the batch has only one, so every weight "
                "is 1. Use larger batches."
            )
        is_done = rehearsal.check_batch(batch, samples)
        if is_done:
            self.learn_sample_loss(rehearsal)
        return is_done

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """Return values of the samples of the global batch, (ranks, B), padded with nan where a rank has fewer."""
        if self._trainer.world_size == 1:
            return values.unsqueeze(0)
        # The last batch may be smaller on one rank. Padding to the loader's batch size gives the reduction equal shapes
        # without an exchange of sizes.
        size = max(len(values), _batch_size(self._trainer))
        everyone = values.new_zeros(self._trainer.world_size, size)
        own = everyone[self._trainer.global_rank]
        own[: len(values)] = values
        own[len(values) :] = math.nan
        return sum_over_ranks(self._trainer, everyone)


def _batch_size(trainer: pl.Trainer) -> int:
    """Return the batch size of the training loader, or 0 if there are several loaders or none is set."""
    loader = trainer.train_dataloader
    owners = (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    return next((size for owner in owners if isinstance(size := getattr(owner, "batch_size", None), int)), 0)
