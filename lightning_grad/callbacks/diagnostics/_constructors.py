"""Tensor classes of other libraries, constructed while ``LogitProbe`` watches.

Used by ``gradient_monitor.py``. torch makes an object of a derived class from a tensor that no Python object wraps yet. A
dispatch mode wraps every result, so ``super().__new__(cls, tensor)`` fails under it ("already associated to a python
object"). Such constructors therefore run outside of the mode.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NOT_CONSTRUCTED = (
    "Creating a new Tensor subclass"  # how torch's error begins where a class has no constructor of its own
)


@contextmanager
def constructors_unwatched() -> Iterator[None]:
    """Run constructors of classes derived from ``Tensor`` outside of dispatch modes."""
    originals = [(cls, vars(cls)["__new__"]) for cls in _derived(Tensor) if _constructs_itself(cls)]
    try:
        for cls, original in originals:
            cls.__new__ = staticmethod(_unwatched(original.__func__))
        yield
    finally:
        for cls, original in originals:
            cls.__new__ = original


def _derived(cls: type) -> set[Any]:
    direct: set[Any] = set(cls.__subclasses__())
    return direct.union(*map(_derived, direct))


def _constructs_itself(cls: Any) -> bool:
    """Return True for a class with a constructor of its own, unless it is torch's or made for dispatch modes."""
    is_torchs = cls.__module__.partition(".")[0] == "torch"
    is_plain = cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    return not is_torchs and is_plain and isinstance(vars(cls).get("__new__"), staticmethod)


def _unwatched(constructor: Any) -> Any:
    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            return constructor(*args, **kwargs)

    return construct
