"""Options of an optimizer class: reads them, and checks them against the constructor.

Used only by :class:`lightning_grad.callbacks.OptimizerSwap`.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_grad.callbacks.optimizers._names import Make
from lightning_grad.functional.choices import hint_for
from lightning_grad.utilities.checks import check_finite, check_finite_at_least

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def as_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as a plain dictionary, with tuples for lists."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(_plain(item) for item in value) if is_list else value


def check_options(options: Mapping[str, Any], make: Make) -> None:
    """Raise if an option is not a named parameter of the constructor. Some libraries accept any name silently.

    Raises:
        ValueError: For such an option, and for the rate, which comes from the module.

    Example:
        >>> import torch
        >>> check_options({"beta": 0.9}, torch.optim.AdamW)
        Traceback (most recent call last):
        ValueError: options must be those of AdamW; got {'beta': 0.9}. Did you mean 'betas'? It has amsgrad, betas, \
capturable, differentiable, eps, foreach, fused, maximize, weight_decay.
    """
    known = sorted(defaults_of(class_of(make)))
    for name in options:
        if name == "lr":
            raise ValueError(
                f"options must not hold 'lr', because each parameter group keeps its own rate; got {options['lr']!r}. "
                "Set lr_factor, which multiplies the rates."
            )
        if name not in known:
            raise ValueError(
                f"options must be those of {name_of(make)}; got {dict(options)!r}.{hint_for(name, known)} It has "
                f"{', '.join(known) or 'none'}."
            )


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raise for a number that is infinite, and for a negative one outside of a list.

    Raises:
        ValueError: Names the option.

    Example:
        >>> check_numbers({"momentum": -0.5})
        Traceback (most recent call last):
        ValueError: options: momentum must be at least 0; got -0.5.
    """
    for name, value in options.items():
        for number in value if isinstance(value, tuple) else ():
            if isinstance(number, float):
                check_finite(number, f"options: {name}")
        if isinstance(value, (int, float)):
            check_finite_at_least(value, 0, f"options: {name}")


def try_options(make: Make, options: Mapping[str, Any]) -> None:
    """Raise if a class of optimizers of matrices does not take the values of options.

    Raises:
        ValueError: With the error of the class.
    """
    tall = torch.nn.Parameter(torch.empty(2**20, 1, device="meta"))  # no memory; room for a small share of its rows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its rank is 1
            make([tall], **options)
    except Exception as error:
        raise ValueError(f"{name_of(make)} does not take options={dict(options)!r}: {error}") from error


def defaults_of(make: Make) -> dict[str, Any]:
    """Return the options of a constructor, each with its default: all named parameters except the rate."""
    parameters = list(inspect.signature(make).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in _VARIADIC and p.name != "lr"}


def class_of(make: Make) -> Any:
    """Return the class behind partial functions, or the function if there is no class."""
    while isinstance(make, functools.partial):
        # LightningCLI passes the class as an argument of a function that creates it.
        make = next((given for given in make.args if _is_optimizer(given)), make.func)
    return make


def _is_optimizer(given: Any) -> bool:
    return isinstance(given, type) and issubclass(given, Optimizer)


def name_of(make: Make) -> str:
    """Return the name of a class or function, for messages."""
    return getattr(class_of(make), "__name__", repr(make))


def own_options(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options that an optimizer was created with, as far as it stores them under their names."""
    stored = {**vars(optimizer), **optimizer.defaults}
    return {name: stored[name] for name in defaults_of(type(optimizer)) if name in stored and name != "weight_decay"}


def given_value(optimizer: Optimizer, name: str) -> Any:
    """Return an option that a function created an optimizer with, or ``None`` if it is the default of the class."""
    parameter = inspect.signature(type(optimizer)).parameters.get(name)
    value = optimizer.defaults.get(name)
    return None if parameter is None or value == parameter.default else value
