"""Checks that raise before the first batch, with errors that say what to do.

Checks of numbers accept ``None``, which means that the argument is off.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_grad.functional.choices import check_choice as check_choice

# Compared by class name along the MRO, which covers both namespaces of Lightning and derived strategies.
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}

Number = TypeVar("Number", bound=float | None)

_LONGEST_NAME = 100  # bytes; file systems allow 255, and an epoch, a layer and a suffix are added


def _checked(value: Number, parameter: str, wanted: str, holds: Callable[[float], bool]) -> Number:
    if value is not None and not holds(value):
        raise ValueError(f"{parameter} must be {wanted}; got {value}.")
    return value


def check_at_least(value: Number, least: float, parameter: str) -> Number:
    """Check that a number is at least ``least``, and return it.

    Raises:
        ValueError: If it is smaller, or NaN.
    """
    return _checked(value, parameter, f"at least {least}", lambda number: number >= least)


def check_count(value: Number, least: int, parameter: str) -> Number:
    """Check that a count is at least ``least``, and return it. The argument's annotation ensures an integer.

    Raises:
        ValueError: If it is smaller.

    Example:
        >>> window = check_count(5, 1, "window")
    """
    return _checked(value, parameter, f"at least {least}", lambda number: number >= least)


def check_only_one(given: Mapping[str, Any], what: str) -> None:
    """Raise if more than one of several mutually exclusive arguments is set.

    Args:
        given: Arguments by name; ``None``, ``False`` and empty lists count as not set.
        what: What both arguments would do, for the error message.

    Raises:
        ValueError: If two or more are set.

    Example:
        >>> check_only_one({"loss_index": 0, "loss_fn": len}, "choose the loss")
        Traceback (most recent call last):
        ValueError: loss_index and loss_fn would both choose the loss. Set only one of them.
    """
    names = [name for name, value in given.items() if not (value is None or value is False or value == [])]
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} would both {what}. Set only one of them.")


def check_above(value: Number, bound: float, parameter: str) -> Number:
    """Check that a number is above ``bound``, and return it; infinity is accepted.

    Raises:
        ValueError: If it is not above the bound, or NaN.
    """
    return _checked(value, parameter, f"above {bound:g}", lambda number: number > bound)


def check_finite(value: Number, parameter: str) -> Number:
    """Check that a number is finite, and return it.

    Raises:
        ValueError: If it is infinite or NaN.

    Example:
        >>> check_finite(float("inf"), "eta")
        Traceback (most recent call last):
        ValueError: eta must be finite; got inf.
    """
    return _checked(value, parameter, "finite", math.isfinite)


def check_finite_at_least(value: Number, least: float, parameter: str) -> Number:
    """Check that a number is finite and at least ``least``, and return it.

    Raises:
        ValueError: If it is not.
    """
    return check_finite(check_at_least(value, least, parameter), parameter)


def check_finite_above(value: Number, bound: float, parameter: str) -> Number:
    """Check that a number is finite and above ``bound``, and return it.

    Raises:
        ValueError: If it is not.
    """
    return check_finite(check_above(value, bound, parameter), parameter)


def check_count_between(value: Number, least: int, most: int, parameter: str) -> Number:
    """Check that a count is in a range, including its ends, and return it.

    Raises:
        ValueError: If it is not.
    """
    return _checked(check_count(value, least, parameter), parameter, f"at most {most}", lambda number: number <= most)


def check_between(value: Number, least: float, most: float, parameter: str) -> Number:
    """Check that a number is in a range, including its ends, and return it.

    Raises:
        ValueError: If it is outside, or NaN.
    """
    return _checked(value, parameter, f"from {least:g} to {most:g}", lambda number: least <= number <= most)


def check_share(value: float, parameter: str) -> float:
    """Check that a number is at least 0 and below 1, and return it.

    Raises:
        ValueError: If it is not.
    """
    return _checked(value, parameter, "at least 0 and below 1", lambda number: 0.0 <= number < 1.0)


def check_ratio(value: float, parameter: str) -> float:
    """Check that a number is a share of entries, above 0 and at most 1, and return it.

    Raises:
        ValueError: If it is not.
    """
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{parameter} must be a share of entries, above 0 and at most 1; got {value!r}.")
    return float(value)


def check_name(name: str | None) -> None:
    """Raise unless the name of an instance is valid in log keys and file names; ``None`` is valid.

    Raises:
        ValueError: If it is empty or too long, or contains slashes or unprintable characters.

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
        fault = "must contain only printable characters"
    elif len(name.encode()) > _LONGEST_NAME:
        fault = f"must have at most {_LONGEST_NAME} bytes"
    if fault is not None:
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        raise ValueError(
            f"name {fault}, because files and log keys are named after it; got {shown!r}. Choose a short word."
        )


def is_sharded(trainer: pl.Trainer) -> bool:
    """Return True if the strategy shards parameters, so all ranks must run the module together."""
    return not _SHARDED.isdisjoint(cls.__name__ for cls in type(trainer.strategy).__mro__)


def refuse_dataloader_iter(step: Callable[..., Any], technique: str) -> None:
    """Raise if a step fetches its own batches.

    Raises:
        ValueError: If it has an argument ``dataloader_iter``.
    """
    if "dataloader_iter" in inspect.signature(step).parameters:
        name = getattr(step, "__name__", "the step")
        raise ValueError(
            f"{technique} needs the batch, but {name}(dataloader_iter) fetches it itself. Change its arguments to "
            "batch and batch_idx."
        )


def warn_of_missing_momentum(trainer: pl.Trainer, technique: str, term: str) -> None:
    """Warn if the strategy applies the momentum itself: terms that callbacks add to gradients then get none.

    Args:
        trainer: The trainer, with its strategy set up.
        technique: Name of the technique that adds a term.
        term: The term, for the warning.
    """
    if getattr(trainer.strategy, "gradient_holds_momentum", False):
        strategy = type(trainer.strategy).__name__
        rank_zero_warn(
            f"{technique} adds {term} after {strategy} has applied the momentum, so the term gets no momentum and is "
            "weaker by a factor of 1 / (1 - momentum). Make it stronger, or set "
            f"{strategy}(correction='error_feedback')."
        )


def owned_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters of an optimizer."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def lacking(optimizer: Optimizer, key: str) -> str:
    """Return the class of an optimizer that does not keep a state such as ``exp_avg_sq``, even before its first step.

    Of an optimizer with parts, it is the class of the first part that does not. Empty if all keep it.

    Example:
        >>> lacking(torch.optim.SGD([torch.zeros(1)]), "exp_avg_sq")
        'SGD'
    """
    parts = getattr(optimizer, "parts", [optimizer])
    return next((type(part).__name__ for part in parts if not _keeps(part, key)), "")


def refuse_projected_moments(needed_by: str, optimizer: Optimizer, way_out: str) -> None:
    """Raise if an optimizer, or a part of it, keeps moments that do not belong to single entries of its parameters.

    Args:
        needed_by: Name of the technique that compares entries with their moments.
        optimizer: The optimizer. Its class says so by ``moments_of_entries = False``.
        way_out: What to do, as an imperative.

    Raises:
        ValueError: Names the class.
    """
    for part in getattr(optimizer, "parts", [optimizer]):
        if not getattr(part, "moments_of_entries", True):
            raise ValueError(
                f"{needed_by} needs a second moment (exp_avg_sq) of each entry, and {type(part).__name__} keeps moments of "
                f"a part of the gradient. {way_out}."
            )


def _keeps(optimizer: Optimizer, key: str) -> bool:
    number = torch.zeros(1, 1, requires_grad=True)  # a matrix, because some optimizers take nothing else
    number.grad = torch.zeros(1, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its rank is 1
            probe = type(optimizer)([number], **optimizer.defaults)
        probe.step()
    except Exception:  # unknown before the first step if the optimizer cannot be built from its defaults
        return True
    return key in probe.state[number]
