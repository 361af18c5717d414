"""The cost of QuantizationAwareTraining: steps and checkpoints next to those of dense training.

Steps of fits with and without the callback take turns step by step, in a real ``Trainer.fit`` with all hooks and the optimizer
step. "dense, again" shows the noise. Bytes of checkpoints are exact.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/quantization.py --quick
    python benchmarks/quantization.py --out quantization.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

from benchmarks.common import (
    Clock,
    in_turns,
    machine,
    quiet_trainer,
    show,
    show_missed,
    silence,
    speed_options,
    timed_fit,
    transformer,
    write_tables,
)
from benchmarks.rows import AGAIN, Row
from lightning_grad.callbacks import NMSparsity, QuantizationAwareTraining

STEPS_OF, CHECKPOINTS = "steps of a transformer", "checkpoints"  # titles of the tables
STEPS = 12
DENSE = "dense"
STE, QUEST = "8 bits, ste", "4 bits, quest in a Hadamard basis"
SPARSE = "2:4 and 8 bits, ste"
VARIANTS: Mapping[str, Mapping[str, Any] | None] = {
    DENSE: None,
    STE: {"weight_bits": 8},
    QUEST: {"weight_bits": 4, "quantizer": "quest"},
    "4 bits, quest": {"weight_bits": 4, "quantizer": "quest", "hadamard": False},
    "2 bits, statsq": {"weight_bits": 2, "quantizer": "statsq"},
    SPARSE: {"weight_bits": 8},
}
BUDGETS = {STE: 1.10, QUEST: 1.25}
FILE_BUDGET = 1.35  # of a checkpoint with weights and two moments, to which the dense weights are added


def callbacks_of(name: str) -> list[Callback]:
    """Build the callbacks of a variant, which act on all weights."""
    arguments = VARIANTS[name]
    sparse = [NMSparsity("2:4", "sr-ste", include=["*"], figure=False)] if name == SPARSE else []
    return [] if arguments is None else [*sparse, QuantizationAwareTraining(**arguments, include=["*"])]


def _steps(name: str, clock: Clock, pause: Any) -> list[float]:
    seed_everything(0, verbose=False)
    module, batch = transformer()
    return timed_fit(module, batch, STEPS, callbacks_of(name), clock, pause, log_every_n_steps=10**6)


def step_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time steps of all variants in turn."""
    names = [*VARIANTS, DENSE]
    found = [in_turns([partial(_steps, name, clock) for name in names]) for _ in range(rounds)]
    times = [median(time for times in each for time in times) for each in zip(*found, strict=True)]
    labels = [*VARIANTS, f"{DENSE}{AGAIN}"]
    return [Row(n, 1000 * t, t / times[0], BUDGETS.get(n)) for n, t in zip(labels, times, strict=True)]


def checkpoint_bytes(name: str, device: str) -> int:
    """Train for one step, and return the size of its checkpoint."""
    module, batch = transformer()
    with TemporaryDirectory() as folder:
        saving = ModelCheckpoint(folder, every_n_train_steps=1)
        trainer = quiet_trainer(device, max_steps=1, callbacks=[*callbacks_of(name), saving], enable_checkpointing=True)
        trainer.fit(module, DataLoader(cast(Any, [batch]), batch_size=None))
        return Path(saving.best_model_path).stat().st_size


def checkpoint_rows(device: str) -> list[Row]:
    """Compare the sizes of checkpoints, which hold the dense weights too, with that of dense training."""
    plain = checkpoint_bytes(DENSE, device)
    rows = [Row(DENSE, None, 1.0, columns={"MB": plain / 1e6})]
    for name in (STE, SPARSE):
        held = checkpoint_bytes(name, device)
        rows.append(Row(name, None, held / plain, FILE_BUDGET, columns={"MB": held / 1e6}))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in half a minute")
    silence()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STEPS_OF: step_rows(options.rounds, Clock(options.device)), CHECKPOINTS: checkpoint_rows(options.device)}
    show("Steps of a transformer", tables[STEPS_OF])
    show("Checkpoints", tables[CHECKPOINTS])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
