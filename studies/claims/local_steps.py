"""Local steps: ranks that train apart and exchange weights once in a while, against DDP, which exchanges every gradient.

Three linear layers learn handwritten digits on two ranks, and a small transformer predicts characters of source code on two
and on four. The batch of all ranks together is the same for every number of ranks. Each way to exchange is one line in
:data:`STRATEGIES`, and has its own learning rate, chosen on a seed that is not reported.

Bytes are those that a rank passes to collectives. Seconds are those of this machine, without validation: the ranks share its
memory, so sending less saves little time here. ``benchmarks/several_machines.py`` measures time over slow links.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from plain_project import CharTransformer, Digits, ImageClassifier, Text
from typing_extensions import override

from lightning_grad.strategies import DiLoCoStrategy, LocalSGDStrategy
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, finish_loggers, hush, linear_network, read_table, write_table
from studies.ranks import StartMethod, gradient_bytes, start_of_ranks

WIDTH, BATCH, EVALUATIONS = 256, 64, 12
REFERENCE = "dense"

# The line Trainer(strategy=...) of each way to exchange, by the start method of ranks.
STRATEGIES: dict[str, Callable[..., DDPStrategy]] = {
    REFERENCE: DDPStrategy,
    "local-10": partial(LocalSGDStrategy, 10),
    "diloco-10": partial(DiLoCoStrategy, 10),
    "diloco-30": partial(DiLoCoStrategy, 30),
    "diloco-100": partial(DiLoCoStrategy, 100),
    "diloco-30-int8": partial(DiLoCoStrategy, 30, compression="int8"),
    "diloco-30-topk": partial(DiLoCoStrategy, 30, compression="topk"),
    "diloco-30-overlap": partial(DiLoCoStrategy, 30, overlap=True),
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is the way to exchange, see :data:`STRATEGIES`.

    Args:
        validation_loss: Loss on the validation data at the end.
        validation_accuracy: Accuracy on the validation data at the end, of images or of next characters.
        test_accuracy: Accuracy on the test images; on characters, the validation accuracy.
        megabytes: Megabytes that a rank sent in the whole training.
        ratio: Bytes of all its gradients, divided by the sent bytes.
        seconds: Seconds of the training on this machine, without validation.
    """

    validation_loss: float
    validation_accuracy: float
    test_accuracy: float
    megabytes: float
    ratio: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LocalSteps(Claim[Result]):
    """Local steps against DDP.

    Args:
        model: ``"digits"`` or ``"characters"``.
        ranks: Number of processes, which share a batch of 64.
        steps: Optimizer steps of each training.
        start_method: Start method of ranks; by default fork, which is faster, on Linux without a GPU, else spawn.
    """

    result = Result
    devices = ("cpu",)
    choices: ClassVar = {"model": ("digits", "characters")}
    least: ClassVar = {"steps": 2}
    name: str = "local-steps-digits"
    text: str = "On digits, DiLoCo with an exchange every 30 steps is at most half a point less accurate than DDP."
    arms: Sequence[str] = tuple(STRATEGIES)
    reference: str = REFERENCE
    metric: str = "test_accuracy"
    margin: float = -0.005
    scale: float = 100
    unit: str = "%"
    rates: Sequence[float] = (0.02, 0.05, 0.1)
    chosen_by: str = "validation_loss"
    budget: float = 15
    model: str = "digits"
    ranks: int = 2
    steps: int = 660
    start_method: Any = None

    @property
    def start(self) -> StartMethod:
        """The start method of ranks."""
        return start_of_ranks(self.start_method)

    @override
    def train(self, run: Run) -> Result:
        """Run one training on all ranks, and test on one. Ranks return measurements in files, and the weights."""
        hush()
        torch.set_num_threads(1)
        data = build_data(self.model, run, BATCH // self.ranks)
        module, folder = build_module(self.model, run, data), self.folder(run)
        trainer = self.trainer(
            run,
            [Recorder(folder), Follow(run.show, "val_loss")],
            strategy=STRATEGIES[run.arm](start_method=self.start),
            devices=self.ranks,
            max_steps=self.steps,
            val_check_interval=max(1, self.steps // EVALUATIONS),
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, data)
        tester = self.trainer(run, [], logger=False)
        tested = tester.test(module, data, verbose=False)[0]["test_acc"] if self.model == "digits" else None
        (validation,) = tester.validate(module, data, verbose=False)
        return measure(run, folder, validation, tested)


def build_data(model: str, run: Run, batch: int) -> LightningDataModule:
    """Return the data of one rank."""
    return Digits(batch, seed=run.seed) if model == "digits" else Text(batch_size=batch)


def build_module(model: str, run: Run, data: Any) -> LightningModule:
    """Return a new module of the plain project, with the rate of an arm."""
    if model == "digits":
        return ImageClassifier(linear_network(WIDTH), optimizer="sgd", lr=run.rate or 0.05, weight_decay=5e-4)
    return CharTransformer(data.vocabulary_size, data.context, lr=run.rate or 3e-3)


def measure(run: Run, folder: Path, validation: Any, tested: float | None) -> Result:
    """Return the result of a training, with what rank 0 wrote."""
    columns = read_table(folder / "evaluations.csv")
    megabytes, dense, seconds = (float(columns[key][-1]) for key in ("megabytes", "dense_megabytes", "seconds"))
    accuracy = validation["val_acc"]
    losses = (validation["val_loss"], accuracy, accuracy if tested is None else tested)
    return Result(run.arm, run.seed, run.rate, *losses, megabytes, dense / max(megabytes, 1e-9), seconds)


class Recorder(Callback):
    """Write loss, bytes and seconds of each validation on rank 0. A rank is a separate process, so only files remain.

    Args:
        folder: Folder for ``evaluations.csv``.
    """

    columns = ("step", "val_loss", "megabytes", "dense_megabytes", "seconds")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[tuple[float, ...]] = []
        self._seconds, self._since = 0.0, 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        hush()
        torch.set_num_threads(1)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        self._since = time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._seconds += time.perf_counter() - self._since

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        dense = trainer.global_step * gradient_bytes(pl_module)
        ledger = getattr(trainer.strategy, "ledger", None)
        sent = dense if ledger is None else ledger.sent_bytes
        loss = trainer.callback_metrics["val_loss"].item()
        self._rows.append((trainer.global_step, loss, sent / 1e6, dense / 1e6, self._seconds))
        trainer.strategy.barrier()
        self._since = time.perf_counter()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            write_table(self.folder / "evaluations.csv", self.columns, self._rows)
            finish_loggers(trainer)


_DILOCO = Paper(
    "DiLoCoStrategy",
    "communication",
    "With hundreds of local steps between exchanges, training ends as well as with an exchange in each step",
    "DiLoCo (2311.08105)",
)


def _characters(ranks: int, budget: float) -> LocalSteps:
    return LocalSteps(
        name=f"local-steps-characters-{ranks}",
        text=f"On characters and {ranks} ranks, DiLoCo with an exchange every 30 steps ends with at most 0.05 more loss "
        "than DDP.",
        paper=_DILOCO,
        default_data="Python sources",
        metric="validation_loss",
        higher=False,
        margin=-0.05,
        scale=1,
        unit="",
        rates=(1e-3, 3e-3, 1e-2),
        budget=budget,
        model="characters",
        ranks=ranks,
    )


CLAIMS = (LocalSteps(paper=_DILOCO), _characters(2, 30), _characters(4, 40))
