"""Accuracy of the recipes of NMSparsity: paired runs at high sparsity.

All recipes of a seed start from the same weights and see the same batches in the same order. They are compared by the mean
of paired differences, with a 95 % interval of Student's t. The dense learning rate is chosen once for each optimizer, on the
validation images of seeds that are not reported.

::

    python benchmarks/nm_convergence.py --out convergence.json            # all recipes
    python benchmarks/nm_convergence.py --out convergence.json --sweep    # phase lengths of two recipes
    python benchmarks/nm_convergence.py --out cifar.json --cifar10 FOLDER --patterns 1:16

Runs whose result is in the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from plain_project import CIFAR10, Digits, ResidualConvNet
from plain_project.schedules import Schedule, with_schedule

from benchmarks.common import machine, quiet_trainer, silence
from benchmarks.rows import markdown_table
from lightning_grad.callbacks import NMSparsity
from lightning_grad.functional import is_nm
from lightning_grad.functional.sparsity.nm_schedule import Recipe
from lightning_grad.functional.sparsity.nm_sparsity import Gradient

OptimizerName = Literal["sgd", "adamw"]
TUNING_SEED = 100  # first of the seeds that choose learning rates and defaults; they are not reported
RATES: dict[OptimizerName, tuple[float, ...]] = {"sgd": (0.01, 0.03, 0.1, 0.3), "adamw": (1e-3, 3e-3, 1e-2, 3e-2)}


@dataclass(frozen=True)
class Variant:
    """One way to train, dense without a recipe; ``None`` uses the callback's default."""

    recipe: Recipe | None = None
    gradient: Gradient | None = None
    dense_fraction: float | None = None
    finetune_fraction: float | None = None

    def __str__(self) -> str:
        parts: list[str] = [self.recipe or "dense"]
        parts += [self.gradient] if self.gradient else []
        parts += [f"dense={self.dense_fraction:g}"] if self.dense_fraction is not None else []
        parts += [f"finetune={self.finetune_fraction:g}"] if self.finetune_fraction is not None else []
        return " ".join(parts)


DENSE = Variant()
REFERENCE = Variant("sr-ste")
PROGRESSIVE: tuple[Recipe, ...] = ("mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric")
GRADIENTS: tuple[Gradient, ...] = ("masked", "ste")
RECIPES: tuple[Variant, ...] = (
    DENSE,
    Variant("ste"),
    REFERENCE,
    Variant("step"),
    *[Variant(recipe, gradient) for recipe in PROGRESSIVE for gradient in GRADIENTS],
)
SWEPT: tuple[Recipe, ...] = ("mdgf-exponential", "sdgf-stepwise")
# Dense and fine-tune fraction, mostly changed one at a time.
PHASES = ((0.1, 0.2), (0.0, 0.2), (0.2, 0.2), (0.1, 0.1), (0.1, 0.3), (0.0, 0.3))
SWEEP = tuple(
    Variant(recipe, gradient, dense, finetune)
    for recipe in SWEPT
    for gradient in GRADIENTS
    for dense, finetune in PHASES
)


class SmallNet(LightningModule):
    """A 64-128-128-10 network on flattened digits.

    Args:
        optimizer: ``"sgd"`` with momentum 0.9, or ``"adamw"``; both with the weight decay of their torch default.
        lr: Peak learning rate.
        schedule: ``"cosine"`` with warm-up, or ``"constant"``.
    """

    def __init__(self, optimizer: OptimizerName, lr: float, schedule: Schedule) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)
        self.optimizer = optimizer
        self.lr = lr
        self.schedule: Schedule = schedule

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``."""
        logits: Tensor = self.head(self.hidden(images.flatten(1)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule."""
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return with_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches, warmup=0.05)


class Task(Protocol):
    """Data and a module to train on them."""

    epochs: int
    schedule: Schedule
    include: list[str] | None

    @property
    def name(self) -> str:
        """Name of the data and of other settings that distinguish the task."""

    def module(self, optimizer: OptimizerName, lr: float) -> LightningModule:
        """Build the module."""

    def sets(self, seed: int) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Return the training, validation and test data."""

    def loader(self, train_set: Dataset[Any]) -> DataLoader[Any]:
        """Return the shuffled loader of the training data."""


@dataclass
class DigitsTask:
    """Digits, with another split for every seed. Both hidden layers are pruned and the head stays dense."""

    epochs: int
    schedule: Schedule
    include: list[str] | None = field(default_factory=lambda: ["hidden.*"])
    name: str = "digits"

    def module(self, optimizer: OptimizerName, lr: float) -> LightningModule:
        """Build the module."""
        return SmallNet(optimizer, lr, self.schedule)

    def sets(self, seed: int) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Return the 1400, 197 and 200 images of this seed's split."""
        data = Digits(seed=seed)
        data.setup("fit")
        return data.train_set, data.val_set, data.test_set

    def loader(self, train_set: Dataset[Any]) -> DataLoader[Any]:
        """Return a loader that indexes whole batches, which is faster than collating single images."""
        batches = BatchSampler(RandomSampler(train_set), 64, drop_last=False)  # type: ignore[arg-type]
        return DataLoader(train_set, sampler=batches, batch_size=None)


@dataclass
class CifarTask:
    """CIFAR-10 and the project's residual network, whose first and last layer stay dense by default."""

    folder: str
    epochs: int
    schedule: Schedule
    limit: int | None
    width: int = 16
    include: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the data and of other settings that distinguish the task."""
        return f"cifar10 limit={self.limit} width={self.width}"

    @cached_property
    def data(self) -> CIFAR10:
        """The images, read once."""
        data = CIFAR10(self.folder, limit=self.limit)
        data.setup("fit")
        data.setup("test")
        return data

    def module(self, optimizer: OptimizerName, lr: float) -> LightningModule:
        """Build the module."""
        decay = 5e-4 if optimizer == "sgd" else 0.01
        return ResidualConvNet(3, self.width, optimizer=optimizer, lr=lr, weight_decay=decay, schedule=self.schedule)

    def sets(self, seed: int) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Return the same images for every seed."""
        return self.data.train_set, self.data.val_set, self.data.test_set

    def loader(self, train_set: Dataset[Any]) -> DataLoader[Any]:
        """Return the shuffled loader."""
        return self.data.train_dataloader()


@dataclass(frozen=True)
class Run:
    """One training run."""

    variant: Variant
    optimizer: OptimizerName
    lr: float
    pattern: str
    seed: int

    def callback(self, include: list[str] | None = None) -> NMSparsity | None:
        """Build the callback, or return None for dense training."""
        variant = self.variant
        if variant.recipe is None:
            return None
        return NMSparsity(
            self.pattern,
            recipe=variant.recipe,
            gradient=variant.gradient or "ste",
            dense_fraction=variant.dense_fraction,
            finetune_fraction=variant.finetune_fraction,
            include=include,
        )

    def __str__(self) -> str:
        found, what = self.callback(), "dense"
        if found is not None:
            phases = f"dense={found.dense_fraction:g} finetune={found.finetune_fraction:g}"
            what = f"{found.pattern} {found.recipe} {found.gradient} {phases}"
        return f"{self.optimizer} lr={self.lr:g} | {what} | seed {self.seed}"


@torch.no_grad()
def accuracy(module: LightningModule, data: Dataset[Any], device: str) -> float:
    """Return the percentage of ``data`` that ``module`` classifies correctly."""
    module.to(device).eval()
    right = total = 0
    for images, labels in DataLoader(data, batch_size=500):
        right += int((module(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return 100 * right / total


def train(task: Task, run: Run, device: str) -> dict[str, float]:
    """Train once, and return accuracies in percent and the time in seconds."""
    seed_everything(run.seed, verbose=False)
    train_set, val_set, test_set = task.sets(run.seed)
    module = task.module(run.optimizer, run.lr)
    sparsity = run.callback(task.include)
    callbacks = [sparsity] if sparsity is not None else []
    trainer = quiet_trainer(device, max_epochs=task.epochs, callbacks=callbacks, log_every_n_steps=10**6)
    begin = time.perf_counter()
    trainer.fit(module, task.loader(train_set))
    seconds = time.perf_counter() - begin
    sparse = sparsity is not None and [w for w in module.parameters() if _follows(w, run.pattern)]
    if sparsity is not None and not sparse:
        raise RuntimeError(f"{run}: no weight follows the pattern.")
    return {
        "val": accuracy(module, val_set, device),
        "test": accuracy(module, test_set, device),
        "seconds": seconds,
    }


def _follows(weight: Tensor, pattern: str) -> bool:
    n, m = map(int, pattern.split(":"))
    return weight.ndim >= 2 and is_nm(weight, n, m)


class Results:
    """Results in a JSON file, which is written after every run.

    Args:
        path: The file. With ``None`` the results stay in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        self.runs: dict[str, dict[str, float]] = stored.get("runs", {})

    def add(self, key: str, result: dict[str, float]) -> None:
        """Store the result of a run."""
        self.runs[key] = result
        if self.path is not None:
            text = json.dumps({"machine": machine(), "runs": self.runs}, indent=1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(text + "\n")
            partial.replace(self.path)


@dataclass
class Study:
    """Runs of one task; skips those with a known result."""

    task: Task
    results: Results
    device: str

    def key(self, run: Run) -> str:
        """Return the key of a run in the file of results."""
        return f"{self.task.name} {self.task.epochs} epochs {self.task.schedule} | {run}"

    def run_all(self, runs: Sequence[Run]) -> None:
        """Train the missing runs, and print the progress."""
        unique = {self.key(run): run for run in runs}
        missing = [run for key, run in unique.items() if key not in self.results.runs]
        print(f"{len(missing)} of {len(unique)} runs are missing.", flush=True)
        for i, run in enumerate(missing, 1):
            result = train(self.task, run, self.device)
            self.results.add(self.key(run), result)
            print(f"{i}/{len(missing)} {run}: {result['test']:.1f} %, {result['seconds']:.1f} s", flush=True)

    def accuracies(self, runs: Sequence[Run], split: str) -> np.ndarray:
        """Return the accuracies of runs in percent."""
        return np.array([self.results.runs[self.key(run)][split] for run in runs])

    def best_rate(self, optimizer: OptimizerName, seeds: int = 2) -> float:
        """Return the learning rate with the best validation accuracy in dense training."""
        tried = {lr: [Run(DENSE, optimizer, lr, "-", TUNING_SEED + i) for i in range(seeds)] for lr in RATES[optimizer]}
        self.run_all([run for runs in tried.values() for run in runs])
        means = {lr: float(self.accuracies(runs, "val").mean()) for lr, runs in tried.items()}
        best = max(means, key=lambda lr: means[lr])
        shown = ", ".join(f"{lr:g}: {mean:.2f}" for lr, mean in means.items())
        print(f"\n{optimizer}: dense validation accuracy by learning rate {shown}; using {best:g}.\n")
        return best


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval of Student's t."""
    if len(differences) < 2:
        return float(differences.mean()), float("nan")
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean()), float(stats.t.ppf(0.975, len(differences) - 1) * error)


Column = tuple[OptimizerName, float, str]  # optimizer, learning rate, pattern


def compare(study: Study, variants: Sequence[Variant], columns: Sequence[Column], seeds: range) -> str:
    """Return a table of test accuracies and differences to SR-STE, averaged over columns within each seed."""

    def of(variant: Variant) -> np.ndarray:
        runs = [[Run(variant, *column, seed) for seed in seeds] for column in columns]
        means: np.ndarray = np.mean([study.accuracies(column, "test") for column in runs], axis=0)
        return means

    reference = of(REFERENCE)
    rows = []
    for variant in variants:
        mean, half = interval(of(variant) - reference)
        difference = "" if variant == REFERENCE else f"{mean:+.2f} ± {half:.2f}{' *' if abs(mean) > half else ''}"
        rows.append([str(variant), f"{of(variant).mean():.2f}", difference])
    return markdown_table(["recipe", "test %", "minus sr-ste"], rows)


def sweep_table(study: Study, runs: Sequence[Run], variants: Sequence[Variant]) -> str:
    """Return a table of validation accuracies, averaged over optimizers and patterns, best first."""
    columns = sorted({(run.optimizer, run.pattern) for run in runs})
    rows: list[tuple[float, list[str]]] = []
    for variant in variants:
        cells = [
            study.accuracies([r for r in runs if (r.variant, r.optimizer, r.pattern) == (variant, *column)], "val")
            for column in columns
        ]
        mean = float(np.mean(cells))
        rows.append((mean, [str(variant), *(f"{cell.mean():.2f}" for cell in cells), f"{mean:.2f}"]))
    header = ["variant", *(f"{optimizer} {pattern}" for optimizer, pattern in columns), "mean val %"]
    return markdown_table(header, [row for _, row in sorted(rows, key=lambda row: -row[0])])


def trainable(variants: Sequence[Variant], optimizer: OptimizerName) -> Iterator[Variant]:
    """Yield the variants that an optimizer can train: STEP needs a second moment to freeze."""
    return (variant for variant in variants if variant.recipe != "step" or optimizer == "adamw")


def study_recipes(study: Study, options: argparse.Namespace) -> None:
    """Run every recipe, and print a comparison for each optimizer and pattern."""
    chosen = [v for v in RECIPES if options.recipes is None or (v.recipe or "dense") in options.recipes]
    variants = [_with_phases(v, options.phases) for v in chosen if v not in (DENSE, REFERENCE)]
    seeds, columns = range(options.seeds), []
    for optimizer in options.optimizers:
        lr = options.lr or study.best_rate(optimizer)
        shown = [DENSE, REFERENCE, *trainable(variants, optimizer)]
        for pattern in options.patterns:
            columns.append((optimizer, lr, pattern))
            study.run_all([Run(v, optimizer, lr, pattern, seed) for seed in seeds for v in shown])
            print(f"\n{optimizer}, lr {lr:g}, {pattern}, {len(seeds)} seeds; * the interval excludes zero\n")
            print(compare(study, shown, columns[-1:], seeds), "\n", flush=True)
    everywhere = [v for v in variants if all(v in trainable(variants, optimizer) for optimizer in options.optimizers)]
    print(f"\nAveraged over the {len(columns)} columns within each seed\n")
    print(compare(study, [DENSE, REFERENCE, *everywhere], columns, seeds), flush=True)


def _with_phases(variant: Variant, phases: tuple[float, float] | None) -> Variant:
    if phases is None or variant.recipe not in PROGRESSIVE:
        return variant
    return replace(variant, dense_fraction=phases[0], finetune_fraction=phases[1])


def study_defaults(study: Study, options: argparse.Namespace) -> None:
    """Sweep the phase lengths of two recipes over all optimizers and patterns."""
    variants = [v for v in SWEEP if options.recipes is None or v.recipe in options.recipes]
    rates = {optimizer: options.lr or study.best_rate(optimizer) for optimizer in options.optimizers}
    runs = [
        Run(variant, optimizer, lr, pattern, TUNING_SEED + i)
        for i in range(options.seeds)
        for optimizer, lr in rates.items()
        for pattern in options.patterns
        for variant in [REFERENCE, *variants]
    ]
    study.run_all(runs)
    print(f"\nPhase lengths, {options.seeds} seeds, validation accuracy in percent\n")
    print(sweep_table(study, runs, [REFERENCE, *variants]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of results, read and continued")
    parser.add_argument("--sweep", action="store_true", help="sweep dense_fraction and finetune_fraction instead")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each variant (default 8)")
    parser.add_argument("--patterns", nargs="+", default=["1:16", "1:32"], help="N:M patterns")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--recipes", nargs="+", help="recipes to run (sr-ste and dense always run)")
    help_phases = "dense and fine-tune fraction of mdgf and sdgf, in place of the defaults"
    parser.add_argument("--phases", nargs=2, type=float, metavar=("DENSE", "FINETUNE"), help=help_phases)
    parser.add_argument("--lr", type=float, help="learning rate, in place of the search")
    parser.add_argument("--schedule", default="cosine", choices=["cosine", "constant"], help="learning rate over time")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of a run (default 30)")
    parser.add_argument("--cifar10", metavar="FOLDER", help="train a residual network on CIFAR-10 instead of digits")
    parser.add_argument("--limit", type=int, help="number of CIFAR-10 images to read")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study of the command line."""
    options = parse(arguments)
    silence()
    torch.set_num_threads(options.threads)
    task: Task = DigitsTask(options.epochs, options.schedule)
    if options.cifar10:
        task = CifarTask(options.cifar10, options.epochs, options.schedule, options.limit)
    study = Study(task, Results(options.out), options.device)
    print(machine(options.device))
    (study_defaults if options.sweep else study_recipes)(study, options)


if __name__ == "__main__":
    main()
