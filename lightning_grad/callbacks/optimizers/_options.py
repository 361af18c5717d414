"""Checks the options of an optimizer, and creates it from the groups of another one.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_grad.callbacks.optimizers._names import Make
from lightning_grad.functional.choices import hint_for

_FROM_THE_MODULE = {"lr": "lr_factor", "weight_decay": "wd_factor"}


def as_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return options as a plain dictionary, with tuples for lists."""
    return {name: _plain(value) for name, value in (options or {}).items()}


def _plain(value: Any) -> Any:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(_plain(item) for item in value) if is_list else value


def check_options(options: Mapping[str, Any], make: Make) -> None:
    """Raise if an option is not a named parameter of the constructor; libraries swallow others with ``**kwargs``.

    Raises:
        ValueError: For such an option, and for rates and decays, which come from the module.

    Example:
        >>> import torch
        >>> check_options({"beta": (0.9, 0.99)}, torch.optim.AdamW)
        Traceback (most recent call last):
        ValueError: options: AdamW has no option 'beta'. Did you mean 'betas'? It has amsgrad, betas, capturable, \
differentiable, eps, foreach, fused, maximize.
    """
    for name, factor in _FROM_THE_MODULE.items():
        if name in options:
            raise ValueError(
                f"options must not hold {name!r}, because each parameter group keeps its own. Set {factor}, which "
                "multiplies it."
            )
    known = sorted(named_parameters(make))
    for name in options:
        if name not in known:
            kind = class_of(make)
            raise ValueError(
                f"options: {getattr(kind, '__name__', kind)} has no option {name!r}.{hint_for(name, known)} It has "
                f"{', '.join(known)}."
            )


def named_parameters(make: Make) -> dict[str, Any]:
    """Return the constructor's parameters that are options, each with its default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(make).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in variadic and p.name not in _FROM_THE_MODULE}


def class_of(make: Make) -> Any:
    """Return the class behind partial functions, or the function that is not a class."""
    while isinstance(make, functools.partial):
        make = make.func
    return make


def own_options(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options with which an optimizer was constructed, as far as it keeps them under their names."""
    held = {**vars(optimizer), **optimizer.defaults}
    return {name: held[name] for name in named_parameters(type(optimizer)) if name in held}
