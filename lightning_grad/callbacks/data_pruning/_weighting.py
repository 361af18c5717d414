"""Base of ``InfoBatch`` and ``LossReweighting``: weight the samples of a batch by their losses."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.given_functions import GivenFunction, LossRequest, SampleLoss
from lightning_grad.core.losses.loss_tap import reweight_losses
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.steps.step_window import is_repeated
from lightning_grad.utilities.checks import check_count, check_only_one
from lightning_grad.utilities.reporting import is_log_step


class LossWeighting(GradCallback):
    """Weights losses in the backward pass, and logs the mean loss of the batch without and with weights.

    A technique defines ``way_out``, :meth:`weigh`, :meth:`needs_losses` and :meth:`samples_of`. Its constructor sets
    ``acts`` and calls :meth:`choose_loss`.
    """

    of_batch: ClassVar[tuple[str, ...]] = ("_weighted", "_mean_weight")
    # Whether weights are ratios of shares of samples, so their mean is about 1; then it is logged.
    changes_shares: ClassVar[bool] = False
    way_out: ClassVar[str]  # advice if the loss cannot be read: a clause that begins with an imperative verb
    loss_index: int | None
    loss_fn: GivenFunction | None
    acts: bool  # whether it weights any batch at all

    # None (read as "share") until a batch has shown which reading of a sample's loss the step means.
    _sample_loss = until_next_fit[SampleLoss](lambda _: None).saved()
    _module = during_fit[pl.LightningModule]()
    _weighted = during_fit[tuple[SampleLosses, Tensor] | None](lambda _: None)
    _mean_weight = during_fit[Tensor | None](lambda _: None)

    def weigh(self, losses: SampleLosses) -> Tensor | None:
        """Return a weight for each sample of the batch, or ``None`` to leave the step as it is."""
        raise NotImplementedError(f"{type(self).__name__} must define weigh(losses).")

    def choose_loss(self, loss_index: int | None, loss_fn: GivenFunction | None) -> None:
        """Check and store the arguments that select the weighted loss."""
        check_only_one({"loss_index": loss_index, "loss_fn": loss_fn}, "select the loss that is weighted")
        self.loss_index = check_count(loss_index, 0, "loss_index")
        self.loss_fn = loss_fn

    @property
    def asked(self) -> LossRequest:
        """The request for the losses of a step."""
        return LossRequest(
            self.display_name, self.loss_index, self.way_out, self.loss_fn, kind=lambda: self._sample_loss
        )

    def samples_of(self, batch: Any) -> int | None:
        """Return the number of samples of a batch, or ``None`` if it is unknown."""
        raise NotImplementedError(f"{type(self).__name__} must define samples_of(batch).")

    def needs_losses(self) -> bool:
        """Return True if the losses of the current step are needed."""
        raise NotImplementedError(f"{type(self).__name__} must define needs_losses().")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._module = pl_module
            own = (pl_module, self._weigh, self.asked, self.samples_of, self.acts, self.needs_losses)
            self.undo.push(reweight_losses(*own))

    def _weigh(self, losses: SampleLosses) -> Tensor | None:
        if is_repeated(self._module):  # the objective must not change, and no loss is recorded
            return None if self._weighted is None else self._weighted[1]
        weights = self.weigh(losses)
        if weights is not None and self.changes_shares:
            self._mean_weight, weights = weights.mean(), losses.for_other_shares(weights)
        self._weighted = None if weights is None else (losses, weights)
        return weights

    def learn_sample_loss(self, rehearsal: Rehearsal) -> None:
        """Store how the loss of a sample is read, unless a checkpoint did, whose losses were read that way."""
        self._sample_loss = self._sample_loss or rehearsal.kind or "share"

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if not self.has_same_loss(state):
            self._sample_loss = None

    def has_same_loss(self, state: Mapping[str, Any]) -> bool:
        """Return True if the losses in a checkpoint come from the loss that is weighted now."""
        return not self.changed_settings(state, "loss_index", "loss_fn")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._weighted is not None and is_log_step(trainer):
            losses, weights = self._weighted
            plain, weighted = losses.weighted(weights)
            mean = {} if self._mean_weight is None else {"mean_weight": self._mean_weight}
            self.log_scalars(pl_module, {"loss": plain, "weighted_loss": weighted, **mean})
        self._weighted, self._mean_weight = None, None
