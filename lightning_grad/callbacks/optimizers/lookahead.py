"""Lookahead: the callback. The rule is :func:`lightning_grad.functional.look_ahead_`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import (
    WHOLE_WEIGHTS,
    AveragedCopies,
    AveragingCallback,
    OptimizerCallback,
    check_above,
    check_between,
    check_count,
    during_fit,
    no,
    yes,
)
from lightning_grad.core.compatibility import Compatibility
from lightning_grad.core.steps.averaged_weights import Averaging, averages
from lightning_grad.functional import look_ahead_
from lightning_grad.functional.plain_tensors import on_plain_tensors, plain_tensor
from lightning_grad.utilities.optimizers import Shape, optimizer_shape

EvalWeights = Literal["slow", "fast"]

_AVERAGES = "averages the weights itself"
_REFUSED: Mapping[str, str] = {  # by class name, because derived classes count too
    "LBFGS": "compares gradients of successive steps, between which the weights would jump",
    "Lookahead": "is Lookahead already",
    "Ranger": "contains Lookahead",
    "Ranger21": "contains Lookahead",
}


class Lookahead(AveragingCallback, OptimizerCallback):
    r"""Every k steps, move slow weights towards the weights of the optimizer, and continue from there.

    .. math::
        \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi
        \qquad \text{after every } k \text{ steps}

    :math:`\theta` are the fast weights, which the optimizer trains, and :math:`\phi` the slow ones,
    which start as the first fast weights. The optimizer keeps its state, such as momentum. Every
    optimizer of the module has its own slow weights and its own count of steps.

    Args:
        k: Number of optimizer steps between two moves of the slow weights.
        alpha: Share of the way that the slow weights move, in (0, 1].
        eval_weights: Weights of validation, checkpoints and the module after the fit.
            ``"slow"``, as the authors evaluate, or ``"fast"``. Both are equal after every k-th step.
        name: Name of this instance, part of its state.

    Raises:
        ValueError: In the constructor if k is below 1 or alpha is outside (0, 1]. Before the first
            batch with LBFGS, an optimizer that averages weights (Schedule-Free, Ranger, another
            Lookahead), a second Lookahead, FSDP, DeepSpeed, a fused optimizer in fp16, and, with
            slow weights in checkpoints, Lightning's weight averaging.

    **Hooks.** The step post-hook of each optimizer, before all others. A step that the GradScaler or
    ``SkipNonFinite`` skips does not count. With ``eval_weights="slow"``, it shows the slow weights
    during validations, ``save_checkpoint`` and after the fit.

    **Logs.** Nothing.

    **State.** The slow weights, and the number of steps of each optimizer. With
    ``eval_weights="slow"``, also the fast weights, from which a resumed run continues.

    **Cost.** A copy of the weights. One step in k reads both copies once and writes them. With slow
    weights, each validation and each checkpoint copies the weights twice.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.Lookahead
                  init_args:
                    k: 5
                    alpha: 0.5

    References:
        Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019, arXiv
        1907.08610, algorithm 1. The authors' code has the default ``k=5``, and an alpha of 0.8 in
        place of 0.5, which libraries use.
    """

    namespace: ClassVar[str] = "lookahead"
    moves_weights: ClassVar[bool] = True
    about_statistics: ClassVar[str] = (
        "shows the slow weights in validation and checkpoints, but the running statistics of BatchNorm belong to the "
        "fast weights. Set eval_weights='fast', or compute the statistics again after the fit"
    )
    compatibility: ClassVar[Compatibility] = OptimizerCallback.compatibility.but(
        several_optimizers=yes("Each optimizer has its own slow weights."),
        weight_averaging=no(
            "shows slow weights in validation and checkpoints, and {} would replace them by an average of the fast ones",
            "Set eval_weights='fast', or remove one of the two callbacks",
        ),
        local_steps=no(
            "pulls each rank back to its own slow weights, and so away from what {} has averaged",
            "Remove Lookahead (an exchange of {value} is such a step, over all ranks), or use strategy='ddp'",
        ),
        **WHOLE_WEIGHTS,
    )
    trial: ClassVar[Mapping[str, Any]] = {"k": 4, "alpha": 0.5}
    neutral: ClassVar[Mapping[str, Any] | str] = {"k": 1, "alpha": 1.0}

    _shapes = during_fit.of(dict[int, Shape])  # of the optimizers whose weights all have slow weights

    def __init__(
        self, k: int = 5, alpha: float = 0.5, eval_weights: EvalWeights = "slow", name: str | None = None
    ) -> None:
        super().__init__(name)
        self.k = check_count(k, 1, "k")
        self.alpha = check_between(check_above(alpha, 0.0, "alpha"), 0.0, 1.0, "alpha")
        self.eval_weights = eval_weights

    @property
    def is_neutral(self) -> bool:
        """Whether it changes neither the training nor the weights of validation and checkpoints."""
        return self.alpha == 1.0 and (self.k == 1 or self.eval_weights == "fast")

    @override
    def works_with(self) -> Compatibility:
        answers = super().works_with()
        return answers.but(weight_averaging=yes()) if self.eval_weights == "fast" or self.is_neutral else answers

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and sum(isinstance(each, Lookahead) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("Use only one Lookahead per Trainer: each would move the weights away from the other's.")

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._shapes.clear()

    @override
    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        if self.is_neutral:
            return False
        names = [cls.__name__ for cls in type(optimizer).__mro__]
        reason = next(
            (_REFUSED[name] for name in names if name in _REFUSED), _AVERAGES if averages(optimizer) else None
        )
        if reason is not None:
            raise ValueError(
                f"{self.display_name} does not work with {names[0]}, which {reason}. Train with a plain optimizer, such "
                "as SGD or AdamW, or remove the callback."
            )
        return True

    @override
    def averaging(self, trainer: pl.Trainer) -> Sequence[Averaging]:
        if self.eval_weights == "fast":
            return []
        return [AveragedCopies(partial(self._fast_and_slow, index)) for index in self.watched]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        names = ", ".join(type(optimizer).__name__ for optimizer in self.watched.values())
        steps = "step" if self.k == 1 else f"{self.k} steps"
        words = (
            f"keeps slow weights for {names}, and moves them {self.alpha:g} of the way to the fast ones every {steps}"
        )
        listed = [f"optimizers[{index}]" for index in self.watched]
        self.announce(words if listed else "changes nothing, because alpha is 1", "optimizers", listed)

    # The slow weights.

    def _fast_and_slow(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights of an optimizer that have slow weights, and these; none before the first step."""
        slow: list[Tensor] = self.memory(index).get("slow", [])
        return _weights(self._seen[index])[: len(slow)], slow

    @override
    @torch.no_grad()
    @on_plain_tensors
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        for index, optimizer in self.watched.items():  # not in before_step, where sparse weights may be in place
            shape = optimizer_shape(optimizer)
            if self._shapes.get(index) != shape:
                self._shapes[index] = shape
                self._add_slow(index, _weights(optimizer))

    def _add_slow(self, index: int, weights: Sequence[Tensor]) -> None:
        """Add slow weights for those that have none: at first, and for groups that are added later."""
        slow: list[Tensor] = self.memory(index).setdefault("slow", [])
        if [each.shape for each in slow] != [each.shape for each in weights[: len(slow)]]:
            slow.clear()  # another optimizer, of other weights, took its place
        slow += [plain_tensor(weight).detach().clone() for weight in weights[len(slow) :]]

    # One optimizer step.

    @override
    def after_step(self, index: int, optimizer: Optimizer) -> None:
        memory = self.memory(index)
        memory["steps"] = memory.get("steps", 0) + 1
        if memory["steps"] % self.k == 0:
            look_ahead_(*self._fast_and_slow(index), self.alpha)


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
