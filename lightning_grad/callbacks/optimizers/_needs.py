"""What some optimizers need from the run: a graph of the gradients, or other weights for inference.

Base of :class:`lightning_grad.callbacks.OptimizerSwap`, which chooses the optimizers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.optimizers._names import Named
from lightning_grad.core import WHOLE_WEIGHTS, AveragingCallback, no
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.core.steps.averaged_weights import Averaging
from lightning_grad.core.steps.gradient_graphs import GradientGraphs

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
_SHARDED = no(
    "uses an optimizer that needs whole parameters, and {} shards them",
    "Use an elementwise optimizer, such as lion, adabelief or diffgrad, or train with strategy='ddp'",
)
_LISTS = no(
    "uses an optimizer that copies lists of tensors, which torch cannot do with the DTensors of {}",
    "Set foreach=False in its options",
)
_COMPLEX = no(
    "uses an optimizer for real parameters, and {} holds complex numbers",
    "Use lion, adabelief, adamp or diffgrad, or skip its optimizer with which=[...]",
)
_ON_THE_REST = yes("Such parameters stay on the module's own optimizer.")
_STOCHASTIC = "StochasticWeightAveraging"  # by name, because both of Lightning's namespaces have their own class


class OptimizerNeeds(AveragingCallback):
    """Gives optimizers what they need from the run, and refuses runs that cannot give it."""

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
        others = {cls.__name__ for callback in trainer.callbacks for cls in type(callback).__mro__}  # type: ignore[attr-defined]
        if _has_modes(kind) and _STOCHASTIC in others:
            raise ValueError(
                f"{self.display_name} uses {kind.__name__}, which averages the weights itself, and {_STOCHASTIC} would "
                "average its training weights. Remove it."
            )

    @override
    def averaging(self, trainer: pl.Trainer) -> Sequence[Averaging]:
        return [optimizer for optimizer in self.new_optimizers(trainer) if isinstance(optimizer, Averaging)]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the new optimizers what they need. Call it as soon as they exist: a search for a rate may train next."""
        if any(hasattr(optimizer, "needs_graph") for optimizer in self.new_optimizers(trainer)):
            GradientGraphs(trainer, lambda: self.new_optimizers(trainer)).watch(self.undo)
        self.watch_averages(trainer, pl_module)


def _has_modes(kind: Any) -> bool:
    return hasattr(kind, "train") and hasattr(kind, "eval")


def answers_of(answers: Compatibility, named: Named | None, options: Mapping[str, Any] | None = None) -> Compatibility:
    """Return what a swap to an optimizer works with.

    Args:
        answers: Those of any optimizer.
        named: What is known about its class; None for a class without a short name.
        options: The user's options of the optimizer.
    """
    if named is None or named.takes_sparse:
        answers = answers.but(sparse_gradients=yes("If the class supports them."))
    if named is not None and not named.takes_complex:
        answers = answers.but(complex_parameters=_COMPLEX)
    if named is not None and named.only_matrices:
        answers = answers.but(sparse_gradients=_ON_THE_REST, complex_parameters=_ON_THE_REST)
    if named is not None and not named.elementwise:
        answers = answers.but(fsdp1=_SHARDED, fsdp2=_SHARDED)
    if named is not None and named.copies_lists and (options or {}).get("foreach") is not False:
        answers = answers.but(fsdp2=_LISTS)
    return answers
