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
from torch.optim import Optimizer
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
    timed_fit,
    transformer,
    write_tables,
)
from benchmarks.rows import AGAIN, Row
from lightning_grad.callbacks import LoRA, LowRankFinetuning, SaliencyUnlearning, SparseUpdate
from lightning_grad.utilities import optimizer_report

# Titles of the tables.
UNLEARNING = "steps of unlearning"
STEPS_OF, STATE, SAVED, NEEDED = "steps of a transformer", "state", "saved activations", "needed in total"
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
        needed: Budget of the bytes of gradients, optimizer state and saved activations together.
    """

    make: Callable[[], Sequence[Callback]]
    steps: float | None = None
    state: float | None = None
    saved: float | None = None
    needed: float | None = None


VARIANTS: dict[str, Variant] = {
    "LoRA, rank 8": Variant(lambda: [LoRA(8)], steps=1.0, state=0.05, saved=1.06),
    "LoRA, rank 8, feed-forward layers": Variant(lambda: [LoRA(8, include=FEED_FORWARD)], 1.0, 0.03, 1.0),
    "SparseUpdate, half of the bytes": Variant(lambda: [SparseUpdate(0.5)], steps=1.0, needed=0.5),
    "SparseUpdate, a fourth of the bytes": Variant(lambda: [SparseUpdate(0.25)], steps=1.0, needed=0.25),
    "LowRankFinetuning, 70 % of the ranks cut": Variant(lambda: [LowRankFinetuning(0.7)], 1.0, state=0.45, saved=1.12),
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


# Steps of unlearning, whose loader must tell the samples of each batch.


def unlearning_rows(rounds: int, clock: Clock) -> list[Row]:
    """Time steps with :class:`SaliencyUnlearning` and without it in turn."""
    fits = {DENSE: list, "SaliencyUnlearning": _forgetting, f"{DENSE}{AGAIN}": list}
    found = [in_turns([partial(_sample_steps, make, clock) for make in fits.values()]) for _ in range(rounds)]
    times = [median(time for times in each for time in times) for each in zip(*found, strict=True)]
    budgets = {"SaliencyUnlearning": 1.1}
    return [
        Row(name, 1000 * time, time / times[0], budgets.get(name), baseline="" if name == DENSE else DENSE)
        for name, time in zip(fits, times, strict=True)
    ]


def _forgetting() -> list[Callback]:
    return [SaliencyUnlearning(range(0, 40, 10), relabel=_negated)]


def _negated(batch: Any, forget: Tensor, generator: torch.Generator) -> Any:
    *inputs, target = batch
    rows = forget.to(target.device).reshape(-1, *[1] * (target.dim() - 1))
    return [*inputs, torch.where(rows, -target, target)]


def _sample_steps(make: Callable[[], Sequence[Callback]], clock: Clock, pause: Callable[[], None]) -> list[float]:
    seed_everything(0, verbose=False)
    module, batch = transformer()
    batches = WARM_STEPS + STEPS + 1
    data = TensorDataset(*(torch.cat([part] * 10) for part in batch))
    timer, size = StepTimer(clock, pause), len(batch[0])
    trainer = quiet_trainer(clock.device, max_steps=batches, callbacks=[timer, *make()])
    trainer.fit(module, DataLoader(data, size))
    return timer.periods


# Bytes.


class SavedBytes(Callback):
    """Count the bytes that autograd saves in the last step, without parameters, and those of gradients. Must be the last."""

    def __init__(self) -> None:
        self.bytes = 0
        self.gradients = 0

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.gradients = sum(gradient.numel() * gradient.element_size() for gradient in gradients)

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


def bytes_of(variant: Variant, device: str) -> dict[str, int]:
    """Train for some steps, and return the bytes of optimizer state, of saved activations, and of both with gradients."""
    seed_everything(0, verbose=False)
    module, batch = transformer()
    counter = SavedBytes()
    trainer = quiet_trainer(device, max_steps=3, callbacks=[*variant.make(), counter])
    trainer.fit(module, DataLoader(cast(Any, [batch] * 3), batch_size=None))
    state = optimizer_report(trainer).state_bytes
    return {STATE: state, SAVED: counter.bytes, NEEDED: state + counter.bytes + counter.gradients}


def byte_rows(device: str) -> dict[str, list[Row]]:
    """Compare the bytes of all variants with those of the dense fit."""
    dense = bytes_of(Variant(list), device)
    tables = {title: [Row(DENSE, None, 1.0, columns={"MB": count / 1e6})] for title, count in dense.items()}
    for name, variant in VARIANTS.items():
        budgets = {STATE: variant.state, SAVED: variant.saved, NEEDED: variant.needed}
        for title, count in bytes_of(variant, device).items():
            tables[title].append(Row(name, None, count / dense[title], budgets[title], columns={"MB": count / 1e6}))
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    assert __doc__ is not None
    options = speed_options(__doc__, arguments, quick="one round: a rough answer in half a minute")
    silence()
    torch.set_num_threads(options.threads)
    print(f"{machine(options.device)}; {options.rounds} rounds")
    tables = {STEPS_OF: step_rows(options.rounds, Clock(options.device))}
    show("Steps of a transformer", tables[STEPS_OF])
    tables[UNLEARNING] = unlearning_rows(options.rounds, Clock(options.device))
    show("Steps of unlearning", tables[UNLEARNING])
    tables |= byte_rows(options.device)
    show("State of the optimizer", tables[STATE])
    show("Activations saved for the backward pass", tables[SAVED])
    show("Gradients, optimizer state and saved activations", tables[NEEDED])
    show_missed(tables)
    write_tables(options, tables)


if __name__ == "__main__":
    main()
