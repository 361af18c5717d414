"""Learning rates that a technique scales for the rest of the run: which they are, by how much, and how far down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_grad.core.learning_rates import (
    base_rate,
    choose_groups,
    restore_initial_rates_,
    scale_rates_,
    scale_schedules_,
)
from lightning_grad.utilities.checks import check_count


class ChosenRates:
    """Rates of some parameter groups, with one scale for all, that schedulers go on from.

    For rates that are multiplied for the length of a step there are the rates held by ``OptimizerCallback``.

    Args:
        optimizers: Which optimizers', ``None`` for all.
        groups: Which groups of them, ``None`` for all.
        policy: Whether schedulers go on from what is scaled, or do not act (which the technique sees to).
        min_lr: Floor of the first group's rate.
        needed_by: Who asks, for errors.

    Attributes:
        scale: Product of all factors; what a state must hold, with the base.
        base: Rate of the first group before any factor; ``None`` until the rates are known.
    """

    def __init__(
        self,
        optimizers: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        policy: Literal["multiply", "replace"] = "multiply",
        min_lr: float = 0.0,
        needed_by: str = "ChosenRates",
    ) -> None:
        self._optimizers = optimizers
        self._groups = groups
        self._policy = policy
        self._min_lr = min_lr
        self._needed_by = needed_by
        self.scale = 1.0
        self.base: float | None = None

    def groups(self, trainer: pl.Trainer) -> list[tuple[Optimizer, list[int]]]:
        """Return the optimizers, each with the positions of its groups.

        Raises:
            ValueError: If there is none such, or it has no rate.
        """
        return choose_groups(trainer.optimizers, self._optimizers, self._groups, self._needed_by)

    def names(self, trainer: pl.Trainer) -> list[str]:
        """Return where the rates stand, as one would write it."""
        at = {id(optimizer): index for index, optimizer in enumerate(trainer.optimizers)}
        chosen = self.groups(trainer)
        return [f"optimizers[{at[id(optimizer)]}].param_groups[{i}]" for optimizer, groups in chosen for i in groups]

    def first(self, trainer: pl.Trainer) -> float:
        """Return the rate of the first group."""
        optimizer, groups = self.groups(trainer)[0]
        return float(optimizer.param_groups[groups[0]]["lr"])

    def begin(self, trainer: pl.Trainer) -> None:
        """Note the rate before any factor, in ``on_train_start``, when the optimizers of a checkpoint are restored.

        Rates from a checkpoint that has it are as they should be.
        """
        if self.base is not None:
            return
        chosen = self.groups(trainer)
        if self._policy == "replace":
            restore_initial_rates_([(optimizer, range(len(optimizer.param_groups))) for optimizer, _ in chosen])
        optimizer, groups = chosen[0]
        keys = ("lr",) if self._policy == "replace" else ("max_lr", "initial_lr", "lr")
        self.base = base_rate(optimizer.param_groups[groups[0]], keys)

    @property
    def _floor(self) -> float:
        """Least scale."""
        return min(1.0, self._min_lr / self.base) if self.base else 0.0

    def multiply(self, trainer: pl.Trainer, factor: float) -> bool:
        """Multiply the rates, below 1 as far as the floor allows, and say whether that changed them."""
        target = self.scale * factor
        scale = target if factor > 1.0 else max(target, self._floor)
        if scale == self.scale or (factor < 1.0 and scale > self.scale):
            return False
        factor = factor if scale == target else scale / self.scale
        self.scale = scale
        chosen = self.groups(trainer)
        scale_rates_(chosen, factor)
        if self._policy == "multiply":
            scale_schedules_(chosen, [config.scheduler for config in trainer.lr_scheduler_configs], factor)
        return True


def as_indices(given: Sequence[int] | None, parameter: str) -> list[int] | None:
    """Return positions in plain types, each checked.

    Raises:
        ValueError: If there is none, one is negative, or one comes twice.
    """
    if given is None:
        return None
    indices = list(given)
    if not indices:
        raise ValueError(f"{parameter} must name at least one by its position, from 0, or be None for all; got none.")
    for index in indices:
        check_count(index, 0, parameter)
    if len(set(indices)) < len(indices):
        raise ValueError(f"{parameter} must name each once; got {indices}.")
    return indices
