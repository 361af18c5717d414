"""An optimizer whose matrices move by another class, in place of one of the module's.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_grad.callbacks.optimizers._matrices import Choice
from lightning_grad.callbacks.optimizers._names import Make
from lightning_grad.callbacks.optimizers._options import name_of
from lightning_grad.callbacks.optimizers._rates import rates_in_words
from lightning_grad.core.steps.chosen_rates import base_rate
from lightning_grad.optimizers import Part, PartedOptimizer


def part_optimizer(
    display_name: str,
    make: Make,
    options: Mapping[str, Any],
    factors: tuple[float | None, float | None],
    old: Optimizer,
    choice: Choice,
    schedulers: Iterable[Any],
) -> tuple[PartedOptimizer, list[str]]:
    """Create an optimizer that moves chosen matrices of an optimizer by another class.

    Args:
        display_name: Name of the callback, for errors.
        make: The other class.
        options: Its options; a weight decay counts for all matrices.
        factors: Factors of the rates and of the weight decays of the matrices.
        old: The module's optimizer.
        choice: The matrices.
        schedulers: Schedulers of the run. If one cycles the momentum of the optimizer, the matrices follow.

    Returns:
        tuple: The optimizer, and what its class warned of.

    Raises:
        ValueError: If the class cannot be created for these matrices.
    """
    given, (lr_factor, wd_factor) = dict(options), factors
    part = Part(
        choice.chosen,
        make,
        given,
        lr_factor=1.0 if lr_factor is None else lr_factor,
        wd_factor=1.0 if wd_factor is None else wd_factor,
        weight_decay=given.pop("weight_decay", None),
        cycle_momentum=any(getattr(each, "cycle_momentum", False) and each.optimizer is old for each in schedulers),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            new = PartedOptimizer(old, [part])
        except Exception as error:
            raise ValueError(
                f"{display_name} cannot create {name_of(make)} for matrices of {type(old).__name__}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return new, [str(each.message) for each in said]


def parted_words(new: PartedOptimizer, choice: Choice, old: Optimizer, lr_factor: float | None) -> str:
    """Return what moves by which class, for the first line of the fit, with the base rates of schedules."""
    moved, factor = new.parts[0], 1.0 if lr_factor is None else lr_factor
    bases = [base_rate(new.param_groups[new.group_of(moved, index)]) for index in range(len(moved.param_groups))]
    groups = [{**group, "lr": base * factor} for group, base in zip(moved.param_groups, bases, strict=True)]
    return f"{type(moved).__name__} for {choice.words()} of {type(old).__name__} ({rates_in_words(groups)})"
