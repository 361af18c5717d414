"""Refusing what cannot work, before the first batch, in words that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

# Asked by name along the class hierarchy, so that both namespaces of Lightning and derived strategies are met.
SHARDED_STRATEGIES = {
    "FSDPStrategy": "FSDP",
    "DeepSpeedStrategy": "DeepSpeed",
    "ModelParallelStrategy": "FSDP2 and tensor parallelism",
}


def check_choice(value: Any, choices: Iterable[str], parameter: str) -> None:
    """Raise unless a value is one of the choices; a near miss is suggested.

    Raises:
        ValueError: If it is none.

    Example:
        >>> check_choice("sr-st", ["ste", "sr-ste"], "recipe")
        Traceback (most recent call last):
        ValueError: recipe='sr-st' is none of 'ste', 'sr-ste'. Did you mean 'sr-ste'?
    """
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{parameter}={value!r} is none of {', '.join(map(repr, known))}.{hint}")


def check_at_least(value: float, least: float, parameter: str) -> None:
    """Raise unless a number is at least ``least``.

    Raises:
        ValueError: If it is smaller, or no number.
    """
    if not value >= least:
        raise ValueError(f"{parameter} must be at least {least}; got {value}.")


def refuse_sharded(trainer: pl.Trainer, technique: str) -> None:
    """Raise if the strategy shards parameters, so that no rank sees a whole weight.

    Raises:
        ValueError: For FSDP, FSDP2 and DeepSpeed.
    """
    for cls in type(trainer.strategy).__mro__:
        if cls.__name__ in SHARDED_STRATEGIES:
            raise ValueError(
                f"{technique} needs whole weights, and {SHARDED_STRATEGIES[cls.__name__]} ({type(trainer.strategy).__name__}) "
                "shards them. Train with strategy='ddp' or on one device."
            )


def gradients_are_scaled(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Say whether callbacks see gradients times the loss scale: a fused optimizer unscales inside its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def refuse_scaled_gradients(trainer: pl.Trainer, optimizer: Optimizer, technique: str) -> None:
    """Raise if gradients are still multiplied by the loss scale when callbacks see them.

    Raises:
        ValueError: For a fused optimizer together with an fp16 GradScaler.
    """
    if gradients_are_scaled(trainer, optimizer):
        raise ValueError(
            f"{technique} reads gradients, and the fused {type(optimizer).__name__} leaves them multiplied by the "
            "fp16 loss scale. Use fused=False, or precision='bf16-mixed'."
        )


def owned_ids(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer moves."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
