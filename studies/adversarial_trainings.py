"""The trainings of the adversarial study, and the epochs that each needed to reach the target accuracy."""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from plain_project import CIFAR10, Digits, ImageClassifier, ResidualConvNet
from plain_project.cifar10 import MEAN, STD
from torch import nn
from typing_extensions import override

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
from studies.common import Follow, Show, build_loggers, finish_loggers

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


@dataclass(frozen=True)
class Study:
    """Settings of the study; :func:`parse` describes each field."""

    attacks: Sequence[str] = tuple(ATTACKS)
    schedules: Sequence[str] = SCHEDULES
    rates: Sequence[float] = (0.03, 0.1, 0.3)
    seeds: int = 1
    epochs: int = 40
    epsilon: float | None = None
    width: int | None = None
    cifar10: Path | None = None
    limit: int | None = None
    output: Path = Path("runs/adversarial")
    wandb: str | None = None
    accelerator: str = "auto"
    threads: int = 1

    @property
    def radius(self) -> float:
        """The largest change of a pixel, on a scale from 0 to 1."""
        return self.epsilon if self.epsilon is not None else 8 / 255 if self.cifar10 else 0.15

    @property
    def reference(self) -> str:
        """The schedule that defines the target accuracy."""
        return REFERENCE if REFERENCE in self.schedules else self.schedules[0]

    def trainings(self) -> Iterator[tuple[str, float]]:
        """Yield each schedule with each peak rate."""
        yield from ((schedule, rate) for schedule in self.schedules for rate in self.rates)

    def name(self, attack: str, schedule: str, rate: float, seed: int) -> str:
        """Return the name of one training, which is its folder in the output."""
        return f"{attack}/{schedule}_{rate:g}_seed{seed}"

    def folder(self, attack: str, schedule: str, rate: float, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / self.name(attack, schedule, rate, seed)


def judged(attack: str) -> str:
    """Return the validation metric by which a training is judged."""
    return CLEAN if attack == "plain" else ROBUST


def schedule_of(schedule: str, attack: str) -> list[Callback]:
    """Return the line in ``Trainer(callbacks=[...])`` of a schedule, with the settings of the paper."""
    return [AccuracyGradientLR(judged(attack), figure=False)] if schedule == OURS else []


@dataclass(frozen=True)
class Result:
    """The result of one training.

    Args:
        attack: The attack, see :data:`ATTACKS`.
        schedule: The schedule, see :data:`SCHEDULES`.
        rate: Peak learning rate.
        seed: Its seed, which also splits the digits.
        validation: Mean of the last three values of the metric of :func:`judged`, by which the rate is chosen.
        clean_accuracy: Accuracy on the test images.
        robust_accuracy: Accuracy on the test images attacked by PGD with 20 steps.
        cuts: Number of cuts of the learning rate.
        cpu_seconds: Processor time of the training steps, without validation.
    """

    attack: str
    schedule: str
    rate: float
    seed: int
    validation: float
    clean_accuracy: float
    robust_accuracy: float
    cuts: int
    cpu_seconds: float


# Training.


def label(schedule: str, rate: float) -> str:
    """Return the name of a training in the progress display."""
    return f"{schedule} {rate:g}"


def train(study: Study, attack: str, schedule: str, rate: float, seed: int, show: Show) -> Result:
    """Run one training, and test the module."""
    data = build_data(study, seed)
    space, recorder = pixels(data), Recorder()
    follow = Follow(show, label(schedule, rate), seed, judged(attack))
    rules = [*ATTACKS[attack](study.radius, space), *schedule_of(schedule, attack)]
    evaluation = AdversarialEvaluation(study.radius, VALIDATION_STEPS, **space)
    name = study.name(attack, schedule, rate, seed)
    seed_everything(seed, verbose=False)
    trainer = build_trainer(study, name, [recorder, follow, evaluation, *rules])
    module = build_module(study, schedule, rate)
    trainer.fit(module, data)
    finish_loggers(trainer)
    recorder.write(study.output / name)
    if schedule == study.schedules[-1]:  # for the figures that compare attacks
        torch.save(module.state_dict(), study.output / name / "weights.pt")
    cuts = int(trainer.callback_metrics.get("lr/cuts", 0))
    final = statistics.mean(recorder.columns[judged(attack)][-LAST:])
    accuracies = evaluate(study, module, data, space)
    write_strengths(accuracies, study.output / name)
    clean, robust = accuracies[0.0], accuracies[study.radius]
    return Result(attack, schedule, rate, seed, final, clean, robust, cuts, recorder.cpu_seconds)


def build_trainer(study: Study, name: str | None, callbacks: list[Callback]) -> Trainer:
    """Return a new trainer. Without a name it logs nothing."""
    return Trainer(
        callbacks=callbacks,
        logger=build_loggers(study.output, name, "adversarial", study.wandb) if name else False,
        max_epochs=study.epochs,
        accelerator=study.accelerator,
        devices=1,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def evaluate(
    study: Study, module: LightningModule, data: Digits | CIFAR10, space: dict[str, Any]
) -> dict[float, float]:
    """Return the test accuracy by the epsilon of an attack, from 0 to twice that of the training."""
    epsilons = {f"x{strength:g}": strength * study.radius for strength in STRENGTHS}
    attacks = [AdversarialEvaluation(each, TEST_STEPS, name=name, **space) for name, each in epsilons.items()]
    (tested,) = build_trainer(study, None, [*attacks]).test(module, data, verbose=False)
    attacked = {each: tested[f"adversarial/{name}/test_acc"] for name, each in epsilons.items()}
    return {0.0: tested["test_acc"], **attacked}


def write_strengths(accuracies: Mapping[float, float], folder: Path) -> None:
    """Write ``strengths.csv``: a row for each epsilon."""
    with (folder / "strengths.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("epsilon", "accuracy"), *accuracies.items()])


def build_module(study: Study, schedule: str, rate: float) -> LightningModule:
    """Return a new module: three linear layers for the digits, a network like ResNet-18 for CIFAR-10."""
    own = "constant" if schedule == OURS else schedule
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": rate, "weight_decay": 5e-4, "schedule": own}
    if study.cifar10 is None:
        width = study.width or 128
        layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        return ImageClassifier(nn.Sequential(nn.Flatten(), *layers), **settings)
    return ResidualConvNet(3, study.width or 64, (2, 2, 2, 2), **settings)


def build_data(study: Study, seed: int) -> Digits | CIFAR10:
    """Return new data after ``setup``. With digits, every seed has its own split."""
    data = CIFAR10(study.cifar10, 128, study.limit) if study.cifar10 else Digits(batch_size=128, seed=seed)
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

    Must be the first callback, so that the time includes the other callbacks.
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

    def write(self, folder: Path) -> None:
        """Write a row for each epoch."""
        with (folder / "epochs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", *self.columns])
            writer.writerows([number, *row] for number, row in enumerate(zip(*self.columns.values(), strict=True), 1))


def read_column(folder: Path, key: str, table: str = "epochs") -> np.ndarray:
    """Read one column of a table of a training."""
    with (folder / f"{table}.csv").open(newline="") as file:
        return np.array([float(row[key]) for row in csv.DictReader(file)])


# Comparison.

Chosen = Mapping[tuple[str, str], list[Result]]  # (attack, schedule): the results at the chosen rate, one for each seed


def tune(results: Sequence[Result]) -> Chosen:
    """Choose the peak rate of each attack and schedule by the mean final validation of its trainings."""
    chosen = {}
    for attack, schedule in dict.fromkeys((result.attack, result.schedule) for result in results):
        own = [result for result in results if (result.attack, result.schedule) == (attack, schedule)]
        by_rate = {result.rate: [other for other in own if other.rate == result.rate] for result in own}
        best = max(by_rate, key=lambda rate: statistics.mean(result.validation for result in by_rate[rate]))
        chosen[attack, schedule] = by_rate[best]
    return chosen


@dataclass(frozen=True)
class Reached:
    """The epoch in which a training reached the target.

    Args:
        attack: The attack.
        schedule: The schedule.
        rate: The chosen peak rate.
        seed: The seed.
        target: Target of the metric of :func:`judged`.
        epochs: Number of epochs to the target, see :func:`epochs_to`; infinite if it was never reached.
    """

    attack: str
    schedule: str
    rate: float
    seed: int
    target: float
    epochs: float


def reach(study: Study, chosen: Chosen) -> list[Reached]:
    """Return when each chosen training reached 98 % of the final accuracy of the reference with the same seed."""
    reached = []
    for (attack, schedule), results in chosen.items():
        for result, reference in zip(results, chosen[attack, study.reference], strict=True):
            target = ENOUGH * reference.validation
            accuracies = read_column(study.folder(attack, schedule, result.rate, result.seed), judged(attack))
            epochs = epochs_to(target, accuracies)
            reached.append(Reached(attack, schedule, result.rate, result.seed, target, epochs))
    return reached


def epochs_to(target: float, accuracies: Sequence[float] | np.ndarray) -> float:
    """Return the number of epochs until the mean of the last three accuracies is at least the target.

    Example:
        >>> epochs_to(0.5, [0.0, 0.9, 0.4, 0.5, 0.6]), epochs_to(0.7, [0.1, 0.2])
        (4.0, inf)
    """
    means = [statistics.mean(accuracies[end - LAST : end]) for end in range(LAST, len(accuracies) + 1)]
    return next((float(number) for number, mean in enumerate(means, LAST) if mean >= target), math.inf)


def speed_ups(reached: Sequence[Reached], attack: str, schedule: str) -> list[float]:
    """Return the epochs of a schedule divided by those of AccuracyGradientLR, by seed; 1 if both never arrived."""
    ours, theirs = (
        [each.epochs for each in reached if (each.attack, each.schedule) == (attack, name)] for name in (OURS, schedule)
    )
    return [
        1.0 if math.isinf(own) and math.isinf(other) else other / own for own, other in zip(ours, theirs, strict=True)
    ]


def middle_and_range(values: Sequence[float], form: str, infinite: str = "never") -> str:
    """Format a median and, if there are several values, their range.

    Example:
        >>> middle_and_range([4.0, 8.0, math.inf], "{:g}")
        '8 (4-never)'
    """

    def write(value: float) -> str:
        return infinite if math.isinf(value) else form.format(value)

    span = f" ({write(min(values))}-{write(max(values))})" if len(values) > 1 else ""
    return write(statistics.median(values)) + span
