"""A module that returns many optimizers with their schedulers, or one, and its fits with and without OptimizerSwap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_grad.testing import ResumableLoader, fit, make_classifier, make_trainer, state_of

BATCHES, EPOCHS = 4, 3
Make = Callable[..., Optimizer]


class Rates(pl.Callback):
    """Records rates, betas and momenta of all groups at the start of each batch."""

    def __init__(self) -> None:
        self.of: list[list[list[Any]]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        keys = ("lr", "betas", "momentum", "weight_decay")
        self.of.append([[g.get(key) for g in o.param_groups for key in keys] for o in trainer.optimizers])


class SaveAt(pl.Callback):
    """Saves a checkpoint after some of the batches."""

    def __init__(self, folder: Path, batches: Sequence[int]) -> None:
        self.folder, self.batches, self.seen = folder, batches, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen += 1
        if self.seen in self.batches:
            trainer.save_checkpoint(self.folder / f"{self.seen}.ckpt")


def groups_of(net: nn.Linear) -> list[dict[str, Any]]:
    """Return a group with and a group without weight decay, both with names."""
    weight = {"params": [net.weight], "weight_decay": 0.1, "name": "weight"}
    return [weight, {"params": [net.bias], "weight_decay": 0.0, "name": "bias", "lr": 2e-3}]


class Nets(pl.LightningModule):
    """One small net, optimizer and scheduler for each function that makes a scheduler; all see the same data."""

    def __init__(self, optimizer: Make, schedulers: Mapping[str, Callable[[Optimizer], Any]]) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.nets = nn.ModuleDict({name: nn.Linear(4, 1) for name in schedulers})
        self.make, self.makers = optimizer, schedulers

    def configure_optimizers(self) -> Any:
        optimizers = [self.make(groups_of(net), lr=1e-3) for net in self.nets.values()]
        return optimizers, [make(each) for make, each in zip(self.makers.values(), optimizers, strict=True)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers() if len(self.nets) > 1 else [self.optimizers()]
        schedulers = self.lr_schedulers() if len(self.nets) > 1 else [self.lr_schedulers()]
        for net, optimizer, scheduler in zip(self.nets.values(), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            loss = (net(batch) - batch.sum(1, keepdim=True)).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            step(scheduler, loss.detach(), self.trainer.fit_loop.total_batch_idx + 1)


def step(scheduler: Any, loss: Tensor, number: int) -> None:
    """Step a scheduler of any kind."""
    if hasattr(scheduler, "step_update"):
        scheduler.step_update(number)
    elif isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


class Net(pl.LightningModule):
    """One net under automatic optimization."""

    def __init__(self, optimizer: Make = AdamW, scheduler: Callable[[Optimizer], Any] | None = None, **options: Any):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(4, 1)
        self.make, self.scheduler, self.options = optimizer, scheduler, {"lr": 1e-3, **options}

    def configure_optimizers(self) -> Any:
        self.mine = self.make(groups_of(self.net), **self.options)
        if self.scheduler is None:
            return self.mine
        scheduler = self.scheduler(self.mine)
        return {"optimizer": self.mine, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "loss"}}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss


def train(
    module: pl.LightningModule,
    callbacks: Sequence[Any] = (),
    ckpt: Path | None = None,
    save: tuple[Path, Sequence[int]] | None = None,
    **arguments: Any,
) -> tuple[Any, list[list[list[Any]]]]:
    """Fit a module; return the trainer, and the rates at the start of each batch."""
    rates = Rates()
    data = torch.randn(8 * BATCHES, 4, generator=torch.Generator().manual_seed(0))
    last = [SaveAt(*save)] if save else []
    trainer = make_trainer(callbacks=[*callbacks, rates, *last], **{"max_epochs": EPOCHS, **arguments})
    trainer.fit(module, ResumableLoader(data, 8), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return trainer, rates.of


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Return True if two modules have bitwise the same parameters."""
    both = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in both)


def searched(technique: Any, folder: Path, searches: bool = True) -> Any:
    """Return what a fit of 12 steps leaves, with or without a search for a learning rate before it."""
    module, search = make_classifier(), LearningRateFinder(num_training_steps=7, update_attr=False)
    module.lr = 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [technique, *([search] if searches else [])]
        trainer, _ = fit(callbacks, module, max_epochs=2, default_root_dir=folder)
    assert not searches or search.optimal_lr.results["loss"], "it did not train"
    return state_of(trainer, module)["optimizers"], weights(module), module.validated, technique.state_dict()
