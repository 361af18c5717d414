"""SAM and ASAM against the same optimizer, at equal steps and at equal time, on a small network that learns digits.

A sharp step computes two gradients, so at equal time the plain optimizer takes twice as many steps: the arm ``plain-long``. On
a network as small as this one, a sharp step takes longer than two plain steps, because its fixed costs count; the table shows
the time. Every arm has its own learning rate, chosen on a seed that is not reported. The lengths of the moves are those of the
papers.

At the end, the loss on the training images is measured at the weights, and after a move up the gradient of a fixed length. The
largest eigenvalue of the Hessian is found by power iteration. Both describe the curvature of the loss, and both depend on the
scale of the weights, so compare them between trainings of one network only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from plain_project import Digits, ImageClassifier
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_grad.callbacks import SAM
from lightning_grad.functional import ascend_
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers, linear_network

LENGTH = 0.05  # of the move after which the loss is measured
ITERATIONS = 50  # of the power iteration

# The line in Trainer(callbacks=[...]) of each arm.
CALLBACKS: Mapping[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "plain-long": list,
    "sam": lambda: [SAM()],
    "asam": lambda: [SAM(adaptive=True)],
}
LONGER = {"plain-long": 2}  # as many times the steps


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training.

    Args:
        validation_loss: Loss on the validation images at the end.
        validation_accuracy: Accuracy on the validation images at the end.
        test_accuracy: Accuracy on the test images.
        training_loss: Loss on the training images at the end.
        rise: Rise of this loss after a move of length 0.05 up its gradient.
        eigenvalue: Largest eigenvalue, by magnitude, of the Hessian of this loss.
        cpu_seconds: Processor time of the training steps, without validation.
    """

    validation_loss: float
    validation_accuracy: float
    test_accuracy: float
    training_loss: float
    rise: float
    eigenvalue: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Sharpness(Claim[Result]):
    """SAM and ASAM against SGD with momentum.

    Args:
        steps: Optimizer steps of each training; ``plain-long`` takes twice as many.
        width: Units of a hidden layer.
        flip: Share of the training labels that are replaced by another class.
    """

    result = Result
    name: str = "sharpness"
    text: str = "SAM and ASAM end with a smaller largest eigenvalue of the Hessian, at equal steps and at equal time."
    arms: Sequence[str] = tuple(CALLBACKS)
    reference: str = "plain"
    metric: str = "eigenvalue"
    higher: bool = False
    rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3)
    chosen_by: str = "validation_loss"
    budget: float = 5
    steps: int = 500
    width: int = 128
    flip: float = 0.0

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        """Compare each sharp arm at equal time and at equal steps."""
        plain = [arm for arm in ("plain-long", "plain") if arm in self.arms]
        return [(arm, other) for arm in self.arms if arm not in plain for other in plain]

    @override
    def train(self, run: Run) -> Result:
        """Run one training, test the module, and measure the loss around its weights."""
        data, clock = Digits(seed=run.seed, flip=self.flip), StepClock()
        module = build_module(self.width, run.rate)
        trainer = self.trainer(
            run,
            [clock, Follow(run.show, "val_acc"), *CALLBACKS[run.arm]()],
            max_steps=self.steps * LONGER.get(run.arm, 1),
            val_check_interval=max(1, self.steps // 10),
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, data)
        (validation,) = trainer.validate(module, data, verbose=False)
        (tested,) = trainer.test(module, data, verbose=False)
        finish_loggers(trainer)
        accuracies = validation["val_loss"], validation["val_acc"], tested["test_acc"]
        around = measure(module, *cast(TensorDataset, data.train_set).tensors)
        return Result(run.arm, run.seed, run.rate, *accuracies, *around, clock.seconds)


def build_module(width: int, rate: float | None = None) -> ImageClassifier:
    """Return a new module."""
    given: dict[str, Any] = {} if rate is None else {"lr": rate}
    return ImageClassifier(linear_network(width), optimizer="sgd", weight_decay=5e-4, **given)


class StepClock(Callback):
    """Adds up the processor time of training steps. Must be first, so that it includes the other callbacks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds += time.process_time() - self._start


# What is measured at the end.


def measure(module: ImageClassifier, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Return the loss of a classifier on some images, its rise after a move up the gradient, and the largest eigenvalue."""
    module.eval()
    images, labels = images.to(module.device), labels.to(module.device)
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        found: Tensor = module.loss(module(images), labels)
        return found

    return loss().item(), rise_of(loss, weights), top_eigenvalue(loss, weights)


def rise_of(loss: Callable[[], Tensor], weights: Sequence[Tensor], length: float = LENGTH) -> float:
    """Return by how much a loss rises when its weights move up the gradient; the weights move back.

    Example:
        >>> weight = torch.tensor([2.0], requires_grad=True)
        >>> round(rise_of(lambda: weight.square().sum(), [weight], 0.5), 4), weight.item()
        (2.25, 2.0)
    """
    here = loss()
    gradients = torch.autograd.grad(here, list(weights))
    kept = [weight.detach().clone() for weight in weights]
    ascend_(weights, gradients, length)
    with torch.no_grad():
        rise = (loss() - here).item()
        torch._foreach_copy_(list(weights), kept)
    return rise


def top_eigenvalue(loss: Callable[[], Tensor], weights: Sequence[Tensor], iterations: int = ITERATIONS) -> float:
    """Return the eigenvalue of a loss's Hessian that is largest by magnitude, by power iteration from a fixed start.

    Example:
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> round(top_eigenvalue(lambda: (weight.square() * torch.tensor([3.0, 0.5])).sum(), [weight]), 4)
        6.0
    """
    gradients = torch.autograd.grad(loss(), list(weights), create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]
    eigenvalue = torch.zeros(())
    for _ in range(iterations):
        length = torch.stack(torch._foreach_norm(vector)).norm()
        vector = [part / length for part in vector]
        product = torch.autograd.grad(gradients, list(weights), vector, retain_graph=True)
        eigenvalue = torch.stack([(v * p).sum() for v, p in zip(vector, product, strict=True)]).sum()
        vector = list(product)
    return eigenvalue.item()


_ACCURATE: dict[str, Any] = {
    "metric": "test_accuracy",
    "higher": True,
    "scale": 100,
    "unit": "%",
    "chosen_by": "validation_accuracy",
}
_SAM = "SAM (2010.01412)"
_ASAM = f"{_SAM}; ASAM (2102.11600)"
CLAIMS = (
    Sharpness(paper=Paper("SAM, ASAM", "sharpness", "Training ends in a flat minimum", _SAM)),
    Sharpness(
        name="sharpness-accuracy",
        text="SAM and ASAM are more accurate than the same optimizer, at equal steps and at equal time.",
        paper=Paper("SAM, ASAM", "sharpness", "Flat minima generalize better", _ASAM),
        **_ACCURATE,
    ),
    Sharpness(
        name="sharpness-wrong-labels",
        text="With 20 % wrong labels, SAM and ASAM are more accurate, at equal steps and at equal time.",
        paper=Paper("SAM, ASAM", "sharpness", "SAM is robust to wrong labels", _SAM),
        flip=0.2,
        **_ACCURATE,
    ),
)
