"""Communication: ways to send gradients between two processes: dense, half precision, low rank, or largest entries.

Three linear layers with 85,000 weights learn handwritten digits with SGD and momentum. Each process (rank) has its own part of
every batch, and all ranks must agree on the mean gradient before each update. Each way to send it is one line in
:data:`STRATEGIES`; everything else here measures.

Bytes are those that a rank passes to collectives during the whole training, including the denser first epochs of DGC. The
bytes on the wire also depend on the number of ranks and their connection. Here the ranks share memory, so compression saves
no time; ``benchmarks/slow_link.py`` measures time, on links of a given speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from plain_project import Digits, ImageClassifier
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_grad.strategies import CompressedDDPStrategy, DGCStrategy, OneBitAdamStrategy, PowerSGDStrategy
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers, hush, linear_network, read_table, write_table
from studies.ranks import StartMethod, gradient_bytes, start_of_ranks

IN_THE_DEMO = """\
Compressed gradients (half a minute). Two processes train one network, each on
its half of every batch, and exchange gradients in three ways, three seeds each:
all entries, an approximation, or the largest entries, with one line changed:

    Trainer(devices=2, strategy=DGCStrategy(ratio=0.001))
"""

WIDTH, BATCH = 256, 64  # units of a hidden layer; digits of one step, over all ranks
REFERENCE = "dense"


class HalfPrecisionStrategy(DDPStrategy):
    """DDP with torch's own hook that sends gradients as float16, which Lightning registers on GPUs only."""

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, fp16_compress_hook)


# The line Trainer(strategy=...) of each way to send gradients, by the start method of ranks.
STRATEGIES: dict[str, Callable[[StartMethod], DDPStrategy]] = {
    "dense": lambda start: DDPStrategy(start_method=start),
    "fp16": lambda start: HalfPrecisionStrategy(start_method=start),
    "powersgd-4": lambda start: PowerSGDStrategy(rank=4, start_method=start),
    "powersgd-2": lambda start: PowerSGDStrategy(rank=2, start_method=start),
    "powersgd-1": lambda start: PowerSGDStrategy(rank=1, start_method=start),
    "dgc-99": lambda start: DGCStrategy(ratio=0.01, start_method=start),
    "dgc-99-unmasked": lambda start: DGCStrategy(ratio=0.01, momentum_masking=False, start_method=start),
    "dgc-99.9": lambda start: DGCStrategy(ratio=0.001, start_method=start),
    "dgc-99.9-unmasked": lambda start: DGCStrategy(ratio=0.001, momentum_masking=False, start_method=start),
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is the way to send gradients, see :data:`STRATEGIES`.

    Args:
        validation_accuracy: Accuracy after the last epoch.
        test_accuracy: Accuracy after the last epoch.
        step_kilobytes: Kilobytes that a rank sent in the last step.
        megabytes: Megabytes that a rank sent in the whole training.
        ratio: Bytes of all its gradients, divided by the sent bytes.
        residual: Norm of the unsent rest of rank 0 at the end.
        validation_loss: Loss after the last epoch.
    """

    validation_accuracy: float
    test_accuracy: float
    step_kilobytes: float
    megabytes: float
    ratio: float
    residual: float
    validation_loss: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Communication(Claim[Result]):
    """Compressed gradients against dense ones.

    Args:
        epochs: Epochs of each training; DGC needs four to become sparse.
        ranks: Number of processes, which share a batch of 64.
        start_method: Start method of ranks; by default fork, which is faster, on Linux without a GPU, else spawn.
    """

    result = Result
    devices = ("cpu",)
    name: str = "communication"
    text: str = "Compressed gradients end at most one and a half points below dense gradients."
    arms: Sequence[str] = tuple(STRATEGIES)
    reference: str = REFERENCE
    metric: str = "test_accuracy"
    margin: float = -0.015
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (0.02, 0.05, 0.1)
    chosen_by: str = "validation_accuracy"
    budget: float = 8
    epochs: int = 30
    ranks: int = 2
    start_method: Any = None
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "sgd"

    @property
    def start(self) -> StartMethod:
        """The start method of ranks."""
        return start_of_ranks(self.start_method)

    def strategy(self, arm: str) -> DDPStrategy:
        """Return the strategy of an arm."""
        return STRATEGIES[arm](self.start)

    @override
    def train(self, run: Run) -> Result:
        """Run one training on all ranks, and test on one. Ranks return measurements in files, and the weights."""
        hush()
        torch.set_num_threads(1)
        module = build_module(run.rate, self.optimizer)
        data, folder = Digits(BATCH // self.ranks, seed=run.seed), self.folder(run)
        callbacks = [Recorder(folder), Follow(run.show)]
        strategy = self.strategy(run.arm)
        trainer = self.trainer(run, callbacks, strategy=strategy, devices=self.ranks, max_epochs=self.epochs)
        trainer.fit(module, data)
        tester = self.trainer(run, [], logger=False)
        return measure(run, folder, tester.test(module, data, verbose=False)[0]["test_acc"])


@dataclass(frozen=True, kw_only=True)
class OneBit(Communication):
    """Signs of Adam's momentum against dense gradients with Adam.

    Args:
        freeze_step: Steps of plain Adam; the default is a fifth of 30 epochs.
    """

    name: str = "onebit-adam"
    text: str = "1-bit Adam ends with a loss at most 0.02 above that of Adam."
    arms: Sequence[str] = (REFERENCE, "one-bit")
    metric: str = "validation_loss"
    higher: bool = False
    margin: float = -0.02
    scale: float = 1.0
    unit: str = ""
    rates: Sequence[float] = (5e-4, 1e-3, 2e-3, 4e-3)
    chosen_by: str = "validation_loss"
    budget: float = 4
    freeze_step: int = 132
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "adamw"

    @override
    def strategy(self, arm: str) -> DDPStrategy:
        if arm == REFERENCE:
            return super().strategy(arm)
        return OneBitAdamStrategy(freeze_step=self.freeze_step, start_method=self.start)


def measure(run: Run, folder: Path, test_accuracy: float) -> Result:
    """Return the result of a training from the files of rank 0."""
    columns = read_table(folder / "epochs.csv")
    accuracy, sent, megabytes, dense, residual, loss = (float(columns[key][-1]) for key in Recorder.columns[1:])
    end = (sent / 1e3, megabytes, dense / megabytes, residual, loss)
    return Result(run.arm, run.seed, run.rate, accuracy, test_accuracy, *end)


def build_module(rate: float | None, optimizer: Literal["sgd", "adamw"] = "sgd") -> LightningModule:
    """Return a new module of the plain project."""
    default = 0.05 if optimizer == "sgd" else 1e-3
    return ImageClassifier(linear_network(WIDTH), optimizer=optimizer, lr=rate or default, weight_decay=5e-4)


class Recorder(Callback):
    """Write accuracy and bytes of each epoch on rank 0. A rank is a separate process, so only files remain.

    Args:
        folder: Folder for ``epochs.csv``.
    """

    columns = ("epoch", "val_acc", "step_bytes", "megabytes", "dense_megabytes", "residual_norm", "val_loss")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[tuple[float, ...]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        hush()
        torch.set_num_threads(1)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step_bytes, all_bytes, residual = communicated(trainer, pl_module)
        dense = trainer.global_step * gradient_bytes(pl_module)
        accuracy, loss = (trainer.callback_metrics[key].item() for key in ("val_acc", "val_loss"))
        sent = (step_bytes, all_bytes / 1e6, dense / 1e6)
        self._rows.append((trainer.current_epoch + 1, accuracy, *sent, residual, loss))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            write_table(self.folder / "epochs.csv", self.columns, self._rows)
            finish_loggers(trainer)


def communicated(trainer: Trainer, module: LightningModule) -> tuple[float, float, float]:
    """Return the bytes that this rank sent in the last step and in total, and the norm of its unsent rest."""
    strategy = trainer.strategy
    if isinstance(strategy, CompressedDDPStrategy):
        return strategy.ledger.step_sent, strategy.ledger.sent_bytes, strategy.residual_norm()
    step_bytes = gradient_bytes(module) / (2 if isinstance(strategy, HalfPrecisionStrategy) else 1)
    return step_bytes, trainer.global_step * step_bytes, 0.0


CLAIMS = (
    Communication(
        paper=Paper(
            "DGCStrategy, PowerSGDStrategy",
            "communication",
            "Gradients that are compressed a hundred times and more train to the accuracy of dense ones",
            "DGC (1712.01887); PowerSGD (1905.13727)",
        )
    ),
    OneBit(
        paper=Paper(
            "OneBitAdamStrategy",
            "communication",
            "Adam trains as well with a frozen variance and a momentum of one bit an entry",
            "1-bit Adam (2102.02888)",
        )
    ),
)
