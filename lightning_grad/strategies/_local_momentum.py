"""Keeps SGD from applying momentum and weight decay to compressed parameters, during its update only.

Used by ``dgc.py``. The compressor of each rank already applies momentum to the gradient, so the optimizer must not
apply it again. Weight decay is the same on all ranks, needs no communication, and keeps its own momentum here.
Momentum is linear, so both parts together equal SGD's own update. The param groups keep their values: schedulers,
monitors, hooks and checkpoints see the user's momentum and weight decay.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_grad.core.undo import UndoList

_BUFFER = "momentum_buffer"


class LocalMomentum:
    """Makes an SGD skip the momentum of some parameters during its updates.

    A pre-hook of the step wraps the user's closure, because the closure ends after everything that Lightning does
    before an update. A post-hook, which runs before all others, restores the groups. In between,
    ``optimizer.param_groups`` is a list of modified copies. The ``momentum_buffer`` of a compressed parameter holds
    the momentum of its weight decay, and what an earlier run without compression left there; both decay and are
    applied as usual.

    Args:
        optimizer: The SGD.
        compressed: ``id`` of each parameter whose gradient already includes momentum.
    """

    def __init__(self, optimizer: SGD, compressed: Collection[int]) -> None:
        self._optimizer = optimizer
        self._compressed = compressed
        self._own_groups: list[dict[str, Any]] | None = None
        self._groups: dict[int, dict[str, Any]] = {}

    def attach(self, undo: UndoList) -> None:
        """Register the hooks and push their removal to ``undo``."""
        undo.push(self._optimizer.register_step_pre_hook(self._before_step).remove)
        after = self._optimizer.register_step_post_hook(lambda *_: self.give_back())
        self._optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        undo.push(after.remove)
        undo.push(self.give_back)

    def of(self, parameter: Tensor) -> tuple[float, bool]:
        """Return the current momentum of a parameter's group, and whether it uses Nesterov momentum."""
        if id(parameter) not in self._groups:
            groups = self._optimizer.param_groups
            self._groups = {id(member): group for group in groups for member in group["params"]}
        group = self._groups.get(id(parameter))  # None if no optimizer holds it (yet)
        return (0.0, False) if group is None else (float(group["momentum"]), bool(group["nesterov"]))

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
        """Split each group in two; the group of compressed parameters has no momentum and no weight decay."""
        groups = self._optimizer.param_groups
        changed: list[dict[str, Any]] = []
        for group in groups:
            mine = [parameter for parameter in group["params"] if id(parameter) in self._compressed]
            if not mine or group["momentum"] == 0:
                changed.append(group)
                continue
            self._apply_decay_(group, [parameter for parameter in mine if parameter.grad is not None])
            others = [parameter for parameter in group["params"] if id(parameter) not in self._compressed]
            off = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
            changed += [{**group, "params": others}, {**group, **off, "params": mine}]
        self._own_groups, self._optimizer.param_groups = groups, changed

    def give_back(self) -> None:
        """Restore the optimizer's own groups if they are replaced."""
        if self._own_groups is not None:
            self._optimizer.param_groups, self._own_groups = self._own_groups, None

    def _apply_decay_(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters like SGD with a gradient that consists of weight decay alone."""
        momentum, decay, rate = group["momentum"], group["weight_decay"], group["lr"]
        for parameter in parameters:
            buffer = self._optimizer.state.get(parameter, {}).get(_BUFFER)
            if decay == 0 and buffer is None:
                continue
            force = parameter * decay
            if buffer is None:
                buffer = self._optimizer.state[parameter][_BUFFER] = force.clone()
            else:
                buffer.mul_(momentum).add_(force)
            parameter.sub_((force.add_(buffer, alpha=momentum) if group["nesterov"] else buffer) * rate)


def why_not_moved(optimizer: Optimizer) -> str:
    """Return why the momentum of an optimizer cannot move into the compressor, or an empty string."""
    if not isinstance(optimizer, SGD) or type(optimizer).step is not SGD.step:
        return f"{type(optimizer).__name__} is not torch.optim.SGD"
    dampening = max(group["dampening"] for group in optimizer.param_groups)
    return f"this SGD has dampening={dampening}, which the compressor cannot apply" if dampening else ""
