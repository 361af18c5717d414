"""Compare ways to send gradients between two processes: dense, half precision, low rank, or largest entries.

::

    python studies/communication.py
    python studies/communication.py --seeds 5
    python studies/communication.py --gradients dense powersgd-4 dgc-99.9 --epochs 10 --ranks 4

Three linear layers with 85,000 weights learn handwritten digits with SGD and momentum. Each process (rank) has its own part of
every batch, and all ranks must agree on the mean gradient before each update. Each way to send it is one line in
:data:`STRATEGIES`; everything else here measures and draws.

Fair comparison: all have the same seeds, batches, epochs and learning rate, which was chosen for dense gradients. Bytes are
those that a rank passes to collectives during the whole training, including the denser first epochs of DGC. The bytes on the
wire also depend on the number of ranks and their connection. Here the ranks share memory, so compression saves no time;
``benchmarks/slow_link.py`` measures time, on links of a given speed.
"""

from __future__ import annotations

import csv
import json
import logging
import statistics
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import Digits, ImageClassifier

from lightning_grad.strategies import CompressedDDPStrategy, DGCStrategy, PowerSGDStrategy
from studies.common import (
    Follow,
    build_loggers,
    finish_loggers,
    hush,
    mean_and_spread,
    percent,
    print_rows,
    tidy,
    write_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IN_THE_DEMO = """\
Compressed gradients (half a minute). Two processes train one network, each on
its half of every batch, and exchange gradients in three ways, three seeds each:
all entries, an approximation, or the largest entries, with one line changed:

    Trainer(devices=2, strategy=DGCStrategy(ratio=0.001))
"""

StartMethod = Literal["fork", "spawn"]
WIDTH, BATCH = 256, 64  # units of a hidden layer; digits of one step, over all ranks
REFERENCE = "dense"


class HalfPrecisionStrategy(DDPStrategy):
    """DDP with torch's own hook that sends gradients as float16, which Lightning registers on GPUs only."""

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, fp16_compress_hook)


# The line Trainer(strategy=...) of each way to send gradients, by the start method of ranks.
STRATEGIES: dict[str, Callable[[StartMethod], DDPStrategy]] = {
    "dense": lambda start: DDPStrategy(start_method=start),
    "fp16": lambda start: HalfPrecisionStrategy(start_method=start),
    "powersgd-4": lambda start: PowerSGDStrategy(rank=4, start_method=start),
    "powersgd-2": lambda start: PowerSGDStrategy(rank=2, start_method=start),
    "powersgd-1": lambda start: PowerSGDStrategy(rank=1, start_method=start),
    "dgc-99": lambda start: DGCStrategy(ratio=0.01, start_method=start),
    "dgc-99-unmasked": lambda start: DGCStrategy(ratio=0.01, momentum_masking=False, start_method=start),
    "dgc-99.9": lambda start: DGCStrategy(ratio=0.001, start_method=start),
    "dgc-99.9-unmasked": lambda start: DGCStrategy(ratio=0.001, momentum_masking=False, start_method=start),
}
MEANINGS = {
    "dense": "every entry of the gradient, as in DDP",
    "fp16": "every entry, in half precision, by torch's own hook",
    "powersgd": "two thin matrices with this number of columns (PowerSGD)",
    "dgc-99": "the largest 1 % of the entries; the others wait until they grow (DGC)",
    "dgc-99.9": "the same with the largest 0.1 % of the entries",
    "unmasked": "without momentum masking",
}


@dataclass(frozen=True)
class Study:
    """Settings of the study; :func:`parse` describes each field."""

    gradients: Sequence[str] = tuple(STRATEGIES)
    seeds: int = 1
    epochs: int = 30
    lr: float = 0.05
    ranks: int = 2
    output: Path = Path("runs/communication")
    resume: bool = False
    wandb: str | None = None
    start_method: StartMethod | None = None

    @property
    def start(self) -> StartMethod:
        """The start method of ranks: fork, which is faster, on Linux without a GPU."""
        is_safe = sys.platform == "linux" and not torch.cuda.is_available()
        return self.start_method or ("fork" if is_safe else "spawn")

    def folder(self, gradients: str, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / f"{gradients}_seed{seed}"


@dataclass(frozen=True)
class Result:
    """The result of one training.

    Args:
        gradients: Way to send them, see :data:`STRATEGIES`.
        seed: Its seed, which also splits the digits.
        validation_accuracy: Accuracy after the last epoch.
        test_accuracy: Accuracy after the last epoch.
        step_kilobytes: Kilobytes that a rank sent in the last step.
        megabytes: Megabytes that a rank sent in the whole training.
        ratio: Bytes of all its gradients, divided by the sent bytes.
        residual: Norm of the unsent rest of rank 0 at the end.
    """

    gradients: str
    seed: int
    validation_accuracy: float
    test_accuracy: float
    step_kilobytes: float
    megabytes: float
    ratio: float
    residual: float


# Training.


def run_study(study: Study) -> list[Result]:
    """Run all trainings, and write ``results.csv`` and ``comparison.png``."""
    prepare()
    study.output.mkdir(parents=True, exist_ok=True)
    results = [result_of(study, gradients, seed) for seed in range(study.seeds) for gradients in study.gradients]
    write_results(results, study.output / "results.csv")
    draw_comparison(study, results).savefig(study.output / "comparison.png", dpi=140)
    return results


def prepare() -> None:
    """Configure a process: log levels and threads."""
    hush()
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def result_of(study: Study, gradients: str, seed: int) -> Result:
    """Return the result of one training, from an earlier run if there is one."""
    path, settings = study.folder(gradients, seed) / "result.json", [study.epochs, study.lr, study.ranks]
    if study.resume and path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == settings:
            return Result(**kept["result"])
    result = train(study, gradients, seed)
    path.write_text(json.dumps({"settings": settings, "result": asdict(result)}))
    return result


def train(study: Study, gradients: str, seed: int) -> Result:
    """Run one training on all ranks, and test on one. Ranks return measurements in files, and the weights."""
    seed_everything(seed, verbose=False)
    module, data, folder = build_module(study), Digits(BATCH // study.ranks, seed=seed), study.folder(gradients, seed)
    trainer = Trainer(
        strategy=STRATEGIES[gradients](study.start),
        devices=study.ranks,
        max_epochs=study.epochs,
        callbacks=[Recorder(folder), Follow(show_line, gradients, seed)],
        logger=build_loggers(study.output, folder.name, "communication", study.wandb),
        log_every_n_steps=10,
        **quiet(),
    )
    trainer.fit(module, data)
    return measure(gradients, seed, folder, test(module, data))


def quiet() -> dict[str, Any]:
    """Return the arguments of a Trainer on the CPU without output and checkpoints."""
    shows = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {"accelerator": "cpu", "num_sanity_val_steps": 0, **shows}


def test(module: LightningModule, data: Digits) -> float:
    """Return the accuracy on the test images, in this process."""
    return Trainer(devices=1, logger=False, **quiet()).test(module, data, verbose=False)[0]["test_acc"]


def measure(gradients: str, seed: int, folder: Path, test_accuracy: float) -> Result:
    """Return the result of a training from the files of rank 0."""
    columns = read_epochs(folder)
    accuracy, sent, megabytes, dense, residual = (float(columns[key][-1]) for key in Recorder.columns[1:])
    return Result(gradients, seed, accuracy, test_accuracy, sent / 1e3, megabytes, dense / megabytes, residual)


def build_module(study: Study) -> LightningModule:
    """Return a new module of the plain project."""
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    return ImageClassifier(nn.Sequential(nn.Flatten(), *layers), optimizer="sgd", lr=study.lr, weight_decay=5e-4)


class Recorder(Callback):
    """Write accuracy and bytes of each epoch on rank 0. A rank is a separate process, so only files remain.

    Args:
        folder: Folder for ``epochs.csv``.
    """

    columns = ("epoch", "val_acc", "step_bytes", "megabytes", "dense_megabytes", "residual_norm")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[tuple[float, ...]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        prepare()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step_bytes, all_bytes, residual = communicated(trainer, pl_module)
        dense = trainer.global_step * gradient_bytes(pl_module)
        accuracy = trainer.callback_metrics["val_acc"].item()
        self._rows.append((trainer.current_epoch + 1, accuracy, step_bytes, all_bytes / 1e6, dense / 1e6, residual))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        with (self.folder / "epochs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self._rows)
        finish_loggers(trainer)


def communicated(trainer: Trainer, module: LightningModule) -> tuple[float, float, float]:
    """Return the bytes that this rank sent in the last step and in total, and the norm of its unsent rest."""
    strategy = trainer.strategy
    if isinstance(strategy, CompressedDDPStrategy):
        return strategy.ledger.step_sent, strategy.ledger.sent_bytes, strategy.residual_norm()
    step_bytes = gradient_bytes(module) / (2 if isinstance(strategy, HalfPrecisionStrategy) else 1)
    return step_bytes, trainer.global_step * step_bytes, 0.0


def gradient_bytes(module: LightningModule) -> int:
    """Return the bytes of all gradients of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def read_epochs(folder: Path) -> dict[str, np.ndarray]:
    """Read the columns of ``epochs.csv``."""
    with (folder / "epochs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


@rank_zero_only
def show_line(name: str, seed: int, share: float, value: float) -> None:
    """Print the end of a training, and in a terminal its progress. A forked rank has no thread for progress bars."""
    line = f"{name:<22} seed {seed}   validation {percent(value)}"
    if share == 1.0:
        print(f"\r{line}      " if sys.stdout.isatty() else line, flush=True)
    elif sys.stdout.isatty():
        print(f"\r{line}  {100 * share:3.0f}%", end="", flush=True)


# Printed tables.


def print_table(results: Sequence[Result], study: Study) -> None:
    """Print a row for each way to send gradients, over its seeds, and what the columns mean."""
    print()
    header = ("gradients", "test accuracy", "kB a step", "MB in all", "smaller by", "unsent")
    print_rows(header, [summarise(gradients, results) for gradients in study.gradients])
    print(f"\nkB a step: sent by each of the {study.ranks} ranks in the last step")
    print("MB in all: over the whole training; the first four epochs of DGC are denser")
    print("smaller by: ratio of all gradients to the sent bytes, over the whole training")
    print("unsent: norm of the gradients that a rank has not sent at the end")
    for word, meaning in MEANINGS.items():
        if any(names(word, gradients) for gradients in study.gradients):
            print(f"{word}: {meaning}")
    if study.seeds > 1:
        print(f"numbers: mean ± standard deviation over {study.seeds} seeds")
    print("test accuracy: of 200 images, so one image is 0.5 %: ignore small differences")


def names(word: str, gradients: str) -> bool:
    """Return True if a word of :data:`MEANINGS` describes a way to send gradients."""
    return gradients == word or gradients.startswith(f"{word}-") or gradients.endswith(f"-{word}")


def summarise(gradients: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one way to send gradients."""
    own = of(gradients, results)
    residual = statistics.mean(result.residual for result in own)
    return (
        gradients,
        mean_and_spread([100 * result.test_accuracy for result in own]) + " %",
        f"{statistics.mean(result.step_kilobytes for result in own):,.1f}",
        f"{statistics.mean(result.megabytes for result in own):,.1f}",
        f"{statistics.mean(result.ratio for result in own):,.0f} x",
        f"{residual:.2f}" if residual else "-",
    )


def of(gradients: str, results: Sequence[Result]) -> list[Result]:
    """Return the results of one way to send gradients."""
    return [result for result in results if result.gradients == gradients]


# Figure.

PALETTE = ("0.45", "black", "#00493A", "#009E73", "#7FCDB5", "#0072B2", "#56B4E9", "#D55E00", "#E69F00")
COLOURS = dict(zip(STRATEGIES, PALETTE, strict=True))


def draw_comparison(study: Study, results: Sequence[Result]) -> Figure:
    """Draw validation accuracy by epoch and by megabytes sent, and test accuracy at the end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12.5, 2.6 + 0.3 * max(6, len(study.gradients))), layout="constrained")
    by_epoch, by_bytes, at_end = figure.subplots(1, 3)
    for gradients in study.gradients:
        draw_curves(by_epoch, by_bytes, study, gradients)
    by_epoch.set_title("Accuracy by epoch", fontsize=10, loc="left")
    by_epoch.set_xlabel("epoch", fontsize=9)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    by_epoch.set_ylabel("validation accuracy in %", fontsize=9)
    by_bytes.sharey(by_epoch)
    by_bytes.set_title("Accuracy by megabytes sent", fontsize=10, loc="left")
    by_bytes.set_xlabel("MB sent by each rank", fontsize=9)
    by_bytes.set_xscale("log")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    draw_test_accuracies(at_end, study, results)
    for axis in (by_epoch, by_bytes, at_end):
        tidy(axis)
    seeds = f"mean of {study.seeds} seeds" if study.seeds > 1 else "one seed"
    figure.suptitle(
        f"Digits learned by {study.ranks} processes that send less of their gradients: {seeds}", fontsize=11
    )
    return figure


def draw_curves(by_epoch: Axes, by_bytes: Axes, study: Study, gradients: str) -> None:
    """Draw the validation accuracy of one way to send gradients, averaged over seeds, with a mark at the end."""
    columns = [read_epochs(study.folder(gradients, seed)) for seed in range(study.seeds)]
    accuracies, sent = (np.mean([column[key] for column in columns], axis=0) for key in ("val_acc", "megabytes"))
    look: dict[str, Any] = {"color": COLOURS[gradients], "linewidth": 3.0 if gradients == REFERENCE else 1.6}
    by_epoch.plot(columns[0]["epoch"], 100 * accuracies, **look)
    by_bytes.plot(sent, 100 * accuracies, **look)
    by_bytes.plot(sent[-1:], 100 * accuracies[-1:], "o", markersize=7, markeredgecolor="white", zorder=3, **look)


def draw_test_accuracies(axis: Axes, study: Study, results: Sequence[Result]) -> None:
    """Draw the test accuracy of every seed and their mean, and the sent megabytes; gray: range of dense."""
    names = []
    for place, gradients in enumerate(study.gradients):
        own, colour = of(gradients, results), COLOURS[gradients]
        shown = [100 * result.test_accuracy for result in own]
        axis.plot([min(shown), max(shown)], [place, place], color=colour, linewidth=1, alpha=0.6)
        axis.plot(shown, [place] * len(shown), "o", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
        axis.vlines(statistics.mean(shown), place - 0.25, place + 0.25, color=colour, linewidth=2.5)
        less = "" if gradients == REFERENCE else f", {statistics.mean(result.ratio for result in own):,.0f} x less"
        names.append(f"{gradients}\n{statistics.mean(result.megabytes for result in own):,.1f} MB{less}")
        if gradients == REFERENCE and len(shown) > 1:
            axis.axvspan(min(shown), max(shown), color="0.93", zorder=0)
            style: dict[str, Any] = {"fontsize": 8, "color": "0.4", "ha": "right", "va": "bottom"}
            axis.text(min(shown) - 0.05, len(study.gradients) - 0.55, f"gray: seeds of {REFERENCE}", **style)
    axis.set_title("Final test accuracy, and megabytes sent", fontsize=10, loc="left")
    axis.set_yticks(range(len(names)), names)
    for label, gradients in zip(axis.get_yticklabels(), study.gradients, strict=True):
        label.set_color(COLOURS[gradients])
    axis.set_ylim(len(names) - 0.5, -0.5)
    lowest = min(100 * result.test_accuracy for result in results)
    axis.set_xlim(min(94.0, lowest - 1), 100.2)  # wide enough that one image looks like a small difference
    axis.set_xlabel("% of 200 test images" + " (dots: seeds, bar: mean)" * (study.seeds > 1), fontsize=9)


# Command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Parse the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    ways = f"ways to send gradients: {', '.join(STRATEGIES)} (default: all)"
    add("--gradients", nargs="+", choices=STRATEGIES, default=SUPPRESS, metavar="WAY", help=ways)
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains every way once")
    add("--epochs", type=int, default=default.epochs, help="epochs of each training; DGC needs four to become sparse")
    add("--lr", type=float, default=default.lr, help="peak learning rate")
    add("--ranks", type=int, default=default.ranks, help=f"number of processes, which share a batch of {BATCH}")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--resume", action="store_true", help="reuse results of an earlier run with the same settings")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    start = "start method of ranks (default: fork, which is faster, on Linux without a GPU, else spawn)"
    add("--start-method", choices=("fork", "spawn"), default=SUPPRESS, help=start)
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    study = parse(arguments)
    print_table(run_study(study), study)
    written = [
        "comparison.png",
        "results.csv",
        "a folder for each training, with a figure if it is compressed",
    ]
    print(f"\nWritten to {study.output}/:", *written, sep="\n  ")


if __name__ == "__main__":
    main()
