"""Makes Adam update some parameters with a frozen variance. Used by ``onebit_adam.py``.

Adam itself would add the square of the exchanged gradient to the variance: a gradient that comes from signs is as large
in every entry, so the variance would forget the scale of each. The state stays under Adam's own keys, and the param groups
keep their values, so checkpoints, schedulers and callbacks see an ordinary Adam.
"""

from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from typing_extensions import override

from lightning_grad.functional import frozen_adam_
from lightning_grad.strategies._split_groups import Group, SplitGroups, updates_like

_MOMENTUM, _VARIANCES = "exp_avg", ("exp_avg_sq", "max_exp_avg_sq")


class FrozenAdam(SplitGroups):
    """Updates the parameters in ``frozen`` without changing their variance, and hides them from Adam's own update.

    Args:
        optimizer: Adam or AdamW.
        floor: Least variance of an entry, as a share of the mean of its tensor.

    Attributes:
        frozen: ``id`` of each parameter that updates treat this way until the next exchange.
    """

    def __init__(self, optimizer: Optimizer, floor: float) -> None:
        super().__init__(optimizer)
        self.frozen: set[int] = set()
        self._floor = floor
        self._updates: dict[int, int] = {}

    def is_of(self, optimizer: Optimizer) -> bool:
        """Return whether this is the optimizer that it updates for."""
        return optimizer is self._optimizer

    def updates(self, parameter: Tensor) -> int:
        """Return how many times Adam has updated a parameter; reads the device once a fit at most."""
        known = self._updates.get(id(parameter))
        if known is None:
            state = self._optimizer.state.get(parameter, {})
            known = self._updates[id(parameter)] = int(_on_host(state["step"])) if _MOMENTUM in state else 0
        return known

    def has_variance(self, parameter: Tensor) -> bool:
        """Return whether the variance of a parameter is above zero anywhere; reads the device."""
        found = self._optimizer.state[parameter][_VARIANCES[0]].any()
        return bool(found.numpy() if found.is_cpu else found)  # numpy() of a CPU tensor is no sync

    def momentum(self, parameter: Tensor) -> tuple[Tensor, float]:
        """Return Adam's momentum of a parameter, as one of gradients that are to be minimized, and its decay."""
        group = self.group_of(parameter)
        assert group is not None
        momentum: Tensor = self._optimizer.state[parameter][_MOMENTUM]
        return -momentum if group["maximize"] else momentum, float(group["betas"][0])

    @override
    def split(self, groups: list[Group]) -> list[Group]:
        changed: list[Group] = []
        for group in groups:
            mine = [parameter for parameter in group["params"] if id(parameter) in self.frozen]
            others = [parameter for parameter in group["params"] if id(parameter) not in self.frozen]
            for parameter in mine:
                if parameter.grad is not None:
                    self._update(parameter, -parameter.grad if group["maximize"] else parameter.grad, group)
            for parameter in others:
                if parameter.grad is not None:
                    self._updates[id(parameter)] = self.updates(parameter) + 1
            changed.append({**group, "params": others} if mine else group)
        return changed

    def _update(self, parameter: Tensor, gradient: Tensor, group: Group) -> None:
        state = self._optimizer.state[parameter]
        state["step"] += 1
        step = _on_host(state["step"])
        frozen_adam_(
            parameter,
            gradient,
            state[_MOMENTUM],
            [state[key] for key in _VARIANCES if key in state],
            step,
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            _is_decoupled(self._optimizer, group),
            self._floor,
        )


def _on_host(step: Any) -> Any:
    """Return a count as a number, or as a double tensor if it is not on the host."""
    if not isinstance(step, Tensor):
        return step
    return float(step.numpy()) if step.is_cpu else step.double()  # numpy() of a CPU tensor is no sync


def _is_decoupled(optimizer: Optimizer, group: Group) -> bool:
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay", False))


def why_not_frozen(optimizer: Optimizer) -> str:
    """Return why the variance of an optimizer cannot be frozen, or an empty string."""
    if not updates_like(optimizer, Adam, AdamW):
        return f"{type(optimizer).__name__} is not torch.optim.Adam or AdamW"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return f"this {type(optimizer).__name__} has differentiable=True"
    return ""
