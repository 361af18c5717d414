"""Values that each rank has of its own, brought together. Every rank must call these functions, in the same order."""

from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

T = TypeVar("T")
_INFINITE = 1e30  # stands for an infinity in a sum over ranks


def sum_over_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on the device on which it is."""
    if trainer.world_size == 1:
        return values
    total = trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum")
    return torch.as_tensor(total).to(values.device)


def mean_over_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Return the mean over those ranks that have a value; nan stands where a rank, or all of them, has none."""
    if trainer.world_size == 1:
        return values
    total = sum_over_ranks(trainer, values.nan_to_num(nan=0.0, posinf=_INFINITE, neginf=-_INFINITE))
    mean = total / sum_over_ranks(trainer, (~values.isnan()).to(values))
    return torch.where(mean.abs() > _INFINITE / 1e3, mean.sign() * float("inf"), mean)


def first_of_ranks(trainer: pl.Trainer, own: dict[str, T]) -> dict[str, T]:
    """Return what the first rank has that has anything, the same on all."""
    for rank in range(trainer.world_size if trainer.world_size > 1 else 0):
        found: dict[str, T] = trainer.strategy.broadcast(own, src=rank)
        if found:
            return found
    return own
