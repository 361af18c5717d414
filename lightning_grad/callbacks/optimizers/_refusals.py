"""Optimizers that cannot be replaced, and optimizers that cannot replace others.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_grad.callbacks.optimizers._names import Make
from lightning_grad.callbacks.optimizers._options import class_of, given_value, name_of

_NOT_REPLACED: Mapping[str, str] = {  # by class name, because derived classes count too
    "LBFGS": "LBFGS evaluates the closure many times a step, so its learning rate says nothing about another optimizer",
    "ZeroRedundancyOptimizer": "ZeroRedundancyOptimizer splits the state of an inner optimizer over the ranks",
}
_NEEDS_GPU = ("apex", "transformer_engine")


def refuse_old(display_name: str, index: int, old: Optimizer) -> None:
    """Raise if an optimizer of the module cannot be replaced.

    Raises:
        ValueError: With the reason.
    """
    names = [cls.__name__ for cls in type(old).__mro__]
    if "_MockOptimizer" in names:
        raise ValueError(
            f"{display_name} replaces an optimizer, but configure_optimizers returns none. Return one, or drop the "
            "callback."
        )
    reason = next((_NOT_REPLACED[name] for name in names if name in _NOT_REPLACED), None)
    if reason is None and "param_groups" not in vars(old):
        reason = f"{names[0]} wraps another optimizer, which holds the parameter groups"
    if reason is None and not all(isinstance(group.get("lr"), (int, float, Tensor)) for group in old.param_groups):
        reason = f"the groups of {names[0]} have no learning rate that another optimizer could take over"
    if reason is not None:
        raise ValueError(
            f"{display_name} cannot replace optimizers[{index}]: {reason}. Return a plain optimizer, such as "
            "torch.optim.AdamW, from configure_optimizers, or skip this one with which=[...]."
        )


def refuse_new(display_name: str, make: Make, old: Optimizer) -> None:
    """Raise if a class cannot move the parameters of an optimizer.

    Raises:
        ValueError: With the reason.
    """
    kind, name = class_of(make), name_of(make)
    parameters = [parameter for group in old.param_groups for parameter in group["params"]]
    if name == "LBFGS":
        raise ValueError(
            f"{display_name} cannot use LBFGS, which takes one parameter group and no decay. Return it from "
            "configure_optimizers instead."
        )
    package = getattr(kind, "__module__", "").partition(".")[0]
    if package in _NEEDS_GPU and any(parameter.device.type == "cpu" for parameter in parameters):
        raise ValueError(
            f"{display_name} cannot use {name}: {package} needs parameters on a GPU, and these are on the CPU. Train "
            "with accelerator='gpu', or use another optimizer."
        )
    rates = dict.fromkeys(float(group["lr"]) for group in old.param_groups)
    if name == "Prodigy" and len(rates) > 1:
        raise ValueError(
            f"{display_name} cannot use {name}, which moves all groups by the learning rate of the first one, for groups "
            f"with learning rates {', '.join(f'{rate:g}' for rate in rates)}. Give all groups one learning rate, or use "
            "another optimizer."
        )


def refuse_scheduler(display_name: str, schedulers: Iterable[Any], old: Optimizer) -> None:
    """Raise if the rates of a scheduler cannot be scaled.

    Raises:
        ValueError: If it keeps them in a form of its own, or an earlier fit scaled them.
    """
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is old and _differ(scheduler, old):
            raise ValueError(
                f"{display_name} would multiply the base rates of {type(scheduler).__name__} again, which an earlier fit "
                "changed. Create the optimizer and its schedulers in configure_optimizers, so each fit has new ones."
            )
        if not isinstance(scheduler, LRScheduler) and any(value is old for value in vars(scheduler).values()):
            raise ValueError(
                f"{display_name} cannot multiply the rates of {type(scheduler).__name__}, which is not derived from a "
                "scheduler of torch. Set the rates of the new optimizer in the module, and lr_factor=1.0."
            )


def _differ(scheduler: Any, optimizer: Optimizer) -> bool:
    """Return True if the base rates of a scheduler are no longer those in the groups."""
    pairs = zip(getattr(scheduler, "base_lrs", ()), optimizer.param_groups, strict=False)
    return any(float(base) != float(group["initial_lr"]) for base, group in pairs if "initial_lr" in group)


def refuse_wrong_groups(display_name: str, new: object, old: Optimizer) -> None:
    """Raise unless a callable returned an optimizer with the groups that it was given.

    Raises:
        TypeError: If it returned something else.
        ValueError: If it changed the groups.
    """
    if not isinstance(new, Optimizer):
        raise TypeError(f"{display_name}: optimizer must return a torch.optim.Optimizer; got {type(new).__name__}.")
    given = [[id(parameter) for parameter in group["params"]] for group in old.param_groups]
    if [[id(parameter) for parameter in group["params"]] for group in vars(new).get("param_groups", [])] != given:
        raise ValueError(
            f"{display_name}: {type(new).__name__} must have the parameter groups that it is given, because schedulers "
            "count them. Use an optimizer that wraps no other and splits no group."
        )


def refuse_one_decay(display_name: str, decay: float | None, old: Optimizer) -> None:
    """Raise if one weight decay would replace several different ones.

    Raises:
        ValueError: With the decays of the groups.
    """
    decays = dict.fromkeys(group.get("weight_decay", 0.0) for group in old.param_groups)
    if decay is not None and len(decays) > 1:
        raise ValueError(
            f"{display_name}: options must not hold 'weight_decay', because the groups have different decays: "
            f"{', '.join(f'{each:g}' for each in decays)}. Set wd_factor, which multiplies each."
        )


def refuse_own_values(display_name: str, make: Make, new: Optimizer) -> None:
    """Raise if a callable sets a learning rate or weight decay, which the groups would hide.

    Raises:
        ValueError: With the value.
    """
    for name, word, factor in (("lr", "learning rate", "lr"), ("weight_decay", "weight decay", "wd")):
        value = None if isinstance(make, type) else given_value(new, name)
        if value is not None:
            raise ValueError(
                f"{display_name}: optimizer must not set a {word}, because each parameter group keeps its own; got "
                f"{name}={value}. Remove it, and set {factor}_factor, which multiplies those of the groups."
            )
