"""Keeps SGD from applying momentum and weight decay to compressed parameters, during its update only.

Used by ``dgc.py``. The compressor of each rank already applies momentum to the gradient, so the optimizer must not
apply it again. Weight decay is the same on all ranks, needs no communication, and keeps its own momentum here.
Momentum is linear, so both parts together equal SGD's own update. The param groups keep their values: schedulers,
monitors, hooks and checkpoints see the user's momentum and weight decay.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_grad.strategies._split_groups import Group, SplitGroups, updates_like

_BUFFER = "momentum_buffer"


class LocalMomentum(SplitGroups):
    """Makes an SGD skip the momentum of some parameters during its updates.

    During an update, ``optimizer.param_groups`` is a list of modified copies. The ``momentum_buffer`` of a compressed
    parameter holds the momentum of its weight decay, and what an earlier run without compression left there; both
    decay and are applied as usual.

    Args:
        optimizer: The SGD.
        compressed: ``id`` of each parameter whose gradient already includes momentum.
    """

    def __init__(self, optimizer: SGD, compressed: Collection[int]) -> None:
        super().__init__(optimizer)
        self._compressed = compressed

    def of(self, parameter: Tensor) -> tuple[float, bool]:
        """Return the current momentum of a parameter's group, and whether it uses Nesterov momentum."""
        group = self.group_of(parameter)
        return (0.0, False) if group is None else (float(group["momentum"]), bool(group["nesterov"]))

    @override
    def split(self, groups: list[Group]) -> list[Group]:
        """Split each group in two; the group of compressed parameters has no momentum and no weight decay."""
        changed: list[Group] = []
        for group in groups:
            mine = [parameter for parameter in group["params"] if id(parameter) in self._compressed]
            if not mine or group["momentum"] == 0:
                changed.append(group)
                continue
            self._apply_decay_(group, [parameter for parameter in mine if parameter.grad is not None])
            others = [parameter for parameter in group["params"] if id(parameter) not in self._compressed]
            off = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
            changed += [{**group, "params": others}, {**group, **off, "params": mine}]
        return changed

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
    if not updates_like(optimizer, SGD):
        return f"{type(optimizer).__name__} is not torch.optim.SGD"
    dampening = max(group["dampening"] for group in optimizer.param_groups)
    return f"this SGD has dampening={dampening}, which the compressor cannot apply" if dampening else ""
