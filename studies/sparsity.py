"""Compare recipes of N:M sparsity with dense training of the same network.

::

    python studies/sparsity.py
    python studies/sparsity.py --pattern 2:4 --recipes sr-ste mdgf-exponential --seeds 3
    python studies/sparsity.py --model ResidualConvNet --data-folder path/to/cifar10 --epochs 30 --wandb

The trained project, ``plain_project``, does not use lightning-grad. One line in :func:`train` makes its weights sparse;
everything else here measures, checks and draws.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import CIFAR10, Digits, ResidualConvNet, VisionTransformer

from lightning_grad.callbacks import NMSparsity
from lightning_grad.functional import RECIPES
from lightning_grad.utilities import sparsity_report
from studies.common import (
    Follow,
    Show,
    build_loggers,
    finish_loggers,
    hush,
    mean_and_spread,
    print_rows,
    read_curve,
    run_trainings,
    tidy,
    write_results,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


IN_THE_DEMO = """\
Sparse weights (a minute). A small vision transformer learns handwritten digits:
first dense, then with one line that keeps 1 of every 8 weights of its encoder.
Each training runs with three seeds:

    Trainer(callbacks=[NMSparsity(pattern="1:8", recipe="mdgf-exponential")])
"""


@dataclass(frozen=True)
class Study:
    """Settings of the study; :func:`parse` describes each field."""

    pattern: str = "1:8"
    recipes: Sequence[Any] = ("sr-ste", "mdgf-exponential", "sdgf-stepwise")
    model: str = "VisionTransformer"
    data_folder: Path | None = None
    seeds: int = 1
    epochs: int = 16
    output: Path = Path("runs/sparsity")
    wandb: str | None = None
    accelerator: str = "auto"
    threads: int = 1
    limit_batches: int | None = None

    def folder(self, recipe: str, seed: int) -> Path:
        """Return the folder of one training."""
        return self.output / f"{recipe}_seed{seed}"


@dataclass(frozen=True)
class Result:
    """The result of one training.

    Args:
        recipe: Its recipe, or "dense".
        seed: Its seed.
        test_accuracy: Accuracy on the test images, 0 to 1.
        exact_weights: Number of the selected weights that are exactly N:M.
        chosen_weights: Number of weights that the callback selected.
        step_ms: Median time of a training step, in milliseconds.
        step_quotient: Median of the step time divided by that of a fixed computation, see :class:`StepTimer`.
        loads_strictly: Whether a plain module with the last checkpoint returns exactly the same logits.
    """

    recipe: str
    seed: int
    test_accuracy: float
    exact_weights: int
    chosen_weights: int
    step_ms: float
    step_quotient: float
    loads_strictly: bool


# Training.


def run_study(study: Study) -> list[Result]:
    """Run all trainings, and write ``results.csv`` and ``comparison.png``."""
    hush()
    torch.set_num_threads(study.threads)
    data = CIFAR10(study.data_folder) if study.data_folder else Digits()
    results = run_trainings(["dense", *study.recipes], study.seeds, partial(train, study, data))
    write_results(results, study.output / "results.csv")
    draw_comparison(study).savefig(study.output / "comparison.png", dpi=140)
    return results


def train(study: Study, data: CIFAR10 | Digits, recipe: Any, seed: int, show: Show) -> Result:
    """Run one training, then test the module, its weights and its last checkpoint."""
    seed_everything(seed, verbose=False)
    module, folder = build_module(study), study.folder(recipe, seed)
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    timer = StepTimer()
    callbacks: list[Callback] = [timer, Follow(show, recipe, seed), last]
    if recipe != "dense":
        callbacks.append(NMSparsity(study.pattern, recipe, save_masks=True))
    trainer = Trainer(
        callbacks=callbacks,
        logger=build_loggers(study.output, folder.name, f"{study.model} {study.pattern}", study.wandb),
        max_epochs=study.epochs,
        accelerator=study.accelerator,
        devices=1,
        limit_train_batches=study.limit_batches,
        limit_val_batches=study.limit_batches,
        log_every_n_steps=1 if study.limit_batches else 10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
    finish_loggers(trainer)
    exact, chosen = (0, 0) if recipe == "dense" else count_exact(module, study.pattern, folder)
    loads = loads_strictly(study, module, folder / "last.ckpt", next(iter(data.test_dataloader()))[0])
    step_ms, quotient = 1000 * statistics.median(timer.seconds), statistics.median(timer.quotients)
    return Result(recipe, seed, accuracy, exact, chosen, step_ms, quotient, loads)


def build_module(study: Study) -> LightningModule:
    """Return a new module of the plain project."""
    if study.model == "ResidualConvNet":
        return ResidualConvNet(channels=3 if study.data_folder else 1)
    if study.data_folder:
        return VisionTransformer(image_size=32, patch_size=4, channels=3, width=128, depth=4)
    return VisionTransformer()


def count_exact(module: LightningModule, pattern: str, folder: Path) -> tuple[int, int]:
    """Return the number of selected weights that are exactly N:M, and the number of all selected weights."""
    chosen = torch.load(folder / "nm_sparsity_masks.pt")
    report = sparsity_report(module, pattern, include=list(chosen), verbose=False)
    return sum(row.exact for row in report), len(chosen)


@torch.no_grad()
def loads_strictly(study: Study, module: LightningModule, checkpoint: Path, images: torch.Tensor) -> bool:
    """Load a checkpoint into a plain module, and compare its logits with those of the trained module."""
    plain = build_module(study)
    plain.load_state_dict(torch.load(checkpoint, map_location="cpu")["state_dict"], strict=True)
    return torch.equal(plain.eval()(images), module.cpu().eval()(images))


class StepTimer(Callback):
    """Time each training step. Must be the first callback, so that the time includes all other callbacks.

    In every fourth step it also times a fixed computation. A busy machine slows down both, so their quotient can be
    compared between trainings that ran one after another.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.quotients: list[float] = []
        self._start = self._work = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = now(pl_module.device)
        if batch_idx % 4 == 0:
            do_fixed_work(pl_module.device)
            end = now(pl_module.device)
            self._work, self._start = end - self._start, end

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seconds.append(now(pl_module.device) - self._start)
        self.quotients.append(self.seconds[-1] / self._work)


def now(device: torch.device) -> float:
    """Return the processor time of this thread, or on an accelerator the time after it has finished its work."""
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def do_fixed_work(device: torch.device) -> None:
    """Run a few layers forward and backward."""
    start = x = torch.ones(1024, 64, device=device, requires_grad=True)
    weight = torch.full((64, 64), 1 / 64, device=device)
    for _ in range(8):
        x = F.gelu(x @ weight)
    torch.autograd.grad(x.sum(), start)


# Printed tables.


def print_table(results: Sequence[Result], study: Study) -> None:
    """Print a row for each recipe, over its seeds, and what the columns mean."""
    pattern = study.pattern
    header = ("recipe", "test accuracy", f"exactly {pattern}", "step time", "plain strict load")
    rows = [summarise(recipe, results) for recipe in dict.fromkeys(result.recipe for result in results)]
    print_rows(header, rows)
    print(f"\nexactly {pattern}: selected weights that follow the pattern in every group")
    print("step time: relative to the dense training of the same seed, roughly")
    print("plain strict load: logits of a plain module with the checkpoint")
    spread = f"mean ± standard deviation of {study.seeds} seeds\n    " if study.seeds > 1 else ""
    images = "" if study.data_folder else "one of 200 images is 0.5 %, so small differences are chance"
    print(f"test accuracy: {spread}{images}")


def summarise(recipe: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the row of one recipe."""
    own = [result for result in results if result.recipe == recipe]
    accuracy = mean_and_spread([100 * result.test_accuracy for result in own])
    exact, chosen = (sum(counts) for counts in zip(*((r.exact_weights, r.chosen_weights) for r in own), strict=True))
    dense = {result.seed: result.step_quotient for result in results if result.recipe == "dense"}
    ratio = statistics.mean(result.step_quotient / dense[result.seed] for result in own)
    loads = "same logits" if all(result.loads_strictly for result in own) else "OTHER LOGITS"
    weights = f"{exact} of {chosen}" if chosen else "-"
    return recipe, f"{accuracy} %", weights, f"{ratio:.2f} x", loads


# Figure.

PALETTE = ("#CC79A7", "#D55E00", "#8C510A", "#56B4E9", "#0072B2", "#009E73", "#E69F00")
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": "0.35", "ha": "right"}
COLOURS = {"dense": "0.5", **dict(zip(RECIPES, PALETTE, strict=True))}


def draw_comparison(study: Study) -> Figure:
    """Draw the validation accuracy, the share of nonzero weights, and the share of mask changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    panels = [["accuracy", "density"], ["accuracy", "flips"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(panels, width_ratios=[1.25, 1], sharex=True)
    data = "CIFAR-10" if study.data_folder else "handwritten digits"
    figure.suptitle(f"Training with {study.pattern} sparsity: {study.model} on {data}", fontsize=12)
    for recipe in ("dense", *study.recipes):
        draw_curves(axes["accuracy"], study, recipe, "val_acc", label=recipe)
        if recipe != "dense":
            draw_curves(axes["density"], study, recipe, "sparsity/density", drawstyle="steps-post")
            draw_curves(axes["flips"], study, recipe, "sparsity/flips")
    style_axes(axes, study)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_curves(axis: Axes, study: Study, recipe: str, key: str, label: str = "", **style: Any) -> None:
    """Draw the mean over the seeds and, if there are several, a thin line for each."""
    curves = [read_curve(study.folder(recipe, seed) / "metrics.csv", key) for seed in range(study.seeds)]
    steps, colour = list(curves[0]), COLOURS[recipe]
    for curve in curves if study.seeds > 1 else []:
        axis.plot(list(curve), list(curve.values()), color=colour, linewidth=0.6, alpha=0.5, **style)
    means = np.mean([list(curve.values()) for curve in curves], axis=0)
    axis.plot(steps, means, color=colour, linewidth=2, label=label, **style)


def style_axes(axes: dict[str, Axes], study: Study) -> None:
    """Label the panels and their axes, and set limits that show the relevant range."""
    seeds = f", {study.seeds} seeds (thin) and their mean" if study.seeds > 1 else ", one seed"
    titles = {
        "accuracy": f"Validation accuracy{seeds}",
        "density": "Nonzero weights",
        "flips": "Mask entries that changed since the last log",
    }
    axes["flips"].set_yscale("log", nonpositive="mask")
    for name, axis in axes.items():
        axis.set_title(titles[name], fontsize=10, loc="left")
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        tidy(axis)
        if name != "density":
            axis.set_xlabel("optimizer step", fontsize=9)
    axes["flips"].yaxis.set_minor_formatter("")
    last = [float(np.asarray(line.get_ydata())[-1]) for line in axes["accuracy"].lines]
    axes["accuracy"].set_ylim(max(0.0, min(last) - 0.12), min(1.005, max(last) + 0.05))
    axes["density"].set_ylim(-0.03, 1.03)
    if not study.data_folder:
        where = axes["accuracy"].transAxes
        axes["accuracy"].text(0.98, 0.04, "one of the 197 images is 0.5 %", transform=where, **NOTE)


# Command line.


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Parse the command line."""
    default, models = Study(), ("VisionTransformer", "ResidualConvNet")
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--pattern", default=default.pattern, help="final N:M pattern of every sparse training")
    add("--recipes", nargs="+", choices=RECIPES, default=default.recipes, help="recipes to compare with dense")
    add("--model", choices=models, default=default.model, help="module of plain_project to train")
    add("--data-folder", type=Path, help="folder with CIFAR-10; without it, the digits of scikit-learn")
    add("--seeds", type=int, default=default.seeds, help="number of seeds; each trains every recipe once")
    add("--epochs", type=int, default=default.epochs, help="epochs of each training")
    add("--output", type=Path, default=default.output, help="folder of the results")
    add("--wandb", nargs="?", const="offline", choices=("offline", "online"), help="also log each training to W&B")
    add("--accelerator", default=default.accelerator, help="accelerator of the Trainer")
    add("--threads", type=int, default=default.threads, help="CPU threads; more do not speed up so small a network")
    add("--limit-batches", type=int, help="number of batches in an epoch, for a quick look")
    return Study(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    study = parse(arguments)
    results = run_study(study)
    print_table(results, study)
    print(f"\nWritten to {study.output}/: comparison.png, results.csv, and a folder for each training.")


if __name__ == "__main__":
    main()
