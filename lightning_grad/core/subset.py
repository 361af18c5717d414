"""The base of callbacks that choose the samples of each epoch."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.samples.schedule_warp import warn_of_two_ends, warp_schedules
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.data.fingerprints import Fingerprint
from lightning_grad.utilities.reporting import log_summary

OWN_SCHEDULES = (
    "If the module steps its own schedulers, a warning says that schedulers that count batches do not reach their end."
)


class SubsetCallback(GradCallback):
    """Trains each epoch on the samples that :meth:`choose_samples` returns.

    It knows the data-set indices of every batch (``self.indices``), adapts schedules to shorter
    epochs, and logs the kept share. The current choice is in its state, so a resumed epoch
    continues with it. Settings that change on resume apply from the next epoch on.

    Args:
        loader_key: Key or list position of the training loader to prune, if there are several.
        name: Name of this instance, needed if two of a class are used; part of state and log keys.
    """

    namespace: ClassVar[str] = "data"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        ddp=yes(
            "With `shuffle=True` or `False`, or a `DistributedSampler`. Any other sampler raises an error with several "
            "ranks, because it does not say which rank draws which samples."
        ),
        manual_optimization=yes(OWN_SCHEDULES),
    )

    of_batch: ClassVar[tuple[str, ...]] = ("indices",)

    training_set = during_fit[TrainingSet]()
    indices = during_fit.of(list[int])
    kept = until_next_fit[Tensor | None](lambda _: None).saved()
    _fixed_steps = until_next_fit.of(bool).saved()  # in the current epoch
    _mark = until_next_fit[Fingerprint | None](lambda _: None)
    _samples_seen = until_next_fit.of(int).saved()
    _is_rehearsed = during_fit.of(bool)
    _has_warned = during_fit.of(bool)
    _has_warned_of_too_few = during_fit.of(bool)

    def __init__(self, loader_key: str | int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.loader_key = loader_key

    def choose_samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        """Return the indices of the samples for the next epoch, or ``None`` for all."""
        raise NotImplementedError(f"{type(self).__name__} must define choose_samples(trainer, pl_module).")

    def rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if later epochs would fail. Called after all hooks of the first batch."""

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Gather what the ranks recorded. Called after an epoch's last batch, before any checkpoint is written."""

    @property
    def plan(self) -> str:
        """A clause about what it does in this fit, printed when the fit begins."""
        return "chooses the samples of each epoch"

    @property
    def remembers_samples(self) -> bool:
        """Whether it stores values for each sample, which requires the data to stay the same."""
        return True

    @property
    def holds_samples(self) -> bool:
        """Whether its state already holds values for each sample."""
        return self.kept is not None

    @property
    def passes_more_than_once(self) -> bool:
        """Whether epochs keep their number of batches, by going through the kept samples several times."""
        return False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._fixed_steps = self.passes_more_than_once
            if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
                raise TypeError(
                    f"{self.display_name} must know the samples of each batch, but training_step(dataloader_iter) "
                    "draws batches itself. Make training_step take a batch."
                )
            key = None if self.loader_key is None else str(self.loader_key)
            own = (trainer, self.display_name, self.undo, key, self.remembers_samples)
            self.training_set = TrainingSet(*own)

    @override
    def state_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self._mark) if self._mark is not None and self.holds_samples else None
        return {**super().state_dict(), "data": data}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if state["data"] is not None and self.remembers_samples:
            self._mark = Fingerprint(**state["data"])
            self.training_set.expect(self._mark)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training_set.begin(self.kept, self._fixed_steps)
        self.undo.push(warp_schedules(trainer, pl_module, self.training_set))
        self._warn_of_own_schedules(trainer, pl_module)
        self.announce(self.plan, "samples")

    @override
    def chosen(self) -> Chosen:
        """Return the samples of the current epoch; an empty list before the training loader exists."""
        chosen = super().chosen()
        if self.kept is None and not self.training_set.is_loaded:
            return chosen
        samples = self.training_set.sampler.population if self.kept is None else self.kept
        return dataclasses.replace(chosen, names=samples.tolist())

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.training_set.resumes_behind_last_batch:
            # Lightning then begins the next epoch without calling on_train_epoch_start.
            self.on_train_epoch_start(trainer, pl_module)
            self.training_set.leave_epoch()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept = self.choose_samples(trainer, pl_module)
        _check_indices(kept, self.display_name)
        self.kept = kept
        self._fixed_steps = self.passes_more_than_once
        self.training_set.keep(self.kept, self._fixed_steps)
        self._has_warned = self._has_warned or warn_of_two_ends(trainer, self.training_set, self.display_name)
        total = len(self.training_set.sampler.population)
        share = 1.0 if self.kept is None else len(self.kept) / total
        self.log_scalars(pl_module, {"kept_share": share}, sync_dist=True)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.indices = self.training_set.draw(batch_idx)
        self._samples_seen += len(self.indices) * trainer.world_size

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.indices = []
        if not self._is_rehearsed:
            self._is_rehearsed = True
            self.rehearse(trainer, pl_module)
            if self.remembers_samples:
                self._mark = self.training_set.mark
        if trainer.is_last_batch:
            self.end_epoch(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.log_scalars(pl_module, {"samples_seen": float(self._samples_seen)}, sync_dist=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        all_samples = self.training_set.full_samples_until_now
        if all_samples:
            totals = {"samples_seen": self._samples_seen, "samples_share": self._samples_seen / all_samples}
            log_summary(trainer, {self.log_key(name): value for name, value in totals.items()})

    def device_indices(self, device: torch.device) -> Tensor:
        return torch.tensor(self.indices, device=device)

    def warn_of_too_few(self, count: int, total: int) -> None:
        if count == total and not self._has_warned_of_too_few:
            self._has_warned_of_too_few = True
            rank_zero_warn(
                f"{self.display_name} keeps all {total} samples: the share to drop is less than one sample, or would "
                "leave a last batch of one sample. Prune more, or train on more samples."
            )

    def refuse_unreached(self, trainer: pl.Trainer, epoch: int, would: str) -> None:
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch and not _is_smoke_test(trainer):
            raise ValueError(
                f"{self.display_name} would {would} after {epoch} epochs, but Trainer(max_epochs={trainer.max_epochs}) "
                "ends earlier. Set epoch to a smaller number."
            )

    def refuse_unreached_steps(self, trainer: pl.Trainer, epoch: int, would: str) -> None:
        steps = epoch * self.training_set.full_batches / trainer.accumulate_grad_batches
        is_new = trainer.current_epoch == 0 and not _is_smoke_test(trainer)
        if is_new and epoch > 0 and math.isfinite(steps) and 0 <= trainer.max_steps <= steps:
            raise ValueError(
                f"{self.display_name} would {would} after {epoch} epochs of {self.training_set.full_batches:.0f} "
                f"batches, but Trainer(max_steps={trainer.max_steps}) ends earlier. Set epoch to a smaller number."
            )

    def _warn_of_own_schedules(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization and trainer.lr_scheduler_configs:
            rank_zero_warn(
                f"{self.display_name} adapts schedulers to shorter epochs only if Lightning steps them. This module steps "
                "its own schedulers. If one counts batches, it will not reach its end: set its length to the number of "
                "batches that are trained on."
            )


def _is_smoke_test(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _check_indices(kept: Any, display_name: str) -> None:
    # A mask would otherwise be read as the indices 0 and 1.
    if kept is None:
        return
    if not isinstance(kept, Tensor) or kept.dim() != 1 or kept.dtype in (torch.bool, torch.uint8) or not kept.numel():
        what = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(
            f"{display_name}.choose_samples must return a tensor (n,) of at least one index, or None for all samples; "
            f"got {what}. Turn a mask into indices with mask.nonzero().flatten()."
        )
