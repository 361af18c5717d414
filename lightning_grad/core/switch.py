"""``LIGHTNING_GRAD_DISABLE=1`` runs without any technique, to find out whether one of them causes a problem."""

import os
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.utilities.checks import check_choice

VARIABLE = "LIGHTNING_GRAD_DISABLE"


class Switchable:
    """A callback or strategy that the environment variable can turn off.

    ``LIGHTNING_GRAD_DISABLE=1`` turns all of them off. ``LIGHTNING_GRAD_DISABLE=ZClip,DataPruning``
    turns off instances of these classes and of their subclasses. The variable is read when a run
    begins.
    """

    @property
    def display_name(self) -> str:
        """Class and name of this instance."""
        raise NotImplementedError

    def switch_off(self, trainer: pl.Trainer) -> None:
        """Take no part in the run that begins; return when it ends, even with an exception."""
        raise NotImplementedError


def is_switched_off(technique: Switchable, trainer: pl.Trainer) -> bool:
    """Turn off everything that the environment variable names; return True if this technique is turned off.

    ``setup`` calls it first, before any technique inspects the Trainer and the other callbacks.

    Raises:
        ValueError: If the variable names a class that does not exist.
    """
    candidates = (*trainer.callbacks, trainer.strategy)  # type: ignore[attr-defined]
    off = [one for one in candidates if isinstance(one, Switchable) and is_named(type(one))]
    if off:
        given, listed = os.environ[VARIABLE], ", ".join(one.display_name for one in off)
        rank_zero_warn(f"{VARIABLE}={given} turns off {listed}. Unset it to use them again.")
    for one in off:
        one.switch_off(trainer)
    return any(one is technique for one in off)


def is_named(technique: type) -> bool:
    """Return True if the environment variable names a class or one of its bases."""
    names = _names()
    return any(cls.__name__ in names for cls in technique.__mro__)


def _names() -> list[str]:
    """Return the names of the classes that the environment variable turns off."""
    given = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    names = [Switchable.__name__ if name == "1" else name for name in given if name not in ("", "0")]
    if not names:
        return []
    import_module("lightning_grad.callbacks")  # else a class that this program does not import would be unknown
    classes = _subclasses(Switchable)
    for name in set(names) - {cls.__name__ for cls in classes}:
        check_choice(name, ["1", *sorted(cls.__name__ for cls in classes if not _is_internal(cls))], VARIABLE)
    return names


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _is_internal(cls: type) -> bool:
    return cls.__module__.startswith("lightning_grad.core.") or "._" in cls.__module__


def unless_switched_off(setup: Callable[..., None]) -> Callable[..., None]:
    """Wrap a callback's ``setup``: it is skipped if the callback is turned off."""

    @wraps(setup)
    def checked(self: Any, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if not is_switched_off(self, trainer):
            setup(self, trainer, *args, **kwargs)

    return checked
