"""The cost of the selectors of gradient compression: ratios to ``torch.topk`` of the magnitudes.

The selectors and the baseline take turns on one vector of 1e7 float32 entries, in rotating order, and the median over the
rounds counts. All of them compute the magnitudes themselves. With one thread the script measures processor time.

::

    python benchmarks/topk_selection.py --quick
    python benchmarks/topk_selection.py --out topk_selection.json
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import Clock, machine, rotated, show, show_missed, speed_options, write_tables
from benchmarks.rows import Row
from lightning_grad.functional.communication.topk_selection import (
    select_blocks,
    select_chunk,
    select_exact,
    select_sampled,
)

ENTRIES, DENSITY = 10_000_000, 1e-3
ROUNDS = 5  # of the selectors in one round of the command line
BUDGETS = {"sampled": 0.35, "blocks": 0.30}
TOPK = "torch.topk"


def magnitude_topk(values: Tensor, k: int) -> Tensor:
    """Select the largest magnitudes with torch."""
    return torch.topk(values.abs(), k).indices


SELECTORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    TOPK: magnitude_topk,
    f"{TOPK}, again": magnitude_topk,
    "exact": select_exact,
    "sampled": select_sampled,
    "blocks": select_blocks,
    "chunk": select_chunk,
}


def vectors(entries: int, device: str) -> dict[str, Tensor]:
    """Return the test vectors: gradients are between normal and heavy-tailed, and some are mostly zero."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(entries, generator=generator)
    uniform = torch.rand(entries, generator=generator)
    found = {
        "normal": normal,
        "heavy tail": normal / uniform.clamp(min=1e-6),
        "99 % zero": normal * (uniform < 0.01),
        "constant": torch.ones(entries),
    }
    return {name: values.to(device) for name, values in found.items()}


def selector_rows(values: Tensor, k: int, rounds: int, clock: Clock, is_held: bool) -> list[Row]:
    """Time all selectors in turn; ``is_held`` applies the budgets."""
    times: dict[str, list[float]] = {name: [] for name in SELECTORS}
    for i in range(rounds + 1):
        for name in rotated(list(SELECTORS), i):
            seconds = clock.seconds(partial(SELECTORS[name], values, k))
            if i:  # the first round warms up
                times[name].append(seconds)
    typical = {name: median(seconds) for name, seconds in times.items()}
    budgets = BUDGETS if is_held else {}
    return [Row(name, 1000 * t, t / typical[TOPK], budgets.get(name)) for name, t in typical.items()]


def main(arguments: Sequence[str] | None = None, entries: int = ENTRIES) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in under a minute")
    torch.set_num_threads(options.threads)
    clock, k = Clock(options.device), math.ceil(DENSITY * entries)
    print(f"{machine(options.device)}; {ROUNDS * options.rounds} rounds")
    tables: dict[str, list[Row]] = {}
    for kind, values in vectors(entries, options.device).items():
        is_held = kind != "constant" and options.device == "cpu"
        tables[kind] = selector_rows(values, k, ROUNDS * options.rounds, clock, is_held)
        show(f"The {k} largest of {entries} float32 entries, {kind}", tables[kind])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
