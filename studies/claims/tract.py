"""TrAct against the same optimizer without it, by the steps to an accuracy on digits.

Every arm has its own learning rate: the one that reaches the accuracy first on a seed that is not reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project import Digits, ResidualConvNet, VisionTransformer
from typing_extensions import override

from lightning_grad.callbacks import TrAct
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers

LAST = 3  # validations in a mean: a single one may be high by chance

# The line in Trainer(callbacks=[...]) of each arm.
CALLBACKS: Mapping[str, Callable[[], list[Callback]]] = {"plain": list, "tract": lambda: [TrAct()]}

# The first layer of the transformer is linear, that of the other network a convolution.
MODULES: Mapping[str, Callable[..., LightningModule]] = {
    "transformer": VisionTransformer,
    "convolutional": lambda **settings: ResidualConvNet(1, 16, (1, 1), optimizer="sgd", weight_decay=5e-4, **settings),
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training.

    Args:
        steps_to_target: Optimizer steps until the mean of three validations reaches the target; infinite if it does not.
        validation_loss: Loss on the validation images at the end.
        test_accuracy: Accuracy on the test images at the end.
        curve: Validation accuracy at each validation.
    """

    steps_to_target: float
    validation_loss: float
    test_accuracy: float
    curve: list[float]


@dataclass(frozen=True, kw_only=True)
class StepsToTarget(Claim[Result]):
    """TrAct by the steps to an accuracy.

    Args:
        model: ``"transformer"``, with AdamW, or ``"convolutional"``, with SGD.
        steps: Optimizer steps of each training.
        every: Steps between validations.
        target: Validation accuracy to reach.
    """

    result = Result
    choices: ClassVar = {"model": tuple(MODULES)}
    least: ClassVar = {"steps": 3}
    name: str = "tract"
    text: str = "With TrAct, a vision transformer reaches the accuracy in fewer steps."
    arms: Sequence[str] = tuple(CALLBACKS)
    reference: str = "plain"
    metric: str = "steps_to_target"
    higher: bool = False
    unit: str = "steps"
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2)
    chosen_by: str = "steps_to_target"
    budget: float = 4
    model: str = "transformer"
    steps: int = 300
    every: int = 10
    target: float = 0.95

    @override
    def train(self, run: Run) -> Result:
        """Run one training, and test the module."""
        data, recorder = Digits(seed=run.seed), Recorder()
        module = MODULES[self.model](**({} if run.rate is None else {"lr": run.rate}))
        trainer = self.trainer(
            run,
            [recorder, Follow(run.show, "val_acc"), *CALLBACKS[run.arm]()],
            max_steps=self.steps,
            val_check_interval=self.every,
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, data)
        loss = float(trainer.callback_metrics["val_loss"])
        (tested,) = trainer.test(module, data, verbose=False)
        finish_loggers(trainer)
        reached = self.every * validations_to(self.target, recorder.curve)
        return Result(run.arm, run.seed, run.rate, reached, loss, tested["test_acc"], recorder.curve)


class Recorder(Callback):
    """Record the accuracy of each validation."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.curve.append(float(trainer.callback_metrics["val_acc"]))


def validations_to(target: float, accuracies: Sequence[float]) -> float:
    """Return the number of validations until the mean of the last three reaches the target; infinite if it does not.

    Example:
        >>> validations_to(0.5, [0.0, 0.9, 0.4, 0.5, 0.6]), validations_to(0.7, [0.1, 0.2])
        (4.0, inf)
    """
    means = [statistics.mean(accuracies[end - LAST : end]) for end in range(LAST, len(accuracies) + 1)]
    return next((float(number) for number, mean in enumerate(means, LAST) if mean >= target), math.inf)


_WITH_SGD: dict[str, Any] = {"model": "convolutional", "rates": (0.01, 0.03, 0.1, 0.3)}
_TRACT = Paper(
    "TrAct", "optimizers", "Networks reach the same accuracy in 1.25 to 4 times fewer steps", "TrAct (2410.23970)"
)
CLAIMS = (
    StepsToTarget(paper=_TRACT),
    StepsToTarget(
        name="tract-convolutional",
        text="With TrAct, a convolutional network reaches the accuracy in fewer steps.",
        paper=_TRACT,
        **_WITH_SGD,
    ),
)
