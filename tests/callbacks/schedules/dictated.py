"""A module whose validation accuracies are written down beforehand, and a callback that writes down the rates it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.testing import ResumableLoader, make_trainer

BATCHES = 4
QUICK = {"window": 2, "cooldown": 2, "factor": 0.5}  # a constant accuracy is cut at 4, 6, 8 ...


class Dictated(pl.LightningModule):
    """Logs the accuracies it was given, one a validation.

    Args:
        accuracies: The metric of each validation; its last one goes on. ``None`` logs nothing then.
        configure: From parameters: what ``configure_optimizers`` returns. Default SGD without a scheduler.
        every: Batches between two validations.
        key: Name of the metric.
    """

    def __init__(
        self,
        accuracies: Sequence[float | None] = (0.5,),
        configure: Callable[[list[nn.Parameter]], Any] | None = None,
        every: int = BATCHES,
        key: str = "val_acc",
    ) -> None:
        super().__init__()
        self.accuracies, self.every, self.key = list(accuracies), every, key
        self.configure = configure or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((weight * batch[0][0]).sum() for weight in self.weights)

    def accuracy(self) -> float | None:
        count = (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) // self.every
        return self.accuracies[min(max(count - 1, 0), len(self.accuracies) - 1)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        accuracy = self.accuracy()
        if accuracy is not None:
            self.log(self.key, accuracy)

    def configure_optimizers(self) -> Any:
        return self.configure(list(self.weights))


class Rates(pl.Callback):
    """Writes down the rates of every optimizer step: of each optimizer, of each group."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append([float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def first(self) -> list[float]:
        """Return the rates of the first group."""
        return [rates[0] for rates in self.seen]

    def epochs(self) -> list[float]:
        """Return the rate of the first group in each epoch."""
        return self.first()[::BATCHES]


def data(batches: int = BATCHES) -> TensorDataset:
    return TensorDataset(torch.randn(batches, 2, generator=torch.Generator().manual_seed(0)))


def train(
    callbacks: Sequence[Any], module: pl.LightningModule | None = None, ckpt: Any = None, **arguments: Any
) -> tuple[pl.Trainer, Rates]:
    """Fit, ten epochs by default, and return the trainer and the rates."""
    rates = Rates()
    if any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        arguments.setdefault("enable_checkpointing", True)
    trainer = make_trainer(callbacks=[*callbacks, rates], **{"max_epochs": 10, **arguments})
    module = Dictated() if module is None else module
    trainer.fit(module, ResumableLoader(data(), 1), DataLoader(data(1), 1), ckpt_path=ckpt)
    return trainer, rates
