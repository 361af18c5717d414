"""What a new optimizer takes over from the parameter groups of another one.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

from collections.abc import Container, Mapping
from typing import Any

from torch.optim import Optimizer

_ALWAYS = ("params", "lr", "weight_decay")


def carried_group(
    group: Mapping[str, Any],
    old: Optimizer,
    same_class: bool,
    wd_factor: float,
    decay: float | None = None,
    given: Container[str] = (),
) -> dict[str, Any]:
    """Return what the group of a new optimizer starts from.

    It keeps the parameters, the rate, the decay, and every key that the old class does not define:
    names, tags, and what schedulers store. The options of the old class are dropped, unless the new
    class is the same.

    Args:
        group: Group of the old optimizer.
        old: The old optimizer.
        same_class: Whether the new optimizer has the same class.
        wd_factor: Factor of the decay.
        decay: Decay in place of the old one.
        given: Options of the new optimizer, which replace those of the group.

    Example:
        >>> import torch
        >>> old = torch.optim.AdamW([{"params": [torch.zeros(1)], "name": "head"}], lr=0.5)
        >>> kept = carried_group(old.param_groups[0], old, same_class=False, wd_factor=10.0)
        >>> {key: kept[key] for key in sorted(kept) if key != "params"}
        {'lr': 0.5, 'name': 'head', 'weight_decay': 0.1}
    """
    stays = {key for key in group if same_class or key in _ALWAYS or key not in old.defaults}
    kept = {key: value for key, value in group.items() if key in stays and key not in given}
    kept["weight_decay"] = group.get("weight_decay", 0.0) * wd_factor if decay is None else decay
    return kept


_MARKS: Mapping[str, str] = {"SPAM": "mask"}
"""Attributes that an optimizer sets on parameters and never reads."""


def forget_marks(optimizer: Optimizer) -> None:
    """Remove what an optimizer left on its parameters."""
    mark = _MARKS.get(type(optimizer).__name__)
    if mark is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                vars(parameter).pop(mark, None)


def carry_defaults_(new: Optimizer, old: Optimizer, lr_factor: float, wd_factor: float, decay: float | None) -> None:
    """Set the rate and the decay that groups added later get, for example by a callback that unfreezes layers."""
    if "weight_decay" in new.defaults:
        new.defaults["weight_decay"] = old.defaults.get("weight_decay", 0.0) * wd_factor if decay is None else decay
    else:  # a class without decay
        for group in new.param_groups:
            del group["weight_decay"]
    if "lr" in old.defaults:
        new.defaults["lr"] = old.defaults["lr"] * lr_factor
