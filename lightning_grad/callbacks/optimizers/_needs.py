"""What some optimizers need from the run: a graph of the gradients, or other weights for inference.

Base of :class:`lightning_grad.callbacks.OptimizerSwap`, which chooses the optimizers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import WHOLE_WEIGHTS, GradCallback, during_fit, no, until_next_fit
from lightning_grad.core.compatibility import Compatibility
from lightning_grad.core.steps.averaged_weights import AveragedWeights, averages, has_batch_statistics, wrap_loading
from lightning_grad.core.steps.gradient_graphs import GradientGraphs

_WEIGHTS = "training_weights"
_SECOND_ORDER: Mapping[str, Any] = {
    **dict.fromkeys(
        ("ddp", "fsdp2", "fsdp1"),
        no(
            "needs second derivatives, which torch cannot compute under {}", "Train on one device, or use lion or adamw"
        ),
    ),
    "fp16": no(
        "needs second derivatives, and {} would scale them with the loss", "Use precision='bf16-mixed' or '32-true'"
    ),
    "compiled": no("needs second derivatives, which {} do not have", "Do not compile the module"),
}
_AVERAGED: Mapping[str, Any] = {
    **WHOLE_WEIGHTS,
    "weight_averaging": no(
        "uses an optimizer that averages the weights itself, and {} would average its training weights",
        "Remove the callback that averages weights",
    ),
}


class OptimizerNeeds(GradCallback):
    """Gives optimizers what they need from the run, and refuses runs that cannot give it."""

    _training_weights = until_next_fit.of(dict[str, Tensor])  # after the fit, and from a checkpoint
    _averaged = during_fit[AveragedWeights | None](lambda _: None)

    def new_optimizers(self, trainer: pl.Trainer) -> Sequence[Optimizer]:
        """Return the optimizers of the run that this callback created."""
        raise NotImplementedError

    def new_class(self) -> Any:
        """Return the class of the new optimizers, or a function, or ``None``."""
        raise NotImplementedError

    @override
    def works_with(self) -> Compatibility:
        kind, answers = self.new_class(), super().works_with()
        if hasattr(kind, "needs_graph"):
            answers = answers.but(**_SECOND_ORDER)
        if hasattr(kind, "train") and hasattr(kind, "eval"):
            answers = answers.but(**_AVERAGED)
        return answers

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
        if any(hasattr(optimizer, "needs_graph") for optimizer in self.new_optimizers(trainer)):
            GradientGraphs(trainer, lambda: self.new_optimizers(trainer)).watch(self.undo)
        averaging: list[Any] = [optimizer for optimizer in self.new_optimizers(trainer) if averages(optimizer)]
        if averaging:
            self._averaged = AveragedWeights(trainer, pl_module, averaging, bool(self._training_weights))
            self._averaged.watch(self.undo, self.undo_after_saving)
            if has_batch_statistics(pl_module):
                self.say(
                    "shows averaged weights in validation and checkpoints, but the running statistics of BatchNorm "
                    "belong to the training weights. Replace BatchNorm, or compute its statistics again after the fit"
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._averaged is not None:
            self._averaged.start()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._averaged is not None:  # not yet averaged if the run had no batch left
            self._averaged.finish()
            self._training_weights = self._averaged.training_weights
