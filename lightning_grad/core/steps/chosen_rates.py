"""Scale learning rates of optimizers, and the schedulers that would otherwise undo it.

A scheduler that computes a rate from the last one keeps a scaled rate. One that computes it from a
base rate overwrites it, unless the base rate is scaled too. Base rates are in the parameter groups
(``initial_lr``; ``max_lr`` and ``min_lr`` of ``OneCycleLR``; ``swa_lr`` of ``SWALR``) and in the
schedulers (``base_lrs``, ``max_lrs``). Floors of schedulers (``eta_min``,
``ReduceLROnPlateau(min_lr=...)``) are not scaled.
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
            f"{needed_by}: {parameter} must hold indices below {count}, because {who_has} {count}; got "
            f"{list(indices)}. Remove {', '.join(map(str, outside))}."
        )


def base_rate(group: Mapping[str, Any], keys: Sequence[str] = ("max_lr", "initial_lr", "lr")) -> float:
    """Return the rate of a group under the first of the keys that it has.

    Example:
        >>> base_rate({"lr": 0.004, "initial_lr": 0.004, "max_lr": 0.1})
        0.1
    """
    return float(next((group[key] for key in keys if isinstance(group.get(key), (int, float, Tensor))), 0.0))


@torch.no_grad()
def scale_rates_(chosen: ChosenGroups, factor: float) -> None:
    """Multiply the current rates of groups; rates that are tensors are changed in place.

    Args:
        chosen: Optimizers, each with the indices of its groups.
        factor: Factor of the rates.

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
            # Several groups may share one tensor. It is scaled once, or replaced if a group that is
            # not chosen shares it.
            if not isinstance(rate, Tensor) or any(rate is other for other in others):
                group["lr"] = rate * factor
            elif id(rate) not in scaled:
                scaled.add(id(rate))
                rate.mul_(factor)


def scale_schedules_(chosen: ChosenGroups, schedulers: Iterable[Any], factor: float) -> None:
    """Multiply the base rates in groups and schedulers, so that schedules continue from the scaled rates.

    Call it after :func:`scale_rates_`, which has already scaled a base that is the same tensor as a
    rate. ``SequentialLR`` makes such bases before torch 2.10.

    Args:
        chosen: Optimizers, each with the indices of its groups.
        schedulers: Schedulers of the trainer, including those (``SequentialLR``,
            ``ChainedScheduler``) that step others.
        factor: Factor of the base rates.

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
    """Yield schedulers and the schedulers that they step, each once."""
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
            # A new list, because SequentialLR shares the _last_lr of the scheduler that it steps.
            of = scheduler.optimizer
            scaled = [_scaled(rate, factor, of) if index in indices else rate for index, rate in enumerate(rates)]
            setattr(scheduler, name, scaled)


def _scaled(base: Any, factor: float, optimizer: Optimizer) -> Any:
    if isinstance(base, Tensor) and any(base is group["lr"] for group in optimizer.param_groups):
        return base
    return base * factor if isinstance(base, (int, float, Tensor)) else base


def unknown_schedulers(schedulers: Iterable[Any]) -> list[str]:
    """Return the names of scheduler classes outside torch, whose base rates :func:`scale_schedules_` may not know.

    Subclasses of torch's schedulers are included: they have ``base_lrs``, but may compute rates
    from something else.
    """
    kinds = {type(scheduler) for scheduler in _flatten(schedulers)}
    return sorted({kind.__name__ for kind in kinds if not kind.__module__.startswith("torch.")})


def restore_initial_rates_(chosen: ChosenGroups) -> None:
    """Restore the rates that groups had before a scheduler was made, if a scheduler stored them."""
    for optimizer, indices in chosen:
        for index in indices:
            group = optimizer.param_groups[index]
            if "initial_lr" in group:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(float(group["initial_lr"]))
                else:
                    group["lr"] = float(group["initial_lr"])


class ChosenRates:
    """Rates of selected parameter groups, scaled by one common factor for the rest of the run.

    To multiply rates during one step only, use :meth:`OptimizerCallback.multiply_rates`.

    Args:
        optimizers: Indices of the optimizers, ``None`` for all.
        groups: Indices of their parameter groups, ``None`` for all.
        policy: "multiply": schedulers continue from the scaled rates. "replace": schedulers are
            turned off (by the technique).
        min_lr: Floor of the first group's rate.
        needed_by: Name of the technique, for errors.

    Attributes:
        scale: Product of all factors. A technique must save it and ``base``.
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
        """Return the optimizers, each with the indices of its groups.

        Raises:
            ValueError: If an optimizer or group does not exist, or a group has no learning rate.
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
                        f"{self._needed_by} scales learning rates, but group {index} of optimizer {number} "
                        f"({type(optimizers[number]).__name__}) has none: its lr is {groups[index].get('lr')!r}. "
                        "Choose others: optimizers=[...], param_groups=[...]."
                    )
            if indices:  # the mock optimizer that Lightning uses for none has no groups
                chosen.append((optimizers[number], indices))
        if not chosen:
            raise ValueError(
                f"{self._needed_by} scales learning rates, but configure_optimizers returns no optimizer. Return one, "
                "or drop the callback."
            )
        return chosen

    def names(self, trainer: pl.Trainer) -> list[str]:
        """Return the names of the groups, such as ``optimizers[0].param_groups[1]``."""
        at = {id(optimizer): index for index, optimizer in enumerate(trainer.optimizers)}
        chosen = self.groups(trainer)
        return [f"optimizers[{at[id(optimizer)]}].param_groups[{i}]" for optimizer, groups in chosen for i in groups]

    def first(self, trainer: pl.Trainer) -> float:
        """Return the rate of the first group."""
        optimizer, groups = self.groups(trainer)[0]
        return float(optimizer.param_groups[groups[0]]["lr"])

    def begin(self, trainer: pl.Trainer) -> None:
        """Store the base rate. Call it in ``on_train_start``, after the optimizers of a checkpoint are restored.

        If ``base`` is restored from a checkpoint, this does nothing: the rates in it are already
        scaled.
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
        """Multiply the rates, not below the floor; return True if they changed."""
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
    """Return indices as a plain list after checking them.

    Raises:
        ValueError: If the list is empty, or has a negative or duplicate index.
    """
    if given is None:
        return None
    indices = list(given)
    if not indices:
        raise ValueError(f"{parameter} must hold at least one index, or be None for all; got [].")
    for index in indices:
        check_count(index, 0, parameter)
    if len(set(indices)) < len(indices):
        raise ValueError(f"{parameter} must not hold an index twice; got {indices}.")
    return indices
