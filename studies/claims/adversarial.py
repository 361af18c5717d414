"""Adversarial training, and AccuracyGradientLR (AccelAT) against learning-rate schedules.

A small network learns handwritten digits without attacks (plain), with attacks of one step (FGSM) and of several (PGD). An
arm is an attack and a schedule. AdversarialEvaluation repeats each validation with PGD, which measures how robust the network
is.

Every arm uses the peak rate with the best final validation, so no schedule is judged by the rate that suits another. "Best"
is the accuracy under attack, or for plain training the accuracy without attack. The target accuracy is 98 % of the final
accuracy at a constant rate, with the same seed. Schedules that end at a small rate reach it late because they are stretched
over the whole training: compare with fewer epochs before you conclude that one is slow.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project import CIFAR10, Digits, ImageClassifier, ResidualConvNet
from plain_project.cifar10 import MEAN, STD
from typing_extensions import override

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
from studies import claim as base
from studies.claim import Claim, Paper, Run, better_by
from studies.common import Follow, finish_loggers, linear_network, write_columns, write_table

IN_THE_DEMO = """\
Attacked inputs (half a minute). A small network learns handwritten digits: on
clean inputs, then on inputs that an attack (FGSM, PGD) changes in each step. The
learning rate is cut when the accuracy under attack stops rising. Three seeds:

    Trainer(callbacks=[AdversarialTraining(0.15), AdversarialEvaluation(0.15),
                       AccuracyGradientLR("adversarial/val_acc")])
"""

PGD_STEPS, VALIDATION_STEPS, TEST_STEPS = 5, 10, 20
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)  # epsilons of attacks on the test images, relative to the training
ENOUGH = 0.98  # target, as a share of the final accuracy at the constant rate
LAST = 3  # validations in a mean: a single one may be high by chance
OURS, REFERENCE = "accuracy-gradient", "constant"
CLEAN, ROBUST = "val_acc", "adversarial/val_acc"

# Schedules of the plain project, and a constant rate that AccuracyGradientLR cuts.
SCHEDULES = ("constant", "piecewise", "linear", "one-cycle", OURS)

# The line in Trainer(callbacks=[...]) of each attack, by epsilon and the arguments of :func:`pixels`.
ATTACKS: dict[str, Callable[[float, dict[str, Any]], list[Callback]]] = {
    "plain": lambda epsilon, space: [],
    "fgsm": lambda epsilon, space: [AdversarialTraining(epsilon, "fgsm", check_every_n_epochs=None, **space)],
    "pgd": lambda epsilon, space: [
        AdversarialTraining(epsilon, "pgd", steps=PGD_STEPS, check_every_n_epochs=None, **space)
    ],
}


def judged(attack: str) -> str:
    """Return the validation metric by which a training is judged."""
    return CLEAN if attack == "plain" else ROBUST


def schedule_of(schedule: str, attack: str) -> list[Callback]:
    """Return the line in ``Trainer(callbacks=[...])`` of a schedule, with the settings of the paper."""
    return [AccuracyGradientLR(judged(attack), figure=False)] if schedule == OURS else []


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is its attack and its schedule.

    Args:
        validation: Mean of the last three values of the metric of :func:`judged`, by which the rate is chosen.
        clean_accuracy: Accuracy on the test images.
        robust_accuracy: Accuracy on the test images attacked by PGD with 20 steps.
        cuts: Number of cuts of the learning rate.
        cpu_seconds: Processor time of the training steps, without validation.
        curve: The metric of :func:`judged` in every epoch.
    """

    validation: float
    clean_accuracy: float
    robust_accuracy: float
    cuts: int
    cpu_seconds: float
    curve: list[float]

    @property
    def attack(self) -> str:
        """The attack, see :data:`ATTACKS`."""
        return self.arm.split()[0]

    @property
    def schedule(self) -> str:
        """The schedule, see :data:`SCHEDULES`."""
        return self.arm.split()[1]


@dataclass(frozen=True, kw_only=True)
class Adversarial(Claim[Result]):
    """Training on attacked inputs, with several schedules.

    Args:
        epochs: Epochs of each training.
        epsilon: Largest change of a pixel between 0 and 1; by default 0.15, for CIFAR-10 8/255.
        width: Units of a hidden layer (by default 128), for CIFAR-10 channels of the first stage (64).
        limit: Number of CIFAR-10 images to read, for a quick look.
    """

    result = Result
    reads = "a folder with CIFAR-10"
    name: str = "adversarial"
    text: str = "Training on attacked inputs raises the accuracy under PGD by more than 20 points."
    arms: Sequence[str] = tuple(f"{attack} constant" for attack in ATTACKS)
    reference: str = "plain constant"
    metric: str = "robust_accuracy"
    margin: float = 0.2
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (0.03, 0.1, 0.3)
    chosen_by: str = "validation"
    budget: float = 1.5
    epochs: int = 40
    epsilon: float | None = None
    width: int | None = None
    limit: int | None = None

    @property
    @override
    def known(self) -> list[str]:
        return [f"{attack} {schedule}" for attack in ATTACKS for schedule in SCHEDULES]

    @property
    def radius(self) -> float:
        """The largest change of a pixel, on a scale from 0 to 1."""
        return self.epsilon if self.epsilon is not None else 8 / 255 if self.data else 0.15

    @property
    def attacks(self) -> list[str]:
        """The attacks of the arms."""
        return list(dict.fromkeys(arm.split()[0] for arm in self.arms))

    @property
    def schedules(self) -> list[str]:
        """The schedules of the arms."""
        return list(dict.fromkeys(arm.split()[1] for arm in self.arms))

    @property
    def base_schedule(self) -> str:
        """The schedule that defines the target accuracy."""
        return REFERENCE if REFERENCE in self.schedules else self.schedules[0]

    @override
    def label(self, of: Run | Result) -> str:
        rate = f"_{of.rate:g}" if of.rate is not None else ""
        return f"{of.arm.replace(' ', '/')}{rate}_seed{of.seed}"

    @override
    def train(self, run: Run) -> Result:
        """Run one training, and test the module."""
        attack, schedule = run.arm.split()
        data, recorder, folder = build_data(self, run.seed), Recorder(), self.folder(run)
        space = pixels(data)
        rules = [*ATTACKS[attack](self.radius, space), *schedule_of(schedule, attack)]
        evaluation = AdversarialEvaluation(self.radius, VALIDATION_STEPS, **space)
        callbacks = [recorder, Follow(run.show, judged(attack)), evaluation, *rules]
        trainer = self.trainer(run, callbacks, max_epochs=self.epochs)
        module = build_module(self, schedule, run.rate)
        trainer.fit(module, data)
        finish_loggers(trainer)
        write_columns(folder / "epochs.csv", "epoch", recorder.columns)
        if schedule == self.schedules[-1]:  # for the figures that compare attacks
            torch.save(module.state_dict(), folder / "weights.pt")
        cuts, curve = int(trainer.callback_metrics.get("lr/cuts", 0)), recorder.columns[judged(attack)]
        accuracies = self.evaluate(run, module, data, space)
        write_table(folder / "strengths.csv", ("epsilon", "accuracy"), list(accuracies.items()))
        tested = accuracies[0.0], accuracies[self.radius]
        final = statistics.mean(curve[-LAST:])
        return Result(run.arm, run.seed, run.rate, final, *tested, cuts, recorder.cpu_seconds, curve)

    def evaluate(
        self, run: Run, module: LightningModule, data: Digits | CIFAR10, space: dict[str, Any]
    ) -> dict[float, float]:
        """Return the test accuracy by the epsilon of an attack, from 0 to twice that of the training."""
        epsilons = {f"x{strength:g}": strength * self.radius for strength in STRENGTHS}
        attacks = [AdversarialEvaluation(each, TEST_STEPS, name=name, **space) for name, each in epsilons.items()]
        (tested,) = self.trainer(run, [*attacks], logger=False).test(module, data, verbose=False)
        attacked = {each: tested[f"adversarial/{name}/test_acc"] for name, each in epsilons.items()}
        return {0.0: tested["test_acc"], **attacked}


@dataclass(frozen=True, kw_only=True)
class AccelAT(Adversarial):
    """AccuracyGradientLR against schedules, by the epochs to an accuracy."""

    name: str = "accelat"
    text: str = "AccuracyGradientLR reaches the accuracy of a constant rate in fewer epochs than other schedules."
    arms: Sequence[str] = tuple(f"{attack} {schedule}" for attack in ATTACKS for schedule in SCHEDULES)
    reference: str = "pgd constant"
    margin: float = 0.0
    budget: float = 7

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        """Compare AccuracyGradientLR with each other schedule under the same attack."""
        others = [schedule for schedule in self.schedules if schedule != OURS]
        attacks = [attack for attack in self.attacks if attack != "plain"]
        return [(f"{attack} {OURS}", f"{attack} {schedule}") for attack in attacks for schedule in others]

    @property
    @override
    def compared(self) -> tuple[str, float]:
        return "epochs saved", 1.0

    @override
    def difference(self, results: Mapping[str, Result], arm: str, reference: str) -> float:
        """Return how many epochs less an arm needs."""
        target = ENOUGH * results[f"{arm.split()[0]} {self.base_schedule}"].validation
        own, other = (epochs_to(target, results[name].curve) for name in (arm, reference))
        return better_by(own, other, higher=False)


def build_module(claim: Adversarial, schedule: str, rate: float | None) -> LightningModule:
    """Return a new module: three linear layers for the digits, a network like ResNet-18 for CIFAR-10."""
    own = "constant" if schedule == OURS else schedule
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": rate or 0.1, "weight_decay": 5e-4, "schedule": own}
    if claim.data is None:
        return ImageClassifier(linear_network(claim.width or 128), **settings)
    return ResidualConvNet(3, claim.width or 64, (2, 2, 2, 2), **settings)


def build_data(claim: Adversarial, seed: int) -> Digits | CIFAR10:
    """Return new data after ``setup``. With digits, every seed has its own split."""
    data = CIFAR10(claim.data, 128, claim.limit) if claim.data else Digits(batch_size=128, seed=seed)
    data.setup("fit")
    return data


def pixels(data: Digits | CIFAR10) -> dict[str, Any]:
    """Return the arguments of attacks for normalized images, with epsilon in pixels from 0 to 1."""
    mean, std = (
        ([data.mean], [data.std]) if isinstance(data, Digits) else (MEAN.flatten().tolist(), STD.flatten().tolist())
    )
    return {"bounds": (0.0, 1.0), "mean": mean, "std": std}


class Recorder(Callback):
    """Record the learning rate and both accuracies of every epoch, and the time of training steps.

    Must be the first callback, so the time includes the other callbacks.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {"lr": [], CLEAN: [], ROBUST: []}
        self.cpu_seconds = 0.0
        self._start = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.columns["lr"].append(trainer.optimizers[0].param_groups[0]["lr"])

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.cpu_seconds += time.process_time() - self._start

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for key in (CLEAN, ROBUST):
            self.columns[key].append(float(trainer.callback_metrics[key]))


def epochs_to(target: float, accuracies: Sequence[float] | np.ndarray) -> float:
    """Return the number of epochs until the mean of the last three accuracies is at least the target.

    Example:
        >>> epochs_to(0.5, [0.0, 0.9, 0.4, 0.5, 0.6]), epochs_to(0.7, [0.1, 0.2])
        (4.0, inf)
    """
    means = [statistics.mean(accuracies[end - LAST : end]) for end in range(LAST, len(accuracies) + 1)]
    return next((float(number) for number, mean in enumerate(means, LAST) if mean >= target), math.inf)


CLAIMS = (
    Adversarial(
        paper=Paper(
            "AdversarialTraining",
            "adversarial",
            "Training on PGD attacks makes networks resistant to attacks by gradients",
            "Madry et al. (1706.06083)",
        )
    ),
    AccelAT(
        paper=Paper(
            "AccuracyGradientLR",
            "schedules",
            "A rate that follows the slope of the accuracy makes adversarial training up to twice as fast",
            "AccelAT (2210.06888)",
        )
    ),
)
