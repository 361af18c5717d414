"""Shared parts of the studies: progress display, loggers, tables and curves."""

from __future__ import annotations

import csv
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.functional import total_norm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes

Show = Callable[[float, str], None]  # completed share of the training, what it has reached


def hush() -> None:
    """Silence the messages of Lightning in every fit, but not the warnings of techniques."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    advice = "many workers|exists and is not empty|LeafSpec|log_every_n_steps|logging interval"
    warnings.filterwarnings("ignore", f".*({advice})")


# Progress.


class Follow(Callback):
    """Show the progress of a training and the latest value of a validation metric.

    Args:
        show: Function that shows it.
        metric: Log key of the metric.
    """

    def __init__(self, show: Show, metric: str = "val_acc") -> None:
        self.show, self.metric = show, metric
        self._shown = 0.0

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        share = min(0.99, trainer.global_step / trainer.estimated_stepping_batches)
        if share >= self._shown + 0.01:
            self._report(trainer, share)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, 1.0)

    def _report(self, trainer: Trainer, share: float) -> None:
        self._shown = share
        value = float(trainer.callback_metrics.get(self.metric, 0.0))
        if trainer.is_global_zero:
            written = percent(value) if self.metric.endswith("acc") else f"{value:6.3f}"
            self.show(share, f"validation {written}")


@dataclass(frozen=True)
class Ticker:
    """Show the progress of one training in a line, which in a terminal is overwritten until it ends.

    There is no thread and nothing that a rank cannot receive: the ranks of a training are other processes.

    Args:
        name: Name of the training.
        note: What to show at the end of the line.
    """

    name: str
    note: str

    def __call__(self, share: float, value: str) -> None:
        """Show a completed share and the latest value."""
        line = f"{self.name:<34} {value}"
        terminal = sys.stdout.isatty()
        if share == 1.0:
            print(f"\r{line}   {self.note}      " if terminal else f"{line}   {self.note}", flush=True)
        elif terminal:
            print(f"\r{line}   {self.note}  {100 * share:3.0f}%", end="", flush=True)


class GradientRecorder(Callback):
    """Record the loss of every step, its gradient norm before and after the rules, and a metric of every validation.

    Must come before the rules in the list. After the step, the gradients are still those that the optimizer used.

    Args:
        metric: Log key of the metric.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.norms_used: list[float] = []
        self.validations: list[float] = []

    @property
    def clipped(self) -> list[bool]:
        """Whether each step's gradients were changed."""
        return [norm != used for norm, used in zip(self.norms, self.norms_used, strict=True)]

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.norms.append(gradient_norm(pl_module))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.norms_used.append(gradient_norm(pl_module))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append(trainer.callback_metrics[self.metric].item())

    def write(self, path: Path) -> None:
        """Write a row for each step."""
        columns: dict[str, list[Any]] = {
            "loss": self.losses,
            "norm": self.norms,
            "norm_used": self.norms_used,
            "clipped": self.clipped,
        }
        write_columns(path, "step", columns)


def linear_network(width: int) -> nn.Sequential:
    """Return three linear layers for the digits."""
    layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def gradient_norm(module: LightningModule) -> float:
    """Return the norm of all gradients of a module, or 0 after a skipped step, which removes them."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return total_norm(gradients).item() if gradients else 0.0


def percent(share: float) -> str:
    """Format a share for the progress display.

    Example:
        >>> percent(0.975)
        ' 97.5 %'
    """
    return f"{100 * share:5.1f} %"


# Logs and results.


def build_loggers(output: Path, name: str, group: str, wandb_mode: str | None) -> list[Logger]:
    """Return the CSV logger of one training and, if ``wandb_mode`` is set, a W&B logger."""
    csv_logger = CSVLogger(output, name=name, version="")
    if not wandb_mode:
        return [csv_logger]
    import wandb

    settings = wandb.Settings(mode=wandb_mode, silent=True, console="off")
    wandb.setup(settings)
    run = {"project": "lightning-grad", "group": group, "name": name, "settings": settings}
    return [csv_logger, WandbLogger(save_dir=output, offline=wandb_mode == "offline", **run)]


def finish_loggers(trainer: Trainer) -> None:
    """Finish the W&B run of a training, so that the next training gets its own run."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def write_results(results: Sequence[DataclassInstance], path: Path) -> None:
    """Write results to a CSV file, one per row, without their lists."""
    rows = [{key: value for key, value in asdict(each).items() if not isinstance(value, list)} for each in results]
    write_table(path, list(rows[0]), [list(row.values()) for row in rows])


def write_columns(path: Path, number: str, columns: Mapping[str, Iterable[Any]], first: int = 1) -> None:
    """Write columns to a CSV file, after a column that numbers the rows."""
    rows = enumerate(zip(*columns.values(), strict=True), first)
    write_table(path, [number, *columns], [[place, *row] for place, row in rows])


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a CSV file of numbers; True is 1, and False is 0."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    truth = {"True": 1.0, "False": 0.0}
    return {
        key: np.array([truth[row[key]] if row[key] in truth else float(row[key]) for row in rows]) for key in rows[0]
    }


def read_curve(metrics: Path, key: str) -> dict[int, float]:
    """Return the values of a logged scalar by the number of completed optimizer steps."""
    with metrics.open(newline="") as file:
        return {int(row["step"]) + 1: float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def mean_and_spread(values: Sequence[float], form: str = ".1f") -> str:
    """Format a mean and, if there are several values, the standard deviation.

    Example:
        >>> mean_and_spread([1.0]), mean_and_spread([1.0, 2.0])
        ('1.0', '1.5 ± 0.7')
    """
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


# Figures.


def tidy(axis: Axes) -> None:
    """Give a panel a light grid and small labels, without a frame at the top and on the right."""
    axis.grid(color="0.93")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
