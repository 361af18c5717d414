"""Putting random streams back after data was read or a module was run: the global ones, and those that objects hold."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_FEW = 100  # data sets or transforms in a list; the samples themselves are more


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Put back the states of the global generators of Python, numpy and torch, on the CPU and on CUDA."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def generators_kept(holder: Any) -> Iterator[None]:
    """Put back the state of random generators that a data set or a function, or what it is made of, has of its own."""
    undo = [_way_back(generator) for generator in _generators_of(holder)]
    try:
        yield
    finally:
        for step in undo:
            step()


def holds_generators(holder: Any) -> bool:
    """Return whether an object or a function has random generators of its own."""
    return next(_generators_of(holder), None) is not None


def seed_generators(holder: Any, seed: int, depth: int = 4) -> None:
    """Seed the random generators that an object or a function has of its own.

    Args:
        holder: The object or function.
        seed: The seed.
        depth: How far to look: 1 for its own attributes only.
    """
    for generator in _generators_of(holder, depth):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:
            generator.seed(seed)


def _way_back(generator: Any) -> Callable[[], None]:
    if isinstance(generator, np.random.Generator):
        state = copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, random.Random):
        python = generator.getstate()
        return lambda: generator.setstate(python)
    other = generator.get_state()
    return lambda: generator.set_state(other)


def _generators_of(holder: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(holder, _GENERATORS):
        yield holder
    elif depth:
        for part in _parts_of(holder):
            yield from _generators_of(part, depth - 1)


def _parts_of(holder: Any) -> list[Any]:
    if isinstance(holder, (list, tuple)):
        return list(holder) if len(holder) <= _FEW else []
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values()]
    if isinstance(holder, MethodType):
        return [holder.__self__]
    if isinstance(holder, FunctionType):
        cells = [cell.cell_contents for cell in holder.__closure__ or () if cell != CellType()]
        return [*cells, *(holder.__defaults__ or ())]
    if hasattr(holder, "__dict__") and not isinstance(holder, (type, ModuleType)):
        return list(vars(holder).values())
    return []
