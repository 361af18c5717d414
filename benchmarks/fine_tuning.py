"""The cost of fine-tuning few parameters: steps, optimizer state and saved activations next to those of a dense fit.

The transformer trains as it is and with each technique, all of them in turn, step by step; the rows "again" show the noise.
Bytes of optimizer state are counted after the first steps. Saved activations are the tensors that autograd keeps for the
backward pass, without the weights themselves. Both counts are exact.

With one thread the script measures processor time, which excludes the time that other processes get.

::

    python benchmarks/fine_tuning.py --quick
    python benchmarks/fine_tuning.py --out fine_tuning.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

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
from lightning_grad.callbacks import LoRA
from lightning_grad.utilities import optimizer_report

STEPS_OF, STATE, SAVED = "steps of a transformer", "state", "saved activations"  # titles of the tables
DENSE = "dense"
STEPS = 12
FEED_FORWARD = ["*.linear1", "*.linear2"]


@dataclass(frozen=True)
class Variant:
    """A technique that is compared with the dense fit.

    Args:
        make: Builds its callbacks.
        steps: Budget of the time of a step; ``None`` for no budget.
        state: Budget of the bytes of optimizer state.
        saved: Budget of the bytes of saved activations.
    """

    make: Callable[[], Sequence[Callback]]
    steps: float | None = None
    state: float | None = None
    saved: float | None = None


VARIANTS: dict[str, Variant] = {
    "LoRA, rank 8": Variant(lambda: [LoRA(8)], steps=1.0, state=0.05, saved=1.06),
    "LoRA, rank 8, feed-forward layers": Variant(lambda: [LoRA(8, include=FEED_FORWARD)], 1.0, 0.03, 1.0),
}


# Steps.


def step_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time steps of all variants and of the dense fit in turn."""
    dense = Variant(list)
    fits = {DENSE: dense, **VARIANTS, f"{DENSE}{AGAIN}": dense}
    found = [in_turns([partial(_steps, fit, clock) for fit in fits.values()]) for _ in range(rounds)]
    times = [median(time for times in each for time in times) for each in zip(*found, strict=True)]
    return [
        Row(name, 1000 * time, time / times[0], fit.steps, baseline="" if name == DENSE else DENSE)
        for (name, fit), time in zip(fits.items(), times, strict=True)
    ]


def _steps(variant: Variant, clock: Clock, pause: Callable[[], None]) -> list[float]:
    seed_everything(0, verbose=False)
    module, batch = transformer()
    return timed_fit(module, batch, STEPS, list(variant.make()), clock, pause)


# Bytes.


class SavedBytes(Callback):
    """Count the bytes that autograd saves in the last step, without parameters. Must be the last callback."""

    def __init__(self) -> None:
        self.bytes = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        saved: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in pl_module.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pl_module.training_step(batch, batch_idx)
        self.bytes = sum(saved.values())


def bytes_of(variant: Variant, device: str) -> tuple[int, int]:
    """Train for some steps, and return the bytes of optimizer state and of saved activations."""
    seed_everything(0, verbose=False)
    module, batch = transformer()
    counter = SavedBytes()
    trainer = quiet_trainer(device, max_steps=3, callbacks=[*variant.make(), counter])
    trainer.fit(module, DataLoader(cast(Any, [batch] * 3), batch_size=None))
    return optimizer_report(trainer).state_bytes, counter.bytes


def byte_rows(device: str) -> tuple[list[Row], list[Row]]:
    """Compare the bytes of all variants with those of the dense fit."""
    dense = bytes_of(Variant(list), device)
    state, saved = ([Row(DENSE, None, 1.0, columns={"MB": each / 1e6})] for each in dense)
    for name, variant in VARIANTS.items():
        held, kept = bytes_of(variant, device)
        state.append(Row(name, None, held / dense[0], variant.state, columns={"MB": held / 1e6}))
        saved.append(Row(name, None, kept / dense[1], variant.saved, columns={"MB": kept / 1e6}))
    return state, saved


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in half a minute")
    silence()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STEPS_OF: step_rows(options.rounds, Clock(options.device))}
    show("Steps of a transformer", tables[STEPS_OF])
    tables[STATE], tables[SAVED] = byte_rows(options.device)
    show("State of the optimizer", tables[STATE])
    show("Activations saved for the backward pass", tables[SAVED])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
