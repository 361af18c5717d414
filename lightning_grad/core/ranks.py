"""Sums, means and lists over ranks. Every rank must call these functions, in the same order."""

from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

T = TypeVar("T")
_INFINITE = 1e30  # replaces infinities in a sum over ranks, where inf - inf would be nan


def sum_over_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on the tensor's device."""
    if trainer.world_size == 1:
        return values
    total = trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum")
    return torch.as_tensor(total).to(values.device)


def mean_over_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Return the mean over the ranks that have a value. A rank without a value passes nan; the mean of no values is nan."""
    if trainer.world_size == 1:
        return values
    total = sum_over_ranks(trainer, values.nan_to_num(nan=0.0, posinf=_INFINITE, neginf=-_INFINITE))
    mean = total / sum_over_ranks(trainer, (~values.isnan()).to(values))
    return torch.where(mean.abs() > _INFINITE / 1e3, mean.sign() * float("inf"), mean)


def averaging_ranks(trainer: pl.Trainer) -> int:
    """Return over how many ranks the gradient of a step is averaged; 1 if each rank takes its own steps."""
    return 1 if getattr(trainer.strategy, "gradient_is_local", False) else trainer.world_size


def first_of_ranks(trainer: pl.Trainer, own: dict[str, T]) -> dict[str, T]:
    """Return the dictionary of the first rank whose own is not empty; all ranks get the same."""
    for rank in range(trainer.world_size if trainer.world_size > 1 else 0):
        found: dict[str, T] = trainer.strategy.broadcast(own, src=rank)
        if found:
            return found
    return own


def lists_of_ranks(trainer: pl.Trainer, own: list[T]) -> list[T]:
    """Return the lists of all ranks as one list, in the order of the ranks; all ranks get the same."""
    if trainer.world_size == 1:
        return own
    return [value for rank in range(trainer.world_size) for value in trainer.strategy.broadcast(own, src=rank)]
