"""The cost of every callback in a network of many small layers: ratios to a plain step, seconds of start, and their growth.

In such a network, Python and the number of operators decide, not the arithmetic. Each callback trains at its trial setting.
All fits take turns step by step, next to a plain fit and to a plain fit "again", which shows the noise. The start of a fit is
the time from the call of ``fit`` to the first timed step, without the steps in it. The last table compares 500 with 2,000
parameters: what a callback adds to a step and to the start may grow as the number of parameters does, by a factor of 4.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/small_layers.py --quick
    python benchmarks/small_layers.py --only NMSparsity ZClip
    python benchmarks/small_layers.py --out small_layers.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    WARM_STEPS,
    Clock,
    Row,
    StepTimer,
    in_turns,
    machine,
    markdown_table,
    quiet_trainer,
    silence,
    speed_options,
    write_tables,
)
from lightning_grad import callbacks

PLAIN, AGAIN = "plain", "plain, again"
BATCH = 16
WIDE, FEW, MANY = "400 layers of 32x32", "500 parameters", "2,000 parameters"
LAYERS = {WIDE: (400, 32), FEW: (250, 8), MANY: (1000, 8)}  # number of linear layers, and their width
STEPS = 20
# A doctor stops watching, and its first batches only count events; here it times every batch.
SETTINGS: dict[str, dict[str, Any]] = {"TrainingDoctor": {"batches": 10**9, "host_syncs": False, "figure": False}}
STEP_BUDGETS = {"NMSparsity": 1.10}
GROWTH_BUDGET = 6.0  # 4 is linear, 16 quadratic
# What adds less with few parameters counts as this much, because the noise is as large.
_NOTICEABLE, _NOTICEABLE_START = 0.02, 4.0  # of a plain step; milliseconds
Fit = Callable[[Callable[[], None]], list[float]]


class SmallLayers(LightningModule):
    """A residual classifier of many small linear layers, with AdamW.

    Args:
        layers: Number of layers.
        width: Number of their inputs, of their outputs, and of the classes.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    @override
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.01 * layer(x).relu()
        return x

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class StartTimer(StepTimer):
    """Records also the start of the fit, and ends the fit after its first epoch."""

    def __init__(self, clock: Clock, pause: Callable[[], None]) -> None:
        super().__init__(clock, pause)
        self._begin = clock.now()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True

    @property
    def start(self) -> float:
        """Seconds from the construction to the first timed step, without the steps in it."""
        first = [end - start for start, end in zip(self._starts, self._ends[1:], strict=False)][:WARM_STEPS]
        return self._ends[0] - self._begin + sum(first) - WARM_STEPS * median(self.periods)


def timed_fit(size: tuple[int, int], with_callbacks: Callable[[], list[Callback]], clock: Clock, pause: Any) -> Any:
    """Train for the first of two epochs, and return the seconds of the start and of each step."""
    module, samples = SmallLayers(*size), BATCH * (WARM_STEPS + STEPS + 1)
    data = TensorDataset(torch.randn(samples, size[1]), torch.randint(size[1], (samples,)))
    timer = StartTimer(clock, pause)
    trainer = quiet_trainer(
        clock.device, max_epochs=2, log_every_n_steps=10**6, limit_val_batches=1, callbacks=[timer, *with_callbacks()]
    )
    trainer.fit(module, DataLoader(data, BATCH), DataLoader(data, BATCH))
    return [timer.start, *timer.periods]


def variants(only: Sequence[str]) -> dict[str, Callable[[], list[Callback]]]:
    """Return the plain fits, and one with each callback at its trial setting."""
    found: dict[str, Callable[[], list[Callback]]] = {PLAIN: list}
    for name in callbacks.__all__:
        if not only or name in only:
            found[name] = partial(_one, getattr(callbacks, name), SETTINGS.get(name, {}))
    return {**found, AGAIN: list}


def _one(technique: Any, settings: Mapping[str, Any]) -> list[Callback]:
    return [technique(**{**technique.trial, **settings})]


@dataclass(frozen=True)
class FitRow(Row):
    """One line of a result: the step, and the start of the fit in seconds."""

    start: float = 0.0
    start_beyond: float = 0.0

    @property
    @override
    def cells(self) -> list[str]:
        return [*super().cells, f"{self.start:.2f}", f"{self.start_beyond:+.2f}"]


def fit_rows(size: tuple[int, int], only: Sequence[str], rounds: int, clock: Clock, budgets: bool) -> list[FitRow]:
    """Train all variants in turn; the mean of the two plain ones is the baseline."""
    found: list[list[list[float]]] = []
    used = variants(only)
    for _ in range(rounds):
        seed_everything(0, verbose=False)
        gc.collect()
        gc.disable()  # it would stop whichever fit runs
        try:
            found.append(in_turns([partial(timed_fit, size, each, clock) for each in used.values()]))
        finally:
            gc.enable()
    typical = [[median(times) for times in zip(*fits, strict=True)] for fits in zip(*found, strict=True)]
    starts, steps = [times[0] for times in typical], [mean(times[1:]) for times in typical]
    # The first fit runs a few percent faster than all later ones, so alone it would be an unfair baseline.
    plain_start, plain_step = (mean((times[0], times[-1])) for times in (starts, steps))
    return [
        FitRow(
            name,
            1000 * step,
            step / plain_step,
            STEP_BUDGETS.get(name) if budgets else None,
            start=start,
            start_beyond=start - plain_start,
        )
        for name, step, start in zip(used, steps, starts, strict=True)
    ]


def growth_rows(few: Sequence[FitRow], many: Sequence[FitRow]) -> list[Row]:
    """Compare what each callback adds to a step and to the start with four times as many parameters."""
    rows = []
    for less, more in zip(few, many, strict=True):
        if less.name in (PLAIN, AGAIN):
            continue
        step = [row.milliseconds * (1 - 1 / row.ratio) for row in (less, more)]
        start = [1000 * row.start_beyond for row in (less, more)]
        measured = (("step", step, _NOTICEABLE * few[0].milliseconds), ("start", start, _NOTICEABLE_START))
        rows += [
            Row(f"{less.name}, {what}", added[1], added[1] / max(added[0], least), GROWTH_BUDGET)
            for what, added, least in measured
            if added[1] > 4 * least
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--only", nargs="+", default=[], metavar="NAME", help="callbacks to measure (default: all)")
    chosen, rest = own.parse_known_args(arguments)
    options = speed_options(__doc__, rest, quick="one round: a rough answer in a few minutes")
    silence()
    warnings.filterwarnings("ignore", ".*the run stopped at .* of its schedule.*")
    torch.set_num_threads(options.threads)
    clock, rounds = Clock(options.device), max(1, options.rounds // 2)
    print(f"{machine(options.device)}; {rounds} rounds")
    tables: dict[str, Sequence[Row]] = {}
    found: dict[str, list[FitRow]] = {}
    for name, size in LAYERS.items():
        tables[name] = found[name] = fit_rows(size, chosen.only, rounds, clock, budgets=name == WIDE)
        header = ["callback", "ms a step", "ratio to a plain step", "budget", "", "s of start", "beyond a plain start"]
        print(f"\n{name}\n\n{markdown_table(header, [row.cells for row in found[name]])}", flush=True)
    tables["growth"] = growth_rows(found[FEW], found[MANY])
    header = [f"added by, with {MANY}", "ms", f"ratio to {FEW}", "budget", ""]
    print(f"\nGrowth\n\n{markdown_table(header, [row.cells for row in tables['growth']])}", flush=True)
    over = [f"{row.name} ({table})" for table, rows in tables.items() for row in rows if row.is_over]
    print(f"\nBudgets missed: {'; '.join(over) or 'nothing'}.")
    write_tables(options, tables)


if __name__ == "__main__":
    main()
