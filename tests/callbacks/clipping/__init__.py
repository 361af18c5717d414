"""What the tests of the rules share: a module whose gradients the data say, and callbacks that look and spoil."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.testing import make_trainer

WIDTH = 4


class Dictated(pl.LightningModule):
    """Its gradients are its data: row t of the data is the gradient of step t, whatever the weights are.

    Args:
        names: Of its parameters, which share the columns of the data equally.
        make_optimizer: From parameters; default SGD.
        make_scheduler: From the optimizer, stepped after every batch; default none.
    """

    def __init__(
        self,
        names: Sequence[str] = ("w",),
        make_optimizer: Callable[[Any], Any] | None = None,
        make_scheduler: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.names = list(names)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(WIDTH)))
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.make_scheduler = make_scheduler

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        columns = batch[0][0].split(WIDTH)
        return sum((getattr(self, name) * part).sum() for name, part in zip(self.names, columns, strict=True))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


class Regression(pl.LightningModule):
    """Fits a random linear map; any net, any optimizer, and losses that are spoilt in chosen batches."""

    def __init__(
        self, net: nn.Module, make_optimizer: Callable[[Any], Any] | None = None, spoilt: dict[int, float] | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        self.spoilt = spoilt or {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y) * self.spoilt.get(batch_idx, 1.0)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net.parameters())


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def rows_of(rows: Tensor) -> DataLoader:
    """Return a loader that gives one row a batch."""
    return DataLoader(TensorDataset(rows), 1)


def pairs(batches: int = 6, size: int = 4, inputs: int = 6, outputs: int = 3) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, inputs, generator=generator)
    return DataLoader(TensorDataset(x, torch.randn(len(x), outputs, generator=generator)), size)


def train(callbacks: Sequence[Any], module: pl.LightningModule, loader: DataLoader, **arguments: Any) -> pl.Trainer:
    """Fit for one epoch and return the trainer."""
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 1, **arguments})
    trainer.fit(module, loader)
    return trainer


class Gradients(pl.Callback):
    """Keeps the gradients of every step as they stand at its place among the callbacks; after all others by default."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(name, p) for name, p in pl_module.named_parameters() if id(p) in chosen and p.grad is not None]
        self.seen.append({name: parameter.grad.clone() for name, parameter in named})

    def norms(self, *names: str) -> list[float]:
        """Return the norm of each step's gradients, of those named or of all."""
        chosen = [[step[name] for name in names or step] for step in self.seen]
        return [torch.cat([g.flatten() for g in gradients]).norm().item() for gradients in chosen]


class Spoil(pl.Callback):
    """Overwrites the gradients of chosen steps, on every rank or on one."""

    def __init__(self, steps: dict[int, float], rank: int | None = None) -> None:
        self.steps, self.rank, self.step = steps, rank, 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.step in self.steps and self.rank in (None, trainer.global_rank):
            for parameter in pl_module.parameters():
                parameter.grad.fill_(self.steps[self.step])
        self.step += 1


def rows_with_norms(norms: Sequence[float], width: int = WIDTH) -> Tensor:
    """Return rows in random directions with the norms asked for."""
    directions = torch.randn(len(norms), width, generator=torch.Generator().manual_seed(5))
    return directions / directions.norm(dim=1, keepdim=True) * torch.tensor(norms).unsqueeze(1)
