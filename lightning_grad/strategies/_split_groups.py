"""Lets an optimizer see other parameter groups during its update, and its own at all other times.

Used by ``_local_momentum.py`` and ``_frozen_adam.py``.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.core.undo import UndoList

Group = dict[str, Any]


class SplitGroups(ABC):
    """Replaces the groups of an optimizer between the end of its closure and the end of its step.

    A pre-hook of the step wraps the user's closure, because the closure ends after everything that Lightning does
    before an update. A post-hook, which runs before all others, restores the groups.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._own_groups: list[Group] | None = None
        self._groups: dict[int, Group] = {}

    def attach(self, undo: UndoList) -> None:
        """Register the hooks and push their removal to ``undo``."""
        undo.push(self._optimizer.register_step_pre_hook(self._before_step).remove)
        after = self._optimizer.register_step_post_hook(lambda *_: self.give_back())
        self._optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        undo.push(after.remove)
        undo.push(self.give_back)

    def group_of(self, parameter: Tensor) -> Group | None:
        """Return the current group of a parameter, or ``None`` if the optimizer does not hold it (yet)."""
        if id(parameter) not in self._groups:
            groups = self._optimizer.param_groups
            self._groups = {id(member): group for group in groups for member in group["params"]}
        return self._groups.get(id(parameter))

    @abstractmethod
    def split(self, groups: list[Group]) -> list[Group]:
        """Return the groups that the optimizer sees in this update; called once the gradients are final."""

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._groups = {}  # a checkpoint or a callback may have replaced the groups

        def closure_then_take() -> Any:
            loss = None if closure is None else closure()
            self._take()
            return loss

        return (args[0],), {**kwargs, "closure": closure_then_take}

    @torch.no_grad()
    def _take(self) -> None:
        groups = self._optimizer.param_groups
        changed = self.split(groups)
        self._own_groups, self._optimizer.param_groups = groups, changed

    def give_back(self) -> None:
        """Restore the optimizer's own groups if they are replaced."""
        if self._own_groups is not None:
            self._optimizer.param_groups, self._own_groups = self._own_groups, None


def updates_like(optimizer: Optimizer, *kinds: type[Optimizer]) -> bool:
    """Return whether an optimizer is of one of these classes, or of a subclass that keeps its ``step``."""
    step = _as_written(type(optimizer).step)
    return any(isinstance(optimizer, kind) and step is _as_written(kind.step) for kind in kinds)


def _as_written(step: Any) -> Any:
    # torch wraps the step of a class at its first instance, also where a subclass inherits it.
    return step.__wrapped__ if getattr(step, "hooked", False) else step
