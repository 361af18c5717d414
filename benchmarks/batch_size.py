"""The cost of GhostBatchNorm and AdaptiveBatchSize: batches of a fit next to those of a plain one.

A residual network trains on a batch that is divided into two and into four chunks. "By hand" are BatchNorm layers of a class
of their own. Then it accumulates four batches, and measures the noise of the gradient in every step; by default, one step in
ten is measured. All fits take turns batch by batch, and the rows "again" show the noise.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/batch_size.py --quick
    python benchmarks/batch_size.py --out batch_size.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    Clock,
    convnet,
    in_turns,
    machine,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    write_tables,
)
from benchmarks.rows import AGAIN, Row
from lightning_grad.callbacks import AdaptiveBatchSize, GhostBatchNorm

STEPS_OF, ACCUMULATED = "steps of a residual convnet", "batches of an accumulation"  # titles of tables
PLAIN, BY_HAND = "plain", "chunks by hand"
MEASURED = "AdaptiveBatchSize, every step measured"
BATCH, STEPS, ACCUMULATE = 32, 8, 4
GHOST_BUDGET, MEASURED_BUDGET = 1.03, 1.05
Make = Callable[[], tuple[LightningModule, list[Callback]]]


class ChunkedNorm(nn.BatchNorm2d):
    """Divides its batch into two chunks."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([nn.BatchNorm2d.forward(self, chunk) for chunk in input.chunk(2)])


def chunked(module: LightningModule) -> LightningModule:
    """Give all BatchNorm layers of a module the class that divides its batch."""
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = ChunkedNorm
    return module


def variants() -> dict[str, Make]:
    """Return the modules and callbacks whose steps are compared."""

    def plain(*acting: Callback) -> tuple[LightningModule, list[Callback]]:
        return convnet()[0], list(acting)

    def divided(chunks: int) -> tuple[LightningModule, list[Callback]]:
        return plain(GhostBatchNorm(BATCH // chunks))

    return {
        PLAIN: plain,
        BY_HAND: lambda: (chunked(convnet()[0]), []),
        **{_name(chunks): partial(divided, chunks) for chunks in (2, 4)},
        f"{PLAIN}{AGAIN}": plain,
        f"{BY_HAND}{AGAIN}": lambda: (chunked(convnet()[0]), []),
    }


def _name(chunks: int) -> str:
    return f"GhostBatchNorm, {chunks} chunks"


def accumulating() -> dict[str, Make]:
    """Return the modules and callbacks whose batches are compared. The size stays, so all do the same work."""
    adaptive = AdaptiveBatchSize(start=ACCUMULATE, max_accumulation=ACCUMULATE, every_n_steps=1)
    return {
        PLAIN: lambda: (convnet()[0], []),
        MEASURED: lambda: (convnet()[0], [adaptive]),
        f"{PLAIN}{AGAIN}": lambda: (convnet()[0], []),
    }


def step_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time the steps of GhostBatchNorm."""
    typical = times_of(variants(), rounds, clock)
    by_hand, two = f"{BY_HAND}{AGAIN}", _name(2)
    rows = [row_of(typical, name, PLAIN, GHOST_BUDGET if name == two else None) for name in typical if name != by_hand]
    return [*rows, row_of(typical, two, BY_HAND), row_of(typical, by_hand, BY_HAND)]


def accumulated_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time the batches of AdaptiveBatchSize."""
    typical = times_of(accumulating(), rounds, clock, accumulate_grad_batches=ACCUMULATE)
    return [row_of(typical, name, PLAIN, MEASURED_BUDGET if name == MEASURED else None) for name in typical]


def times_of(makes: Mapping[str, Make], rounds: int, clock: Clock, **arguments: Any) -> dict[str, float]:
    """Run all fits in turn, and return the mean over an accumulation of the median times of its batches."""
    fits = {name: partial(_steps, make, clock, arguments) for name, make in makes.items()}
    found: list[list[list[float]]] = [in_turns(list(fits.values())) for _ in range(rounds)]
    of_each = dict(zip(fits, zip(*found, strict=True), strict=True))
    every: int = arguments.get("accumulate_grad_batches", 1)
    return {
        name: mean(median(time for times in found for time in times[place::every]) for place in range(every))
        for name, found in of_each.items()
    }


def row_of(typical: Mapping[str, float], name: str, baseline: str, budget: float | None = None) -> Row:
    """Return the row of a variant."""
    to = "" if name == baseline else baseline
    return Row(name, 1000 * typical[name], typical[name] / typical[baseline], budget, baseline=to)


def _steps(make: Make, clock: Clock, arguments: Mapping[str, Any], pause: Callable[[], None]) -> list[float]:
    seed_everything(0, verbose=False)
    module, callbacks = make()
    return timed_fit(module, convnet()[1], STEPS, callbacks, clock, pause, **arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in half a minute")
    silence()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STEPS_OF: step_rows(options.rounds, Clock(options.device))}
    show("Steps of a residual convnet", tables[STEPS_OF])
    tables[ACCUMULATED] = accumulated_rows(options.rounds, Clock(options.device))
    show("Batches of a residual convnet that accumulates four", tables[ACCUMULATED])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
