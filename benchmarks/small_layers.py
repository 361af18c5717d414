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
    StepTimer,
    in_turns,
    machine,
    quiet_trainer,
    show,
    show_missed,
    silence,
    speed_options,
    write_tables,
)
from benchmarks.rows import Row
from lightning_grad import callbacks

PLAIN, AGAIN = "plain", "plain, again"
BATCH = 16
WIDE, FEW, MANY = "400 layers of 32x32", "500 parameters", "2,000 parameters"
LAYERS = {WIDE: (400, 32), FEW: (250, 8), MANY: (1000, 8)}  # number of linear layers, and their width
STEPS = 20
# A doctor stops watching, and its first batches only count events; here it times every batch.
SETTINGS: dict[str, dict[str, Any]] = {"TrainingDoctor": {"batches": 10**9, "host_syncs": False, "figure": False}}
_OTHERS = ("GradCAMLogger", "GhostBatchNorm")  # which need images, and BatchNorm
MEASURED = [name for name in callbacks.__all__ if name not in _OTHERS]
STEP_BUDGETS = {"NMSparsity": 1.10}
# What adds less than this with few parameters is not in the table of growth, because the noise is as large.
_NOTICEABLE, _NOTICEABLE_START = 0.05, 4.0  # of a plain step; milliseconds
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
    for name in MEASURED:
        if not only or name in only:
            found[name] = partial(_one, getattr(callbacks, name), SETTINGS.get(name, {}))
    return {**found, AGAIN: list}


def _one(technique: Any, settings: Mapping[str, Any]) -> list[Callback]:
    return [technique(**{**technique.trial, **settings})]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step and of the start of a fit."""

    step: float
    start: float


def fit_times(size: tuple[int, int], only: Sequence[str], rounds: int, clock: Clock) -> dict[str, Times]:
    """Train all variants in turn."""
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
    return {name: Times(1000 * mean(times[1:]), 1000 * times[0]) for name, times in zip(used, typical, strict=True)}


def plain_times(found: Mapping[str, Times]) -> Times:
    """Return the mean of the two plain fits: the first runs a few percent faster than all later ones."""
    plain = found[PLAIN], found[AGAIN]
    return Times(mean(times.step for times in plain), mean(times.start for times in plain))


def fit_rows(found: Mapping[str, Times], budgets: Mapping[str, float]) -> list[Row]:
    """Return the lines of one network."""
    plain = plain_times(found)

    def row(name: str, times: Times) -> Row:
        columns = {"ms of start": times.start, "more than plain": times.start - plain.start}
        return Row(name, times.step, times.step / plain.step, budgets.get(name), columns=columns)

    return [row(name, times) for name, times in found.items()]


def growth_rows(few: Mapping[str, Times], many: Mapping[str, Times]) -> list[Row]:
    """Compare what each callback adds to a step and to the start with four times as many parameters.

    A ratio of 4 is linear, one of 16 quadratic. There is no budget: a test counts calls, which have no noise.
    """
    rows = []
    plain_few, plain_many = plain_times(few), plain_times(many)
    for name in few:
        if name in (PLAIN, AGAIN):
            continue
        for what, least in (("step", _NOTICEABLE * plain_few.step), ("start", _NOTICEABLE_START)):
            less, more = (getattr(t[name], what) - getattr(p, what) for t, p in ((few, plain_few), (many, plain_many)))
            if less > least:
                rows.append(Row(f"{name}, {what}", more, more / less, baseline=FEW))
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
    found: dict[str, dict[str, Times]] = {}
    for name, size in LAYERS.items():
        found[name] = fit_times(size, chosen.only, rounds, clock)
        tables[name] = fit_rows(found[name], STEP_BUDGETS if name == WIDE else {})
        show(name, tables[name])
    tables["growth"] = growth_rows(found[FEW], found[MANY])
    show(f"Added by each callback, with {MANY}", tables["growth"])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
