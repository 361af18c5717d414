"""The cost of OptimizerSwap and layer-wise rates: bytes of state, and steps next to a module that does the same itself.

Bytes are counted after one step of a transformer that returns AdamW, and are exact. Steps of a fit with the callback, of a
module that returns the new optimizer or groups itself, and of that module "again", which shows the noise, take turns step by
step. The rows of short names need the extra ``optimizers``. Optimizers that move matrices only have tables of their own; their
steps are compared with those of AdamW.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/optimizers.py --quick
    python benchmarks/optimizers.py --out optimizers.json
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch.optim import Optimizer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    Clock,
    SmallTransformer,
    in_turns,
    machine,
    quiet_trainer,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    write_tables,
)
from benchmarks.rows import AGAIN, Row
from lightning_grad.callbacks import LayerwiseLearningRateDecay, OptimizerSwap
from lightning_grad.utilities import optimizer_report

STATE, STEPS_OF = "state", "steps of a transformer"  # titles of the tables
OF_MATRICES, MATRIX_STEPS = "state with matrices", "steps with matrices"
STATE_BUDGETS: dict[str, float | None] = {"lion": 0.50, "adafactor": 0.01, "adabelief": 1.0, "came": None}
STEP_BUDGET = 1.02
RANK = {"rank": 32}  # of matrices with a smaller side of 256
MATRICES: dict[str, tuple[dict[str, Any], float]] = {  # options, and budget of the state
    "muon": ({}, 0.58),
    "galore-adamw": (RANK, 0.28),
    "q-galore": (RANK, 0.26),
    "frugal": ({"density": 0.25}, 0.37),
    "dct-adamw": (RANK, 0.26),
}
STEPPED = ("lion", "adabelief", "adafactor")
STEPS = 12
RATE, DECAY = 1e-4, 0.75


def batch_of() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch for the transformer."""
    return torch.randn(4, 256, 256), torch.randn(4, 256, 256)


def state_bytes(callbacks: list[Callback], device: str) -> int:
    """Train for one step, and return the bytes of the optimizer's state."""
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(device, max_steps=1, callbacks=callbacks)
    trainer.fit(SmallTransformer(), DataLoader(cast(Any, [batch_of()]), batch_size=None))
    return optimizer_report(trainer).state_bytes


def state_rows(device: str) -> list[Row]:
    """Compare the bytes of all states with those of AdamW."""
    plain = state_bytes([], device)
    rows = [Row("AdamW", None, 1.0, columns={"MB": plain / 1e6})]
    for name, budget in STATE_BUDGETS.items():
        held = state_bytes([OptimizerSwap(name, lr_factor=1.0)], device)
        rows.append(Row(f"OptimizerSwap({name!r})", None, held / plain, budget, columns={"MB": held / 1e6}))
    return rows


class Native(SmallTransformer):
    """The transformer with an optimizer of its own.

    Args:
        kind: Class of the optimizer.
    """

    def __init__(self, kind: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer."""
        return self.kind(self.parameters(), lr=RATE, weight_decay=0.01)


def matrix_rows(device: str) -> list[Row]:
    """Compare the bytes of all states with those of AdamW, where some matrices move by another optimizer."""
    plain = state_bytes([], device)
    rows = [Row("AdamW", None, 1.0, columns={"MB": plain / 1e6})]
    for name, (options, budget) in MATRICES.items():
        held = state_bytes([OptimizerSwap(name, options)], device)
        rows.append(Row(_name_of(name, options), None, held / plain, budget, columns={"MB": held / 1e6}))
    return rows


def matrix_steps(names: Sequence[str], rounds: int, clock: Clock) -> list[Row]:
    """Time steps of the transformer with each optimizer of matrices and with AdamW in turn."""
    variants: dict[str, Callable[[], tuple[LightningModule, list[Callback]]]] = {
        "AdamW": lambda: (SmallTransformer(), [])
    }
    for name in names:
        variants[_name_of(name, MATRICES[name][0])] = partial(_with_matrices, name)
    variants[f"AdamW{AGAIN}"] = variants["AdamW"]
    found = [in_turns([partial(_steps, variant, clock) for variant in variants.values()]) for _ in range(rounds)]
    times = [median(time for times in each for time in times) for each in zip(*found, strict=True)]
    return [
        Row(name, 1000 * time, time / times[0], baseline="" if name == "AdamW" else "AdamW")
        for name, time in zip(variants, times, strict=True)
    ]


def _with_matrices(name: str) -> tuple[LightningModule, list[Callback]]:
    return SmallTransformer(), [OptimizerSwap(name, MATRICES[name][0])]


def _name_of(name: str, options: dict[str, Any]) -> str:
    given = "".join(f", {key}={value}" for key, value in options.items())
    return f"OptimizerSwap({name!r}){given}"


class Grouped(SmallTransformer):
    """The transformer with a group of parameters for each layer."""

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer."""
        layers = self.encoder.layers
        rates = [RATE * DECAY**depth for depth in reversed(range(len(layers)))]
        return torch.optim.AdamW([{"params": e.parameters(), "lr": r} for e, r in zip(layers, rates, strict=True)])


def swap_rows(name: str, rounds: int, clock: Clock) -> list[Row]:
    """Time steps with another optimizer."""
    kind = _class_of(name)
    ours = [OptimizerSwap(name, lr_factor=1.0)]
    return step_rows(f"{name} in the module", lambda: Native(kind), f"OptimizerSwap({name!r})", ours, rounds, clock)


def decay_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time steps with a learning rate for each layer."""
    ours = [LayerwiseLearningRateDecay(DECAY)]
    return step_rows("adamw with a group for each layer", Grouped, type(ours[0]).__name__, ours, rounds, clock)


def step_rows(
    baseline: str,
    native: Callable[[], LightningModule],
    name: str,
    callbacks: Sequence[Callback],
    rounds: int,
    clock: Clock,
) -> list[Row]:
    """Time steps with a callback, and of a module that does the same itself, in turn."""
    variants: list[Callable[[], tuple[LightningModule, list[Callback]]]] = [
        lambda: (native(), []),
        lambda: (SmallTransformer(), copy.deepcopy(list(callbacks))),
        lambda: (native(), []),
    ]
    found: list[list[list[float]]] = []
    for _ in range(rounds):
        found.append(in_turns([partial(_steps, variant, clock) for variant in variants]))
    plain, ours, again = (median(time for times in each for time in times) for each in zip(*found, strict=True))
    return [
        Row(baseline, 1000 * plain, 1.0),
        Row(name, 1000 * ours, ours / plain, STEP_BUDGET, baseline=baseline),
        Row(f"{baseline}{AGAIN}", 1000 * again, again / plain, baseline=baseline),
    ]


def _class_of(name: str) -> Callable[..., Optimizer]:
    """Return the class behind a short name."""
    kind: Callable[..., Optimizer] = OptimizerSwap(name, lr_factor=1.0).new_class()
    return kind


def _steps(make: Callable[[], tuple[LightningModule, list[Callback]]], clock: Clock, pause: Any) -> list[float]:
    seed_everything(0, verbose=False)
    module, callbacks = make()
    return timed_fit(module, batch_of(), STEPS, callbacks, clock, pause)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round of one optimizer: a rough answer in seconds")
    silence()
    torch.set_num_threads(options.threads)
    clock = Clock(options.device)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STATE: state_rows(options.device), STEPS_OF: list[Row](), OF_MATRICES: matrix_rows(options.device)}
    show("State of the optimizers", tables[STATE])
    show("State with optimizers of matrices", tables[OF_MATRICES])
    for name in STEPPED[: 1 if options.quick else None]:
        tables[STEPS_OF] += swap_rows(name, options.rounds, clock)
    tables[STEPS_OF] += decay_rows(options.rounds, clock)
    show("Steps of a transformer", tables[STEPS_OF])
    names = ["dct-adamw"] if options.quick else list(MATRICES)
    tables[MATRIX_STEPS] = matrix_steps(names, options.rounds, clock)
    show("Steps with optimizers of matrices", tables[MATRIX_STEPS])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
