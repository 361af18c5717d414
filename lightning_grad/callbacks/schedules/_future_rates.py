"""The learning rates of the rest of a run, from copies of its schedulers that run ahead."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_grad.core.dispatch import overrides
from lightning_grad.data.random_streams import random_streams_kept


class UnknownRatesError(Exception):
    """Raised if the learning rates of the rest of a run are unknown; the message is a sentence."""


def rate_of(optimizer: Optimizer | Any) -> Any:
    """Return the highest learning rate of an optimizer's groups; of the first group if rates are tensors."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return rates[0] if any(isinstance(rate, torch.Tensor) for rate in rates) else max(rates)


def future_rates(trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int, batch_idx: int) -> list[float]:
    """Return the learning rates of the first optimizer in the next steps. The schedulers of the run do not change.

    Call it in ``on_train_batch_end``, after the schedulers.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        steps: Number of steps.
        batch_idx: Index in the epoch of the batch that has ended.

    Raises:
        UnknownRatesError: If the rates depend on a metric or on the module, or a scheduler cannot be copied.
    """
    if overrides(pl_module, "lr_scheduler_step"):
        raise UnknownRatesError("The module steps its schedulers itself (lr_scheduler_step).")
    configs = [
        c for c in trainer.lr_scheduler_configs if getattr(c.scheduler, "optimizer", None) is trainer.optimizers[0]
    ]
    if any(config.reduce_on_plateau for config in configs):
        raise UnknownRatesError("A scheduler follows a metric (ReduceLROnPlateau).")
    light = _light_copy(trainer.optimizers[0])
    # Whatever refers to the optimizer then refers to the copy, which has no weights and no state.
    memo: dict[int, Any] = {id(trainer.optimizers[0]): light, id(trainer): trainer, id(pl_module): pl_module}
    accumulate, in_epoch = trainer.accumulate_grad_batches, trainer.num_training_batches
    batch: float = batch_idx + 1
    epoch, found = trainer.current_epoch, list[float]()
    if batch >= in_epoch:
        batch, epoch = 0, epoch + 1
    with random_streams_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            copies = [(config, copy.deepcopy(config.scheduler, memo)) for config in configs]
            for _ in range(steps):
                found.append(float(rate_of(light)))
                batch = min((batch // accumulate + 1) * accumulate, in_epoch)
                done = {"step": batch}
                if batch == in_epoch:
                    batch, epoch = 0, epoch + 1
                    done["epoch"] = epoch
                _advance(copies, done)
        except Exception as error:
            raise UnknownRatesError(f"A scheduler cannot run ahead: {type(error).__name__}: {error}.") from error
    return found


def _advance(copies: list[tuple[Any, Any]], done: Mapping[str, float]) -> None:
    for interval, count in done.items():
        for config, scheduler in copies:
            if config.interval == interval and count % config.frequency == 0:
                scheduler.step()


def _light_copy(optimizer: Optimizer | Any) -> Optimizer:
    """Return an optimizer with the same groups, but for one number in place of all weights."""
    groups = [{**group, "params": [nn.Parameter(torch.zeros(()))]} for group in copy.copy(optimizer.param_groups)]
    light = torch.optim.SGD([group["params"][0] for group in groups], lr=0.0)
    light.param_groups[:] = [{key: copy.copy(value) for key, value in group.items()} for group in groups]
    return light


def has_followed(plan: list[float], came: list[float]) -> bool:
    """Return True if the learning rates that came are those of a plan."""
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in zip(plan, came, strict=False))
