"""Training on two processes whose gradients are sent in full, in half precision, at low rank, or only the largest entries.

::

    python studies/communication.py
    python studies/communication.py --seeds 5
    python studies/communication.py --gradients dense powersgd-4 dgc-99.9 --epochs 10 --ranks 4

Three linear layers of 85,000 weights learn handwritten digits with SGD and momentum. Each process (rank) has its own part of
every batch, and all must agree on the mean gradient before each update. How they do is one line in :data:`STRATEGIES`; all
else here measures and draws.

What is fair to compare: all have the same seeds, batches, epochs and learning rate, which was chosen for dense gradients.
Bytes are what a rank hands over to be sent, counted over the whole training with the denser epochs in which DGC begins; what
travels depends on the number of ranks and on how they are joined. Here they are joined by memory, so that nothing is gained in
time: benchmarks/slow_link.py measures time, on links of a given speed.
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
    """DDP with torch's own hook that sends gradients as float16, which Lightning would register on GPUs only."""

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, fp16_compress_hook)


# The line Trainer(strategy=...) of each way to send gradients, for the way in which ranks are started.
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
    "dense": "every entry of the gradient, as DDP does",
    "fp16": "every entry, in half precision, by torch's own hook",
    "powersgd": "the product of two thin matrices, with so many columns (PowerSGD)",
    "dgc-99": "the largest 1 % of the entries; the others wait until they grow (DGC)",
    "dgc-99.9": "the largest 0.1 % of the entries, likewise",
    "unmasked": "without momentum masking",
}


@dataclass(frozen=True)
class Study:
    """What is trained and where the results go; :func:`parse` says what each field means."""

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
        """How ranks are started: forked, which is quick, where neither the system nor a GPU forbids it."""
        is_safe = sys.platform == "linux" and not torch.cuda.is_available()
        return self.start_method or ("fork" if is_safe else "spawn")

    def folder(self, gradients: str, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / f"{gradients}_seed{seed}"


@dataclass(frozen=True)
class Result:
    """What one training came to.

    Args:
        gradients: How they were sent, see :data:`STRATEGIES`.
        seed: Its seed, also of the split of the digits.
        validation_accuracy: After the last epoch.
        test_accuracy: After the last epoch.
        step_kilobytes: What a rank sent in the last step.
        megabytes: What a rank sent in all.
        ratio: How many times less that is than all its gradients.
        residual: Norm of what rank 0 had not sent at the end.
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
    """Train everything, and write ``results.csv`` and ``comparison.png``."""
    prepare()
    study.output.mkdir(parents=True, exist_ok=True)
    results = [result_of(study, gradients, seed) for seed in range(study.seeds) for gradients in study.gradients]
    write_results(results, study.output / "results.csv")
    draw_comparison(study, results).savefig(study.output / "comparison.png", dpi=140)
    return results


def prepare() -> None:
    """Set what holds for a process, this one or a rank."""
    hush()
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def result_of(study: Study, gradients: str, seed: int) -> Result:
    """Return the result of one training, which an earlier run may have written."""
    path, settings = study.folder(gradients, seed) / "result.json", [study.epochs, study.lr, study.ranks]
    if study.resume and path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == settings:
            return Result(**kept["result"])
    result = train(study, gradients, seed)
    path.write_text(json.dumps({"settings": settings, "result": asdict(result)}))
    return result


def train(study: Study, gradients: str, seed: int) -> Result:
    """Train once on all ranks, and test on one: what ranks measure comes back in files, and of the module its weights."""
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
    """Return the arguments of a trainer on the CPU that shows and keeps nothing."""
    shows = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {"accelerator": "cpu", "num_sanity_val_steps": 0, **shows}


def test(module: LightningModule, data: Digits) -> float:
    """Return the accuracy on the test images, in this process."""
    return Trainer(devices=1, logger=False, **quiet()).test(module, data, verbose=False)[0]["test_acc"]


def measure(gradients: str, seed: int, folder: Path, test_accuracy: float) -> Result:
    """Return the result of a training from what its rank 0 has written."""
    columns = read_epochs(folder)
    accuracy, sent, megabytes, dense, residual = (float(columns[key][-1]) for key in Recorder.columns[1:])
    return Result(gradients, seed, accuracy, test_accuracy, sent / 1e3, megabytes, dense / megabytes, residual)


def build_module(study: Study) -> LightningModule:
    """Return a new module of the plain project."""
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    return ImageClassifier(nn.Sequential(nn.Flatten(), *layers), optimizer="sgd", lr=study.lr, weight_decay=5e-4)


class Recorder(Callback):
    """Write accuracy and bytes after each epoch, from rank 0: a rank is a process of its own, and only its files last.

    Args:
        folder: Where ``epochs.csv`` is written.
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
    """Return the bytes that this rank sent in the last step and in all, and the norm of what it has not sent."""
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
    """Tell of the end of a training, and in a terminal how far it is; bars need a thread, which a forked rank has not."""
    line = f"{name:<22} seed {seed}   validation {percent(value)}"
    if share == 1.0:
        print(f"\r{line}      " if sys.stdout.isatty() else line, flush=True)
    elif sys.stdout.isatty():
        print(f"\r{line}  {100 * share:3.0f}%", end="", flush=True)


# What is printed at the end.


def print_table(results: Sequence[Result], study: Study) -> None:
    """Print a row for each way to send gradients, over its seeds, and what the columns mean."""
    print()
    header = ("gradients", "test accuracy", "kB a step", "MB in all", "smaller by", "unsent")
    print_rows(header, [summarise(gradients, results) for gradients in study.gradients])
    print(f"\nkB a step: what each of the {study.ranks} ranks sends of its gradients in the last step")
    print("MB in all: over the whole training; the first four epochs of DGC are denser")
    print("smaller by: all gradients to that, over the whole training")
    print("unsent: norm of what a rank has kept back at the end")
    for word, meaning in MEANINGS.items():
        if any(names(word, gradients) for gradients in study.gradients):
            print(f"{word}: {meaning}")
    if study.seeds > 1:
        print(f"numbers: mean ± standard deviation over {study.seeds} seeds")
    print("test accuracy: of 200 images, so one image is 0.5 %: ignore small differences")


def names(word: str, gradients: str) -> bool:
    """Say whether a word of :data:`MEANINGS` is about a way to send gradients."""
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


# The figure.

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
    by_bytes.set_title("Accuracy by what was sent until then", fontsize=10, loc="left")
    by_bytes.set_xlabel("MB that each rank has sent", fontsize=9)
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
    """Draw the validation accuracy of one way to send gradients, as a mean over the seeds, up to a mark at the end."""
    columns = [read_epochs(study.folder(gradients, seed)) for seed in range(study.seeds)]
    accuracies, sent = (np.mean([column[key] for column in columns], axis=0) for key in ("val_acc", "megabytes"))
    look: dict[str, Any] = {"color": COLOURS[gradients], "linewidth": 3.0 if gradients == REFERENCE else 1.6}
    by_epoch.plot(columns[0]["epoch"], 100 * accuracies, **look)
    by_bytes.plot(sent, 100 * accuracies, **look)
    by_bytes.plot(sent[-1:], 100 * accuracies[-1:], "o", markersize=7, markeredgecolor="white", zorder=3, **look)


def draw_test_accuracies(axis: Axes, study: Study, results: Sequence[Result]) -> None:
    """Draw the test accuracy of every seed and their mean, next to what was sent; grey: between the seeds of dense."""
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
            beside: dict[str, Any] = {"fontsize": 8, "color": "0.4", "ha": "right", "va": "bottom"}
            axis.text(min(shown) - 0.05, len(study.gradients) - 0.55, f"grey: seeds of {REFERENCE}", **beside)
    axis.set_title("Test accuracy at the end, and what was sent", fontsize=10, loc="left")
    axis.set_yticks(range(len(names)), names)
    for label, gradients in zip(axis.get_yticklabels(), study.gradients, strict=True):
        label.set_color(COLOURS[gradients])
    axis.set_ylim(len(names) - 0.5, -0.5)
    lowest = min(100 * result.test_accuracy for result in results)
    axis.set_xlim(min(94.0, lowest - 1), 100.2)  # wide enough for one image to look as little as it is
    axis.set_xlabel("% of 200 test images" + " (dots: seeds, bar: mean)" * (study.seeds > 1), fontsize=9)


# The command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Read the command line."""
    default = Study()
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    ways = f"how gradients are sent: {', '.join(STRATEGIES)} (default: all)"
    add("--gradients", nargs="+", choices=STRATEGIES, default=SUPPRESS, metavar="WAY", help=ways)
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains every way once")
    add("--epochs", type=int, default=default.epochs, help="epochs of each training; DGC takes four to get sparse")
    add("--lr", type=float, default=default.lr, help="peak learning rate")
    add("--ranks", type=int, default=default.ranks, help=f"processes, which share a batch of {BATCH}")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--resume", action="store_true", help="keep what an earlier run has finished with the same settings")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="log each training to W&B too")
    start = "how ranks are started (default: fork on Linux without a GPU, which is quicker, else spawn)"
    add("--start-method", choices=("fork", "spawn"), default=SUPPRESS, help=start)
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study that the command line describes."""
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
