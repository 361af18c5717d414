"""The figures of the adversarial study."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_grad.callbacks import AccuracyGradientLR
from lightning_grad.functional import pgd
from studies.adversarial_trainings import (
    CLEAN,
    ENOUGH,
    LAST,
    OURS,
    PGD_STEPS,
    ROBUST,
    SCHEDULES,
    TEST_STEPS,
    Chosen,
    Reached,
    Result,
    Study,
    build_data,
    build_module,
    judged,
    middle_and_range,
    pixels,
    reach,
    read_column,
)
from studies.common import tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("0.35", "#E69F00", "#56B4E9", "#009E73", "#D55E00")
COLOURS = dict(zip(SCHEDULES, PALETTE, strict=True))
ATTACK_COLOURS = {"plain": "0.35", "fgsm": "#D55E00", "pgd": "#0072B2"}
RIGHT, WRONG = "#0072B2", "#D55E00"
NAMES = {"plain": "plain training", "fgsm": "trained on FGSM", "pgd": f"trained on PGD, {PGD_STEPS} steps"}


def draw_robustness(study: Study, chosen: Chosen) -> Figure:
    """Draw the test accuracy by the strength of the attack for each training, and the cost of the training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    robust, cost = figure.subplots(1, 2, width_ratios=[1.7, 1])
    for attack in study.attacks:
        draw_strengths(robust, study, chosen[attack, study.schedules[-1]])
    robust.axvline(study.radius, color="0.5", linewidth=1, linestyle=":")
    robust.annotate("epsilon of the training", (study.radius, 102), (4, 0), textcoords="offset points", fontsize=8)
    robust.set(ylim=(0, 107), xlim=(0, None))
    robust.set_ylabel("test accuracy in %", fontsize=9)
    robust.set_xlabel("epsilon: largest change of a pixel, on a scale from 0 to 1", fontsize=9)
    robust.set_title("Accuracy by the strength of the attack", fontsize=10, loc="left")
    robust.legend(loc="lower left", frameon=False, fontsize=9)
    draw_costs(cost, study, chosen)
    for axis in (robust, cost):
        tidy(axis)
    seeds = f"mean of {study.seeds} seeds, band: lowest to highest" if study.seeds > 1 else "one seed"
    figure.suptitle(f"Gain and cost of training on attacked images ({seeds})", fontsize=11)
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
    left = attack == "fgsm"  # its line is below another
    offset, side = ((-6, -9), "right") if left else ((6, 4), "left")
    spot: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": side, "fontsize": 9}
    axis.annotate(f"{mean[place]:.0f} %", (study.radius, mean[place]), color=colour, **spot)


def draw_costs(axis: Axes, study: Study, chosen: Chosen) -> None:
    """Draw the processor time of training steps, relative to the first training."""
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
    """Draw both accuracies over epochs, and the epochs to the target, a column for each attack."""
    from matplotlib.figure import Figure

    count = len(study.attacks)
    figure = Figure(figsize=(max(6.0, 0.8 + 3.9 * count), 7.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row", height_ratios=[1.5, 1])
    reached = reach(study, chosen)
    for (upper, lower), attack in zip(axes.T, study.attacks, strict=True):
        draw_accuracies(upper, study, chosen, attack)
        upper.set_title(NAMES[attack], fontsize=10, loc="left")
        draw_epochs(lower, study, [each for each in reached if each.attack == attack])
        title = f"Epochs to the target (dotted): {100 * ENOUGH:g} % of {study.reference}"
        lower.set_title(title, fontsize=10, loc="left")
    axes[0, 0].set_ylabel("validation accuracy in %", fontsize=9)
    for label, schedule in zip(axes[1, 0].get_yticklabels(), study.schedules, strict=True):
        label.set_color(COLOURS[schedule])
    seeds = f"{study.seeds} seeds" if study.seeds > 1 else "one seed"
    figure.suptitle(f"Learning-rate schedules, each with its best peak rate: {seeds}", fontsize=11)
    return figure


def draw_accuracies(axis: Axes, study: Study, chosen: Chosen, attack: str) -> None:
    """Draw the mean of both accuracies over epochs, smoothed as in the target, and the target."""
    lows = {}
    for key, dashes, width in ((ROBUST, "-", 1.8), (CLEAN, "--", 1.0)):
        means = {each: smooth(mean_curve(study, chosen[attack, each], key)) for each in study.schedules}
        for schedule, mean in means.items():
            epochs = np.arange(LAST, LAST + len(mean))
            axis.plot(epochs, 100 * mean, dashes, color=COLOURS[schedule], linewidth=width)
        lows[key] = 100 * min(mean[-1] for mean in means.values())
    target = 100 * ENOUGH * statistics.mean(result.validation for result in chosen[attack, study.reference])
    axis.axhline(target, color="0.5", linewidth=1, linestyle=":")
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
    """Return the running mean of three values, from the third value on."""
    return np.convolve(values, np.ones(LAST) / LAST, "valid")


def draw_epochs(axis: Axes, study: Study, reached: Sequence[Reached]) -> None:
    """Draw the epochs to the target: a dot for each seed, a line from first to last, a bar for the median."""
    never = 1.08 * study.epochs
    for place, schedule in enumerate(study.schedules):
        epochs = [each.epochs for each in reached if each.schedule == schedule]
        shown, colour = [min(number, never) for number in epochs], COLOURS[schedule]
        axis.plot([min(shown), max(shown)], [place, place], color=colour, linewidth=1, alpha=0.6)
        axis.plot(shown, [place] * len(shown), "o", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
        axis.vlines(statistics.median(shown), place - 0.3, place + 0.3, color=colour, linewidth=2.5)
        median = middle_and_range(epochs, "{:g}").partition(" ")[0]
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
        axis.annotate(median, (statistics.median(shown), place - 0.3), (0, 1), color=colour, **style)
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
    """Draw the accuracy with the last schedule, and the learning rates below it, with lines at the cuts."""
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
    """Start the axis of learning rates at zero, or make it logarithmic if they differ by a factor above ten."""
    from matplotlib.patches import StepPatch

    rates = np.concatenate([line.get_data()[0] for line in axis.patches if isinstance(line, StepPatch)])
    if rates.max() > 10 * rates.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate", fontsize=9)


def name_rates(axis: Axes, study: Study) -> None:
    """Write the name of each schedule at the end of its rate."""
    from matplotlib.patches import StepPatch

    ends = [float(line.get_data()[0][-1]) for line in axis.patches if isinstance(line, StepPatch)]
    for schedule, place in zip(study.schedules, spread(np.log10(ends).tolist(), 0.16), strict=True):
        style: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(schedule, (study.epochs, 10**place), color=COLOURS[schedule], annotation_clip=False, **style)


def draw_digits(study: Study, chosen: Chosen, columns: int = 10) -> Figure:
    """Draw test images, and their changes and predictions for each training; write ``digits.csv``."""
    from matplotlib.figure import Figure

    images, labels, space = first_of_each_class(study, columns)
    rows, answered = 1 + 2 * len(study.attacks), []
    figure = Figure(figsize=(1.9 + 0.86 * len(labels), 0.8 + 0.98 * rows), layout="constrained")
    axes = figure.subplots(rows, len(labels), squeeze=False)
    signs = "red: darker, blue: lighter" if images.shape[1] == 1 else "grey: not at all, in each colour"
    what = (
        f"{len(labels)} test images: an attack changes each pixel, from 0 to 1, by at most {study.radius:.3g} ({signs})"
    )
    figure.suptitle(f"{what}\nBelow: prediction before → after the attack (blue: right, orange: wrong)", fontsize=10)
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
    """Return the first test image of each class."""
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
    """Return attacked images, and the predictions of a module before and after the attack."""

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
FIGURES: dict[str, Callable[[Study, Chosen], Figure]] = {
    "robustness": draw_robustness,
    "digits": draw_digits,
    "rates": draw_rates,
    "comparison": draw_comparison,
}
