"""Refusing what cannot work, before the first batch, in words that say what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_grad.functional.choices import check_choice as check_choice

# Asked by name along the class hierarchy, so that both namespaces of Lightning and derived strategies are met.
SHARDED_STRATEGIES = {
    "FSDPStrategy": "FSDP",
    "DeepSpeedStrategy": "DeepSpeed",
    "ModelParallelStrategy": "FSDP2 and tensor parallelism",
}

_LONGEST_NAME = 100  # bytes; file systems end at 255, and an epoch, a layer and an ending are added


def check_at_least(value: float, least: float, parameter: str) -> float:
    """Return a number that must be at least ``least``.

    Raises:
        ValueError: If it is smaller, or no number.
    """
    if not value >= least:
        raise ValueError(f"{parameter} must be at least {least}; got {value}.")
    return value


def check_count(value: int, least: int, parameter: str) -> int:
    """Return a count that must be at least ``least``. The annotation of the argument makes sure that it is whole.

    Raises:
        ValueError: If it is smaller.

    Example:
        >>> window = check_count(5, 1, "window")
    """
    if value < least:
        raise ValueError(f"{parameter} must be at least {least}, and whole; got {value}.")
    return value


def check_position(value: int | None, parameter: str) -> int | None:
    """Return a number that must count from 0 which of several is meant, or be ``None``.

    Raises:
        ValueError: If it does not.
    """
    return None if value is None else check_count(value, 0, parameter)


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


def check_above(value: float, bound: float, parameter: str) -> float:
    """Return a number that must be above ``bound``; infinity is.

    Raises:
        ValueError: If it is not, or no number.
    """
    if not value > bound:
        raise ValueError(f"{parameter} must be above {bound:g}; got {value}.")
    return value


def check_finite(value: float, parameter: str) -> float:
    """Return a number that must be finite.

    Raises:
        ValueError: If it is infinite, or no number.

    Example:
        >>> check_finite(float("inf"), "eta")
        Traceback (most recent call last):
        ValueError: eta must be finite; got inf.
    """
    if not math.isfinite(value):
        raise ValueError(f"{parameter} must be finite; got {value}.")
    return value


def check_finite_at_least(value: float, least: float, parameter: str) -> float:
    """Return a number that must be finite, and at least ``least``.

    Raises:
        ValueError: If it is not.
    """
    return check_finite(check_at_least(value, least, parameter), parameter)


def check_finite_above(value: float, bound: float, parameter: str) -> float:
    """Return a number that must be finite, and above ``bound``.

    Raises:
        ValueError: If it is not.
    """
    return check_finite(check_above(value, bound, parameter), parameter)


def check_count_between(value: int, least: int, most: int, parameter: str) -> int:
    """Return a count that must be in a range, its ends included.

    Raises:
        ValueError: If it is not.
    """
    check_count(value, least, parameter)
    if value > most:
        raise ValueError(f"{parameter} must be at most {most}; got {value}.")
    return value


def check_between(value: float, least: float, most: float, parameter: str) -> float:
    """Return a number that must be in a range, its ends included.

    Raises:
        ValueError: If it is outside, or no number.
    """
    if not least <= value <= most:
        raise ValueError(f"{parameter} must be from {least:g} to {most:g}; got {value}.")
    return value


def check_share(value: float, parameter: str) -> float:
    """Return a number that must be a share that leaves something: at least 0 and below 1.

    Raises:
        ValueError: If it is not.
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{parameter} must be at least 0 and below 1; got {value}.")
    return value


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


def _sharding(trainer: pl.Trainer) -> str | None:
    """Return the class name of the sharding strategy that the trainer's derives from, if it does."""
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    return next((name for name in names if name in SHARDED_STRATEGIES), None)


def is_sharded(trainer: pl.Trainer) -> bool:
    """Say whether the strategy shards parameters, so that its ranks must run the module together."""
    return _sharding(trainer) is not None


def refuse_sharded(trainer: pl.Trainer, technique: str) -> None:
    """Raise if the strategy shards parameters, so that no rank sees a whole weight.

    Raises:
        ValueError: For FSDP, FSDP2 and DeepSpeed.
    """
    sharding = _sharding(trainer)
    if sharding is not None:
        raise ValueError(
            f"{technique} needs whole weights, and {SHARDED_STRATEGIES[sharding]} ({type(trainer.strategy).__name__}) "
            "shards them. Train with strategy='ddp' or on one device."
        )


def refuse_deepspeed(trainer: pl.Trainer, technique: str) -> None:
    """Raise if the DeepSpeed engine owns the gradients.

    Raises:
        ValueError: For DeepSpeed.
    """
    if _sharding(trainer) == "DeepSpeedStrategy":
        raise ValueError(
            f"{technique} works on gradients, and under DeepSpeed ({type(trainer.strategy).__name__}) the engine owns them. "
            "Train with strategy='ddp' or ModelParallelStrategy, or clip in DeepSpeed's own config."
        )


def refuse_flat_shards(trainer: pl.Trainer, technique: str) -> None:
    """Raise if each rank sees flat pieces of gradients only, without the shape and the norm of any.

    Raises:
        ValueError: For FSDP1.
    """
    if _sharding(trainer) == "FSDPStrategy":
        raise ValueError(
            f"{technique} needs gradients in their own shapes, and under FSDP1 ({type(trainer.strategy).__name__}) a rank "
            "sees flat shards of them. Use ModelParallelStrategy with fully_shard (FSDP2), whose gradients are DTensors."
        )


def refuse_manual_optimization(pl_module: pl.LightningModule, technique: str, why: str) -> None:
    """Raise if the module steps its optimizers itself.

    Raises:
        ValueError: Under manual optimization.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(f"{technique} does not work with manual optimization: {why}")


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


def refuse_sparse_gradients(module: nn.Module, chosen: set[int], technique: str) -> None:
    """Raise if a parameter will have a sparse gradient.

    Args:
        module: Whose embeddings are looked at.
        chosen: Identities of the parameters that matter.
        technique: Who asks, for the error.

    Raises:
        ValueError: For a chosen ``Embedding(sparse=True)`` or ``EmbeddingBag(sparse=True)``.
    """
    for name, child in module.named_modules():
        if getattr(child, "sparse", False) is True and any(id(p) in chosen for p in child.parameters(recurse=False)):
            raise ValueError(
                f"{technique} needs dense gradients, and {type(child).__name__} {name!r} makes sparse ones. Build it with "
                f"sparse=False, or leave it out: exclude=[{name!r}]."
            )


def refuse_complex(module: nn.Module, chosen: set[int], technique: str) -> None:
    """Raise if a parameter holds complex numbers, which have no order.

    Raises:
        ValueError: For a chosen parameter of a complex type.
    """
    for name, parameter in module.named_parameters():
        if id(parameter) in chosen and parameter.is_complex():
            raise ValueError(
                f"{technique} compares entries, and those of {name!r} are complex. Leave it out: exclude=[{name!r}]."
            )


def owned_ids(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer moves."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def check_keeps(optimizer: Optimizer, key: str, technique: str, message: str) -> None:
    """Raise before the first step if an optimizer will keep no state of a name.

    Args:
        optimizer: Which has not stepped yet, perhaps.
        key: The name, such as ``exp_avg_sq``.
        technique: Who asks, for the error.
        message: What follows the technique's name in the error, with ``{}`` for the optimizer's class.

    Raises:
        ValueError: If a copy of it that steps one number keeps none.
    """
    number = torch.zeros(1, requires_grad=True)
    number.grad = torch.zeros(1)
    try:
        probe = type(optimizer)([number], **optimizer.defaults)
        probe.step()
    except Exception:  # an optimizer that cannot be built from its defaults tells nothing before its first step
        return
    if key not in probe.state[number]:
        raise ValueError(f"{technique} {message.format(type(optimizer).__name__)}")
