"""Training on attacked inputs, under several learning-rate schedules and under AccuracyGradientLR (AccelAT).

::

    python studies/adversarial.py --seeds 5
    python studies/adversarial.py --attacks fgsm --schedules one-cycle accuracy-gradient --rates 0.1 --epochs 20
    python studies/adversarial.py --cifar10 path/to/folder --epochs 30 --seeds 3

A small network learns handwritten digits as they are (plain), attacked by one step (FGSM) and by several (PGD). Each is
done under five schedules, each from several peak rates. The attack is one line in :data:`ATTACKS`, the schedule of AccelAT
is one in :func:`schedule_of`; all else here measures and draws. Each validation is run a second time under PGD, by
AdversarialEvaluation, which says how robust the network is.

What is fair to compare: every schedule has the peak rate that ends best with it, by the validation, so that none is judged by
the rate that suits another. What a training is for decides what "best" means: accuracy under attack, and of plain training
accuracy without. The accuracy to be reached is that at which training at a constant rate ends, a little less, of the same
seed. Schedules that end at a small rate reach it late because they are stretched over the whole training: compare with
fewer ``--epochs`` before you believe that one is slow.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import CIFAR10, Digits, ImageClassifier, ResidualConvNet
from plain_project.cifar10 import MEAN, STD

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
from lightning_grad.functional import pgd
from studies.common import Follow, Show, build_loggers, finish_loggers, hush, print_rows, progress, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PGD_STEPS, VALIDATION_STEPS, TEST_STEPS = 5, 10, 20
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of attacks on the test images, times the epsilon of the training
IN_THE_DEMO = """\
Attacked inputs (half a minute). A small network learns handwritten digits as
they are, then with inputs that an attack (FGSM, PGD) changes in each step, three
seeds each. The learning rate is cut when the accuracy under attack stops rising:

    Trainer(callbacks=[AdversarialTraining(0.15), AdversarialEvaluation(0.15),
                       AccuracyGradientLR("adversarial/val_acc")])
"""

ENOUGH = 0.98  # of the accuracy at which training at the constant rate ends
LAST = 3  # validations in a mean: one alone may be high by luck
OURS, REFERENCE = "accuracy-gradient", "constant"
CLEAN, ROBUST = "val_acc", "adversarial/val_acc"

# Those of the plain project, and a constant rate that AccuracyGradientLR cuts.
SCHEDULES = ("constant", "piecewise", "linear", "one-cycle", OURS)

# The line in Trainer(callbacks=[...]) of each attack, for an epsilon and what says where pixels are.
ATTACKS: dict[str, Callable[[float, dict[str, Any]], list[Callback]]] = {
    "plain": lambda epsilon, space: [],
    "fgsm": lambda epsilon, space: [AdversarialTraining(epsilon, "fgsm", check_every_n_epochs=None, **space)],
    "pgd": lambda epsilon, space: [
        AdversarialTraining(epsilon, "pgd", steps=PGD_STEPS, check_every_n_epochs=None, **space)
    ],
}


@dataclass(frozen=True)
class Study:
    """What is trained and where the results go; :func:`parse` says what each field means."""

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
        """By how much a pixel, which is between 0 and 1, may be changed."""
        return self.epsilon if self.epsilon is not None else 8 / 255 if self.cifar10 else 0.15

    @property
    def reference(self) -> str:
        """The schedule whose accuracy the others are to reach."""
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
    """Return the validation metric that a training is for."""
    return CLEAN if attack == "plain" else ROBUST


def schedule_of(schedule: str, attack: str) -> list[Callback]:
    """Return the line in ``Trainer(callbacks=[...])`` of a schedule, with the settings of the paper."""
    return [AccuracyGradientLR(judged(attack), figure=False)] if schedule == OURS else []


@dataclass(frozen=True)
class Result:
    """What one training came to.

    Args:
        attack: What it trained on, see :data:`ATTACKS`.
        schedule: Its schedule, see :data:`SCHEDULES`.
        rate: Its peak learning rate.
        seed: Its seed, also of the split of the digits.
        validation: Mean of the last three values of the metric that it is for, which chooses among rates.
        clean_accuracy: On the test images.
        robust_accuracy: On the test images under PGD with 20 steps.
        cuts: How often the learning rate was cut by its accuracy.
        cpu_seconds: Time of the process in training steps, without validation, whatever else the machine did.
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


def run_study(study: Study) -> list[Result]:
    """Train everything, and write ``results.csv``, ``reached.csv`` and the figures."""
    hush()
    torch.set_num_threads(study.threads)
    results = []
    for attack in study.attacks:
        print(f"{attack}:", flush=True)
        with progress([label(*training) for training in study.trainings()], study.seeds) as show:
            for seed in range(study.seeds):
                results += [train(study, attack, *training, seed, show) for training in study.trainings()]
    write_results(results, study.output / "results.csv")
    chosen = tune(results)
    write_results(reach(study, chosen), study.output / "reached.csv")
    for name, draw in FIGURES.items():
        if name != "comparison" or len(study.schedules) > 1:
            draw(study, chosen).savefig(study.output / f"{name}.png", dpi=140)
    return results


def label(schedule: str, rate: float) -> str:
    """Name a training in the progress display."""
    return f"{schedule} {rate:g}"


def train(study: Study, attack: str, schedule: str, rate: float, seed: int, show: Show) -> Result:
    """Train once, and test."""
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
    """Return a new trainer; one without a name logs nothing."""
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
    """Return the accuracy on the test images by the epsilon of an attack, from none to twice that of the training."""
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
    """Return new data, set up; of the digits every seed has its own split."""
    data = CIFAR10(study.cifar10, 128, study.limit) if study.cifar10 else Digits(batch_size=128, seed=seed)
    data.setup("fit")
    return data


def pixels(data: Digits | CIFAR10) -> dict[str, Any]:
    """Return what lets attacks count in pixels between 0 and 1, of images that are normalised."""
    mean, std = (
        ([data.mean], [data.std]) if isinstance(data, Digits) else (MEAN.flatten().tolist(), STD.flatten().tolist())
    )
    return {"bounds": (0.0, 1.0), "mean": mean, "std": std}


class Recorder(Callback):
    """Keep the learning rate and both accuracies of every epoch, and the time of training steps.

    It stands first in the list, so that the time holds what the others do in a step.
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


# What is compared.

Chosen = Mapping[tuple[str, str], list[Result]]  # attack and schedule: the results at the chosen rate, one a seed


def tune(results: Sequence[Result]) -> Chosen:
    """Choose for each attack and schedule the peak rate whose trainings end best, by the mean of their validations."""
    chosen = {}
    for attack, schedule in dict.fromkeys((result.attack, result.schedule) for result in results):
        own = [result for result in results if (result.attack, result.schedule) == (attack, schedule)]
        by_rate = {result.rate: [other for other in own if other.rate == result.rate] for result in own}
        best = max(by_rate, key=lambda rate: statistics.mean(result.validation for result in by_rate[rate]))
        chosen[attack, schedule] = by_rate[best]
    return chosen


@dataclass(frozen=True)
class Reached:
    """When a training reached what is asked for.

    Args:
        attack: What it trained on.
        schedule: Its schedule.
        rate: The peak rate that was chosen for it.
        seed: Its seed.
        target: The accuracy to be reached, in the metric that the training is for.
        epochs: After how many epochs it was, see :func:`epochs_to`; infinite if never.
    """

    attack: str
    schedule: str
    rate: float
    seed: int
    target: float
    epochs: float


def reach(study: Study, chosen: Chosen) -> list[Reached]:
    """Ask of every chosen training when it reached 98 % of what the reference ended at, by the same seed."""
    reached = []
    for (attack, schedule), results in chosen.items():
        for result, reference in zip(results, chosen[attack, study.reference], strict=True):
            target = ENOUGH * reference.validation
            accuracies = read_column(study.folder(attack, schedule, result.rate, result.seed), judged(attack))
            epochs = epochs_to(target, accuracies)
            reached.append(Reached(attack, schedule, result.rate, result.seed, target, epochs))
    return reached


def epochs_to(target: float, accuracies: Sequence[float] | np.ndarray) -> float:
    """Return after how many epochs the mean of the last three accuracies is at least the target.

    Example:
        >>> epochs_to(0.5, [0.0, 0.9, 0.4, 0.5, 0.6]), epochs_to(0.7, [0.1, 0.2])
        (4.0, inf)
    """
    means = [statistics.mean(accuracies[end - LAST : end]) for end in range(LAST, len(accuracies) + 1)]
    return next((float(number) for number, mean in enumerate(means, LAST) if mean >= target), math.inf)


def speed_ups(reached: Sequence[Reached], attack: str, schedule: str) -> list[float]:
    """Return of each seed how many epochs a schedule needed for each of AccuracyGradientLR; 1 if neither arrived."""
    ours, theirs = (
        [each.epochs for each in reached if (each.attack, each.schedule) == (attack, name)] for name in (OURS, schedule)
    )
    return [
        1.0 if math.isinf(own) and math.isinf(other) else other / own for own, other in zip(ours, theirs, strict=True)
    ]


# What is printed at the end.


def print_tables(results: Sequence[Result], study: Study) -> None:
    """Print a row for each attack and schedule, what AccuracyGradientLR gains over each, and what the columns mean."""
    chosen = tune(results)
    reached = reach(study, chosen)
    plain = statistics.mean(result.cpu_seconds for result in chosen[study.attacks[0], study.reference])
    rows = [summarise(study, own, reached, plain) for own in chosen.values()]
    print()
    print_rows(list(rows[0]), [list(row.values()) for row in rows])
    print()
    if len(study.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in study.rates)
        print(f"rate: the peak learning rate, of {rates} the one that ends best in the validation")
    if len(study.schedules) > 1:
        print(f"epochs: to {100 * ENOUGH:g} % of the accuracy under attack (of plain: without) at which")
        print(f"    {study.reference} ends, by the same seed; means of {LAST} validations")
    print(f"clean, robust: test accuracy in %, without PGD and with ({TEST_STEPS} steps, epsilon {study.radius:.3g})")
    print(f"CPU: time of training steps, {study.attacks[0]} with {study.reference} being 1")
    if study.seeds > 1:
        median = "; of epochs: median (least-most)" if len(study.schedules) > 1 else ""
        print(f"numbers: mean ± standard deviation over {study.seeds} seeds{median}")
        print("    a difference that is smaller than these deviations is no difference")
    else:
        print("one seed: it tells a large difference, and no small one")
    if OURS in study.schedules and len(study.schedules) > 1:
        print_speed_ups(study, chosen, reached)


def summarise(study: Study, own: Sequence[Result], reached: Sequence[Reached], plain: float) -> dict[str, str]:
    """Return the row of one attack and schedule by column, without columns in which nothing is compared."""
    attack, schedule = own[0].attack, own[0].schedule
    epochs = [each.epochs for each in reached if (each.attack, each.schedule) == (attack, schedule)]
    compared = {"schedule": schedule, "rate": f"{own[0].rate:g}", "epochs": middle_and_range(epochs, "{:g}")}
    return {
        "attack": attack,
        **(compared if len(study.schedules) > 1 else {}),
        "clean": mean_and_spread([100 * result.clean_accuracy for result in own]),
        "robust": mean_and_spread([100 * result.robust_accuracy for result in own]),
        "CPU": f"{statistics.mean(result.cpu_seconds for result in own) / plain:.1f}",
        "cuts": f"{statistics.mean(result.cuts for result in own):.1f}" if schedule == OURS else "",
    }


def print_speed_ups(study: Study, chosen: Chosen, reached: Sequence[Reached]) -> None:
    """Print for how many epochs of each schedule one under AccuracyGradientLR stands, and what it costs in accuracy."""
    rows = []
    for attack in study.attacks:
        for schedule in (schedule for schedule in study.schedules if schedule != OURS):
            ratios = speed_ups(reached, attack, schedule)
            pairs = zip(chosen[attack, OURS], chosen[attack, schedule], strict=True)
            gains = [100 * (own.robust_accuracy - other.robust_accuracy) for own, other in pairs]
            faster = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
            gained = mean_and_spread(gains, "+.1f")
            rows.append((attack, schedule, middle_and_range(ratios, "{:.2f}", "∞"), faster, gained))
    print("\nAccuracyGradientLR against each schedule:\n")
    print_rows(("attack", "schedule", "speed-up", "faster in", "robust accuracy gained"), rows)
    print("\nspeed-up: epochs that the schedule needed, divided by those of AccuracyGradientLR")


def mean_and_spread(values: Sequence[float], form: str = ".1f") -> str:
    """Write a mean, and the standard deviation where there are several values."""
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def middle_and_range(values: Sequence[float], form: str, infinite: str = "never") -> str:
    """Write a median, and the least and the most where there are several values.

    Example:
        >>> middle_and_range([4.0, 8.0, math.inf], "{:g}")
        '8 (4-never)'
    """

    def write(value: float) -> str:
        return infinite if math.isinf(value) else form.format(value)

    span = f" ({write(min(values))}-{write(max(values))})" if len(values) > 1 else ""
    return write(statistics.median(values)) + span


# The figures.

PALETTE = ("0.35", "#E69F00", "#56B4E9", "#009E73", "#D55E00")
COLOURS = dict(zip(SCHEDULES, PALETTE, strict=True))
ATTACK_COLOURS = {"plain": "0.35", "fgsm": "#D55E00", "pgd": "#0072B2"}
RIGHT, WRONG = "#0072B2", "#D55E00"
NAMES = {"plain": "plain training", "fgsm": "trained on FGSM", "pgd": f"trained on PGD, {PGD_STEPS} steps"}


def draw_robustness(study: Study, chosen: Chosen) -> Figure:
    """Draw test accuracy by the strength of the attack for each kind of training, and what that training costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    robust, cost = figure.subplots(1, 2, width_ratios=[1.7, 1])
    for attack in study.attacks:
        draw_strengths(robust, study, chosen[attack, study.schedules[-1]])
    robust.axvline(study.radius, color="0.5", linewidth=1, linestyle=":")
    robust.annotate("epsilon of the training", (study.radius, 102), (4, 0), textcoords="offset points", fontsize=8)
    robust.set(ylim=(0, 107), xlim=(0, None))
    robust.set_ylabel("% of the test images answered right", fontsize=9)
    robust.set_xlabel("epsilon: largest change of a pixel, which is between 0 and 1", fontsize=9)
    robust.set_title("Accuracy by the strength of the attack", fontsize=10, loc="left")
    robust.legend(loc="lower left", frameon=False, fontsize=9)
    draw_costs(cost, study, chosen)
    for axis in (robust, cost):
        tidy(axis)
    seeds = f"mean of {study.seeds} seeds, band: lowest to highest" if study.seeds > 1 else "one seed"
    figure.suptitle(f"What training on attacked images gives, and what it costs ({seeds})", fontsize=11)
    return figure


def draw_strengths(axis: Axes, study: Study, results: Sequence[Result]) -> None:
    """Draw the accuracy of one kind of training by the strength of the attack."""
    folders = [study.folder(each.attack, each.schedule, each.rate, each.seed) for each in results]
    epsilons = read_column(folders[0], "epsilon", "strengths")
    accuracies = 100 * np.array([read_column(folder, "accuracy", "strengths") for folder in folders])
    attack, mean = results[0].attack, accuracies.mean(0)
    colour, place = ATTACK_COLOURS[attack], int(np.flatnonzero(epsilons == study.radius)[0])
    axis.fill_between(epsilons, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.plot(epsilons, mean, "o-", color=colour, linewidth=1.8, markersize=4, label=NAMES[attack])
    left = attack == "fgsm"  # its line lies below another
    offset, side = ((-6, -9), "right") if left else ((6, 4), "left")
    spot: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": side, "fontsize": 9}
    axis.annotate(f"{mean[place]:.0f} %", (study.radius, mean[place]), color=colour, **spot)


def draw_costs(axis: Axes, study: Study, chosen: Chosen) -> None:
    """Draw the processor time of training steps, with the first kind of training as the unit."""
    seconds = [statistics.mean(each.cpu_seconds for each in chosen[a, study.schedules[-1]]) for a in study.attacks]
    ratios, places = [second / seconds[0] for second in seconds], range(len(seconds))
    bars = axis.barh(places, ratios, color=[ATTACK_COLOURS[attack] for attack in study.attacks], height=0.6)
    axis.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3, fontsize=9)
    axis.set_yticks(places, [NAMES[attack].replace(", ", ",\n") for attack in study.attacks])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(ratios))
    axis.set_xlabel(f"times that of {NAMES[study.attacks[0]]}", fontsize=9)
    axis.set_title("Processor time of the training steps", fontsize=10, loc="left")


def draw_comparison(study: Study, chosen: Chosen) -> Figure:
    """Draw both accuracies over epochs, and how many epochs each schedule needed, a column for each attack."""
    from matplotlib.figure import Figure

    count = len(study.attacks)
    figure = Figure(figsize=(max(6.0, 0.8 + 3.9 * count), 7.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row", height_ratios=[1.5, 1])
    reached = reach(study, chosen)
    for (upper, lower), attack in zip(axes.T, study.attacks, strict=True):
        draw_accuracies(upper, study, chosen, attack)
        upper.set_title(NAMES[attack], fontsize=10, loc="left")
        draw_epochs(lower, study, [each for each in reached if each.attack == attack])
        lower.set_title(f"Epochs to the target, {100 * ENOUGH:g} % of {study.reference}", fontsize=10, loc="left")
    axes[0, 0].set_ylabel("validation accuracy in %", fontsize=9)
    for label, schedule in zip(axes[1, 0].get_yticklabels(), study.schedules, strict=True):
        label.set_color(COLOURS[schedule])
    seeds = f"{study.seeds} seeds" if study.seeds > 1 else "one seed"
    figure.suptitle(f"Learning-rate schedules, each from the peak rate that ends best with it: {seeds}", fontsize=11)
    return figure


def draw_accuracies(axis: Axes, study: Study, chosen: Chosen, attack: str) -> None:
    """Draw the mean of both accuracies over epochs, smoothed as the target asks, and the target."""
    lows = {}
    for key, dashes, width in ((ROBUST, "-", 1.8), (CLEAN, "--", 1.0)):
        means = {each: smooth(mean_curve(study, chosen[attack, each], key)) for each in study.schedules}
        for schedule, mean in means.items():
            epochs = np.arange(LAST, LAST + len(mean))
            axis.plot(epochs, 100 * mean, dashes, color=COLOURS[schedule], linewidth=width)
        lows[key] = 100 * min(mean[-1] for mean in means.values())
    target = 100 * ENOUGH * statistics.mean(result.validation for result in chosen[attack, study.reference])
    axis.axhline(target, color="0.5", linewidth=1, linestyle=":")
    axis.text(0.2, target + 1, "target", fontsize=7, color="0.35")  # left of the curves, which begin later
    place: dict[str, Any] = {"fontsize": 8, "color": "0.35", "va": "top", "ha": "right"}
    for key, name in ((ROBUST, "under attack"), (CLEAN, "without attack")):
        axis.text(study.epochs, lows[key] - (8 if key == judged(attack) else 3), name, **place)  # below the target
    axis.set_xlim(0, study.epochs)
    axis.set_ylim(0, 102)
    axis.set_xlabel("epoch", fontsize=9)
    tidy(axis)


def mean_curve(study: Study, results: Sequence[Result], key: str) -> np.ndarray:
    """Return the mean over seeds of a column."""
    folders = [study.folder(result.attack, result.schedule, result.rate, result.seed) for result in results]
    mean: np.ndarray = np.mean([read_column(folder, key) for folder in folders], axis=0)
    return mean


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of the last three values at each place from the third on."""
    return np.convolve(values, np.ones(LAST) / LAST, "valid")


def draw_epochs(axis: Axes, study: Study, reached: Sequence[Reached]) -> None:
    """Draw when each training reached the target: a dot for each seed, a line from first to last, a bar for the median."""
    never = 1.08 * study.epochs
    for place, schedule in enumerate(study.schedules):
        epochs = [each.epochs for each in reached if each.schedule == schedule]
        shown, colour = [min(number, never) for number in epochs], COLOURS[schedule]
        axis.plot([min(shown), max(shown)], [place, place], color=colour, linewidth=1, alpha=0.6)
        axis.plot(shown, [place] * len(shown), "o", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
        axis.vlines(statistics.median(shown), place - 0.3, place + 0.3, color=colour, linewidth=2.5)
        median = middle_and_range(epochs, "{:g}").partition(" ")[0]
        beside: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
        axis.annotate(median, (statistics.median(shown), place - 0.3), (0, 1), color=colour, **beside)
    axis.axvspan(1.03 * study.epochs, 1.13 * study.epochs, color="0.95", zorder=0)
    axis.set_yticks(range(len(study.schedules)), study.schedules)
    axis.set_ylim(len(study.schedules) - 0.5, -0.8)
    axis.set_xlim(0, 1.13 * study.epochs)
    step = max(1, study.epochs // 4)
    ticks = range(0, study.epochs + 1 - step // 2, step)
    axis.set_xticks([*ticks, never], [*map(str, ticks), "never"])
    axis.set_xlabel("epoch (dots: seeds, number: median)" if study.seeds > 1 else "epoch", fontsize=9)
    tidy(axis)


def draw_rates(study: Study, chosen: Chosen) -> Figure:
    """Draw the accuracy that the last schedule ends at and the learning rates below it, with the cuts through both."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count, last = len(study.attacks), study.schedules[-1]
    window, threshold = AccuracyGradientLR().window, 100 * AccuracyGradientLR().threshold
    figure = Figure(figsize=(max(6.0, 1.4 + 3.6 * count), 5.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row", sharex=True, height_ratios=[1, 1.2])
    for (upper, lower), attack in zip(axes.T, study.attacks, strict=True):
        first = chosen[attack, last][0]
        accuracies = 100 * read_column(study.folder(attack, last, first.rate, first.seed), judged(attack))
        means = [accuracies[max(0, end - window) : end].mean() for end in range(1, len(accuracies) + 1)]
        upper.plot(range(1, len(accuracies) + 1), accuracies, "o", color="0.6", markersize=3, label="one validation")
        upper.plot(range(1, len(accuracies) + 1), means, color=COLOURS[last], label=f"mean of {window}")
        under = "" if attack == "plain" else " under attack"
        upper.set_title(f"{NAMES[attack]}: accuracy{under}", fontsize=10, loc="left")
        for schedule in study.schedules:
            result = chosen[attack, schedule][0]
            rates = read_column(study.folder(attack, schedule, result.rate, result.seed), "lr")
            draw_rate(lower, rates, schedule)
            for cut in np.flatnonzero(np.diff(rates) < 0) + 1 if schedule == OURS else ():
                for axis in (upper, lower):
                    axis.axvline(cut, color=COLOURS[OURS], linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        lower.set_xlabel("epoch", fontsize=9)
        for axis in (upper, lower):
            tidy(axis)
    axes[0, 0].set_ylabel("validation accuracy in %", fontsize=9)
    axes[0, 0].legend(loc="lower right", framealpha=1, edgecolor="white", fontsize=8)
    axes[0, 0].set_xlim(0, 1.02 * study.epochs)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    scale_rates(axes[1, 0])
    if len(study.schedules) > 1:
        name_rates(axes[1, -1], study)
    rule = (
        f"cuts the learning rate (dashed) when the mean of {window} accuracies rises by less than {threshold:g} points"
    )
    what = f"AccuracyGradientLR {rule}" if OURS in study.schedules else "Accuracy and learning rates"
    figure.suptitle(f"{what}: seed 0", fontsize=11)
    return figure


def draw_rate(axis: Axes, rates: np.ndarray, schedule: str) -> None:
    """Draw the learning rate of each epoch."""
    width = 2.2 if schedule == OURS else 1.4
    axis.stairs(rates, np.arange(len(rates) + 1), baseline=None, color=COLOURS[schedule], linewidth=width)


def scale_rates(axis: Axes) -> None:
    """Begin the axis of learning rates at zero, or make it logarithmic where they differ by more than ten times."""
    from matplotlib.patches import StepPatch

    rates = np.concatenate([line.get_data()[0] for line in axis.patches if isinstance(line, StepPatch)])
    if rates.max() > 10 * rates.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate", fontsize=9)


def name_rates(axis: Axes, study: Study) -> None:
    """Write the name of each schedule where its rate ends."""
    from matplotlib.patches import StepPatch

    ends = [float(line.get_data()[0][-1]) for line in axis.patches if isinstance(line, StepPatch)]
    for schedule, place in zip(study.schedules, spread(np.log10(ends).tolist(), 0.16), strict=True):
        beside: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(schedule, (study.epochs, 10**place), color=COLOURS[schedule], annotation_clip=False, **beside)


def draw_digits(study: Study, chosen: Chosen, columns: int = 10) -> Figure:
    """Draw test images, and for each training what is added to them and what it answers then; write ``digits.csv``."""
    from matplotlib.figure import Figure

    images, labels, space = first_of_each_class(study, columns)
    rows, answered = 1 + 2 * len(study.attacks), []
    figure = Figure(figsize=(1.9 + 0.86 * len(labels), 0.8 + 0.98 * rows), layout="constrained")
    axes = figure.subplots(rows, len(labels), squeeze=False)
    signs = "red: darker, blue: lighter" if images.shape[1] == 1 else "grey: not at all, in each colour"
    what = (
        f"{len(labels)} test images: an attack changes each pixel, from 0 to 1, by at most {study.radius:.3g} ({signs})"
    )
    figure.suptitle(f"{what}\nBelow: the answer before → after the attack, blue right, orange wrong", fontsize=10)
    draw_row(axes[0], "test image", images, [(f"{label}", "0.2") for label in labels.tolist()], space)
    for place, attack in enumerate(study.attacks):
        module = read_module(study, chosen[attack, study.schedules[-1]][0])
        attacked, before, after = attack_images(study, module, images, labels, space)
        answers = list(zip(labels.tolist(), before, after, strict=True))
        captions = [(f"{old} → {new}", RIGHT if new == label else WRONG) for label, old, new in answers]
        answered += [(attack, *answer) for answer in answers]
        name = NAMES[attack].replace(", ", ",\n")
        right = sum(new == label for label, _, new in answers)
        draw_changes(axes[2 * place + 1], f"{name}:\nchange", attacked - images, study.radius, space)
        draw_row(axes[2 * place + 2], f"changed image:\n{right} of {len(answers)} right", attacked, captions, space)
    with (study.output / "digits.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("attack", "label", "before", "after"), *answered])
    return figure


def first_of_each_class(study: Study, columns: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the first test image of each class, whatever any network says of it."""
    data = build_data(study, 0)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    present = labels.unique()[:columns].tolist()
    first = torch.tensor([int((labels == each).nonzero()[0]) for each in present])
    return images[first], labels[first], pixels(data)


def read_module(study: Study, result: Result) -> LightningModule:
    """Return a module with the weights of a training."""
    module = build_module(study, result.schedule, result.rate)
    folder = study.folder(result.attack, result.schedule, result.rate, result.seed)
    module.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu"))
    return module.eval()


def attack_images(
    study: Study, module: LightningModule, images: Tensor, labels: Tensor, space: dict[str, Any]
) -> tuple[Tensor, list[int], list[int]]:
    """Return attacked images, and a module's answers before and after."""

    def loss(inputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(inputs), labels)

    generator = torch.Generator().manual_seed(0)
    attacked = pgd(loss, images, study.radius, TEST_STEPS, generator=generator, **space)
    with torch.no_grad():
        before, after = (module(inputs).argmax(1).tolist() for inputs in (images, attacked))
    return attacked, before, after


def draw_row(
    axes: np.ndarray, name: str, images: Tensor, captions: Sequence[tuple[str, str]], space: dict[str, Any]
) -> None:
    """Draw images, each with a caption in its colour below."""
    mean, std = (torch.tensor(space[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for axis, image, (caption, colour) in zip(axes, images, captions, strict=True):
        axis.imshow((image * std + mean).clamp(0, 1).movedim(0, -1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_xlabel(caption, fontsize=9, color=colour, labelpad=2)
    frame(axes, name)


def draw_changes(axes: np.ndarray, name: str, changes: Tensor, radius: float, space: dict[str, Any]) -> None:
    """Draw how images are changed: red adds, blue takes away; in colour images each channel for itself."""
    changes = changes * torch.tensor(space["std"]).view(-1, 1, 1) / radius
    for axis, change in zip(axes, changes.movedim(1, -1).numpy(), strict=True):
        shown = change if change.shape[-1] == 1 else np.clip(0.5 + 0.5 * change, 0, 1)
        axis.imshow(shown, cmap="RdBu_r", vmin=-1.4, vmax=1.4)
    frame(axes, name)


def frame(axes: np.ndarray, name: str) -> None:
    """Take the ticks from a row of images, and name it."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="0.8", linewidth=0.6)
    axes[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return where to write labels of these places so that they lie at least a gap apart: some are moved up.

    Example:
        >>> spread([5.0, 1.0, 1.5], 2.0)
        [5.0, 1.0, 3.0]
    """
    moved, order = list(places), sorted(range(len(places)), key=places.__getitem__)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    return moved


def tidy(axis: Axes) -> None:
    """Take away from a panel what says nothing."""
    axis.grid(color="0.93")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


# In the order in which they answer: does it help, by example, why is the rate what it is, which schedule is best.
FIGURES: dict[str, Callable[[Study, Chosen], Figure]] = {
    "robustness": draw_robustness,
    "digits": draw_digits,
    "rates": draw_rates,
    "comparison": draw_comparison,
}


# The command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Read the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+"}
    attacks = "what to train on: plain, the images as they are; fgsm; pgd"
    add("--attacks", choices=ATTACKS, default=default.attacks, metavar="ATTACK", help=attacks, **many)
    schedules = f"what to compare: {', '.join(SCHEDULES)}"
    add("--schedules", choices=SCHEDULES, default=default.schedules, metavar="SCHEDULE", help=schedules, **many)
    rates = "peak learning rates to try with each schedule; the best is reported"
    add("--rates", type=float, default=default.rates, metavar="RATE", help=rates, **many)
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains everything once")
    add("--epochs", type=int, default=default.epochs, help="epochs of each training")
    epsilon = "by how much a pixel between 0 and 1 may be changed (default: 0.15, of CIFAR-10 8/255)"
    add("--epsilon", type=float, help=epsilon)
    add(
        "--width", type=int, help="units of a hidden layer (default: 128), of CIFAR-10 channels of the first stage (64)"
    )
    add("--cifar10", type=Path, metavar="FOLDER", help="learn CIFAR-10 from the files in this folder, not the digits")
    add("--limit", type=int, help="read only so many images of CIFAR-10, for a quick try")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="log each training to W&B too")
    add("--accelerator", default=default.accelerator, help="device, as the Trainer calls it")
    add("--threads", type=int, default=default.threads, help="CPU threads; so small a network gains nothing by more")
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study that the command line describes."""
    study = parse(arguments)
    print_tables(run_study(study), study)
    figures = [f"{name}.png" for name in FIGURES if name != "comparison" or len(study.schedules) > 1]
    tables = ["results.csv", "reached.csv", "digits.csv", "a folder for each training"]
    print(f"\nWritten to {study.output}/:", *figures, *tables, sep="\n  ")


if __name__ == "__main__":
    main()
