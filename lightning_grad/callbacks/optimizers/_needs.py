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


_TUNERS = (
    "trains without this callback, which switches between training weights and averages",
    "Find the value without OptimizerSwap",
)
_UNAWARE: Mapping[str, tuple[str, str]] = {  # callbacks of Lightning that an optimizer with averages breaks
    "StochasticWeightAveraging": ("would average its training weights", "Remove it"),
    "LearningRateFinder": _TUNERS,
    "BatchSizeFinder": _TUNERS,
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
        return self.answers_for(self.new_class())

    def answers_for(self, kind: Any) -> Compatibility:
        """Return what the callback works with if it creates optimizers of a class."""
        answers = super().works_with()
        if hasattr(kind, "needs_graph"):
            answers = answers.but(**_SECOND_ORDER)
        if _has_modes(kind):
            answers = answers.but(**_AVERAGED)
        return answers

    def refuse_run(self, kind: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a run cannot give an optimizer what it needs.

        ``setup`` does so too, but there the class is not known if a function creates the optimizer.

        Raises:
            ValueError: With the reason.
        """
        self.answers_for(kind).refuse(self.display_name, trainer, pl_module)
        names = [cls.__name__ for callback in trainer.callbacks for cls in type(callback).__mro__]  # type: ignore[attr-defined]
        found = next((name for name in names if name in _UNAWARE), None) if _has_modes(kind) else None
        if found is not None:
            reason, way_out = _UNAWARE[found]
            raise ValueError(
                f"{self.display_name} uses {kind.__name__}, which averages the weights itself, and {found} {reason}. "
                f"{way_out}."
            )

    def keep_graphs(self, trainer: pl.Trainer) -> None:
        """Let backward keep the graph of the gradients if an optimizer needs it.

        Call it when the optimizers exist, because a tuner trains before ``on_fit_start``.
        """
        if any(hasattr(optimizer, "needs_graph") for optimizer in self.new_optimizers(trainer)):
            GradientGraphs(trainer, lambda: self.new_optimizers(trainer)).watch(self.undo)

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
        averaging: list[Any] = [optimizer for optimizer in self.new_optimizers(trainer) if averages(optimizer)]
        if averaging:
            self._averaged = AveragedWeights(trainer, pl_module, averaging, bool(self._training_weights))
            self.undo_after_saving.push(self._keep_averages)
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
        if self._averaged is not None:
            self._averaged.start()  # it has not started if the run had no batch left
            self._keep_averages()

    def _keep_averages(self) -> None:
        """Leave the averages in the module, and keep the training weights for checkpoints."""
        if self._averaged is not None and self._averaged.has_started:
            self._averaged.finish()
            self._training_weights = self._averaged.training_weights


def _has_modes(kind: Any) -> bool:
    return hasattr(kind, "train") and hasattr(kind, "eval")
