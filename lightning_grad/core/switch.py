"""``LIGHTNING_GRAD_DISABLE=1``: the run without any technique, to find out whether one of them causes a problem."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.utilities.checks import check_choice

VARIABLE = "LIGHTNING_GRAD_DISABLE"

_known: set[str] = set()


class Switchable:
    """A callback or strategy that the environment variable turns off.

    ``LIGHTNING_GRAD_DISABLE=1`` turns all of them off, ``LIGHTNING_GRAD_DISABLE=ZClip,DataPruning`` those of these classes
    and of classes derived from them. The variable is read when a run begins.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _known.add(cls.__name__)

    @property
    def display_name(self) -> str:
        """The class and the name of this instance."""
        raise NotImplementedError

    def switch_off(self, trainer: pl.Trainer) -> None:
        """Take no part in the run that begins, and come back when it ends, however it ends."""
        raise NotImplementedError


def is_switched_off(technique: Switchable, trainer: pl.Trainer) -> bool:
    """Turn off what the environment variable names, all at once, and return whether this technique is among it.

    Called first in ``setup``, before any technique looks at the Trainer and the others.

    Raises:
        ValueError: If the variable names a class that does not exist.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value in ("", "0"):
        return False
    names = [name.strip() for name in value.split(",")] if value != "1" else [Switchable.__name__]
    for name in names:
        check_choice(name, sorted({*_known, Switchable.__name__}), VARIABLE)
    everybody = (*trainer.callbacks, trainer.strategy)  # type: ignore[attr-defined]
    off = [one for one in everybody if isinstance(one, Switchable) and _is_named(one, names)]
    if off:
        rank_zero_warn(
            f"{VARIABLE}={value} turns off {', '.join(one.display_name for one in off)}. Unset it to use them again."
        )
    for one in off:
        one.switch_off(trainer)
    return any(one is technique for one in off)


def _is_named(technique: Switchable, names: list[str]) -> bool:
    return any(cls.__name__ in names for cls in type(technique).__mro__)


def unless_switched_off(setup: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``setup`` of a callback, which is skipped if the callback is turned off."""

    @wraps(setup)
    def checked(self: Any, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if not is_switched_off(self, trainer):
            setup(self, trainer, *args, **kwargs)

    return checked


class SwitchedOff(Callback):
    """Stand in a Trainer's list of callbacks for a technique that is turned off, until the run ends.

    Args:
        technique: The callback whose place this takes.
    """

    def __init__(self, technique: Any) -> None:
        self.technique = technique

    @property
    @override
    def state_key(self) -> str:  # so Lightning does not ask for the callback whose state a checkpoint holds
        return str(self.technique.state_key)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        replace(trainer, self, self.technique)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Checkpoint callbacks still save after this hook, and the technique has no part in their files.
        def last(inner: Callable[..., Any], *args: Any) -> None:
            unwrap()
            replace(trainer, self, self.technique)
            inner(*args)

        unwrap = wrap_method(trainer.strategy, "on_exception", last)


def replace(trainer: pl.Trainer, old: Callback, new: Callback) -> None:
    """Put one callback in the place of another, in the list that Lightning may be going through."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [new if callback is old else callback for callback in callbacks]
