"""Which strategy on which link: time and traffic until a network has learned, between two machines.

Two ranks learn digits, each in a network namespace of its own; ``network.py`` makes the link between them. Seconds are
wall-clock time since the first step, without validation. Megabytes are what the interface of rank 0 has sent in this time,
with headers and acknowledgements. A training ends after the epoch that reaches 95 %.

The last table trains to the end with five seeds, over a fast link: the accuracy of rare exchanges, and their traffic. It
needs Linux and root.

::

    python benchmarks/several_machines.py --quick
    python benchmarks/several_machines.py --only dense 'DiLoCo H=30'
    python benchmarks/several_machines.py --out several_machines.json --figure communication_slow_link.png
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import Digits, ImageClassifier

from benchmarks.common import machine, quiet_trainer, show, show_missed, silence
from benchmarks.network import Link, Quality, sent_bytes, slow_link, why_unavailable
from benchmarks.rows import AGAIN, Results, Row
from benchmarks.slow_link import RANKS, STRATEGIES, build_strategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOAL, EPOCHS, SEEDS = 0.95, 40, 5
BATCH, WIDTH, RATE = 128, 768, 0.05
LIMIT_S = 300.0
LINKS = (Quality(100.0), Quality(20.0, delay_ms=20.0))
FAST = Quality(1000.0)


def _diloco(every: int, **arguments: Any) -> dict[str, Any]:
    # A run has few rounds, and the published outer momentum of 0.9 still moves the weights at its end.
    settings = {"sync_every_n_steps": every, "outer_momentum": 0.5, **arguments}
    return {"class_path": "lightning_grad.strategies.DiLoCoStrategy", "init_args": settings}


LEARNERS: dict[str, dict[str, Any]] = {
    "dense": STRATEGIES["ddp"],
    f"dense{AGAIN}": STRATEGIES["ddp"],
    "fp16": STRATEGIES["fp16"],
    "PowerSGD rank 4": STRATEGIES["powersgd"],
    "DGC 0.1 %": {"class_path": "lightning_grad.strategies.DGCStrategy", "init_args": {"ratio": 1e-3}},
    "DiLoCo H=10": _diloco(10),
    "DiLoCo H=30": _diloco(30),
    "DiLoCo H=100": _diloco(100),
    "DiLoCo H=30, momentum 0.9": _diloco(30, outer_momentum=0.9),
    "DiLoCo H=30, int8": _diloco(30, compression="int8"),
    "DiLoCo H=30, top 3 %": _diloco(30, compression="topk"),
}
DENSE, RARE = "dense", ("DiLoCo H=30", "DiLoCo H=30, momentum 0.9")
FEWER, POINTS = 20.0, 0.5  # what rare exchanges must save, and the most accuracy that they may lose
ACCURACY = f"Accuracy over {SEEDS} seeds"

Tables = dict[str, list[Row]]


def title_of(quality: Quality) -> str:
    """Return the title of the table of a link."""
    return f"Digits over {quality}"


# A rank.


@dataclass(frozen=True)
class Epoch:
    """State of a training after an epoch.

    Args:
        accuracy: Accuracy on the validation images.
        seconds: Seconds since the first step, without validation.
        megabytes: Megabytes that the interface of rank 0 has sent in this time.
    """

    accuracy: float
    seconds: float
    megabytes: float


class Follow(Callback):
    """Record accuracy, time and traffic after each epoch. Both counts pause during validation, until all ranks are done.

    Args:
        stop_at: End the training after an epoch with this accuracy; None trains to the end.
    """

    def __init__(self, stop_at: float | None) -> None:
        self.epochs: list[Epoch] = []
        self._stop_at = stop_at
        self._seconds, self._bytes = 0.0, 0
        self._since: tuple[float, int] | None = None

    def _resume(self, trainer: Trainer) -> None:
        trainer.strategy.barrier()
        self._since = time.perf_counter(), sent_bytes()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._resume(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._since is not None
        self._seconds += time.perf_counter() - self._since[0]
        self._bytes += sent_bytes() - self._since[1]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_acc"])
        self.epochs.append(Epoch(accuracy, self._seconds, self._bytes / 1e6))
        trainer.should_stop |= self._stop_at is not None and accuracy >= self._stop_at
        self._resume(trainer)


@dataclass(frozen=True)
class Learned:
    """A training.

    Args:
        epochs: Its epochs.
        accuracy: Accuracy at the end, on all images that it was not trained on.
    """

    epochs: list[Epoch]
    accuracy: float


def perceptron() -> nn.Sequential:
    """Build the network."""
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def learn(
    strategy: Mapping[str, Any],
    stop_at: float | None = GOAL,
    seed: int = 0,
    epochs: int = EPOCHS,
    rate: float = RATE,
    **arguments: Any,
) -> Learned:
    """Train as one rank.

    Args:
        strategy: Mapping of ``class_path`` and ``init_args``.
        stop_at: Accuracy at which the training ends; None trains to the end.
        seed: Seed of the network and of the order of the images.
        epochs: Largest number of epochs.
        rate: Peak learning rate.
        arguments: Arguments of the Trainer, instead of two machines.
    """
    prepare()
    seed_everything(seed, verbose=False)
    module = ImageClassifier(perceptron(), optimizer="sgd", lr=rate, weight_decay=5e-4)
    data, follow = Digits(BATCH // RANKS), Follow(stop_at)
    trainer = quiet_trainer(
        "cpu",
        strategy=build_strategy(strategy),
        max_epochs=epochs,
        callbacks=[follow],
        num_sanity_val_steps=0,
        **(arguments or {"num_nodes": RANKS}),
    )
    trainer.fit(module, data)
    return Learned(follow.epochs, _accuracy(module, data))


@torch.no_grad()
def _accuracy(module: ImageClassifier, data: Digits) -> float:
    unseen: ConcatDataset[tuple[torch.Tensor, ...]] = ConcatDataset([data.val_set, data.test_set])
    ((images, labels),) = DataLoader(unseen, len(unseen))
    return float((module.eval()(images).argmax(1) == labels).float().mean())


def prepare() -> None:
    """Configure a process: warnings, log levels, threads."""
    silence()
    torch.set_num_threads(1)


# Tables.


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Args:
        epochs: Largest number of epochs of a training.
        seeds: Seeds of the last table.
        only: Names of learners.
    """

    epochs: int
    seeds: int
    only: Sequence[str]


def over_link(quality: Quality, sizes: Sizes) -> dict[str, list[Epoch]]:
    """Train with each of the learners over a link until the goal accuracy, and return their epochs."""
    found: dict[str, list[Epoch]] = {}
    names = [name for name in sizes.only if not (quality.delay_ms and name.endswith(AGAIN))]  # it would take a minute
    with slow_link(quality) as link:
        for name in names:
            found[name] = _learn_over(link, name, epochs=sizes.epochs).epochs
            print(f"{quality}: {name}, {len(found[name])} epochs in {found[name][-1].seconds:.1f} s", flush=True)
    return found


def _learn_over(link: Link, name: str, **arguments: Any) -> Learned:
    learned: Learned = link.call(partial(learn, LEARNERS[name], **arguments), LIMIT_S)[0]
    return learned


def reached(epochs: Sequence[Epoch]) -> Epoch | None:
    """Return the first epoch that reaches the goal accuracy."""
    return next((epoch for epoch in epochs if epoch.accuracy >= GOAL), None)


def rows_of(found: Mapping[str, Sequence[Epoch]]) -> list[Row]:
    """Return time and traffic until the goal accuracy; the ratio is the time of the baseline divided by the own time."""
    goal, baseline = f"{100 * GOAL:g} %", reached(next(iter(found.values())))
    rows = []
    for name, epochs in found.items():
        first = reached(epochs)
        columns: dict[str, float | str] = {
            f"s to {goal}": first.seconds if first else "never",
            f"MB to {goal}": first.megabytes if first else "never",
            "epochs": len(epochs),
            "accuracy, %": 100 * epochs[-1].accuracy,
        }
        rows.append(Row(name, None, baseline.seconds / first.seconds if first and baseline else None, columns=columns))
    return rows


def seeds(sizes: Sizes) -> list[Row]:
    """Train to the end with several seeds, and compare accuracy and traffic of rare exchanges with dense gradients."""
    found: dict[str, list[Learned]] = {name: [] for name in (DENSE, *RARE)}
    with slow_link(FAST) as link:
        for seed in range(sizes.seeds):
            for name, runs in found.items():
                runs.append(_learn_over(link, name, stop_at=None, seed=seed, epochs=sizes.epochs))
            print(
                f"seed {seed}: " + ", ".join(f"{name} {100 * runs[-1].accuracy:.2f} %" for name, runs in found.items())
            )
    return seed_rows(found)


def seed_rows(found: Mapping[str, Sequence[Learned]]) -> list[Row]:
    """Return accuracy and traffic of trainings with the same seeds; the ratio says how many times fewer bytes were sent."""
    dense = found[DENSE]
    rows = []
    for name, runs in found.items():
        accuracies, megabytes = [100 * run.accuracy for run in runs], mean(run.epochs[-1].megabytes for run in runs)
        points = [100 * (run.accuracy - other.accuracy) for run, other in zip(runs, dense, strict=True)]
        columns: dict[str, float | str] = {
            "accuracy, %": f"{mean(accuracies):.2f} ± {stdev(accuracies) if len(runs) > 1 else 0:.2f}",
            "MB": megabytes,
            "points against dense": ""
            if name == DENSE
            else f"{mean(points):+.2f} ({min(points):+.2f} to {max(points):+.2f})",
            f"within {POINTS} points": "" if name == DENSE else "yes" if abs(mean(points)) <= POINTS else "no",
        }
        fewer = mean(run.epochs[-1].megabytes for run in dense) / megabytes
        rows.append(Row(name, None, fewer, None if name == DENSE else FEWER, at_least=name != DENSE, columns=columns))
    return rows


def measure(sizes: Sizes, figure: Path | None) -> Tables:
    """Measure all tables, and draw the trainings over the links."""
    if reason := why_unavailable():
        print(f"\nSkipped: {reason}.", flush=True)
        return {title: [] for title in (*map(title_of, LINKS), ACCURACY)}
    found: dict[Quality, Mapping[str, list[Epoch]]] = {quality: over_link(quality, sizes) for quality in LINKS}
    if figure is not None:
        draw(found).savefig(figure, dpi=140)
    return {title_of(quality): rows_of(runs) for quality, runs in found.items()} | {ACCURACY: seeds(sizes)}


# Figure.


def draw(found: Mapping[Quality, Mapping[str, Sequence[Epoch]]]) -> Figure:
    """Draw accuracy by megabytes sent, and by seconds over each link."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * (1 + len(found)), 4.6), layout="constrained")
    by_bytes, *by_time = figure.subplots(1, 1 + len(found), sharey=True)
    runs = next(iter(found.values()))
    _draw(by_bytes, runs, "megabytes", "MB that rank 0 has sent")
    by_bytes.set_ylabel("validation accuracy, %")
    for axes, (quality, each) in zip(by_time, found.items(), strict=True):
        _draw(axes, each, "seconds", f"seconds over {quality}")
    count = sum(parameter.numel() for parameter in perceptron().parameters())
    figure.suptitle(f"Digits learned by two ranks, {count / 1e6:.2f} M parameters, until {100 * GOAL:g} %", fontsize=11)
    figure.legend(*by_bytes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw(axes: Axes, runs: Mapping[str, Sequence[Epoch]], quantity: str, label: str) -> None:
    shown = {name: epochs for name, epochs in runs.items() if not name.endswith(AGAIN)}
    for place, (name, epochs) in enumerate(shown.items()):
        places, heights = [getattr(epoch, quantity) for epoch in epochs], [100 * epoch.accuracy for epoch in epochs]
        style: dict[str, Any] = {"color": f"C{place}", "marker": "osD^v<>PX*"[place % 10]}
        axes.plot(places, heights, markersize=3.5, linewidth=1.6, label=name, **style)
        if reached(epochs) is not None:
            axes.plot(places[-1], heights[-1], markersize=10, markeredgecolor="white", zorder=3, **style)
    axes.axhline(100 * GOAL, color="black", linestyle=":", linewidth=1, zorder=1)
    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="#eeeeee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


# Command line.


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few epochs and one seed: a rough answer in two minutes")
    parser.add_argument("--only", nargs="+", choices=LEARNERS, default=list(LEARNERS), help="learners (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write the tables to")
    parser.add_argument("--figure", type=Path, help="file for the figure")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so the link is removed, too
    prepare()
    print(machine(), flush=True)
    sizes = Sizes(epochs=4 if options.quick else EPOCHS, seeds=1 if options.quick else SEEDS, only=options.only)
    tables = measure(sizes, options.figure)
    for title, rows in tables.items():
        if rows:
            show(title, rows)
    show_missed(tables)
    if options.out is not None:
        Results(machine(), 1, tables).write(options.out)


if __name__ == "__main__":
    main()
