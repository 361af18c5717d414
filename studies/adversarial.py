"""Compare training on attacked inputs with several learning-rate schedules and AccuracyGradientLR (AccelAT).

::

    python studies/adversarial.py --seeds 5
    python studies/adversarial.py --attacks fgsm --schedules one-cycle accuracy-gradient --rates 0.1 --epochs 20
    python studies/adversarial.py --cifar10 path/to/folder --epochs 30 --seeds 3

A small network learns handwritten digits without attacks (plain), with attacks of one step (FGSM) and of several (PGD). Each
training is repeated with five schedules and several peak rates. ``adversarial_trainings.py`` has the attacks, a line each in
``ATTACKS``, and the trainings; ``adversarial_figures.py`` draws them. AdversarialEvaluation repeats each validation with PGD,
which measures how robust the network is.

Fair comparison: every schedule uses the peak rate with the best final validation, so no schedule is judged by the rate that
suits another. "Best" is the accuracy under attack, or for plain training the accuracy without attack. The target accuracy is
98 % of the final accuracy at a constant rate, with the same seed. Schedules that end at a small rate reach it late because
they are stretched over the whole training: compare with fewer ``--epochs`` before you conclude that one is slow.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from studies.adversarial_figures import FIGURES
from studies.adversarial_trainings import (
    ATTACKS,
    ENOUGH,
    LAST,
    OURS,
    SCHEDULES,
    TEST_STEPS,
    Chosen,
    Reached,
    Result,
    Study,
    label,
    middle_and_range,
    reach,
    speed_ups,
    train,
    tune,
)
from studies.common import hush, mean_and_spread, print_rows, progress, write_results

IN_THE_DEMO = """\
Attacked inputs (half a minute). A small network learns handwritten digits: on
clean inputs, then on inputs that an attack (FGSM, PGD) changes in each step. The
learning rate is cut when the accuracy under attack stops rising. Three seeds:

    Trainer(callbacks=[AdversarialTraining(0.15), AdversarialEvaluation(0.15),
                       AccuracyGradientLR("adversarial/val_acc")])
"""


def run_study(study: Study) -> list[Result]:
    """Run all trainings, and write ``results.csv``, ``reached.csv`` and the figures."""
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


# Printed tables.


def print_tables(results: Sequence[Result], study: Study) -> None:
    """Print a row for each attack and schedule, the gain of AccuracyGradientLR, and what the columns mean."""
    chosen = tune(results)
    reached = reach(study, chosen)
    plain = statistics.mean(result.cpu_seconds for result in chosen[study.attacks[0], study.reference])
    rows = [summarise(study, own, reached, plain) for own in chosen.values()]
    print()
    print_rows(list(rows[0]), [list(row.values()) for row in rows])
    print()
    if len(study.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in study.rates)
        print(f"rate: the peak learning rate with the best final validation, of {rates}")
    if len(study.schedules) > 1:
        print(f"epochs: to {100 * ENOUGH:g} % of the final accuracy under attack (for plain: without attack)")
        print(f"    of {study.reference} with the same seed; means of {LAST} validations")
    print(f"clean, robust: test accuracy in %, without and with PGD ({TEST_STEPS} steps, epsilon {study.radius:.3g})")
    print(f"CPU: time of training steps, relative to {study.attacks[0]} with {study.reference}")
    if study.seeds > 1:
        median = "; of epochs: median (least-most)" if len(study.schedules) > 1 else ""
        print(f"numbers: mean ± standard deviation over {study.seeds} seeds{median}")
        print("    ignore differences that are smaller than these deviations")
    else:
        print("one seed: only large differences are meaningful")
    if OURS in study.schedules and len(study.schedules) > 1:
        print_speed_ups(study, chosen, reached)


def summarise(study: Study, own: Sequence[Result], reached: Sequence[Reached], plain: float) -> dict[str, str]:
    """Return the row of one attack and schedule by column, without columns for a single schedule."""
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
    """Print the speed-up of AccuracyGradientLR over each schedule, and its gain in accuracy."""
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
    print("\nspeed-up: epochs of the schedule, divided by those of AccuracyGradientLR")


# Command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Parse the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+"}
    attacks = "trainings to compare: plain (without attack), fgsm, pgd"
    add("--attacks", choices=ATTACKS, default=default.attacks, metavar="ATTACK", help=attacks, **many)
    schedules = f"schedules to compare: {', '.join(SCHEDULES)}"
    add("--schedules", choices=SCHEDULES, default=default.schedules, metavar="SCHEDULE", help=schedules, **many)
    rates = "peak learning rates to try with each schedule; the best is reported"
    add("--rates", type=float, default=default.rates, metavar="RATE", help=rates, **many)
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains everything once")
    add("--epochs", type=int, default=default.epochs, help="epochs of each training")
    epsilon = "largest change of a pixel between 0 and 1 (default: 0.15, for CIFAR-10 8/255)"
    add("--epsilon", type=float, help=epsilon)
    add(
        "--width",
        type=int,
        help="units of a hidden layer (default: 128), for CIFAR-10 channels of the first stage (64)",
    )
    add("--cifar10", type=Path, metavar="FOLDER", help="folder with CIFAR-10; without it, the digits")
    add("--limit", type=int, help="number of CIFAR-10 images to read, for a quick look")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    add("--accelerator", default=default.accelerator, help="accelerator of the Trainer")
    add("--threads", type=int, default=default.threads, help="CPU threads; more do not speed up so small a network")
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    study = parse(arguments)
    print_tables(run_study(study), study)
    figures = [f"{name}.png" for name in FIGURES if name != "comparison" or len(study.schedules) > 1]
    tables = ["results.csv", "reached.csv", "digits.csv", "a folder for each training"]
    print(f"\nWritten to {study.output}/:", *figures, *tables, sep="\n  ")


if __name__ == "__main__":
    main()
