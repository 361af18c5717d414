"""Refusing what cannot work, before the first batch, in words that say what to do.

Checks of a number let ``None`` pass, which stands for an argument that is off.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_grad.functional.choices import check_choice as check_choice

# Asked by name along the class hierarchy, so that both namespaces of Lightning and derived strategies are met.
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}

Number = TypeVar("Number", bound=float | None)

_LONGEST_NAME = 100  # bytes; file systems end at 255, and an epoch, a layer and an ending are added


def _checked(value: Number, parameter: str, wanted: str, holds: Callable[[float], bool]) -> Number:
    if value is not None and not holds(value):
        raise ValueError(f"{parameter} must be {wanted}; got {value}.")
    return value


def check_at_least(value: Number, least: float, parameter: str) -> Number:
    """Return a number that must be at least ``least``.

    Raises:
        ValueError: If it is smaller, or no number.
    """
    return _checked(value, parameter, f"at least {least}", lambda number: number >= least)


def check_count(value: Number, least: int, parameter: str) -> Number:
    """Return a count that must be at least ``least``. The annotation of the argument makes sure that it is whole.

    Raises:
        ValueError: If it is smaller.

    Example:
        >>> window = check_count(5, 1, "window")
    """
    return _checked(value, parameter, f"at least {least}, and whole", lambda number: number >= least)


def check_only_one(given: Mapping[str, Any], what: str) -> None:
    """Raise if more than one argument is given of several that exclude each other.

    Args:
        given: Arguments by name; ``None``, ``False`` and empty lists are not given.
        what: What both would do, for the error.

    Raises:
        ValueError: If there are two.

    Example:
        >>> check_only_one({"loss": 0, "loss_fn": len}, "say what is weighted")
        Traceback (most recent call last):
        ValueError: loss and loss_fn would both say what is weighted. Leave one of them out.
    """
    names = [name for name, value in given.items() if not (value is None or value is False or value == [])]
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} would both {what}. Leave one of them out.")


def check_above(value: Number, bound: float, parameter: str) -> Number:
    """Return a number that must be above ``bound``; infinity is.

    Raises:
        ValueError: If it is not, or no number.
    """
    return _checked(value, parameter, f"above {bound:g}", lambda number: number > bound)


def check_finite(value: Number, parameter: str) -> Number:
    """Return a number that must be finite.

    Raises:
        ValueError: If it is infinite, or no number.

    Example:
        >>> check_finite(float("inf"), "eta")
        Traceback (most recent call last):
        ValueError: eta must be finite; got inf.
    """
    return _checked(value, parameter, "finite", math.isfinite)


def check_finite_at_least(value: Number, least: float, parameter: str) -> Number:
    """Return a number that must be finite, and at least ``least``.

    Raises:
        ValueError: If it is not.
    """
    return check_finite(check_at_least(value, least, parameter), parameter)


def check_finite_above(value: Number, bound: float, parameter: str) -> Number:
    """Return a number that must be finite, and above ``bound``.

    Raises:
        ValueError: If it is not.
    """
    return check_finite(check_above(value, bound, parameter), parameter)


def check_count_between(value: Number, least: int, most: int, parameter: str) -> Number:
    """Return a count that must be in a range, its ends included.

    Raises:
        ValueError: If it is not.
    """
    return _checked(check_count(value, least, parameter), parameter, f"at most {most}", lambda number: number <= most)


def check_between(value: Number, least: float, most: float, parameter: str) -> Number:
    """Return a number that must be in a range, its ends included.

    Raises:
        ValueError: If it is outside, or no number.
    """
    return _checked(value, parameter, f"from {least:g} to {most:g}", lambda number: least <= number <= most)


def check_share(value: float, parameter: str) -> float:
    """Return a number that must be a share that leaves something: at least 0 and below 1.

    Raises:
        ValueError: If it is not.
    """
    return _checked(value, parameter, "at least 0 and below 1", lambda number: 0.0 <= number < 1.0)


def check_name(name: str | None) -> None:
    """Raise unless the name of an instance can be part of a log key and of a file's name; ``None`` can.

    Raises:
        ValueError: If it is empty or long, or has slashes or characters that cannot be printed.

    Example:
        >>> check_name("../../x")
        Traceback (most recent call last):
        ValueError: name must not contain slashes, because files and log keys are named after it; got '../../x'. Choose a \
short word.
    """
    if name is None:
        return
    fault = None
    if not name.strip():
        fault = "must not be empty"
    elif "/" in name or "\\" in name:
        fault = "must not contain slashes"
    elif not name.isprintable():
        fault = "must hold printable characters only"
    elif len(name.encode()) > _LONGEST_NAME:
        fault = f"must have at most {_LONGEST_NAME} bytes"
    if fault is not None:
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        raise ValueError(
            f"name {fault}, because files and log keys are named after it; got {shown!r}. Choose a short word."
        )


def is_sharded(trainer: pl.Trainer) -> bool:
    """Say whether the strategy shards parameters, so that its ranks must run the module together."""
    return not _SHARDED.isdisjoint(cls.__name__ for cls in type(trainer.strategy).__mro__)


def refuse_dataloader_iter(step: Callable[..., Any], technique: str) -> None:
    """Raise if a step gets its batch from the loader by itself.

    Raises:
        ValueError: If it has an argument ``dataloader_iter``.
    """
    if "dataloader_iter" in inspect.signature(step).parameters:
        name = getattr(step, "__name__", "the step")
        raise ValueError(
            f"{technique} needs the batch, and {name}(dataloader_iter) gets it by itself. Let it take batch and batch_idx."
        )


def warn_of_missing_momentum(trainer: pl.Trainer, technique: str, term: str) -> None:
    """Say so if the strategy has taken the momentum out of the optimizer: what is added to gradients now gets none.

    Args:
        trainer: Whose strategy is asked, once it is set up.
        technique: Who adds.
        term: What it adds.
    """
    if getattr(trainer.strategy, "gradient_holds_momentum", False):
        strategy = type(trainer.strategy).__name__
        rank_zero_warn(
            f"{technique} adds {term} after {strategy} has applied the momentum, so it gets none and acts 1 / (1 - momentum) "
            f"times weaker than without {strategy}. Make it stronger, or set {strategy}(correction='error_feedback')."
        )


def owned_ids(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer moves."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def keeps(optimizer: Optimizer, key: str) -> bool:
    """Return whether an optimizer, which has perhaps not stepped yet, keeps state of a name such as ``exp_avg_sq``."""
    number = torch.zeros(1, requires_grad=True)
    number.grad = torch.zeros(1)
    try:
        probe = type(optimizer)([number], **optimizer.defaults)
        probe.step()
    except Exception:  # an optimizer that cannot be built from its defaults tells nothing before its first step
        return True
    return key in probe.state[number]
