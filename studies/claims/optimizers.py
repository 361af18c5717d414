"""Optimizers on two small transformers: one classifies handwritten digits, one predicts characters of source code.

The trained project, ``plain_project``, uses AdamW. Each other optimizer is one line in :data:`SWAPS`; everything else here
measures. Each optimizer has its own learning rate, chosen on a seed that is not reported. All rates are those of the
optimizer itself (``lr_factor=1.0``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from plain_project import CharTransformer, Digits, Text, VisionTransformer
from typing_extensions import override

from lightning_grad.callbacks import OptimizerSwap
from studies import claim as base
from studies.claim import Claim, Run
from studies.common import Follow, finish_loggers

WARMUP, EVALUATIONS = 0.05, 8
FREE = "schedulefree-adamw"  # it needs no schedule, and has a warm-up of its own

# The line in Trainer(callbacks=[...]) of each arm, by the number of steps of its warm-up.
SWAPS: Mapping[str, Callable[[int], list[Callback]]] = {
    "adamw": lambda warmup: [],
    "lion": lambda warmup: [OptimizerSwap("lion", lr_factor=1.0, wd_factor=5.0)],
    "adabelief": lambda warmup: [OptimizerSwap("adabelief", lr_factor=1.0)],
    "adafactor": lambda warmup: [OptimizerSwap("adafactor", lr_factor=1.0)],
    FREE: lambda warmup: [OptimizerSwap(FREE, {"warmup_steps": warmup}, lr_factor=1.0)],
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is its optimizer.

    Args:
        validation_loss: Loss on the validation data at the end.
        validation_accuracy: Accuracy on the validation data at the end, of images or of next characters.
        test_accuracy: Accuracy on the test images; on characters, the validation accuracy.
        state_share: Memory of the optimizer's state, divided by that of the weights.
    """

    validation_loss: float
    validation_accuracy: float
    test_accuracy: float
    state_share: float


@dataclass(frozen=True, kw_only=True)
class Optimizers(Claim[Result]):
    """Optimizers against AdamW, each with its own learning rate.

    Args:
        model: ``"digits"`` or ``"characters"``.
        steps: Optimizer steps of each training.
    """

    result = Result
    choices: ClassVar = {"model": ("digits", "characters")}
    least: ClassVar = {"steps": 2}
    name: str = "optimizers-digits"
    text: str = "On digits, each optimizer with its own learning rate is at most one point less accurate than AdamW."
    arms: Sequence[str] = tuple(SWAPS)
    reference: str = "adamw"
    metric: str = "test_accuracy"
    margin: float = -0.01
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    chosen_by: str = "validation_accuracy"
    budget: float = 8
    model: str = "digits"
    steps: int = 400

    @override
    def train(self, run: Run) -> Result:
        """Run one training, and validate and test the module that remains."""
        data = Digits(seed=run.seed) if self.model == "digits" else Text()
        module = build_module(self.model, run, data)
        every = max(1, self.steps // EVALUATIONS)
        trainer = self.trainer(
            run,
            [Follow(run.show, "val_acc"), *SWAPS[run.arm](round(WARMUP * self.steps))],
            max_steps=self.steps,
            val_check_interval=every,
            check_val_every_n_epoch=None,
            log_every_n_steps=max(1, min(10, self.steps // 4)),
        )
        trainer.fit(module, data)
        share = state_share(trainer.optimizers[0])
        (validation,) = trainer.validate(module, data, verbose=False)
        accuracy = validation["val_acc"]
        tested = accuracy
        if self.model == "digits":
            tested = trainer.test(module, data, verbose=False)[0]["test_acc"]
        finish_loggers(trainer)
        return Result(run.arm, run.seed, run.rate, validation["val_loss"], accuracy, tested, share)


def build_module(model: str, run: Run, data: Any) -> LightningModule:
    """Return a new module of the plain project, with the rate and the schedule of an arm."""
    settings: dict[str, Any] = {"schedule": "constant" if run.arm == FREE else "cosine", "warmup": WARMUP}
    if run.rate is not None:
        settings["lr"] = run.rate
    if model == "digits":
        return VisionTransformer(**settings)
    return CharTransformer(data.vocabulary_size, data.context, **settings)


def state_share(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of an optimizer's state, divided by those of its weights.

    Example:
        >>> weight = torch.zeros(100, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> state_share(optimizer)
        1.0
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [each for weight in weights for each in optimizer.state[weight].values() if isinstance(each, torch.Tensor)]
    return float(sum(each.nbytes for each in kept) / sum(weight.nbytes for weight in weights))


CLAIMS = (
    Optimizers(about=("OptimizerSwap",)),
    Optimizers(
        name="optimizers-characters",
        about=("OptimizerSwap",),
        default_data="Python sources",
        text="On characters, each optimizer with its own learning rate ends with at most 0.02 more loss than AdamW.",
        metric="validation_loss",
        higher=False,
        margin=-0.02,
        scale=1,
        unit="",
        chosen_by="validation_loss",
        budget=15,
        model="characters",
    ),
)
