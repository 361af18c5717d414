"""Tables and figures of adversarial training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from lightning_grad.callbacks import AccuracyGradientLR
from lightning_grad.functional import pgd
from studies.claims.adversarial import (
    CLEAN,
    ENOUGH,
    LAST,
    OURS,
    PGD_STEPS,
    ROBUST,
    SCHEDULES,
    TEST_STEPS,
    Adversarial,
    Result,
    build_data,
    build_module,
    epochs_to,
    judged,
    pixels,
)
from studies.common import mean_and_spread, print_rows, read_table, tidy, write_results, write_table

# Comparison.

Chosen = Mapping[tuple[str, str], list[Result]]  # (attack, schedule): the results, one for each seed


def by_training(results: Sequence[Result]) -> Chosen:
    """Return the results of each attack and schedule."""
    keys = dict.fromkeys((result.attack, result.schedule) for result in results)
    return {key: [result for result in results if (result.attack, result.schedule) == key] for key in keys}


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
    rate: float | None
    seed: int
    target: float
    epochs: float


def reach(claim: Adversarial, chosen: Chosen) -> list[Reached]:
    """Return when each chosen training reached 98 % of the final accuracy of the reference with the same seed."""
    reached = []
    for (attack, schedule), results in chosen.items():
        for result, reference in zip(results, chosen[attack, claim.base_schedule], strict=True):
            target = ENOUGH * reference.validation
            epochs = epochs_to(target, result.curve)
            reached.append(Reached(attack, schedule, result.rate, result.seed, target, epochs))
    return reached


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


# Tables.


def print_table(claim: Adversarial, results: Sequence[Result]) -> None:
    """Print a row for each attack and schedule, the gain of AccuracyGradientLR, and what the columns mean."""
    chosen = by_training(results)
    reached = reach(claim, chosen)
    plain = statistics.mean(result.cpu_seconds for result in chosen[claim.attacks[0], claim.base_schedule])
    rows = [summarise(claim, own, reached, plain) for own in chosen.values()]
    print()
    print_rows(list(rows[0]), [list(row.values()) for row in rows])
    print()
    if len(claim.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in claim.rates)
        print(f"rate: the peak learning rate with the best final validation, of {rates}")
    if len(claim.schedules) > 1:
        print(f"epochs: to {100 * ENOUGH:g} % of the final accuracy under attack (for plain: without attack)")
        print(f"    of {claim.base_schedule} with the same seed; means of {LAST} validations")
    print(f"clean, robust: test accuracy in %, without and with PGD ({TEST_STEPS} steps, epsilon {claim.radius:.3g})")
    print(f"CPU: time of training steps, relative to {claim.attacks[0]} with {claim.base_schedule}")
    if claim.seeds > 1:
        median = "; of epochs: median (least-most)" if len(claim.schedules) > 1 else ""
        print(f"numbers: mean ± standard deviation over {claim.seeds} seeds{median}")
        print("    ignore differences that are smaller than these deviations")
    else:
        print("one seed: only large differences are meaningful")
    if OURS in claim.schedules and len(claim.schedules) > 1:
        print_speed_ups(claim, chosen, reached)


def summarise(claim: Adversarial, own: Sequence[Result], reached: Sequence[Reached], plain: float) -> dict[str, str]:
    """Return the row of one attack and schedule by column, without columns for a single schedule."""
    attack, schedule = own[0].attack, own[0].schedule
    epochs = [each.epochs for each in reached if (each.attack, each.schedule) == (attack, schedule)]
    compared = {"schedule": schedule, "rate": f"{own[0].rate or 0:g}", "epochs": middle_and_range(epochs, "{:g}")}
    return {
        "attack": attack,
        **(compared if len(claim.schedules) > 1 else {}),
        "clean": mean_and_spread([100 * result.clean_accuracy for result in own]),
        "robust": mean_and_spread([100 * result.robust_accuracy for result in own]),
        "CPU": f"{statistics.mean(result.cpu_seconds for result in own) / plain:.1f}",
        "cuts": f"{statistics.mean(result.cuts for result in own):.1f}" if schedule == OURS else "",
    }


def print_speed_ups(claim: Adversarial, chosen: Chosen, reached: Sequence[Reached]) -> None:
    """Print the speed-up of AccuracyGradientLR over each schedule, and its gain in accuracy."""
    rows = []
    for attack in claim.attacks:
        for schedule in (schedule for schedule in claim.schedules if schedule != OURS):
            ratios = speed_ups(reached, attack, schedule)
            pairs = zip(chosen[attack, OURS], chosen[attack, schedule], strict=True)
            gains = [100 * (own.robust_accuracy - other.robust_accuracy) for own, other in pairs]
            faster = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
            gained = mean_and_spread(gains, "+.1f")
            rows.append((attack, schedule, middle_and_range(ratios, "{:.2f}", "∞"), faster, gained))
    print("\nAccuracyGradientLR against each schedule:\n")
    print_rows(("attack", "schedule", "speed-up", "faster in", "robust accuracy gained"), rows)
    print("\nspeed-up: epochs of the schedule, divided by those of AccuracyGradientLR")


# Figures.

PALETTE = ("0.35", "#E69F00", "#56B4E9", "#009E73", "#D55E00")
COLOURS = dict(zip(SCHEDULES, PALETTE, strict=True))
ATTACK_COLOURS = {"plain": "0.35", "fgsm": "#D55E00", "pgd": "#0072B2"}
RIGHT, WRONG = "#0072B2", "#D55E00"
NAMES = {"plain": "plain training", "fgsm": "trained on FGSM", "pgd": f"trained on PGD, {PGD_STEPS} steps"}


def draw_robustness(claim: Adversarial, chosen: Chosen) -> Figure:
    """Draw the test accuracy by the strength of the attack for each training, and the cost of the training."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    robust, cost = figure.subplots(1, 2, width_ratios=[1.7, 1])
    for attack in claim.attacks:
        draw_strengths(robust, claim, chosen[attack, claim.schedules[-1]])
    robust.axvline(claim.radius, color="0.5", linewidth=1, linestyle=":")
    robust.annotate("epsilon of the training", (claim.radius, 102), (4, 0), textcoords="offset points", fontsize=8)
    robust.set(ylim=(0, 107), xlim=(0, None))
    robust.set_ylabel("test accuracy in %", fontsize=9)
    robust.set_xlabel("epsilon: largest change of a pixel, on a scale from 0 to 1", fontsize=9)
    robust.set_title("Accuracy by the strength of the attack", fontsize=10, loc="left")
    robust.legend(loc="lower left", frameon=False, fontsize=9)
    draw_costs(cost, claim, chosen)
    for axis in (robust, cost):
        tidy(axis)
    seeds = f"mean of {claim.seeds} seeds, band: lowest to highest" if claim.seeds > 1 else "one seed"
    figure.suptitle(f"Gain and cost of training on attacked images ({seeds})", fontsize=11)
    return figure


def draw_strengths(axis: Axes, claim: Adversarial, results: Sequence[Result]) -> None:
    """Draw the accuracy of one kind of training by the strength of the attack."""
    folders = [claim.folder(each) for each in results]
    tables = [read_table(folder / "strengths.csv") for folder in folders]
    epsilons, accuracies = tables[0]["epsilon"], 100 * np.array([table["accuracy"] for table in tables])
    attack, mean = results[0].attack, accuracies.mean(0)
    colour, place = ATTACK_COLOURS[attack], int(np.flatnonzero(epsilons == claim.radius)[0])
    axis.fill_between(epsilons, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.plot(epsilons, mean, "o-", color=colour, linewidth=1.8, markersize=4, label=NAMES[attack])
    left = attack == "fgsm"  # its line is below another
    offset, side = ((-6, -9), "right") if left else ((6, 4), "left")
    spot: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": side, "fontsize": 9}
    axis.annotate(f"{mean[place]:.0f} %", (claim.radius, mean[place]), color=colour, **spot)


def draw_costs(axis: Axes, claim: Adversarial, chosen: Chosen) -> None:
    """Draw the processor time of training steps, relative to the first training."""
    seconds = [statistics.mean(each.cpu_seconds for each in chosen[a, claim.schedules[-1]]) for a in claim.attacks]
    ratios, places = [second / seconds[0] for second in seconds], range(len(seconds))
    bars = axis.barh(places, ratios, color=[ATTACK_COLOURS[attack] for attack in claim.attacks], height=0.6)
    axis.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3, fontsize=9)
    axis.set_yticks(places, [NAMES[attack].replace(", ", ",\n") for attack in claim.attacks])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(ratios))
    axis.set_xlabel(f"times that of {NAMES[claim.attacks[0]]}", fontsize=9)
    axis.set_title("Processor time of the training steps", fontsize=10, loc="left")


def draw_comparison(claim: Adversarial, chosen: Chosen) -> Figure:
    """Draw both accuracies over epochs, and the epochs to the target, a column for each attack."""
    count = len(claim.attacks)
    figure = Figure(figsize=(max(6.0, 0.8 + 3.9 * count), 7.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row", height_ratios=[1.5, 1])
    reached = reach(claim, chosen)
    for (upper, lower), attack in zip(axes.T, claim.attacks, strict=True):
        draw_accuracies(upper, claim, chosen, attack)
        upper.set_title(NAMES[attack], fontsize=10, loc="left")
        draw_epochs(lower, claim, [each for each in reached if each.attack == attack])
        title = f"Epochs to the target (dotted): {100 * ENOUGH:g} % of {claim.base_schedule}"
        lower.set_title(title, fontsize=10, loc="left")
    axes[0, 0].set_ylabel("validation accuracy in %", fontsize=9)
    for label, schedule in zip(axes[1, 0].get_yticklabels(), claim.schedules, strict=True):
        label.set_color(COLOURS[schedule])
    seeds = f"{claim.seeds} seeds" if claim.seeds > 1 else "one seed"
    figure.suptitle(f"Learning-rate schedules, each with its best peak rate: {seeds}", fontsize=11)
    return figure


def draw_accuracies(axis: Axes, claim: Adversarial, chosen: Chosen, attack: str) -> None:
    """Draw the mean of both accuracies over epochs, smoothed as in the target, and the target."""
    lows = {}
    for key, dashes, width in ((ROBUST, "-", 1.8), (CLEAN, "--", 1.0)):
        means = {each: smooth(mean_curve(claim, chosen[attack, each], key)) for each in claim.schedules}
        for schedule, mean in means.items():
            epochs = np.arange(LAST, LAST + len(mean))
            axis.plot(epochs, 100 * mean, dashes, color=COLOURS[schedule], linewidth=width)
        lows[key] = 100 * min(mean[-1] for mean in means.values())
    target = 100 * ENOUGH * statistics.mean(result.validation for result in chosen[attack, claim.base_schedule])
    axis.axhline(target, color="0.5", linewidth=1, linestyle=":")
    place: dict[str, Any] = {"fontsize": 8, "color": "0.35", "va": "top", "ha": "right"}
    for key, name in ((ROBUST, "under attack"), (CLEAN, "without attack")):
        axis.text(claim.epochs, lows[key] - (8 if key == judged(attack) else 3), name, **place)  # below the target
    axis.set_xlim(0, claim.epochs)
    axis.set_ylim(0, 102)
    axis.set_xlabel("epoch", fontsize=9)
    tidy(axis)


def mean_curve(claim: Adversarial, results: Sequence[Result], key: str) -> np.ndarray:
    """Return the mean over seeds of a column."""
    mean: np.ndarray = np.mean([read_epochs(claim, result)[key] for result in results], axis=0)
    return mean


def read_epochs(claim: Adversarial, result: Result) -> dict[str, np.ndarray]:
    """Return what a training recorded in each epoch."""
    return read_table(claim.folder(result) / "epochs.csv")


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean of three values, from the third value on."""
    return np.convolve(values, np.ones(LAST) / LAST, "valid")


def draw_epochs(axis: Axes, claim: Adversarial, reached: Sequence[Reached]) -> None:
    """Draw the epochs to the target: a dot for each seed, a line from first to last, a bar for the median."""
    never = 1.08 * claim.epochs
    for place, schedule in enumerate(claim.schedules):
        epochs = [each.epochs for each in reached if each.schedule == schedule]
        shown, colour = [min(number, never) for number in epochs], COLOURS[schedule]
        axis.plot([min(shown), max(shown)], [place, place], color=colour, linewidth=1, alpha=0.6)
        axis.plot(shown, [place] * len(shown), "o", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
        axis.vlines(statistics.median(shown), place - 0.3, place + 0.3, color=colour, linewidth=2.5)
        median = middle_and_range(epochs, "{:g}").partition(" ")[0]
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
        axis.annotate(median, (statistics.median(shown), place - 0.3), (0, 1), color=colour, **style)
    axis.axvspan(1.03 * claim.epochs, 1.13 * claim.epochs, color="0.95", zorder=0)
    axis.set_yticks(range(len(claim.schedules)), claim.schedules)
    axis.set_ylim(len(claim.schedules) - 0.5, -0.8)
    axis.set_xlim(0, 1.13 * claim.epochs)
    step = max(1, claim.epochs // 4)
    ticks = range(0, claim.epochs + 1 - step // 2, step)
    axis.set_xticks([*ticks, never], [*map(str, ticks), "never"])
    axis.set_xlabel("epoch (dots: seeds, number: median)" if claim.seeds > 1 else "epoch", fontsize=9)
    tidy(axis)


def draw_rates(claim: Adversarial, chosen: Chosen) -> Figure:
    """Draw the accuracy with the last schedule, and the learning rates below it, with lines at the cuts."""
    count, last = len(claim.attacks), claim.schedules[-1]
    window, threshold = AccuracyGradientLR().window, 100 * AccuracyGradientLR().threshold
    figure = Figure(figsize=(max(6.0, 1.4 + 3.6 * count), 5.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row", sharex=True, height_ratios=[1, 1.2])
    for (upper, lower), attack in zip(axes.T, claim.attacks, strict=True):
        first = chosen[attack, last][0]
        accuracies = 100 * read_epochs(claim, first)[judged(attack)]
        means = [accuracies[max(0, end - window) : end].mean() for end in range(1, len(accuracies) + 1)]
        upper.plot(range(1, len(accuracies) + 1), accuracies, "o", color="0.6", markersize=3, label="one validation")
        upper.plot(range(1, len(accuracies) + 1), means, color=COLOURS[last], label=f"mean of {window}")
        under = "" if attack == "plain" else " under attack"
        upper.set_title(f"{NAMES[attack]}: accuracy{under}", fontsize=10, loc="left")
        for schedule in claim.schedules:
            result = chosen[attack, schedule][0]
            rates = read_epochs(claim, result)["lr"]
            draw_rate(lower, rates, schedule)
            for cut in np.flatnonzero(np.diff(rates) < 0) + 1 if schedule == OURS else ():
                for axis in (upper, lower):
                    axis.axvline(cut, color=COLOURS[OURS], linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        lower.set_xlabel("epoch", fontsize=9)
        for axis in (upper, lower):
            tidy(axis)
    axes[0, 0].set_ylabel("validation accuracy in %", fontsize=9)
    axes[0, 0].legend(loc="lower right", framealpha=1, edgecolor="white", fontsize=8)
    axes[0, 0].set_xlim(0, 1.02 * claim.epochs)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    scale_rates(axes[1, 0])
    if len(claim.schedules) > 1:
        name_rates(axes[1, -1], claim)
    rule = (
        f"cuts the learning rate (dashed) when the mean of {window} accuracies rises by less than {threshold:g} points"
    )
    what = f"AccuracyGradientLR {rule}" if OURS in claim.schedules else "Accuracy and learning rates"
    figure.suptitle(f"{what}: seed 0", fontsize=11)
    return figure


def draw_rate(axis: Axes, rates: np.ndarray, schedule: str) -> None:
    """Draw the learning rate of each epoch."""
    width = 2.2 if schedule == OURS else 1.4
    axis.stairs(rates, np.arange(len(rates) + 1), baseline=None, color=COLOURS[schedule], linewidth=width)


def scale_rates(axis: Axes) -> None:
    """Start the axis of learning rates at zero, or make it logarithmic if they differ by a factor above ten."""
    rates = np.concatenate([line.get_data()[0] for line in axis.patches if isinstance(line, StepPatch)])
    if rates.max() > 10 * rates.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate", fontsize=9)


def name_rates(axis: Axes, claim: Adversarial) -> None:
    """Write the name of each schedule at the end of its rate."""
    ends = [float(line.get_data()[0][-1]) for line in axis.patches if isinstance(line, StepPatch)]
    for schedule, place in zip(claim.schedules, spread(np.log10(ends).tolist(), 0.16), strict=True):
        style: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(schedule, (claim.epochs, 10**place), color=COLOURS[schedule], annotation_clip=False, **style)


def draw_digits(claim: Adversarial, chosen: Chosen, columns: int = 10) -> Figure:
    """Draw test images, and their changes and predictions for each training; write ``digits.csv``."""
    images, labels, space = first_of_each_class(claim, columns)
    rows, answered = 1 + 2 * len(claim.attacks), []
    figure = Figure(figsize=(1.9 + 0.86 * len(labels), 0.8 + 0.98 * rows), layout="constrained")
    axes = figure.subplots(rows, len(labels), squeeze=False)
    signs = "red: darker, blue: lighter" if images.shape[1] == 1 else "grey: not at all, in each colour"
    what = (
        f"{len(labels)} test images: an attack changes each pixel, from 0 to 1, by at most {claim.radius:.3g} ({signs})"
    )
    figure.suptitle(f"{what}\nBelow: prediction before → after the attack (blue: right, orange: wrong)", fontsize=10)
    draw_row(axes[0], "test image", images, [(f"{label}", "0.2") for label in labels.tolist()], space)
    for place, attack in enumerate(claim.attacks):
        module = read_module(claim, chosen[attack, claim.schedules[-1]][0])
        attacked, before, after = attack_images(claim, module, images, labels, space)
        answers = list(zip(labels.tolist(), before, after, strict=True))
        captions = [(f"{old} → {new}", RIGHT if new == label else WRONG) for label, old, new in answers]
        answered += [(attack, *answer) for answer in answers]
        name = NAMES[attack].replace(", ", ",\n")
        right = sum(new == label for label, _, new in answers)
        draw_changes(axes[2 * place + 1], f"{name}:\nchange", attacked - images, claim.radius, space)
        draw_row(axes[2 * place + 2], f"changed image:\n{right} of {len(answers)} right", attacked, captions, space)
    write_table(claim.output / "digits.csv", ("attack", "label", "before", "after"), answered)
    return figure


def first_of_each_class(claim: Adversarial, columns: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the first test image of each class."""
    data = build_data(claim, 0)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    present = labels.unique()[:columns].tolist()
    first = torch.tensor([int((labels == each).nonzero()[0]) for each in present])
    return images[first], labels[first], pixels(data)


def read_module(claim: Adversarial, result: Result) -> LightningModule:
    """Return a module with the weights of a training."""
    module = build_module(claim, result.schedule, result.rate)
    folder = claim.folder(result)
    module.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu"))
    return module.eval()


def attack_images(
    claim: Adversarial, module: LightningModule, images: Tensor, labels: Tensor, space: dict[str, Any]
) -> tuple[Tensor, list[int], list[int]]:
    """Return attacked images, and the predictions of a module before and after the attack."""

    def loss(inputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(inputs), labels)

    generator = torch.Generator().manual_seed(0)
    attacked = pgd(loss, images, claim.radius, TEST_STEPS, generator=generator, **space)
    with torch.no_grad():
        before, after = (module(inputs).argmax(1).tolist() for inputs in (images, attacked))
    return attacked, before, after


def draw_row(
    axes: np.ndarray, name: str, images: Tensor, captions: Sequence[tuple[str, str]], space: dict[str, Any]
) -> None:
    """Draw images, each with a colored caption below."""
    mean, std = (torch.tensor(space[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for axis, image, (caption, colour) in zip(axes, images, captions, strict=True):
        axis.imshow((image * std + mean).clamp(0, 1).movedim(0, -1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_xlabel(caption, fontsize=9, color=colour, labelpad=2)
    frame(axes, name)


def draw_changes(axes: np.ndarray, name: str, changes: Tensor, radius: float, space: dict[str, Any]) -> None:
    """Draw the changes of images: red adds, blue subtracts; in color images by channel."""
    changes = changes * torch.tensor(space["std"]).view(-1, 1, 1) / radius
    for axis, change in zip(axes, changes.movedim(1, -1).numpy(), strict=True):
        shown = change if change.shape[-1] == 1 else np.clip(0.5 + 0.5 * change, 0, 1)
        axis.imshow(shown, cmap="RdBu_r", vmin=-1.4, vmax=1.4)
    frame(axes, name)


def frame(axes: np.ndarray, name: str) -> None:
    """Remove the ticks of a row of images, and label it."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="0.8", linewidth=0.6)
    axes[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return positions of labels that are at least ``gap`` apart, by moving some up.

    Example:
        >>> spread([5.0, 1.0, 1.5], 2.0)
        [5.0, 1.0, 3.0]
    """
    moved, order = list(places), sorted(range(len(places)), key=places.__getitem__)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    return moved


# In the order of reading: the effect, examples, the cuts of the learning rate, the comparison of schedules.
FIGURES: dict[str, Callable[[Adversarial, Chosen], Figure]] = {
    "robustness": draw_robustness,
    "digits": draw_digits,
    "rates": draw_rates,
    "comparison": draw_comparison,
}


def draw(claim: Adversarial, results: Sequence[Result]) -> dict[str, Figure]:
    """Return the figures, and write ``reached.csv`` and ``digits.csv``."""
    chosen = by_training(results)
    write_results(reach(claim, chosen), claim.output / "reached.csv")
    several = len(claim.schedules) > 1
    return {name: figure(claim, chosen) for name, figure in FIGURES.items() if several or name != "comparison"}
