"""Base of ``InfoBatch`` and ``GradientNormSampling``: samples of an epoch, and their weights, by values of past batches."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._epoch_record import EpochRecord
from lightning_grad.callbacks.data_pruning._weighting import LossWeighting
from lightning_grad.core.fit import until_next_fit
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.subset import SubsetCallback


class RecordedSubset(LossWeighting, SubsetCallback):
    """Chooses and weights the samples of an epoch by the values that its batches had when they were last trained on.

    A technique defines :meth:`values_of` and :meth:`choose`. Its constructor sets ``acts`` and ``total_steps``, and calls
    :meth:`choose_loss`.
    """

    recorded: ClassVar[str] = "values"  # what is recorded, for messages
    total_steps: int | None

    _values = until_next_fit[Tensor | None](lambda _: None).saved()  # of all samples; nan if never measured
    # Of the current epoch; a resumed epoch keeps its weights even if settings have changed.
    _weights = until_next_fit[Tensor | None](lambda _: None).saved()
    _record = until_next_fit.of(EpochRecord)

    def values_of(self, losses: SampleLosses) -> Tensor:
        """Return the values (B,) to record of a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define values_of(losses).")

    def choose(self, trainer: pl.Trainer, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the places in ``values`` of an epoch's samples, and a weight for each value; ``None`` for all samples."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(trainer, values).")

    def is_known(self, values: Tensor) -> Tensor:
        """Return which values of an epoch replace those before."""
        return ~values.isnan()

    @property
    @override
    def remembers_samples(self) -> bool:
        return self.acts

    @property
    @override
    def holds_samples(self) -> bool:
        return super().holds_samples or self._values is not None or self._record.values is not None

    @override
    def needs_losses(self) -> bool:
        return self.acts or self._weights is not None

    @override
    def samples_of(self, batch: Any) -> int:
        return len(self.indices)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch_values": self._record.values}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self.has_same_loss(state):
            self._record.values = state["epoch_values"]
        elif self._values is not None:
            self._values = None
            self.say(f"has no {self.recorded} of the new loss yet and trains on all samples for one epoch")

    @override
    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acts:
            rehearsal = Rehearsal(trainer, pl_module, self.asked, self.training_set, by_terms=True)
            rehearsal.check_loader(in_training=self.loss_fn is None)
            self.learn_sample_loss(rehearsal)

    @override
    def choose_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        self._take_values(trainer)
        self._weights = None
        if self._values is None or not self.acts:
            return None
        sampler = self.training_set.sampler
        chosen = self.choose(trainer, self._values[sampler.population])
        if chosen is None:
            return None
        places, weights = chosen
        self._weights = torch.ones(sampler.total).index_put((sampler.population,), weights)
        return sampler.population[places]

    @override
    def end_epoch(self, trainer: pl.Trainer) -> None:
        self._take_values(trainer)

    def _take_values(self, trainer: pl.Trainer) -> None:
        seen = self._record.take(trainer)
        if seen is not None:
            self._values = seen if self._values is None else torch.where(self.is_known(seen), seen, self._values)

    def ends(self, trainer: pl.Trainer) -> list[tuple[int, int]]:
        """Return what is done of the run when an epoch begins, and its end, by each limit that the run has."""
        # Not run_progress, which is for hooks of a batch: here its counters still belong to the last epoch.
        limits = [(trainer.current_epoch, trainer.max_epochs), (trainer.global_step, trainer.max_steps)]
        if self.total_steps is not None:
            limits = [(trainer.global_step, self.total_steps)]
        return [(done, end) for done, end in limits if end not in (None, -1, 0)]

    @override
    def weigh(self, losses: SampleLosses) -> Tensor | None:
        self._record.put(self.indices, self.values_of(losses), self.training_set.sampler.total)
        if self._weights is None:
            return None
        device = losses.losses.device
        self._weights = self._weights.to(device)
        return self._weights[self.device_indices(device)]
