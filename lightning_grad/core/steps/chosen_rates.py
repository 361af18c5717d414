"""Scaling learning rates of optimizers, together with the schedulers that would undo it.

A scheduler that computes a rate from the last one keeps a scaled rate; one that computes it from a base rate writes over
it, unless the base is scaled too. Base rates stand in the parameter groups (``initial_lr``; ``max_lr`` and ``min_lr`` of
``OneCycleLR``; ``swa_lr`` of ``SWALR``) and in the schedulers (``base_lrs``, ``max_lrs``). Floors of a schedule's own
(``eta_min``, ``ReduceLROnPlateau(min_lr=...)``) stay what they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.utilities.checks import check_count

ChosenGroups = Sequence[tuple[Optimizer, Sequence[int]]]

_BASES_OF_GROUPS = ("initial_lr", "max_lr", "min_lr", "swa_lr")
_LISTS_OF_SCHEDULERS = ("base_lrs", "max_lrs", "_last_lr")


def _check_range(indices: Sequence[int], count: int, needed_by: str, parameter: str, who_has: str) -> None:
    outside = [index for index in indices if not 0 <= index < count]
    if outside:
        raise ValueError(
            f"{needed_by}: {parameter}={list(indices)} counts from 0, and {who_has} {count}. Leave out "
            f"{', '.join(map(str, outside))}."
        )


def base_rate(group: Mapping[str, Any], keys: Sequence[str] = ("max_lr", "initial_lr", "lr")) -> float:
    """Return the first rate of a group that stands under one of the keys.

    Example:
        >>> base_rate({"lr": 0.004, "initial_lr": 0.004, "max_lr": 0.1})
        0.1
    """
    return float(next((group[key] for key in keys if isinstance(group.get(key), (int, float, Tensor))), 0.0))


@torch.no_grad()
def scale_rates_(chosen: ChosenGroups, factor: float) -> None:
    """Multiply the present rates of groups, those that are tensors in place.

    Args:
        chosen: Optimizers, each with the positions of its groups.
        factor: What they are multiplied by.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> scale_rates_([(optimizer, [0])], 0.5)
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """
    scaled: set[int] = set()
    for optimizer, indices in chosen:
        others = [group["lr"] for index, group in enumerate(optimizer.param_groups) if index not in indices]
        for index in indices:
            group = optimizer.param_groups[index]
            rate = group["lr"]
            # Groups made from one tensor share it: it is scaled once, and not at all for those that are not meant.
            if not isinstance(rate, Tensor) or any(rate is other for other in others):
                group["lr"] = rate * factor
            elif id(rate) not in scaled:
                scaled.add(id(rate))
                rate.mul_(factor)


def scale_schedules_(chosen: ChosenGroups, schedulers: Iterable[Any], factor: float) -> None:
    """Multiply the base rates of groups, and those that their schedulers keep, so that schedules go on from scaled rates.

    To be called after :func:`scale_rates_`: a base that is the very tensor of a rate has been scaled with it. ``SequentialLR``
    makes such bases before torch 2.10.

    Args:
        chosen: Optimizers, each with the positions of its groups.
        schedulers: Of the trainer; those that step others (``SequentialLR``, ``ChainedScheduler``) stand for them.
        factor: What they are multiplied by.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        >>> scale_rates_([(optimizer, [0])], 0.5)
        >>> scale_schedules_([(optimizer, [0])], [scheduler], 0.5)
        >>> optimizer.step()
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """
    nested = list(_flatten(schedulers))
    for optimizer, indices in chosen:
        for index in indices:
            group = optimizer.param_groups[index]
            group.update({key: _scaled(group[key], factor, optimizer) for key in _BASES_OF_GROUPS if key in group})
        for scheduler in nested:
            if getattr(scheduler, "optimizer", None) is optimizer:
                _scale_lists(scheduler, set(indices), factor)


def _flatten(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield schedulers and those that they step, each once."""
    seen: list[Any] = []
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop(0)
        if not any(scheduler is other for other in seen):
            seen.append(scheduler)
            waiting.extend(getattr(scheduler, "_schedulers", ()))
            yield scheduler


def _scale_lists(scheduler: Any, indices: set[int], factor: float) -> None:
    for name in _LISTS_OF_SCHEDULERS:
        rates = getattr(scheduler, name, None)
        if isinstance(rates, (list, tuple)):
            # A new list: SequentialLR shows the very _last_lr of the one that it steps.
            of = scheduler.optimizer
            scaled = [_scaled(rate, factor, of) if index in indices else rate for index, rate in enumerate(rates)]
            setattr(scheduler, name, scaled)


def _scaled(base: Any, factor: float, optimizer: Optimizer) -> Any:
    if isinstance(base, Tensor) and any(base is group["lr"] for group in optimizer.param_groups):
        return base
    return base * factor if isinstance(base, (int, float, Tensor)) else base


def unknown_schedulers(schedulers: Iterable[Any]) -> list[str]:
    """Return the names of classes that torch does not define: :func:`scale_schedules_` may not know their base rates.

    Those derived from torch's are among them. They have ``base_lrs``, and may still compute rates from something else.
    """
    kinds = {type(scheduler) for scheduler in _flatten(schedulers)}
    return sorted({kind.__name__ for kind in kinds if not kind.__module__.startswith("torch.")})


def restore_initial_rates_(chosen: ChosenGroups) -> None:
    """Set the rates of groups back to those before any scheduler was made, where a scheduler has kept them."""
    for optimizer, indices in chosen:
        for index in indices:
            group = optimizer.param_groups[index]
            if "initial_lr" in group:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(float(group["initial_lr"]))
                else:
                    group["lr"] = float(group["initial_lr"])


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
            ValueError: If there is no such optimizer or group, or if one of the groups has no learning rate.
        """
        optimizers = trainer.optimizers
        numbers = list(range(len(optimizers))) if self._optimizers is None else self._optimizers
        _check_range(numbers, len(optimizers), self._needed_by, "optimizers", "the module has")
        chosen = []
        for number in numbers:
            groups = optimizers[number].param_groups
            indices = list(range(len(groups)) if self._groups is None else self._groups)
            _check_range(indices, len(groups), self._needed_by, "param_groups", f"optimizer {number} has")
            for index in indices:
                if not isinstance(groups[index].get("lr"), (int, float, Tensor)):
                    raise ValueError(
                        f"{self._needed_by} scales learning rates, and group {index} of optimizer {number} "
                        f"({type(optimizers[number]).__name__}) has none: its lr is {groups[index].get('lr')!r}. Choose "
                        "others: optimizers=[...], param_groups=[...]."
                    )
            if indices:  # Lightning's stand-in for no optimizer has no groups
                chosen.append((optimizers[number], indices))
        if not chosen:
            raise ValueError(
                f"{self._needed_by} scales learning rates, and configure_optimizers of the module returns no optimizer. "
                "Return one, or drop the callback."
            )
        return chosen

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

    def multiply(self, trainer: pl.Trainer, factor: float) -> bool:
        """Multiply the rates, below 1 as far as the floor allows, and say whether that changed them."""
        target = self.scale * factor
        floor = min(1.0, self._min_lr / self.base) if self.base else 0.0
        scale = target if factor > 1.0 else max(target, floor)
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
