"""The base of callbacks that show other weights in validation and checkpoints than those that train."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.steps.averaged_weights import (
    AveragedWeights,
    Averaging,
    averages,
    has_batch_statistics,
    wrap_loading,
)

_WEIGHTS = "training_weights"


class AveragingCallback(GradCallback):
    """Shows averaged weights in validation, in checkpoints and after the fit.

    Override :meth:`averaging`, which returns what averages the weights. Training continues from the
    training weights bit for bit, also in a resumed run: checkpoints hold them in the state of the
    callback. List this base before another one: ``class Mine(AveragingCallback, OptimizerCallback)``.

    Class attributes:

    - ``about_statistics``: what is said if the module has BatchNorm, whose running statistics belong
      to the training weights.
    """

    about_statistics: ClassVar[str] = (
        "shows averaged weights in validation and checkpoints, but the running statistics of BatchNorm belong to the "
        "training weights. Replace BatchNorm, or compute its statistics again after the fit"
    )

    _training_weights = until_next_fit.of(dict[str, Tensor])  # after the fit, and from a checkpoint
    _averaged = during_fit[AveragedWeights | None](lambda _: None)

    def averaging(self, trainer: pl.Trainer) -> Sequence[Averaging]:
        """Return what averages the weights in this fit; nothing if the module always has its training weights.

        Called in ``on_fit_start``, after that of the other base.
        """
        raise NotImplementedError(f"{type(self).__name__} must define averaging(trainer).")

    def __getstate__(self) -> dict[str, Any]:
        if self._averaged is not None:  # a copy has no part in the fit, but the same state
            self._training_weights = self._averaged.training_weights
        return super().__getstate__()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.undo.push(wrap_loading(pl_module, self._weights_in))

    def _weights_in(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        state: Mapping[str, Any] = checkpoint.get("callbacks", {}).get(self.state_key) or {}
        return state.get(_WEIGHTS)

    @override
    def state_dict(self) -> dict[str, Any]:
        weights = self._training_weights if self._averaged is None else self._averaged.training_weights
        return {**super().state_dict(), **({_WEIGHTS: weights} if weights else {})}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._training_weights = dict(state.get(_WEIGHTS, {}))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.watch_averages(trainer, pl_module)

    def watch_averages(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show averages from now on. The base calls this in ``on_fit_start``; earlier calls are allowed."""
        if self._averaged is not None:
            return
        averaging = self.averaging(trainer)
        if not averaging:
            self._training_weights = {}  # of a checkpoint that was saved with other settings
            return
        self._averaged = AveragedWeights(trainer, pl_module, averaging, bool(self._training_weights))
        self._averaged.watch(self.undo, self.undo_after_saving)
        self.undo_after_saving.push(self._finish_after_exception)
        if has_batch_statistics(pl_module):
            self.say(self.about_statistics)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if self._averaged is not None:  # not yet averaged if the run had no batch left
            self._finish(self._averaged)

    def _finish_after_exception(self) -> None:
        if self._averaged is not None and self._averaged.is_training:
            self._finish(self._averaged)

    def _finish(self, averaged: AveragedWeights) -> None:
        averaged.finish()
        self._training_weights = averaged.training_weights


def techniques_that_average(trainer: pl.Trainer) -> list[str]:
    """Return the names of callbacks and optimizers that replace the trained weights by averages.

    Callbacks know it from ``on_train_start`` on. Lightning's own weight averaging is in
    :class:`~lightning_grad.core.compatibility.Compatibility`, except ``StochasticWeightAveraging``, which is here.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    names = [c.display_name for c in callbacks if isinstance(c, AveragingCallback) and c.averaging(trainer)]
    names += [type(optimizer).__name__ for optimizer in trainer.optimizers if averages(optimizer)]
    kinds = [kind.__name__ for callback in callbacks for kind in type(callback).__mro__]
    return names + [kind for kind in kinds if kind == "StochasticWeightAveraging"]
