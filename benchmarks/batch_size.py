"""The cost of GhostBatchNorm: steps of a fit next to a plain step and to layers that divide their batch themselves.

A residual network trains on a batch that is divided into two and into four chunks. "By hand" are BatchNorm layers of a class
of their own. All fits take turns step by step, and the rows "again" show the noise.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/batch_size.py --quick
    python benchmarks/batch_size.py --out batch_size.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

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
from lightning_grad.callbacks import GhostBatchNorm

STEPS_OF = "steps of a residual convnet"  # title of a table
PLAIN, BY_HAND = "plain", "chunks by hand"
BATCH, STEPS = 32, 8
GHOST_BUDGET = 1.03
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


def step_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time the steps of all variants in turn."""
    fits = {name: partial(_steps, make, clock) for name, make in variants().items()}
    found: list[list[list[float]]] = [in_turns(list(fits.values())) for _ in range(rounds)]
    of_each = dict(zip(fits, zip(*found, strict=True), strict=True))
    typical = {name: median(time for times in fits_of for time in times) for name, fits_of in of_each.items()}

    def row(name: str, baseline: str, budget: float | None = None) -> Row:
        to = "" if name == baseline else baseline
        return Row(name, 1000 * typical[name], typical[name] / typical[baseline], budget, baseline=to)

    by_hand = f"{BY_HAND}{AGAIN}"
    rows = [row(name, PLAIN, GHOST_BUDGET if name == _name(2) else None) for name in typical if name != by_hand]
    return [*rows, row(_name(2), BY_HAND), row(by_hand, BY_HAND)]


def _steps(make: Make, clock: Clock, pause: Callable[[], None]) -> list[float]:
    seed_everything(0, verbose=False)
    module, callbacks = make()
    return timed_fit(module, convnet()[1], STEPS, callbacks, clock, pause)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in half a minute")
    silence()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STEPS_OF: step_rows(options.rounds, Clock(options.device))}
    show("Steps of a residual convnet", tables[STEPS_OF])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
