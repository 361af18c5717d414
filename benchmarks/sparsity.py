"""The cost of NMSparsity: ratios to a dense step and to a plain sort, all interleaved in one run.

Steps run in a real ``Trainer.fit`` with all hooks and the optimizer step. The variants take turns of a few steps, over many
rounds in rotating order. The time of a step runs from the start of one batch to the start of the next. It is the median over
the rounds, and the steps of a turn are averaged. With ``mask_every_n_steps=10``, a step with new masks therefore counts as
one in ten.

With one thread the scripts measure processor time, which excludes the time that other processes get. With more threads or
on a GPU they measure wall-clock time.

::

    python benchmarks/sparsity.py --quick
    python benchmarks/sparsity.py --out speed.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    Clock,
    convnet,
    machine,
    rotated,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    transformer,
    write_tables,
)
from benchmarks.rows import AGAIN, Row
from lightning_grad.callbacks import NMSparsity
from lightning_grad.functional import is_nm, nm_mask
from lightning_grad.functional.sparsity._native_mask import VARIABLE, native_mask
from lightning_grad.functional.sparsity.nm_schedule import Recipe
from lightning_grad.functional.sparsity.nm_sparsity import Gradient

TIMED_STEPS = 10  # a multiple of mask_every_n_steps
TRANSFORMER_BUDGETS, EXACT_BUDGET, SPACED_BUDGET, MANY_BUDGET = {"2:4": 1.05, "1:16": 1.08}, 1.20, 1.08, 1.10
MASK_SHAPE = (768, 3072)
SORT = "a stable argsort"
MASK_BUDGETS = {(2, 4): 0.16, (4, 8): 0.26, (1, 8): 0.20, (1, 16): 0.20}
MASKS: dict[tuple[int, int], float | None] = {**MASK_BUDGETS, (2, 16): None, (8, 16): None, (4, 32): None}
METHODS: tuple[tuple[Recipe, Gradient], ...] = (
    ("sr-ste", "ste"),
    ("mdgf-exponential", "masked"),
    ("mdgf-exponential", "ste"),
)


@dataclass(frozen=True)
class Variant:
    """A way to train; dense without a pattern. All weights whose dimension the groups divide become sparse."""

    pattern: str | None = None
    recipe: Recipe = "sr-ste"
    gradient: Gradient = "ste"
    mask_every_n_steps: int = 1
    log_every: int = 10**6
    again: bool = False
    exact_budget: float = EXACT_BUDGET
    native: bool = False

    def __str__(self) -> str:
        name = "dense" if self.pattern is None else f"{self.pattern} {self.recipe} {self.gradient}"
        name += f", mask_every_n_steps={self.mask_every_n_steps}" if self.mask_every_n_steps > 1 else ""
        name += ", native" if self.native else ""
        name += ", every step a log step" if self.log_every == 1 else ""
        return name + (AGAIN if self.again else "")

    @property
    def budget(self) -> float | None:
        """Largest allowed ratio to the dense step."""
        if self.pattern is None or self.log_every == 1:
            return None
        return self.exact_budget if self.mask_every_n_steps == 1 else SPACED_BUDGET

    def callback(self) -> NMSparsity | None:
        """Build the callback without dense and fine-tuning phases."""
        if self.pattern is None:
            return None
        return NMSparsity(
            self.pattern,
            recipe=self.recipe,
            gradient=self.gradient,
            dense_fraction=0.0,
            finetune_fraction=0.0,
            mask_every_n_steps=self.mask_every_n_steps,
            include=["*"],
        )


@contextmanager
def kernel(is_on: bool) -> Iterator[bool]:
    """Turn the C kernel for masks on or off; yield whether it is on and works."""
    os.environ[VARIABLE] = str(int(is_on))
    try:
        yield native_mask(torch.ones(1, 4, 1), 2) is not None
    finally:
        os.environ[VARIABLE] = "0"


def fit_once(variant: Variant, module: LightningModule, batch: Any, clock: Clock) -> list[float]:
    """Train for a few steps, and return the seconds of each."""
    sparsity = variant.callback()
    callbacks = [] if sparsity is None else [sparsity]
    with kernel(variant.native):
        periods = timed_fit(module, batch, TIMED_STEPS, callbacks, clock, log_every_n_steps=variant.log_every)
    if variant.pattern is not None and not any(_follows(w, variant.pattern) for w in module.parameters()):
        raise RuntimeError(f"{variant}: no weight follows the pattern.")
    return periods


def _follows(weight: Tensor, pattern: str) -> bool:
    n, m = map(int, pattern.split(":"))
    return weight.ndim >= 2 and is_nm(weight, n, m)


def step_rows(
    build: Callable[[], tuple[LightningModule, Any]], variants: Sequence[Variant], rounds: int, clock: Clock
) -> list[Row]:
    """Train all variants in turn; the first is the baseline."""
    seed_everything(0, verbose=False)
    built = {variant: build() for variant in variants}
    blocks: dict[Variant, list[list[float]]] = {variant: [] for variant in variants}
    for i in range(rounds):
        for variant in rotated(variants, i):
            blocks[variant].append(fit_once(variant, *built[variant], clock))
    typical = {variant: mean(median(step) for step in zip(*b, strict=True)) for variant, b in blocks.items()}
    base = typical[variants[0]]
    return [Row(str(v), 1000 * time_, time_ / base, v.budget) for v, time_ in typical.items()]


def sorted_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Compute the mask by a stable sort of every group."""
    groups = weight.abs().view(-1, m)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)
    return torch.zeros_like(groups).scatter_(1, order[:, :n], 1.0).view_as(weight)


def mask_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time ``nm_mask`` and the sort for all patterns, in turn."""
    weight = torch.randn(MASK_SHAPE, device=clock.device)
    times: dict[tuple[int, int], list[list[float]]] = {pattern: [] for pattern in MASKS}
    repeated = next(iter(MASKS))
    for i in range(rounds + 1):
        for (n, m), found in times.items():
            again = [sorted_mask] if (n, m) == repeated else []
            seconds = [clock.seconds(partial(function, weight, n, m)) for function in (nm_mask, sorted_mask, *again)]
            if i:  # the first round warms up
                found.append(seconds)
    plain, again_ = (median(found[i] for found in times[repeated]) for i in (1, 2))
    noise = Row(f"{SORT}{AGAIN}", 1000 * again_, again_ / plain, baseline=SORT)
    return [*(_mask_row(weight, n, m, times[n, m]) for n, m in MASKS), noise]


def _mask_row(weight: Tensor, n: int, m: int, times: Sequence[Sequence[float]]) -> Row:
    if not torch.equal(nm_mask(weight, n, m), sorted_mask(weight, n, m)):
        raise RuntimeError(f"{n}:{m}: nm_mask and the sort disagree.")
    ours, plain = (median(found[i] for found in times) for i in (0, 1))
    return Row(f"{n}:{m}", 1000 * ours, ours / plain, MASKS[n, m], baseline=SORT)


def native_mask_rows(rounds: int, clock: Clock) -> list[Row]:
    """Return the rows that have a budget, measured with the C kernel."""
    with kernel(clock.device == "cpu") as works:
        found = mask_rows(rounds, clock) if works else []
    return [replace(row, name=f"{row.name}, native") for row in found if row.budget is not None]


def transformer_variants(device: str) -> list[Variant]:
    """Return the dense baseline, the variants with a budget, and log steps."""
    found = [
        Variant(pattern, recipe, gradient, mask_every_n_steps, exact_budget=budget)
        for mask_every_n_steps in (1, 10)
        for pattern, budget in TRANSFORMER_BUDGETS.items()
        for recipe, gradient in METHODS
    ]
    with kernel(device == "cpu") as works:
        found += [replace(v, native=True) for v in found if works and v.mask_every_n_steps == 1]
    return [Variant(), *found, Variant(again=True), Variant("2:4", "mdgf-exponential", "masked", log_every=1)]


class ManyLayers(LightningModule):
    """400 residual linear layers of width 32, with AdamW: the cost of each weight, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(400))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        x, y = batch
        for layer in self.layers:
            x = x + 0.01 * layer(x).relu()
        return F.mse_loss(x, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def many_layers() -> tuple[LightningModule, Any]:
    """Build the network of many layers and a batch for it."""
    return ManyLayers(), (torch.randn(16, 32), torch.randn(16, 32))


def many_layers_variants() -> list[Variant]:
    """Return the dense baseline, its repetition, and the methods of 2:4."""
    return [
        Variant(),
        Variant(again=True),
        *(Variant("2:4", recipe, gradient, exact_budget=MANY_BUDGET) for recipe, gradient in METHODS),
    ]


def convnet_variants() -> list[Variant]:
    """Return the dense baseline, two variants of 2:4, and the baseline again."""
    return [Variant(), Variant("2:4"), Variant("2:4", mask_every_n_steps=10), Variant(again=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in about a minute")
    silence()
    torch.set_num_threads(options.threads)
    clock, rounds = Clock(options.device), options.rounds
    print(f"{machine(options.device)}; {rounds} rounds")
    masks = [*mask_rows(3 * rounds, clock), *native_mask_rows(3 * rounds, clock)]
    show("Mask of a 768x3072 float32 weight", masks)
    steps = step_rows(transformer, transformer_variants(options.device), rounds, clock)
    show("Step of a transformer, 4 layers of width 256, 4 x 256 tokens, AdamW", steps)
    convolutions = step_rows(convnet, convnet_variants(), 2 * rounds, clock)
    show("Step of a residual convnet, width 32, 32 images of 3x32x32, AdamW", convolutions)
    layers = step_rows(many_layers, many_layers_variants(), 2 * rounds, clock)
    show("Step of 400 linear layers of 32x32, batch of 16, AdamW", layers)
    tables = {"masks": masks, "transformer": steps, "convnet": convolutions, "many layers": layers}
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
