"""Attacked inputs: training on them, and AccuracyGradientLR (AccelAT) against schedules by the steps to a robust accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
from studies import claim as base
from studies.arms import Arm, Use
from studies.claim import Paper, Run, better_by
from studies.common import finish_loggers
from studies.on_task import OnTask, look
from studies.tasks import TASKS, pixels

ROBUST = "adversarial/val_acc"
VALIDATION_STEPS, TEST_STEPS, TESTED_IMAGES = 5, 20, 1_000
ENOUGH = 0.98  # target, as a share of the final robust accuracy at the constant rate


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training.

    Args:
        validation: Mean accuracy under attack of the last two validations, by which the rate is chosen.
        robust_accuracy: The lower of the two accuracies under attack that follow.
        pgd_accuracy: Accuracy on 1,000 test images attacked by PGD with 20 steps.
        autopgd_accuracy: Accuracy on these images attacked by AutoPGD, which has no step size, with as many steps.
        test_accuracy: Accuracy on these images without attack.
        curve: Accuracy under attack of each epoch, on the validation images.
        cpu_seconds: Processor time of the fit without validation.
    """

    validation: float
    robust_accuracy: float
    pgd_accuracy: float
    autopgd_accuracy: float
    test_accuracy: float
    curve: list[float]
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Attacked(OnTask):
    """Arms under attacks of one size.

    Args:
        radius: Largest change of a pixel between 0 and 1, in 255ths.
        attack: Attack in training, ``"fgsm"``, ``"pgd"``, or ``"by arm"`` if the name of an arm is that of its attack.
    """

    result: ClassVar[type[Any]] = Result
    choices: ClassVar[Mapping[str, Sequence[str]]] = {**OnTask.choices, "attack": ("fgsm", "pgd", "by arm")}
    metric: str = "robust_accuracy"
    scale: float = 100
    unit: str = "%"
    chosen_by: str = "validation"
    radius: int = 8
    attack: str = "fgsm"

    @override
    def check(self) -> None:
        super().check()
        if not find_spec("art"):
            raise ValueError(f"{self.name} attacks with AutoPGD: pip install adversarial-robustness-toolbox")

    @override
    def train(self, run: Run) -> Result:
        """Run one training on attacked inputs, and attack the module that remains."""
        data: Any = TASKS[self.task].data(self.data, run.seed, self.flip)
        data.setup("fit")
        space, epsilon, curve = pixels(data), self.radius / 255, Curve()
        attack: Any = run.arm if self.attack == "by arm" else self.attack
        attacks = (
            [AdversarialTraining(epsilon, attack, check_every_n_epochs=None, **space)] if attack != "plain" else []
        )
        first = [curve, AdversarialEvaluation(epsilon, VALIDATION_STEPS, **space), *attacks]
        _, module, data, clock = self.fitted(run, first)
        judge = self.trainer(run, [AdversarialEvaluation(epsilon, TEST_STEPS, **space)], logger=False)
        tested = data.test_dataloader().dataset
        loader = DataLoader(Subset(tested, range(min(TESTED_IMAGES, len(tested)))), 500)
        _, clean = look(judge, module, loader)
        pgd = float(judge.callback_metrics[ROBUST])
        autopgd = under_autopgd(module, loader, epsilon, **space)
        finish_loggers(judge)
        values = curve.values[-2:]
        measured = (min(pgd, autopgd), pgd, autopgd, clean, curve.values, clock.seconds)
        return Result(run.arm, run.seed, run.rate, sum(values) / len(values), *measured)

    @override
    def limits(self, arm: Arm, batches: int) -> Any:
        limits, length = super().limits(arm, batches)
        return {**limits, "check_val_every_n_epoch": 1}, length


def under_autopgd(
    module: LightningModule,
    loader: Iterable[Any],
    epsilon: float,
    bounds: tuple[float, float],
    mean: Sequence[float],
    std: Sequence[float],
) -> float:
    """Return the accuracy under AutoPGD (2003.01690), which chooses its steps itself, so none can be chosen badly for it.

    Args:
        module: The module, which returns logits.
        loader: Batches of normalized images and their labels.
        epsilon: Largest change of a pixel.
        bounds: Smallest and largest pixel.
        mean: Mean of each channel, by which the images were normalized.
        std: Standard deviation of each channel, likewise.
    """
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels_of = (images * scale + shift).clamp(*bounds).numpy()
    channels = {name: np.reshape(values, (-1, 1, 1)) for name, values in (("mean", mean), ("std", std))}
    classifier = PyTorchClassifier(
        module.eval(),
        nn.CrossEntropyLoss(),
        pixels_of.shape[1:],
        int(labels.max()) + 1,
        clip_values=bounds,
        preprocessing=tuple(channels.values()),
        device_type=module.device.type.replace("cuda", "gpu"),
    )
    state = np.random.get_state()
    first_step = 2 * epsilon  # as published; later ones are halved where they do not help
    settings = {"max_iter": TEST_STEPS, "nb_random_init": 1, "batch_size": 500, "loss_type": "cross_entropy"}
    attack = AutoProjectedGradientDescent(classifier, np.inf, epsilon, first_step, verbose=False, **settings)
    attacked = attack.generate(pixels_of, labels.numpy())
    np.random.set_state(state)
    return float((classifier.predict(attacked).argmax(1) == labels.numpy()).mean())


class Curve(Callback):
    """Records the accuracy under attack of each epoch. It is logged after the hooks of the validation."""

    def __init__(self) -> None:
        self.values: list[float] = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics[ROBUST]))


@dataclass(frozen=True, kw_only=True)
class Schedules(Attacked):
    """Schedules by the epochs to the accuracy under attack of a constant rate."""

    @property
    @override
    def compared(self) -> tuple[str, float]:
        return "epochs saved", 1.0

    @override
    def difference(self, results: Mapping[str, Any], arm: str, reference: str) -> float:
        """Return how many epochs less an arm needs; a schedule that never gets there needs one more than it has."""
        target = ENOUGH * results["constant"].validation
        own, other = (epochs_to(target, results[name].curve) for name in (arm, reference))
        return better_by(own, other, higher=False)


def epochs_to(target: float, curve: Sequence[float]) -> float:
    """Return the number of epochs until an accuracy is reached, or one more than there are.

    Example:
        >>> epochs_to(0.5, [0.1, 0.5, 0.4]), epochs_to(0.7, [0.1, 0.2])
        (2.0, 3.0)
    """
    return next((float(epoch) for epoch, value in enumerate(curve, 1) if value >= target), len(curve) + 1.0)


def schedule(name: str) -> Arm:
    """Return a schedule of the task's module."""
    return Arm(module={"schedule": name})


SCHEDULES = {
    "constant": schedule("constant"),
    "cosine": schedule("cosine"),
    "one-cycle": schedule("one-cycle"),
    # As published, with a window that fits into so few epochs.
    "accelat": Arm(
        Use(AccuracyGradientLR, ROBUST, window=2, cooldown=1, figure=False), module={"schedule": "constant"}
    ),
}
ATTACKS = {name: Arm() for name in ("plain", "fgsm", "pgd")}
CLAIMS = (
    Attacked(
        name="attacks-images",
        text="Training on attacked inputs raises the accuracy under PGD and AutoPGD; with PGD more than with FGSM.",
        paper=Paper(
            "`AdversarialTraining`",
            "adversarial",
            "Training on inputs attacked by PGD gives networks that withstand attacks.",
            "Towards Deep Learning Models Resistant to Adversarial Attacks (1706.06083)",
        ),
        table=ATTACKS,
        arms=tuple(ATTACKS),
        reference="plain",
        pairs=[("fgsm", "plain"), ("pgd", "plain"), ("pgd", "fgsm")],
        attack="by arm",
        rates=(0.03, 0.1),
        budget=14,
    ),
    Schedules(
        name="accelat-images",
        text="AccuracyGradientLR reaches the robust accuracy of a constant rate in fewer epochs than other schedules.",
        paper=Paper(
            "`AccuracyGradientLR`",
            "schedules",
            "A rate that follows the slope of the accuracy makes adversarial training up to twice as fast.",
            "AccelAT: Accelerating the Adversarial Training through Accuracy Gradient (2210.06888)",
        ),
        table=SCHEDULES,
        arms=tuple(SCHEDULES),
        reference="constant",
        pairs=[("accelat", other) for other in ("constant", "cosine", "one-cycle")],
        rates=(0.03, 0.1),
        budget=17,
    ),
)
